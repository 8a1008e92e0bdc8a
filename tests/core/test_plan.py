"""The plan against all numbers of the paper that `paper/facts.json` recomputes, and the plan's own
rules.
"""

from __future__ import annotations

import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
import yaml
from typer.testing import CliRunner

from modelchain.api.spec import ModelChain
from modelchain.cli.plan import plan as plan_command
from modelchain.errors import InputError
from modelchain.families import swin
from modelchain.plan.plan import (
    A100_BASE,
    A100_PER_GMAC,
    A100_TEACHER,
    MS_PER_HOUR,
    Plan,
    plan,
)
from modelchain.plan.pools import DEFAULT_POOLS, NodePool, PoolFile
from modelchain.plan.prices import kept

ROOT = Path(__file__).parents[2]
FACTS = ROOT.parent / "shared" / "paper" / "facts.json"
UNIT = 10**19  # the tables count 10^10 GMACs
CC3M, MERGED = 2753427, 12927058

# facts.json, table_2.*.computed: each model trained alone, each in the chain, and the accumulated
# ratios.
TABLE_2 = {
    "vit-cc3m": (
        [0.619234718592, 1.5383947334399999, 3.7453655973119995, 10.788499698816],
        [0.619234718592, 0.326908880856, 0.598259111706, 1.4092039386000001],
        [1.0, 2.280446068959095, 3.822186406894609, 5.651224664445484],
    ),
    "swin-cc3m": (
        [0.93748682496, 1.9673125777920002, 3.483503675904, 7.857267396864],
        [0.93748682496, 0.42675915758399996, 0.516498850368, 0.8446963350600001],
        [1.0, 2.1292343462395458, 3.396687826473965, 5.22688607001564],
    ),
    "vit-merged15m": (
        [3.6113029228799993, 5.474453938304, 8.792054103423999, 25.325451036032],
        [3.6113029228799993, 2.188305305298, 2.81622422059, 6.616068284400001],
        [1.0, 1.5666156236278004, 2.074995198770885, 2.836367092818782],
    ),
}
RUNS = {"vit-cc3m": "ViT/CC3M", "swin-cc3m": "Swin/CC3M", "vit-merged15m": "ViT/Merged-15M"}

# The paper's Table 2 as printed. Training MACs in 10^10 G: each model alone, then each in the
# chain.
PRINTED_MACS = {
    "vit-cc3m": (["0.62", "1.54", "3.75", "10.79"], ["0.62", "0.32", "0.59", "1.41"]),
    "swin-cc3m": (["0.94", "1.97", "3.48", "7.86"], ["0.94", "0.43", "0.52", "0.84"]),
    "vit-merged15m": (["3.61", "5.52", "8.79", "25.33"], ["3.61", "2.19", "2.82", "6.62"]),
}
# Hundreds of A100 hours, in the same order; the first model of a chain is the one trained alone.
PRINTED_HOURS = {
    "vit-cc3m": (["1.54", "2.40", "3.45", "7.56"], ["1.54", "0.52", "0.54", "1.02"]),
    "swin-cc3m": (["2.22", "3.29", "3.73", "6.76"], ["2.22", "0.68", "0.58", "0.73"]),
    "vit-merged15m": (["5.10", "6.20", "7.94", "16.28"], ["5.10", "2.60", "2.75", "4.52"]),
}
# How many times fewer MACs and hours the whole family takes, as printed; then hours by the plan's
# law.
PRINTED_RATIOS = {
    "vit-cc3m": (5.68, 4.10),
    "swin-cc3m": (5.22, 3.80),
    "vit-merged15m": (2.84, 2.37),
}
LAW_RATIOS = {"vit-cc3m": 3.92, "swin-cc3m": 3.58, "vit-merged15m": 2.43}
# Printed cells that differ from the rounded value: chain, stage, alone or in the chain.
SLIPS = {("vit-cc3m", 1, "com"), ("vit-cc3m", 2, "com"), ("vit-merged15m", 1, "base")}

# facts.json, table_2.*.own_conventions.A_full_n4_exactCu.acc[-1]. It takes ViT-S and ViT-L with the
# embedding of the authors' release.
ANALYTIC = {
    "vit-cc3m": (5.830782406247072, 1e-5),
    "swin-cc3m": (5.169291220713631, 1e-12),
    "vit-merged15m": (2.8917469946606524, 1e-5),
}

