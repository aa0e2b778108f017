"""What is to be measured on a GPU, rehearsed with tiny sizes: facts that are on disk at once, limits, what is left out."""
import json
import re

import pytest

import eval as evaluation
import train
from support import fast, graphs
from tests.again import Again
from tests.toy import write_sums
from tools import bench, gpu

SCRIPTS = {"train.py": train.main, "eval.py": evaluation.main, "-m": lambda words: gpu.main(words[1:])}


@pytest.fixture
def rehearse(tmp_path, monkeypatch, capsys):
    """Run `bench gpu --tiny`, its parts in this process, compiling nothing: what it printed, its records."""
    compiled = []

    def here(words, limit):
        try:
            SCRIPTS[words[0]](words[1:])
        except Exception as error:
            return str(error)
    monkeypatch.setattr(gpu, "run", here)
    monkeypatch.setattr(gpu, "matmul_rate", lambda *_: 100.0)
    monkeypatch.setattr(fast, "compile_blocks", compiled.append)
    monkeypatch.setattr(graphs, "Side", Again)
    monkeypatch.setattr(graphs, "wanted", lambda choice, model: choice != "off")

    def run(*arguments):
        results = tmp_path / "facts.jsonl"
        monkeypatch.setattr("sys.argv", ["bench.py", "gpu", "--tiny", "--results", str(results), *map(str, arguments)])
        bench.main()
        facts = [json.loads(line) for line in results.read_text().splitlines()]
        assert all(fact["device"].startswith("cpu") and "--tiny" in fact["command"] for fact in facts)
        return capsys.readouterr().out, facts, compiled
    return run


def test_every_part_leaves_its_facts(rehearse):
    """With random weights, which the data's name says; each method is sound; every target stands with what was found."""
    out, facts, compiled = rehearse()
    assert list(dict.fromkeys(fact["part"] for fact in facts)) == list(gpu.PARTS)
    assert not [fact for fact in facts if "failed" in fact] and {fact["data"] for fact in facts} == {
        gpu.DATA, "random tokens, rows of 32"}
    assert [fact["method"] for fact in facts if fact.get("sound")] == list(gpu.METHODS)
    sides = {(fact["side"], fact["batch"]) for fact in facts if fact["part"] in ("as_written", "others")}
    assert {side for side, _ in sides} == set(gpu.METHODS) and {("lora", 2), ("lora", 3)} <= sides
    assert len(compiled) == 3 and all(f["gradient_error"] < 1e-3 for f in facts if "gradient_error" in f)
    assert [f["method"] for f in facts if f["part"] == "recorded" and "gradient_error" in f] == list(gpu.METHODS)
    assert {f["graphs"] for f in facts if "graphs" in f} == {"on", "off", "auto"}
    found = out.partition("targets, for one H100")[2]
    assert len(re.findall(r"^(?:not )?met  ", found, re.M)) == 6 - ("not installed" in out) and "answer, at least 9: 9\n" in found


def test_a_target_is_met_on_its_own_side():
    """Seconds below, shares and speeds above; the speed at every batch that both have, whatever did not fit."""
    facts = [{"part": "as_written", "epoch_seconds": 13.3}, {"part": "recorded", "epoch_seconds": 4.9, "side": "lora", "batch": 32,
             "tokens_per_second": 300}, {"part": "answers", "seconds": 6.3}, {"part": "large", "share": 0.6},
             {"part": "recorded", "side": "lora", "batch": 86, "tokens_per_second": 600},
             {"part": "peers", "side": "peer", "batch": 32, "failed": "out of memory"},
             {"part": "peers", "side": "peer", "batch": 86, "tokens_per_second": 200},
             *({"part": "correct", "sound": method != "lotr"} for method in gpu.METHODS)]
    assert [(value, met) for _, value, met in gpu.targets(facts)] == [(8, False), (13.3, False), (4.9, True), (6.3, True), (0.6, True),
                                                                     (3.0, True)]
    assert gpu.targets([{"part": "peers", "side": "peer", "batch": 86, "tokens_per_second": 301}, *facts[4:5]])[-1][2] is False


def test_a_part_fails_alone_and_memory_that_runs_out_is_a_fact(rehearse, monkeypatch):
    """One that raises is named, as is a case that does not fit; the others go on, and the target is not met for nothing."""
    def broken(task):
        raise RuntimeError("no such kernel")

    def full(task):
        monkeypatch.setattr(gpu, "our_steps", lambda *_: (_ for _ in ()).throw(gpu.torch.OutOfMemoryError))
        gpu.cases(task, ("lora",), (2,), 1)
    monkeypatch.setattr(gpu, "PARTS", {"machine": (broken, 9), "as_written": (full, 9), "answers": gpu.PARTS["answers"]})
    out, facts, _ = rehearse("--parts", "machine", "as_written", "answers")
    assert [fact.get("failed") for fact in facts] == ["no such kernel", "out of memory", None, None]
    assert "not measured  seconds for an epoch as written" in out


def test_what_does_not_fit_the_time_is_named(rehearse):
    """Nothing is begun without time; each part says so."""
    out, facts, _ = rehearse("--minutes", "0.1")
    assert [(fact["part"], fact["skipped"]) for fact in facts] == [(part, "no time left") for part in gpu.PARTS]
    assert out.count("not measured") == 6


def test_a_command_has_a_limit_and_last_words():
    """One that takes too long is ended; of one that fails the last line is told."""
    assert gpu.run(["-c", "import time; time.sleep(60)"], 1) == "more than 1 s"
    assert gpu.run(["-c", "raise SystemExit('first\\nerror: last')"], 60) == "error: last"
    assert gpu.run(["-c", "pass"], 60) is None


def test_the_real_model(rehearse, tiny_gguf, tmp_path, monkeypatch):
    """SORSA, the base, LoRA, then the others: the project's own commands, with what they leave; one that fails is named."""
    monkeypatch.setattr(gpu, "METHODS", ["lora", "lotr"])
    data = write_sums(tmp_path / "data")
    _, facts, _ = rehearse("--real", "--model", tiny_gguf, "--data", data)
    assert [fact["part"] for fact in facts] == ["sorsa epoch", "sorsa answers", "base answers", "lora epoch", "lora answers",
                                                "lotr epoch", "lotr answers"]
    assert all(str(data) in fact["data"] and fact["model"] == str(tiny_gguf) for fact in facts[:5])
    assert facts[0]["held_out_after"] and facts[0]["seconds_in_steps"] and "answer" in facts[1]["accuracy"] and facts[1]["n"] == 2
    assert "rank 64 is out of range" in facts[5]["failed"] and "failed" in facts[6]


def test_the_rows_have_gsm8ks_lengths(monkeypatch):
    """190 tokens on average, 125 of them answer, as the README says of the data; as many rows of other lengths as there."""
    rows = gpu.Task("x", gpu.parse_arguments(["--tiny"])).examples(gpu.EPOCH)
    lengths, prompts = [len(ids) for ids, _ in rows], [prompt for _, prompt in rows]
    assert len(rows) == 7468 and sum(lengths) / 7468 == pytest.approx(190.2, rel=0.01)
    assert sum(lengths) - sum(prompts) == pytest.approx(125.3 * 7468, rel=0.01)
    assert min(lengths) == 71 and max(lengths) > 500


def test_without_a_gpu_it_says_so(capsys):
    """In a line."""
    with pytest.raises(SystemExit):
        gpu.main([])
    assert "torch finds no GPU here: --tiny rehearses on a CPU" in capsys.readouterr().err
