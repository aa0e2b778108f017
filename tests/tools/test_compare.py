"""Runs side by side, on a tiny model."""
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from tests import runs
from tests.toy import write_sums
from tools import compare
from weights.files import LOCK, holder, try_lock, unlock


def test_every_run_is_recorded_once(tiny_gguf, tmp_path, monkeypatch, capsys):
    """Each method, rate and seed gets a line in the table and in the results; a diverged run is one too. The same command again
    makes the runs that are missing, and no other."""
    results = tmp_path / "results.jsonl"
    command = ["--methods", "lora", "--lrs", "1e-2", "1e30", "--params", "5k", "--data", str(write_sums(tmp_path / "data")), "--results",
               str(results), "--", "--model", str(tiny_gguf), "--steps", "2", "--batch", "4", "--held-out", "8", "--report", "3",
               "--forgetting", "--device", "cpu"]
    monkeypatch.chdir(tmp_path)
    compare.main(command)
    good, bad = [json.loads(line) for line in results.read_text().splitlines()]
    assert good["held_out_after"] < good["held_out_before"] and good["adapter"]["rank"] == 3 and len(good["losses"]) == 2
    assert len(good["report_losses"]) == 3 and good["report_loss"] == pytest.approx(
        sum(good["report_losses"]) / sum(good["report_tokens"]), abs=1e-4)
    assert len(good["prose_losses"]) == 64 and good["prose_loss"]["2"] == pytest.approx(sum(good["prose_losses"]) / (64 * 255), abs=1e-4)
    assert {"data_sha256", "base_sha256", "threads", "torch"} <= good.keys()
    assert good["forgot"] == pytest.approx(good["prose_loss"]["2"] - good["prose_loss"]["0"])
    assert "held_out_after" not in bad and "lower --lr" in bad["error"] and str(tmp_path / "runs") not in json.dumps(bad)
    printed = capsys.readouterr().out
    assert "| `lora` | r 3 | 0.01 | " in printed and "| diverged | - | - |" in printed
    compare.main(["--seeds", "0", "1", *command])
    names = [json.loads(line)["flags"].split()[:10] for line in results.read_text().splitlines()]
    assert [(flags[7], flags[9]) for flags in names] == [("0.01", "0"), ("1e+30", "0"), ("0.01", "1"), ("1e+30", "1")]
    assert capsys.readouterr().out.count("| `lora` |") == 4  # those that were there are shown too


def test_a_comparison_on_other_data_is_another(tiny_gguf, tmp_path, monkeypatch):
    """With runs of its own, whose folders are their own; a run that trains nothing leaves no record, whatever lies in its folder."""
    monkeypatch.chdir(tmp_path)
    flags = ["--model", str(tiny_gguf), "--steps", "1", "--held-out", "8", "--device", "cpu", "--rank", "2"]
    for name in ("one", "two"):
        compare.main(["--methods", "lora", "--data", str(write_sums(tmp_path / name)), "--", *flags])
    results = tmp_path / "runs" / "compare.jsonl"
    assert [f"--data {tmp_path / name} " in line for name, line in zip(("one", "two"), results.read_text().splitlines())] == [True] * 2
    assert len([*results.parent.glob("compare/*/result.json")]) == 2
    with pytest.raises(ValueError, match="lora: train.py has trained nothing: leave --dry-run and --help out"):
        compare.main(["--methods", "lora", "--data", str(tmp_path / "one"), "--", *flags, "--dry-run"])
    assert len(results.read_text().splitlines()) == 2


def test_two_comparisons_share_the_work(tmp_path, monkeypatch):
    """What another process has in hand is left to it, and waited for; its record is not made twice."""
    results, made = tmp_path / "results.jsonl", []
    jobs = [compare.Job(name, ("--seed", "0")) for name in ("a", "b", "c")]

    def run(job, data, folder):
        made.append(job.name)
        return {"name": job.name, "flags": "--seed 0"}

    def other_ends(seconds):
        results.open("a").write(json.dumps({"name": "a", "flags": "--seed 0"}) + "\n")
        unlock(other)

    monkeypatch.setattr(compare, "run", run)
    monkeypatch.setattr(time, "sleep", other_ends)
    (tmp_path / jobs[0].folder).mkdir()
    other = try_lock(tmp_path / jobs[0].folder / "compare.lock")
    assert [record["name"] for record in compare.run_all(lambda records: jobs, "data", results, tmp_path)] == made == ["b", "c"]
    assert sorted(record["name"] for record in compare.read_records(results)) == ["a", "b", "c"]


