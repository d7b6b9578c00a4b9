"""Turns a traced step into the `Program` that the planner lays out."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction

from autoshard.graph.caches import CacheMoves, cache_count, cache_moves, rebuilt_arguments
from autoshard.graph.casts import held_arrays, turned_weights, with_narrow_results
from autoshard.graph.equal import merge_equal
from autoshard.graph.equations import Equation, FlatJaxpr
from autoshard.graph.grouping import Grouping, Numbering, group_arrays
from autoshard.graph.interleaving import with_interleaving
from autoshard.graph.layer_outputs import layer_outputs
from autoshard.graph.link import ONCE, PASSING, Label, Labels, Link, Reads
from autoshard.graph.liveness import Lives, read_lives
from autoshard.graph.meetings import count_meetings
from autoshard.graph.places import with_places
from autoshard.graph.program import (
    Argument,
    Array,
    Group,
    Op,
    Program,
    Slicing,
    StepOutput,
)
from autoshard.graph.repeats import read_repetitions
from autoshard.graph.slices import Slice, read_slices
from autoshard.graph.softmaxes import with_scores
from autoshard.graph.sums import as_summed, sum_targets
from autoshard.graph.vectors import broadcast_vectors

__all__ = ["StepInput", "build_program"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepInput:
    """What is known of one argument of the step beside its shape.

    Attributes:
        role: `weight`, `slot`, `state`, `cache` or `data`.
        family: the family whose spec it follows, or None.
        count: how many like it the whole model has, for this one of the folded copy; of a cache
            `build_program` finds out itself.
        trainable: whether the step computes a gradient for it.
    """

    role: str
    family: str | None
    count: int | Fraction = 1
    trainable: bool = False


def build_program(
    flat: FlatJaxpr,
    inputs: Sequence[StepInput],
    replaces: Sequence[int | None],
    count_of: Callable[[str], int] = lambda layer: 1,
    templates: Mapping[str, str] | None = None,
    *,
    for_tpu: bool = False,
) -> Program:
    """Turn a step that was read into the program.

    Args:
        flat: the step.
        inputs: one an argument, in order.
        replaces: for each result, the index of the argument whose memory it takes, or None.
        count_of: how many times the whole model has a layer of the traced copy.
        templates: path of each variable or layer output -> its template.
        for_tpu: whether a TPU compiler partitions the step, which simplifies it first (see
            `autoshard.graph.casts`, `autoshard.graph.equal` and `autoshard.graph.vectors`), and
            has matmuls read a weight in place of what it is turned to.

    Returns:
        The program, with the arrays grouped and only the ops that can move or compute something.
    """
    flat, common = with_places(flat, templates or {}), frozenset[int]()
    if for_tpu:
        own = [i for i, info in zip(flat.inputs, inputs, strict=True) if info.role != "data"]
        flat, common = merge_equal(flat, own)
        flat = with_narrow_results(flat)
    inputs = [
        replace(info, count=cache_count(flat, identity, count_of)) if info.role == "cache" else info
        for identity, info in zip(flat.inputs, inputs, strict=True)
    ]
    owners = _owners(flat, inputs, turned_weights(flat) if for_tpu else {})
    grouping, left = group_arrays(flat, owners)
    numbering = Numbering(grouping, held=held_arrays(flat), repetitions=read_repetitions(flat))
    argument_of = {numbering.number(i): n for n, i in enumerate(flat.inputs)}
    caches = {index: info.count for index, info in enumerate(inputs) if info.role == "cache"}
    moves = cache_moves(flat, caches, replaces)
    made = _ops(flat, left, numbering, _counts(flat, left, moves, common, count_of))
    lives = read_lives(flat, {position: index for index, position in enumerate(made)})
    ops = _with_surroundings(made, flat, grouping, moves, lives, for_tpu)
    ops = _with_ends(ops, flat, has_caches=bool(caches))
    ops += _replacements(flat, inputs, replaces, numbering)
    outputs, arguments = _ends(flat, inputs, replaces, numbering)
    laid = layer_outputs(flat, ops, numbering, templates or {}, for_tpu)
    groups = tuple(
        Group(sizes=grouping.sizes[root], argument=argument_of.get(number))
        for root, number in numbering.numbers.items()
    )
    return Program(
        groups=groups,
        ops=tuple(ops),
        last_readers=tuple(lives.results.get(index, index) for index in range(len(ops))),
        chained_operands=lives.operands,
        arguments=arguments,
        outputs=outputs,
        layer_outputs=laid,
    )


def _owners(
    flat: FlatJaxpr, inputs: Sequence[StepInput], turned: Mapping[int, int]
) -> dict[int, str]:
    """Identity of an argument -> whose spec it follows: its family's, or one of its own.

    What a weight is turned to follows the weight's.
    """
    owners = {
        identity: f"argument {index}" if info.family is None else info.family
        for index, (identity, info) in enumerate(zip(flat.inputs, inputs, strict=True))
        if info.role != "state" or info.family
    }
    of_turned = {result: owners[weight] for result, weight in turned.items() if weight in owners}
    return owners | of_turned


def _counts(
    flat: FlatJaxpr,
    left: Collection[int],
    moves: CacheMoves,
    common: frozenset[int],
    count_of: Callable[[str], int],
) -> dict[int, int]:
    """Position of an equation -> how many times the whole model runs it.

    Args:
        flat: the step.
        left: positions of the equations to count.
        moves: those that move caches.
        common: the arrays that blocks have in common.
        count_of: how many times the whole model has a layer of the traced copy.
    """
    return {
        position: moves.counts.get(position)
        or (1 if common.issuperset(equation.results) else count_of(equation.layer))
        for position, equation in enumerate(flat.equations)
        if position in left
    }


def _ops(
    flat: FlatJaxpr,
    left: Mapping[int, tuple[int, ...]],
    numbering: Numbering,
    counts: Mapping[int, int],
) -> dict[int, Op]:
    """The ops in the order of execution, by the position of their equations.

    Args:
        flat: the step.
        left: position of an equation that grouping leaves -> the operands that it has yet to lay.
        numbering: of the groups.
        counts: position -> how many times the whole model runs the equation.
    """
    sums = sum_targets(flat)
    ops = {
        position: _op(flat.equations[position], operands, flat, numbering, counts[position], sums)
        for position, operands in left.items()
    }
    return {position: op for position, op in ops.items() if op is not None}


def _with_surroundings(
    made: Mapping[int, Op],
    flat: FlatJaxpr,
    grouping: Grouping,
    moves: CacheMoves,
    lives: Lives,
    for_tpu: bool,
) -> list[Op]:
    """The ops, told what is around them: caches, sums, slices, arrays laid out by others."""
    meetings = count_meetings(flat, grouping.group_of)
    slices = read_slices(flat) if for_tpu else {}
    sliced = {each.identity for each in slices.values()}
    return [
        replace(
            op,
            moves_cache=position in moves.all,
            is_fused=position in moves.fused
            or not sliced.isdisjoint(flat.equations[position].results),
            vectors=broadcast_vectors(op) if for_tpu else None,
            n_meetings=meetings.get(op.results[0].identity, 0) if op.results else 0,
            slicing=_slicing(op, slices, grouping),
        )
        for position, op in zip(made, as_summed(list(made.values()), lives), strict=True)
    ]


def _with_ends(ops: Sequence[Op], flat: FlatJaxpr, *, has_caches: bool) -> list[Op]:
    """The ops, told which make what the step returns, in whatever form, and which are brief."""
    outputs, spread = set(flat.outputs), set[int]()
    for equation in flat.equations:
        if equation.link.kind == "broadcast":
            spread.update(equation.results)
    for equation in reversed(flat.equations):
        if equation.link.kind in PASSING and not outputs.isdisjoint(equation.results):
            own = set(equation.operands) - spread
            outputs |= own if len(own) == 1 else set()
    told = [
        replace(op, is_returned=not outputs.isdisjoint(array.identity for array in op.results))
        for op in ops
    ]
    if has_caches or any(op.backward for op in ops):
        return told
    brief = [replace(op, is_brief=not op.is_returned) for op in told]
    return with_interleaving(with_scores(brief))


def _slicing(op: Op, slices: Mapping[int, Slice], grouping: Grouping) -> Slicing | None:
    """What is read of an op's result, if that is a slice alone."""
    if not op.results or op.results[0].identity not in slices:
        return None
    result = op.results[0]
    read, dims = slices[result.identity], grouping.dims[result.identity]
    factors = (result.factors[dim] for dim in map(dims.__getitem__, read.dims) if dim is not None)
    return Slicing(share=read.share, factors=frozenset(f for f in factors if f is not None))


