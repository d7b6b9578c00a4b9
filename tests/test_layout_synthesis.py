"""From specs of families to short rules that Keras resolves to exactly those specs."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from layout_tables import MESH, gemma_table, mixtral_table

from autoshard.errors import LayoutError, UnknownNameError
from autoshard.layout.resolve import resolve
from autoshard.layout.rules import Rule, format_rules, match
from autoshard.layout.synthesis import synthesise, tied_families
from autoshard.mesh import Spec
from autoshard.model.variables import ModelTable, make_table

ROWS, COLUMNS = ("model", None), (None, "model")
HEADS = ("model", None, None)
MEGATRON: dict[str, Spec] = {
    "token_embedding/embeddings": ROWS,
    "decoder_block_*/attention/query/kernel": HEADS,
    "decoder_block_*/attention/key/kernel": HEADS,
    "decoder_block_*/attention/value/kernel": HEADS,
    "decoder_block_*/attention/attention_output/kernel": HEADS,
    "decoder_block_*/ffw_gating/kernel": COLUMNS,
    "decoder_block_*/ffw_gating_2/kernel": COLUMNS,
    "decoder_block_*/ffw_linear/kernel": ROWS,
    "final_normalization/scale": (None,),
}


def patterns(rules: tuple[Rule, ...]) -> list[str]:
    return [rule.pattern for rule in rules]


def table_of(*paths: str, shape: tuple[int, ...] = (8, 8)) -> ModelTable:
    return make_table("model", [(path, shape, "float32", True) for path in paths])


def test_gemma_split_over_heads_and_ffn_takes_four_readable_rules() -> None:
    assert format_rules(synthesise(gemma_table(), MEGATRON)) == (
        'layout_map["token_embedding/embeddings"] = ("model", None)\n'
        'layout_map[r"decoder_block_\\d+/attention/(query|key|value|attention_output)/kernel"] = '
        '("model", None, None)\n'
        'layout_map[r"decoder_block_\\d+/ffw_gating(_2)?/kernel"] = (None, "model")\n'
        'layout_map[r"decoder_block_\\d+/ffw_linear/kernel"] = ("model", None)'
    )


def test_lora_factors_get_rules_of_their_own() -> None:
    factors = {
        "decoder_block_*/attention/query/lora_kernel_a": HEADS,
        "decoder_block_*/attention/value/lora_kernel_a": HEADS,
    }
    rules = synthesise(gemma_table(lora=True), MEGATRON | factors)
    assert patterns(rules)[1:3] == [
        r"decoder_block_\d+/attention/(query|key|value|attention_output)/kernel",
        r"decoder_block_\d+/attention/(query|value)/lora_kernel_a",
    ]


def test_an_output_gets_a_rule_after_the_weights() -> None:
    rules = synthesise(gemma_table(), MEGATRON, {"decoder_block_*/output": ("batch", None, None)})
    assert rules[-1] == Rule(pattern=r"decoder_block_\d+/output", spec=("batch", None, None))
    assert resolve(rules, gemma_table(), MESH).outputs == {
        "decoder_block_0/output": ("batch", None, None),
        "decoder_block_1/output": ("batch", None, None),
    }


def test_rules_hold_for_a_model_built_later_in_the_process() -> None:
    # The second Mixtral of a process has sparse_moe_block_2 and _3 where the first has none and _1.
    chosen: dict[str, Spec] = {
        "transformer_layer_*/sparse_moe_block/experts/gate_dense": (None, None, "model"),
        "transformer_layer_*/sparse_moe_block/experts/output_dense": (None, "model", None),
    }
    rules = synthesise(mixtral_table(), chosen)
    assert patterns(rules) == [
        r"transformer_layer_\d+/sparse_moe_block(_\d+)?/experts/gate_dense",
        r"transformer_layer_\d+/sparse_moe_block(_\d+)?/experts/output_dense",
    ]
    first, later = mixtral_table(), mixtral_table(first_number=2)
    assert first.fingerprint == later.fingerprint
    assert resolve(rules, first).assignment == resolve(rules, later).assignment


def test_an_anchor_is_added_only_where_re_search_would_take_too_much() -> None:
    # "a/kernel" is found in "a/kernel_scale", "b/kernel" in "xb/kernel", "c/kernel" in both.
    table = table_of(
        "a/kernel", "a/kernel_scale", "b/kernel", "xb/kernel", "c/kernel", "c/kernel_2", "xc/kernel"
    )
    assert patterns(synthesise(table, {"a/kernel": ROWS})) == ["a/kernel$"]
    assert patterns(synthesise(table, {"b/kernel": ROWS})) == ["^b/kernel"]
    assert patterns(synthesise(table, {"c/kernel": ROWS})) == ["^c/kernel$"]


def test_a_weight_rule_misses_the_lora_and_adafactor_factors_that_come_later() -> None:
    # Unanchored, "w" would be found in "lora_w_a"; "w$" in "adafactor/w".
    assert patterns(synthesise(table_of("w"), {"w": ROWS})) == ["^w"]


def test_layers_of_other_shape_are_listed_when_their_spec_differs() -> None:
    shapes = {0: (8, 8), 1: (8, 16), 2: (8, 8), 10: (8, 8)}
    table = make_table(
        "model", [(f"block_{k}/mlp/kernel", shape, "float32", True) for k, shape in shapes.items()]
    )
    small, large = "block_*/mlp/kernel [8x8]", "block_*/mlp/kernel [8x16]"
    assert patterns(synthesise(table, {small: ROWS, large: COLUMNS})) == [
        "block_(0|2|10)/mlp/kernel",
        "block_1/mlp/kernel",
    ]
    assert patterns(synthesise(table, {small: ROWS, large: ROWS})) == [r"block_\d+/mlp/kernel"]


def test_where_most_blocks_want_one_spec_the_others_are_left_out() -> None:
    shapes = {k: (4, 8) if k % 6 == 5 else (8, 8) for k in range(34)}
    table = make_table(
        "model", [(f"block_{k}/mlp/kernel", shape, "float32", True) for k, shape in shapes.items()]
    )
    few, most = "block_*/mlp/kernel [4x8]", "block_*/mlp/kernel [8x8]"
    assert sorted(patterns(synthesise(table, {few: COLUMNS, most: ROWS}))) == [
        "block_(5|11|17|23|29)/mlp/kernel",
        r"block_(?!(5|11|17|23|29)/)\d+/mlp/kernel",
    ]


def test_a_layer_named_after_the_numbered_one_that_it_is_in_is_not_spelt_out() -> None:
    ends, kinds = ("start", "end"), ("q", "k")
    layers = [f"net_{k}_{end}_{kind}" for k in range(3) for end in ends for kind in kinds]
    table = table_of(*(f"{layer}/{layer}_dense/kernel" for layer in layers))
    families = {family.name: ROWS for family in table.families()}
    assert len(families) == 4
    assert patterns(synthesise(table, families)) == [
        r"net_\d+_(start_q|start_k|end_q|end_k)/\w+_dense/kernel"
    ]


def test_layers_of_one_spec_that_differ_in_a_number_get_one_rule() -> None:
    table = table_of(*(f"moe_{k}/{name}" for k in range(12) for name in ("w1", "w2")), "moe_x/w1")
    families = {f"moe_{k}/{name}": ROWS for k in range(12) for name in ("w1", "w2")}
    assert patterns(synthesise(table, families)) == [r"moe_\d+/(w1|w2)"]
    # one that wants another spec leaves a list
    found = patterns(synthesise(table, families | {"moe_7/w1": COLUMNS}))
    assert r"moe_\d+/w2" in found and "moe_7/w1" in found


def test_numbers_that_tell_layers_apart_are_kept() -> None:
    table = table_of(*(f"block_{k}/mlp_dense_{n}/kernel" for k in range(30) for n in (1, 2)))
    families = {family.name: ROWS for family in table.families()}
    assert patterns(synthesise(table, families)) == [r"block_\d+/mlp_dense_(1|2)/kernel"]
    families["block_*/mlp_dense_2/kernel"] = COLUMNS
    assert patterns(synthesise(table, families)) == [
        r"block_\d+/mlp_dense_1/kernel",
        r"block_\d+/mlp_dense_2/kernel",
    ]


def test_a_merge_never_takes_a_path_that_is_not_among_its_own() -> None:
    # (a|b)/(p|q) would also take b/q.
    table = table_of("a/p", "a/q", "b/p", "b/q")
    assert patterns(synthesise(table, {"a/p": ROWS, "a/q": ROWS, "b/p": ROWS})) == [
        "(a|b)/p",
        "a/q",
    ]


def test_signs_of_regular_expressions_in_a_path_are_escaped() -> None:
    table = table_of("a.b(c)/kernel", "aXb(c)/kernel")
    rules = synthesise(table, {"a.b(c)/kernel": ROWS})
    assert patterns(rules) == [r"a\.b\(c\)/kernel"]
    assert match(rules, "a.b(c)/kernel") == ROWS


def test_families_of_one_path_that_want_different_specs_are_refused() -> None:
    # SmolLM3 names all its output projections o_proj/kernel.
    table = make_table(
        "model",
        [("o_proj/kernel", (8, 8), "float32", True), ("o_proj/kernel", (8, 16), "float32", True)],
    )
    names = ("o_proj/kernel [8x8]", "o_proj/kernel [8x16]")
    assert tied_families(table) == (names,)
    with pytest.raises(LayoutError) as error:
        synthesise(table, {names[0]: ROWS})
    assert str(error.value) == (
        "families 'o_proj/kernel [8x8]' ((\"model\", None)) and 'o_proj/kernel [8x16]' "
        "(replicated) share the path 'o_proj/kernel', so no rule can tell them apart; give both "
        "the same spec"
    )
    assert patterns(synthesise(table, dict.fromkeys(names, ROWS))) == ["o_proj/kernel"]


def test_families_of_their_own_paths_are_not_tied() -> None:
    assert tied_families(gemma_table()) == ()


def test_a_family_that_does_not_exist_is_refused_with_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match=r"did you mean decoder_block_\*/ffw_linear/kernel"):
        synthesise(gemma_table(), {"decoder_block/ffw_linear/kernel": ROWS})
    with pytest.raises(UnknownNameError, match=r"unknown layer output 'decoder_block/output'"):
        synthesise(gemma_table(), {}, {"decoder_block/output": ROWS})


def test_a_replicated_model_needs_no_rules() -> None:
    assert synthesise(gemma_table(), {}) == ()


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_every_path_resolves_to_what_was_chosen(data: st.DataObject) -> None:
    table = data.draw(st.sampled_from([gemma_table(), gemma_table(lora=True), mixtral_table()]))
    chosen = {}
    for family in table.families():
        rank = len(family.shape)
        split = data.draw(st.sampled_from([None, *range(rank)]))
        chosen[family.name] = tuple("model" if k == split else None for k in range(rank))
    rules = synthesise(table, chosen)
    resolution = resolve(rules, table)
    assert resolution.findings == ()
    assert resolution.assignment == chosen
    assert resolution.outputs == {}
    # As older versions of Keras matched.
    for variable in table.variables:
        found = match(rules, variable.path, "search") or (None,) * len(variable.shape)
        assert found == chosen[variable.family]
