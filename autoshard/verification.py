"""Compiles the step of a plan, or of a map that somebody wrote, with the target's own compiler.

The compiler's memory decides whether the step fits. Its program says which collectives there are;
each is held against the rules to tell which one causes it. The prediction stands beside.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from autoshard.errors import OutOfMemoryError
from autoshard.hardware.targets import Target
from autoshard.host import available_bytes
from autoshard.installed import COMPILERS, installed_version
from autoshard.layout.causes import Causes
from autoshard.model.fold import PLANNED_PERIODS, check_periods, fold
from autoshard.model.folding import Folding
from autoshard.planner.pricing import Candidate, make_scorer, score_rules
from autoshard.planner.setup import Setup, check_options
from autoshard.planner.tracing import make_program
from autoshard.processes.child import Child
from autoshard.records.parts import Prediction, Versions
from autoshard.records.verification import (
    MemoryUse,
    StepSeconds,
    Verification,
    VerifiedCollective,
)
from autoshard.subject import Subject, subject_of
from autoshard.xla.cache import verdict_cache
from autoshard.xla.clock import step_time
from autoshard.xla.compile import compile_in
from autoshard.xla.compiled import CompiledStep, CompileRequest
from autoshard.xla.copies import complaint
from autoshard.xla.environment import child_environment

__all__ = ["verify"]

# Who asks for one program waits longer than who asks for several.
_PATIENCE_SECONDS = 1800.0


def verify(
    layout: Any,
    *,
    model: str | None = None,
    target: str | None = None,
    blocks: int | None = None,
    memory_limit: str | int | None = None,
    cache: bool = True,
    on_progress: Callable[[str], None] = lambda stage: None,
    **options: Any,
) -> Verification:
    """Compile the step of a layout with the compiler of its target.

    Args:
        layout: a `Plan` or the path of a plan file; with `model`, a layout as `check` takes it.
        model: the name of the model of a layout that is no plan.
        target: such as `tpu:v3:2x2`, `gpu:h100-sxm:8`, `cpu` or `attached` (what JAX sees); by
            default the plan's.
        blocks: compile only so many periods of each stack of repeated blocks.
        memory_limit: bytes a device, or a text like `15GiB`; by default the chip's usable memory.
        cache: False to ask the compiler again where the cache has its verdict.
        on_progress: called with the name of each stage.
        **options: with `model`: `mesh`, `axes`, `workload`, `batch`, `seq_len`, `lora_rank`,
            `dtype` and `optimizer`, as for `plan`.

    Raises:
        UsageError: a value is wrong, a plan came with the options of a map, or the model cannot be
            built with so many blocks.
        PlanFileError: the plan was made for another model.
        LayoutError: Keras refuses the map.
        XlaError: the compiler is missing, failed, or its process died.
    """
    check_options("verify", options)
    on_progress("build the model")
    subject = subject_of(layout, model=model, target=target, memory_limit=memory_limit, **options)
    check_periods(subject.model, blocks)
    predicted = subject.predicted
    if blocks or predicted is None:
        on_progress("predict")
        predicted = _predict(subject, blocks)
    setup = subject.setup
    on_progress(f"compile for {setup.target}")
    request = CompileRequest(
        model=subject.name,
        workload=setup.workload,
        mesh=setup.mesh,
        rules=subject.rules,
        target=str(setup.target),
        periods=blocks,
        attention=subject.attention,
    )
    known = verdict_cache(subject.model, reads=cache)
    with Child(child_environment(setup.target), memory_limit_bytes=available_bytes()) as child:
        try:
            step = compile_in(child, request, timeout_seconds=_PATIENCE_SECONDS, cache=known)
        except OutOfMemoryError as error:
            return replace(_empty(subject, predicted), fits=False, refusal=str(error))
    return _judged(subject, step, predicted)


def _predict(subject: Subject, blocks: int | None) -> Prediction | None:
    """The formulas' word on the program that is compiled.

    None where they cannot lay it out, and for CPU devices, for which they have none.
    """
    setup, model = subject.setup, subject.model
    if setup.target.chip.kind == "cpu":
        return None
    folded = fold(model, periods=blocks or PLANNED_PERIODS)
    if blocks:
        # The copy stands for itself alone, as it does for the compiler.
        model = folded = replace(folded, folding=Folding())
    scorer = make_scorer(make_program(folded, setup.workload, setup.target.chip), setup)
    priced = score_rules("the map", subject.rules, model.table(), scorer)
    return Prediction.of(priced.scored.cost) if isinstance(priced, Candidate) else None


def _empty(subject: Subject, predicted: Prediction | None) -> Verification:
    """A verification before the compiler has said anything."""
    setup = subject.setup
    return Verification(
        model=subject.model.name,
        mesh=setup.mesh,
        rules=subject.rules,
        workload=setup.workload,
        target=str(setup.target),
        blocks=None,
        n_blocks=None,
        fits=None,
        memory_limit=setup.memory_limit,
        predicted=predicted,
        versions=Versions.installed(),
        compiler=_compiler(setup.target),
    )


def _judged(subject: Subject, step: CompiledStep, predicted: Prediction | None) -> Verification:
    setup = subject.setup
    # Too much for a part is too much for the whole, but what is enough for it may not be.
    fits = step.peak_bytes <= setup.memory_limit
    unsaid = setup.target.chip.kind == "cpu" or (fits and not step.is_whole)
    all_flops = (step.flops or 0) * setup.mesh.n_devices
    repeated = None
    # XLA counts one turn of a loop: then it finds fewer than the model has.
    if step.model_flops is not None and all_flops >= step.model_flops > 0:
        repeated = 1 - step.model_flops / all_flops
    return replace(
        _empty(subject, predicted),
        blocks=step.traced_blocks,
        n_blocks=step.n_blocks,
        fits=None if unsaid else fits,
        wrong=complaint(step.sums_of_copies) if step.sums_of_copies else "",
        memory=MemoryUse(
            arguments=step.argument_bytes,
            temporaries=step.temporary_bytes,
            outputs=step.output_bytes,
            aliased=step.alias_bytes,
            peak=step.peak_bytes,
        ),
        step_seconds=_seconds(step, setup, predicted),
        collectives=tuple(_collectives(subject, step)),
        flops_per_device=step.flops,
        model_flops=step.model_flops,
        repeated_share=repeated,
    )


def _seconds(step: CompiledStep, setup: Setup, predicted: Prediction | None) -> StepSeconds | None:
    """The compiler's cycles and the collectives on the mesh's links; a GPU's predicted compute."""
    by_cycles = step.estimated_cycles is not None
    if setup.target.chip.kind == "cpu" or not (by_cycles or predicted):
        return None
    compute_seconds = predicted.compute_seconds if predicted else None
    time = step_time(step, setup.mesh, compute_seconds=compute_seconds)
    return StepSeconds(
        compute=time.compute_seconds,
        compute_is_predicted=not by_cycles,
        blocking=time.blocking_seconds,
        overlapped=time.overlapped_seconds,
        step=time.step_seconds,
    )


def _collectives(subject: Subject, step: CompiledStep) -> Sequence[VerifiedCollective]:
    causes = Causes(
        rules=subject.rules, mesh=subject.setup.mesh, paths=tuple(subject.model.table().templates)
    )
    found = [
        VerifiedCollective(
            kind=item.kind,
            axis=item.axis,
            n_bytes=item.n_bytes,
            dtype=item.dtype,
            count=item.count,
            wire_bytes=round(item.wire_bytes),
            phase=item.phase,
            overlapped=item.overlapped,
            layer=item.layer,
            cause=causes.of(item.layer, item.axis),
        )
        for item in step.merged_collectives()
    ]
    return sorted(found, key=lambda item: (-item.wire_bytes, item.layer, item.kind, item.phase))


def _compiler(target: Target) -> str:
    package = COMPILERS[target.chip.kind]
    return f"{package} {installed_version(package)}".rstrip()