def _ends(
    flat: FlatJaxpr,
    inputs: Sequence[StepInput],
    replaces: Sequence[int | None],
    numbering: Numbering,
) -> tuple[tuple[StepOutput, ...], tuple[Argument, ...]]:
    outputs = tuple(
        StepOutput(group=numbering.number(identity), n_bytes=flat.arrays[identity].n_bytes)
        for identity, replaced in zip(flat.outputs, replaces, strict=True)
        if replaced is None and identity is not None
    )
    donated = {index for index in replaces if index is not None}
    rebuilt = rebuilt_arguments(flat, replaces)
    arguments = tuple(
        Argument(
            role=info.role,
            family=info.family,
            group=numbering.number(identity),
            dims=numbering.grouping.dims[identity],
            shape=flat.arrays[identity].shape,
            n_bytes=flat.arrays[identity].n_bytes,
            count=info.count,
            donated=index in donated,
            is_rebuilt=index in rebuilt,
            trainable=info.trainable,
        )
        for index, (identity, info) in enumerate(zip(flat.inputs, inputs, strict=True))
    )
    return outputs, arguments


def _replacements(
    flat: FlatJaxpr,
    inputs: Sequence[StepInput],
    replaces: Sequence[int | None],
    numbering: Numbering,
) -> list[Op]:
    """A result that takes an argument's memory takes its layout: a copy, where they differ."""
    ops = []
    for identity, replaced in zip(flat.outputs, replaces, strict=True):
        if replaced is None or identity is None:
            continue
        target = flat.inputs[replaced]
        if numbering.grouping.group_of[identity] == numbering.grouping.group_of[target]:
            continue
        labels = tuple(range(len(flat.arrays[identity].shape)))
        link = Link(kind="elementwise", operands=(labels,), results=(labels,))
        equation = Equation(
            primitive="copy",
            operands=(identity,),
            results=(target,),
            link=link,
            flops=0,
            layer="",
            place="",
            backward=False,
        )
        count = round(inputs[replaced].count)
        ops.append(_op(equation, (0,), flat, numbering, count, {}))
    return [op for op in ops if op is not None]


