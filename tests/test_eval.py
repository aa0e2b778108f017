"""The evaluation script: its counts against its own files, the loss of a run on a file of one's own."""
import json
import shutil

import pytest
import torch

import adapter
import eval as evaluation
import train
from data import gsm8k, prompting, prose
from data.practice import practice
from methods import METHODS
from support import fast
from tests.runs import Stopped, begin, go_on, stopping
from tests.tiny import tiny_metadata, tiny_tensors, write_gguf
from tests.toy import attach, perturb, same, toy_model, write_sums
from tests.weights.test_huggingface import edit_json, write_folder
from tools import export
from weights import adapter_file, base_model
from weights.safetensors import read_safetensors


def train_tiny(tiny_gguf, data, out, *flags):
    """The result of a short run on the tiny model."""
    result = train.main(["--method", "sorsa", "--rank", "4", "--lr", "1e-2", "--model", str(tiny_gguf), "--data", str(data), "--batch", "8",
                         "--held-out", "4", "--out", str(out), "--no-sample", "--device", "cpu", *flags])
    fast.switch_off()
    return result


@pytest.fixture(scope="module")
def made(tiny_gguf, tmp_path_factory):
    """A finished run on a few problems, and its data."""
    folder = tmp_path_factory.mktemp("made")
    train_tiny(tiny_gguf, write_sums(folder / "data"), folder / "run", "--steps", "30")
    return folder


@pytest.fixture
def run(made, tmp_path):
    """A copy of that run to write into."""
    return shutil.copytree(made / "run", tmp_path / "run")


def evaluate(*arguments):
    return evaluation.main([*map(str, arguments), "--device", "cpu"])


def predictions(folder, name="predictions.jsonl"):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


@pytest.fixture
def known(monkeypatch):
    """Let the model answer what is given: known([text, ...], [finish, ...]); the prompts it saw."""
    def answer(texts, finishes=None):
        prompts = []

        def complete(model, tokenizer, asked, *rest, **more):
            prompts.extend(asked)
            return [{"text": text, "finish": finish, "new_tokens": 10} for text, finish in zip(texts, finishes or ["eos"] * len(texts))]
        monkeypatch.setattr(evaluation, "complete", complete)
        return prompts
    return answer


# ---- accuracy -------------------------------------------------------------------------------------------------------

def test_evaluating_a_run(run, made, capsys):
    """The run's own data and base are used; the printed numbers follow from predictions.jsonl by rescoring it."""
    summary = evaluate(run, "--max-new", 40, "--batch", 4)
    records = predictions(run)
    assert summary["n"] == len(records) == 11 and summary["method"] == "sorsa" and summary["data"] == str(made / "data")
    assert [record["question"] for record in records] == [f"What is {i}+1?" for i in range(11)]
    for rule in gsm8k.RULES:
        rescored = [gsm8k.score(record["completion"], f"#### {record['gold']}")[rule] for record in records]
        assert rescored == [record["scores"][rule] for record in records]
        p = sum(score["correct"] for score in rescored) / 11
        assert summary["accuracy"][rule] == p and summary["standard_error"][rule] == pytest.approx((p * (1 - p) / 11) ** 0.5)
    assert summary["capped"] == sum(record["finish"] == "cap" for record in records) / 11
    assert json.loads((run / "eval.json").read_text()) == summary
    out = capsys.readouterr().out
    assert f"answer    {100 * summary['accuracy']['answer']:6.2f} %" in out and "11 of 11 problems" in out


def test_printed_counts_are_right(run, known, capsys):
    """With completions that are known (6 right, 3 wrong, 1 capped without a number, 1 in another form), so are all figures."""
    known([f" {i}+1={i + 1}\n#### {i + 1}" for i in range(6)] + [" #### 99"] * 3 + [" I do not know", " The answer is: 11"],
          ["eos"] * 9 + ["cap", "eos"])
    summary = evaluate(run)
    assert summary["accuracy"] == {"answer": 7 / 11, "strict": 6 / 11, "flexible": 7 / 11, "metamath": 1 / 11}
    assert summary["capped"] == summary["no_answer"] == 1 / 11 and summary["new_tokens"] == 110
    out = capsys.readouterr().out
    assert "answer     63.64 %  (+- 14.50)" in out and "metamath    9.09 %  (+- 8.67)" in out and "cap of 256 tokens: 9.1 %" in out


