"""Runs side by side: `python -m tools.compare --data DIR --methods lora sorsa --lrs 3e-4 1e-3 --seeds 0 1`.

Runs train.py once per method, learning rate (its default, without --lrs) and seed, each in a process of its own, so
that its peak memory is its own; the data, its order for a seed, and the held-out slice are the same for all. Prints a
table and appends a JSON line per run to the results file. A run whose line is there is not made again, and one that was
stopped in its training goes on from its checkpoint, so that a comparison that was stopped goes on; a second one on the
same file takes the runs that the first has not begun. What follows a lone -- goes to train.py as it is:
`... -- --steps 100`.
"""
import support

support.interruptible(__name__)  # before torch, which takes seconds to import

import hashlib
import json
import re
import sys
import time
from pathlib import Path
from typing import NamedTuple

from methods import METHODS
from support import resume, run_folder
from support.script import Parser, above_zero, amount, check_folder, one_line, run_script, whole
from weights import child
from weights.files import LOCK, fault, holder, json_object, read_json, try_lock, unlock

ROOT = Path(__file__).resolve().parent.parent
KEPT = ("method", "lr", "seed", "held_out_loss", "held_out_examples", "report_loss", "report_losses", "report_tokens",
        "prose_loss", "prose_losses", "forgot", "prose_sha256", "trainable_parameters", "steps", "batch", "gamma",
        "tokens", "seconds_in_steps", "seconds", "memory_gb", "threads", "dtype", "autocast", "products_widened",
        "model", "base_sha256", "data_sha256", "device", "torch", "python")
# Neither has a size that a budget could choose sensibly: full trains all there is, and Mo-SARA reaches LoRA's budgets
# only with nearly all singular vectors, whose frozen copies then cost as much as the model.
OWN_SIZE = ("full", "mosara")
WAIT = 10  # seconds between two looks at what another process runs


class Job(NamedTuple):
    """A run to make: what it is called in tables, train.py's flags, without --out, and for each evaluation of it the
    flags of eval.py."""
    name: str
    flags: tuple
    evaluations: tuple = ()

    @property
    def key(self):
        """By which a record is known to be that of this job."""
        return key_of({"name": self.name, "flags": " ".join(self.flags)})

    @property
    def folder(self):
        """A name for the folder of its run, which no other job's has."""
        words = [word for word in ("lr", "seed") if f"--{word}" in self.flags]
        values = [self.flags[self.flags.index(f"--{word}") + 1] for word in words]
        return "-".join([self.name.replace(" ", "_"), *(word[0] + value for word, value in zip(words, values)),
                         hashlib.sha256(self.key.encode()).hexdigest()[:6]])


def key_of(record):
    """The key of the Job that a record is of."""
    return f"{record['name']}: {record['flags']}"


def run(job, data, folder):
    """The record of a run: what is kept of its result, the loss of every step, its evaluations. ValueError if a script
    refuses its flags. A run that diverged is a result too, with its error and no loss."""
    record, saved = {"name": job.name, "flags": " ".join(job.flags)}, folder / resume.FILE
    (folder / run_folder.RESULT).unlink(missing_ok=True)  # of an earlier run
    data = ["--data", data] if data else []
    begin = [*data, "--log-every", "1", *job.flags, "--out", folder, "--overwrite", "--no-sample"]
    going_on = saved.is_file()
    done = finished("train", ["--resume", folder] if going_on else begin, folder)
    if done.returncode and re.search("lower --(lr|gamma)", done.stderr):
        return {**record, "error": one_line(done.stderr.strip()).replace(str(folder), folder.name)}
    check(job, done, f"; or delete {saved}, and the run begins again" * going_on)
    if not (folder / run_folder.RESULT).is_file():
        raise ValueError(f"{job.name}: train.py has trained nothing: leave --dry-run and --help out")
    record |= {**kept(folder / run_folder.RESULT), **logged(folder / run_folder.LOG)}
    for number, flags in enumerate(job.evaluations):
        out = folder / f"eval-{number}"
        check(job, finished("eval", [folder, *flags, "--out", out], out))
        record.setdefault("evaluations", []).append({"flags": " ".join(flags), **evaluation(out)})
    return record


