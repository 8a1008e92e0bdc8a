"""The pages keep their word: every fenced command is run or checked, every chain loads, every link
leads somewhere.

`modelchain` commands are executed as printed, page by page, in a folder of small stand-ins for the
names the pages use.
"""

from __future__ import annotations

import ast
import copy
import json
import re
import shlex
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pages
import pytest
import yaml
from commandline import modelchain
from PIL import Image
from webdataset import TarWriter

from modelchain.api.contracts import FailureClass
from modelchain.api.modelconfig import ModelConfig
from modelchain.api.spec import ChainSpec, Gate
from modelchain.api.zoo import MODELS, ZooModel
from modelchain.io.load import load_chain, load_model
from modelchain.plan.check import check_epochs
from modelchain.plan.pools import PoolFile
from modelchain_bench import end_to_end, loader

REPOSITORY = Path(__file__).parents[2]
sys.path += [str(REPOSITORY / "tests" / name) for name in ("core", "local")]
from harness import MODELCHAIN, SPEC  # noqa: E402
from test_digest import ROWS  # noqa: E402

PAGES = [
    REPOSITORY / "README.md",
    REPOSITORY / "CONTRIBUTING.md",
    *sorted((REPOSITORY / "docs").glob("*.md")),
]
RUNBOOKS = sorted((REPOSITORY / "docs" / "runbooks").glob("*.md"))
TRAIN, VAL = 64, 16
SMALL = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 48, "layers": 2, "head_width": 16},
    "text_cfg": {"context_length": 77, "width": 32, "heads": 2, "layers": 2},
}  # in the place of the model that the page measures
PYTEST = ".venv/bin/pytest"
ON_A_CLUSTER = ("get", "watch", "logs", "explain", "suspend", "resume", "retry")


class Block(NamedTuple):
    page: Path
    language: str
    text: str


def blocks(page: Path) -> list[Block]:
    return [
        Block(page, *found)
        for found in re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), re.M | re.S)
    ]


def commands(page: Path) -> list[list[str]]:
    """The words of every command in the page's `sh` blocks, comments left out. `kubectl modelchain`
    is the same as `modelchain`: tests/operator and tests/cluster type the plugin's name.
    """
    text = "".join(block.text for block in blocks(page) if block.language == "sh").replace(
        "\\\n", " "
    )
    found = [words for line in text.splitlines() if (words := shlex.split(line, comments=True))]
    return [words[words[:2] == ["kubectl", "modelchain"] :] for words in found]


def inline(page: Path) -> list[list[str]]:
    """Commands named within a sentence or a table."""
    spans = re.findall(
        r"`([^`\n]+)`", re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)
    )
    return [
        shlex.split(span)
        for span in spans
        if re.match(rf"(make [a-z]|(\w+=\S+ )?{re.escape(PYTEST)} )", span)
    ]


BLOCKS = [block for page in PAGES for block in blocks(page)]
EXECUTED = [page for page in PAGES if any(words[0] == "modelchain" for words in commands(page))]
TYPED = [
    REPOSITORY / "README.md",
    *(REPOSITORY / "docs" / f"{name}.md" for name in pages.ON_A_CLUSTER),
]
OTHERS = [
    (page, words)
    for page in PAGES
    for words in commands(page) + inline(page)
    if words[0] != "modelchain"
    and not (words[0] in pages.PROGRAMS and page in TYPED)  # by tests/cluster/test_docs.py
    if words[0] not in ("pip", "clip_benchmark")  # by tests/trainer/test_export.py
]


def shards(folder: Path, names: list[str]) -> None:
    """Small tars of one-coloured pictures, each with four captions."""
    folder.mkdir(parents=True)
    for name in names:
        with TarWriter(str(folder / name)) as tar:
            for i in range(VAL if "val" in name else TRAIN):
                picture = Image.new("RGB", (20, 16), (i * 4, 255 - i * 4, i * 37 % 256))
                captions = [
                    f"{kind} number {i}" for kind in ("picture", "colour", "square", "sample")
                ]
                tar.write(
                    {"__key__": f"{name[:-4]}-{i}", "png": picture, "json": {"captions": captions}}
                )


