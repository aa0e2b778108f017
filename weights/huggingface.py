"""A model in the layout of the Hugging Face hub: a folder with config.json, tokenizer.json and safetensors files.

`folder_tensors` maps the weights: nothing is read before a tensor is cast to the dtype asked for. Everything in the
folder is data: no code of it is run, and no path in it leads out of it.
"""
import re
from pathlib import Path
from typing import NamedTuple

import torch

from model import Config
from weights.files import fault, read_json
from weights.safetensors import read_safetensors

# What each architecture adds to the Llama block (model.py).
ARCHITECTURES = {"LlamaForCausalLM": {}, "MistralForCausalLM": {}, "Qwen2ForCausalLM": {"attention_bias": True},
                 "Qwen3ForCausalLM": {"qk_norm": True}, "GPT2LMHeadModel": {"gpt2": True}}
# What a config.json leaves out is what transformers' class of that architecture says; null is no number and stays null.
DEFAULTS = {
    "MistralForCausalLM": {"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
    "Qwen2ForCausalLM": {"num_key_value_heads": 32, "max_position_embeddings": 32768, "sliding_window": 4096},
    "Qwen3ForCausalLM": {"num_key_value_heads": 32, "max_position_embeddings": 32768, "sliding_window": 4096,
                         "head_dim": 128}}
# Tables that old files hold and that the model computes.
COMPUTED = (".rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")
LARGEST = {int: 1 << 30, float: 1e30}  # number: a tensor of two such sides can still be counted in bytes


# ---- the numbers ----

def folder_config(folder):
    """config.json -> Config. ValueError names the field that is missing or that this project has no code for."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; a model folder holds config.json, tokenizer.json and "
                                "safetensors files")
    fields = read_json(path)
    names = fields.get("architectures")
    architecture = names[0] if isinstance(names, list) and names else None
    if not isinstance(architecture, str) or architecture not in ARCHITECTURES:
        raise fault(path, f"architecture {architecture} is not supported", f"supported: {', '.join(ARCHITECTURES)}")
    fields = {**DEFAULTS.get(architecture, {}), **fields}
    kind = ARCHITECTURES[architecture]
    return gpt2_config(path, fields) if kind.get("gpt2") else llama_config(path, fields, architecture)


def number(path, fields, key, kind=int, default=None):
    """A positive number of config.json."""
    value = fields.get(key)
    value = default if value is None else value
    if value is None:
        raise fault(path, f"the field {key} is missing")
    if isinstance(value, bool) or not isinstance(value, (int, kind)) or not 0 < value <= LARGEST[kind]:
        raise fault(path, f"the field {key} is {value!r}, expected a {kind.__name__} above 0, at most {LARGEST[kind]}")
    return kind(value)


def refuse(path, fields, key, *allowed):
    """ValueError if a field is there and has another value than those that the code is written for."""
    if fields.get(key, allowed[0]) not in allowed:
        raise fault(path, f"{key} = {fields[key]!r} is not supported", f"supported: {', '.join(map(repr, allowed))}")


def llama_config(path, fields, architecture):
    """Config of the Llama family."""
    kind = ARCHITECTURES[architecture]
    refuse(path, fields, "hidden_act", "silu")
    refuse(path, fields, "mlp_bias", False)
    refuse(path, fields, "partial_rotary_factor", 1.0, None)
    if not kind.get("attention_bias"):  # Llama's flag would give o_proj a bias too, Qwen2's are on q, k and v alone
        refuse(path, fields, "attention_bias", False)
    hidden, heads = (number(path, fields, key) for key in ("hidden_size", "num_attention_heads"))
    kv_heads = number(path, fields, "num_key_value_heads", default=heads)
    head_dim = number(path, fields, "head_dim", default=hidden // heads)
    if heads % kv_heads or head_dim % 2 or heads * head_dim > LARGEST[int]:
        raise fault(path, f"{heads} query heads of {head_dim} features on {kv_heads} key heads cannot be grouped")
    layers, (theta, scaling) = number(path, fields, "num_hidden_layers"), rope(path, fields)
    if scaling and len(scaling.get("factors", range(head_dim // 2))) != head_dim // 2:
        raise fault(path, f"{len(scaling['factors'])} RoPE factors for heads of {head_dim} features")
    return Config(
        vocab_size=number(path, fields, "vocab_size"), hidden_size=hidden, num_attention_heads=heads,
        intermediate_size=number(path, fields, "intermediate_size"), num_key_value_heads=kv_heads, head_dim=head_dim,
        num_hidden_layers=layers, rope_theta=theta, rope_scaling=scaling,
        rms_norm_eps=number(path, fields, "rms_norm_eps", float, 1e-6),
        max_position_embeddings=longest_text(path, fields, architecture, layers),
        tie_word_embeddings=bool(fields.get("tie_word_embeddings", False)), **kind)


def longest_text(path, fields, architecture, layers):
    """How many tokens a text may have: max_position_embeddings, and no more than a sliding window holds, wherever
    transformers has one: within it, attention is the ordinary one.

    In Mistral every layer slides, whatever else is said; in Qwen2 and Qwen3 those that layer_types names, else those
    from max_window_layers on, if use_sliding_window is true; in Llama the cache of transformers' `generate` does.
    """
    refuse(path, fields, "use_sliding_window", False, True)
    qwen = architecture.startswith("Qwen")
    window = None if qwen and not fields.get("use_sliding_window") else fields.get("sliding_window")
    kinds, first = fields.get("layer_types"), fields.get("max_window_layers", 28)
    if kinds is not None and (not isinstance(kinds, list) or len(kinds) != layers
                              or not all(kind in ("full_attention", "sliding_attention") for kind in kinds)):
        raise fault(path, "the field layer_types is not a list of full_attention or sliding_attention, one per layer")
    if qwen and type(first) is not int:
        raise fault(path, f"the field max_window_layers is {first!r}, expected a whole number")
    slides = "sliding_attention" in kinds if kinds is not None else not qwen or first < layers
    longest = number(path, fields, "max_position_embeddings", default=2048)
    if kinds is not None and slides and window is None:
        raise fault(path, "layer_types names layers that slide, and there is no window for them",
                    "set sliding_window, and use_sliding_window to true, or take layer_types out")
    if window is None or not slides and architecture != "MistralForCausalLM":
        return longest
    return min(longest, number(path, fields, "sliding_window"))


def rope(path, fields):
    """(theta, rope_scaling or None). Newer files keep both under rope_parameters, older ones apart; where a file has
    both, transformers takes the older field."""
    given = fields.get("rope_scaling") or fields.get("rope_parameters") or {}
    if not isinstance(given, dict) or any(isinstance(value, dict) for value in given.values()):
        raise fault(path, f"the RoPE scaling {given!r} is not an object of numbers")
    refuse(path, given, "partial_rotary_factor", 1.0, None)
    theta = number(path, given if "rope_theta" in given else fields, "rope_theta", float, 10000.0)
    kind = given.get("rope_type", given.get("type", "default"))
    if kind == "longrope" and given.get("short_factor") == given.get("long_factor") \
            and given.get("attention_factor") == 1.0 and is_numbers(given.get("long_factor")):
        return theta, {"rope_type": "factors", "factors": given["long_factor"]}  # at any length
    needed = {"default": (), "linear": ("factor",), "llama3": ("factor", "low_freq_factor", "high_freq_factor",
                                                               "original_max_position_embeddings")}
    if not isinstance(kind, str) or kind not in needed:
        raise fault(path, f"RoPE scaling of type {kind!r} is not supported", f"supported: {', '.join(needed)}")
    if kind == "llama3":  # the original context is what the top of the file says, or the scaling, or else the context
        original = "original_max_position_embeddings"
        given = {original: fields.get("max_position_embeddings", 2048), **given}
        given |= {original: fields[original]} if original in fields else {}
    scaling = {key: number(path, given, key, float) for key in needed[kind]}
    return theta, {"rope_type": kind, **scaling} if scaling else None


def is_numbers(value):
    """Whether a JSON value is a list of numbers above 0."""
    return isinstance(value, list) and all(type(number) in (int, float) and 0 < number <= LARGEST[float]
                                           for number in value)


def gpt2_config(path, fields):
    """Config of GPT-2."""
    refuse(path, fields, "activation_function", "gelu_new", "gelu_pytorch_tanh")
    refuse(path, fields, "scale_attn_weights", True)
    refuse(path, fields, "scale_attn_by_inverse_layer_idx", False)
    refuse(path, fields, "sliding_window", None)
    hidden, heads = number(path, fields, "n_embd"), number(path, fields, "n_head")
    if hidden % heads:
        raise fault(path, f"{heads} heads do not divide the width {hidden}")
    return Config(
        vocab_size=number(path, fields, "vocab_size"), hidden_size=hidden, num_attention_heads=heads,
        num_key_value_heads=heads, head_dim=hidden // heads, num_hidden_layers=number(path, fields, "n_layer"),
        intermediate_size=number(path, fields, "n_inner", default=4 * hidden),
        rms_norm_eps=number(path, fields, "layer_norm_epsilon", float, 1e-5),
        max_position_embeddings=number(path, fields, "n_positions"),
        tie_word_embeddings=bool(fields.get("tie_word_embeddings", True)), gpt2=True)


# ---- what stands beside them ----

def end_ids(folder):
    """(ids of the tokens at which transformers' generate stops, the file that names them): generation_config.json's if
    it names any, else config.json's, which may be none."""
    for name in ("generation_config.json", "config.json"):
        path = Path(folder) / name
        value = read_json(path).get("eos_token_id") if path.is_file() else None
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(type(i) is int for i in ids):
            raise fault(path, f"the field eos_token_id is {value!r}, expected a whole number or a list of them")
        if ids:
            return ids, name
    return [], "config.json"


class Beside(NamedTuple):
    """What stands beside a tokenizer.json."""
    end: str | None  # the tokenizer's own end token
    end_source: str  # the file that names it
    chat: str  # the file of the model's chat template, "" if it has none
    added: list  # added tokens that replace or follow those of tokenizer.json
    space: bool | None  # whether a space is put before texts, where it says so


def beside_tokenizer(folder):
    """Beside of a folder: what transformers takes from tokenizer_config.json and older files."""
    config, older, template = (Path(folder) / name for name in ("tokenizer_config.json", "special_tokens_map.json",
                                                                "chat_template.jinja"))
    fields, older_fields = (read_json(path) if path.is_file() else {} for path in (config, older))
    token, source = fields.get("eos_token"), config.name
    if "eos_token" in older_fields and "added_tokens_decoder" not in fields:  # then transformers goes by the older file
        token, source = older_fields["eos_token"], older.name
    token = token.get("content") if isinstance(token, dict) else token
    if token is not None and not isinstance(token, str):
        raise fault(Path(folder) / source, f"the field eos_token is {token!r}, expected a text")
    chat = template.name if template.is_file() else config.name if fields.get("chat_template") else ""
    added = fields.get("added_tokens_decoder") or {}
    if not isinstance(added, dict) or not all(re.fullmatch("[0-9]{1,9}", i, re.ASCII) and isinstance(one, dict)
                                              for i, one in added.items()):
        raise fault(config, "added_tokens_decoder does not give tokens by their numbers")
    return Beside(token, source, chat, [{**added[i], "id": int(i)} for i in sorted(added, key=int)],
                  fields.get("add_prefix_space"))


# ---- the weights ----

def weight_files(folder):
    """The safetensors files of a folder: model.safetensors, where it is not there those that the index names."""
    folder = Path(folder)
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        raise FileNotFoundError(f"{folder}: holds no model.safetensors and no model.safetensors.index.json: "
                                "pickled weights are not read; save_pretrained of transformers writes these files")
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
        raise fault(index, "has no weight_map from names to files")
    files = []
    for name in sorted(set(shards.values())):
        if not re.fullmatch(r"[\w-][\w.-]*\.safetensors", name, re.ASCII):  # no slash: nothing outside the folder
            raise fault(index, f"{name!r} is not the name of a safetensors file in this folder")
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name}: the index names this file, and it is missing; download it again")
        files.append(folder / name)
    return files


def folder_tensors(folder, config):
    """{our name: tensor} of all weight files, mapped. ValueError if two files hold one name with different numbers.

    A head of its own beside `tie_word_embeddings` is kept, and the config says so afterwards, as in transformers 5.
    """
    tensors = {}
    for path in weight_files(folder):
        for name, tensor in read_safetensors(path)[0].items():
            if name in tensors and not same(tensor, tensors[name]):
                raise fault(path, f"{name} is in another file too, with other numbers", "leave one of the two out")
            tensors[name] = tensor
    tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith(COMPUTED)}
    if config.gpt2:
        tensors = gpt2_names(tensors)
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    if config.tie_word_embeddings and head in tensors:
        config.tie_word_embeddings = embedding not in tensors or same(tensors[head], tensors[embedding])
        if config.tie_word_embeddings:
            tensors[embedding] = tensors.pop(head)
    return tensors


