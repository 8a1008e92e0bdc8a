"""Growth: a successor's first weights from its trained predecessor (inverse weight initialisation,
paper 3.1.1).

`rules.py` says what every parameter's axes are, `depth.py` which layer is taken; the other files
are the methods in width, each of which fills one tensor; `grow.py` brings them together,
`report.py` tells of it.
"""

from modelchain_trainer.growth.agreement import agreement
from modelchain_trainer.growth.grow import grow
from modelchain_trainer.growth.report import GrowthReport

__all__ = ["GrowthReport", "agreement", "grow"]
