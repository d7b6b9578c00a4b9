"""Attention as KerasHub runs it on the chips that are planned for, whatever this machine has.

Some of its layers (Gemma, Mixtral, Qwen-MoE) ask what devices JAX has. On an accelerator they hand
attention to one op of Keras, and their softmax layer, and with it what a LayoutMap says of its
output, is never asked.
"""

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from autoshard.hardware.chips import Chip
from autoshard.model.keras_import import PATCHING, import_keras, import_keras_hub

__all__ = ["attention_of"]

# What KerasHub's layers ask, and how a chip answers.
_QUESTIONS: dict[str, Callable[[Chip], bool]] = {
    "running_on_tpu": lambda chip: chip.kind == "tpu",
    "running_on_gpu": lambda chip: chip.kind == "gpu",
    "gpu_supports_fused_attention_op": lambda chip: (
        not any("T4" in device for device in chip.jax_device_kinds)
    ),
}


@contextmanager
def attention_of(chip: Chip | None) -> Iterator[None]:
    """While a step is traced: KerasHub's layers take this machine for one with such chips.

    Another thread that comes here waits.

    Args:
        chip: what the step will run on; None for a CPU.
    """
    with PATCHING:
        import_keras_hub()
        ops = import_keras().ops
        attention = ops.dot_product_attention
        own = [
            (module, question, vars(module)[question])
            for name, module in list(sys.modules.items())
            if name.startswith("keras_hub.src.models.")
            for question in _QUESTIONS
            if question in vars(module)
        ]
        try:
            ops.dot_product_attention = _without_kernels(attention)
            for module, question, _ in own:
                answer = chip is not None and _QUESTIONS[question](chip)
                setattr(module, question, lambda answer=answer: answer)
            yield
        finally:
            ops.dot_product_attention = attention
            for module, question, function in own:
                setattr(module, question, function)


def _without_kernels(attention: Any) -> Any:
    """Keras' op as matmuls, without the soft cap of logits, which it refuses on this machine.

    On a TPU it gives up its kernel, and the soft cap with it, where the mask is traced.
    """

    @functools.wraps(attention)  # KerasHub looks at its signature
    def traced(*arrays: Any, **options: Any) -> Any:
        options.pop("attn_logits_soft_cap", None)
        return attention(*arrays, **{**options, "flash_attention": False})

    return traced
