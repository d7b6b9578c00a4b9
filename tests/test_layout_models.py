"""Rules on the variable tables of real KerasHub models, held against Keras' own LayoutMap."""

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import keras
import pytest
from layout_tables import MESH
from test_end_to_end import small_gemma_backbone

from autoshard.checking import check
from autoshard.cost.values import Memory
from autoshard.errors import ModelError, UnknownNameError, UsageError
from autoshard.layout.published import ANNOUNCEMENT_MAP
from autoshard.layout.reading import kerashub_rules
from autoshard.layout.resolve import Finding, resolve
from autoshard.layout.rules import LayoutRules, Rule, match
from autoshard.layout.synthesis import synthesise, tied_families
from autoshard.mesh import Spec, divides
from autoshard.model.build import build
from autoshard.model.keras_import import import_keras_hub
from autoshard.model.recipe import AbstractModel
from autoshard.model.variables import Family
from autoshard.model.workload import Workload
from autoshard.pipeline import plan
from autoshard.records.parts import PlannedModel, Prediction
from autoshard.sharding_plan import Plan
from autoshard.subject import subject_of

PRESETS = (
    "gemma_7b_en",
    "gemma_2b_en",
    "llama3_8b_en",
    "mixtral_8_7b_en",
    "smollm3_3b_en",
    "gpt2_base_en",
    "bert_tiny_en_uncased",
    "t5_small_multi",
)


@cache
def model(preset: str, lora_rank: int | None = None) -> AbstractModel:
    return build(preset, dtype="bfloat16", lora_rank=lora_rank)


def faults(*arguments: Any, **options: Any) -> list[Finding]:
    """What is wrong with a map of a few rules, that it has so few apart."""
    return [one for one in check(*arguments, **options) if one.kind != "lies-whole"]


def spec_of(family: Family) -> Spec:
    """The widest dimension that divides by 8, unless the array is a vector."""
    rank = len(family.shape)
    specs = [tuple("model" if d == k else None for d in range(rank)) for k in range(rank)]
    legal = [k for k in range(rank) if rank > 1 and divides(family.shape, specs[k], MESH)]
    return specs[max(legal, key=lambda k: family.shape[k])] if legal else (None,) * rank


@pytest.mark.parametrize("lora_rank", [None, 4])
@pytest.mark.parametrize("preset", PRESETS)
def test_keras_finds_for_every_path_what_was_chosen(preset: str, lora_rank: int | None) -> None:
    table = model(preset, lora_rank).table()
    tied = {name for group in tied_families(table) for name in group}
    families = [family for family in table.families() if family.name not in tied]
    chosen = {family.name: spec_of(family) for family in families}
    rules = synthesise(table, chosen)
    assert len(rules) <= (10 if lora_rank is None else 16)

    layout_map = keras.distribution.LayoutMap(None)
    for rule in rules:
        layout_map[rule.pattern] = rule.spec
    for variable in table.variables:
        layout = layout_map[variable.path]
        spec = chosen.get(variable.family, ())
        expected = spec if any(spec) else None
        assert (layout and layout.axes) == expected, variable.path
    for path in (*table.output_paths, *table.state_paths):
        assert layout_map[path] is None, path
        assert match(rules, path, "search") is None, path


def test_a_second_mixtral_in_the_process_gets_the_same_layout() -> None:
    # Keras numbers the blocks of experts over the whole process, as a user's own models show.
    first, second = (
        build(
            import_keras_hub().models.MixtralBackbone(
                vocabulary_size=64,
                num_layers=2,
                num_query_heads=8,
                num_key_value_heads=8,
                hidden_dim=64,
                intermediate_dim=128,
                num_experts=8,
            )
        ).table()
        for _ in range(2)
    )
    assert {v.path for v in first.variables} != {v.path for v in second.variables}
    rules = synthesise(first, {family.name: spec_of(family) for family in first.families()})
    assert len(resolve(rules, first, MESH).assignment) == len(first.families())
    assert resolve(rules, first, MESH).assignment == resolve(rules, second, MESH).assignment