@dataclass(slots=True, kw_only=True)
class _Factors:
    """Gives the labels of one op numbers from 0, as its arrays come to use them."""

    link: Link
    flat: FlatJaxpr
    numbering: Numbering
    numbers: dict[Label, int] = field(default_factory=dict)
    sizes: list[int] = field(default_factory=list)

    def array(self, identity: int, labels: Labels, reads: Reads = ONCE) -> Array:
        kind = self.flat.arrays[identity]
        for label, size in zip(labels, kind.shape, strict=True):
            if label is not None and size != 1:
                self.number(label, size)
        placed = self.numbering.grouping.placed(identity, labels)
        inner = tuple(
            (self.number(label, 1), dim)
            for dim, major in enumerate(placed)
            for label in self.inside(major, placed)
        )
        return Array(
            identity=identity,
            group=self.numbering.number(identity),
            n_bytes=kind.n_bytes,
            itemsize=kind.itemsize,
            factors=tuple(None if label is None else self.numbers[label] for label in placed),
            inner=inner,
            is_held=identity in self.numbering.held,
            repetition=self.numbering.repetition(identity),
            reads=reads,
        )

    def number(self, label: Label, size: int) -> int:
        """The number of a factor, which has this size if the link says no other."""
        if label not in self.numbers:
            self.numbers[label] = len(self.numbers)
            self.sizes.append(self.link.sizes.get(label, size))
        return self.numbers[label]

    def inside(self, major: Label | None, own: Sequence[Label | None]) -> Iterator[Label]:
        """What a dimension holds inside its factor: up to where another dimension begins."""
        label = self.link.inner.get(major)
        while label is not None and label not in own:
            yield label
            label = self.link.inner.get(label)

    def of(self, labels: frozenset[Label]) -> frozenset[int]:
        return frozenset(self.numbers[label] for label in labels if label in self.numbers)


def _op(
    equation: Equation,
    open_operands: tuple[int, ...],
    flat: FlatJaxpr,
    numbering: Numbering,
    count: int,
    sums: Mapping[int, int],
) -> Op | None:
    """One op of the program, its labels turned into factor numbers; None where nothing is laid."""
    link = equation.link
    reads = link.reads or (ONCE,) * len(link.operands)
    used = [(equation.operands[i], link.operands[i], reads[i]) for i in open_operands]
    made = [
        pair
        for pair in zip(equation.results, link.results, strict=True)
        if any(size != 1 for size in flat.arrays[pair[0]].shape)
    ]
    if link.kind == "source" or not used:
        return None
    factors = _Factors(link=link, flat=flat, numbering=numbering)
    operands = tuple(factors.array(*pair) for pair in used)
    results = tuple(factors.array(*pair) for pair in made)
    # What grouping left of an elementwise op reads an argument, or broadcasts.
    made_of = {factor for result in results for factor in result.factors}
    broadcast = link.kind == "elementwise" and all(set(a.factors) < made_of for a in operands)
    return Op(
        primitive=equation.primitive,
        kind="broadcast" if broadcast else link.kind,
        operands=operands,
        results=results,
        factor_sizes=tuple(factors.sizes),
        reduced=factors.of(link.reduced),
        shifted=factors.of(link.shifted),
        gathered=factors.of(link.gathered),
        flops=equation.flops,
        window=equation.window,
        n_kernels=equation.n_kernels,
        layer=equation.layer,
        place=equation.place,
        backward=equation.backward,
        count=count,
        # A lookup's gradient is reduced on its own, before what it is added to.
        sum_into=equation.results[0]
        if link.kind == "scatter"
        else sums.get(equation.results[0], equation.results[0]),
    )
