"""A supervisor leaves no process behind, however its children hide."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from contract.errors import DeadlineError, RoundError
from trunkline.orphans import LOOK_S, Orphans
from trunkline.ports import reserve_port
from trunkline.processes import MARKER, Daemon, Supervisor, _adopt_orphans

SLEEPER = "import time; time.sleep(120)"
STUBBORN = (
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(120)"
)
# A grandchild in a session of its own whose parent ends at once: it is re-parented and only the marker names it.
ORPHANING = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {SLEEPER!r}], start_new_session=True)"
# A child that dropped its environment but stayed in the session.
UNMARKED = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {SLEEPER!r}], env={{}})"


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def until(condition: object, limit_s: float = 10) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


@pytest.mark.parametrize("code", [SLEEPER, ORPHANING, UNMARKED], ids=["child", "orphan", "unmarked"])
def test_leaving_the_block_ends_every_descendant(tmp_path: Path, code: str) -> None:
    with Supervisor(tmp_path) as supervisor:
        daemon = supervisor.start("worker", python(code))
        if code is not SLEEPER:
            until(lambda: not daemon.alive())
        until(lambda: len(supervisor.family()) == 1)
        survivors = [process.pid for process in supervisor.family()]
    assert not any(psutil.pid_exists(pid) for pid in survivors), "something is left, be it a zombie"
    assert supervisor.family() == []


def test_an_orphan_that_ends_is_gone_while_the_block_goes_on(tmp_path: Path) -> None:
    child = "import time; time.sleep(4)"
    code = f"import subprocess, sys, time; print(subprocess.Popen([sys.executable, '-c', {child!r}]).pid, flush=True); "
    with Supervisor(tmp_path) as supervisor:
        daemon = supervisor.start("parent", python(code + "time.sleep(2)"))
        until(lambda: daemon.last_lines().isdecimal())
        orphan = int(daemon.last_lines())
        until(lambda: not daemon.alive())
        assert psutil.Process(orphan).ppid() == os.getpid(), "it was adopted"
        until(lambda: not psutil.pid_exists(orphan))
        ended = subprocess.Popen(python("import sys; sys.exit(7)"))
        time.sleep(2 * LOOK_S)
        assert ended.wait() == 7, "what was started here is its waiter's"


def test_an_orphan_is_reaped_that_a_look_missed_as_its_parent_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """psutil lists nobody below a process that ends between its reading of all parents and its looking at each."""
    child = "import sys; sys.stdin.read()"
    code = f"import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', {child!r}]).pid, flush=True); "
    _adopt_orphans()
    parent = subprocess.Popen(
        python(code + "sys.stdin.readline()"), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    orphan, orphans = int(parent.stdout.readline()), Orphans()
    orphans.look()
    with monkeypatch.context() as patch:
        patch.setattr(psutil.Process, "children", lambda process, recursive: [])
        orphans.look()
    parent.kill()
    parent.communicate()
    until(lambda: psutil.Process(orphan).status() == psutil.STATUS_ZOMBIE)
    orphans.look()
    assert not psutil.pid_exists(orphan)


def test_a_process_that_ignores_sigterm_is_killed(tmp_path: Path) -> None:
    with Supervisor(tmp_path, grace_s=0.3) as supervisor:
        daemon = supervisor.start("stubborn", python(STUBBORN))
        until(lambda: "up" in daemon.last_lines())
    assert daemon.process.returncode == -signal.SIGKILL


@pytest.mark.parametrize("code", [STUBBORN, "print('up', flush=True)"], ids=["stubborn", "ended"])
def test_a_process_that_is_ended_is_reaped_and_forgotten_and_the_others_go_on(tmp_path: Path, code: str) -> None:
    with Supervisor(tmp_path, grace_s=0.3) as supervisor:
        kept, gone = supervisor.start("kept", python(SLEEPER)), supervisor.start("gone", python(code))
        until(lambda: "up" in gone.last_lines())
        supervisor.end(gone)
        assert not psutil.pid_exists(gone.process.pid), "something is left, be it a zombie"
        assert supervisor.daemons == [kept]
        assert kept.alive()
        assert gone.last_lines() == "up"


def test_new_lines_are_whole_and_what_was_told_is_not_read_again(tmp_path: Path) -> None:
    daemon = Daemon("talker", subprocess.Popen(python("")), tmp_path / "talker.log")
    daemon.process.wait()
    told, rest = "einß\nzwei\r\n".encode() + b"\xff\n", "dreiß".encode()
    daemon.log_path.write_bytes(told + rest[:-1])  # in the middle of a letter
    assert daemon.new_lines() == ["einß", "zwei", "\ufffd"]
    assert daemon.new_lines() == []
    daemon.log_path.write_bytes(b"?" * len(told) + rest + b"\n")
    assert daemon.new_lines() == ["dreiß"], "whatever stands before it by now"


def test_two_supervisors_do_not_touch_each_other(tmp_path: Path) -> None:
    with Supervisor(tmp_path / "one") as one:
        kept = one.start("kept", python(SLEEPER))
        with Supervisor(tmp_path / "two") as two:
            two.start("gone", python(SLEEPER))
        assert kept.alive()


def test_a_child_that_dies_is_reported_with_its_last_words(tmp_path: Path) -> None:
    with Supervisor(tmp_path) as supervisor:
        daemon = supervisor.start("trunk", python("import sys; sys.exit('error: no such model')"))
        with pytest.raises(RoundError, match="trunk ended with code 1: no such model"):
            supervisor.wait_for(lambda: False, daemon, "the trunk", limit_s=10)


def test_a_child_that_is_never_ready_is_given_up(tmp_path: Path) -> None:
    with Supervisor(tmp_path) as supervisor:
        daemon = supervisor.start("slow", python(SLEEPER))
        with pytest.raises(DeadlineError, match="the slow one was not ready within 0 s"):
            supervisor.wait_for(lambda: False, daemon, "the slow one", limit_s=0.1)


ENDINGS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL]


@pytest.mark.parametrize("number", ENDINGS)
def test_a_signalled_supervisor_takes_its_orphans_along(tmp_path: Path, number: signal.Signals) -> None:
    code = f"""
