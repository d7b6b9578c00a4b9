"""Fine-tunes Gemma with LoRA on several chips, and lets it write: the layout is a plan's.

    python examples/finetune_gemma.py gemma_2b_en --mesh 1x8

The preset is a name, a `kaggle://` or `hf://` handle, or a directory. Without eight chips, eight
devices of the CPU do (`XLA_FLAGS=--xla_force_host_platform_device_count=8`) for a small preset.
"""

import argparse
import os

os.environ.setdefault("KERAS_BACKEND", "jax")

import keras
import keras_nlp

import autoshard

RANK, BATCH, SEQ_LEN = 4, 8, 64
TEXTS = [
    f"Instruction: Name the capital of {country}.\n\nResponse: {capital}."
    for country, capital in (
        ("France", "Paris"),
        ("Japan", "Tokyo"),
        ("Kenya", "Nairobi"),
        ("Peru", "Lima"),
        ("Canada", "Ottawa"),
        ("Norway", "Oslo"),
        ("Egypt", "Cairo"),
        ("India", "New Delhi"),
    )
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("preset")
    parser.add_argument("--mesh", default="1x8")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    arguments = parser.parse_args()

    plan = autoshard.plan(
        arguments.preset,
        mesh=arguments.mesh,
        workload="lora",
        lora_rank=RANK,
        batch=BATCH,
        seq_len=SEQ_LEN,
    )
    print(plan)

    keras.utils.set_random_seed(0)
    # From here on nothing is autoshard's but the memory it saves while weights are loaded.
    keras.distribution.set_distribution(plan.distribution())
    with autoshard.sharded_loading():
        gemma = keras_nlp.models.GemmaCausalLM.from_preset(arguments.preset, dtype="bfloat16")
    gemma.backbone.enable_lora(rank=RANK)
    gemma.preprocessor.sequence_length = SEQ_LEN
    # In bfloat16 the default beta_2 of 0.999 rounds to 1, and Adam moves nothing.
    gemma.compile(
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        optimizer=keras.optimizers.AdamW(learning_rate=arguments.learning_rate, beta_2=0.99),
    )
    gemma.fit(TEXTS, epochs=arguments.epochs, batch_size=BATCH)
    print(gemma.generate(TEXTS[0].partition("Paris")[0], max_length=SEQ_LEN))


if __name__ == "__main__":
    main()
