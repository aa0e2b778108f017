"""safetensors: against the library, and damaged."""
import json
import os
import struct

import numpy as np
import pytest
import torch

from tests.tiny import one_line, short
from weights import safetensors
from weights.safetensors import read_safetensors, write_safetensors

HUGE = 2 ** 64 - 1


def assorted():
    """Tensors of every dtype, among them a scalar, an empty one, strided ones, special values and odd sizes."""
    numbers = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)) * 100
    tensors = {f"t.{name}": numbers.to(dtype) for name, dtype in safetensors.DTYPES.items()}
    return tensors | {"scalar": torch.tensor(2.5, dtype=torch.bfloat16), "empty": torch.zeros(0, 4),
                      "transposed": numbers.T, "strided": numbers[:, 0], "bytes": torch.arange(3, dtype=torch.uint8),
                      "special": torch.tensor([float("inf"), -0.0, float("nan"), 1e-45]),
                      "parameter": torch.nn.Parameter(numbers), "ünï": torch.ones(1, dtype=torch.bool)}


def equal(a, b):
    """Same names, dtypes, shapes and bits."""
    def bits(tensor):
        return tensor.detach().contiguous().reshape(-1).view(torch.uint8).tolist()

    return a.keys() == b.keys() and all(a[name].dtype == b[name].dtype and a[name].shape == b[name].shape
                                        and bits(a[name]) == bits(b[name]) for name in a)


@pytest.fixture
def path(tmp_path):
    """Where a test may write a file."""
    return tmp_path / "a.safetensors"


def test_what_was_written_comes_back(path):
    """Bit by bit, with its metadata."""
    write_safetensors(path, assorted(), {"method": "sorsa", "ü": '"\n'})
    tensors, metadata = read_safetensors(path)
    assert equal(tensors, assorted()) and metadata == {"method": "sorsa", "ü": '"\n'}
    write_safetensors(path, {})
    assert read_safetensors(path) == ({}, {})


def test_written_tensors_are_aligned(path):
    """Header and tensors begin where their numbers can be read in place: at multiples of 8 and of the element size."""
    write_safetensors(path, {"a": torch.ones(3, dtype=torch.int8), "b": torch.ones(1, dtype=torch.float64)})
    size = struct.unpack("<Q", path.read_bytes()[:8])[0]
    header = json.loads(path.read_bytes()[8:8 + size])
    assert size % 8 == 0 and header["b"]["data_offsets"] == [0, 8] and header["a"]["data_offsets"] == [8, 11]


@pytest.mark.peers
def test_safetensors_library_reads_ours_and_we_read_theirs(path):
    """Both ways, bit by bit."""
    library = pytest.importorskip("safetensors.torch")
    from safetensors import safe_open
    write_safetensors(path, assorted(), {"k": "v"})
    assert equal(library.load_file(path), assorted())
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"k": "v"}
    library.save_file({name: tensor.clone().contiguous() for name, tensor in assorted().items()}, path, {"k": "v"})
    tensors, metadata = read_safetensors(path)
    assert equal(tensors, assorted()) and metadata == {"k": "v"}


def test_read_tensors_outlive_and_do_not_touch_the_file(path):
    """They may be written to, and used after the file was replaced or removed."""
    write_safetensors(path, {"a": torch.ones(3)})
    tensors, _ = read_safetensors(path)
    tensors["a"] += 1
    untouched = read_safetensors(path)[0]["a"]
    write_safetensors(path, {"a": torch.zeros(3)})
    path.unlink()
    assert tensors["a"].tolist() == [2, 2, 2] and untouched.tolist() == [1, 1, 1]


def test_misaligned_tensors_are_read(path):
    """The format allows a float to begin at any byte."""
    entries = {"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
               "b": {"dtype": "F32", "shape": [2], "data_offsets": [1, 9]},
               "c": {"dtype": "F32", "shape": [0, 2], "data_offsets": [9, 9]}}
    path.write_bytes(packed(entries, b"\7" + np.array([1.5, -2], np.float32).tobytes()))
    tensors, _ = read_safetensors(path)
    assert tensors["b"].tolist() == [1.5, -2] and tensors["b"].data_ptr() % 4 == 0 and tensors["c"].shape == (0, 2)


