"""`modelchain bench step|loader|end-to-end`, which an entry point in pyproject.toml names."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table

from modelchain.errors import InputError
from modelchain_bench import LEVERS

# Waiting threads must not spin: as soon as another process wants a core, both loops would take many
# times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

bench = typer.Typer(
    help="Measure the trainer against a stock open_clip loop on this machine.", no_args_is_help=True
)

Model = Annotated[
    str, typer.Option("--model", help="A name of Table G, such as ViT-T-16 or Swin-T.")
]
BatchSize = Annotated[int, typer.Option("--batch", min=2, max=65_536, help="Pictures a step.")]
Captions = Annotated[int, typer.Option("--captions", min=1, max=64, help="Captions a picture.")]
Pairs = Annotated[
    int, typer.Option("--pairs", min=5, max=1000, help="Turns of each loop, interleaved.")
]
Precision = Annotated[
    Literal["bf16", "fp32"], typer.Option("--precision", help="bf16: by autocast, both loops.")
]
Output = Annotated[Literal["table", "json"], typer.Option("-o", "--output", help="What to print.")]


@bench.command()
def step(
    model: Model = "ViT-T-16",
    batch: BatchSize = 32,
    captions: Captions = 4,
    pad: Annotated[
        int | None,
        typer.Option("--pad", min=1, help="Process each caption with at least this many tokens."),
    ] = None,
    captions_file: Annotated[
        Path | None,
        typer.Option("--captions-file", help="One caption per line. Default: Flickr8k's lengths."),
    ] = None,
    precision: Precision = "fp32",
    without: Annotated[
        str, typer.Option("--without", help="Levers to switch off, parted by commas.")
    ] = "",
    predecessor: Annotated[
        str | None,
        typer.Option("--predecessor", help="Measure, too, what distilling from it would add."),
    ] = None,
    pairs: Pairs = 5,
    output: Output = "table",
) -> None:
    """One update on synthetic pictures: ours over the stock loop's samples a second.

    Example: [bold]modelchain bench step --model ViT-T-16 --batch 32 --captions 4[/bold]
    """
    config, off = _config(model, "--model"), _levers(without)
    before = _config(predecessor, "--predecessor") if predecessor else None
    # After the options were checked, since torch takes seconds to load.
    from modelchain_bench.step import Options, measure

    options = Options(
        batch, captions, pad=pad, captions_file=captions_file, precision=precision,
        pairs=pairs, without=off, predecessor=before,
    )  # fmt: skip
    _show({"model": model, "predecessor": predecessor} | measure(config, options), output)


def _levers(names: str) -> tuple[str, ...]:
    levers = tuple(name for name in names.split(",") if name)
    if unknown := set(levers) - set(LEVERS):
        raise InputError(
            f"{min(unknown)!r} is no lever; they are {', '.join(LEVERS)}", field="--without"
        )
    return levers


Data = Annotated[
    str | None, typer.Option("--data", help="Tars with captions, braces allowed; else synthetic.")
]


@bench.command()
def loader(
    model: Model = "ViT-T-16",
    batch: BatchSize = 32,
    captions: Captions = 4,
    data: Data = None,
    pairs: Pairs = 5,
    output: Output = "table",
) -> None:
    """Pictures and captions that one core loads: ours over open_clip's pipeline on the same files,
    and ours on packed files.

    Example: [bold]modelchain bench loader --data
    '../shared/data/coco-mini/train/train-000000.tar'[/bold]
    """
    config = _config(model, "--model")
    from modelchain_bench.loader import measure_loader

    side, context = config.vision_cfg.image_size, config.text_cfg.context_length
    found = measure_loader(
        batch, captions, data, image_size=side, context_length=context, pairs=pairs
    )
    _show({"model": model} | found, output)


@bench.command()
def end_to_end(
    model: Model = "ViT-T-16",
    batch: BatchSize = 32,
    captions: Captions = 4,
    data: Data = None,
    precision: Precision = "fp32",
    workers: Annotated[
        int,
        typer.Option(
            "--workers", min=1, max=256, help="Threads or processes that decode, for each loop."
        ),
    ] = 2,
    pairs: Pairs = 5,
    output: Output = "table",
) -> None:
    """From files to updated weights: ours over the stock loop's samples a second, on the same
    files.

    Example: [bold]modelchain bench end-to-end --model ViT-S-16 --batch 16[/bold]
    """
    config = _config(model, "--model")
    from modelchain_bench.end_to_end import measure

    found = measure(
        config, batch, captions, data, precision=precision, pairs=pairs, workers=workers
    )
    _show({"model": model} | found, output)


def _config(name: str, option: str) -> Any:
    from modelchain.api.zoo import MODELS

    if name not in MODELS:
        raise InputError(f"{name!r} is not known; the models are {', '.join(MODELS)}", field=option)
    return MODELS[name].config


def _show(found: dict[str, Any], output: str) -> None:
    if output == "json":
        typer.echo(json.dumps(found, indent=1))
        return
    console = Console()
    console.print(_pairs_table(found))
    if "tokens" in found:
        real, processed = found["tokens"]["real"], found["tokens"]["processed"]
        console.print(
            f"tokens a step: {real:.0f} real of {processed:.0f} processed ({real / processed:.0%})"
        )
    for name, label in (
        ("mfu", "MFU"),
        ("teacherShare", "teacher's share of a step"),
        ("dataWait", "data wait"),
    ):
        if found.get(name) is not None:
            console.print(f"{label}: {found[name]:.1%}")
    if "packedSamplesPerSecond" in found:
        console.print(f"packed first: {found['packedSamplesPerSecond']:.0f} a second")
    console.print(", ".join(f"{name} {value}" for name, value in found["environment"].items()))


def _pairs_table(found: dict[str, Any]) -> Table:
    title = f"{found['model']}, samples a second"
    table = Table("pair", "ours", "stock", "ratio", title=title, title_justify="left")
    samples = found["batch"] * found.get("stepsPerTurn", 1)
    for number, pair in enumerate(found["pairs"], 1):
        rates = (f"{samples / pair[who]:.2f}" for who in ("ours", "stock"))
        table.add_row(str(number), *rates, f"{pair['ratio']:.3f}")
    table.add_section()
    table.add_row(
        "median",
        *(f"{rate:.2f}" for rate in found["samplesPerSecond"].values()),
        f"[bold]{found['ratio']:.3f}[/bold]",
    )
    return table
