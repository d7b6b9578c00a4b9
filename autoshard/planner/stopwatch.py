"""How long each stage takes."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

__all__ = ["Stopwatch"]


@dataclass(slots=True)
class Stopwatch:
    """Seconds spent in each stage, measured."""

    seconds: dict[str, float] = field(default_factory=dict)
    progress: Callable[[str], None] = lambda stage: None

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time one stage and announce it."""
        self.progress(name)
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
