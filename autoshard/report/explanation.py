"""Why each family of variables got its spec, as text."""

import math
from collections import Counter
from collections.abc import Callable

from tabulate import tabulate

from autoshard.mesh import Spec, format_spec
from autoshard.model.paths import unnumbered
from autoshard.records.parts import Reason
from autoshard.report.families import families_name
from autoshard.sharding_plan import Plan
from autoshard.units import format_bytes, format_seconds

__all__ = ["RANKING", "explanation_text", "reasons_text"]

RANKING = (
    "the ranking adds a twentieth of the collectives behind compute, 0.25% a rule for an output, "
    "for biases or for some of several numbered layers, 0.7% for twice the memory"
)
"""Why what is faster may come later: `autoshard.search.descent.Scored.rank` in words."""

# Seconds below this are rounding; bytes are one or more.
_LEAST = 1e-12


def explanation_text(plan: Plan) -> str:
    """What to know of a plan, and why each family got its spec.

    Args:
        plan: a plan, fresh or from a file.
    """
    head = f"{plan.model.name}, {plan.workload}\nmesh {plan.mesh.named} on {plan.target}"
    known = "".join(f"\nnote: {note}" for note in plan.notes)
    return f"{head}{known}\n\n{reasons_text(plan)}"


def reasons_text(plan: Plan) -> str:
    """Why each family got its spec.

    Args:
        plan: a plan, fresh or from a file.
    """
    alike = Counter(unnumbered(reason.family) for reason in plan.reasons)
    groups: dict[tuple[str, Spec], list[Reason]] = {}
    for reason in plan.reasons:
        groups.setdefault((unnumbered(reason.family), reason.spec), []).append(reason)
    rows = []
    for (template, spec), several in groups.items():
        name = families_name([reason.family for reason in several], alike[template])
        rows.append((name, format_spec(spec), *_next_best(min(several, key=_added_seconds))))
    headers = ("family", "spec", "next best, all else equal", "step", "memory")
    table = tabulate(rows, headers=headers, disable_numparse=True)
    joint = len(groups) < len(plan.reasons)
    of_one = ", of several layers in one line for the one where that is least" if joint else ""
    asked = ";\na compiler was asked about whole layouts, and its word counts first"
    return (
        f"{table}\n(step and memory: what the next best would add, predicted by formulas{of_one};\n"
        f"{RANKING}{asked if plan.compiled else ''})"
    )


def _added_seconds(reason: Reason) -> float:
    """What the next best spec would add to the step; infinite where there is none."""
    return math.inf if reason.cost_seconds is None else reason.cost_seconds


def _next_best(reason: Reason) -> tuple[str, str, str]:
    """The next best spec of a family, and what it would add to the step and to the peak."""
    if reason.next_best is None or reason.cost_seconds is None or reason.cost_bytes is None:
        why = "none legal or worth a rule"
        if any(reason.spec):
            why = "none: not read by this step, or tied to another family"
        return why, "", ""
    return (
        format_spec(reason.next_best),
        _signed(reason.cost_seconds, format_seconds),
        _signed(reason.cost_bytes, format_bytes) + ("" if reason.fits else ", does not fit"),
    )


def _signed(amount: float, text: Callable[[float], str]) -> str:
    """An amount that is added or saved, "same" where it is neither."""
    if abs(amount) < _LEAST:
        return "same"
    return f"{'+' if amount > 0 else '-'}{text(abs(amount))}"
