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
from statistics import fmean, median, stdev

from support.script import Parser, run_script
from tools.compare import ROOT, read_records, size
from tools.intervals import mcnemar, over_seeds
from tools.study import (AGAIN, ALPHA, ARMS, ASKED, DEPTHS, LONGER, LOWER, METHODS, OTHER_RANK, OWN_SIZE, RECORDS,
                         SEEDS, STEPS, WITH_SPECTRA, best_rate, by_rate, default_rate, difference, diverged,
                         evaluations, losses_by_rate, most_right, reported, spectra)
from weights.files import atomic_write

NOT_YET = "not run yet"
LEVELS = 0.8, 0.77  # losses on the selection slice that most methods pass on the way and near the end
SIX_DIGITS = 1e-3  # in %: by so much the rounding of tools.compare may have moved the ratio of two condition numbers


# ---- tables ---------------------------------------------------------------------------------------------------------

def table(header, rows):
    """A Markdown table of texts."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows))


def spread(values, form=".4f"):
    """0.7612 ± 0.0021: mean and standard deviation over seeds; how many these are, where some are lacking."""
    text = f"{fmean(values):{form}}" + (f" ± {stdev(values):{form.lstrip('+')}}" if len(values) > 1 else "")
    return text + (f" ({len(values)} of {len(SEEDS)} seeds)" if len(values) < len(SEEDS) else "")


def absent(records, name):
    """Why nothing is reported of a method or an arm."""
    return "diverged" if diverged(records, name) else NOT_YET


def none_of(records, *names):
    """The same in a sentence about several of them."""
    return next((f"`{name}` diverged" for name in names if diverged(records, name)), NOT_YET)


def over_runs(records, name, number, form=".4f"):
    """The `spread` of number(record) over the reported runs of a method or an arm; why there is none."""
    runs = reported(records, name).values()
    lost = len(diverged(records, name))
    if not runs:
        return absent(records, name)
    return spread([number(run) for run in runs], form) + f", {lost} diverged" * bool(lost)


def of_runs(records, name, key="device"):
    """What the records of a method's or an arm's reported runs say of `key`: a set."""
    return {run.get(key) for run in reported(records, name).values()}


def elsewhere(records, name, other):
    """Where runs of a method or an arm were made, and none of those beside it: a set, empty where there is nothing
    beside it."""
    here = of_runs(records, other)
    return here and of_runs(records, name) - here


def line_of(records, name, other):
    """The cells of what is reported of a method or arm beside another, with a dagger if that was made elsewhere."""
    run = next(iter(reported(records, name).values()), None)
    loss = over_runs(records, name, lambda run: run["report_loss"])
    if run is None:
        return [f"`{name}`", "-", "-", "-", loss, "-", "-"]
    beside = difference(records, name, other) if name != other else None
    dagger = " †" * bool(elsewhere(records, name, other))
    return [f"`{name}`{dagger}", size(run), f"{run['trainable_parameters']:,}", f"{run['lr']:g}", loss,
            str(beside or "-"), over_runs(records, name, lambda run: run["forgot"], "+.4f")]


def results_table(records, names, other):
    """What is reported of several methods or arms, the lowest loss first."""
    def loss(name):
        return fmean([run["report_loss"] for run in reported(records, name).values()] or [math.inf])

    header = ["", "size", "trained parameters", "rate", "loss", f"difference to `{other}` [95 % interval]", "forgot"]
    rows = table(header, [line_of(records, name, other) for name in sorted(names, key=loss)])
    marked = [name for name in names if elsewhere(records, name, other)]
    if not marked:
        return rows
    there, here = set().union(*(elsewhere(records, name, other) for name in marked)), of_runs(records, other)
    texts = [of_runs(records, name, "prose_sha256") for name in (other, *marked)]
    return (f"{rows}\n\n† Made on {', '.join(sorted(there))}, `{other}` on {', '.join(sorted(here))}"
            + "; \"forgot\" is of the manual of another Python" * any(text != texts[0] for text in texts) + ".")


def methods(records):
    """Every method at its best rate."""
    return results_table(records, METHODS, "lora")


def rates_table(records, names, key="held_out_after", form=".4f", mark=lambda losses: ""):
    """A number of the runs that choose the rates by learning rate, that at the best rate of each name in bold; a star
    at the rate mark(losses)."""
    found = {name: by_rate(records, name, key) for name in names}
    losses = {name: losses_by_rate(records, name) for name in names}
    columns = sorted({rate for numbers in found.values() for rate in numbers}, key=float)

    def cell(name, rate):
        if rate not in found[name]:
            return ""
        text = f"{found[name][rate]:{form}}" if math.isfinite(found[name][rate]) else "diverged"
        return (f"**{text}**" if rate == best_rate(losses[name]) else text) + r" \*" * (rate == mark(losses[name]))

    return table(["", *columns], [[f"`{name.removesuffix(', own size')}`", *(cell(name, rate) for rate in columns)]
                                  for name in names])


def rates(records):
    """Every method at the size that is reported, LoRA at another scale, and what else has rates of its own."""
    tried = [name for name in OTHER_RANK if losses_by_rate(records, name)]
    return rates_table(records, (*METHODS, *ALPHA, *tried))


def own_rates(records):
    """Every method at its own size, with a star at the default that follows."""
    return rates_table(records, ("full", *OWN_SIZE), mark=default_rate)


def forgetting(records):
    """What every method forgets at each rate."""
    return rates_table(records, METHODS, "forgot", "+.4f")


def arms_of(method, *others):
    """A block: a method with its arms, and others, beside it."""
    arms = [name for name in ARMS if name.startswith(f"{method}, ") and "last" not in name]
    return lambda records: results_table(records, [method, *arms, *others], method)


def steps_to(record, loss):
    """After how many steps the loss on the selection slice has come down to `loss`, by a straight line between two
    measurements; None if it never has."""
    points = sorted((int(step), measured) for step, measured in record["held_out_loss"].items())
    for (before, higher), (after, lower) in itertools.pairwise(points):
        if lower <= loss:
            return before + (after - before) * (higher - loss) / (higher - lower)
    return None


def measured_at(records):
    """The steps at which the reported runs have measured their loss on the selection slice."""
    return sorted({int(step) for name in METHODS for run in reported(records, name).values()
                   for step in run["held_out_loss"]})


def ahead(records, name, other, step, comparisons=1):
    """The Interval, over seeds, of the loss of `name` on the selection slice after a step less that of `other`; None
    where no seed has both. comparisons: as of intervals.paired."""
    a, b = (reported(records, which) for which in (name, other))
    lead = [a[seed]["held_out_loss"][str(step)] - b[seed]["held_out_loss"][str(step)] for seed in a if seed in b]
    return over_seeds(lead, comparisons) if lead else None


def leads(records):
    """Which methods are below LoRA's loss on the selection slice after each step, and which above, zero being outside
    of the interval over all seeds."""
    def found(step, sign):
        beside = {name: ahead(records, name, "lora", step) for name in METHODS if name != "lora"}
        return names([name for name, interval in beside.items() if interval and interval.sure
                      and interval.seeds == len(SEEDS) and sign * interval.mean > 0])

    steps = measured_at(records)[1:]
    return "; ".join(f"after {step} steps below `lora`: {found(step, -1)}, above: {found(step, 1)}" for step in steps)


def names(some):
    """The names of methods in a sentence."""
    return f"`{'`, `'.join(some)}`" if some else "none"


def convergence(records):
    """Loss on the selection slice over the steps of the reported runs, the steps that two losses take, and by whom
    LoRA is led."""
    steps = measured_at(records)

    def reached(name, loss):
        found = [steps_to(run, loss) for run in reported(records, name).values()]
        there = [number for number in found if number is not None]
        never = f", {len(found) - len(there)} never" * (len(there) < len(found))
        return spread(there, ".1f") + never if there else "never" if found else ""

    def measured(name, step):
        return over_runs(records, name, lambda run: run["held_out_loss"][str(step)])

    header = ["", *(f"after {step} steps" for step in steps), *(f"{loss:.2f} after" for loss in LEVELS)]
    rows = [[f"`{name}`", *(measured(name, step) for step in steps), *(reached(name, loss) for loss in LEVELS)]
            for name in METHODS]
    return (f"{table(header, rows)}\n\nBy intervals over the seeds alone, each as if it were the only one, "
            f"{leads(records) or NOT_YET}.")


def movement(records):
    """How far weights have moved in their SVD."""
    def cells(name):
        found = list(spectra(records, name).values())
        if not found:
            return [absent(records, name), "", "", "", "", ""]
        mean = {key: fmean([numbers[key] for numbers in found]) for key in found[0]}
        return [f"{fmean([run['report_loss'] for run in reported(records, name).values()]):.4f}",
                f"{mean['delta_sigma']:.2e}", f"{mean['delta_d']:.2e}", f"{mean['change']:.2e}",
                f"{mean['kappa_start']:.4f} → {mean['kappa']:.4f}" if "kappa" in mean else "-",
                f"{mean['u_error']:.1e}, {mean['v_error']:.1e}" if "u_error" in mean else "-"]

    shown = [name for name in (*METHODS, *ARMS) if name in WITH_SPECTRA]
    shown += [name for name in sorted(WITH_SPECTRA) if name not in shown]
    header = ["", "loss", "ΔΣ", "ΔD", "&#124;dW&#124; / &#124;W&#124;", "κ(W_p)", "‖UᵀU − I‖, ‖VᵀV − I‖"]
    return table(header, [[f"`{name}`", *cells(name)] for name in shown])


def depth(records):
    """LoTR and LoRA of one budget on the last layers."""
    rows = []
    for blocks in DEPTHS:
        lotr, lora = f"lotr, last {blocks}", f"lora, last {blocks}"
        losses = [over_runs(records, name, lambda run: run["report_loss"]) for name in (lotr, lora)]
        rows.append([str(blocks), *losses, str(difference(records, lotr, lora) or "-")])
    return table(["last blocks", "`lotr`", "`lora`", "difference [95 % interval]"], rows)


def twice(records):
    """The losses of runs that were made on two devices, with the same flags, and so the same seed and data."""
    pairs = {}
    for record in records:
        if "error" not in record:
            pairs.setdefault(record["flags"], []).append(record)

    def losses(record):
        report = [f"{record['report_loss']:.4f} on the report's"] if "report_loss" in record else []
        return f"{record.get('device')}: " + ", ".join([f"{record['held_out_after']:.4f}", *report])

    rows = [[f"`{min((run['name'] for run in runs), key=len)}`", *sorted(map(losses, runs))]
            for runs in pairs.values() if len({run.get("device") for run in runs}) == 2]
    return table(["", "loss after training on one", "on the other"], rows)


def accuracy(records):
    """Right answers, in %, and McNemar's p against LoRA without the calculator."""
    def cells(method, name, beside):
        found, lora = evaluations(records, f"{method}, {name}"), evaluations(records, f"lora, {beside}")
        return [*map(percent, found), p_value(found[0], lora and lora[0])] if found else [NOT_YET, "", ""]

    rows = [[f"`{method}`", *(cell for name in ASKED for cell in cells(method, name, name))]
            for method in METHODS]
    best, nothing = most_right(records, "equations"), ["", "", ""]
    rows.append(["`lora` at a rate of 0.003", *cells("lora", LOWER, ASKED[0]), *nothing])
    rows += [[f"`{method}` made again on an H100", *cells(method, AGAIN, ASKED[0]), *nothing]
             for method in METHODS if evaluations(records, f"{method}, {AGAIN}")]
    rows.append([f"`{best}`, three epochs" if best else "the best, three epochs", *nothing,
                 *cells(best, LONGER, "equations")[:2], ""])  # no p: other steps than LoRA's, and the best of many
    header = [text for name in ASKED for text in (f"{name}, %", "with calculator, %", "p")]
    capped = [evaluation["capped"] for record in records for evaluation in record.get("evaluations", ())]
    return table(["", *header], rows) + (f"\n\nOf the answers {100 * min(capped):.1f} to {100 * max(capped):.1f} % ran "
                                         "into the cap of new tokens." if capped else "")


