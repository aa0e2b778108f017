"""Learning rates side by side: `python sweep.py --data DIR --methods lora sorsa --lrs 3e-4 1e-3`.

Runs train.py once per method and rate, all with the same data order and held-out slice, and appends a JSON line each to
results/sweep.jsonl. What follows a lone -- goes to train.py as it is: `... -- --steps 100 --rank 32`.
"""
import contextlib
import json
import sys
from pathlib import Path

import train
from script import Parser, run_script

KEPT = ("method", "lr", "held_out_before", "held_out_after", "held_out_examples", "trainable_parameters", "steps",
        "batch", "seed", "schedule", "warmup", "weight_decay", "gamma", "adapter", "model", "tokens", "seconds",
        "memory_gb", "device", "torch", "command")


def run(method, lr, out, extra):
    """The kept fields of one run's result; held_out_after is None for a run that diverged."""
    arguments = ["--method", method, "--lr", f"{lr:g}", "--out", str(out), "--overwrite", "--no-sample", *extra]
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "output.txt", "w") as file, contextlib.redirect_stdout(file):
        try:
            result = train.main(arguments)
        except FloatingPointError as error:
            return {"method": method, "lr": lr, "held_out_after": None, "error": str(error)}
    return {key: result[key] for key in KEPT if key in result}


def main(argv):
    own, extra = (argv[:argv.index("--")], argv[argv.index("--") + 1:]) if "--" in argv else (argv, [])
    parser = Parser(prog="sweep.py", description=__doc__.split("\n")[0])
    parser.add_argument("--methods", nargs="+", required=True)
    parser.add_argument("--lrs", nargs="+", type=float, required=True)
    parser.add_argument("--data", default="gsm8k")
    parser.add_argument("--results", type=Path, default=Path("results/sweep.jsonl"))
    args = parser.parse_args(own)
    args.results.parent.mkdir(parents=True, exist_ok=True)
    for method in args.methods:
        for lr in args.lrs:
            record = run(method, lr, Path("runs/sweep") / f"{method}-{lr:g}", ["--data", args.data, *extra])
            after = record["held_out_after"]
            shown = "diverged" if after is None else f"{after:.4f}"
            print(f"{method:<8} lr {lr:<8g} held-out loss {shown}", flush=True)
            with open(args.results, "a") as file:
                file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    run_script(lambda: main(sys.argv[1:]))
