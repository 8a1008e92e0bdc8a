"""Pictures of every kind decode to Pillow's pixels, and too large ones are refused."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from making import encoded, opened, picture, sample, tar_of
from PIL import Image

from modelchain.errors import InputError
from modelchain_data.batches import decode
from modelchain_data.pack import pack

NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 41, 4), np.uint8), "RGBA")
PHOTO = NOISE.convert("RGB").resize((83, 61), Image.Resampling.BICUBIC)


def png(bits: int, kind: int, samples: np.ndarray, chunks: bytes = b"") -> bytes:
    """A PNG of samples [height, width, channels], which Pillow cannot write for every depth and
    kind.
    """

    def chunk(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    height, width = samples.shape[:2]
    rows = samples.astype(">u2" if bits == 16 else np.uint8).reshape(height, -1)
    data = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunks + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def pixels(data: bytes) -> np.ndarray:
    return decode(data).permute(1, 2, 0).numpy().astype(int)


def with_transparency(image: Image.Image, transparency: bytes | int) -> bytes:
    return encoded(image, "PNG", transparency=transparency)


PALETTE = PHOTO.quantize(16)
WIDE = np.random.default_rng(1).integers(0, 65536, (20, 30, 4))
EXACT = {
    **{
        f"PNG {mode}": encoded(NOISE.convert(mode)) for mode in ("1", "L", "LA", "P", "RGB", "RGBA")
    },
    "PNG palette": encoded(PALETTE),
    "PNG palette of 2": encoded(PHOTO.quantize(2), bits=1),
    "PNG palette, see-through": with_transparency(PALETTE, bytes([0, 128] + [255] * 14)),
    "PNG palette, one see-through": with_transparency(PALETTE, 3),
    "PNG L, one see-through": with_transparency(PHOTO.convert("L"), 7),
    "PNG 16-bit RGB": png(16, 2, WIDE[..., :3]),
    "PNG 16-bit RGBA": png(16, 6, WIDE),
    "PNG 16-bit LA": png(16, 4, WIDE[..., :2]),
    "WebP RGBA": encoded(NOISE, "WEBP", lossless=True),
    "WebP": encoded(PHOTO, "WEBP"),
    "WebP moving": encoded(
        NOISE, "WEBP", save_all=True, append_images=[NOISE.rotate(90)], lossless=True
    ),
    "JPEG CMYK": encoded(PHOTO.convert("CMYK"), "JPEG"),
}
TURNED = Image.Exif()
TURNED[0x0112] = 6  # orientation
NEAR = {
    "JPEG": encoded(PHOTO, "JPEG"),
    "JPEG grey": encoded(PHOTO.convert("L"), "JPEG"),
    "JPEG YCbCr": encoded(PHOTO.convert("YCbCr"), "JPEG", subsampling=0),
    "JPEG RGB": encoded(PHOTO, "JPEG", keep_rgb=True),
    "JPEG progressive": encoded(PHOTO, "JPEG", progressive=True),
    "JPEG turned": encoded(
        PHOTO,
        "JPEG",
        exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0",
    ),
}


@pytest.mark.parametrize("name", [*EXACT, *NEAR])
def test_pictures_are_what_pillow_makes_of_them(name: str) -> None:
    data = (EXACT | NEAR)[name]
    expected = np.array(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)
    assert pixels(data).shape == expected.shape
    assert np.abs(pixels(data) - expected).max() <= (2 if name in NEAR else 0)


@pytest.mark.parametrize(
    "chunks", [b"", b"\0\0\0\x02tRNS\0\x07" + struct.pack(">I", zlib.crc32(b"tRNS\0\x07"))]
)
def test_of_16_bits_the_upper_8_are_taken(chunks: bytes) -> None:
    ramp = np.arange(65536).reshape(256, 256, 1)
    expected = np.repeat(ramp >> 8, 3, axis=2)
    assert np.array_equal(pixels(png(16, 0, ramp, chunks)), expected)
    assert np.array_equal(
        pixels(encoded(Image.fromarray(ramp[..., 0].astype(np.uint16)))), expected
    )
    rgb = np.repeat(ramp, 3, axis=2)
    assert np.array_equal(pixels(png(16, 2, rgb)), expected)


def test_16_bits_are_packed_as_they_are_trained_on(tmp_path: Path) -> None:
    ramp = np.tile(np.linspace(0, 65535, 400).astype(np.uint16), (400, 1))
    small, large = encoded(Image.fromarray(ramp[:64, :64])), encoded(Image.fromarray(ramp))
    members = [("a.png", small), ("a.txt", b"x"), ("b.png", large), ("b.txt", b"x")]
    pack(tar_of(tmp_path / "train-0.tar", members), tmp_path / "out")
    data = opened(tmp_path / "out" / "train-000000.tar")
    assert data.picture(0) == small
    row = pixels(data.picture(1))[128, :, 0]
    assert np.abs(row - np.linspace(0, 255, 256)).max() < 4


def sized(form: str, width: int, height: int) -> bytes:
    """A small picture whose header says that it is of another size."""
    data = bytearray(picture(form=form) if form != "WEBP" else encoded(PHOTO, "WEBP"))
    if form == "PNG":
        data[16:24] = struct.pack(">II", width, height)
        data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    elif form == "JPEG":
        at = data.index(b"\xff\xc0") + 5
        data[at : at + 4] = struct.pack(">HH", height, width)
    else:
        data[26:30] = struct.pack("<HH", width, height)
    return bytes(data)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_too_large_pictures_are_refused_by_their_header(tmp_path: Path, form: str) -> None:
    for width, height in ((14_000, 14_000), (16_383, 16_383)):
        with pytest.raises(ValueError, match=r"too large a picture: .*\d{9} pixels"):
            decode(sized(form, width, height))
    members = [("k.png", sized(form, 14_000, 14_000)), *sample("k", caption="x")[1:]]
    with pytest.raises(InputError, match=r"the first is .*: k: too large a picture"):
        pack(tar_of(tmp_path / "train-0.tar", members), tmp_path / "out")
