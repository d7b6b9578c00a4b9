"""A run of a plan as text and as JSON."""

from collections.abc import Iterator

from tabulate import tabulate

from autoshard.codec import dump, to_record
from autoshard.layout.rules import rules_text
from autoshard.records.execution import PartRun, PlanRun
from autoshard.units import format_bytes, format_seconds

__all__ = ["run_json", "run_text"]

_N_SHOWN = 5


def run_json(found: PlanRun) -> str:
    """Everything that was found, as a JSON object."""
    return dump(to_record(found))


def run_text(found: PlanRun) -> str:
    """Everything that was found, for a person.

    Args:
        found: what `autoshard.run` returned.
    """
    parts = ["\n".join(_part(part, found.tolerance)) for part in found.parts]
    return "\n\n".join([_head(found), rules_text(found.rules), *parts, _verdict(found)])


def _head(found: PlanRun) -> str:
    versions, n_processes = found.versions, found.n_processes
    processes = f"{n_processes} processes x " if n_processes > 1 else ""
    free = "" if found.available_bytes is None else (
        f", {format_bytes(found.available_bytes)} of memory free"
    )  # fmt: skip
    return (
        f"{found.model}, {found.dtype}, random weights of seed {found.seed}\n"
        f"mesh {found.mesh.named} on {processes}"
        f"{found.mesh.n_devices // n_processes} virtual CPU devices{free}\n"
        f"keras {versions.keras}, keras-hub {versions.keras_hub}, jax {versions.jax}; results are "
        f"held against {found.against}\n{found.tolerance}"
    )


def _part(part: PartRun, tolerance: str) -> Iterator[str]:
    yield f"{part.part}: {part.work}{_depth(part)}"
    if part.missing_bytes:
        yield f"  for all blocks the machine lacks {format_bytes(part.missing_bytes)} of memory"
    if part.failure:
        yield f"  FAILED: {part.failure}"
        return
    rows = [
        (
            name,
            format_seconds(execution.build_seconds),
            format_seconds(execution.run_seconds),
            format_bytes(execution.built_bytes),
            format_bytes(execution.peak_bytes),
        )
        for name, execution in (("sharded", part.sharded), ("reference", part.reference))
        if execution is not None
    ]
    headers = ("", "build", "compile and run", "memory when built", "memory at the peak")
    yield _indented(tabulate(rows, headers=headers, disable_numparse=True))
    yield f"  (expected to need {format_bytes(part.needed_bytes)})"
    yield from _placed(part)
    for step, loss in enumerate(part.losses):
        yield f"  loss of step {step + 1}: {loss:.6f}, reference {part.reference_losses[step]:.6f}"
    if part.tolerance != tolerance:
        yield f"  at this depth {part.tolerance}"
    for item in part.agreements:
        verdict = "ok" if item.holds else "TOO MUCH"
        note = f" ({item.note})" if item.note else ""
        yield f"  {item.figure}: {item.found:.3g}, allowed {item.allowed:.3g}: {verdict}{note}"


def _depth(part: PartRun) -> str:
    if part.n_blocks is None:
        return ""
    if part.blocks == part.n_blocks:
        return f"; all {part.n_blocks} blocks"
    return f"; {part.blocks} of {part.n_blocks} blocks"


def _placed(part: PartRun) -> Iterator[str]:
    placed = part.placed
    if placed is None:
        return
    right = placed.n_variables - len(placed.misplaced)
    yield (
        f"  {right} of {placed.n_variables} variables lie as planned, {placed.n_split} of them "
        "split"
    )
    for line in placed.misplaced[:_N_SHOWN]:
        yield f"  MISPLACED: {line}"
    if len(placed.misplaced) > _N_SHOWN:
        yield f"  and {len(placed.misplaced) - _N_SHOWN} more"


def _verdict(found: PlanRun) -> str:
    parts = ", ".join(part.part for part in found.parts if found.passed or not part.passed)
    left_out = (
        "" if found.generate else " (generate left out: the plan was made with --no-generate)"
    )
    return f"{'PASSED' if found.passed else 'FAILED'}: {parts}{left_out}"


def _indented(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.splitlines())