def test_an_accuracy_that_cannot_be_written_is_seen(run, known, monkeypatch, capsys):
    """A disk that is full after hours of answers."""
    def full(path):
        raise OSError(28, "No space left on device", str(path))
    known([""] * 11)
    monkeypatch.setattr(evaluation, "atomic_write", full)
    with pytest.raises(OSError, match="No space left"):
        evaluate(run)
    assert "accuracy on 11 problems" in capsys.readouterr().out


def test_a_larger_evaluation_is_not_lost(run, known):
    """Fewer problems do not take its place, unless they go elsewhere; as many do, and so does anything over a broken file."""
    prompts = known([""] * 11)
    before = evaluate(run) and predictions(run)
    with pytest.raises(ValueError, match="eval.json is of 11 examples, and 2 would take its place: name another folder with --out"):
        evaluate(run, "--limit", 2)
    assert predictions(run) == before and len(prompts) == 11
    known([""] * 11)
    assert evaluate(run, "--limit", 2, "--out", run / "few")["n"] == 2 and evaluate(run)["n"] == 11
    (run / "eval.json").write_text("{")
    assert evaluate(run, "--limit", 2)["n"] == 2 and len(predictions(run)) == 2


MATH_PAGE = [("Algebra", "Level 1", "What is $2+2$?", r"It is $\boxed{4}$."),
             ("Algebra", "Level 5", "Solve $2x=1$.", r"$\boxed{\frac{1}{2}}$"),
             ("Geometry", "Level 1", "How many sides has a square?", r"$\boxed{4}$")]


@pytest.fixture
def math_file(tmp_path):
    """Three problems of MATH."""
    lines = [json.dumps({"problem": problem, "solution": solution, "type": subject, "level": level})
             for subject, level, problem, solution in MATH_PAGE]
    (tmp_path / "math.jsonl").write_text("\n".join(lines))
    return tmp_path / "math.jsonl"


def test_math_is_counted_in_total_by_subject_and_by_level(tiny_gguf, math_file, tmp_path, known, capsys):
    """With completions that are known, so are all printed figures: 2 of 3, by subject 1 of 2 and 1 of 1, by level 2 of 2 and 0 of 1."""
    known(["So $\\boxed{4}$.", "The answer is: 2", "The answer is: $4.0$."])
    summary = evaluate("--model", tiny_gguf, "--benchmark", "math", "--data", math_file, "--out", tmp_path)
    assert summary["accuracy"] == {"answer": 2 / 3, "is_equiv": 1 / 3, "harness": 0, "metamath": 0} and summary["max_new"] == 1024
    assert summary["standard_error"]["answer"] == pytest.approx((2 / 27) ** 0.5)
    assert summary["by_subject"] == {"Algebra": {"n": 2, "accuracy": 0.5}, "Geometry": {"n": 1, "accuracy": 1}}
    assert summary["by_level"] == {"1": {"n": 2, "accuracy": 1}, "5": {"n": 1, "accuracy": 0}}
    out = capsys.readouterr().out
    assert "answer     66.67 %" in out and "subject Algebra                   50.00 %  of 2" in out
    assert "level 5                          0.00 %  of 1" in out
    fields = [(r["question"], r["gold"], r["subject"], r["level"], r["scores"]["answer"]["correct"])
              for r in predictions(tmp_path, "predictions-math.jsonl")]
    assert fields == [("What is $2+2$?", "4", "Algebra", "1", True), ("Solve $2x=1$.", r"\frac{1}{2}", "Algebra", "5", False),
                      ("How many sides has a square?", "4", "Geometry", "1", True)]


def test_evaluating_a_base_model_alone_and_asking(run, made, tiny_gguf, tmp_path, capsys):
    """--model alone measures the base, --limit takes the first problems, --ask answers one question and writes nothing."""
    summary = evaluate("--model", tiny_gguf, "--data", made / "data", "--limit", 3, "--max-new", 8, "--out", tmp_path / "base")
    assert summary["n"] == 3 and summary["method"] == "none" and (tmp_path / "base" / "predictions.jsonl").exists()
    capsys.readouterr()
    evaluate(run, "--ask", "What is 2+1?", "--max-new", 8)
    assert "Question: What is 2+1?\nAnswer:" in capsys.readouterr().out and not (run / "predictions.jsonl").exists()


