"""RESULTS.md from the records: `python -m tools.page` writes its numbers anew, `--check` only looks if they are right.

Between the comments <!-- NAME --> and <!-- end --> of the page stands what the function of that name makes of the
records: no number is typed. What stands outside is text. README.md has such a place as well.
"""
import support

support.interruptible(__name__)  # before torch, which takes seconds to import

import itertools
import math
import re
import sys
from statistics import fmean, stdev

from support.script import Parser, run_script
from tools.compare import ROOT, read_records
from tools.intervals import mcnemar, over_seeds
from tools.study import (ACCURACY, ALPHA, ARMS, METHODS, OWN_SIZE, RECORDS, SEEDS, WITH_SPECTRA, best_rate, difference,
                         diverged, evaluations, losses_by_rate, reported, spectra)
from weights.files import atomic_write

NOT_YET = "not run yet"


# ---- tables ---------------------------------------------------------------------------------------------------------

def table(header, rows):
    """A Markdown table of texts."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows))


def size(record):
    """The size of a method, as its paper counts it."""
    config = record["adapter"]
    return f"r {config['rank']}" if "rank" in config else f"m {config['threshold']:g}" if "threshold" in config else "-"


def spread(values, form=".4f"):
    """0.7612 ± 0.0021: mean and standard deviation over seeds; how many these are, where some are lacking."""
    text = f"{fmean(values):{form}}" + (f" ± {stdev(values):{form.lstrip('+')}}" if len(values) > 1 else "")
    return text + (f" ({len(values)} of {len(SEEDS)} seeds)" if len(values) < len(SEEDS) else "")


def absent(records, name):
    """Why nothing of a method or an arm is reported."""
    return "diverged" if diverged(records, name) else NOT_YET


def line_of(records, name, other):
    """The cells of what is reported of a method or arm beside another."""
    runs = list(reported(records, name).values())
    if not runs:
        return [f"`{name}`", "-", "-", "-", absent(records, name), "-", "-"]
    beside = difference(records, name, other) if name != other else None
    return [f"`{name}`", size(runs[0]), f"{runs[0]['trainable_parameters']:,}", f"{runs[0]['lr']:g}",
            spread([run["report_loss"] for run in runs]), str(beside or "-"),
            spread([run["forgot"] for run in runs], "+.4f")]


def results_table(records, names, other):
    """What is reported of several methods or arms, the lowest loss first."""
    def loss(name):
        return fmean([run["report_loss"] for run in reported(records, name).values()] or [math.inf])

    header = ["", "size", "trained parameters", "rate", "loss", f"difference to `{other}` [95 % interval]", "forgot"]
    return table(header, [line_of(records, name, other) for name in sorted(names, key=loss)])


def methods(records):
    """Every method at its best rate."""
    return results_table(records, METHODS, "lora")


def rates_table(records, names):
    """The loss on the selection slice by learning rate, the best of each name in bold."""
    found = {name: losses_by_rate(records, name) for name in names}
    columns = sorted({rate for losses in found.values() for rate in losses}, key=float)

    def cell(losses, rate):
        if rate not in losses:
            return ""
        text = f"{losses[rate]:.4f}" if math.isfinite(losses[rate]) else "diverged"
        return f"**{text}**" if rate == best_rate(losses) else text

    return table(["", *columns], [[f"`{name.removesuffix(', own size')}`", *(cell(losses, rate) for rate in columns)]
                                  for name, losses in found.items()])


def rates(records):
    """Every method at the size that is reported, and LoRA at another scale."""
    return rates_table(records, (*METHODS, *ALPHA))


def own_rates(records):
    """Every method at its own size."""
    return rates_table(records, OWN_SIZE)


def arms_of(method, *others):
    """A block: a method with its arms, and others, beside it."""
    names = [method, *(name for name, (_, of) in ARMS.items() if of == method and "last" not in name), *others]
    return lambda records: results_table(records, names, method)


def convergence(records):
    """Loss on the selection slice over the steps of the reported runs."""
    steps = sorted({int(step) for name in METHODS for run in reported(records, name).values()
                    for step in run["held_out_loss"]})
    rows = []
    for name in METHODS:
        runs = list(reported(records, name).values())
        rows.append([f"`{name}`", *(spread([run["held_out_loss"][str(step)] for run in runs]) if runs else
                                    absent(records, name) for step in steps)])
    return table(["after steps", *map(str, steps)], rows)


def movement(records):
    """How far weights have moved in their SVD."""
    def cells(name):
        found = list(spectra(records, name).values())
        if not found:
            return [absent(records, name), "", "", "", ""]
        mean = {key: fmean([numbers[key] for numbers in found]) for key in found[0]}
        return [f"{mean['delta_sigma']:.2e}", f"{mean['delta_d']:.2e}", f"{mean['change']:.2e}",
                f"{mean['kappa_start']:.4f} → {mean['kappa']:.4f}" if "kappa" in mean else "-",
                f"{mean['u_error']:.1e}, {mean['v_error']:.1e}" if "u_error" in mean else "-"]

    names = [name for name in (*METHODS, *ARMS) if name in WITH_SPECTRA]
    names += [name for name in sorted(WITH_SPECTRA) if name not in names]
    header = ["", "ΔΣ", "ΔD", "&#124;dW&#124; / &#124;W&#124;", "κ(W_p)", "‖UᵀU − I‖, ‖VᵀV − I‖"]
    return table(header, [[f"`{name}`", *cells(name)] for name in names])


def depth(records):
    """LoTR and LoRA of one budget on the last layers."""
    rows = []
    for blocks in (5, 10, 20, 30):
        lotr, lora = f"lotr, last {blocks}", f"lora, last {blocks}"
        losses = [spread([run["report_loss"] for run in reported(records, name).values()])
                  if reported(records, name) else absent(records, name) for name in (lotr, lora)]
        rows.append([str(blocks), *losses, str(difference(records, lotr, lora) or "-")])
    return table(["last blocks", "`lotr`", "`lora`", "difference [95 % interval]"], rows)


def accuracy(records):
    """Right answers, in %, and McNemar's p against LoRA without the calculator."""
    rows = []
    for method in METHODS:
        cells = [f"`{method}`"]
        for name in ACCURACY:
            found, lora = evaluations(records, f"{method}, {name}"), evaluations(records, f"lora, {name}")
            cells += [NOT_YET, "", ""] if not found else [*map(percent, found), p_value(found[0], lora and lora[0])]
        rows.append(cells)
    header = [text for name in ACCURACY for text in (f"{name}, %", "with calculator, %", "p")]
    return table(["", *header], rows)


