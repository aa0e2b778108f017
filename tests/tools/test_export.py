"""What is exported loads in transformers and peft and gives our logits."""
import errno
import json

import pytest
import torch

import adapter
from methods import METHODS
from tests.toy import MERGEABLE, SIZES, perturb
from tools import export
from weights import adapter_file, base_model

pytestmark = pytest.mark.peers
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
from tests.weights.test_huggingface import byte_vocabulary, edit_json, peer, tokens  # noqa: E402 (needs transformers)


@pytest.fixture(scope="module")
def models(tiny_gguf, tmp_path_factory):
    """{family: path} of a llama, a qwen2 and a gpt2 as folders, and of the tiny model as a file."""
    root = tmp_path_factory.mktemp("models")
    for family in ("llama3.1", "qwen2", "gpt2"):
        peer(family).save_pretrained(root / family)
        (root / family / "tokenizer.json").write_text(json.dumps(byte_vocabulary()))
    peer("llama2").save_pretrained(root / "own head")  # though its config says that it has none
    (root / "own head" / "tokenizer.json").write_text(json.dumps(byte_vocabulary()))
    edit_json(root / "own head" / "config.json", {"tie_word_embeddings": True})
    return {"gguf": tiny_gguf, **{path.name: path for path in root.iterdir()}}


@pytest.fixture
def exported(models, tmp_path):
    """exported(family, method, to, targets): the logits of an adapted model that has moved, and its exported folder."""
    def make(family, method, to, targets=adapter.TARGETS):
        base = base_model.load(str(models[family]))
        targets = {} if method == "full" else {"targets": targets}
        METHODS[method].attach(base.model, **SIZES.get(method, {"rank": 4}), **targets)
        perturb(base.model, 0.05)
        (tmp_path / "run").mkdir()
        adapter_file.save(base.model, tmp_path / "run" / "adapter.safetensors", base.name, base.sha256)
        export.main([str(tmp_path / "run"), str(tmp_path / "out"), "--to", to])
        with torch.no_grad():
            return base.model(tokens() % base.model.config.vocab_size), tmp_path / "out"
    return make


@torch.no_grad()
def logits(model):
    """Of a model of transformers or peft."""
    return model(tokens() % model.config.vocab_size).logits


@pytest.mark.parametrize("family, method, targets, modules", [
    *(("gpt2", method, adapter.TARGETS, ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]) for method in MERGEABLE),
    *(("llama3.1", method, adapter.TARGETS, sorted(adapter.TARGETS)) for method in ("lora", "sara")),
    ("qwen2", "pissa", ["q_proj", "down_proj"], ["down_proj", "q_proj"]),
    ("qwen2", "lora", ["layers.1.*.q_proj", "layers.0.mlp.up_proj"], ["model.layers.0.mlp.up_proj", "model.layers.1.self_attn.q_proj"]),
    ("gpt2", "lora", ["layers.1.*"], [f"transformer.h.1.{name}" for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")]),
    ("gpt2", "pissa", ["v_proj", "down_proj"], ["attn.c_attn", "mlp.c_proj"]),
    ("gpt2", "pissa", ["q_proj", "o_proj"], ["attn.c_attn", "attn.c_proj"]),
    ("gpt2", "pissa", ["k_proj", "up_proj"], ["attn.c_attn", "mlp.c_fc"])])
def test_a_peft_folder_gives_our_logits(family, method, targets, modules, models, exported):
    """PeftModel.from_pretrained on transformers' own base, ranks per layer included. In GPT-2 one of q, k, v alone changes
    only its third of c_attn, and the two matrices called c_proj are told apart."""
    expected, folder = exported(family, method, "peft", targets)
    base = transformers.AutoModelForCausalLM.from_pretrained(models[family])
    before = logits(base)
    assert (logits(peft.PeftModel.from_pretrained(base, folder)) - expected).abs().max() < 1e-4 < 1e-2 < (before - expected).abs().max()
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(models[family]) and config["target_modules"] == modules
    by_layer = method == "sara" or family == "gpt2" and len(modules) == 4  # there c_attn has three times the rank
    assert (len(config["rank_pattern"]) > 0) == by_layer


@pytest.mark.parametrize("family, method", [
    ("llama3.1", "sorsa"), ("llama3.1", "full"), ("gpt2", "lora"), ("qwen2", "lotr"), ("gguf", "cora"), ("own head", "lora")])
def test_an_hf_folder_gives_our_logits(family, method, models, exported):
    """AutoModelForCausalLM.from_pretrained, and our own loader, on the merged model; the tokenizer comes along."""
    expected, folder = exported(family, method, "hf")
    assert (logits(transformers.AutoModelForCausalLM.from_pretrained(folder)) - expected).abs().max() < 1e-4
    if family == "own head":
        assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is False
    again, before = base_model.load(str(folder)), base_model.load(str(models[family]))
    with torch.no_grad():
        assert (again.model(tokens() % again.model.config.vocab_size) - expected).abs().max() < 1e-4
    assert again.tokenizer.encode("ai bj") == before.tokenizer.encode("ai bj")
    if family == "gguf":  # whose config and tokenizer are written anew
        theirs = transformers.AutoTokenizer.from_pretrained(folder)
        for text in ("the her in", "12 + 7 = 19\n#### 19", "é 🙂"):
            ids = before.tokenizer.encode(text)
            assert theirs.encode(text) == ids and theirs.decode(ids) == text
        assert theirs.eos_token_id == before.tokenizer.eos_id


def test_a_base_alone_and_a_lora_on_it(tiny_gguf, exported, tmp_path, capsys):
    """The base of a GGUF run as a folder, then the run's LoRA on that folder, in peft: our logits again."""
    expected, folder = exported("gguf", "lora", "peft")
    assert f"its base for transformers: python -m tools.export BASE_DIR --model {tiny_gguf} --to hf" in capsys.readouterr().out
    export.main([str(tmp_path / "base"), "--model", str(tiny_gguf), "--to", "hf"])
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert (logits(peft.PeftModel.from_pretrained(base, folder)) - expected).abs().max() < 1e-4


def test_an_export_that_fails_leaves_nothing(models, tmp_path, monkeypatch):
    """Where the disk is full the message names the new file, and the folder is as empty as it was."""
    def full(*files):
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(export.shutil, "copyfileobj", full)
    with pytest.raises(OSError) as error:
        export.main([str(tmp_path / "out"), "--model", str(models["qwen2"]), "--to", "hf"])
    assert error.value.filename.startswith(str(tmp_path / "out")) and not any((tmp_path / "out").iterdir())


def test_links_within_a_model_are_followed(models, tmp_path):
    """Of its folder, and to the blobs of the hub's own cache, where every file is a link."""
    blobs, folder = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "1"
    blobs.mkdir(parents=True)
    folder.mkdir(parents=True)
    for number, path in enumerate(models["qwen2"].iterdir()):
        (blobs / str(number)).write_bytes(path.read_bytes())
        (folder / path.name).symlink_to(f"../../blobs/{number}")
    (folder / "vocab.json").symlink_to("tokenizer.json")
    export.main([str(tmp_path / "out"), "--model", str(folder), "--to", "hf"])
    for name in ("tokenizer.json", "vocab.json"):
        copied = tmp_path / "out" / name
        assert not copied.is_symlink() and copied.read_bytes() == (models["qwen2"] / "tokenizer.json").read_bytes()
