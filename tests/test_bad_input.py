"""Tables of bad input: what is wrong, and what the one line that says so must contain.

A row is a command line and words of the message: first the name of what is wrong, then the remedy. Where files are
needed there is an id and a way to prepare them in front. {places} in commands and words are files of the `kit`; {here}
is the folder of the test.
"""
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import eval as evaluation
import train
from data import gsm8k
from support.script import run_script
from tests.tiny import tiny_metadata, tiny_tensors, write_gguf
from tests.toy import write_sums
from tools import bench, compare, export, spectra
from weights.safetensors import read_safetensors, write_safetensors

ROOT = Path(__file__).resolve().parent.parent
MAINS = {"train": train.main, "eval": evaluation.main, "export": export.main, "bench": bench.parse_arguments, "compare": compare.main,
         "spectra": spectra.main}
USUAL = {"train": "--method lora --model {gguf} --data {data} --held-out 8 --steps 1 --device cpu --no-sample --out {here}/out",
         "eval": "--device cpu --limit 2 --max-new 4", "compare": "--data {data}"}
RECORD = '{"question": "How many?", "answer": "One and one.\\n#### 2"}\n'


# ---- flags ----------------------------------------------------------------------------------------------------------

WHOLE, ABOVE = "not a whole number of at least", "is not a number of at least 0"
FLAGS = [
    ("train --method lorra", "unknown method 'lorra'", "choose one of full, lora, pissa"),
    ("train --learning-rate 1", "--learning-rate", "--help lists every option"),
    ("train --lr", "argument --lr", "expected one argument"),
    ("train --lr fast", "--lr", "'fast' " + ABOVE),
    ("train --lr nan", "--lr", "'nan' " + ABOVE),
    ("train --lr 0", "--lr", "'0' is not above 0"),
    ("train --method sorsa --gamma -1", "--gamma", "'-1' " + ABOVE),
    ("train --rank full", "--rank", "'full' is " + WHOLE + " 1"),
    ("train --rank 0", "--rank", "'0' is " + WHOLE + " 1"),
    ("train --seed 99999999999999999999", "--seed", WHOLE + " 0, below 10^12"),
    ("train --cut 512", "--cut", "'512' is not two lengths, as in 512+512"),
    ("train --cut 5+0", "--cut", "two lengths, as in 512+512"),
    ("train --params 1.2G", "--params", "'1.2G' is not a number of at least 1, as in 500k or 1.2M"),
    ("train --schedule zigzag", "--schedule", "choose from"),
    ("train --method cora --basis pca", "--basis", "choose from"),
    ("train --targets q_proj,w_pack", "'w_pack'", "this model has q_proj"),
    ("train --targets ,", "--targets is empty", "as in --targets q_proj,v_proj"),
    ("train --targets lm_head", "lm_head shares its weight", "would change the other"),
    ("train --device gpu", "--device gpu", "choose auto, cpu"),
    ("train --rank 33", "rank 33", "must be 1 .. 32, the smaller side of"),
    ("train --alpha 0", "alpha 0", "it must be above 0"),
    ("train --alpha 1e30", "alpha 1e+30", "from 1e-6 to 1e6"),
    ("train --warmup 2", "--warmup 2", "at most 1"),
    ("train --method sara --threshold 1.5", "threshold 1.5", "above 0 and at most 1"),
    ("train --epochs 2", "--steps or --epochs", "not both"),
    ("train --epochs 1e308", "--epochs 1e+308", "give fewer"),
    ("train --held-out 40", "the 40 examples of --held-out and --report", "leave nothing to train on: the data has 40; give a lower --held-out"),
    ("train --answers equations --strip-annotations", "--strip-annotations removes", "give one of them"),
    ("train --max-tokens 5", "more than 5 tokens", "raise --max-tokens"),
    ("train --params 5k --rank 2", "--params chooses the rank", "give --params or --rank"),
    ("train --method sara --params 5k --threshold 0.1", "--params chooses the threshold", "not both"),
    ("train --method full --params 5k", "--params does not belong to full", "its own flags are"),
    ("train --gamma 1", "--gamma does not belong to lora", "its own flags are --rank, --alpha, --targets, --params"),
    ("train --method cora --core-only", "--core-only does not belong to cora", "--basis"),
    ("train --method sara --recipe paper", "--recipe paper", "known for sorsa, pissa, lora, full"),
    ("train --method cora --basis input", "k_proj is 32 x 64", "name other targets"),
    ("train --method cora --extra {gguf},{gguf}", "--extra names a model twice", "as in --extra one.gguf,two.gguf"),
    ("train --method cora --extra {here}/no.gguf", "{here}/no.gguf: no such file", "the path of a .gguf file"),
    ("train --method cora --basis random --extra {gguf}", "basis='random'", "leave out extra"),
    ("only train --overwrite", "--overwrite replaces the run in a folder", "name it with --out"),
    ("train --out {here}/" + "x" * 300, "File name too long", "check that path"),
    ("train --out=", "--out: it is empty", "name a folder"),
    ("train --data=", "--data: it is empty", "--help"),
    ("train --graphs on --plain", "--plain leaves off what --graphs on asks for", "give one of them"),
    ("only train --resume {here}/no", "there is no such folder", "name that of a run"),
    ("only train --resume {run}", "this run is finished", "another run takes another --out"),
    ("train --model {hf}/model.safetensors", "model.safetensors is a file, and not a .gguf file", "a folder with config.json"),
    ("train --model gpt5", "model gpt5", "the path of a .gguf file, a folder with config.json"),
    ("train --model {here}/no.gguf", "{here}/no.gguf: no such file", "it takes smollm2-135m"),
    ("train --model owner/model", "no connection", "pass --model FOLDER"),
    ("train --data {here}/no", "no folder '{here}/no'", "one of the words auto, gsm8k, practice"),
    ("train --data {gguf}", "{gguf}' is a file, and no .jsonl or .json", "give a folder with"),
    ("train --data {here}/no.jsonl", "{here}/no.jsonl: no such file", "expected a .json list or a .jsonl"),
    ("train --data gsm8k", "download failed", "pass --data FOLDER"),
    ("eval", "name a run", "--model"),
    ("eval {here}/no", "{here}/no: no such file", "a folder that a finished train.py run has left"),
    ("eval {gguf}", "{gguf} is no adapter", "a base model goes behind --model"),
    ("eval {hf}/model.safetensors", "{hf}/model.safetensors: not an adapter file", "no 'adapter' entry"),
    ("eval --model {gguf} --data {data} --max-new 300", "do not fit the model's context of 256", "lower --max-new or --shots"),
    ("eval --model {gguf} --ask=", "--ask is empty", "write a question"),
    ("eval --model {gguf} --benchmark loss", "--benchmark loss needs --data FILE", "a .json or .jsonl"),
    ("eval --model {gguf} --forgetting --limit 3", "--forgetting is measured on a text of its own", "leave out --limit"),
    ("eval --model {gguf} --forgetting --benchmark gsm8k", "--benchmark", "not allowed with argument --forgetting"),
    ("eval --model {gguf} --data {data}/test.jsonl --shots 2 --benchmark gsm8k", "{data}/test.jsonl is one file", "a folder with train"),
    ("only eval {run} --ask why --batch 7 --limit 3", "--ask answers one question", "leave out --batch"),
    ("eval --model {gguf} --benchmark math", "--benchmark math needs --data FILE", "a .jsonl file"),
    ("eval --model {gguf} --benchmark math --data {here}/m.jsonl --shots 2", "--shots", "are for GSM-8K"),
    ("export {run} {here}/to", "--to", "required"),
    ("export {run} --to peft {run}", "{run} is not an empty folder", "name another"),
    ("export {here}/to --to hf", "name a run and a folder", "--model MODEL --to hf"),
    ("export {here}/to --model {gguf} --to peft", "name a run and a folder", "--to hf"),
    ("export {here}/no {here}/to --to hf", "{here}/no: no such file", "a finished train.py run"),
    ("export {mosara} {here}/to --to peft", "q_proj cannot be exported", "eval.py takes the run as it is"),
    ("export {full} {here}/to --to peft", "full fine-tuning changes whole matrices", "export it with --to hf"),
    ("train --method mosara --spectra-every 1", "--spectra-every: mosara has no W_t at", "no single matrix equals it: leave it out"),
    ("spectra", "RUN", "required"),
    ("spectra {here}/no", "{here}/no: no such file", "a finished train.py run"),
    ("spectra {mosara}", "{mosara}: mosara has no W_t at model.layers.0.self_attn.q_proj", "no single matrix equals it"),
    ("spectra {run} --results {data}/train.jsonl/r", "--results in {data}/train.jsonl", "name a folder"),
    ("compare", "--methods", "required"),
    ("compare --methods lora --lrs 1e-3 nan", "--lrs", ABOVE),
    ("bench load --peer", "--peer", "is for train, generate, init and memory")]


