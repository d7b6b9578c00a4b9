"""The values of this room: the ops of a step with their factors, and the layout of its arrays.

An array of the step is known by the group of arrays it belongs to, and by which of the group's
dimensions each of its own is. Arrays that only elementwise ops, casts and transpositions
join are laid out together by the partitioner, so they form one group with one layout; what is
left to decide is the layout of the groups.

A layout of a group is a tuple with one entry a mesh axis: the dimension of the group that the
axis splits, or `WHOLE`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

from autoshard.graph.link import ONCE, Reads
from autoshard.model.outputs import OutputShapes

__all__ = [
    "WHOLE",
    "Argument",
    "Array",
    "Chain",
    "Group",
    "Interleaving",
    "LayerOutput",
    "Layout",
    "Op",
    "Program",
    "Repetition",
    "Scores",
    "Slicing",
    "StepOutput",
]

WHOLE = -1
Layout = tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Repetition:
    """How an array has each part of another several times, one beside the other.

    Attributes:
        dim: the dimension along which it does.
        width: the last one, along which each part is wide.
        times: how often.
        for_rows: whether matmuls read it that have a single row for each, as one token's query is.
    """

    dim: int
    width: int
    times: int
    for_rows: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Array:
    """One operand or result of an op.

    Attributes:
        identity: which array of the step it is; two uses of one array share it.
        group: index of its group.
        n_bytes: bytes of the whole array.
        itemsize: bytes of an element.
        factors: for each dimension of the group, the op's factor it moves with, or None.
        inner: the factors that dimensions hold inside those, each with its dimension, from major
            to minor.
        is_held: whether it is an argument of the step, there before any op runs.
        repetition: how it repeats what it was made of, by the group's dimensions, or None.
        reads: how the op reads it, if it is an operand.
    """

    identity: int
    group: int
    n_bytes: int
    itemsize: int
    factors: tuple[int | None, ...]
    inner: tuple[tuple[int, int], ...] = ()
    is_held: bool = False
    repetition: Repetition | None = None
    reads: Reads = ONCE


@dataclass(frozen=True, slots=True, kw_only=True)
class Slicing:
    """What is read of a matmul's result (see `autoshard.graph.slices`).

    Attributes:
        share: elements of it over those of the result.
        factors: the matmul's, along which it is sliced.
    """

    share: Fraction
    factors: frozenset[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """What attention scores (see `autoshard.graph.softmaxes`), among the arrays of an op.

    Attributes:
        position: of the scores or their exponentials, among operands and results.
        itemsize: bytes of an element, as the matmul makes it.
        batch: dimensions of their group that are the matmul's batch: not the tokens, nor heads that
            share a key's.
    """

    position: int
    itemsize: int
    batch: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Interleaving:
    """What a stack interleaves (see `autoshard.graph.interleaving`): the halves of heads.

    Attributes:
        tokens: dimension of its result's group.
        sharing: how many heads of a query share a key's; 1 of keys, and where each has its own.
    """

    tokens: int
    sharing: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Op:
    """One op of the step that moves or computes something.

    Attributes:
        primitive: its name in the jaxpr.
        kind: that of its link (see `autoshard.graph.link.Link`).
        operands, results: the arrays in and out.
        factor_sizes: size of each factor.
        reduced, shifted, gathered: the factors that do not just pass through (see
            `autoshard.graph.link.Link`).
        flops: multiply-adds count two; 0 for ops that only move data.
        window: elements of a convolution's filter, see `autoshard.graph.flops`; 1 for a matmul.
        layer: path of the layer that made it, for example `decoder_block_1/attention/query`.
        place: the same for each block that has such a layer, as `decoder_block_*/attention/query`.
        backward: whether it belongs to the gradient.
        count: how many times the whole model runs it, for this one of the folded copy. What it
            shares with ops of other blocks, as the output of an encoder, is moved once for all.
        sum_into: identity of the array in which its partial results end up summed with those of
            other ops; the partitioner reduces once, there.
        n_kernels: of a loop, the kernels of all its turns; 1 for any other op.
        summed_batch: the batch factor of a matmul along which a reduction sums its result at once,
            as that of the experts is; None for any other op.
        addends: for each written sum, as a residual stream's, of which its result is the part that
            is made last: the number of arrays that the sum reads.
        moves_cache: whether it moves part of a cache.
        is_fused: whether it takes no time beside another op: it moves the same part of a cache (see
            `autoshard.graph.caches`), or is that one's `slicing`. Where it shifts shards it does.
        vectors: position of the operand that a compiler broadcasts to the shape of the other before
            it partitions, see `autoshard.graph.vectors`.
        n_meetings: how often elementwise ops bring a matmul's result together with arrays of its
            group that others laid out.
        slicing: of a matmul, the slice that is all that is read of its result, if one is.
        is_returned: whether the step returns what it makes, as logits, or that in other form.
        is_brief: whether what it makes is soon read for the last time, as in a step that neither
            trains nor decodes.
        scores: of the ops of attention in a step that neither trains nor decodes, which array they
            make, add up or read; None for any other op.
        interleaving: of what interleaves the halves of heads in such a step; None for any other op.
    """

    primitive: str
    kind: str
    operands: tuple[Array, ...]
    results: tuple[Array, ...]
    factor_sizes: tuple[int, ...]
    reduced: frozenset[int]
    shifted: frozenset[int]
    gathered: frozenset[int]
    flops: int
    layer: str
    place: str
    backward: bool
    count: int
    sum_into: int
    window: int = 1
    n_kernels: int = 1
    summed_batch: int | None = None
    addends: tuple[int, ...] = ()
    moves_cache: bool = False
    is_fused: bool = False
    vectors: int | None = None
    n_meetings: int = 0
    slicing: Slicing | None = None
    is_returned: bool = False
    is_brief: bool = False
    scores: Scores | None = None
    interleaving: Interleaving | None = None

    @property
    def is_convolution(self) -> bool:
        """Whether it is no plain matmul, whatever its window."""
        return self.primitive == "conv_general_dilated"

    @property
    def is_batch(self) -> bool:
        """Whether it is a batch of matmuls, as attention is: both operands have it, and the result.

        A convolution is none.
        """
        if self.kind != "contraction" or self.is_convolution or len(self.arrays) != 3:
            return False
        left, right, made = ({*array.factors} for array in self.arrays)
        return bool(left & right & made - {None})

    @property
    def arrays(self) -> tuple[Array, ...]:
        """Its operands, then its results."""
        return (*self.operands, *self.results)

    @property
    def groups(self) -> tuple[int, ...]:
        """The groups of its operands, then of its results."""
        return tuple(array.group for array in self.arrays)


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Arrays that are laid out together.

    Attributes:
        sizes: size of each dimension (none of size 1).
        argument: index of the argument that fixes the layout, or None where it is free.
    """

    sizes: tuple[int, ...]
    argument: int | None

    @property
    def n_elements(self) -> int:
        """Elements of an array of this group."""
        return math.prod(self.sizes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Argument:
    """An input of the step.

    Attributes:
        role: `weight`, `slot`, `state`, `cache` or `data`.
        family: the family whose spec it follows; None for data and for what is replicated.
        group: index of its group.
        dims: for each dimension of the array, the group's dimension, or None for size 1.
        shape: shape of the array.
        n_bytes: bytes of the whole array.
        count: how many like it the whole model has; of a cache how many times as large it is there.
        donated: whether a result takes its place in memory.
        is_rebuilt: whether that result is joined from parts, which are all there before it.
        trainable: whether the step computes a gradient for it.
    """

    role: str
    family: str | None
    group: int
    dims: tuple[int | None, ...]
    shape: tuple[int, ...]
    n_bytes: int
    count: int | Fraction
    donated: bool
    is_rebuilt: bool
    trainable: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class StepOutput:
    """An array that the step returns.

    Attributes:
        group: index of its group.
        n_bytes: bytes of the whole array.
    """

    group: int
    n_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerOutput:
    """An array that Keras would ask a LayoutMap about: the output of a layer or its gradient.

    Attributes:
        template: path of the layer, `*` for the number of its block, and `/output`.
        group: index of its group.
        dims: for each dimension of the array, the group's dimension, or None for size 1.
        shape: shape of the array.
        n_bytes: bytes of the whole array.
        backward: whether it is the gradient.
        identity: which array of the step it is.
        made_by: index of the contraction that makes it, if one does: then a layout of it can turn
            an all-reduce into a reduce-scatter.
        as_made: whether it is that contraction's own result, with no bias, move or cast behind it.
    """

    template: str
    identity: int
    group: int
    dims: tuple[int | None, ...]
    shape: tuple[int, ...]
    n_bytes: int
    backward: bool
    made_by: int | None
    as_made: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Chain:
    """What fused ops make for matmuls.

    Attributes:
        end: identity of the array that they make in the end.
        readers: the matmuls that read it, in order.
        follows_matmul: whether it is made of results of matmuls alone, each as large as it: then
            the one made last can make it too, as it writes.
        takes_place: whether it may be written where the result of that one would be, which only
            one equation reads.
    """

    end: int
    readers: tuple[int, ...]
    follows_matmul: bool
    takes_place: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """The step as the planner sees it.

    Attributes:
        groups: what is to be laid out.
        ops: in execution order.
        last_readers: for each op the index of the last that reads its result, its own where none
            does (see `autoshard.graph.liveness`).
        chained_operands: index of a matmul -> those of its operands that fused ops make, by
            identity.
        arguments: the inputs of the step.
        outputs: results that take no argument's place (loss, logits).
        layer_outputs: where a LayoutMap could lay out an activation.
    """

    groups: tuple[Group, ...]
    ops: tuple[Op, ...]
    last_readers: tuple[int, ...]
    chained_operands: Mapping[int, Mapping[int, Chain]]
    arguments: tuple[Argument, ...]
    outputs: tuple[StepOutput, ...]
    layer_outputs: tuple[LayerOutput, ...] = ()

    def touching(self) -> list[list[int]]:
        """For each group the ops that read or make an array of it, in order."""
        touching: list[list[int]] = [[] for _ in self.groups]
        for index, op in enumerate(self.ops):
            for group in set(op.groups):
                touching[group].append(index)
        return touching

    def layers_with(self, kind: str) -> dict[str, tuple[str, ...]]:
        """The primitives of ops of a kind -> the layers that made such ops."""
        layers: dict[str, dict[str, None]] = {}
        for op in self.ops:
            if op.kind == kind:
                layers.setdefault(op.primitive, {})[op.layer] = None
        return {primitive: tuple(found) for primitive, found in layers.items()}

    def output_shapes(self) -> OutputShapes:
        """Template of a layer output -> the shapes of the arrays there."""
        shapes = OutputShapes()
        for output in self.layer_outputs:
            shapes.setdefault(output.template, set()).add(output.shape)
        return shapes
