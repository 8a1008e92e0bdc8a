"""`python benchmarks/quickstart_picture.py`: draw the end of the quickstart as docs/quickstart.svg,
from its root.
"""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from modelchain.io.load import load_chain
from modelchain.io.table import report_table, stages_table
from modelchain.local.root import Root
from modelchain.plan.plan import plan

root, repository = Root(Path("runs/quickstart")), Path(__file__).parent.parent
chain = load_chain(repository / "examples" / "quickstart.yaml")
status = root.read_status(chain)
results = {s.name: root.results(s.input_digest or "") for s in status.stages}
console = Console(record=True, width=112, file=Path("/dev/null").open("w"))  # noqa: SIM115
console.print("$ make quickstart", style="bold")
console.print(stages_table(chain.metadata.name, status))
console.print()
console.print(
    report_table(plan(chain, "analytic", {}), status, {k: v for k, v in results.items() if v})
)
console.save_svg(str(repository / "docs" / "quickstart.svg"), title="ModelChain")
