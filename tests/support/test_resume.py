"""A run that stops, in whatever way, goes on as if it had not: checkpoints, signals, full disks, steps that fail."""
import collections
import contextlib
import gc
import itertools
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch

import adapter
import eval as evaluation
import train
from data import batching
from methods import METHODS
from support import flags, loss, report, resume, script
from support.loss import IGNORE
from support.script import run_script
from tests.child import ended, forked, signalling
from tests.tiny import tiny_metadata, tiny_tensors, write_gguf
from tests.toy import SIZES, attach, snapshot, toy_examples, toy_model, write_sums
from weights import adapter_file, base_model, files
from tests.test_recipe import metamath_file

ROOT = Path(__file__).resolve().parent.parent.parent
METHODS = list(METHODS)
LR = {"sara": "3e-2", "mosara": "3e-2"}


class Stopped(Exception):
    """What ends a run in the middle, here."""


@pytest.fixture(scope="module")
def place(tiny_gguf, tmp_path_factory):
    """A folder with data, and the flags of a short run on them with the tiny model."""
    folder = tmp_path_factory.mktemp("resume")
    data = write_sums(folder / "data")
    flags = ["--model", str(tiny_gguf), "--data", str(data), "--held-out", "8", "--batch", "4", "--device", "cpu",
             "--no-sample"]
    return types.SimpleNamespace(folder=folder, data=data, flags=flags, model=tiny_gguf)


def flags_for(method, *more):
    """A method at a size and rate for the tiny model, six steps with a checkpoint after each second one."""
    size = [f"--{key}={value}" for key, value in SIZES.get(method, {"rank": 4}).items()]
    return ["--method", method, "--lr", LR.get(method, "1e-2"), "--steps", "6", "--eval-every", "3", "--save-every",
            "2", *size, *more]


@contextlib.contextmanager
def stopping(*steps):
    """Let train.py end with Stopped after the checkpoints of these steps, once each; a list of the steps saved."""
    saved, left, save = [], list(steps), resume.save

    def watched(path, model, optimizer, base, flags, data_sha256, progress):
        save(path, model, optimizer, base, flags, data_sha256, progress)
        saved.append(progress.step)
        if progress.step in left:
            left.remove(progress.step)
            raise Stopped
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resume, "save", watched)
        yield saved


def interrupted(flags, out, *steps):
    """Begin a run that stops after the checkpoints of `steps`, and continue it each time."""
    with stopping(*steps):
        with pytest.raises(Stopped):
            train.main([*flags, "--out", str(out)])
        for _ in steps[1:]:
            with pytest.raises(Stopped):
                train.main(["--resume", str(out)])
        return train.main(["--resume", str(out)])


