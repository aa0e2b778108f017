"""A run that stops, in whatever way, goes on as if it had not: checkpoints, signals, full disks, steps that fail."""
import collections
import contextlib
import itertools
import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch

import adapter
import batching
import checkpoint
import eval as evaluation
import report
import resume
import script
import settings
import tensorfile
import train
from loss import IGNORE
from script import run_script
from test_recipe import llama2, metamath_file  # noqa: F401 (a fixture)
from tiny import tiny_metadata, tiny_tensors, write_gguf
from toy import SIZES, attach, snapshot, toy_examples, toy_model, write_sums

ROOT = Path(__file__).resolve().parent.parent
METHODS = list(adapter.METHODS)
LR = {"sara": "3e-2", "mosara": "3e-2"}


class Stopped(Exception):
    """What ends a run in the middle, here."""


@pytest.fixture(scope="module")
def place(tiny_gguf, tmp_path_factory):
    """A folder with data, and the flags of a short run on them with the tiny model."""
    folder = tmp_path_factory.mktemp("resume")
    data = write_sums(folder / "data")
    flags = ["--model", str(tiny_gguf), "--data", str(data), "--held-out", "8", "--batch", "4", "--device", "cpu", "--no-sample"]
    return types.SimpleNamespace(folder=folder, data=data, flags=flags, model=tiny_gguf)


def flags_for(method, *more):
    """A method at a size and rate for the tiny model, six steps with a checkpoint after each second one."""
    size = [f"--{key}={value}" for key, value in SIZES.get(method, {"rank": 4}).items()]
    return ["--method", method, "--lr", LR.get(method, "1e-2"), "--steps", "6", "--eval-every", "3", "--save-every", "2", *size, *more]


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
    tensors, others = (tensorfile.read_safetensors(out / "adapter.safetensors") for out in (one, other))
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
    """Stopped twice, a run of every method has the losses, norms, rates, tokens, settings and weights of one that was not."""
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
    "micro": ["--micro-batch", "3", "--log-every", "4", "--checkpointing", "--seed", "5", "--rank", "4"],
    "bf16": ["--dtype", "bfloat16", "--rank", "4", "--max-tokens", "60"]}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_continued_run_keeps_its_settings(variant, place, tmp_path):
    """Epochs, budgets, targets, cuts, templates and limits are what they were, without being given again."""
    steps = [] if variant == "epochs" else ["--steps", "6"]
    flags = [*place.flags, "--method", "lora", "--lr", "1e-2", "--eval-every", "3", "--save-every", "2", *steps, *VARIANTS[variant]]
    train.main([*flags, "--out", str(tmp_path / "whole")])
    interrupted(flags, tmp_path / "parts", 2)
    if variant == "micro":  # where a run is stopped there is a line of the log
        assert {line["step"] for line in log_lines(tmp_path / "parts") if "loss" in line} == {2, 3, 4, 6}
    assert_same(tmp_path / "whole", tmp_path / "parts")
    if variant == "epochs":
        assert outcome(tmp_path / "parts")["epochs"] == 1.5 and outcome(tmp_path / "parts")["steps"] == 12


@pytest.mark.parametrize("more", [[], ["--params", "30k", "--steps", "3"]], ids=["recipe", "recipe with a budget"])
def test_a_continued_recipe_is_the_recipe(more, llama2, tmp_path, capsys):  # noqa: F811
    """--recipe paper goes on with all that it sets, and prints it as before."""
    metamath_file(tmp_path / "MetaMathQA.json", 60)
    flags = ["--method", "sorsa", "--recipe", "paper", "--model", str(llama2), "--data", str(tmp_path / "MetaMathQA.json"),
             "--held-out", "20", "--no-sample", "--device", "cpu", "--batch", "8", "--svd", "gram", "--save-every", "1", *more]
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

def forked(arguments, said):
    """The process id of train.py in a process of its own, without the seconds that importing takes; `said` is a file."""
    sys.stdout.flush()
    process = os.fork()
    if process:
        return process
    status = 99
    try:
        with open(said, "a") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
            run_script(lambda: train.main(list(map(str, arguments))))
            status = 0
    except SystemExit as stopped:
        status = stopped.code
    finally:
        os._exit(status)


def ended(process):
    """The status of a process as a shell sees it, once it has ended."""
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    return code if code >= 0 else 128 - code


def check_whole(out):
    """Every file of a run, finished or not, can be read, but for the last line of its log. Returns its checkpoint's step."""
    names = {path.name for path in out.iterdir() if not path.name.endswith(".tmp")} if out.is_dir() else set()
    assert names <= {"log.jsonl", "result.json", "adapter.safetensors", resume.FILE}
    for text in (out / "log.jsonl").read_text().splitlines()[:-1] if "log.jsonl" in names else ():
        json.loads(text)
    if "result.json" in names:
        tensorfile.read_json(out / "result.json")
    if "adapter.safetensors" in names:
        [tensor.sum() for tensor in adapter.read_config(out / "adapter.safetensors")[0].values()]
    if resume.FILE in names:
        return resume.read(out).progress.step
    return "finished" if "result.json" in names else None


