"""Reads a jaxpr into flat equations: calls inlined, arrays numbered, layers named.

The result knows nothing of JAX any more: shapes, factors and names only.
"""

import re
from collections.abc import Hashable, Mapping
from dataclasses import replace
from typing import Any

from autoshard.graph.equations import ArrayType, Equation, FlatJaxpr, Mark, live_equations
from autoshard.graph.flops import equation_flops, window_size
from autoshard.graph.loops import Loop, loop_link
from autoshard.graph.rules import link_of, unknown_link
from autoshard.model.outputs import MARK

__all__ = ["read_jaxpr"]

_CALLS = {"jit", "pjit", "closed_call", "core_call", "custom_jvp_call", "custom_vjp_call", "remat",
          "checkpoint", "remat2", "custom_vjp_call_jaxpr"}  # fmt: skip
_TRANSFORM = re.compile(r"(?:jvp|transpose|vmap|remat|checkpoint|rematted_computation)\(")


class _Reader:
    """Walks nested jaxprs, keeping the numbering of arrays; see `read_jaxpr`."""

    def __init__(self) -> None:
        self.arrays: list[ArrayType] = []
        self.equations: list[Equation] = []
        self.marks: list[Mark] = []

    def new(self, variable: Any) -> int:
        aval = variable.aval
        # Extended dtypes (random keys) have no itemsize of their own.
        itemsize = getattr(aval.dtype, "itemsize", 4)
        self.arrays.append(ArrayType(shape=tuple(map(int, aval.shape)), itemsize=itemsize))
        return len(self.arrays) - 1

    def walk(self, jaxpr: Any, known: dict[Any, int | None], prefix: str) -> list[int | None]:
        for equation in jaxpr.eqns:
            stack = "/".join(filter(None, (prefix, str(equation.source_info.name_stack))))
            inner = _called(equation) if equation.primitive.name in _CALLS else None
            if inner is None:
                self.add(equation, known, stack)
                continue
            scope: dict[Any, int | None] = {}
            for variable, operand in zip(inner.invars, equation.invars, strict=True):
                scope[variable] = _identity(operand, known)
            for variable in inner.constvars:
                scope[variable] = self.new(variable)
            outs = self.walk(inner, scope, stack)
            known.update(zip(equation.outvars, outs, strict=True))
        return [_identity(variable, known) for variable in jaxpr.outvars]

    def add(self, equation: Any, known: dict[Any, int | None], stack: str) -> None:
        name = equation.primitive.name
        shapes = [tuple(map(int, v.aval.shape)) for v in equation.invars]
        out_shapes = [tuple(map(int, v.aval.shape)) for v in equation.outvars]
        if all(0 in shape for shape in out_shapes):
            known.update(dict.fromkeys(equation.outvars))  # arrays of no elements: no work
            return
        layer, backward = _layer(stack)
        # Offsets that are constants make it a slice, for the compiler too.
        if name == "dynamic_slice" and all(hasattr(v, "val") for v in equation.invars[1:]):
            name, shapes = "slice", shapes[:1]
        loop = _loop(name, equation.params)
        of_loop = loop_link(loop, shapes) if loop and loop.is_known else None
        by_rule = of_loop or link_of(name, shapes, out_shapes, equation.params)
        link = by_rule or unknown_link(shapes, out_shapes)
        results: list[int] = []
        for variable in equation.outvars:
            results.append(self.new(variable))
            known[variable] = results[-1]
        identities = enumerate(_identity(v, known) for v in equation.invars)
        present = [(i, identity) for i, identity in identities if identity is not None]
        if name == MARK:
            path = equation.params["path"]
            self.marks.append(Mark(path=path, identity=results[0], backward=backward))
        self.equations.append(
            Equation(
                primitive=name,
                operands=tuple(identity for _, identity in present),
                results=tuple(results),
                link=replace(
                    link,
                    operands=tuple(link.operands[i] for i, _ in present if i < len(link.operands)),
                    reads=tuple(link.reads[i] for i, _ in present if link.reads),
                ),
                flops=equation_flops(equation),
                n_kernels=loop.n_kernels if loop else 1,
                window=window_size(equation),
                layer=layer,
                backward=backward,
                does=_does(equation),
            )
        )


def _loop(name: str, params: Mapping[str, Any]) -> Loop | None:
    """What a loop or condition runs; None of anything else."""
    if name == "scan":
        return Loop(
            bodies=(read_jaxpr(params["jaxpr"]),),
            n_constants=params["num_consts"],
            n_carried=params["num_carry"],
            turns=params["length"],
            is_stacked=True,
        )
    if name == "while":
        body = read_jaxpr(params["body_jaxpr"])
        n_skipped, n_constants = params["cond_nconsts"], params["body_nconsts"]
        n_carried = len(body.outputs)
        return Loop(
            bodies=(body,), n_skipped=n_skipped, n_constants=n_constants, n_carried=n_carried
        )
    if name == "cond":
        return Loop(bodies=tuple(map(read_jaxpr, params["branches"])), n_skipped=1)
    return None


def _does(equation: Any) -> Hashable | None:
    """What two equations of one primitive and of the same operands share that do the same."""
    literals = tuple(
        (str(v.aval), str(v.val)) if hasattr(v, "val") else None for v in equation.invars
    )
    does = (tuple(sorted(equation.params.items())), literals)
    try:
        hash(does)
    except TypeError:
        return None
    return does


def _called(equation: Any) -> Any:
    """The jaxpr that a call runs, or None where it cannot be inlined."""
    for name in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        inner = equation.params.get(name)
        if inner is not None:
            return getattr(inner, "jaxpr", inner)
    return None


def _identity(variable: Any, known: dict[Any, int | None]) -> int | None:
    return None if hasattr(variable, "val") else known.get(variable)


def _layer(stack: str) -> tuple[str, bool]:
    """Path of the layer and whether the equation belongs to the gradient.

    >>> _layer("transpose(jvp(gemma_backbone))/decoder_block_1/attention/query/btd,ndh->btnh")
    ('gemma_backbone/decoder_block_1/attention/query', True)
    """
    backward = "transpose(" in stack
    parts = [part.rstrip(")") for part in _TRANSFORM.sub("", stack).split("/")]
    return "/".join(part for part in parts if part and "->" not in part), backward


def read_jaxpr(closed: Any) -> FlatJaxpr:
    """Flatten a `jax.core.ClosedJaxpr`.

    Args:
        closed: the traced step, as `jax.make_jaxpr` returns it.

    Returns:
        Its equations in order, calls inlined. A primitive without a rule is of kind `unknown` and
        taken to need its operands whole.
    """
    reader = _Reader()
    known: dict[Any, int | None] = {v: reader.new(v) for v in closed.jaxpr.invars}
    inputs = tuple(one for one in known.values() if one is not None)
    known.update({v: None for v in closed.jaxpr.invars if 0 in v.aval.shape})
    known.update({v: reader.new(v) for v in closed.jaxpr.constvars})
    outputs = tuple(reader.walk(closed.jaxpr, known, ""))
    equations = live_equations(reader.equations, outputs)
    made = {result for equation in equations for result in equation.results}
    return FlatJaxpr(
        arrays=tuple(reader.arrays),
        equations=equations,
        inputs=inputs,
        outputs=outputs,
        marks=tuple(mark for mark in reader.marks if mark.identity in made),
    )
