"""The benchmark on a tiny model: every command runs, prints its table and leaves records that say what was measured."""
import argparse
import json
import sys

import pytest
import torch

from support import fast
from tests.toy import write_sums
from tools import bench


@pytest.fixture
def measure(tiny_gguf, tmp_path, monkeypatch, capsys):
    """Run the benchmark on the tiny model; gives what it printed and its records. The sides run in this process, which
    spares importing torch anew for each, or with processes=True as a user's do."""
    data, results = write_sums(tmp_path / "data"), tmp_path / "results.jsonl"

    def here(arguments):
        args = bench.parse_arguments(arguments)
        return bench.SIDES[args.what](args)

    def run(*arguments, processes=False):
        results.unlink(missing_ok=True)
        if not processes:
            monkeypatch.setattr(bench, "run_side", here)
        arguments = [*arguments, "--model", str(tiny_gguf), "--data", str(data), "--results", str(results)]
        monkeypatch.setattr(sys, "argv", ["bench.py", *arguments])
        bench.main()
        return capsys.readouterr().out, [json.loads(line) for line in results.read_text().splitlines()]
    return run


SMALL = ["--rounds", "1", "--batch", "3", "--rank", "4", "--steps", "1", "--problems", "5", "--max-new", "20", "--length", "9"]


def test_training_and_its_memory(measure):
    """Tokens per second, our share of the machine's speed; what is held for the trained parameters: 4 numbers each, for
    full fine-tuning 3 beside the weights."""
    out, (record,) = measure("train", *SMALL)
    assert record["tokens_per_second"] > 0 and 0 < record["share"] < 1 and record["parameters"] > 0
    assert record["command"].startswith("python -m tools.bench train") and "real tokens/s" in out
    out, (lora, full) = measure("memory", *SMALL, "--methods", "lora", "full", "--recompute")
    assert "lora / full: memory gb" in out and lora["memory_gb"] > lora["weights_gb"]
    assert full["trained_gb"] == pytest.approx(3 * full["weights_gb"]) and lora["trained_gb"] < full["trained_gb"]


def test_starts_texts_loading_and_the_merged_model(measure):
    """Seconds per method; problems per second; memory while loading; the merged model's time beside its base's."""
    out, records = measure("init", "--methods", "sorsa", "sara", "--params", "3000")
    assert [record["side"] for record in records] == ["sorsa", "sara"] and all(record["seconds"] > 0 for record in records)
    assert "sorsa / sara: seconds" in out
    record = measure("generate", *SMALL)[1][0]
    assert record["problems_per_second"] > 0 and record["new_tokens"] > 0 and "texts" not in record
    assert measure("load")[1][0]["weights_gb"] > 0 and measure("merged", "--batch", "1")[1][0]["ratio"] > 0


def test_a_process_of_its_own(measure):
    """What a user runs: the side's record comes back from its process, and the last words of one that failed."""
    assert measure("load", processes=True)[1][0]["peak_in_sizes"] > 0
    with pytest.raises(ValueError, match="train --side lora: error: .*no such file"):
        bench.run_side(["train", "--side", "lora", "--model", "no/such.gguf"])


@pytest.mark.peers
@pytest.mark.parametrize("what, sides, words", [
    ("train", ["lora", "peer", "strict", "tuned"], ["lora / peer: tokens per second", "lora / strict: tokens per second"]),
    ("memory", ["lora", "peer"], ["lora / peer: memory gb"]), ("init", ["pissa", "peer"], ["pissa / peer: seconds"]),
    ("generate", ["ours", "peer"], ["ours / peer: problems per second", "the same text: 5 of 5 problems"])])
def test_beside_the_peer(what, sides, words, measure):
    """The same weights and examples through transformers + peft, the same texts; ratios to each side."""
    pytest.importorskip("peft")
    out, records = measure(what, "--peer", *SMALL, *(["--methods", sides[0]] if sides[0] != "ours" else []))
    assert [record["side"] for record in records] == sides and all(word in out for word in words)
    if what == "generate":
        assert records[0]["new_tokens"] == records[1]["new_tokens"] > 0


