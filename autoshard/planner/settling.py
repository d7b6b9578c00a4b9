"""Settles the ranking on what a compiler makes of the best few layouts, and compiles the winner.

`cpu`: XLA's partitioner, which decides for CPU devices as it does for the target's, says which
collectives there are; their time is that of the target's links, and compute is the prediction.
`target`: the target's own compiler says that too, and memory, and the cycles of a TPU.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from autoshard.errors import (
    AutoshardError,
    ChildError,
    ChildTimeoutError,
    OutOfMemoryError,
    XlaError,
)
from autoshard.hardware.targets import Target, parse_target
from autoshard.host import available_bytes
from autoshard.planner.planning import Planning
from autoshard.planner.pricing import Candidate
from autoshard.planner.setup import Setup
from autoshard.processes.child import Child
from autoshard.units import format_bytes
from autoshard.xla.clock import step_time
from autoshard.xla.compile import compile_deep, compile_in, copied_share
from autoshard.xla.compiled import CompiledStep, CompileRequest
from autoshard.xla.copies import complaint
from autoshard.xla.environment import child_environment
from autoshard.xla.partitioned import partitioned_seconds

__all__ = ["Verdict", "compiler_for", "settle", "worth_compiling"]

_N_SETTLED = 3
# Where more ops than this are compiled for one candidate, one is: each takes minutes.
_MANY_OPS = 9_200
# The split by hand is compiled unless it is predicted to take so many times as long.
_NEAR = 1.25
# What is predicted to be so many times as fast as the best compiled is worth a compile.
_CLEARLY = 1.1
# A step of at most so many times another's is taken to be as fast.
_SAME = 1.01
# Within which one candidate has to compile: twice what the largest models took on two cores.
_COMPILE_SECONDS = 580.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What a compiler says of one candidate.

    Attributes:
        candidate: the layout.
        compiled: its program at full depth, compiled or extrapolated; None where it failed.
        step_seconds: time of the step with the compiler's collectives; infinite where it failed.
        fits: whether it fits the memory, by the compiler of a TPU or GPU target; None from `cpu`.
        error: why it failed, in one line, or "".
    """

    candidate: Candidate
    compiled: CompiledStep | None
    step_seconds: float
    fits: bool | None
    error: str = ""

    @property
    def weighed_seconds(self) -> float:
        """The time of the step with its memory weighed as the search's ranking weighs it.

        Nothing is added for hidden collectives and for rules: what the ranking allows for there is
        in what the compiler says.
        """
        return self.candidate.scored.weigh(self.step_seconds)

    @property
    def misfit(self) -> str:
        """What the target's compiler says of the memory where that is too little, else ""."""
        if self.fits is not False:
            return ""
        return f"it needs {format_bytes(self.compiled.peak_bytes)}" if self.compiled else self.error


def settle(
    model: str,
    planning: Planning,
    compiler: Target,
    *,
    on_progress: Callable[[str], None] = lambda stage: None,
) -> tuple[Verdict, ...]:
    """Compile the best candidates shallowly, rank them, and compile the winner at full depth.

    Where shallow copies would have as many blocks, all are compiled at full depth. Where all are
    clearly slower than another layout is predicted to be, that is compiled too: a further
    candidate, the best without rules for outputs, the split by hand, no rule at all. Where the
    winner turns out slower than the next was, shallow, the next is compiled at full depth too.

    Args:
        model: the model's name, by which a child builds it.
        planning: the candidates.
        compiler: the target to compile for: `cpu:N`, or the setup's own.
        on_progress: called with each stage.

    Returns:
        Verdicts, best first; the first one's program is that of the whole model. A layout that is
        refused whole goes to the end; where all are, one that does not fit comes first.

    Raises:
        XlaError: no candidate could be compiled, or the child died or ran out of time with the
            first, or with all blocks of the winner.
    """
    judge = partial(_verdict, model, planning, compiler)
    is_shallow = _copied_share(planning) < 1
    with Child(child_environment(compiler), memory_limit_bytes=available_bytes()) as child:
        compile_whole = partial(compile_in, child, timeout_seconds=_COMPILE_SECONDS)
        compile_copies = partial(compile_deep, child, timeout_seconds=_COMPILE_SECONDS)

        def ask_shallow(candidate: Candidate) -> Verdict:
            on_progress(f"compile {candidate.name} for {compiler}, shallow")
            return judge(candidate, compile_copies)

        def ask_whole(candidate: Candidate) -> Verdict:
            on_progress(f"compile {candidate.name} for {compiler}, all blocks")
            return judge(candidate, compile_whole)

        ask_first = ask_shallow if is_shallow else ask_whole
        verdicts = _first_verdicts(planning, compiler, ask_first)
        verdicts.sort(key=lambda v: (v.compiled is None, v.fits is False, v.weighed_seconds))
        whole, refused = _whole_verdicts(verdicts, ask_whole if is_shallow else None)
    rest = verdicts[len(whole) + len(refused) :]
    if whole:
        whole.sort(key=lambda verdict: verdict.weighed_seconds)
        return (*whole, *rest, *refused)
    refused = refused or verdicts
    refused.sort(key=lambda verdict: verdict.fits is not False)
    if refused[0].fits is not False:
        raise XlaError(f"no candidate runs on {compiler}: {refused[0].error}")
    return (*refused, *verdicts[len(refused) :])


