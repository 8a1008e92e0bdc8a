"""Every good spec loads. Every bad one gives one line per problem, and never a traceback."""

from __future__ import annotations

import contextlib
import copy
import tempfile
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
import yaml
from commandline import modelchain
from hypothesis import given, settings
from hypothesis import strategies as st
from specs import BAD, DELETE, GOOD, MINIMAL, Bad, config, inline, with_changes

from modelchain.api.spec import ModelChain
from modelchain.errors import InputError
from modelchain.identity.shards import base_names, expand
from modelchain.io.load import MAX_BYTES, load_chain, parse
from modelchain.plan.check import _problems_of, check

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.yaml"))


def load(value: Any) -> ModelChain:
    """Like `load_chain`, but with an object instead of a file."""
    chain = parse(ModelChain, value, "chain.yaml")
    check(chain, "chain.yaml")
    return chain


def refused(tmp_path: Path, content: str | bytes) -> InputError:
    """The error for a file with this content. Each line of it names the file and is short."""
    file = tmp_path / "chain.yaml"
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(InputError) as caught:
        load_chain(file)
    _one_line_each(caught.value, str(file))
    return caught.value


def _one_line_each(error: InputError, file: str) -> None:
    assert error.exit_code == 2
    lines = str(error).splitlines()
    assert len(lines) == len(error.problems) >= 1
    for line in lines:
        assert line.startswith(f"{file}: ")
        assert len(line) < 1500


def test_the_table_is_large_and_its_names_differ() -> None:
    assert len(BAD) >= 45
    assert len({row.name for row in BAD}) == len(BAD)


@pytest.mark.parametrize("name", GOOD)
def test_good_specs_load(name: str, tmp_path: Path) -> None:
    file = tmp_path / "chain.yaml"
    file.write_text(yaml.safe_dump(GOOD[name]))
    chain = load_chain(file)
    again = load(chain.model_dump(mode="json", by_alias=True, exclude_unset=True))
    assert again == chain, "a chain that is dumped loads as the same chain"


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.stem)
def test_examples(file: Path) -> None:
    load_chain(file)


@pytest.mark.parametrize("row", BAD, ids=lambda row: row.name)
def test_bad_specs_are_refused(row: Bad, tmp_path: Path) -> None:
    error = refused(tmp_path, yaml.safe_dump(row.spec))
    fields = [problem.field for problem in error.problems]
    assert row.field in fields
    assert any(
        row.message in problem.message for problem in error.problems if problem.field == row.field
    ), str(error)


def test_all_problems_are_reported_at_once() -> None:
    changes = {"metadata.name": "X", "spec.recipe.seed": -1, "spec.data.train.shards": DELETE}
    with pytest.raises(InputError) as caught:
        load(with_changes(changes))
    assert [p.field for p in caught.value.problems] == [
        "metadata.name",
        "spec.data.train.shards",
        "spec.recipe.seed",
    ]
    changes = {
        "spec.recipe.learningRate": "11",
        "spec.data.train.shards": "/etc/x",
        "spec.stages[1].name": "vit-t",
    }
    with pytest.raises(InputError) as caught:
        load(with_changes(changes))
    assert len(caught.value.problems) == 3


def test_each_name_of_no_stage_has_a_line() -> None:
    gate = {"metric": "top1", "train": ["a", "b", "a"], "baseline": {"c": "1"}}
    evaluation = [{"name": "top1", "kind": "Retrieval", "shards": "/data/val.tar"}]
    with pytest.raises(InputError) as caught:
        load(with_changes({"spec.gate": gate, "spec.evaluation": evaluation}))
    assert [p.message.partition(";")[0] for p in caught.value.problems] == [
        "there is no stage 'c'",
        "there is no stage 'a'",
        "there is no stage 'b'",
        "a stage is named twice",
    ]


@pytest.mark.parametrize(
    ("gate", "warned"), [({}, True), ({"train": ["vit-s"]}, False), (None, False)]
)
def test_validate_warns_of_a_gate_that_gates_nothing(
    gate: dict[str, Any] | None, warned: bool, tmp_path: Path
) -> None:
    evaluation = [{"name": "top1", "kind": "Retrieval", "shards": "/data/val.tar"}]
    changes: dict[str, Any] = {"spec.evaluation": evaluation}
    if gate is not None:
        changes["spec.gate"] = {"metric": "top1", **gate}
    (tmp_path / "chain.yaml").write_text(yaml.safe_dump(with_changes(changes)))
    done = modelchain("validate", "-f", "chain.yaml", folder=tmp_path)
    assert done.returncode == 0 and "valid" in done.stdout
    told = "modelchain: warning: chain.yaml: spec.gate: gates nothing: no stage is compared"
    assert done.stderr.startswith(told) if warned else done.stderr == ""


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("spec.recipe.baselineEpochs", 1 << 40_000),
        ("spec.recipe.learningRate", 1 << 40_000),
        ("spec.recipe.learningRate", True),
        ("spec.stages[0].modelConfig", config(text={"mlp_ratio": float("nan")})),
        ("spec.stages[0].modelConfig", config(vision={"mlp_ratio": float("inf")})),
        ("spec.stages[0].modelConfig", config(vision={"mlp_ratio": 1 << 40_000})),
        ("spec.stages[0].name", "\ud800"),
        ("spec.stages[0]\ud800", 1),
        ("spec.stages[0].rerun", b"bytes"),
        ("metadata.labels", {"a": "b" * 10, "c": object()}),
    ],
    ids=range(10),
)
def test_values_that_json_cannot_hold(path: str, value: Any) -> None:
    with pytest.raises(InputError) as caught:
        load(with_changes({path: value}))
    _one_line_each(caught.value, "chain.yaml")


BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 40))
BAD_YAML: dict[str, tuple[str | bytes, str]] = {
    "an alias bomb": (BOMB, "expand to more than"),
    "an alias to itself": ("a: &a [*a]", "refers to itself"),
    "a merge with itself": ("a: &a\n  <<: *a", "refers to itself"),
    "an alias to nothing": ("a: *b", "undefined alias"),
    "a key given twice": ("kind: A\nkind: B", "'kind' is given twice (line 2"),
    "a key given twice, deep": ("spec: {stages: [{name: a, name: b}]}", "'name' is given twice"),
    "two documents": ("a: 1\n---\nb: 2", "holds 2 documents; keep one ModelChain in a file"),
    "a tab": ("spec:\n\tstages: []", "'\\t'"),
    "not UTF-8": (b"kind: \xff\xfe", "is not UTF-8 text (byte 6)"),
    "UTF-16": ("kind: ModelChain".encode("utf-16"), "is not UTF-8"),
    "a NUL": ("kind: \0", "unacceptable character"),
    "a picture": (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "is not UTF-8"),
    "an empty file": ("", "is empty"),
    "only a comment": ("# nothing\n", "is empty"),
    "an empty document": ("---\n", "is empty"),
    "null": ("null", "is empty"),
    "a text": ("ModelChain", "holds a text"),
    "a list": ("[1, 2]", "holds a list"),
    "JSON cut off": ('{"kind": "Mod', "is not valid YAML"),
    "an integer of 5,000 digits": ("a: " + "9" * 5000, "is not valid YAML"),
    "deep nesting": ("[" * 5000, "nested too deeply"),
    "deep nesting in a value": ("a: " + "{a: " * 3000 + "1" + "}" * 3000, "nested too deeply"),
    "a Python object": (
        "a: !!python/object/apply:os.system [ls]",
        "could not determine a constructor",
    ),
    "a Python name": ("a: !!python/name:os.system", "could not determine a constructor"),
    "an unknown tag": ("a: !secret b", "could not determine a constructor"),
    "an empty integer": ('a: !!int ""', "does not fit its tag"),
    "a boolean that is none": ("a: !!bool maybe", "does not fit its tag"),
    "a time that is none": ("a: !!timestamp soon", "does not fit its tag"),
    "the 99th of a month": ("a: 2020-01-99", "does not fit its tag"),
    "binary that is none": ("a: !!binary é", "is not valid YAML"),
    "a number as a key": ("1: a", "key '1' is not a text"),
    "a boolean as a key": ("on: a", "key 'on' is not a text"),
    "a list as a key": ("[a]: b", "is not a text"),
    "merging a number": ("<<: 1", "for merging"),
    "too large": ("#" * (MAX_BYTES + 1), "is larger than"),
}


@pytest.mark.parametrize("name", BAD_YAML)
def test_bad_yaml_is_refused(name: str, tmp_path: Path) -> None:
    content, message = BAD_YAML[name]
    error = refused(tmp_path, content)
    assert message in str(error)


def test_a_folder_and_a_missing_file(tmp_path: Path) -> None:
    for path, message in ((tmp_path, "Is a directory"), (tmp_path / "none.yaml", "No such file")):
        with pytest.raises(InputError, match=f"cannot be read: {message}") as caught:
            load_chain(path)
        _one_line_each(caught.value, str(path))


def test_anchors_and_merges_are_allowed(tmp_path: Path) -> None:
    file = tmp_path / "chain.yaml"
    text = yaml.safe_dump(MINIMAL | {"status": {"base": {"epochs": 3}}})
    text = text.replace("base:\n", "base: &base\n") + "  derived: {<<: *base, more: 1}\n"
    file.write_text(text)
    assert load_chain(file).status["derived"] == {"epochs": 3, "more": 1}


