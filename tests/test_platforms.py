"""Other people's machines: Windows as far as Linux can play it, GPUs without bf16 units, a Mac's GPU."""
import contextlib
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

import adapter
from support import report, script
from tests.toy import ATTACHED, attach, toy_model, write_sums
from tools import compare
from weights import base_model, files

ROOT = Path(__file__).resolve().parent.parent

# All that a user does, in one process: two steps with a checkpoint after each, stopped and resumed (the file that is read from is
# the one that is replaced), an overwritten run, an evaluation, exports.
EVERYTHING = """
import sys
from tests import windows
windows.pretend()
import eval as evaluation
import train
from support import resume
from support.script import run_script
from tools import bench, compare, draw, export, plot
from weights import files

files.SMALL = 1  # every tensor is a part of a mapped file, as large ones are
model, data = sys.argv[1:]
common = ["--model", model, "--data", data, "--held-out", "4", "--batch", "2", "--steps", "2", "--save-every", "1", "--device", "cpu"]

def stopping(*arguments):
    save(*arguments)
    resume.save = save
    raise KeyboardInterrupt

def everything():
    for method in ("full", "pissa", "mosara", "cora"):
        out = f"run {method}"
        resume.save = stopping
        try:
            train.main([*common, "--method", method, "--no-sample", "--out", out])
            raise AssertionError("not stopped")
        except KeyboardInterrupt:
            pass
        result = train.main(["--resume", out])
        assert result["memory_gb"] is None and result["resumed_at"] == [1]
    compare.table_row({"name": "full", **compare.kept("run full/result.json")})
    train.main([*common, "--method", "lora", "--out", "run full", "--overwrite"])
    evaluation.main(["run mosara", "--limit", "2", "--max-new", "4", "--device", "cpu"])
    export.main(["run pissa", "peft", "--to", "peft"])
    export.main(["run pissa", "hf", "--to", "hf"])
    train.main([*common, "--method", "lora", "--out", "run full"])

save = resume.save
run_script(everything)
"""


