"""How a matmul is split over a mesh, held against what XLA's partitioner makes of it."""

import itertools
import math
import random
import re
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from autoshard.cost.partitioner import partition_matmul
from autoshard.graph.program import WHOLE, Array, Layout, Op

ROWS, CONTRACTED, COLUMNS, BATCH = range(4)
SIZES = ((64, 128, 256), (256, 128, 64), (64, 512, 64), (512, 16, 512))
BATCH_SIZE = 16
PLAIN = ((ROWS, CONTRACTED), (CONTRACTED, COLUMNS), (ROWS, COLUMNS))
BATCHED = tuple((BATCH, *dims) for dims in PLAIN)
NAMES = "rkcb"

Dims = tuple[tuple[int, ...], ...]


def matmul(sizes: Sequence[int], dims: Dims) -> Op:
    arrays = [
        Array(
            identity=i,
            group=i,
            n_bytes=4 * math.prod(sizes[f] for f in factors),
            itemsize=4,
            factors=factors,
        )
        for i, factors in enumerate(dims)
    ]
    return Op(
        primitive="dot_general",
        kind="contraction",
        operands=tuple(arrays[:2]),
        results=(arrays[2],),
        factor_sizes=tuple(sizes),
        reduced=frozenset({CONTRACTED}),
        shifted=frozenset(),
        gathered=frozenset(),
        flops=2 * math.prod(sizes),
        layer="",
        place="",
        backward=False,
        count=1,
        sum_into=2,
    )


def cases(axis_sizes: Sequence[int], dims: Dims, n: int) -> list[tuple[Layout, ...]]:
    """Some layouts of both operands and the result, of those that propagation leaves as they are.

    A whole result it would split as an operand is split. No two axes split one dimension: there the
    partitioner has more ways.
    """
    layouts = [
        layout
        for layout in itertools.product(range(-1, len(dims[0])), repeat=len(axis_sizes))
        if len(set(layout) - {WHOLE}) == len(layout) - layout.count(WHOLE)
    ]
    settled = [
        three
        for three in itertools.product(layouts, repeat=3)
        if all(
            result != WHOLE
            or all(
                factors[dim] == CONTRACTED
                for dim, factors in zip(operands, dims, strict=False)
                if dim != WHOLE
            )
            for *operands, result in zip(*three, strict=True)
        )
    ]
    return random.Random(0).sample(settled, n)


def shards(
    sizes: Sequence[int], dims: Dims, layouts: Sequence[Layout], axis_sizes: Sequence[int]
) -> list[str]:
    """The shapes of what a device multiplies, in some order."""
    found = partition_matmul(matmul(sizes, dims), layouts, axis_sizes)
    assert found is not None
    local = list(sizes)
    for axis, factor in enumerate(found.choice):
        if factor != WHOLE:
            local[factor] //= axis_sizes[axis]
        if factor == CONTRACTED and found.n_slices > 1 and layouts[2][axis] != WHOLE:
            local[dims[2][layouts[2][axis]]] //= found.n_slices
    return sorted(str(sorted(local[f] for f in factors)) for factors in dims[:2])


def shards_by_xla(
    sizes: Sequence[int], dims: Dims, layouts: Sequence[Layout], axis_sizes: Sequence[int]
) -> list[str]:
    axes = tuple("xyz"[: len(axis_sizes)])
    mesh = jax.sharding.Mesh(np.reshape(jax.devices()[: math.prod(axis_sizes)], axis_sizes), axes)
    shardings = []
    for layout, factors in zip(layouts, dims, strict=True):
        spec: list[str | None] = [None] * len(factors)
        for axis, dim in zip(axes, layout, strict=True):
            if dim != WHOLE:
                spec[dim] = axis
        shardings.append(jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec)))
    left, right = (
        jax.ShapeDtypeStruct([sizes[f] for f in factors], jnp.float32, sharding=sharding)
        for factors, sharding in zip(dims[:2], shardings, strict=False)
    )
    left_text, right_text, result_text = ("".join(NAMES[f] for f in factors) for factors in dims)
    einsum = f"{left_text},{right_text}->{result_text}"
    compiled = jax.jit(
        lambda left, right: jnp.einsum(einsum, left, right), out_shardings=shardings[2]
    ).lower(left, right)
    text = compiled.compile().as_text()
    shapes = dict(re.findall(r"(%[\w.-]+) = f32\[([\d,]+)\]", text))
    (operands,) = re.findall(r" dot\((%[\w.-]+), (%[\w.-]+)\)", text)
    return sorted(str(sorted(map(int, shapes[name].split(",")))) for name in operands)


@pytest.mark.parametrize(
    ("axis_sizes", "dims", "n"),
    [((8,), PLAIN, 19), ((8,), BATCHED, 20), ((2, 4), PLAIN, 40), ((2, 4), BATCHED, 40)],
)
def test_a_matmul_is_split_as_by_xla(axis_sizes: tuple[int, ...], dims: Dims, n: int) -> None:
    for layouts, plain in itertools.product(cases(axis_sizes, dims, n), SIZES):
        sizes = (*plain, BATCH_SIZE)
        expected = shards_by_xla(sizes, dims, layouts, axis_sizes)
        assert shards(sizes, dims, layouts, axis_sizes) == expected, (layouts, sizes)
