"""The layouts that a LayoutMap can ask for, family by family, and what they fix in a program.

A spec puts each mesh axis on at most one dimension, and on each dimension at most one axis (Keras'
TensorLayout takes no more); a dimension must be a multiple of its axis (JAX pads nothing).

Beside the variables a map can lay out the outputs of layers. Of the outputs that are laid out
together only those that a contraction makes are asked about: there partial sums can become a
reduce-scatter, and propagation carries the layout to the rest. Every array that a rule would hit
has to bear it, the gradient's and those of `generate` included.
"""

import itertools
import math
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import networkx as nx

from autoshard.graph.axis_parts import AxisParts
from autoshard.graph.program import WHOLE, LayerOutput, Layout, Program
from autoshard.mesh import Mesh, Spec, divides, shard_shape
from autoshard.model.outputs import OutputShapes
from autoshard.model.paths import unnumbered

__all__ = [
    "NO_RULE",
    "Assignment",
    "Choices",
    "asked_layouts",
    "family_choices",
    "first_specs",
    "fixed_layouts",
    "legal_specs",
    "output_choices",
    "smallest_shards",
    "split_by_hand",
]

Assignment = Mapping[str, Spec]

# A family of less than this share of the model's bytes stays whole, for a rule for it would be
# longer than its gain; or, a bias, it lies as the weight of its layer does.
_NEGLIGIBLE_SHARE = 1e-3

# What stands for a layer output that no rule names.
NO_RULE: Spec = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Choices:
    """What is to be decided for one family, or for one layer output.

    Attributes:
        name: of the family, or the template of the output.
        shape: shape of each of its variables.
        specs: the legal ones, the replicated one first; of what the step does not read the
            smallest alone; of an output `NO_RULE` first.
        siblings: name shared by those that are moved together before they are moved alone:
            families of one shape in one block (query, key and value; gate and up), outputs that are
            added up, and families that a map can give only one spec.
        n_bytes: bytes of all its variables, whole.
        follows: of a small bias, the family of its layer's weight: it lies as the last dimensions
            of that do, or whole. "" for what is moved on its own.
        is_output: whether it is a layer output, which may go without a rule.
    """

    name: str
    shape: tuple[int, ...]
    specs: tuple[Spec, ...]
    siblings: str
    n_bytes: int
    follows: str = ""
    is_output: bool = False

    @property
    def layer(self) -> str:
        """The layer whose weight or output it is."""
        return _layer(self.name)

    @property
    def parent(self) -> str:
        """The layer that the layer of it stands in; "" at the top."""
        return _parent(self.name)

    @property
    def unnumbered(self) -> str:
        """The name with `*` for the number that alone tells it from others, if there are such."""
        return unnumbered(self.name)


def legal_specs(shape: Sequence[int], mesh: Mesh) -> Iterator[Spec]:
    """Every spec of an array of `shape`, the replicated one first.

    >>> from autoshard.mesh import parse_mesh
    >>> list(legal_specs((16, 3), parse_mesh("1x8")))
    [(None, None), ('model', None)]
    """
    specs = _placements(len(shape), mesh.parallel_axes)
    return (spec for spec in specs if divides(shape, spec, mesh))


def _placements(n_dims: int, axes: Sequence[str]) -> Iterator[Spec]:
    """Each axis on one dimension of an array or on none, on none first."""
    for dims in itertools.product(range(-1, n_dims), repeat=len(axes)):
        axis_at = {dim: axis for dim, axis in zip(dims, axes, strict=True) if dim >= 0}
        if len(axis_at) == sum(dim >= 0 for dim in dims):
            yield tuple(map(axis_at.get, range(n_dims)))


