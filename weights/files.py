"""Files: written whole or not at all, read without being believed.

A reader holds every number against the file's size before it allocates anything by it, and whatever is wrong, one
ValueError names the file and the fault.
"""
import contextlib
import errno
import functools
import glob
import hashlib
import json
import mmap
import os
import platform
import shutil
import struct
import sys
import time
import weakref
from pathlib import Path

import numpy as np

try:
    import fcntl
except ImportError:  # Windows
    import msvcrt
    fcntl = None

SMALL = 1 << 20  # bytes
LARGEST_HEADER = 1 << 25  # bytes, twice what the largest vocabularies take; parsed, text grows up to twentyfold
MOST_ENTRIES = 1 << 15  # tensors or metadata fields of a file: five times a checkpoint of SORSA on a model of 70B
TEMPORARY = ".sorsa.tmp"  # the end of the names of temporary files; before it stands the process that writes
LOCK = ".lock.sorsa.tmp"  # the lock file of a folder
# A mapping that may be written to without changing the file. Linux sets no memory aside for it, of which there may be
# less than the file takes (a flag that Python knows by name from 3.13 on).
NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)
PRIVATE = ({"flags": mmap.MAP_PRIVATE | NO_RESERVE, "prot": mmap.PROT_READ | mmap.PROT_WRITE}
           if hasattr(mmap, "MAP_PRIVATE") else {"access": mmap.ACCESS_COPY})


# ---- written --------------------------------------------------------------------------------------------------------

@contextlib.contextmanager
def atomic_write(path):
    """Open `path` for writing, under a temporary name beside it until the block ends without an error: whatever
    happens, and whenever the process is killed, `path` is the old file or the whole new one."""
    path = Path(path)
    new = temporary(path)
    sweep(path)
    try:
        with names_file(path):
            with open(new, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)


@contextlib.contextmanager
def names_file(path):
    """An OSError of the system from inside the block names `path`, if it names nothing, as where a disk is full, or
    only the temporary file."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and (error.filename is None or str(error.filename).endswith(TEMPORARY)):
            error.filename, error.filename2 = str(path), None
        raise


def temporary(path):
    """The name under which this process makes the file or folder `path`."""
    return path.with_name(f".{path.name}.{host()}.{os.getpid()}{TEMPORARY}")


@functools.cache
def host():
    """A short name of this machine or container, as others may use the same folder and the same process numbers."""
    return hashlib.sha256(platform.node().encode()).hexdigest()[:8]


def sweep(path):
    """Remove what processes of this machine that are gone have left under temporary names for `path`."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.{host()}.*{TEMPORARY}"):
        pid = left.name.removesuffix(TEMPORARY).rpartition(".")[2]
        if pid.isdecimal() and not lives(int(pid)):
            shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(missing_ok=True)


def lives(pid):
    """Whether there is such a process. Windows need not be asked: it removes no file that a process has open."""
    try:
        return os.name != "nt" and os.kill(pid, 0) is None
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # it is another user's
        return True


# ---- locked ---------------------------------------------------------------------------------------------------------

def try_lock(path):
    """The lock file `path`, open and held by this process, whose number is in it; None where another process holds it.

    The lock is the system's and ends with its process, in whatever way that ends: a file that is left counts for
    nothing. On a file system without locks there are none.
    """
    while True:
        file = open(path, "ab+", buffering=0)
        try:
            if fcntl:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            else:
                file.seek(SMALL)  # a byte that nobody reads
                msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES, errno.EDEADLK):
                file.close()
                return None
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                with names_file(path):
                    file.truncate(0)
                    file.write(b"%d" % os.getpid())
                return file
        file.close()  # its holder removed it between the two calls: again


def unlock(file):
    """Let go of what `try_lock` gave, and remove it."""
    with contextlib.suppress(PermissionError, FileNotFoundError):  # Windows removes no open file: it counts for nothing
        os.unlink(file.name)
    file.close()


def holder(path):
    """The process that holds the lock file `path`, in words; None where none does."""
    if not os.path.exists(path):
        return None
    file = try_lock(path)
    if file:
        unlock(file)
        return None
    with contextlib.suppress(OSError):  # gone since
        for _ in range(100):  # it writes its number at once, but after it has the lock
            number = Path(path).read_text()
            if number:
                return f"process {number}"
            time.sleep(0.01)
        return "process (which has just begun)"


@contextlib.contextmanager
def locked(path, wait):
    """Hold the lock file `path` while the block runs. While another process holds it, that one is waited for, after
    `wait(its name)`."""
    file, waiting = try_lock(path), False
    while file is None:
        if not waiting:
            wait(holder(path) or "another process")
        waiting = True
        time.sleep(0.1)
        file = try_lock(path)
    try:
        yield
    finally:
        unlock(file)


