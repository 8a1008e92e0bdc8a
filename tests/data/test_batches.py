"""Batches: order, captions and crops depend only on (seed, step), and not on ranks, threads or the
step that is read first.
"""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tarfile
import threading
from bisect import bisect_left
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip.transform import image_transform
from PIL import Image

from modelchain.errors import WorkError
from modelchain_data.batches import (
    RATIO,
    SCALE,
    Batch,
    Batches,
    crop_box,
    cut_chunks,
    decode,
    epoch_order,
    evaluation_image,
    global_batch,
    resized,
)
from modelchain_data.index import ShardSet, open_set

SHARED = Path(__file__).parents[3] / "shared" / "data"
torch.set_num_threads(1)


def picture(number: int, form: str = "PNG", size: tuple[int, int] = (20, 16)) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, form, quality=90)
    return buffer.getvalue()


def make_set(
    folder: Path, count: int, bad: dict[int, bytes] | None = None, captions: int = 5
) -> ShardSet:
    shards = [folder / "t-0.tar", folder / "t-1.tar"]
    for number, shard in enumerate(shards):
        with tarfile.open(shard, "w") as tar:
            for i in range(number * count // 2, (number + 1) * count // 2):
                texts = [f"picture {i} " + "very " * (3 * j) + f"nice {j}" for j in range(captions)]
                data = (bad or {}).get(i, picture(i % 7))
                for suffix, content in (
                    ("png", data),
                    ("json", json.dumps({"captions": texts}).encode()),
                ):
                    info = tarfile.TarInfo(f"k{i}.{suffix}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    return open_set(shards, folder / "cache")


def loader(data: ShardSet, **changes: int) -> Batches:
    options = {
        "image_size": 12,
        "context_length": 16,
        "global_batch_size": 8,
        "captions_per_sample": 3,
        "seed": 5,
    }
    return Batches(data=data, **(options | changes))


def take(batches: Batches, count: int, step: int = 0) -> list[Batch]:
    stream = batches.from_step(step)
    found = [next(stream) for _ in range(count)]
    stream.close()
    return found


def same(one: Batch, other: Batch) -> bool:
    captions = all(np.array_equal(a, b) for a, b in zip(one.captions, other.captions, strict=True))
    return captions and np.array_equal(one.ids, other.ids) and torch.equal(one.images, other.images)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    return make_set(tmp_path_factory.mktemp("set"), 27)


@given(
    samples=st.integers(1, 300),
    batch=st.integers(1, 300),
    seed=st.integers(0, 2**31 - 1),
    step=st.integers(0, 500),
)
def test_order(samples: int, batch: int, seed: int, step: int) -> None:
    batch = min(batch, samples)
    ids = global_batch(step, samples, batch, seed)
    epoch, place = divmod(step, samples // batch)
    assert len(set(ids.tolist())) == batch and set(ids.tolist()) <= set(range(samples))
    assert np.array_equal(
        ids, epoch_order(samples, seed, epoch)[place * batch : (place + 1) * batch]
    )
    epoch_ids = [
        global_batch(epoch * (samples // batch) + k, samples, batch, seed)
        for k in range(samples // batch)
    ]
    assert len(set(np.concatenate(epoch_ids).tolist())) == samples // batch * batch


def test_order_changes_with_epoch_and_seed_and_is_golden() -> None:
    """Golden: another order would end in other weights for the same digest."""
    orders = [epoch_order(10, 0, 0), epoch_order(10, 0, 1), epoch_order(10, 1, 0)]
    assert len({tuple(order) for order in orders}) == 3
    assert [order.tolist() for order in orders] == GOLDEN_ORDERS


WIDTHS = [*range(4, 33, 4), 40, 48, 56, 64, 77]
GOLDEN_ORDERS = [
    [0, 7, 8, 6, 9, 5, 1, 3, 2, 4],
    [9, 4, 2, 1, 0, 7, 8, 5, 3, 6],
    [6, 0, 7, 9, 4, 1, 8, 5, 2, 3],
]


@pytest.mark.parametrize("world", [2, 4])
def test_every_number_of_ranks_sees_the_same(data: ShardSet, world: int) -> None:
    alone = take(loader(data), 5)
    ranks = [take(loader(data, rank=rank, world_size=world), 5) for rank in range(world)]
    for step, whole in enumerate(alone):
        parts = [batches[step] for batches in ranks]
        assert np.array_equal(np.concatenate([part.ids for part in parts]), whole.ids)
        assert torch.equal(torch.cat([part.images for part in parts]), whole.images)
        captions = [caption for part in parts for caption in part.captions]
        assert all(np.array_equal(a, b) for a, b in zip(captions, whole.captions, strict=True))
        assert np.array_equal(whole.ids, global_batch(step, 27, 8, 5))


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_and_resuming_change_nothing(data: ShardSet, threads: int) -> None:
    straight = take(loader(data), 8)
    resumed = take(loader(data, threads=threads), 4, step=4)
    assert [batch.step for batch in resumed] == [4, 5, 6, 7]
    assert all(same(a, b) for a, b in zip(straight[4:], resumed, strict=True))


def test_epochs_draw_other_captions_and_crops(data: ShardSet) -> None:
    batches = take(loader(data, global_batch_size=27, seed=6), 2)
    place = {int(i): row for row, i in enumerate(batches[1].ids)}
    moved = [
        row
        for row, i in enumerate(batches[0].ids)
        if not torch.equal(batches[0].images[row], batches[1].images[place[int(i)]])
    ]
    assert len(moved) > 20
    assert len({tuple(np.concatenate(b.captions[:3])) for b in (batches[0], batches[1])}) == 2


def test_captions_are_drawn_without_replacement_from_all(data: ShardSet) -> None:
    seen: set[tuple[int, ...]] = set()
    for batch in take(loader(data, captions_per_sample=5, context_length=77), 9):
        for row, i in enumerate(batch.ids.tolist()):
            drawn = [tuple(caption.tolist()) for caption in batch.captions[row * 5 : row * 5 + 5]]
            assert sorted(drawn) == sorted(tuple(data.tokens(i, j, 77).tolist()) for j in range(5))
            seen.add(tuple(len(caption) for caption in drawn))
    assert len(seen) > 20  # the drawn order is kept
    few = loader(data, captions_per_sample=7)
    assert few.scarce == 27 and loader(data).scarce == 0
    batch = take(few, 1)[0]
    assert len(batch.captions) == 8 * 7


@settings(deadline=None)
@given(
    lengths=st.lists(st.integers(2, 77), min_size=1, max_size=50),
    more=st.sampled_from([0, 0, 700, 3000]),
)
def test_chunks_hold_every_caption_once(lengths: list[int], more: int) -> None:
    lengths += (lengths * more)[:more]
    captions = [np.full(length, 1 + row, np.uint16) for row, length in enumerate(lengths)]
    chunks = cut_chunks(captions, 77)
    assert len(chunks) == {0: min(4, len(lengths)), 700: 5, 3000: 8}[more]
    assert sorted(torch.cat([rows for _, rows in chunks]).tolist()) == list(range(len(lengths)))
    sizes = [len(rows) for _, rows in chunks]
    assert max(sizes) - min(sizes) <= 1
    for tokens, rows in chunks:
        longest = max(lengths[row] for row in rows)
        assert (
            tokens.shape == (len(rows), WIDTHS[bisect_left(WIDTHS, longest)])
            and tokens.dtype == torch.int64
        )
        for caption, row in zip(tokens, rows.tolist(), strict=True):
            assert (
                caption[: lengths[row]].tolist() == captions[row].tolist()
                and not caption[lengths[row] :].any()
            )
    order = torch.cat([rows for _, rows in chunks]).tolist()
    assert order == sorted(range(len(lengths)), key=lambda row: lengths[row])


def test_pieces_are_the_batch_in_parts(data: ShardSet) -> None:
    batch = take(loader(data), 1)[0]
    assert batch.pieces(None) == [batch] and batch.pieces(8)[0] is batch
    pieces = batch.pieces(3)
    assert [len(piece.ids) for piece in pieces] == [3, 3, 2]
    assert torch.equal(torch.cat([piece.images for piece in pieces]), batch.images)
    assert sum(piece.real_tokens for piece in pieces) == batch.real_tokens
    assert (
        batch.processed_tokens
        == sum(tokens.numel() for tokens, _ in batch.chunks)
        > batch.real_tokens
    )
    for number, piece in enumerate(pieces):
        for tokens, rows in piece.chunks:
            for caption, row in zip(tokens, rows.tolist(), strict=True):
                expected = batch.captions[number * 9 + row]
                assert caption[: len(expected)].tolist() == expected.tolist()


def test_closing_ends_the_threads(data: ShardSet) -> None:
    before = threading.active_count()
    stream = loader(data).from_step(0)
    next(stream)
    assert threading.active_count() > before
    stream.close()
    assert threading.active_count() == before


@settings(max_examples=200)
@given(seed=st.integers(0, 1000), height=st.integers(1, 300), width=st.integers(1, 300))
def test_crop_boxes_lie_inside(seed: int, height: int, width: int) -> None:
    top, left, h, w = crop_box(np.random.default_rng(seed), height, width)
    assert 0 <= top <= top + h <= height and 0 <= left <= left + w <= width and h and w


def test_crop_boxes_are_golden() -> None:
    """Golden: another crop would give other weights under the same input digest."""
    rng = np.random.Generator(np.random.Philox(key=np.array([5, 1], np.uint64)))
    assert [crop_box(rng, 256, 341) for _ in range(3)] == GOLDEN_BOXES


GOLDEN_BOXES = [(1, 19, 254, 322), (0, 0, 256, 341), (0, 2, 256, 334)]


def test_crop_boxes_are_distributed_as_torchvisions() -> None:
    from torchvision.transforms.v2 import RandomResizedCrop

    reference, rng = RandomResizedCrop(8, scale=SCALE, ratio=RATIO), np.random.default_rng(0)
    torch.manual_seed(0)
    for height, width in ((100, 120), (200, 100), (10, 90)):
        image = torch.zeros(3, height, width)
        theirs = [reference.make_params([image]) for _ in range(3000)]
        theirs = np.array([[p["top"], p["left"], p["height"], p["width"]] for p in theirs], float)
        ours = np.array([crop_box(rng, height, width) for _ in range(3000)], float)
        assert np.allclose(ours.mean(0), theirs.mean(0), atol=0.6), (height, width)
        assert np.allclose(ours.std(0), theirs.std(0), atol=0.6), (height, width)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_decoding(form: str) -> None:
    data = picture(1, form)
    expected = np.array(Image.open(io.BytesIO(data)).convert("RGB"))
    ours = decode(data).permute(1, 2, 0).numpy()
    assert ours.dtype == np.uint8 and np.abs(ours.astype(int) - expected).max() <= (
        2 if form == "JPEG" else 0
    )
    for cut in (0, 1, len(data) // 3, len(data) * 2 // 3):
        with pytest.raises(ValueError, match="not a whole picture"):
            decode(data[:cut])
    with pytest.raises(ValueError, match="not a whole picture"):
        decode(b"GIF89a" + bytes(100))


def test_damaged_pictures_never_end_the_process() -> None:
    """torchvision's PNG decoder would (SIGSEGV), so this runs in a process of its own."""
    code = f"""
import random, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_batches import decode, picture
random.seed(0)
for form in ("JPEG", "PNG", "WEBP"):
    for _ in range(400):
        data = bytearray(picture(1, form))
        for _ in range(random.choice((1, 3, 20))):
            data[random.randrange(len(data))] = random.randrange(256)
        try:
            decode(bytes(data))
        except ValueError:
            pass
"""
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode
        == 0
    )


@pytest.mark.parametrize("box", [(0, 0, 90, 120), (7, 11, 80, 101), (60, 70, 9, 20)])
def test_crops_are_resized_as_pil_does(box: tuple[int, int, int, int]) -> None:
    data = picture(2, size=(120, 90))
    top, left, height, width = box
    with Image.open(io.BytesIO(data)) as image:
        window = image.crop((left, top, left + width, top + height))
    expected = np.array(window.resize((24, 24), Image.Resampling.BICUBIC)).astype(int)
    ours = resized(decode(data), box, 24)
    assert ours.dtype == torch.uint8 and np.abs(ours.permute(1, 2, 0).numpy() - expected).max() <= 2


@pytest.mark.parametrize("size", [(40, 30), (30, 41), (16, 16), (300, 20)])
def test_evaluation_images_are_as_open_clips(size: tuple[int, int]) -> None:
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    Image.fromarray(noise).save(buffer, "PNG")
    ours = evaluation_image(buffer.getvalue(), 16)
    reference = image_transform(16, is_train=False, mean=(0, 0, 0), std=(1, 1, 1))
    expected = reference(Image.open(io.BytesIO(buffer.getvalue())))
    assert ours.dtype == torch.uint8 and ours.shape == (3, 16, 16)
    assert torch.equal(ours / 255, expected)


def test_an_undecodable_picture_is_replaced_by_the_next_in_order(tmp_path: Path) -> None:
    clean = make_set(tmp_path, 2000)
    order = epoch_order(2000, 5, 0)
    last = int(order[2000 - 1])  # its successor is the first of the order
    bad = {int(order[3]): b"\xff\xd8 no", last: picture(0)[:40]}
    (tmp_path / "bad").mkdir()
    data = make_set(tmp_path / "bad", 2000, bad)
    batches = loader(data, global_batch_size=100, captions_per_sample=2, image_size=4)
    expected = order[:100].copy()
    expected[3] = order[4]
    first = take(batches, 1)[0]
    assert np.array_equal(first.ids, expected) and torch.equal(first.images[3], first.images[4])
    assert same(
        take(
            loader(data, global_batch_size=100, captions_per_sample=2, image_size=4, threads=3), 1
        )[0],
        first,
    )
    final = take(batches, 1, step=19)[0]
    assert final.ids[99] == order[0]
    take(batches, 1)
    assert batches.replaced == 2  # each counts once
    rank = loader(
        data, global_batch_size=100, captions_per_sample=2, image_size=4, rank=1, world_size=2
    )
    assert np.array_equal(take(rank, 1, step=19)[0].ids, final.ids[50:])
    assert take(loader(clean), 1)[0].ids.tolist() == order[:8].tolist()


def test_too_many_undecodable_pictures_fail_the_work(tmp_path: Path) -> None:
    data = make_set(tmp_path, 30, {7: b"no picture"})
    before = threading.active_count()
    with pytest.raises(
        WorkError, match=r"1 of 30 pictures .* \(at most 0 may\); the last is 'k7'"
    ) as caught:
        take(loader(data), 3)
    assert caught.value.failure == "Data" and threading.active_count() < before + 10


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data sets are not beside this checkout")
def test_real_photos(tmp_path: Path) -> None:
    data = open_set(sorted((SHARED / "coco-mini" / "train").glob("*.tar")), tmp_path / "cache")
    options = {
        "image_size": 64,
        "context_length": 77,
        "global_batch_size": 16,
        "captions_per_sample": 4,
        "seed": 0,
    }
    batches = Batches(data=data, threads=2, **options)
    for batch in take(batches, 4):
        assert batch.images.shape == (16, 3, 64, 64) and len(batch.captions) == 64
        assert batch.images.float().std() > 20
    assert batches.replaced == 0
