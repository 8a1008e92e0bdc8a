"""Growth: a successor's first weights from its trained predecessor (inverse weight initialisation,
paper 3.1.1).

- `rules.py` says what the axes of every parameter are.
- `depth.py` says which of the predecessor's layers each layer takes.
- `simple.py`, `copies.py`, `lemon.py` and `netexpand.py` are the methods in width; each fills one
  tensor.
- `grow.py` puts them together, `agreement.py` measures what was kept, `report.py` tells of it.
"""

from modelchain_trainer.growth.agreement import agreement
from modelchain_trainer.growth.grow import grow
from modelchain_trainer.growth.report import GrowthReport

__all__ = ["GrowthReport", "agreement", "grow"]
