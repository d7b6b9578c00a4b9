"""The planner on real models, and its search against exhaustive search."""

import gc
import itertools
from collections import Counter
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from test_end_to_end import small_gemma_backbone

from autoshard.cost.machine import Machine
from autoshard.cost.step import StepPricer
from autoshard.errors import ModelError
from autoshard.graph.build import StepInput, build_program
from autoshard.graph.jaxpr import read_jaxpr
from autoshard.graph.program import Program
from autoshard.hardware.targets import parse_target
from autoshard.layout.rules import LayoutRules, Rule
from autoshard.mesh import Mesh, parse_mesh
from autoshard.model.build import build
from autoshard.model.fold import PLANNED_PERIODS, fold
from autoshard.model.folding import Folding
from autoshard.model.keras_import import import_keras, import_keras_hub
from autoshard.model.variables import ModelTable
from autoshard.planner.garbage import uncollected
from autoshard.planner.planning import Planning, run_planner
from autoshard.planner.pricing import Candidate, Refused, make_scorer, score_rules
from autoshard.planner.setup import Setup, make_setup
from autoshard.planner.tracing import make_program, trace_model
from autoshard.search.candidates import family_choices
from autoshard.search.descent import Scorer, descend, exhaust, n_assignments, starting_points
from autoshard.search.lower_bound import relax
from autoshard.search.ranking import _holds, _output_groups


def plan(model: Any, setup: Setup) -> Planning:
    traced = trace_model(model, setup.workload, setup.target.chip)
    return run_planner(traced, replace(setup, workload=traced.workload))


def priced(rules: LayoutRules, table: ModelTable, scorer: Scorer) -> Candidate:
    found = score_rules("the map", rules, table, scorer)
    assert isinstance(found, Candidate)
    return found


@pytest.fixture(scope="module")
def gemma() -> Planning:
    return plan("gemma_7b_en", make_setup("1x8"))


def test_every_primitive_of_gemmas_train_step_has_a_rule(gemma: Planning) -> None:
    assert gemma.traced.program.layers_with("unknown") == {}


def test_the_default_train_plan_of_gemma_7b_fits_eight_v5e_chips(gemma: Planning) -> None:
    scored = gemma.best
    assert scored.excess_bytes == 0
    # bfloat16 weights, split but for the norms: 2 x 8,537,680,896 / 8, and two Adam slots as large
    memory = scored.cost.memory
    assert memory.weights == pytest.approx(2 * 8_537_680_896 / 8, rel=1e-3)
    assert memory.optimizer == pytest.approx(2 * memory.weights, rel=1e-3)


def test_the_announcements_map_loses(gemma: Planning) -> None:
    rivals = {rival.name: rival for rival in gemma.rivals}
    announced = rivals["the announcement's map"]
    assert isinstance(announced, Candidate)
    assert announced.step_seconds > 2 * gemma.best.cost.step_seconds


@pytest.mark.parametrize(
    ("model", "mesh"), [("gemma_2b_en", "1x8"), ("gemma_2b_en", "2x4"), ("bart_base_en", "1x8")]
)
def test_no_layout_found_is_faster_than_the_relaxed_problem(model: str, mesh: str) -> None:
    setup = make_setup(mesh, workload="prefill")
    found = plan(model, setup).result
    pricer = found.scorer.pricer
    relaxed = relax(pricer, family_choices(pricer.program, setup.mesh), setup.mesh, None)
    fastest = min(scored.cost.step_seconds for scored in found.scorer.seen.values())
    assert 0 < relaxed.bound_seconds <= fastest * (1 + 1e-9)


def test_the_split_by_hand_leaves_whole_what_has_no_other_dimension_that_divides() -> None:
    # 28 query heads and 4 key/value heads on 8 devices; the feed-forward layers and the vocabulary
    # divide, and dimension 128 of a head is none that people split.
    hand = plan("qwen2.5_7b_en", make_setup("1x8", workload="prefill")).by_hand
    assert hand is not None
    assert {rule.pattern: rule.spec for rule in hand.rules} == {
        "token_embedding/embeddings": ("model", None),
        "token_embedding/reverse_embeddings": (None, "model"),
        r"transformer_layer_\d+/feedforward_(intermediate|gate)_dense/kernel": (None, "model"),
        r"transformer_layer_\d+/feedforward_output_dense/kernel": ("model", None),
    }