def same(one, other):
    """Whether two tensors have the same dtype, shape and bytes."""
    return one.dtype == other.dtype and one.shape == other.shape \
        and torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))


GPT2_PARTS = {"ln_1": "input_layernorm", "ln_2": "post_attention_layernorm", "attn.c_proj": "self_attn.o_proj",
              "mlp.c_fc": "mlp.up_proj", "mlp.c_proj": "mlp.down_proj"}
GPT2_ENDS = {"wte.weight": "embed_tokens.weight", "wpe.weight": "embed_positions.weight",
             "ln_f.weight": "norm.weight", "ln_f.bias": "norm.bias"}


def gpt2_names(tensors):
    """GPT-2's tensors under Llama's names: its matrices are stored (in, out), and q, k, v side by side in c_attn."""
    ours = {}
    for name, tensor in tensors.items():
        short = name.removeprefix("transformer.")
        if short in GPT2_ENDS:
            ours[f"model.{GPT2_ENDS[short]}"] = tensor
            continue
        h, _, rest = short.partition(".")
        layer, _, rest = rest.partition(".")
        part, _, last = rest.rpartition(".")
        tensor = tensor if name == "lm_head.weight" else turned(tensor)
        if h == "h" and part == "attn.c_attn" and tensor.dim() and len(tensor) % 3 == 0:
            for projection, third in zip("qkv", tensor.chunk(3)):
                ours[f"model.layers.{layer}.self_attn.{projection}_proj.{last}"] = third
        elif h == "h" and part in GPT2_PARTS:
            ours[f"model.layers.{layer}.{GPT2_PARTS[part]}.{last}"] = tensor
        else:
            ours[name] = tensor  # lm_head, or a name that will be reported
    return ours


