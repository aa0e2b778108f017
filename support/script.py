"""What the scripts share: flags, the choice of a device, JSON files, and how an error reaches the user."""
import argparse
import json
import math
import os
import sys

import torch

from support import fast
from weights.files import atomic_write


def choose_device(device, dtype="auto", plain=False):
    """(device, dtype of frozen weights), as told or by what is there: CUDA before the CPU, bf16 on a GPU and on a CPU
    that is fast at it (which a `plain` run does not ask)."""
    here = ["cpu"] + ["cuda"] * torch.cuda.is_available() + [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    if device == "auto":
        device = "cuda" if "cuda" in here else "cpu"
    if device not in here:
        raise ValueError(f"--device {device}: torch finds no such device here; choose auto, {', '.join(here)}")
    if dtype == "auto":
        pays = device.startswith("cuda") or not plain and fast.bf16_pays()
        dtype = "bfloat16" if pays else "float32"
    return torch.device(device), getattr(torch, dtype)


class Help(argparse.HelpFormatter):
    """Help that states a default wherever there is one to state."""

    def _get_help_string(self, action):
        told = action.default in (None, False, argparse.SUPPRESS) or "default" in action.help
        return action.help if told else action.help + " (default: %(default)s)"


class Parser(argparse.ArgumentParser):
    """argparse, with defaults in the help and one line per error."""

    def __init__(self, **options):
        super().__init__(formatter_class=Help, **options)

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


def check_folder(path, flag):
    """ValueError unless `path` is a folder that can be written to, or can be made; makes nothing."""
    there = next(folder for folder in (path, *path.parents) if folder.exists())
    if not there.is_dir():
        where = "is a file" if there == path else f"cannot be made, {there} is a file"
        raise ValueError(f"{flag} {path} {where}: name a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"{flag} {path}: no permission to write into {there}: name another folder")


def one_line(message):
    """A message without line breaks, which names of files may have."""
    return " ".join(str(message).splitlines())


def is_out_of_memory(error):
    """Whether an exception says that memory ran out, of a GPU or of the machine."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


def run_script(main, memory_advice="take a smaller model, or a machine with more"):
    """Run `main`; an error that the user can put right ends as one line on stderr and exit status
    2, any other as a traceback.
    `memory_advice` says what to do where memory ran out. Ctrl-C ends with status 130."""
    try:
        main()
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError, FloatingPointError, RuntimeError, MemoryError) as error:
        if isinstance(error, (RuntimeError, MemoryError)):
            if not is_out_of_memory(error):
                raise
            error = f"out of memory: {memory_advice}"
        if isinstance(error, OSError) and error.filename is not None:  # the system's own error, not one of our words
            error = f"{error.filename}: {error.strerror}; check that path, its permissions and the space left there"
        print(one_line(f"error: {error}"), file=sys.stderr)
        sys.exit(2)