def test_the_split_by_hand_of_a_single_block_splits_its_heads() -> None:
    # More arrays have the 8 heads (four kernels, three biases) than the 64 of the stream (five
    # kernels, a bias); of layers it is four and five.
    keras = import_keras()

    def attention() -> Any:
        rows = keras.Input((16, 64))
        heads = keras.layers.MultiHeadAttention(8, 8, name="attention")(rows, rows)
        return keras.Model(rows, keras.layers.Dense(256, name="head")(heads))

    hand = plan(attention, make_setup("1x4")).by_hand
    assert hand is not None
    specs = {rule.pattern: rule.spec for rule in hand.rules}
    assert specs["head/kernel"] == (None, "model")
    assert specs["attention/attention_output/kernel"] == ("model", None, None)
    assert specs["attention/(query|key|value)/kernel"] == (None, "model", None)


def test_heads_ffn_and_vocabulary_pay_two_all_reduces_a_block_forward(gemma: Planning) -> None:
    by_hand = gemma.by_hand
    assert by_hand is not None
    best = by_hand.scored
    # 28 blocks x (attention output, ffn output) + the embedding, of [8, 512, 3072] bfloat16
    forward = [t for t in best.cost.traffic if not t.backward and t.n_bytes == 8 * 512 * 3072 * 2]
    assert sum(t.count for t in forward) == 2 * 28 + 1
    assert {t.kind for t in forward} == {"all-reduce"}


def test_kerashubs_map_fails_on_gemma_2b_and_a_plan_does_not() -> None:
    planning = plan("gemma_2b_en", make_setup("1x8", workload="prefill"))
    (kerashub,) = [rival for rival in planning.rivals if rival.name == "KerasHub's own map"]
    assert isinstance(kerashub, Refused)
    assert "key" in kerashub.failure
    assert planning.best.excess_bytes == 0


def residual_rules(*spec: str | None) -> LayoutRules:
    """Heads, ffn and vocabulary by hand, and the outputs that add to the residual stream."""
    block = r"decoder_block_\d+"
    return (
        Rule(pattern="token_embedding/embeddings", spec=("model", None)),
        Rule(pattern=rf"{block}/attention/.*/kernel", spec=("model", None, None)),
        Rule(pattern=rf"{block}/ffw_gating(_2)?/kernel", spec=(None, "model")),
        Rule(pattern=rf"{block}/ffw_linear/kernel", spec=("model", None)),
        Rule(pattern=rf"{block}/(attention/attention_output|ffw_linear)/output", spec=spec),
    )


def test_a_rule_for_an_output_turns_all_reduces_into_reduce_scatters() -> None:
    setup = make_setup("1x8", workload="prefill")
    traced = trace_model("gemma_7b_en", setup.workload, setup.target.chip)
    scorer = make_scorer(traced.program, setup)
    rules = residual_rules("batch", None, "model")
    scored = priced(rules, traced.table, scorer).scored
    # As XLA's partitioner does: 28 x (attention, ffn) + the embedding, each reduce-scattered and
    # gathered again; what is left to all-reduce is the norms' statistics, [8, 512] float32.
    large = Counter(
        t.kind for t in scored.cost.traffic for _ in range(t.count) if t.n_bytes > 2**20
    )
    # A sum of 3 x 128 columns a device that does not hide behind its matmul is all-reduced on TPUs.
    assert large == {"reduce-scatter": 29, "all-reduce": 28, "all-gather": 57}


@pytest.mark.parametrize(
    ("preset", "kind", "template", "as_made"),
    [
        ("gemma_2b_en", "prefill", "decoder_block_*/attention/query/output", True),
        ("gpt2_base_en", "prefill", "transformer_layer_*/self_attention/query/output", False),
        # One token: the compiler drops the dimension of 1, and puts it back by a reshape.
        ("gemma_2b_en", "decode", "decoder_block_*/attention/query/output", False),
    ],
)
def test_a_contraction_without_bias_makes_the_output_itself(
    preset: str, kind: str, template: str, as_made: bool
) -> None:
    setup = make_setup("1x8", workload=kind)
    program = trace_model(preset, setup.workload, setup.target.chip).program
    asked = {output.as_made for output in program.layer_outputs if output.template == template}
    assert asked == {as_made}


