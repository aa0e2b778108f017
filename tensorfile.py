"""Tensors in files, without pickle: the safetensors format, read and written in plain PyTorch.

    8 bytes            N, the length of the header, little endian
    N bytes            JSON: {"name": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}, "__metadata__": {}}
    the rest           the tensors' bytes, one after the other; offsets count from here

Nothing in such a file can run code. A reader must still not believe it: every number is held against the file's size
before it is used to allocate anything, and whatever is wrong, one ValueError names the file and the fault.
"""
import contextlib
import hashlib
import json
import math
import os
import struct
from pathlib import Path

import numpy as np
import torch

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
          "BOOL": torch.bool}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
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


def read_safetensors(path):
    """Map a safetensors file -> (tensors: dict of name -> CPU tensor, metadata: dict of str -> str).

    The tensors read the file when they are used (see `mapped`). Raises ValueError for anything
    malformed, truncated, overlapping or left over.
    """
    cursor = Cursor(path)
    header = json_object(cursor.take(cursor.number("<Q", "the header"), "the header"), path, "the header is ")
    cursor.in_header = False
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise fault(path, "the metadata is not a map of strings")

    entries = [(name, *safetensors_entry(path, name, entry)) for name, entry in header.items()]
    start = end = cursor.position
    tensors = {}
    for name, dtype, shape, first, last in sorted(entries, key=lambda entry: entry[3:]):
        if start + first != end:
            raise fault(path, f"tensor {name} at offset {first} overlaps another or leaves a gap")
        cursor.take(last - first, f"tensor {name}")
        end = cursor.position
        raw = torch.from_numpy(mapped(path, start + first, last - first))  # (bytes,)
        if (start + first) % dtype.itemsize:
            raw = raw.clone()  # PyTorch expects aligned numbers, the format does not promise them
        tensors[name] = raw.view(dtype).reshape(shape)
    if end != len(cursor.view):
        raise fault(path, f"{len(cursor.view) - end} bytes follow the last tensor")
    return tensors, metadata


def safetensors_entry(path, name, entry):
    """Check what the header says of one tensor -> (dtype, shape, first byte, byte after the last)."""
    def sizes(value):
        return isinstance(value, list) and len(value) <= 64 and all(type(n) is int and 0 <= n < 1 << 63 for n in value)

    entry = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise fault(path, f"tensor {name} has dtype {dtype}", f"supported: {', '.join(DTYPES)}")
    if not sizes(shape) or not sizes(offsets) or len(offsets) != 2:
        raise fault(path, f"tensor {name} has shape {shape} and offsets {offsets}")
    needed, held = math.prod(shape) * DTYPES[dtype].itemsize, offsets[1] - offsets[0]
    if needed != held or math.prod(n or 1 for n in shape) >= 1 << 63:
        raise fault(path, f"tensor {name} of shape {shape} and dtype {dtype} needs {needed} bytes, its offsets {held}")
    return DTYPES[dtype], shape, *offsets


def write_safetensors(path, tensors, metadata=None):
    """Write tensors (dict of name -> tensor, any device) and metadata (dict of str -> str) to a safetensors file.

    The file appears whole or not at all. Tensors that share storage are written out one by one. Raises ValueError for
    a dtype that the format lacks or metadata that are not strings.
    """
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPE_NAMES or name == "__metadata__":
            raise fault(path, f"tensor {name} of {tensor.dtype} cannot be stored", f"supported: {', '.join(DTYPES)}")
    if metadata and not all(isinstance(item, str) for pair in metadata.items() for item in pair):
        raise fault(path, f"metadata {metadata} are not all strings", "convert them")

    names = sorted(tensors, key=lambda name: -tensors[name].element_size())  # widest first keeps every tensor aligned
    header, end = {"__metadata__": metadata} if metadata else {}, 0
    for name in names:
        start, end = end, end + tensors[name].numel() * tensors[name].element_size()
        header[name] = {"dtype": DTYPE_NAMES[tensors[name].dtype], "shape": list(tensors[name].shape),
                        "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with atomic_write(path) as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in names:
            file.write(tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
