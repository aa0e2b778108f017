"""The papers' own recipe from end to end on a tiny Llama 2: MetaMathQA in, GSM-8K and MATH accuracy and a LoRA out."""
import json
import math

import pytest
import torch

import eval as evaluation
import train
from data import batching, prompting
from data.practice import practice
from methods import METHODS
from support import flags, generate
from support.script import run_script
from tests.toy import write_sums
from tools import export
from weights import base_model

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")
peft = pytest.importorskip("peft")


def metamath_file(path, count=276):
    """MetaMathQA's form: a JSON list of query, response, type and original question."""
    records = [{"type": "GSM_Rephrased", "query": example["question"], "original_question": example["question"],
                "response": example["answer"] + "\nThe answer is: " + example["answer"].rpartition("#### ")[2]}
               for example in practice("train", count)]
    path.write_text(json.dumps(records))
    return records


def paper(method, model, folder, *flags, count=276):
    """train.py --recipe paper with nothing else but the model, the data and a small held-out slice."""
    metamath_file(folder / "MetaMathQA.json", count)
    return train.main(["--method", method, "--recipe", "paper", "--model", str(model), "--data", str(folder / "MetaMathQA.json"),
                       "--out", str(folder / "run"), "--held-out", "20", "--no-sample", "--device", "cpu", *flags])


RATES = {"sorsa": 3e-5, "pissa": 2e-5, "lora": 2e-5, "full": 2e-5}


@pytest.mark.parametrize("method", ["lora", "pissa"])
def test_the_recipe_of_the_baselines(method):
    """The same, at the baselines' rate and without a regularizer; not run again for each."""
    args = flags.parse_arguments(["--recipe", "paper", "--method", method])
    assert (args.lr, args.rank, args.batch, args.cut, args.limit) == (RATES[method], 128, 128, (512, 512), 100_000)
    assert args.gamma is None and args.reduction is None


@pytest.mark.parametrize("method", ["sorsa", "full"])
def test_the_recipe_sets_what_the_authors_used(method, llama2, tmp_path, capsys):
    """Rank 128, the method's rate, batch 128 by accumulation, one epoch, cosine with 3 % warm-up, Alpaca's prompt, 512+512
    tokens, seed 42: set, printed, and recorded."""
    result = paper(method, llama2, tmp_path)
    out = capsys.readouterr().out
    assert {key: result[key] for key in ("lr", "batch", "schedule", "warmup", "weight_decay", "clip", "template", "seed", "limit", "epochs")} == \
        {"lr": RATES[method], "batch": 128, "schedule": "cosine", "warmup": 0.03, "weight_decay": 0, "clip": 1, "template": "alpaca",
         "seed": 42, "limit": 100_000, "epochs": 1}
    assert result["steps"] == 256 // 128 and result["max_tokens"] == 1024 and result["cut"] == (512, 512) and result["micro_batch"] == 8
    assert result["adapter"].get("rank") == (None if method == "full" else 128)
    assert (result.get("gamma"), result.get("reduction")) == ((4e-4, "mean") if method == "sorsa" else (None, None))
    line = next(line for line in out.splitlines() if line.startswith("recipe"))
    sets = {"template alpaca", "limit 100000", "cut 512+512", "epochs 1.0", "batch 128", "schedule cosine", "warmup 0.03",
            "weight_decay 0.0", "clip 1.0", "seed 42", f"lr {RATES[method]}"}
    sets |= {"rank 128"} if method != "full" else set()
    sets |= {"gamma 0.0004", "reduction mean"} if method == "sorsa" else set()
    assert line.startswith("recipe    paper sets ") and set(line.removeprefix("recipe    paper sets ").split(", ")) == sets
    assert "prompt alpaca" in out and "prompts cut at 512 tokens, answers at 512 (0 of them were longer)" in out
    rates = [json.loads(line)["lr"] for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines() if '"lr"' in line]
    assert rates == pytest.approx([train.learning_rate(step, 2, RATES[method], "cosine", 0.03) for step in range(2)])


