"""From the paths of a spec, which lie under `data.volume.mountPath`, to files on this machine."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from modelchain.api.contracts import DataRequest, TaskEvaluation, TrainFiles
from modelchain.api.spec import ModelChain
from modelchain.errors import InputError, Problem
from modelchain.identity.shards import expand


class DataFolder:
    """The folder that stands for the chain's mountPath. Nothing is ever written to it."""

    def __init__(self, chain: ModelChain, folder: Path | None, file: Path):
        self.chain, self.file = chain, file
        self.mount = PurePosixPath(chain.spec.data.volume.mount_path)
        self.folder = folder.absolute() if folder else Path(self.mount)
        if not self.folder.is_dir():
            hint = "" if folder else "; give the folder that stands for it with --data DIR"
            raise InputError(
                f"{self.folder} is not a folder{hint}",
                file=file,
                field="spec.data.volume.mountPath",
            )

    def _path(self, path: str) -> str:
        return str(self.folder / PurePosixPath(path).relative_to(self.mount))

    def _files(self, pattern: str, field: str, problems: list[Problem]) -> list[str]:
        files = [self._path(name) for name in expand(pattern)]
        missing = [name for name in files if not Path(name).is_file()]
        if missing:
            others = f" (and {len(missing) - 1} more of {len(files)})" if len(missing) > 1 else ""
            problems.append(Problem(f"{missing[0]} does not exist{others}", str(self.file), field))
        return files

    def request(self, index: Path, train: bool = True) -> DataRequest:
        """The files that the trainer is to open. Raises InputError with every field whose files are
        missing.
        """
        problems: list[Problem] = []
        spec = self.chain.spec
        files = (
            self._files(spec.data.train.shards, "spec.data.train.shards", problems) if train else []
        )
        evaluations = []
        for number, evaluation in enumerate(spec.evaluation):
            where = f"spec.evaluation[{number}]"
            values = evaluation.model_dump(by_alias=True)
            values["files"] = self._files(evaluation.shards, f"{where}.shards", problems)
            for field, path in evaluation.list_files.items():
                values[field] = self._path(path)
                if not Path(values[field]).is_file():
                    problems.append(
                        Problem(
                            f"{values[field]} does not exist", str(self.file), f"{where}.{field}"
                        )
                    )
            evaluations.append(TaskEvaluation.model_validate(values))
        if problems:
            raise InputError(*problems)
        data = spec.data.train
        train_files = TrainFiles(
            files=files,
            samples=data.samples,
            captions_per_sample=data.captions_per_sample,
            fingerprint=data.fingerprint,
        )
        return DataRequest(
            index=str(index), file=str(self.file), train=train_files, evaluation=evaluations
        )
