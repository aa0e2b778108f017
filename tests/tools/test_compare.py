"""Methods and learning rates side by side, on a tiny model."""
import json
import os
import subprocess
import sys
import time

import pytest

from tests.toy import write_sums
from tools import compare
from weights.files import LOCK, holder


def test_every_run_is_recorded(tiny_gguf, tmp_path, monkeypatch, capsys):
    """Each method and rate gets a line in the table and in the results; a diverged run is one too."""
    results = tmp_path / "results.jsonl"
    flags = ["--data", str(write_sums(tmp_path / "data")), "--results", str(results), "--", "--model", str(tiny_gguf), "--steps", "2",
             "--batch", "4", "--held-out", "8", "--device", "cpu"]
    monkeypatch.chdir(tmp_path)
    compare.main(["--methods", "lora", "--lrs", "1e-2", "1e30", "--params", "5k", *flags])
    good, bad = [json.loads(line) for line in results.read_text().splitlines()]
    assert good["held_out_after"] < good["held_out_before"] and good["adapter"]["rank"] == 3
    assert bad["held_out_after"] is None and "lower --lr" in bad["error"]
    printed = capsys.readouterr().out
    assert "| `lora` | r 3 | 0.01 | " in printed and "| `lora` | - | 1e+30 | - | - | diverged | - | - |" in printed


@pytest.mark.long
def test_a_killed_comparison_ends_its_run(tiny_gguf, tmp_path):
    """train.py saves, and ends; it does not go on by itself."""
    run = tmp_path / "runs" / "compare" / "lora"
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
