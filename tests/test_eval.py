"""Generation against an uncached loop, and the evaluation script's counts against its own files."""
import json

import pytest
import torch

import adapter
import eval as evaluation
import train
from data import gsm8k, prompting
from support import generate
from support.script import run_script
from tests.toy import attach, perturb, tokens, toy_model, write_sums
from tools import export
from weights.safetensors import read_safetensors, write_safetensors

EOS = 0


@torch.no_grad()
def naive_greedy(model, prompt, max_new, eos_id):
    """One row, no cache, no padding: the whole text through the model for every token."""
    ids = list(prompt)
    for _ in range(max_new):
        ids.append(model(torch.tensor([ids]))[0, -1].argmax().item())
        if ids[-1] == eos_id:
            break
    return ids[len(prompt):]


def toy_prompts(count=13):
    return [tokens(1, 1 + (7 * i) % 40, seed=i)[0].tolist() for i in range(count)]


@pytest.mark.parametrize("batch, at_once", [(1, 2048), (5, 2048), (64, 2048), (64, 50), (64, 1)])
def test_batched_cached_generation_equals_the_naive_loop(batch, at_once, monkeypatch):
    """Token for token the text of an uncached one-row loop, for rows of different lengths that end at different times,
    however many prompts are read at once."""
    monkeypatch.setitem(generate.PREFILL_TOKENS, "cpu", at_once)
    model, prompts = toy_model(seed=3), toy_prompts()
    expected = [naive_greedy(model, prompt, 60, EOS) for prompt in prompts]
    ends = [len(ids) for ids in expected]
    eos = max(set(t for ids in expected for t in ids), key=lambda t: sum(t in ids for ids in expected))  # one that many rows reach
    expected = [naive_greedy(model, prompt, 60, eos) for prompt in prompts]
    assert len({len(ids) for ids in expected}) > 3 and max(ends) == 60  # rows do leave the batch at different steps
    assert generate.generate(model, prompts, eos, max_new=60, batch=batch) == expected


def test_rows_that_ended_leave_at_once(monkeypatch):
    """On a CPU no decode step carries a row whose text has ended."""
    model, prompts, rows = toy_model(seed=3), toy_prompts(), []
    free = [naive_greedy(model, prompt, 30, -1) for prompt in prompts]
    eos = max(set(sum(free, [])), key=lambda token: sum(token in ids for ids in free))
    lengths = [len(naive_greedy(model, prompt, 30, eos)) for prompt in prompts]
    forward = model.model.forward
    monkeypatch.setattr(model.model, "forward", lambda tokens, cache=None: (rows.append(tuple(tokens.shape)), forward(tokens, cache))[1])
    generate.generate_batch(model, prompts, eos, max_new=30)
    steps = [size for size, T in rows if T == 1 and size <= len(prompts)][-max(lengths) + 1:]
    assert len(set(lengths)) > 2 and steps == [sum(n > step for n in lengths) for step in range(1, max(lengths))]


def test_finished_rows_leave_the_batch(monkeypatch):
    """Once most rows have ended, the decode steps carry only those that have not."""
    model, prompts, rows = toy_model(seed=3), toy_prompts(), []
    last = naive_greedy(model, prompts[-1], 1, -1)
    forward = model.model.forward
    monkeypatch.setattr(model.model, "forward", lambda tokens, cache=None: (rows.append(len(tokens)), forward(tokens, cache))[1])
    generate.generate_batch(model, prompts, EOS, max_new=40, is_done=lambda ids: ids[:1] != last)
    assert rows[0] == len(prompts) and rows[-1] < len(prompts) / 2


def test_forced_tokens_enter_the_row():
    """What `force` returns is taken in place of the model's choices, and the model goes on from there."""
    model, prompt = toy_model(seed=3), toy_prompts()[3]
    free = naive_greedy(model, prompt, 12, -1)
    forced = generate.generate(model, [prompt, prompt], -1, max_new=12, force=lambda ids: [11, 12] if len(ids) == 3 else None)[0]
    assert forced[:3] == free[:3] and forced[3:5] == [11, 12]
    assert forced[5:] == naive_greedy(model, prompt + forced[:5], 7, -1)