def log_lines(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


CLOCK = ("tokens_per_second", "gflops", "memory_gb", "spike", "loss_max")


def trace(out):
    """What log.jsonl says, less what the clock has to do with (and spikes, which are seen from a run's beginning)."""
    return [{key: value for key, value in line.items() if key not in CLOCK} for line in log_lines(out)]


def outcome(out, *left_out):
    """result.json, less what may differ between a run and the same run continued."""
    result = json.loads((out / "result.json").read_text())
    vary = ("out", "resumed_at", "command", "seconds", "seconds_in_steps", "tokens_per_second", "memory_gb", *left_out)
    return {key: value for key, value in result.items() if key not in vary}


def assert_same(one, other, *left_out):
    """Two finished runs have the same log, result, and bits of the adapter; nothing else is left of either."""
    assert trace(one) == trace(other)
    assert outcome(one, *left_out) == outcome(other, *left_out)
    tensors, others = (files.read_safetensors(out / "adapter.safetensors") for out in (one, other))
    assert tensors[1] == others[1] and tensors[0].keys() == others[0].keys()
    for name, tensor in tensors[0].items():
        assert torch.equal(tensor, others[0][name]), name
    for out in (one, other):
        assert sorted(path.name for path in out.iterdir()) == ["adapter.safetensors", "log.jsonl", "result.json"]


def ends(arguments, capsys):
    """(status, what it says on stderr) of a script's end by a user's mistake."""
    with pytest.raises(SystemExit) as stopped:
        run_script(lambda: train.main(list(map(str, arguments))))
    said = capsys.readouterr().err
    assert said.count("\n") == 1, said
    return stopped.value.code, said


# ---- going on -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("method", METHODS)
def test_a_continued_run_is_the_uninterrupted_one(method, place, tmp_path):
    """Stopped twice, a run of every method has the losses, norms, rates, tokens, settings and weights of one that
    was not."""
    flags = [*place.flags, *flags_for(method, "--weight-decay", "0.01")]
    train.main([*flags, "--out", str(tmp_path / "whole")])
    result = interrupted(flags, tmp_path / "parts", 2, 4)
    assert result["resumed_at"] == [2, 4]
    assert_same(tmp_path / "whole", tmp_path / "parts")
    assert [line["step"] for line in log_lines(tmp_path / "parts") if "loss" in line] == [1, 2, 3, 4, 5, 6]


VARIANTS = {
    "epochs": ["--epochs", "1.5", "--template", "alpaca"], "params": ["--params", "3k", "--strip-annotations"],
    "targets": ["--targets", "q_proj,down_proj", "--limit", "13", "--rank", "3", "--alpha", "7"],
    "cut": ["--cut", "9+12", "--rank", "4", "--schedule", "linear", "--warmup", "0.5", "--clip", "0.3"],
    "micro": ["--micro-batch", "3", "--log-every", "4", "--recompute", "--seed", "5", "--rank", "4"],
    "bf16": ["--dtype", "bfloat16", "--rank", "4", "--max-tokens", "60"]}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_continued_run_keeps_its_settings(variant, place, tmp_path):
    """Epochs, budgets, targets, cuts, templates and limits are what they were, without being given again."""
    steps = [] if variant == "epochs" else ["--steps", "6"]
    flags = [*place.flags, "--method", "lora", "--lr", "1e-2", "--eval-every", "3", "--save-every", "2", *steps,
             *VARIANTS[variant]]
    train.main([*flags, "--out", str(tmp_path / "whole")])
    interrupted(flags, tmp_path / "parts", 2)
    if variant == "micro":  # where a run is stopped there is a line of the log
        assert {line["step"] for line in log_lines(tmp_path / "parts") if "loss" in line} == {2, 3, 4, 6}
    assert_same(tmp_path / "whole", tmp_path / "parts")
    if variant == "epochs":
        assert outcome(tmp_path / "parts")["epochs"] == 1.5 and outcome(tmp_path / "parts")["steps"] == 12


@pytest.mark.parametrize("more", [[], ["--params", "30k", "--steps", "3"]], ids=["recipe", "recipe with a budget"])
def test_a_continued_recipe_is_the_recipe(more, llama2, tmp_path, capsys):
    """--recipe paper goes on with all that it sets, and prints it as before."""
    metamath_file(tmp_path / "MetaMathQA.json", 36)
    flags = ["--method", "sorsa", "--recipe", "paper", "--model", str(llama2), "--data",
             str(tmp_path / "MetaMathQA.json"),
             "--held-out", "20", "--no-sample", "--device", "cpu", "--batch", "8", "--svd", "gram", "--save-every",
             "1", *more]
    train.main([*flags, "--out", str(tmp_path / "whole")])
    before = capsys.readouterr().out
    interrupted(flags, tmp_path / "parts", 1)
    assert_same(tmp_path / "whole", tmp_path / "parts")
    line = next(line for line in before.splitlines() if line.startswith("recipe"))
    assert capsys.readouterr().out.splitlines().count(line) == 2


def test_further_models_are_not_needed_again(place, tmp_path):
    """The basis that CoRA took from --extra is in the checkpoint: the run goes on though the other model is gone."""
    other = write_gguf(tmp_path / "other.gguf", tiny_metadata(), tiny_tensors(seed=5))
    flags = [*place.flags, *flags_for("cora", "--extra", str(other))]
    train.main([*flags, "--out", str(tmp_path / "whole")])
    with stopping(4), pytest.raises(Stopped):
        train.main([*flags, "--out", str(tmp_path / "parts")])
    other.unlink()
    train.main(["--resume", str(tmp_path / "parts")])
    assert_same(tmp_path / "whole", tmp_path / "parts")


def test_random_numbers_go_on(tmp_path):
    """What torch draws next after a checkpoint is what it would have drawn."""
    model, progress = attach(toy_model(), "lora"), resume.Progress(1, {0: 1.0}, 9, 0.5, 1.0, [])
    optimizer = torch.optim.AdamW(train.decay_groups(model, 0.0), fused=True)
    train.accumulate_gradients(model, toy_examples(4), 4, "cpu", contextlib.nullcontext())
    optimizer.step()
    base = base_model.Base(model, None, "base", "1" * 64)
    resume.save(tmp_path / resume.FILE, model, optimizer, base, ["--method=lora"], "2" * 64, progress)
    drawn = torch.rand(5)
    saved, twin = resume.read(tmp_path), base_model.Base(toy_model(), None, "base", "1" * 64)
    assert saved.progress == progress
    resume.attach(tmp_path, saved, twin, "2" * 64)
    torch.manual_seed(7)
    resume.restore(tmp_path, saved, twin.model, torch.optim.AdamW(train.decay_groups(twin.model, 0.0), fused=True), 3)
    assert torch.equal(torch.rand(5), drawn)


def test_a_run_that_was_killed_before_its_last_line_is_finished(place, tmp_path):
    """With every step made and result.json written or not, --resume only writes what was missing."""
    flags = [*place.flags, *flags_for("lora")]
    train.main([*flags, "--out", str(tmp_path / "whole")])
    interrupted(flags, tmp_path / "parts", 6)
    assert_same(tmp_path / "whole", tmp_path / "parts")
    with stopping(6), pytest.raises(Stopped):
        train.main([*flags, "--out", str(tmp_path / "again")])
    for name in ("result.json", "adapter.safetensors"):
        (tmp_path / "again" / name).write_bytes((tmp_path / "whole" / name).read_bytes())
    train.main(["--resume", str(tmp_path / "again")])
    assert_same(tmp_path / "whole", tmp_path / "again")


# ---- killed ---------------------------------------------------------------------------------------------------------

def check_whole(out):
    """Every file of a run, finished or not, can be read, but for the last line of its log. Returns its checkpoint's
    step."""
    names = {path.name for path in out.iterdir() if not path.name.endswith(".tmp")} if out.is_dir() else set()
    assert names <= {"log.jsonl", "result.json", "adapter.safetensors", resume.FILE}
    for text in (out / "log.jsonl").read_text().splitlines()[:-1] if "log.jsonl" in names else ():
        json.loads(text)
    if "result.json" in names:
        files.read_json(out / "result.json")
    if "adapter.safetensors" in names:
        [tensor.sum() for tensor in adapter_file.read(out / "adapter.safetensors")[0].values()]
    if resume.FILE in names:
        return resume.read(out).progress.step
    return "finished" if "result.json" in names else None


def kill_and_continue(flags, out, seconds, rng, kills):
    """Begin a run and SIGKILL it `kills` times at random moments of the `seconds` that it takes, going on after each
    kill; then let it end. Returns where the kills left it: (step of the checkpoint, None before the first one or
    "finished"; whether it was writing a file)."""
    states, said = [], out.with_suffix(".txt")
    while True:
        state = check_whole(out)
        if state == "finished":
            return states
        arguments = [*flags, "--out", out, "--overwrite"] if state is None else ["--resume", out]
        process = forked(arguments, said)
        if len(states) >= kills:
            assert ended(process) == 0, said.read_text()
        else:
            time.sleep(seconds * rng.choice((rng.uniform(0, 0.6), rng.uniform(0.5, 1.1))))
            process.kill()
            status = ended(process)
            assert status in (0, 137), said.read_text()
            if status:
                states.append((check_whole(out), any(out.glob(".*.tmp"))))


def killed(method, place, folder, rng, kills):
    """A run of a method that is killed and continued: its files are those of an uninterrupted run."""
    flags = [*place.flags, *flags_for(method, "--save-every", "1", "--log-every", "1", "--steps", "16")]
    since = time.perf_counter()
    assert ended(forked([*flags, "--out", folder / "whole"], folder / "whole.txt")) == 0
    seconds = time.perf_counter() - since
    states = kill_and_continue(flags, folder / "parts", seconds, rng, kills)
    for left in (folder / "parts").glob(".*.tmp"):  # of a kill after all was written
        left.unlink()
    assert_same(folder / "whole", folder / "parts", "overwrite")
    return states


def test_a_killed_run_goes_on(place, tmp_path):
    """SIGKILL at three random moments: every file is whole at any time, and in the end all is as if nothing had
    happened."""
    print(killed("sorsa", place, tmp_path, random.Random(0), 3))


@contextlib.contextmanager
def signalled(*signal_at):
    """child.signalling in this process."""
    with pytest.MonkeyPatch.context() as patch:
        signalling(*signal_at, put=patch.setattr)
        yield


@pytest.mark.parametrize("name, call", [
    *itertools.product(("fsync", "replace"), range(1, 6)), ("unlink", 11)])
def test_a_run_killed_as_it_writes_goes_on(name, call, place, tmp_path):
    """SIGKILL within the writing of the log, of both checkpoints, of the adapter and of the result, and at the end,
    before the last checkpoint is removed."""
    flags = [*place.flags, *flags_for("sorsa", "--steps", "2", "--save-every", "1", "--eval-every", "1")]
    if not (place.folder / "two").exists():
        train.main([*flags, "--out", str(place.folder / "two")])
    process = forked([*flags, "--out", tmp_path / "run"], tmp_path / "said", (signal.SIGKILL, "os", name, call))
    assert ended(process) == 137
    state = check_whole(tmp_path / "run")
    assert name != "unlink" or state == 2 and (tmp_path / "run" / "result.json").exists()
    train.main([*flags, "--out", str(tmp_path / "run"), "--overwrite"] if state is None
               else ["--resume", str(tmp_path / "run")])
    assert_same(place.folder / "two", tmp_path / "run", "overwrite")


@pytest.mark.long
def test_fifty_kills_of_all_methods(place, tmp_path):
    """The same with six random kills or more of each method: in steps, in checkpoints, at the end."""
    rng, states, runs = random.Random(1), [], itertools.count()
    for at_least, method in zip(range(6, 55, 6), METHODS):
        while len(states) < at_least:
            folder = tmp_path / f"{method}{next(runs)}"
            folder.mkdir()
            states += killed(method, place, folder, rng, 6)
    count = collections.Counter("end" if step in (16, "finished") else "start" if step is None else "middle"
                                for step, _ in states)
    writing = sum(was_writing for _, was_writing in states)
    print(f"\n{len(states)} kills: {dict(count)}, {writing} of them while a file was written")
    assert len(states) >= 50


# ---- told to stop ---------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def whole(place):
    """An uninterrupted run of LoRA."""
    train.main([*place.flags, *flags_for("lora"), "--out", str(place.folder / "whole")])
    return place.folder / "whole"


@pytest.mark.parametrize("owner, name, call, step", [
    (train, "accumulate_gradients", 1, 1), (train, "accumulate_gradients", 3, 3),
    (torch.optim.AdamW, "zero_grad", 2, 2),
    (train, "log_line", 4, 5), (train, "held_out_loss", 2, 4), (resume, "save", 1, 3), (files.os, "fsync", 2, 3)])
@pytest.mark.parametrize("kind, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["SIGINT", "SIGTERM"])
def test_a_signal_ends_the_run_after_a_checkpoint(kind, status, owner, name, call, step, place, whole, tmp_path,
                                                  capsys):
    """Wherever it comes, the step is finished, or the next one is; what was saved and said leads to the same end."""
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with signalled(kind, owner, name, call), pytest.raises(SystemExit) as stopped:
        run_script(lambda: train.main([*place.flags, *flags_for("lora"), "--out", str(tmp_path / "parts")]))
    printed = capsys.readouterr()
    assert stopped.value.code == status and printed.err == "" and resume.read(tmp_path / "parts").progress.step == step
    assert printed.out.splitlines()[-1] == (f"stopped by {kind.name} after step {step} of 6; to go on: "
                                            f"python train.py --resume {tmp_path / 'parts'}")
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    train.main(["--resume", str(tmp_path / "parts")])
    assert_same(whole, tmp_path / "parts")


@pytest.mark.parametrize("owner, name, call", [(train, "accumulate_gradients", 6), (resume, "save", 3)])
def test_a_signal_in_the_last_step_lets_the_run_finish(owner, name, call, place, whole, tmp_path):
    """There is nothing to go on with: the result is written."""
    with signalled(signal.SIGTERM, owner, name, call):
        train.main([*place.flags, *flags_for("lora"), "--out", str(tmp_path / "run")])
    assert_same(whole, tmp_path / "run")


def test_a_signal_that_is_ignored_stays_so(place, whole, tmp_path):
    """As a shell sets it for what a script runs in the background: the run goes on, and Ctrl-C is still ignored
    after."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with signalled(signal.SIGINT, train, "accumulate_gradients", 3):
            train.main([*place.flags, *flags_for("lora"), "--out", str(tmp_path / "run")])
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
    assert_same(whole, tmp_path / "run")


@pytest.mark.parametrize("owner, name, call, times", [
    (train, "accumulate_gradients", 3, 2), (resume, "save", 2, 2), (base_model, "load", 1, 1),
    (train, "print_sample", 1, 1),
    (adapter, "save", 1, 1)])
def test_ctrl_c_ends_at_once(owner, name, call, times, place, tmp_path, capsys):
    """A second Ctrl-C in the loop, and one before or after it: one line and status 130; the last checkpoint is
    there."""
    with signalled(signal.SIGINT, owner, name, call, times):
        status, said = ends([*place.flags, *flags_for("lora"), "--out", tmp_path / "run"], capsys)
    assert (status, said) == (130, "error: interrupted\n")
    assert check_whole(tmp_path / "run") == {"accumulate_gradients": 2, "save": 2 if owner is resume else 6}.get(name)


def test_a_second_sigterm_ends_at_once(place, tmp_path):
    """As the system does it, with status 143."""
    process = forked([*place.flags, *flags_for("lora"), "--out", tmp_path / "run"], tmp_path / "said",
                     (signal.SIGTERM, "train", "accumulate_gradients", 3, 2))
    assert ended(process) == 143 and check_whole(tmp_path / "run") == 2


def test_ctrl_c_from_the_shell(place, tmp_path):
    """`python train.py` itself: a line that says how to go on, status 130; and as it says, it goes on."""
    command = [sys.executable, str(ROOT / "train.py"), *place.flags, "--method", "lora", "--steps", "100000", "--out",
               str(tmp_path / "run")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("step"):
            process.send_signal(signal.SIGINT)
            break
    out, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (130, "")
    assert f"python train.py --resume {tmp_path / 'run'}" in out.splitlines()[-1]
    step = int(re.search(r"stopped by SIGINT after step (\d+) of", out)[1])
    assert log_lines(tmp_path / "run")[-1]["step"] == step == resume.read(tmp_path / "run").progress.step


# ---- what is refused ------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def half(place):
    """A LoRA run that was stopped after step 4 of 6: read it only."""
    with stopping(4), pytest.raises(Stopped):
        train.main([*place.flags, *flags_for("lora"), "--out", str(place.folder / "half")])
    return place.folder / "half"


# Another value of every flag that is not free to change, and what the run above began with.
OTHERS = {
    "method": ("sorsa", "lora"), "template": ("alpaca", "plain"), "recipe": ("paper", None),
    "targets": ("q_proj", None),
    "params": ("5k", None), "rank": ("5", "4"), "alpha": ("3", None), "svd": ("exact", None), "gamma": ("0", None),
    "reduction": ("sum", None), "threshold": ("0.3", None), "init": ("lora", None), "sets": ("3", None),
    "router_rank": ("2", None),
    "v_mode": ("output", None), "basis": ("random", None), "extra": ("a.gguf", None), "a_init": ("random", None),
    "group_by": ("shape", None), "core_only": (None, None), "steps": ("7", "6"), "epochs": ("2", None),
    "batch": ("5", "4"),
    "lr": ("0.02", "0.01"), "schedule": ("linear", "cosine"), "warmup": ("0.5", "0.03"), "weight_decay": ("0.1", "0.0"),
    "clip": ("2", "1.0"), "max_tokens": ("99", "256"), "cut": ("50+50", None), "strip_annotations": (None, None),
    "limit": ("20", None), "seed": ("1", "0"), "held_out": ("9", "8"), "dtype": ("bfloat16", "float32")}


def test_every_flag_is_free_or_refused():
    """A flag that is added to train.py must be put into one of the two lists."""
    there = set(vars(flags.make_parser().parse_args([])))
    assert there == {*OTHERS, *flags.FREE} and not {*OTHERS} & {*flags.FREE}


@pytest.mark.parametrize("name", OTHERS)
def test_what_changes_the_run_is_refused(name, half, capsys):
    """Each flag with another value than the run began with: one line with the flag, the new value and the old one."""
    flag, (new, old) = "--" + name.replace("_", "-"), OTHERS[name]
    before = (half / "log.jsonl").read_bytes(), (half / resume.FILE).read_bytes()
    status, said = ends(["--resume", half, flag, *([new] if new else [])], capsys)
    new = {"params": "5000", "alpha": "3.0", "gamma": "0.0", "epochs": "2.0", "clip": "2.0"}.get(name, new)
    assert status == 2 and said.startswith(f"error: {flag}{f' {new}' if new else ''}: the run in {half} began ")
    assert f"began with {flag} {old}, and" in said if old else "began without it, and" in said
    assert before == ((half / "log.jsonl").read_bytes(), (half / resume.FILE).read_bytes())


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def copied(half, folder):
    shutil.copytree(half, folder)
    return folder


def test_the_same_value_and_free_flags_are_taken(half, whole, tmp_path):
    """What a run began with may be given again; how often it measures, saves and logs may change, and how it
    computes."""
    run = copied(half, tmp_path / "run")
    with stopping() as saved:
        result = train.main(["--resume", str(run), "--lr", "1e-2", "--rank", "4", "--micro-batch", "2", "--eval-every",
                             "1",
                             "--save-every", "1", "--log-every", "1", "--recompute", "--device", "cpu"])
    assert saved == [5, 6] and set(result["held_out_loss"]) == {0, 3, 5, 6}
    assert (result["micro_batch"], result["checkpointing"]) == (2, True)
    assert result["held_out_after"] == pytest.approx(outcome(whole)["held_out_after"], rel=1e-5)


def test_a_flag_that_was_changed_stays_changed(half, tmp_path):
    """A run that is continued with another --save-every and stopped again goes on with that one."""
    run = copied(half, tmp_path / "run")
    with stopping(5) as saved, pytest.raises(Stopped):
        train.main(["--resume", str(run), "--save-every", "1"])
    flags = resume.read(run).flags
    assert saved == [5] and "--save-every=1" in flags and "--save-every=2" not in flags


def test_model_and_data_may_have_moved(half, place, whole, tmp_path):
    """Both are known by their checksums: --model and --data say where they are now."""
    run, model = copied(half, tmp_path / "run"), tmp_path / "moved.gguf"
    model.write_bytes(place.model.read_bytes())
    shutil.copytree(place.data, tmp_path / "moved")
    result = train.main(["--resume", str(run), "--model", str(model), "--data", str(tmp_path / "moved")])
    assert (result["model"], result["data"]) == (str(model), str(tmp_path / "moved")) and trace(run) == trace(whole)


def other_model(folder):
    return ["--model", write_gguf(folder / "other.gguf", tiny_metadata(), tiny_tensors(seed=5))]


def other_data(folder):
    return ["--data", write_sums(folder / "data", 41)]


@pytest.mark.parametrize("more, words", [
    (other_model, "the run began with another model (sha256 "),
    (other_data, "the run began with another data (sha256 "),
    (lambda folder: ["--out", folder / "x"], "leave out --out and --overwrite"),
    (lambda folder: ["--overwrite"], "leave out --out and --overwrite"),
    (lambda folder: ["--model", "no.gguf"], "no.gguf: no such file"),
    (lambda folder: ["--data", folder / "no"], "/no")])
def test_what_does_not_go_with_resume(more, words, half, tmp_path, capsys):
    """One line, and the run is as it was."""
    run = copied(half, tmp_path / "run")
    status, said = ends(["--resume", run, *more(tmp_path)], capsys)
    assert status == 2 and words in said
    assert contents(run) == contents(half)


def test_where_there_is_nothing_to_continue(whole, tmp_path, capsys):
    """A finished run, a folder that holds none, and no folder are told apart."""
    (tmp_path / "empty").mkdir()
    for folder, words in ((whole, "this run is finished"), (tmp_path / "empty", "nothing was saved before it stopped"),
                          (tmp_path / "no", "there is no such folder"),
                          (whole / "log.jsonl", "there is no such folder")):
        status, said = ends(["--resume", folder], capsys)
        assert status == 2 and f"{folder / resume.FILE}: no such file, so there is nothing to continue: {words}" in said


# ---- damaged checkpoints --------------------------------------------------------------------------------------------

def rewritten(run, tensors=None, metadata=None, progress=None, **record):
    """Change the tensors (None: left out), the metadata, the saved record and the progress in it of a run's
    checkpoint."""
    found, texts = files.read_safetensors(run / resume.FILE)
    found = {name: tensor.clone() for name, tensor in found.items()}
    for name, change in (tensors or {}).items():
        old = found.pop(name, None)
        if change is not None:
            found[name] = change(old)
    saved = json.loads(texts["run"])
    saved = {**saved, **record, "progress": {**saved["progress"], **(progress or {})}}
    files.write_safetensors(run / resume.FILE, found, {**texts, "run": json.dumps(saved), **(metadata or {})})


Q = "model.layers.0.self_attn.q_proj.A"
DAMAGE = {
    "a moment missing": (dict(tensors={f"exp_avg.{Q}": None}), "exp_avg is not there for exactly what trains"),
    "a moment too many": (dict(tensors={"exp_avg_sq.x": lambda _: torch.zeros(3)}),
                          "exp_avg_sq is not there for exactly"),
    "a moment's shape": (dict(tensors={f"exp_avg.{Q}": lambda old: old.T.contiguous()}),
                         f"exp_avg.{Q} is not of shape (4, 64) in fp32"),
    "a moment's dtype": (dict(tensors={f"exp_avg_sq.{Q}": lambda old: old.double()}),
                         f"exp_avg_sq.{Q} is not of shape"),
    "a step's shape": (dict(tensors={f"step.{Q}": lambda old: old[None]}), f"step.{Q} is not of shape ()"),
    "another step": (dict(tensors={f"step.{Q}": lambda old: old + 1}), f"step.{Q} is not 4"),
    "a factor missing": (dict(tensors={f"adapter.{Q}": None}), f"missing {Q}"),
    "a factor's shape": (dict(tensors={f"adapter.{Q}": lambda old: old[:2].contiguous()}),
                         f"{Q} has shape (2, 64), expected (4, 64)"),
    "a factor's dtype": (dict(tensors={f"adapter.{Q}": lambda old: old.long()}), f"{Q} has dtype torch.int64"),
    "a tensor of no kind": (dict(tensors={"x.y": lambda _: torch.zeros(3)}), "unexpected tensor x.y"),
    "no random state": (dict(tensors={"rng": None}), "no random state of torch's"),
    "half a random state": (dict(tensors={"rng": lambda old: old[:100].clone()}), "no random state of torch's"),
    "numbers for a random state": (dict(tensors={"rng": lambda old: old.float()}), "no random state of torch's"),
    "no record": (dict(metadata={"run": "[]"}), "the 'run' metadata is not a JSON object"),
    "no adapter": (dict(metadata={"adapter": "{}"}), "unknown method None"),
    "flags of another type": (dict(flags="--lr=1"), "its flags are no flags"),
    "a number among flags": (dict(flags=["--lr=1", 3]), "its flags are no flags"),
    "a word among flags": (dict(flags=["--lr=1", "x"]), "its flags are no flags"),
    "no checksum": (dict(data_sha256=None), "its progress is none"),
    "step 0": (dict(progress={"step": 0}), "its progress is not that of a run of 6 steps"),
    "step 7": (dict(progress={"step": 7}), "its progress is not that of a run of 6 steps"),
    "the last step": (dict(progress={"step": 6}), "its progress is not that of a run of 6 steps"),
    "nothing measured": (dict(progress={"held_out": {}}), "its progress is not that of a run of 6 steps"),
    "no time": (dict(progress={"seconds_in_steps": 0}), "its progress is not that of a run of 6 steps"),
    "a field too many": (dict(progress={"x": 0}), "its progress is none"),
    **{f"progress {field} {value!r}": (dict(progress={field: value}), "its progress is none") for field, value in (
        ("step", -1), ("step", 1.5), ("step", True), ("tokens", "many"), ("seconds", -1.0), ("seconds", None),
        ("resumed_at", 3),
        ("resumed_at", [0.5]), ("held_out", []), ("held_out", {"0": "x"}), ("held_out", {"a": 0.5}),
        ("held_out", {"0": 1}))},
    **{f"flags {' '.join(flags)}": (dict(flags=flags), f"its flags are not those of a run: {words}")
       for flags, words in (
        (["--help"], "--help"), (["--resume=x"], "--resume=x"), (["--out=x"], "--out=x"), (["--dry-run"], "--dry-run"),
        (["--overwrite"], "--overwrite"), (["--met=lora"], "--met=lora"), (["--methods=lora"], "--methods=lora"),
        (["--"], "--"),
        (["--recipe=paper", "--method=sara"], "--recipe paper is known for"),
        (["--recipe=x"], "argument --recipe: invalid choice"),
        (["--lr"], "argument --lr: expected one argument"), (["--lr=x"], "argument --lr: 'x' is not a number"),
        (["--steps=0"], "argument --steps: '0' is not"),
        (["--steps=3", "--epochs=1"], "give --steps or --epochs, not both"),
        (["--warmup=2"], "--warmup 2 is a share of the steps"), (["--method=lorra"], "unknown method 'lorra'"),
        (["--method=lora", "--sets=3"], "--sets does not belong to lora"),
        (["--no-sample=1"], "argument --no-sample: ignored explicit"),
        (["--cut=5"], "argument --cut: '5' is not two lengths"),
        (["--method=full"], "full, and the adapter is of lora"))}}


@pytest.mark.parametrize("label", DAMAGE)
def test_a_damaged_checkpoint_is_named(label, half, tmp_path, capsys):
    """One line that names the file and what is wrong in it; nothing of the run has changed."""
    run, (changes, words) = copied(half, tmp_path / "run"), DAMAGE[label]
    rewritten(run, **changes)
    log = (run / "log.jsonl").read_bytes()
    status, said = ends(["--resume", run], capsys)
    assert status == 2 and said.startswith(f"error: {run / resume.FILE}: ") and words in said, said
    assert (run / "log.jsonl").read_bytes() == log and len(list(run.iterdir())) == 2


@pytest.mark.parametrize("share", [0, 0.001, 0.01, 0.5, 0.999])
def test_a_truncated_checkpoint_is_named(share, half, tmp_path, capsys):
    """Wherever it was cut."""
    run = copied(half, tmp_path / "run")
    content = (run / resume.FILE).read_bytes()
    (run / resume.FILE).write_bytes(content[:int(share * len(content))])
    status, said = ends(["--resume", run], capsys)
    assert status == 2 and said.startswith(f"error: {run / resume.FILE}: ")


def test_a_log_of_any_kind_is_mended(half, whole, tmp_path):
    """Lines that are cut, foreign, or of steps after the checkpoint are dropped; without a log there is a new one."""
    run = copied(half, tmp_path / "run")
    with open(run / "log.jsonl", "ab") as file:
        file.write(b'{"step": 5, "loss": 1.0}\n[1]\n7\n{}\n{"step": "x"}\n{"step": null}\n\xff\xfe\n{"step": 5, "lo')
    train.main(["--resume", str(run)])
    assert_same(whole, run)
    run = copied(half, tmp_path / "without")
    (run / "log.jsonl").unlink()
    train.main(["--resume", str(run)])
    assert trace(run) == trace(whole)[-3:]


# ---- a full disk ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["fsync", "replace"])
def test_a_full_disk_leaves_the_last_checkpoint(name, place, whole, tmp_path, monkeypatch, capsys):
    """The second checkpoint does not fit: one line that names it, the first is there and goes on, nothing else is
    left."""
    run, function, calls = tmp_path / "run", getattr(os, name), itertools.count(1)

    def full(*arguments):
        if next(calls) == 3:  # the log, a checkpoint, the next
            raise OSError(28, "No space left on device")
        return function(*arguments)
    with monkeypatch.context() as patch:
        patch.setattr(os, name, full)
        status, said = ends([*place.flags, *flags_for("lora"), "--out", run], capsys)
    assert (status, said) == (2, f"error: {run / resume.FILE}: No space left on device; check that path, its "
                                 "permissions and the space left there\n")
    assert {path.name for path in run.iterdir()} == {"log.jsonl", resume.FILE} and check_whole(run) == 2
    train.main(["--resume", str(run)])
    assert_same(whole, run)


def test_a_file_size_limit_is_one_line(place, tmp_path):
    """What the system itself refuses to write: the same, in a process of its own."""
    process = forked([*place.flags, *flags_for("lora"), "--out", tmp_path / "run"], tmp_path / "said",
                     file_limit=50_000)
    assert ended(process) == 2 and [path.name for path in (tmp_path / "run").iterdir()] == ["log.jsonl"]
    last = (tmp_path / "said").read_text().splitlines()[-1]
    assert last.startswith(f"error: {tmp_path / 'run' / resume.FILE}: File too large; ")


# ---- numbers --------------------------------------------------------------------------------------------------------

def poisoned(value, at, place_of="loss"):
    """accumulate_gradients whose call number `at` gives a loss, or one gradient, of this value."""
    function, calls = train.accumulate_gradients, itertools.count(1)

    def watched(model, encoded, *rest):
        loss = function(model, encoded, *rest)
        if next(calls) == at:
            if place_of == "loss":
                return loss * value
            next(p for p in adapter.trainable(model).values() if p.grad is not None).grad[0, 0] = value
        return loss
    return watched


@pytest.mark.parametrize("value, where", [(float("nan"), "loss"), (float("inf"), "gradient"),
                                          (float("nan"), "gradient")])
def test_a_step_that_is_not_finite_changes_nothing(value, where, place, whole, tmp_path, monkeypatch, capsys):
    """The run ends before step 4 changes a weight; one line with the step and what was not finite, no adapter, and from
    the checkpoint after step 2 it goes on as if nothing had happened."""
    run, parameters, weights, step = tmp_path / "run", [], [], torch.optim.AdamW.step

    def stepped(optimizer):
        step(optimizer)
        parameters[:] = [p for group in optimizer.param_groups for p in group["params"]]
        weights.append([p.detach().clone() for p in parameters])
    with monkeypatch.context() as patch:
        patch.setattr(train, "accumulate_gradients", poisoned(value, 4, where))
        patch.setattr(torch.optim.AdamW, "step", stepped)
        status, said = ends([*place.flags, *flags_for("lora"), "--out", run], capsys)
    assert status == 2 and len(weights) == 3
    assert said.startswith("error: step 4: loss ") and "lower --lr, now 0.01" in said
    assert (f"loss {value:g}" if where == "loss" else f"gradient norm {value:g}") in said
    assert parameters and all(map(torch.equal, parameters, weights[-1]))
    assert {path.name for path in run.iterdir()} == {"log.jsonl", resume.FILE} and check_whole(run) == 2
    assert [line["step"] for line in log_lines(run) if "loss" in line] == [1, 2, 3]
    train.main(["--resume", str(run)])
    assert_same(whole, run)


@pytest.mark.parametrize("batch", [4, 18])
def test_the_records_of_a_bad_step_are_those_of_the_data(batch, place, tmp_path, monkeypatch):
    """With --limit, a blank line and examples that are too long, the numbers name the records that the batch was
    made of."""
    records = [{"question": f"What is {i}+1?", "answer": f"{i + 1}\n#### {i + 1}"} for i in range(40)]
    for i in range(0, 40, 3):
        records[i]["answer"] = 30 * "so " + records[i]["answer"]
    (tmp_path / "data.jsonl").write_text("\n\n".join(map(json.dumps, records)))
    seen, function = [], train.accumulate_gradients

    def watched(model, encoded, *rest):
        seen.append(encoded)
        return function(model, encoded, *rest) * (float("nan") if len(seen) == 3 else 1)
    monkeypatch.setattr(train, "accumulate_gradients", watched)
    with pytest.raises(FloatingPointError, match="on records") as stopped:
        train.main([*place.flags, "--data", str(tmp_path / "data.jsonl"), "--method", "lora", "--rank", "4", "--limit",
                    "30",
                    "--max-tokens", "100", "--batch", str(batch), "--out", str(tmp_path / "run")])
    named = re.search(r"on records ([\d, ]+)(?: and (\d+) more)? of the data", str(stopped.value))
    numbers = [int(number) for number in named[1].split(", ")]
    tokenizer = base_model.load(str(place.model)).tokenizer
    assert len(numbers) + int(named[2] or 0) == len(seen[2]) == batch and (named[2] == "2") == (batch == 18)
    for number, (ids, start) in zip(numbers, seen[2]):
        assert records[number - 1]["question"] in tokenizer.decode(ids[:start])
        assert records[number - 1]["answer"] in tokenizer.decode(ids) and number % 3 != 1


def test_the_way_of_a_gpu():
    """Not waited for, a step that is not finite changes nothing, nor does any after it; the line names the first."""
    model, data = attach(toy_model(), "lora"), toy_examples(16)
    optimizer = torch.optim.AdamW(train.decay_groups(model, 0.1), lr=1e-2, fused=True)
    steps, before = [], None
    for step in range(1, 6):
        loss = train.accumulate_gradients(model, data[:4], 4, "cpu", contextlib.nullcontext())
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        R = torch.tensor(float("inf")) if step == 3 else torch.tensor(1.0)
        if step == 4:
            loss = loss * float("nan")
        steps.append((step, [step, 0], loss.detach(), norm, R))
        train.skip_if_not_finite(optimizer, (loss, norm, R))
        optimizer.step()
        optimizer.zero_grad()
        if step == 2:
            before = snapshot(model), [value.clone() for state in optimizer.state.values() for value in state.values()]
    assert all(torch.equal(before[0][name], tensor) for name, tensor in snapshot(model).items())
    assert all(map(torch.equal, before[1], (value for state in optimizer.state.values() for value in state.values())))
    assert {float(state["step"]) for state in optimizer.state.values()} == {2}
    with pytest.raises(FloatingPointError,
                       match=r"step 3: loss [\d.]+, gradient norm [\d.]+, R inf, on records 13, 10 of the data"):
        train.check_finite(steps, range(10, 20), 1e-2)
    train.check_finite(steps[:2], range(10, 20), 1e-2)
    train.check_finite([(1, [0], torch.tensor(1.0), torch.tensor(1.0), None)], [1], 1e-2)


def test_without_a_bad_step_the_way_of_a_gpu_is_the_same():
    """Looking for bad steps does not change a good one."""
    results = []
    for look in (False, True):
        model = attach(toy_model(), "sorsa")
        optimizer = torch.optim.AdamW(train.decay_groups(model, 0.1), lr=1e-2, fused=True)
        for _ in range(3):
            loss = train.accumulate_gradients(model, toy_examples(4), 4, "cpu", contextlib.nullcontext())
            if look:
                train.skip_if_not_finite(optimizer, (loss, loss, None))
            optimizer.step()
            optimizer.zero_grad()
        results.append(snapshot(model))
    assert all(torch.equal(tensor, results[1][name]) for name, tensor in results[0].items())


def test_a_regularizer_that_is_not_finite_stops_the_run(place, tmp_path, monkeypatch):
    """R counts as the loss does, and is named."""
    monkeypatch.setattr(adapter.method_module("sorsa"), "add_regularizer_grad", lambda *_: torch.tensor(float("inf")))
    with pytest.raises(FloatingPointError, match="step 1: loss .*, gradient norm .*, R inf, on records"):
        train.main([*place.flags, *flags_for("sorsa"), "--out", str(tmp_path / "run")])


@pytest.mark.parametrize("every", [1, 2])
def test_spikes_are_marked(every, place, tmp_path, monkeypatch, capsys):
    """A loss of twice the median of the lines before shows in the line and the log, also of a step without a line."""
    monkeypatch.setattr(train, "accumulate_gradients", poisoned(3.0, 15))
    train.main([*place.flags, *flags_for("lora", "--steps", "20", "--eval-every", "20", "--save-every", "20", "--lr",
                                         "1e-4",
                                         "--log-every", str(every)), "--out", str(tmp_path / "run")])
    lines = [line for line in log_lines(tmp_path / "run") if "loss" in line]
    marked = [line for line in lines if "spike" in line]
    printed = [line for line in capsys.readouterr().out.splitlines() if "<- loss spike" in line]
    assert [line["step"] for line in marked] == [15 if every == 1 else 16] and len(printed) == 1
    assert 2 < marked[0]["spike"] < 4 and f"<- loss spike, {marked[0]['spike']:.1f} times the usual" in printed[0]
    assert all(("loss_max" in line) == (every == 2) for line in lines)
    if every == 2:
        assert marked[0]["loss_max"] > 2 * marked[0]["loss"] and all(line["loss_max"] >= line["loss"] for line in lines)
    assert report.spike([9.0], [1.0] * 4) == {} and report.spike([9.0], [1.0] * 5) == {"spike": 9.0}
    assert report.spike([1.9, 1.0], [1.0] * 5) == {"loss_max": 1.9}


# ---- memory ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("fail", [
    lambda: torch.empty(1 << 50), lambda: bytearray(1 << 60),
    lambda: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory.\nTried to"))],
                         ids=["torch", "python", "gpu"])
def test_out_of_memory_is_one_line_with_advice(fail, capsys):
    """From every allocator."""
    with pytest.raises(SystemExit) as stopped:
        run_script(fail, "lower --micro-batch")
    assert stopped.value.code == 2 and capsys.readouterr().err == "error: out of memory: lower --micro-batch\n"


def test_other_errors_are_tracebacks():
    """A RuntimeError that is not about memory is ours to mend."""
    with pytest.raises(RuntimeError, match="size"):
        run_script(lambda: torch.zeros(3) @ torch.zeros(4))
    assert not script.is_out_of_memory(RuntimeError("x")) and script.is_out_of_memory(MemoryError())


def test_too_large_a_batch_leaves_the_last_checkpoint(place, tmp_path, monkeypatch, capsys):
    """Memory that runs out in the middle of a run."""
    function, calls = train.accumulate_gradients, itertools.count(1)
    monkeypatch.setattr(train, "accumulate_gradients",
                        lambda *rest: function(*rest) if next(calls) < 4 else torch.empty(1 << 50))
    status, said = ends([*place.flags, *flags_for("lora"), "--out", tmp_path / "run"], capsys)
    assert status == 2 and said.startswith("error: out of memory: ") and check_whole(tmp_path / "run") == 2


# ---- a dry run ------------------------------------------------------------------------------------------------------

def shown_batch(printed):
    """{record number: (question, answer)} of the batch that --dry-run prints."""
    parts = re.split(r"\n--- record (\d+) of the data, \d+ tokens, \d+ of them answer\n",
                     printed.split("\na dry run: ")[0])
    return {int(number): text.rstrip("\n").removesuffix("]]").split("[[")
            for number, text in zip(parts[1::2], parts[2::2])}


@contextlib.contextmanager
def first_batches():
    """A list of the batches that are trained on."""
    seen, function = [], train.accumulate_gradients

    def watched(model, encoded, *rest):
        seen.append(encoded)
        return function(model, encoded, *rest)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "accumulate_gradients", watched)
        yield seen


@pytest.mark.parametrize("method", METHODS)
def test_a_dry_run_shows_what_the_run_will_do(method, place, tmp_path, capsys):
    """The table, the memory, and the batch that is trained on first, question and answer as the data have them; nothing
    is written."""
    flags = [*place.flags, *flags_for(method, "--template", "alpaca", "--seed", "3", "--steps", "1"), "--out",
             str(tmp_path / "run")]
    assert train.main([*flags, "--dry-run"]) is None and not (tmp_path / "run").exists()
    printed = capsys.readouterr().out
    assert printed.rstrip().endswith("a dry run: nothing was trained, nothing was written")
    with first_batches() as seen:
        train.main(flags)
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith((" ", "plan", "method"))]
    assert set(table) <= set(printed.splitlines()) and "\nmemory    about " in printed
    records = [json.loads(line) for line in (place.data / "train.jsonl").read_text().splitlines()]
    batch, tokenizer = shown_batch(printed), base_model.load(str(place.model)).tokenizer
    tokens = batching.token_count(seen[0])
    assert f"the batch of step 1, {tokens} tokens; what carries loss is in [[ ]]" in printed
    assert len(batch) == 4
    for (number, (question, answer)), (ids, start) in zip(batch.items(), seen[0]):
        assert (question, answer) == (tokenizer.decode(ids[:start]), tokenizer.decode(ids[start:]))
        assert records[number - 1]["question"] in question and answer == records[number - 1]["answer"] + "<|im_end|>"


def test_a_dry_run_of_what_goes_on(half, place, tmp_path, capsys):
    """With --resume it shows the batch of the next step, and that all are made where they are; the run is untouched."""
    run = copied(half, tmp_path / "run")
    before = contents(run)
    train.main(["--resume", str(run), "--dry-run"])
    printed = capsys.readouterr().out
    assert contents(run) == before
    tokenizer = base_model.load(str(place.model)).tokenizer
    with first_batches() as seen, stopping(6), pytest.raises(Stopped):
        train.main(["--resume", str(run)])
    assert "the batch of step 5, " in printed
    shown = [answer for _, answer in shown_batch(printed).values()]
    assert [tokenizer.decode(ids[start:]) for ids, start in seen[0]] == shown
    train.main(["--resume", str(run), "--dry-run"])
    assert "\nall 6 steps are made\n" in capsys.readouterr().out


def test_a_dry_run_refuses_what_the_run_would(half, whole, place, tmp_path, capsys):
    """A folder that holds a run needs --overwrite, and is left as it is; a damaged checkpoint is named."""
    before = (whole / "log.jsonl").read_bytes()
    status, said = ends([*place.flags, *flags_for("lora"), "--out", whole, "--dry-run"], capsys)
    assert status == 2 and "already holds a run" in said
    status, said = ends([*place.flags, *flags_for("lora"), "--out", half, "--dry-run"], capsys)
    assert status == 2 and f"or --resume {half} to go on" in said
    train.main([*place.flags, *flags_for("lora"), "--out", str(whole), "--dry-run", "--overwrite"])
    assert (whole / "log.jsonl").read_bytes() == before and (whole / "result.json").exists()
    run = copied(half, tmp_path / "run")
    rewritten(run, tensors={f"exp_avg.{Q}": None})
    assert "exp_avg is not there" in ends(["--resume", run, "--dry-run"], capsys)[1]


# ---- long runs ------------------------------------------------------------------------------------------------------

def held():
    """(resident bytes, open files, threads) of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize(), len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))


