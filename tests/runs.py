"""Short runs of train.py on the tiny model: to begin, to stop in the middle, to go on with, and to compare."""
import contextlib
import json
import shutil

import pytest

import train
from support import fast, resume
from support.script import run_script
from tests.toy import SIZES, write_sums
from weights import adapter_file, files

LR = {"sara": "3e-2", "mosara": "3e-2"}  # the others: 1e-2
# What differs between a run and the same run continued: the clock, and spikes, which are seen from a run's beginning.
CLOCK = ("tokens_per_second", "gflops", "memory_gb", "spike", "loss_max", "seconds", "seconds_in_steps", "out", "resumed_at",
         "command", "overwrite")


class Stopped(Exception):
    """What ends a run in the middle, here."""


class Place:
    """A folder with data, and the flags of short runs on them with the tiny model."""

    def __init__(self, folder, model):
        self.folder, self.model, self.data = folder, model, write_sums(folder / "data")
        self.common = ["--model", str(model), "--data", str(self.data), "--held-out", "8", "--batch", "4", "--device", "cpu",
                       "--dtype", "float32", "--no-sample"]
        self.lora = self.flags("lora")

    def flags(self, method, *more):
        """Six steps with a checkpoint after each second one, at a size and rate for the tiny model."""
        size = [f"--{key}={value}" for key, value in SIZES.get(method, {"rank": 4}).items()]
        return [*self.common, "--method", method, "--lr", LR.get(method, "1e-2"), "--steps", "6", "--eval-every", "3",
                "--save-every", "2", *size, *more]


def begin(flags, out, *more):
    """train.py from its first step."""
    return train.main([*flags, "--out", str(out), *map(str, more)])


def go_on(out, *more):
    """train.py --resume."""
    return train.main(["--resume", str(out), *map(str, more)])


@contextlib.contextmanager
def stopping(*steps):
    """Let train.py end with Stopped after the checkpoints of these steps, once each; a list of the steps saved."""
    saved, left, save = [], list(steps), resume.save

    def watched(*arguments):
        save(*arguments)
        step = arguments[-1].step
        saved.append(step)
        if step in left:
            left.remove(step)
            raise Stopped
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resume, "save", watched)
        yield saved


def ends(capsys, function, *arguments):
    """(status, the one line on stderr) of a script that a user's mistake ends."""
    with pytest.raises(SystemExit) as stopped:
        run_script(lambda: function(*arguments))
    said = capsys.readouterr().err
    assert said.count("\n") == 1, said
    return stopped.value.code, said


def contents(folder):
    """{name: bytes} of the files in a folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def copied(run, folder):
    """A copy of a run, which may be changed."""
    return shutil.copytree(run, folder)


def trace(out):
    """What log.jsonl says, less what may differ."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [without_clock(line) for line in lines]


def logged_steps(out):
    """The steps with a line of the log."""
    return [line["step"] for line in trace(out) if "loss" in line]


def in_use():
    """The names of support/fast.py's forms that are in their places now."""
    return {name for name, (owner, attribute, _, form) in fast.FORMS.items() if getattr(owner, attribute) is form}


def without_clock(record):
    return {key: value for key, value in record.items() if key not in CLOCK}


def assert_same(one, other):
    """Two finished runs have the same log, result, and bits of the adapter; nothing else is left of either."""
    assert trace(one) == trace(other)
    results = [without_clock(files.read_json(out / "result.json")) for out in (one, other)]
    assert results[0] == results[1]
    assert (one / "adapter.safetensors").read_bytes() == (other / "adapter.safetensors").read_bytes()
    assert contents(one).keys() == contents(other).keys() == {"adapter.safetensors", "log.jsonl", "result.json"}


def state_of(out):
    """Where a run stands: the step of its checkpoint, "finished", or None before both. Every file of it must be whole, but
    for the last line of its log."""
    names = {path.name for path in out.iterdir() if not path.name.endswith(".tmp")} if out.is_dir() else set()
    assert names <= {"log.jsonl", "result.json", "adapter.safetensors", resume.FILE}
    for text in (out / "log.jsonl").read_text().splitlines()[:-1] if "log.jsonl" in names else ():
        json.loads(text)
    if "result.json" in names:
        files.read_json(out / "result.json")
    if "adapter.safetensors" in names:
        adapter_file.read(out / "adapter.safetensors")
    if resume.FILE in names:
        return resume.read(out).progress.step
    return "finished" if "result.json" in names else None
