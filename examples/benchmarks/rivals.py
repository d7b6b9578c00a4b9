"""autoshard's plans against the maps that people use today, on the target's own compiler.

    python examples/benchmarks/rivals.py [--models NAME...] [--meshes MESH...] [--only ours|rivals]
    python examples/benchmarks/rivals.py --unseen
    python examples/benchmarks/rivals.py --close | --whole
    python examples/benchmarks/rivals.py --table

A verdict is the program of two periods of blocks, batch 8 x 512 (decoding: of all blocks, a token
each beside a cache of 512), compiled for `tpu:v5e:2x4`, on the clock of `autoshard.xla.clock`: the
compiler's cycles and its collectives over a plain ring. Where libtpu is not installed it is
predicted compute with the collectives of XLA's partitioner for CPUs.

Ours are the candidates that `autoshard plan --verify target` compiles too; the fastest counts.

`--unseen` does it for other models, on two meshes: of classes that no rule of the cost was made for
before they had been compiled. What is split by hand is there what the planner takes for it, and no
rule at all is a rival too.

Plans are made for whole models. `--close` compiles all blocks where our best and the best rival are
within 2% of each other, or our first candidate is behind; these verdicts stand in brackets, and
count. `--whole` does it for every row.

Verdicts are kept in results/, in rivals.jsonl, unseen.jsonl and whole.jsonl, and a run asks only
for those that are missing. The table marks with `!` a layout whose weights and optimizer alone
exceed the memory of a device at full depth, or that its compiler says does not fit: it is no rival.
What Keras refuses is `refused`, what the compiler cannot hold `too big`.
"""

import argparse
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

from maps import rivals
from planned import held_bytes, predicted_cost, setup_of
from tables import Entry, cells, compact_table, rivals_table
from verdicts import (
    BATCH,
    PERIODS,
    SEQ_LEN,
    TARGET,
    Question,
    Results,
    Row,
    answer_all,
    compiled,
    installed_versions,
    plan_here,
    rules_of,
    verdict_target,
)

from autoshard.hardware.targets import parse_target
from autoshard.layout.rules import LayoutRules
from autoshard.mesh import Mesh, parse_mesh
from autoshard.model.build import build
from autoshard.model.recipe import AbstractModel
from autoshard.model.variables import ModelTable
from autoshard.pipeline import make_plan
from autoshard.planner.settling import worth_compiling
from autoshard.xla.clock import step_time
from autoshard.xla.compiled import CompiledStep
from autoshard.xla.partitioned import partitioned_seconds

MODELS = (
    "gemma_2b_en",
    "gemma_7b_en",
    "gemma2_2b_en",
    "gemma3_4b_text",
    "llama3_8b_en",
    "mistral_7b_en",
    "qwen2.5_7b_en",
    "qwen3_8b_en",
    "phi3_mini_4k_instruct_en",
    "mixtral_8_7b_en",
    "gpt2_large_en",
    "vit_large_patch16_224_imagenet",
    "bert_large_en_uncased",
)
UNSEEN = (
    "smollm3_3b_en",
    "opt_2.7b_en",
    "bloom_3b_multi",
    "falcon_refinedweb_1b_en",
    "gpt_oss_20b_en",
    "qwen1.5_moe_2.7b_en",
    "qwen3_moe_30b_a3b_en",
    "flan_large_multi",
    "bart_large_en",
    "t5gemma_2b_2b_prefixlm",
    "deberta_v3_large_en",
    "albert_extra_extra_large_en_uncased",
    "f_net_large_en",
    "esm2_t33_650M",
    "dinov2_giant",
    "pali_gemma_3b_224",
)
TRAINED = ("gemma_2b_en", "llama3_8b_en", "qwen3_8b_en")
MESHES = ("1x8", "2x4", "4x2", "8x1")
WORKLOADS = ("prefill", "decode", "train")
# The first by the formulas, then the others that `--verify target` compiles.
OURS = ("autoshard", "autoshard, second", "autoshard, third", "autoshard, fourth")
HAND = "megatron"
NO_RULE = "no rule"
RIVALS = ("announcement", "kerashub", "largest dimension", HAND, NO_RULE)
RESULTS = Path(__file__).parent / "results" / "rivals.jsonl"
UNSEEN_RESULTS = RESULTS.with_name("unseen.jsonl")
WHOLE_RESULTS = RESULTS.with_name("whole.jsonl")
UNSEEN_MESHES = ("1x8", "2x4")
# With all blocks, where a mesh of data alone leaves maps little to choose.
DECODE_MESHES = ("1x8", "2x4", "4x2")
KEY = ("model", "mesh", "workload", "layout", "rules", "target", "versions")
_TOO_BIG = "too big"


