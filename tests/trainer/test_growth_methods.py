"""Growth methods against their papers: values on families scaled down by 8, shapes at full size."""

from __future__ import annotations

from functools import cache
from itertools import combinations, pairwise
from typing import get_args

import open_clip
import pytest
import sweeps
import torch
from timm.models.swin_transformer import SwinTransformer
from torch import nn
from torch.nn.functional import interpolate, normalize

from modelchain.api.spec import Transfer
from modelchain.api.zoo import MODELS
from modelchain_trainer.growth import agreement, depth, grow
from modelchain_trainer.growth.copies import drawn_map
from modelchain_trainer.growth.grow import WIDTH
from modelchain_trainer.growth.rules import HEADS, RULES, STREAM, Space, match

torch.set_num_threads(1)
VIT = {
    name: (width, layers)
    for name, width, layers in (
        ("T", 24, 12),
        ("S", 48, 12),
        ("M", 64, 12),
        ("B", 96, 12),
        ("XB", 128, 12),
        ("L", 128, 24),
    )
}
SWIN = {"T": (12, 6), "S": (12, 18), "B": (16, 18), "L": (24, 18)}
TEXT = {"T": 4, "S": 6, "M": 7, "B": 8, "XB": 10, "L": 12}  # heads of 8
HEAD = 8


