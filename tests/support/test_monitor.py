"""What goes on beside the steps: signals, numbers that are not finite, spikes of the loss, the lines of the log."""
import io
import itertools
import json
import math
import os
import re
import signal
import sys
import time
import types

import pytest
import torch

import adapter
import eval as evaluation
import sorsa
import train
from methods import METHODS
from support import report, resume
from support.monitor import Monitor
from support.script import run_script
from tests.child import signalling
from tests.runs import Stopped, assert_same, begin, contents, ends, go_on, logged_steps, state_of, stopping
from tests.toy import attach, same, snapshot, toy_examples, toy_model
from weights import adapter_file, base_model


@pytest.fixture(autouse=True)
def heard():
    """Signals are heard, also where the shell has set them to be ignored: for what runs in the background, and by nohup."""
    heard = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
    before = {kind: signal.signal(kind, handler) for kind, handler in heard.items()}
    yield
    for kind, handler in before.items():
        signal.signal(kind, handler)


# ---- told to stop ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind, owner, name, call, step", [
    (signal.SIGTERM, train, "accumulate_gradients", 1, 1), (signal.SIGTERM, torch.optim.AdamW, "zero_grad", 2, 2),
    (signal.SIGTERM, report, "log_line", 4, 5), (signal.SIGTERM, resume, "save", 1, 3), (signal.SIGTERM, os, "fsync", 2, 3),
    (signal.SIGINT, train, "accumulate_gradients", 3, 3), (signal.SIGINT, train, "measure", 2, 4)])
def test_a_signal_ends_the_run_after_a_checkpoint(kind, owner, name, call, step, place, whole, tmp_path, monkeypatch, capsys):
    """Wherever it comes, the step is finished, or the next one is; what was saved and said leads to the same end."""
    handlers, run = [signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM)], tmp_path / "run"
    signalling(kind, owner, name, call, put=monkeypatch.setattr)
    with pytest.raises(SystemExit) as stopped:
        run_script(lambda: begin(place.lora, run))
    printed = capsys.readouterr()
    assert stopped.value.code == 128 + kind and printed.err == "" and state_of(run) == step
    assert printed.out.splitlines()[-1] == (f"stopped by {kind.name} after step {step} of 6; to go on: "
                                            f"python train.py --resume {run}")
    assert [signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM)] == handlers
    go_on(run)
    assert_same(whole, run)


@pytest.mark.parametrize("stdout", [None, io.StringIO()])
def test_a_terminal_that_is_gone_is_heard_without_a_stdout(stdout, monkeypatch):
    """SIGHUP comes to jobs whose output was closed, too: they are to save like any other."""
    monkeypatch.setattr(sys, "stdout", stdout)
    with resume.noted_signals() as noted:
        signal.raise_signal(signal.SIGHUP)
    assert noted == [signal.SIGHUP]


def test_a_signal_in_the_last_step_lets_the_run_finish(place, whole, tmp_path, monkeypatch):
    """There is nothing to go on with: the result is written."""
    signalling(signal.SIGTERM, resume, "save", 3, put=monkeypatch.setattr)
    begin(place.lora, tmp_path / "run")
    assert_same(whole, tmp_path / "run")