def percent(evaluation):
    """An accuracy with its standard error, in %."""
    p, n = evaluation["accuracy"], evaluation["n"]
    return f"{100 * p:.1f} ± {100 * math.sqrt(p * (1 - p) / n):.1f}"


def p_value(one, other):
    """McNemar's p of two evaluations on the same problems, in words."""
    if other is None or one is other:
        return "-"
    p = beside(one, other)[2]
    return f"{p:.3f}" if p >= 0.001 else "< 0.001"


def beside(one, other):
    """How often one evaluation alone is right, how often the other, and McNemar's p."""
    return mcnemar(*([digit == "1" for digit in evaluation["right"]] for evaluation in (one, other)))


def made(records):
    """With what the records were made: all that differs between them is named."""
    ended = [record for record in records if "error" not in record]
    keys = {"Python": "python", "torch": "torch", "threads": "threads", "device": "device", "model": "model"}
    said = [f"{words} {', '.join(sorted({str(record.get(key, 'not recorded')) for record in ended}))}"
            for words, key in keys.items()]
    runs = [record for record in ended if record.get("steps") == int(STEPS) and "tokens" in record]
    if runs:
        tokens = [record["tokens"] for record in runs]
        said.append(f"{min(tokens):,} to {max(tokens):,} tokens in {STEPS} steps")
    for words, reports in (("chooses a rate", False), ("is reported", True)):
        if seconds := [record["seconds"] for record in runs if ("report_losses" in record) == reports]:
            said.append(f"a run that {words} takes {median(seconds) / 60:.0f} minutes")
    widened = [record["name"] for record in ended if record.get("products_widened")]
    of_them = (f", {len(widened)} of them with products of bf16 taken in fp32 (of {names(dict.fromkeys(widened))})"
               if widened else "")
    return f"{'; '.join(said)}; {len(records)} runs{of_them}."


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
            return f"- {text}: {none_of(records, name, other)}."
        return (f"- {text}: **{judged(interval, unseen)}**; difference to `{other}` {interval}"
                + ", which was made on another device" * bool(elsewhere(records, name, other)) + ".")
    return verdict


