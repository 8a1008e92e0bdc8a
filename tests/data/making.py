"""Pictures and tars for the tests of the data room."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import webdataset
from PIL import Image

from modelchain_data.index import ShardSet, open_set
from modelchain_data.pack import Split, pack

Members = list[tuple[str, bytes]]


def encoded(image: Image.Image, form: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def picture(number: int = 0, size: tuple[int, int] = (20, 16), form: str = "PNG") -> bytes:
    """An encoded picture of noise, different for each number."""
    pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), np.uint8)
    return encoded(Image.fromarray(pixels), form)


def pairs(*keys: str, start: int = 0) -> Members:
    """A picture and a caption for each key. The caption has the picture's number."""
    both = [
        ((f"{k}.png", picture(i)), (f"{k}.txt", b"picture %d" % i))
        for i, k in enumerate(keys, start)
    ]
    return [member for sample in both for member in sample]


def sample(key: str, **meta: object) -> Members:
    return [(f"{key}.png", picture()), (f"{key}.json", json.dumps(meta).encode())]


def tar_of(path: Path, members: Members, format: int = tarfile.PAX_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def packed(
    source: Path, split: str = "train", to: str = "packed"
) -> tuple[Split, dict[str, tuple[bytes, dict]]]:
    """The only split of a packed source: picture and json of each key."""
    [report] = pack(source, source.parent / to, size=None)
    shards = sorted((source.parent / to).glob(f"{split}-*.tar"))
    found = list(
        webdataset.WebDataset(
            [str(shard) for shard in shards], shardshuffle=False, empty_check=False
        )
    )
    assert report.name == split and report.samples == len(found) == len(
        {s["__key__"] for s in found}
    )
    return report, {
        s["__key__"]: (s.get("png", s.get("jpg", s.get("webp"))), json.loads(s["json"]))
        for s in found
    }


def opened(*shards: Path) -> ShardSet:
    return open_set(shards, shards[0].parent / "cache")
