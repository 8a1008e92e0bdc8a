"""Caption tables: their rows, the captions that are taken, and what is refused with its line."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from modelchain.errors import InputError
from modelchain_data.index import open_set
from modelchain_data.pack import pack
from modelchain_data.table import captions_of, read_table

HEADER = [
    "Image Path",
    "raw_caption",
    "shortIB",
    "longIB",
    "shortSV",
    "longSV",
    "shortLLA",
    "longLLA",
]


def picture(form: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 20, 3), np.uint8)).save(
        buffer, form
    )
    return buffer.getvalue()


def _samples(shard: Path) -> list[dict[str, bytes]]:
    return list(webdataset.WebDataset(str(shard), shardshuffle=False))


def test_sentences() -> None:
    text = (
        'A dog runs. Mr. Smith of St. Ives, J. R. by name, paid 3.50 for it!  "Good," he said. It'
        " is no. 7 etc. of 9"
    )
    assert captions_of("raw one. Not split.", "", " ", text, "?!", "last") == [
        "raw one. Not split.",
        "A dog runs.",
        "Mr. Smith of St. Ives, J. R. by name, paid 3.50 for it!",
        '"Good," he said.',
        "It is no.",
        "7 etc. of 9",
        "last",
    ]
    assert captions_of("", "One. Two.") == ["One.", "Two."]
    assert len(captions_of("raw", *(f"A {i}. B {i}. C {i}." for i in range(6)))) == 16


def table(folder: Path, rows: list[str]) -> Path:
    header = "Image Path\traw_caption\tshortIB\tlongIB\tshortSV\tlongSV\tshortLLA\tlongLLA"
    path = folder / "cc3m.csv"
    path.write_bytes("\n".join([header, *rows, ""]).encode())
    return path


def test_a_dreamlip_table(tmp_path: Path) -> None:
    (tmp_path / "img").mkdir()
    for name in ("0.jpg", "1.png", "2.jpg", "no-suffix"):
        (tmp_path / "img" / name).write_bytes(picture(form="PNG" if name == "1.png" else "JPEG"))
    rows = [
        (
            "img/0.jpg\traw cat\tA cat.\tA cat sits. It is red.\t\t \tA pet.\tThe cat looks at us."
            " The end.\r"
        ),
        # csv would swallow tabs and lines here
        'img/1.png\t"a quote that never ends\tShort.\t"Another. One\t\t\t\t',
        'img/2.jpg\the said "hi"\t\t\t\t\t\tüber "all".',
        "img/no-suffix\t\t\t\t\t\tOne.\t",
    ]
    report = pack(table(tmp_path, rows), tmp_path / "out")
    assert (report[0].name, report[0].samples, report[0].skipped) == ("train", 4, 0)
    found = [
        json.loads(s["json"])["captions"] for s in _samples(tmp_path / "out" / "train-000000.tar")
    ]
    assert found == [
        [
            "raw cat",
            "A cat.",
            "A cat sits.",
            "It is red.",
            "A pet.",
            "The cat looks at us.",
            "The end.",
        ],
        ['"a quote that never ends', "Short.", '"Another.', "One"],
        ['he said "hi"', 'über "all".'],
        ["One."],
    ]
    data = open_set([tmp_path / "out" / "train-000000.tar"], tmp_path / "cache")
    assert data.keys == ["000000002", "000000003", "000000004", "000000005"] and data.picture(
        1
    ) == picture(form="PNG")


def test_bad_rows_of_a_table_are_counted_and_named(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(picture())
    good = "a.jpg\traw" + "\t" * 6
    bad = [
        "gone.jpg\traw" + "\t" * 6,
        "a.jpg\traw",
        "a.jpg" + "\t" * 7,
        "\traw" + "\t" * 6,
        "a\0b\traw" + "\t" * 6,
        "",
    ]
    for number, row in enumerate(bad):
        with pytest.raises(
            InputError, match=r"1 of 2 rows are unusable, at most 0 may be; the first is line 3 \("
        ):
            pack(table(tmp_path, [good, row]), tmp_path / f"out{number}")
    report = pack(table(tmp_path, [good] * 2995 + bad[:3] + [good, good]), tmp_path / "out")
    assert (report[0].samples, report[0].skipped) == (2997, 3)


LONG = 'He said "hi". A second one.\n\nAnother paragraph.\tWith a tab'
ROWS = [
    ["0.jpg", "plain", "A cat.", "", "", "", "", ""],
    ["1.jpg", 'the "best", they say', LONG, "x", "", "", "", ""],
    ["2.jpg", '"all of it"', "", "", "", "", "", "Only.\n\nThe last column."],
    ["3.jpg", "with, commas", "", "", "one\ntwo", "", "", 'ends with a quote "'],
    ["4.jpg", '"', "", '"begins', "", "", "", "\r\n"],
]


@pytest.mark.parametrize("delimiter", ["\t", ","])
@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC])
@pytest.mark.parametrize("end", ["\r\n", "\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_a_table_by_a_csv_writer(
    tmp_path: Path, delimiter: str, quoting: int, end: str, mark: str
) -> None:
    text = io.StringIO()
    csv.writer(text, delimiter=delimiter, quoting=quoting, lineterminator=end).writerows(
        [HEADER, *ROWS * 2]
    )
    (tmp_path / "t.csv").write_bytes((mark + text.getvalue()).encode())
    found = list(read_table(tmp_path / "t.csv"))
    assert [row.meta["captions"] for row in found] == [captions_of(*row[1:]) for row in ROWS * 2]
    assert [row.where.partition("(")[2] for row in found] == [f"{row[0]})" for row in ROWS * 2]
    lines = [int(row.key) for row in found]
    assert lines == sorted(set(lines)) and lines[:3] == [2, 3, 6]


def raw_table(path: Path, *rows: str) -> list[list[str]]:
    path.write_bytes("\n".join(["\t".join(HEADER), *rows, ""]).encode("utf-8", "surrogateescape"))
    return [row.meta["captions"] for row in read_table(path)]


def row(raw: str, last: str = "", short: str = "") -> str:
    return "\t".join(["0.jpg", raw, short, "", "", "", "", last])


@pytest.mark.parametrize(
    "rows, captions",
    [
        ([row('"never closed'), row("a"), row('"never')], [['"never closed'], ["a"], ['"never']]),
        (
            [row("a", '"opens'), row("b"), row("c", 'closes"')],
            [["a", '"opens'], ["b"], ["c", 'closes"']],
        ),
        ([row('"opens'), row('closes"')], [['"opens'], ['closes"']]),
        ([row('"Hello"'), row('"Hi" he said')], [['"Hello"'], ['"Hi" he said']]),
        (
            [row('the "best"', '"Good," he said. "And"')],
            [['the "best"', '"Good," he said.', '"And"']],
        ),
        ([row('"he said ""hi"""')], [['he said "hi"']]),
        ([row("a", '"One.\n\nTwo."'), row("b")], [["a", "One.", "Two."], ["b"]]),
    ],
)
def test_quotes_in_a_table(tmp_path: Path, rows: list[str], captions: list[list[str]]) -> None:
    """Quotes enclose fields where csv would write them so. Else they are plain characters, so that
    no row is swallowed by the one before.
    """
    assert raw_table(tmp_path / "t.csv", *rows) == captions


