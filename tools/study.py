"""The study behind RESULTS.md: `python -m tools.study --data gsm8k` makes the runs of it that are left.

First every method at learning rates half a decade apart, with one seed: the best is the one with the lowest loss on 128
held-out examples, and the rates go on where it would lie at an end. What is reported are other seeds at that rate, on
other examples. Then the rates of every method at its own size, the defaults of train.py; longer runs for an accuracy;
and the arms, which the claims of the papers call for, at the rate of the method that they vary, or one chosen in the
same way where their rank is another.
"""
import support

support.interruptible(__name__)  # before torch, which takes seconds to import

import itertools
import math
import sys

from data import prose
from support.script import Parser, one_line, run_script
from tools.compare import ROOT, Job, key_of, read_records, run_all, table_row
from tools.intervals import paired

RECORDS = ROOT / "results" / "study.jsonl"
TARGETS = ("--targets", "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj")
BUDGET = ("--params", "1200000", *TARGETS)
STEPS = "64"
RUN = ("--steps", STEPS, "--batch", "8", "--held-out", "128", "--save-every", STEPS, "--forgetting", "--dtype",
       "bfloat16")
REPORT, SPECTRA = ("--report", "512"), ("--spectra-every", "16")
TIE = 0.01  # losses of one seed that are no further apart count as equal: so far apart are those of two seeds
SEEDS = ("1", "2", "3")  # of what is reported; the rates are chosen with seed 0
HALF_DECADES = [f"{digit}e{power}" for power in range(-8, 3) for digit in (1, 3)]

# name: (flags, the learning rate in the middle of those that are tried first)
METHODS = {
    "full": (("--method", "full"), "1e-4"),
    "lora": (("--method", "lora", *BUDGET), "3e-3"),
    "pissa": (("--method", "pissa", *BUDGET), "3e-4"),
    "sorsa": (("--method", "sorsa", *BUDGET), "1e-4"),
    "sara": (("--method", "sara", *BUDGET), "3e-2"),
    "mosara": (("--method", "mosara", *TARGETS), "1e-1"),
    "cora": (("--method", "cora", *BUDGET), "3e-3"),
    "cora-init": (("--method", "cora-init", *BUDGET), "3e-3"),
    "lotr": (("--method", "lotr", *BUDGET), "3e-3"),
}


ALPHA = {"lora, alpha 32": ((*METHODS["lora"][0], "--alpha", "32"), "1e-3")}  # does the best rate follow the scale?
OWN_SIZE = {f"{name}, own size": (("--method", name), middle) for name, (_, middle) in METHODS.items()
            if name != "full"}
# Arms of another rank than their method's above: the best rate moves with it, so each has rates of its own.
# {how many: (the default model's last blocks, the rate in the middle)}, on which LoRA's budget at rank 2 is spent.
DEPTHS = {5: ("layers.2[5-9].*", "3e-3"), 30: ("layers.*", "1e-2")}
OTHER_RANK = {"lora, r 8": (("--method", "lora", "--rank", "8", *TARGETS), "3e-3"),
              "lotr, cores only": ((*METHODS["lotr"][0], "--core-only"), "1e-2"),
              **{f"{method}, last {blocks}": (("--method", method, "--params", "610560", "--targets", last), middle)
                 for blocks, (last, middle) in DEPTHS.items() for method in ("lotr", "lora")}}
WITH_RATES = METHODS | ALPHA | OWN_SIZE | OTHER_RANK  # those that rates are tried for
# name: (flags, whose best rate it takes)
ARMS = {
    "sara, even": ((*METHODS["sara"][0], "--ranks", "even"), "sara"),
    "mosara, one set": ((*METHODS["mosara"][0], "--sets", "1"), "mosara"),
    "mosara, no router": ((*METHODS["mosara"][0], "--equal-gates"), "mosara"),
    "cora, random basis": ((*METHODS["cora"][0], "--basis", "random"), "cora"),
    "sorsa, gamma 0": ((*METHODS["sorsa"][0], "--gamma", "0"), "sorsa"),
    "sorsa, gamma 4e-3": ((*METHODS["sorsa"][0], "--gamma", "4e-3"), "sorsa"),
    "cora-init, random basis": ((*METHODS["cora-init"][0], "--basis", "random"), "cora-init"),
    "lotr, by name": ((*METHODS["lotr"][0], "--group-by", "name"), "lotr"),
    **{name: (flags, name) for name, (flags, _) in OTHER_RANK.items()},
    "mosara, router of rank 2": ((*METHODS["mosara"][0], "--router-rank", "2"), "mosara"),
    "sara, q and v": (OWN_SIZE["sara, own size"][0], "sara, own size"),
    "mosara, q and v": (OWN_SIZE["mosara, own size"][0], "mosara, own size"),
    "sorsa, sum": ((*METHODS["sorsa"][0], "--reduction", "sum"), "sorsa"),
    "sorsa, gamma 4e-5": ((*METHODS["sorsa"][0], "--gamma", "4e-5"), "sorsa"),
}
ONE_RATE = "3e-4"  # at which these are compared as well, each other's rates being equal
WATCHED = ("full", "lora", "pissa", "sorsa")
WITH_SPECTRA = {*WATCHED, *(f"{name}, rate {ONE_RATE}" for name in WATCHED),
                *(name for name, (_, of) in ARMS.items() if of == "sorsa")}