def test_what_cannot_be_stored_leaves_the_old_file(path):
    """A dtype that the format lacks, metadata that are no texts, a tensor without numbers."""
    write_safetensors(path, {"a": torch.ones(2)})
    before = path.read_bytes()
    with pytest.raises(ValueError, match="tensor b of torch.complex64 cannot be stored; supported: F64, F32"):
        write_safetensors(path, {"a": torch.ones(1), "b": torch.ones(1, dtype=torch.complex64)})
    with pytest.raises(ValueError, match="are not all strings"):
        write_safetensors(path, {"a": torch.ones(1)}, {"rank": 8})
    with pytest.raises(Exception):
        write_safetensors(path, {"a": torch.ones(1), "b": torch.ones(1, device="meta")})
    assert path.read_bytes() == before and list(path.parent.iterdir()) == [path]


# ---- damaged --------------------------------------------------------------------------------------------------------

def packed(header, data=b""):
    """A safetensors file with this header (an object, or its text)."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype="F32", shape=[2], offsets=[0, 8]):
    """A header of one tensor, of 8 bytes unless told otherwise."""
    return {"a": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


@pytest.mark.parametrize("content, message", [
    (b"", "the file is empty"),
    (b"\1\2\3", "truncated: the header needs bytes 0..8, the file has 3"),
    (struct.pack("<Q", HUGE) + b"{}", "truncated: the header"),
    (packed(b'{"\xff": 1}'), "the header is not valid JSON"),
    (packed(b"[" * 200000), "the header is not valid JSON"),
    (packed(b'{"a": {}, "a": {}}'), "a key occurs twice"),
    (packed([1]), "the header is not a JSON object"),
    (packed({"__metadata__": {"k": 1}}), "the metadata is not a map of strings"),
    (packed({"a": 3}), "tensor a has dtype None; supported: F64"),
    (packed(entry(dtype="F8_E4M3"), bytes(8)), "tensor a has dtype F8_E4M3; supported: F64"),
    (packed(entry(dtype=["F32"]), bytes(8)), "tensor a has dtype"),
    (packed(entry(shape=[-2]), bytes(8)), r"tensor a has shape \[-2\]"),
    (packed(entry(shape=[True, 2]), bytes(8)), r"tensor a has shape \[True, 2\]"),
    (packed(entry(shape=2), bytes(8)), "tensor a has shape 2"),
    (packed(entry(shape=[1] * 65), bytes(8)), "tensor a has shape"),
    (packed(entry(shape=[2 ** 62, 2 ** 62, 0], offsets=[0, 0])), "tensor a of shape .* needs 0 bytes"),
    (packed(entry(offsets=[0]), bytes(8)), r"offsets \[0\]"),
    (packed(entry(offsets=[8, 0]), bytes(8)), "needs 8 bytes, its offsets -8"),
    (packed(entry(shape=[3]), bytes(8)), "needs 12 bytes, its offsets 8"),
    (packed(entry(), bytes(7)), "truncated: tensor a needs bytes"),
    (packed(entry(), bytes(9)), "1 bytes follow the last tensor"),
    (packed(entry(offsets=[4, 12]), bytes(12)), "tensor a at offset 4 overlaps another or leaves a gap"),
    (packed({**entry(), "b": entry(offsets=[4, 12])["a"]}, bytes(12)), "tensor b at offset 4 overlaps"),
], ids=short)
def test_damaged_safetensors_files_are_named(path, content, message):
    """One line with the file and the fault."""
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        read_safetensors(path)
    assert one_line(error).startswith(f"{path}: ")


def test_an_endless_header_is_refused_unread(path):
    """A file of a terabyte of nothing, whose header is half of it, costs no memory and no time."""
    path.write_bytes(struct.pack("<Q", 1 << 39))
    os.truncate(path, 1 << 40)
    with pytest.raises(ValueError, match="a header of more than 33554432 bytes") as error:
        read_safetensors(path)
    assert str(path) in one_line(error)