import signal, time
from pathlib import Path
from trunkline.processes import Supervisor, ending_signals_interrupt
if {number:d} != signal.SIGKILL:
    signal.signal({number:d}, signal.SIG_DFL)  # be the tests themselves run under nohup
with ending_signals_interrupt(), Supervisor(Path({str(tmp_path)!r})) as supervisor:
    supervisor.start("orphan", [{sys.executable!r}, "-c", {ORPHANING!r}])
    supervisor.start("child", [{sys.executable!r}, "-c", {SLEEPER!r}])
    print(supervisor.mark, flush=True)
    time.sleep(60)
"""
    process = subprocess.Popen(python(code), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout is not None
    mark = process.stdout.readline().strip()
    until(lambda: len(marked(mark)) == 2)
    process.send_signal(number)
    assert process.wait(20) != 0
    until(lambda: marked(mark) == [], limit_s=20 if number == signal.SIGKILL else 1)


def test_what_a_killed_supervisor_leaves_is_killed_at_once_and_not_asked_to_end(tmp_path: Path) -> None:
    asked = tmp_path / "asked"
    child = f"""
import signal, time
from pathlib import Path
signal.signal(signal.SIGTERM, lambda number, frame: Path({str(asked)!r}).touch())
print("ready", flush=True)
while True:
    time.sleep(1)
"""
    code = f"""
import time
from pathlib import Path
from trunkline.processes import Supervisor
with Supervisor(Path({str(tmp_path)!r})) as supervisor:
    child = supervisor.start("child", [{sys.executable!r}, "-c", {child!r}])
    supervisor.wait_for(lambda: child.last_lines() == "ready", child, "the child", 30)
    print(supervisor.mark, flush=True)
    time.sleep(60)
"""
    process = subprocess.Popen(python(code), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout is not None
    mark = process.stdout.readline().strip()
    assert len(marked(mark)) == 1
    process.kill()
    process.wait(20)
    until(lambda: marked(mark) == [], limit_s=20)
    assert not asked.exists()


def test_a_signal_that_was_ignored_at_the_start_stays_ignored() -> None:
    code = """
import os, signal
from trunkline.processes import ending_signals_interrupt, ignoring_signals
signal.signal(signal.SIGHUP, signal.SIG_IGN)
with ending_signals_interrupt():
    with ignoring_signals():
        pass
    os.kill(os.getpid(), signal.SIGHUP)
    assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
print("alive", signal.getsignal(signal.SIGHUP) is signal.SIG_IGN)
"""
    done = subprocess.run(python(code), capture_output=True, text=True, timeout=30, check=False)
    assert done.stdout == "alive True\n", done.stderr


def marked(mark: str) -> list[int]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARKER) == mark and process.status() != "zombie":
                found.append(process.pid)
        except psutil.Error:
            continue
    return found


def test_a_reserved_port_is_not_given_to_another_process(monkeypatch: pytest.MonkeyPatch) -> None:
    port = reserve_port()
    code = (
        "import sys; from trunkline import ports; "
        f"ports.FIRST_PORT = ports.LAST_PORT = {port}\n"
        "try: ports.reserve_port()\n"
        "except Exception as error: sys.exit(str(error))"
    )
    answer = subprocess.run(python(code), capture_output=True, text=True, env=dict(os.environ), timeout=30)
    assert answer.returncode == 1
    assert "no free port found" in answer.stderr
