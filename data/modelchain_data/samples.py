"""From the members of a tar to samples, with webdataset's keys, captions and labels,
and problems.
"""

from __future__ import annotations

import itertools
import json
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from modelchain.errors import InputError, Problem
from modelchain_data.tars import DamagedTar, Member, members

PICTURES, TEXTS = ("jpg", "jpeg", "png", "webp"), ("json", "txt", "cls")
MAX_PROBLEMS = 5
NO_LABEL, BAD_LABEL = -1, -2  # none is given; it is not a whole number from 0
# Key and suffix, as by webdataset's base_plus_ext.
_NAME = re.compile(r"(?!__[^/]*__(?:$|/))((?:.*/)?[^./]+)[.]([^/]*)", re.DOTALL)
_WHOLE = re.compile(r"\s*-?[0-9]{1,12}\s*")


class Problems(list[Problem]):
    """The problems found so far. The fifth raises InputError with all of them, and so does `stop`
    if there are any.
    """

    def add(self, message: str, file: str | Path, field: str | None = None) -> None:
        self.append(Problem(message, str(file), field))
        if len(self) == MAX_PROBLEMS:
            self.stop()

    def stop(self) -> None:
        if self:
            raise InputError(*self)


class Sample(NamedTuple):
    """A picture by its place in the tar (in bytes), with its captions and label.

    `captions` may be empty, and `label` may be NO_LABEL or BAD_LABEL: the use decides whether that
    is wrong. `meta` is the whole json, with the label of a .cls.
    """

    key: str
    offset: int
    size: int
    captions: list[str]
    label: int
    meta: dict[str, Any]


def read_shard(path: Path, problems: Problems) -> Iterator[Sample]:
    """The samples of a plain tar in order. What is wrong is added to `problems`, with
    the member.
    """
    member, seen = None, set()
    try:
        with path.open("rb") as file:
            named = ((_NAME.fullmatch(found.name), found) for found in members(file))
            groups = itertools.groupby(
                (n for n in named if n[0]), key=lambda n: (n[1].archive, n[0][1])
            )
            for place, group in groups:
                files = [(match[2].lower(), found) for match, found in group]
                parts = dict(files)
                member = files[-1][1].name
                key = place[1]
                try:
                    _check_dots(parts)
                    if place in seen or len(parts) < len(files):
                        raise ValueError(
                            "its key, or one of its suffixes, is used twice in this shard"
                        )
                    seen.add(place)
                    yield _sample(file, key, parts)
                except (ValueError, RecursionError) as error:
                    problems.add(f"sample {key!r}: {error}", path, member)
            if member is None:
                problems.add("the tar holds no sample", path)
    except DamagedTar as error:
        problems.add(str(error), path, member)
    except (tarfile.TarError, OSError, ValueError) as error:
        problems.add(
            f"not a whole, plain tar (a compressed one must be unpacked): {error}", path, member
        )


def _check_dots(parts: dict[str, Member]) -> None:
    """Raise ValueError for a picture whose name has one dot too many: `a.0.jpg` beside `a.0.txt`,
    or without `a.jpg`, is not meant as part of sample `a`.
    """
    dotted = {suffix: suffix.rpartition(".")[::2] for suffix in parts if "." in suffix}
    own = {stem for stem, last in dotted.values() if last in TEXTS}
    for suffix, (stem, last) in dotted.items():
        if last in PICTURES and (stem in own or not parts.keys() & set(PICTURES)):
            raise ValueError(
                f"{parts[suffix].name!r} has a dot within its name, but a key ends at the first"
                " one, so that this is no sample of its own; put another sign, such as _, for the"
                " dots but the last"
            )


def _sample(file: BinaryIO, key: str, parts: dict[str, Member]) -> Sample:
    """The sample of these members, by suffix. Raises ValueError with what is wrong with them."""
    for suffix in PICTURES + TEXTS:
        if suffix in parts and parts[suffix].fault:
            raise ValueError(f"{parts[suffix].name!r} {parts[suffix].fault}")
    pictures = [parts[suffix] for suffix in PICTURES if suffix in parts]
    if len(pictures) != 1:
        raise ValueError(f"has {len(pictures)} pictures (.{', .'.join(PICTURES)}) instead of one")
    read = {name: parts[name].read(file) for name in TEXTS if name in parts}
    meta = json.loads(read.get("json", b"{}").decode())
    if not isinstance(meta, dict):
        raise ValueError("its json must be an object")
    if meta.get("label") is None and "cls" in read:
        text = read["cls"].decode(errors="replace")
        meta["label"] = int(text) if _WHOLE.fullmatch(text) else text.strip()
    captions = _captions(meta, read.get("txt", b"").decode())
    return Sample(
        key, pictures[0].offset, pictures[0].size, captions, _label(meta.get("label")), meta
    )


def _captions(meta: dict[str, Any], txt: str) -> list[str]:
    """The json's `captions`, else its `caption`, else the lines of the txt: the first of them that
    has any text, without blank texts.
    """
    for given in (meta.get("captions"), [meta.get("caption")], re.split(r"\r?\n", txt)):
        texts = [] if _nothing(given) else given
        if not isinstance(texts, list) or not all(
            isinstance(text, str) or _nothing(text) for text in texts
        ):
            raise ValueError("captions must be a list of texts, and caption a text")
        if texts := [text for text in texts if isinstance(text, str) and text.strip()]:
            return texts
    return []


def _nothing(value: object) -> bool:
    """Whether the value is null or NaN, by which tables say that there is no caption."""
    return value is None or value != value


def _label(value: object) -> int:
    """A label as the index holds it."""
    if value is None:
        return NO_LABEL
    return value if type(value) is int and NO_LABEL <= value < 2**31 else BAD_LABEL