class Swin(nn.Module):
    """open_clip's vision tower around timm's trunk, with small pictures; those of timm's own models
    have a fixed size.
    """

    def __init__(self, width: int, deep: int, embed: int):
        super().__init__()
        self.trunk = SwinTransformer(
            img_size=32,
            patch_size=2,
            window_size=2,
            embed_dim=width,
            depths=(2, 2, deep, 2),
            num_classes=0,
            num_heads=tuple(width * 2**stage // 4 for stage in range(4)),
            drop_path_rate=0.0,
        )
        self.head = nn.Sequential()
        self.head.add_module("proj", nn.Linear(8 * width, embed, bias=False))

    def forward(self, image):
        return self.head(self.trunk(image))


def clip(vision, layers, heads, embed=64, *, swin=False, text_layers=3):
    vit = {
        "image_size": 32,
        "patch_size": 16,
        "width": vision,
        "layers": layers,
        "head_width": HEAD,
    }
    text = {
        "context_length": 6,
        "vocab_size": 50,
        "width": heads * HEAD,
        "heads": heads,
        "layers": text_layers,
    }
    model = open_clip.CLIP(embed, vit, text).eval()
    if swin:
        model.visual = Swin(vision, layers, embed).eval()
    # After this no parameter is zero or one, so that a wrong one shows.
    for name, parameter in model.named_parameters():
        if name != "logit_scale":
            parameter.data += 0.02 * torch.randn_like(parameter)
    return model


def member(family, name, **changes):
    sizes, embed = (VIT, {"S": 48, "L": 96}) if family == "ViT" else (SWIN, {})
    return clip(
        *sizes[name],
        TEXT[name],
        **{"embed": embed.get(name, 64), "swin": family == "Swin", **changes},
    )


EDGES = [
    (family, a, b)
    for family, sizes in (("ViT", list(VIT)), ("Swin", list(SWIN)))
    for i, a in enumerate(sizes)
    for b in sizes[i + 1 :]
]

NEIGHBOURS = [edge for edge in EDGES if edge[1:] in [*pairwise(VIT), *pairwise(SWIN)]]


@torch.no_grad()
def similarities(model):
    """The logits that the loss sees, before the logit scale: five images against seven captions."""
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(5, 3, 32, 32, generator=generator)
    text = torch.randint(1, 48, (7, 6), generator=generator)
    text[torch.arange(7), torch.arange(7) % 5 + 1] = 49  # the end of a caption is its highest token
    return normalize(model.encode_image(image)) @ normalize(model.encode_text(text)).T


@pytest.mark.parametrize("swin", [False, True])
@pytest.mark.parametrize("embed", [64, 96, 128])
@pytest.mark.parametrize("method", ["FPI", "LEMON"])
@pytest.mark.parametrize("times", [2, 3])
def test_integer_multiples_compute_what_the_predecessor_did(method, swin, embed, times):
    old = clip(12 if swin else 24, 2, 3, swin=swin)
    new = clip((12 if swin else 24) * times, 2, 3 * times, embed, swin=swin)
    grow(new, old.state_dict(), method)
    assert (similarities(new) - similarities(old)).abs().max() < 1e-4


@pytest.mark.parametrize("way", depth.DEPTH)
def test_lemon_is_exact_for_a_text_tower_of_any_width_and_across_depth(way):
    old, new = clip(24, 2, 4, text_layers=2), clip(48, 5, 7, 96, text_layers=3)
    # A trained embedding is so large that a norm's epsilon is negligible beside it.
    old.token_embedding.weight.data *= 20
    grow(new, old.state_dict(), "LEMON", way)
    assert (similarities(new) - similarities(old)).abs().max() < 1e-4
    old, new = clip(12, 2, 2, swin=True), clip(24, 6, 2, swin=True)
    grow(new, old.state_dict(), "LEMON", way)
    assert (similarities(new) - similarities(old)).abs().max() < 1e-4


def test_lemon_s_copies_learn_different_things():
    """Equal copies that are read with equal weights would get equal gradients for ever."""
    new = clip(48, 2, 6)
    grow(new, clip(24, 2, 3).state_dict(), "LEMON")
    images, text = torch.randn(4, 3, 32, 32), torch.randint(1, 49, (4, 6))
    (new.encode_image(images) @ new.encode_text(text).T).square().sum().backward()
    for name in (
        "visual.transformer.resblocks.0.mlp.c_fc.weight",
        "transformer.resblocks.1.attn.in_proj_weight",
    ):
        first, second = (
            dict(new.named_parameters())[name].grad.chunk(3 if "in_proj" in name else 1)[0].chunk(2)
        )
        assert (first - second).abs().max() > 0.1 * first.abs().max()


@pytest.mark.parametrize("method", WIDTH)
def test_every_edge_of_both_families_grows_by_every_method(method):
    """In `make test` three edges a method."""
    edges = EDGES if method in ("Insert", "FPI", "LEMON") else NEIGHBOURS
    for family, a, b in sweeps.sample(f"edges by {method}", edges, 3):
        old, new = member(family, a, text_layers=1), member(family, b, text_layers=1)
        before = {name: tensor.clone() for name, tensor in new.state_dict().items()}
        report = grow(new, old.state_dict(), method)
        assert report.inserted + report.duplicated + report.new == sum(
            p.numel() for p in new.parameters()
        ), (family, a, b)
        assert similarities(new).isfinite().all(), (family, a, b)
        kept = sum(int((p == before[name]).sum()) for name, p in new.named_parameters())
        assert kept <= report.new + 5, (family, a, b, "what is not new is the predecessor's")


@cache
def full_size(name):
    with torch.device("meta"):
        return open_clip.CLIP(**MODELS[name].config.resolved())


# Slow on the meta device: tested on two edges. test_growth.py has all edges for Insert.
SLOW_WITHOUT_VALUES = ("Interpolate", "Net2Net", "AKI", "NetExpand")


@pytest.mark.parametrize("method", WIDTH)
def test_full_size_has_the_same_rules(method):
    """In `make test` one edge a method."""
    edges = [("ViT-S-16", "ViT-L-16"), ("Swin-T", "Swin-L")]
    if method not in SLOW_WITHOUT_VALUES:
        edges = [(a, b) for a, b in combinations(MODELS, 2) if a.split("-")[0] == b.split("-")[0]]
    for a, b in sweeps.sample(f"full size by {method}", edges, 1):
        old, new = full_size(a), full_size(b)
        report = grow(new, old.state_dict(), method)
        assert report.inserted + report.duplicated + report.new == sum(
            p.numel() for p in new.parameters()
        ), (a, b)
        shrinks = old.text_projection.shape[1] > new.text_projection.shape[1]
        assert shrinks or report.inserted == sum(p.numel() for p in old.parameters()), (a, b)


def grown(method, old_heads=2, new_heads=4, layers=2, depth="Duplicate"):
    old, new = clip(HEAD * old_heads, 2, old_heads), clip(HEAD * new_heads, layers, new_heads)
    own = {name: p.clone() for name, p in new.named_parameters()}
    grow(new, old.state_dict(), method, depth)
    return dict(old.named_parameters()), dict(new.named_parameters()), own


ATTENTION = "transformer.resblocks.{}.attn.in_proj_weight"
HIDDEN = "transformer.resblocks.{}.mlp.c_fc.weight"
OUT = "transformer.resblocks.{}.mlp.c_proj.weight"


def test_released_puts_the_fused_tensor_into_one_corner():
    """At twice the width the student's query is the predecessor's query and key, its key is the
    predecessor's value, and its value keeps its own initialisation.
    """
    old, new, own = grown("Released")
    there, here, mine = old[ATTENTION.format(0)], new[ATTENTION.format(0)], own[ATTENTION.format(0)]
    query, key, value = here.chunk(3)
    assert torch.equal(query[:, :16], there[:32]) and torch.equal(key[:16, :16], there[32:])
    assert torch.equal(key[16:], mine.chunk(3)[1][16:]) and torch.equal(value, mine.chunk(3)[2])


def as_the_authors_do(student, predecessor, deeper):
    """The authors' weight_initialization, written from an audit of their code: every tensor goes
    into the leading corner as a whole, and if the depth differs, layer l of the ViT, and of no
    other stack, goes to layers 2l and 2l + 1.
    """
    grown = {f"module.{name}": tensor.clone() for name, tensor in student.items()}
    for name, tensor in predecessor.items():
        name, targets = f"module.{name}", [f"module.{name}"]
        if deeper and name.startswith("module.visual.transformer.resblocks."):
            layer, rest = name.removeprefix("module.visual.transformer.resblocks.").split(".", 1)
            targets = [
                f"module.visual.transformer.resblocks.{2 * int(layer) + i}.{rest}" for i in (0, 1)
            ]
        for target in targets:
            if tensor.ndim == 0:
                grown[target] = tensor
            elif tensor.ndim == 1:
                grown[target][: len(tensor)] = tensor
            else:
                grown[target][: tensor.shape[0], : tensor.shape[1]] = tensor
    return {name.removeprefix("module."): tensor for name, tensor in grown.items()}


@pytest.mark.parametrize(
    "edge", [edge for edge in NEIGHBOURS if edge != ("ViT", "T", "S")], ids="-".join
)
def test_released_is_the_authors_code(edge):
    """Except where the embedding shrinks (ViT-T to S), which their code cannot do."""
    family, a, b = edge
    old, new = member(family, a), member(family, b)
    expected = as_the_authors_do(
        new.state_dict(), old.state_dict(), deeper=b == "L" and family == "ViT"
    )
    grow(new, old.state_dict(), "Released")
    for name, tensor in new.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("swin", [False, True])
def test_released_repeats_layers_in_a_vit_alone(swin):
    size = 12 if swin else 16
    old, new = clip(size, 2, 2, swin=swin), clip(size, 4, 2, swin=swin, text_layers=4)
    own = {name: p.clone() for name, p in new.named_parameters()}
    grow(new, old.state_dict(), "Released")
    name = "visual.trunk.layers.2.blocks.{}.mlp.fc1.weight" if swin else "visual." + HIDDEN
    there, here = dict(old.named_parameters()), dict(new.named_parameters())
    for layer in range(4):
        expected = (
            own[name.format(layer)]
            if swin and layer > 1
            else there[name.format(layer if swin else layer // 2)]
        )
        assert torch.equal(here[name.format(layer)], expected)
    assert torch.equal(here[HIDDEN.format(3)], own[HIDDEN.format(3)]), (
        "the text tower's fourth layer keeps its own initialisation"
    )


def test_duplication_lays_tiles():
    old, new, _ = grown("Duplicate")
    assert torch.equal(new[HIDDEN.format(1)], old[HIDDEN.format(1)].tile(2, 2))
    for theirs, ours in zip(
        old[ATTENTION.format(1)].chunk(3), new[ATTENTION.format(1)].chunk(3), strict=True
    ):
        assert torch.equal(ours, theirs.tile(2, 2))


def test_interpolation_is_bilinear_and_keeps_queries_keys_and_values_apart():
    old, new, _ = grown("Interpolate", 2, 3)
    for theirs, ours in zip(
        old[ATTENTION.format(0)].chunk(3), new[ATTENTION.format(0)].chunk(3), strict=True
    ):
        assert torch.allclose(
            ours, interpolate(theirs[None, None], size=(24, 24), mode="bilinear")[0, 0], atol=1e-6
        )
    name = "visual.conv1.weight"
    lines = old[name].flatten(1)[None, None]
    size = (24, lines.shape[-1])
    assert torch.allclose(
        new[name].flatten(1), interpolate(lines, size=size, mode="bilinear")[0, 0], atol=1e-6
    )


def test_net2net_copies_whole_heads_and_shares_what_is_read():
    """From two heads to four, 16 channels to 32: every new row is an old row plus noise, and reads
    in sum what that row read.
    """
    torch.manual_seed(5)
    old, new, _ = grown("Net2Net")
    theirs, rows = old[ATTENTION.format(0)].chunk(3)[0], new[ATTENTION.format(0)].chunk(3)[0]
    source = drawn_map(HEADS, 32, 16, HEAD)
    assert (source.view(4, HEAD) % HEAD == torch.arange(HEAD)).all(), "heads are whole"
    channels = drawn_map(STREAM, 32, 16, HEAD)
    read = torch.stack([rows[:, channels == channel].sum(1) for channel in range(16)], 1)
    noise = 0.01 * theirs.std()
    assert torch.allclose(read[:16], theirs, atol=1e-6)
    assert 0 < (read[16:] - theirs[source[16:]]).abs().max() < 20 * noise
    drawn = drawn_map(STREAM, 320, 160, 1)[160:].tolist()
    assert len(set(drawn)) < 120, "drawn with replacement"


def test_aki_takes_new_outputs_from_the_next_layer():
    old, new, _ = grown("AKI")
    for layer, after in ((0, 1), (1, 2), (2, 2)):  # three layers
        ours = new[HIDDEN.format(layer)]
        assert torch.allclose(ours[:64], old[HIDDEN.format(layer)].tile(1, 2) / 2)
        assert torch.allclose(ours[64:], old[HIDDEN.format(after)].tile(1, 2) / 2)
    assert torch.equal(new["ln_final.weight"], old["ln_final.weight"].tile(2))


def test_netexpand_s_new_rows_are_orthogonal_to_the_old():
    old, new, own = grown("NetExpand", 2, 4)
    name = "transformer.resblocks.0.attn.out_proj.weight"
    assert torch.equal(new[name][:16, :16], old[name]) and torch.equal(
        new[name][:, 16:], own[name][:, 16:]
    )
    rows = new["visual.conv1.weight"].flatten(1)
    assert (rows[:16] @ rows[16:].T).abs().max() < 1e-4 * rows[:16].norm()
    assert (
        rows[16:] @ rows[16:].T - torch.eye(16) * rows[:16].square().sum(1).mean()
    ).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("way", "expected"),
    [
        ("Constant", [0, 1, None, None, None]),
        ("Interval", [0, None, None, 1, None]),
        ("Duplicate", [0, 0, 0, 1, 1]),
    ],
)
def test_depth_as_the_paper_draws_it(way, expected):
    assert depth.DEPTH[way](2, 5) == expected
    assert depth.DEPTH[way](4, 4) == [0, 1, 2, 3]
    for layers in range(1, 9):
        for more in range(layers, 25):
            taken = depth.DEPTH[way](layers, more)
            assert [k for i, k in enumerate(taken) if k is not None and k not in taken[:i]] == list(
                range(layers)
            )
    old, new, own = grown("Insert", 2, 2, layers=5, depth=way)
    for layer, source in enumerate(expected):
        name = "visual." + HIDDEN
        assert torch.equal(
            new[name.format(layer)],
            own[name.format(layer)] if source is None else old[name.format(source)],
        )


def test_rules_tell_axes_that_read_from_axes_that_write():
    """No parameter has two growing axes of the same role; and a projection's axes have the roles
    that open_clip's matrix product gives them.
    """
    for rule in RULES:
        grows = [axis for axis in rule.axes if axis.space is not Space.FIXED]
        assert len({axis.role for axis in grows}) == len(grows), rule.pattern
    assert (
        match("text_projection")[0].axes[0].role == "reads"
        and match("visual.proj")[0].axes[1].role == "writes"
    )


def test_a_spec_names_the_methods_there_are():
    for field, methods in (("width", WIDTH), ("depth", depth.DEPTH)):
        assert set(get_args(Transfer.model_fields[field].annotation)) == set(methods)


@pytest.mark.parametrize("swin", [False, True])
def test_agreement_tells_what_was_kept(swin):
    """Layer by layer: everything after LEMON, little with a random initialisation."""
    size = 12 if swin else 24
    old, new = clip(size, 2, 3, swin=swin), clip(2 * size, 4, 6, swin=swin)

    def run(model):
        model.encode_image(torch.ones(2, 3, 32, 32))
        model.encode_text(torch.tensor([[1, 2, 3, 49, 0, 0]]))

    before = agreement(new, old, run)
    grow(new, old.state_dict(), "LEMON")
    after = agreement(new, old, run)
    stacks = (
        [f"visual.trunk.layers.{i}.blocks" for i in range(4)]
        if swin
        else ["visual.transformer.resblocks"]
    )
    assert set(after) == {*stacks, "transformer.resblocks"} and all(
        len(v) in (2, 3) for v in after.values()
    )
    assert min(map(min, after.values())) > 0.999 > 0.9 > max(map(max, before.values()))
