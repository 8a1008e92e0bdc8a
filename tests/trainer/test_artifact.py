"""artifact.py: what a stage leaves opens in open_clip, is never overwritten, and is refused if it
has changed.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import socket

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from modelchain.api.contracts import Manifest, Measured, Predecessor, Results
from modelchain.api.modelconfig import ModelConfig, VisionConfig
from modelchain.errors import InputError, WorkError
from modelchain.io.files import sha256_of
from modelchain_data.batches import evaluation_image
from modelchain_trainer import artifact, models

torch.set_num_threads(1)
DIGEST = "ab" * 32
FILES = {"open_clip_model.safetensors", "open_clip_config.json", "results.json"}
CONFIG = ModelConfig.model_validate(
    {
        "embed_dim": 12,
        "vision_cfg": {
            "image_size": 16,
            "patch_size": 8,
            "width": 16,
            "layers": 1,
            "head_width": 8,
        },
        "text_cfg": {"context_length": 8, "width": 16, "heads": 2, "layers": 1},
    }
).resolved()
SWIN = CONFIG | {
    "vision_cfg": VisionConfig(timm_model_name="swin_tiny_patch4_window7_224").resolved()
}


def export(root, attempt="local-a1", seed=0, digest=DIGEST, clip=None, config=CONFIG):
    measured = Measured(loss=1.0, metrics={"top1": 50.0})
    results = Results(
        stage="s0",
        model="inline",
        predecessor=None,
        steps=7,
        samples_seen=70,
        macs=1,
        seconds=2.0,
        initial=measured,
        final=measured,
        growth=None,
    )
    manifest = Manifest(
        kind="artifact", input_digest=digest, step=7, inputs={"a": 1}, files={}, environment={}
    )
    clip = clip or models.build(config, seed)
    artifact.export(clip, config, results, manifest, root / digest, attempt)
    return root / digest / "artifact"


def flip(path):
    raw = bytearray(path.read_bytes())
    raw[-3] ^= 1
    path.write_bytes(raw)


def predecessor(path, digest=None):
    weights = path / "open_clip_model.safetensors"
    return Predecessor(
        stage="s0",
        input_digest=DIGEST,
        artifact_digest=digest or sha256_of(weights),
        path=str(path),
    )


@pytest.mark.parametrize("config", [CONFIG, SWIN], ids=["vit", "swin"])
def test_it_opens_in_open_clip_and_gives_the_same_features(tmp_path, monkeypatch, config):
    monkeypatch.setattr(
        socket.socket, "connect", lambda *_: pytest.fail("nothing may be downloaded")
    )
    clip = models.build(config, 3).eval()
    directory = export(tmp_path, clip=clip, config=config)
    theirs, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{directory}")
    tokens = open_clip.get_tokenizer(f"local-dir:{directory}")(["a dog", "two cats " * 9])
    theirs.eval()
    picture = np.random.default_rng(0).integers(0, 256, (260, 300, 3), np.uint8)
    Image.fromarray(picture).save(tmp_path / "picture.png")
    pixels = evaluation_image((tmp_path / "picture.png").read_bytes(), clip.visual.image_size[0])
    image = models.normalise(pixels[None])
    assert torch.equal(preprocess(Image.fromarray(picture)), image[0]) and tokens.shape == (2, 8)
    with torch.no_grad():
        assert torch.allclose(
            theirs.encode_image(image), models.encode_image(clip, image), atol=1e-6
        )
        ours = models.encode_text_chunks(clip, [(tokens, torch.arange(len(tokens)))])
        assert torch.allclose(theirs.encode_text(tokens), ours, atol=1e-6)
    weights = clip.state_dict()
    assert theirs.state_dict().keys() == weights.keys()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in theirs.state_dict().items())


def test_the_manifest_covers_every_file(tmp_path):
    path = export(tmp_path)
    manifest, results = artifact.find(path.parent)
    assert {p.name for p in path.iterdir()} == {*FILES, "manifest.json"} and set(
        manifest.files
    ) == FILES
    for name, entry in manifest.files.items():
        assert (entry.sha256, entry.size) == (sha256_of(path / name), (path / name).stat().st_size)
    assert manifest.artifact_digest == sha256_of(path / "open_clip_model.safetensors")
    assert (manifest.kind, manifest.input_digest, manifest.step, results.steps) == (
        "artifact",
        DIGEST,
        7,
        7,
    )
    assert [p.name for p in path.parent.iterdir()] == ["artifact"]


def test_the_weights_bytes_depend_on_neither_time_nor_place(tmp_path):
    one = export(tmp_path / "one")
    two = export(tmp_path / "somewhere" / "else", attempt="0a1b2c3d-a9", digest="cd" * 32)
    for name in ("open_clip_model.safetensors", "open_clip_config.json"):
        assert (one / name).read_bytes() == (two / name).read_bytes()
    assert str(tmp_path).encode() not in b"".join(p.read_bytes() for p in one.iterdir())


def test_config_and_weights_come_back(tmp_path):
    config, weights = artifact.load_artifact(export(tmp_path))
    assert config == json.loads(json.dumps(CONFIG))
    expected = models.build(CONFIG, 0).state_dict()
    assert weights.keys() == expected.keys() and all(
        torch.equal(weights[n], expected[n]) for n in weights
    )
    models.build(config, 1).load_state_dict(weights)


def test_a_whole_artifact_stays_and_ours_is_dropped(tmp_path):
    path = export(tmp_path)
    before = {p.name: (p.read_bytes(), p.stat().st_ino) for p in path.iterdir()}
    export(tmp_path, "local-a2", seed=1)
    assert {p.name: (p.read_bytes(), p.stat().st_ino) for p in path.iterdir()} == before
    assert [p.name for p in path.parent.iterdir()] == ["artifact"]


def test_an_artifact_without_manifest_is_put_aside(tmp_path):
    path = export(tmp_path)
    (path / "manifest.json").unlink()
    assert artifact.find(path.parent) is None
    export(tmp_path, "local-a2", seed=1)
    assert artifact.find(path.parent) is not None
    aside = path.parent / "artifact-without-manifest-local-a2"
    assert {p.name for p in aside.iterdir()} == FILES


@pytest.mark.parametrize("name", sorted(FILES))
def test_a_damaged_artifact_is_refused_with_both_digests_and_never_overwritten(tmp_path, name):
    path = export(tmp_path)
    said = sha256_of(path / name)
    flip(path / name)
    before = {p.name: p.read_bytes() for p in path.iterdir()}
    for work in (lambda: artifact.find(path.parent), lambda: export(tmp_path, "local-a2", seed=1)):
        with pytest.raises(WorkError) as error:
            work()
        text = str(error.value)
        assert error.value.failure == "CorruptArtifact"
        assert str(path / name) in text and said in text and sha256_of(path / name) in text
    assert {p.name: p.read_bytes() for p in path.iterdir()} == before
    assert [p.name for p in path.parent.iterdir()] == ["artifact"]


def test_a_missing_file_and_a_torn_manifest_are_refused(tmp_path):
    path = export(tmp_path)
    (path / "results.json").unlink()
    with pytest.raises(WorkError, match=r"results\.json: is missing") as error:
        artifact.find(path.parent)
    assert error.value.failure == "CorruptArtifact"
    os.truncate(path / "manifest.json", 30)
    with pytest.raises(WorkError, match="is not a manifest"):
        artifact.find(path.parent)


def test_an_artifact_of_another_stage_in_this_place_is_refused(tmp_path):
    other = export(tmp_path, digest="cd" * 32)
    shutil.copytree(other, tmp_path / DIGEST / "artifact")
    with pytest.raises(WorkError, match="other inputs") as error:
        artifact.find(tmp_path / DIGEST)
    assert error.value.failure == "CorruptArtifact"
    with pytest.raises(WorkError):
        export(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_not_exported(tmp_path, value):
    clip = models.build(CONFIG, 0)
    with torch.no_grad():
        clip.visual.conv1.weight[0, 0, 0, 0] = value
    with pytest.raises(WorkError, match=r"visual\.conv1\.weight is not finite") as error:
        export(tmp_path, clip=clip)
    assert error.value.failure == "NonFinite" and not list(tmp_path.glob("*/*"))


@pytest.mark.parametrize("where", ["save_file", "entry_of", "seal"])
def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch, where):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(artifact, where, full)
    with pytest.raises(WorkError, match="writing the artifact") as error:
        export(tmp_path)
    assert error.value.failure == "VolumeFull" and not list((tmp_path / DIGEST).iterdir())


def test_what_a_killed_attempt_left_half_written_does_not_prevent_an_export(tmp_path):
    half = tmp_path / DIGEST / ".artifact-local-a1"
    half.mkdir(parents=True)
    (half / "open_clip_model.safetensors").write_bytes(b"half")
    assert artifact.find(tmp_path / DIGEST) is None
    export(tmp_path)
    assert [p.name for p in (tmp_path / DIGEST).iterdir()] == ["artifact"]


def test_a_predecessor_is_loaded_if_its_bytes_are_those_named(tmp_path):
    path = export(tmp_path)
    config, weights = artifact.load_predecessor(predecessor(path))
    assert (
        config["embed_dim"] == 12
        and weights.keys() == load_file(path / "open_clip_model.safetensors").keys()
    )


def test_a_predecessor_with_one_flipped_byte_is_refused_with_file_and_both_digests(tmp_path):
    path = export(tmp_path)
    weights = path / "open_clip_model.safetensors"
    wanted = predecessor(path)
    flip(weights)
    with pytest.raises(WorkError) as error:
        artifact.load_predecessor(wanted)
    assert error.value.failure == "CorruptPredecessor"
    assert all(
        part in str(error.value)
        for part in (str(weights), wanted.artifact_digest, sha256_of(weights))
    )


def test_a_predecessor_that_was_replaced_by_a_whole_artifact_is_refused_too(tmp_path):
    path = export(tmp_path)
    wanted = predecessor(path)
    shutil.rmtree(path)
    export(tmp_path, seed=1)
    weights = path / "open_clip_model.safetensors"
    with pytest.raises(WorkError, match="stage s0 left") as error:
        artifact.load_predecessor(wanted)
    assert error.value.failure == "CorruptPredecessor"
    assert all(
        part in str(error.value)
        for part in (str(weights), wanted.artifact_digest, sha256_of(weights))
    )


def test_where_there_is_no_artifact(tmp_path):
    with pytest.raises(WorkError, match="holds no artifact") as error:
        artifact.load_predecessor(predecessor(tmp_path, "0" * 64))
    assert error.value.failure == "CorruptPredecessor"
    with pytest.raises(InputError, match="holds no artifact"):
        artifact.load_artifact(tmp_path)
    assert artifact.find(tmp_path) is None
