"""The workload: what the model is asked to do in one step."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from autoshard.errors import UnknownNameError, UsageError

__all__ = [
    "DEFAULT_BATCH",
    "DEFAULT_DTYPE",
    "DEFAULT_LORA_RANK",
    "DEFAULT_OPTIMIZER",
    "DEFAULT_SEQ_LEN",
    "DTYPES",
    "KINDS",
    "OPTIMIZERS",
    "QUANTIZED",
    "Kind",
    "Workload",
    "check_dtype",
]

Kind = Literal["train", "lora", "prefill", "decode"]
KINDS: tuple[Kind, ...] = get_args(Kind)
OPTIMIZERS = ("adam", "adamw", "sgd", "lion", "adafactor", "muon")
# Weights in eight bits, all else in bfloat16.
QUANTIZED = "int8"
DEFAULT_DTYPE = "bfloat16"
DEFAULT_OPTIMIZER = "adam"
DEFAULT_BATCH = 8
DEFAULT_SEQ_LEN = 512
DEFAULT_LORA_RANK = 4
# XLA counts the elements of an array in 64 bits, and each token has many.
_MOST_TOKENS = 2**40
DTYPES = (DEFAULT_DTYPE, "float16", "float32", "mixed_bfloat16", QUANTIZED)


def check_dtype(dtype: object) -> None:
    """Make sure that a dtype policy is one of `DTYPES`, or None.

    Raises:
        UsageError: it is not.
    """
    if dtype is not None:
        _check_name("dtype", dtype, DTYPES)


def _check_name(what: str, name: object, known: Sequence[str]) -> None:
    if not isinstance(name, str):
        raise UsageError(f"{what} is {name!r}; give its name, one of {', '.join(known)}")
    if name not in known:
        raise UnknownNameError(what, name, known, f"(one of {', '.join(known)})")


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """One step: its kind and the sizes that decide its cost.

    Attributes:
        kind: `train` (loss, gradients, optimizer), `lora` (the same on low-rank factors with the
            base frozen), `prefill` (forward with logits), `decode` (one token against a cache).
        batch: sequences in the global batch, at least 1.
        seq_len: tokens a sequence, at least 1; for `decode` the length of the cache; 1 for a model
            that leaves no length open.
        dtype: Keras dtype policy of the model, `int8` for weights in eight bits; None for the
            model's own, until that is built.
        optimizer: Keras optimizer of `train` and `lora`, by name.
        lora_rank: rank of the low-rank factors; `lora` needs one, `prefill` and `decode` may have
            one, `train` has none.
    """

    kind: Kind = "train"
    batch: int = DEFAULT_BATCH
    seq_len: int = DEFAULT_SEQ_LEN
    dtype: str | None = DEFAULT_DTYPE
    optimizer: str = DEFAULT_OPTIMIZER
    lora_rank: int | None = None

    def __post_init__(self) -> None:
        _check_name("workload", self.kind, KINDS)
        check_dtype(self.dtype)
        _check_name("optimizer", self.optimizer, OPTIMIZERS)
        if self.batch < 1 or self.seq_len < 1:
            raise UsageError(
                f"a batch of {self.batch} sequences of {self.seq_len} tokens is no work: "
                "both must be at least 1"
            )
        if self.batch * self.seq_len > _MOST_TOKENS:
            raise UsageError(
                f"a batch of {self.batch} sequences of {self.seq_len} tokens is too large: "
                f"{_MOST_TOKENS:,} tokens at most"
            )
        if self.kind == "lora" and self.lora_rank is None:
            raise UsageError("the lora workload needs a rank, for example 4")
        if self.kind == "train" and self.lora_rank is not None:
            raise UsageError(
                "training with a LoRA rank is another workload: ask for lora, or leave the rank out"
            )
        if self.kind == "train" and self.dtype == QUANTIZED:
            raise UsageError("weights in int8 cannot be trained: the lora workload adapts them")
        if self.lora_rank is not None and self.lora_rank < 1:
            raise UsageError(f"a LoRA rank must be at least 1, not {self.lora_rank}")

    @property
    def policy(self) -> str:
        """The dtype policy, the default one where the model's own is not known."""
        return self.dtype or DEFAULT_DTYPE

    @property
    def trains(self) -> bool:
        """Whether the step has gradients and an optimizer."""
        return self.kind in ("train", "lora")

    @property
    def is_still(self) -> bool:
        """Whether the step moves no weight: Adam's `beta_2` of 0.999 is 1 in bfloat16."""
        rounds = self.policy == "bfloat16" and self.optimizer in ("adam", "adamw")
        return self.kind == "train" and rounds

    @property
    def stillness(self) -> str:
        """What of weights in bfloat16 the step does not move, in words; "" where it moves all."""
        beta = "where its beta_2 of 0.999 is 1"
        if self.is_still:
            return (
                f"Keras' {self.optimizer} moves no weight in bfloat16, {beta}: give it "
                "beta_2=0.99, or plan for mixed_bfloat16"
            )
        if self.kind == "train" and (self.policy, self.optimizer) == ("bfloat16", "muon"):
            return (
                "Keras' muon moves matrices alone in bfloat16; the rest is left to adam, "
                f"{beta}: give it adam_beta_2=0.99, or plan for mixed_bfloat16"
            )
        return ""

    @property
    def size(self) -> str:
        """Such as `batch 8 x 512 tokens`, or `batch 8` where the length is 1."""
        return f"batch {self.batch}" + (f" x {self.seq_len} tokens" if self.seq_len > 1 else "")

    def __str__(self) -> str:
        """Such as `train: batch 8 x 512 tokens, bfloat16, adam`."""
        kind: str = self.kind
        if self.lora_rank:
            kind += f" rank {self.lora_rank}" if kind == "lora" else f", LoRA rank {self.lora_rank}"
        optimizer = f", {self.optimizer}" if self.trains else ""
        return f"{kind}: {self.size}, {self.policy}{optimizer}"
