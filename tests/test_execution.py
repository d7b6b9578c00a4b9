"""What a run compares, what memory it asks for, and how it ends when a process does."""

import itertools
import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_cli import environment, run
from test_execution_models import asked, described, ran, split_all

from autoshard import host
from autoshard.errors import ChildError, ChildTimeoutError
from autoshard.execution import running
from autoshard.execution.agreement import compare
from autoshard.execution.children import execute, run_environment
from autoshard.execution.memory import needed_bytes
from autoshard.execution.tolerance import Tolerance, tolerance_of
from autoshard.host import available_bytes
from autoshard.layout.rules import format_rules
from autoshard.mesh import parse_mesh
from autoshard.model.build import build
from autoshard.model.data import run_data, targets_of
from autoshard.model.fold import fold
from autoshard.model.keras_import import import_keras, import_keras_hub
from autoshard.model.loading import sharded_loading
from autoshard.model.workload import Workload

__all__ = ["environment"]

# delta = 0.2124 x 2^-7 sqrt(2 x 2) = 0.003318.
COARSE = Tolerance(step=2.0**-7, n_roundings=2, n_terms=0)


def test_roundings_are_counted_along_the_stream_of_a_residual_model() -> None:
    model = described("gemma")
    found = tolerance_of(model)
    # Outside the two blocks: embedding, final norm, input layers and what else has no layer inside.
    # A block adds twice to the stream; n does not grow by all of its layers with each block.
    deep = tolerance_of(build("gemma_7b_en"))
    assert deep.n_roundings - found.n_roundings == 2 * (28 - 2)
    # A stack of one block is one too.
    shallow = tolerance_of(fold(build("gemma_7b_en"), periods=1))
    assert deep.n_roundings - shallow.n_roundings == 2 * (28 - 1)
    assert found.step == 2.0**-23
    assert deep.step == 2.0**-7
    # delta of bfloat16 comes from the roundings: 28 blocks, 2 each, are at least 56 of them.
    least = 0.2124 * math.sqrt(2 * 56) * 2**-7
    assert least < deep.relative < 2 * least


def test_u_is_the_error_of_rounding_numbers_of_all_sizes() -> None:
    from ml_dtypes import bfloat16

    values = np.exp(np.random.default_rng(0).uniform(0, 5, 100_000))
    off = values.astype(bfloat16).astype("float64") / values - 1
    one = Tolerance(step=2.0**-7, n_roundings=1, n_terms=0)
    assert np.sqrt(np.mean(np.square(off))) == pytest.approx(one.relative / math.sqrt(2), rel=0.02)


def test_outputs_may_differ_by_the_tolerance_and_no_more() -> None:
    reference = {"output": np.array([1.0, -1.0, 1.0, -1.0], "float32")}
    # Root mean square 1, so 0.003318 is allowed, and (3 + sqrt(2 ln 4)) 0.003318 + 2^-7 of each.
    for off, holds in ((0.0033, True), (0.0034, False)):
        found = {"output": reference["output"] + np.float32(off)}
        mean, largest = compare("predict", found, reference, COARSE, 0)
        assert mean.holds is holds
        assert mean.allowed == pytest.approx(0.003318, abs=1e-6)
        assert largest.holds
        assert largest.allowed == pytest.approx(0.02329, abs=1e-5)


def generated(margin: float) -> dict[str, Any]:
    """Two tokens of prompt, three made, the second of them by a margin."""
    return {
        "tokens": np.array([[5, 6, 7, 8, 9]]),
        "margins": np.array([[9.0, 9.0, margin, 9.0]]),
        "root_mean_square": np.array(1.0),
        "largest": np.array(1.0),
    }


def test_another_token_is_wrong_where_the_choice_was_clear_and_ends_the_comparison() -> None:
    other = {"tokens": np.array([[5, 6, 7, 1, 2]])}
    (clear,) = compare("generate", other, generated(margin=1.0), COARSE, 2)
    assert clear.found == 1
    assert not clear.holds
    (tie,) = compare("generate", other, generated(margin=0.01), COARSE, 2)
    assert tie.holds
    assert tie.note.startswith("1 of 3 tokens equal; 1 chosen by a margin of more than")
    (equal,) = compare("generate", generated(1.0), generated(1.0), COARSE, 2)
    assert equal.note.startswith("3 of 3 tokens equal; 3 chosen")


