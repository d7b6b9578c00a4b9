"""The processes of a run: one for each execution, or several that share its devices.

XLA's CPU backend multiplies bfloat16 in float32. Its defaults convert all weights at once (34 GB of
temporaries for Gemma 7B); the flags below keep one conversion next to its use, in a loop and in
the backward pass too. They change no value.
"""

import socket
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import replace

from autoshard.errors import ChildError, XlaError
from autoshard.execution.requests import Cluster, Part, PartOutcome, RunRequest
from autoshard.hardware.targets import parse_target
from autoshard.processes.child import Child
from autoshard.xla.environment import child_environment

__all__ = ["execute", "run_environment"]

_GRACE_SECONDS = 2.0

_FLAGS = (
    # The default scheduler runs ops as early as it can: every conversion first.
    "--xla_cpu_enable_concurrency_optimized_scheduler=false",
    # Virtual devices take turns on few cores, so that the first waits long for the last.
    "--xla_cpu_collective_call_warn_stuck_timeout_seconds=600",
    "--xla_cpu_collective_call_terminate_timeout_seconds=3600",
)
_DISABLED_PASSES: dict[Part, tuple[str, ...]] = {
    "load": (),
    "predict": (),
    # They move the conversions out of the loop over tokens, where all of them are kept.
    "generate": (
        "while-loop-invariant-code-motion",
        "while-loop-expensive-invariant-code-motion",
    ),
    # They drop the barriers of jax.checkpoint, and recomputed conversions are merged again.
    "fit": ("optimization-barrier-expander", "cse_barrier_expander"),
}


def run_environment(part: Part, n_devices: int) -> dict[str, str]:
    """The environment variables of a process that runs a part.

    Args:
        part: what it runs.
        n_devices: its own virtual devices.
    """
    environment = child_environment(parse_target(f"cpu:{n_devices}"))
    flags = [environment["XLA_FLAGS"], *_FLAGS]
    if _DISABLED_PASSES[part]:
        flags.append(f"--xla_disable_hlo_passes={','.join(_DISABLED_PASSES[part])}")
    return environment | {"XLA_FLAGS": " ".join(flags)}


def execute(
    request: RunRequest,
    *,
    n_processes: int = 1,
    timeout_seconds: float,
    memory_limit_bytes: int | None = None,
    on_stage: Callable[[str], None] | None = None,
) -> tuple[PartOutcome, ...]:
    """Run a part in a process of its own, or in several that share the mesh.

    Args:
        request: what to run.
        n_processes: how many processes; each has an equal share of the devices.
        timeout_seconds: the limit of all of it.
        memory_limit_bytes: resident memory of a process beyond which it is stopped.
        on_stage: called with the name of each stage of the first process.

    Returns:
        What each process found, in their order.

    Raises:
        ChildError: a process died; the others are stopped at once.
        ChildTimeoutError: it ran past its time.
        AutoshardError: what a process raised.
    """
    n_devices = request.mesh.n_devices if request.mesh else 1
    environment = run_environment(request.part, n_devices // n_processes)
    with ExitStack() as stack:
        children = [
            stack.enter_context(
                Child(
                    environment,
                    memory_limit_bytes=memory_limit_bytes,
                    on_stage=on_stage if process_id == 0 else None,
                )
            )
            for process_id in range(n_processes)
        ]
        return _call_all(children, _shares(request, n_processes), timeout_seconds)


def _shares(request: RunRequest, n_processes: int) -> list[RunRequest]:
    if n_processes == 1:
        return [request]
    address = f"127.0.0.1:{_free_port()}"
    return [
        replace(request, cluster=Cluster(address=address, n_processes=n_processes, process_id=i))
        for i in range(n_processes)
    ]


def _call_all(
    children: Sequence[Child], requests: Sequence[RunRequest], timeout_seconds: float
) -> tuple[PartOutcome, ...]:
    """Call each child in a thread of its own; the first failure ends all of them."""
    with ThreadPoolExecutor(len(children)) as threads:
        calls = [
            threads.submit(
                child.call,
                "autoshard.execution.worker:run_part",
                request,
                timeout_seconds=timeout_seconds,
            )
            for child, request in zip(children, requests, strict=True)
        ]
        try:
            wait(calls, return_when=FIRST_EXCEPTION)
            # The others notice a death in their own way, perhaps first: let the dead speak too.
            done, _ = wait(calls, timeout=_GRACE_SECONDS)
        finally:
            # A process that waits for another, or that nobody waits for, must not go on.
            for child in children:
                child.kill()
        failures = {i: call.exception() for i, call in enumerate(calls) if call in done}
        failed = {i: error for i, error in failures.items() if error is not None}
        if failed:
            raise _root(failed, len(children))
        return tuple(call.result() for call in calls)


def _root(failed: Mapping[int, BaseException], n_processes: int) -> BaseException:
    """The failure that explains the others: a death first; with the process that it befell."""
    which = min(failed, key=lambda i: (not isinstance(failed[i], ChildError), i))
    error = failed[which]
    if n_processes == 1 or not isinstance(error, XlaError):
        return error
    named = type(error)(f"process {which} of {n_processes} failed and all were stopped: {error}")
    named.__cause__ = error
    return named


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port
