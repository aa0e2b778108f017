"""GGUF, the file format of llama.cpp, read with numpy: `read_gguf` maps a file, `dequantize` decodes a tensor.

    magic, version, number of tensors, number of metadata fields
    metadata           for each field its name, the number of its type, its value
    descriptions       for each tensor its name, sizes, the number of its type, the offset of its bytes
    padding, then the tensors' bytes, each aligned to general.alignment

Quantised tensors hold blocks of 32 weights with a scale, and perhaps a minimum, per block. K-quants hold blocks of 256
of which each 16 or 32 have a small integer for a scale, and the block the scale of these.
"""
import math
from typing import NamedTuple

import numpy as np

from weights.files import MOST_ENTRIES, Cursor, fault

SCALARS = {0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "bool", 10: "<u8", 11: "<i8",
           12: "<f8"}  # metadata value types, by number
STRING, ARRAY = 8, 9

# Tensor types, by number: name, weights in a block, bytes of a block. Not all can be decoded (see DECODERS).
TENSOR_TYPES = {0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22),
                7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110),
                12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 30: ("BF16", 1, 2)}


class GGUFTensor(NamedTuple):
    """One tensor as it lies in the file: shape (rows first, as in PyTorch), name of its type, its bytes (mapped)."""
    shape: tuple
    type: str
    raw: np.ndarray