def test_what_every_block_reads_is_gathered_once_where_one_stands_for_several() -> None:
    setup, whole = make_setup("1x8", workload="prefill"), build("bart_base_en", dtype="bfloat16")
    rules = (
        Rule(pattern=r"transformer_encoder_layer_\d+/output", spec=("batch", None, "model")),
        Rule(
            pattern=r"transformer_decoder_layer_\d+/cross_attention/(key|value)/kernel",
            spec=(None, None, "model"),
        ),
    )
    step_seconds = []
    for model in (fold(whole, periods=PLANNED_PERIODS), replace(whole, folding=Folding())):
        scorer = make_scorer(make_program(model, setup.workload, setup.target.chip), setup)
        cost = priced(rules, whole.table(), scorer).scored.cost
        read = [one for one in cost.traffic if "cross_attention/key" in one.layer]
        assert [(one.kind, one.count) for one in read] == [("all-gather", 1)]
        step_seconds.append(cost.step_seconds)
    assert step_seconds[0] == pytest.approx(step_seconds[1])


def test_only_outputs_that_generate_can_bear_are_laid_out() -> None:
    setup = make_setup("1x8", workload="prefill")
    traced = trace_model("gemma_2b_en", setup.workload, setup.target.chip)
    planning = run_planner(traced, setup)
    outputs = {output.template for output in traced.program.layer_outputs}
    assert "decoder_block_*/ffw_linear/output" in outputs
    best, beyond = planning.best, planning.without_generate
    assert beyond is not None
    for name, spec in best.assignment:
        # A single prompt, one token at a time: neither of the first two dimensions can be split.
        assert name not in outputs or spec[:2] == ("batch", None)
    assert beyond.scored.rank < best.rank
    assert run_planner(traced, setup, top=1, without_generate=False).without_generate is None


def test_no_outputs_chosen_by_hand_beat_those_that_the_search_chooses() -> None:
    # Whole weights, and attention split along the keys: Gemma 2 has four key/value heads, and for
    # its soft cap KerasHub calls its softmax layer on GPUs.
    setup = make_setup("1x8", workload="prefill", target="gpu:h100-sxm:8")
    traced = trace_model("gemma2_2b_en", setup.workload, setup.target.chip)
    planning = run_planner(traced, setup)
    scorer = planning.result.scorer
    value = Rule(
        pattern=r"decoder_block_\d+/attention/value/output", spec=("batch", None, None, None)
    )
    softmax = Rule(
        pattern=r"decoder_block_\d+/attention/softmax(_\d+)?/output",
        spec=("batch", None, None, None, "model"),
    )
    best = planning.result.ranked[0]
    for rules in ((), (value,), (softmax,), (value, softmax)):
        assert priced(rules, traced.table, scorer).scored.rank >= best.rank
    assert [name for name, spec in best.assignment if any(spec)] == [
        "decoder_block_*/attention/softmax/output"
    ]


def test_no_candidate_runs_the_program_of_a_better_one_in_more_memory() -> None:
    ranked = plan("qwen2.5_7b_en", make_setup("1x8", workload="prefill")).result.ranked
    assert len(ranked) > 3
    for better, worse in itertools.combinations(ranked, 2):
        same_time = worse.cost.step_seconds < 1.01 * better.cost.step_seconds
        same_wire = worse.cost.collective_bytes == better.cost.collective_bytes
        saves = worse.cost.memory.peak_bytes < better.cost.memory.peak_bytes
        assert saves or not (same_time and same_wire)


def step_program(*widths: int) -> Program:
    """A gradient step of a small perceptron; one family a weight."""

    def step(x, *weights):
        def loss(weights):
            hidden = x
            for weight in weights:
                hidden = jnp.tanh(hidden @ weight)
            return (hidden**2).sum()

        gradients = jax.grad(loss)(weights)
        return tuple(w - g for w, g in zip(weights, gradients, strict=True))

    shapes = list(zip(widths, widths[1:], strict=False))
    structs = [jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((4096, widths[0]), *shapes)]
    closed = jax.make_jaxpr(step)(*structs)
    inputs = [StepInput(role="data", family=None)] + [
        StepInput(role="weight", family=f"layer_{i}/w{i}/kernel", trainable=True)
        for i in range(len(shapes))
    ]
    return build_program(read_jaxpr(closed), inputs, list(range(1, len(shapes) + 1)))


def scorer_of(program: Program, mesh: Mesh, limit: int | None = None) -> Scorer:
    machine = Machine.of(mesh, parse_target("tpu:v5e:2x4"))
    return Scorer(pricer=StepPricer(program, machine), mesh=mesh, memory_limit=limit)


