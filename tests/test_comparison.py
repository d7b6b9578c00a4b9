"""Layouts side by side: the same prices as the planner's, and refused maps among them."""

import json
from pathlib import Path

import pytest
from test_end_to_end import small_gemma_backbone

import autoshard
from autoshard.comparison import compare
from autoshard.errors import UsageError
from autoshard.report.compare import comparison_json, comparison_text

OPTIONS = {"mesh": "1x8", "dtype": "float32", "seq_len": 16, "batch": 8}
WHOLE = 'layout_map["nothing"] = (None,)'
CONTRACTED = r'layout_map[r"decoder_block_\d+/ffw_gating(_2)?/kernel"] = ("model", None)'


def test_a_plan_its_file_and_the_planner_s_word_are_one_layout(tmp_path: Path) -> None:
    options = {**OPTIONS, "mesh": "2x4"}
    plan = autoshard.plan(small_gemma_backbone, **options)
    path = tmp_path / "plan.json"
    plan.save(path)
    found = compare(small_gemma_backbone, [plan, path, "autoshard"], **options)
    assert {layout.rules for layout in found.layouts} == {plan.rules}
    assert {layout.predicted for layout in found.layouts} == {plan.predicted}


def test_a_split_contracting_dimension_names_its_rule_and_its_collective() -> None:
    found = compare(small_gemma_backbone, [CONTRACTED, WHOLE], **OPTIONS)
    layout = next(one for one in found.layouts if one.rules[0].spec == ("model", None))
    split = [
        one for one in layout.collectives if one.layer.startswith("decoder_block_*/ffw_gating")
    ]
    assert split[0].kind == "all-reduce"
    assert split[0].cause == r"decoder_block_\d+/ffw_gating(_2)?/kernel"


def test_what_another_layer_s_rule_brings_about_names_that_rule() -> None:
    # Rows of position embeddings split the sequence: the gradient of the token embedding, which no
    # rule splits, is summed over it.
    rules = r"""
layout_map["position_embedding/embeddings"] = ("model", None)
layout_map[r"transformer_layer_\d+/feedforward_output_dense/kernel"] = ("model", None)
"""
    (layout,) = compare("gpt2_base_en", [rules], "1x8", seq_len=64).layouts
    causes = {(item.kind, item.layer): item.cause for item in layout.collectives}
    assert causes["all-reduce", "token_embedding"] == "position_embedding/embeddings"
    patterns = {rule.pattern for rule in layout.rules}
    assert set(causes.values()) <= {*patterns, "several rules"}


def test_what_comes_of_no_rule_comes_of_the_split_of_the_data() -> None:
    (layout,) = compare(small_gemma_backbone, [WHOLE], **{**OPTIONS, "mesh": "8x1"}).layouts
    assert {item.cause for item in layout.collectives} == {"the split of the data"}


def test_no_cause_is_made_up_where_a_rule_shields_a_wrong_one() -> None:
    # Without its first rule Keras refuses the map: 64 rows of 64 have no third dimension.
    rules = """
layout_map["token_embedding/embeddings"] = ("model", None)
layout_map["token_.*"] = ("model", None, None)
"""
    (layout,) = compare(small_gemma_backbone, [rules], **OPTIONS).layouts
    assert not layout.failure
    assert {item.cause for item in layout.collectives} == {None}


def test_a_map_is_priced_as_its_source() -> None:
    layout_map = {r"decoder_block_\d+/ffw_gating(_2)?/kernel": ("model", None)}
    found = compare(small_gemma_backbone, [layout_map, CONTRACTED], **OPTIONS)
    assert {layout.name for layout in found.layouts} == {"map", "source"}
    assert len({layout.predicted for layout in found.layouts}) == 1
    with pytest.raises(UsageError, match="the layout is 3; give a path"):
        compare(small_gemma_backbone, [3], **OPTIONS)  # type: ignore[list-item]


def test_what_no_rule_splits_is_counted_whole() -> None:
    table = autoshard.inspect(small_gemma_backbone, dtype="float32")
    (layout,) = compare(small_gemma_backbone, [WHOLE], **OPTIONS).layouts
    assert layout.whole_bytes == table.n_bytes