def test_adapted_and_merged_models_generate_the_same():
    """Merging changes the weights' form, not the text."""
    model = perturb(attach(toy_model(seed=3), "sorsa"), 0.05)
    before = generate.generate(model, toy_prompts(), EOS, max_new=20)
    adapter.merge(model)
    assert generate.generate(model, toy_prompts(), EOS, max_new=20) == before


def test_a_prompt_longer_than_the_context_is_refused():
    """A prompt must leave room for the new tokens."""
    with pytest.raises(ValueError, match="a prompt of 250 tokens and 20 new ones do not fit the model's context of 256"):
        generate.generate(toy_model(), [[1] * 250], EOS, max_new=20)


def test_golden_generation_on_the_real_model(real_base):
    """On the real model, batched and cached generation gives the uncached one-row loop's text, token for token."""
    questions = ["What is 3 plus 4?", "Tom has 12 eggs. He eats 2 each day for 3 days. How many eggs are left?", "How many legs do 5 dogs have?"]
    asked = [real_base.tokenizer.encode(prompting.prompt(question)) for question in questions]
    expected = [naive_greedy(real_base.model, ids, 16, real_base.tokenizer.eos_id) for ids in asked]
    assert generate.generate(real_base.model, asked, real_base.tokenizer.eos_id, max_new=16) == expected


def test_calculator_on_the_real_model(real_base):
    """With the calculator, what follows '=' inside << >> is computed, not generated."""
    shots = [{"question": "Sam has 4 bags with 6 figs each. How many figs?", "answer": "Sam has 4*6 = <<4*6=24>>24 figs.\n#### 24"}] * 2
    prompt = prompting.prompt("Eve has 137 boxes with 68 pens each. How many pens does she have?", shots)
    with_it, without = (generate.complete(real_base.model, real_base.tokenizer, [prompt], max_new=40, calculator=on)[0]["text"] for on in (True, False))
    assert "<<137*68=9316>>" in with_it and "<<137*68=9316>>" not in without


def test_a_completion_ends_where_another_question_begins(real_base, monkeypatch):
    """What follows "Question:" on a new line is cut and not counted, and the row may end there."""
    text = " 3+4=7\n#### 7\nQuestion: What else?"
    ids = real_base.tokenizer.encode(text)
    told = []

    def generated(model, prompts, eos_id, max_new, batch, is_done, force, progress):
        told.extend([is_done(ids), is_done(real_base.tokenizer.encode(" 3+4=7\n#### 7"))])
        return [ids, real_base.tokenizer.encode(" 7") + [eos_id], real_base.tokenizer.encode(" 7")]
    monkeypatch.setattr(evaluation, "generate", generated)
    stopped, ended, capped = generate.complete(real_base.model, real_base.tokenizer, ["a", "b", "c"])
    assert told == [True, False]
    assert stopped == {"text": " 3+4=7\n#### 7", "new_tokens": len(real_base.tokenizer.encode(" 3+4=7\n#### 7")), "finish": "stop"}
    assert ended == {"text": " 7", "new_tokens": 3, "finish": "eos"} and capped == {"text": " 7", "new_tokens": 2, "finish": "cap"}


# ---- the script -----------------------------------------------------------------------------------------------------

@pytest.fixture
def small_run(tiny_gguf, tmp_path):
    """A finished run of a tiny model on two handfuls of problems; its data folder and its run folder."""
    data = write_sums(tmp_path / "data")
    train.main(["--method", "sorsa", "--rank", "4", "--lr", "1e-2", "--model", str(tiny_gguf), "--data", str(data), "--steps", "30", "--batch", "8",
                "--held-out", "4", "--out", str(tmp_path / "run"), "--no-sample", "--device", "cpu"])
    return data, tmp_path / "run"


