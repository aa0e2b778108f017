"""A run that stops can go on: `checkpoint.safetensors` holds all that its next step depends on.

    adapter.NAME      what the method added and what trains (for full fine-tuning: every parameter)
    exp_avg.NAME, exp_avg_sq.NAME, step.NAME     AdamW's two moments of each trained parameter, and its step count
    rng, rng.cuda     torch's random state
    metadata          method and settings of the adapter, name and checksum of the base, and as JSON: the flags of the
                      run, a checksum of its examples, the step, what was measured so far

The order of the data follows from the seed and the step. The file is written whole or not at all (tensorfile.py); like
any file that is loaded here it cannot run code, and is believed only as far as it can be checked.
"""
import array
import contextlib
import hashlib
import json
import math
import signal
from dataclasses import asdict, dataclass, field

import torch

import adapter
from tensorfile import fault, json_object, read_safetensors, write_safetensors

FILE = "checkpoint.safetensors"
AGAIN = "start the run again with --overwrite"
MOMENTS = ("exp_avg", "exp_avg_sq", "step")


@dataclass
class Progress:
    """How far a run is, and what it has measured."""
    step: int = 0
    held_out: dict = field(default_factory=dict)  # {step: held-out loss}
    tokens: int = 0  # trained on
    seconds_in_steps: float = 0.0
    seconds: float = 0.0  # in all
    resumed_at: list = field(default_factory=list)


@dataclass
class Saved:
    """What a checkpoint file says: flags (a command line), adapter, AdamW's state, progress, what must not differ."""
    flags: list
    config: dict
    adapter: dict
    state: dict
    rng: dict
    progress: Progress
    data_sha256: str
    base_sha256: str


