"""A run that stops can go on: `checkpoint.safetensors` holds all that its next step depends on.

    adapter.NAME      what the method added and what trains (for full fine-tuning: every parameter)
    KEY.NAME          what the optimizer keeps of each trained parameter: for AdamW exp_avg, exp_avg_sq and step
    rng, rng.cuda     torch's random state
    metadata          method and settings of the adapter, name and identity of the base, and as JSON: the flags of the
                      run, a checksum of its examples, the optimizer, the step, what was measured so far, and which
                      library multiplied fp32 matrices

The order of the data follows from the seed and the step. The file is written whole or not at all; like any
file that is loaded here it cannot run code, and is believed only as far as it can be checked.
"""
import contextlib
import json
import math
import os
import signal
import sys
from dataclasses import asdict, dataclass, field

import torch

import adapter
from support import fast
from weights import adapter_file
from weights.files import fault, json_object
from weights.safetensors import read_safetensors, write_safetensors

FILE = "checkpoint.safetensors"
AGAIN = "start the run again with --overwrite"


@dataclass
class Progress:
    """How far a run is, and what it has measured."""
    step: int = 0
    held_out: dict = field(default_factory=dict)  # {step: held-out loss}
    tokens: int = 0  # trained on
    seconds_in_steps: float = 0.0
    seconds: float = 0.0  # in all
    resumed_at: list = field(default_factory=list)
    prose: dict = field(default_factory=dict)  # {step: loss on general text}, with --forgetting


@dataclass
class Saved:
    """What a checkpoint says: flags (a command line), adapter, optimizer's state, progress, what must not differ."""
    flags: list
    config: dict
    adapter: dict
    optimizer: str
    state: dict  # {key: {name of a parameter: tensor}}
    rng: dict
    progress: Progress
    data_sha256: str
    base_sha256: str
    products: str | None  # fast.products()


