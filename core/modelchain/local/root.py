"""The root of a local run: its stored status, verified artifacts, and the files of attempts."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from modelchain.api.contracts import (
    EVALUATIONS,
    LAST_WORD,
    MANIFEST,
    METRICS,
    RELAXATION,
    RESULTS,
    TASK,
    Findings,
    LastWord,
    Manifest,
    Progress,
    RelaxedEpochs,
    Results,
    Task,
)
from modelchain.api.reasons import Code, Reason
from modelchain.api.spec import API_VERSION, KIND, ModelChain, WrittenModel
from modelchain.api.status import AttemptStatus, ChainStatus, Spent
from modelchain.decide.observed import Artifact, Damage
from modelchain.decide.relaxation import remembered
from modelchain.errors import InputError, WorkError
from modelchain.gate.relaxation import Schedule, Trained
from modelchain.identity.digest import KEY_DIGITS, TRAINER_MATH
from modelchain.io.files import read_artifact, write_atomic
from modelchain.io.lastword import read_last_word

DIGITS = "0123456789"
# The first part of the names of attempts' directories.
OWNER = "local"

R = TypeVar("R", bound=WrittenModel)

_ADDED = TypeAdapter(dict[str, Findings])


class Root:
    """Reads and writes `status.json` and the directories that are named by input digests.

    All stored paths are relative, so a root can be copied.
    """

    def __init__(self, path: Path):
        self.path = path
        self.status_file = path / "status.json"
        # By input digest, the sizes and times of an artifact's files when they were hashed, and the
        # result.
        self._verified: dict[str, tuple[tuple[Any, ...], Artifact | Damage]] = {}

    def read_status(self, chain: ModelChain) -> ChainStatus:
        """The stored status of `chain`; what its artifacts tell if nothing was stored.

        Raises:
            InputError: the root belongs to another chain.
            WorkError: the file cannot be read as a status.
        """
        if not self.status_file.exists():
            return remembered(chain, self._trained())
        stored = read_object(self.status_file)
        name, mine = stored["metadata"]["name"], chain.metadata.name
        if name != mine:
            raise InputError(
                f"this root belongs to chain {name!r}; give {mine!r} a root of its own",
                file=self.path,
            )
        return parse_status(stored, self.status_file)

    def _trained(self) -> Iterator[Trained]:
        """What every artifact tells of its stage's epochs.

        Earlier stages come first, and of one stage the newest at the end. A stage's attempts are
        numbered; the times of files would be others in a copy of the root.
        """
        manifests = (
            read_model(Manifest, path) for path in self.path.glob(f"*/artifact/{MANIFEST}")
        )
        made = {m.artifact_digest: m for m in manifests if m is not None}

        def depth(manifest: Manifest) -> int:
            before = made.get(manifest.inputs.get("predecessor"))
            return 0 if before is None else 1 + depth(before)

        def order(manifest: Manifest) -> tuple[int, int]:
            attempts = (self.path / manifest.input_digest).glob(f"{OWNER}-a*")
            numbers = [number_in(path, f"{OWNER}-a") for path in attempts]
            return depth(manifest), max(numbers, default=0)

        for manifest in sorted(made.values(), key=order):
            folder = self.path / manifest.input_digest
            if results := read_model(Results, folder / "artifact" / RESULTS):
                schedule = Schedule(int(manifest.inputs["epochs"]))
                if relaxed := read_model(RelaxedEpochs, folder / RELAXATION):
                    schedule = Schedule(schedule.epochs, relaxed.round, relaxed.first_epochs)
                alone = "predecessor" not in manifest.inputs
                spent = Spent(macs=results.macs)
                yield Trained(results.stage, manifest.input_digest, schedule, alone, spent)

    def write_relaxation(self, digest: str, relaxed: RelaxedEpochs) -> None:
        """Note that a round of relaxation gave the artifact of these inputs its epochs."""
        write_atomic(
            self.path / digest / RELAXATION, relaxed.model_dump_json(by_alias=True).encode()
        )

    def write_status(self, chain: ModelChain, status: ChainStatus) -> None:
        spec = chain.model_dump(mode="json", by_alias=True, exclude_unset=True)["spec"]
        document = {
            "apiVersion": API_VERSION,
            "kind": KIND,
            "metadata": {"name": chain.metadata.name},
            "spec": spec,
            "status": status.model_dump(mode="json", by_alias=True),
        }
        write_atomic(self.status_file, json.dumps(document, indent=1).encode())

    def artifact(self, digest: str) -> Artifact | Damage | None:
        """The artifact of an input digest; None if there is none.

        All its files are hashed at the first call, and again if one of them has changed.
        """
        directory = self.path / digest / "artifact"
        if not (directory / MANIFEST).is_file():
            return None
        stamp = tuple(
            (p.name, p.stat().st_size, p.stat().st_mtime_ns, p.stat().st_ino)
            for p in sorted(directory.iterdir())
        )
        known = self._verified.get(digest)
        if known is None or known[0] != stamp:
            self._verified[digest] = known = (stamp, self._read_artifact(digest, directory))
        return known[1]

    def _read_artifact(self, digest: str, directory: Path) -> Artifact | Damage:
        restore = f"; restore the file, or delete {directory} to train it again"
        try:
            manifest, results = read_artifact(directory)
        except (WorkError, OSError, ValidationError) as error:
            message = " ".join(str(error).split()) + restore
            return Damage(Reason(Code.CORRUPT_ARTIFACT, digest, message))
        assert manifest.artifact_digest is not None
        added = self.added_evaluations(digest)
        return Artifact(
            digest=manifest.artifact_digest,
            path=str(directory.relative_to(self.path)),
            macs=results.macs,
            metrics=results.final.metrics,
            evaluations={name: key[:KEY_DIGITS] for name, key in results.evaluations.items()},
            later={key[:KEY_DIGITS]: found.metrics for key, found in added.items()},
            pictures=_pictures(results, added),
            trainer_math=manifest.trainer_math,
        )

    def added_evaluations(self, digest: str) -> dict[str, Findings]:
        """By evaluation key, what was measured after the stage finished.

        It is not part of the artifact.
        """
        with contextlib.suppress(OSError, ValueError):
            return _ADDED.validate_json((self.path / digest / EVALUATIONS).read_bytes())
        return {}

    def add_evaluation(self, digest: str, key: str, found: Findings) -> None:
        known = {**self.added_evaluations(digest), key: found}
        text = _ADDED.dump_json(known, by_alias=True, indent=1)
        write_atomic(self.path / digest / EVALUATIONS, text)
        self._verified.pop(digest, None)

    def attempt_numbers(self) -> dict[str, int]:
        """The highest attempt number ever used, by all of an attempt's name but its number, and by
        input digest.
        """
        highest: dict[str, int] = {}
        for path in self.path.glob(f"*/{OWNER}-a*/{TASK}"):
            number = number_in(path.parent, f"{OWNER}-a")
            if task := read_model(Task, path):
                for name in (task.attempt.rstrip(DIGITS), task.input_digest):
                    highest[name] = max(number, highest.get(name, 0))
        return highest

    def results(self, digest: str) -> Results | None:
        """The `results.json` of a finished stage; None if it is missing or damaged."""
        return read_model(Results, self.path / digest / "artifact" / RESULTS)

    def attempt_directory(self, attempt: AttemptStatus) -> Path:
        return self.path / attempt.input_digest / f"{OWNER}-a{attempt.number}"

    def started(self, attempt: AttemptStatus) -> bool:
        """Whether the attempt's task was written. Then a process may have run."""
        return (self.attempt_directory(attempt) / TASK).exists()

    def last_word(self, attempt: AttemptStatus) -> LastWord | None:
        """How the attempt ended; None if it left no last word, or one that cannot be read."""
        with contextlib.suppress(OSError):
            path = self.attempt_directory(attempt) / LAST_WORD
            return read_last_word(path.read_text(errors="replace"))
        return None

    def last_step(self, attempt: AttemptStatus) -> dict[str, Any] | None:
        """The newest entry of a step in an attempt's metrics.jsonl; None before the first."""
        path = self.attempt_directory(attempt) / METRICS
        try:
            # The end of the file is enough, as an entry is much shorter.
            with path.open("rb") as file:
                file.seek(max(0, path.stat().st_size - 16_384))
                lines = file.read().splitlines()
        except OSError:
            return None
        for line in reversed(lines):
            with contextlib.suppress(ValueError):
                entry = json.loads(line)
                if isinstance(entry, dict) and entry.get("event") == "step":
                    return entry
        return None

    def checkpoint_step(self, digest: str) -> int:
        """The step of the newest complete checkpoint that a trainer would resume; 0 if there is
        none.
        """
        paths = (self.path / digest).glob(f"*/step-*/{MANIFEST}")
        made = [(path.parent, read_model(Manifest, path)) for path in paths]
        ours = [step for step, m in made if m is not None and m.trainer_math == TRAINER_MATH]
        return max((number_in(step, "step-") for step in ours), default=0)

    def known_inputs(self) -> dict[str, dict[str, Any]]:
        """By input digest, the inputs of all attempts and artifacts in this root.

        A comparison with them shows which input caused a miss.
        """
        known: dict[str, dict[str, Any]] = {}
        for path in self.path.glob(f"*/{OWNER}-a*/{TASK}"):
            if task := read_model(Task, path):
                known[task.input_digest] = task.inputs
        for path in self.path.glob(f"*/artifact/{MANIFEST}"):
            if manifest := read_model(Manifest, path):
                known[manifest.input_digest] = manifest.inputs
        return known


