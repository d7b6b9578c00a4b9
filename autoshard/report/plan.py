"""A plan, what it costs and what a compiler says of it, as text."""

import math
from collections import Counter
from collections.abc import Iterable, Iterator

from tabulate import tabulate

from autoshard.cost.values import Traffic
from autoshard.hardware.links import group_link
from autoshard.hardware.targets import Target
from autoshard.layout.resolve import resolve
from autoshard.layout.rules import rules_text
from autoshard.mesh import Mesh, format_spec
from autoshard.model.paths import unnumbered
from autoshard.model.variables import Family
from autoshard.pipeline import PlanOutcome
from autoshard.planner.remedies import as_options
from autoshard.report.explanation import reasons_text
from autoshard.report.families import families_name
from autoshard.report.ranking import ranking_text, shapes_text
from autoshard.search.candidates import legal_specs
from autoshard.sharding_plan import Plan
from autoshard.units import format_bytes, format_seconds, option_bytes, spell_count
from autoshard.xla.collectives import Collective
from autoshard.xla.partitioned import target_collectives

__all__ = ["notes", "plan_text"]

# Whole weights of less than this share of the model are not worth a line.
_TRIFLE = 0.01

# If no axis divides more than this share, the mesh has hardly the right shape.
_MUCH = 0.1

# Why a family has to lie whole.
_UNDIVIDED = "no axis divides"

# What carries a mesh axis, by `AxisLink.kind`.
_LINKS = {
    "torus-ring": "rings of the torus",
    "torus-line": "lines of the torus",
    "on-chip": "the chip itself",
    "nvlink": "NVLink",
    "network": "the network",
    "host": "the host's memory",
}

# The dimensions of a cache as KerasHub's models make it.
_CACHE = ("batch", "block", "key or value", "token", "head", "width")

# Collectives that the TPU compiler makes others of.
_REFINED = ("reduce-scatter", "all-gather")


def plan_text(outcome: PlanOutcome, *, timings: bool = False) -> str:
    """Everything a person wants to know of a plan.

    Args:
        outcome: what `autoshard.pipeline.make_plan` found.
        timings: whether to add the seconds of each stage.
    """
    parts = [
        _head(outcome),
        _map(outcome.plan),
        _cost(outcome),
        *_whole(outcome),
        *shapes_text(outcome),
        ranking_text(outcome),
        *_verification(outcome),
        reasons_text(outcome.plan),
    ]
    if timings:
        parts.append(_timings(outcome))
    return "\n\n".join(parts)


def _map(plan: Plan) -> str:
    head = "layout_map = keras.distribution.LayoutMap(device_mesh)\n" if plan.rules else ""
    return head + rules_text(plan.rules)


def _head(outcome: PlanOutcome) -> str:
    setup, table = outcome.planning.setup, outcome.planning.traced.table
    stored = f"{format_bytes(table.n_bytes)} as {' and '.join(table.dtypes)}"
    lines = [
        f"{table.name}: {spell_count(table.n_parameters, 'parameters', stored)}, "
        f"{outcome.planning.traced.folded.task}",
        f"mesh {setup.mesh.named} on {setup.target}, {format_bytes(setup.memory_limit)} a device",
        *_links(setup.mesh, setup.target),
        f"workload {setup.workload}",
    ]
    lines += notes(outcome)
    if not outcome.plan.fits:
        lines.append(_misfit(outcome))
    if outcome.failure:
        lines.append(f"UNVERIFIED: {outcome.failure}")
    return "\n".join(lines)


def _links(mesh: Mesh, target: Target) -> Iterator[str]:
    """What carries each axis, where there are several, or a network."""
    if len(mesh.parallel_axes) < 2 and target.n_slices == 1:
        return
    links = (group_link((axis,), mesh, target) for axis in mesh.parallel_axes)
    told = (
        f"{link.axis} over {_LINKS[link.kind]}, {link.bytes_per_second / 1e9:.3g} GB/s"
        for link in links
    )
    yield f"links {'; '.join(told)} a device"


def notes(outcome: PlanOutcome) -> list[str]:
    """What a user should know of the plan before it is used, a line each."""
    said = [f"note: {outcome.plan.stillness}"] if outcome.plan.stillness else []
    return said + [f"warning: {doubt}" for doubt in outcome.doubts]


