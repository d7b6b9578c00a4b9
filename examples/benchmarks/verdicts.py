"""What a compiler says of layouts, kept in a file: a JSON line a verdict, never asked for twice.

A row is the question (model, mesh, workload, name and rules of the layout, target, versions) and
either the compiled program of two periods of blocks or the error, in one line. Of several rows with
one key, or several layouts of one name (plans of an older and a newer planner), the last counts.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path
from typing import Any

from autoshard.codec import from_record, to_record
from autoshard.errors import AutoshardError
from autoshard.hardware.targets import parse_target
from autoshard.installed import installed_version
from autoshard.layout.rules import LayoutRules
from autoshard.mesh import parse_mesh
from autoshard.model.keras_import import PLANNING_ONLY
from autoshard.model.workload import Workload
from autoshard.processes.child import Child
from autoshard.xla.compile import compile_in
from autoshard.xla.compiled import CompiledStep, CompileRequest
from autoshard.xla.environment import child_environment

__all__ = [
    "BATCH",
    "PERIODS",
    "SEQ_LEN",
    "TARGET",
    "Question",
    "Results",
    "Row",
    "answer_all",
    "compiled",
    "installed_versions",
    "plan_here",
    "rules_of",
    "verdict_target",
]

BATCH = 8
SEQ_LEN = 512
# Periods of blocks in a program, None for all: a step of decoding is quick to compile, and of two
# blocks of it the logits would be all that counts.
PERIODS = {"prefill": 2, "decode": None, "train": 2}
TARGET = "tpu:v5e:2x4"
"""What is planned for; its compiler gives the verdicts where libtpu is installed."""

_MEMORY_LIMIT_BYTES = 14 * 2**30
_VERDICT_SECONDS = 300.0
_WHOLE_VERDICT_SECONDS = 900.0
_PACKAGES = ("jax", "libtpu", "keras", "keras-hub")

Row = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A layout to compile; see `CompileRequest`.

    Attributes:
        layout: what a table calls it.
        is_whole: whether to compile all blocks, whatever `PERIODS` says.
    """

    model: str
    mesh: str
    workload: str
    layout: str
    rules: LayoutRules
    target: str
    is_whole: bool = False

    def request(self) -> CompileRequest:
        """What the child is asked."""
        return CompileRequest(
            model=self.model,
            workload=Workload(
                kind=self.workload,  # type: ignore[arg-type]
                batch=BATCH,
                seq_len=SEQ_LEN,
            ),
            mesh=parse_mesh(self.mesh),
            rules=self.rules,
            target=self.target,
            periods=None if self.is_whole else PERIODS[self.workload],
        )

    def row(self) -> Row:
        """The question's part of a row."""
        return {
            "model": self.model,
            "mesh": self.mesh,
            "workload": {"kind": self.workload, "batch": BATCH, "seq_len": SEQ_LEN},
            "layout": self.layout,
            "rules": to_record(self.rules, LayoutRules),
            "target": self.target,
            "versions": installed_versions(),
        }


def installed_versions() -> dict[str, str]:
    """The packages that decide a verdict, `""` for one that is not installed."""
    return {package: installed_version(package) for package in _PACKAGES}


def rules_of(row: Row) -> LayoutRules:
    """The layout of a row."""
    return from_record(LayoutRules, row["rules"])


def _effective(row: Row) -> list[Any]:
    """The rules of a row that do anything, without the axes of one device.

    A weight that is not split is as good as one without a rule. An output that is not split is
    whole by the rule, and without it might not be.
    """
    axes = parse_mesh(row["mesh"]).parallel_axes
    rules = [
        [pattern, [axis if axis in axes else None for axis in spec]]
        for pattern, spec in row["rules"]
    ]
    return [rule for rule in rules if any(rule[1]) or rule[0].endswith("/output")]


def compiled(row: Row) -> CompiledStep | None:
    """The program of a row; None where there is an error.

    Rows of older days do not say what was in use at once, nor whether sums count copies.
    """
    if not row.get("compiled"):
        return None
    unsaid = {"live_bytes": None, "sums_of_copies": []}
    return from_record(CompiledStep, unsaid | row["compiled"])