def test_evaluating_a_run(small_run, capsys):
    """The run's own data and base are used; the printed numbers follow from predictions.jsonl by rescoring it."""
    data, run = small_run
    summary = evaluation.main([str(run), "--max-new", "40", "--batch", "4", "--device", "cpu"])
    records = [json.loads(line) for line in (run / "predictions.jsonl").read_text().splitlines()]
    assert summary["n"] == len(records) == 11 and summary["method"] == "sorsa" and summary["data"] == str(data)
    assert [r["question"] for r in records] == [f"What is {i}+1?" for i in range(11)]
    for rule in gsm8k.RULES:
        rescored = [gsm8k.score(r["completion"], f"#### {r['gold']}")[rule] for r in records]
        assert rescored == [r["scores"][rule] for r in records]
        p = sum(r["correct"] for r in rescored) / 11
        assert summary["accuracy"][rule] == p and summary["standard_error"][rule] == pytest.approx((p * (1 - p) / 11) ** 0.5)
    assert summary["capped"] == sum(r["finish"] == "cap" for r in records) / 11
    assert json.loads((run / "eval.json").read_text()) == summary
    out = capsys.readouterr().out
    assert f"answer    {100 * summary['accuracy']['answer']:6.2f} %" in out and "11 of 11 problems" in out


def test_printed_counts_are_right(small_run, monkeypatch, capsys):
    """With completions that are known (6 right, 3 wrong, 1 capped without a number, 1 in another form), so are all figures."""
    data, run = small_run
    texts = [f" {i}+1={i + 1}\n#### {i + 1}" for i in range(6)] + [" #### 99"] * 3 + [" I do not know", " The answer is: 11"]
    finishes = ["eos"] * 9 + ["cap", "eos"]
    monkeypatch.setattr(evaluation, "complete", lambda *args: [
        {"text": text, "finish": finish, "new_tokens": 10} for text, finish in zip(texts, finishes)])
    summary = evaluation.main([str(run), "--device", "cpu"])
    assert summary["accuracy"] == {"answer": 7 / 11, "strict": 6 / 11, "flexible": 7 / 11, "metamath": 1 / 11}
    assert summary["capped"] == summary["no_answer"] == 1 / 11 and summary["new_tokens"] == 110
    out = capsys.readouterr().out
    assert "answer     63.64 %  (+- 14.50)" in out and "metamath    9.09 %  (+- 8.67)" in out and "cap of 256 tokens: 9.1 %" in out


def test_evaluating_a_base_model_alone_and_asking(small_run, tiny_gguf, tmp_path, capsys):
    """--model alone measures the base, --limit takes the first problems, --ask answers one question and writes nothing."""
    data, run = small_run
    summary = evaluation.main(["--model", str(tiny_gguf), "--data", str(data), "--limit", "3", "--max-new", "8", "--device", "cpu", "--out", str(tmp_path / "base")])
    assert summary["n"] == 3 and summary["method"] == "none" and (tmp_path / "base" / "predictions.jsonl").exists()
    capsys.readouterr()
    evaluation.main([str(run), "--ask", "What is 2+1?", "--max-new", "8", "--device", "cpu"])
    assert "Question: What is 2+1?\nAnswer:" in capsys.readouterr().out and not (run / "predictions.jsonl").exists()


def test_shots_come_from_the_training_data(small_run, monkeypatch):
    """--shots puts solved training problems in front of every question, never test problems."""
    data, run = small_run
    (data / "train.jsonl").write_text(json.dumps({"question": "Only in train?", "answer": "Yes.\n#### 1"}))
    prompts = []
    monkeypatch.setattr(evaluation, "complete", lambda model, tokenizer, texts, *rest: prompts.extend(texts) or [
        {"text": " 1", "finish": "eos", "new_tokens": 1}] * len(texts))
    evaluation.main([str(run / "adapter.safetensors"), "--shots", "1", "--limit", "2", "--device", "cpu"])
    assert len(prompts) == 2 and (run / "predictions.jsonl").exists()  # beside the adapter file that was named
    assert all(p.startswith("Question: Only in train?\nAnswer: Yes.\n#### 1\n\nQuestion: What is") for p in prompts)