@pytest.mark.parametrize("rules", [ANNOUNCEMENT_MAP, None], ids=["announcement", "kerashub"])
def test_the_published_maps_for_gemma_7b_are_without_fault(rules: LayoutRules | None) -> None:
    gemma = model("gemma_7b_en")
    rules = rules or kerashub_rules(gemma.backbone, MESH)
    assert resolve(rules, gemma.table(), MESH).findings == ()


def test_kerashubs_map_splits_the_one_key_value_head_of_gemma_2b() -> None:
    gemma = model("gemma_2b_en")
    findings = resolve(kerashub_rules(gemma.backbone, MESH), gemma.table(), MESH).findings
    assert [finding.kind for finding in findings] == ["indivisible"] * 2
    assert findings[0].message == (
        "rule 'decoder_block.*attention.*(query|key|value).kernel' splits dimension 0 of "
        "'decoder_block_*/attention/key/kernel', of shape (1, 2048, 256), over axis 'model': 1 is "
        "not a multiple of 8; put None there or another axis"
    )


def test_gemmas_map_pasted_on_llama_takes_nothing_but_the_embedding() -> None:
    findings = resolve(ANNOUNCEMENT_MAP, model("llama3_8b_en").table(), MESH).findings
    assert [finding.kind for finding in findings] == ["takes-nothing"] * 4


def test_partition_specs_come_from_the_name_alone_or_from_a_model(gemma_plan: Plan) -> None:
    by_name = gemma_plan.partition_specs()
    assert tuple(by_name["decoder_block_27/ffw_linear/kernel"]) == ("model", None)
    assert tuple(by_name["decoder_block_27/ffw_gating/kernel"]) == ()
    assert by_name == gemma_plan.partition_specs(model("gemma_7b_en").model)
    with pytest.raises(UnknownNameError, match="did you mean gemma_7b_en"):
        gemma_plan.partition_specs("gemma_7b_ne")


def test_a_plan_for_low_rank_factors_is_checked_with_them(gemma_plan: Plan, tmp_path: Path) -> None:
    pattern = r"decoder_block_\d+/attention/query/lora_kernel_a"
    lora = replace(
        gemma_plan,
        model=PlannedModel.of(model("gemma_7b_en", 4).table()),
        rules=(Rule(pattern=pattern, spec=("model", None, None)),),
        workload=Workload(kind="lora", lora_rank=4),
    )
    lora.save(tmp_path / "plan.json")
    assert check("gemma_7b_en", str(tmp_path / "plan.json")) == ()
    kinds = [finding.kind for finding in check("gemma_2b_en", str(tmp_path / "plan.json"))]
    assert "other-model" in kinds
    # As a map for the model without factors the rule takes nothing.
    (tmp_path / "map.py").write_text(lora.to_python())
    (finding,) = faults("gemma_7b_en", str(tmp_path / "map.py"), mesh="1x8")
    assert "takes no variable" in finding.message


def test_rules_for_layer_outputs_are_checked_against_their_shapes(tmp_path: Path) -> None:
    path = tmp_path / "map.py"
    for spec, kind, words in (
        (("model",), "uneven-output", "JAX pads"),
        ((None,) * 4, "output-shape", "JAX refuses"),
    ):
        path.write_text(f"layout_map[r'decoder_block_\\d+/output'] = {spec!r}")
        findings = faults(small_gemma_backbone, str(path), mesh="1x16")
        assert [f.kind for f in findings] == [kind]
        assert words in findings[0].message
        assert "with batch 8 x 512 tokens" in findings[0].message
    path.write_text("layout_map[r'decoder_block_\\d+/output'] = (None, None, 'model')")
    assert faults(small_gemma_backbone, str(path), mesh="1x16") == []


def test_a_rule_that_generate_does_not_keep_is_told_unless_it_was_given_up(tmp_path: Path) -> None:
    rule = Rule(pattern=r"decoder_block_\d+/output", spec=(None, "model", None))
    made = plan(small_gemma_backbone, (1, 8), dtype="float32", generate=False)
    given_up = replace(made, rules=(rule,), generate=False)
    wanted = replace(given_up, generate=True)
    kinds = []
    for layout in (given_up, wanted):
        layout.save(tmp_path / "plan.json")
        kinds.append([f.kind for f in check(small_gemma_backbone, str(tmp_path / "plan.json"))])
    assert kinds == [[], ["breaks-generate"]]
    again = subject_of(given_up, model="test_end_to_end:small_gemma_backbone", mesh="1x8")
    assert not again.setup.generate
    assert "generate may be slow or fail" in given_up.to_python()
    assert "generate" not in wanted.to_python()


