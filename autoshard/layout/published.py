"""Maps that others published for Gemma, to compare a plan with."""

from autoshard.layout.rules import LayoutRules, Rule

__all__ = ["ANNOUNCEMENT_MAP"]

ANNOUNCEMENT_MAP: LayoutRules = (
    Rule(pattern="token_embedding/embeddings", spec=(None, "model")),
    Rule(pattern="decoder_block.*attention.*(query|key|value).*kernel", spec=(None, "model", None)),
    Rule(pattern="decoder_block.*attention_output.*kernel", spec=(None, None, "model")),
    Rule(pattern="decoder_block.*ffw_gating.*kernel", spec=("model", None)),
    Rule(pattern="decoder_block.*ffw_linear.*kernel", spec=(None, "model")),
)
"""The map of the announcement of Gemma for Keras (February 2024, for a TPUv3-8 as a 1x8 mesh).

It splits the hidden dimension throughout, which is the one that most matmuls contract.
"""
