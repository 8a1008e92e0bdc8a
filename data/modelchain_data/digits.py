"""Handwritten digits that come with the package: real pictures, with nothing to download.

`digits.csv.gz`: the 1,797 test pictures of "Optical Recognition of Handwritten Digits" (E. Alpaydin
and C. Kaynak, UCI Machine Learning Repository, CC BY 4.0), in the form in which scikit-learn ships
them: scikit-learn itself would add 190 MB to the trainer's image.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torchvision.io import encode_png

CLASSES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
_STARTS = (
    "a handwritten",
    "the digit",
    "the number",
    "a photo of the number",
    "a scan of the digit",
    "the figure",
)
TEMPLATES = [
    f"{start} {{}}{end}." for end in ("", " on a form", " in white on black") for start in _STARTS
]


class SourceRow(NamedTuple):
    """A sample to be packed. `read` raises OSError or ValueError if there is no picture or the row
    is unusable.
    """

    key: str
    where: str  # for errors
    read: Callable[[], bytes]
    meta: dict[str, Any]  # the json; `captions` is a list, or absent


def load() -> tuple[np.ndarray, list[int]]:
    """Pictures [1797, 8, 8] with values 0 to 16, and their labels."""
    table = np.loadtxt(Path(__file__).with_name("digits.csv.gz"), delimiter=",")
    return table[:, :-1].reshape(-1, 8, 8), [int(label) for label in table[:, -1]]


def splits() -> tuple[dict[str, list[SourceRow]], dict[str, list[str]]]:
    """Rows of each split, pictures at 32 x 32, and the lists of class names and templates."""
    found: dict[str, list[SourceRow]] = {"train": [], "val": []}
    seen: Counter[int] = Counter()
    for number, (image, label) in enumerate(zip(*load(), strict=True)):
        seen[label] += 1
        small = torch.from_numpy(image * 255 / 16).round().byte()
        grey = small.repeat_interleave(4, 0).repeat_interleave(4, 1)
        captions = [template.format(CLASSES[label]) for template in TEMPLATES]
        meta = {"captions": captions, "label": label, "classname": CLASSES[label]}
        row = SourceRow(
            f"digit-{number:04d}",
            f"digit {number}",
            partial(bytes, encode_png(grey[None]).numpy()),
            meta,
        )
        # Every fifth of each class, since every fifth of all would be 21 ones and 52 threes.
        found["train" if seen[label] % 5 else "val"].append(row)
    return found, {"classnames.json": CLASSES, "templates.json": TEMPLATES}
