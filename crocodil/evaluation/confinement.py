"""The inner side of `sandbox`: raises walls around an untrusted program, runs it, and says how it ended.

It runs as a script in a fresh `python -I -S`, and so is one file that imports the standard library only. Its argument
is an empty folder; the job, one JSON object, comes in through stdin; a status and a detail go out through stdout.
"""

import ctypes
import json
import os
import platform
import resource
import signal
import struct
import sys
import time
import traceback
import types
from contextlib import suppress
from typing import Any, NoReturn

MAX_TASKS = 32
"""Processes and threads of a program at once."""
MAX_FILE_BYTES = 64 * 2**20
"""Size of a file; in a private file system, of all files together."""
MAX_OPEN_FILES = 256
MAX_DETAIL = 200
"""Characters of the detail."""

LIBRARIES = ("/usr", "/lib", "/lib64", sys.base_prefix)
DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")
FIRST_PRIVATE_UID = 1_000_000_000
"""Far above the ids that systems, containers and directory services hand out."""
NOBODY = 65534

CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC = 0x20000, 0x4000000, 0x8000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MS_PRIVATE = 2, 4, 4096, 16384, 1 << 18
MNT_DETACH, AT_FDCWD, AT_RECURSIVE, MOUNT_ATTR_RDONLY = 2, -100, 0x8000, 1
PR_SET_PDEATHSIG, PR_SET_KEEPCAPS, PR_SET_SECCOMP, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 8, 22, 36, 38
CAPABILITY_VERSION, CAP_DAC_OVERRIDE = 0x20080522, 1
MOUNT_SETATTR, LANDLOCK_CREATE_RULESET, LANDLOCK_ADD_RULE, LANDLOCK_RESTRICT_SELF = 442, 444, 445, 446
LANDLOCK_READ, LANDLOCK_DEVICE = 0b1101, 0b0110  # execute, read file, read directory; write file, read file

ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
"""Column in the tables below, and `AUDIT_ARCH_*` of <linux/audit.h>."""
Calls = dict[str, tuple[int, int | None]]
# Four entries a line: a column of fifty would hide the file.
# fmt: off
HOARDING_CALLS: Calls = {
    "memfd_create": (319, 279), "shmget": (29, 194), "semget": (64, 190), "msgget": (68, 186), "mq_open": (240, 180),
    "io_uring_setup": (425, 425), "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219),
}
"""Memory that no limit counts, and the keys of the user's session."""
OUTWARD_CALLS: Calls = {
    "socket": (41, 198), "kill": (62, 129), "tkill": (200, 130), "tgkill": (234, 131), "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240), "pidfd_send_signal": (424, 424), "truncate": (76, 45), "chmod": (90, None),
    "fchmod": (91, 52), "fchmodat": (268, 53), "fchmodat2": (452, 452), "chown": (92, None), "fchown": (93, 55),
    "lchown": (94, None), "fchownat": (260, 54), "utime": (132, None), "utimes": (235, None), "futimesat": (261, None),
    "utimensat": (280, 88), "setxattr": (188, 5), "lsetxattr": (189, 6), "fsetxattr": (190, 7),
    "setxattrat": (463, 463), "removexattr": (197, 14), "lremovexattr": (198, 15), "fremovexattr": (199, 16),
    "removexattrat": (466, 466),
}
"""What Landlock leaves open (truncate: before Linux 6.2)."""
LEAVING_CALLS: Calls = {"setsid": (112, 157), "setpgid": (109, 154)}
"""Ways out of the group of processes that is killed."""
# fmt: on
FORBIDDEN: dict[str, Calls] = {
    "namespaces": HOARDING_CALLS,
    "landlock": HOARDING_CALLS | LEAVING_CALLS | OUTWARD_CALLS,
    "none": HOARDING_CALLS | LEAVING_CALLS,
}


def main() -> None:
    """Runs the job of stdin and writes its outcome to stdout."""
    job = json.load(sys.stdin) | {"folder": sys.argv[1]}
    os.umask(0o022)
    try:
        if sys.platform == "linux":
            _call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL)
            with open("/proc/self/oom_score_adj", "w") as file:
                file.write("1000")  # should memory run out, this process goes before the one that trains
            job["uid"] = _private_uid()
        if job["level"] == "namespaces":
            _enter_namespaces(job["folder"], plain_user=job["uid"] is None)
            job["folder"] = "/program"
            init = os.fork()  # its end, however it comes, is the end of every process in the namespace
            if init:
                os.waitpid(init, 0)
                os._exit(0)
            _call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL)
        elif sys.platform == "linux":
            _call("prctl", PR_SET_CHILD_SUBREAPER, 1)
        status, detail = _supervise(job)
    except OSError as error:
        status, detail = "refused", str(error)
    os.write(1, f"{status} {detail}".encode(errors="replace"))
    os._exit(0)


