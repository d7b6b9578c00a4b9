"""The predicted step and peak memory against the TPU compiler's, of the programs that are kept.

    python examples/benchmarks/kept.py [--workload KIND ...] [--models NAME ...]

Compiles nothing: `fidelity.py` and `rivals.py` put the programs, as deep as `PERIODS` says or whole
(`rivals.py --whole`), into results/. A row a workload and model; an error is predicted over
compiled, less one. The step is timed on the links of the mesh; its rank correlation is that of
layouts on one mesh, to a twentieth, the mean over meshes. Memory of training that was compiled
before what is in use at once was kept is left out: what lies idle counts twice there. (Prefill
leaves next to nothing idle.)
"""

import argparse
import math
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import fidelity
import rivals
from planned import predicted_cost
from scores import quantile, spearman
from tabulate import tabulate
from verdicts import TARGET, Results, compiled, plan_here, rules_of

from autoshard.mesh import parse_mesh
from autoshard.xla.clock import step_time

HEADERS = (
    *("workload", "model", "programs", "step: median error", "90th percentile", "Spearman"),
    *("memory: median error", "90th percentile", "within 10%", "range"),
)
# What is added to the workload of whole models.
_WHOLE = ", all blocks"
# Fewer layouts of one mesh have no ranks worth comparing.
_RANKED = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """One program, predicted and compiled.

    Attributes:
        workload, model, mesh: what was compiled; the workload of whole models is told apart.
        predicted_seconds, compiled_seconds: the step.
        memory_error: of the peak; None where the compiler's is not known.
    """

    workload: str
    model: str
    mesh: str
    predicted_seconds: float
    compiled_seconds: float
    memory_error: float | None

    @property
    def step_error(self) -> float:
        """Of the step's time."""
        return self.predicted_seconds / self.compiled_seconds - 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--workload", nargs="+", default=rivals.WORKLOADS, choices=rivals.WORKLOADS)
    parser.add_argument("--models", nargs="+", default=rivals.MODELS, metavar="NAME")
    arguments = parser.parse_args()
    plan_here()
    found: dict[tuple[str, str], list[Kept]] = {}
    for one in programs(arguments.workload, arguments.models):
        found.setdefault((one.workload, one.model), []).append(one)
    lines = [row(*place, several) for place, several in sorted(found.items())]
    for workload in arguments.workload:
        for kind in (workload, workload + _WHOLE):
            together = [one for place, some in found.items() if place[0] == kind for one in some]
            lines += [row(kind, "all", together)] if together else []
    print(tabulate(lines, headers=HEADERS, disable_numparse=True))


def programs(workloads: Iterable[str], models: Iterable[str]) -> Iterator[Kept]:
    """Each program; one that several results hold comes once."""
    seen = set()
    for path, key in (
        (fidelity.RESULTS, fidelity.KEY),
        (rivals.RESULTS, rivals.KEY),
        (rivals.WHOLE_RESULTS, rivals.KEY),
    ):
        is_whole = path == rivals.WHOLE_RESULTS
        for kept in Results(path=path, fields=key).rows.values():
            model, mesh, kind = kept["model"], kept["mesh"], kept["workload"]["kind"]
            step, program = compiled(kept), (is_whole, model, mesh, kind, str(kept["rules"]))
            is_asked = kept["target"] == TARGET and model in models and kind in workloads
            if step is None or not is_asked or program in seen:
                continue
            seen.add(program)
            cost = predicted_cost(model, mesh, kind, rules_of(kept), is_whole=is_whole)
            if cost is None:
                continue
            is_known = kind != "train" or step.live_bytes is not None
            yield Kept(
                workload=kind + _WHOLE * is_whole,
                model=model,
                mesh=mesh,
                predicted_seconds=cost.step_seconds,
                compiled_seconds=step_time(step, parse_mesh(mesh)).step_seconds,
                memory_error=cost.memory.peak_bytes / step.peak_bytes - 1 if is_known else None,
            )


def row(workload: str, model: str, several: Sequence[Kept]) -> tuple[str, ...]:
    """The statistics of some programs."""
    steps = [abs(one.step_error) for one in several]
    memory = [one.memory_error for one in several if one.memory_error is not None]
    sizes = [abs(error) for error in memory]
    return (
        *(workload, model, str(len(several))),
        *(f"{statistics.median(steps):.1%}", f"{quantile(steps, 0.9):.0%}", ranks(several)),
        *(f"{statistics.median(sizes):.1%}", f"{quantile(sizes, 0.9):.0%}"),
        f"{sum(size <= 0.1 for size in sizes) / len(sizes):.0%} of {len(sizes)}",
        f"{min(memory):+.0%} to {max(memory):+.0%}",
    )


def ranks(several: Sequence[Kept]) -> str:
    """The mean rank correlation of the step over models and meshes, where there are enough.

    In steps of a twentieth: most layouts of a place are plans, and alike.
    """
    places: dict[tuple[str, str], list[Kept]] = {}
    for one in several:
        places.setdefault((one.model, one.mesh), []).append(one)
    found = [
        spearman(
            [_twentieths(one.predicted_seconds) for one in some],
            [_twentieths(one.compiled_seconds) for one in some],
        )
        for some in places.values()
        if len(some) >= _RANKED
    ]
    ranked = [rank for rank in found if not math.isnan(rank)]  # the others are all as fast
    return f"{statistics.mean(ranked):.3f}" if ranked else ""


def _twentieths(seconds: float) -> int:
    return round(math.log(seconds) / math.log(1.05))


if __name__ == "__main__":
    main()