def family_choices(program: Program, mesh: Mesh) -> tuple[Choices, ...]:
    """The families of a program with their legal specs, largest first.

    Families that make up less than a thousandth of the weights have the replicated spec alone, but
    for biases: the gradient of one that lies whole has to be gathered where its layer is split.
    Those that the step does not read, as an encoder of pictures where none are fed, cost no time in
    any layout and have the one with the smallest shard.
    """
    unread = _unread(program)
    shapes: dict[str, tuple[int, ...]] = {}
    n_bytes: dict[str, int] = {}
    for argument in program.arguments:
        if argument.role == "weight" and argument.family is not None:
            shapes[argument.family] = argument.shape
            total = int(argument.n_bytes * argument.count)
            n_bytes[argument.family] = n_bytes.get(argument.family, 0) + total
    floor = _NEGLIGIBLE_SHARE * sum(n_bytes.values())
    weights = {
        (_layer(name), shape[-n:]): name
        for name, shape in shapes.items()
        for n in range(1, len(shape))
        if n_bytes[name] >= floor
    }
    follows = {
        name: weights.get((_layer(name), shape), "") if n_bytes[name] < floor else ""
        for name, shape in shapes.items()
    }

    def specs(family: str) -> tuple[Spec, ...]:
        legal = tuple(legal_specs(shapes[family], mesh))
        if n_bytes[family] < floor and not follows[family]:
            return legal[:1]
        return (_smallest_shard(shapes[family], legal, mesh),) if family in unread else legal

    return tuple(
        Choices(
            name=family,
            shape=shapes[family],
            specs=specs(family),
            siblings=f"{_parent(family)} {shapes[family]}",
            n_bytes=n_bytes[family],
            follows=follows[family],
        )
        for family in sorted(n_bytes, key=lambda name: (-n_bytes[name], name))
    )


def _unread(program: Program) -> set[str]:
    """The families that no op brings together with anything but their own slots and gradient."""
    touching = nx.Graph()
    touching.add_nodes_from(range(len(program.groups)))
    for op in program.ops:
        nx.add_path(touching, op.groups)
    owners: dict[int | None, str | None] = {a.group: a.family for a in program.arguments}
    unread: set[str] = set()
    read: set[str | None] = set()
    for component in nx.connected_components(touching):
        families = {owners[group] for group in component if group in owners}
        alone = families.pop() if len(families) == 1 else None
        unread |= set() if alone is None else {alone}
        read |= families
    return unread - read


def first_specs(families: Sequence[Choices]) -> dict[str, Spec]:
    """Each family with its first spec: whole where it has a choice, outputs without a rule."""
    return {choices.name: choices.specs[0] for choices in families}


def smallest_shards(families: Sequence[Choices], mesh: Mesh) -> dict[str, Spec]:
    """The layout under which a device holds the least of each family."""
    return {
        choices.name: _smallest_shard(choices.shape, choices.specs, mesh) for choices in families
    }


def _smallest_shard(shape: Sequence[int], specs: Sequence[Spec], mesh: Mesh) -> Spec:
    """The spec under which a device holds the least of an array."""
    return min(specs, key=lambda spec: math.prod(shard_shape(shape, spec, mesh)))


def split_by_hand(families: Sequence[Choices], mesh: Mesh) -> dict[str, Spec]:
    """The layout that people write, told by shapes: heads, feed-forward and vocabulary are split.

    The last mesh axis splits the first dimension of each family that is not the residual stream;
    where that is not legal the family stays whole. The stream is the dimension that most layers
    have in their largest family (biases of heads, which have none, tell nothing), the smallest of
    several: it is narrower than a feed-forward layer.
    """
    largest: dict[str, Choices] = {}
    for choices in sorted(families, key=lambda choices: -choices.n_bytes):
        largest.setdefault(choices.layer, choices)
    sizes = Counter(size for choices in largest.values() for size in set(choices.shape))
    stream = max(sizes, key=lambda size: (sizes[size], -size), default=0)
    assignment = {}
    for choices in families:
        beside = (dim for dim, size in enumerate(choices.shape) if size != stream)
        split = next(beside, None)
        spec = tuple(
            mesh.axis_names[-1] if dim == split else None for dim in range(len(choices.shape))
        )
        assignment[choices.name] = spec if spec in choices.specs else choices.specs[0]
    return assignment