def test_nothing_that_only_posix_has_is_needed(tiny_gguf, tmp_path):
    """All scripts import, and what they do ends as on Linux, in a process without it (see windows.py), whose files are ASCII by
    default; the last command is refused in the usual line."""
    data = write_sums(tmp_path / "data")
    with open(data / "train.jsonl", "a", encoding="utf-8") as file:
        file.write('\n{"question": "Wie viele H\u00fcte \u2192 kaufen?", "answer": "Zw\u00f6lf \U0001f642\\n#### 12"}')
    env = {**os.environ, "PYTHONPATH": str(ROOT), "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run([sys.executable, "-c", EVERYTHING, tiny_gguf, data], capture_output=True, cwd=tmp_path, env=env)
    said = done.stderr.decode()
    assert done.returncode == 2 and said.startswith("error: --out run full already holds a run") and said.count("\n") == 1, said[-3000:]
    lines = [line for line in done.stdout.decode().splitlines() if line.startswith("step 2/2")]
    assert len(lines) == 5 and not any(" GB " in line for line in lines)


@pytest.mark.parametrize("capability, dtype, words", [((7, 0), torch.float32, "no bf16 units"), ((7, 5), torch.float32, "no bf16 units"),
                                                      ((8, 0), torch.bfloat16, ""), ((9, 0), torch.bfloat16, "")])
def test_a_gpu_gets_weights_that_it_multiplies(capability, dtype, words, monkeypatch):
    """By its compute capability, whatever torch says of emulated bf16; the plan says why. What is asked for counts."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Name of it")
    asked, current = [], []
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: asked.append(str(device)) or capability)
    assert script.choose_device("auto") == (torch.device("cuda"), dtype)
    assert script.choose_device("cuda:1") == (torch.device("cuda:1"), dtype) and asked[-1] == "cuda:1"
    assert current == ["cuda:1"]
    assert script.choose_device("cuda", "bfloat16")[1] == torch.bfloat16
    assert script.choose_device("cuda", "float32")[1] == torch.float32
    assert script.choose_device("cpu") == (torch.device("cpu"), torch.float32)
    assert report.hardware(torch.device("cuda"), torch.ones(1)).startswith("Name of it" + f", {words}" * bool(words))
    assert [script.device_name(torch.device(name)) for name in ("cuda:1", "cpu")] == ["Name of it", "cpu"]  # what records hold


def test_a_macs_gpu_is_taken_where_it_is_asked_for(monkeypatch):
    """And is said to be untried; without one it is refused as any other device."""
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert script.choose_device("mps") == (torch.device("mps"), torch.float32)
    assert script.choose_device("auto")[0].type != "mps"
    assert "untried" in report.hardware(torch.device("mps"), torch.ones(1))
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(ValueError, match="--device mps: torch finds no such device here"):
        script.choose_device("mps")


def test_a_macs_gpu_computes_no_fp64(monkeypatch):
    """Every start that takes fp64 takes the weight through adapter.with_fp64, which brings it to the CPU."""
    there = types.SimpleNamespace(device=torch.device("mps"), cpu=lambda: "on the CPU")
    assert adapter.with_fp64(there) == "on the CPU"
    moved, function = [], adapter.with_fp64
    monkeypatch.setattr(adapter, "with_fp64", lambda weight: moved.append(weight) or function(weight))
    monkeypatch.setattr(torch.Tensor, "double", lambda tensor: tensor.to(torch.float64) if moved
                        else pytest.fail("fp64 of what was not moved"))
    for method in ATTACHED:
        moved.clear()
        attach(toy_model(), method)
        assert bool(moved) == (method not in ("lora", "lotr"))


def test_a_path_on_no_drive_is_refused(monkeypatch):
    """On Windows nothing of Z:\\\\runs may exist, not even Z:."""
    monkeypatch.setattr(Path, "exists", lambda path: False)
    with pytest.raises(ValueError, match="--out /runs: there is no / here: name another folder"):
        script.check_folder(Path("/runs"), "--out")


def test_a_user_without_a_home(monkeypatch, tmp_path):
    """No HOME and no entry for the user: the folder for downloads must be named; where it is, nobody is asked."""
    for name in ("HOME", "XDG_CACHE_HOME", "SORSA_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as Python answers then
    with pytest.raises(FileNotFoundError, match="no home folder to keep downloads in: name a folder in .SORSA_CACHE"):
        base_model.load(base_model.DEFAULT_MODEL)
    monkeypatch.setenv("SORSA_CACHE", str(tmp_path / "cache"))
    assert files.cache_dir() == tmp_path / "cache" and (tmp_path / "cache").is_dir()


def test_memory_that_is_not_known_is_left_out(monkeypatch, tmp_path):
    """Where the system does not tell the peak: no number in the line, none in the table."""
    monkeypatch.setattr(report, "resource", None)
    assert report.peak_memory(torch.device("cpu")) is None
    line = {"step": 1, "loss": 1.0, "lr": 1e-3, "grad_norm": 1.0, "tokens_per_second": 1.0, "padding": 0.0, "gflops": 1.0}
    assert " GB " not in report.log_line({**line, "memory_gb": None}, 2, 1) and "1.50 GB  1s left" in report.log_line(
        {**line, "memory_gb": 1.5}, 2, 1)
    record = {"name": "lora", "method": "lora", "adapter": {}, "lr": 1.0, "trainable_parameters": 1, "held_out_before": 1.0, "held_out_after": 1.0,
              "seconds_in_steps": 1.0, "steps": 1, "memory_gb": None}
    assert compare.table_row(record).endswith("| - |")
    path = tmp_path / "result.json"
    for memory, fits in ((None, True), (0.5, True), ({}, False), ([], False), ("", False)):
        path.write_text(json.dumps({**record, "adapter": {}, "memory_gb": memory}))
        with contextlib.nullcontext() if fits else pytest.raises(ValueError, match="not the result of a run"):
            compare.kept(path)
