"""models.py: agreement with open_clip, text of any length, the student's projections."""

import warnings

import open_clip
import pytest
import torch

from modelchain.api.zoo import MODELS
from modelchain_trainer import models

torch.set_num_threads(1)
END = 63  # the highest id of the tests' vocabulary


def config(embed=12, width=16, layers=2, text=8, text_layers=2, context=77):
    return {
        "embed_dim": embed,
        "quick_gelu": False,
        "vision_cfg": {
            "image_size": 16,
            "patch_size": 8,
            "width": width,
            "layers": layers,
            "head_width": 4,
            "mlp_ratio": 4.0,
        },
        "text_cfg": {
            "context_length": context,
            "vocab_size": END + 1,
            "width": text,
            "heads": text // 4,
            "layers": text_layers,
            "mlp_ratio": 4.0,
        },
    }


def encode_text(model, tokens):
    """Text features of all captions in one chunk."""
    return models.encode_text_chunks(model, [(tokens, torch.arange(len(tokens)))])


def captions(lengths, width, seed=0):
    tokens = torch.zeros(len(lengths), width, dtype=torch.long)
    generator = torch.Generator().manual_seed(seed)
    for row, length in enumerate(lengths):
        tokens[row, : length - 1] = torch.randint(1, END, (length - 1,), generator=generator)
        tokens[row, length - 1] = END
    return tokens


def test_build_is_a_pure_function_of_config_and_seed():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        a, b, c = models.build(config(), 1), models.build(config(), 1), models.build(config(), 2)
    assert torch.equal(torch.get_rng_state(), before)
    a, b, c = a.state_dict(), b.state_dict(), c.state_dict()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["visual.conv1.weight"], c["visual.conv1.weight"])
    assert all(
        tensor.dtype == torch.float32 and tensor.device.type == "cpu" for tensor in a.values()
    )


def test_swin_builds_from_the_zoo_config_and_keeps_timms_stochastic_depth():
    with torch.device("meta"):
        model = models.build(MODELS["Swin-T"].config.resolved(), 0)
    rates = [m.drop_prob for m in model.modules() if hasattr(m, "drop_prob")]
    assert max(rates) == pytest.approx(0.1)
    images = torch.empty(2, 3, 224, 224, device="meta")
    assert models.encode_image(model.eval(), images).shape == (2, 512)


def test_normalise_is_open_clips():
    from PIL import Image

    pixels = torch.randint(
        0, 256, (2, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    transform = open_clip.image_transform(16, is_train=False)
    expected = [transform(Image.fromarray(picture.permute(1, 2, 0).numpy())) for picture in pixels]
    assert torch.allclose(models.normalise(pixels), torch.stack(expected), rtol=0, atol=1e-6)


@pytest.mark.parametrize("length", [4, 9, 30, 77])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-6)])
def test_encode_text_at_any_length_is_open_clips_at_full_length(length, dtype, tolerance):
    model = models.build(config(), 0).to(dtype)
    tokens = captions([2, 3, length, max(2, length - 1)], 77)
    ours, theirs = encode_text(model, tokens[:, :length]), model.encode_text(tokens)
    assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()
    for a, b in zip(
        torch.autograd.grad(ours.square().sum(), list(model.transformer.parameters())),
        torch.autograd.grad(theirs.square().sum(), list(model.transformer.parameters())),
        strict=True,
    ):
        assert (a - b).norm() <= 10 * tolerance * b.norm()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-5)])
def test_the_last_layers_pooled_token_alone_is_open_clips_whole_layer(dtype, tolerance):
    ours = models.build(config(layers=3), 0).to(dtype)
    theirs = open_clip.CLIP(**config(layers=3)).to(dtype)
    theirs.load_state_dict(ours.state_dict())
    images = torch.randn(3, 3, 16, 16, dtype=dtype, generator=torch.Generator().manual_seed(1))
    tokens = captions([5, 9, 3, 7], 77)
    loss = (
        models.encode_image(ours, images).square().sum()
        + encode_text(ours, tokens[:, :9]).square().sum()
    )
    expected = (
        theirs.encode_image(images).square().sum() + theirs.encode_text(tokens).square().sum()
    )
    loss.backward()
    expected.backward()
    assert abs(loss - expected) <= tolerance * expected
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        if name != "logit_scale":
            assert (a.grad - b.grad).norm() <= tolerance * b.grad.norm(), name
    with torch.no_grad():  # the class is open_clip's still: its own forward runs on our layers
        assert torch.allclose(
            ours.encode_image(images), theirs.encode_image(images), rtol=tolerance
        )
        assert torch.allclose(ours.encode_text(tokens), theirs.encode_text(tokens), rtol=tolerance)


def test_encode_text_in_bf16_autocast_follows_open_clip():
    model = models.build(config(), 0)
    tokens = captions([3, 9, 5], 77)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = encode_text(model, tokens[:, :9]), model.encode_text(tokens)
    assert ours.dtype == theirs.dtype == torch.bfloat16
    assert torch.nn.functional.cosine_similarity(ours.float(), theirs.float()).min() > 0.999


def test_chunks_put_every_caption_in_its_row():
    model = models.build(config(), 0)
    tokens = captions([9, 3, 12, 5, 4, 7], 77)
    order = torch.tensor([1, 4, 3, 5, 0, 2])  # by length
    chunks = [(tokens[rows, :length], rows) for rows, length in ((order[:3], 5), (order[3:], 16))]
    features, expected = models.encode_text_chunks(model, chunks), model.encode_text(tokens)
    assert (features - expected).abs().max() <= 1e-6 * expected.abs().max()
    assert torch.equal(features, models.encode_text_chunks(model, chunks))


def test_decay_is_for_matrices_only():
    model = models.build(config(), 0)
    without = {
        name for name, parameter in model.named_parameters() if not models.decays(name, parameter)
    }
    assert {"logit_scale", "ln_final.weight", "visual.class_embedding"} <= without
    assert {name for name in without if "weight" in name} == {
        n for n in without if "ln_" in n and "weight" in n
    }
    assert {name for name, _ in model.named_parameters() if "bias" in name} <= without
    assert not models.decays(
        "visual.trunk.layers.0.blocks.0.attn.relative_position_bias_table", torch.ones(169, 3)
    )
    assert models.decays("visual.proj", model.visual.proj)


@pytest.mark.parametrize("predecessor", [None, 12, 7, 20])
def test_projection_starts_as_the_left_inverse_and_exists_only_where_widths_differ(predecessor):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    student = models.Student(models.build(config(embed=12), 0), predecessor)
    assert torch.equal(torch.get_rng_state(), before)
    tokens = captions([4, 6, 5, 3], 6)
    features = student(torch.randn(2, 3, 16, 16), [(tokens, torch.tensor([2, 0, 3, 1]))])
    assert features.image.shape == (2, 12) and features.text.shape == (4, 12)
    assert features.scale.shape == () and features.scale.item() == pytest.approx(1 / 0.07)
    if predecessor in (None, 12):
        assert (
            features.projected_image is features.image and features.projected_text is features.text
        )
        assert not [name for name, _ in student.named_parameters() if not name.startswith("clip.")]
        return
    kept = min(12, predecessor)
    for own, projected in (
        (features.image, features.projected_image),
        (features.text, features.projected_text),
    ):
        assert torch.equal(projected[:, :kept], own[:, :kept])
        assert projected.shape[1] == predecessor and not projected[:, kept:].any()
    sum(tensor.square().sum() for tensor in features).backward()
    assert all(parameter.grad is not None for parameter in student.parameters())
