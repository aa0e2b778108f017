"""train.py --dry-run shows what the run would do, and does nothing."""
import json
import re

import pytest

import train
from data import batching
from tests.runs import Stopped, begin, contents, copied, ends, go_on, stopping
from weights import base_model


def shown_batch(printed):
    """{record number: (question, answer)} of the batch that is printed."""
    parts = re.split(r"\n--- record (\d+) of the data, \d+ tokens, \d+ of them answer\n", printed.split("\na dry run: ")[0])
    return {int(number): text.rstrip("\n").removesuffix("]]").split("[[") for number, text in zip(parts[1::2], parts[2::2])}


@pytest.fixture
def batches(monkeypatch):
    """A list of the batches that are trained on."""
    seen, function = [], train.accumulate_gradients

    def watched(args, model, encoded):
        seen.append(encoded)
        return function(args, model, encoded)
    monkeypatch.setattr(train, "accumulate_gradients", watched)
    return seen


@pytest.mark.parametrize("method", ["lora", "sara", "full"])
def test_a_dry_run_shows_what_the_run_will_do(method, place, batches, tmp_path, capsys):
    """The plan with the method's table, the memory, and the batch that is trained on first, question and answer as the data
    have them; nothing is written."""
    flags, run = place.flags(method, "--template", "alpaca", "--seed", "3", "--steps", "1"), tmp_path / "run"
    assert begin(flags, run, "--dry-run") is None and not run.exists()
    printed = capsys.readouterr().out
    assert printed.rstrip().endswith("a dry run: nothing was trained, nothing was written")
    begin(flags, run)
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith((" ", "plan", "method"))]
    assert set(table) <= set(printed.splitlines()) and "\nmemory    about " in printed
    assert "; answers end in '<|im_end|>' (2), says tokenizer.ggml\n" in printed and "prompt alpaca; " in printed
    records = [json.loads(line) for line in (place.data / "train.jsonl").read_text().splitlines()]
    shown, tokenizer = shown_batch(printed), base_model.load(str(place.model)).tokenizer
    assert f"the batch of step 1, {batching.token_count(batches[0])} tokens; what carries loss is in [[ ]]" in printed
    for (number, (question, answer)), (ids, start) in zip(shown.items(), batches[0], strict=True):
        assert (question, answer) == (tokenizer.decode(ids[:start]), tokenizer.decode(ids[start:]))
        assert records[number - 1]["question"] in question and answer == records[number - 1]["answer"] + "<|im_end|>"


def test_the_plan_names_what_is_measured_and_counts_every_example(place, tmp_path, capsys):
    """Trained on, held out, kept for the report and left out are all there are."""
    begin(place.flags("lora", "--report", "5", "--forgetting", "--spectra-every", "2"), tmp_path / "run", "--dry-run")
    printed = capsys.readouterr().out
    counts = re.search(r"(\d+) to train on, (\d+) held out, (\d+) kept for --report, (\d+) left out", printed)
    assert sum(map(int, counts.groups())) == 40 and counts[3] == "5"
    assert re.search(r"\nout .*; held-out loss every \d+ steps, with that on general text, spectra every 2", printed)


def test_the_right_answer_beside_a_sample(tiny_gguf, tmp_path, capsys):
    """GSM-8K's and MetaMathQA's number; of anything else the first line, and no more of it than fits."""
    for answer, right in (("5+5=10\n#### 10", "10"), ("It is 3.\nThe answer is: 3", "3"), ("def f():\n    return 3\n}", "def f():"),
                          ("word " * 30, ("word " * 30)[:80])):
        records = [{"question": f"q{i}", "answer": answer} for i in range(6)]
        (tmp_path / "own.jsonl").write_text("\n".join(map(json.dumps, records)))
        train.main(["--method", "lora", "--targets", "q_proj, v_proj,", "--rank", "2", "--model", str(tiny_gguf), "--data",
                    str(tmp_path / "own.jsonl"), "--held-out", "2", "--steps", "1", "--batch", "2", "--device", "cpu", "--out",
                    str(tmp_path / "run"), "--overwrite"])
        assert f"a held-out question, after training (right: {right})\n" in capsys.readouterr().out


def test_a_dry_run_of_what_goes_on(half, place, batches, tmp_path, capsys):
    """With --resume it shows the batch of the next step, or that all are made; the run is as it was."""
    run, tokenizer = copied(half, tmp_path / "run"), base_model.load(str(place.model)).tokenizer
    go_on(run, "--dry-run")
    printed = capsys.readouterr().out
    assert contents(run) == contents(half) and "the batch of step 5, " in printed
    with stopping(6), pytest.raises(Stopped):
        go_on(run)
    assert [tokenizer.decode(ids[start:]) for ids, start in batches[0]] == [answer for _, answer in shown_batch(printed).values()]
    go_on(run, "--dry-run")
    assert "\nall 6 steps are made\n" in capsys.readouterr().out


def test_a_dry_run_refuses_what_the_run_would(whole, place, capsys):
    """A folder that holds a run needs --overwrite, and is left as it is all the same."""
    before = contents(whole)
    assert "already holds a run" in ends(capsys, begin, place.lora, whole, "--dry-run")[1]
    begin(place.lora, whole, "--dry-run", "--overwrite")
    assert contents(whole) == before