def finished(script, arguments, folder):
    """A script of the repository that has run in a process of its own, its output in the folder's output.txt."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "output.txt", "w") as file:
        done = child.run(script, arguments, ROOT, stdout=file)
        file.write(done.stderr)
    return done


def check(job, done, more=""):
    """ValueError, of its last words and `more`, if a script has not ended well."""
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"a script ended with status {done.returncode}"])[-1]
        raise ValueError(f"{job.name}: {last.removeprefix('error: ')}{more}")


def evaluation(folder):
    """What is kept of an evaluation: which problems are right by our rule (a digit for each, in the order of the data),
    how many ran into the cap, new tokens and seconds."""
    predictions, summary = (folder / name for name in run_folder.EVAL_FILES["gsm8k"])
    summary = read_json(summary)
    right = [json_object(line, predictions)["scores"]["answer"]["correct"]
             for line in predictions.read_text(encoding="utf-8").strip().split("\n")]
    return {"accuracy": summary["accuracy"]["answer"], "right": "".join("01"[correct] for correct in right),
            **{key: summary[key] for key in ("n", "capped", "no_answer", "new_tokens", "seconds")}}


def kept(path):
    """The kept fields of a run's result.json. ValueError if it is not the result of a run."""
    result = read_json(path)
    numbers = [result.get(key) for key in ("lr", "trainable_parameters", "held_out_before", "held_out_after",
                                            "seconds_in_steps", "steps")]
    numbers += [] if result.get("memory_gb") is None else [result["memory_gb"]]  # where the system tells
    if not isinstance(result.get("adapter"), dict) or not isinstance(result.get("method"), str) \
            or not all(type(value) in (int, float) and abs(value) < 1e30 for value in numbers) or not result["steps"]:
        raise fault(path, "not the result of a run", "run train.py again")
    record = {key: result[key] for key in KEPT if result.get(key) is not None}
    if result["method"] == "sara":
        record["ranks"] = ranks_by_projection(result["adapter"].get("ks"), path)
    return {**record, "held_out_before": result["held_out_before"], "held_out_after": result["held_out_after"],
            "adapter": {key: value for key, value in result["adapter"].items() if key not in ("ks", "norms")}}


def ranks_by_projection(ks, path):
    """{projection: its k, layer by layer} of SARA's {module: k}, in the order of the modules."""
    if not isinstance(ks, dict) or not all(type(k) is int for k in ks.values()):
        raise fault(path, "not the result of a run of SARA, which has a rank for every module", "run train.py again")
    ranks = {}
    for name, k in ks.items():
        ranks.setdefault(name.rpartition(".")[2], []).append(k)
    return ranks


def logged(path):
    """What is kept of a run's log: the loss of every step and, where it was measured, {step: spectra}."""
    lines = [json_object(line, path) for line in path.read_text().splitlines()]
    spectra = {str(line["step"]): rounded(line["spectra"]) for line in lines if "spectra" in line}
    return {"losses": [round(line["loss"], 5) for line in lines if "loss" in line],
            **({"spectra": spectra} if spectra else {})}


def rounded(numbers):
    """The same dict with six digits of each number."""
    return {name: float(f"{value:.6g}") if isinstance(value, float) else value for name, value in numbers.items()}


def size(record):
    """The size of a method, as its paper counts it."""
    config = record["adapter"]
    if config.get("ranks") == "even" and record.get("ranks"):  # of SARA: the same in all layers
        return f"k {next(iter(record['ranks'].values()))[0]}"
    return f"r {config['rank']}" if "rank" in config else f"m {config['threshold']:g}" if "threshold" in config else "-"


def table_row(record):
    """One line of a Markdown table."""
    if "error" in record:
        return f"| `{record['name']}` | - | `{record['flags']}` | - | - | diverged | - | - |"
    memory = "-" if record.get("memory_gb") is None else f"{record['memory_gb']:.2f}"
    return (f"| `{record['name']}` | {size(record)} | {record['lr']:g} | {record['trainable_parameters']:,} "
            f"| {record['held_out_before']:.4f} | {record['held_out_after']:.4f} "
            f"| {record['seconds_in_steps'] / record['steps']:.2f} | {memory} |")


