"""The study behind RESULTS.md: which runs it is made of. `python -m tools.study run --data gsm8k` makes them.

First every method at five learning rates, half a decade apart, with one seed: the best is the one with the lowest loss
on the selection slice, and the grid is extended where that lies at its end. Then two more seeds there, and the arms
that each paper's claims call for.
"""
import support

support.interruptible(__name__)  # before torch, which takes seconds to import

import itertools
import math
import sys
from pathlib import Path

from support.script import Parser, one_line, run_script
from tools.compare import Job, read_records, run_all, table_row

RECORDS = Path(__file__).parent.parent / "results" / "study.jsonl"
TARGETS = ("--targets", "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj")
BUDGET = ("--params", "1200000", *TARGETS)
RUN = ("--steps", "64", "--batch", "8", "--held-out", "128", "--save-every", "64", "--forgetting", "--dtype", "bfloat16")
CHOOSE, REPORT = ("--eval-every", "64"), ("--eval-every", "16", "--report", "512")
SEEDS = ("1", "2", "3")  # of what is reported; the rates are chosen with seed 0
HALF_DECADES = [f"{digit}e{power}" for power in range(-6, 1) for digit in (1, 3)]

# name: (flags, the middle one of five learning rates)
METHODS = {
    "lora": (("--method", "lora", *BUDGET), "3e-3"),
    "pissa": (("--method", "pissa", *BUDGET), "3e-4"),
    "sorsa": (("--method", "sorsa", *BUDGET), "1e-4"),
    "sara": (("--method", "sara", *BUDGET), "3e-2"),
    "mosara": (("--method", "mosara", *TARGETS), "1e-1"),
    "cora": (("--method", "cora", *BUDGET), "3e-3"),
    "cora-init": (("--method", "cora-init", *BUDGET), "3e-3"),
    "lotr": (("--method", "lotr", *BUDGET), "3e-3"),
    "full": (("--method", "full"), "1e-4"),
}


def job(name, flags, rate, seed="0"):
    return Job(name, (*flags, "--lr", rate, "--seed", seed, *RUN, *(CHOOSE if seed == "0" else REPORT)))


def losses_by_rate(records, name):
    """{rate as in the flags: selection loss of seed 0, infinite for a run that diverged}, in the order of the rates."""
    found = {}
    for record in records:
        words = record["flags"].split()
        if record["name"] == name and words[words.index("--seed") + 1] == "0":
            found[words[words.index("--lr") + 1]] = record.get("held_out_after", math.inf)
    return dict(sorted(found.items(), key=lambda item: float(item[0])))


def best_rate(losses):
    """The rate with the lowest loss."""
    return min(losses, key=losses.get)


def rates_around(losses, middle, reach):
    """The middle rate and `reach` on either side, half a decade apart; and as long as the best of them lies at an end,
    further ones beyond it."""
    place = HALF_DECADES.index(middle)
    low, high = place - reach, place + reach
    while all(rate in losses for rate in HALF_DECADES[low:high + 1]):
        best = HALF_DECADES.index(best_rate({rate: losses[rate] for rate in HALF_DECADES[low:high + 1]}))
        if low < best < high:
            break
        low, high = low - (best == low), high + (best == high)
    return sorted(HALF_DECADES[low:high + 1], key=lambda rate: abs(HALF_DECADES.index(rate) - place))


def jobs(records):
    """The study's runs, as far as the records determine them, the most telling first."""
    found, settled = [], {}
    losses = {name: losses_by_rate(records, name) for name in METHODS}
    for name, (flags, middle) in METHODS.items():
        near = rates_around(losses[name], middle, 1)
        found.append([job(name, flags, rate) for rate in near])
        if all(rate in losses[name] for rate in near):
            settled[name] = best_rate(losses[name])
    found = [planned for some in itertools.zip_longest(*found) for planned in some if planned]  # the middles first
    found += [job(name, METHODS[name][0], rate, seed) for seed in SEEDS for name, rate in settled.items()]
    return found + [job(name, flags, rate) for name, (flags, middle) in METHODS.items()
                    for rate in rates_around(losses[name], middle, 2)]


def main(argv):
    parser = Parser(prog="python -m tools.study", description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=("run", "plan"))
    parser.add_argument("--data", default="gsm8k")
    args = parser.parse_args(argv)
    if args.what == "plan":
        done = {f"{record['name']}: {record['flags']}" for record in read_records(RECORDS)}
        for planned in jobs(read_records(RECORDS)):
            print("done" if planned.key in done else "    ", planned.key)
        return
    for record in run_all(jobs, args.data, RECORDS, Path("runs/study")):
        print(one_line(table_row(record)), flush=True)


if __name__ == "__main__":
    run_script(lambda: main(sys.argv[1:]))
