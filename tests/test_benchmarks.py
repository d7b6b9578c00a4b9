"""The parts of the benchmarks that compile nothing: layouts, results, tables and statistics."""

import json
import math
import statistics
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import catalogue
import fidelity
import kept
import layouts
import maps
import pytest
import rivals
import scaling
from layout_tables import MESH, gemma_table
from scores import Pair, byte_error, quantile, score, spearman
from tables import Entry, cells, compact_table, rivals_table
from verdicts import Question, Results

from autoshard.layout.resolve import resolve
from autoshard.layout.rules import Rule
from autoshard.mesh import parse_mesh
from autoshard.model.catalogue import get, names
from autoshard.model.variables import make_table


class GemmaBackbone:
    """Stands for KerasHub's: the maps look at the name of the class."""


GEMMA = SimpleNamespace(backbone=GemmaBackbone(), table=gemma_table)
SPLIT = (Rule(pattern=r"decoder_block_\d+/ffw_gating/kernel", spec=(None, "model")),)


def question(**changes):
    given = {
        "model": "gemma_7b_en",
        "mesh": "1x8",
        "workload": "prefill",
        "layout": "by hand",
        "rules": SPLIT,
        "target": "cpu:8",
    }
    return Question(**{**given, **changes})


def entry(layout, seconds, **changes):
    given = {"model": "m", "mesh": "1x8", "workload": "prefill"}
    return Entry(**{**given, "layout": layout, "seconds": seconds, **changes})


def pair(predicted_bytes, compiled_bytes, predicted_seconds=1.0, compiled_seconds=1.0):
    return Pair(
        layout="one",
        predicted_bytes=predicted_bytes,
        compiled_bytes=compiled_bytes,
        predicted_seconds=predicted_seconds,
        compiled_seconds=compiled_seconds,
    )


def test_every_model_of_the_benchmarks_is_in_the_catalogue() -> None:
    used = {
        *rivals.MODELS,
        *rivals.UNSEEN,
        *rivals.TRAINED,
        *fidelity.DEVELOPMENT,
        *fidelity.HELD_OUT,
    }
    assert used <= set(names())
    assert not set(fidelity.DEVELOPMENT) & set(fidelity.HELD_OUT)


def test_megatron_leaves_out_what_does_not_divide() -> None:
    rules = maps.megatron_rules("GemmaBackbone", gemma_table(), MESH)
    # 16 heads over 8 devices divide, over 32 they do not; 256,000 and 24,576 divide by 32.
    wide = maps.megatron_rules("GemmaBackbone", gemma_table(), parse_mesh("1x32"))
    assert {r.pattern for r in rules} - {r.pattern for r in wide} == {
        r"decoder_block_\d+/attention/query/kernel",
        r"decoder_block_\d+/attention/(key|value)/kernel",
        r"decoder_block_\d+/attention/attention_output/kernel",
    }


def test_the_shape_rule_takes_the_later_of_two_equal_dimensions() -> None:
    table = make_table(
        "toy",
        [
            ("square/kernel", (512, 512), "bfloat16", True),
            ("odd/kernel", (1001, 512), "bfloat16", True),
            ("tiny/kernel", (8, 8), "bfloat16", True),
            ("norm/scale", (65536,), "bfloat16", True),
        ],
        [],
        [],
    )
    rules = maps.largest_dimension_rules(table, MESH)
    assert rules == (Rule(pattern="(square|odd)/kernel", spec=(None, "model")),)


@pytest.mark.parametrize("mesh", fidelity.MESHES)
def test_there_are_twenty_legal_layouts_and_always_the_same(mesh: str, monkeypatch) -> None:
    monkeypatch.setattr(layouts, "rivals", lambda model, mesh: [("by hand", SPLIT)])
    found = layouts.fixed_layouts(GEMMA, parse_mesh(mesh))
    assert found == layouts.fixed_layouts(GEMMA, parse_mesh(mesh))
    assert len(found) >= 20
    assert len({rules for _, rules in found}) == len(found)
    for _, rules in found:
        resolve(rules, gemma_table(), parse_mesh(mesh)).checked()


def test_legal_specs_put_an_axis_on_one_dimension_and_a_dimension_under_one_axis() -> None:
    # Two axes on two dimensions: each on none or one of two, less the 2 where they meet.
    assert len(layouts.legal_specs((8, 8), parse_mesh("2x4"))) == 3 * 3 - 2


def test_an_answer_is_found_again(tmp_path: Path) -> None:
    path = tmp_path / "results" / "some.jsonl"
    fields = ("model", "mesh", "workload", "layout", "rules", "target", "versions")
    first = Results(path=path, fields=fields)
    row = question().row()
    first.add(row | {"error": "XlaError: no", "seconds": 1.0})
    first.add(row | {"compiled": {"collectives": []}, "seconds": 2.0})
    again = Results(path=path, fields=fields)
    assert len(path.read_text().splitlines()) == 2
    assert list(again.rows.values()) == [json.loads(path.read_text().splitlines()[1])]
    assert again.key(question(mesh="2x4").row()) not in again.rows