def moved_less(text, number, name, other=None, form=".3g", error=0.0):
    """A verdict on the claim that a number of `tools.spectra` is lower for `name` than for `other`, or without another
    lower than 0. error: by how much the records' rounding may have moved it."""
    def verdict(records):
        a, b = (spectra(records, which) for which in (name, other or name))
        seeds = sorted(a.keys() & b.keys())
        if not seeds:
            return f"- {text}: {none_of(records, name, other or name)}."
        mine, its = [number(a[seed]) for seed in seeds], [number(b[seed]) if other else 0.0 for seed in seeds]
        found = over_seeds([x - y for x, y in zip(mine, its)])
        agreed = " (the seeds agree: the interval is the records' rounding)" if found.high - found.low < error else ""
        found = found._replace(low=found.low - error, high=found.high + error)
        reach = f" [{found.low:+{form}}, {found.high:+{form}}]{agreed}" if found.seeds > 1 else ""
        said = f"{fmean(mine):{form}}, and {fmean(its):{form}} for `{other}`: " if other else ""
        return f"- {text}: **{judged(found, 'not seen here')}**; {said}{found.mean:+{form}}{reach}."
    return verdict


def sooner(other):
    """A verdict on the claim that SORSA converges faster than another: that its loss is lower on the way, all looks
    taken at once."""
    def verdict(records):
        text = f"SORSA converges faster than `{other}`, a lower loss on the way"
        looks = measured_at(records)[1:-1]
        found = {step: ahead(records, "sorsa", other, step, len(looks)) for step in looks}
        if None in found.values() or not found:
            return f"- {text}: {none_of(records, 'sorsa', other)}."
        return f"- {text}: " + "; ".join(f"after {step} steps **{judged(interval, 'not seen here')}**, {interval}"
                                        for step, interval in found.items()) + "."
    return verdict