@pytest.mark.parametrize(
    "lines, unusable",
    [
        ([row("a", '"opens and never ends'), "a second line"], 1),
        (['0.jpg\t"opens\tand is short'], 1),
        ([row("caf\udce9")], 1),
        (['0.jpg,"raw",a,b'], 1),
        ([row("a") + "\tninth"], 1),
        (['0.jpg\t"opens', 'and closes"\t\t'], 2),
        ([""], 1),
    ],
)
def test_rows_that_are_no_rows_are_counted_with_their_line(
    tmp_path: Path, lines: list[str], unusable: int
) -> None:
    (tmp_path / "0.jpg").write_bytes(picture())
    path, good = tmp_path / "t.csv", [row(f"good {i}") for i in range(100)]
    found = raw_table(path, *good[:50], *lines, *good[50:])
    assert [captions for captions in found if captions[:1] != ["a"] and captions] == [
        [f"good {i}"] for i in range(100)
    ]
    assert found.count([]) == unusable
    raw_table(path, good[0], *lines)
    first = 3 if len(lines) == unusable else 4
    with pytest.raises(
        InputError,
        match=rf"of \d rows are unusable, at most 0 may be; the first is line {first} \(",
    ):
        pack(path, tmp_path / "out")


def test_an_unclosed_quote_parted_by_commas_loses_its_own_row_alone(tmp_path: Path) -> None:
    text = io.StringIO()
    csv.writer(text).writerows([HEADER, *([f"{i}.jpg", f"raw, {i}", *[""] * 6] for i in range(9))])
    lines = text.getvalue().splitlines(keepends=True)
    lines[4] = lines[4].replace('3"', "3")
    (tmp_path / "t.csv").write_text("".join(lines), newline="")
    found = list(read_table(tmp_path / "t.csv"))
    assert [row.meta["captions"] for row in found] == [
        [f"raw, {i}"] if i != 3 else [] for i in range(9)
    ]
    assert found[3].where == "line 5 (3.jpg)"
    with pytest.raises(ValueError, match="is no row of 8 columns"):
        found[3].read()


