"""The benchmark script on a tiny model: every command runs, prints its table and leaves records that say what was measured."""
import argparse
import json
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch

from support import fast
from tests.toy import write_sums
from tools import bench


@pytest.fixture
def measure(tiny_gguf, tmp_path, monkeypatch, capsys):
    """Run bench.py on the tiny model; gives what it printed and its records. The sides run in this process, which
    spares importing torch anew for each."""
    data = write_sums(tmp_path / "data")

    def run(*arguments, processes=False):
        results = tmp_path / "results.jsonl"
        results.unlink(missing_ok=True)
        if not processes:
            def here(arguments):
                args = bench.parse_arguments(arguments)
                return bench.SIDES[args.what](args)

            monkeypatch.setattr(bench, "run_side", here)
        monkeypatch.setattr(sys, "argv", ["bench.py", *arguments, "--model", str(tiny_gguf), "--data", str(data),
                                          "--results", str(results)])
        bench.main()
        return capsys.readouterr().out, [json.loads(line) for line in results.read_text().splitlines()]
    return run


def test_training_beside_both_peers(measure):
    """Ours, the usual peer and the strict one: tokens per second, memory, our share of the machine's speed, ratios."""
    pytest.importorskip("peft")
    out, records = measure("train", "--peer", "--steps", "1", "--rounds", "1", "--batch", "4", "--rank", "4")
    assert [record["side"] for record in records] == ["lora", "peer", "strict", "tuned"]
    assert all(record["tokens_per_second"] > 0 and record["memory_gb"] > 0 and record["command"].startswith("python -m tools.bench train") for record in records)
    assert 0 < records[0]["share"] < 1 and records[0]["parameters"] > 0 and "share" not in records[1]
    assert "lora / peer: tokens per second" in out and "lora / strict: tokens per second" in out and "memory gb" in out


def test_generation_beside_the_peer(measure):
    """The same problems on both sides, and the same text."""
    pytest.importorskip("transformers")
    out, records = measure("generate", "--peer", "--rounds", "1", "--problems", "5", "--max-new", "20", "--batch", "3")
    assert [record["side"] for record in records] == ["ours", "peer"] and "the same text: 5 of 5 problems" in out
    assert records[0]["new_tokens"] == records[1]["new_tokens"] > 0 and "texts" not in records[0]


def test_the_start_the_loading_and_the_merged_model(measure):
    """Seconds per method; memory while loading in sizes of the weights; the merged model's time beside its base's."""
    out, records = measure("init", "--methods", "sorsa", "sara", "--params", "3000")
    assert [record["side"] for record in records] == ["sorsa", "sara"] and all(record["seconds"] > 0 for record in records)
    assert "sorsa / sara: seconds" in out
    assert measure("load", processes=True)[1][-1]["seconds"] > 0
    assert 0.2 < measure("merged", "--batch", "1")[1][-1]["ratio"] < 5


def test_the_memory_of_a_step(measure):
    """What is held for the trained parameters is counted: 4 numbers each, for full fine-tuning 3 beside the weights."""
    out, (lora, full, peer) = measure("memory", "--methods", "lora", "full", "--batch", "2", "--length", "9", "--peer")
    assert "lora / full: memory gb" in out and "lora / peer: memory gb" in out and peer["side"] == "peer"
    assert full["trained_gb"] == pytest.approx(3 * full["weights_gb"]) and lora["trained_gb"] < full["trained_gb"]
    assert lora["memory_gb"] > lora["weights_gb"]


def test_what_is_measured_on_a_gpu(measure, monkeypatch):
    """Every method as written, compiled and with graphs, evaluations, the large model with and without checkpointing;
    what fails is a line of its own and stops nothing."""
    modes = []
    monkeypatch.setattr(bench.train, "compile_blocks", lambda model, mode: modes.append(mode))
    monkeypatch.setattr(bench, "matmul_rate", lambda *_: 100.0)
    out, records = measure("gpu", "--methods", "lora", "full", "--steps", "1", "--batch", "2", "--params", "4000", "--problems", "3",
                           "--max-new", "3", "--width", "64", "--layers", "1", "--length", "9", "--rank", "128")
    assert modes == ["default", "reduce-overhead"] * 2
    assert [(r["what"], r["side"]) for r in records[:8]] == [("train", "lora")] * 3 + [("train", "full")] * 3 + [("train", "lora"), ("train", "full")]
    assert [r["what"] for r in records[8:]] == ["generate"] * 2 + ["init"] * 2 + ["train"] * 4
    failed = [r for r in records if "failed" in r]  # rank 128 in a width of 64
    assert [r["side"] for r in failed] == ["sorsa", "pissa", "sorsa", "lora", "sorsa", "lora"] and "rank 128 is out of range" in out
    assert all("failed" in r or r.get("tokens_per_second") or r["problems_per_second"] for r in records)
    assert [r.get("checkpointing") for r in records[-4:]] == [False, False, True, True]


def test_cost_of_a_small_case():
    """A training step and a generation of a random Llama, per token."""
    case = argparse.Namespace(width=64, layers=1, batch=2, length=9, rank=2, params=None, problems=None, max_new=3)
    assert bench.cost_side(case)["us_per_token"] > 0
    case.problems = 3
    assert bench.cost_side(case)["us_per_token"] > 0
    for width in {case.get("width", 576) for case in bench.COST}:  # every width has a model: its heads divide
        with torch.device("meta"), mock.patch.object(bench, "DEVICE", torch.device("meta")):
            config = bench.random_llama(argparse.Namespace(width=width, layers=1)).config
        assert config.num_attention_heads % config.num_key_value_heads == 0
    assert {key for case in bench.COST for key in case} == {"batch", "length", "rank", "width", "problems", "max_new"}


def test_methods_differ_in_what_is_counted():
    """The batches of the strict peer are ours, those of the usual one are random; the largest comes once more, first,
    untimed."""
    encoded = [([1] * n, 1) for n in range(2, 200)]
    args = argparse.Namespace(side="lora", batch=8, steps=5)
    ours = bench.batches(args, encoded)
    args.side = "strict"
    assert bench.batches(args, encoded) == ours and len(ours) == 6
    args.side = "peer"
    usual = bench.batches(args, encoded)
    spread = lambda batches: sum(max(len(ids) for ids, _ in b) - min(len(ids) for ids, _ in b) for b in batches)  # noqa: E731
    assert spread(usual) > 3 * spread(ours)
    assert all(max(len(ids) for ids, _ in usual[0]) >= max(len(ids) for ids, _ in batch) for batch in usual)
    assert usual[0] in usual[1:] and ours[0] in ours[1:]


FAULTS = """
import resource, sys
import torch
from support import fast
if sys.argv[1] == "keep":
    fast.keep_freed_memory()
torch.ones(10_000_000).add(1)
counts = []
for _ in range(3):  # the least, as a system that reclaims memory adds faults
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(8):
        torch.ones(10_000_000)
    counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(min(counts))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="malloc is tuned on Linux only")
def test_freed_memory_is_kept():
    """Eight tensors of 40 MB, one after the other, are mapped in once instead of every time."""
    faults = [int(subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True, text=True, check=True,
                                 cwd=Path(fast.__file__).parent.parent).stdout) for how in ("leave", "keep")]
    assert faults[0] > 20_000 and faults[1] < faults[0] / 2
