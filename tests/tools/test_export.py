"""What is exported loads in transformers and peft and gives our logits."""
import json
import shutil

import pytest
import torch

import adapter
from methods import METHODS
from support.script import run_script
from tests.toy import SIZES, perturb
from tools import export
from weights import adapter_file, base_model
from tests.weights.test_huggingface import byte_vocabulary, peer, tokens

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
LORAS = [method for method in METHODS if method not in ("full", "mosara")]


def make_run(folder, model, method, targets=adapter.TARGETS):
    """A run folder whose adapter has moved, and the logits of its model."""
    base = base_model.load(str(model))
    targets = {} if method == "full" else {"targets": targets}
    METHODS[method].attach(base.model, **SIZES.get(method, {"rank": 4}), **targets)
    perturb(base.model, 0.05)
    folder.mkdir()
    adapter_file.save(base.model, folder / "adapter.safetensors", base.name, base.sha256)
    with torch.no_grad():
        return base.model(tokens() % base.model.config.vocab_size)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of a llama, a qwen2 and a gpt2."""
    root = tmp_path_factory.mktemp("models")
    for family in ("llama3.1", "qwen2", "gpt2"):
        peer(family).save_pretrained(root / family)
        (root / family / "tokenizer.json").write_text(json.dumps(byte_vocabulary()))
    return root


@pytest.mark.parametrize("family", ["llama3.1", "qwen2", "gpt2"])
@pytest.mark.parametrize("method", LORAS)
def test_peft_folder_gives_our_logits(method, family, models, tmp_path):
    """PeftModel.from_pretrained on transformers' own base, ranks per layer included."""
    expected = make_run(tmp_path / "run", models / family, method)
    export.main([str(tmp_path / "run"), str(tmp_path / "out"), "--to", "peft"])
    base = transformers.AutoModelForCausalLM.from_pretrained(models / family)
    with torch.no_grad():
        before = base(tokens()).logits
        found = peft.PeftModel.from_pretrained(base, tmp_path / "out")(tokens()).logits
    assert (found - expected).abs().max() < 1e-4 < 1e-2 < (before - expected).abs().max()
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(models / family)
    assert (len(config["rank_pattern"]) > 0) == (method == "sara" or family == "gpt2")  # c_attn has three times the rank


@pytest.mark.parametrize("targets, modules", [
    (["v_proj", "down_proj"], ["attn.c_attn", "mlp.c_proj"]), (["q_proj", "o_proj"], ["attn.c_attn", "attn.c_proj"]),
    (["k_proj", "up_proj"], ["attn.c_attn", "mlp.c_fc"])])
def test_a_part_of_gpt2s_matrices_in_peft(targets, modules, models, tmp_path):
    """One of q, k, v alone changes only its third of c_attn; the two matrices called c_proj are told apart."""
    expected = make_run(tmp_path / "run", models / "gpt2", "pissa", targets)
    export.main([str(tmp_path / "run"), str(tmp_path / "out"), "--to", "peft"])
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["target_modules"] == modules
    base = transformers.AutoModelForCausalLM.from_pretrained(models / "gpt2")
    with torch.no_grad():
        before = base(tokens()).logits
        found = peft.PeftModel.from_pretrained(base, tmp_path / "out")(tokens()).logits
    assert (found - expected).abs().max() < 1e-4 < 1e-2 < (before - expected).abs().max()


@pytest.mark.parametrize("family, method", [("llama3.1", method) for method in LORAS + ["full"]] + [("gpt2", "lora"), ("qwen2", "full")])
def test_hf_folder_gives_our_logits(family, method, models, tmp_path):
    """AutoModelForCausalLM.from_pretrained, and our own loader, on the merged model; the tokenizer comes along."""
    expected = make_run(tmp_path / "run", models / family, method)
    export.main([str(tmp_path / "run"), str(tmp_path / "out"), "--to", "hf"])
    with torch.no_grad():
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")(tokens()).logits
        again = base_model.load(str(tmp_path / "out"))
        assert (theirs - expected).abs().max() < 1e-4 and (again.model(tokens()) - expected).abs().max() < 1e-4
    assert again.tokenizer.encode("ai bj") == base_model.load(str(models / family)).tokenizer.encode("ai bj")


def test_a_gguf_base_gets_a_config_and_a_tokenizer(tiny_gguf, tmp_path):
    """From a GGUF file both are written anew: transformers loads model and tokenizer, with our logits and ids."""
    expected = make_run(tmp_path / "run", tiny_gguf, "sorsa")
    export.main([str(tmp_path / "run"), str(tmp_path / "out"), "--to", "hf"])
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        assert (model(tokens() % model.config.vocab_size).logits - expected).abs().max() < 1e-4
    theirs, ours = transformers.AutoTokenizer.from_pretrained(tmp_path / "out"), base_model.load(str(tiny_gguf)).tokenizer
    for text in ("the her in", "12 + 7 = 19\n#### 19", "é 🙂"):
        assert theirs.encode(text) == ours.encode(text) and theirs.decode(ours.encode(text)) == text
    assert theirs.eos_token_id == ours.eos_id


def test_a_base_alone_and_a_lora_on_it(tiny_gguf, tmp_path, capsys):
    """The base of a GGUF run as a folder, then the run's LoRA on that folder, in peft: our logits again."""
    expected = make_run(tmp_path / "run", tiny_gguf, "lora")
    export.main([str(tmp_path / "base"), "--model", str(tiny_gguf), "--to", "hf"])
    export.main([str(tmp_path / "run"), str(tmp_path / "lora"), "--to", "peft"])
    assert f"its base for transformers: python -m tools.export BASE_DIR --model {tiny_gguf} --to hf" in capsys.readouterr().out
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    with torch.no_grad():
        found = peft.PeftModel.from_pretrained(base, tmp_path / "lora")(tokens() % base.config.vocab_size).logits
    assert (found - expected).abs().max() < 1e-4
    with pytest.raises(SystemExit):
        export.main([str(tmp_path / "x"), "--to", "hf"])


@pytest.mark.parametrize("method, family, to, message", [
    ("mosara", "llama3.1", "peft", "q_proj cannot be exported: each token has its own update through the router"),
    ("mosara", "llama3.1", "hf", "q_proj cannot be exported: each token has its own update through the router"),
    ("full", "llama3.1", "peft", "full fine-tuning changes whole matrices, which is no LoRA: export it with --to hf")])
def test_what_cannot_be_exported_says_why(method, family, to, message, models, tmp_path, capsys):
    """One line, status 2, and no folder left behind."""
    make_run(tmp_path / "run", models / family, method)
    with pytest.raises(SystemExit) as stopped:
        run_script(lambda: export.main([str(tmp_path / "run"), str(tmp_path / "out"), "--to", to]))
    assert stopped.value.code == 2 and message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_folder_that_is_not_empty_is_refused(models, tmp_path):
    """Nothing is overwritten."""
    make_run(tmp_path / "run", models / "qwen2", "lora")
    with pytest.raises(ValueError, match="is not an empty folder: name another"):
        export.main([str(tmp_path / "run"), str(tmp_path / "run"), "--to", "peft"])
    with pytest.raises(FileNotFoundError, match="no such file: give a folder"):
        export.main([str(tmp_path / "no"), str(tmp_path / "out"), "--to", "peft"])
    shutil.rmtree(tmp_path / "run")
