"""What an accelerator would do where XLA compiled for the CPU.

The CPU compiler takes the partitioner's decisions as the others do, and then changes their form:

1. It has no bfloat16 arithmetic, so it converts, and often before the movement instead of after it:
   the array moves as float32, twice the bytes. All-reduces are promoted (`to_apply=%add_promoted`);
   elsewhere the operand is a conversion from the narrow type, behind nothing but changes of layout.
   Compile with `COMPILER_OPTIONS`, or XLA drops the pairs of conversions that tell. A conversion
   that the program itself asks for (`convert_element_type`) is no sign: then float32 moves.
2. It forms no reduce-scatter: an all-reduce of the whole array is read only by slices of one
   device's share.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from autoshard.xla.collectives import Site
from autoshard.xla.groups import parse_groups
from autoshard.xla.hlo import Computation, HloModule, Instruction, itemsize

__all__ = ["COMPILER_OPTIONS", "cpu_normaliser"]

COMPILER_OPTIONS = {"xla_allow_excess_precision": False}

_MOVES = frozenset(
    {"bitcast", "broadcast", "concatenate", "copy", "dynamic-slice", "pad", "reshape", "slice"}
    | {"transpose"}
)
_KEEPS_PLACE = frozenset({"bitcast", "convert", "copy", "reshape", "transpose"})
# Chains of fusions are short; this only bounds the walk on programs of unforeseen form.
_DEPTH = 40


@dataclass(frozen=True, kw_only=True)
class _Program:
    """A module with the way back from a fused computation to the fusion that calls it."""

    module: HloModule
    callers: Mapping[str, tuple[Computation, Instruction]]


def cpu_normaliser(module: HloModule, n_devices: int) -> Callable[[Site], Site]:
    """Make the function that turns a site of a CPU program into the target's.

    Args:
        module: a program that XLA compiled for the CPU with `COMPILER_OPTIONS`.
        n_devices: the devices that run it.
    """
    callers = {
        name: (computation, instruction)
        for computation in module
        for instruction in computation.instructions
        if instruction.opcode == "fusion"
        for name in instruction.called
    }
    program = _Program(module=module, callers=callers)

    def normalise(site: Site) -> Site:
        site = replace(site, shape=replace(site.shape, dtype=_logical_dtype(program, site)))
        if site.kind == "all-reduce":
            group_size = max(map(len, parse_groups(site.instruction.attributes, n_devices)))
            share = site.shape.n_elements // group_size
            if group_size > 1 and _becomes_slices(program, site, share):
                return replace(site, kind="reduce-scatter")
        return site

    return normalise


def _becomes_slices(program: _Program, site: Site, share: int) -> bool:
    """Whether all that reads the array takes one device's share of it."""
    computation, name = site.computation, site.instruction.name
    if len(site.instruction.shapes) == 1:
        return _only_sliced(program, computation, name, share, _DEPTH)
    parts = [
        user.name
        for user in computation.users.get(name, ())
        if user.attribute("index") == str(site.index)
    ]
    return bool(parts) and all(
        _only_sliced(program, computation, part, share, _DEPTH) for part in parts
    )


def _logical_dtype(program: _Program, site: Site) -> str:
    """The element type that the program itself gives the array."""
    dtype, instruction = site.shape.dtype, site.instruction
    if dtype != "f32":
        return dtype
    if "promoted" in (instruction.attribute("to_apply") or ""):
        return "bf16"
    operand = instruction.operands[min(site.index, len(instruction.operands) - 1)]
    found = _source_dtype(program, site.computation, operand, _DEPTH)
    return found if found and itemsize(found) < itemsize(dtype) else dtype


def _source_dtype(program: _Program, computation: Computation, name: str, depth: int) -> str | None:
    """The type that the compiler's own conversion before `name` reads, or None."""
    instruction = computation.by_name.get(name)
    if instruction is None or depth == 0:
        return None
    if instruction.opcode == "convert":
        if instruction.op_name.endswith("/convert_element_type"):
            return None
        source = computation.by_name.get(instruction.operands[0])
        return source.shapes[0].dtype if source and source.shapes else None
    if instruction.opcode in _MOVES:
        return _source_dtype(program, computation, instruction.operands[0], depth - 1)
    if instruction.opcode == "fusion" and len(instruction.shapes) == 1:
        inner = program.module.computations[instruction.called[0]]
        return _source_dtype(program, inner, inner.root.name, depth - 1)
    if instruction.opcode == "parameter" and computation.name in program.callers:
        outer, fusion = program.callers[computation.name]
        return _source_dtype(program, outer, fusion.operands[int(instruction.literal)], depth - 1)
    return None


def _only_sliced(
    program: _Program, computation: Computation, name: str, share: int, depth: int
) -> bool:
    """Whether every use of the value takes a slice of `share` elements that the device chooses."""
    users = computation.users.get(name, ())
    if not users and computation.by_name[name].is_root and computation.name in program.callers:
        outer, fusion = program.callers[computation.name]
        return _only_sliced(program, outer, fusion.name, share, depth - 1)
    return depth > 0 and bool(users) and all(
        _sliced_by(program, computation, user, name, share, depth) for user in users
    )  # fmt: skip


def _sliced_by(
    program: _Program,
    computation: Computation,
    user: Instruction,
    name: str,
    share: int,
    depth: int,
) -> bool:
    if user.opcode == "dynamic-slice":
        return user.operands[0] == name and user.shapes[0].n_elements == share
    if user.opcode in _KEEPS_PLACE:
        return _only_sliced(program, computation, user.name, share, depth - 1)
    if user.opcode != "fusion" or len(user.shapes) != 1:
        return False
    inner = program.module.computations[user.called[0]]
    parameters = [inner.parameter(i) for i, operand in enumerate(user.operands) if operand == name]
    return all(
        parameter is not None and _only_sliced(program, inner, parameter.name, share, depth - 1)
        for parameter in parameters
    )
