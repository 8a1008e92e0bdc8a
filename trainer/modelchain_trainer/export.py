"""The vision tower of an artifact alone, in the files that timm or transformers opens: for those
who build on one.
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
Tower = tuple[
    dict[str, Tensor], dict[str, dict[str, Any]]
]  # weights, and the JSON files beside them by name
Names = tuple[tuple[str, str], ...]  # open_clip's part of a parameter's name, and theirs

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
    # sic
    ("positional_embedding", "embeddings.position_embedding.weight"),
    ("ln_pre", "pre_layrnorm"),
    ("ln_post", "post_layernorm"),
    ("transformer.resblocks", "encoder.layers"),
    ("ln_1", "layer_norm1"),
    ("ln_2", "layer_norm2"),
    ("attn", "self_attn"),
    ("c_fc", "fc1"),
    ("c_proj", "fc2"),
)


def export(artifact: Path, to: Path, layout: Layout) -> None:
    """Write the folder `to`, whole or not at all; every byte of the artifact is re-hashed first.

    Raises:
        InputError: no artifact there, a tower that `layout` does not know, or a folder `to` that
            holds something.
        WorkError: the artifact is damaged, or the disk is full.
    """
    config, weights = load_artifact(artifact)
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise InputError("exists already; remove it or choose another folder", file=to)
    visual = {
        name.removeprefix("visual."): t for name, t in weights.items() if name.startswith("visual.")
    }
    if layout == "transformers" and "timm_model_name" in config["vision_cfg"]:
        raise InputError(
            "its tower is a Swin, which transformers' CLIP does not know: use --as timm",
            file=artifact,
        )
    make = _timm if layout == "timm" else _transformers
    tower, files = make(
        visual, config, json.loads((artifact / CONFIG).read_text())["preprocess_cfg"]
    )
    try:
        to.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{to.name}-", dir=to.parent.resolve()) as folder:
            new = Path(folder, "new")
            new.mkdir()
            save_file(
                tower, new / "model.safetensors", metadata={"format": "pt"}
            )  # transformers insists on it
            for name, content in files.items():
                (new / name).write_text(json.dumps(content, indent=1))
            for file in new.iterdir():
                file.chmod(READABLE)
                fsync(file)
            new.rename(to)
            fsync(to.parent)
    except Exception as error:
        raise as_work_error(error, f"writing {to}") from error


def _renamed(visual: dict[str, Tensor], names: Names) -> Iterable[tuple[str, Tensor]]:
    """The tower's parameters without the projection, under their other names."""
    for name, tensor in visual.items():
        if name != "proj":
            for ours, theirs in names:
                name = name.replace(ours, theirs)
            yield name, tensor


def _timm(visual: dict[str, Tensor], config: dict[str, Any], preprocess: dict[str, Any]) -> Tower:
    vision = config["vision_cfg"]
    if "timm_model_name" in vision:
        trunk = {
            name.removeprefix("trunk."): t
            for name, t in visual.items()
            if name.startswith("trunk.")
        }
        return trunk, {
            "config.json": _timm_config(vision["timm_model_name"], "avg", {}, preprocess)
        }
    tower = {name: t[None] if name == "pos_embed" else t for name, t in _renamed(visual, TIMM)}
    tower["cls_token"] = tower["cls_token"][None, None]
    # An architecture with open_clip's norm before the first block, and its epsilon; the arguments
    # give it our shape.
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


def _timm_config(
    architecture: str, pool: str, arguments: dict[str, Any], preprocess: dict[str, Any]
) -> dict[str, Any]:
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
    visual: dict[str, Tensor], config: dict[str, Any], preprocess: dict[str, Any]
) -> Tower:
    vision, (side, _) = config["vision_cfg"], preprocess["size"]
    tower: dict[str, Tensor] = {}
    for name, tensor in _renamed(visual, TRANSFORMERS):
        if "in_proj_" in name:
            for letter, part in zip("qkv", tensor.chunk(3), strict=True):
                tower["vision_model." + name.replace("in_proj_", f"{letter}_proj.")] = (
                    part.contiguous()
                )
        else:
            tower[f"vision_model.{name}"] = tensor
    model = {
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
    processor = {
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
    return tower, {"config.json": model, "preprocessor_config.json": processor}
