"""Predicted peak memory against the TPU compiler's, of the programs that the benchmarks keep.

    python examples/benchmarks/memory.py [--workload KIND ...] [--models NAME ...]

Compiles nothing: `fidelity.py` and `rivals.py` put the programs, as deep as `PERIODS` says, into
results/. A row a workload and model; the error is predicted over compiled, less one. Training that
was compiled before what is in use at once was kept is left out: what lies idle counts twice there.
(Prefill leaves next to nothing idle.)
"""

import argparse
import statistics
from collections.abc import Iterable, Iterator

import fidelity
import rivals
from planned import predicted_cost
from scores import quantile
from tabulate import tabulate
from verdicts import TARGET, Results, compiled, plan_here, rules_of

HEADERS = ("workload", "model", "programs", "median", "90th percentile", "within 10%", "range")

Place = tuple[str, str]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--workload", nargs="+", default=rivals.WORKLOADS, choices=rivals.WORKLOADS)
    parser.add_argument("--models", nargs="+", default=rivals.MODELS, metavar="NAME")
    arguments = parser.parse_args()
    plan_here()
    found: dict[Place, list[float]] = {}
    for workload, model, error in errors(arguments.workload, arguments.models):
        found.setdefault((workload, model), []).append(error)
    lines = [row(place, several) for place, several in sorted(found.items())]
    for workload in arguments.workload:
        together = [
            error for place, several in found.items() if place[0] == workload for error in several
        ]
        lines += [row((workload, "all"), together)] if together else []
    print(tabulate(lines, headers=HEADERS, disable_numparse=True))


def errors(workloads: Iterable[str], models: Iterable[str]) -> Iterator[tuple[str, str, float]]:
    """Workload, model and error of each program; one that several results hold comes once."""
    seen = set()
    for benchmark in (fidelity, rivals):
        for kept in Results(path=benchmark.RESULTS, fields=benchmark.KEY).rows.values():
            kind, step = kept["workload"]["kind"], compiled(kept)
            program = (kept["model"], kept["mesh"], kind, str(kept["rules"]))
            if (
                step is None
                or (kind == "train" and step.live_bytes is None)
                or kept["target"] != TARGET
                or kept["model"] not in models
                or kind not in workloads
                or program in seen
            ):
                continue
            seen.add(program)
            cost = predicted_cost(kept["model"], kept["mesh"], kind, rules_of(kept))
            if cost is not None:
                yield kind, kept["model"], cost.memory.peak_bytes / step.peak_bytes - 1


def row(place: Place, several: list[float]) -> tuple[str, ...]:
    """The statistics of some errors."""
    sizes = sorted(map(abs, several))
    return (
        *place,
        str(len(several)),
        f"{statistics.median(sizes):.1%}",
        f"{quantile(sizes, 0.9):.0%}",
        f"{sum(size <= 0.1 for size in sizes) / len(sizes):.0%}",
        f"{min(several):+.0%} to {max(several):+.0%}",
    )


if __name__ == "__main__":
    main()
