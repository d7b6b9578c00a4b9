"""What a map does to a model, and the line that each fault of a map gets."""

import pytest
from layout_tables import MESH, gemma_table

from autoshard.errors import LayoutError
from autoshard.layout.published import ANNOUNCEMENT_MAP
from autoshard.layout.resolve import resolve
from autoshard.layout.rules import Rule
from autoshard.mesh import Mesh, Spec
from autoshard.model.variables import make_table

TABLE = gemma_table()


def rule(pattern: str, *spec: str | None) -> Rule:
    return Rule(pattern=pattern, spec=spec)


def found(*rules: Rule, mesh: Mesh = MESH) -> list[tuple[str, str]]:
    findings = resolve(rules, TABLE, mesh).findings
    return [(finding.severity, finding.message) for finding in findings]


def test_the_announcements_map_lays_out_the_hidden_dimensions_of_gemma() -> None:
    resolution = resolve(ANNOUNCEMENT_MAP, TABLE, MESH).checked()
    expected: dict[str, Spec] = {
        "token_embedding/embeddings": (None, "model"),
        "decoder_block_*/pre_attention_norm/scale": (None,),
        "decoder_block_*/attention/query/kernel": (None, "model", None),
        "decoder_block_*/attention/key/kernel": (None, "model", None),
        "decoder_block_*/attention/value/kernel": (None, "model", None),
        "decoder_block_*/attention/attention_output/kernel": (None, None, "model"),
        "decoder_block_*/ffw_gating/kernel": ("model", None),
        "decoder_block_*/ffw_gating_2/kernel": ("model", None),
        "decoder_block_*/ffw_linear/kernel": (None, "model"),
        "final_normalization/scale": (None,),
    }
    assert resolution.assignment == expected
    assert resolution.findings == ()


def test_a_short_spec_is_filled_to_the_rank() -> None:
    resolution = resolve([rule("token_embedding/embeddings", "model")], TABLE, MESH)
    assert resolution.assignment["token_embedding/embeddings"] == ("model", None)


def test_a_rule_that_takes_nothing_is_told_the_nearest_variable() -> None:
    assert found(rule(r"transformer_layer.*feedforward.*ffw_linear.kernel", "model")) == [
        (
            "warning",
            "rule 'transformer_layer.*feedforward.*ffw_linear.kernel' takes no variable and no "
            "layer output of gemma, so what it was meant for is replicated; the nearest variable "
            "is 'decoder_block_*/ffw_linear/kernel'",
        )
    ]


def test_a_family_name_is_told_from_a_regex() -> None:
    (finding,) = resolve([rule("decoder_block_*/ffw_linear/kernel", "model")], TABLE, MESH).findings
    assert finding.message.endswith(
        r"a rule is a regex: write 'decoder_block_\d+/ffw_linear/kernel' for every block"
    )


def test_a_forgotten_r_and_a_rule_for_an_optimizer_are_told_so() -> None:
    ((_, forgotten),) = found(rule("decoder_block_\b/ffw_linear/kernel", "model"))
    assert forgotten.endswith("write r before the quotes, or double the backslash")
    ((_, slot),) = found(rule("adam/.*_momentum", "model"))
    assert slot.endswith("what an optimizer holds lies as its weight does: leave the rule out")


def test_a_rule_written_for_older_keras_is_told_so() -> None:
    assert found(rule("ffw_linear/kernel", "model")) == [
        (
            "warning",
            "rule 'ffw_linear/kernel' takes no variable and no layer output of gemma, so what it "
            "was meant for is replicated; it takes only a part of "
            "'decoder_block_0/ffw_linear/kernel', and Keras 3.14 and later want the whole path",
        )
    ]


def test_a_rule_behind_an_exact_one_is_told_so() -> None:
    exact = rule("decoder_block_0/ffw_linear/kernel", "model")
    behind = rule(r"decoder_block_0/ffw_l\w+/kernel", None, "model")
    messages = [message for _, message in found(exact, behind) if behind.pattern in message]
    assert messages == [
        rf"rule '{behind.pattern}' takes no variable and no layer output of gemma: "
        f"'{exact.pattern}' has a rule of its own, which alone counts; drop one of the two"
    ]


def test_two_rules_on_one_path_are_an_error() -> None:
    assert found(
        rule(".*ffw_gating.*kernel", None, "model"), rule(".*gating_2/.*nel", "model")
    ) == [
        (
            "error",
            "rules '.*ffw_gating.*kernel' and '.*gating_2/.*nel' both take "
            "'decoder_block_0/ffw_gating_2/kernel' and 1 more; Keras allows one rule a path: "
            "narrow all but one",
        )
    ]