def save(path, model, optimizer, base, flags, data_sha256, progress):
    """Write the state of a run after progress.step steps."""
    tensors = {f"adapter.{name}": tensor for name, tensor in adapter.adapter_tensors(model).items()}
    for name, parameter in adapter.trainable(model).items():
        tensors.update({f"{key}.{name}": optimizer.state[parameter][key] for key in MOMENTS})
    tensors["rng"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["rng.cuda"] = torch.cuda.get_rng_state()
    run = {"flags": flags, "data_sha256": data_sha256, "progress": asdict(progress)}
    write_safetensors(path, tensors, {"adapter": json.dumps(model.adapter_config), "base_name": base.name,
                                      "base_sha256": base.sha256, "run": json.dumps(run)})


def read(folder):
    """The checkpoint in the folder of a run. FileNotFoundError where there is none, ValueError if it is damaged."""
    path = folder / FILE
    if not path.is_file():
        why = ("this run is finished" if (folder / "result.json").is_file() else
               "nothing was saved before it stopped" if folder.is_dir() else "there is no such folder")
        raise FileNotFoundError(f"{path}: no such file, so there is nothing to continue: {why}; {AGAIN}")
    tensors, metadata = read_safetensors(path)
    config = adapter.checked_config(path, metadata)
    run = json_object(metadata.get("run", ""), path, "the 'run' metadata is ", AGAIN)
    flags, progress = run.get("flags"), read_progress(run.get("progress"))
    if not isinstance(flags, list) or not all(isinstance(flag, str) and flag[:2] == "--" for flag in flags):
        raise fault(path, "its flags are no flags", AGAIN)
    if progress is None or not isinstance(run.get("data_sha256"), str):
        raise fault(path, "its progress is none", AGAIN)
    kinds = {kind: {} for kind in ("adapter", *MOMENTS, "rng")}
    for name, tensor in tensors.items():
        kind, _, rest = name.partition(".")
        if kind not in kinds:
            raise fault(path, f"unexpected tensor {name}", AGAIN)
        kinds[kind][rest] = tensor
    return Saved(flags, config, kinds["adapter"], {key: kinds[key] for key in MOMENTS}, kinds["rng"], progress,
                 run["data_sha256"], metadata.get("base_sha256", ""))


def read_progress(record):
    """A Progress from its JSON form; None if it is none."""
    def count(value):
        return type(value) is int and 0 <= value < 1 << 50

    def seconds(value):
        return type(value) in (int, float) and 0 <= value < 1e15

    kinds = {"step": count, "tokens": count, "seconds_in_steps": seconds, "seconds": seconds,
             "held_out": lambda value: isinstance(value, dict) and all(
                 step.isdecimal() and len(step) < 15 and type(loss) is float and math.isfinite(loss)
                 for step, loss in value.items()),
             "resumed_at": lambda value: isinstance(value, list) and all(map(count, value))}
    if not isinstance(record, dict) or record.keys() != kinds.keys() \
            or not all(is_kind(record[key]) for key, is_kind in kinds.items()):
        return None
    return Progress(**{**record, "held_out": {int(step): loss for step, loss in record["held_out"].items()}})


def attach(folder, saved, base, data_sha256):
    """Attach the saved adapter to the base. ValueError if the base or the examples are not those the run began with."""
    path = folder / FILE
    for what, now, then in (("model", base.sha256, saved.base_sha256), ("data", data_sha256, saved.data_sha256)):
        if now != then:
            raise fault(path, f"the run began with another {what} (sha256 {then[:12]}..., now {now[:12]}...)",
                        f"name that one with --{what}")
    adapter.attach_saved(base.model, path, saved.adapter, saved.config)


def restore(folder, saved, model, optimizer, steps):
    """Fill in AdamW's state and torch's random state. ValueError if they are not of this model's parameters after as
    many steps as were made of the run's `steps`."""
    path, progress, parameters = folder / FILE, saved.progress, adapter.trainable(model)
    measured = {0, steps} if progress.step == steps else {0}
    if not 1 <= progress.step <= steps or not measured <= progress.held_out.keys() or not progress.seconds_in_steps:
        raise fault(path, f"its progress is not that of a run of {steps} steps", AGAIN)
    for key, tensors in saved.state.items():
        if tensors.keys() != parameters.keys():
            raise fault(path, f"{key} is not there for exactly what trains", AGAIN)
        for name, parameter in parameters.items():
            shape = () if key == "step" else parameter.shape
            if tensors[name].shape != shape or tensors[name].dtype != torch.float32:
                raise fault(path, f"{key}.{name} is not of shape {tuple(shape)} in fp32", AGAIN)
            if key == "step" and tensors[name] != progress.step:
                raise fault(path, f"{key}.{name} is not {progress.step}, the step it was saved after", AGAIN)
            optimizer.state[parameter][key] = tensors[name].clone().to(parameter.device)
    try:
        torch.set_rng_state(saved.rng[""].clone())
        if "cuda" in saved.rng and torch.cuda.is_available():
            torch.cuda.set_rng_state(saved.rng["cuda"].clone())
    except (KeyError, TypeError, RuntimeError):
        raise fault(path, "it holds no random state of torch's", AGAIN) from None


def examples_sha256(*sets):
    """A checksum of encoded examples: their tokens, where the answers begin, and their order."""
    digest = hashlib.sha256()
    for examples in sets:
        for ids, prompt_length in examples:
            digest.update(array.array("q", [len(ids), prompt_length, *ids]).tobytes())
    return digest.hexdigest()


@contextlib.contextmanager
def noted_signals():
    """A list that the first SIGINT (Ctrl-C) or SIGTERM goes into; a second one ends the process. What the shell has set
    to be ignored (SIGINT, for a script's job in the background) stays so."""
    noted = []

    def note(number, frame):
        noted.append(signal.Signals(number))
        put_back()

    def put_back():
        for kind, handler in before.items():
            signal.signal(kind, handler)

    heard = [kind for kind in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(kind) != signal.SIG_IGN]
    before = {kind: signal.signal(kind, note) for kind in heard}
    try:
        yield noted
    finally:
        put_back()
