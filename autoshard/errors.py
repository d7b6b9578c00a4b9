"""The error tree. Every error that a caller may catch derives from `AutoshardError`.

AutoshardError
├── UsageError            the request itself is wrong                   exit status 2
│   ├── UnknownNameError    a preset, chip, optimizer or family that does not exist
│   ├── MeshError           a mesh that does not parse, or does not match its axes, devices or batch
│   └── BackendError        Keras runs on a backend that has no distribution
├── LayoutError           a rule that no map may hold                   exit status 1
├── PlanFileError         a file that is not a plan, or not one for this model
├── ModelError            a model that cannot be built or traced without weights
├── NothingFitsError      no layout meets the memory limit
└── XlaError              a compiler or a run that failed
    ├── OutOfMemoryError    the compiler says that the program does not fit the target
    ├── ChildError          a child process died
    └── ChildTimeoutError   a child process ran past its limit
"""

import difflib
from collections.abc import Iterable, Sequence

__all__ = [
    "AutoshardError",
    "BackendError",
    "ChildError",
    "ChildTimeoutError",
    "LayoutError",
    "MeshError",
    "ModelError",
    "NothingFitsError",
    "OutOfMemoryError",
    "PlanFileError",
    "UnknownNameError",
    "UsageError",
    "XlaError",
]


class AutoshardError(Exception):
    """Base of every error this package raises on purpose; its text is one line for a person.

    Attributes:
        exit_status: what a command that ends with this error returns to the shell.
    """

    exit_status = 1


class UsageError(AutoshardError):
    """The request itself is wrong: nothing was done."""

    exit_status = 2


class UnknownNameError(UsageError):
    """A name that is not in a table; the text offers the nearest ones.

    Args:
        kind: what was looked up, for example `"model"`.
        name: the name as given.
        known: every name that would have been right.
        hint: what to do when none of them is meant.
    """

    def __init__(self, kind: str, name: str, known: Iterable[str], hint: str = "") -> None:
        names = list(dict.fromkeys(known))
        begins = [one for one in names if name and one.startswith(name)]
        close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
        near = list(dict.fromkeys([*begins, *close]))[:3]
        offer = f"; did you mean {' or '.join(near)}?" if near else ""
        super().__init__(f"unknown {kind} '{name}'{offer}{' ' + hint if hint else ''}")
        self.near = tuple(near)


class MeshError(UsageError):
    """A mesh that does not parse, or does not match its axis names, its devices or the batch."""


class BackendError(UsageError):
    """Keras runs on a backend whose distribution does nothing."""


class LayoutError(AutoshardError):
    """A rule that Keras refuses, or that lays a variable out as its shape does not allow."""

    @classmethod
    def of(cls, faults: Sequence[str]) -> "LayoutError":
        """The first fault of a map, and how many more there are."""
        n_more = len(faults) - 1
        return cls(faults[0] + (f" (check tells {n_more} more)" if n_more else ""))


class PlanFileError(AutoshardError):
    """A file that is not a plan, or a plan made for another model."""


class ModelError(AutoshardError):
    """A model that cannot be built or traced without its weights."""


class NothingFitsError(AutoshardError):
    """No layout keeps the step within the memory limit."""


class XlaError(AutoshardError):
    """A compilation or a run that failed."""


class OutOfMemoryError(XlaError):
    """The target's compiler says that the program does not fit its memory."""


class ChildError(XlaError):
    """A child process died before it could answer."""


class ChildTimeoutError(XlaError):
    """A child process ran past its time limit and was stopped."""