def told_apart(found):
    """The methods that can be told from LoRA, of found(comparisons) -> {method: (difference, whether it is sure)}: a
    function of the sign that the difference is to have."""
    def of_sign(sign, comparisons):
        return [name for name, (difference, sure) in found(comparisons).items() if sure and sign * difference > 0]

    several = len(METHODS) - 1
    return lambda sign: names(of_sign(sign, 1)) + (
        f" (as {several} comparisons at once: {names(of_sign(sign, several))})" if of_sign(sign, 1) else "")


def told_by_loss(records, losses="report_losses"):
    """`told_apart` by the loss on the report's examples, or its rise on general text; None where runs are lacking."""
    if any(len(reported(records, name)) < len(SEEDS) for name in METHODS):
        return None

    def found(comparisons):
        intervals = {name: difference(records, name, "lora", losses, comparisons) for name in METHODS if name != "lora"}
        return {name: (interval.mean, interval.sure) for name, interval in intervals.items()}
    return told_apart(found)


def overall(records):
    """How far the methods lie apart, each at its best rate, and which of them can be told from LoRA."""
    told = told_by_loss(records)
    if told is None:
        return f"- All methods at their own best rate: {none_of(records, *METHODS)}."
    losses = {name: fmean([run["report_loss"] for run in reported(records, name).values()]) for name in METHODS}
    best, worst = min(losses, key=losses.get), max(losses, key=losses.get)
    return (f"- Each at its own best rate, the nine methods lie between {losses[best]:.4f} (`{best}`) and "
            f"{losses[worst]:.4f} (`{worst}`). Worse than `lora`: {told(1)}. Better: {told(-1)}.")


