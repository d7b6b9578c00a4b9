"""What the planner predicts for the program that a verdict is of: few blocks, or all (`PERIODS`).

The planner itself prices a copy of the model in which one block stands for many, as it is done here
for verdicts on whole models. Else the copy stands for itself alone, so that prediction and compiler
speak of the same program.
"""

import math
from dataclasses import replace
from functools import cache

from verdicts import BATCH, PERIODS, SEQ_LEN, TARGET

from autoshard.cost.step import StepPricer
from autoshard.cost.values import StepCost
from autoshard.layout.resolve import resolve
from autoshard.layout.rules import LayoutRules
from autoshard.mesh import Mesh, shard_shape
from autoshard.model.build import build
from autoshard.model.fold import PLANNED_PERIODS, fold
from autoshard.model.folding import Folding
from autoshard.model.variables import ModelTable, dtype_bytes
from autoshard.planner.pricing import Candidate, make_scorer, score_rules
from autoshard.planner.setup import Setup, make_setup
from autoshard.planner.tracing import make_program
from autoshard.search.descent import Scorer

__all__ = ["held_bytes", "predicted_cost", "setup_of", "copy_scorer"]

# A weight, and Adam's two moments.
_COPIES = {"train": 3, "prefill": 1, "decode": 1}


def setup_of(mesh: str, workload: str) -> Setup:
    """The setting of every benchmark: `TARGET`, batch 8 x 512, bfloat16, Adam."""
    return make_setup(mesh, target=TARGET, workload=workload, batch=BATCH, seq_len=SEQ_LEN)


@cache
def copy_scorer(
    model: str,
    mesh: str,
    workload: str,
    *,
    as_partitioned: bool = False,
    is_whole: bool = False,
) -> tuple[ModelTable, Scorer]:
    """The variables of the copy that is compiled, and what scores its layouts.

    With `is_whole` the planner's own, in which blocks stand for others.
    """
    setup = setup_of(mesh, workload)
    periods = PLANNED_PERIODS if is_whole else PERIODS[workload]
    copy = fold(build(model, dtype=setup.workload.dtype), periods=periods)
    if not is_whole:
        copy = replace(copy, folding=Folding())
    chip = None if as_partitioned else setup.target.chip
    scorer = make_scorer(make_program(copy, setup.workload, chip), setup)
    if as_partitioned:
        machine = replace(scorer.pricer.machine, as_partitioned=True)
        scorer = replace(scorer, pricer=StepPricer(scorer.pricer.program, machine))
    return copy.table(), scorer


def predicted_cost(
    model: str,
    mesh: str,
    workload: str,
    rules: LayoutRules,
    *,
    as_partitioned: bool = False,
    is_whole: bool = False,
) -> StepCost | None:
    """The cost of a layout of that copy; None where the planner refuses the layout.

    `as_partitioned` leaves out what the TPU compiler makes of the partitioner's collectives;
    `is_whole` is for a program of all blocks.
    """
    table, scorer = copy_scorer(
        model, mesh, workload, as_partitioned=as_partitioned, is_whole=is_whole
    )
    priced = score_rules("", rules, table, scorer)
    return priced.scored.cost if isinstance(priced, Candidate) else None


def held_bytes(table: ModelTable, rules: LayoutRules, mesh: Mesh, workload: str) -> int:
    """Bytes of weights and optimizer on a device, of the whole model: exact, and below the peak."""
    assignment = resolve(rules, table, mesh).assignment
    return _COPIES[workload] * sum(
        math.prod(shard_shape(variable.shape, assignment.get(variable.family, ()), mesh))
        * dtype_bytes(variable.dtype)
        for variable in table.variables
    )