def turned(tensor):
    """A matrix transposed; a bias or norm as it is."""
    return tensor.T if tensor.dim() == 2 else tensor


# ---- the way out ----------------------------------------------------------------------------------------------------

def hugging_face_names(model):
    """{name: tensor} of a plain model as transformers keeps it; a tied head is left out."""
    tensors = {name: tensor for name, tensor in model.state_dict().items()
               if not (model.config.tie_word_embeddings and name == "lm_head.weight")}
    if not model.config.gpt2:
        return tensors
    ends, parts = ({ours: theirs for theirs, ours in names.items()} for names in (GPT2_ENDS, GPT2_PARTS))
    theirs = {}
    for name, tensor in tensors.items():
        if not name.startswith("model.layers."):
            end = name.removeprefix("model.")
            theirs[f"transformer.{ends[end]}" if end in ends else name] = tensor
            continue
        _, _, layer, rest = name.split(".", 3)
        part, _, last = rest.rpartition(".")
        if part in parts:
            theirs[f"transformer.h.{layer}.{parts[part]}.{last}"] = turned(tensor)
        elif part == "self_attn.q_proj":  # c_attn is q, k and v side by side: made once, when q comes
            three = [tensors[name.replace("q_proj", f"{letter}_proj")] for letter in "qkv"]
            theirs[f"transformer.h.{layer}.attn.c_attn.{last}"] = turned(torch.cat(three))
    return theirs


