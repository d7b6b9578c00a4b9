"""What the planner predicts for the program that a verdict is of: two periods of blocks, no more.

The planner itself prices a copy of the model in which one block stands for many. Here the copy
stands for itself alone, so that prediction and compiler speak of the same program.
"""

from dataclasses import replace
from functools import cache

from verdicts import BATCH, PERIODS, SEQ_LEN, TARGET

from autoshard.cost.step import StepPricer
from autoshard.cost.strategies import Machine
from autoshard.hardware.links import axis_links
from autoshard.layout.resolve import resolve
from autoshard.layout.rules import LayoutRules
from autoshard.mesh import Mesh, shard_bytes
from autoshard.model.build import build
from autoshard.model.folding import Folding
from autoshard.model.step import make_step, trace
from autoshard.model.variables import ModelTable, dtype_bytes
from autoshard.planning import Planning, Setup, _program, make_setup
from autoshard.search.descent import Scorer
from autoshard.search.ranking import SearchResult

__all__ = ["held_bytes", "scorer_of", "setup_of", "shallow_planning"]

# A weight, and Adam's two moments.
_COPIES = {"train": 3, "prefill": 1}


def setup_of(mesh: str, workload: str) -> Setup:
    """The setting of every benchmark: `TARGET`, batch 8 x 512, bfloat16, Adam."""
    return make_setup(mesh, target=TARGET, workload=workload, batch=BATCH, seq_len=SEQ_LEN)


@cache
def shallow_planning(model: str, mesh: str, workload: str) -> Planning:
    """The program of two periods of blocks with its prices, nothing searched."""
    setup = setup_of(mesh, workload)
    shallow = build(model, dtype=setup.workload.dtype, repeats=PERIODS)
    shallow = replace(shallow, folding=Folding())
    step = make_step(shallow, setup.workload)
    program = _program(trace(step), step, shallow)
    links = axis_links(setup.mesh, setup.target)
    machine = Machine(
        chip=setup.target.chip, links=tuple(links[axis] for axis in setup.mesh.parallel_axes)
    )
    pricer = StepPricer(program, machine)
    return Planning(
        setup=setup,
        table=shallow.table(),
        task=shallow.task,
        unknown=pricer.program.unknown,
        result=SearchResult(ranked=(), bound_seconds=0.0, n_scored=0, reasons=()),
        candidates=(),
        rivals=(),
        pricer=pricer,
    )


def scorer_of(planning: Planning) -> Scorer:
    """Scores layouts of a planning's program, whatever their memory."""
    return Scorer(pricer=planning.pricer, mesh=planning.setup.mesh, memory_limit=None)


def held_bytes(table: ModelTable, rules: LayoutRules, mesh: Mesh, workload: str) -> int:
    """Bytes of weights and optimizer on a device, of the whole model: exact, and below the peak."""
    assignment = resolve(rules, table, mesh).assignment
    return _COPIES[workload] * sum(
        shard_bytes(
            variable.shape, dtype_bytes(variable.dtype), assignment.get(variable.family, ()), mesh
        )
        for variable in table.variables
    )
