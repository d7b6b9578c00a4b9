"""How the dimensions of each primitive's operands and results move together: one rule a primitive.

An op is described by factors, as in Shardy's op sharding rules
(https://openxla.org/shardy/sharding_representation). A factor is a set of dimensions, across
operands and results, that are split together or not at all. `dot_general` of `A[i, k]` and
`B[k, j]` to `C[i, j]` has the factors i, j, k:

- a *pass-through* factor stands in operands and results (i, j): splitting it is free;
- a *reduced* factor stands in operands only (k): splitting it leaves partial sums;
- a dimension without a factor may not be split: the op needs it whole.

A rule takes the shapes and parameters of one equation and returns a `Link`. Dimensions of size 1
carry no factor: there is nothing to split.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from autoshard.graph.link import Label, Link, LinkRule, Shape, drop_ones, numbered
from autoshard.graph.lookups import gather_rule, scatter_rule
from autoshard.graph.reshapes import reshape_rule
from autoshard.model.outputs import MARK

__all__ = ["LINK_RULES", "link_of", "unknown_link"]


def _elementwise(operands: Sequence[Shape], results: Sequence[Shape], params: Any) -> Link:
    """Dimension i of every operand goes with dimension i of the result; scalars join in."""
    return Link(
        kind="elementwise",
        operands=tuple(numbered(shape) for shape in operands),
        results=tuple(numbered(shape) for shape in results),
    )


def _one_to_one(operands: Sequence[Shape], results: Sequence[Shape], params: Any) -> Link:
    """Each operand is a result, whatever the others are."""
    labels = tuple(
        tuple(None if label is None else (position, label) for label in numbered(shape))
        for position, shape in enumerate(operands)
    )
    return Link(kind="elementwise", operands=labels, results=labels)


def _transpose(operands: Sequence[Shape], results: Sequence[Shape], params: Any) -> Link:
    """Result dimension i is operand dimension permutation[i]."""
    labels = numbered(operands[0])
    return Link(
        kind="reshape",
        operands=(labels,),
        results=(tuple(labels[dim] for dim in params["permutation"]),),
    )


def _broadcast_in_dim(operands: Sequence[Shape], results: Sequence[Shape], params: Any) -> Link:
    """Operand dimension i becomes result dimension broadcast_dimensions[i]; the rest are new."""
    labels = numbered(results[0])
    placed = [
        labels[dim] if operands[0][i] == results[0][dim] else None
        for i, dim in enumerate(params["broadcast_dimensions"])
    ]
    # Trailing operands are dynamic sizes, which no model here has.
    return Link(kind="broadcast", operands=(tuple(placed),), results=(labels,))


def _reduce(operands: Sequence[Shape], results: Sequence[Shape], params: Any) -> Link:
    """The dimensions in `axes` are summed (or multiplied, compared) away."""
    axes = set(params["axes"])
    labels = numbered(operands[0])
    kept = tuple(label for dim, label in enumerate(labels) if dim not in axes)
    return Link(
        kind="reduction",
        operands=tuple(labels for _ in operands),
        results=tuple(kept for _ in results),
        reduced=frozenset(labels[dim] for dim in axes if labels[dim] is not None),
    )


def _argminmax(operands: Sequence[Shape], results: Sequence[Shape], params: Any) -> Link:
    """The dimension searched must be whole: an index is not a partial sum."""
    axes = tuple(params["axes"])
    labels = numbered(operands[0], whole=axes)
    kept = tuple(label for dim, label in enumerate(labels) if dim not in axes)
    return Link(kind="slice", operands=(labels,), results=(kept,))


def _dot_general(operands: Sequence[Shape], results: Sequence[Shape], params: Any) -> Link:
    """`(batch, lhs free, rhs free)` are the result's dimensions; contracting ones are reduced."""
    (lhs_contract, rhs_contract), (lhs_batch, rhs_batch) = params["dimension_numbers"]
    lhs: list[Label | None] = [("lhs", dim) for dim in range(len(operands[0]))]
    rhs: list[Label | None] = [("rhs", dim) for dim in range(len(operands[1]))]
    for left, right in zip((*lhs_contract, *lhs_batch), (*rhs_contract, *rhs_batch), strict=True):
        rhs[right] = lhs[left]
    result = [lhs[dim] for dim in lhs_batch]
    result += [x for dim, x in enumerate(lhs) if dim not in (*lhs_contract, *lhs_batch)]
    result += [x for dim, x in enumerate(rhs) if dim not in (*rhs_contract, *rhs_batch)]
    reduced = frozenset(lhs[dim] for dim in lhs_contract)
    drop = [drop_ones(labels, shape) for labels, shape in zip((lhs, rhs), operands, strict=True)]
    return Link(
        kind="contraction",
        operands=tuple(drop),
        results=(drop_ones(result, results[0]),),
        reduced=frozenset(label for label in reduced if any(label in labels for labels in drop)),
    )


