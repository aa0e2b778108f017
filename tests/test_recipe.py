"""The papers' own recipe from end to end on a tiny Llama 2: MetaMathQA in, a loss, two accuracies and a LoRA out.

What the recipe sets for which method stands in tests/support/test_flags.py.
"""
import json

import pytest
import torch

import eval as evaluation
import train
from data import batching, prompting
from data.practice import practice
from tests.toy import write_sums
from tools import export
from weights import base_model

pytestmark = pytest.mark.peers
transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")
peft = pytest.importorskip("peft")


def metamath_file(path, count):
    """MetaMathQA's form: a JSON list of query, response, type and original question."""
    records = [{"type": "GSM_Rephrased", "query": example["question"], "original_question": example["question"],
                "response": example["answer"] + "\nThe answer is: " + example["answer"].rpartition("#### ")[2]}
               for example in practice("train", count)]
    path.write_text(json.dumps(records))
    return records


def paper(method, model, folder, *flags, count):
    """train.py --recipe paper with nothing else but the model, the data and a small held-out slice."""
    metamath_file(folder / "MetaMathQA.json", count)
    return train.main(["--method", method, "--recipe", "paper", "--model", str(model), "--data", str(folder / "MetaMathQA.json"),
                       "--out", str(folder / "run"), "--held-out", "20", "--no-sample", "--device", "cpu", *flags])


@pytest.mark.parametrize("method, rate, own", [
    ("sorsa", 3e-5, {"rank 128", "gamma 0.0004", "reduction mean"}), ("full", 2e-5, set())])
def test_a_run_of_the_recipe(method, rate, own, llama2, tmp_path, capsys):
    """What the recipe sets is printed, recorded and done: batch 128 by accumulation, one epoch, cosine after a warm-up."""
    result = paper(method, llama2, tmp_path, count=276)
    out = capsys.readouterr().out
    assert (result["lr"], result["batch"], result["micro_batch"], result["steps"], result["max_tokens"]) == (rate, 128, 8, 256 // 128, 1024)
    assert result["adapter"].get("rank") == (128 if own else None) and result.get("gamma") == (4e-4 if own else None)
    line = next(line for line in out.splitlines() if line.startswith("recipe    paper sets "))
    assert set(line.removeprefix("recipe    paper sets ").split(", ")) == own | {
        "template alpaca", "limit 100000", "cut 512+512", "epochs 1.0", "batch 128", "schedule cosine", "warmup 0.03", "weight_decay 0.0",
        "clip 1.0", "seed 42", f"lr {rate}"}
    assert "prompt alpaca" in out and "prompts cut at 512 tokens, answers at 512 (0 answers were longer)" in out
    rates = [json.loads(line)["lr"] for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines() if '"lr"' in line]
    assert rates == pytest.approx([train.learning_rate(step, 2, rate, "cosine", 0.03) for step in range(2)])


def test_tokens_are_those_of_the_hugging_face_tokenizer(llama2, tmp_path):
    """Start token, Alpaca prompt, answer without a space before it, end token: ids as tokenizers gives them for both texts."""
    theirs = tokenizers.Tokenizer.from_file(str(llama2 / "tokenizer.json"))
    records, ours = metamath_file(tmp_path / "data.json", 30), base_model.load(str(llama2)).tokenizer
    examples, _ = batching.load_examples(str(tmp_path / "data.json"))
    encoded = batching.encode_examples(ours, examples, 1024, "alpaca", (512, 512)).values()
    for record, (ids, length) in zip(records, encoded, strict=True):
        text = prompting.INSTRUCTION + record["query"] + "\n\n### Response:"
        before, whole = (theirs.encode(part, add_special_tokens=False).ids for part in (text, text + record["response"]))
        assert [i for i in ids[:length] if i != 1] == before and ids[-1] == 2
        assert [i for i in ids[:-1] if i != 1] == whole  # here no token spans both: an answer begins with a capital


def test_from_training_to_both_accuracies_and_out(llama2, tmp_path):
    """A run of the recipe has a held-out loss and accuracies on GSM-8K and on MATH, and leaves as a LoRA of rank 256."""
    run, result = tmp_path / "run", paper("sorsa", llama2, tmp_path, "--steps", "1", "--batch", "8", count=40)
    (tmp_path / "math.jsonl").write_text(json.dumps({"problem": "What is $2+2$?", "answer": "4", "subject": "Algebra", "level": 1}))
    common = [str(run), "--max-new", "8", "--device", "cpu"]
    assert evaluation.main(common)["loss"] == pytest.approx(result["held_out_after"], rel=1e-5)
    gsm8k = evaluation.main([*common, "--benchmark", "gsm8k", "--data", str(write_sums(tmp_path / "gsm8k"))])
    math = evaluation.main([*common, "--benchmark", "math", "--data", str(tmp_path / "math.jsonl"), "--template", "alpaca-steps"])
    assert gsm8k["template"] == "alpaca" and gsm8k["n"] == 11 and set(gsm8k["accuracy"]) == {"answer", "strict", "flexible", "metamath"}
    assert math["n"] == 1 and set(math["accuracy"]) == {"answer", "is_equiv", "harness", "metamath"}
    for name, summary in (("eval.json", gsm8k), ("eval-math.json", math)):
        assert json.loads((run / name).read_text()) == summary

    export.main([str(run), str(tmp_path / "lora"), "--to", "peft"])
    base = transformers.AutoModelForCausalLM.from_pretrained(llama2, dtype=torch.float32)
    theirs, ours = peft.PeftModel.from_pretrained(base, tmp_path / "lora"), evaluation.load_run(run, None)[0]
    ids = torch.tensor([ours.tokenizer.encode(prompting.prompt("How many?", template="alpaca"))])
    with torch.no_grad():
        assert (theirs(ids).logits - ours.model(ids)).abs().max() < 1e-4
    assert json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["r"] == 256
