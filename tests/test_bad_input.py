"""One table of bad input: what is wrong, and what the one line that says so must contain.

A row is an id, a way to prepare files (or None), a command line, and words of the message: first the name of what is
wrong, then the remedy. {places} in commands and words are files of the `Kit`; {here} is the folder of the test.
"""
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import eval as evaluation
import train
from data import gsm8k
from support.script import run_script
from tests.tiny import tiny_metadata, tiny_tensors, write_gguf
from tests.toy import write_sums
from tools import bench, compare, export
from weights.safetensors import read_safetensors, write_safetensors

ROOT = Path(__file__).resolve().parent.parent
MAINS = {"train": train.main, "eval": evaluation.main, "export": export.main, "bench": bench.main,
         "sweep": lambda: compare.main(sys.argv[1:])}
USUAL = {"train": "--method lora --model {gguf} --data {data} --held-out 8 --steps 1 --device cpu --no-sample "
                  "--out {here}/out",
         "eval": "--device cpu --limit 2 --max-new 4", "export": "", "bench": "", "sweep": "--data {data}"}
RECORD = '{"question": "How many?", "answer": "One and one.\\n#### 2"}\n'


# ---- how files are made wrong ---------------------------------------------------------------------------------------

def write(name, content="", times=1):
    """A file in the folder of the test, text or bytes."""
    def prepare(here, kit):
        path = here / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes((content.encode() if isinstance(content, str) else content) * times)
    return prepare


def folder(name):
    """An empty folder."""
    return lambda here, kit: (here / name).mkdir(parents=True)


def cut(source, name, share):
    """The first part of a file."""
    def prepare(here, kit):
        whole = Path(source.format(**kit)).read_bytes()
        (here / name).write_bytes(whole[:int(len(whole) * share)])
    return prepare


def changed_gguf(metadata=None, tensors=None, seed=0):
    """{here}/bad.gguf, with other metadata and tensors; a value None takes a field or tensor out."""
    def prepare(here, kit):
        fields, weights = {**tiny_metadata(), **(metadata or {})}, {**tiny_tensors(seed), **(tensors or {})}
        write_gguf(here / "bad.gguf", *({key: value for key, value in some.items() if value is not None}
                                        for some in (fields, weights)))
    return prepare


def one_layer(here, kit):
    """{here}/bad.gguf with half of the model's layers."""
    tensors = {name: None for name in tiny_tensors() if name.startswith("blk.1.")}
    changed_gguf({"llama.block_count": 1}, tensors)(here, kit)


def changed_folder(name, change):
    """{here}/hf, the model's folder with one file changed: its JSON object, its text, or None to take it out."""
    def prepare(here, kit):
        shutil.copytree(kit["hf"], here / "hf")
        path = here / "hf" / name
        if change is None:
            path.unlink()
        elif isinstance(change, dict):
            path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
        else:
            path.write_text(change)
    return prepare


def changed_weights(**tensors):
    """{here}/hf with other tensors: a value is what becomes of the tensor of that name, None takes it out."""
    def prepare(here, kit):
        shutil.copytree(kit["hf"], here / "hf")
        path = here / "hf" / "model.safetensors"
        stored = {name: tensor.clone() for name, tensor in read_safetensors(path)[0].items()}
        for name, change in tensors.items():
            old = stored.pop(name)
            if change is not None:
                stored[name] = change(old)
        write_safetensors(path, stored)
    return prepare


def changed_adapter(config=None, **metadata):
    """{here}/run, whose adapter says otherwise: its settings, or base_name and base_sha256."""
    def prepare(here, kit):
        shutil.copytree(kit["run"], here / "run")
        path = here / "run" / "adapter.safetensors"
        tensors, found = read_safetensors(path)
        found["adapter"] = json.dumps({**json.loads(found["adapter"]), **(config or {})})
        write_safetensors(path, {name: tensor.clone() for name, tensor in tensors.items()}, {**found, **metadata})
    return prepare


