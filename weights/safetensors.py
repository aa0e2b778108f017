"""The safetensors format, read and written in plain PyTorch: tensors in files, without pickle.

    8 bytes            N, the length of the header, little endian
    N bytes            JSON: {"name": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}, "__metadata__": {}}
    the rest           the tensors' bytes, one after the other; offsets count from here

Nothing in such a file can run code; the reader still believes none of it (see files.py).
"""
import json
import math
import struct

import torch

from weights.files import MOST_ENTRIES, Cursor, atomic_write, fault, json_object

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
          "BOOL": torch.bool}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def read_safetensors(path):
    """Map a safetensors file -> (tensors: dict of name -> CPU tensor, metadata: dict of str -> str).

    The tensors read the file when they are used (see `Cursor.array`). Raises ValueError for
    anything malformed, truncated, overlapping or left over.
    """
    cursor = Cursor(path)
    header = json_object(cursor.take(cursor.number("<Q", "the header"), "the header"), path, "the header is ")
    cursor.in_header = False
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise fault(path, "the metadata is not a map of strings")
    if len(header) > MOST_ENTRIES:
        raise fault(path, f"{len(header)} tensors", f"at most {MOST_ENTRIES} are read")

    entries = [(name, *safetensors_entry(path, name, entry)) for name, entry in header.items()]
    start = end = cursor.position
    tensors = {}
    for name, dtype, shape, first, last in sorted(entries, key=lambda entry: entry[3:]):
        if start + first != end:
            raise fault(path, f"tensor {name} at offset {first} overlaps another or leaves a gap")
        raw = torch.from_numpy(cursor.array(last - first, f"tensor {name}"))  # (bytes,)
        end = cursor.position
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