def forgotten(records):
    """Which methods forget more than LoRA, and which less, each at its best rate."""
    told = told_by_loss(records, "prose_losses")
    if told is None:
        return f"- What is forgotten, against `lora`: {none_of(records, *METHODS)}."
    return f"- At these rates more than `lora` forget: {told(1)}. Less: {told(-1)}."


def answers(name, said, lower=None):
    """A verdict on which methods give more right answers than LoRA, or fewer; `lower` names LoRA's accuracy at a lower
    rate, beside which they are set as well."""
    def told(found, lora):
        tests = {method: beside(evaluation, lora) for method, evaluation in found.items()}
        apart = told_apart(lambda comparisons: {method: (mine - its, p * comparisons < 0.05)
                                                for method, (mine, its, p) in tests.items()})
        return f"{apart(1)}. Fewer: {apart(-1)}."

    def verdict(records):
        found = {method: evaluation[0] for method in METHODS
                 if (evaluation := evaluations(records, f"{method}, {name}"))}
        lacking, lora = names([method for method in METHODS if method not in found]), found.pop("lora", None)
        if not lora or not found:
            return f"- {said}: {NOT_YET}."
        at_lower = lower and evaluations(records, f"lora, {lower}")
        return (f"- {said}, one training seed: more answers right than `lora`: {told(found, lora)}"
                + (f" More than `lora` at a rate of 0.003: {told(found, at_lower[0])}" if at_lower else "")
                + f" {lacking}: {NOT_YET}." * (lacking != "none"))
    return verdict