def gpt2_factors(factors, hidden):
    """{our name of a linear: LoRA factors (k, in) and (out, k)} under GPT-2's names: c_attn is q, k and v side by side,
    so its factors are those of the three, each writing to its own third of the outputs."""
    parts, theirs = {ours: name for name, ours in GPT2_PARTS.items()}, {}
    for name, (down, up) in factors.items():
        _, _, layer, part = name.split(".", 3)
        if part in parts:
            theirs[f"transformer.h.{layer}.{parts[part]}"] = down, up
            continue
        c_attn, third = f"transformer.h.{layer}.attn.c_attn", "qkv".index(part.removeprefix("self_attn.")[0])
        rows = up.new_zeros(3 * hidden, up.shape[1])  # (3 d, k)
        rows[third * hidden:(third + 1) * hidden] = up
        downs, ups = theirs.get(c_attn, (down[:0], rows[:, :0]))
        theirs[c_attn] = torch.cat((downs, down)), torch.cat((ups, rows), dim=1)
    return theirs


def llama_fields(config, eos_id):
    """The config.json of a Llama model that came from another kind of file. eos_id: an id or a list of them."""
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "rope_theta",
             "num_key_value_heads", "head_dim", "rms_norm_eps", "max_position_embeddings", "tie_word_embeddings")
    kind = {name: True for name in ("attention_bias", "qk_norm") if getattr(config, name)}
    architecture = next(name for name, adds in ARCHITECTURES.items() if adds == kind)
    fields = {"architectures": [architecture], "model_type": architecture.removesuffix("ForCausalLM").lower(),
              "hidden_act": "silu", "eos_token_id": eos_id, **{name: getattr(config, name) for name in names}}
    scaling = config.rope_scaling
    if scaling and scaling["rope_type"] == "factors":
        scaling = {"rope_type": "longrope", "short_factor": scaling["factors"], "long_factor": scaling["factors"],
                   "attention_factor": 1.0, "factor": 1.0,
                   "original_max_position_embeddings": config.max_position_embeddings}
    return {**fields, "rope_parameters": {**scaling, "rope_theta": config.rope_theta}} if scaling else fields