# ---- read -----------------------------------------------------------------------------------------------------------


def sha256(*paths):
    """Hex digest of the files' bytes, one after the other."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def cache_dir():
    """The folder for downloaded files, created if need be: $SORSA_CACHE, else `sorsa` in the user's cache folder."""
    named = os.environ.get("SORSA_CACHE") or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "sorsa")
    folder = Path(os.path.expanduser(named))
    if folder.parts[0] == "~":
        raise FileNotFoundError("this user has no home folder to keep downloads in: name a folder in $SORSA_CACHE")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def printable(text):
    """Text from a file as a terminal may be given it: line breaks and tabs as they are, other characters that control
    one, or that nobody sees, spelled out, as \\x1b."""
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)


AGAIN = "write or download it again"


def fault(path, what, fix=AGAIN):
    """A ValueError of one line: where, what, how to fix it. Text from a damaged file may hold anything: tame it."""
    what = "".join(c if c.isprintable() else "?" for c in what[:1000])
    return ValueError(f"{path}: {what}; {fix}")


def json_object(text, path, what="", fix=AGAIN):
    """The object in some JSON text (str, or bytes of UTF-8) of the file `path`. ValueError if it holds anything else, a
    key twice, or NaN; `what` is the message's subject."""
    try:
        value = json.loads(text if isinstance(text, str) else str(text, "utf-8"), object_pairs_hook=unique_keys,
                           parse_constant=no_constant)
    except (ValueError, RecursionError) as error:
        raise fault(path, f"{what}not valid JSON ({error})", fix) from None
    if not isinstance(value, dict):
        raise fault(path, f"{what}not a JSON object", fix)
    return value


def unique_keys(pairs):
    """A JSON object as a dict. ValueError if a key occurs twice."""
    if len(dict(pairs)) != len(pairs):
        raise ValueError("a key occurs twice")
    return dict(pairs)


def no_constant(name):
    """ValueError for NaN and Infinity, which JSON does not have and Python reads."""
    raise ValueError(f"{name} is no JSON number")


def read_json(path, fix=AGAIN):
    """The JSON object in a file. FileNotFoundError if there is none, ValueError for something else, or too much."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; write or download it")
    if path.stat().st_size > LARGEST_HEADER:
        raise fault(path, f"larger than {LARGEST_HEADER} bytes", "expected a small JSON file")
    return json_object(path.read_bytes(), path, fix=fix)


class Cursor:
    """A place in a file, which moves forward, first through the file's header (see LARGEST_HEADER). The file is mapped
    once, whatever is read of it: a mapping is an open file, of which a process may have a thousand."""

    def __init__(self, path):
        if os.path.getsize(path) == 0:
            raise fault(path, "the file is empty")
        self.path, self.position, self.in_header = path, 0, True
        with open(path, "rb") as file:
            self.map = mmap.mmap(file.fileno(), 0, **PRIVATE)
        self.view = memoryview(self.map)

    def take(self, size, what):
        """The next `size` bytes."""
        start, end = self.position, self.position + size
        if end > len(self.view):
            raise fault(self.path, f"truncated: {what} needs bytes {start}..{end}, the file has {len(self.view)}")
        if self.in_header and end > LARGEST_HEADER:
            raise fault(self.path, f"{what} ends at byte {end}: a header of more than {LARGEST_HEADER} bytes")
        self.position = end
        return self.view[start:end]

    def number(self, format, what):
        """The next number, in `struct` notation."""
        return struct.unpack(format, self.take(struct.calcsize(format), what))[0]

    def string(self, what):
        """The next string: its length in 8 bytes, then UTF-8."""
        raw = self.take(self.number("<Q", what), what)
        try:
            return str(raw, "utf-8")
        except UnicodeDecodeError:
            raise fault(self.path, f"{what} is not UTF-8 at byte {self.position - len(raw)}") from None

    def array(self, size, what):
        """The next `size` bytes as an array (size,) uint8: read from disk when they are used, out of memory again when
        the array is let go. It may be written to; the file does not change."""
        array = np.asarray(self.take(size, what))
        page = mmap.PAGESIZE  # only whole pages: the neighbours may have been written to
        first, last = -(-(self.position - size) // page) * page, self.position // page * page
        if size >= SMALL and hasattr(self.map, "madvise"):
            weakref.finalize(array, self.map.madvise, mmap.MADV_DONTNEED, first, last - first)
        return array
