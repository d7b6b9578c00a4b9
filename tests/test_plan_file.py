"""The plan as a value: its file, its Python source, the Keras objects it makes."""

import json
import os
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from layout_tables import MESH, gemma_table, mixtral_table

from autoshard.cost.values import Memory
from autoshard.errors import BackendError, LayoutError, MeshError, PlanFileError, UsageError
from autoshard.layout.rules import Rule
from autoshard.layout.source import parse_map
from autoshard.mesh import Mesh, Spec
from autoshard.model.workload import Workload
from autoshard.records.parts import (
    Alternative,
    Compiled,
    CompiledCollective,
    PlannedModel,
    Prediction,
    Reason,
    Versions,
)
from autoshard.report.explanation import reasons_text
from autoshard.sharding_plan import Plan, is_stream, load, plan_or_map

RULES = (
    Rule(pattern="token_embedding/embeddings", spec=("model", None)),
    Rule(pattern=r"decoder_block_\d+/ffw_linear/kernel", spec=("model", None)),
)
PREDICTED = Prediction(
    step_seconds=0.25,
    compute_seconds=0.2,
    collective_seconds=0.05,
    collective_bytes=220_000_000,
    peak_bytes_per_device=3_315_000_000,
    bytes_per_device=Memory(weights=2_134_420_224),
)
PLAN = Plan(
    model=PlannedModel.of(gemma_table()),
    mesh=MESH,
    rules=RULES,
    workload=Workload(),
    target="tpu:v5e:2x4",
    predicted=PREDICTED,
    compiled=Compiled(
        target="cpu:8",
        blocks=2,
        fits=None,
        peak_bytes_per_device=None,
        collectives=(
            CompiledCollective(
                kind="all-reduce",
                axis="model",
                wire_bytes=44_040_192,
                count=4,
                layer="decoder_block_*",
            ),
        ),
        step_seconds=None,
    ),
    reasons=(
        Reason(
            family="token_embedding/embeddings",
            spec=("model", None),
            next_best=(None, "model"),
            cost_seconds=0.072,
            cost_bytes=0,
            fits=True,
        ),
    ),
    alternatives=(Alternative(rules=RULES[:1], predicted=PREDICTED),),
    versions=Versions(autoshard="0.1.0", keras="3.15.1"),
)

texts = st.text(max_size=12)
seconds = st.floats(min_value=0, max_value=1e6)
counts = st.integers(min_value=0, max_value=2**60)
predictions = st.builds(
    Prediction,
    step_seconds=seconds,
    compute_seconds=seconds,
    collective_seconds=seconds,
    collective_bytes=counts,
    peak_bytes_per_device=counts,
    bytes_per_device=st.builds(Memory, weights=counts, kv_cache=counts),
)
specs = st.permutations([None, None, "batch", "model"]).flatmap(
    lambda entries: st.integers(0, 4).map(lambda n: tuple(entries[:n]))
)
rules = st.lists(
    st.builds(Rule, pattern=st.sampled_from([r"block_\d+/a", "(a|b)/c", '"', "a'b"]), spec=specs),
    max_size=4,
    unique_by=lambda rule: rule.pattern,
).map(tuple)
collectives = st.builds(
    CompiledCollective,
    kind=texts,
    axis=st.none() | texts,
    wire_bytes=counts,
    count=counts,
    layer=texts,
)
compiled = st.builds(
    Compiled,
    target=texts,
    blocks=st.none() | counts,
    fits=st.none() | st.booleans(),
    peak_bytes_per_device=st.none() | counts,
    collectives=st.lists(collectives, max_size=2).map(tuple),
    step_seconds=st.none() | seconds,
)
plans = st.builds(
    Plan,
    model=st.sampled_from([gemma_table(), mixtral_table()]).map(PlannedModel.of),
    mesh=st.just(MESH),
    rules=rules,
    workload=st.sampled_from([Workload(), Workload(kind="lora", lora_rank=4)]),
    fits=st.booleans(),
    warnings=st.lists(texts, max_size=2).map(tuple),
    target=st.sampled_from(["tpu:v5e:2x4", "gpu:h100-sxm:8", "tpu:v3:2x2", "cpu:8"]),
    predicted=predictions,
    compiled=st.none() | compiled,
    reasons=st.lists(
        st.builds(
            Reason,
            family=texts,
            spec=specs,
            next_best=st.none() | specs,
            cost_seconds=st.none() | st.floats(min_value=-1e6, max_value=1e6),
            cost_bytes=st.none() | st.integers(min_value=-(2**60), max_value=2**60),
            fits=st.booleans(),
        ),
        max_size=2,
    ).map(tuple),
    alternatives=st.lists(
        st.builds(Alternative, rules=rules, predicted=predictions, compiled=st.none() | compiled),
        max_size=2,
    ).map(tuple),
    versions=st.builds(Versions, autoshard=texts, jax=texts),
)