# facts.json, figures 6 and 7: models, epochs, samples, total, baseline.
VIT = {s: f"ViT-{s}-16" for s in ("T", "C", "S", "M", "B", "XB", "L")}
FIGURES = [
    ("B L", [128, 15], CC3M, 5.1545695359120005, 14.533865296127999),
    ("S B L", [128, 18, 15], CC3M, 3.545857783746, 16.072260029568),
    ("T S B L", [128, 24, 18, 15], CC3M, 2.953606649754, 16.69149474816),
    ("B L", [64, 15], MERGED, 15.408122387824003, 34.117505139456),
    ("M B L", [64, 17, 15], MERGED, 14.906746443294, 39.59195907776),
    ("S M B L", [64, 21, 17, 15], MERGED, 15.231900733168002, 43.20326200064),
    ("T C S M B XB L", [128, 24, 21, 18, 15, 12, 9], CC3M, 3.5609355499979998, 25.223682171264002),
    ("T M L", [128, 32, 23], CC3M, 3.330658189707, 13.739821004160001),
    ("T M L", [128, 28, 22], CC3M, 3.161060853642, 13.739821004160001),
]


def _chain(
    models: list[str],
    epochs: list[int | None],
    samples: int = CC3M,
    baseline: int = 128,
    **spec: Any,
) -> ModelChain:
    stages: list[dict[str, Any]] = []
    for i, (model, count) in enumerate(zip(models, epochs, strict=True)):
        stages.append(
            {"name": f"s{i + 1}", "model": model} | ({} if count is None else {"epochs": count})
        )
    body = {
        "stages": stages,
        "data": {"train": {"shards": "/data/x-{0..9}.tar", "samples": samples}},
        "recipe": {"baselineEpochs": baseline, "globalBatchSize": 1024, "learningRate": "1e-3"},
    }
    return ModelChain.model_validate(
        {
            "apiVersion": "modelchain.dev/v1alpha1",
            "kind": "ModelChain",
            "metadata": {"name": "x"},
            "spec": body | spec,
        }
    )


def _example(name: str) -> ModelChain:
    return ModelChain.model_validate(
        yaml.safe_load((ROOT / "examples" / f"{name}.yaml").read_text())
    )


def _accumulated(result: Plan) -> list[float]:
    alone = spent = 0
    out = []
    for stage in result.stages:
        alone, spent = alone + stage.individual.macs, spent + stage.macs
        out.append(alone / spent)
    return out


def _check_table_2(name: str, base: list[float], com: list[float], ratios: list[float]) -> None:
    result = plan(_example(name), "paper", DEFAULT_POOLS)
    assert [stage.individual.macs / UNIT for stage in result.stages] == pytest.approx(
        base, rel=1e-12
    )
    assert [stage.macs / UNIT for stage in result.stages] == pytest.approx(com, rel=1e-12)
    assert _accumulated(result) == pytest.approx(ratios, rel=1e-12)
    assert result.acceleration == pytest.approx(ratios[-1], rel=1e-12)


@pytest.mark.parametrize("name", TABLE_2)
def test_the_examples_give_table_2(name: str) -> None:
    _check_table_2(name, *TABLE_2[name])
    assert plan(_example(name), "paper", {}).acceleration == pytest.approx(
        {"vit-cc3m": 5.651, "swin-cc3m": 5.227, "vit-merged15m": 2.836}[name], abs=0.002
    )


@pytest.mark.parametrize("name", PRINTED_MACS)
def test_the_printed_ratios_are_quotients_of_printed_cells_though_three_are_misrounded(
    name: str,
) -> None:
    for mode, printed, computed in zip(
        ("base", "com"), PRINTED_MACS[name], TABLE_2[name][:2], strict=True
    ):
        for i, (cell, value) in enumerate(zip(printed, computed, strict=True)):
            assert (abs(float(cell) - value) > 0.0051) == ((name, i, mode) in SLIPS), (i, mode)
    alone, chained = (sum(Decimal(cell) for cell in cells) for cells in PRINTED_MACS[name])
    assert round(float(alone / chained), 2) == PRINTED_RATIOS[name][0]


