"""Keras models without values: variables keep shape, dtype and path, and take no memory."""

import collections
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from autoshard.errors import ModelError
from autoshard.model.keras_import import PATCHING, import_keras, without_tensorflow

__all__ = ["OutputRecorder", "abstract_scope", "fresh_names", "name_counts", "recording_scope"]

_PENDING = "uninitialized_variables"
_NAME_COUNTERS = "object_name_uids"
_DISTRIBUTION = "distribution"
_STATELESS_SCOPE = "stateless_scope"


class OutputRecorder:
    """Stands in for a distribution and writes down every layer output that Keras asks about."""

    def __init__(self) -> None:
        self.paths: dict[str, None] = {}

    def get_tensor_layout(self, path: str) -> Any:
        """Answer as a map without a rule for `path` does: None."""
        self.paths[path] = None

    def get_variable_layout(self, variable: Any) -> None:
        """Answer that the variable lies wherever its device is."""

    def get_data_layout(self, data_shape: Any) -> None:
        """Refuse: data means that the model is trained or called while it is built."""
        raise ModelError(
            "the model is trained, or called on data, while it is built; return it before that: "
            "no weights are needed to plan"
        )


@contextmanager
def _global_attributes(**values: Any) -> Iterator[None]:
    from keras.src.backend.common import global_state

    before = {name: global_state.get_global_attribute(name) for name in values}
    for name, value in values.items():
        global_state.set_global_attribute(name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            global_state.set_global_attribute(name, value)


@contextmanager
def fresh_names() -> Iterator[None]:
    """Layer names count from zero inside, so that a model gets the paths of its first build.

    Keras draws seeds for what it makes, with Python's generator: that of the caller's program goes
    on where it was.
    """
    import_keras()
    counters: dict[str, int] = collections.defaultdict(int)
    state = random.getstate()
    try:
        with without_tensorflow(), _global_attributes(**{_NAME_COUNTERS: counters}):
            yield
    finally:
        random.setstate(state)


def name_counts() -> dict[str, int]:
    """How many names Keras has made up for layers, by the class in snake case that they begin with.

    Of those that it made in the innermost `fresh_names` around, else in the process.
    """
    import_keras()
    from keras.src.backend.common import global_state

    return dict(global_state.get_global_attribute(_NAME_COUNTERS, {}))


@contextmanager
def recording_scope(recorder: OutputRecorder | None = None) -> Iterator[OutputRecorder]:
    """Record the layer outputs that Keras would ask a LayoutMap for, and apply no layout.

    Layer names count from zero inside: Keras numbers unnamed layers over the whole process, so
    that a second Mixtral would otherwise get other paths than the first.

    Args:
        recorder: what records; by default the one of the scope around this one, or a new one.
    """
    import_keras()
    from keras.src.backend.common import global_state

    outer = global_state.get_global_attribute(_DISTRIBUTION)
    if recorder is None:
        recorder = outer if isinstance(outer, OutputRecorder) else OutputRecorder()
    with fresh_names(), _global_attributes(**{_DISTRIBUTION: recorder}):
        yield recorder


@contextmanager
def abstract_scope() -> Iterator[None]:
    """Variables made inside from an initializer are never given a value.

    They stay on Keras' list of variables that wait for one, and the next StatelessScope to close
    would fill them all (34 GB for Gemma 7B): the list is put back as it was.
    """
    keras = import_keras()
    with (
        _global_attributes(**{_PENDING: []}),
        keras.StatelessScope(initialize_variables=False),
        _without_values(),
    ):
        yield


def _placeholder(shape: Any, dtype: Any = None) -> Any:
    """What stands for the value of a variable that has none."""
    import jax.numpy as jnp

    return jnp.zeros(shape, dtype)


@contextmanager
def _without_values() -> Iterator[None]:
    """Let a variable made from an initializer never call it, and one made from a value keep that.

    Keras calls the initializer wherever a layer reads the variable, to learn shapes: Gemma 3n,
    which transposes its embeddings outside of a layer, then draws numbers for all of them.

    A StatelessScope refuses values: the rates and counters of an optimizer, which a KerasHub task
    makes in its constructor, and T5Gemma2's two bare vectors. These exist already.
    """
    import jax
    from keras.src.backend.common import KerasVariable

    def init(self: Any, initializer: Any, *args: Any, **kwargs: Any) -> None:
        if isinstance(initializer, (str, jax.core.Tracer)) or callable(initializer):
            original(self, initializer, *args, **kwargs)
            self._initializer = _placeholder
            return
        with _global_attributes(**{_STATELESS_SCOPE: None}):
            original(self, initializer, *args, **kwargs)

    with PATCHING:
        original = KerasVariable.__init__
        KerasVariable.__init__ = init
        try:
            yield
        finally:
            KerasVariable.__init__ = original