def read_records(path):
    """The records of a results file, in its order; none where there is no file. A line that was cut as it was written
    is none. ValueError for one of another kind."""
    records = []
    for number, line in enumerate(path.read_text().split("\n") if path.exists() else [], 1):
        try:
            records += [json_object(line, f"{path}:{number}", fix="its run is made again")] if line else []
        except ValueError as error:
            print(error, file=sys.stderr)
    for record in records:
        if not all(isinstance(record.get(key), str) for key in ("name", "flags")):
            raise fault(path, "holds lines that are no records of tools.compare", "name another file")
    return records


def add_record(path, record):
    """Append a line to a results file, a new one even where the last has no end."""
    with open(path, "a+b") as file:
        file.seek(max(0, file.tell() - 1))
        cut = file.read() not in (b"", b"\n")
        file.write(b"\n" * cut + json.dumps(record).encode() + b"\n")


def run_all(jobs, data, results, folder):
    """Make every run of jobs(records), a list of Jobs that may grow as records come, and yield each new record. `data`
    is train.py's; None where the jobs' own flags name it.

    A job that another process has in hand is left to it; where only such are left, this one waits for them. What a run
    fails of is printed, and the others go on; ValueError at the end.
    """
    failed = {}
    while True:
        records = read_records(results)
        done = {key_of(record) for record in records} | failed.keys()
        left = [job for job in jobs(records) if job.key not in done]
        if not left:
            break
        job, lock = taken(left, folder)
        if lock is None:
            time.sleep(WAIT)
            continue
        try:
            if job.key not in {key_of(record) for record in read_records(results)}:
                record = run(job, data, folder / job.folder)
                add_record(results, record)
                yield record
        except ValueError as error:
            print(one_line(f"failed: {error}"), flush=True)
            failed[job.key] = error
        finally:
            unlock(lock)
    if failed:
        first, *others = failed.values()
        raise ValueError(f"{first}" + f"; {len(others)} more runs failed" * bool(others))


def taken(jobs, folder):
    """(the first job that no other process has in hand, a lock on it), or (None, None)."""
    for job in jobs:
        place = folder / job.folder
        place.mkdir(parents=True, exist_ok=True)
        if not holder(place / LOCK) and (lock := try_lock(place / "compare.lock")):  # no train.py that still saves
            return job, lock
    return None, None


def main(argv):
    own, extra = (argv[:argv.index("--")], argv[argv.index("--") + 1:]) if "--" in argv else (argv, [])
    parser = Parser(prog="python -m tools.compare", description=__doc__)
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), required=True)
    parser.add_argument("--lrs", nargs="+", type=above_zero, default=[None],
                        help="peak rates (default: the method's own)")
    parser.add_argument("--seeds", nargs="+", type=whole, default=[0])
    parser.add_argument("--params", type=amount, help="a budget for all methods but " + " and ".join(OWN_SIZE))
    parser.add_argument("--targets", help="train.py's, for all methods but full, which trains every parameter")
    parser.add_argument("--data", default="gsm8k")
    parser.add_argument("--results", type=Path, default=Path("runs/compare.jsonl"))
    args = parser.parse_args(own)
    check_folder(args.results.parent, "--results in")
    if args.results.is_dir():
        parser.error(f"--results {args.results} is a folder: name a file, as in runs/compare.jsonl")
    args.results.parent.mkdir(parents=True, exist_ok=True)
    print("| method | size | peak lr | parameters | held-out before | after | s/step | peak GB |\n" + "|---" * 8 + "|")
    jobs = []
    for method in args.methods:
        budget = ["--params", str(args.params)] if args.params and method not in OWN_SIZE else []
        budget += ["--targets", args.targets] if args.targets and method != "full" else []
        for lr in args.lrs:
            rate = [] if lr is None else ["--lr", str(lr)]
            jobs += [Job(method, ("--data", args.data, "--method", method, *budget, *rate, "--seed", str(seed), *extra))
                     for seed in args.seeds]
    there = {key_of(record): record for record in read_records(args.results)}
    for record in [there[job.key] for job in jobs if job.key in there]:
        print(one_line(table_row(record)))
    for record in run_all(lambda records: jobs, None, args.results, Path("runs/compare")):
        print(one_line(table_row(record)), flush=True)


if __name__ == "__main__":
    run_script(lambda: main(sys.argv[1:]))
