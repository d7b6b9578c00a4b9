"""Attention as KerasHub runs it on the chips that are planned for, not on this machine.

Some of its layers (Gemma, Mixtral, Qwen-MoE) ask what devices JAX has. On an accelerator they hand
attention to one op of Keras, and their softmax layer, and with it what a LayoutMap says of its
output, is never asked.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from autoshard.model.keras_import import import_keras, import_keras_hub

__all__ = ["attention_of"]

# The questions that KerasHub's layers ask -> the kind of chip on which the answer is yes.
_QUESTIONS = {
    "running_on_tpu": "tpu",
    "running_on_gpu": "gpu",
    "gpu_supports_fused_attention_op": "gpu",
}


@contextmanager
def attention_of(kind: str) -> Iterator[None]:
    """While a step is traced: KerasHub's layers take this machine for one with such chips.

    Args:
        kind: of the chips, `tpu`, `gpu` or `cpu`.
    """
    import_keras_hub()
    ops = import_keras().ops
    own: list[tuple[Any, str, Any]] = [
        (module, asked, vars(module)[asked])
        for name, module in list(sys.modules.items())
        if name.startswith("keras_hub.src.models.")
        for asked in _QUESTIONS
        if asked in vars(module)
    ]
    attention = ops.dot_product_attention
    try:
        if kind == "tpu":
            ops.dot_product_attention = _without_soft_cap(attention)
        for module, asked, _ in own:
            setattr(module, asked, lambda answer=_QUESTIONS[asked] == kind: answer)
        yield
    finally:
        ops.dot_product_attention = attention
        for module, name, function in own:
            setattr(module, name, function)


def _without_soft_cap(attention: Any) -> Any:
    """Keras' op without the soft cap of logits, which it refuses on this machine.

    On a TPU it gives up its kernel, and the soft cap with it, where the mask is traced.
    """

    def traced(*arrays: Any, attn_logits_soft_cap: float | None = None, **options: Any) -> Any:
        return attention(*arrays, **options)

    return traced