def test_losses_and_weights_are_compared() -> None:
    def trained(second: float) -> dict[str, Any]:
        return {"losses": np.array([2.0, second]), "slots": np.array([])}

    losses = trained(1.0)
    close, moved = compare("fit", trained(1.006), losses, COARSE, 0)
    far, _ = compare("fit", trained(1.007), losses, COARSE, 0)
    _, still = compare("fit", trained(2.0), losses, COARSE, 0)
    assert (moved.holds, still.holds) == (True, False)
    assert close.allowed == pytest.approx(2 * 0.003318, abs=1e-5)
    assert close.holds
    assert not far.holds
    digests = {"digests": np.zeros((3, 32), "uint8")}
    (same,) = compare("load", digests, digests, COARSE, 0)
    assert same.holds
    changed = {"digests": np.eye(3, 32, dtype="uint8")[[0, 0, 0]] * [[0], [1], [0]]}
    (other,) = compare("load", changed, digests, COARSE, 0)
    assert other.found == 1


@pytest.mark.parametrize(
    ("slots", "holds"),
    [
        ([1.1, 0.21, 0.01], True),
        ([1.0, 0.20, 0.0], True),  # what is small may be anything
        ([1.0, 0.40, 0.001], False),
        ([0.5, 0.20, 0.001], False),
        ([1.0, 0.0, 0.001], False),
    ],
)
def test_gradients_may_not_be_twice_as_large(slots: list[float], holds: bool) -> None:
    losses = {"losses": np.array([2.0, 1.0])}
    expected = losses | {"slots": np.array([1.0, 0.2, 0.001])}
    *_, found = compare("fit", losses | {"slots": np.array(slots)}, expected, COARSE, 0)
    assert found.holds == holds
    assert found.note == "2 of 3, those above 0.0033 of the largest"


def test_outputs_that_are_open_in_every_size_are_held_against_targets_of_size_1() -> None:
    def network() -> Any:
        keras = import_keras()
        pictures = keras.Input((None, None, 3))
        return keras.Model(pictures, keras.layers.Conv2D(4, 3, padding="same")(pictures))

    model = build(network)
    data = run_data(model, Workload(batch=2, seq_len=8), seed=0)
    assert targets_of(model, data, seed=0).values.shape == (2, 1, 1, 4)


def test_the_peak_of_a_run_is_its_own_and_not_that_of_who_starts_it() -> None:
    code = "from autoshard.execution.worker import _peak_bytes; print(_peak_bytes())"
    ballast = np.ones(2**27)
    started = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert int(started.stdout) < ballast.nbytes


def test_memory_counts_every_copy_on_every_device() -> None:
    model = build("gemma_7b_en")
    mesh, workload = parse_mesh("1x8"), Workload(kind="prefill", batch=1, seq_len=8)
    # bfloat16 weights, one of them in float32, 16 bytes a logit, 1 GiB of libraries.
    weights, embedding = 2 * 8_537_680_896, 4 * 256_000 * 3072
    rest = 16 * 8 * 256_000 + 2**30
    assert needed_bytes(model, "predict", workload, (), None) == weights + embedding + rest
    # Without a rule each of eight devices holds all of them.
    whole = needed_bytes(model, "predict", workload, (), mesh)
    assert whole == 8 * (weights + embedding) + rest
    # A gradient and Adam's two slots, and its two scalars.
    train = replace(workload, kind="train")
    trained = needed_bytes(model, "fit", train, (), None)
    assert trained == pytest.approx(4 * weights + embedding + rest, abs=100)


def test_the_memory_of_this_machine_is_known_or_said_not_to_be() -> None:
    available = available_bytes()
    assert available is None or available > 2**20