def test_what_fails_does_not_stop_the_others(tmp_path, monkeypatch, capsys):
    """The others are run and recorded, the failure is printed, and the end is an error; the same again takes it up again."""
    results = tmp_path / "results.jsonl"
    jobs = [compare.Job(name, ("--seed", "0")) for name in ("a", "bad", "c", "worse")]

    def run(job, data, folder):
        if job.name in ("bad", "worse"):
            raise ValueError(f"{job.name}: killed")
        return {"name": job.name, "flags": "--seed 0"}
    monkeypatch.setattr(compare, "run", run)
    for _ in range(2):
        with pytest.raises(ValueError, match="^bad: killed; 1 more runs failed$"):
            list(compare.run_all(lambda records: jobs, "data", results, tmp_path))
        assert capsys.readouterr().out == "failed: bad: killed\nfailed: worse: killed\n"
    assert [record["name"] for record in compare.read_records(results)] == ["a", "c"]


def test_a_line_that_was_cut_spoils_no_other(tmp_path, capsys):
    """It is named and passed over, and the next record begins a line of its own."""
    results = tmp_path / "results.jsonl"
    compare.add_record(results, {"name": "a", "flags": ""})
    with open(results, "a") as file:
        file.write('{"name": "b", "lo')
    compare.add_record(results, {"name": "c", "flags": ""})
    compare.add_record(results, {"name": "d", "flags": ""})
    assert [record["name"] for record in compare.read_records(results)] == ["a", "c", "d"]
    assert capsys.readouterr().err.startswith(f"{results}:2: not valid JSON") and results.read_text().count("\n") == 4


def test_a_run_is_evaluated(tiny_gguf, tmp_path):
    """Every evaluation is kept with which problems are right, as in its predictions."""
    data = str(write_sums(tmp_path / "data"))
    flags = ("--method", "sorsa", "--model", str(tiny_gguf), "--steps", "1", "--batch", "4", "--held-out", "8", "--device", "cpu")
    evaluations = (("--limit", "5", "--max-new", "8"), ("--limit", "3", "--max-new", "8", "--calculator"))
    record = compare.run(compare.Job("one", flags, evaluations), data, tmp_path / "run")
    first, second = record["evaluations"]
    assert (first["n"], second["n"], second["flags"]) == (5, 3, "--limit 3 --max-new 8 --calculator")
    for number, found in enumerate((first, second)):
        lines = (tmp_path / "run" / f"eval-{number}" / "predictions.jsonl").read_text().splitlines()
        right = [json.loads(line)["scores"]["answer"]["correct"] for line in lines]
        assert found["right"] == "".join("1" if correct else "0" for correct in right)
        assert found["accuracy"] == sum(right) / len(right)
    with pytest.raises(ValueError, match="two: --limit 0 "):
        compare.check(compare.Job("two", ()), subprocess.CompletedProcess("", 2, stderr="error: --limit 0 is wrong\n"))


def test_a_run_that_was_stopped_goes_on(tiny_gguf, tmp_path):
    """From its checkpoint, to the same numbers as one that was not; a checkpoint that cannot be taken is named."""
    data = str(write_sums(tmp_path / "data"))
    job = compare.Job("one", ("--method", "lora", "--model", str(tiny_gguf), "--steps", "6", "--batch", "4", "--held-out", "8",
                              "--save-every", "2", "--device", "cpu", "--dtype", "float32"))
    with runs.stopping(4), pytest.raises(runs.Stopped):
        runs.begin(["--data", data, *job.flags, "--no-sample"], tmp_path / "stopped")
    whole, stopped = (compare.run(job, data, tmp_path / name) for name in ("whole", "stopped"))
    assert json.loads((tmp_path / "stopped" / "result.json").read_text())["resumed_at"] == [4]
    assert runs.without_clock(whole) == runs.without_clock(stopped) and len(stopped["losses"]) == 6
    saved = tmp_path / "damaged" / "checkpoint.safetensors"
    saved.parent.mkdir()
    saved.write_text("not a checkpoint")
    with pytest.raises(ValueError, match=f"^one: .*; or delete {saved}, and the run begins again$"):
        compare.run(job, data, saved.parent)


