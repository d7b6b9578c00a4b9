"""A model's step as an op graph: all of planning that no mesh changes."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any

from autoshard.errors import ModelError
from autoshard.graph.build import StepInput, build_program
from autoshard.graph.chains import blocks_read
from autoshard.graph.equations import FlatJaxpr
from autoshard.graph.jaxpr import read_jaxpr
from autoshard.graph.program import Program
from autoshard.hardware.chips import Chip
from autoshard.model.attention import attention_of
from autoshard.model.build import build_for
from autoshard.model.fold import PLANNED_PERIODS, fold
from autoshard.model.folding import Folding
from autoshard.model.outputs import OutputShapes
from autoshard.model.paths import tails
from autoshard.model.recipe import AbstractModel, layers_by_path
from autoshard.model.signature import Step
from autoshard.model.step import generate_shapes, make_step, trace
from autoshard.model.thinning import called_alike, counts_of, thin
from autoshard.model.variables import ModelTable
from autoshard.model.workload import Workload
from autoshard.planner.stopwatch import Stopwatch

__all__ = ["TracedModel", "make_program", "shapes_in_generate", "trace_model"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TracedModel:
    """A model whose step is traced: all of it that no mesh changes.

    Attributes:
        whole: the model.
        table: its variables.
        folded: the copy with fewer blocks.
        workload: the step, with the model's dtype.
        program: the op graph of the copy's step.
        leaves_out: whether that step leaves out blocks that the copy has, and those alone that two
            periods do without.
    """

    whole: AbstractModel
    table: ModelTable
    folded: AbstractModel
    workload: Workload
    program: Program
    leaves_out: bool


def trace_model(
    model: Any, workload: Workload, chip: Chip | None = None, watch: Stopwatch | None = None
) -> TracedModel:
    """Build a model and trace its step.

    Args:
        model: what `autoshard.plan` takes.
        workload: the step.
        chip: see `make_program`.
        watch: measures the stages.
    """
    watch = watch or Stopwatch()
    with watch.stage("build the model"):
        whole = build_for(model, workload)
        table = whole.table()
        folded = fold(whole, periods=PLANNED_PERIODS)
    workload = whole.adapted(workload)
    program, leaves_out = _make_program(folded, workload, chip, watch)
    return TracedModel(
        whole=whole,
        table=table,
        folded=folded,
        workload=workload,
        program=program,
        leaves_out=leaves_out,
    )


def make_program(folded: AbstractModel, workload: Workload, chip: Chip | None = None) -> Program:
    """The op graph of a model's step.

    Args:
        folded: the model, with fewer blocks.
        workload: the step.
        chip: the target's: it decides how attention runs, and TPU compilers rewrite a step before
            they partition it; None for a CPU, which takes it as it is.
    """
    return _make_program(folded, workload, chip, Stopwatch())[0]


def _make_program(
    folded: AbstractModel, workload: Workload, chip: Chip | None, watch: Stopwatch
) -> tuple[Program, bool]:
    """See `make_program`; and whether the step leaves blocks out."""
    with watch.stage("trace the step"), attention_of(chip):
        copy, step, flat = _trace_thinned(folded, workload) or _trace(folded, workload)
    with watch.stage("build the op graph"):
        program = _program(flat, step, copy, for_tpu=chip is not None and chip.kind == "tpu")
    return program, copy is not folded and _is_plain(copy.folding)


def _is_plain(folding: Folding) -> bool:
    """Whether the blocks left out are those between the first periods and the last one."""
    stacks = (stack for stack in folding.blocks if stack.template in folding.counts)
    return all(
        folding.counts[stack.template]
        == counts_of(stack.folded(PLANNED_PERIODS).stand_ins(), stack)
        for stack in stacks
    )


def _trace(model: AbstractModel, workload: Workload) -> tuple[AbstractModel, Step, FlatJaxpr]:
    try:
        step = make_step(model, workload)
        return model, step, read_jaxpr(trace(step))
    except ModelError as error:
        told = model.open_sizes()
        if told:
            raise ModelError(f"{error}; {told}") from error
        raise


def _trace_thinned(
    folded: AbstractModel, workload: Workload
) -> tuple[AbstractModel, Step, FlatJaxpr] | None:
    """The step of a copy with blocks left out; None where none can be.

    Blocks that do not read each other's results are no chain. A decoding step has parts of a cache
    for all of them.
    """
    thinned = folded if workload.kind == "decode" else thin(folded)
    if thinned is folded:
        return None
    try:
        traced = _trace(thinned, workload)
    except ModelError:
        return None
    return traced if called_alike(thinned) and _are_chains(traced[2], thinned) else None


def _are_chains(flat: FlatJaxpr, thinned: AbstractModel) -> bool:
    """Whether each block reads what the one made that stands for those left out before it.

    No block of a tower runs of whose input, such as pictures, the step has none.
    """
    folding, layers = thinned.folding, frozenset(layers_by_path(thinned.model))
    reads = blocks_read(flat, lambda layer: folding.block_of(_own_path(layer, folding, layers)))
    kept = (
        [(template, block) for block, count in enumerate(counts) if count]
        for template, counts in folding.counts.items()
    )
    return all(
        before in reads.get(block, ()) or reads.keys().isdisjoint({before, block})
        for blocks in kept
        for before, block in pairwise(blocks)
        if block[1] - before[1] > 1
    )


def _own_path(layer: str, folding: Folding, layers: Collection[str]) -> str:
    """The path by which the model knows a traced op's layer; "" where that is in no block.

    `head/block_4` is another layer than the fourth block.
    """
    for tail in tails(layer):
        if tail in folding:
            return tail
        if "/" in tail and tail in layers:
            break
    return ""


def shapes_in_generate(
    folded: AbstractModel, workload: Workload, chip: Chip
) -> OutputShapes | None:
    """The shapes that layer outputs have in `generate`; None for a model without a cache.

    Args:
        folded, workload, chip: as for `make_program`.
    """
    try:
        with attention_of(chip):
            return generate_shapes(folded, workload)
    except ModelError:
        return None


def _program(flat: FlatJaxpr, step: Step, folded: AbstractModel, *, for_tpu: bool) -> Program:
    """The op graph of the traced copy, each op and argument with its count in the real model."""
    folded_table = folded.table()
    variables = folded_table.variables
    families: dict[str, dict[tuple[int, ...], str]] = {}
    for variable in variables:
        families.setdefault(variable.path, {})[variable.shape] = variable.family
    trainable = {variable.path for variable in variables if variable.trainable}
    multiplicity = folded.folding.multiplicity
    layers = frozenset(layers_by_path(folded.model))

    @cache
    def layer_count(layer: str) -> int:
        """How many layers of the real model the layer of a traced op stands for."""
        return int(multiplicity(_own_path(layer, folded.folding, layers)))

    inputs = [
        StepInput(
            role=argument.role,
            family=_family(families.get(argument.layout_path or "", {}), argument.shape),
            count=multiplicity(argument.layout_path or argument.path),
            trainable=argument.path in trainable and argument.role == "weight",
        )
        for argument in step.arguments
    ]
    replaces = [result.argument for result in step.results]
    return build_program(
        flat,
        inputs,
        replaces,
        layer_count,
        folded_table.templates,
        for_tpu=for_tpu,
    )


def _family(families: Mapping[tuple[int, ...], str], shape: tuple[int, ...]) -> str | None:
    """The family of an argument, of those under its path by shape; two weights may share a path."""
    return next(iter(families.values())) if len(families) == 1 else families.get(shape)