def _misfit(outcome: PlanOutcome) -> str:
    peak = outcome.winner.scored.cost.memory.peak_bytes
    limit = format_bytes(outcome.planning.setup.memory_limit)
    said = (
        f": this is the nearest plan; it needs {format_bytes(peak)}, "
        f"{format_bytes(peak - outcome.planning.setup.memory_limit)} more "
        f"(planned for as if a chip had them by --memory-limit {option_bytes(peak)})"
    )
    if outcome.verdicts and outcome.verdicts[0].misfit:
        said = f", by the target's compiler: {outcome.verdicts[0].misfit}"
    lines = [f"DOES NOT FIT {limit} a device{said}"]
    lines += [
        f"  fits with {as_options(remedy.change)}: step {format_seconds(remedy.step_seconds)}, "
        f"{format_bytes(remedy.peak_bytes)} a device, predicted"
        for remedy in outcome.advice.remedies
    ]
    if refusal := outcome.advice.refusal(as_options):
        lines.append(f"  {refusal}")
    return "\n".join(lines)


def _cost(outcome: PlanOutcome) -> str:
    scored, planning = outcome.winner.scored, outcome.planning
    cost, memory, result = scored.cost, scored.cost.memory, planning.result
    parts = (
        ("weights", memory.weights),
        ("gradients", memory.gradients),
        ("optimizer", memory.optimizer),
        ("activations", memory.activations),
        ("KV cache", memory.kv_cache),
    )
    shown = ", ".join(f"{name} {format_bytes(n)}" for name, n in parts if n)
    specs = planning.cache_specs(scored)
    caches = dict.fromkeys(map(format_spec, specs))
    laid = [f"KV cache, laid out by XLA: {', '.join(caches)}"] if caches else []
    if any(len(spec) == len(_CACHE) for spec in specs):
        laid[0] += f" of {', '.join(_CACHE)}"
    if any(entry and ":" in entry for spec in specs for entry in spec):
        laid.append(
            "  axis:(m)n is the part of size n of an axis, behind parts of size m (as in Shardy)"
        )
    if result.bound_seconds is not None:
        bound = (
            f"by the same formulas none is faster than {format_seconds(result.bound_seconds)}, "
            f"the relaxed problem's bound (gap {result.gap(scored):.0%})"
        )
    elif scored.excess_bytes:
        bound = "no layout keeps the memory limit, by the same formulas"
    else:
        bound = "the relaxed problem, where numbered layers are alike, gives no bound"
    return "\n".join(
        (
            f"predicted step {format_seconds(cost.step_seconds)}: compute "
            f"{format_seconds(cost.compute_seconds)}, blocking collectives "
            f"{format_seconds(cost.blocking_seconds)}, collectives behind compute "
            f"{format_seconds(cost.overlapped_seconds)}; "
            f"{format_bytes(cost.collective_bytes)} on the wire a device",
            f"predicted memory {format_bytes(memory.peak_bytes)} a device at the peak: {shown}",
            *laid,
            f"searched {result.n_scored} layouts; {bound}",
            *_passed_over(outcome),
        )
    )


def _passed_over(outcome: PlanOutcome) -> Iterator[str]:
    """Why the fastest that fits was not taken, where the ranking has the plan before it."""
    winner, compiled = outcome.winner.scored, [one.candidate.scored for one in outcome.verdicts]
    fitting = [
        (scored.cost.step_seconds, planning.setup.mesh, scored)
        for planning in outcome.shapes or (outcome.planning,)
        for scored in planning.result.front
        if scored.excess_bytes == 0 and scored.rank > winner.rank
    ]
    seconds, mesh, fastest = min(fitting, key=lambda one: one[0], default=(math.inf, None, winner))
    if seconds >= winner.cost.step_seconds or fastest in compiled:
        return
    step, own_step = map(format_seconds, (seconds, winner.cost.step_seconds))
    counted, own = (format_seconds(one.counted_beside(winner)) for one in (fastest, winner))
    if step == own_step or counted == own:  # they are as good as equal
        return
    yield (
        f"a step of {step} on {mesh} was passed over: with what the ranking adds (told below) it "
        f"counts {counted}, this plan {own}"
    )


