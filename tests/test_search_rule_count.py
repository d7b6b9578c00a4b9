"""Which rules of a map have to pay for their lines."""

from collections.abc import Sequence
from typing import Any

import pytest

import autoshard
from autoshard.mesh import Spec
from autoshard.model.keras_import import import_keras
from autoshard.search.candidates import NO_RULE, Choices
from autoshard.search.rule_count import RuleCount

ROWS, COLUMNS = ("model", None), (None, "model")


def choices(name: str, specs: Sequence[Spec], **fields: Any) -> Choices:
    made = {"shape": (8,) * len(specs[-1]), "specs": tuple(specs), "siblings": "", "n_bytes": 64}
    return Choices(name=name, **{**made, **fields})


@pytest.mark.parametrize(
    ("specs", "n_rules"), [((ROWS, ROWS, ROWS), 0), ((ROWS, COLUMNS, ROWS), 1), ((ROWS,) * 3, 0)]
)
def test_weights_cost_the_numbers_that_a_pattern_has_to_name(
    specs: tuple[Spec, ...], n_rules: int
) -> None:
    names = [f"up_{number}/kernel" for number in range(3)]
    count = RuleCount.of(choices(name, [(None, None), ROWS, COLUMNS]) for name in names)
    assert count(dict(zip(names, specs, strict=True))) == n_rules


def test_layers_that_stand_for_blocks_or_have_other_names_cost_nothing() -> None:
    names = [r"block_*/up/kernel", r"block_*/down/kernel", "conv1_block2_3_conv/kernel"]
    count = RuleCount.of(choices(name, [(None, None), ROWS, COLUMNS]) for name in names)
    assert count(dict(zip(names, (ROWS, COLUMNS, ROWS), strict=True))) == 0


@pytest.mark.parametrize(("n_laid", "n_rules"), [(0, 0), (1, 1), (3, 3), (4, 1)])
def test_outputs_cost_a_rule_together_or_one_each(n_laid: int, n_rules: int) -> None:
    names = [f"up_{number}/output" for number in range(4)]
    count = RuleCount.of(choices(name, [NO_RULE, ROWS], is_output=True) for name in names)
    assert count(dict.fromkeys(names[:n_laid], ROWS)) == n_rules


def test_small_biases_of_siblings_cost_a_rule() -> None:
    names = [f"block_*/{name}/bias" for name in ("query", "key", "value")]
    fields = {"siblings": "block", "follows": "block_*/query/kernel"}
    count = RuleCount.of(choices(name, [(None,), ("model",)], **fields) for name in names)
    whole: dict[str, Spec] = dict.fromkeys(names, (None,))
    assert count(whole) == 0
    assert count({**whole, names[0]: ("model",)}) == 1
    assert count(dict.fromkeys(names, ("model",))) == 1


def chain() -> Any:
    keras = import_keras()
    stream = entry = keras.Input((4096,))
    for number in range(4):
        stream = keras.layers.Dense(16384, name=f"up_{number}")(stream)
        stream = keras.layers.Dense(4096, name=f"down_{number}")(stream)
    return keras.Model(entry, stream)


def test_a_chain_of_like_layers_gets_one_rule_for_each_kind() -> None:
    rules = autoshard.plan(chain, mesh="1x8", batch=64, verify="none").rules
    assert [rule.pattern for rule in rules] == [
        r"up_\d+/kernel",
        r"up_\d+/bias",
        r"down_\d+/kernel",
    ]
