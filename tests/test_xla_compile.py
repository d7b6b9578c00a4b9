"""Real compiles. Models are built and compiled in children, by references to this file."""

from dataclasses import replace
from importlib.util import find_spec

import pytest

from autoshard.codec import from_record, to_record
from autoshard.errors import LayoutError, MeshError, OutOfMemoryError, UnknownNameError, XlaError
from autoshard.hardware.targets import parse_target
from autoshard.layout.rules import Rule
from autoshard.mesh import Mesh, parse_mesh
from autoshard.model.folding import BlockStack
from autoshard.model.workload import Workload
from autoshard.processes.child import Child
from autoshard.xla import compile as compile_module
from autoshard.xla.clock import collective_seconds, link_of, step_time
from autoshard.xla.collectives import Collective, merge_collectives
from autoshard.xla.compile import _heap_bytes, compile_deep, compile_in, copied_share
from autoshard.xla.compiled import CompiledStep, CompileRequest
from autoshard.xla.environment import child_environment
from autoshard.xla.extrapolate import extrapolate
from autoshard.xla.partitioned import _folded, target_collectives

SECONDS = 240
MEGATRON = (
    Rule(pattern="token_embedding/embeddings", spec=("model", None)),
    Rule(pattern=r"decoder_block_\d+/attention/(query|key|value)/kernel", spec=("model",)),
    Rule(pattern=r"decoder_block_\d+/attention/attention_output/kernel", spec=("model",)),
    Rule(pattern=r"decoder_block_\d+/ffw_gating(_2)?/kernel", spec=(None, "model")),
    Rule(pattern=r"decoder_block_\d+/ffw_linear/kernel", spec=("model", None)),
)


def gemma(num_key_value_heads=8, **sizes):
    import keras_hub

    return keras_hub.models.GemmaBackbone(
        num_query_heads=8, num_key_value_heads=num_key_value_heads, **sizes
    )


def small_gemma():
    sizes = {"hidden_dim": 64, "intermediate_dim": 256, "head_dim": 16}
    return gemma(vocabulary_size=512, num_layers=8, **sizes)


def sharing_gemma():
    sizes = {"hidden_dim": 64, "intermediate_dim": 256, "head_dim": 16}
    return gemma(num_key_value_heads=4, vocabulary_size=512, num_layers=2, **sizes)


def wide_gemma():
    sizes = {"hidden_dim": 1024, "intermediate_dim": 8192, "head_dim": 128}
    return gemma(vocabulary_size=65_536, num_layers=2, **sizes)


def request(**changes):
    given = {
        "model": f"{__name__}:small_gemma",
        "workload": Workload(kind="prefill", batch=8, seq_len=32),
        "mesh": parse_mesh("1x8"),
        "rules": MEGATRON,
        "target": "cpu:8",
        "periods": 2,
    }
    return CompileRequest(**{**given, **changes})


@pytest.fixture(scope="module")
def child():
    with Child(child_environment(parse_target("cpu:8"))) as child:
        yield child


def compiled(child, **changes):
    return compile_in(child, request(**changes), timeout_seconds=SECONDS)


def test_megatron_layout_has_two_all_reduces_a_block_and_one_for_the_embedding(child):
    step = compiled(child)
    # Attention's output and the feed-forward's output are sums over the split heads and the split
    # inner dimension; the embedding's rows lie on different devices. Each is (8, 32, 64) bfloat16.
    assert all((c.kind, c.axis, c.n_bytes) == ("all-reduce", "model", 8 * 32 * 64 * 2)
               for c in step.collectives)  # fmt: skip
    assert {c.layer: c.count for c in step.collectives} == {
        "token_embedding": 1,
        "decoder_block_0/attention/attention_output": 1,
        "decoder_block_0/ffw_linear": 1,
        "decoder_block_1/attention/attention_output": 1,
        "decoder_block_1/ffw_linear": 1,
    }
    assert {c.dtype for c in step.collectives} == {"bf16"}
    # Wire bytes of a ring: 2 b (g - 1) / g each.
    assert sum(one.wire_bytes for one in step.collectives) == 5 * 2 * 32768 * 7 / 8
    # Logits, a device's share of the vocabulary: 8 x 32 x 512 / 8 bfloat16.
    assert step.output_bytes == 8 * 32 * 64 * 2
    assert step.estimated_cycles is None
    assert from_record(CompiledStep, to_record(step)) == step