def chain() -> dict[str, Any]:
    """The local tests' chain, with less to do: one stage, one epoch."""
    spec = copy.deepcopy(SPEC)
    body = spec["spec"]
    body["stages"] = [body["stages"][0] | {"epochs": 1}]
    body["data"]["train"]["samples"] = TRAIN
    body["evaluation"] = [{"name": "r1", "kind": "Retrieval", "shards": "/data/val-000000.tar"}]
    body["recipe"] |= {"baselineEpochs": 1, "globalBatchSize": 16, "warmupSteps": {"first": 1}}
    return spec


def execute(folder: Path, *words: str) -> str:
    """In a process of its own where it trains, which is the page's own `run`; else in ours, in
    which torch is loaded once.
    """
    if words[0] == "run":
        done = subprocess.run(
            [MODELCHAIN, *words], cwd=folder, capture_output=True, text=True, timeout=280
        )
    else:
        done = modelchain(*words, folder=folder)
    assert done.returncode == 0, f"{' '.join(words)}: {done.stderr}"
    assert "Traceback" not in done.stderr
    return done.stdout


@pytest.fixture(scope="session")
def stand_ins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with everything the pages name, and in runs/mine a chain that was really trained."""
    folder = tmp_path_factory.mktemp("docs")
    (folder / "examples").symlink_to(REPOSITORY / "examples")
    shards(folder / "SRC", ["train-000000.tar", "val-000000.tar"])
    shards(folder / "tars", ["train-00000.tar", "train-00001.tar"])
    shutil.copy(folder / "SRC" / "train-000000.tar", folder / "tars" / "other.tar")
    (folder / "cc3m").mkdir()
    Image.new("RGB", (300, 290)).save(folder / "cc3m" / "1.jpg")
    rows = [
        ["filepath", *"rabcdef"],
        ["1.jpg", "a dog", *["One. Two."] * 6],
        ["gone.jpg", "a cat", *["Three."] * 6],
    ]
    (folder / "cc3m" / "all.csv").write_text("".join("\t".join(row) + "\n" for row in rows))
    (folder / "cc3m" / "captions.csv").write_text(
        "".join("\t".join(row) + "\n" for row in rows[:2])
    )
    (folder / "chain.yaml").write_text(yaml.safe_dump(chain()))
    before = chain()
    before["spec"]["recipe"]["learningRate"] = "0.5"
    (folder / "main.yaml").write_text(yaml.safe_dump(before))
    pools = [
        block.text for block in BLOCKS if block.page.stem == "plan" and "nodePools" in block.text
    ]
    (folder / "pools.yaml").write_text(pools[0])
    execute(folder, "pack", "SRC", "--to", "DIR")
    execute(folder, "run", "-f", "chain.yaml", "--root", "runs/mine", "--data", "DIR")
    return folder


def is_for_a_cluster(words: list[str]) -> bool:
    """These are run in tests/cluster; here they only have to be understood."""
    return words[1] in ON_A_CLUSTER or (
        words[1] in ("status", "plan", "cost", "report") and "-n" in words
    )


def understand(folder: Path, *words: str) -> None:
    """The command line is right: what it lacks is a cluster."""
    done = modelchain(*words, "--kubeconfig=none", folder=folder)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("modelchain: no API server to talk to: there is no none"), (
        done.stderr
    )


@pytest.mark.parametrize("page", EXECUTED, ids=lambda page: page.stem)
def test_commands_do_what_the_page_says(
    page: Path, stand_ins: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # `bench` with less to do, here and below.
    monkeypatch.setattr(loader, "measure_loader", partial(loader.measure_loader, seconds=0.1))
    monkeypatch.setattr(loader, "PICTURES", 8)
    monkeypatch.setattr(end_to_end, "STEPS", 1)
    small = ZooModel(ModelConfig.model_validate(SMALL), MODELS["ViT-T-16"].paper)
    here = tmp_path / "page"
    shutil.copytree(stand_ins, here, symlinks=True)
    artifacts = list((here / "runs" / "mine").glob("*/artifact"))
    names = {"ARTIFACT": str(artifacts[0]), "STAGE": "one"}
    if ["modelchain", "pack", "SRC", "--to", "DIR"] in commands(page):
        shutil.rmtree(here / "DIR")
    for words in commands(page):
        if words[0] == "modelchain" and is_for_a_cluster(words):
            understand(here, *words[1:])
        elif words[0] == "modelchain":
            if words[1] == "bench":
                words = re.sub(r"(--batch|--captions) \d+", r"\1 2", " ".join(words)).split()
                monkeypatch.setitem(MODELS, "ViT-T-16", small)
            out = execute(here, *(names.get(word, word) for word in words[1:]))
            if "json" in words:
                json.loads(out)
    assert set((here / "runs" / "mine").glob("*/artifact")) == set(artifacts), (
        "a finished chain trains nothing"
    )


def test_every_command_line_is_in_some_page() -> None:
    listed = subprocess.run(
        [MODELCHAIN, "--help"], capture_output=True, text=True, check=True
    ).stdout
    known = set(re.findall(r"^[│|] (\w+)  ", listed, re.M))
    assert known >= {"validate", "plan", "run", "status", "pack", "evaluate"}
    assert known == {
        words[1] for page in EXECUTED for words in commands(page) if words[0] == "modelchain"
    }


@pytest.mark.parametrize(
    ("page", "words"), OTHERS, ids=lambda value: getattr(value, "stem", None) or " ".join(value)
)
def test_other_commands_name_what_is_there(page: Path, words: list[str]) -> None:
    while re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words = words[1:]
    if words[0] == "make":
        done = subprocess.run(
            ["make", "-n", *words[1:]], cwd=REPOSITORY, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
    elif words[0] == ".venv/bin/python":
        command = [sys.executable, words[1], "--help"]
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
        assert not [word for word in words if word.startswith("--") and word not in done.stdout], (
            done.stderr
        )
    elif words[0] in ("docker", "buildah"):
        assert_is_of_an_image(words)
    else:
        assert words[0] == PYTEST, f"{page.name}: nothing here checks `{' '.join(words)}`"
        paths = [word for word in words[1:] if word.startswith("tests")]
        assert paths and all((REPOSITORY / path).exists() for path in paths)


def assert_is_of_an_image(words: list[str]) -> None:
    """Built is what the Dockerfile has; pushed and looked at is what was built."""
    dockerfile = (REPOSITORY / "Dockerfile").read_text()
    targets = re.findall(r"^FROM .* AS (\S+)$", dockerfile, re.M)
    if words[1] in ("build", "bud"):
        options = dict(zip(words[2:-1:2], words[3:-1:2], strict=True))
        assert options.keys() <= {"--target", "--tag", "--build-arg"} and words[-1] == "."
        assert options["--target"] in targets and f"/{options['--target']}:" in options["--tag"]
        argument = options.get("--build-arg", "BASE=").split("=")[0]
        assert re.search(rf"^ARG .*\b{argument}=", dockerfile, re.M)
    else:
        assert words[1] in ("push", "inspect")
        assert any(
            words[-1] == other[other.index("--tag") + 1] for _, other in OTHERS if "--tag" in other
        )


def test_the_pages_use_blocks_that_are_checked() -> None:
    assert {block.language for block in BLOCKS} <= {"sh", "yaml", "python", "text", ""}
    assert not [
        b
        for b in BLOCKS
        if b.language in ("", "text") and re.search(r"^(modelchain|make) ", b.text, re.M)
    ]


@pytest.mark.parametrize(
    "block", [b for b in BLOCKS if b.language == "yaml"], ids=lambda block: block.page.stem
)
def test_yaml_loads(block: Block, tmp_path: Path) -> None:
    file = tmp_path / "file.yaml"
    file.write_text(block.text)
    if "kind: ModelChain" in block.text:
        check_epochs(load_chain(file), str(file), {})
    elif "kind" not in (
        content := yaml.safe_load(block.text)
    ):  # other kinds: tests/cluster/test_docs.py
        if content.keys() == {"spec"}:  # a part of a chain
            assert content["spec"].keys() <= {f.alias for f in ChainSpec.model_fields.values()}
            Gate.model_validate(content["spec"]["gate"])
            return
        chart = yaml.safe_load((REPOSITORY / "charts" / "modelchain" / "values.yaml").read_text())
        ours = {field.alias for field in PoolFile.model_fields.values()}
        assert content.keys() <= chart.keys() | ours
        file.write_text(
            yaml.safe_dump({key: value for key, value in content.items() if key in ours})
        )
        load_model(PoolFile, file)


@pytest.mark.parametrize(
    "block", [b for b in BLOCKS if b.language == "python"], ids=lambda block: block.page.stem
)
def test_python_is_python(block: Block, stand_ins: Path, tmp_path: Path) -> None:
    ast.parse(block.text)
    if "cc3m" in block.text:
        shutil.copytree(stand_ins / "cc3m", tmp_path / "cc3m")
        (tmp_path / "cc3m" / "captions.csv").unlink()
        subprocess.run([sys.executable, "-c", block.text], cwd=tmp_path, check=True)
        made, expected = (folder / "cc3m" / "captions.csv" for folder in (tmp_path, stand_ins))
        assert made.read_bytes() == expected.read_bytes()


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [*PAGES, *RUNBOOKS], ids=lambda page: page.stem)
def test_relative_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        path, _, anchor = link.partition("#")
        if path.startswith(("http://", "https://")):
            continue
        target = page.parent / path if path else page
        assert target.exists(), f"{page.name}: {link}"
        assert not anchor or anchor in anchors(target), f"{page.name}: {link}"


def test_the_page_of_the_spec_has_every_field() -> None:
    page = (REPOSITORY / "docs" / "spec.md").read_text()
    fields = {re.sub(r"\[\d\]", "[]", row.path) for row in ROWS}
    names = {re.sub(r"^spec\.(stages\[\]\.modelConfig\.)?", "", field) for field in fields}
    assert not [name for name in names if f"`{name}`" not in page and f"`{name}." not in page]


def test_every_class_of_failure_has_its_row(tmp_path: Path) -> None:
    rows = pages.failure_rows()
    assert sorted(rows) == sorted(FailureClass)
    for name, cells in rows.items():
        what, pays, alone, todo, command = cells
        failure = FailureClass(name)
        budget = "`maxDisruptions`" if failure.disruption else "`maxRetries`"
        assert pays == ("no budget: the stage fails at once" if failure.permanent else budget), name
        assert what and alone and todo
        advised = pages.advised(cells)
        assert advised and command == f"`{advised[-1]}`", f"{name}: {command}"
        for line in advised:  # those of kubectl are typed by tests/cluster/test_docs.py
            words = line.replace("NAME", "family").replace("NS", "vision").split()
            if words[0] == "modelchain":
                understand(tmp_path, *words[1:])


@pytest.mark.parametrize("page", RUNBOOKS, ids=lambda page: page.stem)
def test_the_command_line_understands_what_a_runbook_types(page: Path, tmp_path: Path) -> None:
    spans = re.findall(r"`(modelchain [^`]+ -n NS)`", page.read_text())
    typed = [*commands(page), *(span.split() for span in spans)]
    assert typed and {words[0] for words in typed} <= {"modelchain", "kubectl"}
    names = {"CHAIN": "family", "NS": "vision"}
    for words in typed:
        if words[0] == "modelchain":
            understand(tmp_path, *(names.get(word, word) for word in words[1:]))


def test_the_page_on_security_has_every_right_of_the_operator() -> None:
    page = (REPOSITORY / "docs" / "security.md").read_text()
    table = page.split("\n## The operator's rights\n")[1].split("\n## ")[0]
    rows = dict(re.findall(r"^\| `([a-z/]+)` \| ([a-z, ]+) \| .* \|$", table, re.M))
    role, _ = yaml.safe_load_all((REPOSITORY / "operator" / "rbac" / "cluster.yaml").read_text())
    assert rows == {rule["resources"][0]: ", ".join(rule["verbs"]) for rule in role["rules"]}
    assert all(len(rule["resources"]) == 1 for rule in role["rules"])


def test_every_picture_is_shown() -> None:
    shown = {
        Path(name).name
        for page in PAGES
        for name in re.findall(r"!\[[^]]+\]\((\S+)\)", page.read_text())
    }
    assert shown == {
        picture.name
        for kind in ("svg", "png")
        for picture in (REPOSITORY / "docs").glob(f"*.{kind}")
    }
