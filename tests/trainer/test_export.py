"""export.py and docs/using-models.md: what other libraries open has the artifact's features, and
CLIP_benchmark measures the same numbers.

CLIP_benchmark, transformers and the open_clip version that SAN pins are installed once, into a
cache outside the tree.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import open_clip
import pytest
import timm
import tiny
import torch
import typer
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from typer.testing import CliRunner

from modelchain.api.contracts import (
    DataRequest,
    EvaluationTask,
    Manifest,
    Measured,
    Results,
    TaskEvaluation,
    TrainFiles,
)
from modelchain.api.modelconfig import ModelConfig
from modelchain.errors import InputError, WorkError
from modelchain_trainer import artifact, commands, export, models
from modelchain_trainer.evaluate import measure

torch.set_num_threads(1)
HERE = Path(__file__).parent
PAGE = (HERE.parents[1] / "docs" / "using-models.md").read_text()
TEXT = {"context_length": 77, "width": 16, "heads": 2, "layers": 2}
VIT = {"image_size": 16, "patch_size": 8, "width": 24, "layers": 3, "head_width": 8}
SWIN = {
    "timm_model_name": "swin_tiny_patch4_window7_224",
    "timm_pool": "avg",
    "timm_proj": "linear",
}
TOWERS = {
    "vit": {"embed_dim": 16, "vision_cfg": VIT},
    "quick": {"embed_dim": 16, "vision_cfg": VIT | {"mlp_ratio": 2.0}, "quick_gelu": True},
    "swin": {"embed_dim": 16, "vision_cfg": SWIN},
}


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory):
    """An artifact of each tower. Its weights differ so much from their initial values that none is
    zero, so that a wrong one shows.
    """
    folder, measured = tmp_path_factory.mktemp("artifacts"), Measured(loss=1.0, metrics={})
    for name, tower in TOWERS.items():
        config = ModelConfig.model_validate({**tower, "text_cfg": TEXT}).resolved()
        clip, generator = models.build(config, 5), torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in clip.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
        results = Results(
            stage=name,
            model="inline",
            predecessor=None,
            steps=1,
            samples_seen=1,
            macs=1,
            seconds=1.0,
            initial=measured,
            final=measured,
            growth=None,
        )
        inputs = {"precision": "fp32"}
        manifest = Manifest(
            kind="artifact", input_digest=name, step=1, inputs=inputs, files={}, environment={}
        )
        artifact.export(clip, config, results, manifest, folder / name, "local-a1")
    return {name: folder / name / "artifact" for name in TOWERS}


@pytest.fixture(scope="module")
def others():
    """A folder with the packages of hand-over.txt, and in its `san` the open_clip of SAN."""
    pins = HERE / "hand-over.txt"
    key = hashlib.sha256(f"{pins.read_text()} {sys.version}".encode()).hexdigest()[:12]
    folder = (
        Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        / "modelchain"
        / f"hand-over-{key}"
    )
    if not (folder / "whole").exists():
        shutil.rmtree(folder, ignore_errors=True)
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        pip += ["--no-deps", "--no-compile"]
        for target, what in (
            (folder, ["-r", str(pins)]),
            (folder / "san", ["open_clip_torch==2.16.0"]),
        ):
            done = subprocess.run(
                [*pip, "--target", str(target), *what], capture_output=True, text=True, check=False
            )
            if done.returncode:
                pytest.skip(
                    "CLIP_benchmark and transformers cannot be installed:"
                    f" {done.stderr.strip()[-200:]}"
                )
        (folder / "whole").touch()
    return folder


def blocks(language, heading):
    """The code blocks of one language in the page's section `heading`."""
    section = PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return re.findall(rf"^```{language}\n(.*?)^```$", section, re.M | re.S)


def run(path, folder, code):
    """Run Python code in `folder`, with the packages in `path` before our own."""
    environment = os.environ | {
        "PYTHONPATH": str(path),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONDONTWRITEBYTECODE": "",  # they are installed without: compiled once, not each time
    }
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command,
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout


def opened(directory):
    clip, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{directory}")
    return clip.eval(), preprocess


def picture(width=50, height=40):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8))