def test_data_parallel_training_reduces_every_gradient_over_the_data_axis(child):
    step = compiled(
        child,
        mesh=parse_mesh("8x1"),
        rules=(),
        workload=Workload(kind="train", batch=8, seq_len=32),
    )
    assert {c.axis for c in step.collectives} == {"batch"}
    assert {c.phase for c in step.collectives} <= {"forward", "backward"}
    # Gradients are as large as the weights, bfloat16: per block 4 x 64 x 8 x 16 for attention,
    # 3 x 64 x 128 for the gated feed-forward (KerasHub halves intermediate_dim) and two norms of
    # 64, then the last norm. The embedding's comes in two parts, one from each end of the model.
    per_block = 2 * (4 * 64 * 8 * 16 + 3 * 64 * 128 + 2 * 64)
    blocks = sum(c.count * c.n_bytes for c in step.collectives if c.layer.startswith("decoder"))
    assert blocks == 2 * per_block


def test_output_rules_act_on_activations(child):
    sequence = Rule(pattern=r"decoder_block_\d+/output", spec=("batch", "model", None))
    step = compiled(child, rules=(*MEGATRON, sequence))
    # The last block's output lies split over the sequence: the logits need the whole of it.
    assert [(c.kind, c.n_bytes) for c in step.collectives if c.layer == "token_embedding"][-1] == (
        "all-gather",
        8 * 32 * 64 * 2,
    )
    assert "reduce-scatter" in {c.kind for c in step.collectives}


def test_a_cache_of_fewer_heads_than_devices_stays_split_as_in_the_loop(child):
    # Queries are split by head; of keys and values four devices share one of four heads.
    rules = (replace(MEGATRON[1], pattern=r"attention/query/kernel"), *MEGATRON[2:])
    step = compiled(
        child,
        model=f"{__name__}:sharing_gemma",
        workload=Workload(kind="decode", batch=8, seq_len=32),
        rules=rules,
    )
    assert {collective.kind for collective in step.collectives} == {"all-reduce"}
    cache = (
        8 * 2 * 2 * 32 * 4 * 16 * 2
    )  # batch, blocks, keys and values, length, heads, width, bytes
    assert step.alias_bytes == cache // 4


def test_two_axes_are_told_apart(child):
    step = compiled(
        child, mesh=parse_mesh("2x4"), workload=Workload(kind="train", batch=8, seq_len=32)
    )
    axes = {(c.axis, c.group_size) for c in step.collectives}
    assert axes == {("model", 4), ("batch", 2)}


def test_equal_sums_of_neighbours_are_one_inside_a_block_only():
    sums = [
        replace(program(2, 4, 0).collectives[0], layer=layer, phase="backward")
        for layer in ("block_*/query", "block_*/key", "dense_1", "dense_2")
    ]
    step = program(2, 4, 0, target="cpu:8", collectives=tuple(sums))
    found = {one.layer for one in target_collectives(step, "batch")}
    assert len(found & {"block_*/query", "block_*/key"}) == 1
    assert {"dense_1", "dense_2"} <= found


@pytest.mark.parametrize("kind", ["prefill", "train"])
def test_extrapolation_equals_a_direct_compile(child, kind):
    workload = Workload(kind=kind, batch=8, seq_len=32)
    shallow = [compiled(child, workload=workload, periods=n) for n in (2, 3)]
    # The line through 2 and 3 blocks, at 4: pretend that the model has four.
    cut = [
        replace(step, blocks=tuple(replace(stack, n_blocks=4) for stack in step.blocks))
        for step in shallow
    ]
    direct = compiled(child, workload=workload, periods=4)
    guess = extrapolate(*cut)
    assert set(guess.collectives) == set(merge_collectives(direct.collectives, ["decoder_block_*"]))
    assert guess.argument_bytes == direct.argument_bytes
    assert guess.output_bytes == direct.output_bytes
    assert guess.alias_bytes == direct.alias_bytes


def test_a_deep_compile_extends_two_copies_to_the_whole_model(child):
    step = compile_deep(child, request(periods=None), timeout_seconds=SECONDS)
    # 8 blocks of two all-reduces and the embedding's.
    assert sum(c.count for c in step.collectives) == 17
    assert step.is_whole
    whole = compiled(child, periods=None)
    assert step.argument_bytes == whole.argument_bytes
    moved, of_all = (sum(one.wire_bytes for one in s.collectives) for s in (step, whole))
    assert moved == of_all


