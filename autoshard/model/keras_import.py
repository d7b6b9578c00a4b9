"""Imports Keras and KerasHub for planning: on JAX, and without TensorFlow.

KerasHub imports TensorFlow wherever it is installed, for preprocessors that planning never calls;
that is two thirds of its import time. In processes that do nothing but plan (the command line and
its children) it is refused; in a program of the caller's, whose `fit` and `generate` need it, not.
Keras fixes its backend at import, so the backend is chosen here, before the first import, or
checked when the caller came first.
"""

import os
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from autoshard.errors import BackendError

__all__ = ["PATCHING", "PLANNING_ONLY", "import_keras", "import_keras_hub", "without_tensorflow"]

PLANNING_ONLY = "AUTOSHARD_PLANNING_ONLY"
"""Environment variable of a process that plans and does not train: set to anything."""

PATCHING = threading.RLock()
"""Held while something is changed that all threads share; another thread that plans waits."""

_REFUSED = ("tensorflow", "tensorflow_text")


class _RefuseTensorFlow:
    """A meta path finder under which TensorFlow looks as if it were not installed."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name.partition(".")[0] in _REFUSED:
            raise ModuleNotFoundError(f"autoshard plans without {name}", name=name)
        return None


@contextmanager
def without_tensorflow() -> Iterator[None]:
    """Let TensorFlow look as if it were not installed, in a process that only plans.

    Also while models are built: Keras' serialization looks for it.
    """
    # What the caller has imported already costs nothing more, and must not vanish.
    if PLANNING_ONLY not in os.environ or "tensorflow" in sys.modules:
        yield
        return
    finder = _RefuseTensorFlow()
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        _forget_what_was_refused()


def _forget_what_was_refused() -> None:
    """Keras remembers that a module is missing: let it look again when the caller needs it."""
    if "keras.src.utils.module_utils" not in sys.modules:
        return
    from keras.src.utils import module_utils

    for module in vars(module_utils).values():
        if getattr(module, "_available", None) is False:
            module._available = None


def import_keras() -> Any:
    """Import Keras on the JAX backend.

    Returns:
        The `keras` module.

    Raises:
        BackendError: Keras is set to another backend, whose distribution does nothing.
    """
    if "keras" not in sys.modules:
        os.environ.setdefault("KERAS_BACKEND", "jax")
    with without_tensorflow():
        import keras
    backend = keras.config.backend()
    if backend != "jax":
        raise BackendError(
            f"Keras runs on the {backend} backend, which ignores layouts; set the environment "
            "variable KERAS_BACKEND=jax before keras is imported"
        )
    return keras


def import_keras_hub() -> Any:
    """Import KerasHub, and Keras before it, as `import_keras` does.

    Returns:
        The `keras_hub` module.

    Raises:
        BackendError: Keras is set to another backend than JAX.
    """
    import_keras()
    with without_tensorflow():
        import keras_hub
    return keras_hub