@pytest.mark.parametrize("name", TOWERS)
def test_timm_opens_the_tower_with_equal_features(artifacts, tmp_path, name):
    export.export(artifacts[name], tmp_path / "tower", "timm")
    assert sorted(p.name for p in (tmp_path / "tower").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]
    assert [p.name for p in tmp_path.iterdir()] == ["tower"]
    tower = timm.create_model(f"local-dir:{tmp_path / 'tower'}", pretrained=True).eval()
    transform = create_transform(**resolve_model_data_config(tower), is_training=False)
    clip, preprocess = opened(artifacts[name])
    images = preprocess(picture(300, 260))[None]
    assert torch.equal(transform(picture(300, 260))[None], images)
    with torch.no_grad():
        pooled = tower(images)
        projected = clip.visual.head(pooled) if name == "swin" else pooled @ clip.visual.proj
        assert torch.allclose(projected, clip.encode_image(images), atol=1e-5)
    assert pooled.shape == (1, tower.num_features) and pooled.std() > 0.1


def test_transformers_opens_the_tower_with_equal_features(artifacts, others, tmp_path):
    names = "vit", "quick"
    for name in names:
        export.export(artifacts[name], tmp_path / name, "transformers")
    images = opened(artifacts["vit"])[1](picture())[None]
    torch.save(images, tmp_path / "images.pt")
    picture().save(tmp_path / "picture.png")
    code = """if True:
        import torch
        from PIL import Image
        from transformers import CLIPImageProcessor, CLIPVisionModel
        for name in ("vit", "quick"):
            tower, info = CLIPVisionModel.from_pretrained(name, output_loading_info=True)
            assert not any(info.values()), info
            processor = CLIPImageProcessor.from_pretrained(name)
            picture = processor(images=Image.open("picture.png"), return_tensors="pt")
            with torch.no_grad():
                out = tower.eval()(torch.load("images.pt"), output_hidden_states=True)
            tensors = picture["pixel_values"], out.pooler_output, out.hidden_states[1:]
            torch.save(tensors, f"{name}.pt")"""
    run(others, tmp_path, code)
    for name in names:
        prepared, pooled, hidden = torch.load(tmp_path / f"{name}.pt")
        clip, layers = opened(artifacts[name])[0], []
        for block in clip.visual.transformer.resblocks:
            block.register_forward_hook(
                lambda module, inputs, output, layers=layers: layers.append(output)
            )
        with torch.no_grad():
            expected = clip.encode_image(images)
        # Within a grey level, because transformers resizes tensors.
        assert torch.allclose(prepared, images, atol=0.02)
        assert torch.allclose(pooled @ clip.visual.proj, expected, atol=1e-5)
        assert len(hidden) == len(layers) == 3
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(hidden, layers, strict=True))


def test_the_open_clip_of_san_opens_what_the_page_writes(artifacts, others, tmp_path):
    (tmp_path / "ARTIFACT").symlink_to(artifacts["vit"])
    page = blocks("python", "In SAN (ViT)")[0]
    code = f"""{page}
import open_clip
open_clip.add_model_config("san/modelchain.json")
clip, _, _ = open_clip.create_model_and_transforms("modelchain", pretrained="san/modelchain.pt")
clip.eval()
with torch.no_grad():
    images = clip.encode_image(torch.load("images.pt"))
    texts = clip.encode_text(open_clip.tokenizer.tokenize(["a dog", "two cats"]))
torch.save((images, texts, hasattr(clip.visual, "input_patchnorm")), "theirs.pt")
"""
    clip, preprocess = opened(artifacts["vit"])
    images = preprocess(picture())[None]
    torch.save(images, tmp_path / "images.pt")
    run(others / "san", tmp_path, code)
    theirs, texts, as_san_expects = torch.load(tmp_path / "theirs.pt")
    with torch.no_grad():
        assert torch.allclose(theirs, clip.encode_image(images), atol=1e-5)
        assert torch.allclose(
            texts, clip.encode_text(open_clip.tokenize(["a dog", "two cats"])), atol=1e-5
        )
    assert as_san_expects


def retrieval_data(folder):
    """Digits with captions that are all different, and the lists a zero-shot evaluation needs."""
    folder.mkdir()
    words = [
        f"{tone} {shape}" for tone in ("dark", "pale", "grey", "white") for shape in tiny.NAMES
    ]
    captions = [
        [f"{w} number {i}", f"one more of {w}", f"{i} times {w}, again"]
        for i, w in enumerate(words)
    ]
    samples = [tiny.digit(i, texts) for i, texts in enumerate(captions)]
    tiny.shard(folder / "val-000000.tar", samples)
    (folder / "classnames.json").write_text(json.dumps(tiny.NAMES))
    (folder / "templates.json").write_text(json.dumps(["a handwritten {}.", "the digit {}", "{}"]))


