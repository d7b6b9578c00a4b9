import os
import signal
import subprocess
import sys
import tempfile
import time
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from autoshard.errors import ChildError, ChildTimeoutError, UnknownNameError, XlaError
from autoshard.hardware.targets import parse_target
from autoshard.processes.child import Child
from autoshard.xla.environment import child_environment

# What the children run. They import this file as a module, by the parent's sys.path.


def _double(request, progress):
    progress("double")
    return 2 * request


def _environment(request, progress):
    return os.environ.get(request)


def _process_id(request, progress):
    return os.getpid()


def _print_much(request, progress):
    print("x" * 1_000_000)
    print("last words", file=sys.stderr, flush=True)
    return "printed"


def _die(request, progress):
    progress("dying")
    print("last words", file=sys.stderr, flush=True)
    os.kill(os.getpid(), request)


def _leave(request, progress):
    os._exit(request)


def _hang(request, progress):
    child = subprocess.Popen(["sleep", "60"])
    Path(request).write_text(f"{os.getpid()} {child.pid}")
    progress("hanging")
    time.sleep(60)


def _eat(request, progress):
    progress("eating")
    eaten = bytearray(request)
    for place in range(0, request, 4096):
        eaten[place] = 1
    time.sleep(60)


def _leave_a_file(request, progress):
    left = Path(tempfile.mkdtemp()) / "left"
    left.touch()
    Path(request).write_text(str(left))
    time.sleep(60)


def _raise_ours(request, progress):
    raise UnknownNameError("model", "gema", ["gemma"])


def _raise_another(request, progress):
    raise KeyError("what\nis this")


HERE = __name__


