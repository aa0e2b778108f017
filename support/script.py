"""What the scripts share: flags, the choice of a device, JSON files, and how an error reaches the user."""
import argparse
import errno
import json
import math
import os
import signal
import sys
from pathlib import Path

import torch

import support
from support import fast
from weights.files import atomic_write, printable


def choose_device(device, dtype="auto", plain=False):
    """(device, dtype of frozen weights), as told or by what is there: CUDA before the CPU, and bf16 where it is fast
    (which a `plain` run does not ask a CPU). A CPU that multiplies no bf16 takes its products in fp32, except in a
    `plain` run. A Mac's GPU (mps) is taken only where it is asked for: nobody has tried it."""
    here = ["cpu"] + ["cuda"] * torch.cuda.is_available() + [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    here += ["mps"] * torch.backends.mps.is_available()
    if device == "auto":
        device = "cuda" if "cuda" in here else "cpu"
    if device not in here:
        raise ValueError(f"--device {device}: torch finds no such device here; choose auto, {', '.join(here)}")
    if dtype == "auto":
        kind = device.partition(":")[0]
        bf16 = has_bf16_units(device) if kind == "cuda" else kind == "cpu" and not plain and fast.bf16_pays()
        dtype = "bfloat16" if bf16 else "float32"
    if dtype == "bfloat16" and device == "cpu" and not plain and not fast.multiplies_bf16():
        fast.widen_products()
    if device.startswith("cuda:"):
        torch.cuda.set_device(device)  # else CUDA graphs take a context on the first GPU, too
    return torch.device(device), getattr(torch, dtype)


def device_name(device):
    """The device in records: which GPU it is, as its address says nothing; "cpu"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def has_bf16_units(device):
    """Whether a GPU multiplies bf16: not before compute capability 8.0 (V100, T4). torch.cuda.is_bf16_supported() says
    yes there too, but counts emulation. fp16, which such a GPU has, ends at 65,504: activations of the default model
    reach 24,000, and small gradients would need a scaler."""
    return torch.cuda.get_device_capability(device) >= (8, 0)


class Help(argparse.HelpFormatter):
    """Help that states a default wherever there is one to state."""

    def _get_help_string(self, action):
        told = action.default in (None, False, argparse.SUPPRESS) or "default" in action.help
        return action.help if told else action.help + " (default: %(default)s)"


class Parser(argparse.ArgumentParser):
    """argparse, with defaults in the help and one line per error. The description may be a whole docstring, whose first
    line counts (python -OO has none)."""

    def __init__(self, description=None, **options):
        super().__init__(formatter_class=Help, description=(description or "").partition("\n")[0], **options)

    def error(self, message):
        self.exit(2, one_line(f"error: {message} (--help lists every option)") + "\n")


def whole(text, least=0):
    """An argparse type: a whole number, 0 or more, of at most 12 digits: more than anything here can be counted to."""
    if not text.isdecimal() or len(text) > 12 or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least}, below 10^12")
    return int(text)


def positive(text):
    """An argparse type: a whole number of at least 1."""
    return whole(text, least=1)


def at_least_zero(text):
    """An argparse type: a finite number, 0 or more."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 0")
    return value


def filled(text):
    """An argparse type: a text, not the empty one of a shell's variable that is not set."""
    if not text:
        raise argparse.ArgumentTypeError("it is empty")
    return text


def folder(text):
    """An argparse type: the path of a folder."""
    if not text:
        raise argparse.ArgumentTypeError("it is empty: name a folder")
    return Path(text).expanduser()


def above_zero(text):
    """An argparse type: a finite number above 0."""
    if at_least_zero(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not above 0")
    return float(text)


def amount(text):
    """An argparse type: a whole number that may be written with k or M, as in 1.2M."""
    number, unit = (text[:-1], {"k": 1e3, "M": 1e6}[text[-1]]) if text[-1:] in ("k", "M") else (text, 1)
    try:
        value = round(float(number) * unit)
    except (ValueError, OverflowError):
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 1, as in 500k or 1.2M")
    return value


def two_lengths(text):
    """An argparse type: two whole numbers of at least 1, as in 512+512."""
    first, _, second = text.partition("+")
    try:
        return positive(first), positive(second)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"{text!r} is not two lengths, as in 512+512") from None


def write_json(path, record):
    """Write a dict as an indented JSON file, whole or not at all. ValueError for numbers JSON has no word for."""
    with atomic_write(path) as file:
        file.write((json.dumps(record, indent=1, allow_nan=False) + "\n").encode())


def check_folder(path, flag, fix="name another folder"):
    """ValueError unless `path` is a folder that can be written to, or can be made; makes nothing."""
    there = next((folder for folder in (path, *path.parents) if folder.exists()), None)
    if there is None:  # a drive of Windows
        raise ValueError(f"{flag} {path}: there is no {path.anchor} here: name another folder")
    if not there.is_dir():
        where = "is a file" if there == path else f"cannot be made, {there} is a file"
        raise ValueError(f"{flag} {path} {where}: name a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"{flag} {path}: no permission to write into {there}: {fix}")


def one_line(message):
    """A message fit to print, without the line breaks and control characters that names and texts of files may have."""
    return printable(" ".join(str(message).splitlines()))


def is_out_of_memory(error):
    """Whether an exception says that memory ran out, of a GPU or of the machine."""
    said = ("can't allocate memory", "not enough memory", "out of memory", "ALLOC_FAILED",  # torch's, cuBLAS's
            "could not create a primitive", "could not execute a primitive")  # oneDNN's
    return (isinstance(error, (torch.OutOfMemoryError, MemoryError)) or getattr(error, "errno", None) == errno.ENOMEM
            or isinstance(error, RuntimeError) and any(words in str(error) for words in said))


def run_script(main, memory_advice="take a smaller model, or a machine with more", go_on=None):
    """Run `main`; an error that the user can put right ends as one line on stderr and exit status
    2, any other as a traceback.
    `memory_advice` says what to do where memory ran out, `go_on` how a run that was cut off continues. Ctrl-C ends with
    status 130. What stdout and stderr cannot encode is spelled out."""
    more = f"; {go_on}" if go_on else ""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    if signal.getsignal(signal.SIGINT) == support.interrupted:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        main()
        print(end="", flush=True)  # what cannot be written is said here, not while Python ends
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError, FloatingPointError, RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            error = f"out of memory: {memory_advice}{more}"
        elif isinstance(error, RuntimeError):
            raise
        elif isinstance(error, BrokenPipeError):
            sys.stdout = None  # there is nobody to flush it to
            error = f"nobody reads the output any more{more}"
        elif isinstance(error, OSError) and error.errno is not None:  # the system's own error, not our words
            where = error.filename or "the log or what the output goes to"
            error = f"{where}: {error.strerror}; check that path, its permissions and the space left there{more}"
        print(one_line(f"error: {error}"), file=sys.stderr)
        sys.exit(2)
