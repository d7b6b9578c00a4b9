"""The examples, run as a user would, on eight virtual devices."""

import io
import os
import re
import subprocess
import sys
from pathlib import Path

import keras
import keras_hub
import pytest
import sentencepiece

# Of SentencePiece's types, and of what Keras asks NumPy for.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

EXAMPLES = Path(__file__).parents[1] / "examples"


def output_of(example: str, *arguments: str) -> str:
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / example), *arguments],
        env=os.environ | flags,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def preset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Gemma with a tokenizer of its own, as KerasHub saves one."""
    proto = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["Instruction: Name the capital of France.", "Response: Paris"] * 9),
        model_writer=proto,
        vocab_size=48,
        hard_vocab_limit=False,
        minloglevel=2,
        **dict(zip(("pad_id", "eos_id", "bos_id", "unk_id"), range(4), strict=True)),
        **{f"{name}_piece": f"<{name}>" for name in ("pad", "eos", "bos", "unk")},
    )
    models = keras_hub.models
    keras.utils.set_random_seed(0)
    tokenizer = models.GemmaTokenizer(proto=proto.getvalue())
    backbone = models.GemmaBackbone(
        vocabulary_size=64,
        num_layers=2,
        num_query_heads=8,
        num_key_value_heads=1,
        hidden_dim=512,
        intermediate_dim=8192,
        head_dim=64,
    )
    path = tmp_path_factory.mktemp("presets") / "small_gemma"
    models.GemmaCausalLM(
        backbone, preprocessor=models.GemmaCausalLMPreprocessor(tokenizer)
    ).save_to_preset(str(path))
    return path


def test_gemma_is_fine_tuned_and_writes(preset: Path) -> None:
    options = ("--mesh", "1x8", "--epochs", "4", "--learning-rate", "0.02")
    said = output_of("finetune_gemma.py", str(preset), *options)
    assert 'layout_map[r"decoder_block_' in said
    losses = [float(loss) for loss in re.findall(r"loss: ([\d.]+)", said)]
    assert losses[-1] < 0.95 * losses[0]
    assert "capital of France" in said.splitlines()[-1]


def test_a_model_of_ones_own_is_trained_by_fit() -> None:
    said = output_of("own_model.py", "--steps", "3")
    assert 'layout_map[r"block_\\d+/up/kernel"]' in said and "loss: " in said


def test_a_loop_of_jax_takes_the_same_steps_on_one_device_and_on_eight() -> None:
    alone, sharded = (
        [float(loss) for loss in re.findall(r"loss ([\d.]+)", said)]
        for said in (
            output_of("jax_loop.py", "--mesh", mesh, "--steps", "3") for mesh in ("1x1", "2x4")
        )
    )
    assert alone[0] > alone[-1]
    assert sharded == pytest.approx(alone, abs=1e-3)
