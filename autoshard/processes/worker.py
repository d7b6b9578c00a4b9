"""The child's side of `autoshard.processes.child`.

`python -m autoshard.processes.worker FD FOLDER` is a child whose temporary files lie in FOLDER.

Requests come on standard input and replies leave on the file descriptor FD, both as pickled frames
with their length before them; what libraries print cannot get between them. The process ends with
its parent: a thread reads standard input, and the end of it ends the process and all that it
started, at once, whatever the main thread is doing, and takes FOLDER with it.
"""

import contextlib
import importlib
import os
import pickle
import queue
import shutil
import signal
import struct
import sys
import threading
import traceback
from collections.abc import Callable
from typing import IO, Any

__all__ = ["Function", "main", "read_frame", "write_frame"]

_LENGTH = struct.Struct("<Q")

Function = Callable[[Any, Callable[[str], None]], Any]


def read_frame(stream: IO[bytes]) -> Any:
    """Read one frame.

    Raises:
        EOFError: the other side closed the stream.
    """
    return pickle.loads(_read_body(stream))


def _read_body(stream: IO[bytes]) -> bytes:
    return _read(stream, _LENGTH.unpack(_read(stream, _LENGTH.size))[0])


def _read(stream: IO[bytes], size: int) -> bytes:
    # A read of an unbuffered pipe may return less than was asked for.
    parts = bytearray()
    while len(parts) < size:
        part = stream.read(size - len(parts))
        if not part:
            raise EOFError
        parts += part
    return bytes(parts)


def write_frame(stream: IO[bytes], value: Any) -> None:
    """Write one frame and flush it."""
    body = pickle.dumps(value)
    stream.write(_LENGTH.pack(len(body)) + body)
    stream.flush()


def _resolve(name: str) -> Function:
    """The module-level function called `package.module:function`."""
    module, _, attribute = name.partition(":")
    function: Function = getattr(importlib.import_module(module), attribute)
    return function


def _answer(body: bytes, progress: Callable[[str], None]) -> tuple[Any, ...]:
    try:
        progress("import")
        name, request = pickle.loads(body)
        return ("result", _resolve(name)(request, progress))
    except Exception as error:
        # The class travels by name: one of jax's or of the caller's may not unpickle there.
        lines = str(error).strip() or "no message"
        return ("error", type(error).__name__, lines, traceback.format_exc())


def main() -> None:
    """Answer requests until standard input ends."""
    requests: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    source = os.fdopen(os.dup(sys.stdin.fileno()), "rb")
    replies = os.fdopen(int(sys.argv[1]), "wb")

    def listen() -> None:
        # Whatever ends the stream, a half frame included, means that nobody waits for an answer.
        with contextlib.suppress(Exception):
            while True:
                requests.put(_read_body(source))
        shutil.rmtree(sys.argv[2], ignore_errors=True)
        if os.getpgrp() == os.getpid():
            os.killpg(os.getpid(), signal.SIGKILL)
        os._exit(0)

    threading.Thread(target=listen, daemon=True).start()
    while True:
        answer = _answer(requests.get(), lambda stage: write_frame(replies, ("stage", stage)))
        write_frame(replies, answer)


if __name__ == "__main__":
    main()
