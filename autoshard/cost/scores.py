"""The scores of attention on a TPU: where they lie, and what it takes to write and read them.

In a step that neither trains nor decodes they stay in the vector memory if they fit. Others are
written as exponentials, added up on the way, and read once by what weighs values by them.

For that a program multiplies the query by the keys once for the maxima of a softmax and once more
for its exponentials, and writes these alone. Where heads of the query share a key's and the query,
or the scores themselves, are summed over devices before, it writes the scores too; of a query that
is summed it reads them again. By the TPU compiler's programs for v5e, two blocks of qwen2.5_7b_en,
mistral_7b_en and llama3_8b_en on 1x8 with all scores on each device: nine of twelve that sum so
have two arrays of 224 or 256 MiB, fifteen others one or less. (phi3_mini_4k_instruct_en, with a key
for each head, has one in any case.) So it is of a query that is gathered from devices that each
made less of the heads' width than there are heads: then heads lie along the rows of its tiles.

Of long rows it writes the scores whatever was summed: llama3_8b_en and phi3_mini_4k_instruct_en,
two blocks, have one array for 1,024 tokens (dinov2_giant for 1,370), two for 2,048 and 4,096.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

from autoshard.cost.machine import Machine
from autoshard.cost.shards import FLOAT32_BYTES, Choice, local_bytes, local_sizes
from autoshard.graph.producers import made_by
from autoshard.graph.program import Layout, Op, Program, Scores
from autoshard.graph.softmaxes import read_softmaxes
from autoshard.graph.splits import layout_of
from autoshard.hardware.chips import Chip
from autoshard.hardware.efficiency import TILE_LANES, memory_seconds

__all__ = ["AttentionScores", "Written", "attending_seconds", "filled_share"]

# The shortest row seen whose scores are written; of 1,370 and fewer none are.
_LONG_ROW = 2048

# What sums of the exponentials take, over those of other rows, by whether they are in float32 and
# whether a device has one key's head or one sequence alone: by 40 programs for v5e 1.3 to 1.4 ps an
# element in float32 and 12.5 of one head, in bfloat16 7.2 to 8.5 and 9.5.
_SUMMING = {(True, False): 0.14, (True, True): 1.33, (False, False): 0.8, (False, True): 1.0}

# What matmuls reach whose rows of scores do not fill the lanes, of those whose do: by six programs
# for v5e of 64, 197 and 1,370 keys, 0.16 to 0.45.
_PADDED = 0.25

# Of the bandwidth, with what exponentials that do not fit are written: by eight programs for v5e.
_WRITING = 0.73


class Written(NamedTuple):
    """Scores that are written.

    Attributes:
        sums: index of the reduction that adds up their exponentials.
        n_bytes: of one device.
        seconds: what it takes to write and read them, in all blocks that the op stands for.
    """

    sums: int
    n_bytes: int
    seconds: float


def attending_seconds(
    op: Op, scores: Scores, choice: Choice, working: float, machine: Machine
) -> float:
    """What an op of attention takes a device of a step that neither trains nor decodes.

    Args:
        op: what makes the scores, adds up their exponentials or weighs values by these.
        scores: which of its arrays they are.
        choice: the factor split over each axis, or `WHOLE`.
        working: seconds of multiplying or adding up alone.
        machine: the chips.
    """
    array, local = op.arrays[scores.position], local_sizes(op, choice, machine.axis_sizes)
    n_bytes = array.n_bytes // array.itemsize * scores.itemsize
    shard = local_bytes(n_bytes, layout_of(array, choice), machine.axis_sizes)
    stays = machine.keeps_on_chip(shard)
    if op.kind == "reduction":
        batch = (array.factors[dim] for dim in scores.batch)
        is_flat = sum(factor is not None and local[factor] > 1 for factor in batch) < 2
        share = _SUMMING[scores.itemsize == FLOAT32_BYTES, is_flat]
        return share * working if stays or is_flat else 0.0
    is_made = scores.position >= len(op.operands)
    efficiency = _WRITING if is_made else machine.chip.hbm_read_efficiency
    moving = 0.0 if stays else shard / (efficiency * machine.chip.hbm_bytes_per_second)
    return max(moving, working)


def filled_share(op: Op, scores: Scores, local: Sequence[int], width: int, chip: Chip) -> float:
    """What a matmul of attention reaches of the efficiency of one without a batch, on a TPU.

    A tile of scores is there for one head alone, and takes as long to fill in as rows of its own
    edge, however narrow a head is. Rows that do not fill the lanes slow it down.

    Args:
        op: the matmul.
        scores: which of its arrays they are.
        local: what a device has of each factor.
        width: the smaller of its rows and columns.
        chip: the chip.
    """
    *_, keys = (factor for factor in op.arrays[scores.position].factors if factor is not None)
    padded = _PADDED if local[keys] % TILE_LANES else 1.0
    return padded * min(1.0, width / chip.mxu_size)


class _Scores(NamedTuple):
    """Indices of the matmuls that make the query (if one does) and the scores, and of the sums.

    And whether heads of the query share a key's, and whether the rows are long.
    """

    query: int | None
    scores: int
    sums: int
    is_shared: bool
    is_long: bool


class AttentionScores:
    """The scores of a step's forward half.

    Args:
        program: the step.
        machine: what it runs on; only a TPU writes any.
    """

    def __init__(self, program: Program, machine: Machine) -> None:
        self._ops = program.ops
        self._machine = machine
        self._scores = tuple(_scores(program.ops)) if machine.compiles_for_tpu else ()

    def written(
        self,
        layouts: Sequence[Layout],
        moved: Mapping[int, tuple[Layout, Layout]],
        is_summed: Callable[[int], bool],
    ) -> Iterator[Written]:
        """Those that are written under some layouts.

        Args:
            layouts: one a group.
            moved: of what ops a rule moves the result -> the layouts before and after.
            is_summed: whether an all-reduce sums what the op of an index makes.
        """
        machine = self._machine
        for query, scores, sums, is_shared, is_long in self._scores:
            is_turned = (
                query is not None and query in moved and self._is_turned(query, moved[query][0])
            )
            reads_again = is_turned or (query is not None and is_summed(query))
            if not (is_long or reads_again or (is_shared and is_summed(scores))):
                continue
            op = self._ops[sums]
            (array,) = op.operands
            n_bytes = local_bytes(array.n_bytes, layouts[array.group], machine.axis_sizes)
            seconds = 0.0
            if not machine.keeps_on_chip(n_bytes):
                by_rows = is_long or is_turned
                seconds = op.count * self._seconds(op, n_bytes, by_rows, reads_again)
            yield Written(sums=sums, n_bytes=n_bytes, seconds=seconds)

    def _seconds(self, sums: Op, n_bytes: int, by_rows: bool, reads_again: bool) -> float:
        """What it takes to write so many bytes of scores, and to read them.

        Where a query is summed, or its scores, that takes a pass each way; where it is done row by
        row, as of long rows, several: 1.2 ms for 224 MiB where 0.8 were taken.
        """
        chip = self._machine.chip
        if sums.scores is not None:
            passes = 2 * n_bytes / (_WRITING * chip.hbm_bytes_per_second)
            return memory_seconds(chip, n_bytes, n_bytes) if by_rows else passes
        if not (by_rows or reads_again):
            return 0.0
        return memory_seconds(chip, n_bytes if reads_again else 0, n_bytes)

    def _is_turned(self, query: int, made: Layout) -> bool:
        """Whether a device makes less of the width of heads than there are heads.

        Args:
            query: index of the matmul.
            made: layout of its result before a rule moves it.
        """
        op, n = self._ops[query], self._machine.axis_sizes
        local = [
            op.factor_sizes[factor]
            // math.prod(n[axis] for axis, at in enumerate(made) if at == dim)
            for dim, factor in enumerate(op.results[0].factors)
            if factor is not None
        ]
        return len(local) == 4 and local[-1] < local[-2]


def _scores(ops: Sequence[Op]) -> Iterator[_Scores]:
    for scores, sums, weighing in read_softmaxes(ops):
        op = ops[scores]
        keys = [array for array in op.operands if array.repetition is not None]
        others = [array for array in op.operands if array.repetition is None]
        is_shared = len(keys) == len(others) == 1
        is_long = weighing is not None and _row(ops[sums]) >= _LONG_ROW
        if is_shared or is_long:
            query = made_by(ops, others[0].group, before=scores) if is_shared else None
            yield _Scores(query, scores, sums, is_shared, is_long)


def _row(sums: Op) -> int:
    """How many elements a reduction adds up."""
    return math.prod(sums.factor_sizes[factor] for factor in sums.reduced)
