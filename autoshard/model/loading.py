"""Loads stored weights shard by shard.

Keras turns each stored array into a whole one on the first device, in its stored dtype, casts it
there, and then lays it out. For a large weight that is the most memory the first device ever needs:
the embedding of Gemma 7B stored as float32 takes 3.1 GB, and its bfloat16 copy 1.6 GB, beside the
device's share of everything else. Here each device gets its own shard and nothing more. The values
are the same: both casts round to nearest, ties to even.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from autoshard.model.keras_import import PATCHING, import_keras

__all__ = ["sharded_loading"]


@contextmanager
def sharded_loading() -> Iterator[None]:
    """Inside, `from_preset` and `load_weights` put the shards of each weight on their devices.

    For use under `keras.distribution.set_distribution(plan.distribution())`; a variable without a
    layout is loaded as ever.

    Raises:
        BackendError: Keras runs on another backend than JAX.
    """
    import_keras()
    import jax
    from keras.src.backend.jax.core import Variable

    def convert(variable: Any, value: Any, dtype: Any = None) -> Any:
        layout = variable._layout
        if layout is None or not isinstance(value, np.ndarray) or value.shape != variable.shape:
            return original(variable, value, dtype)
        stored = jax.numpy.dtype(dtype or value.dtype)
        return jax.make_array_from_callback(
            value.shape,
            getattr(layout, "backend_layout", layout),
            lambda index: value[index].astype(stored),
        )

    with PATCHING:
        original = Variable._convert_to_tensor
        Variable._convert_to_tensor = convert
        try:
            yield
        finally:
            Variable._convert_to_tensor = original
