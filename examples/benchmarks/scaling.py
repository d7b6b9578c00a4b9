"""Time to plan a preset as it gets deeper, and as the mesh gets larger, without a compiler.

    python examples/benchmarks/scaling.py [PRESET] [--workload train] [--runs 3]

Seconds are measured, after one plan that is not timed, so that imports are not; of several runs the
fastest counts, for other programs on the machine only ever make one slower. Keras builds the
model block by block; trace and search see a copy with two periods of blocks, whatever the depth.
"""

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from tabulate import tabulate
from verdicts import plan_here

from autoshard.model.catalogue import Preset, get
from autoshard.model.keras_import import import_keras_hub
from autoshard.pipeline import PlanOutcome, make_plan
from autoshard.units import format_seconds

DEPTHS = (2, 8, 28, 80)
DEEP = ("1x8", "tpu:v5e:2x4")
# What the data axes of all meshes divide.
BATCH = 64
MESHES = (
    ("2x4", "tpu:v5e:2x4"),
    ("8x8", "tpu:v5e:8x8"),
    ("16x16", "tpu:v5e:16x16"),
    ("64x16", "tpu:v5p:8x8x16"),
)
BUILD = "build the model"
HEADERS = (
    "blocks",
    "mesh",
    "target",
    BUILD,
    "trace the step",
    "search",
    "all but the build",
    "predicted step",
    "fits",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("preset", nargs="?", default="gemma_7b_en", metavar="PRESET")
    parser.add_argument("--workload", default="train")
    parser.add_argument("--runs", type=int, default=3, metavar="N", help="plans a row")
    arguments = parser.parse_args()
    plan_here()
    preset = get(arguments.preset)
    if "num_layers" not in preset.config():
        parser.error(f"'{preset.name}' has no num_layers to change; give another preset")
    plan = partial(make_plan, workload=arguments.workload, batch=BATCH, verify="none", advise=False)
    plan(preset.name, DEEP[0], target=DEEP[1])

    def planned(model: Any, mesh: str, **options: Any) -> PlanOutcome:
        outcomes = (plan(model, mesh, **options) for _ in range(max(1, arguments.runs)))
        return min(outcomes, key=seconds_but_build)

    print(tabulate(rows(preset, planned), headers=HEADERS, disable_numparse=True))


def rows(preset: Preset, planned: Callable[..., PlanOutcome]) -> Iterator[tuple[str, ...]]:
    """A row for each depth on one mesh, then one for each mesh with the preset's own depth."""
    mesh, target = DEEP
    for depth in DEPTHS:
        outcome = planned(partial(_with_depth, preset, depth), mesh, target=target)
        yield (str(depth), mesh, target, *_cells(outcome))
    for mesh, target in MESHES:
        outcome = planned(preset.name, mesh, target=target)
        yield (str(preset.config()["num_layers"]), mesh, target, *_cells(outcome))


def _with_depth(preset: Preset, depth: int) -> Any:
    backbone = getattr(import_keras_hub().models, preset.class_name)
    return backbone.from_config({**preset.config(), "num_layers": depth})


def seconds_but_build(outcome: PlanOutcome) -> float:
    """What a plan took, the building of the model aside."""
    return sum(outcome.timings.values()) - outcome.timings[BUILD]


def _cells(outcome: PlanOutcome) -> tuple[str, ...]:
    seconds = outcome.timings
    return (
        f"{seconds[BUILD]:.2f} s",
        f"{seconds['trace the step']:.2f} s",
        f"{seconds['search']:.2f} s",
        f"{seconds_but_build(outcome):.2f} s",
        format_seconds(outcome.plan.predicted.step_seconds),
        "yes" if outcome.plan.fits else "no",
    )


if __name__ == "__main__":
    main()