def save(path, model, optimizer, base, flags, data_sha256, progress):
    """Write the state of a run after progress.step steps. ValueError for an optimizer that keeps more than tensors."""
    tensors = {f"adapter.{name}": tensor for name, tensor in adapter.state(model).items()}
    for name, parameter in adapter.trainable(model).items():
        for key, value in optimizer.state[parameter].items():
            if not isinstance(value, torch.Tensor):
                raise ValueError(f"{kind_of(optimizer)} keeps {key} = {value!r}, no tensor: it cannot be saved")
            tensors[f"{key}.{name}"] = value
    tensors["rng"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["rng.cuda"] = torch.cuda.get_rng_state()
    run = {"flags": flags, "data_sha256": data_sha256, "optimizer": kind_of(optimizer), "progress": asdict(progress),
           "products": fast.products()}
    write_safetensors(path, tensors, {"adapter": json.dumps(model.adapter_config), "base_name": base.name,
                                      "base_sha256": base.sha256, "run": json.dumps(run)})


def kind_of(optimizer):
    """The name of an optimizer's class."""
    return type(optimizer).__name__


def checkpoint(folder):
    """The path of the checkpoint in the folder of a run. FileNotFoundError where there is none."""
    path = folder / FILE
    if not path.is_file():
        why = ("this run is finished: eval.py measures it, another run takes another --out"
               if (folder / "result.json").is_file() else
               f"nothing was saved before it stopped; {AGAIN}" if folder.is_dir() else
               f"{folder} is a file: name the folder of a run, as in runs/sorsa" if folder.exists() else
               "there is no such folder: name that of a run, as in runs/sorsa")
        raise FileNotFoundError(f"{path}: no such file, so there is nothing to continue: {why}")
    return path


def read(folder):
    """The checkpoint in the folder of a run. FileNotFoundError where there is none, ValueError if it is damaged."""
    path = checkpoint(folder)
    tensors, metadata = read_safetensors(path)
    config = adapter_file.checked_config(path, metadata)
    run = json_object(metadata.get("run", ""), path, "the 'run' metadata is ", AGAIN)
    flags, progress = run.get("flags"), read_progress(run.get("progress"))
    if not isinstance(flags, list) or not all(isinstance(flag, str) and flag[:2] == "--" for flag in flags):
        raise fault(path, "its flags are no flags", AGAIN)
    texts = run.get("data_sha256"), run.get("optimizer"), run.get("products") or ""
    if progress is None or not all(isinstance(text, str) for text in texts):
        raise fault(path, "its progress is none", AGAIN)
    kinds = {"adapter": {}, "rng": {}}
    for name, tensor in tensors.items():
        kind, _, rest = name.partition(".")
        kinds.setdefault(kind, {})[rest] = tensor
    return Saved(flags, config, kinds.pop("adapter"), run["optimizer"], rng=kinds.pop("rng"), state=kinds,
                 progress=progress, data_sha256=run["data_sha256"], base_sha256=metadata.get("base_sha256", ""),
                 products=run.get("products"))


def read_progress(record):
    """A Progress from its JSON form; None if it is none."""
    def count(value):
        return type(value) is int and 0 <= value < 1 << 50

    def seconds(value):
        return type(value) in (int, float) and 0 <= value < 1e15

    def losses(value):
        return isinstance(value, dict) and all(step.isdecimal() and len(step) < 15 and type(loss) is float
                                               and math.isfinite(loss) for step, loss in value.items())

    kinds = {"step": count, "tokens": count, "seconds_in_steps": seconds, "seconds": seconds,
             "held_out": losses, "prose": losses,
             "resumed_at": lambda value: isinstance(value, list) and all(map(count, value))}
    if not isinstance(record, dict) or record.keys() != kinds.keys() \
            or not all(is_kind(record[key]) for key, is_kind in kinds.items()):
        return None
    by_step = {key: {int(step): loss for step, loss in record[key].items()} for key in ("held_out", "prose")}
    return Progress(**{**record, **by_step})


def attach(folder, saved, base, data_sha256):
    """Attach the saved adapter to the base. ValueError if the base or the examples are not those the run began with."""
    path = folder / FILE
    for what, now, then in (("model", base.sha256, saved.base_sha256), ("data", data_sha256, saved.data_sha256)):
        if now != then:
            raise fault(path, f"the run began with another {what} (sha256 {then[:12]}..., now {now[:12]}...)",
                        f"name that one with --{what}, as it was then")
    adapter_file.attach_saved(base.model, path, saved.adapter, saved.config)


def restore(folder, saved, model, optimizer, steps):
    """Fill in the optimizer's state and torch's random state. ValueError if they are not of this model's parameters
    after as many steps as were made of the run's `steps`."""
    path, progress, parameters = folder / FILE, saved.progress, adapter.trainable(model)
    measured = {0, steps} if progress.step == steps else {0}
    losses = [progress.held_out] + [progress.prose] * ("--forgetting" in saved.flags)
    if not 1 <= progress.step <= steps or not all(measured <= loss.keys() for loss in losses):
        raise fault(path, f"its progress is not that of a run of {steps} steps", AGAIN)
    if saved.optimizer != kind_of(optimizer):
        raise fault(path, f"the run began with {saved.optimizer}, train.py now has {kind_of(optimizer)}", AGAIN)
    first_step(optimizer)
    names = {name: optimizer.state[parameter].keys() for name, parameter in parameters.items()}
    found = {f"{key}.{name}" for key, tensors in saved.state.items() for name in tensors}
    odd = sorted(found ^ {f"{key}.{name}" for name, keys in names.items() for key in keys})
    if odd:
        raise fault(path, f"the optimizer's state is {'unexpected' if odd[0] in found else 'missing'}: {odd[0]}", AGAIN)
    for name, parameter in parameters.items():
        for key, value in optimizer.state[parameter].items():
            tensor = saved.state[key][name]
            if tensor.shape != value.shape or tensor.dtype != value.dtype:
                raise fault(path, f"{key}.{name} is not of shape {tuple(value.shape)} in {value.dtype}", AGAIN)
            if key == "step" and tensor != progress.step:
                raise fault(path, f"{key}.{name} is not {progress.step}, the step it was saved after", AGAIN)
            optimizer.state[parameter][key] = tensor.to(value.device, copy=True)
    try:
        torch.set_rng_state(saved.rng[""].clone())
        if "cuda" in saved.rng and torch.cuda.is_available():
            torch.cuda.set_rng_state(saved.rng["cuda"].clone())
    except (KeyError, TypeError, RuntimeError):
        raise fault(path, "it holds no random state of torch's", AGAIN) from None


def first_step(optimizer):
    """Let a new optimizer make the tensors that it keeps, by a step at rate 0 with gradients of 0."""
    for group in optimizer.param_groups:
        group["lr"] = 0.0  # train.py sets the rate before every step
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


@contextlib.contextmanager
def noted_signals():
    """A list that the first SIGINT (Ctrl-C), SIGTERM or SIGHUP (the terminal is gone) goes into; a second one ends the
    process. What the shell has set to be ignored (SIGINT, for a script's job in the background) stays so."""
    noted = []

    def note(number, frame):
        noted.append(signal.Signals(number))
        put_back()
        if noted[0].name == "SIGHUP" and sys.stdout and sys.stdout.isatty():
            sys.stdout = open(os.devnull, "w")  # there is nothing any more to print to

    def put_back():
        for kind, handler in before.items():
            signal.signal(kind, handler)

    heard = [kind for kind in signal.Signals  # those that the system has
             if kind.name in ("SIGINT", "SIGTERM", "SIGHUP") and signal.getsignal(kind) != signal.SIG_IGN]
    before = {kind: signal.signal(kind, note) for kind in heard}
    try:
        yield noted
    finally:
        put_back()