def _hours() -> list[tuple[str, float, float, bool, bool]]:
    """For each of Table 2's 21 different GPU hours: chain and stage, milliseconds per sample as
    printed, GMACs per sample, whether it is a successor, whether it is a Swin.
    """
    rows = []
    for name, (alone, chained) in PRINTED_HOURS.items():
        stages = plan(_example(name), "paper", DEFAULT_POOLS).stages
        per_epoch = MERGED if name == "vit-merged15m" else CC3M
        for i, stage in enumerate(stages):
            for cell, epochs, macs, successor in (
                (alone[i], stages[0].epochs, stage.individual.macs, False),
                (chained[i], stage.epochs, stage.macs, True),
            ):
                if successor and i == 0:
                    continue
                samples = epochs * per_epoch
                ms = float(cell) * 100 * MS_PER_HOUR / samples
                rows.append(
                    (
                        f"{name} {i} {successor}",
                        ms,
                        macs / samples / 1e9,
                        successor,
                        name.startswith("swin"),
                    )
                )
    return rows


def test_the_laws_errors_are_those_in_docs_plan() -> None:
    rows = _hours()
    assert len(rows) == 21
    design = np.array(
        [[1, gmacs, successor, swin] for _, _, gmacs, successor, swin in rows], dtype=float
    )
    printed = np.array([row[1] for row in rows])
    law = np.array([A100_BASE, A100_PER_GMAC, A100_TEACHER, swin.A100_MS])
    errors = np.abs(design @ law / printed - 1)
    assert (round(100 * errors.mean(), 2), round(100 * errors.max(), 1)) == (3.76, 10.2)
    # For ViT-B in the chain on CC3M 54 is printed, but the printed sum (2.06 to 2.62) and the ratio
    # (3.45 / 6.16) need 56.
    read = np.array([ms * 56 / 54 if row == "vit-cc3m 2 True" else ms for row, ms, *_ in rows])

    def fitted(kept: Any) -> Any:
        """The law fitted by least squares of relative errors."""
        scaled = design[kept] / read[kept, None]
        return np.linalg.lstsq(scaled, np.ones(len(scaled)), rcond=None)[0]

    assert fitted(np.arange(21)) == pytest.approx(law, rel=1e-5)
    left_out = [abs(design[i] @ fitted(np.arange(21) != i) / read[i] - 1) for i in range(21)]
    assert (round(100 * np.mean(left_out), 1), round(100 * max(left_out), 1)) == (4.6, 13.8)


@pytest.mark.parametrize("name", LAW_RATIOS)
def test_the_laws_ratio_of_hours_is_not_the_papers(name: str) -> None:
    result = plan(_example(name), "paper", DEFAULT_POOLS)
    assert (
        round((result.individual.gpu_hours or 0) / (result.total.gpu_hours or 1), 2)
        == LAW_RATIOS[name]
    )
    analytic = plan(_example(name), "analytic", DEFAULT_POOLS)
    for by_table, counted in (
        (result.total, analytic.total),
        (result.individual, analytic.individual),
    ):
        assert 6 <= round(100 * (1 - (counted.gpu_hours or 0) / (by_table.gpu_hours or 1))) <= 11
    # The paper also prints sums of hours. The sum for ViT on CC3M counts 56 where the cell has 54,
    # and the paper cuts 14.95 / 3.64 off at 4.10.
    alone, chained = (sum(Decimal(cell) for cell in cells) for cells in PRINTED_HOURS[name])
    chained += Decimal("0.02") * (name == "vit-cc3m")
    assert float(alone / chained) == pytest.approx(PRINTED_RATIOS[name][1], abs=0.01)


def test_pages_and_examples_state_these_ratios() -> None:
    page = (ROOT / "docs" / "plan.md").read_text()
    titles = {
        "vit-cc3m": "ViT on CC3M",
        "swin-cc3m": "Swin on CC3M",
        "vit-merged15m": "ViT on Merged-15M",
    }
    for name, title in titles.items():
        macs, hours = PRINTED_RATIOS[name]
        ours, analytic, law = TABLE_2[name][2][-1], ANALYTIC[name][0], LAW_RATIOS[name]
        assert f"| {title} | {macs} | {ours:.2f} | {analytic:.2f} | {hours:.2f} | {law} |" in page
        head, *_ = (ROOT / "examples" / f"{name}.yaml").read_text().split("apiVersion")
        head = " ".join(head.replace("#", "").split())
        assert f"{macs} times fewer MACs, {hours:.2f} times fewer A100 hours" in head
        assert f"says {ours:.2f}, recomputed from Table G, and {law}, by a law" in head
    readme = " ".join((ROOT / "README.md").read_text().split())
    spans = [
        f"{min(found):.2f} to {max(found):.2f}"
        for found in zip(*PRINTED_RATIOS.values(), strict=True)
    ]
    assert (
        f"cost {spans[0]} times fewer MACs that way and {spans[1]} times fewer A100 hours" in readme
    )