def test_shots_come_from_the_training_data(run, made, tmp_path, known):
    """--shots puts solved training problems in front of every question, never test problems."""
    data = shutil.copytree(made / "data", tmp_path / "data")
    (data / "train.jsonl").write_text(json.dumps({"question": "Only in train?", "answer": "Yes.\n#### 1"}))
    prompts = known([" 1"] * 2)
    evaluate(run / "adapter.safetensors", "--data", data, "--shots", 1, "--limit", 2)
    assert len(prompts) == 2 and (run / "predictions.jsonl").exists()  # beside the adapter file that was named
    assert all(prompt.startswith("Question: Only in train?\nAnswer: Yes.\n#### 1\n\nQuestion: What is") for prompt in prompts)


def test_the_prompt_is_that_of_the_run(run, made, math_file, known):
    """A run on Alpaca's prompt is asked in it; --template asks otherwise."""
    result = json.loads((run / "result.json").read_text())
    (run / "result.json").write_text(json.dumps({**result, "template": "alpaca"}))
    prompts = known([" 1"] * 11)
    assert evaluate(run)["template"] == "alpaca"
    assert prompts[3] == prompting.prompt("What is 3+1?", template="alpaca")
    prompts = known([" 1"] * 3)
    evaluate(run, "--benchmark", "math", "--data", math_file, "--template", "alpaca-steps")
    assert prompts[1] == prompting.prompt("Solve $2x=1$.", template="alpaca") + " Let's think step by step."


@pytest.fixture
def some_without(tmp_path):
    """A data folder whose first problem, and every third, has no annotation, in training and in test."""
    data = write_sums(tmp_path / "data")
    for path in data.iterdir():
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        for line in lines[::3]:
            line["answer"] = line["answer"].rpartition(">>")[2]
        path.write_text("\n".join(map(json.dumps, lines)))
    return data


def test_answers_are_those_of_the_run(some_without, tiny_gguf, tmp_path, known, capsys):
    """A run on equations is evaluated, asked and shown examples in them, and on all test problems; --answers takes others. What
    is printed and written says it. A run from before there was a choice has full answers."""
    run = tmp_path / "run"
    result = train_tiny(tiny_gguf, some_without, run, "--steps", "2", "--answers", "equations")
    said = capsys.readouterr().out
    assert result["answers"] == "equations" and "calculator annotations alone (answers equations)" in said
    left = 40 - result["held_out_examples"] - 14
    assert f" {left} to train on, {result['held_out_examples']} held out, 14 left out (without annotations), 0 left out (longer" in said
    prompts, questions = known([f" <<{i}+1={i + 1}>>\n#### {i + 1}" for i in range(11)]), "Question: What is {}+1?\nAnswer:"
    summary = evaluate(run, "--shots", 3)
    shots = [f"{questions.format(i)} <<{i}+1={i + 1}>>\n#### {i + 1}" for i in (1, 2, 4)]
    assert prompts == ["\n\n".join([*shots, questions.format(i)]) for i in range(11)]
    assert summary["answers"] == json.loads((run / "eval.json").read_text())["answers"] == "equations" and summary["n"] == 11
    assert summary["accuracy"]["answer"] == 1 and ", answers equations, 3 shots, " in capsys.readouterr().out
    prompts = known([" <<1+1=2>>"])
    evaluate(run, "--shots", 1, "--ask", "What?")
    assert prompts == [f"{shots[0]}\n\nQuestion: What?\nAnswer:"] and ", answers equations\n" in capsys.readouterr().out
    prompts, shots = known([" 1"] * 11), [f"{questions.format(0)} 1\n#### 1", f"{questions.format(1)} 1+1=<<1+1=2>>2\n#### 2"]
    summary = evaluate(run, "--shots", 2, "--answers", "full")
    assert prompts[5] == "\n\n".join([*shots, questions.format(5)])
    assert summary["answers"] == "full" and ", answers full, 2 shots, " in capsys.readouterr().out
    del result["answers"]
    (run / "result.json").write_text(json.dumps(result))
    known([" 1"] * 11)
    assert evaluate(run)["answers"] == "full"


