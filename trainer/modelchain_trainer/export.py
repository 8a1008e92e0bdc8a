"""The vision tower of an artifact alone, in the files that timm or transformers opens, for models
that build on one.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from safetensors.torch import save_file
from torch import Tensor

from modelchain.api.contracts import CONFIG
from modelchain.errors import InputError
from modelchain.io.files import READABLE, fsync
from modelchain_trainer.artifact import load_artifact
from modelchain_trainer.checkpoint import as_work_error

Layout = Literal["timm", "transformers"]
Weights = dict[str, Tensor]
Json = dict[str, Any]
Names = tuple[tuple[str, str], ...]  # parts of a parameter's name: open_clip's, and the other's

# Replaced in this order, each wherever it occurs.
TIMM: Names = (
    ("class_embedding", "cls_token"),
    ("positional_embedding", "pos_embed"),
    ("conv1", "patch_embed.proj"),
    ("ln_pre", "norm_pre"),
    ("ln_post", "norm"),
    ("transformer.resblocks", "blocks"),
    ("ln_1", "norm1"),
    ("ln_2", "norm2"),
    ("in_proj_", "qkv."),
    ("out_proj", "proj"),
    ("c_fc", "fc1"),
    ("c_proj", "fc2"),
)
TRANSFORMERS: Names = (
    ("class_embedding", "embeddings.class_embedding"),
    ("conv1", "embeddings.patch_embedding"),
    ("positional_embedding", "embeddings.position_embedding.weight"),
    ("ln_pre", "pre_layrnorm"),  # spelled like this in transformers
    ("ln_post", "post_layernorm"),
    ("transformer.resblocks", "encoder.layers"),
    ("ln_1", "layer_norm1"),
    ("ln_2", "layer_norm2"),
    ("attn", "self_attn"),
    ("c_fc", "fc1"),
    ("c_proj", "fc2"),
)


def export(artifact: Path, to: Path, layout: Layout) -> None:
    """Write the folder `to`, complete or not at all. Every byte of the artifact is hashed again
    first.

    Raises:
        InputError: there is no artifact, `layout` does not know its tower, or `to` is not empty.
        WorkError: the artifact is damaged, or the disk is full.
    """
    config, weights = load_artifact(artifact)
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise InputError("exists already; remove it or choose another folder", file=to)
    if layout == "transformers" and "timm_model_name" in config["vision_cfg"]:
        raise InputError(
            "its tower is a Swin, which transformers' CLIP does not know: use --as timm",
            file=artifact,
        )
    visual = {
        name.removeprefix("visual."): t for name, t in weights.items() if name.startswith("visual.")
    }
    preprocess = json.loads((artifact / CONFIG).read_text())["preprocess_cfg"]
    make = _timm if layout == "timm" else _transformers
    tower, files = make(visual, config, preprocess)
    try:
        _write(to, tower, files)
    except Exception as error:
        raise as_work_error(error, f"writing {to}") from error


def _write(to: Path, tower: Weights, files: dict[str, Json]) -> None:
    """Weights, and JSON files by name, in a temporary folder that is renamed last."""
    to.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{to.name}-", dir=to.parent.resolve()) as folder:
        new = Path(folder, "new")
        new.mkdir()
        # transformers refuses files without this metadata.
        save_file(tower, new / "model.safetensors", metadata={"format": "pt"})
        for name, content in files.items():
            (new / name).write_text(json.dumps(content, indent=1))
        for file in new.iterdir():
            file.chmod(READABLE)
            fsync(file)
        new.rename(to)
        fsync(to.parent)


def _renamed(visual: Weights, names: Names) -> Iterable[tuple[str, Tensor]]:
    """The tower's parameters under their other names, without the projection."""
    for name, tensor in visual.items():
        if name != "proj":
            for ours, theirs in names:
                name = name.replace(ours, theirs)
            yield name, tensor


def _timm(visual: Weights, config: Json, preprocess: Json) -> tuple[Weights, dict[str, Json]]:
    vision = config["vision_cfg"]
    if "timm_model_name" in vision:  # a Swin, which is timm's own model inside open_clip's tower
        trunk = {
            name.removeprefix("trunk."): t
            for name, t in visual.items()
            if name.startswith("trunk.")
        }
        about = _timm_config(vision["timm_model_name"], "avg", {}, preprocess)
        return trunk, {"config.json": about}
    tower = dict(_renamed(visual, TIMM))
    tower["pos_embed"] = tower["pos_embed"][None]
    tower["cls_token"] = tower["cls_token"][None, None]
    # timm's architecture with open_clip's norm before the first block, and with its epsilon; the
    # arguments give it our shape.
    architecture = (
        "vit_base_patch16_clip_quickgelu_224"
        if config["quick_gelu"]
        else "vit_base_patch16_clip_224"
    )
    shape = {
        "img_size": vision["image_size"],
        "patch_size": vision["patch_size"],
        "embed_dim": vision["width"],
        "depth": vision["layers"],
        "num_heads": vision["width"] // vision["head_width"],
        "mlp_ratio": vision["mlp_ratio"],
    }
    return tower, {"config.json": _timm_config(architecture, "token", shape, preprocess)}


def _timm_config(architecture: str, pool: str, arguments: Json, preprocess: Json) -> Json:
    as_trained = {
        "input_size": [3, *preprocess["size"]],
        "interpolation": preprocess["interpolation"],
        "crop_pct": 1.0,
        "crop_mode": "center",
        "mean": preprocess["mean"],
        "std": preprocess["std"],
        "num_classes": 0,
        "first_conv": "patch_embed.proj",
    }
    return {
        "architecture": architecture,
        "num_classes": 0,
        "global_pool": pool,
        "model_args": arguments,
        "pretrained_cfg": as_trained,
    }


def _transformers(
    visual: Weights, config: Json, preprocess: Json
) -> tuple[Weights, dict[str, Json]]:
    tower: Weights = {}
    for name, tensor in _renamed(visual, TRANSFORMERS):
        if "in_proj_" in name:
            # open_clip has query, key and value in one tensor, transformers in three.
            for letter, part in zip("qkv", tensor.chunk(3), strict=True):
                of_part = name.replace("in_proj_", f"{letter}_proj.")
                tower[f"vision_model.{of_part}"] = part.contiguous()
        else:
            tower[f"vision_model.{name}"] = tensor
    return tower, {
        "config.json": _transformers_config(config),
        "preprocessor_config.json": _transformers_processor(preprocess),
    }


def _transformers_config(config: Json) -> Json:
    vision = config["vision_cfg"]
    return {
        "architectures": ["CLIPVisionModel"],
        "model_type": "clip_vision_model",
        "torch_dtype": "float32",
        "image_size": vision["image_size"],
        "patch_size": vision["patch_size"],
        "hidden_size": vision["width"],
        "num_hidden_layers": vision["layers"],
        "num_attention_heads": vision["width"] // vision["head_width"],
        "intermediate_size": int(vision["width"] * vision["mlp_ratio"]),
        "projection_dim": config["embed_dim"],
        "hidden_act": "quick_gelu" if config["quick_gelu"] else "gelu",
        "layer_norm_eps": 1e-5,
    }


def _transformers_processor(preprocess: Json) -> Json:
    side = preprocess["size"][0]
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": side},
        "resample": 3,  # PIL's bicubic
        "do_center_crop": True,
        "crop_size": {"height": side, "width": side},
        "do_rescale": True,
        "do_normalize": True,
        "image_mean": preprocess["mean"],
        "image_std": preprocess["std"],
    }
