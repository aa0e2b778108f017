"""Reading GGUF: against the gguf library, by hand, and damaged."""
import os
import struct

import numpy as np
import pytest

from tests.tiny import one_line, short, write_gguf
from weights.gguf import DECODERS, dequantize, read_gguf

F32 = np.float32


@pytest.fixture
def small(tmp_path):
    """A GGUF file of 1 kB with every kind of value that the tiny model's file holds."""
    metadata = {"text": "grün", "flag": True, "number": 7, "real": 0.5, "words": ["a", "", "ü"], "list": [1, -2, 3]}
    tensors = {"a": np.arange(6, dtype=F32).reshape(2, 3), "b": np.ones(4, F32)}
    return write_gguf(tmp_path / "small.gguf", metadata, tensors)


def test_gguf_gives_back_what_was_written(small):
    """Values with their types, tensors with rows first."""
    metadata, tensors = read_gguf(small)
    assert metadata.pop("list").tolist() == [1, -2, 3]
    assert metadata == {"text": "grün", "flag": True, "number": 7, "real": 0.5, "words": ["a", "", "ü"]}
    assert metadata["flag"] is True and list(tensors) == ["a", "b"]
    assert tensors["a"].shape == (2, 3) and tensors["a"].type == "F32"
    assert np.array_equal(dequantize(tensors["a"].raw, "F32", (2, 3)), [[0, 1, 2], [3, 4, 5]])


@pytest.mark.peers
def test_gguf_reading_equals_the_gguf_library(tiny_gguf, real_gguf):
    """Same fields, same tensors, same bytes, for a file of our writer and for the default model."""
    library = pytest.importorskip("gguf")
    for path in (tiny_gguf, real_gguf):
        theirs, (metadata, tensors) = library.GGUFReader(path), read_gguf(path)
        fields = {key: field.contents() for key, field in theirs.fields.items() if not key.startswith("GGUF.")}
        assert {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in metadata.items()} == fields
        assert tensors.keys() == {tensor.name for tensor in theirs.tensors}
        for tensor in theirs.tensors:
            ours = tensors[tensor.name]
            assert ours.shape == tuple(tensor.shape[::-1].tolist()) and ours.type == tensor.tensor_type.name
            assert np.array_equal(ours.raw, tensor.data.view(np.uint8).reshape(-1))


@pytest.mark.peers
@pytest.mark.parametrize("type_name", ["Q4_K", "Q5_K", "Q6_K"])
def test_k_quants_equal_the_gguf_library(type_name):
    """Bit by bit, on random bytes, whose scales are of every size: that library decodes these types and does not make them."""
    gguf = pytest.importorskip("gguf")
    weights, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[type_name]]
    raw = np.random.default_rng(0).integers(0, 256, (300, size), dtype=np.uint8)
    with np.errstate(all="ignore"):
        theirs = gguf.quants.dequantize(raw.reshape(60, -1), gguf.GGMLQuantizationType[type_name])
        ours = dequantize(raw.reshape(-1), type_name, (60, 5 * weights))
    same = (ours.view(np.uint32) == theirs.view(np.uint32)) | np.isnan(ours) & np.isnan(theirs)
    assert ours.dtype == F32 and same.all() and np.isfinite(ours).mean() > 0.9


@pytest.mark.peers
@pytest.mark.parametrize("type_name", [name for name in DECODERS if not name.endswith("_K")])
def test_dequantize_equals_the_gguf_library(type_name):
    """Bit by bit, on weights of very different sizes, quantized by that library."""
    gguf = pytest.importorskip("gguf")
    from gguf import quants
    number, random = gguf.GGMLQuantizationType[type_name], np.random.default_rng(0)
    for scale in (1e-6, 1, 300):
        raw = quants.quantize((random.standard_normal((48, 256)) * scale).astype(F32), number)
        theirs = quants.dequantize(raw, number).astype(F32)
        ours = dequantize(np.ascontiguousarray(raw).view(np.uint8).reshape(-1), type_name, (48, 256))
        assert ours.dtype == F32 and np.array_equal(ours.view(np.uint32), theirs.view(np.uint32))


@pytest.mark.parametrize("type_name, head, body, expected", [
    # d = 0.5, m = -1; the lower halves of the bytes are weights 0..15, the upper ones weights 16..31
    ("Q4_1", [0.5, -1], bytes([0x21] * 15 + [0xF0]), [-0.5] * 15 + [-1] + [0] * 15 + [6.5]),
    ("Q4_0", [0.5], bytes([0x21] * 15 + [0xF0]), [-3.5] * 15 + [-4] + [-3] * 15 + [3.5]),
    # the fifth bits first: of weight 0 and of weight 31
    ("Q5_0", [0.5], bytes([1, 0, 0, 0x80] + [0x21] * 16), [0.5] + [-7.5] * 15 + [-7] * 15 + [1]),
    ("Q5_1", [0.5, -1], bytes([1, 0, 0, 0x80] + [0x21] * 16), [7.5] + [-0.5] * 15 + [0] * 15 + [8]),
    ("Q8_0", [0.5], bytes([0xFF] + [2] * 31), [-0.5] + [1] * 31),
    ("F16", [0.5] * 32, b"", [0.5] * 32),
    ("BF16", [], bytes([0x80, 0xBF] * 32), [-1] * 32),
])
def test_dequantize_by_hand(type_name, head, body, expected):
    """One block of each type."""
    raw = np.frombuffer(np.array(head, np.float16).tobytes() + body, np.uint8)
    assert dequantize(raw, type_name, (1, 32)).tolist() == [expected]


