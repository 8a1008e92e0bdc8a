"""How many times as large a model is as its predecessor: the paper's rule 2 (section 3.1.2).

The rule says 2 to 4 times, the ratios of published families. It does not say of what. The paper
calls a chain of all seven ViTs one of "2x", and ViT-T, S, B, L one of "4x". Their image towers grow
1.76 to 2.23 and 3.53 to 3.95 times in parameters. Whole models grow less, since their text towers
do. So the parameters of the image tower are compared, and the ratio is rounded to a whole number.
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from itertools import pairwise
from math import floor

from modelchain.api.modelconfig import ModelConfig
from modelchain.api.spec import ChainSpec
from modelchain.errors import Problem

SMALLEST, LARGEST = 2, 4


def size(config: ModelConfig) -> int:
    """The parameters of the image tower."""
    vision = config.vision_cfg
    return vision.family.parameters(vision, config.embed_dim)


def follows_rule_2(before: ModelConfig, after: ModelConfig) -> bool:
    """Whether `after` is 2 to 4 times as large as `before`."""
    ratio = Fraction(size(after), size(before))
    return SMALLEST <= floor(ratio + Fraction(1, 2)) <= LARGEST


def warnings(spec: ChainSpec, file: str) -> Iterator[Problem]:
    """A warning for each stage that is not 2 to 4 times as large as its predecessor."""
    for index, (before, after) in enumerate(pairwise(spec.stages), 1):
        if not follows_rule_2(before.config, after.config):
            ratio = size(after.config) / size(before.config)
            yield Problem(
                f"the image tower of '{after.name}' is {ratio:.1f} times as large as that of"
                f" '{before.name}'; the paper advises {SMALLEST} to {LARGEST} times:"
                " `modelchain plan --search` lists such chains",
                file,
                f"spec.stages[{index}]",
            )