@pytest.mark.peers
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_peer_computes_as_its_trainer_does(dtype, tiny_gguf, monkeypatch):
    """Under autocast where its weights are bf16: its factors are fp32, and would else be multiplied as such."""
    pytest.importorskip("peft")
    seen, build = [], bench.peer_model

    def watched(ours, dtype):
        model = build(ours, dtype)
        model.model.register_forward_pre_hook(lambda *_: seen.append(torch.is_autocast_enabled("cpu")))
        return model
    monkeypatch.setattr(bench, "peer_model", watched)
    bench.memory_side(bench.parse_arguments(["memory", "--side", "peer", "--model", str(tiny_gguf), "--batch", "2", "--length", "9",
                                             "--rank", "4", "--dtype", dtype]))
    assert seen == 2 * [dtype == "bfloat16"]


def test_ratios_are_of_the_first_side():
    """By hand: the median over rounds, and from the lowest to the highest."""
    rounds = {"ours": [{"x": 2.0}, {"x": 9.0}, {"x": 4.0}], "peer": [{"x": 1.0}, {"x": 3.0}, {"x": 1.0}]}
    assert bench.compare(rounds, "x", "ours", "peer") == "3.00 (2.00 to 4.00)"


def test_what_each_fast_form_buys(monkeypatch, capsys):
    """Training and generation with all forms, without each, and without any; a side has on what is not left out, the peers
    nothing but for "tuned"."""
    cases = bench.plan(bench.parse_arguments(["fast"]))
    assert [(what, case["leave_out"]) for what, _, case in cases] == [
        (what, name) for what in ("train", "generate") for name in (None, *fast.NAMES, "all")]
    seen = []
    monkeypatch.setattr(fast, "switch_on", lambda names: seen.append(set(names)))
    monkeypatch.setattr(bench, "SIDES", {"train": lambda args: {}})
    for side, left_out in (("lora", None), ("lora", "norm"), ("lora", "all"), ("tuned", None), ("peer", None), ("strict", None)):
        monkeypatch.setattr(sys, "argv", ["bench.py", *bench.side_arguments("train", side, {"leave_out": left_out})])
        bench.main()
    everything = set(fast.NAMES)
    assert seen == [everything, everything - {"norm"}, set(), everything] and capsys.readouterr().out == "{}\n" * 6


def test_the_cost_of_a_small_case(monkeypatch):
    """A training step and a generation of a random Llama, per token; each width of the table has a model."""
    case = argparse.Namespace(width=64, layers=1, batch=2, length=9, rank=2, params=None, problems=None, max_new=3, dtype="float32", side="lora")
    assert bench.cost_side(case)["us_per_token"] > 0
    case.problems = 3
    assert bench.cost_side(case)["us_per_token"] > 0
    monkeypatch.setattr(bench, "DEVICE", torch.device("meta"))
    for width in {case.get("width", 576) for case in bench.COST}:
        with torch.device("meta"):
            config = bench.random_llama(argparse.Namespace(width=width, layers=1, dtype="float32", side="lora")).config
        assert config.num_attention_heads % config.num_key_value_heads == 0
    assert {key for case in bench.COST for key in case} == {"batch", "length", "rank", "width", "problems", "max_new"}


def test_whose_batches_are_measured():
    """The batches of the strict peer are ours, those of the usual one are random; the largest comes once more, first,
    untimed."""
    encoded = [([1] * n, 1) for n in range(2, 200)]
    ours, strict, usual = (bench.batches(argparse.Namespace(side=side, batch=8, steps=5), encoded) for side in ("lora", "strict", "peer"))
    assert strict == ours and len(ours) == 6

    def spread(batches):
        return sum(max(len(ids) for ids, _ in batch) - min(len(ids) for ids, _ in batch) for batch in batches)
    assert spread(usual) > 3 * spread(ours)
    for batches in (ours, usual):
        longest = [max(len(ids) for ids, _ in batch) for batch in batches]
        assert longest[0] == max(longest) and batches[0] in batches[1:]