@settings(deadline=None, max_examples=100)
@given(plans)
def test_a_plan_survives_its_file_and_has_the_same_bytes_again(plan: Plan) -> None:
    text = plan.to_json()
    again = Plan.from_json(text)
    assert again == plan
    assert again.to_json() == text


def test_numbers_keep_their_declared_type() -> None:
    # A step of no time is 0.0 in the file, whether it was computed as 0 or as 0.0.
    whole = replace(PLAN, predicted=replace(PREDICTED, step_seconds=0))
    assert (
        whole.to_json() == replace(PLAN, predicted=replace(PREDICTED, step_seconds=0.0)).to_json()
    )
    assert json.loads(whole.to_json())["predicted"]["step_seconds"] == 0.0


def test_the_file_has_the_fields_of_the_format_in_order() -> None:
    record = json.loads(PLAN.to_json())
    assert list(record) == [
        "format",
        "version",
        "model",
        "mesh",
        "batch_dim_name",
        "layout_map",
        "workload",
        "target",
        "predicted",
        "compiled",
        "reasons",
        "alternatives",
        "versions",
    ]
    assert list(record["model"])[:3] == ["name", "parameters", "fingerprint"]
    assert record["mesh"] == {"shape": [1, 8], "axis_names": ["batch", "model"]}
    assert record["batch_dim_name"] == "batch"
    assert record["workload"] == {
        "kind": "train",
        "batch": 8,
        "seq_len": 512,
        "dtype": "bfloat16",
        "optimizer": "adam",
        "lora_rank": None,
    }


def test_that_generate_was_given_up_is_in_the_file_where_it_was() -> None:
    given_up = replace(PLAN, generate=False)
    assert json.loads(given_up.to_json())["generate"] is False
    assert Plan.from_json(given_up.to_json()) == given_up
    assert "generate" not in json.loads(PLAN.to_json())
    assert Plan.from_json(PLAN.to_json()).generate
    assert str(given_up).splitlines()[0].endswith("generate may be slow or fail under this plan")


def test_rules_stand_one_on_a_line() -> None:
    assert (
        '  "layout_map": [\n'
        '    ["token_embedding/embeddings", ["model", null]],\n'
        '    ["decoder_block_\\\\d+/ffw_linear/kernel", ["model", null]]\n'
        "  ],\n"
    ) in PLAN.to_json()


