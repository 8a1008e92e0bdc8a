"""The plugin of kubectl and the completion of shells, without a cluster: never an error, and never
a long wait. tests/cluster completes names on a real control plane.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
import yaml

from modelchain.cli.app import NAME, PLUGIN, main

BIN = Path(sys.executable).parent
COMMANDS = ("get", "watch", "logs", "explain", "cost", "suspend", "resume", "retry")


def run(program: str, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(BIN / program), *words],
        env=os.environ | {"COLUMNS": "100", **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def kubeconfig(folder: Path, server: str) -> str:
    file = folder / "kubeconfig"
    named = {"name": "c"}
    config = {
        "clusters": [named | {"cluster": {"server": server}}],
        "users": [named | {"user": {}}],
        "contexts": [named | {"context": {"cluster": "c", "user": "c"}}],
        "current-context": "c",
    }
    file.write_text(yaml.safe_dump(config))
    return str(file)


def offered(*words: str, **environment: str) -> list[str]:
    """What kubectl is told for the words after `kubectl modelchain`."""
    done = run("kubectl_complete-modelchain", *words, **environment)
    assert (done.returncode, done.stderr) == (0, "")
    return [line.split("\t")[0] for line in done.stdout.splitlines()]


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("program", [NAME, PLUGIN])
def test_the_help_names_the_program_that_was_called(
    command: str, program: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with patch("sys.argv", ["x", command, "--help"]), pytest.raises(SystemExit):
        main(program)
    text = " ".join(capsys.readouterr().out.split())
    assert f"Usage: {program} {command} " in text and f"Example: {program} {command} " in text


def test_the_plugin_has_no_completion_of_its_own() -> None:
    assert "--install-completion" in run("modelchain", "--help").stdout
    assert "--install-completion" not in run("kubectl-modelchain", "--help").stdout


def test_errors_of_the_plugin_are_one_line(tmp_path: Path) -> None:
    done = run("kubectl-modelchain", "watch", "x", f"--kubeconfig={tmp_path / 'none'}")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and done.stdout == ""


def test_commands_and_options_are_offered() -> None:
    assert set(offered("")) >= {*COMMANDS, "plan", ":4"}
    assert offered("wat") == ["watch", ":4"]
    assert {"--all-ranks", "--follow", "--tail"} <= set(offered("logs", "x", "--"))
    assert offered() == offered("")


@pytest.mark.parametrize(
    "words", [("watch", ""), ("logs", "x", ""), ("plan", "-f", ""), ("watch", "'")]
)
def test_without_a_cluster_nothing_is_offered_but_files(
    words: tuple[str, ...], tmp_path: Path
) -> None:
    assert offered(*words, KUBECONFIG=str(tmp_path / "none")) == [":0"]


def test_a_cluster_that_does_not_answer_is_not_waited_for(tmp_path: Path) -> None:
    """The server takes connections and says nothing: a command would wait for half a minute."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        file = kubeconfig(tmp_path, f"http://127.0.0.1:{server.getsockname()[1]}")
        done = subprocess.run(
            ["timeout", "20", str(BIN / "kubectl_complete-modelchain"), "watch", ""],
            env=os.environ | {"KUBECONFIG": file},
            capture_output=True,
            text=True,
            check=False,
        )
    assert (done.returncode, done.stdout, done.stderr) == (0, ":0\n", "")


@pytest.mark.parametrize("text", ["[]", "{", "users: 7"])
def test_a_broken_kubeconfig_is_no_error_of_a_completion(text: str, tmp_path: Path) -> None:
    file = tmp_path / "config"
    file.write_text(text)
    assert offered("watch", "", KUBECONFIG=str(file)) == [":0"]


def test_shells_are_answered(tmp_path: Path) -> None:
    asks = {"_MODELCHAIN_COMPLETE": "complete_bash", "COMP_CWORD": "1"}
    done = run("modelchain", COMP_WORDS="modelchain re", **asks)
    assert (done.returncode, done.stderr) == (0, "")
    assert set(done.stdout.split()) == {"report", "resume", "retry"}
    fish = {"_MODELCHAIN_COMPLETE": "complete_fish", "_TYPER_COMPLETE_FISH_ACTION": "is-args"}
    nothing = {"_TYPER_COMPLETE_ARGS": "modelchain watch ", "KUBECONFIG": str(tmp_path / "none")}
    assert run("modelchain", **fish, **nothing).returncode == 1  # fish then offers files
    assert run("modelchain", **fish, _TYPER_COMPLETE_ARGS="modelchain wa").returncode == 0
