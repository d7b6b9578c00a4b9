"""Time to plan every preset of the catalogue on one mesh, without a compiler.

    python examples/benchmarks/catalogue.py [PATTERN] [--mesh 1x8] [--workload train] [--limit N]

A row a preset: seconds of the planner's stages, measured, and the step that it predicts; a preset
that cannot be planned is a row with the reason. Presets of one configuration are planned once and
share a row.
"""

import argparse
import statistics
import sys
from collections.abc import Iterable, Sequence

from tabulate import tabulate
from verdicts import plan_here

from autoshard.errors import AutoshardError
from autoshard.model.catalogue import get, names
from autoshard.model.keras_import import import_keras_hub
from autoshard.pipeline import PlanOutcome, make_plan
from autoshard.units import format_bytes, format_seconds

HEADERS = (
    "preset",
    "seconds (measured)",
    "of it search",
    "rules",
    "predicted step",
    "bytes a device",
    "fits",
)

Line = tuple[str, ...]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("pattern", nargs="?", metavar="PATTERN", help="some presets only")
    parser.add_argument("--mesh", default="1x8")
    parser.add_argument("--workload", default="train")
    parser.add_argument("--limit", type=int, metavar="N", help="the first N configurations only")
    arguments = parser.parse_args()
    plan_here()
    import_keras_hub()  # the time of imports is nobody's
    lines: list[Line] = []
    seconds: list[float] = []
    for alike in distinct(names(arguments.pattern))[: arguments.limit]:
        line, measured = planned(alike, arguments.mesh, arguments.workload)
        print(" ".join(line), file=sys.stderr, flush=True)
        lines.append(line)
        seconds += [] if measured is None else [measured]
    print(tabulate(lines, headers=HEADERS, disable_numparse=True))
    print(summary(seconds, len(lines)))


def distinct(presets: Iterable[str]) -> list[tuple[str, ...]]:
    """Presets grouped by class and configuration, which are all that a plan depends on."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name in presets:
        preset = get(name)
        groups.setdefault((preset.class_name, preset.config_json), []).append(name)
    return [tuple(group) for group in groups.values()]


def planned(alike: Sequence[str], mesh: str, workload: str) -> tuple[Line, float | None]:
    """Plan one of some equal presets: a row of the table and the seconds, None on a failure."""
    label = alike[0] if len(alike) == 1 else f"{alike[0]} and {len(alike) - 1} like it"
    try:
        outcome = make_plan(alike[0], mesh, workload=workload, verify="none", advise=False)
    except AutoshardError as error:
        return (label, *[""] * (len(HEADERS) - 2), str(error).splitlines()[0]), None
    except Exception as error:  # a defect of the planner is a row too, not the end of the table
        return (label, *[""] * (len(HEADERS) - 2), f"{type(error).__name__}: {error}"), None
    return (label, *_cells(outcome)), sum(outcome.timings.values())


def _cells(outcome: PlanOutcome) -> Line:
    predicted = outcome.plan.predicted
    return (
        f"{sum(outcome.timings.values()):.2f}",
        f"{outcome.timings['search']:.2f}",
        str(len(outcome.plan.rules)),
        format_seconds(predicted.step_seconds),
        format_bytes(predicted.peak_bytes_per_device),
        "yes" if outcome.plan.fits else "no",
    )


def summary(seconds: Sequence[float], n: int) -> str:
    """How many were planned, and how long that took."""
    if not seconds:
        return f"0 of {n} configurations planned"
    return (
        f"{len(seconds)} of {n} configurations planned; seconds: "
        f"median {statistics.median(seconds):.2f}, longest {max(seconds):.2f}"
    )


if __name__ == "__main__":
    main()