def test_a_map_that_keras_refuses_comes_last_with_its_reason() -> None:
    refused = 'layout_map["token_embedding/embeddings"] = ("model", None, None)'
    found = compare(small_gemma_backbone, [refused, WHOLE], **OPTIONS)
    assert [bool(layout.failure) for layout in found.layouts] == [False, True]
    assert "(64, 64)" in found.layouts[1].failure


def test_files_that_cannot_be_read_hide_no_other(tmp_path: Path) -> None:
    for name, text in (("broken.json", "{"), ("empty.py", "x = 1")):
        (tmp_path / name).write_text(text)
    files = [tmp_path / "broken.json", tmp_path / "empty.py"]
    found = compare(small_gemma_backbone, [*files, WHOLE], **OPTIONS)
    assert [bool(layout.failure) for layout in found.layouts] == [False, True, True]
    with pytest.raises(UsageError, match="there is no layout"):
        compare(small_gemma_backbone, [WHOLE, str(tmp_path / "none.py")], **OPTIONS)


def test_a_rule_that_takes_nothing_is_pointed_at() -> None:
    found = compare(small_gemma_backbone, [WHOLE], **OPTIONS)
    assert "warning: rule 'nothing'" in comparison_text(found)


def test_a_plan_for_another_model_is_said_to_be_one() -> None:
    plan = autoshard.plan("bert_tiny_en_uncased", mesh="2x4", seq_len=16)
    (layout,) = compare(small_gemma_backbone, [plan], **OPTIONS).layouts
    assert any("bert_tiny_en_uncased" in warning for warning in layout.warnings)


def test_a_plan_for_another_mesh_or_step_is_said_to_be_one() -> None:
    plan = autoshard.plan(small_gemma_backbone, **{**OPTIONS, "mesh": "2x4"})
    (layout,) = compare(small_gemma_backbone, [plan], **OPTIONS, workload="prefill").layouts
    assert layout.warnings[0] == (
        "made for mesh 2x4 (batch, model), tpu:v5e:2x4, train: batch 8 x 16 tokens, float32, adam"
    )


def test_a_rule_for_what_the_chips_do_not_compute_is_said_to_do_nothing() -> None:
    path = r"decoder_block_\d+/attention/softmax(_\d+)?/output"
    rule = f'layout_map[r"{path}"] = (None, None, None, None, "model")'
    said = {}
    for target in ("tpu:v5e:2x4", "cpu:8"):
        (layout,) = compare(small_gemma_backbone, [rule], **OPTIONS, target=target).layouts
        said[target] = any("does nothing here" in warning for warning in layout.warnings)
    assert said == {"tpu:v5e:2x4": True, "cpu:8": False}


def test_text_and_json_hold_every_layout() -> None:
    found = compare(small_gemma_backbone, [CONTRACTED, "kerashub"], **OPTIONS)
    text = comparison_text(found)
    for layout in found.layouts:
        assert text.count(f"{layout.name}:") == 1
    record = json.loads(comparison_json(found))
    assert [len(layout["layout_map"]) for layout in record["layouts"]] == [
        len(layout.rules) for layout in found.layouts
    ]


def test_nothing_to_compare_is_said() -> None:
    with pytest.raises(UsageError, match="at least one layout"):
        compare(small_gemma_backbone, [], **OPTIONS)
    with pytest.raises(UsageError, match="give a list, also of one"):
        compare(small_gemma_backbone, "kerashub", **OPTIONS)
    with pytest.raises(UsageError, match="layouts is a dict; give a list, also of one"):
        compare(small_gemma_backbone, {}, **OPTIONS)  # type: ignore[arg-type]


def test_layouts_of_one_name_are_numbered_and_a_missing_one_is_said_at_once() -> None:
    source = 'm = LayoutMap(d)\nm["token_embedding/embeddings"] = ("model", None)'
    found = compare(small_gemma_backbone, [source, "kerashub", source], **OPTIONS)
    assert sorted(layout.name for layout in found.layouts) == ["kerashub", "source 1", "source 2"]
    said: list[str] = []
    with pytest.raises(UsageError, match="there is no layout 'missing.json'"):
        compare(small_gemma_backbone, ["missing.json"], on_progress=said.append, **OPTIONS)
    assert said == []