@pytest.mark.skipif(
    not FACTS.exists(),
    reason=f"{FACTS.name} is not beside this checkout; the committed numbers stand",
)
@pytest.mark.parametrize("name", RUNS)
def test_the_committed_numbers_are_those_of_facts_json(name: str) -> None:
    facts = json.loads(FACTS.read_text())
    computed = facts["table_2"][RUNS[name]]["computed"]
    assert (computed["base"], computed["com"], computed["acc_ratio"]) == TABLE_2[name]
    result = plan(_example(name), "paper", DEFAULT_POOLS)
    assert [s.individual.macs / s.macs for s in result.stages] == pytest.approx(
        computed["ind_ratio"], rel=1e-12
    )
    assert [s.epochs for s in result.stages] == facts["table_D"][RUNS[name]]["epochs"]
    hours = {
        (r["model"].replace("/", "-"), r["mode"]): r
        for r in facts["gpu_hours"]["rows"]
        if r["run"] == RUNS[name]
    }
    for i, stage in enumerate(result.stages):
        for mode, amount in (("base", stage.individual), ("com", stage)):
            if mode == "com" and i == 0:
                continue
            row = hours[stage.model, mode]
            assert amount.gpu_hours == pytest.approx(
                row["samples"] * row["fit_ms"] / 3.6e6, rel=1e-5
            )


@pytest.mark.skipif(
    not FACTS.exists(),
    reason=f"{FACTS.name} is not beside this checkout; the committed numbers stand",
)
def test_the_committed_figures_are_those_of_facts_json() -> None:
    figures = json.loads(FACTS.read_text())["figures"]
    rows = [*figures["fig6_CC3M"], *figures["fig6_M15"], *figures["fig7"]["plausible"].values()]
    told = {(tuple(r["models"]), tuple(r["epochs"])): (r["total"], r["baseline"]) for r in rows}
    for models, epochs, _, total, baseline in FIGURES:
        names = tuple(VIT[m].replace("-16", "/16") for m in models.split())
        assert told[names, tuple(epochs)] == (total, baseline)
    assert len(told) == len({(m, tuple(e)) for m, e, *_ in FIGURES})


@pytest.mark.parametrize(("models", "epochs", "samples", "total", "baseline"), FIGURES)
def test_figures_6_and_7(
    models: str, epochs: list[int], samples: int, total: float, baseline: float
) -> None:
    result = plan(
        _chain([VIT[m] for m in models.split()], [*epochs], samples, epochs[0]),
        "paper",
        DEFAULT_POOLS,
    )
    assert result.total.macs / UNIT == pytest.approx(total, rel=1e-12)
    assert result.individual.macs / UNIT == pytest.approx(baseline, rel=1e-12)
    assert result.acceleration == pytest.approx(baseline / total, rel=1e-12)


@pytest.mark.parametrize("name", ANALYTIC)
def test_analytic_ratios(name: str) -> None:
    ratio, exact = ANALYTIC[name]
    assert plan(_example(name), "analytic", DEFAULT_POOLS).acceleration == pytest.approx(
        ratio, rel=exact
    )


