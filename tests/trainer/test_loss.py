"""loss.py: values against plain loops; gradients with 1, 2 and 4 ranks against a plain computation
in one process.
"""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from modelchain.api.spec import Distillation
from modelchain_trainer import loss, models

torch.set_num_threads(1)
PICTURES, SLOTS, OWN, PREDECESSOR, END, ALPHA = 8, 3, 12, 10, 31, 500.0
CASES = [(dtype, pieces) for dtype in ("float64", "float32") for pieces in (1, 2)]


def make_student(dtype, predecessor=PREDECESSOR):
    config = {
        "embed_dim": OWN,
        "vision_cfg": {"image_size": 8, "patch_size": 4, "width": 8, "layers": 2, "head_width": 4},
        "text_cfg": {
            "context_length": 8,
            "vocab_size": END + 1,
            "width": 8,
            "heads": 2,
            "layers": 2,
        },
    }
    student = models.Student(models.build(config, 3), predecessor)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():  # as if T had been trained a little, so that its off-diagonal counts too
        for projection in filter(None, (student.image_projection, student.text_projection)):
            projection.weight += 0.1 * torch.randn(projection.weight.shape, generator=generator)
    return student.to(dtype)


def make_batch(dtype, predecessor=PREDECESSOR):
    generator = torch.Generator().manual_seed(5)
    images = torch.randn(PICTURES, 3, 8, 8, generator=generator, dtype=torch.float64).to(dtype)
    tokens = torch.randint(1, END, (PICTURES, SLOTS, 8), generator=generator)
    ends = torch.randint(2, 8, (PICTURES, SLOTS, 1), generator=generator)
    tokens = tokens.scatter(2, ends, END)
    teacher_image = torch.randn(PICTURES, predecessor, generator=generator, dtype=torch.float64).to(
        dtype
    )
    teacher_text = torch.randn(
        PICTURES, SLOTS, predecessor, generator=generator, dtype=torch.float64
    ).to(dtype)
    return images, tokens, teacher_image, teacher_text


def chunked(tokens_NML):
    """Captions of some pictures in two chunks, sorted by length and cut to the longest of each."""
    tokens = tokens_NML.flatten(0, 1)
    lengths = (tokens == END).int().argmax(1) + 1
    order = lengths.argsort(stable=True)
    return [(tokens[rows, : int(lengths[rows].max())], rows) for rows in order.chunk(2)]


def features(student, images, tokens):
    """Features of the whole batch with padded captions: [N, D], [N, M, D], and both after T."""
    image = student.clip.encode_image(images)
    text = torch.stack([student.clip.encode_text(tokens[:, slot]) for slot in range(SLOTS)], 1)
    projections = (
        student.image_projection or nn.Identity(),
        student.text_projection or nn.Identity(),
    )
    return image, text, projections[0](image), projections[1](text)


