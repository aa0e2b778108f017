"""Folders in Hugging Face layout: every family against transformers, what a file may say, damaged files."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import adapter
from methods import METHODS
from model import Config
from support.generate import generate_batch
from tests.tiny import byte_vocabulary, one_line
from tests.toy import SIZES, toy_model
from weights import base_model, huggingface
from weights.safetensors import read_safetensors, write_safetensors

CONFIG, INDEX, VOCABULARY, SHARD = "config.json", "model.safetensors.index.json", "tokenizer.json", "part-0.safetensors"


def tokens(rows=3, length=40):
    return torch.randint(0, 320, (rows, length), generator=torch.Generator().manual_seed(1))


# ---- against transformers -------------------------------------------------------------------------------------------

SHAPE = dict(vocab_size=320, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=128, eos_token_id=2, bos_token_id=1)
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}
FAMILIES = {  # name: (transformers' config, its fields)
    "llama1": ("LlamaConfig", {**SHAPE, "num_key_value_heads": 4}),
    "llama2": ("LlamaConfig", {**SHAPE, "rms_norm_eps": 1e-5}),
    "llama3": ("LlamaConfig", {**SHAPE, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}),
    "llama3.1": ("LlamaConfig", {**SHAPE, "rope_parameters": LLAMA3}),
    "linear": ("LlamaConfig", {**SHAPE, "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}),
    "smollm2": ("LlamaConfig", {**SHAPE, "tie_word_embeddings": True}),
    "mistral": ("MistralConfig", {**SHAPE, "sliding_window": 64}),
    "qwen2": ("Qwen2Config", {**SHAPE, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", {**SHAPE, "head_dim": 16}),
    "qwen3-128": ("Qwen3Config", {**SHAPE, "head_dim": 128}),
    "mistral-8": ("MistralConfig", {**SHAPE, "num_attention_heads": 8, "num_key_value_heads": 8}),
    "gpt2": ("GPT2Config", dict(vocab_size=320, n_embd=48, n_layer=3, n_head=4, n_positions=128, eos_token_id=2)),
}


def peer(family):
    """transformers' model of a family: random weights, biases and norms included."""
    transformers = pytest.importorskip("transformers")
    kind, fields = FAMILIES[family]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, kind)(**fields)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter += torch.randn(parameter.shape) * (0.3 if parameter.dim() == 1 else 0.1)
    return model


