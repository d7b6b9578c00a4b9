"""Leaving blocks out of a traced step: the same prices, for a part of the ops."""

from typing import Any

import pytest

from autoshard.hardware.targets import parse_target
from autoshard.layout.rules import Rule
from autoshard.mesh import parse_mesh
from autoshard.model.build import build
from autoshard.model.fold import fold
from autoshard.model.folding import BlockStack
from autoshard.model.keras_import import import_keras, import_keras_hub
from autoshard.model.thinning import counts_of, stand_ins, thin
from autoshard.model.workload import Workload
from autoshard.pipeline import make_plan
from autoshard.planner import tracing
from autoshard.planner.tracing import make_program
from autoshard.processes.child import Child
from autoshard.xla.collectives import merge_collectives
from autoshard.xla.compile import compile_deep, compile_in
from autoshard.xla.compiled import CompileRequest
from autoshard.xla.environment import child_environment

TRAIN = Workload(batch=8, seq_len=32, dtype="float32")
N_BLOCKS = 9


def chain() -> Any:
    """Nine equal blocks, one behind the other, in a model without a configuration."""
    return _net(lambda blocks, x: _one_after_another(blocks, x))


def fan() -> Any:
    """Nine equal blocks that read the same."""
    return _net(lambda blocks, x: import_keras().layers.Add()([block(x) for block in blocks]))


def gemma3() -> Any:
    """Five local blocks before a global one, three times, and two more."""
    return import_keras_hub().models.Gemma3Backbone(
        vocabulary_size=64,
        image_size=16,
        num_layers=20,
        num_query_heads=8,
        num_key_value_heads=8,
        hidden_dim=64,
        intermediate_dim=128,
        head_dim=16,
        use_sliding_window_attention=True,
        sliding_window_size=16,
        vision_encoder=None,
    )


def frozen() -> Any:
    """A chain before which nothing is trained."""
    model = chain()
    model.get_layer("tokens_in").trainable = False
    return model


def again() -> Any:
    """A chain whose first block is called four times more."""
    return _net(lambda blocks, x: _one_after_another([*blocks, *blocks[:1] * 4], x))


def halving() -> Any:
    """A chain in which the sequence is halved from block to block."""
    pool = import_keras().layers.MaxPooling1D
    return _net(lambda blocks, x: _one_after_another([*blocks[:1], *_halved(blocks[1:], pool)], x))


def _halved(blocks: Any, pool: Any) -> Any:
    return [layer for block in blocks for layer in (pool(2, padding="same"), block)]


def with_a_block_in_its_head() -> Any:
    """A chain, and a layer of another name that has a block's name inside it."""
    keras = import_keras()

    class Head(keras.layers.Layer):  # type: ignore[misc, name-defined]
        def __init__(self, **settings: Any) -> None:
            super().__init__(**settings)
            self.inner = _block(4)

        def build(self, shape: Any) -> None:
            self.inner.build(shape)
            self.built = True

        def call(self, x: Any) -> Any:
            return self.inner(x)

    return _net(lambda blocks, x: Head(name="head")(_one_after_another(blocks, x)))


def _net(join: Any) -> Any:
    keras = import_keras()
    tokens = keras.Input((32,), dtype="int32", name="tokens")
    x = keras.layers.Embedding(64, 64, name="tokens_in")(tokens)
    x = join([_block(number) for number in range(N_BLOCKS)], x)
    return keras.Model(tokens, keras.layers.Dense(64, name="tokens_out")(x), name="net")


def _one_after_another(blocks: Any, x: Any) -> Any:
    for block in blocks:
        x = block(x)
    return x


def _block(number: int) -> Any:
    layers = import_keras().layers

    class Block(layers.Layer):  # type: ignore[misc, name-defined]
        """A feed-forward network around which the residual stream goes."""

        def __init__(self, **settings: Any) -> None:
            super().__init__(**settings)
            self.up = layers.Dense(128, activation="relu", name="up")
            self.down = layers.Dense(64, name="down")

        def build(self, shape: Any) -> None:
            self.up.build(shape)
            self.down.build((*shape[:-1], 128))
            self.built = True

        def call(self, x: Any) -> Any:
            return x + self.down(self.up(x))

    return Block(name=f"block_{number}")


@pytest.mark.parametrize(
    ("kinds", "counts"),
    [
        ("aaaaaaa", (6, 0, 0, 0, 0, 0, 1)),
        ("ab", (1, 1)),
        ("aabb", (1, 1, 1, 1)),
        ("abababab", (3, 3, 0, 0, 0, 0, 1, 1)),
        ("abcabcabd", (1,) * 9),
        ("aaabaaabaaab", (4, 0, 2, 2, 0, 0, 0, 0, 2, 0, 1, 1)),
    ],
)
def test_the_first_of_what_repeats_stands_for_all_but_the_last(kinds, counts) -> None:
    n_blocks = len(kinds)
    stack = BlockStack(template="block_*", n_blocks=n_blocks, traced=n_blocks)
    kept = stand_ins(kinds)
    assert counts_of(kept, stack) == counts
    assert sorted(block for stood_for in kept.values() for block in stood_for) == [*range(n_blocks)]
    assert all(kinds[b] == kinds[block] for block, stood_for in kept.items() for b in stood_for)