# ---- files ----------------------------------------------------------------------------------------------------------

def write(name, content=""):
    """A file in the folder of the test."""
    def prepare(here, kit):
        path = here / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode())
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


def with_one(value):
    """The value projection of a tiny model with this number in one place."""
    weight = tiny_tensors()["blk.1.attn_v.weight"]
    weight[3, 5] = float(value)
    return weight


def adapter_with_nan(here, kit):
    """{here}/run, in whose adapter one number is none."""
    changed_adapter()(here, kit)
    path = here / "run" / "adapter.safetensors"
    tensors, found = read_safetensors(path)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    next(iter(tensors.values())).view(-1)[0] = float("nan")
    write_safetensors(path, tensors, found)


def other_data_in_the_cache(here, kit):
    """What somebody has put where the downloaded GSM-8K lies."""
    shutil.copytree(kit["data"], here.parent / "cache" / "gsm8k")


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


def link(name, target):
    """A link in the folder of the test."""
    return lambda here, kit: (here / name).symlink_to(here / target)


def several(*prepares):
    return lambda here, kit: [prepare(here, kit) for prepare in prepares]


DATA, MATH = "train --data {here}/d", "eval --model {gguf} --benchmark math --data {here}/m.jsonl"
FILES = [
    ("out is a file", write("out"), "train", "--out {here}/out is a file", "name a folder"),
    ("out below a file", write("file"), "train --out {here}/file/run", "{here}/file is a file", "name a folder"),
    ("out holds a run", changed_result({}), "train --out {here}/run", "{here}/run already holds a run", "give another folder"),
    ("overwriting with bad data", several(changed_result({}), write("bad.jsonl", "{}\n")),
     "train --out {here}/run --overwrite --data {here}/bad.jsonl", "{here}/bad.jsonl:1", "query and response, question and answer"),
    ("further model of another shape", one_layer, "train --method cora --rank 2 --extra {here}/bad.gguf",
     "bad.gguf has no model.layers.1", "must have the base's architecture"),
    # models
    ("empty model", write("a.gguf"), "train --model {here}/a.gguf", "{here}/a.gguf: the file is empty", "download it again"),
    ("text for a model", write("a.gguf", "not a model at all, but text" * 9), "train --model {here}/a.gguf", "{here}/a.gguf: magic",
     "expected a little-endian GGUF file"),
    ("half a gguf", cut("{gguf}", "a.gguf", 0.5), "train --model {here}/a.gguf", "{here}/a.gguf: truncated", "download it again"),
    ("another architecture", changed_gguf({"general.architecture": "mamba"}), "train --model {here}/bad.gguf",
     "architecture mamba is not supported", "supported: llama"),
    ("tensor of another shape", changed_gguf(tensors={"blk.0.attn_q.weight": tiny_tensors()["blk.0.attn_k.weight"]}),
     "train --model {here}/bad.gguf", "blk.0.attn_q.weight is (32, 64), expected (64, 64)", "use another file"),
    *((f"base with {value} for {method}", changed_gguf(tensors={"blk.1.attn_v.weight": with_one(value)}),
       f"train --model {{here}}/bad.gguf --method {method}", "layers.1.self_attn.v_proj has weights that are not finite, or too large",
       "load another") for value, method in (("nan", "pissa"), ("inf", "cora"), ("1e30", "sara --params 5k"), ("1e30", "mosara"))),
    *((f"norm with {value}", changed_gguf(tensors={"output_norm.weight": np.full(64, value, np.float32)}),
       f"only eval --device cpu --model {{here}}/bad.gguf{more}", "{here}/bad.gguf holds NaN or infinity in model.norm.weight", "load another")
      for value, more in ((np.nan, ""), (np.inf, " --forgetting"))),
    ("a context too short for prose", changed_gguf({"llama.context_length": 128}), "train --model {here}/bad.gguf --forgetting",
     "pieces of 256 tokens, and the model's context is 128", "leave it out"),
    ("no weights", folder("m.gguf"), "train --model {here}/m.gguf", "{here}/m.gguf", "no model.safetensors"),
    ("no config.json", changed_folder("config.json", None), "train --model {here}/hf", "{here}/hf/config.json: no such file",
     "a model folder holds config.json"),
    ("config.json of text", changed_folder("config.json", "hidden_size: 64"), "train --model {here}/hf",
     "{here}/hf/config.json: not valid JSON", "download it again"),
    ("unsupported architecture", changed_folder("config.json", {"architectures": ["MambaForCausalLM"]}), "train --model {here}/hf",
     "MambaForCausalLM is not supported", "supported: LlamaForCausalLM"),
    ("config.json with a word", changed_folder("config.json", {"hidden_size": "wide"}), "train --model {here}/hf",
     "the field hidden_size is 'wide'", "expected a int above 0"),
    ("no tokenizer.json", changed_folder("tokenizer.json", None), "train --model {here}/hf", "{here}/hf/tokenizer.json: no such file",
     "write or download it"),
    ("half a safetensors", several(changed_folder("config.json", {}), cut("{hf}/model.safetensors", "hf/model.safetensors", 0.5)),
     "train --model {here}/hf", "{here}/hf/model.safetensors: truncated: tensor", "download it again"),
    ("tensors of another model", changed_folder("config.json", {"hidden_size": 32, "head_dim": 16}), "train --model {here}/hf",
     "expected [269, 32]", "use another folder"),
    ("missing shard", several(changed_folder("model.safetensors", None),
                              write("hf/model.safetensors.index.json", '{"weight_map": {"a": "b.safetensors"}}')),
     "train --model {here}/hf", "b.safetensors: the index names this file", "download it again"),
    # data
    ("empty data folder", folder("d"), DATA, "{here}/d/train.jsonl: no such file", "holds train.jsonl and test.jsonl"),
    ("malformed line", write("d/train.jsonl", RECORD + "{not json\n"), DATA, "{here}/d/train.jsonl:2: not valid JSON",
     "mend it or take it out"),
    ("no question", write("d/train.jsonl", '{"answer": "#### 2"}'), DATA, "{here}/d/train.jsonl:1",
     "expected a JSON object with a non-empty text under 'question'"),
    ("no number", write("d/train.jsonl", '{"question": "Why?", "answer": "So."}'), DATA,
     "{here}/d/train.jsonl:1: the answer does not end", "as in '#### 72'"),
    ("folder for a data file", folder("d.json"), "train --data {here}/d.json", "{here}/d.json: no such file", "expected a .json list"),
    ("no list", write("m.json", '{"query": "?"}'), "train --data {here}/m.json", "{here}/m.json: expected a JSON list",
     "one record per line goes into a .jsonl file"),
    ("no test data", write("d/train.jsonl", RECORD), "eval --model {gguf} --data {here}/d", "{here}/d/test.jsonl: no such file",
     "holds train.jsonl and test.jsonl"),
    ("file for test data", write("d.json", RECORD), "eval --model {gguf} --benchmark gsm8k --data {here}/d.json",
     "'{here}/d.json' is a file", "give a folder"),
    ("data beyond the context", write("d.jsonl", RECORD.replace("How", "How " * 300)), "eval --model {gguf} --data {here}/d.jsonl",
     "{here}/d.jsonl: all 1 examples have more than 256 tokens", "give other --data"),
    ("data beyond the context, whatever is asked", write("d.jsonl", RECORD.replace("How", "How " * 300) * 20),
     "train --data {here}/d.jsonl --max-tokens 100000", "have more than 256 tokens: that is the model's context", "--cut them"),
    ("nothing but annotations", write("d.jsonl", RECORD.replace("One and one.\\n#### 2", "<<1+1=2>>") * 20),
     "train --data {here}/d.jsonl --strip-annotations", "leaves nothing of the answer of record 1, '<<1+1=2>>'", "leave the flag out"),
    ("an empty answer", write("d.jsonl", '{"instruction": "Go.", "output": ""}'), "train --data {here}/d.jsonl",
     "{here}/d.jsonl:1: its 'output' is ''", "take it out"),
    ("other data in the cache", other_data_in_the_cache, "train --data gsm8k", "train.jsonl is not the published GSM-8K", "take it away"),
    ("no annotations", write("d/train.jsonl", RECORD * 20), DATA + " --answers equations", "none of 12 answers has annotations",
     "give other --data (gsm8k, practice)"),
    ("no math problem", write("m.jsonl", '{"question": "?"}'), MATH, "{here}/m.jsonl:1",
     "expected a JSON object with a non-empty text under 'problem'"),
    ("no math answer", write("m.jsonl", '{"problem": "?", "solution": "2"}'), MATH, "{here}/m.jsonl:1: no text under 'answer'",
     "ends in a \\boxed{{...}} one"),
    # runs
    ("run without an adapter", write("r/log.jsonl"), "eval {here}/r", "{here}/r/adapter.safetensors: no such file",
     "finished train.py run"),
    ("evaluation into a file", write("file"), "eval {run} --out {here}/file/out", "{here}/file is a file", "name a folder"),
    ("result of text", changed_result("no result"), "eval {here}/run", "{here}/run/result.json: not valid JSON",
     "name --data, --template and --answers"),
    ("result with a wrong template", changed_result({"template": "chat"}), "eval {here}/run", "{here}/run/result.json: not the result",
     "name --data, --template and --answers"),
    ("result with wrong answers", changed_result({"answers": ["full"]}), "eval {here}/run --data practice",
     "{here}/run/result.json: not the result", "name --data, --template and --answers"),
    ("data of the run gone", changed_result({"data": "/no/such"}), "eval {here}/run", "no folder '/no/such'", "give a folder"),
    ("adapter of another base", changed_gguf(seed=5), "eval {run} --model {here}/bad.gguf", "trained on another base model",
     "load that base"),
    ("base gone", changed_adapter(base_name="/no/such.gguf"), "eval {here}/run", "base model /no/such.gguf is not there", "--model"),
    ("base not named", changed_adapter(base_name=""), "eval {here}/run", "names no base model", "give it with --model"),
    ("adapter with an unknown setting", changed_adapter({"dropout": 0.1}), "eval {here}/run", "lora has no setting dropout",
     "was it written by another version?"),
    ("adapter of an unknown method", changed_adapter({"method": "dora"}), "eval {here}/run",
     "{here}/run/adapter.safetensors: unknown method 'dora'", "known: full, lora"),
    ("adapter of another rank", changed_adapter({"rank": 4}), "eval {here}/run",
     "{here}/run/adapter.safetensors: model.layers.0", "has shape (2, 64) in the saved state, expected (4, 64)"),
    ("adapter with NaN", adapter_with_nan, "eval {here}/run", "{here}/run/adapter.safetensors: does not fit", "holds NaN or infinity"),
    ("half an adapter", several(changed_result({}), cut("{run}/adapter.safetensors", "run/adapter.safetensors", 0.9)), "eval {here}/run",
     "{here}/run/adapter.safetensors", "write or download it again"),
    ("link out of the model", several(changed_folder("config.json", {}), write("secret", "x"), link("hf/chat_template.jinja", "secret")),
     "export {here}/to --model {here}/hf --to hf", "{here}/hf/chat_template.jinja is a link to {here}/secret", "put the file itself there"),
    ("link out by a link", several(changed_folder("tokenizer_config.json", None), write("a/b/secret", "{}"), link("in", "a"),
                                   link("hf/tokenizer_config.json", "in/b/secret")),
     "export {here}/to --model {here}/hf --to hf", "{here}/hf/tokenizer_config.json is a link to", "outside of the model's folder"),
    ("export onto files", write("to/model.safetensors"), "export {run} {here}/to --to hf", "{here}/to is not an empty folder",
     "name another"),
    ("another's results", write("r", '{"step": 1}\n'), "compare --methods lora --results {here}/r", "{here}/r: holds lines that are no records", "name another file"),
    ("a folder for the summary", folder("out/eval.json"), "eval --model {gguf} --out {here}/out", "out/eval.json is a folder", "with --out"),
    ("results in a folder", folder("r"), "compare --methods lora --results {here}/r", "--results {here}/r is a folder", "name a file"),
    ("spectra into a folder", folder("r"), "spectra {run} --results {here}/r", "--results {here}/r is a folder", "name a file"),
    ("spectra on another base", changed_gguf(seed=5), "spectra {run} --model {here}/bad.gguf", "trained on another base model",
     "load that base")]


