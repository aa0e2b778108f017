"""Files: written whole or not at all, read without being believed.

A reader holds every number against the file's size before it allocates anything by it, and whatever is wrong, one
ValueError names the file and the fault.
"""
import contextlib
import hashlib
import json
import os
import struct
from pathlib import Path

import numpy as np

SMALL = 1 << 20  # bytes
LARGEST_HEADER = 1 << 25  # bytes, twice what the largest vocabularies take; parsed, text grows up to twentyfold


@contextlib.contextmanager
def atomic_write(path):
    """Open `path` for writing, under a temporary name beside it until the block ends without an error: whatever
    happens, and whenever the process is killed, `path` is the old file or the whole new one."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if error.errno is not None and error.filename is None:  # a full disk does not say where
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


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
    """A place in a mapped file, which moves forward, first through the file's header (see LARGEST_HEADER)."""

    def __init__(self, path):
        if os.path.getsize(path) == 0:
            raise fault(path, "the file is empty")
        self.path, self.position, self.in_header = path, 0, True
        self.view = memoryview(np.memmap(path, dtype=np.uint8, mode="r"))

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


def mapped(path, start, size):
    """Bytes of a file as an array (size,) uint8 with a mapping of its own: read from disk when they are used, out of
    memory again when the array is let go. It may be written to; the file does not change. A mapping is an open file,
    of which a process may have a thousand: what is small is read at once."""
    if size < SMALL:
        return np.fromfile(path, np.uint8, size, offset=start) if size else np.empty(1, np.uint8)[:0]
    return np.memmap(path, np.uint8, "c", start, size)
