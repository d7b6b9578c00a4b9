"""Folding: fewer blocks that stand for all."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoshard.model.build import build
from autoshard.model.fold import fold
from autoshard.model.folding import BlockStack, Folding, find_repetition


@given(
    lead=st.lists(st.sampled_from("xyz"), max_size=2),
    period=st.sampled_from(["a", "ab", "aab"]),
    n_periods=st.integers(3, 9),
    remainder=st.integers(0, 2),
)
def test_a_repetition_accounts_for_every_block(
    lead: list[str], period: str, n_periods: int, remainder: int
) -> None:
    kinds = [*lead, *period * n_periods, *period[: remainder % len(period)]]
    found_lead, found_period = find_repetition(kinds)
    after = (len(kinds) - found_lead) % found_period
    traced = min(len(kinds), found_lead + 3 * found_period + after)
    stack = BlockStack(
        template="b_*", n_blocks=len(kinds), lead=found_lead, period=found_period, traced=traced
    )
    assert traced <= len(lead) + 3 * len(period) + remainder % len(period)
    copies = [stack.real_block(block) for block in range(traced)]
    counts = dict.fromkeys("abxyz", 0)
    for block, real in enumerate(copies):
        counts[kinds[real]] += stack.multiplicity(block)
    assert counts == {kind: kinds.count(kind) for kind in "abxyz"}


def test_the_middle_period_stands_for_all_but_two() -> None:
    # Gemma 3 1B: 26 blocks, five local and one global, and two local ones at the end.
    stack = BlockStack(template="decoder_block_*", n_blocks=26, period=6, traced=20)
    assert (stack.n_periods, stack.traced_periods) == (4, 3)
    assert [stack.multiplicity(i) for i in range(20)] == [1] * 6 + [2] * 6 + [1] * 8
    assert stack.real_block(12) == 18
    folding = Folding(blocks=(stack,))
    assert folding.multiplicity("decoder_block_7/attention/query/kernel") == 2
    assert folding.multiplicity("final_normalization/scale") == 1


@pytest.mark.parametrize(
    ("name", "template", "n_blocks", "lead", "period", "traced"),
    [
        ("gemma_7b_en", "decoder_block_*", 28, 0, 1, 3),
        ("gemma3_1b", "decoder_block_*", 26, 0, 6, 20),
        ("mixtral_8_7b_en", "transformer_layer_*", 32, 0, 1, 3),
        # The first block has a norm of its own.
        ("rwkv7_g1a_0.1b_en", "rwkv_layer_*", 12, 1, 1, 4),
        # The first block has the positions of all, under a path that is not the block's.
        ("t5_small_multi", "transformer_encoder_layer_*", 6, 1, 1, 4),
        # All blocks share the path of one weight, and every fourth has no positions.
        ("smollm3_3b_en", "transformer_layer_*", 36, 0, 4, 12),
        # Three linear attentions and a full one.
        ("qwen3_5_0.8b_base", "transformer_layer_*", 24, 0, 4, 12),
        ("whisper_small_en", "transformer_decoder_layer_*", 12, 0, 1, 3),
        ("vit_base_patch16_224_imagenet", "vit_encoder/transformer_block_*", 12, 0, 1, 3),
    ],
)
@pytest.mark.filterwarnings("ignore:The 'rwkv_ops' package")
def test_periods_are_found_and_multiplicities_add_up(
    name: str, template: str, n_blocks: int, lead: int, period: int, traced: int
) -> None:
    model = build(name)
    folded = fold(model, periods=3)
    stack = next(s for s in folded.folding.blocks if s.template == template)
    assert (stack.n_blocks, stack.lead, stack.period) == (n_blocks, lead, period)
    assert stack.traced == traced
    total = sum(
        variable.n_parameters * folded.folding.multiplicity(variable.path)
        for variable in folded.table().variables
    )
    assert total == model.table().n_parameters


def test_k_and_2k_periods_can_be_built() -> None:
    one, two = (fold(build("mixtral_8_7b_en"), periods=k).table() for k in (1, 2))
    # Each of the 32 blocks adds ten variables.
    assert len(two.variables) - len(one.variables) == 10
    whole = build("mixtral_8_7b_en").table()
    assert whole.n_parameters == one.n_parameters + 31 * (two.n_parameters - one.n_parameters)


def test_families_of_the_folded_model_are_those_of_the_whole() -> None:
    model = build("gemma_7b_en")
    names = [family.name for family in model.table().families()]
    assert [family.name for family in fold(model, periods=3).table().families()] == names