def test_a_saved_plan_loads(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    PLAN.save(path)
    assert load(path) == PLAN
    PLAN.save(str(path))
    assert path.read_text() == PLAN.to_json()
    assert os.listdir(tmp_path) == ["plan.json"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~current_umask()


def current_umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask


def test_what_cannot_be_written_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(PlanFileError) as error:
        PLAN.save(tmp_path / "missing" / "plan.json")
    assert str(error.value) == (
        f"cannot write {tmp_path}/missing/plan.json: No such file or directory"
    )
    (tmp_path / "plan.json").mkdir()
    with pytest.raises(PlanFileError, match="Is a directory"):
        PLAN.save(tmp_path / "plan.json")
    assert os.listdir(tmp_path) == ["plan.json"]


def test_a_pipe_is_written_to_and_stays_one(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        PLAN.save(pipe)
        assert os.read(reader, 2**20).decode() == PLAN.to_json()
    finally:
        os.close(reader)
    assert stat.S_ISFIFO(pipe.stat().st_mode)


def test_standard_output_is_written_to_like_any_other_text(capsys: Any) -> None:
    print("before")
    PLAN.save("/dev/stdout")
    print("after")
    assert capsys.readouterr().out == f"before\n{PLAN.to_json()}after\n"


def test_a_next_best_that_is_faster_is_explained() -> None:
    faster = replace(PLAN.reasons[0], cost_seconds=-2e-4)
    row, *notes = reasons_text(replace(PLAN, reasons=(faster,))).splitlines()[2:]
    assert row.endswith("-200 us  same")
    assert notes == [
        "(step and memory: what the next best would add, predicted by formulas;",
        "the ranking adds a twentieth of the collectives behind compute, 0.25% a rule for an "
        "output, for biases or for some of several numbered layers, 0.7% for twice the memory;",
        "a compiler was asked about whole layouts, and its word counts first)",
    ]
    assert "a compiler" not in reasons_text(replace(PLAN, compiled=None))


def test_layers_that_a_number_tells_apart_are_one_line_where_they_lie_alike() -> None:
    def reason(family: str, spec: Spec, seconds: float) -> Reason:
        other: Spec = (None, "model")
        return Reason(family=family, spec=spec, next_best=other, cost_seconds=seconds, cost_bytes=0)

    whole, split = (None, None), ("model", None)
    reasons = [reason(f"up_{k}/kernel", whole, (9 - k) * 1e-3) for k in range(3)]
    reasons += [reason("up_3/kernel", split, 1e-3), reason("head/kernel", split, 2e-3)]
    reasons += [reason(f"down_{k}/kernel", split, 4e-3) for k in range(3)]
    rows = reasons_text(replace(PLAN, reasons=tuple(reasons))).splitlines()[2:]
    assert [(row.split("  ")[0], row.split()[-2]) for row in rows[:4]] == [
        ("up_*/kernel (3 of 4)", "ms"),
        ("up_3/kernel", "ms"),
        ("head/kernel", "ms"),
        ("down_*/kernel", "ms"),
    ]
    assert "+7 ms" in rows[0] and "for the one where that is least" in rows[4]


def test_a_file_in_memory_is_a_file_like_any_other() -> None:
    assert not is_stream(Path("/dev/shm/plan.json"))
    assert is_stream(Path("/dev/stdout"))


@pytest.mark.parametrize(
    ("target", "message"),
    [("moon", "unknown chip 'moon'"), ("tpu:v5e:2x2", "target tpu:v5e:2x2 has 4")],
)
def test_a_plan_is_for_a_target_of_as_many_devices(target: str, message: str) -> None:
    text = PLAN.to_json().replace(f'"{PLAN.target}"', f'"{target}"')
    with pytest.raises(PlanFileError, match=message):
        Plan.from_json(text)


def test_a_number_that_json_lacks_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    plan = replace(PLAN, predicted=replace(PREDICTED, step_seconds=float("inf")))
    with pytest.raises(PlanFileError) as error:
        plan.save(tmp_path / "plan.json")
    assert str(error.value) == "predicted.step_seconds is inf; a plan holds finite numbers only"
    assert os.listdir(tmp_path) == []


def changed(*path: str | int, to: Any = ...) -> str:
    """The text of the plan's file with one field changed, or taken out."""
    record = json.loads(PLAN.to_json())
    inner: Any = record
    for key in path[:-1]:
        inner = inner[key]
    if to is ...:
        del inner[path[-1]]
    else:
        inner[path[-1]] = to
    return json.dumps(record)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "plan.json is not JSON: Expecting value: line 1 column 1 (char 0)"),
        ("[" * 100_000, "plan.json is not JSON: maximum recursion depth exceeded"),
        ("[]", "field 'format' is not \"autoshard-plan\""),
        (changed("format", to="other"), "field 'format' is not \"autoshard-plan\""),
        (changed("version", to=2), "field 'version' is 2; this autoshard reads version 1"),
        (changed("version"), "field 'version' is null; this autoshard reads version 1"),
        (changed("target"), "field 'target' is missing"),
        (changed("target", to=8), "field 'target' is 8; expected a string"),
        (
            changed("predicted", "step_seconds", to="0.1"),
            "field 'predicted.step_seconds' is \"0.1\"; expected a number",
        ),
        (
            changed("predicted", "collective_bytes", to=1.5),
            "field 'predicted.collective_bytes' is 1.5; expected a whole number",
        ),
        (
            changed("predicted", "bytes_per_device", to=None),
            "field 'predicted.bytes_per_device' is null; expected an object with weights, "
            "gradients, optimizer, activations, kv_cache",
        ),
        (
            changed("predicted", "seconds", to=1),
            "unknown field 'predicted.seconds'; expected step_seconds, compute_seconds, "
            "collective_seconds, collective_bytes, peak_bytes_per_device, bytes_per_device",
        ),
        (
            changed("compiled", "collectives", 0, "count", to=True),
            "field 'compiled.collectives[0].count' is true; expected a whole number",
        ),
        (changed("reasons", to={}), "field 'reasons' is {}; expected a list"),
        (
            changed("layout_map", 0, to=["a"]),
            "field 'layout_map[0]': [\"a\"] is not a rule; expected [pattern, [axis or null, ...]]",
        ),
        (
            changed("layout_map", 0, to=["a(", []]),
            "field 'layout_map[0]': rule 'a(' is not a regular expression: missing ), unterminated "
            "subpattern at position 1; escape the character with a backslash if it is part of the "
            "path",
        ),
        (
            changed("layout_map", 0, to=["a", ["data"]]),
            "rule 'a' names axis 'data', which mesh 1x8 does not have; its axes are batch, model",
        ),
        (
            changed("layout_map", 0, to=["a", ["model", "model"]]),
            "rule 'a' uses axis 'model' for 2 dimensions of (\"model\", \"model\"); an axis can "
            "split one: put None for the others",
        ),
        (
            changed("predicted", "step_seconds", to=-0.25),
            "field 'predicted.step_seconds' is -0.25; expected a number, 0 or more",
        ),
        (
            changed("compiled", "collectives", 0, "count", to=-4),
            "field 'compiled.collectives[0].count' is -4; expected a whole number, 0 or more",
        ),
        (
            changed("mesh", "shape", to=[0, 8]),
            "field 'mesh': mesh '0x8' is not a grid of devices: every axis needs at least one",
        ),
        (
            changed("workload", "batch", to=0),
            "field 'workload': a batch of 0 sequences of 512 tokens is no work: both must be at "
            "least 1",
        ),
        (changed("workload", "kind", to=1), "field 'workload.kind' is 1; expected a string"),
        (
            changed("batch_dim_name", to="model"),
            'field \'batch_dim_name\' is "model"; expected the first axis of the mesh, "batch"',
        ),
        (
            PLAN.to_json().replace("0.25", "NaN", 1),
            "field 'predicted.step_seconds' is NaN; expected a finite number",
        ),
    ],
)
def test_a_foreign_or_broken_file_is_refused_with_its_first_wrong_field(
    text: str, message: str
) -> None:
    with pytest.raises(PlanFileError) as error:
        Plan.from_json(text, "plan.json")
    said = str(error.value).removeprefix("plan.json is not a plan that can be used: ")
    assert said.startswith(message)
    assert "\n" not in said


