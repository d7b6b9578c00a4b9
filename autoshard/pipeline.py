"""`inspect` and `plan`: each runs the stages it needs and returns a value."""

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from autoshard.errors import NothingFitsError, UsageError, XlaError
from autoshard.hardware.targets import Target
from autoshard.mesh import MeshLike
from autoshard.model.build import build
from autoshard.model.recipe import own_lora_rank
from autoshard.model.variables import ModelTable
from autoshard.model.workload import DEFAULT_OPTIMIZER, DEFAULT_SEQ_LEN, Workload
from autoshard.planner.mesh_shapes import make_setups, plan_shapes
from autoshard.planner.plan_value import plan_value
from autoshard.planner.planning import Planning
from autoshard.planner.pricing import Candidate
from autoshard.planner.remedies import Advice, as_arguments, remedies
from autoshard.planner.settling import Verdict, compiler_for, settle
from autoshard.planner.setup import Setup, make_setup
from autoshard.planner.stopwatch import Stopwatch
from autoshard.planner.tracing import TracedModel, trace_model
from autoshard.sharding_plan import Plan
from autoshard.units import format_bytes

__all__ = ["PlanOutcome", "inspect", "make_plan", "plan"]

Verify = Literal["none", "cpu", "target"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanOutcome:
    """A plan and everything that was found on the way to it.

    Attributes:
        plan: the winner.
        winner: its candidate.
        planning: the search and the rivals, on the plan's mesh.
        shapes: the same for every shape of the mesh, best first, where the shape was chosen.
        advice: what would make the step fit by prediction, where the plan does not.
        verdicts: what a compiler said, best first; empty where none was asked.
        timings: seconds of each stage, measured.
        failure: why the verification failed, in one line, or "".
        unused: what was asked for and has no effect, a line each.
    """

    plan: Plan
    winner: Candidate
    planning: Planning
    verdicts: tuple[Verdict, ...]
    timings: dict[str, float]
    failure: str = ""
    unused: tuple[str, ...] = ()
    shapes: tuple[Planning, ...] = ()
    advice: Advice = Advice()

    @property
    def doubts(self) -> tuple[str, ...]:
        """Why the plan may not be what it seems, a line each."""
        return (*self.unused, *self.plan.warnings)

    @property
    def foreseen_share(self) -> float:
        """The part of what the plan takes, by the target's compiler, that was predicted.

        Where that refuses it without a number, it is taken to need all that there is.
        """
        if not self.verdicts or self.verdicts[0].fits is not False:
            return 1.0
        compiled = self.verdicts[0].compiled
        taken = compiled.peak_bytes if compiled else self.planning.setup.memory_limit
        return min(1.0, self.winner.scored.cost.memory.peak_bytes / taken)


def inspect(model: Any, *, lora_rank: int | None = None, dtype: str | None = None) -> ModelTable:
    """The variable table of a model, built without weights.

    Args:
        model: a preset name, `package.module:callable`, a local preset or configuration, a
            `kaggle://` or `hf://` handle, a Keras model, or a callable that returns one.
        lora_rank: rank of low-rank factors to add, or None.
        dtype: Keras dtype policy; by default bfloat16 for presets, and what a model, a callable
            or a file has.

    Raises:
        UnknownNameError: there is no such model, or no such dtype policy.
        ModelError: Keras cannot build it without values.
    """
    return build(model, dtype=dtype, lora_rank=lora_rank).table()


def plan(
    model: Any,
    mesh: MeshLike | None = None,
    *,
    devices: int | None = None,
    axes: Sequence[str] | None = None,
    target: str | Target | None = None,
    slices: int | None = None,
    workload: str = "train",
    batch: int | None = None,
    seq_len: int = DEFAULT_SEQ_LEN,
    lora_rank: int | None = None,
    dtype: str | None = None,
    optimizer: str = DEFAULT_OPTIMIZER,
    memory_limit: str | int | None = None,
    generate: bool = True,
    verify: Verify = "none",
) -> Plan:
    """Find the layout map that runs a model fastest on a mesh.

    Args:
        model: as for `inspect`.
        mesh: such as `1x8` or `(1, 8)`, or a `Mesh`, a `keras.distribution.DeviceMesh`, a
            `jax.sharding.Mesh`.
        devices: instead of a mesh, how many devices; the shape of the mesh is then chosen too.
        axes: names of the mesh axes, the data axis first.
        target: such as `tpu:v5e:2x4`; a chip alone, as `tpu:v6e`, for as many as the mesh has; or
            `attached` for what JAX sees; by default the smallest v5e slice of that many devices.
        slices: so many of that target, joined by the data-centre network (GPU nodes: InfiniBand).
        workload: `train`, `lora`, `prefill` or `decode`.
        batch: sequences of the global batch; by default 8, or the next multiple of the data axis
            (with `devices` of all of them).
        seq_len: tokens a sequence.
        lora_rank: rank of the low-rank factors; for `lora` by default the rank of those that the
            model has, else 4.
        dtype: as for `inspect`.
        optimizer: Keras optimizer, by name.
        memory_limit: bytes a device, or a text like `15GiB`; by default the chip's usable memory.
        generate: False to allow rules for layer outputs under which `generate` is slow or fails.
        verify: `none`, `cpu` (XLA's partitioner) or `target` (the target's compiler).

    Raises:
        NothingFitsError: no layout keeps the memory limit.
        UsageError: a value is wrong.
        XlaError: the verification failed.

    Warns:
        UserWarning: the plan may not be what it seems: see `autoshard.planner.doubts`.
    """
    outcome = make_plan(
        model,
        mesh,
        devices=devices,
        axes=axes,
        target=target,
        slices=slices,
        workload=workload,
        batch=batch,
        seq_len=seq_len,
        lora_rank=lora_rank,
        dtype=dtype,
        optimizer=optimizer,
        memory_limit=memory_limit,
        generate=generate,
        verify=verify,
    )
    if outcome.failure:
        raise XlaError(outcome.failure)
    if not outcome.plan.fits:
        raise NothingFitsError(
            _refusal(outcome)
            + ("; devices in place of mesh tries every shape of it" if devices is None else "")
        )
    for doubt in outcome.doubts:
        warnings.warn(doubt, stacklevel=2)
    return outcome.plan


def _refusal(outcome: PlanOutcome) -> str:
    """That nothing fits, what the nearest layout needs, and what would fit, as arguments."""
    changes = [as_arguments(remedy.change) for remedy in outcome.advice.remedies]
    advice = [f"{change} would fit, predicted" for change in changes]
    return (
        f"no layout of {outcome.plan.model.name} keeps "
        f"{format_bytes(outcome.planning.setup.memory_limit)} a device; {_nearest(outcome)}"
        + "".join(f"; {line}" for line in (*advice, outcome.advice.refusal(as_arguments)) if line)
    )


def _nearest(outcome: PlanOutcome) -> str:
    """What the nearest layout needs: by the target's compiler where it said so, else predicted."""
    if outcome.verdicts and outcome.verdicts[0].misfit:
        return f"by the target's compiler {outcome.verdicts[0].misfit}"
    return f"the nearest needs {format_bytes(outcome.winner.scored.cost.memory.peak_bytes)}"


def make_plan(
    model: Any,
    mesh: MeshLike | None = None,
    *,
    devices: int | None = None,
    verify: Verify = "none",
    top: int = 5,
    advise: bool = True,
    on_progress: Callable[[str], None] = lambda stage: None,
    **options: Any,
) -> PlanOutcome:
    """As `plan`, but return all that was found, and a plan also where nothing fits.

    Args:
        model: as for `plan`.
        mesh: as for `plan`.
        devices: as for `plan`.
        verify: as for `plan`.
        top: how many layouts to keep.
        advise: whether to look for what would make the step fit, where it does not.
        on_progress: called with the name of each stage.
        **options: the other arguments of `plan`.
    """
    if verify not in get_args(Verify):
        raise UsageError(f"verify is {verify!r}; give 'none', 'cpu' or 'target'")
    if isinstance(model, os.PathLike):
        model = os.fspath(model)
    if verify != "none" and not isinstance(model, str):
        raise UsageError(
            "a compiler runs in a process of its own, which must build the model: pass its name or "
            "'package.module:callable', or verify=\"none\""
        )
    if options.get("workload") == "lora" and options.get("lora_rank") is None:
        options["lora_rank"] = own_lora_rank(model)
    setups = _setups(mesh, devices, **options)
    watch = Stopwatch(progress=on_progress)
    traced = trace_model(model, setups[0].workload, setups[0].target.chip, watch)
    setups = _adapted(setups, traced)
    shapes = plan_shapes(traced, setups, top=top, watch=watch)
    planning = shapes[0]
    verdicts, failure = _verdicts(model, planning, verify, watch)
    winner = verdicts[0].candidate if verdicts else planning.candidates[0]
    outcome = PlanOutcome(
        plan=plan_value(planning, winner, verdicts, is_best_shape=devices is not None),
        winner=winner,
        planning=planning,
        verdicts=verdicts,
        timings=watch.seconds,
        failure=failure,
        shapes=() if devices is None else shapes,
        unused=tuple(_unused(options.get("batch"), options.get("seq_len"), traced.workload)),
    )
    if not advise or failure or outcome.plan.fits:
        return outcome
    return replace(outcome, advice=_advice(model, traced, setups, outcome, watch))


def _adapted(setups: Sequence[Setup], traced: TracedModel) -> tuple[Setup, ...]:
    """The setups with what is the model's own; of several those that its own batch divides over."""
    batch, generates = traced.workload.batch, traced.whole.generates
    dividing = [setup for setup in setups if batch % setup.mesh.n_data == 0]
    return tuple(
        replace(setup, workload=traced.workload, generate=setup.generate or not generates)
        for setup in dividing or setups
    )


def _advice(
    model: Any,
    traced: TracedModel,
    setups: Sequence[Setup],
    outcome: PlanOutcome,
    watch: Stopwatch,
) -> Advice:
    """What would make a plan fit that does not."""
    planned = outcome.planning.setup
    limit = int(planned.memory_limit * outcome.foreseen_share)
    return remedies(
        model,
        traced,
        replace(planned, memory_limit=limit),
        outcome.winner.scored.cost.memory.peak_bytes,
        watch,
        [setup.mesh for setup in setups],
    )


def _unused(batch: int | None, seq_len: int | None, workload: Workload) -> Iterator[str]:
    """What was asked for, where the model is planned with its own."""
    if batch not in (None, workload.batch):
        yield f"a batch of {batch} has no effect: the model has its own, {workload.batch}"
    if seq_len not in (None, DEFAULT_SEQ_LEN, workload.seq_len):
        yield f"a sequence length of {seq_len} has no effect: the model has its own"


def _setups(mesh: MeshLike | None, devices: int | None, **options: Any) -> tuple[Setup, ...]:
    """What is to be planned for: one mesh, or each shape of so many devices."""
    if (mesh is None) == (devices is None):
        raise UsageError("give the mesh, such as 1x8, or the number of devices: one of the two")
    if mesh is None:
        assert devices is not None
        return make_setups(devices, **options)
    return (make_setup(mesh, **options),)


def _verdicts(
    model: Any, planning: Planning, verify: Verify, watch: Stopwatch
) -> tuple[tuple[Verdict, ...], str]:
    """What the compiler says, best first, or why it says nothing."""
    if verify == "none":
        return (), ""
    compiler = compiler_for(verify, planning.setup)
    try:
        with watch.stage("verify"):
            return settle(model, planning, compiler, on_progress=watch.progress), ""
    except XlaError as error:
        return (), str(error)
