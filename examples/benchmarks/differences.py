"""What moves between devices, predicted and compiled, side by side."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from tabulate import tabulate

from autoshard.cost.values import StepCost
from autoshard.xla.compiled import CompiledStep
from autoshard.xla.partitioned import target_collectives

__all__ = ["difference_table"]

HEADERS = ("collective", "axis", "MB", "predicted", "compiled", "wire MB", "where")
_MB = 1e6


@dataclass(slots=True)
class _Movement:
    predicted: int = 0
    compiled: int = 0
    wire: float = 0.0
    where: dict[str, None] = field(default_factory=dict)


def difference_table(step: CompiledStep, cost: StepCost, data_axis: str) -> str:
    """Collectives of which there are not as many as predicted, those of most bytes first."""
    found: dict[tuple[str, str, int], _Movement] = defaultdict(_Movement)
    for item in cost.traffic:
        movement = found[item.kind, item.axis, item.n_bytes]
        movement.predicted += item.count
        movement.wire += item.count * item.wire_bytes
        movement.where[f"p:{item.layer}{' (backward)' if item.backward else ''}"] = None
    for one in target_collectives(step, data_axis):
        movement = found[one.kind, one.axis, one.n_bytes]
        movement.compiled += one.count
        movement.wire -= one.wire_bytes
        movement.where[f"c:{one.layer} ({one.phase}, {one.count}/{one.launches})"] = None
    rows = sorted(found.items(), key=lambda pair: -abs(pair[1].wire))
    return _table([row for row in rows if row[1].predicted != row[1].compiled])


def _table(rows: Sequence[tuple[tuple[str, str, int], _Movement]]) -> str:
    lines = [
        [
            kind,
            axis,
            f"{n_bytes / _MB:.3f}",
            str(movement.predicted),
            str(movement.compiled),
            f"{movement.wire / _MB:+.2f}",
            ", ".join(movement.where),
        ]
        for (kind, axis, n_bytes), movement in rows
    ]
    return tabulate(lines, headers=HEADERS, disable_numparse=True)
