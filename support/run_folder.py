"""The folder of a run: what it holds, where a new one goes, its log."""
import contextlib
import itertools
import json
from pathlib import Path

from support import resume
from support.script import check_folder
from weights.files import atomic_write

ADAPTER, RESULT, LOG = "adapter.safetensors", "result.json", "log.jsonl"
# What eval.py writes, by what it measures: the predictions, if there are any, and the summary.
EVAL_FILES = {"gsm8k": ("predictions.jsonl", "eval.json"), "math": ("predictions-math.jsonl", "eval-math.json"),
              "loss": ("eval-loss.json",)}
ALL_EVAL_FILES = tuple(itertools.chain.from_iterable(EVAL_FILES.values()))
FILES = (LOG, RESULT, ADAPTER, resume.FILE, *ALL_EVAL_FILES)


def holds_a_run(folder):
    """Whether a run has left something in the folder."""
    return any((folder / name).exists() for name in FILES)


def check_out(args):
    """ValueError, before anything is loaded, if --out is no folder, or holds a run and there is no --overwrite."""
    check_folder(args.out or Path("runs"), "--out")
    if args.out and holds_a_run(args.out) and not args.overwrite and not args.resume:
        more = f", or --resume {args.out} to go on" if (args.out / resume.FILE).exists() else ""
        raise ValueError(f"--out {args.out} already holds a run: give another folder, or --overwrite to replace it"
                         f"{more}")


def choose_out(args):
    """The run's folder: --out, or the first free one of runs/METHOD, runs/METHOD-2, ..."""
    names = (args.method if n == 1 else f"{args.method}-{n}" for n in itertools.count(1))
    return args.out or next(Path("runs") / name for name in names if not holds_a_run(Path("runs") / name))


def open_log(args, step):
    """The run's log, to append to: new, or when a run goes on the lines up to its checkpoint's step. Line by line, so
    that a killed run leaves every line it printed."""
    path = args.out / LOG
    args.out.mkdir(parents=True, exist_ok=True)
    for left in args.out.glob(".*.tmp"):  # of a run that was killed as it wrote
        left.unlink()
    if not args.resume:
        (args.out / resume.FILE).unlink(missing_ok=True)  # of the run that is overwritten
    kept = []
    if args.resume and path.is_file():
        for text in path.read_text(errors="replace").splitlines():
            with contextlib.suppress(ValueError, TypeError, KeyError, RecursionError):  # the last line may be cut
                if json.loads(text)["step"] <= step:
                    kept.append(text + "\n")
    with atomic_write(path) as file:
        file.write("".join(kept).encode())
    return open(path, "a", buffering=1)