def changed_result(content):
    """{here}/run with another result.json."""
    def prepare(here, kit):
        shutil.copytree(kit["run"], here / "run")
        path = here / "run" / "result.json"
        text = content if isinstance(content, str) else json.dumps({**json.loads(path.read_text()), **content})
        path.write_text(text)
    return prepare


def a_run(here, kit):
    """{here}/run, a run as it should be."""
    shutil.copytree(kit["run"], here / "run")


def shut(name):
    """A file that nobody may read."""
    def prepare(here, kit):
        if os.geteuid() == 0:
            pytest.skip("nothing is unreadable to root")
        write(name, "x")(here, kit)
        (here / name).chmod(0)
    return prepare


def several(*prepares):
    return lambda here, kit: [prepare(here, kit) for prepare in prepares]


# ---- the table ------------------------------------------------------------------------------------------------------

WHOLE, ABOVE = "not a whole number of at least", "is not a number of at least 0"
ROWS = [
    # flags of train.py
    ("method", None, "train --method lorra", "unknown method 'lorra'", "choose one of full, lora, pissa"),
    ("flag", None, "train --learning-rate 1", "--learning-rate", "--help lists every option"),
    ("no value", None, "train --lr", "argument --lr", "expected one argument"),
    ("target", None, "train --targets q_proj,w_pack", "'w_pack'", "this model has q_proj"),
    ("no target", None, "train --targets ,", "--targets is empty", "as in --targets q_proj,v_proj"),
    ("schedule", None, "train --schedule zigzag", "--schedule", "choose from"),
    ("device", None, "train --device gpu", "--device gpu", "choose auto, cpu"),
    ("absent device", None, "train --device cuda:99", "--device cuda:99", "choose auto, cpu"),
    ("dtype", None, "train --dtype float8", "--dtype", "choose from"),
    ("template", None, "train --template chat", "--template", "choose from"),
    ("svd", None, "train --method pissa --svd fast", "--svd", "choose from"),
    ("reduction", None, "train --method sorsa --reduction max", "--reduction", "choose from"),
    ("init", None, "train --method sara --init ones", "--init", "choose from"),
    ("v mode", None, "train --method mosara --v-mode all", "--v-mode", "choose from"),
    ("basis", None, "train --method cora --basis pca", "--basis", "choose from"),
    ("a init", None, "train --method cora --a-init ones", "--a-init", "choose from"),
    ("group", None, "train --method lotr --group-by colour", "--group-by", "choose from"),
    ("recipe", None, "train --recipe cook", "--recipe", "choose from"),
    ("recipe of another", None, "train --method sara --recipe paper", "--recipe paper",
     "known for sorsa, pissa, lora, full"),
    ("lr word", None, "train --lr fast", "--lr", "'fast' " + ABOVE),
    ("lr nan", None, "train --lr nan", "--lr", "'nan' " + ABOVE),
    ("lr infinite", None, "train --lr inf", "--lr", "'inf' " + ABOVE),
    ("lr zero", None, "train --lr 0", "--lr", "'0' is not above 0"),
    ("gamma below zero", None, "train --method sorsa --gamma -1", "--gamma", "'-1' " + ABOVE),
    ("alpha", None, "train --alpha 0", "--alpha", "is not above 0"),
    ("clip", None, "train --clip -inf", "--clip", "expected one argument"),
    ("weight decay", None, "train --weight-decay -0.1", "--weight-decay", ABOVE),
    ("warmup", None, "train --warmup 2", "--warmup 2", "at most 1"),
    ("warmup nan", None, "train --warmup nan", "--warmup", ABOVE),
    ("threshold", None, "train --method sara --threshold 1.5", "threshold 1.5", "above 0 and at most 1"),
    ("threshold zero", None, "train --method mosara --threshold 0", "--threshold", "is not above 0"),
    ("rank word", None, "train --rank full", "--rank", "'full' is " + WHOLE + " 1"),
    ("rank zero", None, "train --rank 0", "--rank", WHOLE + " 1"),
    ("rank too large", None, "train --rank 33", "rank 33", "must be 1 .. 32, the smaller side of"),
    ("seed", None, "train --seed 99999999999999999999", "--seed", WHOLE + " 0, below 10^12"),
    ("seed half", None, "train --seed 1.5", "--seed", WHOLE),
    ("sets", None, "train --method mosara --sets 0", "--sets", WHOLE),
    ("router rank", None, "train --method mosara --router-rank -1", "--router-rank", WHOLE),
    ("steps", None, "train --steps 0", "--steps", WHOLE),
    ("endless steps", None, "train --steps 1" + "0" * 400, "--steps", "below 10^12"),
    ("steps and epochs", None, "train --epochs 2", "--steps or --epochs", "not both"),
    ("epochs word", None, "train --epochs two", "--epochs", ABOVE),
    ("endless epochs", None, "train --epochs 1e308", "--epochs 1e+308", "give fewer"),
    ("batch", None, "train --batch 1.5", "--batch", WHOLE),
    ("micro-batch", None, "train --micro-batch 0", "--micro-batch", WHOLE),
    ("limit", None, "train --limit 0", "--limit", WHOLE),
    ("held-out", None, "train --held-out 0", "--held-out", WHOLE),
    ("held-out of all", None, "train --held-out 40", "--held-out 40",
     "leaves nothing to train on: the data has 40 examples"),
    ("eval-every", None, "train --eval-every -3", "--eval-every", WHOLE),
    ("log-every", None, "train --log-every never", "--log-every", WHOLE),
    ("max-tokens", None, "train --max-tokens 0", "--max-tokens", WHOLE),
    ("all too long", None, "train --max-tokens 5", "more than 5 tokens", "raise --max-tokens"),
    ("cut", None, "train --cut 512", "--cut", "'512' is not two lengths, as in 512+512"),
    ("cut to nothing", None, "train --cut 5+0", "--cut", "two lengths, as in 512+512"),
    ("params", None, "train --params 1.2G", "--params", "'1.2G' is not a number of at least 1, as in 500k or 1.2M"),
    ("params infinite", None, "train --params 1e999", "--params", "as in 500k or 1.2M"),
    ("params and rank", None, "train --params 5k --rank 2", "--params chooses the rank", "give --params or --rank"),
    ("params and threshold", None, "train --method sara --params 5k --threshold 0.1", "--params chooses the threshold",
     "not both"),
    ("params of full", None, "train --method full --params 5k", "--params does not belong to full",
     "its own flags are"),
    ("another's flag", None, "train --gamma 1", "--gamma does not belong to lora",
     "its own flags are --targets, --params, --rank"),
    ("another's switch", None, "train --method cora --core-only", "--core-only does not belong to cora", "--basis"),
    ("square only", None, "train --method cora --basis input", "k_proj is 32 x 64", "name other targets"),
    ("extra twice", None, "train --method cora --extra a.gguf,a.gguf", "--extra", "as in --extra one.gguf,two.gguf"),
    ("extra missing", None, "train --method cora --extra {here}/no.gguf", "{here}/no.gguf: no such file",
     "the path of a .gguf file"),
    ("extra of no use", None, "train --method cora --basis random --extra {gguf}", "basis='random'", "leave out extra"),
    ("extra of another shape", one_layer, "train --method cora --rank 2 --extra {here}/bad.gguf",
     "bad.gguf has no model.layers.1", "must have the base's architecture"),
    ("overwrite what", None, "only train --overwrite", "--overwrite replaces the run in a folder",
     "name it with --out"),
    # where train.py writes
    ("out is a file", write("out"), "train", "--out {here}/out is a file", "name a folder"),
    ("out below a file", write("file"), "train --out {here}/file/run", "{here}/file is a file", "name a folder"),
    ("out holds a run", a_run, "train --out {here}/run", "{here}/run already holds a run",
     "give another folder, or --overwrite"),
    ("out with a long name", None, "train --out {here}/" + "x" * 300, "File name too long", "check that path"),
    ("overwriting with bad data", several(a_run, write("bad.jsonl", "{}\n")),
     "train --out {here}/run --overwrite --data {here}/bad.jsonl", "{here}/bad.jsonl:1",
     "query and response, question and answer"),
    # models
    ("model", None, "train --model gpt5", "model gpt5", "the path of a .gguf file, a folder with config.json"),
    ("no model name", None, "train --model=", "model ''", "it takes smollm2-135m"),
    ("missing model", None, "train --model {here}/no.gguf", "{here}/no.gguf: no such file", "it takes smollm2-135m"),
    ("no hub", None, "train --model owner/model", "no connection", "pass --model FOLDER"),
    ("empty model", write("a.gguf"), "train --model {here}/a.gguf", "{here}/a.gguf: the file is empty",
     "download it again"),
    ("text for a model", write("a.gguf", "not a model at all, but text" * 9), "train --model {here}/a.gguf",
     "{here}/a.gguf: magic", "expected a little-endian GGUF file"),
    ("half a gguf", cut("{gguf}", "a.gguf", 0.5), "train --model {here}/a.gguf", "{here}/a.gguf: truncated",
     "download it again"),
    ("another architecture", changed_gguf({"general.architecture": "mamba"}), "train --model {here}/bad.gguf",
     "architecture mamba is not supported", "supported: llama"),
    ("field missing", changed_gguf({"llama.block_count": None}), "train --model {here}/bad.gguf",
     "{here}/bad.gguf: metadata field llama.block_count is missing", "the file is incomplete"),
    ("tensor missing", changed_gguf(tensors={"blk.0.attn_q.weight": None}), "train --model {here}/bad.gguf",
     "blk.0.attn_q.weight is missing", "use another file"),
    ("tensor of another shape", changed_gguf(tensors={"blk.0.attn_q.weight": tiny_tensors()["blk.0.attn_k.weight"]}),
     "train --model {here}/bad.gguf", "blk.0.attn_q.weight is (32, 64), expected (64, 64)", "use another file"),
    ("rope scaling", changed_gguf({"llama.rope.scaling.type": "yarn"}), "train --model {here}/bad.gguf", "RoPE scaling",
     "use a model without it"),
    ("no config.json", changed_folder("config.json", None), "train --model {here}/hf",
     "{here}/hf/config.json: no such file", "a model folder holds config.json"),
    ("config.json of text", changed_folder("config.json", "hidden_size: 64"), "train --model {here}/hf",
     "{here}/hf/config.json: not valid JSON", "download it again"),
    ("config.json of a list", changed_folder("config.json", "[]"), "train --model {here}/hf",
     "config.json: not a JSON object", "again"),
    ("unsupported architecture", changed_folder("config.json", {"architectures": ["MambaForCausalLM"]}),
     "train --model {here}/hf", "MambaForCausalLM is not supported", "supported: LlamaForCausalLM"),
    ("config.json with a word", changed_folder("config.json", {"hidden_size": "wide"}), "train --model {here}/hf",
     "the field hidden_size is 'wide'", "expected a int above 0"),
    ("no tokenizer.json", changed_folder("tokenizer.json", None), "train --model {here}/hf",
     "{here}/hf/tokenizer.json: no such file", "write or download it"),
    ("safetensors of text", changed_folder("model.safetensors", "These are no tensors, only words."),
     "train --model {here}/hf", "{here}/hf/model.safetensors: truncated: the header", "download it again"),
    ("half a safetensors",
     several(changed_folder("config.json", {}), cut("{hf}/model.safetensors", "hf/model.safetensors", 0.5)),
     "train --model {here}/hf", "{here}/hf/model.safetensors: truncated: tensor", "download it again"),
    ("hf tensor missing", changed_weights(**{"model.norm.weight": None}), "train --model {here}/hf",
     "model.norm.weight is missing", "use another folder"),
    ("hf tensor of another shape", changed_weights(**{"model.norm.weight": lambda w: w[:8].clone()}),
     "train --model {here}/hf", "model.norm.weight is [8], expected [64]", "use another folder"),
    ("missing shard",
     several(changed_folder("model.safetensors", None), write("hf/model.safetensors.index.json",
     '{"weight_map": {"a": "b.safetensors"}}')), "train --model {here}/hf", "b.safetensors: the index names this file",
     "download it again"),
    ("unreadable model", shut("a.gguf"), "train --model {here}/a.gguf", "{here}/a.gguf",
     "check that path, its permissions"),
    # training data
    ("no data folder", None, "train --data {here}/no", "no folder '{here}/no'",
     "one of the words auto, gsm8k, practice"),
    ("empty data folder", folder("d"), "train --data {here}/d", "{here}/d/train.jsonl: no such file",
     "holds train.jsonl and test.jsonl"),
    ("no data file", None, "train --data {here}/no.jsonl", "{here}/no.jsonl: no such file",
     "expected a .json list or a .jsonl"),
    ("folder for a data file", folder("d.json"), "train --data {here}/d.json", "{here}/d.json: no such file",
     "expected a .json list"),
    ("no download", None, "train --data gsm8k", "download failed", "pass --data FOLDER"),
    ("empty data", write("d/train.jsonl", " \n"), "train --data {here}/d", "{here}/d/train.jsonl: holds no problems",
     "expected one JSON object"),
    ("malformed line", write("d/train.jsonl", RECORD + "{not json\n"), "train --data {here}/d",
     "{here}/d/train.jsonl:2: not valid JSON", "mend it or take it out"),
    ("nested beyond reason", write("d/train.jsonl", "[" * 100_000), "train --data {here}/d",
     "{here}/d/train.jsonl:1: not valid JSON", "mend it or take it out"),
    ("not UTF-8", write("d/train.jsonl", RECORD.encode() * 2 + b'{"question": "\xff"}'), "train --data {here}/d",
     "{here}/d/train.jsonl:3: not valid JSON: 'utf-8' codec", "mend it or take it out"),
    ("half a surrogate pair", write("d/train.jsonl", '{"question": "a \\ud83d", "answer": "#### 1"}'),
     "train --data {here}/d", "{here}/d/train.jsonl:1: not valid JSON: 'utf-8' codec", "mend it or take it out"),
    ("no question", write("d/train.jsonl", '{"answer": "#### 2"}'), "train --data {here}/d", "{here}/d/train.jsonl:1",
     "expected a JSON object with a non-empty text under 'question'"),
    ("no answer", write("d/train.jsonl", RECORD + '{"question": "Why?"}'), "train --data {here}/d",
     "{here}/d/train.jsonl:2", "expected a JSON object with a non-empty text under 'answer'"),
    ("no number", write("d/train.jsonl", '{"question": "Why?", "answer": "So."}'), "train --data {here}/d",
     "{here}/d/train.jsonl:1: the answer does not end", "as in '#### 72'"),
    ("endless number", write("d/train.jsonl", RECORD.replace("2", "2" * 5000)), "train --data {here}/d",
     "{here}/d/train.jsonl:1: the number behind '####'", "shorten it"),
    ("metamath object", write("m.json", '{"query": "?"}'), "train --data {here}/m.json",
     "{here}/m.json: expected a JSON list", "one record per line goes into a .jsonl file"),
    ("metamath record", write("m.json", '[{"query": "?", "answer": "!"}]'), "train --data {here}/m.json",
     "{here}/m.json: record 1", "expected a JSON object with two texts, under query and response"),
    ("metamath cut off", write("m.json", '[{"query": "?"'), "train --data {here}/m.json",
     "{here}/m.json: not valid JSON", "mend it"),
    ("metamath empty", write("m.json", "[]"), "train --data {here}/m.json", "{here}/m.json: holds no records",
     "expected one JSON object"),
    # eval.py
    ("nothing to evaluate", None, "eval", "name a run", "--model"),
    ("no run", None, "eval {here}/no", "{here}/no: no such file", "a folder that a finished train.py run has left"),
    ("run without an adapter", write("r/log.jsonl"), "eval {here}/r", "{here}/r/adapter.safetensors: no such file",
     "finished train.py run"),
    ("benchmark", None, "eval --model {gguf} --benchmark mmlu", "--benchmark", "choose from"),
    ("eval template", None, "eval --model {gguf} --template chat", "--template", "choose from"),
    ("shots", None, "eval --model {gguf} --shots many", "--shots", WHOLE + " 0"),
    ("eval limit", None, "eval --model {gguf} --limit -1", "--limit", WHOLE + " 0"),
    ("eval batch", None, "eval --model {gguf} --batch 0", "--batch", WHOLE + " 1"),
    ("max-new", None, "eval --model {gguf} --max-new 0", "--max-new", WHOLE + " 1"),
    ("max-new beyond the context", None, "eval --model {gguf} --data {data} --max-new 300",
     "do not fit the model's context of 256", "lower --max-new or --shots"),
    ("nothing asked", None, "eval --model {gguf} --ask=", "--ask is empty", "write a question"),
    ("math without data", None, "eval --model {gguf} --benchmark math", "--benchmark math needs --data FILE",
     "a .jsonl file"),
    ("math with shots", None, "eval --model {gguf} --benchmark math --data {here}/m.jsonl --shots 2", "--shots",
     "are for GSM-8K"),
    ("math without a file", None, "eval --model {gguf} --benchmark math --data {here}/m.jsonl",
     "{here}/m.jsonl: no such file", "expected a .json list or a .jsonl file"),
    ("math problem", write("m.jsonl", '{"question": "?"}'),
     "eval --model {gguf} --benchmark math --data {here}/m.jsonl", "{here}/m.jsonl:1",
     "expected a JSON object with a non-empty text under 'problem'"),
    ("math answer", write("m.jsonl", '{"problem": "?", "solution": "2"}'),
     "eval --model {gguf} --benchmark math --data {here}/m.jsonl", "{here}/m.jsonl:1: no text under 'answer'",
     "ends in a \\boxed{{...}} one"),
    ("no test data", write("d/train.jsonl", RECORD), "eval --model {gguf} --data {here}/d",
     "{here}/d/test.jsonl: no such file", "holds train.jsonl and test.jsonl"),
    ("training file as test", write("d.jsonl", RECORD), "eval --model {gguf} --data {here}/d.jsonl",
     "no folder '{here}/d.jsonl'", "give a folder"),
    ("eval out is a file", write("file"), "eval {run} --out {here}/file", "--out {here}/file is a file",
     "name a folder"),
    ("eval out below a file", write("file"), "eval {run} --out {here}/file/out", "{here}/file is a file",
     "name a folder"),
    ("result of text", changed_result("no result"), "eval {here}/run",
     "{here}/run/result.json: not valid JSON", "name --data and --template"),
    ("result with a wrong template", changed_result({"template": "chat"}), "eval {here}/run", "{here}/run/result.json",
     "name --data and --template"),
    ("data of the run gone", changed_result({"data": "/no/such"}), "eval {here}/run", "no folder '/no/such'",
     "give a folder"),
    ("adapter of another base", changed_gguf(seed=5), "eval {run} --model {here}/bad.gguf",
     "trained on another base model", "load that base"),
    ("base gone", changed_adapter(base_name="/no/such.gguf"), "eval {here}/run",
     "base model /no/such.gguf is not there", "--model"),
    ("base not named", changed_adapter(base_name=""), "eval {here}/run", "names no base model", "give it with --model"),
    ("adapter with an unknown setting", changed_adapter({"dropout": 0.1}), "eval {here}/run",
     "lora has no setting dropout", "was it written by another version?"),
    ("half an adapter", several(a_run, cut("{run}/adapter.safetensors", "run/adapter.safetensors", 0.9)),
     "eval {here}/run", "{here}/run/adapter.safetensors", "write or download it again"),
    # export.py
    ("nowhere to", None, "export {run} {here}/to", "--to", "required"),
    ("format", None, "export {run} {here}/to --to onnx", "--to", "choose from"),
    ("nothing to export", None, "export {here}/to --to hf", "name a run and a folder", "--model MODEL --to hf"),
    ("base as a lora", None, "export {here}/to --model {gguf} --to peft", "name a run and a folder", "--to hf"),
    ("no run to export", None, "export {here}/no {here}/to --to hf", "{here}/no: no such file",
     "a finished train.py run"),
    ("export onto files", write("to/model.safetensors"), "export {run} {here}/to --to hf",
     "{here}/to is not an empty folder", "name another"),
    ("export below a file", write("file"), "export {run} {here}/file/to --to hf", "{here}/file is a file",
     "name a folder"),
    ("mosara as a lora", None, "export {mosara} {here}/to --to peft", "q_proj cannot be exported",
     "eval.py takes the run as it is"),
    ("mosara merged", None, "export {mosara} {here}/to --to hf", "each token has its own update",
     "eval.py takes the run as it is"),
    ("full as a lora", None, "export {full} {here}/to --to peft", "full fine-tuning changes whole matrices",
     "export it with --to hf"),
    ("export dtype", None, "export {run} {here}/to --to hf --dtype float16", "--dtype", "choose from"),
    # sweep.py and bench.py
    ("no methods", None, "sweep", "--methods", "required"),
    ("sweep method", None, "sweep --methods lora lorra", "'lorra'", "choose from"),
    ("sweep rate", None, "sweep --methods lora --lrs 1e-3 nan", "--lrs", ABOVE),
    ("sweep params", None, "sweep --methods lora --params some", "--params", "as in 500k or 1.2M"),
    ("results folder", folder("r"), "sweep --methods lora --results {here}/r", "--results {here}/r is a folder",
     "name a file"),
    ("results below a file", write("file"), "sweep --methods lora --results {here}/file/r.jsonl", "--results",
     "name a folder"),
    ("bench of nothing", None, "bench", "what", "required"),
    ("bench of what", None, "bench speed", "'speed'", "choose from"),
    ("bench rounds", None, "bench train --rounds 0", "--rounds", WHOLE),
    ("bench peer", None, "bench load --peer", "--peer", "is for train, generate, init, memory and gpu"),
    # named as it should be, but for the file or the remedy: as the readers have it
    ("tied head", None, "train --targets lm_head", "lm_head shares its weight", "would change the other"),
    ("folder without weights", folder("m.gguf"), "train --model {here}/m.gguf", "{here}/m.gguf",
     "no model.safetensors"),
    ("adapter for another shape", several(one_layer, changed_adapter(base_sha256="")),
     "eval {here}/run --model {here}/bad.gguf", "{here}/run/adapter.safetensors: does not fit this model",
     "unexpected model.layers.1"),
    ("adapter of an unknown method", changed_adapter({"method": "dora"}), "eval {here}/run",
     "{here}/run/adapter.safetensors: unknown method 'dora'", "known: full, lora"),
    ("adapter of another rank", changed_adapter({"rank": 4}), "eval {here}/run", "has shape (2, 64), expected (4, 64)",
     "{here}/run/adapter.safetensors: does not fit this model"),
    ("plain safetensors", None, "eval {hf}/model.safetensors", "{hf}/model.safetensors: not an adapter file",
     "no 'adapter' entry"),
]


