"""CEL for model configs: the towers' own rules, and the neighbours' (RULES section 3), with Table G
as lookup maps.
"""

from __future__ import annotations

from collections.abc import Mapping

from modelchain.api import messages
from modelchain.api.modelconfig import (
    SWIN_HEAD_WIDTH,
    SWIN_IMAGE,
    SWIN_TRUNKS,
    VIT_ONLY,
    ModelConfig,
    TextConfig,
    VisionConfig,
)
from modelchain.crd.cel import FIRST_TO_LAST, literal, quoted, sentence
from modelchain.families.zoo import MODELS


def _given(at: str, name: str, kind: type[VisionConfig | TextConfig]) -> str:
    """A field of a tower, its default filled in: a CRD has no defaults inside lists."""
    default = kind.model_fields[name].default
    return f"(has({at}.{name}) ? {at}.{name} : {default})"


_W, _HW, _L, _IMAGE, _PATCH, _RATIO = (
    _given("self", name, VisionConfig)
    for name in ("width", "head_width", "layers", "image_size", "patch_size", "mlp_ratio")
)
_TW, _TH, _TRATIO = (_given("self", name, TextConfig) for name in ("width", "heads", "mlp_ratio"))
_TRUNK = "has(self.timm_model_name)"
_BESIDE = " || ".join(f"has(self.{key})" for key in VIT_ONLY)


def _whole(width: str, ratio: str) -> str:
    return f"double({width}) * {ratio} == double(int(double({width}) * {ratio}))"


# Tower, rule, message, values.
TOWERS: list[tuple[str, str, str, Mapping[str, str]]] = [
    ("vision_cfg", f"{_TRUNK} || {_W} % {_HW} == 0", messages.HEADS, {"w": _W, "h": _HW}),
    (
        "vision_cfg",
        f"{_TRUNK} || {_IMAGE} % {_PATCH} == 0",
        messages.PATCHES,
        {"s": _IMAGE, "p": _PATCH},
    ),
    (
        "vision_cfg",
        f"{_TRUNK} || {_whole(_W, _RATIO)}",
        messages.MLP,
        {"w": _W, "r": _RATIO},
    ),
    (
        "vision_cfg",
        f"{_TRUNK} || (!has(self.timm_pool) && !has(self.timm_proj))",
        messages.TIMM_ONLY,
        {},
    ),
    (
        "vision_cfg",
        f"!{_TRUNK} || self.timm_model_name in {literal(list(SWIN_TRUNKS))}",
        messages.UNKNOWN_TRUNK,
        {"name": "self.timm_model_name", "known": quoted(", ".join(SWIN_TRUNKS))},
    ),
    ("vision_cfg", f"!{_TRUNK} || !({_BESIDE})", messages.BESIDE_TRUNK, {}),
    ("vision_cfg", f"!{_TRUNK} || {_IMAGE} == {SWIN_IMAGE}", messages.TRUNK_IMAGE, {}),
    ("text_cfg", f"{_TW} % {_TH} == 0", messages.TEXT_HEADS, {"w": _TW, "h": _TH}),
    ("text_cfg", _whole(_TW, _TRATIO), messages.MLP, {"w": _TW, "r": _TRATIO}),
]

# A stage s as two lists that are compared place by place: sizes, which may not shrink, and what
# must be equal.
_SIZES = [
    "vision width",
    "vision heads",
    *["vision depth"] * 4,
    "text width",
    "text heads",
    "text depth",
]
_EQUALS = [
    "vision image_size",
    "vision head_width",
    "vision patch_size",
    "vision mlp_ratio",
    "text head width",
    "text context_length",
    "text mlp_ratio",
    "quick_gelu",
]


def _sizes(config: ModelConfig) -> list[int]:
    """Behind them 1 for a Swin and 0 for a ViT; a ViT's depth stands four times."""
    vision, text = config.vision_cfg, config.text_cfg
    depths = vision.depths if vision.is_swin else vision.depths * 4
    return [
        vision.base_width,
        vision.heads,
        *depths,
        text.width,
        text.heads,
        text.layers,
        int(vision.is_swin),
    ]


def _equals(config: ModelConfig) -> list[float]:
    """What a Swin trunk fixes is 0, which is compared with nothing; quick_gelu is 1 if false and 2
    if true.
    """
    vision, text = config.vision_cfg, config.text_cfg
    shape = (
        [0, 0, 0] if vision.is_swin else [vision.head_width, vision.patch_size, vision.mlp_ratio]
    )
    rest = [text.head_width, text.context_length, text.mlp_ratio, 1 + config.quick_gelu]
    return [float(value) for value in (vision.image_size, *shape, *rest)]


