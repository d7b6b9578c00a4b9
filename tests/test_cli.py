"""The command line: what it prints, and one clear line for bad input."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from autoshard.cli import main

SMALL = "test_end_to_end:small_gemma_backbone"
FLOAT = ("--dtype", "float32", "--seq-len", "16")


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands set the backend of their process; give it back after each test."""
    for name in ("KERAS_BACKEND", "AUTOSHARD_PLANNING_ONLY", "TF_CPP_MIN_LOG_LEVEL"):
        monkeypatch.setenv(name, os.environ.get(name, ""))
    monkeypatch.delenv("AUTOSHARD_PLANNING_ONLY")
    monkeypatch.setattr("autoshard.cli._set_backend", lambda: None)
    monkeypatch.syspath_prepend(str(Path(__file__).parent))


def leaves() -> None:
    """What a script does whose arguments are wrong."""
    raise SystemExit(2)


def empty() -> object:
    import keras

    return keras.Sequential([keras.Input((8,)), keras.layers.ReLU(name="alone")])


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, list(arguments))


def plan_small(*options: str) -> Result:
    return run("plan", SMALL, "--mesh", "1x8", "--verify", "none", *FLOAT, *options)


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (("plan", "gemma_7b_em", "--mesh", "1x8"), 2, "did you mean gemma_7b_en"),
        (("plan", SMALL, "--mesh", "1xeight"), 2, "'1xeight' is not a mesh"),
        (("plan", SMALL, "--mesh", "0x8"), 2, "every axis needs at least one"),
        (("plan", SMALL, "--mesh", "2x2x2"), 2, "name them (axes, --axes)"),
        (("plan", SMALL, "--mesh", "1x8", "--axes", "a"), 2, "2 axes and 1 axis names"),
        (("plan", SMALL, "--mesh", "4x2", "--batch", "6"), 2, "batch of 6 does not divide"),
        (("plan", SMALL, "--mesh", "1x8", "--target", "tpu:v9:2x4"), 2, "unknown chip"),
        (("plan", SMALL, "--mesh", "1x8", "--target", "tpu:v5e:2x2"), 2, "tpu:v5e:2x2 has 4"),
        (("plan", SMALL, "--mesh", "1x8", "--workload", "sleep"), 2, "unknown workload"),
        (("plan", SMALL, "--mesh", "1x8", "--memory-limit", "much"), 2, "not an amount of memory"),
        (("plan", SMALL, "--mesh", "1x8", "--memory-limit", "15"), 2, "a unit, as in 15GiB"),
        (("plan", SMALL, "--mesh", "1x8", "--memory-limit", "9533"), 2, "a unit, as in 15GiB"),
        (
            ("plan", SMALL, "--mesh", "2x4", "--target", "cpu:4", "--slices", "2"),
            2,
            "like cpu:8, and no slices",
        ),
        (("plan", "test_cli:leaves", "--mesh", "1x8"), 1, "SystemExit"),
        (("plan", "mine.py:model", "--mesh", "1x8"), 2, "name its module: mine:model"),
        (("plan", "mine.py", "--mesh", "1x8"), 2, "as in mine:make_model"),
        (("plan", SMALL, "--mesh", "1x8", "-o", ""), 2, "output file is empty"),
        (("plan", SMALL, "--mesh", "1x8", "-o", "p.py"), 2, "name it p.json"),
        (("plan", SMALL, "--mesh", "1x9999999999"), 2, "has more devices than there are"),
        (("plan", SMALL, "--mesh", "2x2x2x2", "--axes", "a,b,c,d"), 2, "for up to 3"),
        (("plan", SMALL, "--mesh", "1x8", "--batch", str(10**13)), 2, "tokens at most"),
        (("plan", SMALL, "--mesh", "1x8", "--lora-rank", "4"), 2, "ask for lora"),
        (("plan", "test_cli:empty", "--mesh", "1x8"), 1, "nothing to lay out"),
        (("models", "gema_7b"), 2, "unknown preset 'gema_7b'; did you mean"),
        (("inspect", "gemma_2b_en", "--layer", "decoder_blok_0"), 2, "decoder_block_0"),
        (("inspect", "gemma_2b_en", "--dtype", "bf16"), 2, "unknown dtype 'bf16'"),
        (("inspect", "tests"), 1, "it has no config.json"),
        (("verify", "kerashub", "--model", SMALL), 2, "needs its mesh"),
        (("check", SMALL, ""), 2, "there is no layout ''"),
        (("check", SMALL, "tests"), 1, "tests cannot be read: Is a directory"),
        (("explain", ""), 2, "there is no plan ''"),
        (("explain", "tests"), 1, "tests cannot be read: Is a directory"),
    ],
)
def test_bad_input_is_one_line_on_standard_error(
    arguments: tuple[str, ...], status: int, words: str
) -> None:
    result = run(*arguments)
    lines = [line for line in result.stderr.splitlines() if line.startswith("autoshard: ")]
    assert result.exit_code == status, result.output
    assert len(lines) == 1
    assert words in lines[0]
    assert "Traceback" not in result.output


