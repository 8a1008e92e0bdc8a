"""Caption tables as DreamLIP publishes them for CC3M and CC12M: of each picture the raw caption,
and six captions of three models.
"""

from __future__ import annotations

import csv
import io
import itertools
import re
from collections import deque
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from modelchain.errors import InputError
from modelchain_data.digits import SourceRow

COLUMNS = ("picture", "raw", "shortIB", "longIB", "shortSV", "longSV", "shortLLA", "longLLA")
MAX_CAPTIONS = 16  # the raw one and 15 sentences, as in the paper
MAX_LINES = 1000  # of a caption in quotes
# White space after a full stop (not that of a title or an initial) and before a capital or a digit.
_SENTENCE_END = re.compile(
    r"(?<=[.!?])(?<!\b[A-Z]\.)(?<!\b[MD]r\.)(?<!\bMrs\.)(?<!\bSt\.)\s+(?=[\"'(]?[A-Z0-9])"
)
_NOT_UTF8 = re.compile("[\ud800-\udfff]")


def read_table(path: Path, captions: Sequence[str] | None = None) -> Iterator[SourceRow]:
    """The rows of a table in order. A row's key is the number of its line.

    Args:
        captions: the columns whose captions are taken, by their names in the header or those of
            COLUMNS; None: all.
    Raises:
        InputError: before the first row; no such file or column, or not 8 columns.
    """
    if not path.is_file():
        raise InputError("no such file", file=path)
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="\n") as file:
        head = next(file, "")
        delimiter = "," if "\t" not in head and head.count(",") >= len(COLUMNS) - 1 else "\t"
        lines = _lines(itertools.chain([head], file), delimiter)
        _, header = next(lines)
        if len(header) != len(COLUMNS):
            message = (
                f"must have {len(COLUMNS)} columns separated by tabs, not {len(header)}"
                " (nor are they by commas)"
            )
            raise InputError(message, file=path)
        chosen = _chosen(header, captions, path)
        for number, fields in lines:
            yield _row(path, number, fields, chosen)


def _chosen(header: list[str], names: Sequence[str] | None, path: Path) -> list[int]:
    """The numbers of the named columns, in the table's order."""
    known = {name.lower(): number for number, name in enumerate(COLUMNS) if number}
    known |= {name.strip().lower(): number for number, name in enumerate(header) if number}
    for name in names or ():
        if name.strip().lower() not in known:
            has = ", ".join(f"{COLUMNS[n]} (here {header[n]!r})" for n in range(1, len(COLUMNS)))
            raise InputError(
                f"has no captions called {name.strip()!r}, but {has}", file=path, field="--captions"
            )
    return sorted(
        {known[name.strip().lower()] for name in names} if names else range(1, len(COLUMNS))
    )


def _row(path: Path, number: int, fields: list[str], chosen: list[int]) -> SourceRow:
    name = fields[0] if fields else ""
    texts = []
    fault = None
    if len(fields) != len(COLUMNS):
        fault = f"is no row of {len(COLUMNS)} columns"
    elif any(_NOT_UTF8.search(fields[column]) for column in chosen):
        fault = "a caption is not UTF-8"
    else:
        raw = fields[1] if 1 in chosen else ""
        texts = captions_of(raw, *(fields[column] for column in chosen if column > 1))
    read = partial(_refuse, fault) if fault else (path.parent / name).read_bytes
    shown = name.encode(errors="replace").decode()
    return SourceRow(f"{number:09d}", f"line {number} ({shown:.100})", read, {"captions": texts})


def _refuse(fault: str) -> bytes:
    raise ValueError(fault)


def captions_of(raw: str, *others: str) -> list[str]:
    """The raw caption, then sentences of the others in order, at most sixteen in all, without empty
    ones.

    If there are more, sentences are taken from each caption in turn, from its beginning on, so that
    every source has an equal share.
    """
    first = [text for text in [raw.strip()] if re.search(r"\w", text)]
    split = [
        [text.strip() for text in _SENTENCE_END.split(other) if re.search(r"\w", text)]
        for other in others
    ]
    in_turn = sorted(
        (turn, column) for column, sentences in enumerate(split) for turn in range(len(sentences))
    )
    kept = sorted((column, turn) for turn, column in in_turn[: MAX_CAPTIONS - len(first)])
    return first + [split[column][turn] for column, turn in kept]


def _lines(file: Iterator[str], delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Line number and fields of each row.

    In the published tables quotes mean nothing, and some are never closed. In tables by a csv
    writer they enclose fields. So quotes are taken to enclose fields if a csv writer would write
    the row exactly so, or if the row takes several lines of which none is a row by itself.
    """
    ahead: deque[str] = deque()
    number = 0
    while (line := ahead.popleft() if ahead else next(file, None)) is not None:
        number += 1
        plain = line.rstrip("\r\n").split(delimiter)
        fields, more = plain, 0
        if delimiter == "," or any(field.startswith('"') for field in plain):
            fields, more = _quoted(line, ahead, file, delimiter)
            if len(fields) != len(COLUMNS):
                fields, more = plain if delimiter == "\t" else plain[:1], 0
            elif (
                delimiter == "\t"
                and len(plain) == len(COLUMNS)
                and not more
                and not _as_written(fields, line)
            ):
                fields = plain
        yield number, fields
        for _ in range(more):
            ahead.popleft()
        number += more


def _quoted(
    line: str, ahead: deque[str], file: Iterator[str], delimiter: str
) -> tuple[list[str], int]:
    """The fields of the csv row that begins with `line`, and how many more lines it takes. There
    are no fields if it is not a csv row.

    Lines that had to be read are left in `ahead`.
    """
    more = 0

    def lines() -> Iterator[str]:
        nonlocal more
        yield line
        while more < MAX_LINES:
            if more == len(ahead):
                ahead.extend(itertools.islice(file, 1))
            if more == len(ahead) or (
                delimiter == "\t" and ahead[more].count("\t") == len(COLUMNS) - 1
            ):
                return
            more += 1
            yield ahead[more - 1]

    try:
        fields = next(csv.reader(lines(), delimiter=delimiter, strict=True))
    except csv.Error:
        return [], 0
    return fields, more


def _as_written(fields: list[str], line: str) -> bool:
    for quoting in (csv.QUOTE_MINIMAL, csv.QUOTE_ALL):
        text = io.StringIO()
        csv.writer(text, delimiter="\t", quoting=quoting).writerow(fields)
        if text.getvalue().rstrip("\r\n") == line.rstrip("\r\n"):
            return True
    return False
