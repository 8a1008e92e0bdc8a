"""What `modelchain bench` measures: captions of known lengths, and both loaders on the
same files.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from open_clip.tokenizer import SimpleTokenizer

from modelchain.errors import InputError
from modelchain_bench import loader
from modelchain_bench.captions import LENGTHS, captions
from modelchain_bench.stock import stock_pipeline
from modelchain_data.batches import cut_chunks


def test_captions_have_the_lengths_of_flickr8ks(tmp_path: Path) -> None:
    assert sum(LENGTHS.values()) == 29_995
    drawn = captions(29_995, 1)
    assert np.array_equal(
        np.bincount([len(c) for c in drawn])[list(LENGTHS)], list(LENGTHS.values())
    )
    one, same, other = captions(128, 0), captions(128, 0), captions(128, 1)
    assert all(map(np.array_equal, one, same)) and not all(map(np.array_equal, one, other))
    assert max(map(len, captions(29_995, 1, context_length=16))) == 16
    for count in (128, 512, 4096):
        drawn = captions(count, 0)
        assert sum(map(len, drawn)) > 0.6 * sum(
            tokens.numel() for tokens, _ in cut_chunks(drawn, 77)
        )
    file = tmp_path / "captions.txt"
    file.write_text("A dog runs.\n\nTwo cats.\n")
    expected = {
        tuple(row[row > 0].tolist())
        for row in SimpleTokenizer()(["A dog runs.", "Two cats."]).numpy()
    }
    assert {tuple(c.tolist()) for c in captions(2, 0, file)} == expected and len(
        captions(5, 0, file)
    ) == 5
    for content in (b"\n \n", b"\xff\xfe"):
        file.write_bytes(content)
        with pytest.raises(InputError, match=r"captions\.txt"):
            captions(2, 0, file)
    with pytest.raises(InputError, match="cannot be read: No such file"):
        captions(2, 0, tmp_path / "gone.txt")


def test_both_loaders_give_the_same_kind_of_batch(tmp_path: Path) -> None:
    shard = loader._write(tmp_path / "t.tar", loader.synthetic(6))
    options = {
        "global_batch_size": 4,
        "captions_per_sample": 3,
        "image_size": 32,
        "context_length": 77,
    }
    images, tokens = next(iter(stock_pipeline(str(shard), 4, 3, 32, 77)))
    assert images.shape == (4, 3, 32, 32) and tokens.shape == (4, 3, 77)
    ours = loader._ours(shard, options)()
    assert ours.images.shape == images.shape and len(ours.captions) == 12  # type: ignore[attr-defined]
    found = loader.measure_loader(4, 3, str(shard), image_size=32, pairs=2, seconds=0.01)
    assert found["ratio"] > 0 and found["packedSamplesPerSecond"] > 0
    assert set(found["samplesPerSecond"]) == {"ours", "stock"} and len(found["pairs"]) == 2
    with pytest.raises(
        InputError, match=r"t\.tar: 6 pictures are taken, fewer than the batch of 7"
    ):
        loader.measure_loader(7, 3, str(shard))