def _whole(outcome: PlanOutcome) -> Iterator[str]:
    """The weights that every device holds whole, and why, where they are more than a trifle."""
    table, mesh = outcome.planning.traced.table, outcome.planning.setup.mesh
    families = resolve(outcome.plan.rules, table, mesh).whole(table, mesh)
    total = sum(family.n_bytes for family in families)
    if mesh.n_devices == 1 or total < _TRIFLE * table.n_bytes:
        return
    alike = Counter(unnumbered(family.name) for family in table.families())
    groups: dict[tuple[str, str], list[Family]] = {}
    for family in families:
        legal = len(list(legal_specs(family.shape, mesh))) > 1
        why = "by choice" if legal else f"{_UNDIVIDED} {family.shape}"
        groups.setdefault((unnumbered(family.name), why), []).append(family)
    named: list[str] = []
    n_rest, rest, undivided = 0, 0, 0
    for (template, why), several in groups.items():
        n_bytes = sum(family.n_bytes for family in several)
        undivided += n_bytes if why.startswith(_UNDIVIDED) else 0
        if n_bytes < _TRIFLE * table.n_bytes and named:
            n_rest, rest = n_rest + len(several), rest + n_bytes
            continue
        name = families_name([family.name for family in several], alike[template])
        named.append(f"  {name} {format_bytes(n_bytes)}: {why}")
    if n_rest:
        named.append(f"  and {n_rest} more, {format_bytes(rest)}")
    if undivided > _MUCH * table.n_bytes and not outcome.shapes:
        named.append(f"  (--devices {mesh.n_devices} tries every shape of the mesh)")
    yield "\n".join([f"whole on every device: {format_bytes(total)} of weights", *named])


def _verification(outcome: PlanOutcome) -> Iterator[str]:
    """Prediction beside compiler, collective by collective."""
    if not outcome.verdicts or outcome.verdicts[0].compiled is None:
        return
    verdict = outcome.verdicts[0]
    compiled = verdict.compiled
    assert compiled is not None
    cost = outcome.winner.scored.cost
    predicted = _counts(cost.traffic)
    found = _counts(target_collectives(compiled, outcome.plan.mesh.data_axis, cost))
    arrays = _counts(compiled.collectives)
    keys = sorted(predicted | found, key=lambda key: -key[2] * max(predicted[key], found[key]))
    rows = [
        (key[0], key[1], format_bytes(key[2]), predicted[key], found[key], arrays[key])
        for key in keys
    ]
    head = f"compiled for {compiled.target} at full depth"
    if rows:
        table = tabulate(rows, headers=("kind", "axis", "size", "predicted", "compiled", "arrays"))
        yield f"{head}; collectives of a step\n{table}"
    else:
        yield f"{head}: no collectives in a step, as predicted"
    refined = any(predicted[key] != found[key] for key in keys if key[0] in _REFINED)
    if compiled.on_cpu and refined and outcome.planning.setup.target.chip.kind == "tpu":
        yield (
            "(compiled: what XLA's partitioner does; predicted: what TPU compilers make of it,\n"
            "which sum some reduce-scatters whole and gather again for the backward pass)"
        )
    if not compiled.on_cpu:
        yield (
            f"by the compiler: step {format_seconds(verdict.step_seconds)}, memory "
            f"{format_bytes(compiled.peak_bytes)} a device (arguments "
            f"{format_bytes(compiled.argument_bytes)}, temporaries "
            f"{format_bytes(compiled.temporary_bytes)}, outputs "
            f"{format_bytes(compiled.output_bytes)}, aliased {format_bytes(compiled.alias_bytes)})"
        )


def _counts(collectives: Iterable[Collective | Traffic]) -> Counter[tuple[str, str, int]]:
    counts: Counter[tuple[str, str, int]] = Counter()
    for item in collectives:
        counts[item.kind, item.axis, item.n_bytes] += item.count
    return counts


def _timings(outcome: PlanOutcome) -> str:
    rows = [(stage, f"{seconds:.2f} s") for stage, seconds in outcome.timings.items()]
    return tabulate(rows, headers=("stage", "measured"), disable_numparse=True)