def _conv(operands: Sequence[Shape], results: Sequence[Shape], params: Any) -> Link:
    """Batch and output features pass through, input features are reduced, space stays whole.

    Of groups of one channel the channels pass through; those of larger groups XLA needs whole. (Its
    partitioner for CPUs gathers the batch too then, that for TPUs does not.)
    """
    lhs_spec, rhs_spec, out_spec = params["dimension_numbers"]
    lhs: list[Label | None] = [None] * len(operands[0])
    rhs: list[Label | None] = [None] * len(operands[1])
    out: list[Label | None] = [None] * len(results[0])
    rhs[rhs_spec[0]] = out[out_spec[1]] = "output"
    n_groups, n_batch_groups = params["feature_group_count"], params["batch_group_count"]
    if n_batch_groups == 1:
        lhs[lhs_spec[0]] = out[out_spec[0]] = "batch"
    if n_groups == 1:
        lhs[lhs_spec[1]] = rhs[rhs_spec[1]] = "input"
    # The gradient of a kernel in groups has them along its batch.
    grouped, n = (lhs_spec[1], n_groups) if n_groups > 1 else (lhs_spec[0], n_batch_groups)
    passes = 1 < n == operands[0][grouped] == results[0][out_spec[1]]
    if passes:
        lhs[grouped] = "output"
    drop = [drop_ones(labels, shape) for labels, shape in zip((lhs, rhs), operands, strict=True)]
    result = drop_ones(out, results[0])
    return Link(
        kind="contraction",
        operands=tuple(drop),
        results=(result,),
        reduced=frozenset(["input"]).intersection(*drop),
        gathered=frozenset(["output"] if n > 1 and not passes else []).intersection(result),
    )


def _pool(operands: Sequence[Shape], results: Sequence[Shape], params: Any) -> Link:
    """The dimensions that the window covers one by one pass through, the others stay whole."""
    whole = [dim for dim, size in enumerate(params["window_dimensions"]) if size != 1]
    return Link(
        kind="reduction",
        operands=tuple(numbered(shape, whole) for shape in operands),
        results=tuple(numbered(shape, whole) for shape in results),
    )


def _tile(operands: Sequence[Shape], results: Sequence[Shape], params: Any) -> Link:
    """The dimensions that are repeated stay whole, the others pass through."""
    whole = [dim for dim, n in enumerate(params["reps"]) if n != 1]
    return Link(
        kind="broadcast",
        operands=(numbered(operands[0], whole),),
        results=(numbered(results[0], whole),),
    )


