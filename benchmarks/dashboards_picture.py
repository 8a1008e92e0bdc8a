"""`python benchmarks/dashboards_picture.py`: draw the three dashboards with a simulated day, as
docs/dashboard-*.png.

Prometheus answers every query, and Grafana's own open-source components draw the answers:
@grafana/ui and @grafana/data (Apache-2.0), bundled by esbuild and opened in Chromium. It needs npm
and chromium in PATH. The packages stay in the cache.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from PIL import Image

REPOSITORY = Path(__file__).parents[1]
for folder in ("tests/charts", "tests/cluster", "tests/tools", "charts"):
    sys.path.append(str(REPOSITORY / folder))
from boards import NAMES, board  # noqa: E402
from golang import cache_home  # noqa: E402
from recorded_day import Server, served  # noqa: E402
from simulated_day import BEGIN, END  # noqa: E402

PREVIEWER = REPOSITORY / "benchmarks" / "dashboards_previewer"
# Pixels of the page, of a line of the grid, and of the title.
WIDTH = 1608
LINE = 36
TOP = 56
PAGE = """<!doctype html><meta charset="utf-8"><style>{style}</style>
<body style="margin:0;background:#111217"><div id="root"></div>
<script>window.BOARD = {data}</script><script type="module">{script}</script>"""
QUIET = """--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync
    --disable-background-networking --disable-component-update --hide-scrollbars
    --virtual-time-budget=20000"""


def bundle() -> tuple[str, str]:
    """The previewer's script and style sheet, with all packages in them."""
    cache = cache_home() / "dashboards-previewer"
    cache.mkdir(parents=True, exist_ok=True)
    for source in PREVIEWER.iterdir():
        shutil.copy(source, cache)
    _run(cache, "npm", "install", "--no-audit", "--no-fund", "--ignore-scripts")
    options = [
        "--bundle",
        "--minify",
        "--format=esm",
        "--outfile=page.js",
        "--loader:.ttf=empty",
        "--loader:.woff=dataurl",
        "--loader:.woff2=dataurl",
    ]
    production = '--define:process.env.NODE_ENV="production"'
    _run(cache, "node_modules/.bin/esbuild", "previewer.jsx", *options, production)
    return (cache / "page.js").read_text(), (cache / "page.css").read_text()


CHOSEN = {"chain": {"chain": "vit"}}  # all chains, but one on the page about one chain


def answered(name: str, server: Server) -> dict[str, Any]:
    """A dashboard's panels, each with the answers to its queries."""
    chosen = CHOSEN.get(name, {})
    panels = [
        {
            "panel": panel,
            "answers": [
                {"target": target, "series": server.query(target, **chosen)}
                for target in panel.get("targets", [])
            ],
        }
        for panel in board(name)["panels"]
    ]
    title = " / ".join([board(name)["title"], *chosen.values()])
    return {"title": title, "begin": 1000 * BEGIN, "end": 1000 * END, "panels": panels}


def draw(name: str, data: dict[str, Any], script: str, style: str, folder: Path) -> None:
    page, picture = folder / f"{name}.html", folder / f"{name}.png"
    shown = {"data": json.dumps(data), "script": script, "style": style}
    closed = {key: text.replace("</script", "<\\/script") for key, text in shown.items()}
    page.write_text(PAGE.format(**closed))
    ends = [panel["panel"]["gridPos"] for panel in data["panels"]]
    height = TOP + LINE * max(at["y"] + at["h"] for at in ends)
    profile = f"--user-data-dir={folder / name}"
    window = f"--window-size={WIDTH},{height}"
    _run(
        folder,
        "chromium",
        *QUIET.split(),
        profile,
        window,
        f"--screenshot={picture}",
        page.as_uri(),
    )
    few = Image.open(picture).convert("RGB").quantize(200, dither=Image.Dither.NONE)
    few.save(REPOSITORY / "docs" / f"dashboard-{name}.png", optimize=True)


def _run(folder: Path, *command: str) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command[:3])}: {done.stderr[-2000:]}")


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    script, style = bundle()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with served(folder) as server:
            boards = {board_name: answered(board_name, server) for board_name in NAMES}
        for board_name, data in boards.items():
            draw(board_name, data, script, style, folder)


if __name__ == "__main__":
    main()
