"""README: its commands are commands, its source is source, its figures are those that are kept."""

import ast
import re
import shlex
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

import pytest
import rivals
from click import Command
from tables import compact_table
from verdicts import Results

from autoshard.cli import main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def commands() -> Iterator[str]:
    """Every call of the command that README shows, in code blocks and between backticks."""
    lines = README.replace("\\\n", " ")
    yield from re.findall(r"(?m)^(?:\$ | {4}|.*&& )(autoshard \w.*)$", lines)
    yield from (call.replace("\\|", "|") for call in re.findall(r"`(autoshard \w[^`]*)`", lines))


def cells(table: str) -> list[list[str]]:
    """The rows of a table in Markdown, whatever their padding."""
    rows = (line.strip("|").split("|") for line in table.splitlines() if line.startswith("| "))
    return [[cell.strip() for cell in row] for row in rows]


@pytest.mark.parametrize("call", sorted(set(commands())))
def test_every_command_is_understood(call: str) -> None:
    _, name, *arguments = shlex.split(call)
    command = main.commands[name]
    assert isinstance(command, Command)
    command.make_context(name, arguments)


def test_every_piece_of_python_is_python() -> None:
    pieces = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(pieces) > 1
    for piece in pieces:
        ast.parse(piece)


@pytest.mark.parametrize(
    ("mark", "path", "models"),
    [
        ("rivals", rivals.RESULTS, rivals.MODELS),
        ("unseen", rivals.UNSEEN_RESULTS, rivals.UNSEEN),
    ],
)
def test_the_table_of_rivals_is_that_of_the_kept_verdicts(
    mark: str, path: Path, models: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    results = Results(path=path, fields=rivals.KEY)
    *_, last = results.rows.values()
    # Of the versions that it was made with, whatever is installed here.
    monkeypatch.setattr(rivals, "installed_versions", lambda: last["versions"])
    monkeypatch.setattr(rivals, "verdict_target", lambda: last["target"])
    everything = Namespace(
        workload=rivals.WORKLOADS, models=models, meshes=rivals.MESHES, links=False
    )
    entries = rivals.entries(results, everything)
    table = compact_table(entries, rivals.OURS, rivals.RIVALS, rivals.HAND)
    shown = README.partition(f"<!-- {mark} -->\n")[2].partition("<!-- end -->")[0]
    assert cells(shown) == cells(table)
    assert all(line in shown for line in table.splitlines() if not line.startswith("|"))


@pytest.mark.parametrize("report", ["tpu-v3-2x2", "tpu-v5e-2x4", "gpu-h100-sxm-8"])
def test_the_compilers_said_what_readme_says_of_them(report: str) -> None:
    text = (ROOT / "examples" / "reports" / f"gemma_7b_en-1x8-train-{report}.txt").read_text()
    told = README.partition("## Reports of the compilers")[2].partition("\n## ")[0]
    peak = re.search(r"memory at the peak, a device +([\d.]+) GiB +([\d.]+) GiB", text)
    assert peak and peak[1] in told and peak[2] in told
    if report == "tpu-v5e-2x4":
        step = re.search(r"\nstep +(\d+) ms +(\d+) ms", text)
        assert (
            step
            and f"takes {step[1]} ms by the compiler's cycles, {step[2]} by the"
            in " ".join(told.split())
        )
