"""A comparison of layouts, as text and as JSON."""

from collections.abc import Iterator

from tabulate import tabulate

from autoshard.codec import dump, to_record
from autoshard.layout.rules import format_rules
from autoshard.records.comparison import ComparedLayout, Comparison
from autoshard.units import format_bytes, format_seconds

__all__ = ["comparison_json", "comparison_text"]

# Of each layout's collectives so many are shown: the costliest.
_SHOWN = 5


def comparison_json(comparison: Comparison) -> str:
    """Everything that was found, as a JSON object."""
    return dump(to_record(comparison))


def comparison_text(comparison: Comparison) -> str:
    """A table of the layouts, best first, and what each spends its communication on.

    Args:
        comparison: what `autoshard.compare` returned.
    """
    head = (
        f"{comparison.model}, {comparison.workload}\n"
        f"mesh {comparison.mesh.named} on {comparison.target}, "
        f"{format_bytes(comparison.memory_limit)} a device"
    )
    details = [_details(layout) for layout in comparison.layouts]
    return "\n\n".join([head, _table(comparison.layouts), *details])


def _table(layouts: tuple[ComparedLayout, ...]) -> str:
    steps = [layout.predicted.step_seconds for layout in layouts if layout.predicted]
    fastest = min(steps, default=0.0)
    rows = []
    for layout in layouts:
        predicted = layout.predicted
        if predicted is None:
            rows.append((layout.name, *[""] * 6, "not priced"))
            continue
        excess = layout.excess_bytes
        rows.append(
            (
                layout.name,
                format_seconds(predicted.step_seconds),
                f"{predicted.step_seconds / fastest:.2f}" if fastest else "",
                format_seconds(predicted.compute_seconds),
                format_seconds(predicted.collective_seconds),
                format_bytes(predicted.collective_bytes),
                format_bytes(predicted.peak_bytes_per_device),
                f"{format_bytes(excess)} too much" if excess else "fits",
            )
        )
    headers = ("layout", "step", "x fastest", "compute", "collectives", "wire", "memory", "note")
    table = tabulate(rows, headers=headers, disable_numparse=True)
    return f"{table}\n(all predicted by formulas; wire and memory are bytes of one device)"


def _details(layout: ComparedLayout) -> str:
    parts = [f"{layout.name}:"]
    if layout.failure:
        parts[0] += f" {layout.failure}"
    if layout.rules:
        parts.append(format_rules(layout.rules))
    parts += [f"warning: {warning}" for warning in layout.warnings]
    if layout.predicted is not None:
        parts.append(f"whole on every device: {format_bytes(layout.whole_bytes)} of weights")
        parts += _collectives(layout)
    return "\n".join(parts)


def _collectives(layout: ComparedLayout) -> Iterator[str]:
    if not layout.collectives:
        yield "no collectives"
        return
    rows = [
        (
            f"{item.kind} over {item.axis}",
            f"{item.count} x {format_bytes(item.n_bytes)}",
            format_seconds(item.seconds),
            "beside compute" if item.overlapped else "blocks",
            item.layer,
            item.cause or "",
        )
        for item in layout.collectives[:_SHOWN]
    ]
    headers = ("costliest collectives", "size", "time", "overlap", "layer", "cause")
    yield tabulate(rows, headers=headers, disable_numparse=True)
    rest = layout.collectives[_SHOWN:]
    if rest:
        total = format_seconds(sum(item.seconds for item in rest))
        yield f"and {sum(item.count for item in rest)} more, {total} together"
