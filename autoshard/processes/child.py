"""Child processes that compile and run things on behalf of this one.

XLA and libtpu abort the process on some errors, the number of virtual devices is fixed when JAX
starts, and a compiler keeps its memory. So all of it happens in a child: a fresh interpreter that
runs module-level functions by name, one after the other, under a limit of time and of memory. Every
way in which it can end badly becomes one error with one line of text that names the stage.

The child leads a process group of its own, which is killed as a whole on a timeout, on an exception
in the parent (Ctrl-C too) and at the end of the `with` block; if the parent is killed, the end of
its pipe ends the child.
"""

import contextlib
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import IO, Any

from autoshard import errors
from autoshard.errors import AutoshardError, ChildError, ChildTimeoutError, XlaError
from autoshard.processes.worker import read_frame, write_frame
from autoshard.units import format_bytes

__all__ = ["Child"]

_POLL_SECONDS = 0.1
_KEPT_WORDS = 400


class Child:
    """A child process that answers calls in sequence; it starts with the first one.

    After an error that killed it, the next call starts another.

    Args:
        environment: variables set on top of this process's.
        memory_limit_bytes: resident memory beyond which it is killed, watched through `/proc` and
            not enforced where there is none.
        on_stage: called with the name of each stage as it begins.
    """

    def __init__(
        self,
        environment: Mapping[str, str] | None = None,
        *,
        memory_limit_bytes: int | None = None,
        on_stage: Callable[[str], None] | None = None,
    ) -> None:
        self._environment = dict(environment or {})
        self._memory_limit_bytes = memory_limit_bytes
        self._on_stage = on_stage
        self._process: subprocess.Popen[bytes] | None = None
        self._replies: IO[bytes] | None = None
        self._log: IO[bytes] | None = None
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._stage = "start"
        self._killed = False

    def __enter__(self) -> "Child":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def call(self, function: str, request: Any, *, timeout_seconds: float) -> Any:
        """Run `function(request, progress)` in the child and wait for its value.

        Args:
            function: `package.module:name` of a module-level function. It may name its stages by
                `progress("compile")`.
            request: its argument; it and the value are pickled.
            timeout_seconds: the limit of this call, the child's start included.

        Raises:
            ChildTimeoutError: it ran past its time.
            ChildError: it died, or used more memory than it may.
            AutoshardError: what the function raised, if that was one of ours.
            XlaError: any other exception of the function, named in the text.
        """
        deadline = time.monotonic() + timeout_seconds
        try:
            process = self._process or self._start()
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                write_frame(process.stdin, (function, request))
            answer = self._wait(process, deadline, timeout_seconds)
        except BaseException:
            # Ctrl-C included: a child that nobody waits for must not go on.
            self.close()
            raise
        if answer[0] == "error":
            raise self._raised(*answer[1:])
        return answer[1]

    def kill(self) -> None:
        """Kill the child from another thread than the one that waits for it, now and for good."""
        # Before a look at the process: one that is being started meanwhile sees it in `_start`.
        self._killed = True
        if self._process is not None:
            _kill_group(self._process)

    def close(self) -> None:
        """Kill the child and all that it started, and remove what it has left behind."""
        process, self._process = self._process, None
        streams = [self._replies, self._log]
        if process is not None:
            _kill_group(process)
            process.wait()
            streams.append(process.stdin)
        for stream in streams:
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()
        if self._folder is not None:
            self._folder.cleanup()

    def _start(self) -> subprocess.Popen[bytes]:
        reader, writer = os.pipe()
        # What this process can import the child can: a user's own model module, say.
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        self._log = tempfile.TemporaryFile()  # noqa: SIM115
        self._folder = tempfile.TemporaryDirectory(prefix="autoshard-", ignore_cleanup_errors=True)
        folder = self._folder.name
        environment = {"PYTHONPATH": path, "TMPDIR": folder, **self._environment}
        self._stage = "start"
        try:
            self._process = subprocess.Popen(
                # -P: what lies in the current folder is imported only if it is on that path.
                [sys.executable, "-P", "-m", "autoshard.processes.worker", str(writer), folder],
                stdin=subprocess.PIPE,
                stdout=self._log,
                stderr=self._log,
                pass_fds=(writer,),
                env={**os.environ, **environment},
                start_new_session=True,
            )
        finally:
            os.close(writer)
            self._replies = os.fdopen(reader, "rb", buffering=0)
        if self._killed:
            raise ChildError("the child process was stopped before it began")
        return self._process

    def _wait(
        self, process: subprocess.Popen[bytes], deadline: float, timeout_seconds: float
    ) -> tuple[Any, ...]:
        assert self._replies is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._replies, selectors.EVENT_READ)
            while True:
                if time.monotonic() > deadline:
                    raise ChildTimeoutError(
                        f"the child process ran past its limit of {timeout_seconds:g} s in stage "
                        f"'{self._stage}' and was stopped"
                    )
                self._check_memory(process)
                if not selector.select(_POLL_SECONDS):
                    continue
                try:
                    frame: tuple[Any, ...] = read_frame(self._replies)
                except EOFError:
                    raise self._died(process) from None
                if frame[0] != "stage":
                    return frame
                self._stage = frame[1]
                if self._on_stage:
                    self._on_stage(self._stage)

    def _check_memory(self, process: subprocess.Popen[bytes]) -> None:
        limit = self._memory_limit_bytes
        used = _resident_bytes(process.pid) if limit else None
        if limit and used and used > limit:
            raise ChildError(
                f"the child process used {format_bytes(used)} of memory in stage "
                f"'{self._stage}', more than its limit of {format_bytes(limit)}, and was stopped"
            )

    def _died(self, process: subprocess.Popen[bytes]) -> ChildError:
        status = process.wait()
        how = f"exited with status {status}"
        if status < 0:
            how = f"died with signal {-status} ({signal.Signals(-status).name})"
        hint = "; the machine may be out of memory" if status == -signal.SIGKILL else ""
        error = ChildError(f"the child process {how} in stage '{self._stage}'{hint}")
        error.add_note(self._last_words())
        return error

    def _raised(self, kind: str, text: str, trace: str) -> AutoshardError:
        """The exception that the function raised, as the caller may catch it."""
        found = getattr(errors, kind, None)
        if isinstance(found, type) and issubclass(found, AutoshardError):
            # Some of our errors make their text from other arguments: the text is made already.
            error: AutoshardError = found.__new__(found)
            error.args = (text,)
        else:
            error = XlaError(f"{kind} in stage '{self._stage}': {text.splitlines()[0]}")
        error.add_note(trace)
        return error

    def _last_words(self) -> str:
        """The end of what the child printed."""
        assert self._log is not None
        self._log.seek(0)
        words = self._log.read().decode(errors="replace").split()
        return " ".join(words[-_KEPT_WORDS:])


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


def _resident_bytes(process_id: int) -> int | None:
    try:
        with open(f"/proc/{process_id}/statm", encoding="ascii") as file:
            pages = int(file.read().split()[1])
    except (OSError, IndexError, ValueError):
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")