def test_a_callable_is_found_in_the_folder_the_script_is_called_from(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "import keras\n"
        "def build():\n"
        "    return keras.Sequential([keras.Input((8,)), keras.layers.Dense(8)])\n"
    )
    script = "from autoshard.cli import main; main()"
    # -P: an installed script has its own folder on the path, not the one it is called from.
    found = subprocess.run(
        [sys.executable, "-P", "-c", script, "inspect", "mine:build"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert found.returncode == 0, found.stderr
    assert "dense/kernel" in found.stdout


def test_an_output_that_cannot_be_written_is_said_before_the_work(tmp_path: Path) -> None:
    result = plan_small("-o", str(tmp_path / "none" / "plan.json"))
    assert result.exit_code == 1
    assert "cannot write" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_limit_that_nothing_meets_prints_the_nearest_plan_marked_so() -> None:
    result = plan_small("--memory-limit", "1kB")
    assert result.exit_code == 1
    assert "DOES NOT FIT" in result.stdout
    assert "layout_map[" in result.stdout
    assert "--memory-limit" in result.stdout


def test_a_plan_that_does_not_fit_names_what_would() -> None:
    limit = ("--target", "gpu:h100-sxm:2", "--memory-limit", "1MB")
    result = run("plan", SMALL, "--mesh", "1x2", "--verify", "none", *FLOAT, *limit)
    assert result.exit_code == 1
    assert "fits with --batch 4: step " in result.stdout


def test_the_shape_of_the_mesh_is_chosen_where_only_devices_are_given() -> None:
    result = run("plan", SMALL, "--devices", "4", "--verify", "none", *FLOAT)
    assert result.exit_code == 0, result.output
    for words in ("-> ", "2x2 ", "4x1 ", "asked for with"):
        assert words in result.stdout
    assert run("plan", SMALL, "--devices", "4", "--mesh", "1x4", *FLOAT).exit_code == 2


def test_slices_and_whole_weights_are_named() -> None:
    result = run("plan", SMALL, "--mesh", "2x3", "--slices", "2", "--verify", "none", *FLOAT)
    assert result.exit_code == 0, result.output
    assert "tpu:v5e:1x3:2" in result.stdout
    assert "whole on every device" in result.stdout
    assert "\nlinks batch over the network, " in result.stdout
    for bad in (("--slices", "4"), ("--target", "tpu:v5e:1x3:2", "--slices", "2")):
        assert run("plan", SMALL, "--mesh", "2x3", *bad, *FLOAT).exit_code == 2


def test_the_same_plan_has_the_same_bytes_and_reads_back(tmp_path: Path) -> None:
    from autoshard.sharding_plan import load

    first, second = (plan_small("--format", "json").stdout for _ in range(2))
    assert first == second
    path = tmp_path / "plan.json"
    result = plan_small("-o", str(path), "--format", "python")
    assert result.exit_code == 0, result.output
    assert load(path).to_json() == first
    said = [line for line in result.stderr.splitlines() if line.startswith("autoshard: ")]
    assert ["nothing is split" in line for line in said] == [True]  # so small is the model
    assert "keras.distribution.LayoutMap" in result.stdout


@pytest.mark.parametrize("form", ["text", "json"])
def test_what_to_know_of_a_plan_is_said_in_every_format(form: str) -> None:
    options = ("--mesh", "1x8", "--verify", "none", "--format", form)
    result = run("plan", "gemma_2b_en", *options)
    assert result.exit_code == 0, result.output
    assert "note: Keras' adam moves no weight in bfloat16" in result.output
    if form == "json":
        json.loads(result.stdout)


def test_what_is_wrong_with_a_plan_is_said_by_its_file_and_its_source(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    limit = ("--memory-limit", "1kB", "-o", str(path), "--format", "python")
    result = run("plan", SMALL, "--mesh", "1x2", "--verify", "none", *FLOAT, *limit)
    assert result.exit_code == 1
    said = "does not fit the memory it was made for: the nearest layout"
    assert f"\n# {said}\n" in result.stdout
    assert f"\nnote: {said}\n" in run("explain", str(path)).stdout


def test_a_plan_file_explains_itself(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    text = plan_small("-o", str(path)).stdout
    explained = run("explain", str(path)).stdout
    assert "next best, all else equal" in explained
    head, _, reasons = explained.partition("\n\n")
    assert "train: batch 8 x " in head and "\nmesh 1x8 (batch, model) on " in head
    assert reasons.strip() in text


def test_the_text_shows_map_cost_ranking_reasons_and_timings() -> None:
    result = plan_small("--timings", "--memory-limit", "600kB")
    assert result.exit_code == 0, result.output
    for words in (
        "mesh 1x8 (batch, model) on tpu:v5e:2x4",
        "layout_map[",
        "predicted step",
        "KerasHub's own map",
        "the announcement's map",
        "next best",
        "trace the step",
    ):
        assert words in result.stdout


def test_a_plan_is_compiled_by_xla_and_its_collectives_compared() -> None:
    # Through the real child process.
    result = run(
        "plan", SMALL, "--mesh", "1x8", "--verify", "cpu", *FLOAT, "--memory-limit", "600kB"
    )
    assert result.exit_code == 0, result.output
    assert "compiled for cpu:8" in result.stdout


def test_a_compiler_that_runs_past_its_limit_leaves_a_plan_marked_unverified(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("autoshard.planner.settling._COMPILE_SECONDS", 0.3)
    result = run("plan", SMALL, "--mesh", "1x8", *FLOAT)
    assert result.exit_code == 1
    assert "UNVERIFIED: " in result.stdout
    assert "predicted step" in result.stdout
    assert "limit of 0.3 s" in result.stderr


def test_compare_prints_a_table_and_fails_where_keras_refuses_a_map(tmp_path: Path) -> None:
    refused = tmp_path / "refused.py"
    refused.write_text('layout_map["token_embedding/embeddings"] = ("model", None, None)')
    result = run("compare", SMALL, str(refused), "kerashub", "--mesh", "1x8", *FLOAT)
    assert result.exit_code == 1
    assert result.stdout.index("kerashub ") < result.stdout.index(f"{refused} ")
    assert run("compare", SMALL, "kerashub", "--mesh", "1x8", *FLOAT).exit_code == 0


def test_compare_says_of_each_broken_map_in_one_line_what_is_wrong(tmp_path: Path) -> None:
    texts = {
        "two.py": 'layout_map["a"] = ["model"]\nlayout_map["b"] = 3',
        "refused.py": 'layout_map["final_normalization/scale"] = ("data", "model")',
        "empty.py": "x = 1",
        "broken.json": "{",
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    paths = [str(tmp_path / name) for name in texts]
    result = run("compare", SMALL, *paths, str(tmp_path), "--mesh", "1x8", *FLOAT)
    two, refused, empty, broken = paths
    lines = result.stdout.splitlines()
    said = [line for line in lines if line.startswith(str(tmp_path)) and ": " in line]
    assert said == [
        f"{two}: line 1: cannot read ['model']: Keras takes a tuple and refuses a list; write "
        '("model",) (check tells 1 more)',
        f"{refused}: rule 'final_normalization/scale' names axis 'data', which mesh 1x8 does not "
        "have; its axes are batch, model (check tells 1 more)",
        f"{empty}: holds no map; expected lines like layout_map[...] = (...)",
        f"{broken}: is not JSON: Expecting property name enclosed in double quotes: line 1 column "
        "2 (char 1)",
        f"{tmp_path}: cannot be read: Is a directory",
    ]


def test_inspect_prints_one_block_as_path_and_shape() -> None:
    result = run("inspect", "gemma_2b_en", "--layer", "decoder_block_0")
    assert "decoder_block_0/attention/query/kernel             (8, 2048, 256)" in result.stdout


def test_inspect_counts_what_lora_trains() -> None:
    result = run("inspect", "gemma_2b_en", "--lora-rank", "4", "--format", "json")
    table = json.loads(result.stdout)
    # the figure of the announcement of Gemma: 1.36 million of 2.5 billion
    assert table["trainable_parameters"] == 1_363_968
    assert table["parameters"] == 2_506_172_416 + 1_363_968


@pytest.mark.parametrize("form", ["text", "csv", "markdown", "json"])
def test_inspect_has_every_format(form: str) -> None:
    result = run("inspect", SMALL, "--dtype", "float32", "--format", form)
    assert result.exit_code == 0
    assert "token_embedding/embeddings" in result.stdout


def test_check_says_what_is_wrong_with_kerashubs_map_for_gemma_2b() -> None:
    # one key/value head does not divide over eight devices
    result = run("check", "gemma_2b_en", "kerashub", "--mesh", "1x8")
    assert result.exit_code == 1
    assert "error: " in result.stdout
    assert "key" in result.stdout
    (first, *_) = json.loads(
        run("check", "gemma_2b_en", "kerashub", "--mesh", "1x8", "--format", "json").stdout
    )
    assert (first["severity"], first["kind"]) == ("error", "indivisible")
    assert f"error: {first['message']}" in result.stdout


def test_models_and_chips_list_what_there_is() -> None:
    head, _, first, *_ = run("models", "gemma_7b_en").stdout.splitlines()
    assert head.split() == ["preset", "backbone", "parameters", "rounded"]
    assert first.split() == ["gemma_7b_en", "GemmaBackbone", "8,537,680,896", "8.54", "billion"]
    assert "tpu:v5e" in run("chips").stdout
    unknown = run("models", "gema_7b")
    assert unknown.exit_code == 2
    assert "or gemma_7b_en" in unknown.stderr


def test_help_loads_neither_keras_nor_jax() -> None:
    code = (
        "import sys\nfrom click.testing import CliRunner\nfrom autoshard.cli import main\n"
        "assert CliRunner().invoke(main, ['plan', '--help']).exit_code == 0\n"
        "print([m for m in ('keras', 'jax', 'networkx', 'scipy', 'rich') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