def reference(dtype, predecessor=PREDECESSOR):
    """Loss and gradients, without gathering or caching."""
    student = make_student(dtype, predecessor)
    images, tokens, *teacher = make_batch(dtype, predecessor)
    image, text, *projected = features(student, images, tokens)
    total = 0
    for slot in range(SLOTS):
        logits = (
            student.clip.logit_scale.exp()
            * F.normalize(image, dim=1)
            @ F.normalize(text[:, slot], dim=1).T
        )
        target = torch.arange(PICTURES)
        total += (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2 / SLOTS
    for ours, theirs in zip(projected, teacher, strict=True):
        difference = F.normalize(ours, dim=-1) - F.normalize(theirs, dim=-1)
        total += ALPHA * difference.square().sum(-1).mean() / predecessor
    total.backward()
    return total.detach(), {name: parameter.grad for name, parameter in student.named_parameters()}


def equations(dtype, predecessor=PREDECESSOR):
    """Loss and gradients by the paper's Eq. 1 to 4 written out, with means in place of sums over
    pairs.

    Features are of unit length: in Eq. 2 because of its cosines, in Eq. 1 because the authors' code
    makes them so (the paper does not say). Alpha is converted to pull as much in Eq. 1.
    """
    student = make_student(dtype, predecessor)
    images, tokens, *teacher = make_batch(dtype, predecessor)
    image, text, *projected = features(student, images, tokens)
    v, t, inverse_tau = unit_of(image), unit_of(text), student.clip.logit_scale.exp()
    to_image = to_text = 0
    for i in range(PICTURES):
        for j in range(SLOTS):
            own = ((t[i, j] @ v[i]) * inverse_tau).exp()
            to_image -= (
                own / sum(((t[i, j] @ v[k]) * inverse_tau).exp() for k in range(PICTURES))
            ).log()  # Eq. 2
            to_text -= (
                own / sum(((t[k, j] @ v[i]) * inverse_tau).exp() for k in range(PICTURES))
            ).log()
    task = (to_image + to_text) / 2 / (PICTURES * SLOTS)  # Eq. 3
    alpha = 2 * ALPHA / predecessor
    assert (
        Distillation(alpha=str(alpha), convention="Equation1").released_alpha(predecessor) == ALPHA
    )
    pulls = [
        alpha * (unit_of(theirs) - unit_of(ours)).square().sum(-1).mean()  # Eq. 1
        for ours, theirs in zip(projected, teacher, strict=True)
    ]
    total = task + sum(pulls) / 2  # Eq. 4
    total.backward()
    return total.detach(), {name: parameter.grad for name, parameter in student.named_parameters()}


def unit_of(x):
    return x / x.square().sum(-1, keepdim=True).sqrt()


def step(student, dtype, pieces, rank=0, world=1, no_sync=None, predecessor=PREDECESSOR):
    """Our loss of one rank's rows of the batch, in pieces; leaves gradients in the parameters."""
    images, tokens, teacher_image, teacher_text = (
        t.chunk(world)[rank] for t in make_batch(dtype, predecessor)
    )
    parts = [(images.chunk(pieces)[i], chunked(tokens.chunk(pieces)[i])) for i in range(pieces)]

    def loss_of(features):
        text = features.text.unflatten(0, (-1, SLOTS))
        task = loss.contrastive(features.image, text, features.scale)
        pull = loss.distillation(
            features.projected_image,
            features.projected_text,
            teacher_image,
            teacher_text.flatten(0, 1),
            ALPHA,
        )
        return task + pull, task, pull

    options = {"no_sync": no_sync} if no_sync else {}
    return loss.cached_backward(lambda part: student(*part), parts, loss_of, **options)


def rank_main(rank, world, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world
    )
    results = {}
    for name, pieces in CASES:
        dtype = getattr(torch, name)
        wrapped = nn.parallel.DistributedDataParallel(make_student(dtype))
        value, task, pull = step(wrapped, dtype, pieces, rank, world, wrapped.no_sync)
        assert torch.allclose(value, task + pull)
        dist.all_reduce(value)
        results |= {f"{name}.{pieces}.{n}": p.grad for n, p in wrapped.module.named_parameters()}
        results[f"{name}.{pieces}.loss"] = value / world
    # The incoming gradient is a transposed view, whose memory is in another order.
    x = torch.arange(6.0, dtype=torch.float64).view(3, 2).add(10 * rank).requires_grad_()
    gathered = loss.gather(x)
    weight = torch.arange(6.0 * world, dtype=torch.float64).view(2, 3 * world) * (rank + 1)
    (gathered.T * weight).sum().backward()
    results |= {"gathered": gathered.detach(), "gathered.grad": x.grad}
    save_file(
        {key: tensor.contiguous() for key, tensor in results.items()},
        f"{folder}/rank-{rank}.safetensors",
    )
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=[1, 2, 4], ids=lambda world: f"world{world}")
def ranks(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    arguments = (request.param, str(folder))
    mp.start_processes(rank_main, arguments, request.param, start_method="forkserver")
    return [load_file(Path(folder) / f"rank-{rank}.safetensors") for rank in range(request.param)]


def assert_same(got, value, gradients, tolerance, skip=()):
    assert abs(got["loss"] - value) <= tolerance * abs(value)
    difference = sum(
        (got[name] - gradient).square().sum() for name, gradient in gradients.items()
    ).sqrt()
    assert difference <= tolerance * sum(g.square().sum() for g in gradients.values()).sqrt()
    # Each by itself too, because a small wrong one would hide in the norm of all.
    for name, gradient in gradients.items():
        assert (got[name] - gradient).norm() <= 10 * tolerance * gradient.norm(), name


TOLERANCE = {"float64": 1e-10, "float32": 1e-5}


@pytest.mark.parametrize("truth", [reference, equations])
@pytest.mark.parametrize(("name", "pieces"), CASES)
def test_gradients_over_ranks_and_pieces_are_those_of_the_whole_batch(ranks, name, pieces, truth):
    value, gradients = truth(getattr(torch, name))
    prefix = f"{name}.{pieces}."
    for results in ranks:
        got = {key.removeprefix(prefix): t for key, t in results.items() if key.startswith(prefix)}
        assert_same(got, value, gradients, TOLERANCE[name])


def test_gather_is_in_rank_order_and_its_gradient_sums_over_ranks(ranks):
    world = len(ranks)
    rows = torch.cat(
        [torch.arange(6.0, dtype=torch.float64).view(3, 2) + 10 * rank for rank in range(world)]
    )
    weight = torch.arange(6.0 * world, dtype=torch.float64).view(2, 3 * world) * sum(
        range(1, world + 1)
    )
    for rank, results in enumerate(ranks):
        assert torch.equal(results["gathered"], rows)
        assert torch.equal(results["gathered.grad"], weight.T.chunk(world)[rank])


@pytest.mark.parametrize("predecessor", [PREDECESSOR, OWN], ids=["T", "equal dims"])
@pytest.mark.parametrize(
    "pieces", [1, 2, 3, 8], ids=["whole", "2 pieces", "unequal pieces", "one by one"]
)
@pytest.mark.parametrize("name", TOLERANCE)
def test_without_a_process_group(name, pieces, predecessor):
    dtype = getattr(torch, name)
    student = make_student(dtype, predecessor)
    value, *_ = step(student, dtype, pieces, predecessor=predecessor)
    got = {"loss": value} | {n: p.grad for n, p in student.named_parameters()}
    assert not value.requires_grad
    assert_same(got, *reference(dtype, predecessor), TOLERANCE[name])


def unit(x):
    return x / np.sqrt((x * x).sum(-1, keepdims=True))


def test_contrastive_is_the_double_loop():
    generator = np.random.default_rng(0)
    image, text, scale = generator.normal(size=(5, 6)), generator.normal(size=(5, 3, 6)), 7.0
    total = 0.0
    for slot in range(3):
        for i in range(5):
            similar = lambda a, b, slot=slot: scale * unit(image[a]) @ unit(text[b, slot])  # noqa: E731
            own = similar(i, i)
            total += math.log(sum(math.exp(similar(i, j)) for j in range(5))) - own
            total += math.log(sum(math.exp(similar(j, i)) for j in range(5))) - own
    expected = total / (2 * 3 * 5)
    ours = loss.contrastive(
        torch.tensor(image), torch.tensor(text), torch.tensor(scale, dtype=torch.float64)
    )
    assert ours.item() == pytest.approx(expected, rel=1e-12)


def test_distillation_is_that_of_the_released_code_and_differs_from_eq_1_by_a_known_factor():
    generator = np.random.default_rng(1)
    arrays = [generator.normal(size=shape) for shape in ((4, 6), (8, 6), (4, 6), (8, 6))]
    image, text, teacher_image, teacher_text = (unit(a) for a in arrays)
    ours = loss.distillation(*(torch.tensor(a) for a in arrays), alpha=500.0).item()
    squares = (
        ((image - teacher_image) ** 2).sum(1).mean(),
        ((text - teacher_text) ** 2).sum(1).mean(),
    )
    assert ours == pytest.approx(500 / 6 * sum(squares), rel=1e-12)
    assert 500 * sum(squares) / 2 == pytest.approx(ours * 6 / 2, rel=1e-12)


def test_losses_are_fp32_inside_autocast_and_for_bf16_features():
    image, text = torch.randn(4, 8), torch.randn(4, 2, 8)
    scale = torch.tensor(20.0)
    plain = loss.contrastive(image, text, scale)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(loss.contrastive(image, text, scale), plain)
        pull = loss.distillation(image.bfloat16(), text[:, 0].bfloat16(), image, text[:, 0], 500.0)
        rough = loss.contrastive(image.bfloat16(), text.bfloat16(), scale)
    assert pull.dtype == rough.dtype == torch.float32
    assert rough.item() == pytest.approx(plain.item(), abs=0.1)


def test_pieces_draw_the_same_noise_in_both_passes_and_work_in_autocast():
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.drop = nn.Linear(6, 4), nn.Dropout(0.5)

        def forward(self, x):
            with torch.autocast("cpu", torch.bfloat16):
                out = self.drop(self.linear(x))
            return models.Features(
                out, out.unflatten(0, (-1, 1)).flatten(0, 1), x.new_ones(()) * 10, out, out
            )

    def loss_of(features):
        return (features.image.float().square().sum(),)

    torch.manual_seed(0)
    x, model = torch.randn(8, 6), Noisy()
    torch.manual_seed(1)
    sum(loss_of(model(part))[0] for part in x.split(2)).backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    torch.manual_seed(1)
    loss.cached_backward(model, x.split(2), loss_of)
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        assert gradient.any() and torch.allclose(parameter.grad, gradient, rtol=1e-5)
