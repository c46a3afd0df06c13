import ctypes
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from crocodil.evaluation import sandbox
from crocodil.evaluation.confinement import MAX_FILE_BYTES, MAX_TASKS
from crocodil.evaluation.sandbox import Level, Outcome, confinement, run_program


def has_namespaces() -> bool:
    unshare = ["unshare", *([] if os.geteuid() == 0 else ["--user"]), "--mount", "--net", "--pid", "--fork", "true"]
    return shutil.which("unshare") is not None and subprocess.run(unshare, capture_output=True).returncode == 0


def has_landlock() -> bool:
    version = ctypes.CDLL(None).syscall(444, None, ctypes.c_size_t(0), 1) if sys.platform == "linux" else 0
    return version >= 1 and platform.machine() in ("x86_64", "aarch64")


HAS = {"namespaces": has_namespaces(), "landlock": has_landlock()}
"""What the kernel grants, found without the sandbox: a wall that does not stand is an error, and no reason to skip."""


class Walls:
    """Runs programs behind walls of one level, and looks for what they leave behind."""

    def __init__(self, level: Level) -> None:
        self.level = level

    def run(self, source: str, timeout: float = 10.0, memory_mib: int = 512) -> Outcome:
        return sandbox._launch(source, self.level, timeout, memory_mib)

    def says(self, source: str, **limits: float) -> str:
        """What the program raises as Exception."""
        outcome = self.run(source, **limits)  # type: ignore[arg-type]
        assert outcome.status == "failed" and outcome.detail.startswith("Exception: "), outcome
        return outcome.detail.removeprefix("Exception: ")


@pytest.fixture(params=["namespaces", "landlock"])
def walls(request: pytest.FixtureRequest) -> Walls:
    if not HAS[request.param]:
        pytest.skip(f"no {request.param} here")
    return Walls(request.param)


def processes() -> list[int]:
    """Every process of this test's sandboxes: none of them has a command line of its own."""
    found = []
    for entry in filter(str.isdigit, os.listdir("/proc")):
        with suppress(OSError):
            if os.fsencode(tempfile.gettempdir()) in Path(f"/proc/{entry}/cmdline").read_bytes():
                found.append(int(entry))
    return found