def test_a_signal_that_is_ignored_stays_so(place, whole, tmp_path, monkeypatch):
    """As a shell sets it for a job in the background: the run goes on, and Ctrl-C is still ignored after."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        signalling(signal.SIGINT, train, "accumulate_gradients", 3, put=monkeypatch.setattr)
        begin(place.lora, tmp_path / "run")
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
    assert_same(whole, tmp_path / "run")


@pytest.mark.parametrize("owner, name, call, times, left", [
    (train, "accumulate_gradients", 3, 2, 2), (resume, "save", 2, 2, 2), (base_model, "load", 1, 1, None),
    (adapter_file, "save", 1, 1, 6)], ids=["in a step", "as it saves", "before", "after"])
def test_ctrl_c_ends_at_once(owner, name, call, times, left, place, tmp_path, monkeypatch, capsys):
    """A second Ctrl-C in the loop, or one outside of it: one line and status 130; the last checkpoint is there."""
    signalling(signal.SIGINT, owner, name, call, times, put=monkeypatch.setattr)
    assert ends(capsys, begin, place.lora, tmp_path / "run") == (130, "error: interrupted\n")
    assert state_of(tmp_path / "run") == left


# ---- numbers that are not finite ------------------------------------------------------------------------------------

def poisoned(value, at, where="loss"):
    """accumulate_gradients whose call number `at` gives the loss times this value, or has it in one gradient."""
    function, calls = train.accumulate_gradients, itertools.count(1)

    def watched(args, model, encoded):
        loss = function(args, model, encoded)
        if next(calls) != at:
            return loss
        if where == "all gradients":
            for p in adapter.trainable(model).values():
                p.grad *= value
        if where == "gradient":
            next(p for p in adapter.trainable(model).values() if p.grad is not None).grad[0, 0] = value
        return loss * value if where == "loss" else loss
    return watched


@pytest.mark.parametrize("value, where, words", [(float("nan"), "loss", "loss nan"), (float("inf"), "gradient", "gradient norm inf")])
def test_a_step_that_is_not_finite_changes_nothing(value, where, words, place, whole, tmp_path, monkeypatch, capsys):
    """The run ends before step 4 changes a weight; one line with the step and what was not finite, no adapter, and from
    the checkpoint after step 2 it goes on as if nothing had happened."""
    run, weights, step = tmp_path / "run", [], torch.optim.AdamW.step

    def stepped(optimizer):
        step(optimizer)
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        weights.append((parameters, [p.detach().clone() for p in parameters]))
    with monkeypatch.context() as patch:
        patch.setattr(train, "accumulate_gradients", poisoned(value, 4, where))
        patch.setattr(torch.optim.AdamW, "step", stepped)
        status, said = ends(capsys, begin, place.lora, run)
    assert status == 2 and said.startswith("error: step 4: loss ") and words in said and "lower --lr, now 0.01" in said
    now, after_step_3 = weights[-1]
    assert len(weights) == 3 and now and all(map(torch.equal, now, after_step_3))
    assert contents(run).keys() == {"log.jsonl", resume.FILE} and state_of(run) == 2 and logged_steps(run) == [1, 2, 3]
    go_on(run)
    assert_same(whole, run)


def test_a_regularizer_that_is_not_finite_stops_the_run(place, tmp_path, monkeypatch):
    """R counts as the loss does, and is named."""
    monkeypatch.setattr(sorsa, "add_regularizer_grad", lambda *_: torch.tensor(float("inf")))
    with pytest.raises(FloatingPointError, match="step 1: loss .*, gradient norm .*, R inf, on records"):
        begin(place.flags("sorsa"), tmp_path / "run")


def test_a_base_that_gives_no_loss_is_named_as_the_cause(place, tmp_path, monkeypatch, capsys):
    """Before a step is made no rate is to blame."""
    load = base_model.load

    def broken(*arguments):
        base = load(*arguments)
        base.model.model.norm.weight.data[0] = math.nan
        return base
    monkeypatch.setattr(base_model, "load", broken)
    status, said = ends(capsys, begin, place.lora, tmp_path / "run")
    assert (status, said) == (2, "error: step 0: held-out loss nan; the base model itself gives it: load another\n")


@pytest.mark.parametrize("gamma", ["1e38", "1e25"])
def test_the_gradient_that_is_checked_is_the_one_that_is_applied(gamma, place, tmp_path, monkeypatch, capsys):
    """With a part of the regularizer that no number can hold the run ends before the optimizer moves anything, and says so."""
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda *_: pytest.fail("the optimizer has moved"))
    status, said = ends(capsys, begin, [*place.flags("sorsa"), "--gamma", gamma, "--save-every", "1"], tmp_path / "run")
    assert status == 2 and "step 1: loss" in said and "the weights are as they were before: lower --gamma" in said
    assert re.search(r"R \S+, gradient norm with R's part (inf|nan), on records", said)
    assert contents(tmp_path / "run").keys() == {"log.jsonl"}


def test_weights_that_are_not_finite_replace_no_checkpoint(place, tmp_path, capsys):
    """A rate that sends them beyond fp32 in one step ends the run before it saves them."""
    status, said = ends(capsys, begin, [*place.lora, "--lr", "3e38", "--save-every", "1", "--eval-every", "6"], tmp_path / "run")
    assert status == 2 and said.startswith("error: step 1: the weights after it are not finite: lower --lr, now 3e+38")
    assert resume.FILE not in contents(tmp_path / "run")


def test_a_clock_that_stands_still(place, whole, tmp_path, monkeypatch):
    """Rates are 0; the run, the stop in it and the evaluation are as ever."""
    for clock in ("time", "perf_counter", "monotonic"):
        monkeypatch.setattr(time, clock, lambda: 1e6)
    with stopping(2), pytest.raises(Stopped):
        begin(place.lora, tmp_path / "run")
    assert go_on(tmp_path / "run")["tokens_per_second"] == 0
    assert_same(whole, tmp_path / "run")
    evaluation.main([str(tmp_path / "run"), "--limit", "2", "--max-new", "4", "--device", "cpu"])


def test_the_records_of_a_bad_step_are_those_of_the_data(place, tmp_path, monkeypatch):
    """With --limit, a blank line and examples that are too long, the numbers name the records of the batch, up to 16."""
    records = [{"question": f"What is {i}+1?", "answer": f"{i + 1}\n#### {i + 1}"} for i in range(40)]
    for i in range(0, 40, 3):
        records[i]["answer"] = 30 * "so " + records[i]["answer"]
    (tmp_path / "data.jsonl").write_text("\n\n".join(map(json.dumps, records)))
    seen, function = [], train.accumulate_gradients

    def watched(args, model, encoded):
        seen.append(encoded)
        return function(args, model, encoded) * (float("nan") if len(seen) == 3 else 1)
    monkeypatch.setattr(train, "accumulate_gradients", watched)
    with pytest.raises(FloatingPointError, match="on records") as stopped:
        begin([*place.lora, "--data", str(tmp_path / "data.jsonl"), "--limit", "30", "--max-tokens", "100", "--batch", "18"],
              tmp_path / "run")
    numbers = re.search(r"on records ([\d, ]+) and 2 more of the data", str(stopped.value))[1].split(", ")
    tokenizer = base_model.load(str(place.model)).tokenizer
    assert len(numbers) == 16 and len(seen[2]) == 18
    for number, (ids, start) in zip(map(int, numbers), seen[2]):
        assert records[number - 1]["question"] in tokenizer.decode(ids[:start])
        assert records[number - 1]["answer"] in tokenizer.decode(ids) and number % 3 != 1


def test_the_way_of_a_gpu():
    """Not waited for, a good step is taken as without a look; one that is not finite changes nothing, nor does any after
    it, and the error names the first."""
    args = types.SimpleNamespace(lr=1e-2, micro_batch=4, multiple=1, autocast=None, compile=None)
    data = types.SimpleNamespace(train=toy_examples(16), numbers=range(10, 26))
    model, plain = (attach(toy_model(), "lora") for _ in range(2))
    optimizer, other = (torch.optim.AdamW(train.decay_groups(some, 0.1), lr=1e-2, fused=True) for some in (model, plain))
    monitor = Monitor(args, model, optimizer, data, 1.0, resume.Progress(), None, None, None, [])
    monitor.waits = False

    def take_step(model, optimizer, look=lambda loss: None):
        look(train.accumulate_gradients(args, model, data.train[:4]))
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(2):
        take_step(plain, other)
    for step, (factor, R) in enumerate([(1, 1), (1, 1), (1, float("inf")), (float("nan"), 1), (1, 1)], 1):
        take_step(model, optimizer, lambda loss: monitor.check(
            step, [step, 0], {"loss": factor * loss, "regularizer": torch.tensor(float(R))}))
    assert same(snapshot(model), snapshot(plain))
    for kept, expected in zip(optimizer.state.values(), other.state.values(), strict=True):
        assert same(kept, expected) and kept["step"] == 2
    monitor.check_numbers(monitor.since[:2])
    with pytest.raises(FloatingPointError, match=r"step 3: loss [\d.]+, R inf, on records 13, 10 of the data"):
        monitor.check_numbers(monitor.since)


def test_a_run_whose_first_gradient_is_nothing_is_an_error(place, tmp_path, monkeypatch, capsys):
    """As where torch.compile loses it: nothing would be learned, so nothing is left that looks as if something had been."""
    monkeypatch.setattr(adapter, "uniform_factor", lambda rank, inner, generator: torch.zeros(rank, inner))  # B is 0 too
    status, said = ends(capsys, begin, place.lora, tmp_path / "run")
    assert status == 2 and "step 1: the gradient of all that trains is exactly 0" in said and "leave --compile out" in said
    assert not (tmp_path / "run" / "adapter.safetensors").exists()


def test_later_a_gradient_may_be_nothing(place, whole, tmp_path, monkeypatch):
    """As of texts that are known by heart: the run goes on."""
    monkeypatch.setattr(train, "accumulate_gradients", poisoned(0.0, 3, "all gradients"))
    begin(place.lora, tmp_path / "run")
    assert json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[3])["grad_norm"] == 0


@pytest.mark.parametrize("method", METHODS)
def test_every_method_starts_with_a_gradient(method):
    """Of the first step, where LoRA's B, SARA's lam, Mo-SARA's v, CoRA's A and LoTR's cores are 0."""
    model = attach(toy_model(), method)
    train.accumulate_gradients(types.SimpleNamespace(micro_batch=4, multiple=1, autocast=None), model, toy_examples(4))
    assert sum(p.grad.square().sum() for p in adapter.trainable(model).values() if p.grad is not None) > 0


