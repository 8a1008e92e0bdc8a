"""Caption tables: which rows they have, which captions are taken of them, and what is refused with its line."""

from __future__ import annotations

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
from modelchain_data.table import captions_of

HEADER = ["Image Path", "raw_caption", "shortIB", "longIB", "shortSV", "longSV", "shortLLA", "longLLA"]


def picture(form: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 20, 3), np.uint8)).save(buffer, form)
    return buffer.getvalue()


def _samples(shard: Path) -> list[dict[str, bytes]]:
    return list(webdataset.WebDataset(str(shard), shardshuffle=False))


def test_sentences() -> None:
    text = 'A dog runs. Mr. Smith of St. Ives, J. R. by name, paid 3.50 for it!  "Good," he said. It is no. 7 etc. of 9'
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
        "img/0.jpg\traw cat\tA cat.\tA cat sits. It is red.\t\t \tA pet.\tThe cat looks at us. The end.\r",
        'img/1.png\t"a quote that never ends\tShort.\t"Another. One\t\t\t\t',  # csv would swallow tabs and lines here
        'img/2.jpg\the said "hi"\t\t\t\t\t\tüber "all".',
        "img/no-suffix\t\t\t\t\t\tOne.\t",
    ]
    report = pack(table(tmp_path, rows), tmp_path / "out")
    assert (report[0].name, report[0].samples, report[0].skipped) == ("train", 4, 0)
    found = [json.loads(s["json"])["captions"] for s in _samples(tmp_path / "out" / "train-000000.tar")]
    assert found == [
        ["raw cat", "A cat.", "A cat sits.", "It is red.", "A pet.", "The cat looks at us.", "The end."],
        ['"a quote that never ends', "Short.", '"Another.', "One"],
        ['he said "hi"', 'über "all".'],
        ["One."],
    ]
    data = open_set([tmp_path / "out" / "train-000000.tar"], tmp_path / "cache")
    assert data.keys == ["000000002", "000000003", "000000004", "000000005"] and data.picture(1) == picture(form="PNG")


def test_bad_rows_of_a_table_are_counted_and_named(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(picture())
    good = "a.jpg\traw" + "\t" * 6
    bad = ["gone.jpg\traw" + "\t" * 6, "a.jpg\traw", "a.jpg" + "\t" * 7, "\traw" + "\t" * 6, "a\0b\traw" + "\t" * 6, ""]
    for number, row in enumerate(bad):
        with pytest.raises(InputError, match=r"1 of 2 rows are unusable, at most 0 may be; the first is line 3 \("):
            pack(table(tmp_path, [good, row]), tmp_path / f"out{number}")
    report = pack(table(tmp_path, [good] * 2995 + bad[:3] + [good, good]), tmp_path / "out")
    assert (report[0].samples, report[0].skipped) == (2997, 3)
