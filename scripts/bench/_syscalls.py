"""A child process whose file-changing system calls are counted, and one of them made to kill it or to fail.

Linux hands each such call to the parent before it happens (seccomp's user notification), whoever makes it: Python,
Rust, C++ or a thread of any of them. Nothing is compiled, and no right of root's is needed.
"""

import array
import ctypes
import errno
import fcntl
import os
import platform
import select
import signal
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

# name: (number on x86_64, on aarch64, what says which file). `fd` and `path` are places of an argument; `at` is a
# descriptor of a folder with a path after it. Of calls with two files it is the one that changes.
CALLS = {
    "open": (2, None, "path 0"), "creat": (85, None, "path 0"), "openat": (257, 56, "at 0"),
    "openat2": (437, 437, "at 0"), "write": (1, 64, "fd 0"), "pwrite64": (18, 68, "fd 0"),
    "writev": (20, 66, "fd 0"), "pwritev": (296, 70, "fd 0"), "pwritev2": (328, 287, "fd 0"),
    "rename": (82, None, "path 1"), "renameat": (264, 38, "at 2"), "renameat2": (316, 276, "at 2"),
    "unlink": (87, None, "path 0"), "unlinkat": (263, 35, "at 0"), "rmdir": (84, None, "path 0"),
    "mkdir": (83, None, "path 0"), "mkdirat": (258, 34, "at 0"), "truncate": (76, 45, "path 0"),
    "ftruncate": (77, 46, "fd 0"), "fallocate": (285, 47, "fd 0"), "fsync": (74, 82, "fd 0"),
    "fdatasync": (75, 83, "fd 0"), "sync_file_range": (277, 84, "fd 0"), "link": (86, None, "path 1"),
    "linkat": (265, 37, "at 2"), "symlink": (88, None, "path 1"), "symlinkat": (266, 36, "at 1"),
    "sendfile": (40, 71, "fd 0"), "copy_file_range": (326, 285, "fd 2"), "splice": (275, 76, "fd 2"),
    "chmod": (90, None, "path 0"), "fchmod": (91, 52, "fd 0"), "fchmodat": (268, 53, "at 0"),
    "mmap": (9, 222, "fd 4"),
}  # fmt: skip
# On a disk that is full these fail; names can still be changed and removed.
TAKE_SPACE = {
    "open", "creat", "openat", "openat2", "write", "pwrite64", "writev", "pwritev", "pwritev2", "mkdir",
    "mkdirat", "fallocate", "link", "linkat", "symlink", "symlinkat", "sendfile", "copy_file_range", "splice",
}  # fmt: skip
OPENS = {"open": 1, "openat": 2}  # the place of their flags
OPENS_TO_CHANGE = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
SHARED_AND_WRITABLE = 1  # MAP_SHARED, and PROT_WRITE is 2

ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
RECEIVE, SEND = 0xC0502100, 0xC0182101  # SECCOMP_IOCTL_NOTIF_RECV and _SEND
GO_ON = 1  # SECCOMP_USER_NOTIF_FLAG_CONTINUE
AT_FDCWD = -100


@dataclass(frozen=True)
class Fault:
    """What happens at the k-th call (from 1) that changes a file."""

    at: int
    kill: bool = False
    error: int = 0  # errno of the call
    stays: bool = False  # later calls that take space fail too, as on a full disk

    def hits(self, count: int, name: str) -> bool:
        if self.stays:
            return count >= self.at and name in TAKE_SPACE
        return count == self.at


@dataclass
class Outcome:
    """How a child ended: its exit code (negative: the signal), and the calls that it made below the watched folder."""

    code: int = 0
    calls: list[tuple[str, str]] = field(default_factory=list)  # name, and path from the watched folder
    mapped: set[str] = field(default_factory=set)  # files mapped to be written: such writes make no call
    outside: set[str] = field(default_factory=set)  # files changed elsewhere


def is_possible() -> bool:
    """Whether this system can count a child's calls: Linux 5.5 or newer on x86_64 or aarch64, seccomp allowed."""
    if platform.system() != "Linux" or platform.machine() not in ARCHITECTURES:
        return False
    return run_child(lambda: 0, Path("/"), None).code == 0


def run_child(body: Callable[[], int], watched: Path, fault: Fault | None, timeout_s: float = 600) -> Outcome:
    """Fork; `body` runs in the child and returns its exit code. A child that takes too long is killed."""
    ours, theirs = socket.socketpair()
    child = os.fork()
    if child == 0:
        try:
            os.setsid()
            ours.close()
            listener = _listen()
            socket.send_fds(theirs, [b"x"], [listener])
            os.close(listener)
            theirs.close()
            code = body()
        except BaseException:
            import traceback

            traceback.print_exc()
            code = 125
        finally:
            os._exit(code)
    theirs.close()
    outcome = Outcome()
    with ours:
        descriptors = socket.recv_fds(ours, 1, 1)[1]
    if descriptors:
        _supervise(descriptors[0], child, watched, fault, outcome, timeout_s)
        os.close(descriptors[0])
    outcome.code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return outcome


