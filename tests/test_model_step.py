"""The step: arguments and results line up with what is traced."""

from typing import Any

import pytest

from autoshard.errors import ModelError
from autoshard.hardware.chips import get_chip
from autoshard.model.attention import attention_of
from autoshard.model.build import build
from autoshard.model.fold import fold
from autoshard.model.inputs import model_inputs
from autoshard.model.keras_import import import_keras, import_keras_hub
from autoshard.model.recipe import AbstractModel
from autoshard.model.signature import Step
from autoshard.model.step import make_step, trace
from autoshard.model.workload import OPTIMIZERS, Workload
from autoshard.planner.tracing import make_program


def assert_aligned(step: Step, jaxpr: Any) -> None:
    assert [(a.shape, a.dtype) for a in step.arguments] == [
        (aval.shape, str(aval.dtype)) for aval in jaxpr.in_avals
    ]
    assert len(step.results) == len(jaxpr.out_avals)
    for result, aval in zip(step.results, jaxpr.out_avals, strict=True):
        if result.argument is not None:
            argument = step.arguments[result.argument]
            assert (argument.role, argument.path) == (result.role, result.path)
            assert (argument.shape, argument.dtype) == (aval.shape, str(aval.dtype))


def shallow(name: Any, **options: Any) -> AbstractModel:
    """Three periods of a model."""
    return fold(build(name, **options), periods=3)


def test_training_returns_every_variable_and_the_loss() -> None:
    model = shallow("gemma_7b_en")
    step = make_step(model, Workload(kind="train", batch=8, seq_len=512))
    jaxpr = trace(step)
    assert_aligned(step, jaxpr)
    # 3 blocks of 9 weights and 2 more; two moments each; iteration and learning rate.
    roles = [argument.role for argument in step.arguments]
    assert (roles.count("weight"), roles.count("slot"), roles.count("data")) == (29, 60, 4)
    assert [r.role for r in step.results if r.argument is None] == ["loss"]
    assert step.donated == tuple(range(89))
    owners = {a.layout_path for a in step.arguments if a.role == "slot"}
    assert owners == {None, *(a.path for a in step.arguments if a.role == "weight")}
    assert step.task == "GemmaCausalLM"
    assert step.loss is not None and "next token" in step.loss


def test_name_stacks_tell_layer_and_phase() -> None:
    step = make_step(shallow("gemma_7b_en"), Workload(kind="train", batch=1, seq_len=8))
    stacks = {str(equation.source_info.name_stack) for equation in trace(step).eqns}
    # An einsum puts its equation behind the layer.
    query = "decoder_block_1/attention/query/btd,ndh->btnh"
    assert f"jvp(gemma_backbone)/{query}" in stacks
    assert f"transpose(jvp(gemma_backbone))/{query}" in stacks
    assert "adam" in stacks


def test_prefill_returns_logits_of_the_vocabulary() -> None:
    step = make_step(shallow("gemma_7b_en"), Workload(kind="prefill", batch=2, seq_len=16))
    jaxpr = trace(step)
    assert [result.role for result in step.results] == ["logits"]
    assert jaxpr.out_avals[0].shape == (2, 16, 256000)
    assert step.loss is None


def test_lora_freezes_the_base() -> None:
    model = shallow("gemma_7b_en", lora_rank=4)
    step = make_step(model, Workload(kind="lora", batch=1, seq_len=8, lora_rank=4))
    jaxpr = trace(step)
    assert_aligned(step, jaxpr)
    # Two factors on query and value of 3 blocks, two moments each, and two scalars.
    assert [a.role for a in step.arguments].count("slot") == 3 * 4 * 2 + 2
    frozen = [r for r in step.results if r.path.endswith("/kernel")]
    assert all(jaxpr.jaxpr.outvars[step.results.index(r)] in jaxpr.jaxpr.invars for r in frozen)


def test_decode_adds_one_token_to_the_cache() -> None:
    step = make_step(shallow("gemma_7b_en"), Workload(kind="decode", batch=4, seq_len=32))
    jaxpr = trace(step)
    assert_aligned(step, jaxpr)
    cache = [a for a in step.arguments if a.role == "cache"]
    # (batch, blocks, keys and values, tokens, heads, head size), of the 3 traced blocks.
    assert [a.shape for a in cache] == [(4, 3, 2, 32, 16, 256)]
    assert jaxpr.out_avals[0].shape == (4, 256000)
    # The pass that fills the cache is not part of the step: no product over 32 x 32 tokens.
    assert not any(v.aval.shape == (4, 16, 32, 32) for e in jaxpr.eqns for v in e.outvars)


def test_decode_of_an_encoder_and_a_decoder_reads_what_the_encoder_left() -> None:
    step = make_step(shallow("bart_base_en"), Workload(kind="decode", batch=4, seq_len=32))
    assert_aligned(step, trace(step))
    # Hidden states of the encoder; keys and values of the decoder's own and of the encoder's.
    of_blocks = (4, 3, 2, 32, 12, 64)
    cache = [a.shape for a in step.arguments if a.role == "cache"]
    assert cache == [(4, 32, 768), of_blocks, of_blocks]


def test_seeds_are_state_and_have_no_layout() -> None:
    step = make_step(shallow("gpt2_base_en"), Workload(kind="train", batch=1, seq_len=8))
    states = [a for a in step.arguments if a.role == "state"]
    assert states and all("seed_generator" in a.path and a.layout_path is None for a in states)
    assert_aligned(step, trace(step))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer_is_traced(optimizer: str) -> None:
    model = fold(build("gemma_2b_en"), periods=1)
    step = make_step(model, Workload(kind="train", batch=1, seq_len=8, optimizer=optimizer))
    assert_aligned(step, trace(step))