def test_a_gpu_is_not_given_what_was_added_behind_the_numbers():
    """Numbers that are finite, a gradient that is not any more: the weights stay, without waiting."""
    args = types.SimpleNamespace(lr=1e-2, micro_batch=4, multiple=1, autocast=None, compile=None)
    data = types.SimpleNamespace(train=toy_examples(4), numbers=range(1, 5))
    model = attach(toy_model(), "lora")
    before, optimizer = snapshot(model), torch.optim.AdamW(train.decay_groups(model, 0.0), lr=1e-2, fused=True)
    monitor = Monitor(args, model, optimizer, data, 1.0, resume.Progress(), None, None, None, [])
    monitor.waits = False
    loss = train.accumulate_gradients(args, model, data.train)
    next(p for p in adapter.trainable(model).values() if p.grad is not None).grad[0, 0] = math.nan
    monitor.check(1, [2], {"loss": loss, "grad_norm": torch.tensor(1.0)})
    optimizer.step()
    assert same(snapshot(model), before)
    with pytest.raises(FloatingPointError, match="step 1: .*, gradient norm with R's part nan, on records 3 of the data"):
        monitor.check_numbers(monitor.since)


# ---- the log --------------------------------------------------------------------------------------------------------

def test_the_lines_of_the_log(place, tmp_path):
    """One each --log-every steps, and where a held-out loss or a checkpoint is due."""
    begin([*place.lora, "--log-every", "4"], tmp_path / "run")
    assert logged_steps(tmp_path / "run") == [2, 3, 4, 6]


def test_spikes_are_marked(place, tmp_path, monkeypatch, capsys):
    """A loss of twice the median of the lines before shows in the line and the log, also of a step without a line."""
    monkeypatch.setattr(train, "accumulate_gradients", poisoned(3.0, 15))
    begin([*place.lora, "--steps", "20", "--eval-every", "20", "--save-every", "20", "--lr", "1e-4", "--log-every", "2"], tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    marked, = [line for line in lines if "spike" in line]
    assert marked["step"] == 16 and 2 < marked["spike"] < 4 and marked["loss_max"] > 2 * marked["loss"]
    printed, = [line for line in capsys.readouterr().out.splitlines() if "<- loss spike" in line]
    assert f"<- loss spike, {marked['spike']:.1f} times the usual" in printed


def test_what_is_a_spike():
    """Twice the median of the latest losses, of which there must be five; of several losses the highest counts."""
    assert report.spike([9.0], [1.0] * 4) == {} and report.spike([9.0], [1.0] * 5) == {"spike": 9.0}
    assert report.spike([1.9, 1.0], [1.0] * 5) == {"loss_max": 1.9} and report.spike([2.0], [1.0] * 5) == {"spike": 2.0}