@pytest.mark.parametrize(
    ("n_blocks", "period", "can_fold", "is_worth"),
    [
        (28, 1, True, True),
        (34, 6, True, False),  # 16 and 28 blocks
        (60, 6, True, True),  # 12 and 24
        (35, 5, False, False),
        (6, 1, True, False),
    ],
)
def test_copies_are_compiled_where_they_are_smaller_than_the_model(
    n_blocks, period, can_fold, is_worth
):
    stack = BlockStack(template="block_*", n_blocks=n_blocks, period=period, traced=n_blocks)
    folded = stack.folded(2) if can_fold else stack
    small = BlockStack(template="other_*", n_blocks=3, traced=3)
    assert (copied_share([folded, small]) < 1) == is_worth


def test_temporaries_are_those_in_the_main_memory(tmp_path):
    assert _heap_bytes(tmp_path) is None
    (tmp_path / "module_0000.jit_step.after_optimizations-buffer-assignment.txt").write_text(
        "allocation 0: size 4194304, parameter 0, shape |bf16[2048,1024]|:\n"
        " value: <7 param.1 @0> (size=4194304,offset=0): bf16[2048,1024]{1,0}\n"
        "allocation 2: size 3000, preallocated-temp:\n"
        "allocation 3: size 500, color 1, preallocated-temp:\n"
    )
    assert _heap_bytes(tmp_path) == 3000
    (tmp_path / "module_0001.jit_other.after_optimizations-buffer-assignment.txt").write_text("")
    assert _heap_bytes(tmp_path) == 3000


def with_heap(asked, progress):
    """A step, and the heap that was read of its buffer assignment."""
    read = []
    own = compile_module._heap_bytes
    compile_module._heap_bytes = lambda folder: read.append(own(folder)) or read[-1]
    return compile_module.compile_step(asked, progress), read


@pytest.mark.tpu
@pytest.mark.skipif(find_spec("libtpu") is None, reason="needs the tpu extra")
def test_the_tpu_compilers_heap_is_that_of_its_buffer_assignment():
    target = parse_target("tpu:v5e:2x4")
    asked = request(
        model=f"{__name__}:wide_gemma",
        workload=Workload(kind="train", batch=8, seq_len=512),
        rules=(),
        target=str(target),
    )
    with Child(child_environment(target)) as child:
        step, read = child.call(f"{__name__}:with_heap", asked, timeout_seconds=SECONDS)
    assert read == [step.temporary_bytes]
    # What is in use counts the chip's vector memory too; idle is up to a fifth.
    assert step.live_bytes - target.chip.vmem_bytes < step.peak_bytes < 1.25 * step.live_bytes


def test_a_layout_that_keras_refuses_is_one_line(child):
    with pytest.raises(LayoutError) as caught:
        compiled(child, rules=(Rule(pattern=".*norm.*", spec=(None, "model")),))
    assert "\n" not in str(caught.value)
    with pytest.raises(LayoutError, match="must be a multiple of its mesh axis"):
        compiled(child, mesh=parse_mesh("2x4"), workload=Workload(kind="prefill", batch=3))
    twice = (*MEGATRON, Rule(pattern=".*ffw_linear.*", spec=("model",)))
    with pytest.raises(LayoutError, match="Keras refuses the layout of"):
        compiled(child, rules=twice)


def test_other_wrong_requests_are_one_line(child):
    with pytest.raises(UnknownNameError, match="did you mean"):
        compiled(child, model="gemma_7b_eng")
    with pytest.raises(MeshError, match="has 4 devices"):
        compiled(child, mesh=parse_mesh("1x4"))
    with pytest.raises(XlaError, match="needs 16"):
        compiled(child, mesh=parse_mesh("1x16"), target="cpu:16")


