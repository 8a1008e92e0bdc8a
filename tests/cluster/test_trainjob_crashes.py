"""As `test_crashes`, with TrainJobs, each of which takes two writes to make."""

from __future__ import annotations

from pathlib import Path

import pytest
import sweeps
from controlplane import ControlPlane
from test_crashes import sweep
from trainer import trainer_on
from trial import TRAINJOBS, Bench


@pytest.mark.timeout(3600)
def test_every_write(control_plane: ControlPlane, tmp_path: Path) -> None:
    with trainer_on(control_plane), Bench(control_plane, tmp_path) as bench:
        tried, of, lines = sweep(bench, [TRAINJOBS], 3)
    print(f"{tried} of {of} points", *lines, sep="\n")
    assert of > tried or sweeps.everything()