def test_what_is_given_beside_the_recipe_counts(llama2, tmp_path, capsys):
    """A flag replaces what the recipe sets, --steps its epoch, --params its rank; the printed line leaves them out."""
    result = paper("sorsa", llama2, tmp_path, "--lr", "1e-3", "--batch", "16", "--steps", "3", "--params", "30k", count=60)
    assert (result["lr"], result["batch"], result["steps"], result["epochs"]) == (1e-3, 16, 3, None) and result["adapter"]["rank"] < 20
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("recipe"))
    assert not any(word in line for word in ("lr ", "rank", "batch", "epochs")) and "gamma 0.0004" in line
    assert result["held_out_after"] < result["held_out_before"]


@pytest.mark.parametrize("method", sorted(set(METHODS) - set(RATES)))
def test_no_recipe_is_made_up(method, tmp_path, capsys):
    """The other papers trained on other tasks: one line says so."""
    with pytest.raises(SystemExit) as stopped:
        run_script(lambda: train.main(["--method", method, "--recipe", "paper"]))
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.count("\n") == 1
    assert f"--recipe paper is known for sorsa, pissa, lora, full: the paper behind {method} trained on other tasks" in error


def test_tokens_are_those_of_the_hugging_face_tokenizer(llama2, tmp_path):
    """Start token, Alpaca prompt, answer without a space before it, end token: ids as tokenizers gives them for both texts."""
    theirs = tokenizers.Tokenizer.from_file(str(llama2 / "tokenizer.json"))
    records = metamath_file(tmp_path / "data.json", 30)
    ours = base_model.load(str(llama2)).tokenizer
    examples, _ = batching.load_examples(str(tmp_path / "data.json"))
    for record, (ids, length) in zip(records, batching.encode_examples(ours, examples, 1024, "alpaca", (512, 512)).values()):
        text = prompting.INSTRUCTION + record["query"] + "\n\n### Response:"
        before = theirs.encode(text, add_special_tokens=False).ids
        whole = theirs.encode(text + record["response"], add_special_tokens=False).ids
        assert [i for i in ids[:length] if i != 1] == before and ids[-1] == 2
        assert [i for i in ids[:-1] if i != 1] == whole  # here no token spans both: an answer begins with a capital


def test_first_examples_and_held_out_ones():
    """--limit N trains on the first N of the data that are not held out; what is held out does not depend on it."""
    examples = [{"question": str(i)} for i in range(100)]
    everything, held_out = batching.split(examples, 10)
    some, same = batching.split(examples, 10, 30)
    apart = [i for i in range(100) if examples[i] not in held_out]
    assert same == held_out and sorted(int(e["question"]) for e in some) == apart[:30]
    assert [e for e in everything if e in some] == some  # in the same order
    assert batching.split(examples, 10, 5000) == (everything, held_out)


MATH_PAGE = [("Algebra", "Level 1", "What is $2+2$?", r"It is $\boxed{4}$."), ("Algebra", "Level 5", "Solve $2x=1$.", r"$\boxed{\frac{1}{2}}$"),
             ("Geometry", "Level 1", "How many sides has a square?", r"$\boxed{4}$")]