def percent(evaluation):
    """An accuracy with its standard error, in %."""
    p, n = evaluation["accuracy"], evaluation["n"]
    return f"{100 * p:.1f} ± {100 * math.sqrt(p * (1 - p) / n):.1f}"


def p_value(one, other):
    """McNemar's p of two evaluations on the same problems."""
    if other is None or one is other:
        return "-"
    _, _, p = mcnemar([digit == "1" for digit in one["right"]], [digit == "1" for digit in other["right"]])
    return f"{p:.3f}" if p >= 0.001 else "< 0.001"


def made(records):
    """With what the records were made: all that differs between them is named."""
    keys = {"Python": "python", "torch": "torch", "threads": "threads", "model": "model"}
    return "; ".join(f"{words} {', '.join(sorted({str(record[key]) for record in records if key in record}))}"
                     for words, key in keys.items()) + f"; {len(records)} runs."


# ---- verdicts -------------------------------------------------------------------------------------------------------

def judged(interval, unseen):
    """Whether a number is lower, as a claim has it: `unseen` where zero lies inside. Fewer seeds decide nothing."""
    if interval.seeds < len(SEEDS):
        return "not decided yet"
    if not interval.sure:
        return unseen
    return "holds here" if interval.mean < 0 else "contradicted here"


def claim(text, name, other, unseen="not seen here", losses="report_losses"):
    """A verdict on the claim that `name` reaches a lower loss than `other`."""
    def verdict(records):
        interval = difference(records, name, other, losses)
        if interval is None:
            gone = [which for which in (name, other) if diverged(records, which)]
            return f"- {text}: {f'`{gone[0]}` diverged' if gone else NOT_YET}."
        return f"- {text}: **{judged(interval, unseen)}**; difference to `{other}` {interval}."
    return verdict