def _supervise(
    listener: int, child: int, watched: Path, fault: Fault | None, outcome: Outcome, timeout_s: float
) -> None:
    number_of, _ = ARCHITECTURES[platform.machine()]
    names = {entry[number_of]: (name, entry[2]) for name, entry in CALLS.items()}
    poll = select.poll()
    poll.register(listener, select.POLLIN)
    is_dead = False
    while True:
        events = poll.poll(timeout_s * 1000)
        if not events:
            os.killpg(child, signal.SIGKILL)
            continue
        if not events[0][1] & select.POLLIN:
            return  # no process is left
        notice = array.array("B", bytes(80))
        try:
            fcntl.ioctl(listener, RECEIVE, notice)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.EINTR):
                continue  # the caller was killed meanwhile
            raise
        identity, process, _, number, _, _ = struct.unpack_from("QIIiIQ", notice)
        arguments = struct.unpack_from("6Q", notice, 32)
        name, where = names[number]
        answer = 0
        path = _path(process, where, arguments)
        if path is not None and not is_dead:
            answer = _count(name, path, watched, fault, outcome)
        if answer < 0:
            is_dead = True
            os.killpg(child, signal.SIGKILL)
            continue
        response = struct.pack("QqiI", identity, 0, -answer, 0 if answer else GO_ON)
        try:
            fcntl.ioctl(listener, SEND, response)
        except OSError as error:
            if error.errno != errno.ENOENT:
                raise


def _count(name: str, path: str, watched: Path, fault: Fault | None, outcome: Outcome) -> int:
    """0 to let the call happen, an errno to fail it, -1 to kill."""
    if not path.startswith(f"{watched}/") and path != str(watched):
        if path.startswith("/") and not path.startswith(("/dev/", "/proc/")) and name != "mmap":
            outcome.outside.add(path)
        return 0
    short = path[len(str(watched)) + 1 :]
    if name == "mmap":
        outcome.mapped.add(short)
        return 0
    outcome.calls.append((name, short))
    if fault is None or not fault.hits(len(outcome.calls), name):
        return 0
    return -1 if fault.kill else fault.error


def _path(process: int, where: str, arguments: tuple[int, ...]) -> str | None:
    """The file of a call, absolute; None where there is none, such as for a pipe."""
    kind, place = where.split()
    first = arguments[int(place)]
    try:
        if kind == "fd":
            found = os.readlink(f"/proc/{process}/fd/{ctypes.c_int(first).value}")
            return found.removesuffix(" (deleted)") if found.startswith("/") else None
        folder = AT_FDCWD if kind == "path" else ctypes.c_int(first).value
        text = os.fsdecode(_text(process, first if kind == "path" else arguments[int(place) + 1]))
        home = f"/proc/{process}/" + ("cwd" if folder == AT_FDCWD else f"fd/{folder}")
        return os.path.normpath(os.path.join(os.readlink(home), text))
    except OSError:
        return None


def _text(process: int, address: int) -> bytes:
    with open(f"/proc/{process}/mem", "rb", buffering=0) as memory:
        memory.seek(address)
        return memory.read(4096).split(b"\0", 1)[0]


# --- the filter ---


def _listen() -> int:
    """From now on this process and its children have their calls answered by who holds the descriptor returned."""
    libc = ctypes.CDLL(None, use_errno=True)
    code = b"".join(struct.pack("HBBI", *line) for line in _program())
    room = ctypes.create_string_buffer(code, len(code))
    program = struct.pack("HxxxxxxQ", len(code) // 8, ctypes.addressof(room))
    libc.prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS, without which only root may
    number = {"x86_64": 317, "aarch64": 277}[platform.machine()]
    # SECCOMP_SET_MODE_FILTER with SECCOMP_FILTER_FLAG_NEW_LISTENER
    listener = libc.syscall(number, 1, 8, ctypes.create_string_buffer(program, len(program)))
    if listener < 0:
        raise OSError(ctypes.get_errno(), "seccomp")
    return listener


def _program() -> list[tuple[int, int, int, int]]:
    """The filter: (instruction, lines to skip if so, if not, value). Only calls that can change a file stop."""
    load, equal, any_bit, answer = 0x20, 0x15, 0x45, 0x06
    allow, stop = 0x7FFF0000, 0x7FC00000
    number_of, architecture = ARCHITECTURES[platform.machine()]

    def argument(place: int) -> tuple[int, int, int, int]:
        return (load, 0, 0, 16 + 8 * place)

    lines = [(load, 0, 0, 4), (equal, 1, 0, architecture), (answer, 0, 0, allow), (load, 0, 0, 0)]
    for name, entry in CALLS.items():
        number = entry[number_of]
        if number is None:
            continue
        if name in OPENS:
            lines += [
                (equal, 0, 4, number), argument(OPENS[name]), (any_bit, 0, 1, OPENS_TO_CHANGE),
                (answer, 0, 0, stop), (answer, 0, 0, allow),
            ]  # fmt: skip
        elif name == "mmap":
            lines += [
                (equal, 0, 6, number), argument(2), (any_bit, 0, 3, 2), argument(3),
                (any_bit, 0, 1, SHARED_AND_WRITABLE), (answer, 0, 0, stop), (answer, 0, 0, allow),
            ]  # fmt: skip
        else:
            lines += [(equal, 0, 1, number), (answer, 0, 0, stop)]
    return [*lines, (answer, 0, 0, allow)]
