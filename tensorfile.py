"""Tensors in files, without pickle: the safetensors format, read and written in plain PyTorch.

    8 bytes            N, the length of the header, little endian
    N bytes            JSON: {"name": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}, ..., "__metadata__": {...}}
    the rest           the tensors' bytes, one after the other; offsets count from here

Nothing in such a file can run code. A reader must still not believe it: every number is held against the file's size first.
"""
import contextlib
import json
import math
import os
import struct
from pathlib import Path

import torch

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
          "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@contextlib.contextmanager
def atomic_write(path):
    """A binary file to write to that becomes `path` in one step when all of it is on the disk, or not at all."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_safetensors(path, tensors, metadata=None):
    """Write {name: tensor} and {str: str} metadata as one file: `path` holds the old content or all of the new."""
    header, offset = {"__metadata__": metadata} if metadata else {}, 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8
    with atomic_write(path) as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors.values():
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            file.write(flat.view(torch.uint8).numpy().tobytes())


def read_safetensors(path):
    """({name: tensor on the CPU}, {str: str} metadata) of a safetensors file.

    Raises FileNotFoundError, or ValueError naming the file and what is wrong with it.
    """
    size = Path(path).stat().st_size
    with open(path, "rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else math.inf
        if length > size - 8:
            raise ValueError(f"{path}: not a safetensors file, or cut off: the header does not fit its {size} bytes")
        try:
            header = json.loads(file.read(length))
        except (ValueError, RecursionError):
            raise ValueError(f"{path}: not a safetensors file, or damaged: the header is not JSON") from None
        data = bytearray(file.read())
    if not isinstance(header, dict):
        raise ValueError(f"{path}: damaged: the header is not a JSON object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError(f"{path}: damaged: __metadata__ must map strings to strings")
    end, tensors = 0, {}
    for name, (dtype, shape, first, last) in _in_file_order(path, header):
        if first != end or last > len(data):
            raise ValueError(f"{path}: damaged or cut off: tensor {name} has bytes {first}..{last} of {len(data)}, "
                             f"expected to begin at {end}")
        end = last
        tensor = torch.frombuffer(data, dtype=DTYPES[dtype], count=math.prod(shape), offset=first) \
            if last > first else torch.empty(0, dtype=DTYPES[dtype])
        tensors[name] = tensor.reshape(shape)
    if end != len(data):
        raise ValueError(f"{path}: damaged: {len(data)} bytes of tensors, {end} described")
    return tensors, metadata


def _in_file_order(path, header):
    """[(name, (dtype, shape, first byte, last byte))], checked one by one, sorted by place."""
    entries = []
    for name, entry in header.items():
        try:
            dtype, shape, (first, last) = entry["dtype"], entry["shape"], entry["data_offsets"]
        except (TypeError, KeyError, ValueError):
            raise ValueError(f"{path}: damaged: tensor {name} needs a dtype, a shape and two data_offsets") from None
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise ValueError(f"{path}: tensor {name} has dtype {dtype!r}; supported are {', '.join(DTYPES)}")
        numbers = [*shape, first, last] if isinstance(shape, list) else [None]
        sane = all(type(n) is int and 0 <= n < 2 ** 48 for n in numbers) and math.prod(n or 1 for n in shape) < 2 ** 48
        if not sane or math.prod(shape) * DTYPES[dtype].itemsize != last - first:
            raise ValueError(f"{path}: damaged: tensor {name} of dtype {dtype} and shape {shape} has bytes {first}..{last}")
        entries.append((name, (dtype, shape, first, last)))
    return sorted(entries, key=lambda entry: entry[1][2:])
