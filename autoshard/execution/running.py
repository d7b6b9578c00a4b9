"""`run`: a plan put to work on virtual devices of this machine, and held against a run without it.

Each part (`predict`, `generate`, `fit`) builds the model with seeded random weights in a process of
its own, under the plan; then once more from the same seed without a distribution, on one device.
One of them is in memory at a time. With several processes the reference is the same plan in one.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from autoshard.errors import AutoshardError, ModelError, UsageError
from autoshard.execution.agreement import compare
from autoshard.execution.children import execute
from autoshard.execution.memory import needed_bytes
from autoshard.execution.requests import Part, PartOutcome, RunRequest
from autoshard.execution.tolerance import tolerance_of
from autoshard.host import available_bytes
from autoshard.mesh import round_up
from autoshard.model.blocks import blocks_of
from autoshard.model.build import build
from autoshard.model.fold import check_periods, fold
from autoshard.model.recipe import AbstractModel
from autoshard.model.values import stores_values
from autoshard.model.workload import DEFAULT_LORA_RANK, QUANTIZED, Workload
from autoshard.planner.setup import check_options
from autoshard.records.execution import Execution, PartRun, Placed, PlanRun
from autoshard.records.parts import Versions
from autoshard.subject import Subject, subject_of
from autoshard.units import format_bytes

__all__ = ["run"]

_PART_SECONDS = 3600.0
_N_STEPS = 3
_N_PROMPT = 4
# Tokens of a sequence, raised to a multiple of the devices, so that a rule may split them.
_TOKENS: dict[Part, int] = {"load": 8, "predict": 8, "generate": 16, "fit": 32}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    """A part, and the whole model it is about; `blocks` periods of it, where that was asked for."""

    part: Part
    subject: Subject
    model: AbstractModel
    workload: Workload
    n_processes: int
    blocks: int | None
    seed: int
    note: str = ""

    def asked_for(self) -> AbstractModel:
        """The model as deep as it was asked for."""
        return fold(self.model, periods=self.blocks)

    def needed(self, model: AbstractModel) -> int:
        """Memory for a model of some depth, under the plan and without it."""
        rules, mesh = self.subject.rules, self.subject.setup.mesh
        sharded = needed_bytes(
            model, self.part, self.workload, rules, mesh, n_processes=self.n_processes
        )
        if self.n_processes > 1:
            return sharded
        return max(sharded, needed_bytes(model, self.part, self.workload, (), None))


def run(
    layout: Any,
    *,
    model: str | None = None,
    n_processes: int = 1,
    blocks: int | None = None,
    seed: int = 0,
    on_progress: Callable[[str], None] = lambda stage: None,
    **options: Any,
) -> PlanRun:
    """Run a model under a plan on virtual CPU devices, and hold it against a run without.

    The weights of a preset directory are loaded, and compared bit by bit. `predict`, `generate`
    (greedy, where the model generates and the plan has not given it up) and three steps of `fit`
    run with seeded random weights and data. `fit` trains what the plan's workload trains; low-rank
    factors where the machine has not the memory to train all weights. A part that does not fit the
    free memory runs with as many blocks as do.

    Args:
        layout: a `Plan` or the path of a plan file; with `model`, a layout as `check` takes it.
        model: the name of the model of a layout that is no plan.
        n_processes: processes that share the devices, joined by `keras.distribution.initialize`;
            with more than one the reference is the same plan in one process.
        blocks: run only so many periods of each stack of repeated blocks; by default all that fit.
        seed: of weights and data.
        on_progress: called with the name of each stage.
        **options: with `model`: as for `verify`.

    Raises:
        UsageError: a value is wrong, the devices do not divide among the processes, the model
            cannot be built with so many blocks, or the weights are int8, which have no random
            values.
        PlanFileError: the plan was made for another model.
        ModelError: the model cannot be built.
    """
    check_options("run", options, without=("target", "memory_limit"))
    on_progress("build the model")
    subject = subject_of(layout, model=model, target="cpu", **options)
    mesh = subject.setup.mesh
    check_periods(subject.model, blocks)
    if subject.setup.workload.dtype == QUANTIZED:
        raise UsageError(
            f"weights in {QUANTIZED} begin as zeros, and a run would compare zeros: run the same "
            "layout in bfloat16"
        )
    if n_processes < 1 or mesh.n_devices % n_processes:
        raise UsageError(
            f"{mesh.n_devices} devices cannot be shared by {n_processes} processes: give a number "
            "that divides them"
        )
    return PlanRun(
        model=subject.model.name,
        mesh=mesh,
        rules=subject.rules,
        dtype=subject.setup.workload.policy,
        seed=seed,
        n_processes=n_processes,
        against="the same weights unsharded on one device"
        if n_processes == 1
        else "the same plan in one process",
        available_bytes=available_bytes(),
        tolerance=tolerance_of(subject.model).words(),
        generate=subject.setup.generate,
        parts=tuple(
            _run_part(_job(part, subject, n_processes, blocks, seed), on_progress)
            for part in _parts(subject)
        ),
        versions=Versions.installed(),
    )


def _parts(subject: Subject) -> tuple[Part, ...]:
    load: tuple[Part, ...] = ("load",) if stores_values(subject.name) else ()
    generates = subject.model.generates and subject.setup.generate
    generate: tuple[Part, ...] = ("generate",) if generates else ()
    return (*load, "predict", *generate, "fit")


def _job(part: Part, subject: Subject, n_processes: int, blocks: int | None, seed: int) -> _Job:
    own, mesh = subject.setup.workload, subject.setup.mesh
    n_devices = mesh.n_devices
    workload = subject.model.adapted(
        replace(
            own,
            kind="lora" if own.lora_rank else "prefill",
            batch=mesh.n_data,
            seq_len=round_up(_TOKENS[part], n_devices),
        )
    )
    job = _Job(
        part=part,
        subject=subject,
        model=subject.model,
        workload=workload,
        n_processes=n_processes,
        blocks=None if part == "load" else blocks,
        seed=seed,
    )
    return _training(job) if part == "fit" and own.lora_rank is None else job


def _training(job: _Job) -> _Job:
    """Training of all weights, or of low-rank factors where that cannot be."""
    job = replace(job, workload=replace(job.workload, kind="train"))
    available, needed = available_bytes(), job.needed(job.asked_for())
    if available is None or needed <= available:
        return job
    missing = format_bytes(needed - available)
    return _adapting(
        job, f"to train all weights takes {format_bytes(needed)}, {missing} more than is free"
    )


def _adapting(job: _Job, note: str) -> _Job:
    """Training of low-rank factors, for a model that takes some."""
    workload = replace(job.workload, kind="lora", lora_rank=DEFAULT_LORA_RANK)
    try:
        lora = build(job.subject.name, dtype=workload.dtype, lora_rank=DEFAULT_LORA_RANK)
    except (ModelError, UsageError):
        return job
    if not lora.model.trainable_variables:
        return job
    return replace(job, model=lora, workload=workload, note=note)


def _run_part(job: _Job, on_progress: Callable[[str], None]) -> PartRun:
    """Run a part at the depth that fits, and the reference after it."""
    # Once: another process may take memory from one look to the next.
    available = available_bytes()
    periods, model, missing = _depth(job, available)
    entry = PartRun(
        part=job.part,
        work=_words(job),
        blocks=_n_blocks(model),
        n_blocks=_n_blocks(job.model),
        needed_bytes=job.needed(model),
        missing_bytes=missing,
    )
    if available is not None and entry.needed_bytes > available:
        return replace(entry, failure=_refusal(entry, available))
    try:
        return _compared(entry, job, model, periods, on_progress)
    except AutoshardError as error:
        return replace(entry, failure=str(error))


def _compared(
    entry: PartRun,
    job: _Job,
    model: AbstractModel,
    periods: int | None,
    on_progress: Callable[[str], None],
) -> PartRun:
    request = RunRequest(
        part=job.part,
        model=job.subject.name,
        workload=job.workload,
        mesh=job.subject.setup.mesh,
        rules=job.subject.rules,
        periods=periods,
        n_prompt=_N_PROMPT,
        n_steps=_N_STEPS,
        seed=job.seed,
    )
    reference = replace(request, with_margins=True)
    if job.n_processes == 1:
        reference = replace(reference, mesh=None, rules=())

    def outcomes(title: str, asked: RunRequest, n_processes: int) -> tuple[PartOutcome, ...]:
        available = available_bytes()
        return execute(
            asked,
            n_processes=n_processes,
            timeout_seconds=_PART_SECONDS,
            memory_limit_bytes=available and available // n_processes,
            on_stage=lambda stage: on_progress(f"{job.part}, {title}: {stage}"),
        )

    found = outcomes("sharded", request, job.n_processes)
    (expected,) = outcomes("reference", reference, 1)
    tolerance = tolerance_of(model)
    losses = [tuple(map(float, o.arrays.get("losses", ()))) for o in (found[0], expected)]
    return replace(
        entry,
        tolerance=tolerance.words(),
        work=f"{entry.work}{found[0].loss and f', {found[0].loss}'}",
        sharded=_execution(found),
        reference=_execution((expected,)),
        placed=_placed(found),
        losses=losses[0],
        reference_losses=losses[1],
        agreements=compare(job.part, found[0].arrays, expected.arrays, tolerance, _N_PROMPT),
    )


def _depth(job: _Job, available: int | None) -> tuple[int | None, AbstractModel, int]:
    """The periods of blocks to run (None: all), the model so deep, and what is missing for all."""
    missing = 0 if available is None else max(0, job.needed(job.model) - available)
    if job.blocks is not None or not missing or job.part == "load":
        return job.blocks, job.asked_for(), missing
    # Every block of a kind needs the same: memory grows evenly from one period to the next.
    one, two = (fold(job.model, periods=periods) for periods in (1, 2))
    first, more = job.needed(one), job.needed(two) - job.needed(one)
    spare = max(0, (available or 0) - first)
    periods = 1 + (spare // more if more else 0)
    return periods, fold(job.model, periods=periods), missing


def _refusal(entry: PartRun, available: int) -> str:
    depth = "" if entry.blocks in (None, entry.n_blocks) else f" with {entry.blocks} blocks"
    return (
        f"not run: it needs {format_bytes(entry.needed_bytes)}{depth} and "
        f"{format_bytes(available)} are free, {format_bytes(entry.needed_bytes - available)} less"
    )


def _words(job: _Job) -> str:
    work = job.workload
    if job.part == "load":
        return "the stored weights, shard by shard"
    if job.part == "predict":
        return work.size
    if job.part == "generate":
        n_made = work.seq_len - _N_PROMPT
        return f"{work.batch} x {_N_PROMPT} tokens of prompt, {n_made} made, greedy"
    table = job.model.table()
    trained = "all weights"
    if work.lora_rank:
        trained = f"low-rank factors of rank {work.lora_rank}"
    elif table.n_trainable < table.n_parameters:
        trained = f"{table.n_trainable:,} of {table.n_parameters:,} parameters"
    note = f" ({job.note})" if job.note else ""
    return f"{_N_STEPS} steps of {work.size}, {trained}{note}, {work.optimizer}"


def _n_blocks(model: AbstractModel) -> int | None:
    return sum(map(len, blocks_of(model))) or None


def _execution(outcomes: tuple[PartOutcome, ...]) -> Execution:
    return Execution(
        build_seconds=max(o.build_seconds for o in outcomes),
        run_seconds=max(o.run_seconds for o in outcomes),
        built_bytes=sum(o.built_bytes for o in outcomes),
        peak_bytes=sum(o.peak_bytes for o in outcomes),
    )


def _placed(outcomes: tuple[PartOutcome, ...]) -> Placed | None:
    placed = [outcome.placed for outcome in outcomes if outcome.placed is not None]
    if not placed:
        return None
    misplaced = dict.fromkeys(line for each in placed for line in each.misplaced)
    return replace(placed[0], misplaced=tuple(misplaced))
