"""The folder of a run: what it holds, where a new one goes, its log."""
import contextlib
import itertools
import json
import shlex
from pathlib import Path

from support import resume
from support.script import check_folder
from weights.files import LOCK, SMALL, atomic_write, holder, try_lock, unlock

ADAPTER, RESULT, LOG = "adapter.safetensors", "result.json", "log.jsonl"
# What eval.py writes, by what it measures: the predictions, if there are any, and the summary.
EVAL_FILES = {"gsm8k": ("predictions.jsonl", "eval.json"), "math": ("predictions-math.jsonl", "eval-math.json"),
              "loss": ("eval-loss.json",), "forgetting": ("eval-forgetting.json",)}
ALL_EVAL_FILES = tuple(itertools.chain.from_iterable(EVAL_FILES.values()))
FILES = (LOG, RESULT, ADAPTER, resume.FILE, *ALL_EVAL_FILES)


def holds_a_run(folder):
    """Whether a run has left something in the folder."""
    return any((folder / name).exists() for name in FILES)


def check_out(args):
    """ValueError, before anything is loaded, if --out is no folder, or another process writes its run there, or it
    cannot take this run."""
    if not args.resume:
        check_folder(args.out or Path("runs"), "--out")
    elif not args.dry_run:
        check_folder(args.resume, "--resume", "copy the run to a folder where you may write, and resume it there")
    if args.out and (process := holder(args.out / LOCK)):
        raise in_use(args.out, process)
    check_free(args)


def in_use(folder, process):
    """A ValueError for a folder in which another process writes."""
    return ValueError(f"{folder}: {process} writes its run there: wait until it has ended, or give another --out")


def check_free(args):
    """ValueError if --out holds a run and there is no --overwrite; FileNotFoundError if --resume has none to go on."""
    if args.resume:
        resume.checkpoint(args.resume)
    elif args.out and holds_a_run(args.out) and not args.overwrite:
        more = f", or --resume {shlex.quote(str(args.out))} to go on" if (args.out / resume.FILE).exists() else ""
        raise ValueError(f"--out {args.out} already holds a run: give another folder, or --overwrite to replace it"
                         f"{more}")


def choose_out(args):
    """The run's folder: --out, or the first free one of runs/METHOD, runs/METHOD-2, ..."""
    names = (args.method if n == 1 else f"{args.method}-{n}" for n in itertools.count(1))
    folders = (Path("runs") / name for name in names)
    return args.out or next(folder for folder in folders if not holds_a_run(folder) and not holder(folder / LOCK))


@contextlib.contextmanager
def claimed(args):
    """Make the run's folder, args.out from here on. While the block runs no other process writes a run there. A dry run
    only chooses. ValueError if the folder has been taken since `check_out`."""
    if args.dry_run:
        args.out = choose_out(args)
        yield
        return
    while True:
        folder = choose_out(args)
        folder.mkdir(parents=True, exist_ok=True)
        lock = try_lock(folder / LOCK)
        if lock and (args.out or not holds_a_run(folder)):
            break
        if args.out:
            raise in_use(folder, holder(folder / LOCK) or "another process")
        if lock:  # another process has been faster: it was here and has ended
            unlock(lock)
    try:
        check_free(args)
        args.out = folder
        yield
    finally:
        unlock(lock)


def open_log(args, step):
    """The run's log, to append to: new, or when a run goes on the lines up to its checkpoint's step. Line by line, so
    that a killed run leaves every line it printed."""
    path = args.out / LOG
    if not args.resume:  # what is overwritten goes first: no file of the old run is ever seen beside one of the new
        for name in FILES:
            (args.out / name).unlink(missing_ok=True)
    with atomic_write(path) as file:
        if path.is_file():
            file.writelines(kept_lines(path, step))
    return open(path, "a", buffering=1)


def kept_lines(path, step):
    """The lines of a log up to a step, without those that are none: the last may be cut, and a file may hold anything,
    of which no more than a line's length is read at once."""
    with open(path, "rb") as log:
        while text := log.readline(SMALL):
            with contextlib.suppress(ValueError, TypeError, KeyError, RecursionError):
                if json.loads(text)["step"] <= step:
                    yield text.rstrip() + b"\n"