def read_gguf(path):
    """Map a GGUF file, version 2 or 3 -> (metadata: dict of key -> value, tensors: dict of name -> GGUFTensor).

    Metadata values are int, float, bool, str, list of str, or a NumPy array of numbers. Tensor bytes are read from
    disk when they are used. Raises ValueError for anything malformed, truncated, duplicated or overlapping.
    """
    cursor = Cursor(path)
    magic, version = bytes(cursor.take(4, "the header")), cursor.number("<I", "the header")
    if magic != b"GGUF" or version not in (2, 3):
        raise fault(path, f"magic {magic} and version {version}", "expected a little-endian GGUF file, version 2 or 3")
    tensor_count, field_count = cursor.number("<Q", "the header"), cursor.number("<Q", "the header")

    metadata = {}
    for _ in range(field_count):
        key = cursor.string("a metadata key")
        if key in metadata:
            raise fault(path, f"metadata field {key} occurs twice")
        if len(metadata) == MOST_ENTRIES:
            raise fault(path, f"{field_count} metadata fields", f"at most {MOST_ENTRIES} are read")
        metadata[key] = metadata_value(cursor, key)

    described = {}  # name -> shape, type, offset, size in bytes
    for _ in range(tensor_count):
        name = cursor.string("a tensor name")
        if name in described:
            raise fault(path, f"tensor {name} occurs twice")
        if len(described) == MOST_ENTRIES:
            raise fault(path, f"{tensor_count} tensors", f"at most {MOST_ENTRIES} are read")
        described[name] = tensor_description(cursor, name)

    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment <= 0:
        raise fault(path, f"general.alignment is {alignment}")
    cursor.in_header = False
    start = end = -(-cursor.position // alignment) * alignment  # tensor bytes begin at the next multiple
    tensors = {}
    for name, (shape, type_name, offset, size) in sorted(described.items(), key=lambda item: item[1][2]):
        if offset % alignment or start + offset < end:
            raise fault(path, f"tensor {name} at offset {offset} is not aligned to {alignment} or overlaps another")
        cursor.position = start + offset
        tensors[name] = GGUFTensor(shape, type_name, cursor.array(size, f"tensor {name}"))
        end = cursor.position
    return metadata, tensors


def metadata_value(cursor, key):
    """Read one metadata value: the number of its type, then a scalar, a string, or an array of either."""
    kind, count = cursor.number("<I", key), 1
    is_array = kind == ARRAY
    if is_array:
        kind, count = cursor.number("<I", key), cursor.number("<Q", key)
    if kind == STRING:
        start = cursor.position
        cursor.take(8 * count, key)  # each has a length of 8 bytes at the least: are there so many?
        cursor.position = start
        return [cursor.string(key) for _ in range(count)] if is_array else cursor.string(key)
    if kind not in SCALARS:
        raise fault(cursor.path, f"metadata field {key} has the unknown type {'array of ' * is_array}{kind}")
    dtype = np.dtype(SCALARS[kind])
    values = np.frombuffer(cursor.take(count * dtype.itemsize, key), dtype)
    return values.copy() if is_array else values[0].item()


def tensor_description(cursor, name):
    """Read one tensor's description -> (shape, name of its type, offset, size in bytes)."""
    dimensions = cursor.number("<I", f"tensor {name}")
    if not 1 <= dimensions <= 4:
        raise fault(cursor.path, f"tensor {name} has {dimensions} dimensions")
    shape = tuple(cursor.number("<Q", f"tensor {name}") for _ in range(dimensions))[::-1]  # columns come first there
    number, offset = cursor.number("<I", f"tensor {name}"), cursor.number("<Q", f"tensor {name}")
    if number not in TENSOR_TYPES:
        raise fault(cursor.path, f"tensor {name} has type number {number}", f"supported: {', '.join(DECODERS)}")
    type_name, weights, size = TENSOR_TYPES[number]
    if 0 in shape or shape[-1] % weights:
        raise fault(cursor.path, f"tensor {name} of type {type_name} has shape {shape}")
    return shape, type_name, offset, math.prod(shape) // weights * size


def dequantize(raw, type, shape):
    """The bytes of one tensor (uint8) -> float32 array of `shape` (rows first).

    Quantized types store blocks of 32 neighbours in a row: a scale d (fp16), in some types a minimum m (fp16), and 32
    small integers q. A weight is d * q + m, or d * (q - middle of the range) where there is no minimum. In K-quants d
    and m are products of an integer for few weights with an fp16 for 256, and m is taken away. Raises ValueError for
    a type that is not supported.
    """
    if type not in DECODERS:
        raise ValueError(f"tensor type {type} is not supported; supported: {', '.join(DECODERS)}")
    return DECODERS[type](raw).reshape(shape)


def floats(dtype):
    """Decoder of plain floating-point numbers."""
    return lambda raw: raw.view(dtype).astype(np.float32)


def bf16(raw):
    """bfloat16 is the upper half of a float32."""
    return (raw.view("<u2").astype(np.uint32) << 16).view(np.float32)


def q8_0(raw):
    """A block is d, then 32 signed bytes."""
    blocks = raw.reshape(-1, 34)  # (blocks, bytes)
    weights = blocks[:, 2:].view(np.int8).astype(np.float32)  # (blocks, 32)
    weights *= half(blocks[:, :2])
    return weights


def small_integers(bits, has_minimum):
    """Decoder of 4- or 5-bit integers. A block is d, m if there is one, the fifth bits in 4 bytes, 16 bytes of fours.

    Byte i of the fours holds the lower bits of weight i in its lower half, those of weight i + 16 in its upper half.
    """
    def decode(raw):
        head = 4 if has_minimum else 2  # bytes of d and m
        blocks = raw.reshape(-1, head + 4 * (bits - 4) + 16)  # (blocks, bytes)
        fours = blocks[:, -16:]
        weights = np.empty((len(blocks), 32), np.float32)
        weights[:, :16] = fours & 15
        weights[:, 16:] = fours >> 4
        if bits == 5:
            weights += 16 * np.unpackbits(blocks[:, head:head + 4], axis=1, bitorder="little")
        if not has_minimum:
            weights -= 1 << (bits - 1)
        weights *= half(blocks[:, :2])
        if has_minimum:
            weights += half(blocks[:, 2:4])
        return weights
    return decode


def k_quant(bits):
    """Decoder of Q4_K and Q5_K. A block is d and m in fp16, eight scales and eight minima of 6 bits in 12 bytes, the
    fifth bits in 32 bytes, 128 bytes of fours. A row of 32 of these holds 32 weights in its lower halves, the next 32
    in its upper ones; byte i of the fifth bits holds, from its lowest bit on, those of weight i of each 32."""
    def decode(raw):
        blocks = raw.reshape(-1, 16 + 32 * (bits - 4) + 128)  # (blocks, bytes)
        fours = blocks[:, -128:].reshape(-1, 4, 1, 32) >> np.array([[0], [4]], np.uint8) & 15  # (blocks, 4, 2, 32)
        weights = fours.reshape(-1, 8, 32).astype(np.float32)
        if bits == 5:
            weights += 16 * (blocks[:, None, 16:48] >> np.arange(8, dtype=np.uint8)[:, None] & 1)
        scales, minima = six_bits(blocks[:, 4:16])  # (blocks, 8) each
        weights *= (half(blocks[:, :2]) * scales)[:, :, None]
        weights -= (half(blocks[:, 2:4]) * minima)[:, :, None]
        return weights
    return decode


def six_bits(packed):
    """Twelve bytes -> eight scales and eight minima: the first four of each are the lower 6 bits of four bytes each,
    whose upper 2 bits complete the halves of the last four bytes to the other four."""
    first, second, halves = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = np.concatenate((first & 63, halves & 15 | first >> 6 << 4), axis=1)
    minima = np.concatenate((second & 63, halves >> 4 | second >> 6 << 4), axis=1)
    return scales, minima


def q6_k(raw):
    """A block is 128 bytes of fours, 64 bytes of the upper two bits, 16 signed scales of 16 weights each, d in fp16.
    Each half of the block has 64 bytes of fours, whose lower halves are its first 64 weights, and 32 bytes of upper
    bits, whose lowest two are those of its first 32 weights."""
    blocks = raw.reshape(-1, 210)  # (blocks, bytes)
    fours = blocks[:, :128].reshape(-1, 2, 1, 64) >> np.array([[0], [4]], np.uint8) & 15  # (blocks, 2, 2, 64)
    shifts = np.array([[0], [2], [4], [6]], np.uint8)
    upper = blocks[:, 128:192].reshape(-1, 2, 1, 32) >> shifts & 3  # (blocks, 2, 4, 32)
    weights = (fours.reshape(-1, 16, 16) | upper.reshape(-1, 16, 16) << 4).astype(np.float32)
    weights -= 32
    weights *= (half(blocks[:, 208:]) * blocks[:, 192:208].view(np.int8))[:, :, None]
    return weights


def half(columns):
    """Two bytes of every block, fp16 -> (blocks, 1) float32."""
    return np.ascontiguousarray(columns).view("<f2").astype(np.float32)


DECODERS = {"F32": floats("<f4"), "F16": floats("<f2"), "BF16": bf16, "Q8_0": q8_0,
            "Q4_0": small_integers(4, False), "Q4_1": small_integers(4, True),
            "Q5_0": small_integers(5, False), "Q5_1": small_integers(5, True),
            "Q4_K": k_quant(4), "Q5_K": k_quant(5), "Q6_K": q6_k}
