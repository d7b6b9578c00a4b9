"""Slices of what matmuls make: multiplied no more, unless devices or pieces come between."""

from fractions import Fraction

import jax.numpy as jnp
import pytest
from test_graph_rules import program_of

from autoshard.cost.machine import Machine
from autoshard.cost.results import ResultCopies
from autoshard.cost.step import StepPricer
from autoshard.cost.strategies import price_op
from autoshard.graph.program import WHOLE, Op, Program
from autoshard.hardware.targets import parse_target
from autoshard.mesh import parse_mesh
from autoshard.search.candidates import family_choices
from autoshard.search.descent import Scorer, exhaust
from autoshard.search.lower_bound import relax

MACHINE = Machine.of(parse_mesh("1x8"), parse_target("tpu:v5e:2x4"))
PICTURE, TEXT, HIDDEN, VOCABULARY = 256, 512, 2048, 65_536


def head(x, w):
    """Logits of a picture and a text `[8, PICTURE + TEXT, VOCABULARY]`, of which the text's."""
    return jnp.einsum("bsd,vd->bsv", jnp.tanh(x), w)[:, PICTURE:]


def last(x, w):
    """A number for the last of the rows of one sequence."""
    return jnp.einsum("bsd,d->bs", x[:1], w[0])[:, -1:]


def head_with_all(x, w):
    logits = jnp.einsum("bsd,vd->bsv", x, w)
    return logits[:, PICTURE:], logits


def sliced(function=head, *, for_tpu: bool = True) -> Program:
    shapes = (8, PICTURE + TEXT, HIDDEN), (VOCABULARY, HIDDEN)
    return program_of(function, *shapes, dtype="bfloat16", for_tpu=for_tpu)


def matmul_of(program: Program) -> Op:
    (matmul,) = [op for op in program.ops if op.kind == "contraction"]
    return matmul


def test_what_alone_is_read_of_a_matmul_is_seen() -> None:
    program = sliced()
    matmul = matmul_of(program)
    assert matmul.slicing is not None
    assert matmul.slicing.share == Fraction(TEXT, PICTURE + TEXT)
    assert matmul.slicing.factors == {matmul.results[0].factors[1]}
    assert [op.is_fused for op in program.ops if op.kind == "slice"] == [True]
    assert ResultCopies(program, MACHINE).is_returned(matmul.results[0])


def test_a_slice_of_one_number_is_no_array_to_lay_out() -> None:
    assert ResultCopies(sliced(last), MACHINE).n_bytes(matmul_of(sliced(last)), (WHOLE,)) == 0


@pytest.mark.parametrize(("function", "for_tpu"), [(head, False), (head_with_all, True)])
def test_what_is_read_otherwise_too_is_made_whole(function, for_tpu: bool) -> None:
    program = sliced(function, for_tpu=for_tpu)
    assert matmul_of(program).slicing is None
    assert not any(op.is_fused for op in program.ops)


@pytest.mark.parametrize(
    ("hidden", "table", "logits", "share"),
    [
        (WHOLE, 0, 2, Fraction(TEXT, PICTURE + TEXT)),
        (2, 0, 2, 1),  # the hidden states arrive in pieces, whose products are added up first
        (1, WHOLE, 1, 1),  # each device has a part of the rows: what is sliced shifts
    ],
)
def test_no_more_is_multiplied_than_is_read(
    hidden: int, table: int, logits: int, share: Fraction
) -> None:
    matmul = matmul_of(sliced())
    layouts = ((hidden,), (table,), (logits,))
    cost = price_op(matmul, layouts, MACHINE)
    assert cost.share == pytest.approx(float(share))
    whole = 2 * 8 * (PICTURE + TEXT) * HIDDEN * VOCABULARY / 8 / 197e12
    assert cost.compute_seconds == pytest.approx(whole * float(share), rel=0.25)


def test_no_layout_beats_the_bound_where_a_slice_alone_is_multiplied() -> None:
    mesh, pricer = parse_mesh("1x8"), StepPricer(sliced(), MACHINE)
    families = family_choices(pricer.program, mesh)
    best = exhaust(Scorer(pricer=pricer, mesh=mesh, memory_limit=None), families)
    assert relax(pricer, families, mesh, None).bound_seconds <= best.cost.step_seconds


def test_partial_sums_are_added_up_before_they_are_sliced() -> None:
    cost = price_op(matmul_of(sliced()), ((2,), (1,), (WHOLE,)), MACHINE)
    assert [transfer.kind for transfer in cost.transfers] == ["all-reduce"]
    assert cost.share == 1
