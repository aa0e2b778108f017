"""RESULTS.md from the records: `python -m tools.page` writes its numbers anew, `--check` only looks if they are right.

Between the comments <!-- NAME --> and <!-- end --> of the page stands what the function of that name makes of the
records: no number is typed. What stands outside is text.
"""
import support

support.interruptible(__name__)  # before torch, which takes seconds to import

import math
import re
import statistics
import sys
from pathlib import Path

from support.script import Parser, run_script
from tools.compare import read_records
from tools.intervals import mcnemar
from tools.study import (ACCURACY, ARMS, METHODS, RECORDS, SEEDS, WITH_SPECTRA, best_rate, difference, evaluations,
                         losses_by_rate, reported, spectra)
from weights.files import atomic_write

PAGE = RECORDS.parent.parent / "RESULTS.md"
NOT_YET = "not run yet"


# ---- tables ---------------------------------------------------------------------------------------------------------

def table(header, rows):
    """A Markdown table of texts."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows))


def size(record):
    """The size of a method, as its paper counts it."""
    config = record["adapter"]
    return f"r {config['rank']}" if "rank" in config else f"m {config['threshold']:g}" if "threshold" in config else "-"


def mean(values):
    return statistics.fmean(values)


def spread(values):
    """0.7612 +- 0.0021: the mean, and the standard deviation where there are several."""
    return f"{mean(values):.4f}" + (f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else "")


def line_of(records, name, other):
    """The cells of what is reported of a method or arm beside another."""
    runs = list(reported(records, name).values())
    if not runs:
        return [f"`{name}`", "-", "-", "-", NOT_YET, "-", "-"]
    beside = difference(records, name, other) if name != other else None
    return [f"`{name}`", size(runs[0]), f"{runs[0]['trainable_parameters']:,}", f"{runs[0]['lr']:g}",
            spread([run["report_loss"] for run in runs]), str(beside or "-"), spread([run["forgot"] for run in runs])]


def results_table(records, names, other):
    """What is reported of several methods or arms, the lowest loss first."""
    def loss(name):
        return mean([run["report_loss"] for run in reported(records, name).values()] or [math.inf])

    header = ["", "size", "trained parameters", "rate", "loss", f"less that of `{other}`, 95 % interval", "forgot"]
    return table(header, [line_of(records, name, other) for name in sorted(names, key=loss)])


def methods(records):
    return results_table(records, METHODS, "lora")


def rates(records):
    """The loss on the selection slice by learning rate, the best of each method in bold."""
    found = {name: losses_by_rate(records, name) for name in METHODS}
    columns = sorted({rate for losses in found.values() for rate in losses}, key=float)

    def cell(losses, rate):
        if rate not in losses:
            return ""
        text = f"{losses[rate]:.4f}" if math.isfinite(losses[rate]) else "diverged"
        return f"**{text}**" if rate == best_rate(losses) else text

    return table(["", *columns], [[f"`{name}`", *(cell(losses, rate) for rate in columns)]
                                  for name, losses in found.items()])


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
        rows.append([f"`{name}`", *(spread([run["held_out_loss"][str(step)] for run in runs]) if runs else NOT_YET
                                    for step in steps)])
    return table(["after steps", *map(str, steps)], rows)


def movement(records):
    """How far weights have moved in their SVD."""
    def cells(name):
        found = spectra(records, name)
        if not found:
            return [NOT_YET, "", "", "", ""]
        return [f"{found['delta_sigma']:.2e}", f"{found['delta_d']:.2e}", f"{found['change']:.2e}",
                f"{found['kappa_start']:.4f} → {found['kappa']:.4f}" if "kappa" in found else "-",
                f"{found['u_error']:.1e}, {found['v_error']:.1e}" if "u_error" in found else "-"]

    names = [name for name in (*METHODS, *ARMS) if name in WITH_SPECTRA]
    names += [name for name in sorted(WITH_SPECTRA) if name not in names]
    return table(["", "ΔΣ", "ΔD", "&#124;dW&#124; / &#124;W&#124;", "κ(W_p)", "‖UᵀU − I‖, ‖VᵀV − I‖"],
                 [[f"`{name}`", *cells(name)] for name in names])


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


def depth(records):
    """LoTR and LoRA of one budget on the last layers."""
    rows = []
    for blocks in (5, 10, 20, 30):
        lotr, lora = f"lotr, last {blocks}", f"lora, last {blocks}"
        losses = [spread([run["report_loss"] for run in reported(records, name).values()])
                  if reported(records, name) else NOT_YET for name in (lotr, lora)]
        rows.append([str(blocks), *losses, str(difference(records, lotr, lora) or "-")])
    return table(["last blocks", "`lotr`", "`lora`", "difference, 95 % interval"], rows)


# ---- verdicts -------------------------------------------------------------------------------------------------------

def said(interval):
    """An interval in words."""
    seeds = f"{interval.seeds} seeds" if interval.seeds > 1 else "one seed, so over examples only"
    way = "higher" if interval.mean > 0 else "lower"
    return f"{abs(interval.mean):.4f} {way} (95 % interval {interval.low:+.4f} to {interval.high:+.4f}, {seeds})"


def judged(interval, unseen):
    """Whether a loss is lower, as a claim has it: `unseen` where zero lies inside. One seed decides nothing."""
    if interval.seeds < len(SEEDS):
        return "not decided yet"
    if not interval.sure:
        return unseen
    return "holds here" if interval.mean < 0 else "contradicted here"


def claim(text, name, other, unseen="not seen here"):
    """A verdict on the claim that `name` reaches a lower loss than `other`."""
    def verdict(records):
        interval = difference(records, name, other)
        if interval is None:
            return f"- {text}: {NOT_YET}."
        return f"- {text}: **{judged(interval, unseen)}**; its loss is {said(interval)} than that of `{other}`."
    return verdict


def faster(records, other):
    """A verdict on the claim that SORSA converges faster: at how many of the points, seeds and steps, its loss is
    lower."""
    a, b = reported(records, "sorsa"), reported(records, other)
    points = [a[seed]["held_out_loss"][step] < b[seed]["held_out_loss"][step]
              for seed in sorted(a.keys() & b.keys()) for step in a[seed]["held_out_loss"] if step != "0"]
    text = f"- SORSA converges faster than `{other}`"
    if not points:
        return f"{text}: {NOT_YET}."
    verdict = "holds here" if all(points) else "not seen here" if any(points) else "contradicted here"
    return f"{text}: **{verdict}**; its held-out loss is the lower one at {sum(points)} of {len(points)} points."


def moved_less(text, key, name, other):
    """A verdict on the claim that a quantity of `tools.spectra` is smaller for `name` than for `other`."""
    def verdict(records):
        a, b = spectra(records, name), spectra(records, other)
        if not a or not b:
            return f"- {text}: {NOT_YET}."
        ratio = a[key] / b[key]
        verdict = "not seen here" if abs(ratio - 1) < 0.01 else "holds here" if ratio < 1 else "contradicted here"
        return (f"- {text}: **{verdict}**; {a[key]:.4g} against {b[key]:.4g} (`{other}`), one seed, "
                "less than 1 % is none.")
    return verdict


def overall(records):
    """How far the methods lie apart, each at its best rate."""
    losses = {name: mean([run["report_loss"] for run in runs.values()])
              for name in METHODS if (runs := reported(records, name))}
    if len(losses) < len(METHODS):
        return f"- All methods at their own best rate: {NOT_YET}."
    order = sorted(losses, key=losses.get)
    same = [name for name in METHODS if name != "lora" and not difference(records, name, "lora").sure]
    told = f"`{'`, `'.join(same)}` cannot be told from `lora`" if same else "each can be told from `lora`"
    return (f"- Each at its own best rate, the nine methods lie between {losses[order[0]]:.4f} (`{order[0]}`) and "
            f"{losses[order[-1]]:.4f} (`{order[-1]}`); {told}.")


def rate_ratio(records):
    """How far the best rates of LoRA and full fine-tuning lie apart."""
    best = {name: losses_by_rate(records, name) for name in ("lora", "full", "pissa")}
    if not all(best.values()):
        return f"- Best learning rates: {NOT_YET}."
    lora, full, pissa = (float(best_rate(best[name])) for name in ("lora", "full", "pissa"))
    return (f"- The best rate of `lora` is {lora / full:.0f} times that of `full` and {lora / pissa:.0f} times that of "
            "`pissa`: at one rate for all, the comparison would measure the rate.")


VERDICTS = (
    overall, rate_ratio,
    lambda records: faster(records, "lora"), lambda records: faster(records, "pissa"),
    claim("SORSA trains to a lower loss than LoRA", "sorsa", "lora"),
    claim("SORSA trains to a lower loss than PiSSA", "sorsa", "pissa"),
    claim("SORSA's regularizer lowers its loss", "sorsa", "sorsa, gamma 0"),
    moved_less("SORSA's regularizer lowers the condition number of W_p", "kappa", "sorsa", "sorsa, gamma 0"),
    moved_less("SORSA's regularizer keeps W's singular vectors in place (ΔD)", "delta_d", "sorsa", "sorsa, gamma 0"),
    *(moved_less(f"SORSA changes the {what} less than {label}, each at its best rate", key, "sorsa", other)
      for what, key in (("singular values (ΔΣ)", "delta_sigma"), ("singular vectors (ΔD)", "delta_d"))
      for label, other in (("LoRA", "lora"), ("full fine-tuning", "full"))),
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
    claim("LoTR's three factors are better than its cores alone, of as many parameters", "lotr", "lotr, cores only"),
)


def verdicts(records):
    return "\n".join(verdict(records) for verdict in VERDICTS)


# ---- the page -------------------------------------------------------------------------------------------------------

BLOCKS = {"verdicts": verdicts, "methods": methods, "convergence": convergence, "rates": rates,
          "sorsa": arms_of("sorsa"), "movement": movement, "sara": arms_of("sara"), "mosara": arms_of("mosara"),
          "cora": arms_of("cora", "lora", "lora, r 8"), "cora-init": arms_of("cora-init", "lora"),
          "lotr": arms_of("lotr", "lora"), "depth": depth, "accuracy": accuracy}


def rewritten(page, records):
    """The text of the page with every block made anew. ValueError for a block that nothing makes, or a missing one."""
    found = re.findall(r"<!-- (?!end)([\w-]+) -->\n", page)
    if sorted(found) != sorted(BLOCKS):
        odd = sorted(set(found) ^ set(BLOCKS))
        raise ValueError("the page's blocks are not those that tools.page makes: "
                         f"{', '.join(odd) or 'one is there twice'}")
    for name, block in BLOCKS.items():
        before, start, rest = page.partition(f"<!-- {name} -->\n")
        _, end, after = rest.partition("<!-- end -->")
        page = before + start + block(records) + "\n" + end + after
    return page


def main(argv):
    parser = Parser(prog="python -m tools.page", description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="change nothing, and fail where a number is not right")
    args = parser.parse_args(argv)
    before = PAGE.read_text()
    after = rewritten(before, read_records(RECORDS))
    if not args.check:
        with atomic_write(PAGE) as file:
            file.write(after.encode())
    elif before != after:
        line = next(number for number, (old, new) in enumerate(zip(before.splitlines(), after.splitlines()), 1)
                    if old != new)
        raise ValueError(f"{PAGE.name}, line {line}, is not what {RECORDS.name} says: run python -m tools.page")


if __name__ == "__main__":
    run_script(lambda: main(sys.argv[1:]))