def _first_verdicts(
    planning: Planning, compiler: Target, ask: Callable[[Candidate], Verdict]
) -> list[Verdict]:
    """What the compiler says of each in turn, up to where its process dies or runs out of time."""
    verdicts: list[Verdict] = []
    for candidate in _in_turn(planning, compiler, verdicts):
        try:
            verdicts.append(ask(candidate))
        except (ChildError, ChildTimeoutError) as error:
            if all(verdict.compiled is None for verdict in verdicts):
                raise
            return [*verdicts, _failed(candidate, error, fits=None)]
    return verdicts


def _whole_verdicts(
    verdicts: Sequence[Verdict], ask: Callable[[Candidate], Verdict] | None
) -> tuple[list[Verdict], list[Verdict]]:
    """What the compiler says of all blocks, until the best is as fast as the next was.

    Args:
        verdicts: the first ones, best first.
        ask: asks about all blocks; None where the first verdicts are of all blocks.

    Returns:
        The verdicts on layouts that run and fit, and on those that do not.
    """
    whole: list[Verdict] = []
    refused: list[Verdict] = []
    for first in verdicts:
        best = min((one.weighed_seconds for one in whole), default=math.inf)
        if first.compiled is None or best <= _SAME * first.weighed_seconds:
            break
        verdict = ask(first.candidate) if ask else first
        fine = verdict.compiled is not None and verdict.fits is not False
        (whole if fine else refused).append(verdict)
    return whole, refused


def _in_turn(
    planning: Planning, compiler: Target, verdicts: Sequence[Verdict]
) -> Iterator[Candidate]:
    """What is worth compiling shallowly, and then what the verdicts so far make worth it."""
    yield from worth_compiling(planning, compiler)
    while (another := _underrated(planning, verdicts)) is not None:
        yield another


def worth_compiling(planning: Planning, compiler: Target) -> tuple[Candidate, ...]:
    """The first that fit by the prediction, or of all where none does.

    The compiler of a TPU, which alone times compute, is asked about the split by hand too, where
    that fits and is not far behind: it may find it faster.
    """
    fitting = tuple(candidate for candidate in planning.candidates if candidate.fits)
    n_ops = sum(op.count for op in planning.traced.program.ops)
    is_large = n_ops * min(1.0, _copied_share(planning)) > _MANY_OPS
    n_settled = 1 if is_large else _N_SETTLED
    chosen = (fitting or planning.candidates)[:n_settled]
    hand = planning.by_hand
    if compiler.chip.kind != "tpu" or hand is None or hand in chosen or not hand.fits:
        return chosen
    return chosen if hand.step_seconds > _NEAR * chosen[0].step_seconds else (*chosen, hand)


def _copied_share(planning: Planning) -> float:
    traced = planning.traced
    return copied_share(traced.folded.folding.blocks, leaves_out=traced.leaves_out)


def _underrated(planning: Planning, verdicts: Sequence[Verdict]) -> Candidate | None:
    """What is predicted to be clearly faster than the best compiled, the fastest of several."""
    asked = {verdict.candidate.rules for verdict in verdicts}
    best = min((one.weighed_seconds for one in verdicts if one.fits is not False), default=math.inf)
    others = (*planning.candidates, planning.plain, planning.by_hand, planning.no_rule)
    faster = [
        (seconds, candidate)
        for candidate in others
        if candidate is not None and candidate.rules not in asked and candidate.fits
        if (seconds := candidate.scored.weigh(candidate.step_seconds)) * _CLEARLY < best
    ]
    return min(faster, key=lambda pair: pair[0])[1] if faster else None


def _verdict(
    model: str,
    planning: Planning,
    compiler: Target,
    candidate: Candidate,
    compiled_by: Callable[[CompileRequest], CompiledStep],
) -> Verdict:
    """What the compiler says of a candidate; a child that is gone says nothing of any."""
    request = CompileRequest(
        model=model,
        workload=planning.setup.workload,
        mesh=planning.setup.mesh,
        rules=candidate.rules,
        target=str(compiler),
        leaves_out=planning.traced.leaves_out,
        attention=planning.setup.target.chip.name,
    )
    try:
        compiled = compiled_by(request)
    except OutOfMemoryError as error:
        return _failed(candidate, error, fits=False)
    except (ChildError, ChildTimeoutError):
        raise
    except AutoshardError as error:
        return _failed(candidate, error, fits=None)
    return _judge(planning, candidate, compiled, compiler)


def _failed(candidate: Candidate, error: AutoshardError, fits: bool | None) -> Verdict:
    return Verdict(
        candidate=candidate,
        compiled=None,
        step_seconds=math.inf,
        fits=fits,
        error=str(error),
    )


def _judge(
    planning: Planning, candidate: Candidate, compiled: CompiledStep, compiler: Target
) -> Verdict:
    """Time a compiled step, and hold its memory against the limit where that says something.

    A program that adds up copies is none.
    """
    if compiled.sums_of_copies:
        return _failed(candidate, XlaError(complaint(compiled.sums_of_copies)), fits=None)
    setup = planning.setup
    cost, on_cpu = candidate.scored.cost, compiler.chip.kind == "cpu"
    if on_cpu:
        seconds = partitioned_seconds(compiled, cost, setup.mesh, setup.target)
    else:
        time = step_time(compiled, setup.mesh, compute_seconds=cost.compute_seconds)
        seconds = time.step_seconds
    return Verdict(
        candidate=candidate,
        compiled=compiled,
        step_seconds=seconds,
        fits=None if on_cpu else compiled.peak_bytes <= setup.memory_limit,
    )


def compiler_for(verify: str, setup: Setup) -> Target:
    """The target whose compiler a verification asks.

    Args:
        verify: `cpu` or `target`.
        setup: what is planned for.
    """
    if verify == "cpu":
        return parse_target(f"cpu:{setup.mesh.n_devices}")
    return setup.target