@pytest.mark.parametrize("limit", [None, 40 * 2**20])
@pytest.mark.parametrize("mesh", ["1x8", "2x4"])
@pytest.mark.parametrize("widths", [(1024, 4096, 1024), (2048, 8192, 2048, 512)])
def test_the_search_finds_what_exhaustive_search_finds(
    widths: tuple[int, ...], mesh: str, limit: int | None
) -> None:
    grid = parse_mesh(mesh)
    scorer = scorer_of(step_program(*widths), grid, limit)
    families = family_choices(scorer.pricer.program, grid)
    assert n_assignments(families) > 1
    relaxed = relax(scorer.pricer, families, grid, limit)
    found = descend(scorer, families, starting_points(families, relaxed.assignment, grid))
    best = exhaust(scorer, families)
    assert found.rank == best.rank
    if limit is None:
        assert relaxed.bound_seconds <= best.cost.step_seconds * (1 + 1e-9)


def test_one_device_has_one_layout() -> None:
    planning = plan("gemma_2b_en", make_setup("1x1", workload="prefill"))
    assert [candidate.rules for candidate in planning.candidates] == [()]


def test_where_nothing_fits_there_is_no_bound() -> None:
    # Weights and Adam of Gemma 7B: 48 GiB over two devices of 15.75.
    planning = plan("gemma_7b_en", make_setup("1x2"))
    assert planning.result.ranked[0].excess_bytes > 0
    assert planning.result.bound_seconds is None


@pytest.mark.parametrize(
    ("pattern", "spec", "words"),
    [
        ("decoder_block_0/ffw_linear/output", ("batch", None, "model"), "not priced: it lays out"),
        (r"decoder_block_\d+/ffw_linear/output", (None, None, None, "model"), "JAX refuses"),
        (r"decoder_block_\d+/attention/query/output", (None, None, None, "model"), ""),
    ],
)
def test_a_rule_for_outputs_is_priced_where_it_can_be(
    pattern: str, spec: tuple[str | None, ...], words: str
) -> None:
    setup = make_setup("1x8", workload="prefill")
    traced = trace_model("gemma_7b_en", setup.workload, setup.target.chip)
    scorer = make_scorer(traced.program, setup)
    rules = (Rule(pattern=pattern, spec=spec),)
    found = score_rules("the map", rules, traced.table, scorer)
    assert words in found.failure if isinstance(found, Refused) else not words


def test_the_cache_of_all_blocks_is_counted() -> None:
    # Gemma 7B: keys and values of 28 blocks, 16 heads x 256, bfloat16, for 8 x 2048 tokens; over
    # the heads' eight parts.
    scored = plan("gemma_7b_en", make_setup("1x8", workload="decode", seq_len=2048)).candidates[0]
    assert scored.scored.cost.memory.kv_cache == 8 * 2048 * 28 * 2 * 16 * 256 * 2 // 8


def test_weights_that_the_step_does_not_read_are_split_for_their_memory() -> None:
    found = plan("small_models:gemma4", make_setup("2x4", dtype="float32", seq_len=16))
    choices = {choices.name: choices for choices in found.result.choices}
    tower = choices["image_encoder/encoder_block_*/ffw_linear/dense/kernel"]
    assert tower.specs == (("batch", "model"),)
    assert len(choices["decoder_block_*/ffw_linear/kernel"].specs) > 1
    # Without a rule they are whole.
    assert found.no_rule.rules == ()
    assert found.no_rule.scored.cost.memory.weights == found.traced.table.n_bytes


def without_a_cache() -> Any:
    """A language model whose `generate` is not made of KerasHub's parts."""
    models = import_keras_hub().models

    class Plain(models.CausalLM):
        def __init__(self, backbone: Any) -> None:
            hidden = backbone(backbone.input)
            logits = backbone.token_embedding(hidden, reverse=True)
            super().__init__(inputs=backbone.input, outputs=logits)
            self.backbone = backbone

    return Plain(small_gemma_backbone())


def test_a_language_model_without_a_cache_is_planned_without_rules_for_outputs() -> None:
    best = plan(without_a_cache, make_setup("2x4", seq_len=16)).best
    assert best.assignment and not best.n_outputs
    with pytest.raises(ModelError, match="Plain has no cache"):
        plan(without_a_cache, make_setup("2x4", seq_len=16, workload="decode"))


def twins() -> Any:
    """Two inputs through one encoder, and one number of both."""
    layers, keras = import_keras().layers, import_keras()
    encoder = keras.Sequential(
        [
            keras.Input((128,)),
            layers.Dense(512, activation="relu", name="wide"),
            layers.Dense(256, name="narrow"),
        ],
        name="encoder",
    )
    inputs = [keras.Input((128,), name=name) for name in ("left", "right")]
    product = layers.Multiply(name="product")([encoder(one) for one in inputs])
    return keras.Model(inputs, layers.Dense(1, name="score")(product))


