"""Runs a Python program that nobody has read, and says how it ended."""

import functools
import json
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast, get_args

Level = Literal["namespaces", "landlock", "none"]
Status = Literal["passed", "failed", "timeout", "crashed"]

_CONFINEMENT = Path(__file__).with_name("confinement.py")
_GRACE = 20.0
"""Seconds beyond the timeout after which the sandbox itself is killed."""
_PROBE = "import random, tempfile, threading\ntempfile.TemporaryFile()\nthreading.Thread(target=int).start()"


@dataclass(frozen=True)
class Outcome:
    """How a program ended.

    Attributes:
        status: `passed` if it ran to the end of its text and left with exit code 0; `failed` if it raised, did not
            compile, or left before its end (`sys.exit(0)`, too); `timeout` if it outlived its time; `crashed` if a
            signal killed it.
        detail: the last line of the traceback, or the exit code or signal; at most 200 characters.
    """

    status: Status
    detail: str = ""


def run_program(
    source: str, *, timeout: float = 10.0, memory_mib: int = 512, allow_unconfined: bool = False
) -> Outcome:
    """Runs a program in a fresh interpreter behind the strongest walls that stand on this machine (`confinement`).

    The interpreter is this one under `-I -S`: the program sees the standard library and no installed package, whose
    .pth files could run code of their own. stdin is empty, stdout and stderr lead nowhere, the environment is PATH and
    HOME, nothing of this process is inherited. The program works in an empty folder, which is gone when this returns,
    as is every process that it started, daemons included.

    Behind all walls a process has `memory_mib` of address space, 64 MiB a file, 256 open files and a second of CPU
    more than `timeout`, and a program has 32 processes and threads at once; so it may take 32 times `memory_mib`.
    Should the machine run out of memory, the kernel ends the program first.

    - `namespaces` (Linux >= 5.12, if the kernel lets this user make namespaces, or root): the program sees a file
      system of 64 MiB in memory with the standard library and /usr, read-only, and no other file, no process that is
      not its own, and no network.
    - `landlock` (Linux >= 5.13): it may open the library, /usr and its folder, and nothing else. It may neither make
      sockets nor send signals, even to its own processes, nor change the owner, mode or times of a file. It can fill
      the disk with many files until its time is up, and look up which files exist. If this process is killed, a
      child of the program may outlive it.
    - `none` (with `allow_unconfined` only): limits and the timeout. It may read, write and send what its user may (a
      user of its own, if this one is root). On macOS memory and processes have no bound, and a daemon survives.

    The first two need x86_64 or aarch64. They hold programs that go astray, as a language model writes them. One that
    attacks the kernel may get out, and one that sets out to look passed will: its tests run in the same interpreter.

    Args:
        source: the text of the program.
        timeout: seconds, in (0, 86400].
        memory_mib: MiB of address space of a process, in 1 ... 2^20; the interpreter takes some 16 of them.
        allow_unconfined: run it without walls where there are none.

    Returns:
        How it ended; nothing that the program does is raised here.

    Raises:
        ValueError: if `timeout` or `memory_mib` is out of range, or nothing here keeps a program from writing outside
            its folder and `allow_unconfined` is False.
        RuntimeError: if the walls could not be raised, though they stood before, or no level of them is possible.
    """
    if not (0 < timeout <= 86_400 and 1 <= memory_mib <= 2**20):
        raise ValueError(f"expected 0 < timeout <= 86400 and 1 <= memory_mib <= 2^20, got {timeout} and {memory_mib}")
    level, reasons = _strongest()
    if level == "none" and not allow_unconfined:
        raise ValueError(
            f"this machine cannot keep a program from writing outside its folder ({reasons}); "
            "use Linux with user namespaces or Landlock, or pass allow_unconfined=True to run it all the same"
        )
    return _launch(source, level, timeout, memory_mib)


def confinement() -> Level:
    """The strongest walls that stand on this machine, found by trial once in a process."""
    return _strongest()[0]


@functools.cache
def _strongest() -> tuple[Level, str]:
    """The level, and why there is no higher one."""
    reasons = []
    for level in ("namespaces", "landlock") if sys.platform == "linux" else ():
        try:
            outcome = _launch(_PROBE, cast(Level, level), timeout=10.0, memory_mib=512)
        except RuntimeError as error:
            reasons.append(f"{level}: {error}")
            continue
        if outcome.status == "passed":
            return cast(Level, level), "; ".join(reasons)
        reasons.append(f"{level}: {outcome.detail}")
    return "none", "; ".join(reasons) or f"{sys.platform} has neither namespaces nor Landlock"


def _launch(source: str, level: Level, timeout: float, memory_mib: int) -> Outcome:
    with tempfile.TemporaryDirectory(prefix="crocodil-", ignore_cleanup_errors=True) as folder:
        job = {"source": source, "level": level, "timeout": timeout, "memory_mib": memory_mib}
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", "-X", "utf8", _CONFINEMENT, folder],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=folder,
            # With an arena a thread, as glibc has it, the address space is used up by seven threads.
            env={"PATH": os.defpath, "HOME": folder, "MALLOC_ARENA_MAX": "1"},
            start_new_session=True,
        )
        try:
            said, complaint = process.communicate(json.dumps(job).encode(), timeout + _GRACE)
        except subprocess.TimeoutExpired:
            return Outcome("timeout", f"no end within {timeout:g} s")
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()
    status, _, detail = said.decode(errors="replace").partition(" ")
    if status in get_args(Status):
        return Outcome(cast(Status, status), detail)
    if said or complaint:
        raise RuntimeError(detail or complaint.decode(errors="replace").strip().splitlines()[-1])
    return Outcome("crashed", "the sandbox was killed with the program")