def test_the_plan_of_a_newer_planner_is_the_last_of_its_name() -> None:
    results = Results(path=Path("none"), fields=("layout", "rules"))
    old, new = (question(rules=rules).row() for rules in (SPLIT, ()))
    results.rows = {results.key(row): row for row in (old, new)}
    assert results.is_last(new)
    assert not results.is_last(old)


def test_axes_of_one_device_make_no_other_program() -> None:
    results = Results(path=Path("none"), fields=("layout", "rules"))
    row = question(mesh="8x1").row() | {"compiled": {"collectives": []}}
    results.rows = {results.key(row): row}
    assert results.same_program(question(mesh="8x1", rules=(), layout="nothing").row())
    assert results.same_program(question(rules=(), layout="nothing").row()) is None
    # A rule that keeps an output whole is not the same as none.
    output = (Rule(pattern="block/output", spec=("model", None)),)
    assert results.same_program(question(mesh="8x1", rules=output).row()) is None


def test_a_rival_that_does_not_fit_is_no_rival() -> None:
    (cell,) = cells(
        [
            entry("ours", 3.0),
            entry("ours", 2.0),
            entry("shape", 1.0, fits=False),
            entry("hand", 2.5),
            entry("kerashub", None, note="refused"),
        ]
    )
    # The later of two verdicts under one name counts: 2.0 against 2.5.
    assert cell.ratio(["ours"], ("shape", "hand", "kerashub")) == 2.0 / 2.5
    assert cell.ratio(["ours"], ("kerashub",)) is None
    # Of several candidates the fastest does.
    assert cell.ratio(["hand", "ours"], ["hand"]) == 2.0 / 2.5


def test_the_table_shows_marks_and_means() -> None:
    text = rivals_table(
        [
            entry("ours", 2e-3),
            entry("hand", 4e-3),
            entry("ours", 5e-3, mesh="8x1"),
            entry("hand", 5e-3, mesh="8x1"),
            entry("ours", 5e-3, mesh="2x4"),
            entry("hand", 1e-3, mesh="2x4", fits=False),
            entry("ours", 5e-3, mesh="4x2"),
            entry("hand", None, mesh="4x2", note="refused"),
            entry("ours", 6e-3, mesh="1x4"),
            entry("ours, second", 2e-3, mesh="1x4"),
            entry("hand", 4e-3, mesh="1x4"),
        ],
        ("ours", "ours, second"),
        ("hand",),
        "hand",
    )
    assert "1.00!" in text
    assert "refused" in text
    assert "rows with ours and a rival that fits: 3; slower by more than 1%: 0" in text
    assert "with the first candidate alone 1" in text
    # Twice as fast, as fast, and twice as fast: the third root of 2 x 1 x 2.
    assert text.splitlines()[-1].split() == ["prefill", "1.587", "3", "2.000", "1"]


def test_the_compact_table_has_a_line_a_model() -> None:
    text = compact_table(
        [
            entry("ours", 4e-3),
            entry("hand", 6e-3),
            entry("ours", 2e-3, mesh="8x1"),
            entry("hand", None, mesh="8x1", note="refused"),
        ],
        ("ours", "ours, second"),
        ("hand",),
        "hand",
    )
    assert "4.00 / 6.00 | 2.00 / none" in text
    # The best mesh's 2 ms against 6 ms by hand on 1x8.
    assert text.splitlines()[-1].replace(" ", "") == "|prefill|1.500|1|3.000|1|"


def test_close_calls_are_told_by_whole_models() -> None:
    ours, hand = entry("ours", 7.1e-3), entry("hand", 7.0e-3)
    (cell,) = cells([ours, hand])
    assert cell.needs_whole(["ours"], ["hand"])
    assert cell.ratio(["ours"], ["hand"]) > 1.01
    assert cell.text(["ours"], ["hand"]) == "7.10 / 7.00"
    whole = [replace(ours, whole_seconds=25e-3), replace(hand, whole_seconds=26e-3)]
    (cell,) = cells(whole)
    assert cell.ratio(["ours"], ["hand"]) == pytest.approx(25 / 26)
    assert cell.text(["ours"], ["hand"]) == "7.10 / 7.00 (25.00 / 26.00)"
    for other in (replace(hand, seconds=7.1e-3), replace(hand, seconds=8e-3)):
        (cell,) = cells([ours, other])
        assert not cell.needs_whole(["ours"], ["hand"])