def _pictures(results: Results, added: Mapping[str, Findings]) -> dict[str, int]:
    """By an evaluation's short key, on how many pictures it was measured."""
    counts = {
        results.evaluations[name][:KEY_DIGITS]: count
        for name, count in results.pictures.items()
        if name in results.evaluations
    }
    for key, found in added.items():  # each is of one evaluation
        counts |= {key[:KEY_DIGITS]: count for count in found.pictures.values()}
    return counts


def read_model(kind: type[R], path: Path) -> R | None:
    """What the file `path` holds; None if the file is missing or damaged."""
    with contextlib.suppress(OSError, ValidationError):
        return kind.model_validate_json(path.read_bytes())
    return None


def progress_of(entry: dict[str, Any]) -> Progress | None:
    """The entry of a step in metrics.jsonl, reduced to what a table shows."""
    with contextlib.suppress(ValidationError):
        names = ("step", "steps", "samplesPerSecond", "etaSeconds")
        return Progress.model_validate({name: entry.get(name) for name in names})
    return None


def number_in(directory: Path, prefix: str) -> int:
    """The number in a directory's name; 0 for a name that is not ours."""
    digits = directory.name.removeprefix(prefix)
    return int(digits) if digits.isdecimal() else 0


def read_object(path: Path) -> dict[str, Any]:
    """The stored object. Raises WorkError if the file cannot be read or is damaged."""
    try:
        stored = json.loads(path.read_bytes())
        if not isinstance(stored["metadata"]["name"], str):
            raise TypeError
    except OSError as error:
        raise WorkError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise WorkError(
            f"{path}: is damaged; delete it (finished stages are found by their artifacts)"
        ) from error
    return stored  # type: ignore[no-any-return]


def parse_status(stored: dict[str, Any], path: Path) -> ChainStatus:
    """The status in the object that was read from `path`. Raises WorkError if it is damaged."""
    try:
        return ChainStatus.model_validate_json(json.dumps(stored.get("status", {})))
    except ValidationError as error:
        raise WorkError(
            f"{path}: is damaged; delete it (finished stages are found by their artifacts)"
        ) from error
