"""benchmarks/growth.py on a tiny case: the trainer stops after the given steps, and is measured."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

REPOSITORY = Path(__file__).parents[2]
sys.path.append(str(REPOSITORY / "benchmarks"))
import growth  # noqa: E402
from modelchain.api.contracts import METRICS  # noqa: E402
from modelchain_trainer import models  # noqa: E402


def test_an_edge_in_small(
    shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(growth, "SHARDS", 1)
    try:
        lab = growth.Lab(shared_data / "fashion-mnist", tmp_path)
        task, student = lab.train("ViT-T-16", stop=2)
        assert (tmp_path / task.input_digest / "growth" / METRICS).read_text().count(
            '"event": "step"'
        ) == 2
        assert student is not None and lab.loss(student.clip) != lab.loss(
            models.build(growth.small("ViT-T-16"), 0)
        )
    finally:
        torch.use_deterministic_algorithms(False)