def _cut(operands: Sequence[Shape], results: Sequence[Shape], params: Any) -> Link:
    """Cutting and padding at places known beforehand: where sizes differ, shards shift.

    Every n-th element of a whole dimension stays where it is.
    """
    strides = params.get("strides") or (1,) * len(operands[0])
    sizes: dict[Label, int] = {}
    in_place = set()
    for dim, size in enumerate(operands[0]):
        others = [shape[dim] for shape in results]
        if any(other != size for other in others):
            sizes[dim] = math.gcd(size, *others)
            if strides[dim] > 1 and others == [-(-size // strides[dim])]:
                in_place.add(dim)
    ones = tuple(dim for dim in range(len(operands[0])) if sizes.get(dim) == 1)
    return Link(
        kind="slice",
        # The value that a pad fills in is a scalar.
        operands=(numbered(operands[0], ones), *[()] * (len(operands) - 1)),
        results=tuple(numbered(shape, ones) for shape in results),
        shifted=frozenset(sizes).difference(ones, in_place),
        sizes=sizes,
    )


def _reverse(operands: Sequence[Shape], results: Sequence[Shape], params: Any) -> Link:
    """The shards of what is turned round change places."""
    labels = numbered(operands[0])
    return Link(
        kind="slice",
        operands=(labels,),
        results=(labels,),
        shifted=frozenset(params["dimensions"]).intersection(labels),
    )


def _concatenate(operands: Sequence[Shape], results: Sequence[Shape], params: Any) -> Link:
    """Layouts spread along the dimension that is joined, but XLA joins whole ones."""
    joined = params["dimension"]
    size = math.gcd(*(shape[joined] for shape in operands))
    whole = (joined,) if size == 1 else ()
    return Link(
        kind="slice",
        operands=tuple(numbered(shape, whole) for shape in operands),
        results=(numbered(results[0], whole),),
        gathered=frozenset([joined]).difference(whole),
        sizes={joined: size},
    )


def _scan(operands: Sequence[Shape], results: Sequence[Shape], params: Any) -> Link:
    """Sorting and running sums: layouts spread along the dimension, but XLA scans whole ones."""
    labels = numbered(operands[0])
    along = params["dimension"] if "dimension" in params else params["axis"]
    return Link(
        kind="slice",
        operands=tuple(labels for _ in operands),
        results=tuple(labels for _ in results),
        gathered=frozenset([along]).intersection(labels),
    )


def _top_k(operands: Sequence[Shape], results: Sequence[Shape], params: Any) -> Link:
    """The dimension searched stays whole, the others pass through."""
    along = (params.get("axis", -1) % len(operands[0]),)
    return Link(
        kind="slice",
        operands=(numbered(operands[0], along),),
        results=tuple(numbered(shape, along) for shape in results),
    )


def _fft(operands: Sequence[Shape], results: Sequence[Shape], params: Any) -> Link:
    """The last dimensions are transformed and stay whole, the others pass through."""
    rank = len(operands[0])
    along = tuple(range(rank - len(params["fft_lengths"]), rank))
    return Link(
        kind="slice",
        operands=(numbered(operands[0], along),),
        results=(numbered(results[0], along),),
    )


def _dynamic_slice(operands: Sequence[Shape], results: Sequence[Shape], params: Any) -> Link:
    """Cutting at a place known only later: the dimensions that are cut stay whole."""
    cut = tuple(dim for dim, size in enumerate(operands[0]) if size != results[0][dim])
    return Link(
        kind="slice",
        # The other operands are scalars (offsets).
        operands=(numbered(operands[0], cut), *[()] * (len(operands) - 1)),
        results=(numbered(results[0], cut),),
    )


def _dynamic_update_slice(operands: Sequence[Shape], results: Sequence[Shape], params: Any) -> Link:
    """Every device updates its shard; of the update it needs the cut dimensions whole."""
    cut = tuple(dim for dim, size in enumerate(operands[1]) if size != operands[0][dim])
    return Link(
        kind="slice",
        operands=(numbered(operands[0]), numbered(operands[1], cut), *[()] * (len(operands) - 2)),
        results=(numbered(results[0]),),
    )


def _stack(operands: Sequence[Shape], results: Sequence[Shape], params: Any) -> Link:
    """A new dimension `axis` in the result; the others pass through."""
    labels = numbered(operands[0])
    axis = params["axis"] % len(results[0])
    return Link(
        kind="slice",
        operands=tuple(labels for _ in operands),
        results=((*labels[:axis], None, *labels[axis:]),),
    )


def _unstack(operands: Sequence[Shape], results: Sequence[Shape], params: Any) -> Link:
    """The dimension `axis` goes away; the others pass through."""
    link = _stack(results, operands, params)
    return Link(kind="slice", operands=link.results, results=link.operands)


def _source(operands: Sequence[Shape], results: Sequence[Shape], params: Any) -> Link:
    """Made on the spot, so every device makes just its own shard."""
    return Link(
        kind="source",
        operands=tuple((None,) * len(shape) for shape in operands),
        results=tuple(numbered(shape) for shape in results),
    )


def unknown_link(operands: Sequence[Shape], results: Sequence[Shape]) -> Link:
    """What is assumed of a primitive without a rule: it needs everything whole."""
    return Link(
        kind="unknown",
        operands=tuple((None,) * len(shape) for shape in operands),
        results=tuple((None,) * len(shape) for shape in results),
    )


# fmt: off
_ELEMENTWISE = (
    "abs", "acos", "acosh", "add", "add_any", "and", "asin", "asinh", "atan", "atan2", "atanh",
    "bessel_i0e", "bessel_i1e", "bitcast_convert_type", "cbrt", "ceil", "clamp",
    "complex", "conj", "convert_element_type", "copy", "copy_p",
    "cos", "cosh", "digamma", "div", "eq", "erf", "erf_inv", "erfc", "exp", "exp2", "expm1",
    "floor", "ge", "gt", "imag", "integer_pow", "is_finite", "le", "lgamma", "log", "log1p",
    "logistic", "lt", "max", "min", "mul", "ne", "neg", "nextafter", "not",
    "or", "pow", "real", "reduce_precision", "rem", "round", "rsqrt", "select_n", "shift_left",
    "shift_right_arithmetic", "shift_right_logical", "sharding_constraint", "sign", "sin", "sinh",
    "sqrt", "square", "stop_gradient", "sub", "tan", "tanh", "xor", "name",
    MARK,
)
# fmt: on

LINK_RULES: Mapping[str, LinkRule] = {
    **dict.fromkeys(_ELEMENTWISE, _elementwise),
    **dict.fromkeys(
        ("reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or"),
        _reduce,
    ),
    **dict.fromkeys(("argmax", "argmin"), _argminmax),
    **dict.fromkeys(("pad", "slice", "split"), _cut),
    **dict.fromkeys(
        (
            "reduce_window_max",
            "reduce_window_min",
            "reduce_window_sum",
            "reduce_window",
            "select_and_scatter_add",
            "select_and_gather_add",
        ),
        _pool,
    ),
    **dict.fromkeys(("cumsum", "cummax", "cummin", "cumprod", "cumlogsumexp", "sort"), _scan),
    **dict.fromkeys(
        ("iota", "random_bits", "random_seed", "random_wrap", "random_unwrap", "empty"), _source
    ),
    **dict.fromkeys(("scatter", "scatter-add", "scatter_add", "scatter-update"), scatter_rule),
    "broadcast_in_dim": _broadcast_in_dim,
    "concatenate": _concatenate,
    "conv_general_dilated": _conv,
    "dot_general": _dot_general,
    "dynamic_slice": _dynamic_slice,
    "dynamic_update_slice": _dynamic_update_slice,
    "expand_dims": reshape_rule,
    "fft": _fft,
    "gather": gather_rule,
    "optimization_barrier": _one_to_one,
    "reshape": reshape_rule,
    "rev": _reverse,
    "squeeze": reshape_rule,
    "tile": _tile,
    "stack": _stack,
    "top_k": _top_k,
    "transpose": _transpose,
    "unstack": _unstack,
}


def link_of(
    primitive: str,
    operands: Sequence[Shape],
    results: Sequence[Shape],
    params: Mapping[str, Any],
) -> Link | None:
    """The factors of one equation, or None where the primitive has no rule.

    Args:
        primitive: the primitive's name in the jaxpr.
        operands: the shape of each operand.
        results: the shape of each result.
        params: the equation's parameters.

    >>> link = link_of("transpose", [(8, 512)], [(512, 8)], {"permutation": (1, 0)})
    >>> link.operands, link.results
    (((0, 1),), ((1, 0),))
    """
    rule = LINK_RULES.get(primitive)
    return rule(operands, results, params) if rule else None