@pytest.mark.peers
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_greedy_text_equal_transformers(family, tmp_path):
    """Every family, from several shards: logits to 1e-4, and the same tokens when generating from the cache."""
    theirs = peer(family)
    theirs.save_pretrained(tmp_path, max_shard_size="100KB")
    (tmp_path / VOCABULARY).write_text(json.dumps(byte_vocabulary()))
    model = base_model.load(str(tmp_path)).model
    assert len(huggingface.weight_files(tmp_path)) > 1
    with torch.no_grad():
        assert (model(tokens()) - theirs(tokens()).logits).abs().max() < 1e-4
    ours = generate_batch(model, [row.tolist() for row in tokens(3, 12)], eos_id=-1, max_new=20)
    expected = theirs.generate(tokens(3, 12), max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert ours == expected[:, 12:].tolist()


# ---- files that contradict themselves, settled as transformers does ------------------------------------------------

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
NO_HEAD, A_HEAD = {"tie_word_embeddings": True}, torch.randn(320, 48, generator=torch.Generator().manual_seed(3))


def saved_by_them(folder, family, fields, change, shards):
    """Their model saved as they save it, then with other fields in config.json (None: taken out) and other tensors."""
    peer(family).save_pretrained(folder, max_shard_size="100KB" if shards > 1 else "1GB")
    edit_json(folder / CONFIG, fields)
    (folder / VOCABULARY).write_text(json.dumps(byte_vocabulary()))
    path = sorted(folder.glob("*.safetensors"))[0]
    rewrite(lambda tensors: change(tensors, path))(path)
    return folder


def add(**tensors):
    """Tensors with "/" for dots in their names, put into the first file."""
    def change(old, path):
        old.update({name.replace("/", "."): tensor for name, tensor in tensors.items()})
    return change


def twice(tensors, first):
    """A tensor of the second file in the first one too."""
    second = sorted(first.parent.glob("*.safetensors"))[1]
    name, tensor = next(iter(read_safetensors(second)[0].items()))
    tensors[name] = tensor.clone()


def also_in_shards(tensors, single):
    """A sharded set with its index beside the single file, of other numbers."""
    write_safetensors(single.parent / SHARD, {name: torch.zeros_like(tensor) for name, tensor in tensors.items()})
    (single.parent / INDEX).write_text(json.dumps({"weight_map": {name: SHARD for name in tensors}}))


def only_a_head(tensors, path):
    tensors["lm_head.weight"] = tensors.pop(EMBEDDING)


def same_head(tensors, path):
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"].clone()


L3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 1e4}
CONTRADICTIONS = {  # family, fields, change of the tensors, files: what is loaded, as far as it isn't the logits
    "another head": ("llama2", NO_HEAD, add(), 1, {"tie_word_embeddings": False}),
    "another head, shards": ("llama2", NO_HEAD, add(), 9, {"tie_word_embeddings": False}),
    "a head added": ("smollm2", {}, add(**{"lm_head/weight": A_HEAD}), 9, {"tie_word_embeddings": False}),
    "gpt2, a head added": ("gpt2", {}, add(**{"lm_head/weight": A_HEAD}), 1, {"tie_word_embeddings": False}),
    "gpt2, its own head": ("gpt2", {}, same_head, 1, {"tie_word_embeddings": True}),
    "qwen2, a head added": ("qwen2", {}, add(**{"lm_head/weight": A_HEAD}), 9, {"tie_word_embeddings": False}),
    "only a head": ("smollm2", {}, only_a_head, 1, {"tie_word_embeddings": True}),
    "a value head": ("llama2", {}, add(**{"v_head/weight": torch.ones(1, 48), "v_head/bias": torch.ones(1)}), 1, {}),
    "biases without a place": ("llama2", {}, add(**{"model/layers/0/self_attn/q_proj/bias": torch.ones(48)}), 9, {}),
    "a layer too many": ("llama2", {"num_hidden_layers": 2}, add(), 1, {"num_hidden_layers": 2}),
    "numbers of another kind": ("gpt2", {}, add(**{"steps": torch.tensor([7])}), 1, {}),
    "in two shards": ("llama3", {}, twice, 9, {}),
    "in one file and in shards": ("qwen3", {}, also_in_shards, 1, {}),
    "both RoPE fields": ("llama2", {"rope_scaling": {"type": "linear", "factor": 4.0}, "rope_theta": 2e4,
                                    "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, add(), 1, {}),
    "llama3 without its context": ("llama2", {"rope_parameters": L3}, add(), 1, {}),
    "llama3, its context at the top too": ("llama2", {"rope_parameters": {**L3, "original_max_position_embeddings": 64},
                                                      "original_max_position_embeddings": 32}, add(), 1, {}),
    "llama3, older names": ("llama2", {"rope_parameters": None, "rope_theta": 5e5, "rope_scaling": {
        key: value for key, value in L3.items() if key != "rope_theta"}}, add(), 1, {}),
    "heads left out": ("llama1", {"num_key_value_heads": None, "head_dim": None}, add(), 1, {"num_key_value_heads": 4}),
    "qwen3's head size left out": ("qwen3-128", {"head_dim": None}, add(), 1, {"head_dim": 128}),
    "mistral's heads left out": ("mistral-8", {"num_key_value_heads": None}, add(), 1, {"num_key_value_heads": 8}),
}


@pytest.mark.peers
@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_contradictions_are_settled_as_transformers_settles_them(name, tmp_path, capsys):
    """The logits are those of `from_pretrained` on the same folder; what belongs to no module is left out, and said."""
    transformers = pytest.importorskip("transformers")
    family, fields, change, shards, expected = CONTRADICTIONS[name]
    folder = saved_by_them(tmp_path, family, fields, change, shards)
    model = base_model.load(str(folder)).model
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        assert (model(tokens()) - theirs(tokens()).logits).abs().max() < 1e-4
    assert {key: getattr(model.config, key) for key in expected} == expected
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == model.config.tie_word_embeddings
    said = capsys.readouterr().err
    unused = {"a value head": "'v_head.weight', 'v_head.bias'", "biases without a place": "'model.layers.0.self_attn.q_proj.bias'",
              "a layer too many": "'model.layers.2.", "numbers of another kind": "'steps'"}.get(name)
    assert (f"{folder}: not part of this model, left out as transformers does: {unused}" in said) if unused else "left out" not in said


FULL, SLIDING = "full_attention", "sliding_attention"
WINDOWS = [  # family, fields: how long the texts are that are offered
    ("llama2", {}, 128), ("llama2", {"sliding_window": None}, 128), ("llama2", {"sliding_window": 16}, 16),
    ("llama2", {"sliding_window": 16, "use_sliding_window": False}, 16), ("llama2", {"sliding_window": 16, "layer_types": [FULL] * 3}, 128),
    ("mistral", {"sliding_window": 16}, 16), ("mistral", {"sliding_window": 16, "use_sliding_window": False}, 16),
    ("mistral", {"sliding_window": 16, "layer_types": [FULL] * 3}, 16), ("mistral", {"sliding_window": 16, "max_window_layers": 9}, 16),
    ("mistral", {"sliding_window": 500}, 128),
    *((qwen, *case) for qwen in ("qwen2", "qwen3") for case in [
        ({"sliding_window": 16, "layer_types": None}, 128), ({"sliding_window": 16, "use_sliding_window": True, "layer_types": None}, 128),
        ({"sliding_window": 16, "use_sliding_window": True, "layer_types": None, "max_window_layers": 3}, 128),
        ({"sliding_window": 16, "use_sliding_window": True, "layer_types": None, "max_window_layers": 2}, 16),
        ({"sliding_window": 16, "use_sliding_window": True, "layer_types": None, "max_window_layers": 0}, 16),
        ({"sliding_window": 16, "use_sliding_window": True, "layer_types": [FULL] * 3, "max_window_layers": 0}, 128),
        ({"sliding_window": 16, "use_sliding_window": True, "layer_types": [FULL, SLIDING, FULL]}, 16)])]


@pytest.mark.peers
@pytest.mark.parametrize("family, fields, context", WINDOWS)
def test_no_text_is_longer_than_a_sliding_window(family, fields, context, tmp_path):
    """Texts of the length that is offered have transformers' logits and its greedy continuation; where that is less than the
    whole context, one more token would not."""
    transformers = pytest.importorskip("transformers")
    folder = saved_by_them(tmp_path, family, {"sliding_window": None, "use_sliding_window": None, **fields}, add(), 1)
    if fields.get("sliding_window", 0) is None:
        edit_null(folder / CONFIG, "sliding_window")
    model = base_model.load(str(folder)).model
    assert model.config.max_position_embeddings == context
    theirs = getattr(transformers, json.loads((folder / CONFIG).read_text())["architectures"][0]).from_pretrained(folder).eval()
    made = theirs.generate(tokens(3, context - 4), attention_mask=torch.ones(3, context - 4), max_new_tokens=4, do_sample=False,
                           eos_token_id=None, pad_token_id=0)
    with torch.no_grad():
        assert (model(tokens(3, context)) - theirs(tokens(3, context)).logits).abs().max() < 1e-4
        assert generate_batch(model, tokens(3, context - 4).tolist(), -1, 4) == made[:, context - 4:].tolist()
        if context < 128:
            text = tokens(3, 2 * context)
            cached = theirs(text[:, -1:], past_key_values=theirs(text[:, :-1], use_cache=True).past_key_values).logits[:, -1]
            assert max((model(text)[:, -1] - last).abs().max() for last in (cached, theirs(text).logits[:, -1])) > 1e-2


@pytest.mark.parametrize("changes", [{"gpt2": True, "num_key_value_heads": 4}, {"attention_bias": True}, {"qk_norm": True}],
                         ids=["gpt2", "qwen2", "qwen3"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_attaches_trains_and_merges(changes, method):
    """With biases, q/k norms or no gate_proj, the default targets are those that the model has."""
    model = toy_model(**changes)
    ids = tokens() % model.config.vocab_size
    before = model(ids).detach()
    METHODS[method].attach(model, **SIZES.get(method, {"rank": 4}))
    assert (model(ids) - before).abs().max() < 1e-4
    model(ids).square().mean().backward()
    assert all(p.grad is not None for p in adapter.trainable(model).values())
    if method not in ("full", "mosara"):
        adapter.merge(model)
        assert (model(ids) - before).abs().max() < 1e-4


# ---- a folder of our own --------------------------------------------------------------------------------------------

def write_folder(folder, model, dtype=torch.float32, shards=2):
    """The model as a folder in Hugging Face layout, with an index and its tensors in `dtype`, shared out to shards."""
    folder.mkdir(exist_ok=True)
    tensors = {name: tensor.to(dtype) for name, tensor in huggingface.hugging_face_names(model).items()}
    shard_of = {name: f"part-{i % shards}.safetensors" for i, name in enumerate(sorted(tensors))}
    for shard in set(shard_of.values()):
        write_safetensors(folder / shard, {name: tensors[name] for name in tensors if shard_of[name] == shard}, {"format": "pt"})
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": shard_of}))
    (folder / CONFIG).write_text(json.dumps(huggingface.llama_fields(model.config, eos_id=2)))
    (folder / VOCABULARY).write_text(json.dumps(byte_vocabulary()))
    return folder


@pytest.fixture
def folder(tmp_path):
    """A Llama of 320 tokens in two shards."""
    return write_folder(tmp_path / "model", toy_model(vocab_size=320))


def edit_json(path, changes):
    """Change fields of a JSON file; None takes one away."""
    fields = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in fields.items() if value is not None}))


def edit_null(path, key):
    """A field of a JSON file that is there and null."""
    path.write_text(json.dumps({**json.loads(path.read_text()), key: None}))


def test_a_hub_id_stays_the_models_name(folder, monkeypatch):
    """What was fetched by its id is known by it, so that a run can name its base anywhere; a folder is known by its path."""
    monkeypatch.setattr(base_model, "fetch", lambda name, target: folder)
    assert base_model.load("owner/model").name == "owner/model"
    assert base_model.load(str(folder)).name == str(folder.resolve())


HALVES = torch.bfloat16, torch.float16


@pytest.mark.parametrize("dtype", HALVES)
def test_half_precision_files_arrive_in_the_dtype_asked_for(dtype, tmp_path):
    """A bf16 or fp16 folder loads as fp32 with the file's numbers, or stays what it is where that is asked for."""
    model = toy_model(vocab_size=320)
    write_folder(tmp_path, model, dtype)
    loaded = base_model.load(str(tmp_path)).model
    for name, parameter in model.named_parameters():
        assert loaded.get_parameter(name).dtype == torch.float32
        assert torch.equal(loaded.get_parameter(name), parameter.to(dtype).float())
    kept, widened = base_model.load(str(tmp_path), dtype).model, base_model.load(str(tmp_path), HALVES[dtype == HALVES[0]])
    assert kept.lm_head.weight.dtype == dtype and widened.model.lm_head.weight.dtype == torch.float32


MEASURE = """
import re, sys, torch
from weights import base_model
def kilobytes(field):
    return int(re.search(field + r":\\s+(\\d+)", open("/proc/self/status").read())[1])
torch.ones(2, 2) @ torch.ones(2, 2)
before = kilobytes("VmRSS")
model = base_model.load(sys.argv[1], getattr(torch, sys.argv[2])).model
print(1024 * (kilobytes("VmHWM") - before) / sum(p.numel() * p.element_size() for p in model.parameters()))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc to see its own memory")
@pytest.mark.parametrize("stored, wanted", [("bfloat16", "float32"), ("float32", "float32"), ("float16", "float16")])
def test_loading_holds_no_second_copy_of_the_weights(stored, wanted, tmp_path):
    """Peak memory, mapped pages included, stays below 1.2 times the loaded weights (50 million of them)."""
    config = Config(vocab_size=4000, hidden_size=1024, intermediate_size=3072, num_hidden_layers=3, num_attention_heads=4,
                    num_key_value_heads=2, head_dim=256)
    ones = {name: torch.ones(tensor.shape, dtype=getattr(torch, stored))
            for name, tensor in base_model.empty_model(config).state_dict().items()}
    write_safetensors(tmp_path / "model.safetensors", ones)
    (tmp_path / CONFIG).write_text(json.dumps(huggingface.llama_fields(config, eos_id=2)))
    (tmp_path / VOCABULARY).write_text(json.dumps(byte_vocabulary()))
    root = Path(base_model.__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", MEASURE, tmp_path, wanted], capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr
    ratio = float(done.stdout)
    assert ratio < 1.2 and (ratio > 0.95 or stored == wanted), ratio  # not cast: read when it is used


LINEAR = {"rope_type": "linear", "factor": 2.0}


@pytest.mark.parametrize("fields, expected", [
    ({"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}}, {"rope_theta": 5e5, "rope_scaling": LINEAR}),
    ({"rope_theta": None, "rope_parameters": {**LINEAR, "rope_theta": 5e5}}, {"rope_theta": 5e5, "rope_scaling": LINEAR}),
    ({"rope_theta": None}, {"rope_theta": 1e4, "rope_scaling": None}),
    ({"num_key_value_heads": None, "head_dim": None}, {"num_key_value_heads": 4, "head_dim": 8}),
    # within its sliding window Mistral's attention is the ordinary one: longer texts are not offered
    ({"architectures": ["MistralForCausalLM"], "sliding_window": 64}, {"max_position_embeddings": 64}),
    ({"architectures": ["Qwen2ForCausalLM"], "sliding_window": 64, "use_sliding_window": False}, {"max_position_embeddings": 256}),
    ({"architectures": ["MistralForCausalLM"], "max_position_embeddings": 9999}, {"max_position_embeddings": 4096}),
], ids=["older RoPE names", "newer RoPE names", "no RoPE", "no heads", "window", "no window", "Mistral's own window"])
def test_field_names_of_all_ages_are_read(fields, expected, folder):
    """What transformers 4 and 5 call things, and what may be left out."""
    edit_json(folder / CONFIG, fields)
    config = huggingface.folder_config(folder)
    assert {name: getattr(config, name) for name in expected} == expected


# ---- the identity of a base -----------------------------------------------------------------------------------------

def inside(*path_and_change):
    """A function that changes a part of a JSON value, by the keys that lead there."""
    *path, key, change = path_and_change

    def changed(fields):
        part = fields
        for step in path:
            part = part[step]
        part[key] = change(part.get(key)) if callable(change) else change
    return changed


def swap(vocabulary):
    """Two tokens have each other's ids."""
    return {**vocabulary, "ai": vocabulary["bj"], "bj": vocabulary["ai"]}


def template(*ids):
    """A post-processor that puts these ids before a text."""
    return {"type": "TemplateProcessing", "single": [*({"SpecialToken": {"id": str(i), "type_id": 0}} for i in ids),
                                                     {"Sequence": {"id": "A", "type_id": 0}}], "pair": [],
            "special_tokens": {str(i): {"id": str(i), "ids": [i], "tokens": [str(i)]} for i in ids}}


OTHER_BASES = {  # a file of the folder, a change that changes logits or ids
    "theta": (CONFIG, inside("rope_theta", 5e5)), "scaling": (CONFIG, inside("rope_scaling", {"rope_type": "linear", "factor": 2.0})),
    "heads": (CONFIG, lambda fields: fields.update(num_attention_heads=8, num_key_value_heads=4, head_dim=4)),
    "eps": (CONFIG, inside("rms_norm_eps", 1e-6)), "end token": (CONFIG, inside("eos_token_id", 0)),
    "vocabulary": (VOCABULARY, inside("model", "vocab", swap)),
    "merges": (VOCABULARY, inside("model", "merges", lambda merges: merges[::-1])),
    "ignore_merges": (VOCABULARY, inside("model", "ignore_merges", True)),
    "a token recognised": (VOCABULARY, inside("added_tokens", 1, "special", False)),
    "begin token": (VOCABULARY, inside("post_processor", template(1))),
    "normaliser": (VOCABULARY, inside("normalizer", {"type": "NFC"})),
    "cut": (VOCABULARY, inside("pre_tokenizer", lambda old: {
        "type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, old]}))}
SAME_BASE = {  # changes that change neither
    "another dtype": (CONFIG, inside("torch_dtype", "bfloat16")), "a version": (CONFIG, inside("transformers_version", "5.0")),
    "a longer context": (CONFIG, inside("max_position_embeddings", 999)),
    "an older name": (CONFIG, inside("rope_parameters", {"rope_type": "default"})),
    "merges as pairs": (VOCABULARY, inside("model", "merges", lambda merges: [merge.split(" ") for merge in merges])),
    "order": (VOCABULARY, inside("model", "vocab", lambda vocabulary: dict(reversed(vocabulary.items())))),
    "nulls": (VOCABULARY, lambda fields: fields["model"].update(dropout=None, fuse_unk=False) or fields.update(normalizer=None)),
    "decoder": (VOCABULARY, inside("decoder", {"type": "ByteLevel"}))}


def edit(path, change):
    """Apply a change to the value in a JSON file."""
    fields = json.loads(path.read_text())
    change(fields)
    path.write_text(json.dumps(fields))


@pytest.mark.parametrize("name", [*OTHER_BASES, *SAME_BASE])
def test_a_base_is_known_by_all_that_changes_logits_or_ids(name, folder):
    """By the numbers of its config and the definition of its tokenizer as by its weights, and by nothing else of these files:
    not by how they are spelled, not by the dtype it is loaded in."""
    before = base_model.load(str(folder)).sha256
    assert base_model.load(str(folder), torch.bfloat16).sha256 == before
    file, change = (OTHER_BASES | SAME_BASE)[name]
    edit(folder / file, change)
    assert (base_model.load(str(folder)).sha256 == before) == (name in SAME_BASE)


def test_a_head_of_its_own_makes_another_base(folder):
    """The same embedding with a head beside it, or with other weights: the config's flag is what it was."""
    seen = {base_model.load(str(folder)).sha256}
    rewrite(lambda tensors: tensors.update({HEAD: torch.zeros(320, 32)}))(folder / SHARD)
    seen.add(base_model.load(str(folder)).sha256)
    rewrite(lambda tensors: tensors.update({HEAD: torch.ones(320, 32)}))(folder / SHARD)
    assert len(seen | {base_model.load(str(folder)).sha256}) == 3


# ---- what stands beside the model -----------------------------------------------------------------------------------

ENDS = [None, 2, [2, 3], [3, 2], []]  # what eos_token_id may be
CONTROL = {"eos_token": "</s>"}


@pytest.mark.peers
@pytest.mark.parametrize("of_config", ENDS, ids=str)
@pytest.mark.parametrize("of_generation", ["no file", *ENDS], ids=str)
def test_generation_stops_where_transformers_stops(of_config, of_generation, folder):
    """At every token that its generate takes for an end, whichever file says so; where it knows none, at the tokenizer's."""
    transformers = pytest.importorskip("transformers")
    edit_json(folder / CONFIG, {"eos_token_id": of_config, "model_type": "llama"})
    (folder / "tokenizer_config.json").write_text(json.dumps(CONTROL))
    if of_generation != "no file":
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": of_generation}))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).generation_config.eos_token_id
    tokenizer = base_model.load(str(folder)).tokenizer
    expected = theirs if isinstance(theirs, list) else [theirs] if theirs is not None else []
    if not expected:  # then transformers never stops
        expected = of_config if isinstance(of_config, list) and of_config else [2]
    assert set(tokenizer.end_ids) == set(expected) and tokenizer.eos_id == 2


def test_a_row_ends_at_any_end_token(folder):
    """As transformers' generate does it: the first of several ends a text, and is its last token."""
    base = base_model.load(str(folder))
    prompts = [row.tolist() for row in tokens(3, 12)]
    free = generate_batch(base.model, prompts, eos_id=-1, max_new=20)
    for ends in ([free[0][3], free[1][7]], [free[2][0]], [-1, free[0][19]]):
        cut = [row[:next((n + 1 for n, i in enumerate(row) if i in ends), None)] for row in free]
        assert generate_batch(base.model, prompts, eos_id=ends, max_new=20) == cut


@pytest.mark.parametrize("config, generation, beside, text", [
    ({"eos_token_id": [3, 2]}, None, {"tokenizer_config.json": CONTROL},
     "answers end in '</s>' (2), says tokenizer_config.json; generation stops at '!' (3) too (config.json)"),
    ({"eos_token_id": 3}, None, {"tokenizer_config.json": CONTROL},
     "answers end in '!' (3), says config.json, not at '</s>' (2) (tokenizer_config.json)"),
    ({"eos_token_id": 3}, {"eos_token_id": [2]}, {}, "answers end in '</s>' (2), says generation_config.json"),
    ({"eos_token_id": None}, {}, {"tokenizer_config.json": {"eos_token": {"content": "</s>"}}},
     "answers end in '</s>' (2), says tokenizer_config.json"),
    ({"eos_token_id": None}, None, {"special_tokens_map.json": CONTROL, "tokenizer_config.json": {"eos_token": "!"}},
     "answers end in '</s>' (2), says special_tokens_map.json"),
    ({"eos_token_id": [1, 2]}, None, {
        "special_tokens_map.json": CONTROL, "tokenizer_config.json": {"eos_token": "<s>", "added_tokens_decoder": {}}},
     "answers end in '<s>' (1), says tokenizer_config.json; generation stops at '</s>' (2) too (config.json)"),
    ({"eos_token_id": [2, 999]}, None, {}, "answers end in '</s>' (2), says config.json")])
def test_the_plan_names_the_end_token_and_who_says_so(config, generation, beside, text, folder):
    """The tokenizer's where generation stops at it, else the first that it stops at; a contradiction is said."""
    edit_json(folder / CONFIG, config)
    for name, fields in {**beside, "generation_config.json": generation}.items():
        if fields is not None:
            (folder / name).write_text(json.dumps(fields))
    assert base_model.load(str(folder)).tokenizer.end_text == text


@pytest.mark.parametrize("name, content, found", [
    ("tokenizer_config.json", '{"chat_template": "{{ messages }}"}', "tokenizer_config.json"), ("tokenizer_config.json", "{}", ""),
    ("chat_template.jinja", "{{ messages }}", "chat_template.jinja")])
def test_a_chat_template_is_seen(name, content, found, folder):
    """Wherever it is: it is not used, and the plan says so."""
    (folder / name).write_text(content)
    tokenizer = base_model.load(str(folder)).tokenizer
    assert tokenizer.chat == found and tokenizer.chat_text == (f" (not the model's chat template, {found})" if found else "")


@pytest.mark.peers
def test_added_tokens_of_tokenizer_config_replace_and_follow_those_of_tokenizer_json(folder):
    """As transformers takes them: the same token with other flags, and one more."""
    transformers = pytest.importorskip("transformers")
    more = {"lstrip": False, "rstrip": True, "single_word": False, "normalized": False, "special": False}
    vocabulary = byte_vocabulary()
    vocabulary["pre_tokenizer"]["trim_offsets"] = True
    vocabulary["added_tokens"] = [{**more, **token, "rstrip": False} for token in vocabulary["added_tokens"]]
    vocabulary["added_tokens"].append({**more, "content": "ai", "id": 259, "rstrip": False})
    (folder / VOCABULARY).write_text(json.dumps(vocabulary))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "added_tokens_decoder": {
        "320": {**more, "content": "<x>"}, "259": {**more, "content": "ai"}}}))
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    ours = base_model.folder_tokenizer(folder, 400)
    for text in ("ai b<x> c", "<x>ai\n\n<x>", "bj ai"):
        assert ours.encode(text) == theirs(text).input_ids
    assert ours.added == {"ai": 259, "<x>": 320} and ours.notes == []


@pytest.mark.parametrize("name, content, message", [
    ("tokenizer_config.json", {"add_prefix_space": True},
     "add_prefix_space is True in tokenizer_config.json, and here it is not; make them agree"),
    ("tokenizer_config.json", {"added_tokens_decoder": {"x": {}}}, "added_tokens_decoder does not give tokens by their numbers"),
    ("tokenizer_config.json", {"eos_token": 2}, "the field eos_token is 2, expected a text"),
    ("generation_config.json", {"eos_token_id": [[2]]}, r"eos_token_id is \[\[2\]\], expected a whole number or a list")])
def test_what_contradicts_the_tokenizer_is_named(name, content, message, folder):
    """What transformers would do otherwise, or can't read, beside a good tokenizer.json."""
    (folder / name).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message) as error:
        base_model.load(str(folder))
    assert str(folder) in one_line(error)


@pytest.mark.peers
def test_a_single_file_beside_a_sharded_set_is_taken(folder):
    """As transformers takes it, although the index names other files."""
    transformers = pytest.importorskip("transformers")
    edit_json(folder / CONFIG, {"model_type": "llama"})
    other = toy_model(vocab_size=320, seed=5)
    write_safetensors(folder / "model.safetensors", huggingface.hugging_face_names(other), {"format": "pt"})
    ours, theirs = base_model.load(str(folder)).model, transformers.AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        assert torch.equal(ours(tokens()), other(tokens())) and (theirs(tokens()).logits - other(tokens())).abs().max() < 1e-4


# ---- damaged and unsupported folders --------------------------------------------------------------------------------

def rewrite(change):
    """A function that changes the tensors of a file."""
    def rewritten(path):
        tensors, metadata = read_safetensors(path)
        tensors = {name: tensor.clone() for name, tensor in tensors.items()}
        change(tensors)
        write_safetensors(path, tensors, metadata)
    return rewritten


FIRST = "model.embed_tokens.weight"  # the first of the tensors in the first shard, in order of their names
DAMAGE = [  # a file of the folder; fields to change, its text, what to do with it, or None to take it out; the message
    (CONFIG, None, "config.json: no such file; a model folder holds"),
    (CONFIG, "[" * 100000, "config.json: not valid JSON"),
    (CONFIG, "[]", "config.json: not a JSON object"),
    (CONFIG, '{"rms_norm_eps": NaN}', "NaN is no JSON number"),
    (CONFIG, lambda path: os.truncate(path, 1 << 40), "config.json: larger than 33554432 bytes"),
    (CONFIG, {"architectures": ["GemmaForCausalLM"]}, "GemmaForCausalLM is not supported; supported: LlamaForCausalLM, MistralForCausalLM"),
    (CONFIG, {"architectures": [[]]}, r"architecture \[\] is not supported"),
    (CONFIG, {"architectures": ["GPT2LMHeadModel"], "n_embd": 50, "n_head": 4}, "4 heads do not divide the width 50"),
    (CONFIG, {"hidden_size": None}, "config.json: the field hidden_size is missing"),
    (CONFIG, {"num_hidden_layers": "3"}, "num_hidden_layers is '3', expected a int above 0"),
    (CONFIG, {"hidden_size": True}, "hidden_size is True, expected a int"),
    (CONFIG, {"vocab_size": -1}, "vocab_size is -1, expected a int above 0"),
    (CONFIG, {"vocab_size": 10**12}, "vocab_size is 1000000000000, expected a int above 0, at most"),
    (CONFIG, {"rms_norm_eps": 10**400}, "rms_norm_eps is 10000"),
    (CONFIG, {"num_hidden_layers": 10**7}, "10000000 layers in config.json for 20 tensors"),
    (CONFIG, {"hidden_size": 10**9}, rf"{FIRST} is \[320, 32\], expected \[320, 1000000000\]"),
    (CONFIG, {"head_dim": 2**29}, "4 query heads of 536870912 features"),
    (CONFIG, {"num_key_value_heads": 3}, "4 query heads of 8 features on 3 key heads"),
    (CONFIG, {"hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported; supported: 'silu'"),
    (CONFIG, {"attention_bias": True}, "attention_bias = True is not supported"),
    (CONFIG, {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "type 'yarn' is not supported; supported: default, linear, llama3"),
    (CONFIG, {"rope_parameters": {"rope_type": "linear"}}, "the field factor is missing"),
    (CONFIG, {"rope_parameters": "fast"}, "the RoPE scaling 'fast' is not an object"),
    (CONFIG, {"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}, "scaling {'full_attention': .* is not an object of numbers"),
    (CONFIG, {"rope_parameters": {"rope_theta": 1e6, "partial_rotary_factor": 0.5}}, "partial_rotary_factor = 0.5 is not supported"),
    (CONFIG, {"sliding_window": 0}, "sliding_window is 0, expected a int above 0"),
    (CONFIG, {"use_sliding_window": "yes"}, "use_sliding_window = 'yes' is not supported"),
    (CONFIG, {"layer_types": [FULL]}, "layer_types is not a list of full_attention or sliding_attention, one per layer"),
    (CONFIG, {"layer_types": [FULL, "linear_attention"]}, "layer_types is not a list of full_attention or sliding_attention"),
    (CONFIG, {"layer_types": [FULL, SLIDING]}, "layer_types names layers that slide, and there is no window for them"),
    (CONFIG, {"architectures": ["Qwen2ForCausalLM"], "layer_types": [FULL, SLIDING], "sliding_window": 8}, "no window for them; set "),
    (CONFIG, {"architectures": ["Qwen2ForCausalLM"], "max_window_layers": "2"}, "max_window_layers is '2', expected a whole number"),
    (CONFIG, {"architectures": ["GPT2LMHeadModel"], "sliding_window": 8}, "sliding_window = 8 is not supported"),
    (CONFIG, {"eos_token_id": None}, "no end token: config.json names none and tokenizer_config.json None, of 320 tokens"),
    (CONFIG, {"eos_token_id": [2, "x"]}, r"eos_token_id is \[2, 'x'\], expected a whole number or a list of them"),
    (CONFIG, {"eos_token_id": 320}, r"no end token: config.json names \[320\]"),
    (INDEX, None, "holds no model.safetensors"),
    (INDEX, {"weight_map": None}, "has no weight_map"),
    (INDEX, {"weight_map": {"a": "../x.safetensors"}}, "'../x.safetensors' is not the name of a safetensors file in this folder"),
    (INDEX, {"weight_map": {"a": "a\nb.safetensors"}}, "is not the name of a safetensors"),
    (INDEX, {"weight_map": {"a": "x.bin"}}, "'x.bin' is not the name of a safetensors"),
    (SHARD, None, "the index names this file, and it is missing"),
    (SHARD, lambda path: os.truncate(path, path.stat().st_size - 7), "truncated: tensor "),
    (SHARD, rewrite(lambda tensors: tensors.update({"model.x": tensors.pop(FIRST)})), f"{FIRST} is missing; model.x is unexpected"),
    (SHARD, rewrite(lambda tensors: tensors.update({FIRST: torch.zeros(3, 5)})), rf"{FIRST} is \[3, 5\], expected \["),
    (SHARD, rewrite(lambda tensors: tensors.update({FIRST: tensors[FIRST].int()})), "has dtype torch.int32"),
    ("part-1.safetensors", rewrite(lambda tensors: tensors.update({FIRST: torch.zeros(320, 32)})), "in another file too, with other"),
    (VOCABULARY, None, "tokenizer.json: no such file"),
    (VOCABULARY, json.dumps(byte_vocabulary(322)), "322 tokens for an embedding of 320 rows"),
]


@pytest.mark.parametrize("name, change, message", DAMAGE, ids=[message[:50] for _, _, message in DAMAGE])
def test_what_is_wrong_with_a_folder_is_named(name, change, message, folder):
    """One line that names the file, the fault and, where there is a choice, what is supported."""
    if change is None:
        (folder / name).unlink()
    elif isinstance(change, dict):
        edit_json(folder / name, change)
    elif isinstance(change, str):
        (folder / name).write_text(change)
    else:
        change(folder / name)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        base_model.load(str(folder))
    assert str(folder) in one_line(error)