def program(traced, count, n_bytes, **changes):
    stack = BlockStack(template="block_*", n_blocks=10, traced=traced)
    inner = Collective(
        kind="all-reduce",
        n_bytes=8,
        dtype="bf16",
        group_size=8,
        axis="model",
        layer="block_*/ffw",
        phase="forward",
        overlapped=False,
        count=count,
        launches=count,
    )
    outer = replace(inner, layer="embedding", count=1, launches=1)
    values = {
        "target": "tpu:v5e:2x4",
        "blocks": (stack,),
        "argument_bytes": n_bytes,
        "output_bytes": 4,
        "temporary_bytes": n_bytes,
        "alias_bytes": 0,
        "live_bytes": n_bytes,
        "collectives": (inner, outer),
        "estimated_cycles": 3000 * traced,
    }
    return CompiledStep(**{**values, **changes})


def test_amounts_grow_linearly_with_depth():
    # 2 blocks: 4 of 100 bytes; 4 blocks: 8 and 180. Ten blocks: 4 + 4 * 4 / 1 = 20, and
    # 100 + 4 * 80 = 420; cycles 6000 + 4 * 6000.
    whole = extrapolate(program(2, 4, 100), program(4, 8, 180))
    assert {c.layer: (c.count, c.launches) for c in whole.collectives} == {
        "block_*/ffw": (20, 20),
        "embedding": (1, 1),
    }
    assert (whole.argument_bytes, whole.output_bytes, whole.peak_bytes) == (420, 4, 844)
    assert whole.live_bytes == 420
    assert whole.estimated_cycles == 30_000
    with pytest.raises(XlaError, match="no shallower and deeper copy"):
        extrapolate(program(4, 8, 180), program(4, 8, 180))


def test_a_collective_of_part_of_an_axis_takes_the_time_of_its_groups():
    whole = replace(program(2, 4, 0).collectives[0], n_bytes=2**30)
    half = replace(whole, group_size=4)
    mesh, target = parse_mesh("1x8"), parse_target("tpu:v5e:2x4")
    times = [collective_seconds(one, link_of(one, mesh, target)) for one in (whole, half)]
    # 2 b (g - 1) / g bytes through each device.
    assert times[1] / times[0] == pytest.approx((3 / 4) / (7 / 8), rel=1e-3)


def test_the_clock_adds_compute_blocking_and_what_overlap_exceeds():
    # v5e: 1.5 GHz; a ring of 8 sends 2 b 7/8 at 2 x 45 GB/s, and takes 8 x 1 us to start.
    blocking = Collective(
        kind="all-reduce",
        n_bytes=90_000_000,
        dtype="bf16",
        group_size=8,
        axis="model",
        layer="",
        phase="forward",
        overlapped=False,
        count=2,
        launches=1,
    )
    hidden = replace(blocking, kind="all-gather", overlapped=True, count=1)
    time = step_time(program(2, 0, 0, collectives=(blocking, hidden), estimated_cycles=1_500_000))
    assert time.compute_seconds == pytest.approx(1e-3)
    assert time.blocking_seconds == pytest.approx(2 * 1.75e-3 + 8e-6)
    assert time.overlapped_seconds == pytest.approx(0.875e-3 + 8e-6)
    assert time.step_seconds == pytest.approx(1e-3 + 3.5e-3 + 8e-6)
    with pytest.raises(XlaError, match="'cpu:8' estimates no time"):
        step_time(program(2, 0, 0, target="cpu:8", estimated_cycles=None))


ANNOUNCEMENT = (
    Rule(pattern="token_embedding/embeddings", spec=(None, "model")),
    Rule(
        pattern=r"decoder_block.*attention.*(query|key|value).*kernel", spec=(None, "model", None)
    ),
    Rule(pattern=r"decoder_block.*attention_output.*kernel", spec=(None, None, "model")),
    Rule(pattern=r"decoder_block.*ffw_gating.*kernel", spec=("model", None)),
    Rule(pattern=r"decoder_block.*ffw_linear.*kernel", spec=(None, "model")),
)


@pytest.mark.tpu
@pytest.mark.parametrize(
    ("target", "rules", "milliseconds"),
    [
        # Gemma 7B, two blocks, batch 8 x 512, forward: 13.77 M cycles at 1.5 GHz and five
        # all-reduces of 25.2 MB; 35.3 M cycles and the all-reduce of all logits, 2.1 GB.
        ("tpu:v5e:2x4", MEGATRON, 11.7),
        ("tpu:v5e:2x4", ANNOUNCEMENT, 84.0),
        # 26.1 M cycles at 0.94 GHz; links of 70 GB/s.
        ("tpu:v3:2x2", MEGATRON, 29.3),
    ],
)
def test_the_clock_agrees_with_known_verdicts_of_the_tpu_compiler(target, rules, milliseconds):
    pytest.importorskip("libtpu")
    with Child(child_environment(parse_target(target))) as child:
        step = compiled(
            child,
            model="gemma_7b_en",
            workload=Workload(kind="prefill", batch=8, seq_len=512),
            rules=rules,
            target=target,
        )
    assert step_time(step).step_seconds * 1e3 == pytest.approx(milliseconds, rel=0.02)