def test_free_pages_that_single_processors_keep_are_available(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    zones = "Node 0, zone Normal\n  pages free 7\n  pagesets\n    cpu: {}\n      count:    {}\n"
    monkeypatch.setattr(host, "_PROC", tmp_path)
    monkeypatch.setattr(host, "_CGROUP", tmp_path)
    assert available_bytes() is None
    (tmp_path / "meminfo").write_text("MemTotal: 3000 kB\nMemAvailable: 2000 kB\n")
    assert available_bytes() == 2000 * 1024
    (tmp_path / "zoneinfo").write_text(zones.format(0, 30) + zones.format(1, 12))
    assert available_bytes() == 2000 * 1024 + 42 * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize(
    ("line", "folder", "limit", "used", "files"),
    [
        ("0::/jobs/one", "jobs", "memory.max", "memory.current", "inactive_file"),
        (
            "4:cpu,memory:/jobs/one",
            "memory/jobs/one",
            "memory.limit_in_bytes",
            "memory.usage_in_bytes",
            "total_inactive_file",
        ),
    ],
)
def test_what_a_control_group_around_the_process_leaves_is_available(
    line: str,
    folder: str,
    limit: str,
    used: str,
    files: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(host, "_PROC", tmp_path)
    monkeypatch.setattr(host, "_CGROUP", tmp_path / "groups")
    (tmp_path / "meminfo").write_text("MemAvailable: 2000 kB\n")
    (tmp_path / "self").mkdir()
    (tmp_path / "self/cgroup").write_text(f"7:freezer:/\n{line}\n")
    group = tmp_path / "groups" / folder
    group.mkdir(parents=True)
    (group / limit).write_text("50000\n")
    (group / used).write_text("20000\n")
    (group / "memory.stat").write_text(f"{files} 3000\n")
    assert available_bytes() == 33_000


def map_of(name: str, folder: Path) -> tuple[str, ...]:
    """The arguments that name a layout of a small model."""
    path = folder / "map.py"
    path.write_text(format_rules(split_all(described(name), parse_mesh("1x8"))) + "\n")
    return (str(path), "--model", f"small_models:{name}", "--mesh", "1x8", "--dtype", "float32")


def test_a_layout_is_run_and_held_against_the_unsharded_model(tmp_path: Path) -> None:
    result = run("verify", *map_of("vit", tmp_path), "--run")
    assert result.exit_code == 0, result.output
    assert "PASSED: predict, fit" in result.stdout
    assert "held against the same weights unsharded on one device" in result.stdout
    assert "loss of step 3: " in result.stdout
    assert "all 2 blocks" in result.stdout


def test_gradients_that_count_copies_fail_though_the_losses_agree(tmp_path: Path) -> None:
    (tmp_path / "map.py").write_text('layout_map["last/kernel"] = (None, "model")\n')
    model = ("--model", "small_models:depthwise", "--mesh", "2x4", "--dtype", "float32")
    result = run("verify", str(tmp_path / "map.py"), *model, "--run")
    assert result.exit_code == 1, result.output
    assert "between root mean squares: 4, allowed 1.5: TOO MUCH" in result.stdout
    assert result.stdout.count("TOO MUCH") == 1
    assert "FAILED: fit" in result.stdout


def test_two_processes_share_a_layout_and_agree_with_one(tmp_path: Path) -> None:
    arguments = ("verify", *map_of("gemma", tmp_path), "--run", "--processes", "2")
    result = run(*arguments, "--format", "json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["against"] == "the same plan in one process"
    assert [part["part"] for part in found["parts"]] == ["predict", "generate", "fit"]
    for part in found["parts"]:
        assert part["agreements"]
        assert part["placed"]["misplaced"] == []
        assert part["placed"]["n_split"] > 0


def test_a_process_that_dies_ends_the_run_with_its_name() -> None:
    mesh = parse_mesh("1x8")
    request = replace(
        asked("gemma", "predict", mesh), model="small_models:dies_in_the_second_process"
    )
    with pytest.raises(ChildError, match=r"process 1 of 2 failed and all were stopped: .*SIGKILL"):
        execute(request, n_processes=2, timeout_seconds=120)


def test_a_run_past_its_limit_is_stopped() -> None:
    request = asked("gemma", "predict", parse_mesh("1x8"))
    with pytest.raises(ChildTimeoutError, match="process 0 of 2 failed .* limit of 0.5 s"):
        execute(request, n_processes=2, timeout_seconds=0.5)


def test_what_the_machine_cannot_hold_is_run_as_deep_as_it_can(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model = fold(build("gemma_7b_en"), periods=5)
    needed = needed_bytes(model, "predict", running_workload("predict"), (), None)
    monkeypatch.setattr(running, "available_bytes", lambda: needed)
    asked_for: list[Any] = []

    def refuse(request: Any, **limits: Any) -> Any:
        asked_for.append(request)
        raise ChildError("not now")

    monkeypatch.setattr(running, "execute", refuse)
    path = tmp_path / "map.py"
    path.write_text('layout_map["token_embedding/embeddings"] = ("model", None)')
    found = running.run(str(path), model="gemma_7b_en", mesh="1x1")
    predict = found.parts[0]
    whole = needed_bytes(build("gemma_7b_en"), "predict", running_workload("predict"), (), None)
    assert (predict.blocks, predict.n_blocks) == (5, 28)
    assert predict.missing_bytes == whole - needed
    assert predict.failure == "not now"
    assert asked_for[0].periods == 5
    assert not found.passed
    # All weights cannot be trained in that, so low-rank factors are.
    assert "low-rank factors of rank 4 (to train all weights takes" in found.parts[2].work


def test_memory_is_looked_at_once_for_a_part(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    needed = needed_bytes(build("gemma_2b_en"), "predict", running_workload("predict"), (), None)
    # Enough at the start and for the first part; less from then on.
    looks = itertools.chain([needed, needed], itertools.repeat(needed - 2**20))
    monkeypatch.setattr(running, "available_bytes", lambda: next(looks))

    def refuse(request: Any, **limits: Any) -> Any:
        raise ChildError("not now")

    monkeypatch.setattr(running, "execute", refuse)
    path = tmp_path / "map.py"
    path.write_text('layout_map["token_embedding/embeddings"] = ("model", None)')
    predict, generate, _ = running.run(str(path), model="gemma_2b_en", mesh="1x1").parts
    assert (predict.blocks, predict.failure) == (18, "not now")
    assert generate.blocks < 18 and generate.failure == "not now"


def running_workload(part: str) -> Workload:
    return Workload(kind="prefill", batch=1, seq_len=8)


def test_nothing_is_started_that_the_machine_cannot_hold(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(running, "available_bytes", lambda: 2**30)
    result = run("verify", *map_of("vit", tmp_path), "--run")
    assert result.exit_code == 1
    assert "FAILED: not run: it needs 1.00 GiB and 1.00 GiB are free" in result.stdout


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--run", "--processes", "3"), "8 devices cannot be shared by 3 processes"),
        (("--run", "--target", "tpu:v5e:2x4"), "leave out --target"),
        (("--processes", "2"), "--processes is for --run"),
        (("--run", "--dtype", "int8", "--workload", "prefill"), "weights in int8 begin as zeros"),
    ],
)
def test_wrong_usage_of_a_run_is_one_line(
    options: tuple[str, ...], words: str, tmp_path: Path
) -> None:
    result = run("verify", *map_of("gemma", tmp_path), *options)
    assert result.exit_code == 2, result.output
    assert words in result.stderr


def test_a_run_keeps_the_callers_flags_and_adds_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XLA_FLAGS", "--xla_some_flag=1")
    flags = run_environment("fit", 4)["XLA_FLAGS"].split()
    assert flags[:2] == ["--xla_some_flag=1", "--xla_force_host_platform_device_count=4"]
    assert "--xla_disable_hlo_passes=optimization-barrier-expander,cse_barrier_expander" in flags


@pytest.fixture(scope="module")
def preset(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A preset directory with weights."""
    import keras

    folder = tmp_path_factory.mktemp("preset")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(keras.config, "floatx", lambda: "float32")
        keras.utils.set_random_seed(5)
        with_weights = import_keras_hub().models.GemmaBackbone.from_config(
            described("gemma").backbone.get_config()
        )
        with_weights.save_to_preset(str(folder))
    return str(folder)


# Keras' save_weights copies its variables by a protocol of numpy 1.
@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword")
def test_a_preset_is_loaded_shard_by_shard_bit_by_bit(preset: str) -> None:
    model = build(preset, dtype="bfloat16")
    mesh = parse_mesh("1x8")
    request = replace(asked("gemma", "load", mesh, split_all(model, mesh)), model=preset)
    found = ran(request)
    reference = ran(replace(request, mesh=None, rules=()))
    assert found.placed is not None
    assert found.placed.misplaced == ()
    assert found.placed.n_split > 0
    (same,) = compare("load", found.arrays, reference.arrays, COARSE, 0)
    assert same.holds
    # Zeros would be alike: the embedding and at least four kernels of each block are not.
    assert len(np.unique(found.arrays["digests"], axis=0)) >= 1 + 2 * 4


@pytest.mark.parametrize("sharded", [False, True])
def test_only_keras_own_loading_puts_a_whole_array_on_the_first_device(
    preset: str, sharded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    import contextlib

    import jax
    from keras.src.backend.jax.core import Variable

    from autoshard.layout.distribution import keras_distribution

    model = build(preset, dtype="bfloat16")
    mesh = parse_mesh("1x8")
    assigned: dict[str, int] = {}
    original = Variable._direct_assign

    def direct_assign(variable: Any, value: Any) -> None:
        first = [s.data.nbytes for s in value.addressable_shards if s.device.id == 0]
        assigned[variable.path] = sum(first)
        original(variable, value)

    distribution = keras_distribution(split_all(model, mesh), mesh, jax.devices())
    with distribution.scope(), sharded_loading() if sharded else contextlib.nullcontext():
        # What initializers make comes before what is loaded.
        monkeypatch.setattr(Variable, "_direct_assign", direct_assign)
        import_keras_hub().models.Backbone.from_preset(preset, dtype="bfloat16")
    # The embedding: 64 x 32 of 2 bytes, split over eight devices or not.
    assert assigned["token_embedding/embeddings"] == 64 * 32 * 2 // (8 if sharded else 1)