@pytest.mark.parametrize("flags", [[], ["--data", "{data}", "--template", "plain"]], ids=["alone", "named"])
def test_the_answers_are_not_forgotten(flags, some_without, tiny_gguf, tmp_path, known):
    """Also where data and template are given, the run says what its answers are."""
    train_tiny(tiny_gguf, some_without, tmp_path / "run", "--steps", "1", "--answers", "equations")
    known([" 1"] * 11)
    assert evaluate(tmp_path / "run", *[flag.format(data=some_without) for flag in flags])["answers"] == "equations"


@pytest.mark.parametrize("flags, skipped", [([], 2), (["--max-new", 150], 3), (["--limit", 3], 1)])
def test_a_question_too_long_for_the_context_is_skipped(flags, skipped, run, tmp_path, capsys):
    """It is counted, said, and wrong by every rule; all others are answered as they are without it. The model has room for 256
    tokens, one for each letter here."""
    questions = ["What is 1+1?", "a" * 400, "What is 2+1?", "b" * 90, "c" * 5000]
    (tmp_path / "data").mkdir()
    lines = [json.dumps({"question": question, "answer": "#### 2"}) for question in questions]
    (tmp_path / "data" / "test.jsonl").write_text("\n".join(lines))
    summary = evaluate(run, "--data", tmp_path / "data", "--max-new", 100, *flags)
    records = predictions(run)
    assert summary["n"] == len(records) == (3 if "--limit" in flags else 5) and summary["skipped"] == skipped
    assert [record["question"] for record in records] == questions[:len(records)]
    out = [record for record in records if record["finish"] == "skipped"]
    assert len(out) == skipped and all(record["completion"] == "" and record["new_tokens"] == 0 for record in out)
    assert not any(score["correct"] for record in out for score in record["scores"].values())
    said = capsys.readouterr().out
    assert f"skipped: {skipped} questions that do not fit the model's context with {summary['max_new']} new tokens" in said
    evaluate("--model", json.loads((run / "result.json").read_text())["model"], "--data", tmp_path / "data", "--limit", 1, "--max-new", 9)


def test_where_no_question_fits_nothing_is_measured(run, made):
    """All too long, as with too many new tokens: an error that says what to lower, and no file."""
    with pytest.raises(ValueError, match="do not fit the model's context of 256: lower --max-new"):
        evaluate(run, "--max-new", 240)
    assert not (run / "eval.json").exists()


def test_forgetting_is_the_same_from_either_script(made, tiny_gguf, tmp_path, monkeypatch, capsys):
    """The loss on general text, of the run and of its base: as training measured it, alone, beside the base's, and of a base."""
    monkeypatch.setattr(prose, "PIECES", 3)
    trained = train_tiny(tiny_gguf, made / "data", tmp_path / "run", "--steps", "4", "--eval-every", "2", "--forgetting",
                         "--dtype", "float32")
    losses = trained["prose_loss"]
    assert sorted(losses) == [0, 2, 4] and trained["forgot"] == losses[4] - losses[0] and abs(trained["forgot"]) > 1e-3
    logged = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["forgot"] for line in logged if "forgot" in line] == [losses[step] - losses[0] for step in (0, 2, 4)]
    assert f"forgot {trained['forgot']:+.4f}: the loss on general text, {losses[0]:.4f} -> {losses[4]:.4f}" in capsys.readouterr().out
    summary = evaluate(tmp_path / "run", "--forgetting")
    assert summary["loss"] == pytest.approx(losses[4], abs=1e-5) and summary["loss_of_base"] == pytest.approx(losses[0], abs=1e-5)
    assert summary["prose_sha256"] == trained["prose_sha256"] and summary["forgot"] == summary["loss"] - summary["loss_of_base"]
    assert json.loads((tmp_path / "run" / "eval-forgetting.json").read_text()) == summary
    of_base = "--model", tiny_gguf, "--out", tmp_path / "base"
    alone = evaluate(*of_base, "--forgetting")
    assert alone["loss"] == pytest.approx(summary["loss_of_base"], abs=1e-5) and "forgot" not in alone
    assert "loss per token" in capsys.readouterr().out
    summary, alone = (evaluate(*run, "--forgetting", "--dtype", "bfloat16") for run in ([tmp_path / "run"], of_base))
    assert alone["loss"] == summary["loss_of_base"] != losses[0]  # the base is rounded as the run is