def rate_ratio(records):
    """How far the best rates of LoRA, PiSSA and full fine-tuning lie apart."""
    found = {name: losses_by_rate(records, name) for name in ("lora", "full", "pissa")}
    if not all(losses and best_rate(losses) in list(losses)[1:-1] for losses in found.values()):
        return f"- How far the best learning rates lie apart: {NOT_YET}."
    lora, full, pissa = (float(best_rate(losses)) for losses in found.values())
    return (f"- The best rate of `lora` is {lora:g}, of `full` {full:g} and of `pissa` {pissa:g}: a comparison at one "
            "rate for all would measure the rate.")


def growth_of_kappa(found):
    """By how much W_p's condition number has risen in a run, in %."""
    return 100 * (found["kappa"] / found["kappa_start"] - 1)


SORSA_BELOW_LORA = claim("SORSA ends at a lower loss than LoRA", "sorsa", "lora")
VERDICTS = (
    overall, rate_ratio,
    answers("practice", "Practice problems", LOWER), answers("equations", "GSM-8K by equations"),
    sooner("lora"), sooner("pissa"), SORSA_BELOW_LORA,
    claim("SORSA ends at a lower loss than PiSSA", "sorsa", "pissa"),
    claim("SORSA's regularizer lowers its loss", "sorsa", "sorsa, gamma 0"),
    moved_less("SORSA's training lowers the condition number κ of W_p (rise in %)", growth_of_kappa, "sorsa",
               form=".4f", error=SIX_DIGITS),
    moved_less("SORSA's regularizer keeps κ(W_p) lower than training without it (rise in %)", growth_of_kappa, "sorsa",
               "sorsa, gamma 0", form=".4f", error=SIX_DIGITS),
    moved_less("SORSA's regularizer keeps W's singular vectors in place (ΔD)", lambda found: found["delta_d"], "sorsa",
               "sorsa, gamma 0"),
    moved_less("SORSA's regularizer keeps W's singular values in place (ΔΣ)", lambda found: found["delta_sigma"],
               "sorsa", "sorsa, gamma 0"),
    forgotten,
    *(claim(text, name, other, losses="prose_losses") for text, name, other in (
        ("LoRA forgets less than full fine-tuning", "lora", "full"),
        ("SORSA forgets less than PiSSA", "sorsa", "pissa"))),
    claim("SARA's ranks from the spectrum are better than the same budget spread evenly", "sara", "sara, even"),
    claim("Mo-SARA's five sets are better than one", "mosara", "mosara, one set"),
    claim("Mo-SARA's router is better than equal gates", "mosara", "mosara, no router"),
    claim("Mo-SARA's router is better with an inner width of 2", "mosara, router of rank 2", "mosara"),
    claim("CoRA's frozen basis, at twice the rank, is better than LoRA of as many parameters", "cora", "lora"),
    claim("CoRA's frozen basis, at rank 8, costs nothing against LoRA of rank 8, which trains twice as many parameters",
          "cora", "lora, r 8", unseen="no cost seen here"),
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
    said = [verdict(records) for verdict in (overall, rate_ratio, SORSA_BELOW_LORA)]
    return "\n".join(line for line in said if NOT_YET not in line)


# ---- the page -------------------------------------------------------------------------------------------------------

BLOCKS = {"verdicts": verdicts, "methods": methods, "convergence": convergence, "rates": rates, "own-rates": own_rates,
          "forgetting": forgetting,
          "sorsa": arms_of("sorsa"), "movement": movement, "sara": arms_of("sara"), "mosara": arms_of("mosara"),
          "cora": arms_of("cora", "lora", "lora, r 8"), "cora-init": arms_of("cora-init", "lora"),
          "lotr": arms_of("lotr", "lora"), "depth": depth, "accuracy": accuracy, "twice": twice,
          "made": made}
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
    parser = Parser(prog="python -m tools.page", description=__doc__)
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
