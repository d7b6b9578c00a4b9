"""The variable table: every variable of a model, and the families that share one layout."""

import dataclasses
import hashlib
import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from autoshard.errors import UnknownNameError
from autoshard.model.paths import path_templates, ranked

__all__ = ["Family", "ModelTable", "Variable", "dtype_bytes", "make_table"]


def dtype_bytes(dtype: str) -> int:
    """Bytes of one element of a dtype, by its numpy-style name.

    >>> dtype_bytes("bfloat16"), dtype_bytes("float32"), dtype_bytes("int8")
    (2, 4, 1)
    """
    bits = re.search(r"\d+", dtype)
    return max(1, int(bits[0]) // 8) if bits else 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Variable:
    """A weight.

    Attributes:
        path: the path that Keras asks a LayoutMap for.
        shape: dimensions, of the whole array.
        dtype: numpy-style name, for example `bfloat16`.
        trainable: whether training changes it.
        family: the name of its family.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    trainable: bool
    family: str

    @property
    def n_parameters(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @property
    def n_bytes(self) -> int:
        """Bytes of the whole array."""
        return self.n_parameters * dtype_bytes(self.dtype)


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """Variables that differ only in the block they sit in: a plan gives them one spec.

    Attributes:
        name: the template, with the shape behind it where several families share the template.
        template: the path with `*` for block indices and without Keras' process-wide counters: a
            segment without `*` whose paths do carry numbers stands for any such number.
        shape, dtype, trainable: of each variable.
        paths: the variables' paths in the model's order; repeated where Keras repeats them.
    """

    name: str
    template: str
    shape: tuple[int, ...]
    dtype: str
    trainable: bool
    paths: tuple[str, ...]

    @property
    def n_parameters(self) -> int:
        """The number of elements of all members."""
        return math.prod(self.shape) * len(self.paths)

    @property
    def n_bytes(self) -> int:
        """Bytes of all members, whole."""
        return self.n_parameters * dtype_bytes(self.dtype)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelTable:
    """All that laying a model out needs to know of it.

    Attributes:
        name: the model as it was asked for.
        variables: the weights, in the model's order.
        output_paths: each layer's path followed by `/output`, for which Keras asks the map too.
        state_paths: variables that are no weights (seeds of random generators): a rule that hits
            one lays it out, so none should.
        templates: path -> template, of the weights and the outputs.
    """

    name: str
    variables: tuple[Variable, ...]
    output_paths: tuple[str, ...]
    state_paths: tuple[str, ...]
    templates: dict[str, str]

    @property
    def n_parameters(self) -> int:
        """Elements of all weights."""
        return sum(variable.n_parameters for variable in self.variables)

    @property
    def n_trainable(self) -> int:
        """Elements of the weights that training changes."""
        return sum(variable.n_parameters for variable in self.variables if variable.trainable)

    @property
    def n_bytes(self) -> int:
        """Bytes of all weights."""
        return sum(variable.n_bytes for variable in self.variables)

    @property
    def dtypes(self) -> tuple[str, ...]:
        """The dtypes of the weights, that of most bytes first."""
        sizes: Counter[str] = Counter()
        for variable in self.variables:
            sizes[variable.dtype] += variable.n_bytes
        return tuple(dtype for dtype, _ in sizes.most_common())

    @property
    def dtype(self) -> str:
        """The dtype of most of these bytes; "" without weights."""
        return next(iter(self.dtypes), "")

    def families(self) -> tuple[Family, ...]:
        """The families, each where its first variable stands."""
        members: dict[str, list[Variable]] = defaultdict(list)
        for variable in self.variables:
            members[variable.family].append(variable)
        return tuple(
            Family(
                name=name,
                template=self.templates[group[0].path],
                shape=group[0].shape,
                dtype=group[0].dtype,
                trainable=group[0].trainable,
                paths=tuple(variable.path for variable in group),
            )
            for name, group in members.items()
        )

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the table of paths, shapes and dtypes.

        Numbers that Keras gives over the whole process are left out, so that a second model of the
        kind in one process has the same fingerprint. Low-rank factors make another table, and
        which weights are trained makes none.
        """
        paths = ranked(self.templates[variable.path] for variable in self.variables)
        rows = [
            [path, list(variable.shape), variable.dtype]
            for path, variable in zip(paths, self.variables, strict=True)
        ]
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()

    def under(self, layer: str) -> "ModelTable":
        """The table of one layer's variables.

        Args:
            layer: its path, such as `decoder_block_0` or `decoder_block_0/attention`.

        Raises:
            UnknownNameError: no variable lies under it.
        """
        prefix = layer.strip("/") + "/"
        variables = tuple(v for v in self.variables if v.path.startswith(prefix))
        if not variables:
            parts = (v.path.split("/") for v in self.variables)
            known = ("/".join(p[:n]) for p in parts for n in range(1, len(p)))
            raise UnknownNameError("layer", layer, known)
        return dataclasses.replace(self, variables=variables)


Row = tuple[str, tuple[int, ...], str, bool]


def make_table(
    name: str,
    rows: Iterable[Row],
    output_paths: Iterable[str] = (),
    state_paths: Iterable[str] = (),
) -> ModelTable:
    """Sort a model's variables into families.

    Args:
        name: the model as it was asked for.
        rows: path, shape, dtype and trainability of each weight, in the model's order.
        output_paths: the layer outputs that Keras asks a map for.
        state_paths: the variables that are no weights.
    """
    rows, outputs = list(rows), tuple(output_paths)
    templates = path_templates([*(row[0] for row in rows), *outputs])
    sharing: dict[str, dict[tuple[Any, ...], None]] = defaultdict(dict)
    for path, *kind in rows:
        sharing[templates[path]][tuple(kind)] = None
    variables = tuple(
        Variable(
            path=path,
            shape=shape,
            dtype=dtype,
            trainable=trainable,
            family=_family_name(
                templates[path], (shape, dtype, trainable), sharing[templates[path]]
            ),
        )
        for path, shape, dtype, trainable in rows
    )
    return ModelTable(
        name=name,
        variables=variables,
        output_paths=outputs,
        state_paths=tuple(state_paths),
        templates=templates,
    )


def _family_name(
    template: str, kind: tuple[tuple[int, ...], str, bool], kinds: Iterable[tuple[Any, ...]]
) -> str:
    """The template, followed by as much as tells its families apart."""
    shapes, dtypes, trainables = (set(column) for column in zip(*kinds, strict=True))
    if len(shapes) == len(dtypes) == len(trainables) == 1:
        return template
    shape, dtype, trainable = kind
    parts = ["x".join(map(str, shape)) or "scalar"]
    if len(dtypes) > 1:
        parts.append(dtype)
    if len(trainables) > 1:
        parts.append("trainable" if trainable else "frozen")
    return f"{template} [{' '.join(parts)}]"
