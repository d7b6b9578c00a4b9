"""Compile a step ahead of time, and read what the compiler made of it.

`compile_in` and `compile_deep` run in the parent and have a child do the work, where
`compile_step` runs. `compile_lowered` is the part that knows nothing of models.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from autoshard.errors import OutOfMemoryError, XlaError
from autoshard.graph.flops import matmul_flops
from autoshard.hardware.chips import get_chip
from autoshard.hardware.targets import Target, parse_target
from autoshard.mesh import Mesh
from autoshard.model.attention import attention_of
from autoshard.model.build import build_for
from autoshard.model.fold import fold
from autoshard.model.folding import BlockStack
from autoshard.model.recipe import AbstractModel
from autoshard.model.signature import Step
from autoshard.model.step import make_step
from autoshard.model.workload import Workload
from autoshard.processes.child import Child
from autoshard.xla.cache import VerdictCache
from autoshard.xla.collectives import estimated_cycles, read_collectives
from autoshard.xla.compiled import CompiledStep, CompileRequest
from autoshard.xla.copies import sums_of_copies
from autoshard.xla.exhausted import exhausted_sentence
from autoshard.xla.extrapolate import extrapolate
from autoshard.xla.hlo import parse_hlo
from autoshard.xla.lowering import lower
from autoshard.xla.names import layer_paths
from autoshard.xla.normalise import COMPILER_OPTIONS, cpu_normaliser

__all__ = ["compile_deep", "compile_in", "compile_lowered", "compile_step", "copied_share"]

# Copies with so many periods of blocks say how the program grows with the model.
_SHALLOW, _DEEPER = 2, 4

# In a buffer assignment, what is no argument or result and lies in the main memory.
_HEAP = re.compile(r"^allocation \d+: size (\d+), preallocated-temp", re.MULTILINE)

# Steps that a child keeps for the next layout: of one model, shallow, deeper and whole.
_KEPT_STEPS = 4


def compile_in(
    child: Child,
    request: CompileRequest,
    *,
    timeout_seconds: float,
    cache: VerdictCache | None = None,
) -> CompiledStep:
    """Compile a step in a child, unless the verdict is known.

    Args:
        child: made with `child_environment` of the request's target.
        request: what to compile.
        timeout_seconds: the limit, the child's start included.
        cache: asked first, and told the verdict.

    Raises:
        OutOfMemoryError: the target's compiler says that the program does not fit its memory.
        LayoutError: Keras refuses the layout.
        XlaError: it failed otherwise, or the child died or ran out of time.
    """
    known = cache.get(request) if cache else None
    if known is not None:
        return known
    try:
        step: CompiledStep = child.call(
            "autoshard.xla.compile:compile_step", request, timeout_seconds=timeout_seconds
        )
    except OutOfMemoryError as error:
        if cache:
            cache.put(request, error)
        raise
    if cache:
        cache.put(request, step)
    return step


def compile_deep(
    child: Child,
    request: CompileRequest,
    *,
    timeout_seconds: float,
) -> CompiledStep:
    """The whole model's program, from copies with two and four periods of blocks.

    Args:
        child: as for `compile_in`, of a model whose `copied_share` is less than 1.
        request: what to compile; its `periods` is not used.
        timeout_seconds: the limit of each compilation.

    Raises:
        OutOfMemoryError: not even a copy fits.
        LayoutError: Keras refuses the layout.
        XlaError: as for `compile_in`.
    """

    def compiled(periods: int) -> CompiledStep:
        copy = replace(request, periods=periods)
        return compile_in(child, copy, timeout_seconds=timeout_seconds)

    return extrapolate(compiled(_SHALLOW), compiled(_DEEPER))


def copied_share(blocks: Sequence[BlockStack], *, leaves_out: bool = False) -> float:
    """How many blocks the two copies of a model have together, for one of its own.

    From 1 on it is no use to compile them in its place.

    Args:
        blocks: its stacks, each folded where it can be.
        leaves_out: whether blocks of the others may be left out of the step.
    """
    copied = (
        stack.folded(periods).traced
        if leaves_out or stack.traced < stack.n_blocks
        else stack.n_blocks
        for periods in (_SHALLOW, _DEEPER)
        for stack in blocks
    )
    n_blocks = sum(stack.n_blocks for stack in blocks)
    return sum(copied) / n_blocks if n_blocks else 1.0


def compile_step(request: CompileRequest, progress: Callable[[str], None]) -> CompiledStep:
    """Build, lower and compile a step in this process.

    Args:
        request: what to compile.
        progress: is told the stages `build`, `lower` and `compile`.

    Raises:
        OutOfMemoryError: the program does not fit the target.
        AutoshardError: the model, the layout or the mesh is wrong.
        XlaError: the compiler refused the program.
    """
    target = parse_target(request.target)
    with attention_of(get_chip(request.attention) if request.attention else target.chip):
        progress("build")
        model, step = _built(request.model, request.workload, request.periods, request.leaves_out)
        progress("lower")
        lowered, jaxpr = lower(step, request.rules, request.mesh, target)
    progress("compile")
    compiled = compile_lowered(lowered, request.mesh, target, step, model.folding.blocks)
    return replace(compiled, model_flops=matmul_flops(jaxpr))


def compile_lowered(
    lowered: Any, mesh: Mesh, target: Target, step: Step, blocks: tuple[BlockStack, ...] = ()
) -> CompiledStep:
    """Run the target's compiler on a lowered step, and read its program.

    Args:
        lowered: what `autoshard.xla.lowering.lower` returned.
        mesh: the mesh it was lowered for.
        target: the target it was lowered for.
        step: what was lowered.
        blocks: the stacks of repeated blocks of its model.

    Raises:
        OutOfMemoryError: the program does not fit the target.
        XlaError: the compiler refused the program.
    """
    on_cpu = target.chip.kind == "cpu"
    try:
        compiled, heap_bytes = _compiled(lowered, target)
    except Exception as error:
        raise _refused(error, target) from error
    module = parse_hlo(compiled.as_text())
    weights = [argument.path for argument in step.arguments if argument.role == "weight"]
    layers = layer_paths(weights)
    memory = compiled.memory_analysis()
    return CompiledStep(
        target=str(target),
        blocks=blocks,
        argument_bytes=memory.argument_size_in_bytes,
        output_bytes=memory.output_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes if heap_bytes is None else heap_bytes,
        alias_bytes=memory.alias_size_in_bytes,
        live_bytes=memory.peak_memory_in_bytes or None,
        collectives=read_collectives(
            module,
            mesh,
            layers,
            cpu_normaliser(module, mesh.n_devices) if on_cpu else None,
        ),
        sums_of_copies=sums_of_copies(module, mesh.n_devices, layers),
        estimated_cycles=estimated_cycles(module),
        flops=_flops(compiled),
    )


def _compiled(lowered: Any, target: Target) -> tuple[Any, int | None]:
    """The program, and what a TPU's takes beside its arguments and results, in bytes.

    What libtpu says of that afterwards counts twice what lies idle between arrays.
    """
    if target.chip.kind != "tpu":
        options = COMPILER_OPTIONS if target.chip.kind == "cpu" else None
        return lowered.compile(compiler_options=options), None
    with TemporaryDirectory(prefix="autoshard-") as folder:
        writing = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
        return lowered.compile(compiler_options=writing), _heap_bytes(Path(folder))


def _heap_bytes(folder: Path) -> int | None:
    """The heap of the buffer assignment that a compiler has written; None where it says of none."""
    texts = [path.read_text("utf-8") for path in folder.glob("*buffer-assignment.txt")]
    sizes = [int(n_bytes) for text in texts for n_bytes in _HEAP.findall(text)]
    return max(sizes, default=None)


@lru_cache(maxsize=_KEPT_STEPS)
def _built(
    name: str, workload: Workload, periods: int | None, leaves_out: bool
) -> tuple[AbstractModel, Step]:
    whole = build_for(name, workload)
    model = fold(whole, periods=periods, leaves_out=leaves_out)
    return model, make_step(model, workload)


def _refused(error: Exception, target: Target) -> XlaError:
    """The compiler's refusal as one line."""
    message = str(error).strip()
    reason = message.partition("\n")[0]
    if "RESOURCE_EXHAUSTED" in message:
        return OutOfMemoryError(exhausted_sentence(message, str(target)))
    return XlaError(f"the compiler for {target} refused the step: {reason}")


def _flops(compiled: Any) -> int | None:
    try:
        analysis = compiled.cost_analysis()
    except Exception:
        # Not every compiler has one, and some that do not abort say so in their own words.
        return None
    analysis = analysis[0] if isinstance(analysis, list) else analysis
    flops = (analysis or {}).get("flops")
    return round(flops) if flops and flops > 0 else None