def main() -> None:
    arguments = _arguments()
    path = UNSEEN_RESULTS if arguments.unseen else RESULTS
    results = Results(path=path, fields=KEY)
    plan_here()
    if arguments.close or arguments.whole:
        whole = Results(path=WHOLE_RESULTS, fields=KEY)
        answer_all(_whole_models(results, arguments), whole, retry_errors=arguments.retry_errors)
    elif not arguments.table:
        answer_all(_questions(arguments), results, retry_errors=arguments.retry_errors)
    table = compact_table if arguments.compact else rivals_table
    print(table(entries(results, arguments), OURS, RIVALS, HAND))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", nargs="+", choices=(*MODELS, *UNSEEN), metavar="NAME")
    parser.add_argument("--meshes", nargs="+", choices=MESHES, metavar="MESH")
    parser.add_argument("--workload", nargs="+", choices=WORKLOADS)
    parser.add_argument(
        "--unseen", action="store_true", help="the models that no rule was made for"
    )
    parser.add_argument("--only", choices=("ours", "rivals"), help="whose layouts to compile")
    parser.add_argument("--close", action="store_true", help="all blocks where it is close")
    parser.add_argument("--whole", action="store_true", help="all blocks, in every row")
    parser.add_argument("--table", action="store_true", help="compile nothing, print the table")
    parser.add_argument("--compact", action="store_true", help="a line a model, as Markdown")
    parser.add_argument(
        "--links", action="store_true", help="time collectives on the mesh's links, not a ring"
    )
    parser.add_argument("--retry-errors", action="store_true", help="ask again where that failed")
    arguments = parser.parse_args()
    models = UNSEEN if arguments.unseen else MODELS
    arguments.models = arguments.models or models
    if not set(arguments.models) <= set(models):  # their verdicts are kept in another file
        parser.error(f"with{'' if arguments.unseen else 'out'} --unseen: {', '.join(models)}")
    arguments.workload = arguments.workload or (WORKLOADS[:1] if arguments.unseen else WORKLOADS)
    return arguments


def _meshes(arguments: argparse.Namespace, workload: str) -> Sequence[str]:
    """The meshes asked for, by default those of a workload."""
    default = DECODE_MESHES if workload == "decode" else MESHES
    meshes: Sequence[str] = arguments.meshes or (UNSEEN_MESHES if arguments.unseen else default)
    return meshes


def _questions(arguments: argparse.Namespace) -> Iterator[Question]:
    """All that is to be compiled, the forward passes first, model by model."""
    for workload in arguments.workload:
        for name in arguments.models:
            if workload == "train" and name not in TRAINED:
                continue
            model = build(name)
            if workload == "decode" and not model.generates:
                continue
            for mesh in _meshes(arguments, workload):
                for layout, rules in _layouts(model, mesh, workload, arguments.only):
                    yield Question(
                        model=name,
                        mesh=mesh,
                        workload=workload,
                        layout=layout,
                        rules=rules,
                        target=verdict_target(),
                    )


def _layouts(
    model: AbstractModel, mesh: str, workload: str, only: str | None
) -> Iterator[tuple[str, LayoutRules]]:
    if only != "ours":
        yield from rivals(model, parse_mesh(mesh))
    if only == "rivals" and model.name not in UNSEEN:
        return
    setup = setup_of(mesh, workload)
    outcome = make_plan(
        model.name,
        mesh,
        target=setup.target,
        workload=workload,
        batch=BATCH,
        seq_len=SEQ_LEN,
        verify="none",
    )
    planning = outcome.planning
    if only != "rivals":
        candidates = worth_compiling(planning, setup.target)
        yield from zip(OURS, (candidate.rules for candidate in candidates), strict=False)
    if only != "ours" and model.name in UNSEEN:
        if planning.by_hand:
            yield HAND, planning.by_hand.rules
        yield NO_RULE, ()