def moved_less(text, number, name, other):
    """A verdict on the claim that a number of `tools.spectra` is lower for `name` than for `other`, seed by seed."""
    def verdict(records):
        a, b = spectra(records, name), spectra(records, other)
        seeds = sorted(a.keys() & b.keys())
        if not seeds:
            return f"- {text}: {NOT_YET}."
        mine, its = ([number(found[seed]) for seed in seeds] for found in (a, b))
        interval = over_seeds([x - y for x, y in zip(mine, its)])
        reach = f" [{interval.low:+.2e}, {interval.high:+.2e}]" if interval.seeds > 1 else ""
        return (f"- {text}: **{judged(interval, 'not seen here')}**; {fmean(mine):.6g}, and {fmean(its):.6g} for "
                f"`{other}`: {interval.mean:+.2e}{reach}.")
    return verdict


def faster(records, other):
    """A verdict on the claim that SORSA converges faster: at how many of the points on the way, seeds and steps, its
    loss is lower."""
    a, b = reported(records, "sorsa"), reported(records, other)
    text = f"- SORSA is ahead of `{other}` on the way"
    if not set(SEEDS) <= a.keys() & b.keys():  # fewer decide nothing
        return f"{text}: {NOT_YET}."
    steps = sorted(map(int, a[SEEDS[0]]["held_out_loss"]))[1:-1]  # before the first all are equal, the last is reported
    points = [a[seed]["held_out_loss"][str(step)] < b[seed]["held_out_loss"][str(step)]
              for seed in SEEDS for step in steps]
    verdict = "holds here" if all(points) else "not seen here" if any(points) else "contradicted here"
    return (f"{text}: **{verdict}**; its loss on the 128 examples that choose rates is the lower one at {sum(points)} "
            f"of {len(points)} points.")


def overall(records):
    """How far the methods lie apart, each at its best rate."""
    losses = {name: fmean([run["report_loss"] for run in runs.values()])
              for name in METHODS if len(runs := reported(records, name)) == len(SEEDS)}
    if len(losses) < len(METHODS):
        return f"- All methods at their own best rate: {NOT_YET}."
    order = sorted(losses, key=losses.get)
    apart = [name for name in order if name != "lora" and difference(records, name, "lora").sure]
    told = f"`{'`, `'.join(apart)}` can be told from `lora`" if apart else "none can be told from `lora`"
    return (f"- Each at its own best rate, the nine methods lie between {losses[order[0]]:.4f} (`{order[0]}`) and "
            f"{losses[order[-1]]:.4f} (`{order[-1]}`); {told}.")


def rate_ratio(records):
    """How far the best rates of LoRA, PiSSA and full fine-tuning lie apart."""
    found = {name: losses_by_rate(records, name) for name in ("lora", "full", "pissa")}
    if not all(losses and best_rate(losses) in list(losses)[1:-1] for losses in found.values()):
        return f"- How far the best learning rates lie apart: {NOT_YET}."
    lora, full, pissa = (float(best_rate(losses)) for losses in found.values())
    return (f"- The best rate of `lora` is {lora:g}, of `full` {full:g} and of `pissa` {pissa:g}: a comparison at one "
            "rate for all would measure the rate.")