def test_the_expansion_of_shard_patterns() -> None:
    assert expand("/data/{b,a-{08..10}}.tar") == [
        "/data/b.tar",
        "/data/a-08.tar",
        "/data/a-09.tar",
        "/data/a-10.tar",
    ]
    assert base_names("/data/x/{1,0}.tar") == ["1.tar", "0.tar"]


# Paths as they are, and patterns of which some names are no files below the mount.
ODD_PATHS = st.lists(
    st.sampled_from(["/", "//", "a", ".", "..", "...", "data", "{a,b}", "{.,..}", "{,a}", "x.tar"]),
    min_size=1,
    max_size=6,
).map(lambda parts: "/data/" + "".join(parts))


@given(ODD_PATHS)
def test_names_of_many_shards_are_read_fast_and_as_paths_are(pattern: str) -> None:
    names = expand(pattern)
    assert base_names(pattern) == [PurePosixPath(name).name for name in names]
    wrong = any(
        ".." in PurePosixPath(name).parts
        or PurePosixPath("/data") not in PurePosixPath(name).parents
        for name in names
    )
    twice = len(set(names)) < len(names)
    assert bool(list(_problems_of(pattern, "/data", True))) == (wrong or twice)


@settings(max_examples=300, deadline=2000)
@given(st.text(alphabet="{},.a01-/٣\\\0", max_size=60) | st.text(max_size=60))
def test_any_pattern_expands_or_is_refused(pattern: str) -> None:
    with contextlib.suppress(InputError):
        assert len(expand(pattern)) <= 100_000


SCALARS: list[Any] = [
    None,
    True,
    False,
    0,
    1,
    -1,
    3,
    10**9,
    1 << 70,
    1 << 20_000,
    0.5,
    1e300,
    float("nan"),
    float("-inf"),
    "",
    "1",
    "a",
    "/",
    "/data/x.tar",
    "1e-3",
    "1e99",
    "é\n\0",
    "\ud800",
    "{{",
    "/data/{a,b}{0..9}",
    b"\xff",
    [],
    {},
    [[]],
    {"": None},
    [None],
    "x" * 3000,
    (1, 2),
    {1},
]


def _places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every path in an object."""
    children = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    return [at, *(place for key, child in children for place in _places(child, (*at, key)))]


@settings(max_examples=600, deadline=None)
@given(data=st.data(), name=st.sampled_from(sorted(GOOD)))
def test_a_mutated_spec_raises_no_other_error(data: st.DataObject, name: str) -> None:
    spec: Any = copy.deepcopy(GOOD[name])
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.sampled_from(_places(spec)))
        values = (
            st.sampled_from(SCALARS).map(copy.deepcopy)
            | st.just(copy.deepcopy(MINIMAL))
            | st.text(max_size=5)
            | st.integers()
        )
        if not place:
            continue
        parent: Any = spec
        for key in place[:-1]:
            parent = parent[key]
        match data.draw(st.sampled_from(["delete", "replace", "insert"])):
            case "delete":
                del parent[place[-1]]
            case "replace":
                parent[place[-1]] = data.draw(values)
            case "insert" if isinstance(parent, dict):
                parent[
                    data.draw(
                        st.sampled_from(["model", "epochs", "x", "", "name"]) | st.text(max_size=3)
                    )
                ] = data.draw(values)
            case _:
                parent.insert(0, data.draw(values))
    try:
        load(spec)
    except InputError as error:
        _one_line_each(error, "chain.yaml")


@settings(max_examples=150, deadline=None)
@given(
    st.binary(max_size=80)
    | st.text(alphabet="[]{}&*<!:-,|>'\"%@ \n\tax0", max_size=80).map(str.encode)
)
def test_arbitrary_bytes_raise_no_other_error(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "chain.yaml"
        file.write_bytes(content)
        with pytest.raises(InputError):
            load_chain(file)


def test_the_defaults_of_a_spec() -> None:
    """They are those that docs/spec.md lists."""
    spec = load(
        with_changes({"spec.recipe.warmupSteps": DELETE, "spec.data.train.samples": 2_753_427})
    ).spec
    assert (spec.data.volume.mount_path, spec.data.train.captions_per_sample) == ("/data", 4)
    recipe = spec.recipe
    assert (recipe.weight_decay, recipe.precision, recipe.seed) == ("0.1", "bf16", 0)
    assert (recipe.warmup_steps.first, recipe.warmup_steps.successors) == (8000, 1000)
    transfer = spec.transfer
    assert (transfer.width, transfer.depth, transfer.distillation.alpha) == (
        "Insert",
        "Duplicate",
        "500",
    )
    assert spec.runner.kind == "PyTorchJob" and not spec.suspend
    first, second = load(with_changes(inline(config(), config(vision={"layers": 3})))).spec.stages
    assert first.config.resolved()["text_cfg"][
        "vocab_size"
    ] == 49_408 and second.config.vision_cfg.shape.depths == (3,)
