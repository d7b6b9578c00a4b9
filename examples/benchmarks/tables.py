"""The table of `rivals.py`, from values."""

import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from tabulate import tabulate

__all__ = ["Cell", "Entry", "cells", "compact_table", "rivals_table"]

# The mesh that people write maps for.
_MODEL_PARALLEL = "1x8"
# An answer within this of the best is as good.
_AS_GOOD = 1.01
# Of programs of some blocks, what is nearer than this is told by those of all.
_CLOSE = 1.02


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One layout's verdict.

    Attributes:
        model, mesh, workload, layout: what was compiled.
        seconds: the step; None where there is no program.
        note: why there is none, in a word, or "".
        fits: whether the whole model's weights and optimizer fit a device, and its compiler did
            not say that the step does not.
        whole_seconds: the step of the whole model, where that was compiled beside `seconds`.
    """

    model: str
    mesh: str
    workload: str
    layout: str
    seconds: float | None
    note: str = ""
    fits: bool = True
    whole_seconds: float | None = None

    @property
    def text(self) -> str:
        """Milliseconds, marked where it does not fit."""
        if self.seconds is None:
            return self.note
        return f"{1e3 * self.seconds:.2f}{'' if self.fits else '!'}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """All verdicts on one model, mesh and workload, by layout."""

    model: str
    mesh: str
    workload: str
    entries: dict[str, Entry]

    def seconds(self, layout: str, *, whole: bool = False) -> float | None:
        """The step under a layout, or that of the whole model; None where there is none to take."""
        entry = self.entries.get(layout)
        if entry is None or not entry.fits:
            return None
        return entry.whole_seconds if whole else entry.seconds

    def best(self, layouts: Sequence[str], *, whole: bool = False) -> float | None:
        """The step under the fastest of some layouts, see `seconds`; None where none runs."""
        times = (self.seconds(layout, whole=whole) for layout in layouts)
        return min((seconds for seconds in times if seconds is not None), default=None)

    def fastest(self, layouts: Sequence[str]) -> Entry | None:
        """The verdict on that layout."""
        best = self.best(layouts)
        if best is None:
            return None
        return next(self.entries[layout] for layout in layouts if self.seconds(layout) == best)

    def ratio(self, ours: Sequence[str], layouts: Sequence[str]) -> float | None:
        """Our best step over that of others; below 1 is faster. None where there is none.

        Those of whole models, where some of both were compiled.
        """
        for whole in (True, False):
            mine, best = self.best(ours, whole=whole), self.best(layouts, whole=whole)
            if mine and best:
                return mine / best
        return None

    def needs_whole(self, ours: Sequence[str], layouts: Sequence[str]) -> bool:
        """Whether some blocks tell too little of our best and that of others.

        They differ, but by little; or the first of ours, which is planned for the whole model, is
        behind.
        """
        mine, best, first = self.best(ours), self.best(layouts), self.seconds(ours[0])
        if mine is None or best is None:
            return False
        is_close = mine != best and max(mine, best) <= _CLOSE * min(mine, best)
        return is_close or (first is not None and first > _AS_GOOD * best)

    def text(self, ours: Sequence[str], layouts: Sequence[str]) -> str:
        """Milliseconds of our best and of that of others, and of the whole models in brackets."""
        blocks, whole = (
            [self.best(names, whole=whole) for names in (ours, layouts)] for whole in (False, True)
        )
        text = " / ".join(map(_milliseconds, blocks))
        return text if None in whole else f"{text} ({' / '.join(map(_milliseconds, whole))})"

    def speed_up(self, ours: Sequence[str], layout: str) -> float | None:
        """How many times as fast ours is as another; None where there is none."""
        ratio = self.ratio(ours, [layout])
        return None if ratio is None else 1 / ratio


def _milliseconds(seconds: float | None) -> str:
    return "none" if seconds is None else f"{1e3 * seconds:.2f}"


def cells(entries: Iterable[Entry]) -> tuple[Cell, ...]:
    """Group verdicts by model, mesh and workload, the last one of a layout counting."""
    found: dict[tuple[str, str, str], dict[str, Entry]] = {}
    for entry in entries:
        found.setdefault((entry.model, entry.mesh, entry.workload), {})[entry.layout] = entry
    return tuple(
        Cell(model=model, mesh=mesh, workload=workload, entries=by_layout)
        for (model, mesh, workload), by_layout in found.items()
    )


def rivals_table(
    entries: Iterable[Entry], ours: Sequence[str], rivals: Sequence[str], hand: str
) -> str:
    """Milliseconds of every layout, the ratio of our best to the best rival, and the means.

    Args:
        entries: the verdicts.
        ours: names of our candidates, the one first that the formulas put first.
        rivals: names of the others, in the order of the columns.
        hand: the rival that the mean speed-ups (geometric) are over.
    """
    grouped = cells(entries)
    rows = []
    names = (*ours, *rivals)
    for cell in grouped:
        ratio = cell.ratio(ours, rivals)
        shown = [cell.entries[name].text if name in cell.entries else "" for name in names]
        rows.append([cell.model, cell.mesh, cell.workload, *shown, f"{ratio:.3f}" if ratio else ""])
    headers = ["model", "mesh", "workload", *names, "ours / best rival"]
    text = tabulate(rows, headers=headers, disable_numparse=True, stralign="right")
    return "\n".join([text, "", *_summary(grouped, ours, rivals, hand, "simple")])


def compact_table(
    entries: Iterable[Entry], ours: Sequence[str], rivals: Sequence[str], hand: str
) -> str:
    """Markdown, a line a model: milliseconds of our best and of the best rival, mesh by mesh.

    Args:
        entries, ours, rivals, hand: as for `rivals_table`.
    """
    grouped = cells(entries)
    meshes = list(dict.fromkeys(cell.mesh for cell in grouped))
    lines: dict[tuple[str, str], dict[str, str]] = {}
    for cell in grouped:
        lines.setdefault((cell.model, cell.workload), {})[cell.mesh] = cell.text(ours, rivals)
    rows = [[*place, *(line.get(mesh, "") for mesh in meshes)] for place, line in lines.items()]
    text = tabulate(rows, headers=["model", "workload", *meshes], tablefmt="github")
    return "\n".join([text, "", *_summary(grouped, ours, rivals, hand, "github")])


def _summary(
    grouped: Sequence[Cell], ours: Sequence[str], rivals: Sequence[str], hand: str, tablefmt: str
) -> list[str]:
    """What the table comes to: how often ours lost, and how much it won on average."""
    ratios, first = (
        [ratio for cell in grouped if (ratio := cell.ratio(names, rivals)) is not None]
        for names in (ours, ours[:1])
    )
    lost, lost_first = (sum(ratio > _AS_GOOD for ratio in some) for some in (ratios, first))
    counted = (
        f"rows with ours and a rival that fits: {len(ratios)}; slower by more than 1%: {lost}, "
        f"with the first candidate alone {lost_first}"
    )
    headers = ["workload", f"speed-up over {hand}", "rows"]
    headers += [f"on the best mesh, over {hand} on {_MODEL_PARALLEL}", "models"]
    rows = []
    for workload in dict.fromkeys(cell.workload for cell in grouped):
        several = [cell for cell in grouped if cell.workload == workload]
        gains = (cell.speed_up(ours, hand) for cell in several)
        free = _with_free_mesh(several, ours, hand)
        rows.append([workload, *_mean(filter(None, gains)), *_mean(free)])
    return [counted, "", tabulate(rows, headers=headers, tablefmt=tablefmt, disable_numparse=True)]


def _mean(gains: Iterable[float]) -> tuple[str, str]:
    """The geometric mean, and of how many."""
    several = list(gains)
    return (f"{statistics.geometric_mean(several):.3f}" if several else "", str(len(several)))


def _with_free_mesh(grouped: Sequence[Cell], ours: Sequence[str], hand: str) -> Iterator[float]:
    """For each model, by how much ours on its best mesh beats another layout on one axis."""
    of_model: dict[str, list[Cell]] = {}
    for cell in grouped:
        of_model.setdefault(cell.model, []).append(cell)
    for several in of_model.values():
        mine = [s for cell in several if (s := cell.best(ours)) is not None]
        theirs = [cell.seconds(hand) for cell in several if cell.mesh == _MODEL_PARALLEL]
        if mine and theirs and theirs[0] is not None:
            yield theirs[0] / min(mine)
