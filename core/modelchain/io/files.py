"""Files that are either whole or absent: hashing, atomic writes, and verifying a directory by its
manifest.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path

from pydantic import ValidationError

from modelchain.api.contracts import MANIFEST, RESULTS, WEIGHTS, FileEntry, Manifest, Results
from modelchain.errors import WorkError

# Temporary files are readable for their owner only, and a successor may run as another user.
READABLE = 0o644


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes, 64 lowercase hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def entry_of(path: Path) -> FileEntry:
    return FileEntry(sha256=sha256_of(path), size=path.stat().st_size)


def fsync(path: Path) -> None:
    """Flush a file's bytes, or a directory's names, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomic(path: Path, content: bytes) -> None:
    """Replace the content of `path`, entirely or not at all."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fchmod(file.fileno(), READABLE)
            os.fsync(file.fileno())
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    fsync(path.parent)


def seal(directory: Path, manifest: Manifest, target: Path) -> None:
    """Write the manifest last, flush all, and rename `directory` to `target`, which must not
    exist.
    """
    for name in manifest.files:
        (directory / name).chmod(READABLE)
        fsync(directory / name)
    write_atomic(directory / MANIFEST, manifest.model_dump_json(by_alias=True, indent=1).encode())
    directory.rename(target)
    fsync(target.parent)


def verify(directory: Path) -> Manifest:
    """Re-hash every file the manifest of `directory` names.

    Raises:
        FileNotFoundError: there is no manifest, so the directory counts as absent.
        WorkError: the manifest does not parse, or a file is missing or differs; names the file and
            both digests.
    """
    path = directory / MANIFEST
    try:
        manifest = Manifest.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise WorkError(
            f"{path}: is not a manifest ({error.error_count()} errors)", "CorruptArtifact"
        ) from error
    for name, entry in manifest.files.items():
        file = directory / name
        if "/" in name or not file.is_file():
            raise WorkError(f"{file}: is missing, but named in {MANIFEST}", "CorruptArtifact")
        found = sha256_of(file)
        if found != entry.sha256:
            raise WorkError(
                f"{file}: its sha256 is {found}, its manifest says {entry.sha256}",
                "CorruptArtifact",
            )
    return manifest


def read_artifact(directory: Path) -> tuple[Manifest, Results]:
    """Manifest and results of `<input digest>/artifact`, after re-hashing every byte. Raises what
    `verify` raises.
    """
    manifest = verify(directory)
    of_these = manifest.kind == "artifact" and manifest.input_digest == directory.parent.name
    if not of_these or manifest.artifact_digest is None or WEIGHTS not in manifest.files:
        raise WorkError(f"{directory / MANIFEST}: belongs to other inputs", "CorruptArtifact")
    return manifest, Results.model_validate_json((directory / RESULTS).read_bytes())