def output_choices(program: Program, mesh: Mesh, shapes: OutputShapes) -> tuple[Choices, ...]:
    """The layer outputs that a rule may lay out, with the specs that every array there can bear.

    Data stays on the data axis: a rule that did not say so would gather it.

    Args:
        program: the step.
        mesh: the mesh.
        shapes: of the arrays at each template; an output that is absent gets no rule.
    """
    found: dict[str, LayerOutput] = {}
    for output in program.layer_outputs:
        free = program.groups[output.group].argument is None
        if (
            output.made_by is not None
            and not output.backward
            and free
            and output.template in shapes
        ):
            found.setdefault(output.template, output)
    choices = []
    for template, output in found.items():
        layer = template.removesuffix("output")
        # Of nested layers that return one array the innermost: others return caches too, at times.
        inner = any(o != template and o.startswith(layer) for o in found)
        specs = () if inner else _output_specs(output.shape, mesh, shapes[template])
        if len(specs) > 0:
            choices.append(
                Choices(
                    name=template,
                    shape=output.shape,
                    specs=(NO_RULE, *specs),
                    siblings=f"output {output.group}",
                    n_bytes=output.n_bytes,
                    is_output=True,
                )
            )
    return tuple(choices)


def _output_specs(
    shape: tuple[int, ...], mesh: Mesh, shapes: Collection[tuple[int, ...]]
) -> tuple[Spec, ...]:
    """Specs of an activation that all of `shapes` can bear; none on a single device."""
    if not mesh.parallel_axes:
        return ()
    data, others = mesh.data_axis, [a for a in mesh.parallel_axes if a != mesh.data_axis]
    specs: list[Spec] = []
    for first, *rest in _placements(len(shape), others):
        spec = (first or data, *rest)
        is_free = first is None or data not in mesh.parallel_axes
        if is_free and all(len(s) == len(shape) and divides(s, spec, mesh) for s in shapes):
            specs.append(spec)
    return tuple(specs)


def _layer(family: str) -> str:
    """The layer of a family: its path less the variable."""
    return family.rpartition("/")[0]


def _parent(family: str) -> str:
    """The block a family's layer stands in: its path less the layer and the variable."""
    return _layer(_layer(family))


def fixed_layouts(
    program: Program, assignment: Assignment, mesh: Mesh, parts: AxisParts
) -> dict[int, Layout]:
    """The layouts of the groups of arguments.

    Data is split on dimension 0 over the data axis, as Keras does; a KV cache is left free, since
    Keras makes it inside the step; what has no family is whole.

    Args:
        program: the step.
        assignment: family -> spec.
        mesh: the mesh.
        parts: what its axes are cut into.
    """
    axes = mesh.parallel_axes
    fixed: dict[int, Layout] = {}
    for argument in program.arguments:
        if argument.role == "cache":
            continue
        spec: Spec = ()
        if argument.role == "data":
            spec = (mesh.data_axis,)
        elif argument.family is not None:
            spec = assignment.get(argument.family, ())
        fixed[argument.group] = _layout(spec, argument.dims, axes, parts)
    return fixed


def asked_layouts(
    program: Program, assignment: Assignment, mesh: Mesh, parts: AxisParts
) -> list[tuple[LayerOutput, Layout]]:
    """The outputs that a rule lays out, and their gradients, and how.

    Args:
        program, mesh, parts: as for `fixed_layouts`.
        assignment: template of a layer output -> spec.
    """
    return [
        (output, _layout(spec, output.dims, mesh.parallel_axes, parts))
        for output in program.layer_outputs
        if program.groups[output.group].argument is None
        and (spec := assignment.get(output.template, NO_RULE))
    ]


@cache
def _layout(
    spec: Spec, dims: tuple[int | None, ...], axes: tuple[str, ...], parts: AxisParts
) -> Layout:
    """A spec of an array as the layout of its group."""
    layout = [WHOLE] * len(axes)
    for axis, dim in zip(spec, dims, strict=False):
        if axis in axes and dim is not None:
            layout[axes.index(axis)] = dim
    return parts.by_part(tuple(layout))