def _supervise(job: dict[str, Any]) -> tuple[str, str]:
    """Runs the program in a child to its end or the deadline, and leaves no process of it."""
    reading, writing = os.pipe()
    program = os.fork()
    if program == 0:
        _become_program(job, writing)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the one signal of the program that an init would obey
    os.close(writing)
    ended = _wait(program, job["timeout"])
    if job["level"] != "namespaces":
        _kill_group(program)
    if ended is None:
        return "timeout", f"no end within {job['timeout']:g} s"
    return _outcome(ended, os.read(reading, 4096).decode(errors="replace"))


def _wait(program: int, timeout: float) -> int | None:
    """The wait status of the program, None if it outlives the timeout; orphans that come here are reaped, too."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == program:
            return status
        if pid == 0:
            time.sleep(0.005)
    return None


def _outcome(ended: int, said: str) -> tuple[str, str]:
    """Status and detail, from the wait status and the report: `.` once the walls stand, then `+` or what was raised."""
    if not said.startswith("."):
        return "refused", said or "the program's process did not begin"
    if os.WIFSIGNALED(ended):
        return "crashed", f"killed by signal {os.WTERMSIG(ended)} ({signal.strsignal(os.WTERMSIG(ended))})"
    code = os.WEXITSTATUS(ended)
    if said == ".+" and code == 0:
        return "passed", ""
    return "failed", said[1:] if said not in (".", ".+") else f"exit code {code}"


def _kill_group(program: int) -> None:
    """Kills what no namespace does: all of the program, which cannot leave its group and is orphaned to here."""
    with suppress(ProcessLookupError, PermissionError):  # where only the dead are left, on Linux and on macOS
        os.killpg(program, signal.SIGKILL)
    with suppress(ChildProcessError):
        while True:
            os.waitpid(-1, 0)


def _become_program(job: dict[str, Any], report: int) -> NoReturn:
    """Raises the walls that belong to a process, and runs the source in a fresh `__main__`."""
    try:
        os.setsid()
        _forget_files(report)
        _raise_walls(job)
    except (OSError, ValueError) as error:
        os.write(3, str(error).encode(errors="replace"))
        os._exit(1)
    os.write(3, b".")
    me, said = os.getpid(), "+"
    module = types.ModuleType("__main__")
    sys.modules["__main__"], sys.argv = module, ["program.py"]
    try:
        exec(compile(job["source"], "program.py", "exec", dont_inherit=True), module.__dict__)
    except BaseException as error:  # SystemExit, too: the tests may lie behind it
        said = traceback.format_exception_only(error)[-1].strip()[:MAX_DETAIL]
    if os.getpid() == me:  # a fork of the program comes this way, too
        os.write(3, said.encode(errors="replace"))
    sys.exit(said != "+")


def _forget_files(report: int) -> None:
    """Leaves the null device as files 0, 1 and 2 and the report as file 3, which no exec inherits; closes the rest."""
    null = os.open("/dev/null", os.O_RDWR)
    os.dup2(report, 3, inheritable=False)
    for fd in range(3):
        os.dup2(null, fd)
    os.closerange(4, resource.getrlimit(resource.RLIMIT_NOFILE)[0])


def _raise_walls(job: dict[str, Any]) -> None:
    os.chdir(job["folder"])
    os.environ["HOME"] = job["folder"]
    for name in ("LC_CTYPE", "MALLOC_ARENA_MAX"):  # the interpreter has set the former (PEP 538), the launch the latter
        os.environ.pop(name, None)
    _limit("RLIMIT_CORE", 0)
    _limit("RLIMIT_NOFILE", MAX_OPEN_FILES)
    _limit("RLIMIT_FSIZE", MAX_FILE_BYTES)
    _limit("RLIMIT_CPU", int(job["timeout"]) + 1)
    if sys.platform != "linux":
        return
    uid, level = job["uid"], job["level"]
    # The limit counts all tasks of a user in a namespace of users, and spares root.
    others = _num_other_tasks(os.getuid()) if uid is None and level != "namespaces" else 0
    _limit("RLIMIT_NPROC", MAX_TASKS + others)
    if uid is not None:
        _drop_root(job["folder"], uid)
    # So an interpreter below /root stays readable; what of the rest may be read or written, Landlock says.
    capabilities = 1 << CAP_DAC_OVERRIDE if uid is not None and level == "landlock" else 0
    _call("capset", struct.pack("Ii", CAPABILITY_VERSION, 0), struct.pack("6I", *[capabilities] * 2, *[0] * 4))
    _call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL)  # a change of the user clears it
    _call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    if level == "landlock":
        _landlock(job["folder"])
    _forbid(FORBIDDEN[level])
    os.stat(os.__file__)  # without its library, every program would fail
    _limit("RLIMIT_AS", job["memory_mib"] * 2**20)


def _limit(name: str, value: int) -> None:
    kind = getattr(resource, name)
    hard = resource.getrlimit(kind)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(kind, (value, value))


def _num_other_tasks(uid: int) -> int:
    """Processes and threads of a user, but for this process."""
    count = -1
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with suppress(OSError):  # it has ended meanwhile
            count += len(os.listdir(f"/proc/{pid}/task")) if os.stat(f"/proc/{pid}").st_uid == uid else 0
    return count


def _private_uid() -> int | None:
    """A user that no other process is; nobody where ids do not reach so far; None for who cannot become another."""
    with open("/proc/self/uid_map") as file:
        ranges = [(int(start), int(count)) for start, _, count in map(str.split, file)]
    candidates = (FIRST_PRIVATE_UID + os.getpid(), NOBODY) if os.geteuid() == 0 else ()
    return next((uid for uid in candidates if any(start <= uid < start + count for start, count in ranges)), None)


def _drop_root(folder: str, uid: int) -> None:
    os.chown(folder, uid, uid)
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    _call("prctl", PR_SET_KEEPCAPS, 1, 0, 0, 0)
    os.setresuid(uid, uid, uid)


def _enter_namespaces(folder: str, plain_user: bool) -> None:
    """Leaves every namespace; the new root is a private, bounded file system with the libraries in it, read-only."""
    uid, gid = os.geteuid(), os.getegid()
    spaces = CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS
    _call("unshare", spaces | CLONE_NEWUSER if plain_user else spaces)
    if plain_user:
        for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    _mount(None, "/", None, MS_REC | MS_PRIVATE)
    _mount("tmpfs", folder, "tmpfs", MS_NOSUID | MS_NODEV, f"size={MAX_FILE_BYTES},nr_inodes=4096,mode=755")
    os.chdir(folder)
    for path in filter(os.path.exists, (*LIBRARIES, *DEVICES)):
        _bind(path, folder + path)
    os.mkdir("program")
    _call("pivot_root", b".", b".")
    _call("umount2", b".", MNT_DETACH)


def _bind(path: str, target: str) -> None:
    is_folder = os.path.isdir(path)
    os.makedirs(target if is_folder else os.path.dirname(target), exist_ok=True)
    if not is_folder:
        os.mknod(target)
    _mount(path, target, None, MS_BIND | MS_REC)
    attributes = struct.pack("4Q", MOUNT_ATTR_RDONLY, 0, 0, 0)
    _call("syscall", MOUNT_SETATTR, AT_FDCWD, os.fsencode(target), AT_RECURSIVE, attributes, len(attributes))


def _mount(source: str | None, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
    texts = [None if text is None else os.fsencode(text) for text in (source, target, kind, options)]
    _call("mount", *texts[:3], ctypes.c_ulong(flags), texts[3])


def _landlock(folder: str) -> None:
    """Lets the process read the libraries, write below the folder, and touch no other file (Linux >= 5.13)."""
    version = _call("syscall", LANDLOCK_CREATE_RULESET, None, ctypes.c_size_t(0), 1)
    files = (1 << {1: 13, 2: 14, 3: 15, 4: 15}.get(version, 16)) - 1
    # TCP from version 4 on; abstract sockets and signals from version 6 on.
    sizes = 8 if version < 4 else 16 if version < 6 else 24
    ruleset = _call("syscall", LANDLOCK_CREATE_RULESET, struct.pack("3Q", files, 3, 3), ctypes.c_size_t(sizes), 0)
    rules = dict.fromkeys(LIBRARIES, LANDLOCK_READ) | dict.fromkeys(DEVICES, LANDLOCK_DEVICE) | {folder: files}
    for path in filter(os.path.exists, rules):
        fd = os.open(path, os.O_PATH)
        _call("syscall", LANDLOCK_ADD_RULE, ruleset, 1, struct.pack("=Qi", rules[path], fd), 0)
        os.close(fd)
    _call("syscall", LANDLOCK_RESTRICT_SELF, ruleset, 0)
    os.close(ruleset)


def _forbid(calls: Calls) -> None:
    """Lets system calls fail with EPERM, by a filter in classic BPF (seccomp(2)); knows x86_64 and aarch64."""
    if platform.machine() not in ARCHITECTURES:
        raise OSError(f"no table of system calls for {platform.machine()}")
    column, architecture = ARCHITECTURES[platform.machine()]
    numbers = [number for pair in calls.values() if (number := pair[column]) is not None]
    load, equal, at_least, answer = 0x20, 0x15, 0x35, 0x06
    program = [(load, 0, 0, 4), (equal, 1, 0, architecture), (answer, 0, 0, 0x80000000), (load, 0, 0, 0)]
    program += [(at_least, len(numbers) + 1, 0, 0x40000000)]  # the second set of numbers of x86_64 (x32)
    program += [(equal, len(numbers) - i, 0, number) for i, number in enumerate(numbers)]
    program += [(answer, 0, 0, 0x7FFF0000), (answer, 0, 0, 0x00050001)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in program))
    _call("prctl", PR_SET_SECCOMP, 2, struct.pack("HP", len(program), ctypes.addressof(code)), 0, 0)


def _call(name: str, *arguments: Any) -> int:
    """A function of the C library or, as `syscall`, of the kernel; raises OSError if it answers -1."""
    result = int(getattr(LIBC, name)(*arguments))
    if result == -1:
        errno = ctypes.get_errno()
        raise OSError(errno, os.strerror(errno), f"{name} {arguments[0]}")
    return result


LIBC: Any = ctypes.CDLL(None, use_errno=True)

if __name__ == "__main__":
    main()