@pytest.mark.parametrize("kind", [signal.SIGINT, pytest.param(signal.SIGKILL, marks=pytest.mark.long)])
def test_a_comparison_that_is_stopped_ends_its_run(kind, tiny_gguf, tmp_path):
    """train.py saves, and ends; it does not go on by itself. For Ctrl-C, which a terminal sends to all, it is waited for."""
    command = [sys.executable, "-m", "tools.compare", "--methods", "lora", "--data", write_sums(tmp_path / "data"), "--results",
               tmp_path / "results.jsonl", "--", "--model", tiny_gguf, "--steps", "1000000", "--batch", "4", "--held-out", "8"]
    process = subprocess.Popen(command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(compare.ROOT)}, stdout=subprocess.DEVNULL,
                               stderr=subprocess.PIPE, text=True, start_new_session=True,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # ignored in a shell's background
    logs = tmp_path / "runs" / "compare"
    while not [*logs.glob("*/log.jsonl")] or next(logs.glob("*/log.jsonl")).read_text().count("grad_norm") < 3:
        assert process.poll() is None
        time.sleep(0.1)
    run, = logs.iterdir()
    assert holder(run / LOCK)
    os.killpg(process.pid, kind)
    assert process.communicate()[1] == ("error: interrupted\n" if kind == signal.SIGINT else "")
    assert kind == signal.SIGKILL or not holder(run / LOCK)
    deadline = time.monotonic() + 60
    while holder(run / LOCK) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not holder(run / LOCK) and (run / "checkpoint.safetensors").exists()
    assert "stopped by SIGTERM" in (run / "output.txt").read_text()


def test_the_loss_of_every_step_is_logged(tmp_path, monkeypatch):
    """Also on a GPU, where train.py logs every tenth by itself."""
    asked = []

    def finished(script, arguments, folder):
        asked.extend(arguments)
        return subprocess.CompletedProcess([], 1, stderr="error: lower --lr")
    monkeypatch.setattr(compare, "finished", finished)
    compare.run(compare.Job("lora", ("--steps", "20")), "practice", tmp_path)
    assert asked[:6] == ["--data", "practice", "--log-every", "1", "--steps", "20"]


RESULT = {"method": "sara", "lr": 0.03, "held_out_before": 1.4, "held_out_after": 0.8, "trainable_parameters": 99, "steps": 2,
          "seconds_in_steps": 2.0, "adapter": {"method": "sara", "threshold": 0.05, "norms": {}, "ks": {
              f"model.layers.{layer}.self_attn.{name}_proj": k for layer, name, k in [(0, "q", 3), (0, "v", 5), (1, "q", 2), (1, "v", 7)]}}}


def test_the_ranks_of_sara_are_kept_by_projection(tmp_path):
    """In the order of the layers. A result of SARA without them is none."""
    path = tmp_path / "result.json"
    path.write_text(json.dumps(RESULT))
    record = compare.kept(path)
    assert record["ranks"] == {"q_proj": [3, 2], "v_proj": [5, 7]} and record["adapter"] == {"method": "sara", "threshold": 0.05}
    for ks in (None, [], {"q_proj": "3"}):
        path.write_text(json.dumps({**RESULT, "adapter": {**RESULT["adapter"], "ks": ks}}))
        with pytest.raises(ValueError, match="result.json: not the result of a run of SARA"):
            compare.kept(path)


def test_losses_and_spectra_come_out_of_the_log(tmp_path):
    """Spectra by step, with six digits; a log without them has losses alone."""
    path = tmp_path / "log.jsonl"
    lines = [{"step": 0, "held_out_loss": 1.5}, {"step": 0, "spectra": {"kappa": 1.23456789, "delta_d": 1.23456789e-5}},
             {"step": 1, "loss": 1.234567}, {"step": 2, "loss": 1.1}, {"step": 2, "spectra": {"kappa": 2, "delta_d": 0.5}}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert compare.logged(path) == {"losses": [1.23457, 1.1], "spectra": {"0": {"kappa": 1.23457, "delta_d": 1.23457e-5},
                                                                          "2": {"kappa": 2, "delta_d": 0.5}}}
    path.write_text("".join(json.dumps(line) + "\n" for line in lines if "spectra" not in line))
    assert compare.logged(path) == {"losses": [1.23457, 1.1]}
