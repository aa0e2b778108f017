"""Runs side by side, on a tiny model."""
import json
import os
import subprocess
import sys
import time

import pytest

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
    monkeypatch.setattr("data.prose.PIECES", 2)
    compare.main(command)
    good, bad = [json.loads(line) for line in results.read_text().splitlines()]
    assert good["held_out_after"] < good["held_out_before"] and good["adapter"]["rank"] == 3 and len(good["losses"]) == 2
    assert len(good["report_losses"]) == 3 and good["report_loss"] == pytest.approx(sum(good["report_losses"]) / good["report_tokens"])
    assert good["forgot"] == pytest.approx(good["prose_loss"]["2"] - good["prose_loss"]["0"])
    assert "held_out_after" not in bad and "lower --lr" in bad["error"] and str(tmp_path) not in json.dumps(bad)
    printed = capsys.readouterr().out
    assert "| `lora` | r 3 | 0.01 | " in printed and "| diverged | - | - |" in printed
    compare.main(["--seeds", "0", "1", *command])
    names = [json.loads(line)["flags"].split()[:8] for line in results.read_text().splitlines()]
    assert [(flags[5], flags[7]) for flags in names] == [("0.01", "0"), ("1e+30", "0"), ("0.01", "1"), ("1e+30", "1")]


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
    (tmp_path / "a-s0").mkdir()
    other = try_lock(tmp_path / "a-s0" / "compare.lock")
    assert [record["name"] for record in compare.run_all(lambda records: jobs, "data", results, tmp_path)] == made == ["b", "c"]
    assert sorted(record["name"] for record in compare.read_records(results)) == ["a", "b", "c"]


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


@pytest.mark.long
def test_a_killed_comparison_ends_its_run(tiny_gguf, tmp_path):
    """train.py saves, and ends; it does not go on by itself."""
    run = tmp_path / "runs" / "compare" / "lora-s0"
    command = [sys.executable, "-m", "tools.compare", "--methods", "lora", "--data", write_sums(tmp_path / "data"), "--results",
               tmp_path / "results.jsonl", "--", "--model", tiny_gguf, "--steps", "1000000", "--batch", "4", "--held-out", "8"]
    process = subprocess.Popen(command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(compare.ROOT)}, stdout=subprocess.DEVNULL)
    while not (run / "log.jsonl").exists() or (run / "log.jsonl").read_text().count("grad_norm") < 3:
        time.sleep(0.1)
    assert holder(run / LOCK)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 60
    while holder(run / LOCK) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not holder(run / LOCK) and (run / "checkpoint.safetensors").exists()
    assert "stopped by SIGTERM" in (run / "output.txt").read_text()
