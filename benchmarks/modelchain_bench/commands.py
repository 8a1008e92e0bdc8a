"""`modelchain bench step|loader|end-to-end`, found by the entry points of pyproject.toml."""

from __future__ import annotations

import typer

bench = typer.Typer(help="Measure the trainer against a stock open_clip loop on this machine.", no_args_is_help=True)
