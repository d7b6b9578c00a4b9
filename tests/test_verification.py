"""Plans and foreign maps, compiled for a target: what is said, and what stands in one line."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_cli import SMALL, environment, plan_small, run
from test_xla_compile import program

from autoshard import verification
from autoshard.comparison import compare
from autoshard.errors import UsageError, XlaError
from autoshard.execution.running import run as run_plan
from autoshard.hardware.targets import parse_target
from autoshard.layout.causes import Causes
from autoshard.layout.rules import Rule
from autoshard.mesh import parse_mesh
from autoshard.report.verify import verification_text
from autoshard.verification import verify
from autoshard.xla.attached import Seen, target_seen

__all__ = ["environment"]

MAP = """
layout_map["token_embedding/embeddings"] = ("model", None)
layout_map[r"decoder_block_\\d+/ffw_linear/kernel"] = ("model", None)
layout_map[r"decoder_block_\\d+/ffw_gating(_2)?/kernel"] = (None, "model")
"""
OPTIONS = ("--model", SMALL, "--dtype", "float32", "--seq-len", "16")


@pytest.fixture(scope="module")
def plan_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("autoshard.cli._set_backend", lambda: None)
        patch.syspath_prepend(str(Path(__file__).parent))
        assert plan_small("--memory-limit", "600kB", "-o", str(path)).exit_code == 0
    return str(path)


def test_a_plan_is_compiled_and_its_collectives_traced_to_rules(plan_file: str) -> None:
    result = run("verify", plan_file, "--target", "cpu", "--format", "json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["target"] == "cpu:8"
    assert found["fits"] is None
    assert found["blocks"] == found["n_blocks"] == 2
    assert found["predicted"] == json.loads(Path(plan_file).read_text())["predicted"]
    causes = {item["layer"]: item["cause"] for item in found["collectives"]}
    patterns = {rule[0] for rule in found["layout_map"]}
    assert causes["decoder_block_*/ffw_gating"] in patterns
    assert causes["decoder_block_*/ffw_linear"] in patterns
    # Verified again, from the cache, word for word.
    assert run("verify", plan_file, "--target", "cpu", "--format", "json").stdout == result.stdout


def test_a_map_that_splits_one_block_alone_is_compiled(tmp_path: Path) -> None:
    path = tmp_path / "map.py"
    path.write_text('layout_map["decoder_block_0/ffw_linear/kernel"] = ("model", None)\n')
    options = (*OPTIONS, "--mesh", "1x8", "--target", "cpu", "--format", "json")
    result = run("verify", str(path), *options)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["collectives"] != []


def test_a_map_from_elsewhere_is_compiled_too(tmp_path: Path) -> None:
    path = tmp_path / "map.py"
    path.write_text(MAP)
    result = run("verify", str(path), *OPTIONS, "--mesh", "1x8", "--target", "cpu")
    assert result.exit_code == 0, result.output
    assert "all 2 blocks" in result.stdout
    assert "all-reduce" in result.stdout
    # Attention is whole on every device: seven eighths of its operations repeat.
    assert "repeat another's or recompute" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("kerashub", "--model", SMALL), "needs its mesh"),
        (("kerashub",), "kerashub is no plan: name its model and its mesh"),
        (("map.py",), "there is no layout 'map.py'"),
        ((__file__,), "test_verification.py is no plan: name its model and its mesh"),
        (("PLAN", "--run", "--no-cache"), "--run keeps no verdicts"),
        (("PLAN", "--mesh", "1x8"), "a plan states its own mesh"),
        (("PLAN", "--seq-len", "8", "--lora-rank", "4"), "states its own lora rank, seq len; "),
        (("PLAN", "--target", "tpu:v5e:2x2"), "8 devices"),
        (("PLAN", "--target", "abacus:8"), "unknown chip"),
    ],
)
def test_wrong_usage_is_one_line(plan_file: str, arguments: tuple[str, ...], words: str) -> None:
    given = [plan_file if argument == "PLAN" else argument for argument in arguments]
    result = run("verify", *given)
    assert result.exit_code == 2, result.output
    assert words in result.stderr


def test_a_map_without_its_model_is_no_plan() -> None:
    with pytest.raises(UsageError, match="the map is no plan: name its model and its mesh"):
        verify({"a/kernel": ("model",)})
    with pytest.raises(UsageError, match="the layout is 3; give a path"):
        verify(3)


def test_an_unknown_keyword_is_said_of_the_function_that_was_called() -> None:
    unknown: dict[str, Any] = {"sequence_length": 128}
    with pytest.raises(TypeError, match=r"^compare\(\) got .* keyword argument 'sequence_length'$"):
        compare(SMALL, [MAP], "1x8", **unknown)
    with pytest.raises(TypeError, match=r"^verify\(\) got .* keyword argument 'sequence_length'$"):
        verify(MAP, model=SMALL, mesh="1x8", **unknown)
    with pytest.raises(TypeError, match=r"^run\(\) got an .* keyword argument 'target'$"):
        run_plan(MAP, model=SMALL, mesh="1x8", target="cpu")


def test_a_model_that_is_no_name_is_refused() -> None:
    with pytest.raises(UsageError, match="pass its name"):
        verify(MAP, model=object(), mesh="1x8")  # type: ignore[arg-type]


def test_a_missing_compiler_gives_the_pip_command(
    plan_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(XlaError, match=r'pip install "jax\[cuda12\]"'):
        verify(plan_file, target="gpu:h100-sxm:8")


@pytest.mark.parametrize(("peak", "fits"), [(2**30, None), (2**50, False)])
def test_part_of_a_model_that_fits_says_nothing_of_the_whole(
    peak: int, fits: bool | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    step = program(2, 4, 0, argument_bytes=peak, target="tpu:v5e:2x4")
    monkeypatch.setattr(verification, "child_environment", lambda target: {})
    monkeypatch.setattr(verification, "compile_in", lambda *_, **__: step)
    path = tmp_path / "map.py"
    path.write_text(MAP)
    found = verify(str(path), model=SMALL, mesh="1x8", target="tpu:v5e:2x4", blocks=2)
    assert found.fits is fits
    text = verification_text(found)
    assert ("2 of 10 blocks; whether all fit" in text) == (fits is None)
    assert ("DOES NOT FIT" in text) == (fits is False)
    assert "predicted" in text
    assert "predicted" not in verification_text(replace(found, predicted=None))


@pytest.mark.parametrize("workload", ["prefill", "train"])
def test_the_prediction_is_of_the_blocks_that_are_compiled(
    workload: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(verification, "child_environment", lambda target: {})
    monkeypatch.setattr(verification, "compile_in", lambda *_, **__: program(1, 18, 0))
    path = tmp_path / "map.py"
    path.write_text(MAP)
    options = {
        "model": "gemma_2b_en",
        "mesh": "1x8",
        "target": "tpu:v5e:2x4",
        "workload": workload,
    }
    whole, all_blocks, two, one = (
        verify(str(path), **options, blocks=blocks).predicted for blocks in (None, 18, 2, 1)
    )
    assert whole and all_blocks and two and one
    assert all_blocks.step_seconds == pytest.approx(whole.step_seconds)
    a_block = two.step_seconds - one.step_seconds
    assert whole.step_seconds == pytest.approx(two.step_seconds + 16 * a_block, rel=0.02)


@pytest.mark.tpu
def test_the_compiler_and_the_prediction_refuse_alike(plan_file: str) -> None:
    pytest.importorskip("libtpu")
    # 600 kB a device is what the plan was made for; a sixth of it is not enough for either.
    found = verify(plan_file, target="tpu:v5e:2x4", memory_limit="100kB")
    assert found.fits is False
    assert found.predicted is not None
    assert found.predicted.peak_bytes_per_device > 100_000
    assert found.step_seconds is not None
    assert found.step_seconds.compute > 0


@pytest.mark.tpu
def test_a_layout_that_is_too_big_is_refused_by_prediction_and_compiler(tmp_path: Path) -> None:
    pytest.importorskip("libtpu")
    path = tmp_path / "map.py"
    path.write_text('layout_map["token_embedding/embeddings"] = ("model", None)')
    found = verify(
        str(path),
        model="small_models:too_big",
        mesh="1x4",
        target="tpu:v5e:2x2",
        batch=1,
        seq_len=16,
    )
    assert found.predicted is not None
    assert found.predicted.peak_bytes_per_device > found.memory_limit
    assert found.fits is False
    assert "the step does not fit tpu:v5e:2x2" in found.refusal


RULES = (
    Rule(pattern=r"block_\d+/up/kernel", spec=(None, "model")),
    Rule(pattern=r"block_\d+/down/kernel", spec=("model", None)),
    Rule(pattern=r"block_\d+/output", spec=("batch", None, None)),
)
PATHS = tuple(
    f"block_{i}/{rest}" for i in range(2) for rest in ("up/kernel", "down/kernel", "output")
)


def test_the_cause_is_the_one_rule_that_splits_the_layer_over_that_axis() -> None:
    causes = Causes(rules=RULES, mesh=parse_mesh("2x4"), paths=PATHS)
    assert causes.of("block_*/down", "model") == RULES[1].pattern
    assert causes.of("block_0/up", "model") == RULES[0].pattern
    assert causes.of("block_*/down", "batch") == "the split of the data"
    # Two rules split what is inside the block; nothing is said of no layer.
    assert causes.of("block_*", "model") is None
    assert causes.of("", "model") is None


def seen(kind: str, platform: str, *places: tuple[int, ...], node: int = 0) -> list[Seen]:
    return [Seen(kind=kind, platform=platform, coordinates=at, node=node) for at in places]


def test_attached_devices_become_a_target() -> None:
    v3 = seen("TPU v3", "tpu", *((x, y, 0) for x in (0, 1) for y in (0, 1) for _ in (0, 1)))
    assert target_seen(v3) == parse_target("tpu:v3:2x2")
    h100 = [d for node in (0, 1) for d in seen("NVIDIA H100 80GB HBM3", "gpu", (), (), node=node)]
    assert target_seen(h100) == parse_target("gpu:h100-sxm:2x2")
    assert target_seen(seen("cpu", "cpu", ())) == parse_target("cpu:1")
    with pytest.raises(XlaError, match="7 devices of gpu:h100-sxm, which make no .*2x3: name"):
        target_seen([*(2 * h100[:2]), *h100[2:], h100[2]])
    with pytest.raises(UsageError, match="Abacus"):
        target_seen(seen("Abacus", "gpu", ()))