@pytest.fixture(scope="session")
def kit(tiny_gguf, tmp_path_factory):
    """{name: path} of what is right: a model as a file and as a folder, data, and three runs."""
    root = tmp_path_factory.mktemp("kit")
    made = {"gguf": tiny_gguf, "data": write_sums(root / "data"), "hf": root / "hf"}
    export.main([str(root / "hf"), "--model", str(tiny_gguf), "--to", "hf"])
    for name, flags in (("run", ["lora", "--rank", "2"]), ("mosara", ["mosara"]), ("full", ["full"])):
        made[name] = root / name
        train.main(["--model", str(tiny_gguf), "--data", str(made["data"]), "--held-out", "8", "--steps", "1",
                    "--device", "cpu", "--no-sample", "--out", str(root / name), "--method", *flags])
    return made


@pytest.fixture
def offline(monkeypatch, tmp_path_factory):
    """Nothing answers where a model or data would be downloaded from, and nothing is in the cache."""
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("SORSA_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setattr(gsm8k, "URL", "http://127.0.0.1:9/{}.jsonl")


def tree(folder):
    """{path: bytes} of every file below a folder; None for a folder."""
    readable = (path for path in folder.rglob("*") if os.access(path, os.R_OK))
    return {path: path.read_bytes() if path.is_file() else None for path in readable}


def command_line(command, places):
    """(script, arguments): the script's usual flags, then those of the row; "only" leaves the usual ones out."""
    script, *words = command.removeprefix("only ").split()
    usual = [] if command.startswith("only ") else USUAL[script].split()
    return script, [word.format(**places) for word in (*usual, *words)]


def check(err, status, words, places):
    """One line that begins with "error: " and has all the words; status 2."""
    assert status == 2 and err.startswith("error: ") and err.endswith("\n") and err.count("\n") == 1, err
    for word in words:
        assert word.format(**places) in err, err


@pytest.mark.parametrize("prepare, command, words", [(p, c, w) for _, p, c, *w in ROWS], ids=[row[0] for row in ROWS])
def test_bad_input_is_one_line_with_name_and_remedy(prepare, command, words, kit, offline, tmp_path, monkeypatch,
                                                         capsys):
    """Status 2, one line on stderr that names what is wrong and how to mend it, and not a file made or changed."""
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    if prepare:
        prepare(here, kit)
    places = {**kit, "here": here}
    script, arguments = command_line(command, places)
    before, run_before = tree(here), tree(kit["run"])
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *arguments])
    with pytest.raises(SystemExit) as stopped:
        run_script(MAINS[script])
    check(capsys.readouterr().err, stopped.value.code, words, places)
    assert tree(here) == before and tree(kit["run"]) == run_before


