"""CEL rules of the CRD on the shapes of models.

Some hold within one tower. Others compare neighbouring stages, because a stage is grown from its
predecessor's weights. CEL can compute the shape of an inline config, but not of a model's name, so
the shapes of all named models are in the rules as lookup maps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from modelchain.api import messages
from modelchain.api.modelconfig import ModelConfig, TextConfig
from modelchain.api.zoo import MODELS
from modelchain.cel import FIRST_TO_LAST, given, literal, quoted, sentence, whole_product
from modelchain.families.registry import FAMILIES
from modelchain.families.tower import DEPTHS, WHOLE_MLP, Family, VisionFields

_WIDTH, _HEADS, _RATIO = (
    given("self", TextConfig, name) for name in ("width", "heads", "mlp_ratio")
)

# Each rule within a tower: the tower's field, the CEL, its message, and the CEL of each value that
# the message names.
TOWERS: list[tuple[str, str, str, Mapping[str, str]]] = [
    *(
        ("vision_cfg", rule.cel, rule.message, rule.cel_values())
        for family in FAMILIES
        for rule in family.RULES
    ),
    ("text_cfg", f"{_WIDTH} % {_HEADS} == 0", messages.TEXT_HEADS, {"w": _WIDTH, "h": _HEADS}),
    ("text_cfg", whole_product(_WIDTH, _RATIO), WHOLE_MLP, {"w": _WIDTH, "r": _RATIO}),
]

# To compare a stage with its neighbour, its shape is written as two lists, which are compared place
# by place. The places of the first are sizes that must not shrink; those of the second are values
# that must be equal.
_SIZES = [
    "vision width",
    "vision heads",
    *["vision depth"] * DEPTHS,
    "text width",
    "text heads",
    "text depth",
]
_FAMILIES_EQUAL = list(dict.fromkeys(name for family in FAMILIES for name in family.EQUAL))
_EQUALS = [
    "vision image_size",
    *(f"vision {name}" for name in _FAMILIES_EQUAL),
    "text head width",
    "text context_length",
    "text mlp_ratio",
    "quick_gelu",
]


def _sizes(config: ModelConfig) -> list[int]:
    """The sizes of a stage, followed by the number of its family."""
    vision, text = config.vision_cfg, config.text_cfg
    family = FAMILIES.index(vision.family)
    return [*vision.shape.places(), text.width, text.heads, text.layers, family]


def _equals(config: ModelConfig) -> list[float]:
    """The values of a stage that must equal those of its neighbours.

    0 stands for a field that the stage's family does not compare; the rule skips it. So quick_gelu
    is 1 for false and 2 for true.
    """
    vision, text = config.vision_cfg, config.text_cfg
    equal = vision.family.EQUAL
    shape = [getattr(vision, name) if name in equal else 0 for name in _FAMILIES_EQUAL]
    rest = [text.head_width, text.context_length, text.mlp_ratio, 1 + config.quick_gelu]
    return [float(value) for value in (vision.image_size, *shape, *rest)]


# CEL on a stage s, which names a model or has an inline config. A rule between neighbours is
# skipped unless all shapes are known: a wrong model or config has a rule of its own.
_C = "s.modelConfig"
_V = "s.modelConfig.vision_cfg"
_T = "s.modelConfig.text_cfg"
_SHAPES_KNOWN = " && ".join(f"({cel})" for f in FAMILIES if (cel := f.known_cel(_V)))
_KNOWN = (
    f"has(s.model) != has({_C})"
    f" && (has(s.model) ? s.model in {literal(list(MODELS))} : {_SHAPES_KNOWN})"
)


def _vision(name: str) -> str:
    return given(_V, VisionFields, name)


def _text(name: str) -> str:
    return given(_T, TextConfig, name)


def _by_family(cel_of: Callable[[Family], str]) -> str:
    """CEL: `cel_of(family)` for the family of the inline tower of stage s."""
    cel = cel_of(FAMILIES[0])
    for family in FAMILIES[1:]:
        cel = f"{family.is_of_cel(_V)} ? {cel_of(family)} : {cel}"
    return cel


def _all_of(family: Family) -> str:
    """CEL: for every stage of the list `self`, whether its tower is of this family."""
    models = literal(list(family.MODELS))
    return f"self.map(s, has(s.model) ? s.model in {models} : {family.is_of_cel(_V)})"


def _all_sizes() -> str:
    """CEL: the sizes of every stage of the list `self`."""
    table = {name: _sizes(model.config) for name, model in MODELS.items()}
    vision = _by_family(lambda family: family.shape_cel(_V))
    number = _by_family(lambda family: str(FAMILIES.index(family)))
    text = f"[{_text('width')}, {_text('heads')}, {_text('layers')}, {number}]"
    return f"self.map(s, has(s.model) ? {literal(table)}[s.model] : (({vision}) + {text}))"


def _all_equals() -> str:
    """CEL: for every stage of the list `self`, the values that must equal its neighbours'."""
    table = {name: _equals(model.config) for name, model in MODELS.items()}
    shape = _by_family(_family_equals)
    vision = f"([double({_vision('image_size')})] + ({shape}))"
    head = f"double({_text('width')} / {_text('heads')})"
    quick = f"has({_C}.quick_gelu) && {_C}.quick_gelu ? 2.0 : 1.0"
    text = f"[{head}, double({_text('context_length')}), double({_text('mlp_ratio')}), {quick}]"
    return f"self.map(s, has(s.model) ? {literal(table)}[s.model] : ({vision} + {text}))"