# name: (flags of train.py, problems of the test set that eval.py asks, with and without the calculator)
ACCURACY = {
    "practice": (("--data", "practice", "--steps", "240", "--batch", "8"), "500"),
    "equations": (("--answers", "equations", "--steps", "400", "--batch", "16"), "0"),
    "equations, three epochs": (("--answers", "equations", "--steps", "1380", "--batch", "16"), "0"),
}
*ASKED, LONGER = ACCURACY  # of every method; of the one alone whose equations are right most often
# Longer runs may want a lower rate than the short ones that chose it: LoRA's, beside which all stand, is tried at one.
LOWER = f"{ASKED[0]}, rate 3e-3"
AGAIN = f"{ASKED[0]}, on an H100"  # how the records of runs are called that were made there as well, with the same seed


# ---- what is to be run ----------------------------------------------------------------------------------------------

def job(name, flags, rate, seed="0"):
    """A run of the study: to choose a rate by, or one that is reported."""
    reports = seed != "0"
    eval_every = "16" if reports and name in METHODS else STEPS
    measured = REPORT * reports + SPECTRA * (reports and name in WITH_SPECTRA)
    return Job(name, (*flags, "--lr", rate, "--seed", seed, *RUN, "--eval-every", eval_every, *measured))


def accuracy_job(name, method, rate):
    """A run whose answers are counted."""
    flags, limit = ACCURACY[name]
    steps = flags[flags.index("--steps") + 1]
    asked = ("--limit", limit, "--dtype", "bfloat16")
    return Job(f"{method}, {name}", (*METHODS[method][0], *flags, "--lr", rate, "--seed", "1", "--eval-every", steps,
                                     "--save-every", steps, "--dtype", "bfloat16"), (asked, (*asked, "--calculator")))


def rates_around(losses, middle, reach):
    """The middle rate and `reach` on either side, half a decade apart, the nearest first; and as long as the best of
    them lies at an end, further ones beyond it."""
    place = HALF_DECADES.index(middle)
    low, high = place - reach, place + reach
    while all(rate in losses for rate in HALF_DECADES[low:high + 1]):
        best = HALF_DECADES.index(best_rate({rate: losses[rate] for rate in HALF_DECADES[low:high + 1]}))
        if low < best < high or best in (0, len(HALF_DECADES) - 1):
            break
        low, high = low - (best == low), high + (best == high)
    return sorted(HALF_DECADES[low:high + 1], key=lambda rate: abs(HALF_DECADES.index(rate) - place))


def jobs(records):
    """The study's runs, as far as the records determine them, the most telling first."""
    losses = {name: losses_by_rate(records, name) for name in WITH_RATES}
    rates = {name: rates_around(losses[name], middle, 1) for name, (_, middle) in WITH_RATES.items()}
    near = {name: [job(name, flags, rate) for rate in rates[name]] for name, (flags, _) in WITH_RATES.items()}
    settled = {name: best_rate(losses[name]) for name in rates if all(rate in losses[name] for rate in rates[name])}
    ordered = itertools.zip_longest(*(near[name] for name in METHODS))
    found = [planned for some in ordered for planned in some if planned]  # the middles first
    found += [job(name, flags, settled[name], seed) for name, (flags, _) in METHODS.items() if name in settled
              for seed in SEEDS]
    far = [job(name, flags, rate) for name, (flags, middle) in METHODS.items()
           for rate in rates_around(losses[name], middle, 2)]
    own = [planned for name in (*ALPHA, *OWN_SIZE) for planned in near[name]]
    arms = []
    for name, (flags, of) in ARMS.items():
        arms += near.get(name, [])
        arms += [job(name, flags, settled[of], seed) for seed in SEEDS if of in settled]
    arms += [job(f"{name}, rate {ONE_RATE}", METHODS[name][0], ONE_RATE, SEEDS[0]) for name in WATCHED
             if settled.get(name, ONE_RATE) != ONE_RATE]
    counted = [accuracy_job(name, method, settled[method]) for name in ASKED for method in METHODS if method in settled]
    counted += [accuracy_job(ASKED[0], "lora", "3e-3")._replace(name=f"lora, {LOWER}")]
    best = most_right(records, "equations")
    longer = [accuracy_job(LONGER, best, settled[best])] if best else []
    return found + far + own + counted + arms + longer


# ---- what the records say -------------------------------------------------------------------------------------------

