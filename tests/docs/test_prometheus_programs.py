"""Where `prometheus` and `promtool` come from, and that both run."""

from __future__ import annotations

import subprocess
from pathlib import Path

import prometheus
import pytest
from build import Unavailable


def test_both_run(promtool: Path, prometheus_server: Path) -> None:
    for program in (promtool, prometheus_server):
        done = subprocess.run([program, "--version"], capture_output=True, text=True, check=True)
        assert f"{program.name}, version" in done.stdout + done.stderr


def test_a_machine_without_them_and_without_apt_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(Unavailable, match=r"promtool is not in PATH.*apt-get and dpkg-deb"):
        prometheus.program("promtool")


def test_a_package_that_cannot_be_fetched_says_why(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for tool in ("apt-get", "dpkg-deb"):
        (tmp_path / tool).write_text("#!/bin/sh\necho 'E: no route to the archive' >&2\nexit 100\n")
        (tmp_path / tool).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(Unavailable, match="no route to the archive"):
        prometheus.program("prometheus")
    assert not list((tmp_path / "cache/modelchain/prometheus").glob("prom*"))