def test_the_rows_differ():
    """No two rows have one id, or wait for the same words from one script."""
    assert len({row[0] for row in ROWS}) == len(ROWS) >= 60
    assert len({(row[2].split()[0], row[3:]) for row in ROWS}) == len(ROWS)


@pytest.mark.parametrize("script, arguments, words", [
    ("train", ["--method", "lora", "--model", "{gguf}", "--data", "{data}", "--held-out", "40", "--out", "{here}/out"],
     ("--held-out 40", "leaves nothing")),
    ("eval", ["{here}/no\nrun"], ("{here}/no run", "finished train.py run")),
    ("sweep", ["--methods", "lora", "--data", "{data}", "--results", "{here}/r.jsonl", "--", "--model",
     "{here}/no.gguf"],
     ("lora: model {here}/no.gguf: no such file", "it takes smollm2-135m")),
], ids=["train", "a line break in a name", "train below sweep"])
def test_a_process_ends_as_the_function_does(script, arguments, words, kit, tmp_path):
    """The scripts themselves, as a shell runs them: status 2 and the one line, also of the script below."""
    places = {**kit, "here": tmp_path}
    done = subprocess.run([sys.executable, str(ROOT / f"{script}.py"), *(word.format(**places) for word in arguments)],
                          capture_output=True, text=True, cwd=tmp_path)
    check(done.stderr, done.returncode, words, places)
    assert not (tmp_path / "out").exists() and not (tmp_path / "r.jsonl").exists() and not list(tmp_path.rglob("*.tmp"))