def test_a_rule_is_idle_where_nothing_that_it_takes_is_made(tmp_path: Path) -> None:
    path, kinds = tmp_path / "map.py", []
    for layers in ("softmax", "(softmax|value)"):
        pattern = rf"decoder_block_\d+/attention/{layers}(_\d+)?/output"
        path.write_text(f"layout_map[r'{pattern}'] = ('batch',)")
        kinds.append([f.kind for f in faults(small_gemma_backbone, str(path), mesh="1x8")])
    assert kinds == [["never-asked"], []]


def test_nothing_is_given_up_where_no_layer_output_is_laid_out() -> None:
    made = plan(small_gemma_backbone, "1x1", dtype="float32", generate=False)
    assert made.generate


def test_axes_are_those_of_a_mesh() -> None:
    with pytest.raises(UsageError, match="give the mesh too"):
        check(small_gemma_backbone, "kerashub", axes=["data", "model"])


def test_a_length_that_the_step_cannot_have_is_refused_where_it_is_asked_for() -> None:
    source = 'layout_map["position_embedding/embeddings"] = ("model", None)'
    assert faults("gpt2_base_en", source, mesh="1x8") == []
    with pytest.raises(ModelError) as error:
        check("gpt2_base_en", source, mesh="1x8", seq_len=5000)
    assert str(error.value) == (
        "GPT2CausalLM takes at most 1024 tokens a sequence, the rows of 'position_embedding', not "
        "5000: give a shorter sequence length"
    )
    # of pictures none is asked for
    assert check("vit_base_patch16_224_imagenet", "m = LayoutMap(d)\n", seq_len=5000) == ()


def test_partition_specs_of_a_callable_have_the_low_rank_factors(gemma_plan: Plan) -> None:
    table = build(small_gemma_backbone, lora_rank=4).table()
    lora = replace(
        gemma_plan,
        model=PlannedModel.of(table),
        workload=Workload(kind="lora", lora_rank=4, dtype="float32"),
    )
    specs = lora.partition_specs(small_gemma_backbone)
    assert len(specs) == len(table.variables)


@pytest.fixture
def gemma_plan() -> Plan:
    return Plan(
        model=PlannedModel.of(model("gemma_7b_en").table()),
        mesh=MESH,
        rules=(Rule(pattern=r"decoder_block_\d+/ffw_linear/kernel", spec=("model", None)),),
        workload=Workload(),
        target="tpu:v5e:2x4",
        predicted=Prediction(
            step_seconds=1,
            compute_seconds=1,
            collective_seconds=0,
            collective_bytes=0,
            peak_bytes_per_device=0,
            bytes_per_device=Memory(),
        ),
    )


def test_one_rule_that_cannot_be_read_does_not_hide_what_is_wrong_with_others() -> None:
    source = """
layout_map["decoder_block_["] = ("model", None)
layout_map["token_embedding/embeddings"] = None
layout_map["token_embedding/embedings"] = ("model", None)
"""
    findings = faults(small_gemma_backbone, source, mesh="1x8")
    assert [finding.kind for finding in findings] == ["unreadable", "unreadable", "takes-nothing"]
    assert "line 2: rule 'decoder_block_[' is not a regular expression" in findings[0].message


def test_a_map_that_leaves_most_weights_whole_is_told_which() -> None:
    table = {"token_embedding/embeddings": ("model", None)}
    (finding,) = check("gemma_2b_en", table, mesh="1x8")
    assert (finding.kind, finding.severity) == ("lies-whole", "warning")
    assert finding.message == (
        "3.69 GiB of 4.67 GiB of weights lie whole on every device, the largest "
        "'decoder_block_*/ffw_gating/kernel' (1.12 GiB): give it a rule that splits one of its "
        "dimensions"
    )
    assert check("gemma_2b_en", table) == ()
    assert check("gemma_2b_en", table, mesh="1x1") == ()