@pytest.mark.parametrize("benchmark, name, record, gold", [
    ("math", "MATH_test.jsonl", {"idx": "a", "instruction": "What is $1+1$?", "output": r"It is $\boxed{2}$.", "type": "Algebra"}, "2"),
    ("gsm8k", "GSM8K_test.jsonl", {"query": "What is 1+1?", "response": "1+1=2\n#### 2"}, "2"),
    ("gsm8k", "data/test.jsonl", {"query": "What is 1+1?", "response": "1+1=2\n#### 2"}, "2")])
def test_metamaths_own_files_are_read(benchmark, name, record, gold, tiny_gguf, tmp_path, known):
    """The files of its evaluators, under their names and in a folder as GSM-8K's."""
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(record) + "\n")
    prompts = known([r"The answer is: 2"])
    data = path.parent if name == "data/test.jsonl" else path
    summary = evaluate("--model", tiny_gguf, "--benchmark", benchmark, "--data", data, "--out", tmp_path)
    assert prompts == [prompting.prompt(record.get("query") or record["instruction"])] and summary["accuracy"]["metamath"] == 1
    assert [r["gold"] for r in predictions(tmp_path, f"predictions{'-math' * (benchmark == 'math')}.jsonl")] == [gold]


def test_progress_is_printed(run, monkeypatch, capsys):
    """While a batch is generated, not only behind it: how many are answered, the tokens, the time."""
    monkeypatch.setattr(evaluation, "SHOWN_EVERY", -1)
    evaluate(run, "--max-new", 40, "--batch", 6)
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if "answered" in line]
    done = [int(words[0].partition("/")[0]) for words in lines]
    assert done == sorted(done) and done[-1] == 11 and len(lines) > 4 and min(done) < 6
    assert all(words[:2] == [f"{n}/11", "answered"] and words[3:5] == ["new", "tokens,"] for n, words in zip(done, lines))


# ---- a file of one's own --------------------------------------------------------------------------------------------

def write_records(path, question, answer, count=24):
    """Practice problems under other names; every third has an `input`. Returns the texts of these."""
    records = [{question: example["question"][-60:], answer: example["answer"][:80]} for example in practice("train", count)]
    inputs = [f"more of {i}" for i in range(0, count, 3)]
    for record, text in zip(records[::3], inputs):
        record["input"] = text
    lines = map(json.dumps, records)
    path.write_text("\n".join(lines) if path.suffix == ".jsonl" else f"[{','.join(lines)}]")
    return inputs


@pytest.mark.parametrize("question, answer, name, flags", [
    ("instruction", "output", "own.json", []), ("question", "answer", "own.jsonl", ["--strip-annotations"]),
    ("query", "response", "own.json", ["--cut", "60+20", "--template", "alpaca"]),
    ("prompt", "completion", "own.jsonl", ["--max-tokens", "150", "--limit", "12"])])
def test_a_run_on_a_file_is_measured_by_its_held_out_loss(question, answer, name, flags, tiny_gguf, tmp_path, capsys):
    """It trains without a line of code, with every `input`; eval.py then finds the loss that train.py ended with, and no
    accuracy."""
    inputs, run = write_records(tmp_path / name, question, answer), tmp_path / "run"
    result = train_tiny(tiny_gguf, tmp_path / name, run, "--steps", "4", *flags)
    train_tiny(tiny_gguf, tmp_path / name, run / "dry", "--steps", "1", "--batch", "20", "--dry-run", "--template", "plain")
    shown = capsys.readouterr().out
    assert sum(f"\n\n{text}\nAnswer:[[" in shown for text in inputs) >= len(inputs) - 4  # all but those held out
    summary = evaluate(run, "--batch", 3)
    assert summary["loss"] == pytest.approx(result["held_out_after"], rel=1e-5) != result["held_out_before"]
    assert summary["n"] == result["held_out_examples"] and "accuracy" not in summary
    assert json.loads((run / "eval-loss.json").read_text()) == summary and not (run / "predictions.jsonl").exists()
    assert f"held-out loss per answer token {summary['loss']:.4f} on {summary['n']} examples" in capsys.readouterr().out