def kill_and_continue(flags, out, seconds, rng, kills):
    """Begin a run and SIGKILL it `kills` times at random moments of the `seconds` that it takes, continuing it after each
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
            os.kill(process, signal.SIGKILL)
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
    """SIGKILL at three random moments: every file is whole at any time, and in the end all is as if nothing had happened."""
    print(killed("sorsa", place, tmp_path, random.Random(0), 3))


@contextlib.contextmanager
def signalling(kind, owner, name, call, times=1):
    """Let the process send itself a signal in the call number `call` of a function, `times` times."""
    function, calls = getattr(owner, name), itertools.count(1)

    def watched(*arguments, **more):
        if next(calls) == call:
            for _ in range(times):
                signal.raise_signal(kind)
        return function(*arguments, **more)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, watched)
        yield


@pytest.mark.parametrize("name, call", list(itertools.product(("fsync", "replace", "unlink"), range(1, 6))))
def test_a_run_killed_as_it_writes_goes_on(name, call, place, tmp_path):
    """SIGKILL within the writing of the log, of both checkpoints, of the adapter and of the result."""
    flags = [*place.flags, *flags_for("sorsa", "--steps", "2", "--save-every", "1", "--eval-every", "1")]
    if not (place.folder / "two").exists():
        train.main([*flags, "--out", str(place.folder / "two")])
    with signalling(signal.SIGKILL, os, name, call):
        assert ended(forked([*flags, "--out", tmp_path / "run"], tmp_path / "said")) == 137
    state = check_whole(tmp_path / "run")
    train.main([*flags, "--out", str(tmp_path / "run"), "--overwrite"] if state is None else ["--resume", str(tmp_path / "run")])
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
    count = collections.Counter("end" if step in (16, "finished") else "start" if step is None else "middle" for step, _ in states)
    print(f"\n{len(states)} kills: {dict(count)}, {sum(writing for _, writing in states)} of them while a file was written")
    assert len(states) >= 50


# ---- told to stop ---------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def whole(place):
    """An uninterrupted run of LoRA."""
    train.main([*place.flags, *flags_for("lora"), "--out", str(place.folder / "whole")])
    return place.folder / "whole"


@pytest.mark.parametrize("owner, name, call, step", [
    (train, "accumulate_gradients", 1, 1), (train, "accumulate_gradients", 3, 3), (torch.optim.AdamW, "zero_grad", 2, 2),
    (train, "log_line", 4, 5), (train, "held_out_loss", 2, 4), (resume, "save", 1, 3), (tensorfile.os, "fsync", 2, 3)])
@pytest.mark.parametrize("kind, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["SIGINT", "SIGTERM"])
def test_a_signal_ends_the_run_after_a_checkpoint(kind, status, owner, name, call, step, place, whole, tmp_path, capsys):
    """Wherever it comes, the step is finished, or the next one is; what was saved and said leads to the same end."""
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with signalling(kind, owner, name, call), pytest.raises(SystemExit) as stopped:
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
    with signalling(signal.SIGTERM, owner, name, call):
        train.main([*place.flags, *flags_for("lora"), "--out", str(tmp_path / "run")])
    assert_same(whole, tmp_path / "run")


@pytest.mark.parametrize("owner, name, call, times", [
    (train, "accumulate_gradients", 3, 2), (resume, "save", 2, 2), (checkpoint, "load", 1, 1), (train, "print_sample", 1, 1),
    (adapter, "save", 1, 1)])
def test_ctrl_c_ends_at_once(owner, name, call, times, place, tmp_path, capsys):
    """A second Ctrl-C in the loop, and one before or after it: one line and status 130; the last checkpoint is there."""
    with signalling(signal.SIGINT, owner, name, call, times):
        status, said = ends([*place.flags, *flags_for("lora"), "--out", tmp_path / "run"], capsys)
    assert (status, said) == (130, "error: interrupted\n")
    assert check_whole(tmp_path / "run") == {"accumulate_gradients": 2, "save": 2 if owner is resume else 6}.get(name)


def test_a_second_sigterm_ends_at_once(place, tmp_path):
    """As the system does it, with status 143."""
    with signalling(signal.SIGTERM, train, "accumulate_gradients", 3, 2):
        process = forked([*place.flags, *flags_for("lora"), "--out", tmp_path / "run"], tmp_path / "said")
    assert ended(process) == 143 and check_whole(tmp_path / "run") == 2


def test_ctrl_c_from_the_shell(place, tmp_path):
    """`python train.py` itself: a line that says how to go on, status 130; and as it says, it goes on."""
    command = [sys.executable, str(ROOT / "train.py"), *place.flags, "--method", "lora", "--steps", "100000", "--out", str(tmp_path / "run")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("step"):
            process.send_signal(signal.SIGINT)
            break
    out, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (130, "") and f"python train.py --resume {tmp_path / 'run'}" in out.splitlines()[-1]
    step = int(re.search(r"stopped by SIGINT after step (\d+) of", out)[1])
    assert log_lines(tmp_path / "run")[-1]["step"] == step == resume.read(tmp_path / "run").progress.step