def test_from_training_to_both_accuracies_and_out(llama2, tmp_path, capsys):
    """A run of the recipe is evaluated with its own prompt, on GSM-8K and on MATH, and leaves as a LoRA of rank 256."""
    paper("sorsa", llama2, tmp_path, "--steps", "1", "--batch", "8", count=40)
    data, run = write_sums(tmp_path / "gsm8k"), tmp_path / "run"
    seen, complete = [], generate.complete

    def watched(model, tokenizer, texts, *rest, **more):
        seen.append(texts)
        return complete(model, tokenizer, texts, *rest, **more)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "complete", watched)
        summary = evaluation.main([str(run), "--data", str(data), "--max-new", "8", "--device", "cpu"])
        with open(tmp_path / "math.jsonl", "w") as file:
            for subject, level, problem, solution in MATH_PAGE:
                file.write(json.dumps({"problem": problem, "solution": solution, "type": subject, "level": level}) + "\n")
        math_summary = evaluation.main([str(run), "--benchmark", "math", "--data", str(tmp_path / "math.jsonl"), "--max-new", "8",
                                        "--template", "alpaca-steps", "--device", "cpu"])
    assert seen[0][3] == prompting.prompt("What is 3+1?", template="alpaca") and summary["template"] == "alpaca"
    assert seen[1][1] == prompting.prompt("Solve $2x=1$.", template="alpaca") + " Let's think step by step."
    assert summary["n"] == 11 and set(summary["accuracy"]) == {"answer", "strict", "flexible", "metamath"}
    assert math_summary["n"] == 3 and set(math_summary["accuracy"]) == {"answer", "is_equiv", "harness", "metamath"}
    assert {f.name for f in run.iterdir()} >= {"predictions.jsonl", "eval.json", "predictions-math.jsonl", "eval-math.json"}
    assert json.loads((run / "eval-math.json").read_text()) == math_summary

    export.main([str(run), str(tmp_path / "lora"), "--to", "peft"])
    base = transformers.AutoModelForCausalLM.from_pretrained(llama2, dtype=torch.float32)
    theirs, ours = peft.PeftModel.from_pretrained(base, tmp_path / "lora"), evaluation.load_run(run, None, "cpu", torch.float32)[0]
    ids = torch.tensor([ours.tokenizer.encode(seen[0][0])])
    with torch.no_grad():
        assert (theirs(ids).logits - ours.model(ids)).abs().max() < 1e-4
    assert json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["r"] == 256
    capsys.readouterr()


def test_math_is_counted_in_total_by_subject_and_by_level(llama2, tmp_path, monkeypatch, capsys):
    """With completions that are known, so are all printed figures: 2 of 3, by subject 1 of 2 and 1 of 1, by level 2 of 2 and 0 of 1."""
    with open(tmp_path / "math.jsonl", "w") as file:
        for subject, level, problem, solution in MATH_PAGE:
            file.write(json.dumps({"problem": problem, "solution": solution, "type": subject, "level": level}) + "\n")
    texts = ["So $\\boxed{4}$.", "The answer is: 2", "The answer is: $4.0$."]
    monkeypatch.setattr(evaluation, "complete", lambda *rest, **more: [{"text": text, "finish": "eos", "new_tokens": 5} for text in texts])
    summary = evaluation.main(["--model", str(llama2), "--benchmark", "math", "--data", str(tmp_path / "math.jsonl"), "--out", str(tmp_path),
                               "--device", "cpu"])
    assert summary["accuracy"] == {"answer": 2 / 3, "is_equiv": 1 / 3, "harness": 1 / 3, "metamath": 0} and summary["max_new"] == 1024
    assert summary["standard_error"]["answer"] == pytest.approx(math.sqrt(2 / 27))
    assert summary["by_subject"] == {"Algebra": {"n": 2, "accuracy": 0.5}, "Geometry": {"n": 1, "accuracy": 1}}
    assert summary["by_level"] == {"1": {"n": 2, "accuracy": 1}, "5": {"n": 1, "accuracy": 0}}
    out = capsys.readouterr().out
    assert "answer     66.67 %" in out and "subject Algebra                   50.00 %  of 2" in out and "level 5                          0.00 %  of 1" in out
    records = [json.loads(line) for line in (tmp_path / "predictions-math.jsonl").read_text().splitlines()]
    assert [(r["question"], r["gold"], r["subject"], r["level"], r["scores"]["answer"]["correct"]) for r in records] == [
        ("What is $2+2$?", "4", "Algebra", "1", True), ("Solve $2x=1$.", r"\frac{1}{2}", "Algebra", "5", False),
        ("How many sides has a square?", "4", "Geometry", "1", True)]


@pytest.mark.parametrize("flags, message", [
    ([], "--benchmark math needs --data FILE"), (["--data", "no.jsonl"], "no.jsonl: no such file"),
    (["--data", "x.jsonl", "--shots", "2"], "--shots and --calculator are for GSM-8K"),
    (["--data", "x.jsonl", "--calculator"], "--shots and --calculator are for GSM-8K")])
def test_what_math_needs_is_said(flags, message, llama2, capsys):
    """One line and status 2."""
    with pytest.raises(SystemExit) as stopped:
        run_script(lambda: evaluation.main(["--model", str(llama2), "--benchmark", "math", "--device", "cpu", *flags]))
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and message in error and error.count("\n") == 1