# ---- the tests ------------------------------------------------------------------------------------------------------

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
def here(tmp_path, monkeypatch):
    """An empty folder to work in, with nothing in the cache and nobody who answers where something would be fetched from."""
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("SORSA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(gsm8k, "URL", "http://127.0.0.1:9/{}.jsonl")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def tree(folder):
    """{path: bytes} of every file below a folder; None for a folder."""
    readable = (path for path in folder.rglob("*") if os.access(path, os.R_OK))
    return {path: path.read_bytes() if path.is_file() else None for path in readable}


def check(err, status, words, places):
    """One line that begins with "error: " and has all the words; status 2."""
    assert status == 2 and err.startswith("error: ") and err.endswith("\n") and err.count("\n") == 1, err
    for word in words:
        assert word.format(**places) in err, err


@pytest.mark.parametrize("prepare, command, words", [
    *((None, command, words) for command, *words in FLAGS),
    *((prepare, command, words) for _, prepare, command, *words in FILES)], ids=[row[0][:60] for row in (*FLAGS, *FILES)])
def test_bad_input_is_one_line_with_name_and_remedy(prepare, command, words, kit, here, capsys):
    """Status 2, one line on stderr that names what is wrong and how to mend it, and not a file made or changed. The
    script's usual flags come first, unless the row begins with "only"."""
    if prepare:
        prepare(here, kit)
    places = {**kit, "here": here}
    script, *given = command.removeprefix("only ").split()
    usual = [] if command.startswith("only ") else USUAL.get(script, "").split()
    arguments = [word.format(**places) for word in (*usual, *given)]
    before, run_before = tree(here), tree(kit["run"])
    with pytest.raises(SystemExit) as stopped:
        run_script(lambda: MAINS[script](arguments))
    check(capsys.readouterr().err, stopped.value.code, words, places)
    assert tree(here) == before and tree(kit["run"]) == run_before


@pytest.mark.parametrize("command, words", [
    (["eval", "{here}/no\nrun"], ("{here}/no run", "finished train.py run")),
    (["tools.compare", "--methods", "lora", "--data", "{data}", "--results", "{here}/r", "--", "--model", "{here}/no.gguf"],
     ("lora: model {here}/no.gguf: no such file", "it takes smollm2-135m"))], ids=["a line break in a name", "train below compare"])
def test_a_process_ends_as_the_function_does(command, words, kit, tmp_path):
    """The scripts themselves, as a shell runs them: status 2 and the one line, also of the script below."""
    places = {**kit, "here": tmp_path}
    done = subprocess.run([sys.executable, "-m", *(word.format(**places) for word in command)], capture_output=True, text=True,
                          cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)})
    check(done.stderr, done.returncode, words, places)
    assert not (tmp_path / "r").exists()