@pytest.fixture(autouse=True)
def nothing_is_left(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No process and no folder of a program outlives it."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        monkeypatch.setattr(tempfile, "tempdir", folder)
        monkeypatch.setenv("TMPDIR", folder)
        yield
        assert processes() == [] and os.listdir(folder) == []


@pytest.fixture
def outside() -> Iterator[Path]:
    """A file that every user may write, in a folder that every user may write."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "sentinel")
        file.write_text("untouched")
        os.chmod(folder, 0o777)
        os.chmod(file, 0o666)
        yield file


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("x = 1", Outcome("passed")),
        ("import sqlite3, ssl, random, decimal\nassert decimal.Decimal(1) == 1", Outcome("passed")),
        ("assert 1 == 2, 'no'", Outcome("failed", "AssertionError: no")),
        ("def f(:", Outcome("failed", "SyntaxError: invalid syntax")),
        ("return 1", Outcome("failed", "SyntaxError: 'return' outside function")),
        ("x = " + "(" * 10**5 + ")" * 10**5, Outcome("failed", "SyntaxError: too many nested parentheses")),
        ("input()", Outcome("failed", "EOFError: EOF when reading a line")),
        ("import sys; sys.exit(0)", Outcome("failed", "SystemExit: 0")),
        ("import os; os._exit(0)", Outcome("failed", "exit code 0")),
        ("import atexit, os; atexit.register(os._exit, 3)", Outcome("failed", "exit code 3")),
        ("import os\nif os.fork():\n    os.wait()\n    os._exit(0)", Outcome("failed", "exit code 0")),
        ("import ctypes; ctypes.string_at(0)", Outcome("crashed", "killed by signal 11 (Segmentation fault)")),
        ("import torch", Outcome("failed", "ModuleNotFoundError: No module named 'torch'")),
        ("raise Exception('x' * 10**6)", Outcome("failed", "Exception: " + "x" * 189)),
        ("import os; os.write(3, b'+' * 60000)", Outcome("failed", "+" * 4095)),
    ],
)
def test_how_a_program_ends(walls: Walls, source: str, expected: Outcome) -> None:
    outcome = walls.run(source)
    assert (outcome.status, outcome.detail[:200]) == (expected.status, expected.detail[:200])


def test_the_program_is_main(walls: Walls) -> None:
    source = """
        import dataclasses, pickle, sys
        @dataclasses.dataclass
        class Point:
            x: "int"
        assert __name__ == "__main__" and pickle.loads(pickle.dumps(Point(3))) == Point(3)
        assert sys.argv == ["program.py"]
    """
    assert walls.run(source.replace("\n        ", "\n")).status == "passed"


@pytest.mark.parametrize(
    "source",
    [
        "while True: pass",
        "import signal, time\nfor i in {*signal.valid_signals()} - {9, 19}: signal.signal(i, print)\ntime.sleep(9)",
        "import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)",
        "import sys\nwhile True: print('x' * 10**6); print('x' * 10**6, file=sys.stderr)",
        "import threading, time\nthreading.Thread(target=time.sleep, args=(9,)).start()",
        "try:\n    while True: pass\nfinally:\n    while True: pass",
    ],
    ids=["loop", "deaf", "stopped", "output", "thread", "finally"],
)
def test_a_program_without_end(walls: Walls, source: str) -> None:
    started = time.monotonic()
    outcome = walls.run(source, timeout=0.3)
    if source.startswith("import os") and walls.level == "landlock":  # it may send no signal
        assert outcome.status == "failed"
    else:
        assert outcome == Outcome("timeout", "no end within 0.3 s")
    assert time.monotonic() - started < 3


def test_forks_are_counted(walls: Walls) -> None:
    source = """
        import os, time
        count = 0
        while count < 1000:
            try:
                child = os.fork()
            except OSError:
                raise Exception(count)
            if child == 0:
                time.sleep(9)
            count += 1
    """
    assert 8 <= int(walls.says(source.replace("\n        ", "\n"))) < MAX_TASKS


LEAVE = """
import os, time
def leave():
    try:
        os.setsid()
    except PermissionError:
        pass
"""
FORK_BOMB = f"""{LEAVE}
while True:
    try:
        os.fork()
        leave()
    except OSError:
        pass
"""
COMET = f"""{LEAVE}
if os.fork() == 0:
    while os.fork() == 0:
        leave()
    os._exit(0)
"""
DAEMON = f"""{LEAVE}
if os.fork() == 0:
    leave()
    if os.fork() == 0:
        os.chdir("/")
        time.sleep(60)
    os._exit(0)
os.wait()
"""


@pytest.mark.parametrize(
    ("source", "status"),
    [(FORK_BOMB, "timeout"), (COMET, "passed"), (DAEMON, "passed"), (DAEMON + "while True: pass", "timeout")],
    ids=["bomb", "comet", "daemon", "daemon and loop"],
)
def test_no_descendant_survives(walls: Walls, source: str, status: str) -> None:
    assert walls.run(source, timeout=0.5).status == status
    assert processes() == []


def test_threads_are_counted(walls: Walls) -> None:
    source = "import threading, time\nfor _ in range({}): threading.Thread(target=time.sleep, args=(.2,)).start()"
    assert walls.run(source.format(MAX_TASKS // 2)).status == "passed"
    assert walls.run(source.format(MAX_TASKS)) == Outcome("failed", "RuntimeError: can't start new thread")


@pytest.mark.parametrize("allocate", ["bytearray(2**20)", "mmap.mmap(-1, 2**20)", "'x' * 2**20"])
def test_memory_is_bounded(walls: Walls, allocate: str) -> None:
    source = f"""
        import mmap
        held = []
        try:
            while len(held) < 2000:
                held.append({allocate})
        except (MemoryError, OSError):
            pass
        count = len(held)
        del held
        raise Exception(count)
    """
    assert 64 < int(walls.says(source.replace("\n        ", "\n"), memory_mib=256)) < 256
    assert walls.run("x = bytearray(2**30)", memory_mib=256) == Outcome("failed", "MemoryError")


def test_no_memory_beside_the_address_space(walls: Walls) -> None:
    assert "Operation not permitted" in walls.run("import os; os.memfd_create('x')").detail


def test_files_are_bounded(walls: Walls) -> None:
    source = f"with open('x', 'wb') as file:\n    for _ in range(65): file.write(bytes({MAX_FILE_BYTES // 64}))"
    assert walls.run(source).status == "failed"
    if walls.level == "namespaces":
        source = f"for i in range(9): open(str(i), 'wb').write(bytes({MAX_FILE_BYTES // 8}))"
        assert walls.run(source) == Outcome("failed", "OSError: [Errno 28] No space left on device")
        assert walls.run("for i in range(9999): open(str(i), 'x').close()").status == "failed"
    assert walls.run("held = [open('x', 'w') for _ in range(300)]").detail.startswith("OSError: [Errno 24]")


def test_the_folder_is_its_own(walls: Walls) -> None:
    source = """
        import os, tempfile
        assert os.listdir() == [] and os.getcwd() == os.environ["HOME"]
        os.mkdir("a"); open("a/b", "w").write("x"); os.rename("a/b", "c"); assert open("c").read() == "x"
        with tempfile.TemporaryFile() as file: file.write(b"x")
        os.mkdir("d", 0)
    """
    assert walls.run(source.replace("\n        ", "\n")) == Outcome("passed")
    assert walls.run(source.replace("\n        ", "\n")) == Outcome("passed")


@pytest.mark.parametrize(
    "deed",
    [
        "open(path, 'w').write('changed')",
        "open(path, 'a').write('changed')",
        "os.truncate(path, 0)",
        "os.unlink(path)",
        "os.rename(path, path + '2')",
        "os.rename(path, 'mine')",
        "os.link(path, 'mine'); open('mine', 'w').write('changed')",
        "os.symlink(path, 'mine'); open('mine', 'w').write('changed')",
        "os.chmod(path, 0o600)",
        "os.utime(path, (1, 1))",
        "os.mkdir(path + '2')",
        "os.mkfifo(path + '2')",
        "os.setxattr(path, 'user.x', b'x')",
        "open(path)",
        "open('/..' + path)",
    ],
)
def test_nothing_outside_is_written_or_read(walls: Walls, outside: Path, deed: str) -> None:
    stat = outside.stat()
    assert walls.run(f"import os\npath = {str(outside)!r}\n{deed}").status == "failed"
    assert outside.read_text() == "untouched" and os.listdir(outside.parent) == ["sentinel"]
    after = outside.stat()
    assert (after.st_mode, after.st_mtime_ns, after.st_ctime_ns) == (stat.st_mode, stat.st_mtime_ns, stat.st_ctime_ns)


def test_the_library_is_read_only(walls: Walls) -> None:
    for deed in ("open(os.__file__, 'a')", "os.mkdir(os.__file__ + '_')", "os.chmod(os.__file__, 0o644)"):
        assert walls.run(f"import os\n{deed}").status == "failed"


def test_no_network(walls: Walls) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(type=socket.SOCK_DGRAM) as datagrams:
        datagrams.bind(("127.0.0.1", 0))
        server.settimeout(0.2)
        datagrams.settimeout(0.2)
        source = "import socket\nsocket.create_connection({!r}).send(b'x')"
        assert walls.run(source.format(server.getsockname())).status == "failed"
        source = "import socket\nsocket.socket(type=socket.SOCK_DGRAM).sendto(b'x', {!r})"
        assert walls.run(source.format(datagrams.getsockname())).status == "failed"
        with pytest.raises(TimeoutError):
            server.accept()
        with pytest.raises(TimeoutError):
            datagrams.recv(1)


def test_no_signal_leaves(walls: Walls) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as victim:
        walls.run(f"import os; os.kill({victim.pid}, 9)")
        walls.run("import os; os.kill(os.getppid(), 9)")
        walls.run("import os, time; os.kill(os.getppid(), 2); time.sleep(0.1)")
        time.sleep(0.05)
        assert victim.poll() is None
        victim.communicate(b"\n")
    assert victim.returncode == 0


def test_nothing_of_the_parent_leaks(walls: Walls, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "x")
    reading, writing = os.pipe()
    os.set_inheritable(reading, True)
    found = walls.says("import os; raise Exception(sorted(os.environ), os.path.exists('/proc/1/environ'))")
    assert found.startswith("(['HOME', 'PATH'], ")
    source = """
        import os
        found = []
        for fd in range(1000):
            try:
                os.fstat(fd)
                found.append(fd)
            except OSError:
                pass
        null = os.stat("/dev/null").st_rdev
        assert all(os.fstat(fd).st_rdev == null for fd in range(3))
        raise Exception(found)
    """
    assert walls.says(source.replace("\n        ", "\n")) == "[0, 1, 2, 3]"
    for file in (f"/proc/{os.getpid()}/environ", "/proc/self/environ", "/etc/passwd", __file__):
        assert walls.run(f"open({file!r})").status == "failed"
    os.close(reading)
    os.close(writing)


def test_a_killed_parent_takes_the_program_along(walls: Walls) -> None:
    script = "from crocodil.evaluation import sandbox\n"
    script += f"sandbox._launch('while True: pass', {walls.level!r}, timeout=60, memory_mib=512)"
    with subprocess.Popen([sys.executable, "-c", script]) as parent:
        _wait_until(lambda: len(processes()) == (3 if walls.level == "namespaces" else 2))
        time.sleep(0.1)  # the program has taken leave of root by then
        for pid in processes():  # the kernel would kill them first, should memory run out
            assert Path(f"/proc/{pid}/oom_score_adj").read_text() == "1000\n"
        parent.send_signal(signal.SIGKILL)
    _wait_until(lambda: not processes())
    for folder in Path(tempfile.gettempdir()).iterdir():  # nobody was left to remove it
        folder.rmdir()


def _wait_until(holds) -> None:  # type: ignore[no-untyped-def]
    deadline = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_hung_sandbox_is_killed_from_outside(walls: Walls, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "_GRACE", -59.7)
    assert walls.run("while True: pass", timeout=60).status == "timeout"
    _wait_until(lambda: not processes())


def test_a_strict_umask_is_no_obstacle(walls: Walls) -> None:
    old = os.umask(0o077)
    try:
        assert walls.run("import random; open('x', 'w')") == Outcome("passed")
    finally:
        os.umask(old)


PLAIN_USER = """
import ctypes, os
from crocodil.evaluation import confinement, sandbox
if os.geteuid() == 0:  # as a plain user in a namespace of users, to whom root's files belong
    confinement._call("unshare", confinement.CLONE_NEWUSER)
    for name, text in (("setgroups", "deny"), ("uid_map", "1000 0 1"), ("gid_map", "1000 0 1")):
        open(f"/proc/self/{name}", "w").write(text)
confinement._call("prctl", confinement.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
"""
NO_NAMESPACES = 'confinement._forbid({"unshare": (272, 97)})\n'
NO_LANDLOCK = 'confinement._forbid({"landlock_create_ruleset": (444, 444)})\n'


def as_plain_user(script: str) -> list[str]:
    """What a script prints that runs as a user without privileges, possibly in a poorer kernel."""
    done = subprocess.run([sys.executable, "-c", PLAIN_USER + script], capture_output=True, text=True)
    if os.geteuid() == 0 and not HAS["namespaces"]:
        pytest.skip("this root cannot become a plain user")
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


DEEDS = """
def tried(*deeds):
    print(sandbox.confinement(), *[sandbox.run_program(f"import os, socket, time\\n{deed}").status for deed in deeds])
"""


def test_namespaces_hold_a_plain_user(outside: Path) -> None:
    script = f"""{DEEDS}
tried("open(os.__file__, 'a')", "socket.sethostname('x')", "open({str(outside)!r}, 'a')")
tried("os.kill(1, 2); time.sleep(0.1)")
print(sandbox.run_program({DAEMON!r}).status)
"""
    if not HAS["namespaces"]:
        pytest.skip("no namespaces here")
    assert as_plain_user(script) == ["namespaces failed failed failed", "namespaces passed", "passed"]


def test_landlock_is_next_and_holds_a_plain_user(outside: Path) -> None:
    path = repr(str(outside))
    script = f"""{NO_NAMESPACES}{DEEDS}
tried("open({path}, 'a')", "open({path})", "os.truncate({path}, 3)", "os.chmod({path}, 0o600)")
tried("os.utime({path}, (1, 1))", "os.setxattr({path}, 'user.x', b'x')", "os.chown({path}, -1, os.getgid())")
tried("os.kill({os.getpid()}, 0)", "open(os.__file__, 'a')", "socket.socket()")
print(sandbox.run_program({DAEMON!r}).status)
"""
    if not HAS["landlock"]:
        pytest.skip("no Landlock here")
    assert as_plain_user(script) == [
        "landlock" + " failed" * 4,
        "landlock" + " failed" * 3,
        "landlock" + " failed" * 3,
        "passed",
    ]
    assert outside.read_text() == "untouched" and outside.stat().st_mode & 0o777 == 0o666


def test_the_strongest_walls_are_taken() -> None:
    assert confinement() == next((level for level, there in HAS.items() if there), "none")


def test_without_walls_nothing_runs_unasked() -> None:
    script = """
try:
    sandbox.run_program("x = 1")
except ValueError as error:
    print(error)
print(sandbox.run_program("x = 1", allow_unconfined=True).status)
print(sandbox.run_program("while True: pass", timeout=0.2, allow_unconfined=True).status)
"""
    said = as_plain_user(NO_NAMESPACES + NO_LANDLOCK + script)
    assert said[0].startswith("this machine cannot keep a program from writing outside its folder (namespaces: ")
    assert "landlock: " in said[0] and "allow_unconfined=True" in said[0]
    assert said[1:] == ["passed", "timeout"]


def test_a_program_that_could_import_nothing_is_not_run() -> None:
    """Without walls root becomes another user; for who cannot read the library, every program would fail."""
    if os.geteuid() != 0 or all(path.stat().st_mode & 1 for path in Path(os.__file__).parents):
        pytest.skip("another user can read the library")
    with pytest.raises(RuntimeError, match="Permission denied"):
        sandbox._launch("x = 1", "none", 10.0, 512)


@pytest.mark.parametrize(("timeout", "memory_mib"), [(0.0, 512), (float("nan"), 512), (float("inf"), 512), (1.0, 0)])
def test_limits_are_in_range(timeout: float, memory_mib: int) -> None:
    with pytest.raises(ValueError, match="expected 0 < timeout"):
        run_program("x = 1", timeout=timeout, memory_mib=memory_mib)
