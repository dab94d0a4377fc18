"""Running a piece of code in a process whose system calls on files can go wrong.

The process is traced with `ptrace(2)`, as strace does, so that the writes of C and Rust code count
as much as those of Python, and a process that is killed is killed by the kernel. A call that fails
is not made; one that is torn is made with half of its bytes. Works on Linux on x86-64.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import signal
import sys
import traceback
from collections.abc import Callable
from enum import Enum
from pathlib import Path

import attrs

SUPPORTED = sys.platform == "linux" and platform.machine() == "x86_64"

_AT_FDCWD = -100
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC

_TRACEME, _SYSCALL, _GETREGS, _SETREGS, _SETOPTIONS, _GET_SYSCALL_INFO = (
    0, 24, 12, 13, 0x4200, 0x420E,
)  # fmt: skip
_OPTIONS = 0x1 | 0x2 | 0x4 | 0x8 | 0x100000  # mark syscall stops, follow children, die together
_ENTRY, _EXIT = 1, 2
_PATIENCE = 120
"""Seconds until a process that hangs is ended."""
_WALL = 0x40000000


class How(Enum):
    """What happens at a call."""

    KILL = "killed before it"
    TEAR = "killed after half of its bytes"


Fault = How | int
"""What happens at a call: the process dies, or the call fails with an error number."""


@attrs.frozen
class _Kind:
    """A system call that changes files.

    Attributes:
        name: Its name.
        path: The arguments that are paths, each with the one for the folder it starts from.
        descriptor: The argument that is an open file.
        size: The argument that says how many bytes are written.
        flags: The argument with the flags of an open.
    """

    name: str
    path: tuple[tuple[int | None, int], ...] = ()
    descriptor: int | None = None
    size: int | None = None
    flags: int | None = None


_KINDS = {
    1: _Kind("write", descriptor=0, size=2),
    2: _Kind("open", path=((None, 0),), flags=1),
    18: _Kind("pwrite", descriptor=0, size=2),
    20: _Kind("writev", descriptor=0),
    40: _Kind("sendfile", descriptor=0, size=3),
    74: _Kind("fsync", descriptor=0),
    75: _Kind("fdatasync", descriptor=0),
    76: _Kind("truncate", path=((None, 0),)),
    77: _Kind("ftruncate", descriptor=0),
    82: _Kind("rename", path=((None, 0), (None, 1))),
    83: _Kind("mkdir", path=((None, 0),)),
    84: _Kind("rmdir", path=((None, 0),)),
    85: _Kind("creat", path=((None, 0),)),
    86: _Kind("link", path=((None, 0), (None, 1))),
    87: _Kind("unlink", path=((None, 0),)),
    88: _Kind("symlink", path=((None, 1),)),
    90: _Kind("chmod", path=((None, 0),)),
    91: _Kind("fchmod", descriptor=0),
    92: _Kind("chown", path=((None, 0),)),
    93: _Kind("fchown", descriptor=0),
    257: _Kind("openat", path=((0, 1),), flags=2),
    258: _Kind("mkdirat", path=((0, 1),)),
    260: _Kind("fchownat", path=((0, 1),)),
    263: _Kind("unlinkat", path=((0, 1),)),
    264: _Kind("renameat", path=((0, 1), (2, 3))),
    265: _Kind("linkat", path=((0, 1), (2, 3))),
    266: _Kind("symlinkat", path=((1, 2),)),
    268: _Kind("fchmodat", path=((0, 1),)),
    277: _Kind("sync_file_range", descriptor=0),
    280: _Kind("utimensat", path=((0, 1),)),
    285: _Kind("fallocate", descriptor=0),
    296: _Kind("pwritev", descriptor=0),
    316: _Kind("renameat2", path=((0, 1), (2, 3))),
    326: _Kind("copy_file_range", descriptor=2, size=4),
    328: _Kind("pwritev2", descriptor=0),
    437: _Kind("openat2", path=((0, 1),)),
    452: _Kind("fchmodat2", path=((0, 1),)),
}
"""By their numbers on x86-64. Memory that is mapped for writing is told by `Event.is_mapped`."""
_MMAP, _MAP_SHARED, _PROT_WRITE = 9, 0x01, 0x2


@attrs.frozen
class Event:
    """A call that changes a file.

    Attributes:
        name: The system call.
        paths: The files it is about, relative to the folder that is watched.
        size: How many bytes it writes; 0 if it does not write.
    """

    name: str
    paths: tuple[str, ...]
    size: int = 0

    @property
    def can_tear(self) -> bool:
        """Whether the call can be made for a part of its bytes."""
        return self.size > 1


@attrs.frozen
class Run:
    """How a traced process went.

    Attributes:
        events: The calls on the files of the folder, until the process was killed.
        status: As `os.waitstatus_to_exitcode` gives it: negative if a signal ended the process.
    """

    events: tuple[Event, ...]
    status: int

    @property
    def was_killed(self) -> bool:
        """Whether the process was killed."""
        return self.status == -signal.SIGKILL


Decide = Callable[[int, Event], Fault | None]
"""Is asked at each call, which it is told the number of, from 0 on, and says what goes wrong."""


def kill_at(number: int, how: How = How.KILL) -> Decide:
    """Have a process die at its call of a number."""
    return lambda found, _: how if found == number else None


def fail_from(number: int, error: int, *names: str) -> Decide:
    """Have calls fail from a number on, all of them or those of some names, as on a full disk."""
    return lambda found, event: (
        error if found >= number and (not names or event.name in names) else None
    )


def traced(work: Callable[[], object], folder: Path, decide: Decide = lambda *_: None) -> Run:
    """Run a piece of code in a forked process, and see to it that calls go wrong.

    Args:
        work: The code. Its result is lost; if it raises, the status is 1 and the error is printed.
        folder: Calls on files in this folder count, and on the folder itself; the others pass.
        decide: What goes wrong.
    """
    if not SUPPORTED:
        raise NotImplementedError("tracing works on Linux on x86-64 only")
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        _be_traced(work)
    return _Tracer(child, folder.resolve(), decide).follow()


def _be_traced(work: Callable[[], object]) -> None:
    """In the forked process: wait for the tracer, do the work, and end."""
    status = 1
    try:
        signal.alarm(_PATIENCE)
        os.setpgid(0, 0)
        _ptrace(_TRACEME, 0, 0, 0)
        os.kill(os.getpid(), signal.SIGSTOP)
        work()
        status = 0
    except BaseException:  # noqa: BLE001 - the process must not go on as its parent
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


_ptrace_of_libc = ctypes.CDLL(None, use_errno=True).ptrace if SUPPORTED else None


def _ptrace(request: int, process: int, address: int, data: object) -> int:
    """`ptrace(2)`."""
    assert _ptrace_of_libc is not None  # noqa: S101 - `traced` has made sure
    _ptrace_of_libc.restype = ctypes.c_long
    _ptrace_of_libc.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
    result: int = _ptrace_of_libc(request, process, address, data)
    if result == -1:
        number = ctypes.get_errno()
        raise OSError(number, f"ptrace {request:#x}: {os.strerror(number)}")
    return result


_NAMES = """
r15 r14 r13 r12 rbp rbx r11 r10 r9 r8 rax rcx rdx rsi rdi orig_rax rip cs eflags rsp ss fs_base
gs_base ds es fs gs
"""


class _Registers(ctypes.Structure):
    """`struct user_regs_struct` of x86-64."""

    _fields_ = tuple((name, ctypes.c_ulonglong) for name in _NAMES.split())


_ARGUMENTS = ("rdi", "rsi", "rdx", "r10", "r8", "r9")


class _Info(ctypes.Structure):
    """`struct ptrace_syscall_info`, as far as it is needed."""

    _fields_ = (
        ("op", ctypes.c_uint8),
        ("pad", ctypes.c_uint8 * 3),
        ("arch", ctypes.c_uint32),
        ("instruction_pointer", ctypes.c_uint64),
        ("stack_pointer", ctypes.c_uint64),
        ("number", ctypes.c_uint64),
        ("arguments", ctypes.c_uint64 * 6),
    )


@attrs.define
class _Tracer:
    """Follows a process and its threads from system call to system call."""

    child: int
    folder: Path
    decide: Decide
    events: list[Event] = attrs.field(factory=list)
    pending: dict[int, Fault] = attrs.field(factory=dict)
    """What is to happen when a thread's call returns."""

    def follow(self) -> Run:
        """Follow the process to its end."""
        os.waitpid(self.child, _WALL)
        _ptrace(_SETOPTIONS, self.child, 0, _OPTIONS)
        self._go_on(self.child, 0)
        while True:
            thread, status = os.waitpid(-self.child, _WALL)
            if os.WIFSTOPPED(status):
                self._stopped(thread, os.WSTOPSIG(status), is_event=bool(status >> 16))
            elif thread == self.child:
                return Run(tuple(self.events), os.waitstatus_to_exitcode(status))

    def _stopped(self, thread: int, number: int, *, is_event: bool) -> None:
        """Look at a thread that has stopped, and let it go on."""
        if number == signal.SIGTRAP | 0x80:
            self._at_call(thread)
            self._go_on(thread, 0)
        else:
            # A new thread stops with SIGSTOP, which is the tracer's and not the process's.
            ours = is_event or number in (signal.SIGTRAP, signal.SIGSTOP)
            self._go_on(thread, 0 if ours else number)

    def _go_on(self, thread: int, number: int) -> None:
        """Let a thread run to its next call, and give it a signal."""
        try:
            _ptrace(_SYSCALL, thread, 0, number)
        except OSError as error:
            if error.errno != errno.ESRCH:  # it was killed
                raise

    def _at_call(self, thread: int) -> None:
        """A thread makes a system call, or returns from one."""
        info = _Info()
        _ptrace(_GET_SYSCALL_INFO, thread, ctypes.sizeof(info), ctypes.byref(info))
        if info.op == _EXIT and thread in self.pending:
            self._finish(thread, self.pending.pop(thread))
        elif info.op == _ENTRY:
            event = self._event(thread, info.number, list(info.arguments))
            if event is not None:
                fault = self.decide(len(self.events), event)
                self.events.append(event)
                self._start(thread, info.number, fault)

    def _start(self, thread: int, number: int, fault: Fault | None) -> None:
        """Have a call go wrong."""
        if fault is How.KILL:
            os.kill(self.child, signal.SIGKILL)
        elif fault is not None:
            registers = _registers(thread)
            if fault is How.TEAR:
                name = _ARGUMENTS[_KINDS[number].size or 0]
                setattr(registers, name, getattr(registers, name) // 2)
            else:
                registers.orig_rax = 2**64 - 1  # no call has this number
            _ptrace(_SETREGS, thread, 0, ctypes.byref(registers))
            self.pending[thread] = fault

    def _finish(self, thread: int, fault: Fault) -> None:
        """A call that went wrong returns."""
        if isinstance(fault, How):
            os.kill(self.child, signal.SIGKILL)
        else:
            registers = _registers(thread)
            registers.rax = 2**64 - fault
            _ptrace(_SETREGS, thread, 0, ctypes.byref(registers))

    def _event(self, thread: int, number: int, arguments: list[int]) -> Event | None:
        """The event that a call is; `None` if it changes no file of the folder."""
        if number == _MMAP:
            shared = arguments[3] & _MAP_SHARED and arguments[2] & _PROT_WRITE
            paths = [_opened(thread, arguments[4])] if shared else []
            return self._inside("mmap", paths, 0)
        kind = _KINDS.get(number)
        if kind is None or (kind.flags is not None and not arguments[kind.flags] & _WRITING):
            return None
        if kind.descriptor is not None:
            paths = [_opened(thread, arguments[kind.descriptor])]
        else:
            paths = [
                _path(thread, None if start is None else arguments[start], arguments[path])
                for start, path in kind.path
            ]
        return self._inside(kind.name, paths, 0 if kind.size is None else arguments[kind.size])

    def _inside(self, name: str, paths: list[str], size: int) -> Event | None:
        """The event, if it is about the folder."""
        root = str(self.folder)
        if not any(path == root or path.startswith(f"{root}/") for path in paths):
            return None
        return Event(name, tuple(os.path.relpath(path, root) for path in paths), size)


def _registers(thread: int) -> _Registers:
    """The registers of a thread that has stopped."""
    registers = _Registers()
    _ptrace(_GETREGS, thread, 0, ctypes.byref(registers))
    return registers


def _opened(thread: int, descriptor: int) -> str:
    """The path of an open file."""
    number = ctypes.c_int(descriptor).value
    link = f"/proc/{thread}/cwd" if number == _AT_FDCWD else f"/proc/{thread}/fd/{number}"
    try:
        return os.readlink(link)  # noqa: PTH115 - a pipe's name is no path
    except OSError:
        return ""


def _path(thread: int, start: int | None, address: int) -> str:
    """The path that an argument is."""
    with Path(f"/proc/{thread}/mem").open("rb", buffering=0) as memory:
        memory.seek(address)
        text = b""
        while b"\0" not in text:
            page_end = 4096 - (address + len(text)) % 4096  # the next page may not be there
            text += memory.read(page_end)
    name = os.fsdecode(text.partition(b"\0")[0])
    folder = _opened(thread, ctypes.c_uint(_AT_FDCWD).value if start is None else start)
    return os.path.normpath(os.path.join(folder, name))  # noqa: PTH118 - the other system's path