def test_a_rule_that_stands_twice_is_an_error() -> None:
    line = rule(".*ffw_linear/kernel", "model")
    assert found(line, line) == [
        ("error", "rule '.*ffw_linear/kernel' stands twice in the map; Keras refuses it: drop one")
    ]


def test_a_spec_longer_than_the_array_is_an_error() -> None:
    assert found(rule(".*ffw_linear/kernel", "model", None, None)) == [
        (
            "error",
            "rule '.*ffw_linear/kernel' has 3 entries, (\"model\", None, None), for "
            "'decoder_block_*/ffw_linear/kernel' of shape (24576, 3072); give at most 2",
        )
    ]


def test_a_dimension_that_does_not_divide_is_an_error() -> None:
    # 16 heads on 32 devices.
    mesh = Mesh(shape=(1, 32), axis_names=("batch", "model"))
    assert found(rule(".*attention/query/kernel", "model"), mesh=mesh) == [
        (
            "error",
            "rule '.*attention/query/kernel' splits dimension 0 of "
            "'decoder_block_*/attention/query/kernel', of shape (16, 3072, 256), over axis "
            "'model': 16 is not a multiple of 32; put None there or another axis",
        )
    ]


def test_an_axis_of_one_device_always_divides() -> None:
    table = make_table("model", [("kernel", (3,), "float32", True)])
    assert resolve([rule("kernel", "batch")], table, MESH).findings == ()


def test_an_axis_that_the_mesh_lacks_is_an_error() -> None:
    assert found(rule(".*ffw_linear/kernel", "data")) == [
        (
            "error",
            "rule '.*ffw_linear/kernel' names axis 'data', which mesh 1x8 does not have; its axes "
            "are batch, model",
        )
    ]


def test_an_axis_used_twice_is_an_error() -> None:
    assert found(rule(".*ffw_linear/kernel", "model", "model")) == [
        (
            "error",
            "rule '.*ffw_linear/kernel' uses axis 'model' for 2 dimensions of "
            '("model", "model"); an axis can split one: put None for the others',
        )
    ]


def test_a_weight_rule_that_hits_an_output_is_a_warning() -> None:
    assert found(rule(".*ffw_linear.*", None, "model")) == [
        (
            "warning",
            "rule '.*ffw_linear.*' takes the variable 'decoder_block_0/ffw_linear/kernel' and also "
            "the layer output 'decoder_block_0/ffw_linear/output', which is then laid out as "
            '(None, "model") in every call; end the rule with the variable\'s name',
        )
    ]


def test_a_rule_that_hits_the_state_of_a_random_generator_is_an_error() -> None:
    assert found(rule("seed_generator/.*", "model")) == [
        (
            "error",
            "rule 'seed_generator/.*' takes 'seed_generator/seed_generator_state', the state of a "
            "random generator, which every device needs whole; end the rule with the name of a "
            "weight",
        )
    ]


def test_a_family_split_between_specs_is_named() -> None:
    rules = [rule("decoder_block_1/ffw_linear/kernel", "model")]
    message = (
        "family 'decoder_block_*/ffw_linear/kernel' is split: 'decoder_block_0/ffw_linear/kernel' "
        "gets (None, None) and 'decoder_block_1/ffw_linear/kernel' gets (\"model\", None); a plan "
        "gives its 2 variables one spec"
    )
    resolution = resolve(rules, TABLE, MESH)
    assert found(*rules) == [("warning", message)]
    assert "decoder_block_*/ffw_linear/kernel" not in resolution.assignment
    with pytest.raises(LayoutError) as error:
        resolution.checked()
    assert str(error.value) == message


def test_a_family_of_which_two_rules_take_one_path_has_no_spec() -> None:
    rules = [rule(".*ffw_linear/kernel", "model"), rule("decoder_block_1/ffw_.*/kernel", "model")]
    resolution = resolve(rules, TABLE, MESH)
    assert "decoder_block_*/ffw_linear/kernel" not in resolution.assignment


def test_errors_come_before_warnings() -> None:
    rules = [rule("nothing/kernel", "model"), rule(".*ffw_linear/kernel", "data")]
    assert [severity for severity, _ in found(*rules)] == ["error", "warning"]
    with pytest.raises(LayoutError, match="names axis 'data'"):
        resolve(rules, TABLE, MESH).checked()


def test_a_rule_for_an_output_alone_is_as_it_should_be() -> None:
    resolution = resolve([rule(r"decoder_block_\d+/output", "batch", None, None)], TABLE, MESH)
    assert resolution.findings == ()
    assert list(resolution.outputs) == ["decoder_block_0/output", "decoder_block_1/output"]
