"""Workloads: what is refused, and how one reads."""

import pytest

from autoshard.errors import UnknownNameError, UsageError
from autoshard.model.workload import Workload


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"batch": 0}, "a batch of 0 sequences of 512 tokens is no work"),
        ({"seq_len": 0}, "a batch of 8 sequences of 0 tokens is no work"),
        ({"kind": "lora"}, "the lora workload needs a rank, for example 4"),
        ({"kind": "train", "lora_rank": 4}, "ask for lora, or leave the rank out"),
        ({"kind": "lora", "lora_rank": 0}, "a LoRA rank must be at least 1, not 0"),
    ],
)
def test_impossible_workloads_are_refused(fields: dict[str, object], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        Workload(**fields)  # type: ignore[arg-type]


def test_an_unknown_optimizer_is_answered_with_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="did you mean adam"):
        Workload(optimizer="adan")


@pytest.mark.parametrize(
    ("workload", "words"),
    [
        (Workload(), "train: batch 8 x 512 tokens, bfloat16, adam"),
        (Workload(kind="prefill", dtype="float32"), "prefill: batch 8 x 512 tokens, float32"),
        (Workload(seq_len=1), "train: batch 8, bfloat16, adam"),
        (
            Workload(kind="lora", lora_rank=4, optimizer="sgd"),
            "lora rank 4: batch 8 x 512 tokens, bfloat16, sgd",
        ),
    ],
)
def test_a_workload_says_itself_in_one_line(workload: Workload, words: str) -> None:
    assert str(workload) == words
