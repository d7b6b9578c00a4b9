"""The scores of attention that a TPU's program writes beside their exponentials.

It multiplies the query by the keys once for the maxima of a softmax and once more for its
exponentials, and writes these alone. Where heads of the query share a key's and the query, or the
scores themselves, are summed over devices before, it writes the scores too; of a query that is
summed it reads them again. By the TPU compiler's programs for v5e, two blocks of qwen2.5_7b_en,
mistral_7b_en and llama3_8b_en on 1x8 with all scores on each device: nine of twelve that sum so
have two arrays of 224 or 256 MiB, fifteen others one or less. (phi3_mini_4k_instruct_en, with a key
for each head, has one in any case.)
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from autoshard.cost.machine import Machine
from autoshard.cost.transfers import local_bytes
from autoshard.graph.program import Layout, Op, Program
from autoshard.hardware.efficiency import ON_CHIP_SHARE, memory_seconds

__all__ = ["SharedKeyScores", "Written"]


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


class _Scores(NamedTuple):
    """Indices of the matmuls that make the query and the scores, and of the reduction."""

    query: int
    scores: int
    sums: int


class SharedKeyScores:
    """The scores of a step's forward half, where heads of the query share one of the key.

    Args:
        program: the step.
        machine: what it runs on; only a TPU writes any.
    """

    def __init__(self, program: Program, machine: Machine) -> None:
        self._ops = program.ops
        self._machine = machine
        self._scores = tuple(_shared_key_scores(program.ops)) if machine.compiles_for_tpu else ()

    def written(
        self, layouts: Sequence[Layout], is_summed: Callable[[int], bool]
    ) -> Iterator[Written]:
        """Those that are written under some layouts.

        Args:
            layouts: one a group.
            is_summed: whether an all-reduce sums what the op of an index makes.
        """
        chip, sizes = self._machine.chip, self._machine.axis_sizes
        for query, scores, sums in self._scores:
            reads_again = is_summed(query)
            if not (reads_again or is_summed(scores)):
                continue
            array, count = self._ops[sums].operands[0], self._ops[sums].count
            n_bytes = local_bytes(array.n_bytes, layouts[array.group], sizes)
            is_small = n_bytes <= ON_CHIP_SHARE * chip.vmem_bytes
            takes_time = reads_again and not is_small
            seconds = count * memory_seconds(chip, n_bytes, n_bytes) if takes_time else 0.0
            yield Written(sums=sums, n_bytes=n_bytes, seconds=seconds)


def _shared_key_scores(ops: Sequence[Op]) -> Iterator[_Scores]:
    made_by: dict[int, int] = {}
    with_maxima: set[int] = set()
    for index, op in enumerate(ops):
        if op.backward or not op.operands:
            continue
        group = op.operands[0].group
        if op.kind == "contraction":
            made_by[op.results[0].group] = index
        elif op.primitive == "reduce_max" and group in made_by:
            with_maxima.add(group)
        elif op.primitive == "reduce_sum" and group in with_maxima:
            query, key = ops[made_by[group]].operands
            if key.repetition is not None and query.group in made_by:
                yield _Scores(query=made_by[query.group], scores=made_by[group], sums=index)