def _family_equals(family: Family) -> str:
    values = (
        f"double({_vision(name)})" if name in family.EQUAL else "0.0" for name in _FAMILIES_EQUAL
    )
    return f"[{', '.join(values)}]"


def _pairs(
    lists: str, wrong: str, places: int, mismatch: str, message: str
) -> tuple[str, str, str]:
    """A rule between neighbours: its CEL, its message, and CEL that makes a better message.

    Args:
        lists: CEL for the stages' lists.
        wrong: CEL that is true for a mismatch. In it v is the stages' lists, i a stage's place in
            the chain and k a place in its list.
        places: the length of a stage's list.
        mismatch: CEL for the text that describes the mismatch. The first one is reported.
        message: what is shown if the server cannot evaluate that text.
    """
    ks = literal(list(range(places)))
    text = sentence(
        messages.NEIGHBOURS, after="self[i].name", before="self[i - 1].name", mismatch=mismatch
    )
    at_fault = f"{FIRST_TO_LAST}.filter(i, i < v.size() && {ks}.exists(k, {wrong}))"
    return (
        f"!self.all(s, {_KNOWN}) || [{lists}].all(v, {at_fault}.size() == 0)",
        message,
        f"[{lists}].map(v, {at_fault}.map(i, {ks}.filter(k, {wrong}).map(k, {text})[0])[0])[0]",
    )


def _value(at: str) -> str:
    """CEL: the k-th value that must be equal, as a YAML file spells it: quick_gelu as a boolean."""
    return f"(k == {_EQUALS.index('quick_gelu')} ? string(v[{at}][k] == 2.0) : string(v[{at}][k]))"


_FAMILY = len(_SIZES)
_SHRINKS = sentence(messages.SHRINKS, name=f"{literal(_SIZES)}[k]", x="v[i - 1][k]", y="v[i][k]")
_OTHER = messages.OTHER_FAMILY
# Each rule between neighbours: its CEL, its message, and CEL that makes a better message.
NEIGHBOURS: list[tuple[str, str, str]] = [
    *(_pairs(_all_of(f), "v[i] != v[i - 1]", 1, quoted(_OTHER), _OTHER) for f in FAMILIES[1:]),
    _pairs(
        _all_sizes(),
        f"v[i] == v[i - 1] || (v[i][{_FAMILY}] == v[i - 1][{_FAMILY}] && v[i][k] < v[i - 1][k])",
        len(_SIZES),
        f"(v[i] == v[i - 1] ? {quoted(messages.NO_GROWTH)} : {_SHRINKS})",
        "along the chain no tower may shrink, and one must grow",
    ),
    _pairs(
        _all_equals(),
        "v[i][k] != 0.0 && v[i - 1][k] != 0.0 && v[i][k] != v[i - 1][k]",
        len(_EQUALS),
        sentence(messages.EQUAL, name=f"{literal(_EQUALS)}[k]", x=_value("i - 1"), y=_value("i")),
        "the shapes of neighbours do not go together",
    ),
]