@pytest.mark.parametrize("optimizer", ["adam", "muon"])
def test_no_change_of_one_family_beats_the_first(optimizer: str) -> None:
    result = plan(twins, make_setup("2x4", optimizer=optimizer)).result
    first = result.ranked[0]
    assert result.unbound is None  # there is no `generate` to give up
    for choices in result.choices:
        found = result.next_best(first, choices)
        assert found is None or found[0].rank >= first.rank


def test_a_stream_is_left_whole_by_rules_for_all_its_addends_or_by_none(gemma: Planning) -> None:
    result = gemma.result
    outputs = [choices for choices in result.choices if choices.is_output]
    stream = next(one for one in outputs if one.name == "decoder_block_*/ffw_linear/output")
    addends = [one.name for one in outputs if one.siblings == stream.siblings]
    assert len(addends) > 1
    weights = {name: spec for name, spec in result.ranked[0].assignment if "output" not in name}
    whole, split = ("batch", None, None), ("batch", None, "model")
    groups = _output_groups(outputs)
    for laid, holds in (
        ({stream.name: whole}, False),
        (dict.fromkeys(addends, whole), True),
        ({stream.name: split}, True),
        ({}, True),
    ):
        assert _holds(result.scorer.score({**weights, **laid}), groups, ["model"]) == holds


def two_of_one_name() -> Any:
    """Two kernels, of different shapes, that Keras gives one path."""
    keras = import_keras()

    class Pair(keras.layers.Layer):
        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            self.first = keras.layers.Dense(1024, name="dense")
            self.second = keras.layers.Dense(512, name="dense")

        def call(self, rows: Any) -> Any:
            return self.second(self.first(rows))

    rows = keras.Input((512,))
    return keras.Model(rows, Pair(name="pair")(rows))


@pytest.mark.parametrize("mesh", ["1x8", "2x4", "8x1"])
def test_families_that_share_a_path_get_one_spec(mesh: str) -> None:
    found = plan(two_of_one_name, make_setup(mesh))
    assert len(found.candidates) > 0
    assert found.best == found.result.ranked[0]
    for scored in found.result.ranked:
        kernels = [spec for name, spec in scored.assignment if "kernel" in name]
        assert len(kernels) in (0, 2)
        assert len(set(kernels)) <= 1
    assert any(scored.assignment for scored in found.result.ranked)


def test_weights_that_nothing_reads_stay_whole_where_one_rule_would_split_them_in_two_ways() -> (
    None
):
    def network() -> Any:
        keras = import_keras()

        class Spare(keras.layers.Layer):
            """Has two layers of one name that it does not call."""

            def __init__(self, **kwargs: Any) -> None:
                super().__init__(**kwargs)
                self.spare = [keras.layers.Dense(n, use_bias=False, name="aux") for n in (128, 256)]
                for layer, n in zip(self.spare, (64, 100), strict=True):
                    layer.build((None, n))

            def call(self, inputs: Any) -> Any:
                return inputs

        rows = keras.Input((512,))
        found = keras.layers.Dense(512, name="dense")(rows)
        return keras.Model(rows, Spare(name="spare")(found))

    found = plan(network, make_setup("1x8", workload="prefill"))
    whole = {choices.name: choices.specs for choices in found.result.choices}
    assert [len(specs) for name, specs in whole.items() if "aux" in name] == [1, 1]
    assert found.best.cost.step_seconds > 0


def test_a_bound_that_numbered_layers_break_is_not_claimed() -> None:
    def network() -> Any:
        keras = import_keras()
        rows = found = keras.Input((8192,))
        for number in range(1, 5):
            found = keras.layers.Dense(8192, use_bias=False, name=f"dense_{number}")(found)
        return keras.Model(rows, found)

    result = plan(network, make_setup("2x4")).result
    best = result.ranked[0].cost.step_seconds
    assert result.bound_seconds is None or result.bound_seconds < best


def test_a_search_leaves_the_garbage_collector_as_it_was() -> None:
    for was_enabled in (True, False):
        (gc.enable if was_enabled else gc.disable)()
        try:
            with pytest.raises(ZeroDivisionError), uncollected():
                assert not gc.isenabled()
                raise ZeroDivisionError
            assert gc.isenabled() == was_enabled
        finally:
            gc.enable()