def soak(place, folder, steps):
    """What a run with a checkpoint and a held-out loss every few steps holds after a third of it, and at its end."""
    seen, function = {}, loss.mean_loss

    def watched(*arguments):
        seen[len(seen)] = held()
        return function(*arguments)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "held_out_loss", watched)
        train.main([*place.flags, *flags_for("sorsa", "--steps", str(steps), "--eval-every", "5", "--save-every", "2"),
                    "--out", str(folder)])
    return seen[len(seen) // 3], seen[len(seen) - 1]


def assert_flat(early, late):
    print(f"resident {early[0] / 1e6:.1f} MB, then {late[0] / 1e6:.1f} MB")
    assert late[1:] == early[1:] and late[0] < early[0] + (4 << 20), (early, late)


def test_a_run_holds_no_more_at_its_end(place, tmp_path):
    """Sixty steps: memory, open files and threads stay as they are."""
    assert_flat(*soak(place, tmp_path / "run", 60))


@pytest.mark.long
def test_a_long_run_holds_no_more_at_its_end(place, tmp_path):
    """Four hundred."""
    assert_flat(*soak(place, tmp_path / "run", 400))


def test_runs_leave_nothing_open(place, tmp_path, monkeypatch):
    """A run that finishes and one that fails close their files."""
    train.main([*place.flags, *flags_for("lora"), "--out", str(tmp_path / "first")])
    gc.collect()
    before = held()[1:]
    train.main([*place.flags, *flags_for("lora"), "--out", str(tmp_path / "second")])
    monkeypatch.setattr(train, "accumulate_gradients", poisoned(float("nan"), 2))
    with pytest.raises(FloatingPointError):
        train.main([*place.flags, *flags_for("lora"), "--out", str(tmp_path / "third")])
    gc.collect()
    assert held()[1:] == before


def test_few_files_are_open_at_once(half, whole, tmp_path, monkeypatch):
    """A checkpoint of more tensors than a process may open files is read, and its file is let go before the next
    step."""
    run, before = copied(half, tmp_path / "run"), resource.getrlimit(resource.RLIMIT_NOFILE)
    assert len(files.read_safetensors(run / resume.FILE)[0]) > 100
    loop, saved = train.train, []
    gc.collect()
    monkeypatch.setattr(train, "train", lambda args, *rest: (saved.append(args.saved), loop(args, *rest)))
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + 20, before[1]))
        train.main(["--resume", str(run)])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert_same(whole, run)
    assert saved == [None]


