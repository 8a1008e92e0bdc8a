"""Captions and labels in their forms. Samples that are left out are counted, and fields that are
not read are not checked.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from making import Members, opened, packed, picture, sample, tar_of

from modelchain.api.contracts import DataRequest, TrainFiles
from modelchain.errors import InputError
from modelchain_data.batches import Batches, epoch_order
from modelchain_data.index import ShardSet, check_labels, check_training
from modelchain_data.request import open_data

PICTURE = ("k.png", picture())
BARE = {
    "nothing": [],
    "null": [("k.json", b'{"caption": null, "url": "u"}'), ("k.txt", b"")],
    "blank": [("k.json", b'{"caption": "  "}'), ("k.txt", b" \r\n")],
    "list": [("k.json", b'{"captions": []}')],
    "list of blanks": [("k.json", b'{"captions": ["", "\\t"]}')],
    "list of nulls": [("k.json", b'{"captions": [null, NaN]}')],
    "null list": [("k.json", b'{"captions": null}')],
    "not a number": [("k.json", b'{"caption": NaN}')],
    "empty json": [("k.json", b"{}")],
    "empty txt": [("k.txt", b"\n\n")],
    "label alone": [("k.json", b'{"label": 3}')],
}


def good(count: int) -> Members:
    return [
        member
        for i in range(count)
        for member in sample(f"g{i}", caption=f"thing {i}", label=i % 3)
    ]


def request(shard: Path, samples: int, captions: int = 1) -> DataRequest:
    train = TrainFiles(
        files=[str(shard)], samples=samples, captions_per_sample=captions, fingerprint=None
    )
    return DataRequest(
        index=str(shard.parent / "cache"), file="chain.yaml", train=train, evaluation=[]
    )


@pytest.mark.parametrize("name", BARE)
def test_a_sample_without_caption_is_left_out_and_counted(tmp_path: Path, name: str) -> None:
    members = good(999)
    members[1000:1000] = [PICTURE, *BARE[name]]
    shard, notes = tar_of(tmp_path / "train-0.tar", members), []
    data, _ = open_data(request(shard, 1000), notes.append)
    assert data.without_caption.tolist() == [500]
    assert notes == [
        "1 of 1000 samples have no caption and are left out; the next in order stand in for them"
    ]
    report, found = packed(shard)
    assert (report.samples, report.skipped, report.captioned) == (999, 1, True) and "k" not in found
    shard = tar_of(tmp_path / "more" / "train-0.tar", [*good(998), PICTURE, *BARE[name]])
    with pytest.raises(
        InputError, match=r"chain.yaml: .*1 of 999 samples have no caption .*the first is 'k'"
    ):
        open_data(request(shard, 999))
    with pytest.raises(
        InputError,
        match=r"1 of 999 rows are unusable.* the first is .*train-0.tar: k: has no caption",
    ):
        packed(shard)


def test_the_next_in_order_stands_in_for_a_sample_without_caption(tmp_path: Path) -> None:
    order = epoch_order(1000, 0, 0).tolist()
    members = [
        m for i in range(1000) for m in sample(f"{i}", caption=f"{i}" if i != order[2] else None)
    ]
    data = opened(tar_of(tmp_path / "t.tar", members))
    options = {
        "image_size": 4,
        "context_length": 8,
        "global_batch_size": 4,
        "captions_per_sample": 2,
        "seed": 0,
    }
    batches = Batches(data=data, **options)
    stream = batches.from_step(0)
    assert next(stream).ids.tolist() == [order[0], order[1], order[3], order[3]]
    stream.close()
    assert batches.replaced == 0 and check_training(data, 1000, 1, "f") == 0


TEXTS = {
    "null": ([("k.json", b'{"caption": null}'), ("k.txt", b"good")], ["good"]),
    "no caption": ([("k.json", b'{"url": "u"}'), ("k.txt", b"good")], ["good"]),
    "blank list": ([("k.json", b'{"captions": [""]}'), ("k.txt", b"good")], ["good"]),
    "not a number": (
        [("k.json", b'{"captions": NaN, "caption": NaN}'), ("k.txt", b"good")],
        ["good"],
    ),
    "caption": ([("k.json", b'{"captions": [], "caption": "good"}')], ["good"]),
    "null among": ([("k.json", b'{"captions": ["good", null, "", "also"]}')], ["good", "also"]),
    "json first": ([("k.json", b'{"caption": "good"}'), ("k.txt", b"bad")], ["good"]),
    "lines": ([("k.txt", b"one\r\n\r\ntwo\nthree")], ["one", "two", "three"]),
    **{
        f"U+{ord(sign):04X}": (
            [("k.txt", f"one{sign}two\nthree".encode())],
            [f"one{sign}two", "three"],
        )
        for sign in "\u2028\u2029\x85\x0b\x0c\x1c\x1d\x1e\r\0"
    },
}


@pytest.mark.parametrize("name", TEXTS)
def test_the_first_that_holds_a_caption_is_taken(tmp_path: Path, name: str) -> None:
    members, captions = TEXTS[name]
    shard = tar_of(tmp_path / "train-0.tar", [PICTURE, *members])
    assert opened(shard).caption_counts.tolist() == [len(captions)]
    assert packed(shard)[1]["k"][1]["captions"] == captions


@pytest.mark.parametrize(
    "meta", [{"captions": ["a", 3]}, {"captions": "a"}, {"caption": ["a"]}, {"caption": 3}]
)
def test_captions_that_are_no_texts_are_refused(tmp_path: Path, meta: dict[str, object]) -> None:
    with pytest.raises(
        InputError,
        match=r"k.json: sample 'k': captions must be a list of texts, and caption a text",
    ):
        opened(tar_of(tmp_path / "t.tar", sample("k", **meta)))


LABELS = ["cat", [1, 2], 2**40, 2**70, 1.5, True, {"a": 1}, float("nan"), -7, ""]


@pytest.mark.parametrize("label", LABELS, ids=repr)
def test_labels_are_checked_only_where_they_are_read(tmp_path: Path, label: object) -> None:
    members = sample("a", caption="x", label=0) + sample(
        "k", caption="x", label=label, classname=["odd"]
    )
    shard = tar_of(tmp_path / "train-0.tar", members)
    data, _ = open_data(request(shard, 2))
    with pytest.raises(
        InputError, match=r"f: g: sample 'k': its label must be a whole number from 0"
    ):
        check_labels(data, ["cat", "dog"], "f", "g")
    meta = packed(shard)[1]["k"][1]
    assert json.dumps(meta["label"]) == json.dumps(label) and meta["classname"] == ["odd"]


@pytest.mark.parametrize(
    "text, label",
    [
        ("cat\n", "cat"),
        ("9" * 30, "9" * 30),
        ("\xff", "\ufffd"),
        (" 3\n", 3),
        ("", ""),
        ("1,2", "1,2"),
    ],
)
def test_a_cls_is_no_matter_in_training(tmp_path: Path, text: str, label: object) -> None:
    shard = tar_of(
        tmp_path / "train-0.tar", [PICTURE, ("k.txt", b"x"), ("k.cls", text.encode("latin-1"))]
    )
    data, _ = open_data(request(shard, 1))
    assert data.labels.tolist() == [3 if label == 3 else -2]
    assert packed(shard)[1]["k"][1]["label"] == label


def test_a_class_name_that_is_no_text_matters_where_it_is_read(tmp_path: Path) -> None:
    data = opened(tar_of(tmp_path / "t.tar", sample("k", label=0, classname=3)))
    with pytest.raises(InputError, match=r"sample 'k': its classname must be a text"):
        check_labels(data, ["cat"], "f")


def test_sets_for_zero_shot_alone_need_no_captions(tmp_path: Path) -> None:
    members = [m for i in range(5) for m in sample(f"k{i}", label=i, caption=None)]
    report, found = packed(tar_of(tmp_path / "val-0.tar", members), "val")
    assert (report.samples, report.captioned) == (5, False) and [
        m["label"] for _, m in found.values()
    ] == [*range(5)]
    with pytest.raises(
        InputError, match=r"1 of 1 rows .*val-1.tar: k: has neither a caption nor a label"
    ):
        packed(tar_of(tmp_path / "b" / "val-1.tar", sample("k", caption=None)), "val")


DOTS = {
    "all": ["IMG.0.png", "IMG.0.txt", "IMG.1.png", "IMG.1.txt"],
    "the second": ["photo.png", "photo.txt", "photo.1.png", "photo.1.txt"],
    "json": ["a.png", "a.json", "a.v2.JPG", "a.v2.json"],
    "without caption": ["a/IMG.0.webp"],
    "two": ["a..png", "a..txt"],
}


@pytest.mark.parametrize("name", DOTS)
def test_names_with_dots_are_refused_as_such(tmp_path: Path, name: str) -> None:
    contents = {"json": b"{}", "txt": b"x"}
    members = [
        (member, contents.get(member.rpartition(".")[2], picture())) for member in DOTS[name]
    ]
    shard = tar_of(tmp_path / "train-0.tar", members)
    for use in (opened, packed):
        with pytest.raises(
            InputError,
            match=r"train-0.tar: .*' has a dot within its name, but a key ends at the first",
        ):
            use(shard)


def test_other_suffixes_with_dots_are_ignored(tmp_path: Path) -> None:
    members = [PICTURE, ("k.txt", b"x"), ("k.seg.png", b"mask"), ("k.seg.npy", b"array")]
    data: ShardSet = opened(tar_of(tmp_path / "t.tar", members))
    assert (
        len(data) == 1 and data.picture(0) == picture() and np.array_equal(data.caption_counts, [1])
    )


def test_a_name_that_is_not_utf8_can_be_told(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        opened(tar_of(tmp_path / "t.tar", [("\udcff.txt", b"x")]))
    assert "\\udcff.txt" in str(caught.value) and str(caught.value).encode()
    shard = tar_of(tmp_path / "train-0.tar", [("\udcff.png", picture()), ("\udcff.txt", b"x")])
    assert opened(shard).keys == ["\\udcff"] and packed(shard)[0].samples == 1