_C, _V, _T = "s.modelConfig", "s.modelConfig.vision_cfg", "s.modelConfig.text_cfg"
_IS_SWIN = f"has({_V}.timm_model_name)"
_KNOWN = (
    f"has(s.model) != has({_C}) && (has(s.model) ? s.model in {literal(list(MODELS))}"
    f" : (!{_IS_SWIN} || {_V}.timm_model_name in {literal(list(SWIN_TRUNKS))}))"
)


def _vit(name: str) -> str:
    return _given(_V, name, VisionConfig)


def _text(name: str) -> str:
    return _given(_T, name, TextConfig)


def _all_families() -> str:
    """CEL: of every stage of the list `self`, whether its tower is a Swin."""
    swins = literal([name for name, model in MODELS.items() if model.config.vision_cfg.is_swin])
    return f"self.map(s, has(s.model) ? s.model in {swins} : {_IS_SWIN})"


def _all_sizes() -> str:
    """CEL: the sizes of every stage of the list `self`."""
    table = {name: _sizes(model.config) for name, model in MODELS.items()}
    trunks = {name: [w, w // SWIN_HEAD_WIDTH, *depths] for name, (w, depths) in SWIN_TRUNKS.items()}
    layers = ", ".join([_vit("layers")] * 4)
    vit = f"[{_vit('width')}, {_vit('width')} / {_vit('head_width')}, {layers}]"
    vision = f"({_IS_SWIN} ? {literal(trunks)}[{_V}.timm_model_name] : {vit})"
    text = f"[{_text('width')}, {_text('heads')}, {_text('layers')}, {_IS_SWIN} ? 1 : 0]"
    return f"self.map(s, has(s.model) ? {literal(table)}[s.model] : ({vision} + {text}))"


def _all_equals() -> str:
    """CEL: what must be equal, of every stage of the list `self`."""
    table = {name: _equals(model.config) for name, model in MODELS.items()}
    shape = ", ".join(f"double({_vit(name)})" for name in ("head_width", "patch_size", "mlp_ratio"))
    vision = f"([double({_vit('image_size')})] + ({_IS_SWIN} ? [0.0, 0.0, 0.0] : [{shape}]))"
    head = f"double({_text('width')} / {_text('heads')})"
    quick = f"has({_C}.quick_gelu) && {_C}.quick_gelu ? 2.0 : 1.0"
    text = f"[{head}, double({_text('context_length')}), double({_text('mlp_ratio')}), {quick}]"
    return f"self.map(s, has(s.model) ? {literal(table)}[s.model] : ({vision} + {text}))"


def _pairs(
    lists: str, wrong: str, places: int, mismatch: str, message: str
) -> tuple[str, str, str]:
    """Rule, message and its expression for neighbours: `wrong` is CEL on v, the stages' lists, i, a
    stage's place in the chain, and k, a place in its list; `mismatch` says it. The first one found
    is said.
    """
    ks = literal(list(range(places)))
    said = sentence(
        messages.NEIGHBOURS, after="self[i].name", before="self[i - 1].name", mismatch=mismatch
    )
    at_fault = f"{FIRST_TO_LAST}.filter(i, i < v.size() && {ks}.exists(k, {wrong}))"
    return (
        f"!self.all(s, {_KNOWN}) || [{lists}].all(v, {at_fault}.size() == 0)",
        message,
        f"[{lists}].map(v, {at_fault}.map(i, {ks}.filter(k, {wrong}).map(k, {said})[0])[0])[0]",
    )


def _value(at: str) -> str:
    """CEL: the k-th of what must be equal, as it is written in YAML."""
    return f"(k == {_EQUALS.index('quick_gelu')} ? string(v[{at}][k] == 2.0) : string(v[{at}][k]))"


_SWIN = len(_SIZES)
_SHRINKS = sentence(messages.SHRINKS, name=f"{literal(_SIZES)}[k]", x="v[i - 1][k]", y="v[i][k]")
# Rule, message, CEL of the message's text.
NEIGHBOURS: list[tuple[str, str, str]] = [
    _pairs(_all_families(), "v[i] != v[i - 1]", 1, quoted(messages.FAMILIES), messages.FAMILIES),
    _pairs(
        _all_sizes(),
        f"v[i] == v[i - 1] || (v[i][{_SWIN}] == v[i - 1][{_SWIN}] && v[i][k] < v[i - 1][k])",
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
