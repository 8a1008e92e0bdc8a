"""growth/: every parameter has its place, and inserted values are where the paper puts them."""

import open_clip
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modelchain.api.zoo import MODELS
from modelchain.errors import InputError
from modelchain_trainer.growth import depth, grow, rules

torch.set_num_threads(1)
FAMILIES = (
    ["ViT-T-16", "ViT-C-16", "ViT-S-16", "ViT-M-16", "ViT-B-16", "ViT-XB-16", "ViT-L-16"],
    ["Swin-T", "Swin-S", "Swin-B", "Swin-L"],
)
EDGES = [
    (family[i], family[j])
    for family in FAMILIES
    for i in range(len(family))
    for j in range(i + 1, len(family))
]
HEAD = 4


def clip(embed=12, heads=2, layers=2, text_heads=2, text_layers=2):
    vision = {
        "image_size": 8,
        "patch_size": 4,
        "width": heads * HEAD,
        "layers": layers,
        "head_width": HEAD,
    }
    text = {"context_length": 5, "vocab_size": 11, "width": text_heads * HEAD, "heads": text_heads}
    return open_clip.CLIP(embed, vision, text | {"layers": text_layers})


def numbered(model, start=1.0):
    """Give every element of a model a value of its own; returns its state dict."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.arange(start, start + parameter.numel()).view(parameter.shape))
            start += parameter.numel()
    return model.state_dict()


def blank(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    return model


def size(model):
    return sum(parameter.numel() for parameter in model.parameters())


shape = st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 3), st.integers(1, 4))


@settings(max_examples=40, deadline=None)
@given(
    old=shape,
    more=st.tuples(*[st.integers(0, 3)] * 4),
    embeds=st.tuples(st.integers(2, 9), st.integers(2, 9)),
)
def test_every_element_is_accounted_for_and_inserted_blocks_are_bit_equal(old, more, embeds):
    new = [a + b for a, b in zip(old, more, strict=True)]
    _, layers, _, text_layers = new
    predecessor = numbered(clip(embeds[0], *old))
    student = blank(clip(embeds[1], *new))
    report = grow(student, predecessor)

    assert report.to_dict() == {
        "method": {"width": "Insert", "depth": "Duplicate"},
        "inserted": report.inserted,
        "duplicated": report.duplicated,
        "new": report.new,
    }
    assert report.new == sum(int(p.isnan().sum()) for p in student.parameters())
    assert report.inserted + report.duplicated + report.new == size(student)
    assert (report.duplicated > 0) == (layers > old[1] or text_layers > old[3])

    for name, parameter in student.named_parameters():
        source = name
        for stack, p, q in (
            ("visual.transformer.resblocks", old[1], layers),
            ("transformer.resblocks", old[3], text_layers),
        ):
            if name.startswith(stack):
                layer = int(name[len(stack) + 1 :].split(".")[0])
                source = name.replace(f"{stack}.{layer}.", f"{stack}.{layer * p // q}.")
        chunks = 3 if "in_proj" in name else 1
        pairs = (
            zip(parameter.chunk(chunks), predecessor[source].chunk(chunks), strict=True)
            if parameter.ndim
            else []
        )
        placed = 0
        for a, b in pairs:
            corner = tuple(slice(min(m, n)) for m, n in zip(a.shape, b.shape, strict=True))
            assert torch.equal(a[corner], b[corner]), name
            placed += b[corner].numel()
        assert int((~parameter.isnan()).sum()) == (placed if parameter.ndim else 1), name
    assert student.logit_scale == predecessor["logit_scale"]


def test_untouched_elements_keep_the_students_own_initialisation():
    student, predecessor = clip(9, 3, 3, 3, 3), clip()
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    grow(student, numbered(predecessor))
    weight = student.visual.transformer.resblocks[0].attn.in_proj_weight
    mask = torch.ones_like(weight, dtype=torch.bool)
    for chunk in range(3):
        mask[chunk * 12 : chunk * 12 + 8, :8] = False
    assert torch.equal(
        weight[mask], before["visual.transformer.resblocks.0.attn.in_proj_weight"][mask]
    )
    assert torch.equal(student.text_projection[8:], before["text_projection"][8:])


def test_a_student_whose_new_dimensions_are_zero_reproduces_attention():
    predecessor, student = clip(), clip(heads=5, text_heads=3)
    with torch.no_grad():
        for parameter in [*student.parameters()]:
            parameter.zero_()
    grow(student, predecessor.state_dict())
    for ours, theirs in (
        (student.visual.transformer, predecessor.visual.transformer),
        (student.transformer, predecessor.transformer),
    ):
        x = torch.randn(3, 5, theirs.width)
        padded = torch.nn.functional.pad(x, (0, ours.width - theirs.width))
        expected = theirs.resblocks[1].attention(x)
        grown = ours.resblocks[1].attention(padded)
        assert (grown[..., : theirs.width] - expected).abs().max() <= 1e-6
        assert not grown[..., theirs.width :].any()


def test_depth_takes_the_floor_and_never_skips():
    assert depth.duplicate(12, 24) == [layer // 2 for layer in range(24)]
    assert depth.duplicate(6, 18) == [layer // 3 for layer in range(18)]
    assert depth.duplicate(2, 3) == [0, 0, 1]
    assert depth.duplicate(4, 4) == [0, 1, 2, 3]


def meta(name):
    config = MODELS[name].config.resolved()
    with torch.device("meta"):
        return open_clip.CLIP(**config)


@pytest.fixture(scope="module")
def family():
    return {name: meta(name) for names in FAMILIES for name in names}


def test_every_parameter_of_table_g_matches_exactly_one_rule(family):
    for model in family.values():
        for name, parameter in model.named_parameters():
            rule, _, _ = rules.match(name)
            assert len(rule.axes) == parameter.ndim, name


@pytest.mark.parametrize("edge", EDGES, ids="-".join)
def test_all_edges_of_table_g_grow_at_full_size(family, edge):
    predecessor, student = family[edge[0]], family[edge[1]]
    report = grow(student, predecessor.state_dict())
    embed_shrinks = predecessor.text_projection.shape[1] > student.text_projection.shape[1]
    assert report.inserted + report.duplicated + report.new == size(student)
    if not embed_shrinks:
        assert report.inserted == size(predecessor)
    deeper = edge[1] == "ViT-L-16" or (edge[0] == "Swin-T")
    assert (report.duplicated > 0) == deeper


def swin(width, depths):
    from timm.models.swin_transformer import SwinTransformer

    model = torch.nn.Module()
    model.visual = torch.nn.Module()
    model.visual.trunk = SwinTransformer(
        img_size=32,
        patch_size=4,
        window_size=2,
        embed_dim=width,
        depths=depths,
        num_heads=(width // HEAD, width // 2),
        num_classes=0,
    )
    model.visual.head = torch.nn.Sequential()
    model.visual.head.add_module("proj", torch.nn.Linear(2 * width, 6, bias=False))
    return model


def test_swin_inserts_qkv_and_patch_merging_block_by_block():
    predecessor, student = swin(4, (1, 2)), blank(swin(8, (2, 4)))
    old = numbered(predecessor)
    report = grow(student, old)
    new = dict(student.named_parameters())
    merge = "visual.trunk.layers.1.downsample."
    for block in range(4):
        a, b = slice(block * 8, block * 8 + 4), slice(block * 4, block * 4 + 4)
        assert torch.equal(new[merge + "norm.weight"][a], old[merge + "norm.weight"][b])
        assert torch.equal(
            new[merge + "reduction.weight"][:8, a], old[merge + "reduction.weight"][:, b]
        )
    block = "visual.trunk.layers.{}.blocks.{}.attn."
    for layer in range(4):  # 2 -> 4 layers in the second stage: 0 0 1 1
        ours, theirs = block.format(1, layer), block.format(1, layer // 2)
        for part in range(3):
            rows, source = slice(part * 16, part * 16 + 8), slice(part * 8, part * 8 + 8)
            assert torch.equal(
                new[ours + "qkv.weight"][rows, :8], old[theirs + "qkv.weight"][source]
            )
        name = "relative_position_bias_table"
        assert torch.equal(new[ours + name][:, :2], old[theirs + name])
    assert report.new == sum(int(p.isnan().sum()) for p in new.values())
    assert report.inserted == size(predecessor) and report.duplicated > 0


def test_swin_attention_is_reproduced_when_new_dimensions_are_zero():
    predecessor, student = swin(4, (1, 2)), swin(8, (2, 4))
    with torch.no_grad():
        for parameter in predecessor.parameters():
            parameter.normal_()
        for parameter in student.parameters():
            parameter.zero_()
    grow(student, predecessor.state_dict())
    ours, theirs = (m.visual.trunk.layers[1].blocks for m in (student, predecessor))
    x = torch.randn(3, 4, 8)
    grown = ours[2].attn(torch.nn.functional.pad(x, (0, 8)))
    assert torch.allclose(grown[..., :8], theirs[1].attn(x), rtol=1e-5, atol=1e-5)
    assert not grown[..., 8:].any()


def changed(state, **changes):
    return {name: tensor for name, tensor in (state | changes).items() if tensor is not None}


@pytest.mark.parametrize(
    ("old", "changes", "words"),
    [
        ({}, {"visual.ln_extra.weight": torch.ones(8)}, "visual.ln_extra.weight: 0 growth rules"),
        ({}, {"visual.ln_post.weight": None}, "visual.ln_post.weight: the predecessor has no"),
        (
            {},
            {"transformer.resblocks.1.ln_1.bias": None},
            "the predecessor has no transformer.resblocks.1.ln_1.bias",
        ),
        (
            {},
            {"visual.trunk.norm.weight": torch.ones(8)},
            "no place for the predecessor's visual.trunk.norm.weight",
        ),
        ({}, {"visual.proj": torch.ones(2, 8, 3)}, "visual.proj: shape"),
        ({}, {"positional_embedding": torch.ones(4, 8)}, "positional_embedding: shape"),
        (
            {},
            {"visual.transformer.resblocks.0.attn.in_proj_bias": torch.ones(23)},
            "in_proj_bias: shape",
        ),
        ({"heads": 4}, {}, "visual.class_embedding: shape"),
        ({"text_layers": 3}, {}, "transformer.resblocks: 3 layers to 2"),
    ],
)
def test_what_does_not_fit_is_an_error_naming_it(old, changes, words):
    with pytest.raises(InputError, match="cannot grow") as error:
        grow(clip(), changed(clip(**old).state_dict(), **changes))
    assert words in str(error.value)


def test_a_student_parameter_without_rule_and_unknown_methods_are_errors():
    student = clip()
    student.logit_bias = torch.nn.Parameter(torch.zeros(()))
    with pytest.raises(InputError, match="logit_bias: 0 growth rules"):
        grow(student, clip().state_dict())
    for methods in ({"width": "Tile"}, {"depth": "Stack"}):
        with pytest.raises(InputError, match="not known"):
            grow(clip(), clip().state_dict(), **methods)


def test_buffers_stay():
    student, predecessor = swin(8, (2, 4)), swin(4, (1, 2))
    before = {name: tensor.clone() for name, tensor in student.named_buffers()}
    with_buffers = predecessor.state_dict() | {
        name: tensor + 1 for name, tensor in predecessor.named_buffers()
    }
    grow(student, with_buffers)
    assert before and all(
        torch.equal(before[name], tensor) for name, tensor in student.named_buffers()
    )