def flag(record, name):
    """The value of a flag of a record's run, as text."""
    words = record["flags"].split()
    if name not in words[:-1]:
        raise ValueError(f"the record of {record['name']} has no {name} among its flags: it is none of the study's")
    return words[words.index(name) + 1]


def by_rate(records, name, key):
    """{rate as in the flags: a number of the run with seed 0, infinite where it diverged}, in the order of rates."""
    found = {flag(record, "--lr"): record.get(key, math.inf)
             for record in records if record["name"] == name and flag(record, "--seed") == "0"}
    return dict(sorted(found.items(), key=lambda item: float(item[0])))


def losses_by_rate(records, name):
    """The same of the loss on the selection slice, which chooses the rate."""
    return by_rate(records, name, "held_out_after")


def spectra(records, name):
    """{seed: what train.py --spectra-every has measured after the last step} of a method or an arm."""
    return {seed: record["spectra"][max(record["spectra"], key=int)] for seed, record in reported(records, name).items()
            if "spectra" in record}


def evaluations(records, name):
    """(without the calculator, with it) of an accuracy's run, as tools.compare keeps them; None without such a run."""
    return next((record["evaluations"] for record in at_best_rate(records, name) if "evaluations" in record), None)


def most_right(records, name):
    """The method with the most right answers of an accuracy's runs; None before all of them have ended."""
    ended = all(at_best_rate(records, f"{method}, {name}") for method in METHODS)
    right = {method: found[0]["accuracy"] for method in METHODS
             if (found := evaluations(records, f"{method}, {name}"))}  # those that diverged have none
    return max(right, key=right.get) if ended and right else None


def best_rate(losses):
    """The rate with the lowest loss."""
    return min(losses, key=losses.get)


def default_rate(losses):
    """What follows for a method's default: the lowest rate whose loss is within TIE of the best, as a lower one forgets
    less and bears a longer run."""
    return min((rate for rate, loss in losses.items() if loss <= min(losses.values()) + TIE), key=float)


def at_best_rate(records, name):
    """[record] of a method, an arm or an accuracy, but those whose rate is no longer the best of the method (unless the
    name says which it is to be)."""
    found = [record for record in records if record["name"] == name]
    method = ARMS[name][1] if name in ARMS else name.partition(", ")[0]
    if ", rate " in name or not losses_by_rate(records, method):
        return found
    best = best_rate(losses_by_rate(records, method))
    return [record for record in found if flag(record, "--lr") == best]


def reported(records, name):
    """{seed: record} of the runs that are reported of a method or an arm: those that did not diverge. A method whose
    best rate is ONE_RATE is not run at it again: the first seed of its own runs stands for that."""
    method, _, rate = name.partition(", rate ")
    if rate == ONE_RATE and method in METHODS and rate == best_rate(losses_by_rate(records, method) or {"": 0}):
        return {seed: record for seed, record in reported(records, method).items() if seed == SEEDS[0]}
    return {flag(record, "--seed"): record for record in at_best_rate(records, name) if "report_losses" in record}


def diverged(records, name):
    """The seeds that are to be reported and diverged."""
    return [seed for record in at_best_rate(records, name) if "error" in record
            and (seed := flag(record, "--seed")) in SEEDS]


def difference(records, name, other, losses="report_losses", comparisons=1):
    """The Interval of the loss per token of `name` less that of `other`, on the report's examples, or of the rise of
    that on general text ("prose_losses"), over the seeds that both have; None without. comparisons: as of
    intervals.paired."""
    a, b = ({seed: record for seed, record in reported(records, which).items() if losses in record}
            for which in (name, other))
    seeds = sorted(a.keys() & b.keys())
    if not seeds:
        return None

    def per_token(record):  # its mean over examples is the loss per token, or by how much that has risen
        prose_tokens = [prose.LENGTH - 1] * prose.PIECES
        tokens, before = ((record["report_tokens"], 0.0) if losses == "report_losses" else
                          (prose_tokens, record["prose_loss"]["0"]))
        return [loss * len(tokens) / sum(tokens) - before for loss in record[losses]]
    return paired([[x - y for x, y in zip(per_token(a[seed]), per_token(b[seed]), strict=True)] for seed in seeds],
                  comparisons)


def main(argv):
    parser = Parser(prog="python -m tools.study", description=__doc__)
    parser.add_argument("--data", default="gsm8k")
    parser.add_argument("--plan", action="store_true", help="print the runs that are left, and stop")
    args = parser.parse_args(argv)
    if args.plan:
        records = read_records(RECORDS)
        done = {key_of(record) for record in records}
        print("\n".join(planned.key for planned in jobs(records) if planned.key not in done))
        return
    for record in run_all(jobs, args.data, RECORDS, ROOT / "runs" / "study"):
        print(one_line(table_row(record)), flush=True)


if __name__ == "__main__":
    run_script(lambda: main(sys.argv[1:]))