def test_the_analytic_convention_counts_exactly_the_samples_that_are_seen() -> None:
    result = plan(_example("vit-cc3m"), "analytic", DEFAULT_POOLS)
    first, second = result.stages[:2]
    assert first.samples == 128 * (CC3M // 1024) * 1024
    assert second.macs == second.samples * second.macs_per_sample
    assert result.total.macs == sum(stage.macs for stage in result.stages)


def test_the_fields_of_the_json_document() -> None:
    document = json.loads(plan(_example("vit-cc3m"), "paper", DEFAULT_POOLS).to_json())
    assert list(document) == [
        "chain",
        "convention",
        "stages",
        "total",
        "individual",
        "acceleration",
        "baselines",
    ]
    keys = [
        "name",
        "model",
        "epochs",
        "samples",
        "macsPerSample",
        "macs",
        "gpuHours",
        "cost",
        "individual",
    ]
    assert all(list(stage) == keys for stage in document["stages"])
    assert list(document["stages"][0]["individual"]) == ["epochs", "macs", "gpuHours", "cost"]
    assert list(document["total"]) == list(document["individual"]) == ["macs", "gpuHours", "cost"]
    second = document["stages"][1]
    assert (second["macsPerSample"], second["macs"]) == (49470000000, 24 * CC3M * 49470000000)
    assert second["cost"] is None


def _pools(**pool: Any) -> dict[str, NodePool]:
    return PoolFile.model_validate(
        {"nodePools": {"mine": {"gpu": "A100", "gpusPerNode": 8} | pool}}
    ).node_pools


def test_cost_is_hours_times_a_named_price() -> None:
    price = {"perGpuHour": "2.50", "currency": "USD", "source": "invoice"}
    chain = _chain(["ViT-T-16", "ViT-S-16"], [128, 24], runner={"nodePool": "mine"})
    result = plan(chain, "paper", _pools(price=price))
    for amount in (*result.stages, *(stage.individual for stage in result.stages)):
        assert amount.gpu_hours is not None and amount.cost is not None
        assert amount.cost == kept(Decimal(amount.gpu_hours) * Decimal("2.50"))
    # By fit_ms of facts.json.
    assert result.total.gpu_hours == pytest.approx(162.828 + 51.192, abs=0.01)
    assert float(result.total.cost or 0) == pytest.approx(
        sum(float(s.cost or 0) for s in result.stages)
    )


@pytest.mark.parametrize("convention", ["analytic", "paper"])
def test_without_distillation_no_predecessor_runs_or_is_counted(convention: Any) -> None:
    """With alpha 0 an epoch of a stage costs as much as an epoch of the model alone."""
    runner, transfer = {"nodePool": "mine"}, {"distillation": {"alpha": "0.0"}}
    chain = _chain(["ViT-T-16", "ViT-S-16"], [128, 128], runner=runner, transfer=transfer)
    for stage in plan(chain, convention, _pools()).stages:
        assert (stage.macs, stage.gpu_hours) == (stage.individual.macs, stage.individual.gpu_hours)


@pytest.mark.parametrize(
    ("runner", "pool"),
    [
        ({"kind": "Local", "nodePool": "mine"}, {}),
        ({}, {}),
        ({"nodePool": "another"}, {}),
        ({"nodePool": "mine"}, {"gpu": "H100"}),
    ],
)
def test_hours_are_unknown_without_an_a100_pool(
    runner: dict[str, str], pool: dict[str, str]
) -> None:
    result = plan(_chain(["ViT-T-16"], [None], runner=runner), "paper", _pools(**pool))
    assert (result.total.gpu_hours, result.total.cost) == (None, None)
    assert result.stages[0].individual.gpu_hours is None


def _problem(error: pytest.ExceptionInfo[InputError]) -> tuple[str, str | None]:
    (problem,) = error.value.problems
    return problem.message, problem.field


def test_an_inline_model_has_no_row_in_table_g() -> None:
    inline = {
        "embed_dim": 64,
        "vision_cfg": {"width": 64, "layers": 2},
        "text_cfg": {"width": 64, "heads": 1},
    }
    chain = _chain([], [], stages=[{"name": "tiny", "modelConfig": inline}])
    assert plan(chain, "analytic", DEFAULT_POOLS).stages[0].model == "inline"
    with pytest.raises(InputError) as error:
        plan(chain, "paper", DEFAULT_POOLS)
    message, field = _problem(error)
    assert (
        "tiny" in message
        and "--convention analytic" in message
        and field == "spec.stages[0].modelConfig"
    )


def test_a_batch_larger_than_the_data_has_no_step() -> None:
    with pytest.raises(InputError) as error:
        plan(_chain(["ViT-T-16"], [1], samples=1023), "analytic", DEFAULT_POOLS)
    assert _problem(error)[1] == "spec.recipe.globalBatchSize"


def test_successors_without_epochs_need_a_target() -> None:
    with pytest.raises(InputError) as error:
        plan(_chain(["ViT-T-16", "ViT-S-16"], [None, None]), "analytic", DEFAULT_POOLS)
    assert _problem(error)[1] == "spec.allocation.targetAcceleration"


def _epochs(chain: ModelChain, frozen: dict[str, int] | None = None) -> list[int]:
    return [stage.epochs for stage in plan(chain, "paper", DEFAULT_POOLS, frozen).stages]


def test_epochs_given_or_frozen_stay_and_the_rest_is_allocated() -> None:
    models = [VIT[m] for m in ["T", "S", "B", "L"]]
    target = {"allocation": {"targetAcceleration": "5.68"}}
    assert _epochs(_chain(models, [None] * 4, **target)) == [128, 23, 19, 14]
    assert _epochs(_chain(models, [100, 24, None, None], **target))[:2] == [100, 24]
    frozen = {"s1": 120, "s2": 30}
    assert _epochs(_chain(models, [None] * 4, **target), frozen)[:2] == [120, 30]
    assert _epochs(_chain(models, [None, 24, None, None], **target), frozen)[:2] == [120, 24]
    steep = {"allocation": {"targetAcceleration": "5.68", "endRatio": "0.5"}}
    first, second, _, last = _epochs(_chain(models, [None] * 4, **steep))
    assert (first, second, last) == (128, 27, 14), "half as many; 0.625 gives 23 and 14"
    # A frozen stage that spends more leaves less to the others, and the target is still reached.
    lean = _chain(models, [None] * 4, **target)
    assert sum(_epochs(lean, {"s2": 40})[2:]) < sum(_epochs(lean)[2:])
    assert plan(lean, "paper", {}, {"s2": 40}).acceleration >= 0.99 * 5.68


def _run(*arguments: str) -> Any:
    app = typer.Typer()
    app.command()(plan_command)
    return CliRunner().invoke(app, list(arguments))


def _written(tmp_path: Path, target: str) -> str:
    """The ViT example with its successors' epochs left to the plan."""
    raw = yaml.safe_load((ROOT / "examples" / "vit-cc3m.yaml").read_text())
    for stage in raw["spec"]["stages"][1:]:
        del stage["epochs"]
    raw["spec"]["allocation"] = {"targetAcceleration": target}
    path = tmp_path / "chain.yaml"
    path.write_text(yaml.safe_dump(raw))
    return str(path)


def test_the_command_prints_one_json_document() -> None:
    result = _run(
        "-f", str(ROOT / "examples" / "vit-cc3m.yaml"), "-o", "json", "--convention", "paper"
    )
    assert result.exit_code == 0
    assert json.loads(result.stdout)["acceleration"] == pytest.approx(5.651, abs=0.002)


def test_the_table_ends_with_a_sentence_and_never_cuts_a_number(tmp_path: Path) -> None:
    pools = tmp_path / "pools.yaml"
    price = "{perGpuHour: '2', currency: USD, source: list price}"
    pools.write_text(f"nodePools: {{a100-80gb: {{gpu: A100, gpusPerNode: 8, price: {price}}}}}")
    file = str(ROOT / "examples" / "vit-cc3m.yaml")
    result = _run("-f", file, "--convention", "paper", "--pools", str(pools))
    assert result.exit_code == 0 and "…" not in result.stdout
    assert result.stdout.splitlines()[-1] == (
        "this chain costs 2.95e19 MACs; training each alone 1.67e20: 5.65 times less"
    )
    assert "2 USD per GPU hour: list price" in result.stdout


def test_the_table_says_which_epochs_run_would_use(tmp_path: Path) -> None:
    file = _written(tmp_path, "5.68")
    assert "`run` allocates epochs by the analytic convention: epochs 128, 24, 20, 15" in (
        _run("-f", file, "--convention", "paper").stdout
    )
    assert "`run` allocates" not in _run("-f", file).stdout


def test_a_refusal_names_file_and_field(tmp_path: Path) -> None:
    file = _written(tmp_path, "100")
    error = _run("-f", file).exception
    assert isinstance(error, InputError)
    (problem,) = error.problems
    assert (problem.file, problem.field) == (file, "spec.allocation.targetAcceleration")


def test_a_plan_takes_the_price_that_holds_now(tmp_path: Path) -> None:
    def dated(since: str, price: str) -> str:
        return f"{{validFrom: {since}, perGpuHour: '{price}', currency: EUR, source: s{price}}}"

    pools = tmp_path / "pools.yaml"
    prices = [dated("2020-01-01", "1"), dated("2021-01-01", "2"), dated("9999-01-01", "3")]
    body = f"gpu: A100, gpusPerNode: 8, prices: [{', '.join(prices)}]"
    pools.write_text(f"nodePools: {{a100-80gb: {{{body}}}}}")
    shown = _run("-f", str(ROOT / "examples" / "vit-cc3m.yaml"), "--pools", str(pools)).stdout
    assert "2 EUR per GPU hour: s2" in shown
    spot = body.replace("EUR", "EUR, capacity: OnDemand") + ", capacityLabel: kind"
    pools.write_text(f"nodePools: {{a100-80gb: {{{spot}}}}}")
    shown = _run("-f", str(ROOT / "examples" / "vit-cc3m.yaml"), "--pools", str(pools)).stdout
    assert "2 EUR per GPU hour (OnDemand): s2" in shown
