"""The Grafana dashboards of the chart, as code.

`make chart` writes them as JSON into charts/modelchain/files/dashboards; Helm makes a ConfigMap of
each.
"""

from __future__ import annotations

from dashboards import chain, family, operator
from dashboards.board import text_of

ALL = {"family": family.build, "chain": chain.build, "operator": operator.build}


def files() -> dict[str, str]:
    """The text of each dashboard's file, by its name."""
    return {f"{name}.json": text_of(build()) for name, build in ALL.items()}