def test_every_source_has_an_even_share(tmp_path: Path) -> None:
    texts = [" ".join(f"{name.upper()}{i} is here." for i in range(9)) for name in "abcdef"]
    kept = captions_of("raw", *texts)
    assert kept[0] == "raw" and len(kept) == 16
    assert [sum(text[0] == name for text in kept[1:]) for name in "ABCDEF"] == [3, 3, 3, 2, 2, 2]
    assert kept[1:] == sorted(kept[1:])
    short = captions_of("raw", "A0.", texts[1], "C0.", texts[3], "E0.", texts[5])
    assert [sum(text[0] == name for text in short[1:]) for name in "ABCDEF"] == [1, 4, 1, 4, 1, 4]
    assert captions_of("", texts[0], "") == [f"A{i} is here." for i in range(9)]


def test_columns_can_be_chosen(tmp_path: Path) -> None:
    (tmp_path / "0.jpg").write_bytes(picture())
    path = tmp_path / "t.tsv"
    fields = [
        "0.jpg",
        "raw",
        "Short ib.",
        "Long ib.",
        "Short sv.",
        "Long sv. Twice.",
        "Short lla.",
        "Long lla.",
    ]
    path.write_text("\n".join(["\t".join(HEADER), "\t".join(fields), ""]))

    def taken(*names: str) -> list[str]:
        [row] = read_table(path, names)
        return row.meta["captions"]

    assert (
        taken("raw", "longSV") == taken("longsv", " RAW_caption") == ["raw", "Long sv.", "Twice."]
    )
    assert taken("longLLA") == ["Long lla."] and taken("shortIB", "shortIB") == ["Short ib."]
    for names in (["raw", "longXY"], [""], ["picture"], ["Image Path"]):
        with pytest.raises(
            InputError, match=r"t.tsv: --captions: has no captions called .*, but raw \(here 'raw_"
        ):
            taken(*names)
    pack(path, tmp_path / "out", captions=["raw"])
    assert json.loads(_samples(tmp_path / "out" / "train-000000.tar")[0]["json"])["captions"] == [
        "raw"
    ]
    with pytest.raises(InputError, match=r"--captions: only a caption table"):
        pack(tmp_path / "out", tmp_path / "out2", captions=["raw"])
