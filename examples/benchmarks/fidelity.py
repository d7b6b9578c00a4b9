"""Predicted bytes, time and memory against what compilers make of the same program.

    python examples/benchmarks/fidelity.py [--held-out] [--worst N]

For each model, mesh and workload a fixed set of layouts (`layouts.py`) is compiled with two periods
of blocks: for eight CPU devices, whose partitioner decides on collectives as the target's does, and
those of some models (`ON_TPU`) for `tpu:v5e:2x4` where libtpu is installed. Verdicts are kept in
results/fidelity.jsonl, and a run asks only for those that are missing; predictions are made anew.

Bytes are wire bytes through one device by the ring formulas. Against the CPU's partitioner the time
is predicted compute with its collectives on the target's links; against the TPU compiler it is its
cycles and its collectives on the same links. Held-out models are for the final figure only.
"""

import argparse
import math
import statistics
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path

from differences import difference_table
from layouts import fixed_layouts
from planned import predicted_cost, setup_of
from scores import Pair, Score, byte_error, score
from tabulate import tabulate
from verdicts import (
    TARGET,
    Question,
    Results,
    Row,
    answer_all,
    compiled,
    installed_versions,
    plan_here,
    rules_of,
)

from autoshard.cost.values import StepCost
from autoshard.mesh import parse_mesh
from autoshard.model.build import build
from autoshard.xla.clock import step_time
from autoshard.xla.partitioned import partitioned_seconds, target_collectives

DEVELOPMENT = ("gemma_2b_en", "llama3_8b_en", "gpt2_large_en", "mixtral_8_7b_en")
HELD_OUT = ("gemma2_2b_en", "qwen2.5_7b_en", "phi3_mini_4k_instruct_en", "bert_large_en_uncased")
ON_TPU = {
    "prefill": ("gemma_2b_en", "llama3_8b_en", "gemma2_2b_en", "qwen2.5_7b_en"),
    "train": ("gemma_2b_en", "qwen2.5_7b_en"),
}
MESHES = ("1x8", "2x4")
WORKLOADS = ("prefill", "train")
CPU = "cpu:8"
RESULTS = Path(__file__).parent / "results" / "fidelity.jsonl"
KEY = ("model", "mesh", "workload", "layout", "target", "versions")
HEADERS = (
    "model",
    "mesh",
    "workload",
    "compiler",
    "layouts",
    "Spearman of time",
    "median byte error",
    "90th percentile",
    "top-1 regret",
    "median peak error",
)


def main() -> None:
    arguments = _arguments()
    plan_here()
    models = arguments.models or (HELD_OUT if arguments.held_out else DEVELOPMENT)
    results = Results(path=RESULTS, fields=KEY)
    if not arguments.report:
        for target in arguments.targets:
            for workload in arguments.workload:
                questions = _questions(models, arguments.meshes, workload, target)
                answer_all(questions, results, retry_errors=arguments.retry_errors)
    rows = [
        row
        for row in results.rows.values()
        if row["model"] in models
        and row["mesh"] in arguments.meshes
        and row["workload"]["kind"] in arguments.workload
        and row["target"] in arguments.targets
        and row["versions"] == installed_versions()
        and "compiled" in row
    ]
    print(report(rows))
    if arguments.worst:
        print(worst(rows, arguments.worst))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    targets = (CPU, TARGET) if find_spec("libtpu") else (CPU,)
    parser.add_argument("--held-out", action="store_true", help="the models kept for the end")
    parser.add_argument("--models", nargs="+", metavar="NAME", help="these instead")
    parser.add_argument("--meshes", nargs="+", default=MESHES, metavar="MESH")
    parser.add_argument("--workload", nargs="+", default=WORKLOADS, choices=WORKLOADS)
    parser.add_argument("--targets", nargs="+", default=targets, choices=(CPU, TARGET))
    parser.add_argument("--report", action="store_true", help="compile nothing")
    parser.add_argument("--retry-errors", action="store_true", help="ask again where that failed")
    parser.add_argument(
        "--worst", type=int, default=0, metavar="N", help="show the N worst byte errors in detail"
    )
    return parser.parse_args()


