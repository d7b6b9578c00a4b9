"""A spinner on standard error that names the stage at work."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console

__all__ = ["spinner"]


@contextmanager
def spinner() -> Iterator[Callable[[str], None]]:
    """Show a spinner; call the value with the name of each stage."""
    console = Console(stderr=True)
    with console.status("start") as status:
        yield lambda stage: status.update(stage)