def test_a_file_that_is_not_there_or_no_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    with pytest.raises(UsageError) as error:
        load(path)
    assert str(error.value) == f"there is no plan '{path}'"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(PlanFileError, match="is not JSON: it is not UTF-8 text"):
        load(path)


def test_a_layout_is_a_plan_by_what_it_holds_whatever_its_name(tmp_path: Path) -> None:
    path = tmp_path / "saved"
    PLAN.save(path)
    assert plan_or_map(PLAN) is PLAN
    for layout in (path, str(path), PLAN.to_json()):
        assert plan_or_map(layout) == PLAN
    path.write_text(PLAN.to_json(), encoding="utf-8-sig")  # as some editors save it
    assert plan_or_map(path) == load(path) == PLAN
    source = tmp_path / "map.py"
    source.write_text(PLAN.to_python())
    for layout in (source, PLAN.to_python(), "kerashub", {}):
        assert not isinstance(plan_or_map(layout), Plan)
    for broken in ("{", tmp_path):
        with pytest.raises(PlanFileError):
            plan_or_map(broken)
    with pytest.raises(UsageError):
        plan_or_map(tmp_path / "missing.json")


def test_a_plan_whose_batch_does_not_divide_is_refused() -> None:
    record = json.loads(PLAN.to_json())
    record["mesh"]["shape"], record["workload"]["batch"] = [2, 4], 3
    with pytest.raises(PlanFileError, match="'workload': a batch of 3 does not divide over the 2"):
        Plan.from_json(json.dumps(record))


