"""`python benchmarks/architecture_picture.py`: draw docs/architecture.svg."""

from __future__ import annotations

from html import escape
from pathlib import Path

WIDTH, HEIGHT = 1180, 760
INK = "#1f2933"
FAINT = "#8896a5"
BLUE = "#e3eefb"
GREEN = "#e4f3e6"
SAND = "#fbf1de"
out: list[str] = []


def text(
    x: float,
    y: float,
    words: str,
    size: int = 14,
    colour: str = INK,
    anchor: str = "middle",
    bold: bool = False,
) -> None:
    weight = ' font-weight="bold"' if bold else ""
    out.append(
        f'<text x="{x}" y="{y}" font-size="{size}" fill="{colour}" text-anchor="{anchor}"{weight}>'
        f"{escape(words)}</text>"
    )


def lane(y: float, height: float, title: str) -> None:
    out.append(
        f'<rect x="20" y="{y}" width="{WIDTH - 40}" height="{height}" rx="10" fill="none"'
        f' stroke="{FAINT}" stroke-dasharray="5 5"/>'
    )
    text(36, y + 22, title, 14, FAINT, "start", bold=True)


def box(
    x: float, y: float, width: float, height: float, title: str, *lines: str, fill: str = BLUE
) -> None:
    out.append(
        f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="8" fill="{fill}"'
        f' stroke="{INK}" stroke-width="1.3"/>'
    )
    top = y + height / 2 - (len(lines)) * 9 + 5
    text(x + width / 2, top, title, 15, bold=True)
    for i, line in enumerate(lines):
        text(x + width / 2, top + 19 + i * 17, line, 12)


def arrow(
    *points: tuple[float, float],
    label: str = "",
    at: tuple[float, float] | None = None,
    anchor: str = "middle",
) -> None:
    path = " ".join(f"{'L' if i else 'M'}{x} {y}" for i, (x, y) in enumerate(points))
    out.append(
        f'<path d="{path}" fill="none" stroke="{INK}" stroke-width="1.6" marker-end="url(#tip)"/>'
    )
    if at:
        text(*at, label, 12, "#44546a", anchor)


text(
    WIDTH / 2,
    30,
    "A chain on its way: one round is one decision; the next stage begins where the last one ended",
    16,
    bold=True,
)

lane(48, 150, "the operator (modelchain_operator, modelchain)")
box(60, 92, 170, 78, "read", "chain, jobs, pods, records,", "from etcd, each time")
box(300, 92, 170, 78, "observe", "objects become what", "decide sees")
box(540, 92, 210, 78, "decide", "pure: spec, what is seen,", "the time -> what to do next")
box(900, 92, 200, 78, "execute", "the only writer", "at most one write a decision")
box(772, 60, 104, 46, "plan", "epochs, MACs", fill=SAND)
arrow((230, 131), (300, 131))
arrow((470, 131), (540, 131))
arrow((750, 140), (900, 140), label="2 decision", at=(825, 157))
arrow((772, 83), (764, 83), (764, 106), (750, 106))

lane(236, 150, "the API server")
box(60, 280, 190, 78, "ModelChain", "spec: yours", "status: the operator's", fill=GREEN)
box(
    490,
    280,
    220,
    78,
    "StageArtifact",
    "digests, metrics, cost of a",
    "finished stage; never changes",
    fill=GREEN,
)
box(900, 280, 200, 78, "PyTorchJob", "one an attempt, made", "suspended, then released", fill=GREEN)
arrow((180, 280), (180, 170), label="1 watch", at=(172, 222), anchor="end")
arrow(
    (600, 280),
    (600, 226),
    (214, 226),
    (214, 170),
    label="6 the next stage may begin",
    at=(490, 220),
)
arrow((1060, 170), (1060, 280), label="3 launch", at=(1068, 222), anchor="start")
arrow((960, 170), (960, 214), (660, 214), (660, 280), label="5 record", at=(810, 208))

lane(424, 170, "nodes (modelchain_trainer, modelchain_data)")
box(
    860,
    470,
    240,
    100,
    "pods of the trainer",
    "torchrun, one pod a node: grow,",
    "distil, checkpoint, evaluate;",
    "every byte of the result is hashed",
)
box(
    490,
    470,
    220,
    100,
    "claim of artifacts",
    "<input digest>/artifact/",
    "<input digest>/<attempt>/step-k/",
    fill=SAND,
)
box(60, 470, 190, 100, "claim of data", "WebDataset shards,", "read only", fill=SAND)
arrow((975, 358), (975, 470), label="training-operator", at=(983, 412), anchor="start")
arrow((860, 505), (710, 505), label="artifact", at=(785, 498))
arrow((710, 545), (860, 545), label="predecessor", at=(785, 562))
arrow((155, 570), (155, 584), (890, 584), (890, 570), label="pictures and captions", at=(370, 578))
arrow(
    (890, 470),
    (890, 404),
    (385, 404),
    (385, 170),
    label="4 last word: the manifest's digest, in rank 0's termination message",
    at=(636, 398),
)

box(60, 650, 170, 64, "operator", "Kubernetes, kopf")
box(330, 650, 190, 64, "core", "types, plan, digest, decide", fill=SAND)
box(620, 650, 190, 64, "data", "shards to batches", fill=GREEN)
box(910, 650, 190, 64, "trainer", "torch", fill=GREEN)
arrow((230, 682), (330, 682), label="imports", at=(280, 674))
arrow((620, 682), (520, 682), label="imports", at=(570, 674))
arrow((910, 682), (810, 682), label="imports", at=(860, 674))
text(60, 634, "the rooms, and who may import whom", 14, FAINT, "start", bold=True)
text(
    WIDTH / 2,
    742,
    "core knows neither torch nor Kubernetes; the operator has no torch; the trainer knows no"
    " Kubernetes",
    12,
    "#44546a",
)

svg = [
    (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="Helvetica, Arial, sans-serif">'
    ),
    (
        '<defs><marker id="tip" markerWidth="9" markerHeight="8" refX="8" refY="4" orient="auto">'
        f'<path d="M0 0 L9 4 L0 8 z" fill="{INK}"/></marker></defs>'
    ),
    f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
    *out,
    "</svg>",
]
(Path(__file__).parent.parent / "docs" / "architecture.svg").write_text("\n".join(svg) + "\n")
