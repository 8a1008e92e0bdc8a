"""Images from the Dockerfile, without a registry: built by buildah, passed to the node's containerd
through a pipe.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import machine
from build import program, training_operator_source
from lab import Lab
from node import PAUSE

REPOSITORY = Path(__file__).parents[2]
BASE = "localhost/modelchain-base:bookworm"
VERSION = "0.1.0"
OPERATOR, TRAINER = (
    f"ghcr.io/modelchain/operator:{VERSION}",
    f"ghcr.io/modelchain/trainer:{VERSION}",
)
PYTHON = "python3,python3-venv,python3-pip,ca-certificates"
# What training-operator's init container runs; its `nslookup` must succeed if any search domain has
# the name.
INIT = "docker.io/library/alpine:3.10"


class Buildah:
    """buildah with a store of its own below `directory`."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._words = [
            "buildah",
            "--root",
            str(directory / "root"),
            "--runroot",
            str(directory / "run"),
        ]
        directory.mkdir(parents=True, exist_ok=True)
        config = (
            directory / "containers.conf"
        )  # or it would make a folder in /etc for networks it does not use
        config.write_text(f'[network]\nnetwork_config_dir = "{directory}/networks"\n')
        own = {
            "BUILDAH_ISOLATION": "chroot",
            "STORAGE_DRIVER": "overlay",
            "CONTAINERS_CONF": str(config),
        }
        self._environment = {**os.environ, **own}

    def __call__(self, *words: str) -> str:
        """Standard output. Raises RuntimeError with the end of what it wrote."""
        done = subprocess.run(
            [*self._words, *words], env=self._environment, capture_output=True, text=True
        )
        if done.returncode:
            raise RuntimeError(f"buildah {' '.join(words)}: {(done.stdout + done.stderr)[-3000:]}")
        return done.stdout.strip()

    def forget(self) -> None:
        """Working containers, and their mounts, of a run that was killed."""
        self("umount", "--all")
        self("rm", "--all")

    def id_of(self, name: str) -> str | None:
        try:
            return self("inspect", "--type", "image", "--format", "{{.FromImageID}}", name)
        except RuntimeError:
            return None

    @contextlib.contextmanager
    def mounted(self, name: str) -> Iterator[Path]:
        """The image's files, to look at."""
        container = self("from", "--pull-never", name)
        try:
            yield Path(self("mount", container))
        finally:
            self("rm", container)

    def size_of(self, name: str) -> int:
        """Bytes of all files in the image."""
        with self.mounted(name) as root:
            sizes = subprocess.run(
                ["du", "-sbx", str(root)], check=True, capture_output=True, text=True
            )
            return int(sizes.stdout.split()[0])

    def from_files(
        self, name: str, parent: str, *files: tuple[Path, str], entrypoint: str = "[]"
    ) -> None:
        """An image of `parent` ("scratch" for none) and files or folders."""
        container = self("from", "--pull-never", parent)
        try:
            for source, to in files:
                self("add", container, str(source), to)
            self("config", "--entrypoint", entrypoint, container)
            self("commit", "-q", container, name)
        finally:
            self("rm", container)


def build(directory: Path) -> Buildah:
    """All images, the base first. What has not changed is taken from the store."""
    buildah = Buildah(directory / "buildah")
    buildah.forget()
    if buildah.id_of(BASE) is None:
        _base(buildah, directory)
    certificates = [
        "-v",
        "/etc/ssl/certs:/etc/ssl/certs:ro",
        "--env",
        "PIP_CERT=/etc/ssl/certs/ca-certificates.crt",
    ]
    for target, name in (("operator", OPERATOR), ("trainer", TRAINER)):
        what = ["--build-arg", f"BASE={BASE}", "--target", target, "-t", name]
        buildah("bud", "--layers", "--network", "host", *certificates, *what, str(REPOSITORY))
    binary = training_operator_image()
    with tempfile.TemporaryDirectory() as folder:
        lookup = Path(folder, "nslookup")
        lookup.write_text('#!/bin/sh\nexec getent hosts "$1"\n')
        lookup.chmod(0o755)
        manager = Path(folder, "manager")
        shutil.copy(program("training-operator.v1"), manager)
        for name, parent, file, to in (
            (INIT, BASE, lookup, "/usr/local/bin/nslookup"),
            (binary, "scratch", manager, "/manager"),
            (PAUSE, "scratch", program("pause"), "/pause"),
        ):
            if buildah.id_of(name) is None:
                buildah.from_files(
                    name,
                    parent,
                    (file, to),
                    entrypoint=json.dumps(["/pause"] if name == PAUSE else []),
                )
    return buildah


def training_operator_image() -> str:
    """The image's name in training-operator's own manifests."""
    overlay = (
        training_operator_source() / "manifests/overlays/standalone/kustomization.yaml"
    ).read_text()
    words = overlay.split()
    return f"{words[words.index('images:') + 3]}:{words[words.index('newTag:') + 1]}"


def _base(buildah: Buildah, directory: Path) -> None:
    """Debian with Python, as the Dockerfile's own base is; there is no registry to take that
    from.
    """
    root = directory / "base"
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    machine.run("debootstrap", "--variant=minbase", f"--include={PYTHON}", "bookworm", str(root))
    shutil.rmtree(root / "var/cache/apt", ignore_errors=True)
    shutil.rmtree(root / "var/lib/apt/lists", ignore_errors=True)
    buildah.from_files(BASE, "scratch", (root, "/"))
    shutil.rmtree(root)


def load(buildah: Buildah, lab: Lab) -> None:
    """Import into the node what it does not have yet, and name each by its digest, too."""
    record = lab.directory / "imported.json"
    known: dict[str, str] = json.loads(record.read_text()) if record.exists() else {}
    for name in (PAUSE, INIT, training_operator_image(), OPERATOR, TRAINER):
        identity = buildah.id_of(name)
        assert identity is not None, f"{name} was not built"
        if known.get(name) != identity:
            _import(buildah, lab, name)
            known[name] = identity
            record.write_text(json.dumps(known))


def _import(buildah: Buildah, lab: Lab, name: str) -> None:
    with tempfile.TemporaryDirectory(dir=lab.directory) as folder:
        pipe = Path(folder, "pipe")
        os.mkfifo(pipe)
        failures: list[BaseException] = []

        def push() -> None:
            try:
                buildah(
                    "push", "-q", "--disable-compression", name, f"docker-archive:{pipe}:{name}"
                )
            except BaseException as error:
                failures.append(error)

        pushing = threading.Thread(target=push, daemon=True)
        pushing.start()
        lab.ctr("images", "import", str(pipe))
        pushing.join()
        if failures:
            raise failures[0]
    lab.ctr("images", "tag", "--force", name, by_digest(lab, name))


def by_digest(lab: Lab, name: str) -> str:
    """`repository@sha256:…` of an imported image."""
    lines = lab.ctr("images", "list", f"name=={name}").splitlines()
    digest = next(word for word in lines[1].split() if word.startswith("sha256:"))
    return f"{name.rpartition(':')[0]}@{digest}"
