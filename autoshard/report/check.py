"""What is wrong with a map, as text and as JSON."""

from collections.abc import Sequence

from autoshard.codec import dump, to_record
from autoshard.layout.resolve import Finding

__all__ = ["findings_json", "findings_text"]


def findings_json(findings: Sequence[Finding]) -> str:
    """A JSON list with an object for each finding; empty where nothing is wrong."""
    return dump([{"severity": finding.severity, **to_record(finding)} for finding in findings])


def findings_text(findings: Sequence[Finding]) -> str:
    """A line for each finding, or `nothing wrong`."""
    lines = [f"{finding.severity}: {finding.message}" for finding in findings]
    return "\n".join(lines or ["nothing wrong"])
