"""How often each computation of an HLO module runs.

A loop runs as often as XLA noted (`known_trip_count`). Where it did not, a counter is looked for:
the condition is `counter < limit`, the body adds a constant `step` to it, and it starts at a
constant; then the loop runs `ceil((limit - start) / step)` times. A loop without such a counter
counts once. Of a conditional every branch counts, which is an upper bound.
"""

from collections.abc import Mapping

from autoshard.xla.hlo import Computation, HloModule, Instruction

__all__ = ["execution_counts", "trip_count"]

_THROUGH = frozenset({"copy", "bitcast", "convert", "reshape"})


def execution_counts(module: HloModule) -> Mapping[str, int]:
    """Computation name -> how often it runs, following calls, loops and branches from the entry.

    Fusions and the reducers of collectives are part of the instruction that calls them and are
    left out.
    """
    counts = {module.entry_name: 1}

    def visit(computation: Computation, times: int) -> None:
        for instruction in computation.instructions:
            if instruction.opcode in ("while", "call", "conditional", "async-start"):
                trips = trip_count(module, computation, instruction)
                for name in instruction.called:
                    counts[name] = counts.get(name, 0) + times * trips
                    visit(module.computations[name], times * trips)

    visit(module.entry, 1)
    return counts


def trip_count(module: HloModule, computation: Computation, instruction: Instruction) -> int:
    """How often the computations that `instruction` calls run each time it is reached."""
    if instruction.opcode != "while":
        return 1
    if instruction.known_trip_count is not None:
        return instruction.known_trip_count
    condition, body = instruction.attribute("condition"), instruction.attribute("body")
    assert condition and body, "every while names a condition and a body"
    return (
        _counted(
            module.computations[condition],
            module.computations[body],
            computation,
            instruction,
        )
        or 1
    )


def _counted(
    condition: Computation, body: Computation, caller: Computation, loop: Instruction
) -> int | None:
    """The trips of a loop with a counter, or None."""
    start = caller.by_name.get(loop.operands[0]) if loop.operands else None
    compare = condition.root
    if start is None or start.opcode != "tuple" or compare.opcode != "compare":
        return None
    invariants = {
        index: value
        for index, name in enumerate(start.operands)
        if (value := _constant(caller, name, {})) is not None
    }
    counter = _carried(condition, compare.operands[0])
    limit = _constant(condition, compare.operands[1], invariants)
    if counter is None or limit is None or counter not in invariants:
        return None
    increment = body.by_name.get(body.root.operands[counter]) if body.root.operands else None
    if increment is None or increment.opcode != "add":
        return None
    steps = [
        value
        for name in increment.operands
        if _carried(body, name) != counter and (value := _constant(body, name, invariants))
    ]
    if len(steps) != 1 or "direction=LT" not in compare.attributes:
        return None
    return max(0, -(-(limit - invariants[counter]) // steps[0]))


def _carried(computation: Computation, name: str) -> int | None:
    """Which element of the loop's tuple `name` reads, or None."""
    instruction = computation.by_name.get(name)
    if instruction is None:
        return None
    if instruction.opcode in _THROUGH:
        return _carried(computation, instruction.operands[0])
    index = instruction.attribute("index")
    return int(index) if instruction.opcode == "get-tuple-element" and index else None


def _constant(computation: Computation, name: str, carried: Mapping[int, int]) -> int | None:
    """The integer that `name` always holds; `carried` are constants that the loop passes on."""
    instruction = computation.by_name.get(name)
    if instruction is None:
        return None
    if instruction.opcode == "constant":
        return int(instruction.literal) if instruction.literal.lstrip("-").isdigit() else None
    if instruction.opcode in _THROUGH:
        return _constant(computation, instruction.operands[0], carried)
    index = _carried(computation, name)
    return carried.get(index) if index is not None else None