def _whole_models(results: Results, arguments: argparse.Namespace) -> Iterator[Question]:
    """Our first and fastest, and the best rival; by default where some blocks tell too little."""
    rows = {
        (row["model"], row["mesh"], row["workload"]["kind"], row["layout"]): row
        for row in _shown(results, arguments)
    }
    for cell in cells(entries(results, arguments)):
        if PERIODS[cell.workload] is None:
            continue
        if not (arguments.whole or cell.needs_whole(OURS, RIVALS)):
            continue
        several = (cell.fastest(names) for names in (OURS[:1], OURS, RIVALS))
        for entry in dict.fromkeys(filter(None, several)):
            row = rows[entry.model, entry.mesh, entry.workload, entry.layout]
            yield Question(
                model=entry.model,
                mesh=entry.mesh,
                workload=entry.workload,
                layout=entry.layout,
                rules=rules_of(row),
                target=row["target"],
                is_whole=True,
            )


def entries(results: Results, arguments: argparse.Namespace) -> Iterator[Entry]:
    """The verdicts that the table shows, in its order."""
    whole_models = Results(path=WHOLE_RESULTS, fields=KEY)
    for name, several in groupby(_shown(results, arguments), key=lambda row: row["model"]):
        table = build(name).table()
        for row in several:
            whole = whole_models.rows.get(whole_models.key(row))
            yield _entry(row, whole, table, arguments.links)


def _shown(results: Results, arguments: argparse.Namespace) -> list[Row]:
    """The rows of what is asked for, by the compiler and the versions that are here, in order."""
    places = {name: place for place, name in enumerate((*MODELS, *UNSEEN))}
    versions = installed_versions()
    rows = [
        row
        for row in results.rows.values()
        if (row["target"], row["versions"]) == (verdict_target(), versions)
        and row["model"] in arguments.models
        and row["workload"]["kind"] in arguments.workload
        and row["mesh"] in _meshes(arguments, row["workload"]["kind"])
    ]
    # The sort is stable: of two plans for one place the later verdict stays the later.
    rows.sort(
        key=lambda row: (
            WORKLOADS.index(row["workload"]["kind"]),
            places[row["model"]],
            MESHES.index(row["mesh"]),
        )
    )
    return rows


def _entry(row: Row, whole: Row | None, table: ModelTable, links: bool) -> Entry:
    mesh, kind = parse_mesh(row["mesh"]), row["workload"]["kind"]
    step, whole_step = compiled(row), compiled(whole) if whole else None
    seconds, note, fits = None, _word(row.get("error", "")), True
    if step is not None:
        seconds = _seconds(row, step, mesh if links else None)
        held = held_bytes(table, rules_of(row), mesh, kind)
        fits = held <= parse_target(TARGET).chip.hbm_bytes
        fits = fits and not (whole and _word(whole.get("error", "")) == _TOO_BIG)
    return Entry(
        model=row["model"],
        mesh=row["mesh"],
        workload=kind,
        layout=row["layout"],
        seconds=seconds,
        note=note,
        fits=fits,
        whole_seconds=_seconds(row, whole_step, mesh if links else None) if whole_step else None,
    )


def _word(error: str) -> str:
    """An error as a word of the table."""
    words = {"LayoutError": "refused", "OutOfMemoryError": _TOO_BIG}
    return words.get(error.partition(":")[0], "failed") if error else ""


def _seconds(row: Row, step: CompiledStep, mesh: Mesh | None) -> float | None:
    """The time of a program: its compiler's clock, or predicted compute where there is none."""
    if step.estimated_cycles is not None:
        return step_time(step, mesh).step_seconds
    kind = row["workload"]["kind"]
    cost = predicted_cost(row["model"], row["mesh"], kind, rules_of(row))
    setup = setup_of(row["mesh"], kind)
    return None if cost is None else partitioned_seconds(step, cost, setup.mesh, setup.target)


if __name__ == "__main__":
    main()
