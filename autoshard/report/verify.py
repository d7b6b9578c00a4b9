"""A verification as text and as JSON."""

from collections.abc import Iterator

from tabulate import tabulate

from autoshard.codec import dump, to_record
from autoshard.hardware.targets import parse_target
from autoshard.layout.rules import rules_text
from autoshard.records.verification import Verification
from autoshard.units import format_bytes, format_flops, format_seconds

__all__ = ["verification_json", "verification_text"]


def verification_json(verification: Verification) -> str:
    """Everything that was found, as a JSON object."""
    return dump(to_record(verification))


def verification_text(verification: Verification) -> str:
    """Everything that was found, for a person.

    Args:
        verification: what `autoshard.verify` returned.
    """
    parts = [
        _head(verification),
        rules_text(verification.rules),
        _verdict_line(verification),
        *([f"WRONG: {verification.wrong}"] if verification.wrong else []),
        *_comparison(verification),
        *_flops(verification),
        *_collectives(verification),
    ]
    return "\n\n".join(parts)


def _head(found: Verification) -> str:
    versions = found.versions
    depth = ""
    if found.blocks is not None:
        depth = f", {found.blocks} of {found.n_blocks} blocks"
        depth = f", all {found.n_blocks} blocks" if found.blocks == found.n_blocks else depth
    return (
        f"{found.model}, {found.workload}\n"
        f"mesh {found.mesh.named} on {found.target}{depth}\n"
        f"compiled by {found.compiler} through jax {versions.jax}, keras {versions.keras}, "
        f"keras-hub {versions.keras_hub}"
    )


def _verdict_line(found: Verification) -> str:
    """Whether it fits, in one line."""
    limit = format_bytes(found.memory_limit)
    if found.refusal:
        return f"DOES NOT FIT: {found.refusal}"
    assert found.memory is not None
    if _on_cpu(found):
        return (
            "compiles; whether it fits cannot be told from a compile for CPU devices, which "
            "computes bfloat16 in float32 and keeps everything"
        )
    peak = format_bytes(found.memory.peak)
    if found.fits is None:
        return (
            f"compiles: {peak} of {limit} usable a device at the peak, for {found.blocks} of "
            f"{found.n_blocks} blocks; whether all fit takes a compile without --blocks"
        )
    if found.fits:
        return f"fits: {peak} of {limit} usable a device at the peak"
    excess = format_bytes(found.memory.peak - found.memory_limit)
    return f"DOES NOT FIT: {peak} a device at the peak, {excess} more than the usable {limit}"


def _on_cpu(found: Verification) -> bool:
    return parse_target(found.target).chip.kind == "cpu"


def _comparison(found: Verification) -> Iterator[str]:
    """Compiler and prediction, side by side."""
    rows: list[tuple[str, str, str]] = []
    predicted, memory, time = found.predicted, found.memory, found.step_seconds
    if memory is not None and not _on_cpu(found):
        peak = format_bytes(predicted.peak_bytes_per_device) if predicted else ""
        rows += [
            ("memory at the peak, a device", format_bytes(memory.peak), peak),
            ("  arguments", format_bytes(memory.arguments), ""),
            ("  temporaries", format_bytes(memory.temporaries), ""),
            ("  outputs", format_bytes(memory.outputs), ""),
            ("  of them in place of arguments", format_bytes(memory.aliased), ""),
        ]
    elif predicted and found.refusal:
        rows.append(
            ("memory at the peak, a device", "", format_bytes(predicted.peak_bytes_per_device))
        )
    if time is not None:
        said = predicted and (
            format_seconds(predicted.step_seconds),
            format_seconds(predicted.compute_seconds),
            format_seconds(predicted.collective_seconds),
        )
        step, compute, collectives = said or ("", "", "")
        source = "predicted" if time.compute_is_predicted else "compiler's cycles"
        both = format_seconds(time.blocking + time.overlapped)
        rows += [
            ("step", format_seconds(time.step), step),
            (f"  compute ({source})", format_seconds(time.compute), compute),
            ("  collectives", both, collectives),
            ("    that block", format_seconds(time.blocking), ""),
            ("    beside compute", format_seconds(time.overlapped), ""),
        ]
    if found.memory is not None:
        wire = sum(item.wire_bytes for item in found.collectives)
        said_wire = format_bytes(predicted.collective_bytes) if predicted else ""
        rows.append(("bytes on the wire, a device", format_bytes(wire), said_wire))
    if rows:
        headers = ("", "compiled", "predicted")
        n_columns = 3 if predicted else 2
        yield tabulate(
            [row[:n_columns] for row in rows],
            headers=headers[:n_columns],
            disable_numparse=True,
            preserve_whitespace=True,
        ) + _note(found)


def _note(found: Verification) -> str:
    if found.step_seconds is None:
        return ""
    return "\n(collectives by the ring formulas over the mesh's links; overlap is taken as perfect)"


def _flops(found: Verification) -> Iterator[str]:
    if found.model_flops is None:
        return
    text = f"the model's matmuls: {format_flops(found.model_flops)} a step"
    if found.flops_per_device is None:
        yield f"{text}; this compiler does not count a device's own"
        return
    text += f"; a device computes {format_flops(found.flops_per_device)}"
    n_devices, repeated = found.mesh.n_devices, found.repeated_share
    if repeated is None:
        yield f"{text}, where one turn of each loop is counted"
        return
    yield (
        f"{text}: {repeated:.1%} of all {n_devices} devices' operations repeat another's or "
        "recompute"
    )


def _collectives(found: Verification) -> Iterator[str]:
    if found.memory is None:
        return
    if not found.collectives:
        yield "no collectives"
        return
    on_cpu = _on_cpu(found)
    rows = [
        (
            item.kind,
            item.axis,
            format_bytes(item.n_bytes),
            item.count,
            format_bytes(item.wire_bytes),
            item.phase,
            "" if on_cpu else "beside compute" if item.overlapped else "blocks",
            item.layer,
            item.cause or "",
        )
        for item in found.collectives
    ]
    headers = ("kind", "axis", "size", "count", "wire", "phase", "overlap", "layer", "cause")
    yield "collectives of a step, by the compiler's program\n" + tabulate(rows, headers=headers)