def measured_by_us(artifact, data, cache):
    shard = {"shards": "/data/val-000000.tar", "files": [str(data / "val-000000.tar")]}
    lists = {
        "class_names": str(data / "classnames.json"),
        "templates": str(data / "templates.json"),
    }
    evaluations = [
        TaskEvaluation(name="top1", kind="ZeroShot", **shard, **lists),
        TaskEvaluation(name="r1", kind="Retrieval", **shard),
    ]
    train = TrainFiles(files=[], samples=0, captions_per_sample=1, fingerprint=None)
    data = DataRequest(index=str(cache), file="chain.yaml", train=train, evaluation=evaluations)
    return measure(EvaluationTask(artifact=str(artifact), data=data)).metrics


def test_clip_benchmark_measures_what_we_measure(artifacts, others, tmp_path):
    """Runs the page's own lines, which name the folders ARTIFACT and DIR."""
    retrieval_data(tmp_path / "DIR")
    (tmp_path / "ARTIFACT").symlink_to(artifacts["vit"])
    lines = blocks("sh", "In CLIP_benchmark")[1].replace("\\\n", " ").splitlines()
    typed = [shlex.split(line) for line in lines]
    assert [words[0] for words in typed] == ["clip_benchmark"] * 2
    program = (
        f"import sys\nfrom clip_benchmark.cli import main\nfor sys.argv in {typed}:\n    main()"
    )
    run(others, tmp_path, blocks("python", "In CLIP_benchmark")[0] + program)
    classes, found = (
        json.loads((tmp_path / f"{n}.json").read_text())["metrics"] for n in ("classes", "captions")
    )
    theirs = {"top1": classes["acc1"], "top1/top-5": classes["acc5"]}
    for k in (1, 5, 10):
        theirs[f"r1/image-to-text-r{k}"] = found[f"text_retrieval_recall@{k}"]
        theirs[f"r1/text-to-image-r{k}"] = found[f"image_retrieval_recall@{k}"]
    ours = measured_by_us(artifacts["vit"], tmp_path / "DIR", tmp_path / "cache")
    del ours["r1"]
    assert ours == pytest.approx({name: 100 * part for name, part in theirs.items()}, abs=1e-4)
    assert 0 < ours["top1"] < ours["top1/top-5"] < 100 and 0 < ours["r1/text-to-image-r5"] < 100


def test_the_command_writes_what_is_asked_for(artifacts, tmp_path):
    app = typer.Typer()
    app.command()(commands.export)
    for words, files in (([], 2), (["--as", "transformers"], 3)):
        to = tmp_path / f"deep/er/{files}"
        done = CliRunner().invoke(app, [str(artifacts["vit"]), "--to", str(to), *words])
        assert done.exit_code == 0 and len(list(to.iterdir())) == files


def test_what_cannot_be_exported_leaves_nothing_behind(artifacts, tmp_path, monkeypatch):
    to = tmp_path / "tower"
    with pytest.raises(InputError, match=r"holds no artifact \(no manifest\.json\)"):
        export.export(tmp_path, to, "timm")
    with pytest.raises(
        InputError, match="is a Swin, which transformers' CLIP does not know: use --as timm"
    ):
        export.export(artifacts["swin"], to, "transformers")
    damaged = shutil.copytree(artifacts["vit"], tmp_path / "damaged")
    weights = bytearray((damaged / "open_clip_model.safetensors").read_bytes())
    weights[-3] ^= 1
    (damaged / "open_clip_model.safetensors").write_bytes(weights)
    with pytest.raises(WorkError, match="its sha256 is"):
        export.export(damaged, to, "timm")

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(WorkError, match=f"writing {to}") as error:
        patch.setattr(export, "save_file", full)
        export.export(artifacts["vit"], to, "timm")
    assert error.value.failure == "VolumeFull"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["damaged"]
    for there in (damaged, damaged / "manifest.json"):
        with pytest.raises(InputError, match="exists already"):
            export.export(artifacts["vit"], there, "timm")
