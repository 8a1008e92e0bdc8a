"""`modelchain bench step`: both loops compute the same, also with levers off, and the output keeps
its form.
"""

import json
from contextlib import ExitStack

import pytest
import torch
from typer.testing import CliRunner

from modelchain.api.modelconfig import ModelConfig
from modelchain.api.zoo import MODELS
from modelchain.errors import InputError
from modelchain_bench import LEVERS, commands, end_to_end, step
from modelchain_bench.captions import captions
from modelchain_bench.stock import StockLoop
from modelchain_trainer import models

CONFIG = ModelConfig.model_validate(
    {
        "embed_dim": 32,
        "vision_cfg": {
            "image_size": 32,
            "patch_size": 8,
            "width": 48,
            "layers": 3,
            "head_width": 16,
        },
        "text_cfg": {"context_length": 77, "width": 32, "heads": 2, "layers": 3},
    }
)
CPU, BATCH, SLOTS = torch.device("cpu"), 6, 3


@pytest.fixture(autouse=True)
def plain_torch():
    yield
    torch.use_deterministic_algorithms(False)


EVERY = [(), *((lever,) for lever in LEVERS), LEVERS]


@pytest.mark.parametrize(("swin", "without"), [(False, some) for some in EVERY] + [(True, ())])
def test_ours_and_the_stock_loop_are_the_same_mathematics(swin, without):
    """Loss to 1e-5, and every gradient: with all levers on, with each lever off, and
    with all off.
    """
    config = (
        MODELS["Swin-T"].config.model_copy(update={"text_cfg": CONFIG.text_cfg}) if swin else CONFIG
    )
    torch.manual_seed(0)
    stock = StockLoop(config.resolved(), CPU, "fp32", SLOTS)
    ours = step.our_step(config.resolved(), CPU, "fp32", None, stock.model)
    for module in (*stock.model.modules(), *ours.student.modules()):
        if hasattr(module, "drop_prob"):
            module.drop_prob = 0.0  # each draws for itself
    size = 2 if swin else BATCH
    texts = captions(size * SLOTS, 0)
    with ExitStack() as off:
        for lever in without:
            step.switch_off(lever, ours, off, 77)
        assert all(
            bool(group["fused"]) != ("fused" in without) for group in ours.optimizer.param_groups
        )
        batch = step._batch(config, 0, size, texts, None)
        loss = ours(batch)[0]
    expected = stock.step(models.normalise(batch.images), step._padded(texts, 77))
    assert abs(loss - expected) <= 1e-5 * expected
    whole = sum(p.grad.square().sum() for p in stock.model.parameters()).sqrt()
    for (name, a), b in zip(
        ours.student.clip.named_parameters(), stock.model.parameters(), strict=True
    ):
        assert (a.grad - b.grad).norm() <= 1e-5 * max(b.grad.norm(), 1e-3 * whole), name


@pytest.mark.timeout(900)  # a C++ compiler at work
def test_compiled_layers_are_the_same_mathematics():
    """On a GPU they are compiled; here the compiler runs for the CPU."""
    model = models.build(
        {**CONFIG.resolved(), "text_cfg": {**CONFIG.text_cfg.resolved(), "layers": 2}}, 0
    )
    chunks = [(step._padded(captions(4, 0), 77)[:, :24], torch.arange(4))]
    plain = models.encode_text_chunks(model, chunks)
    plain.square().sum().backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    models.compile_layers(model)
    compiled = models.encode_text_chunks(model, chunks)
    compiled.square().sum().backward()
    assert (compiled - plain).norm() <= 1e-5 * plain.norm()
    for name, gradient in expected.items():
        assert (
            dict(model.named_parameters())[name].grad - gradient
        ).norm() <= 1e-5 * gradient.norm(), name


def test_what_is_printed(monkeypatch):
    monkeypatch.setitem(
        MODELS, "ViT-T-16", type(MODELS["ViT-T-16"])(CONFIG, MODELS["ViT-T-16"].paper)
    )
    run = CliRunner().invoke(
        commands.bench,
        ["step", "--batch", "4", "--captions", "2", "--pad", "77", "-o", "json"],
        catch_exceptions=False,
    )
    found = json.loads(run.stdout)
    assert {
        "model",
        "batch",
        "captions",
        "ratio",
        "samplesPerSecond",
        "pairs",
        "tokens",
        "mfu",
        "environment",
    } <= found.keys()
    assert len(found["pairs"]) == 5 and found["mfu"] is None and found["ratio"] > 0
    assert found["samplesPerSecond"].keys() == {"ours", "stock"}
    assert found["tokens"]["processed"] == 8 * 77 and found["tokens"]["real"] < 8 * 20
    run = CliRunner().invoke(
        commands.bench,
        [
            "step",
            "--batch",
            "4",
            "--captions",
            "2",
            "--predecessor",
            "ViT-T-16",
            "--without",
            "fused",
        ],
    )
    assert "ratio" in run.stdout and "teacher's share" in run.stdout


def test_from_files_to_weights():
    found = end_to_end.measure(CONFIG, 4, 2, None, precision="fp32", pairs=1, workers=2)
    assert found["ratio"] > 0 and 0 <= found["dataWait"] <= 1 and len(found["pairs"]) == 1


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--model", "ViT-H-14"], "ViT-H-14"),
        (["--without", "speed"], "speed"),
        (["--predecessor", "x"], "'x'"),
        (["--pad", "78"], "78 is longer"),
    ],
)
def test_what_is_not_known_is_refused_by_name(given, said):
    with pytest.raises(InputError, match=said):
        CliRunner().invoke(commands.bench, ["step", *given], catch_exceptions=False)