VERDICTS = (
    overall, rate_ratio,
    lambda records: faster(records, "lora"), lambda records: faster(records, "pissa"),
    claim("SORSA ends at a lower loss than LoRA", "sorsa", "lora"),
    claim("SORSA ends at a lower loss than PiSSA", "sorsa", "pissa"),
    claim("SORSA's regularizer lowers its loss", "sorsa", "sorsa, gamma 0"),
    moved_less("SORSA's regularizer lowers the condition number of W_p (κ after / κ before)",
               lambda found: found["kappa"] / found["kappa_start"], "sorsa", "sorsa, gamma 0"),
    moved_less("SORSA's regularizer keeps W's singular vectors in place (ΔD)", lambda found: found["delta_d"], "sorsa",
               "sorsa, gamma 0"),
    moved_less("SORSA's regularizer keeps W's singular values in place (ΔΣ)", lambda found: found["delta_sigma"],
               "sorsa", "sorsa, gamma 0"),
    *(claim(text, name, other, losses="prose_losses") for text, name, other in (
        ("LoRA forgets less than full fine-tuning", "lora", "full"), ("SORSA forgets less than LoRA", "sorsa", "lora"),
        ("SORSA forgets less than PiSSA", "sorsa", "pissa"), ("CoRA forgets less than LoRA", "cora", "lora"))),
    claim("SARA's ranks from the spectrum are better than the same budget spread evenly", "sara", "sara, even"),
    claim("Mo-SARA's five sets are better than one", "mosara", "mosara, one set"),
    claim("Mo-SARA's router is better than equal gates", "mosara", "mosara, no router"),
    claim("Mo-SARA's router is better with an inner width of 2", "mosara, router of rank 2", "mosara"),
    claim("CoRA's frozen basis, at twice the rank, is better than LoRA of as many parameters", "cora", "lora"),
    claim("CoRA's frozen basis loses nothing against LoRA of its rank, with twice its parameters", "cora", "lora, r 8",
          unseen="no loss seen here"),
    claim("CoRA's basis from the weights is better than a random one", "cora", "cora, random basis"),
    claim("CoRA's basis is a better start for LoRA", "cora-init", "lora"),
    claim("CoRA's start from the weights is better than a random one", "cora-init", "cora-init, random basis"),
    claim("LoTR is better than LoRA of as many parameters", "lotr", "lora"),
    *(claim(f"LoTR is better than LoRA of as many parameters on {which}", f"lotr, {blocks}", f"lora, {blocks}")
      for blocks, which in (("last 5", "the last 5 blocks"), ("last 30", "all 30 blocks, with half the budget"))),
    claim("LoTR's groups by shape are better than groups by name", "lotr", "lotr, by name"),
    claim("LoTR's three factors are better than its cores alone, of as many parameters", "lotr", "lotr, cores only"),
)


def verdicts(records):
    """The list that the page begins with."""
    return "\n".join(verdict(records) for verdict in VERDICTS)


def summary(records):
    """What README.md says: of a few verdicts those that are there."""
    chosen = overall, rate_ratio, claim("SORSA ends at a lower loss than LoRA", "sorsa", "lora")
    said = [verdict(records) for verdict in chosen]
    return "\n".join(line for line in said if NOT_YET not in line)


# ---- the page -------------------------------------------------------------------------------------------------------

BLOCKS = {"verdicts": verdicts, "methods": methods, "convergence": convergence, "rates": rates, "own-rates": own_rates,
          "sorsa": arms_of("sorsa"), "movement": movement, "sara": arms_of("sara"), "mosara": arms_of("mosara"),
          "cora": arms_of("cora", "lora", "lora, r 8"), "cora-init": arms_of("cora-init", "lora"),
          "lotr": arms_of("lotr", "lora"), "depth": depth, "accuracy": accuracy, "made": made}
PAGES = {"RESULTS.md": BLOCKS, "README.md": {"summary": summary}}


def rewritten(page, records, blocks=BLOCKS):
    """The text of a page with every block made anew. ValueError for a block that nothing makes, or a missing one."""
    marks = re.findall(r"<!-- ([\w-]+) -->", page)
    if sorted(marks[::2]) != sorted(blocks) or marks[1::2] != ["end"] * len(blocks):
        odd = sorted({*marks} ^ {*blocks, "end"})
        raise ValueError("the page's blocks are not those that tools.page makes: "
                         f"{', '.join(odd) or 'one is there twice, or has no end'}")
    for name, block in blocks.items():
        before, start, rest = page.partition(f"<!-- {name} -->\n")
        _, end, after = rest.partition("<!-- end -->")
        page = before + start + block(records) + "\n" + end + after
    return page


def main(argv):
    parser = Parser(prog="python -m tools.page", description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="change nothing, and fail where a number is not right")
    args = parser.parse_args(argv)
    records = read_records(RECORDS)
    for name, blocks in PAGES.items():
        before = (ROOT / name).read_text(encoding="utf-8")
        after = rewritten(before, records, blocks)
        if not args.check:
            with atomic_write(ROOT / name) as file:
                file.write(after.encode())
        elif before != after:
            lines = enumerate(itertools.zip_longest(before.split("\n"), after.split("\n")), 1)
            line = next(number for number, (old, new) in lines if old != new)
            raise ValueError(f"{name}, line {line}, is not what {RECORDS.name} says: run python -m tools.page")


if __name__ == "__main__":
    run_script(lambda: main(sys.argv[1:]))