def test_a_run_on_equations_of_a_file(some_without, tiny_gguf, tmp_path, capsys):
    """Its held-out loss is found again, of the answers that have annotations; --answers takes others, also of a run
    that was trained without annotations."""
    run, file = tmp_path / "run", some_without / "train.jsonl"
    result = train_tiny(tiny_gguf, file, run, "--steps", "2", "--held-out", "9", "--answers", "equations")
    summary = evaluate(run)
    assert summary["loss"] == pytest.approx(result["held_out_after"], rel=1e-5) and summary["answers"] == "equations"
    assert summary["n"] == result["held_out_examples"] < 9
    assert f"the 9 that the run held out, {summary['n']} of them with annotations; " in capsys.readouterr().out
    assert evaluate(run, "--answers", "full", "--limit", 2, "--out", run / "few")["n"] == 2
    whole = evaluate(run, "--answers", "full")
    assert whole["n"] == 9 and whole["answers"] == "full" and whole["loss"] != summary["loss"]
    train_tiny(tiny_gguf, file, tmp_path / "bare", "--steps", "1", "--held-out", "9", "--strip-annotations")
    assert evaluate(tmp_path / "bare", "--answers", "equations")["n"] == summary["n"]
    lines = file.read_text().splitlines()
    for changed in (lines[::-1], 2 * lines):  # what was held out is not what would be
        file.write_text("\n".join(changed))
        with pytest.raises(ValueError, match="train.jsonl is not the file that the run was trained on any more, .*: put that file back"):
            evaluate(run)


def test_held_out_records_are_known_by_what_they_say(tiny_gguf, tmp_path, monkeypatch, capsys):
    """Wherever their file lies now, and however it is named: all of them, also where they are more than a CPU takes of another file.
    A smaller measurement does not take the place of that."""
    monkeypatch.chdir(tmp_path)
    write_records(tmp_path / "own.jsonl", "prompt", "completion", 160)
    result = train_tiny(tiny_gguf, "own.jsonl", tmp_path / "run", "--steps", "1", "--held-out", "140")
    capsys.readouterr()
    (tmp_path / "own.jsonl").rename("moved.jsonl")
    (tmp_path / "linked.jsonl").symlink_to("moved.jsonl")
    shutil.copy("moved.jsonl", "own.jsonl")
    for name in ("moved.jsonl", "linked.jsonl", tmp_path / "own.jsonl", "own.jsonl"):
        summary = evaluate("run", "--data", name)
        assert summary["n"] == 140 and summary["loss"] == pytest.approx(result["held_out_after"], rel=1e-5), name
    assert capsys.readouterr().out.count("\nheld-out loss per answer token ") == 4
    with pytest.raises(ValueError, match="eval-loss.json is of 140 examples, and 7 would take its place: name another folder with --out"):
        evaluate("run", "--limit", 7)
    assert evaluate("run", "--limit", 7, "--out", "few")["n"] == 7
    write_records(tmp_path / "other.jsonl", "prompt", "completion", 150)
    assert evaluate("run", "--data", "other.jsonl", "--out", "other")["n"] == 128
    assert "\nloss per answer token " in capsys.readouterr().out


def test_what_else_a_run_on_a_file_can_be_measured_by(made, tiny_gguf, tmp_path):
    """Another file; GSM-8K, where that is asked for; --plain, which leaves everything off, to the same loss."""
    for name in ("own.jsonl", "other.jsonl"):
        write_records(tmp_path / name, "prompt", "completion", 24 if name == "own.jsonl" else 30)
    run, plain = tmp_path / "run", {form[2] for form in fast.FORMS.values()}
    train_tiny(tiny_gguf, tmp_path / "own.jsonl", run, "--steps", "2")
    without = evaluate(run, "--plain")
    assert {getattr(owner, attribute) for owner, attribute, _, _ in fast.FORMS.values()} == plain
    own = evaluate(run)
    assert {getattr(owner, attribute) for owner, attribute, _, _ in fast.FORMS.values()}.isdisjoint(plain)
    assert own["loss"] == pytest.approx(without["loss"], rel=1e-5) and own["n"] == 4
    other = evaluate(run, "--data", tmp_path / "other.jsonl", "--limit", 7)
    assert other["n"] == 7 and other["loss"] != own["loss"]
    summary = evaluate(run, "--benchmark", "gsm8k", "--data", made / "data", "--limit", 2, "--max-new", 4)
    assert summary["n"] == 2 and "accuracy" in summary and (run / "eval.json").exists()
    args = evaluation.parse_arguments([str(run), "--benchmark", "gsm8k"])
    evaluation.settle(args, on_cpu=True)
    assert args.data == "auto"