def test_a_rule_that_stands_twice_makes_no_plan() -> None:
    with pytest.raises(LayoutError, match="'token_embedding/embeddings' stands twice"):
        replace(PLAN, rules=(RULES[0], RULES[0]))


def test_a_plan_says_that_adam_stands_still_only_of_weights_in_bfloat16_that_it_trains() -> None:
    assert "moves no weight" in PLAN.stillness and PLAN.stillness in PLAN.notes
    frozen = tuple(replace(family, trainable=False) for family in PLAN.model.families)
    still = replace(PLAN, model=replace(PLAN.model, families=frozen))
    assert not still.stillness and not still.notes
    assert Plan.from_json(still.to_json()) == still


def test_the_python_source_reads_as_written_by_hand() -> None:
    assert (
        PLAN.to_python()
        == """\
import keras

# "gemma" on 8 devices, dtype bfloat16
# Keras' adam moves no weight in bfloat16, where its beta_2 of 0.999 is 1: give it beta_2=0.99, or \
plan for mixed_bfloat16
device_mesh = keras.distribution.DeviceMesh(
    shape=(1, 8),
    axis_names=("batch", "model"),
    devices=keras.distribution.list_devices(),
)
layout_map = keras.distribution.LayoutMap(device_mesh)
layout_map["token_embedding/embeddings"] = ("model", None)
layout_map[r"decoder_block_\\d+/ffw_linear/kernel"] = ("model", None)
distribution = keras.distribution.ModelParallel(
    layout_map=layout_map, batch_dim_name="batch"
)
keras.distribution.set_distribution(distribution)
"""
    )
    assert parse_map(PLAN.to_python()).accepted() == RULES
    assert parse_map(replace(PLAN, rules=()).to_python()).accepted() == ()


def test_what_to_know_of_a_plan_stays_with_it_and_is_a_comment_of_its_source() -> None:
    warned = replace(
        PLAN,
        fits=False,
        generate=False,
        warnings=("nothing is split", "two\nimport os"),
        workload=Workload(kind="prefill"),
    )
    assert Plan.from_json(warned.to_json()) == warned
    lines = warned.to_python().splitlines()
    assert lines[3:7] == [
        "# does not fit the memory it was made for: the nearest layout",
        "# made without regard to generate: generate may be slow or fail under this plan",
        "# nothing is split",
        "# two import os",
    ]
    assert parse_map(warned.to_python()).accepted() == RULES
    assert not {"fits", "warnings"} & json.loads(PLAN.to_json()).keys()


def test_a_plan_prints_as_its_map() -> None:
    assert str(PLAN).splitlines()[1:] == [str(rule) for rule in RULES]
    assert str(replace(PLAN, rules=())).endswith(
        "\nno rule: every variable is whole on every device"
    )


def test_a_name_with_a_line_break_stays_in_its_comment() -> None:
    model = replace(PLAN.model, name="x\nimport os")
    assert '\n# "x\\nimport os" on 8 devices, ' in replace(PLAN, model=model).to_python()