def test_a_damaged_result_is_named(small_run, capsys):
    """A result.json that is not one stops with its name and the flag that does without."""
    _, run = small_run
    (run / "result.json").write_text("{}")
    with pytest.raises(SystemExit):
        run_script(lambda: evaluation.main([str(run), "--device", "cpu"]))
    assert f"{run / 'result.json'}: not the result of a run; name --data and --template" in capsys.readouterr().err


def test_perfect_answers_score_one_hundred(tmp_path):
    """Completions that are the reference solutions are right by our rule and the strict one, and summed up so."""
    examples = gsm8k.practice("test", 20)
    completions = [{"text": prompting.target(e["answer"]), "finish": "eos", "new_tokens": 5} for e in examples]
    summary = evaluation.summarise(evaluation.score_all(gsm8k, examples, completions))
    assert summary["accuracy"]["answer"] == summary["accuracy"]["strict"] == 1 and summary["standard_error"]["answer"] == 0
    wrong = evaluation.summarise(evaluation.score_all(gsm8k, examples, [{**c, "text": " no idea", "finish": "cap"} for c in completions]))
    assert wrong["accuracy"]["answer"] == 0 and wrong["no_answer"] == wrong["capped"] == 1 and summary["new_tokens"] == 100


BAD = [([], "name a run"), (["no/such/run"], "no/such/run: no such file"), (["--model", "x.gguf", "--shots", "-1"], "'-1' is not a whole number"),
       (["--model", "gpt5"], "model gpt5 is not known")]


@pytest.mark.parametrize("flags, message", BAD, ids=[message for _, message in BAD])
def test_bad_input_is_one_line_and_status_2(flags, message, capsys):
    """What a user can mend ends with status 2 and one line that names it."""
    with pytest.raises(SystemExit) as stopped:
        run_script(lambda: evaluation.main(flags))
    lines = capsys.readouterr().err.strip().splitlines()
    assert stopped.value.code == 2 and len(lines) == 1 and message in lines[0], lines


def test_an_adapter_on_another_base_is_refused(small_run, tiny_gguf, tmp_path, capsys):
    """Naming another base file than the run's own is refused by its checksum."""
    _, run = small_run
    other = tmp_path / "other.gguf"
    content = bytearray(tiny_gguf.read_bytes())
    content[-1] ^= 1
    other.write_bytes(content)
    with pytest.raises(SystemExit) as stopped:
        run_script(lambda: evaluation.main([str(run), "--model", str(other), "--ask", "?", "--device", "cpu"]))
    refusal = capsys.readouterr().err
    assert stopped.value.code == 2 and "trained on another base model" in refusal and "--force" in refusal
    evaluation.main([str(run), "--model", str(other), "--force", "--ask", "?", "--max-new", "2", "--device", "cpu"])
    assert "other.gguf, method" in capsys.readouterr().out
    with pytest.raises(ValueError, match="trained on another base model"):
        export.main([str(run), str(tmp_path / "out"), "--to", "peft", "--model", str(other)])
    export.main([str(run), str(tmp_path / "out"), "--to", "peft", "--model", str(other), "--force"])


@pytest.mark.parametrize("name", ["", "a\nb", "x" * 1000])
def test_an_adapter_that_names_no_base_says_so(name, small_run, tmp_path, capsys):
    """The base's name in an adapter file is a name, or --model must be given."""
    tensors, metadata = read_safetensors(small_run[1] / "adapter.safetensors")
    write_safetensors(tmp_path / "a.safetensors", {k: v.clone() for k, v in tensors.items()}, {**metadata, "base_name": name})
    with pytest.raises(ValueError, match="a.safetensors: names no base model .*; give it with --model"):
        evaluation.main([str(tmp_path / "a.safetensors"), "--ask", "?", "--device", "cpu"])


@pytest.mark.parametrize("change", [{"data": 3}, {"template": "none"}, {"template": []}, {"data": "a\nb"}])
def test_a_damaged_record_of_data_or_template_is_named(change, small_run):
    """Before a model generates anything."""
    path = small_run[1] / "result.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ValueError, match="result.json: not the result of a run; name --data and --template"):
        evaluation.recorded(small_run[1])
