"""What a step pays for its arguments beside its ops: the optimizer's updates, tables turned round.

A TPU keeps a table whose last dimension does not fill whole tiles the other way round (see
`autoshard.cost.transposing`). A lookup takes rows, so it first copies the whole table the right way
round, and in a step that trains it the new table, and every slot, in and out. Seen in programs of
the TPU compiler: `[152064, 448]` costs 1.3 ms a copy on a v5e, `[152064, 512]` none.
"""

import math
from collections import Counter
from collections.abc import Iterable

from autoshard.cost.machine import Machine
from autoshard.cost.shards import local_bytes
from autoshard.cost.transposing import turning_seconds
from autoshard.cost.updates import Updates
from autoshard.graph.program import Argument, Layout, Program
from autoshard.hardware.efficiency import TILE_LANES
from autoshard.mesh import round_up

__all__ = ["ArgumentPricer"]


class ArgumentPricer:
    """Prices the layouts of a program's arguments on one machine.

    Attributes:
        updates: those of the weights and slots.
    """

    def __init__(self, program: Program, machine: Machine) -> None:
        self.updates = Updates(program, machine)
        self._machine = machine
        read = {op.operands[0].group for op in program.ops if op.kind == "gather"}
        tables = {
            (argument.family, argument.shape)
            for argument in program.arguments
            if argument.role == "weight" and argument.group in read and len(argument.shape) > 1
        }
        # The slots of a table have its family and shape.
        self._tables = Counter(
            (argument.family, argument.shape)
            for argument in program.arguments
            if argument.role in ("weight", "slot") and (argument.family, argument.shape) in tables
        )

    def is_free(self, argument: Argument) -> bool:
        """Whether it costs nothing under any layout."""
        return not (self.updates.changes(argument) or self._is_table(argument))

    def paid(self, arguments: Iterable[Argument]) -> list[tuple[Argument, ...]]:
        """Those that cost something under some layout, a weight and its slots together."""
        return self.updates.made_together(one for one in arguments if not self.is_free(one))

    def seconds(self, argument: Argument, layout: Layout, *, is_fused: bool) -> float:
        """What an argument, and all like it in the whole model, cost the step.

        Args:
            argument: one of the program's.
            layout: that of its group.
            is_fused: whether the matmul that makes its gradient makes its update too.
        """
        n_bytes = local_bytes(argument.n_bytes, layout, self._machine.axis_sizes)
        once = self.updates.seconds(argument, n_bytes, is_fused=is_fused)
        return (once + self._copy_seconds(argument, layout)) * float(argument.count)

    def least_seconds(self, argument: Argument, layout: Layout) -> float:
        """No more than what `seconds` says of an argument, whatever makes its update."""
        return self.seconds(argument, layout, is_fused=self.updates.may_be_fused(argument))

    def _is_table(self, argument: Argument) -> bool:
        return (
            self._machine.chip.kind == "tpu"
            and argument.role in ("weight", "slot")
            and (argument.family, argument.shape) in self._tables
        )

    def _copy_seconds(self, argument: Argument, layout: Layout) -> float:
        """Turning a table round for the lookup; back too where the step returns it."""
        if not self._is_table(argument):
            return 0.0
        sizes = self._machine.axis_sizes
        last = argument.dims[-1]
        splits = zip(layout, sizes, strict=True)
        parts = math.prod(size for dim, size in splits if last is not None and dim == last)
        columns = argument.shape[-1] // parts
        padded = round_up(columns, TILE_LANES)
        if padded == columns:
            return 0.0
        is_trained = self.updates.changes(argument)
        n_bytes = local_bytes(argument.n_bytes, layout, sizes) * padded / columns
        n_elements = n_bytes * math.prod(argument.shape) / argument.n_bytes
        n_copies = self._tables[argument.family, argument.shape] if is_trained else 1
        seconds = turning_seconds(n_elements, n_bytes, self._machine, n_copies)
        return (1 + is_trained) * seconds