def _questions(
    models: Sequence[str], meshes: Sequence[str], workload: str, target: str
) -> Iterator[Question]:
    """What is compiled: for a TPU, where it takes long, the layouts of some models."""
    for name in models:
        if target != CPU and name not in ON_TPU[workload]:
            continue
        model = build(name)
        for mesh in meshes:
            for layout, rules in fixed_layouts(model, parse_mesh(mesh)):
                yield Question(
                    model=name,
                    mesh=mesh,
                    workload=workload,
                    layout=layout,
                    rules=rules,
                    target=target,
                )


def report(rows: Sequence[Row]) -> str:
    """A line of statistics for each model, mesh, workload and compiler, and one over all."""
    lines, scores = [], []
    pairs: list[Pair] = []
    for place, several in groupby(sorted(rows, key=_place), key=_place):
        here = [pair for row in several if (pair := _pair(row)) is not None]
        pairs += here
        scores.append(score(here))
        lines.append([*place, *_texts(scores[-1])])
    if scores:
        lines.append(["all", "", "", "", *_texts(_overall(scores, pairs))])
    return tabulate(lines, headers=HEADERS, disable_numparse=True, stralign="right")


def _place(row: Row) -> tuple[str, str, str, str]:
    compiler = row["target"].split(":")[0]
    return row["model"], row["mesh"], row["workload"]["kind"], compiler


def _overall(scores: Sequence[Score], pairs: Sequence[Pair]) -> Score:
    """Byte errors over all layouts; the mean correlation and the worst regret of the places."""
    together = score(pairs)
    known = [one.spearman for one in scores if not math.isnan(one.spearman)]
    return Score(
        n=together.n,
        spearman=statistics.mean(known) if known else math.nan,
        median_error=together.median_error,
        p90_error=together.p90_error,
        regret=max(one.regret for one in scores),
        peak_error=together.peak_error,
    )


def _texts(one: Score) -> list[str]:
    shares = (one.median_error, one.p90_error, one.regret, one.peak_error)
    texts = ("" if math.isnan(share) else f"{share:.1%}" for share in shares)
    return [str(one.n), f"{one.spearman:.3f}", *texts]


def _cost(row: Row) -> StepCost | None:
    """The prediction for the row's layout."""
    model, mesh, kind = row["model"], row["mesh"], row["workload"]["kind"]
    return predicted_cost(model, mesh, kind, rules_of(row), as_partitioned=row["target"] == CPU)


def _pair(row: Row) -> Pair | None:
    """A prediction beside its verdict; None where the planner refuses the layout."""
    step, cost = compiled(row), _cost(row)
    if step is None or cost is None:
        return None
    setup = setup_of(row["mesh"], row["workload"]["kind"])
    on_cpu = step.estimated_cycles is None
    return Pair(
        layout=row["layout"],
        predicted_bytes=cost.collective_bytes,
        compiled_bytes=sum(
            one.wire_bytes for one in target_collectives(step, setup.mesh.data_axis)
        ),
        predicted_seconds=cost.step_seconds,
        compiled_seconds=partitioned_seconds(step, cost, setup.mesh, setup.target)
        if on_cpu
        else step_time(step, setup.mesh).step_seconds,
        predicted_peak=cost.memory.peak_bytes,
        compiled_peak=0 if on_cpu else step.peak_bytes,
    )


def worst(rows: Sequence[Row], n: int) -> str:
    """The layouts whose bytes are predicted worst, each with what moves, predicted and compiled."""
    pairs = [(pair, row) for row in rows if (pair := _pair(row)) is not None]
    pairs.sort(key=lambda found: -byte_error(found[0]))
    texts = []
    for pair, row in pairs[:n]:
        step, cost = compiled(row), _cost(row)
        assert step is not None and cost is not None
        rules = "\n".join(f"  {pattern}: {spec}" for pattern, spec in row["rules"])
        texts.append(
            f"\n{' '.join(_place(row))} {pair.layout}: byte error {byte_error(pair):.0%}\n{rules}\n"
            + difference_table(step, cost, parse_mesh(row["mesh"]).data_axis)
        )
    return "\n".join(texts)


if __name__ == "__main__":
    main()