@pytest.mark.tpu
def test_a_step_that_does_not_fit_the_target_is_refused_with_sizes():
    pytest.importorskip("libtpu")
    target = "tpu:v5e:2x2"
    with (
        Child(child_environment(parse_target(target))) as child,
        pytest.raises(OutOfMemoryError, match=f"does not fit {target}: a device needs .* [GT]iB"),
    ):
        # Logits of 512 x 2048 x 256000 in bfloat16 alone are 0.5 TB.
        compiled(
            child,
            model="gemma_2b_en",
            mesh=parse_mesh("1x4"),
            workload=Workload(kind="train", batch=512, seq_len=2048),
            rules=(),
            target=target,
            periods=1,
        )


@pytest.mark.gpu
def test_the_gpu_compiler_decides_as_the_others_do_and_states_memory():
    pytest.importorskip("jax_cuda12_plugin")
    target = "gpu:h100-sxm:8"
    with Child(child_environment(parse_target(target))) as child:
        step = compiled(child, target=target)
    # As on CPU devices: two a block and one for the embedding, each (8, 32, 64) bfloat16.
    assert [(c.kind, c.n_bytes) for c in step.collectives] == [("all-reduce", 32768)] * 5
    # A device's share: 1/8 of (512 x 64 + 2 x (4 x 64 x 128 + 3 x 64 x 128)) weights, norms whole.
    weights = (512 * 64 + 2 * (4 * 64 * 128 + 3 * 64 * 128)) // 8 + 5 * 64
    tokens_and_mask = 8 * 32 * 4 + 8 * 32 * 4
    assert abs(step.argument_bytes - 2 * weights - tokens_and_mask) < 2048


def test_all_reduces_that_the_target_folds_are_one_and_nothing_else_is():
    mesh = parse_mesh("2x4")
    (one,) = program(2, 4, 0).collectives[:1]
    sums, moves = (
        [
            replace(one, kind=kind, axis=axis, phase="backward", n_bytes=64)
            for axis in mesh.axis_names
        ]
        for kind in ("all-reduce", "collective-permute")
    )
    foreseen = {(kind, "batch,model", 64, True): 1 for kind in ("all-reduce", "collective-permute")}
    folded, *others = _folded([*sums, *moves], foreseen, mesh)
    assert (folded.kind, folded.axis, folded.group_size) == ("all-reduce", "batch,model", 8)
    assert others == moves
    assert list(_folded(sums, {}, mesh)) == sums
    # Of the sums over one axis alone nothing is folded, and of several as many as are on both.
    assert list(_folded(sums[:1], foreseen, mesh)) == sums[:1]
    fewer = replace(sums[1], count=1, launches=1)
    folded, rest = _folded([sums[0], fewer], foreseen, mesh)
    assert (folded.axis, folded.count, folded.launches) == ("batch,model", 1, 1)
    assert (rest.axis, rest.count, rest.launches) == ("batch", 3, 3)


def test_all_reduces_over_two_of_three_axes_are_folded_where_that_is_foreseen():
    mesh = Mesh(shape=(2, 2, 2), axis_names=("a", "b", "c"))
    (one,) = program(2, 4, 0).collectives[:1]
    sums = [
        replace(one, kind="all-reduce", axis=axis, phase="backward", n_bytes=64)
        for axis in mesh.axis_names
    ]
    folded, left = _folded(sums, {("all-reduce", "a,c", 64, True): 1}, mesh)
    assert (folded.axis, folded.group_size, left.axis) == ("a,c", 4, "b")
    (folded,) = _folded(sums, {("all-reduce", "a,b,c", 64, True): 1}, mesh)
    assert folded.group_size == 8
    parts = {("all-reduce", "a,b:(1)2", 64, True): 1}
    assert _folded(sums, parts, mesh) == sums
