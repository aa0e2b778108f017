"""What Windows lacks or forbids, taken away from a Python on Linux: `pretend()`, in a process of its own.

Nobody has run this project on Windows. This is as near as one comes on Linux: modules and functions that only POSIX has are
gone, a file that is open or mapped can be neither replaced nor deleted, a folder cannot be opened, names hold no character
that Windows forbids there. Torch and numpy are imported before: they are built for this system.
"""
import builtins
import ctypes
import enum
import fcntl
import mmap
import os
import re
import signal
import sys
import types

import numpy  # noqa: F401
import tiktoken  # noqa: F401
import torch._dynamo  # noqa: F401 (an optimizer imports it)

MODULES = ("fcntl", "grp", "pwd", "pty", "resource", "syslog", "termios", "tty", "crypt", "spwd", "readline")
FUNCTIONS = """chown chroot confstr ctermid fchmod fchown fork forkpty fpathconf getegid geteuid getgid getgroups getloadavg getpgid
    getpgrp getpriority getresgid getresuid getsid getuid initgroups killpg lchown lockf major minor makedev mkfifo mknod nice openpty
    pathconf pidfd_open posix_fadvise posix_fallocate posix_spawn pread preadv pwrite pwritev register_at_fork sched_getaffinity
    sched_setaffinity sched_yield sendfile setgid setpriority setsid setuid statvfs fstatvfs sync sysconf tcgetpgrp uname wait wait3
    wait4 waitid O_CLOEXEC O_DIRECTORY O_DSYNC O_NOCTTY O_NOFOLLOW O_NONBLOCK O_SYNC O_TMPFILE""".split()
SIGNALS = [name for name in dir(signal) if re.match("SIG[A-Z]", name)
           and name not in ("SIG_DFL", "SIG_IGN", "SIGABRT", "SIGFPE", "SIGILL", "SIGINT", "SIGSEGV", "SIGTERM")]
CALLS = ("alarm", "getitimer", "pause", "pthread_kill", "pthread_sigmask", "setitimer", "siginterrupt", "sigpending", "sigtimedwait",
         "sigwait", "sigwaitinfo")


MAPS = [name for name in dir(mmap) if name.startswith(("MAP_", "PROT_", "MADV_"))]


class Mapping(mmap.mmap):
    """A mapping that takes no advice."""

    @property
    def madvise(self):
        raise AttributeError("madvise")


def locking(file, mode, size):
    """msvcrt's: lock or unlock a part of a file, here the whole file."""
    fcntl.flock(file, mode)


def pretend():
    """From here on this process has no more than Windows has."""
    sys.platform = "win32"
    for name in MODULES:
        sys.modules[name] = None  # importing it is an ImportError
    sys.modules["msvcrt"] = types.SimpleNamespace(locking=locking, LK_NBLCK=fcntl.LOCK_EX | fcntl.LOCK_NB, LK_UNLCK=fcntl.LOCK_UN)
    for owner, names in ((os, FUNCTIONS), (signal, (*SIGNALS, *CALLS)), (mmap, MAPS)):
        for name in names:
            if hasattr(owner, name):
                delattr(owner, name)
    mmap.mmap = Mapping
    kinds = [kind for kind in signal.Signals if hasattr(signal, kind.name)]
    signal.Signals = enum.IntEnum("Signals", {kind.name: kind.value for kind in kinds})
    ctypes.CDLL = guarded(ctypes.CDLL, lambda name, *_: name is None)  # there is no library that is the process itself
    for owner, name, places in ((os, "replace", (0, 1)), (os, "rename", (0, 1)), (os, "unlink", (0,)), (os, "remove", (0,))):
        setattr(owner, name, guarded(getattr(owner, name), lambda *paths, places=places: any(is_held(paths[i]) for i in places)))
    os.open = guarded(os.open, lambda path, *_: os.path.isdir(path))
    for owner, name in ((builtins, "open"), (os, "open"), (os, "mkdir"), (os, "replace")):
        setattr(owner, name, guarded(getattr(owner, name), is_forbidden))


def guarded(function, forbids):
    """The function, which raises PermissionError where `forbids` says so of its arguments."""
    def watched(*arguments, **more):
        if forbids(*arguments):
            raise PermissionError(13, "Windows does not let you do this", str(arguments[-1]))
        return function(*arguments, **more)
    return watched


def is_held(path):
    """Whether this process has the file open or mapped."""
    path = os.path.realpath(path)
    with open("/proc/self/maps") as maps:
        if any(line.rstrip("\n").endswith(" " + path) for line in maps):
            return True
    return any(os.path.realpath(f"/proc/self/fd/{number}") == path for number in os.listdir("/proc/self/fd"))


def is_forbidden(path, *_):
    """Whether a name in the path has a character that Windows does not allow, or ends in a dot or a space."""
    parts = os.fspath(path).split("/") if not isinstance(path, int) else []
    return any(re.search(r'[<>:"\\|?*\x00-\x1f]|[. ]$', part) for part in parts if part not in ("", ".", ".."))
