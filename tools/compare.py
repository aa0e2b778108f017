"""Methods and learning rates side by side: `python -m tools.compare --data DIR --methods lora sorsa --lrs 3e-4 1e-3`.

Runs train.py once per method and rate (without --lrs once per method, at its default rate), all with the same data
order and held-out slice, each in a process of its own, so that its peak memory is its own. Prints a table and appends a
JSON line per run to the results file. What follows a lone -- goes to train.py as it is: `... -- --steps 100`.
"""
import support

support.interruptible(__name__)  # before torch, which takes seconds to import

import json
import subprocess
import sys
from pathlib import Path

from methods import METHODS
from support.script import Parser, above_zero, amount, check_folder, one_line, run_script
from weights import child
from weights.files import fault, read_json

ROOT = Path(__file__).resolve().parent.parent
KEPT = ("method", "lr", "held_out_before", "held_out_after", "held_out_examples", "trainable_parameters", "steps",
        "batch", "seed", "schedule", "warmup", "weight_decay", "gamma", "model", "tokens", "seconds_in_steps",
        "seconds", "memory_gb", "device", "torch", "command")
# Neither has a size that a budget could choose sensibly: full trains all there is, and Mo-SARA reaches LoRA's budgets
# only with nearly all singular vectors, whose frozen copies then cost as much as the model.
OWN_SIZE = ("full", "mosara")


def run(method, lr, out, extra):
    """The kept fields of one run's result; held_out_after is None for a run that diverged. ValueError if train.py
    refuses its flags."""
    arguments = ["--method", method, "--out", str(out), "--overwrite", "--no-sample", *extra]
    arguments += [] if lr is None else ["--lr", f"{lr:g}"]
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "output.txt", "w") as file:
        done = child.run("train", arguments, ROOT, stdout=file, stderr=subprocess.PIPE, text=True, errors="replace")
        file.write(done.stderr)
    if "lower --lr" in done.stderr:
        return {"method": method, "lr": lr, "held_out_after": None, "error": done.stderr.strip()}
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"train.py ended with status {done.returncode}"])[-1]
        raise ValueError(f"{method}: {last.removeprefix('error: ')}")
    return kept(out / "result.json")


def kept(path):
    """The kept fields of a run's result.json. ValueError if it is not the result of a run."""
    result = read_json(path)
    numbers = [result.get(key) for key in ("lr", "trainable_parameters", "held_out_before", "held_out_after",
                                            "seconds_in_steps", "steps")]
    numbers += [] if result.get("memory_gb") is None else [result["memory_gb"]]  # where the system tells
    if not isinstance(result.get("adapter"), dict) or not isinstance(result.get("method"), str) \
            or not all(type(value) in (int, float) and abs(value) < 1e30 for value in numbers) or not result["steps"]:
        raise fault(path, "not the result of a run", "run train.py again")
    config = {key: value for key, value in result["adapter"].items() if key not in ("ks", "norms")}
    return {**{key: result[key] for key in KEPT if key in result}, "adapter": config}


def table_row(record):
    """One line of a Markdown table."""
    config = record.get("adapter", {})
    size = f"r {config['rank']}" if "rank" in config else f"m {config['threshold']}" if "threshold" in config else "-"
    if record["held_out_after"] is None:
        return f"| `{record['method']}` | {size} | {record['lr'] or 'default'} | - | - | diverged | - | - |"
    memory = "-" if record.get("memory_gb") is None else f"{record['memory_gb']:.2f}"
    return (f"| `{record['method']}` | {size} | {record['lr']:g} | {record['trainable_parameters']:,} "
            f"| {record['held_out_before']:.4f} | {record['held_out_after']:.4f} "
            f"| {record['seconds_in_steps'] / record['steps']:.2f} | {memory} |")


def main(argv):
    own, extra = (argv[:argv.index("--")], argv[argv.index("--") + 1:]) if "--" in argv else (argv, [])
    parser = Parser(prog="python -m tools.compare", description=__doc__.split("\n")[0])
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), required=True)
    parser.add_argument("--lrs", nargs="+", type=above_zero, default=[None],
                        help="peak rates (default: the method's own)")
    parser.add_argument("--params", type=amount, help="a budget for all methods but " + " and ".join(OWN_SIZE))
    parser.add_argument("--targets", help="train.py's, for all methods but full, which trains every parameter")
    parser.add_argument("--data", default="gsm8k")
    parser.add_argument("--results", type=Path, default=Path("results/compare.jsonl"))
    args = parser.parse_args(own)
    check_folder(args.results.parent, "--results in")
    if args.results.is_dir():
        parser.error(f"--results {args.results} is a folder: name a file, as in results/compare.jsonl")
    args.results.parent.mkdir(parents=True, exist_ok=True)
    print("| method | size | peak lr | parameters | held-out before | after | s/step | peak GB |\n" + "|---" * 8 + "|")
    for method in args.methods:
        size = ["--params", str(args.params)] if args.params and method not in OWN_SIZE else []
        size += ["--targets", args.targets] if args.targets and method != "full" else []
        for lr in args.lrs:
            folder = Path("runs/compare") / (method if lr is None else f"{method}-{lr:g}")
            record = run(method, lr, folder, ["--data", args.data, *size, *extra])
            print(one_line(table_row(record)), flush=True)
            with open(args.results, "a") as file:
                file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    run_script(lambda: main(sys.argv[1:]))