def test_a_run_and_its_evaluation_are_repeatable(place, tmp_path, capsys):
    """Twice the same flags: the same bytes of the adapter and of the predictions."""
    found = []
    for name in ("one", "two"):
        train.main([*place.flags, *flags_for("cora"), "--out", str(tmp_path / name)])
        evaluation.main([str(tmp_path / name), "--data", str(place.data), "--limit", "6", "--max-new", "12",
                         "--device", "cpu"])
        found.append([(tmp_path / name / file).read_bytes() for file in ("adapter.safetensors", "predictions.jsonl")])
    assert found[0] == found[1]


# ---- the estimate of memory -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("rows", [3, 16])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_estimate_of_activations(checkpointing, rows):
    """report.activation_bytes is within 15 % of what autograd keeps for a LoRA on every projection; with checkpointing
    of what it keeps of all blocks, and of one more while its backward pass runs."""
    model = attach(toy_model(num_hidden_layers=6, hidden_size=64, intermediate_size=160, num_attention_heads=4,
                             num_key_value_heads=2,
                             head_dim=16), "lora", rank=2)
    tokens = torch.randint(0, 97, (rows, 40))
    targets = tokens.clone()
    targets[:, :-1] = IGNORE  # the head is counted apart
    weights = {tensor.untyped_storage().data_ptr() for tensor in model.state_dict().values()}

    def kept(checkpointing):
        held, model.model.recompute = {}, checkpointing

        def keep(tensor):
            if tensor.untyped_storage().data_ptr() not in weights:
                held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = train.answer_loss(model, tokens, targets)
        return sum(held.values()), loss  # the graph holds what was kept until here

    everything, few = kept(False)[0], kept(True)[0]
    measured = few + everything / 6 if checkpointing else everything
    print(f"estimate / measured: {report.activation_bytes(model, tokens.numel(), checkpointing) / measured:.3f}")
    assert report.activation_bytes(model, tokens.numel(), checkpointing) == pytest.approx(measured, rel=0.15)