def _alive(process_id):
    try:
        # A killed process that its new parent has not waited for yet counts as dead.
        return Path(f"/proc/{process_id}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def _wait_until(condition):
    deadline = time.monotonic() + 20
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


def test_a_child_answers_calls_in_sequence_from_one_process_and_names_its_stages():
    stages = []
    with Child(on_stage=stages.append) as child:
        first = child.call(f"{HERE}:_process_id", None, timeout_seconds=60)
        assert child.call(f"{HERE}:_double", 21, timeout_seconds=60) == 42
        assert child.call(f"{HERE}:_process_id", None, timeout_seconds=60) == first != os.getpid()
    assert stages == ["import", "import", "double", "import"]


def test_what_a_child_leaves_behind_goes_with_it(tmp_path):
    told = tmp_path / "told"
    with Child() as child, pytest.raises(ChildTimeoutError):
        child.call(f"{HERE}:_leave_a_file", str(told), timeout_seconds=5)
    left = Path(told.read_text())
    assert left.is_absolute() and not left.exists() and not left.parent.exists()


def test_a_request_that_the_child_cannot_read_is_an_error_that_says_so(monkeypatch):
    module = types.ModuleType("only_the_parents")
    module.Sent = type("Sent", (), {"__module__": "only_the_parents"})
    monkeypatch.setitem(sys.modules, "only_the_parents", module)
    with Child() as child, pytest.raises(XlaError, match="No module named 'only_the_parents'"):
        child.call(f"{HERE}:_double", module.Sent(), timeout_seconds=60)


def test_a_module_in_the_current_folder_does_not_get_into_a_child(tmp_path, monkeypatch):
    (tmp_path / "queue.py").write_text("raise RuntimeError('shadowed')")
    monkeypatch.chdir(tmp_path)
    with Child() as child:
        assert child.call(f"{HERE}:_double", 21, timeout_seconds=60) == 42


def test_a_child_gets_the_environment_it_was_given():
    with Child({"AUTOSHARD_TEST": "yes"}) as child:
        assert child.call(f"{HERE}:_environment", "AUTOSHARD_TEST", timeout_seconds=60) == "yes"


def test_what_a_child_prints_does_not_disturb_its_answer():
    with Child() as child:
        assert child.call(f"{HERE}:_print_much", None, timeout_seconds=60) == "printed"


def test_a_child_that_dies_is_one_line_with_signal_and_stage_and_its_last_words():
    with Child() as child:
        with pytest.raises(ChildError) as caught:
            child.call(f"{HERE}:_die", signal.SIGABRT, timeout_seconds=60)
        assert (
            str(caught.value) == "the child process died with signal 6 (SIGABRT) in stage 'dying'"
        )
        assert "last words" in caught.value.__notes__[0]
        with pytest.raises(ChildError, match="exited with status 3 in stage 'import'"):
            child.call(f"{HERE}:_leave", 3, timeout_seconds=60)
        with pytest.raises(ChildError, match="SIGKILL.* in stage 'dying'; the machine may be out"):
            child.call(f"{HERE}:_die", signal.SIGKILL, timeout_seconds=60)
        # The next call starts another child.
        assert child.call(f"{HERE}:_double", 1, timeout_seconds=60) == 2


def test_a_child_past_its_time_is_killed_with_what_it_started(tmp_path):
    note = tmp_path / "pids"
    with Child() as child:
        with pytest.raises(ChildTimeoutError) as caught:
            child.call(f"{HERE}:_double", 1, timeout_seconds=60)
            child.call(f"{HERE}:_hang", str(note), timeout_seconds=2)
        assert str(caught.value) == (
            "the child process ran past its limit of 2 s in stage 'hanging' and was stopped"
        )
    processes = [int(text) for text in note.read_text().split()]
    assert _wait_until(lambda: not any(_alive(process) for process in processes))


def test_a_child_that_eats_memory_is_stopped():
    with (
        Child(memory_limit_bytes=200 << 20) as child,
        pytest.raises(ChildError, match="MiB of memory in stage 'eating', more than its limit"),
    ):
        child.call(f"{HERE}:_eat", 400 << 20, timeout_seconds=60)


def test_an_exception_of_ours_keeps_its_class_and_text_and_the_child_lives():
    with Child() as child:
        with pytest.raises(UnknownNameError, match="unknown model 'gema'; did you mean gemma?"):
            child.call(f"{HERE}:_raise_ours", None, timeout_seconds=60)
        before = child.call(f"{HERE}:_process_id", None, timeout_seconds=60)
        with pytest.raises(XlaError) as caught:
            child.call(f"{HERE}:_raise_another", None, timeout_seconds=60)
        assert "\n" not in str(caught.value)
        assert "KeyError in stage 'import'" in str(caught.value)
        assert "_raise_another" in caught.value.__notes__[0]
        assert child.call(f"{HERE}:_process_id", None, timeout_seconds=60) == before


def test_a_child_killed_while_it_starts_does_nothing(tmp_path):
    note = tmp_path / "pids"
    with Child() as child:
        child.kill()
        with pytest.raises(ChildError, match="stopped before it began"):
            child.call(f"{HERE}:_hang", str(note), timeout_seconds=60)
    assert not note.exists()


def test_a_killed_child_ends_the_call_of_another_thread(tmp_path):
    note = tmp_path / "pids"
    with Child() as child, ThreadPoolExecutor(1) as threads:
        call = threads.submit(child.call, f"{HERE}:_hang", str(note), timeout_seconds=60)
        assert _wait_until(note.exists)
        child.kill()
        with pytest.raises(ChildError, match="SIGKILL"):
            call.result()


def _parent_of_a_hanging_child(note):
    """Run as a program: a parent that waits for a child that hangs."""
    return (
        "import signal, sys; sys.path[:0] = [sys.argv[1]]\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's & ignores it\n"
        "from autoshard.processes.child import Child\n"
        "with Child() as child:\n"
        f"    child.call('{HERE}:_hang', {note!r}, timeout_seconds=60)\n"
    )


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_left_of_a_child_when_its_parent_ends(how, tmp_path):
    note = tmp_path / "pids"
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    here = str(Path(__file__).parent)
    program = _parent_of_a_hanging_child(str(note))
    with subprocess.Popen(
        [sys.executable, "-c", program, here],
        stderr=subprocess.DEVNULL,
        env={**os.environ, "TMPDIR": str(temporary)},
    ) as parent:
        assert _wait_until(lambda: note.exists() and len(note.read_text().split()) == 2)
        parent.send_signal(how)
        parent.wait(20)
    processes = [int(text) for text in note.read_text().split()]
    assert _wait_until(lambda: not any(_alive(process) for process in processes))
    assert not any(temporary.iterdir())


def test_the_environment_of_a_target_sets_devices_and_keeps_the_callers_flags(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_some_flag=1")
    environment = child_environment(parse_target("cpu:6"))
    assert environment["XLA_FLAGS"] == (
        "--xla_some_flag=1 --xla_force_host_platform_device_count=6"
    )


@pytest.mark.parametrize(
    ("target", "extra"), [("tpu:v5e:2x4", "tpu"), ("gpu:h100-sxm:8", "cuda12")]
)
def test_without_the_compiler_the_error_has_the_pip_command(monkeypatch, target, extra):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(XlaError, match=rf'pip install "jax\[{extra}\]"'):
        child_environment(parse_target(target))