def test_unsupported_tensor_types_are_named():
    """A type that can be stored but not decoded."""
    with pytest.raises(ValueError, match="tensor type Q3_K is not supported; supported: F32, F16, BF16, Q8_0"):
        dequantize(np.zeros(110, np.uint8), "Q3_K", (1, 256))


# ---- damaged --------------------------------------------------------------------------------------------------------

def header(tensors, fields, *keys):
    """The beginning of a GGUF file with so many tensors and fields, and the keys, each with the bytes behind it."""
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, fields) + b"".join(struct.pack("<Q", len(key)) + key + rest for key, rest in keys)


def field(key, kind, payload):
    """A GGUF file whose one metadata field has these bytes."""
    return header(0, 1, (key, struct.pack("<I", kind) + payload))


def described(*entries):
    """A GGUF file with tensors of the given (name, shape as stored, type number, offset) and 1 kB of data."""
    head = header(len(entries), 0, *((name, struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, *rest))
                                     for name, shape, *rest in entries))
    return head + bytes(-len(head) % 32 + 1024)


HUGE = 2 ** 64 - 1


@pytest.mark.parametrize("content, message", [
    (b"", "the file is empty"),
    (b"GGU", "truncated: the header needs bytes 0..4, the file has 3"),
    (b"PK\x03\x04" + bytes(40), "expected a little-endian GGUF file, version 2 or 3"),
    (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "version 1"),
    (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "version 50331648"),
    (header(HUGE, 0), "truncated: a tensor name"),
    (header(0, HUGE), "truncated: a metadata key"),
    (header(0, 1) + struct.pack("<Q", HUGE), "truncated: a metadata key needs bytes 32.."),
    (field(b"\xff\xfe", 4, bytes(4)), "a metadata key is not UTF-8 at byte 32"),
    (field(b"k", 8, struct.pack("<Q", 2) + b"\xc3("), "k is not UTF-8 at byte 45"),
    (field(b"k", 99, bytes(8)), "metadata field k has the unknown type 99"),
    (field(b"k", 9, struct.pack("<IQ", 9, 1) + bytes(99)), "metadata field k has the unknown type array of 9"),
    (field(b"k", 9, struct.pack("<IQ", 8, HUGE) + bytes(99)), "truncated: k"),
    (field(b"k", 9, struct.pack("<IQ", 12, HUGE) + bytes(99)), "truncated: k"),
    (field(b"general.alignment", 4, struct.pack("<I", 0)), "general.alignment is 0"),
    (field(b"general.alignment", 7, b"\1"), "general.alignment is True"),
    (header(0, 2, *[(b"k", struct.pack("<II", 4, 0))] * 2), "metadata field k occurs twice"),
    (described((b"t", (4,), 0, 0), (b"t", (4,), 0, 32)), "tensor t occurs twice"),
    (described((b"t", (64,), 0, 0), (b"u", (4,), 0, 32)), "tensor u at offset 32 .* overlaps"),
    (described((b"t", (4,), 0, 8)), "tensor t at offset 8 is not aligned to 32"),
    (described((b"t", (257,), 0, 0)), "truncated: tensor t needs bytes 64..1092, the file has 1088"),
    (described((b"t", (4,), 0, HUGE - 31)), "truncated: tensor t"),
    (described((b"t", (HUGE, HUGE, HUGE, HUGE), 0, 0)), "truncated: tensor t"),
    (described((b"t", (4, 0), 0, 0)), r"tensor t of type F32 has shape \(0, 4\)"),
    (described((b"t", (33,), 3, 0)), r"tensor t of type Q4_1 has shape \(33,\)"),
    (described((b"t", (), 0, 0)), "tensor t has 0 dimensions"),
    (described((b"t", (1,) * 5, 0, 0)), "tensor t has 5 dimensions"),
    (described((b"t\n\x1b[2J", (4,), 77, 0)), r"tensor t\?\?\[2J has type number 77; supported: F32"),
], ids=short)
def test_damaged_gguf_files_are_named(tmp_path, content, message):
    """One line with the file, the fault and what to do."""
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        read_gguf(path)
    assert one_line(error).startswith(f"{path}: ")


def test_a_gguf_file_cut_anywhere_is_named(small):
    """Every proper beginning of a file, down to nothing."""
    content = small.read_bytes()
    last = content.rindex(np.ones(4, F32).tobytes()) + 16  # what follows is padding
    for size in range(last):
        small.write_bytes(content[:size])
        with pytest.raises(ValueError, match="truncated|empty|needs bytes"):
            read_gguf(small)
    small.write_bytes(content[:last])
    read_gguf(small)


@pytest.mark.parametrize("kind", [(8,), (9, 0), (9, 8)], ids=["text", "bytes", "texts"])
def test_endless_metadata_are_refused_unread(kind, tmp_path):
    """In a file of a terabyte of nothing, a text, an array of bytes and one of texts, many gigabytes each."""
    path = tmp_path / "a.gguf"
    path.write_bytes(header(0, 1, (b"k", struct.pack(f"<{len(kind)}IQ", *kind, 1 << 36))))
    os.truncate(path, 1 << 40)
    with pytest.raises(ValueError, match="a header of more than 33554432 bytes") as error:
        read_gguf(path)
    assert str(path) in one_line(error)
