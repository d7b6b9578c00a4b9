"""Marks in a traced step: where Keras would ask a LayoutMap about the output of a layer.

Keras asks after every layer call, and lays the output out by the answer (`lax.with_sharding_
constraint`). For tracing, that is replaced by an equation `layer_output[path=...]`, the identity,
which goes through differentiation as the constraint does: the gradient of the output is laid out as
the output is.
"""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

from autoshard.model.abstract import OutputRecorder, recording_scope
from autoshard.model.keras_import import PATCHING

__all__ = ["MARK", "OutputShapes", "joined_shapes", "marking_scope"]

MARK = "layer_output"

Shape = tuple[int, ...]
# Template of a layer output -> the shapes of the arrays there, which a rule for it would hit.
OutputShapes = dict[str, set[Shape]]


def joined_shapes(*several: Mapping[str, Collection[Shape]]) -> OutputShapes:
    """The shapes of layer outputs in any of several steps.

    >>> sorted(joined_shapes({"mlp": {(8, 4)}}, {"mlp": {(1, 4)}})["mlp"])
    [(1, 4), (8, 4)]
    """
    joined = OutputShapes()
    for shapes in several:
        for output, found in shapes.items():
            joined.setdefault(output, set()).update(found)
    return joined


class _Marker(OutputRecorder):
    """Answers with the path itself, for `_mark` to put into the trace."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: OutputShapes = {}

    def get_tensor_layout(self, path: str) -> Any:
        super().get_tensor_layout(path)
        return path

    def mark(self, outputs: Any, path: str) -> Any:
        import jax

        def one(leaf: Any) -> Any:
            if not isinstance(leaf, jax.Array):
                return leaf
            self.shapes.setdefault(path, set()).add(tuple(leaf.shape))
            return _primitive().bind(leaf, path=path)

        return jax.tree.map(one, outputs)


@contextmanager
def marking_scope() -> Iterator[OutputShapes]:
    """Mark every layer output of what is traced inside.

    Yields:
        Path of a layer output -> the shapes of all arrays that a rule for it would lay out, filled
        as they are traced.
    """
    from keras.src.distribution import distribution_lib

    marker = _Marker()
    with PATCHING:
        original = distribution_lib.distribute_tensor
        distribution_lib.distribute_tensor = marker.mark
        try:
            with recording_scope(marker):
                yield marker.shapes
        finally:
            distribution_lib.distribute_tensor = original


@cache
def _primitive() -> Any:
    from jax.extend.core import Primitive
    from jax.interpreters import ad

    primitive = Primitive(MARK)
    primitive.def_abstract_eval(lambda aval, path: aval)
    primitive.def_impl(lambda array, path: array)
    ad.deflinear2(primitive, lambda cotangent, _, path: [primitive.bind(cotangent, path=path)])
    return primitive