def test_the_plan_of_a_model_is_refused_for_another_with_the_first_difference() -> None:
    def said(table: Any) -> str:
        with pytest.raises(PlanFileError) as error:
            PLAN.check_model(table)
        return str(error.value).removeprefix(
            f"the plan was made for gemma, and {table.name} differs from it: "
        )

    PLAN.check_model(gemma_table())
    assert said(gemma_table(dtype="float32")) == (
        "'token_embedding/embeddings' is (256000, 3072) float32 and the plan has (256000, 3072) "
        "bfloat16; plan for this model"
    )
    assert said(gemma_table(n_blocks=3)) == (
        "there are 3 variables 'decoder_block_*/pre_attention_norm/scale', the last "
        "'decoder_block_2/pre_attention_norm/scale', and the plan has 2; plan for this model"
    )
    assert said(gemma_table(lora=True)) == (
        "'decoder_block_0/attention/query/lora_kernel_a' (16, 3072, 4) float32 is not among the "
        "plan's variables; plan for this model"
    )
    with pytest.raises(
        PlanFileError, match=r"it has no variable 'decoder_block_\*/.*lora_kernel_a'"
    ):
        replace(PLAN, model=PlannedModel.of(gemma_table(lora=True))).check_model(gemma_table())


def test_partition_specs_name_every_variable() -> None:
    from jax.sharding import PartitionSpec

    found = PLAN.partition_specs(gemma_table())
    variables = [variable.path for variable in gemma_table().variables]
    assert list(found) == [*variables, *gemma_table().state_paths]
    assert found["token_embedding/embeddings"] == PartitionSpec("model", None)
    assert found["decoder_block_1/ffw_linear/kernel"] == PartitionSpec("model", None)
    assert found["final_normalization/scale"] == PartitionSpec()


def test_a_mesh_of_another_size_than_the_devices_is_refused_with_both_numbers() -> None:
    with pytest.raises(MeshError) as error:
        PLAN.distribution(devices=["cpu:0", "cpu:1"])
    assert str(error.value) == (
        "the plan is for mesh 1x8, 8 devices, and there were given 2; pass devices=[...] with 8, "
        "or plan for 2"
    )


def test_a_device_mesh_of_another_shape_is_refused() -> None:
    import keras

    plan = replace(PLAN, mesh=Mesh(shape=(1, 1), axis_names=("batch", "model")))
    device = keras.distribution.list_devices()[:1]
    other = keras.distribution.DeviceMesh((1, 1), ("data", "model"), device)
    with pytest.raises(MeshError) as error:
        plan.layout_map(other)
    assert str(error.value) == (
        "the device mesh is 1x1 (data, model) and the plan is for 1x1 (batch, model); make that "
        "mesh, or plan for this one"
    )
    assert list(plan.layout_map(plan.device_mesh(device))) == [rule.pattern for rule in RULES]
    assert plan.distribution(device).batch_dim_name == "batch"


def test_another_backend_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import keras

    monkeypatch.setattr(keras.config, "backend", lambda: "tensorflow")
    with pytest.raises(BackendError, match="KERAS_BACKEND=jax"):
        PLAN.distribution()


# A dense layer of 16 x 32 on a 2x4 mesh: columns over model leave 16 x 8 on each of the 8 devices.
PASTED = """
import keras
model = keras.Sequential([keras.Input((16,)), keras.layers.Dense(32, name="ffw")])
kernel = model.layers[0].kernel.value
assert tuple(kernel.sharding.spec) == (None, "model"), kernel.sharding
assert kernel.addressable_shards[0].data.shape == (16, 8)
assert len(kernel.addressable_shards) == 8
assert keras.distribution.distribution().batch_dim_name == "batch"
"""


def test_the_source_shards_a_model_as_it_is_pasted_and_the_objects_do_the_same() -> None:
    plan = replace(
        PLAN,
        mesh=Mesh(shape=(2, 4), axis_names=("batch", "model")),
        rules=(Rule(pattern=".*ffw/kernel", spec=(None, "model")),),
    )
    objects = (
        "import keras, sys\nfrom autoshard.sharding_plan import Plan\n"
        "plan = Plan.from_json(sys.argv[1])\n"
        "keras.distribution.set_distribution(plan.distribution())\n"
    )
    environment = os.environ | {
        "KERAS_BACKEND": "jax",
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
    }
    for source in (plan.to_python(), objects):
        done = subprocess.run(
            [sys.executable, "-c", source + PASTED, plan.to_json()],
            env=environment,
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert done.returncode == 0, done.stderr
