"""A real Prometheus that holds the simulated day, with the series of the recording rules."""

from __future__ import annotations

import json
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from boards import recorded
from prometheus import program
from simulated_day import BEGIN, END, STEP, openmetrics

# What Grafana would put in place of the variables: all chains, the whole day.
VARIABLES = {
    "__rate_interval": f"{4 * STEP}s",
    "__range": f"{END - BEGIN:.0f}s",
    "namespace": ".*",
    "chain": ".*",
    "operator": ".*",
}
# Seconds between two evaluations of the rules. Prometheus moves all of them by a part of this. So
# it is less than the time between a scrape and the moment that it tells of.
EVERY = 20
Series = list[dict[str, Any]]


@dataclass(frozen=True)
class Server:
    url: str

    def query(self, target: dict[str, Any], at: float = END, **chosen: str) -> Series:
        """The answer to a query of a panel, at a moment in seconds since the epoch.

        Values of variables may be chosen. Raises AssertionError if Prometheus refuses the query.
        """
        expression = filled(target["expr"], VARIABLES | chosen)
        if target.get("instant"):
            return self._get("query", query=expression, time=at)
        return self._get("query_range", query=expression, start=BEGIN, end=at, step=f"{5 * STEP}s")

    def _get(self, what: str, **parameters: object) -> Series:
        url = f"{self.url}/api/v1/{what}?{urllib.parse.urlencode(parameters)}"
        try:
            with urllib.request.urlopen(url, timeout=60) as answer:
                found: Series = json.load(answer)["data"]["result"]
                return found
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{parameters}: {error.read().decode()}") from None


def filled(expression: str, variables: dict[str, str]) -> str:
    for name, value in variables.items():
        expression = expression.replace(f"${name}", value)
    assert "$" not in expression, expression
    return expression


@contextmanager
def served(folder: Path) -> Iterator[Server]:
    """Raises `Unavailable` without Prometheus."""
    (folder / "day.txt").write_text(openmetrics())
    _blocks("openmetrics", folder / "day.txt", folder / "data")
    rules = [{"record": name, "expr": expression} for name, expression in recorded().items()]
    group = {"name": "recorded", "interval": f"{EVERY}s", "rules": rules}
    (folder / "rules.yaml").write_text(yaml.safe_dump({"groups": [group]}))
    with _running(folder) as server:
        span = (f"--start={BEGIN:.0f}", f"--end={END:.0f}", f"--eval-interval={EVERY}s")
        to = f"--output-dir={folder / 'data'}"
        _blocks("rules", *span, f"--url={server.url}", to, folder / "rules.yaml")
    with _running(folder) as server:  # it finds new blocks when it starts
        yield server


def _blocks(kind: str, *arguments: str | Path) -> None:
    command = [program("promtool"), "tsdb", "create-blocks-from", kind, *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@contextmanager
def _running(folder: Path) -> Iterator[Server]:
    (folder / "config.yaml").write_text(f"global: {{scrape_interval: {STEP}s}}\n")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    options = {
        "config.file": folder / "config.yaml",
        "storage.tsdb.path": folder / "data",
        "storage.tsdb.retention.time": "100y",
        "web.listen-address": address,
        "log.level": "error",
    }
    command = [program("prometheus"), *(f"--{name}={value}" for name, value in options.items())]
    with (folder / "log").open("a") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        _wait(f"http://{address}", process, folder)
        yield Server(f"http://{address}")
    finally:
        process.terminate()
        process.wait(timeout=60)


def _wait(url: str, process: subprocess.Popen[bytes], folder: Path) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(f"{url}/-/ready", timeout=5):
                return
        except OSError:
            time.sleep(0.1)
    raise AssertionError(f"Prometheus is not ready: {(folder / 'log').read_text()[-2000:]}")
