"""benchmarks/method.py on a tiny case: one command trains models alone and as chains, and writes
the report.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
sys.path.append(str(REPOSITORY / "benchmarks"))
import method_report  # noqa: E402


def test_the_report_in_small(shared_data: Path, tmp_path: Path) -> None:
    """Nothing is trained twice, neither in one report nor when the command runs again."""
    script, root, docs = (
        REPOSITORY / "benchmarks" / "method.py",
        tmp_path / "root",
        tmp_path / "docs",
    )
    command = [
        sys.executable,
        str(script),
        "--only",
        "smoke",
        "--data",
        str(shared_data),
        "--root",
        str(root),
    ]
    command += ["--write", str(docs), "--workers", "1"]
    said = [
        subprocess.run(command, capture_output=True, text=True, check=True).stdout for _ in range(2)
    ]
    assert "0 of 12 stages are there already" in said[0]
    assert "12 of 12 stages are there already" in said[1]
    assert said[0][said[0].index("| model") :] == said[1][said[1].index("| model") :]

    report = json.loads((docs / "method.json").read_bytes())
    arms = {(arm["name"], arm["ifd"]): arm["stages"] for arm in report["arms"]}
    grown, alone = arms["Insert", True], arms["individual", False]
    assert grown[0] == alone[0]  # one first stage for all
    assert arms["T(·) starts at random", True][1] == grown[1]  # between equal spaces there is no T
    assert len({str(stages[2]["final"]) for stages in arms.values()}) == 6
    assert sum(s["macs"] for s in grown) < sum(s["macs"] for s in alone)
    assert (docs / "method-smoke.png").stat().st_size > 10_000
    page = (docs / "method.md").read_text()
    assert page.count("<!-- end -->") == 3
    assert "| Insert | with | 2+1+1 |" in page


def test_lossless_is_said_of_the_interval() -> None:
    """Half widths of three differences 1 apart: 4.303 / √3 = 2.48."""
    assert method_report.verdict([-0.4]) == "lossless"
    assert method_report.verdict([-0.6]) == "not lossless"
    assert method_report.verdict([0.0, 1.0, 2.0]) == "undecided"
    assert method_report.verdict([1.0, 2.0, 3.0]) == "lossless"
    assert method_report.verdict([-1.0, -2.0, -3.0]) == "undecided"
    assert method_report.verdict([-2.0, -3.0, -4.0]) == "not lossless"


def _arm(
    part: str, name: str, seed: int, epochs: tuple[int, int], *top1: float
) -> dict[str, object]:
    macs = zip("sm", epochs, top1, strict=True)
    stages = [
        {"model": m, "epochs": e, "macs": 100 * e, "initial": {"top1": 10.0}, "final": {"top1": t}}
        for m, e, t in macs
    ]
    return {
        "setup": "x",
        "part": part,
        "name": name,
        "ifd": name != "individual",
        "seed": seed,
        "stages": stages,
    }


def test_chains_are_compared_with_their_own_seed_alone() -> None:
    arms = []
    for part, seed in (("table", 0), ("table", 1), ("fresh", 3), ("fresh", 4)):
        alone = "individual" if part == "table" else "fresh"
        arms.append(_arm(alone, "individual", seed, (8, 8), 70.0, 80.0 + seed))
        arms.append(_arm(part, "Insert", seed, (8, 2), 70.0, 81.0 + seed))
    arms += [_arm("sweep", "Insert", seed, (8, 1), 70.0, 78.0) for seed in (0, 1)]
    tables = method_report.tables({"arms": arms})
    assert "| Insert | with | 8+2 | 1.60 | 10.0 | +1.00 ± 0.00 | lossless |" in tables["x table"]
    assert "| Insert | with | 8+1 | 1.78 | 10.0 | -2.50 ± 6.35 | undecided |" in tables["x sweep"]
    assert tables["x fresh"] == tables["x all seeds"] == tables["x table"]
    assert "80.50" in tables["x individual"]  # of seeds 0 and 1 alone
    fresh = method_report.tables(
        {"arms": [arm for arm in arms if arm["part"] == "fresh"]}
    )  # --only fresh
    assert fresh == dict.fromkeys(("x fresh", "x all seeds"), tables["x fresh"])


def test_a_report_of_one_part_leaves_the_others(tmp_path: Path) -> None:
    one = _arm("individual", "individual", 0, (8, 8), 70.0, 80.0)
    for arms in ([one, {**one, "setup": "y"}, {**one, "part": "choice"}], [{**one, "seed": 1}]):
        method_report.write({"environment": {}, "arms": arms}, tmp_path)
    found = json.loads((tmp_path / "method.json").read_bytes())["arms"]
    assert [(arm["setup"], arm["part"], arm["seed"]) for arm in found] == [
        ("x", "choice", 0),
        ("x", "individual", 1),
        ("y", "individual", 0),
    ]
    assert "<!-- method.py: y individual -->" in (tmp_path / "method.md").read_text()