def test_a_folded_copys_counts_are_shared_out() -> None:
    stack = BlockStack(template="block_*", n_blocks=40, period=4, traced=8)
    looks = [(kind, stack.multiplicity(block)) for block, kind in enumerate("aaabaaab")]
    assert counts_of(stand_ins(looks), stack) == (18, 0, 9, 9, 2, 0, 1, 1)


def test_a_stack_says_what_its_folded_blocks_stand_for() -> None:
    stack = BlockStack(template="block_*", n_blocks=8, lead=1, period=2, traced=6)
    assert stack.stand_ins() == {0: (0,), 1: (1, 3), 2: (2, 4), 5: (5,), 6: (6,), 7: (7,)}


@pytest.mark.parametrize("make", [chain, gemma3])
def test_the_plan_and_its_prices_are_those_of_the_whole_step(make, monkeypatch) -> None:
    options: dict[str, Any] = {"batch": 8, "seq_len": 32, "verify": "none", "advise": False}
    plan = make_plan(make, "2x4", **options).plan
    monkeypatch.setattr(tracing, "thin", lambda folded: folded)
    whole = make_plan(make, "2x4", **options).plan
    assert plan.rules == whole.rules
    assert plan.predicted.step_seconds == pytest.approx(whole.predicted.step_seconds, rel=0.01)
    peak = plan.predicted.peak_bytes_per_device
    assert peak == pytest.approx(whole.predicted.peak_bytes_per_device, rel=0.01)


def blocks_of(program: Any) -> set[str]:
    """The numbers of the blocks that have ops."""
    layers = [op.layer for op in program.ops if "block_" in op.layer]
    return {layer.split("block_")[1].split("/")[0] for layer in layers}


@pytest.mark.parametrize(("make", "n_left"), [(chain, 2), (gemma3, 8)])
def test_only_the_ends_of_a_row_are_traced(make, n_left) -> None:
    model = fold(build(make), periods=2)
    program = make_program(model, model.adapted(TRAIN))
    assert len(blocks_of(program)) == n_left
    n_weights = sum(a.count for a in program.arguments if a.role == "weight")
    assert n_weights == len(build(make).model.weights)


def matmul_flops(program: Any) -> int:
    return sum(op.flops * op.count for op in program.ops)


@pytest.mark.parametrize("make", [chain, frozen, again, halving, fan, with_a_block_in_its_head])
def test_no_flops_are_lost_or_made_up(make, monkeypatch) -> None:
    model = fold(build(make), periods=2)
    program = make_program(model, model.adapted(TRAIN))
    monkeypatch.setattr(tracing, "thin", lambda folded: folded)
    assert matmul_flops(program) == matmul_flops(make_program(model, model.adapted(TRAIN)))


def test_blocks_beside_each_other_are_no_chain() -> None:
    model = fold(build(fan), periods=2)
    assert thin(model) is not model
    program = make_program(model, model.adapted(TRAIN))
    layers = {op.layer for op in program.ops}
    assert all(any(f"block_{n}/up" in layer for layer in layers) for n in range(N_BLOCKS))


def test_a_model_that_is_the_callers_own_is_left_as_it_is() -> None:
    made = chain()
    model = fold(build(lambda: made), periods=2)
    assert thin(model) is model
    given = fold(build(made), periods=2)
    assert thin(given) is given


def test_a_decoding_step_has_all_its_blocks() -> None:
    workload = Workload(kind="decode", batch=8, seq_len=64)
    model = fold(build("gemma3_1b", dtype=workload.policy), periods=2)
    program = make_program(model, workload)
    assert len(blocks_of(program)) == model.folding.blocks[0].traced


def test_copies_with_blocks_left_out_compile_to_the_whole_models_program() -> None:
    rules = (
        Rule(pattern=r"block_\d+/up/kernel", spec=(None, "model")),
        Rule(pattern=r"block_\d+/down/kernel", spec=("model", None)),
    )
    request = CompileRequest(
        model=f"{__name__}:chain",
        workload=Workload(kind="prefill", batch=8, seq_len=32, dtype="float32"),
        mesh=parse_mesh("1x8"),
        rules=rules,
        target="cpu:8",
        leaves_out=True,
    )
    with Child(child_environment(parse_target("cpu:8"))) as child:
        deep = compile_deep(child, request, timeout_seconds=300.0)
        whole = compile_in(child, request, timeout_seconds=300.0)
    assert deep.is_whole
    assert [(stack.template, stack.traced) for stack in deep.blocks] == [("block_*", N_BLOCKS)]
    assert deep.argument_bytes == whole.argument_bytes
    assert set(deep.collectives) == set(merge_collectives(whole.collectives, ["block_*"]))