@pytest.mark.parametrize("flags, message", [
    (["--benchmark", "loss"], "--benchmark loss needs --data FILE"),
    (["--data", "x.jsonl", "--shots", "2"], "--shots and --calculator are for GSM-8K: add --benchmark gsm8k"),
    (["--data", "x.jsonl", "--calculator"], "--shots and --calculator are for GSM-8K: add --benchmark gsm8k")])
def test_what_the_loss_needs_is_said(flags, message, run):
    """A file, and no flags that are for answers."""
    with pytest.raises(ValueError, match=message):
        evaluate(run, *flags)


# ---- whose adapter, which base --------------------------------------------------------------------------------------

def test_an_adapter_on_another_base_must_be_forced(run, tmp_path, capsys):
    """Another base than the run's own is refused by its checksum, in evaluation and in export; --force takes it."""
    other = write_gguf(tmp_path / "other.gguf", tiny_metadata(), tiny_tensors(seed=5))
    to = [str(run), str(tmp_path / "out"), "--to", "peft", "--model", str(other)]
    asking = [run, "--model", other, "--ask", "?", "--max-new", 2]
    for command in (lambda *force: evaluate(*asking, *force), lambda *force: export.main([*to, *force])):
        with pytest.raises(ValueError, match="trained on another base model.*--force"):
            command()
        command("--force")
    assert "other.gguf, method" in capsys.readouterr().out


@pytest.mark.parametrize("method", METHODS)
def test_weights_are_rounded_once(method, tiny_gguf, tmp_path):
    """In bf16 a merged weight is the fp32 sum rounded, in eval.py as in export. What can't be merged keeps fp32 factors beside
    weights in bf16."""
    base = base_model.load(str(tiny_gguf))
    perturb(attach(base.model, method), 0.05)
    (tmp_path / "run").mkdir()
    adapter_file.save(base.model, tmp_path / "run" / "adapter.safetensors", base.name, base.sha256)
    args = evaluation.parse_arguments([str(tmp_path / "run")])
    evaluated = evaluation.load_for_eval(args, torch.device("cpu"), torch.bfloat16)[0].model
    if method == "mosara":
        fp32 = base.model.state_dict()
        for name, tensor in evaluated.state_dict().items():
            assert tensor.dtype == (torch.float32 if name in adapter.state(base.model) else torch.bfloat16)
            assert torch.equal(tensor, fp32[name].to(tensor.dtype))
        assert evaluated(torch.tensor([[5, 6]])).dtype == torch.bfloat16
        return
    adapter.merge(base.model)
    once = {name: tensor.bfloat16() for name, tensor in base.model.state_dict().items()}
    assert same(evaluated.state_dict(), once)
    export.main([str(tmp_path / "run"), str(tmp_path / "out"), "--to", "hf", "--dtype", "bfloat16"])
    written = read_safetensors(tmp_path / "out" / "model.safetensors")[0]
    assert all(torch.equal(tensor, once[name]) for name, tensor in written.items()) and len(written) == len(once) - 1


@pytest.mark.parametrize("file, change", [("config.json", {"rope_theta": 5e5}), ("tokenizer.json", {"normalizer": {"type": "NFC"}})])
def test_a_base_with_the_same_weights_may_be_another(file, change, tmp_path, capsys):
    """What is in a folder beside its weights decides too: a run, evaluated or resumed on it after a change there, is refused,
    the one unless it is forced; in bf16 or in fp32 it is the same base."""
    model = write_folder(tmp_path / "model", toy_model(vocab_size=320))
    flags = ["--method", "lora", "--rank", "2", "--model", str(model), "--data", str(write_sums(tmp_path / "data")), "--batch", "4",
             "--held-out", "4", "--steps", "2", "--save-every", "1", "--no-sample", "--device", "cpu"]
    with stopping(1), pytest.raises(Stopped):
        begin(flags, tmp_path / "half")
    begin(flags, tmp_path / "run")
    asking = [tmp_path / "run", "--ask", "?", "--max-new", 2]
    evaluate(*asking, "--dtype", "bfloat16")
    kept = (model / file).read_bytes()
    edit_json(model / file, change)
    with pytest.raises(ValueError, match="trained on another base model.*: other weights, numbers in config.json or tokenizer.*--force"):
        evaluate(*asking)
    evaluate(*asking, "--force")
    with pytest.raises(ValueError, match="the run began with another model"):
        go_on(tmp_path / "half")
    (model / file).write_bytes(kept)
    go_on(tmp_path / "half")