@dataclass(slots=True)
class Results:
    """The rows of one file, by key.

    Attributes:
        path: the file; it need not exist yet.
        fields: the entries of a row that make its key.
        rows: the rows; a key's last one stands last.
    """

    path: Path
    fields: Sequence[str]
    rows: dict[str, Row] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.path.exists():
            for line in self.path.read_text(encoding="utf-8").splitlines():
                # A run that was stopped may have left part of a row.
                if line.endswith("}") and line.startswith("{"):
                    self._put(json.loads(line))

    def key(self, row: Row) -> str:
        """What makes a row the answer to a question."""
        return json.dumps([row[name] for name in self.fields], sort_keys=True)

    def add(self, row: Row) -> None:
        """Append a row to the file."""
        self._put(row)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab+") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 1))
            cut_off = file.read(1) not in (b"", b"\n")
            file.write(b"\n" * cut_off + json.dumps(row).encode() + b"\n")

    def is_last(self, row: Row) -> bool:
        """Whether no other rules came later under the same name, as those of a newer planner do."""
        names = ("model", "mesh", "workload", "layout", "target")
        alike = [one for one in self.rows.values() if all(one[n] == row[n] for n in names)]
        return alike[-1] is row

    def same_program(self, row: Row) -> dict[str, Any] | None:
        """The answer to a layout that differs only along mesh axes of one device."""
        names = ("model", "mesh", "workload", "target", "versions")
        for one in self.rows.values():
            alike = all(one[name] == row[name] for name in names)
            if alike and "error" not in one and _effective(one) == _effective(row):
                return {"compiled": one["compiled"], "seconds": 0.0}
        return None

    def _put(self, row: Row) -> None:
        key = self.key(row)
        self.rows.pop(key, None)
        self.rows[key] = row


def answer_all(
    questions: Iterable[Question],
    results: Results,
    *,
    retry_errors: bool = False,
    say: Callable[[str], None] = lambda line: print(line, file=sys.stderr, flush=True),
) -> None:
    """Compile what the results do not hold yet, a child for each model and target.

    Args:
        questions: those of one model next to each other.
        results: what is known; each answer is added at once.
        retry_errors: ask again where the row is an error.
        say: is told of each answer.
    """
    for (_, target), several in groupby(questions, key=lambda q: (q.model, q.target)):
        environment = child_environment(parse_target(target))
        with Child(environment, memory_limit_bytes=_MEMORY_LIMIT_BYTES) as child:
            for question in several:
                row = question.row()
                known = results.rows.get(results.key(row))
                if known is None or (retry_errors and "error" in known):
                    same = results.same_program(row)
                    row |= same or _answer(child, question)
                    results.add(row)
                    say(_line(row))
                elif not results.is_last(known):
                    results.add(known)


def _answer(child: Child, question: Question) -> dict[str, Any]:
    start = time.perf_counter()
    limit = _WHOLE_VERDICT_SECONDS if question.is_whole else _VERDICT_SECONDS
    try:
        step = compile_in(child, question.request(), timeout_seconds=limit)
    except AutoshardError as error:
        answer: dict[str, Any] = {"error": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
    else:
        answer = {"compiled": _compact(step)}
    return answer | {"seconds": round(time.perf_counter() - start, 1)}


def _compact(step: CompiledStep) -> dict[str, Any]:
    """The program, the collectives of all blocks together."""
    return to_record(replace(step, collectives=step.merged_collectives()))


def _line(row: Row) -> str:
    said = row.get("error") or f"{len(row['compiled']['collectives'])} collectives"
    where = f"{row['model']} {row['mesh']} {row['workload']['kind']} {row['target']}"
    return f"{where} {row['layout']}: {said} ({row['seconds']} s)"


def verdict_target(n_devices: int = 8) -> str:
    """The target whose compiler is asked: `TARGET` where libtpu is installed, else the CPU's."""
    return TARGET if find_spec("libtpu") else f"cpu:{n_devices}"


def plan_here() -> None:
    """Set this process up for planning, as the commands do, before Keras and JAX are imported."""
    os.environ |= {"KERAS_BACKEND": "jax", PLANNING_ONLY: "1"}
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
