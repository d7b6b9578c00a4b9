"""Workloads: what is refused, and the round trip through JSON."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoshard.errors import UnknownNameError, UsageError
from autoshard.model.workload import DTYPES, OPTIMIZERS, Workload


@given(
    kind=st.sampled_from(["prefill", "decode"]),
    batch=st.integers(1, 10**6),
    seq_len=st.integers(1, 10**6),
    dtype=st.sampled_from(DTYPES),
    optimizer=st.sampled_from(OPTIMIZERS),
    lora_rank=st.none() | st.integers(1, 64),
)
def test_a_workload_survives_json(**fields: object) -> None:
    workload = Workload(**fields)  # type: ignore[arg-type]
    assert Workload.from_json(workload.to_json()) == workload


@pytest.mark.parametrize(
    "fields",
    [
        {"batch": 0},
        {"seq_len": 0},
        {"kind": "lora"},
        {"kind": "train", "lora_rank": 4},
        {"kind": "lora", "lora_rank": 0},
    ],
)
def test_impossible_workloads_are_refused(fields: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        Workload(**fields)  # type: ignore[arg-type]


def test_an_unknown_optimizer_is_answered_with_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="did you mean adam"):
        Workload(optimizer="adan")


def test_json_with_a_missing_entry_is_refused() -> None:
    with pytest.raises(UsageError, match="lora_rank"):
        Workload.from_json({"kind": "train", "batch": 1})
