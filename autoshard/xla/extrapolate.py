"""The whole model's program from those of two shallow copies.

Repeated blocks are compiled alike, so every amount grows by the same step with each period of
blocks more: with `p` periods in the model, `k1` and `k2` in the copies,

    amount(p) = amount(k1) + (p - k1) / (k2 - k1) * (amount(k2) - amount(k1))

for bytes, cycles, FLOPs, and the number of collectives of one kind, size, axis, phase and layer
template. Collectives of a stack grow with that stack, all else with the mean of the stacks (stacks
of one model mostly have one depth). A number of collectives that is not whole (a compiler that
combines them across blocks) is rounded.
"""

from dataclasses import replace
from statistics import mean

from autoshard.errors import XlaError
from autoshard.xla.collectives import Collective, merge_collectives
from autoshard.xla.compiled import CompiledStep

__all__ = ["extrapolate"]


def extrapolate(small: CompiledStep, large: CompiledStep) -> CompiledStep:
    """Extend the line through two programs to the model's depth.

    Args:
        small: the program of a copy of the model with few blocks.
        large: the program of a copy with more.

    Returns:
        The program of the whole model, its layers as templates.

    Raises:
        XlaError: the two are not copies of one model for one target, or equally deep.
    """
    steps = _steps(small, large)
    everywhere = mean(steps.values())

    def grown(first: int, second: int, by: float = everywhere) -> int:
        return max(0, round(first + by * (second - first)))

    def maybe(first: int | None, second: int | None) -> int | None:
        return None if first is None or second is None else grown(first, second)

    before, after = _counts(small), _counts(large)
    collectives = []
    for key in dict.fromkeys([*after, *before]):
        by = next((s for t, s in steps.items() if key.layer.startswith(t)), everywhere)
        count, launches = (
            grown(first, second, by)
            for first, second in zip(before.get(key, (0, 0)), after.get(key, (0, 0)), strict=True)
        )
        if count:
            collectives.append(replace(key, count=count, launches=launches))
    return CompiledStep(
        target=large.target,
        blocks=tuple(replace(stack, traced=stack.n_blocks) for stack in large.blocks),
        argument_bytes=grown(small.argument_bytes, large.argument_bytes),
        output_bytes=grown(small.output_bytes, large.output_bytes),
        temporary_bytes=grown(small.temporary_bytes, large.temporary_bytes),
        alias_bytes=grown(small.alias_bytes, large.alias_bytes),
        live_bytes=maybe(small.live_bytes, large.live_bytes),
        collectives=tuple(collectives),
        sums_of_copies=large.sums_of_copies,
        estimated_cycles=maybe(small.estimated_cycles, large.estimated_cycles),
        flops=maybe(small.flops, large.flops),
        model_flops=maybe(small.model_flops, large.model_flops),
    )


def _steps(small: CompiledStep, large: CompiledStep) -> dict[str, float]:
    """Template of each stack that grows -> (p - k1) / (k2 - k1)."""
    steps = {}
    same = small.target == large.target and len(small.blocks) == len(large.blocks)
    for first, second in zip(small.blocks, large.blocks, strict=False) if same else ():
        if first.template == second.template and first.traced < second.traced:
            difference = second.traced_periods - first.traced_periods
            steps[first.template] = (first.n_periods - first.traced_periods) / difference
    if not steps:
        raise XlaError(
            f"programs for {small.target} and {large.target} are no shallower and deeper copy of "
            "one model"
        )
    return steps


def _counts(step: CompiledStep) -> dict[Collective, tuple[int, int]]:
    templates = [stack.template for stack in step.blocks]
    return {
        replace(collective, count=1, launches=1): (collective.count, collective.launches)
        for collective in merge_collectives(step.collectives, templates)
    }