def attention_outputs(preset: str, chip: str) -> set[str]:
    """The templates of the layer outputs in attention that a step makes on such chips."""
    model, workload = fold(build(preset), periods=1), Workload(kind="prefill", batch=1, seq_len=8)
    shapes = make_program(model, workload, get_chip(chip)).output_shapes()
    return {template for template in shapes if "attention" in template}


@pytest.mark.parametrize("preset", ["gemma_2b_en", "gemma2_2b_en", "gemma3_1b", "mixtral_8_7b_en"])
def test_accelerators_run_attention_as_one_op_of_keras(preset: str) -> None:
    asked = {chip: attention_outputs(preset, chip) for chip in ("tpu:v5e", "cpu")}
    skipped = asked["cpu"] - asked["tpu:v5e"]
    assert skipped and all("softmax" in template for template in skipped)
    assert asked["tpu:v5e"] < asked["cpu"]


def softmax_is_called(preset: str, chip: str) -> bool:
    return any("softmax" in template for template in attention_outputs(preset, chip))


def test_gpus_have_the_op_too_but_for_old_ones_and_soft_caps() -> None:
    assert not softmax_is_called("gemma_2b_en", "gpu:h100-sxm")
    assert softmax_is_called("gemma_2b_en", "gpu:t4")
    assert softmax_is_called("gemma2_2b_en", "gpu:h100-sxm")


def test_what_a_layer_asks_is_given_back_after_an_error() -> None:
    layers = import_keras_hub().src.models.gemma.gemma_attention
    before = layers.running_on_tpu, import_keras().ops.dot_product_attention
    with pytest.raises(ZeroDivisionError), attention_of(get_chip("tpu:v5e")):
        assert layers.running_on_tpu()
        with attention_of(None):
            assert not layers.running_on_tpu()
        raise ZeroDivisionError
    assert (layers.running_on_tpu, import_keras().ops.dot_product_attention) == before


def test_a_model_without_a_cache_cannot_decode() -> None:
    with pytest.raises(ModelError, match="BertBackbone has no cache"):
        make_step(build("bert_tiny_en_uncased"), Workload(kind="decode"))


def test_a_sequence_beyond_the_position_embeddings_is_refused() -> None:
    with pytest.raises(ModelError, match="at most 512 tokens .* 'position_embedding', not 600"):
        make_step(build("bert_tiny_en_uncased"), Workload(kind="prefill", seq_len=600))


def of_eight_tokens() -> Any:
    keras = import_keras()
    tokens = keras.Input((None,), dtype="int32", name="tokens")
    embedded = keras.layers.Reshape((8, 4))(keras.layers.Embedding(10, 4)(tokens))
    return keras.Model(tokens, embedded, name="eight")


def test_a_sequence_that_the_model_cannot_take_is_one_line() -> None:
    step = make_step(build(of_eight_tokens), Workload(kind="prefill", seq_len=600))
    with pytest.raises(ModelError, match=r"Functional cannot be traced: .*600") as caught:
        trace(step)
    assert "\n" not in str(caught.value)


def fed(model: str, kind: str) -> dict[str, tuple[int, ...]]:
    """The shapes of what a step is fed, by name."""
    step = make_step(shallow(model), Workload(kind=kind, batch=2, seq_len=64))
    return {a.path: a.shape for a in step.arguments if a.role == "data"}


def test_a_model_that_says_how_large_a_picture_is_sees_one_with_the_prompt_alone() -> None:
    prefill, decode = (fed("gemma3_instruct_4b", kind) for kind in ("prefill", "decode"))
    assert prefill["images"] == (2, 1, 896, 896, 3)
    assert prefill["vision_indices"] == (2, 256)
    assert decode["images"] == (2, 0, 896, 896, 3)
    assert decode["vision_indices"] == (2, 0)
    assert prefill["token_ids"] == decode["token_ids"] == (2, 64)


def test_a_model_that_does_not_say_it_is_fed_text_alone() -> None:
    shapes = fed("small_models:gemma4", "train")
    # the encoder inside says that a patch has 4 x 4 x 3 numbers, nobody how many patches there are
    assert shapes["pixel_values"] == (2, 0, 0, 48)
    assert shapes["vision_indices"] == (2, 0)
    assert shapes["token_ids"] == shapes["vision_mask"] == shapes["labels"] == (2, 64)


def test_only_what_takes_sequences_has_a_length() -> None:
    lengths = [
        build(f"small_models:{name}").adapted(Workload(seq_len=64)).seq_len
        for name in ("vit", "bert")
    ]
    assert lengths == [1, 64]


def test_a_batch_that_a_model_states_is_its_own() -> None:
    keras = import_keras()

    def of_batch(batch: int | None) -> Any:
        rows = keras.Input(batch_shape=(batch, 64))
        return keras.Model(rows, keras.layers.Dense(8, name="only")(rows))

    batches = [build(lambda n=n: of_batch(n)).adapted(Workload()).batch for n in (32, None)]
    assert batches == [32, 8]
    (rows,) = model_inputs(of_batch(32), Workload(batch=32))[0]
    assert rows.shape == (32, 64)


def test_an_input_of_strings_is_refused() -> None:
    keras = import_keras()
    words = keras.Input((1,), dtype="string", name="words")
    with pytest.raises(ModelError, match="'words' of .* holds strings"):
        model_inputs(keras.Model(words, words), Workload())