def test_a_first_candidate_that_is_behind_is_compiled_whole() -> None:
    first, second, hand = (
        entry(name, seconds) for name, seconds in (("ours", 9e-3), ("second", 5e-3), ("hand", 7e-3))
    )
    (cell,) = cells([first, second, hand])
    assert cell.needs_whole(["ours", "second"], ["hand"])
    assert not cell.needs_whole(["second", "ours"], ["hand"])
    (cell,) = cells(
        [
            replace(first, whole_seconds=20e-3),
            replace(second, whole_seconds=24e-3),
            replace(hand, whole_seconds=30e-3),
        ]
    )
    # of whole models the first is the fastest, whatever some blocks say
    assert cell.ratio(["ours", "second"], ["hand"]) == pytest.approx(20 / 30)
    assert cell.text(["ours", "second"], ["hand"]) == "5.00 / 7.00 (20.00 / 30.00)"


def test_spearman_shares_ranks_and_knows_no_constant() -> None:
    assert spearman([1.0, 2.0, 3.0], [10.0, 20.0, 30.0]) == 1.0
    assert spearman([1.0, 2.0, 3.0], [3.0, 2.0, 1.0]) == -1.0
    assert math.isnan(spearman([1.0, 1.0], [1.0, 2.0]))


def test_a_byte_error_is_relative_to_a_mebibyte_at_least() -> None:
    assert byte_error(pair(3 * 2**20, 2 * 2**20)) == 0.5
    assert byte_error(pair(2**19, 0)) == 0.5


def test_a_quantile_is_a_value_of_the_set() -> None:
    assert quantile([float(n) for n in range(1, 11)], 0.9) == 9.0


def test_regret_is_what_the_choice_costs_over_the_best() -> None:
    found = score([pair(0, 0, 1.0, 3.0), pair(0, 0, 2.0, 2.0), pair(0, 0, 3.0, 4.0)])
    assert found.regret == 0.5
    assert found.median_error == 0.0
    assert math.isnan(found.peak_error)


def test_presets_of_one_configuration_are_planned_once() -> None:
    groups = catalogue.distinct(["gemma_2b_en", "gemma_7b_en", "code_gemma_2b_en"])
    assert groups == [("gemma_2b_en", "code_gemma_2b_en"), ("gemma_7b_en",)]


def test_a_preset_that_cannot_be_planned_is_a_row(monkeypatch) -> None:
    def fails(*args, **kwargs):
        raise ZeroDivisionError("no")

    monkeypatch.setattr(catalogue, "make_plan", fails)
    line, seconds = catalogue.planned(("one", "two"), "1x8", "train")
    assert len(line) == len(catalogue.HEADERS)
    assert (line[0], line[-1], seconds) == ("one and 1 like it", "ZeroDivisionError: no", None)
    assert catalogue.summary([], 1) == "0 of 1 configurations planned"


def test_scaling_plans_every_depth_on_one_mesh_and_the_preset_on_every_mesh() -> None:
    asked = []

    def planned(model, mesh, *, target):
        asked.append((model, mesh))
        timings = {scaling.BUILD: 1.0, "trace the step": 0.25, "search": 0.5}
        predicted = SimpleNamespace(step_seconds=0.1)
        plan = SimpleNamespace(predicted=predicted, fits=True)
        return SimpleNamespace(timings=timings, plan=plan)

    rows = list(scaling.rows(get("gemma_2b_en"), planned))
    assert [row[:2] for row in rows[:4]] == [
        ("2", "1x8"),
        ("8", "1x8"),
        ("28", "1x8"),
        ("80", "1x8"),
    ]
    assert asked[4:] == [("gemma_2b_en", mesh) for mesh, _ in scaling.MESHES]
    assert rows[4][0] == "18"
    assert rows[4][3:] == ("1.00 s", "0.25 s", "0.50 s", "0.75 s", "100 ms", "yes")


# The medians allowed of the errors of memory and of the step, and the rank correlation asked for:
# plans that decode are within a few percent of each other.
@pytest.mark.parametrize(
    ("workload", "memory", "seconds", "ranks"),
    [("prefill", 0.02, 0.05, 0.9), ("decode", 0.05, 0.1, 0.8), ("train", 0.066, 0.04, 0.85)],
)
def test_the_predicted_peak_and_step_are_those_of_the_tpu_compiler(
    workload: str, memory: float, seconds: float, ranks: float
) -> None:
    """The programs are those that are kept, so no compiler is needed."""
    programs = list(kept.programs([workload], ["llama3_8b_en"]))
    errors = [abs(one.memory_error) for one in programs if one.memory_error is not None]
    assert len(errors) >= 10
    assert statistics.median(errors) < memory
    assert statistics.median(abs(one.step_error) for one in programs) < seconds
    assert float(kept.ranks(programs)) > ranks
