"""Maps that people use today, for the models of the benchmarks.

- `announcement`: the map of Gemma's announcement for Keras (`autoshard.layout.published`).
- `kerashub`: the backbone's own `get_layout_map`.
- `largest dimension`: keras-hub issue 2806: the largest dimension that the model axis divides, the
  later one of two equal; variables of rank 1 and tiny ones stay whole.
- `megatron`: Megatron-LM's (arXiv 1909.08053) by hand: heads, inner dimension of the feed-forward
  layers and vocabulary over the model axis. A rule whose dimension does not divide is left out, as
  key/value heads of grouped attention are.
"""

import contextlib
import math
from collections.abc import Callable, Iterator

from autoshard.errors import LayoutError
from autoshard.layout.published import ANNOUNCEMENT_MAP
from autoshard.layout.reading import kerashub_rules
from autoshard.layout.rules import LayoutRules, Rule, match
from autoshard.layout.synthesis import synthesise
from autoshard.mesh import Mesh, Spec, divides
from autoshard.model.recipe import AbstractModel
from autoshard.model.variables import ModelTable

__all__ = ["MEGATRON", "largest_dimension_rules", "megatron_rules", "rivals"]

_TINY = 2**16


def _rules(*lines: tuple[str, Spec]) -> LayoutRules:
    return tuple(Rule(pattern=pattern, spec=spec) for pattern, spec in lines)


_ROWS: Spec = ("model", None)
_COLUMNS: Spec = (None, "model")
_EMBEDDINGS = (
    ("token_embedding/embeddings", _ROWS),
    ("token_embedding/reverse_embeddings", _COLUMNS),
)


def _attention(layer: str) -> tuple[tuple[str, Spec], ...]:
    """Kernels of shape (hidden, heads, head size), and the output's (heads, head size, hidden)."""
    return (
        (f"{layer}/query/kernel", (None, "model", None)),
        (f"{layer}/query/bias", _ROWS),
        (f"{layer}/(key|value)/kernel", (None, "model", None)),
        (f"{layer}/(key|value)/bias", _ROWS),
        (f"{layer}/attention_output/kernel", ("model", None, None)),
    )


_LAYER = r"transformer_layer_\d+"
_FEEDFORWARD = (
    (rf"{_LAYER}/feedforward_(gate|intermediate)_dense/kernel", _COLUMNS),
    (rf"{_LAYER}/feedforward_intermediate_dense/bias", ("model",)),
    (rf"{_LAYER}/feedforward_output_dense/kernel", _ROWS),
)
_EXPERT = rf"{_LAYER}/mixtral_sparse_moe_block(_\d+)?/experts(_\d+)?/expert_feedforward"
_VIT = r"vit_encoder/transformer_block_\d+"
_GEMMA = _rules(
    *_EMBEDDINGS,
    (r"decoder_block_\d+/attention/query/kernel", ("model", None, None)),
    (r"decoder_block_\d+/attention/(key|value)/kernel", ("model", None, None)),
    (r"decoder_block_\d+/attention/attention_output/kernel", ("model", None, None)),
    (r"decoder_block_\d+/ffw_gating(_2)?/kernel", _COLUMNS),
    (r"decoder_block_\d+/ffw_linear/kernel", _ROWS),
)
_LLAMA = _rules(*_EMBEDDINGS, *_attention(rf"{_LAYER}/self_attention"), *_FEEDFORWARD)
MEGATRON: dict[str, LayoutRules] = {
    "GemmaBackbone": _GEMMA,
    "Gemma3Backbone": _GEMMA,
    "Llama3Backbone": _LLAMA,
    "MistralBackbone": _LLAMA,
    "QwenBackbone": _LLAMA,
    "Qwen3Backbone": _LLAMA,
    "GPT2Backbone": _LLAMA,
    "Phi3Backbone": _rules(*_EMBEDDINGS, *_attention(rf"{_LAYER}/attention"), *_FEEDFORWARD),
    "BertBackbone": _rules(
        *_EMBEDDINGS, *_attention(rf"{_LAYER}/self_attention_layer"), *_FEEDFORWARD
    ),
    "MixtralBackbone": _rules(
        *_EMBEDDINGS,
        *_attention(rf"{_LAYER}/self_attention"),
        (rf"{_EXPERT}_(gate|intermediate)_dense", (None, None, "model")),
        (rf"{_EXPERT}_output_dense", (None, "model", None)),
    ),
    "ViTBackbone": _rules(
        *_attention(rf"{_VIT}/mha"),
        (rf"{_VIT}/mlp/dense_1/kernel", _COLUMNS),
        (rf"{_VIT}/mlp/dense_1/bias", ("model",)),
        (rf"{_VIT}/mlp/dense_2/kernel", _ROWS),
    ),
}
"""Class of the backbone -> its map."""


def megatron_rules(class_name: str, table: ModelTable, mesh: Mesh) -> LayoutRules:
    """Megatron's map of a class, without the rules that take nothing or do not divide."""

    def kept(rule: Rule) -> bool:
        shapes = [
            variable.shape
            for variable in table.variables
            if match((rule,), variable.path) is not None
        ]
        return bool(shapes) and all(divides(shape, rule.spec, mesh) for shape in shapes)

    return tuple(rule for rule in MEGATRON[class_name] if kept(rule))


def largest_dimension_rules(table: ModelTable, mesh: Mesh) -> LayoutRules:
    """The map that looks at nothing but shapes."""
    axis = mesh.axis_names[-1]
    n = mesh.sizes[axis]
    assignment: dict[str, Spec] = {}
    for family in table.families():
        fitting = [(size, dim) for dim, size in enumerate(family.shape) if size % n == 0]
        if fitting and len(family.shape) > 1 and math.prod(family.shape) >= _TINY:
            _, largest = max(fitting)
            assignment[family.name] = tuple(
                axis if dim == largest else None for dim in range(len(family.shape))
            )
    return synthesise(table, assignment)


def rivals(model: AbstractModel, mesh: Mesh) -> Iterator[tuple[str, LayoutRules]]:
    """The maps for a model on a mesh, by name, also those that Keras refuses.

    What its class does not ship, or no LayoutMap can hold, is left out.
    """
    table, class_name = model.table(), type(model.backbone).__name__
    makers: list[tuple[str, Callable[[], LayoutRules]]] = [
        ("kerashub", lambda: kerashub_rules(model.backbone, mesh)),
        ("largest dimension", lambda: largest_dimension_rules(table, mesh)),
    ]
    if class_name == "GemmaBackbone":
        makers.insert(0, ("announcement", lambda: ANNOUNCEMENT_MAP))
    if class_name in MEGATRON:
        makers.append(("megatron", lambda: megatron_rules(class_name, table, mesh)))
    for name, make in makers:
        with contextlib.suppress(LayoutError):
            yield name, make()
