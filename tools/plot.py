"""The figures of the study: `python -m tools.plot` draws them from results/study.jsonl, each as an SVG beside it.

A function each. What the records do not hold yet is left out and said; the same records give the same bytes. Needs
matplotlib, which nothing else here does: `python -m pip install matplotlib`.
"""
import support

support.interruptible(__name__)  # before torch, which takes seconds to import

import io
import math
import re
from pathlib import Path
from statistics import mean

from support.script import Parser, check_folder, run_script
from tools import study
from tools.compare import read_records
from tools.draw import PANELS

WIDTH, EDGE, COLUMNS = 880, 16, 4  # of a card, as wide as the README's figure; its margin; panels side by side
WINDOW = 8  # steps that a training loss is averaged over
LOSS = "loss per answer token (nats)"
INK, SOFT, FAINT, PALE = "#1f2328", "#59636e", "#c9ced4", "#e8eaed"
FONTS = "-apple-system, 'Segoe UI', Helvetica, Arial, sans-serif"  # which tools/draw.py names too
DASHED, DOTTED = (0, (4, 2)), (0, (2.5, 1.2))
# A colour, a dash and a marker each. Okabe and Ito's colours, which the colour-blind tell apart; relatives share one.
LOOKS = {"full": ("#000000", "-", "s"), "lora": (SOFT, DASHED, "o"), "pissa": ("#0072b2", "-", "^"),
         "sorsa": ("#d55e00", "-", "D"), "sara": ("#009e73", "-", "v"), "mosara": ("#009e73", DOTTED, "P"),
         "cora": ("#b0568c", "-", "X"), "cora-init": ("#b0568c", DOTTED, "<"), "lotr": ("#b87700", "-", ">")}
# SORSA's arms: the stronger the regularizer, the darker.
SHADES = {"sorsa, gamma 0": ("#e5803c", "s"), "sorsa, gamma 4e-5": ("#dd6f1f", "X"),
          "sorsa, gamma 4e-3": ("#8a3d00", "P"), "sorsa, sum": ("#4f2300", "*")}
NAMES = {name: PANELS[name].name.removesuffix(" fine-tuning") for name in LOOKS}
OTHER_SIZES = ("lora, r 8", "sara, q and v", "mosara, q and v")  # the study's arms that are a method at another size
# {what is measured: which numbers of a record's spectra, whose mean is drawn}
SPECTRA = {"change of the singular values, ΔΣ": ("delta_sigma",), "turn of the singular vectors, ΔD": ("delta_d",),
           "condition κ(W_p), rise in %": ("kappa",), "distance of U and V from orthonormal": ("u_error", "v_error")}
STYLE = {"svg.fonttype": "none", "svg.hashsalt": "study", "font.family": "DejaVu Sans", "font.size": 12,
         "text.color": INK, "axes.facecolor": "none", "axes.edgecolor": FAINT, "axes.titlesize": 13, "axes.grid": True,
         "axes.axisbelow": True, "axes.spines.top": False, "axes.spines.right": False, "grid.color": PALE,
         "xtick.color": SOFT, "ytick.color": SOFT, "lines.linewidth": 1.8, "lines.markersize": 5.5,
         **{f"{axis}tick.{ticks}.size": 0 for axis in "xy" for ticks in ("major", "minor")}}


class Missing(Exception):
    """What a figure needs and the records do not hold."""


# ---- cards and panels -----------------------------------------------------------------------------------------------

def panels(title, subtitle, number, x_label, y_label, columns=COLUMNS, height=150, left=66, right=EDGE, between=26,
           share=True):
    """(figure, its axes): a white card under its title, on it panels of one size in rows, with one label for all x and
    one for all y."""
    from matplotlib.figure import Figure
    from matplotlib.patches import FancyBboxPatch
    rows, columns = math.ceil(number / columns), min(columns, number)
    above, below, between_rows = 86 if number > 1 else 66, 54, 46
    total = above + rows * height + (rows - 1) * between_rows + below
    width = (WIDTH - left - right - (columns - 1) * between) / columns
    figure = Figure(figsize=(WIDTH / 72, total / 72), facecolor="none", label=title)
    figure.add_artist(FancyBboxPatch(
        (0.5 / 72, 0.5 / 72), (WIDTH - 1) / 72, (total - 1) / 72, boxstyle=f"round,pad=0,rounding_size={10 / 72}",
        facecolor="white", edgecolor="#d0d7de", zorder=-1, transform=figure.dpi_scale_trans))
    figure.text(EDGE / WIDTH, 1 - 28 / total, title, fontsize=15, fontweight="bold")
    figure.text(EDGE / WIDTH, 1 - 48 / total, subtitle, color=SOFT)
    figure.text((left + WIDTH - right) / 2 / WIDTH, 16 / total, x_label, ha="center")
    figure.text(22 / WIDTH, (below + total - above) / 2 / total, y_label, ha="center", rotation=90,
                rotation_mode="anchor")
    grid = list(figure.subplots(rows, columns, squeeze=False, sharex=share, sharey=share, gridspec_kw={
        "left": left / WIDTH, "right": 1 - right / WIDTH, "top": 1 - above / total, "bottom": below / total,
        "wspace": between / width, "hspace": between_rows / height}).flat)
    for axes in grid[number:]:
        axes.remove()
    for axes in grid[max(0, number - columns):number]:  # the lowest of each column
        axes.tick_params(labelbottom=True)
    return figure, grid[:number]


def method_panels(title, subtitle, said, x_label, y_label):
    """(figure, {method: its axes}) for the methods of `said`, {method: what stands at the right above its panel}: all
    but LoRA, which is in the panel of each."""
    names = [name for name in said if name != "lora"] or ["lora"]
    figure, grid = panels(title, subtitle, len(names), x_label, y_label)
    for name, axes in zip(names, grid):
        head(axes, NAMES[name], said[name], LOOKS[name][0])
    return figure, dict(zip(names, grid))


def head(axes, name, said="", colour=INK):
    """A panel's title, and on its right what is said of it."""
    axes.set_title(name, loc="left", color=colour, fontweight="bold")
    axes.set_title(said, loc="right", color=SOFT, fontsize=12)


# ---- lines and labels -----------------------------------------------------------------------------------------------

def band(axes, name, curves):
    """A method's mean over seeds of curves that begin at step WINDOW, on the band from the lowest to the highest."""
    colour, dash, _ = LOOKS[name]
    by_step = list(zip(*curves))
    steps = range(WINDOW, WINDOW + len(by_step))
    axes.fill_between(steps, list(map(min, by_step)), list(map(max, by_step)), color=colour, alpha=0.18, linewidth=0)
    axes.plot(steps, list(map(mean, by_step)), color=colour, linestyle=dash)


def rate_panels(title, subtitle, points, said, x_label, x_scale, x_format):
    """(figure, points) of {method: {rate: (x, held-out loss)}}: one method's line in colour, its best rate filled, on
    LoRA's in grey and all others' pale. What lies 0.3 above the lowest loss or higher is put there: a run that diverged
    as a cross, another as a bar. `said` forms what stands above a panel of the best rate's (x, loss)."""
    best = {name: study.best_rate({rate: y for rate, (_, y) in line.items()}) for name, line in points.items()}
    heads = {name: f"{said.format(*line[best[name]])} at {best[name]}" for name, line in points.items()}
    reference = f"dashed: LoRA, {heads['lora']}; " * ("lora" in heads)
    figure, grid = method_panels(title, f"{subtitle}; {reference}pale: the others", heads, x_label, LOSS)
    top = min(line[best[name]][1] for name, line in points.items()) + 0.3
    for name, axes in grid.items():
        axes.set_xscale(**x_scale)
        axes.xaxis.set_major_formatter(x_format)
        for shown in sorted(points, key=lambda other: (other == name, other == "lora")):
            colour, dash, marker = LOOKS[shown] if shown in (name, "lora") else (FAINT, "-", "")
            axes.plot([x for x, _ in points[shown].values()], [min(y, top) for _, y in points[shown].values()],
                      color=colour, linestyle=dash, linewidth=1.8 if marker else 1,
                      marker="." if shown == "lora" or len(points[shown]) == 1 else "", markersize=5)
        for rate, (x, y) in points[name].items():
            axes.plot(x, min(y, top), marker=marker if y < top else "_" if y < math.inf else "x", color=colour,
                      markersize=5.5 if y < top else 8, markerfacecolor=colour if rate == best[name] else "white",
                      clip_on=False)
    return figure, points


def label(axes, points):
    """Write the text of each of `points`, [(text, x, y, colour)], on the right of the panel, one above the other as
    they lie, with a thin line to its point."""
    heights = axes.transAxes.inverted().transform(axes.transData.transform([point[1:3] for point in points]))[:, 1]
    gap = 15 / 72 / (axes.get_position().height * axes.figure.get_figheight())
    for (text, x, y, colour), height in zip(points, apart(heights.tolist(), gap)):
        axes.annotate(text, (x, y), (1.08, height), textcoords="axes fraction", va="center", annotation_clip=False,
                      arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.8, "shrinkA": 1, "shrinkB": 5,
                                  "relpos": (0, 0.5)})


def apart(heights, gap):
    """The same heights moved, as little as leaves `gap` between any two, in the same order."""
    order, blocks = sorted(range(len(heights)), key=heights.__getitem__), []
    for place, i in enumerate(order):
        blocks.append([heights[i] - place * gap])
        while len(blocks) > 1 and mean(blocks[-2]) > mean(blocks[-1]):
            blocks[-2:] = [blocks[-2] + blocks[-1]]
    moved = [mean(block) for block in blocks for _ in block]
    return [moved[order.index(i)] + order.index(i) * gap for i in range(len(heights))]


def power(value, _=None):
    """A number of one digit as the flags have it: 3e-4."""
    return re.sub(r"e\+?(-?)0?", r"e\1", f"{value:.0e}") if value else "0"


def amount(value, _=None):
    """A number of parameters: 1.2M."""
    return f"{value / 1e6:.3g}M" if value >= 1e6 else f"{value / 1e3:.3g}k"


def in_words(name):
    """A method's or an arm's name: "SORSA, γ 4e-5" for "sorsa, gamma 4e-5"."""
    method, comma, rest = name.partition(",")
    return NAMES[method] + comma + rest.replace("gamma", "γ")


def arm_in_words(_, gamma, name, rate):
    """An arm of `arms`, with gamma where its name does not say it."""
    arm = in_words(name.partition(", rate")[0])  # the rate stands at the end
    return f"{arm}{f', γ {power(gamma)}' * (arm == NAMES['sorsa'])}, lr {power(rate)}"


def seeds(some):
    """How many seeds' records these are, where some are lacking."""
    return f", {len(some)}/{len(study.SEEDS)} seeds" * (len(some) != len(study.SEEDS))


def at_rate(some):
    """What stands above the panel of some seeds' records."""
    first, *_ = some
    return f"at {study.flag(first, '--lr')}{seeds(some)}"


# ---- what the records say -------------------------------------------------------------------------------------------

def of_each(records, key, names=tuple(LOOKS)):
    """{name: key(records, name)} of the methods (or other names) that have any; Missing if none has."""
    if found := {name: value for name in names if (value := key(records, name))}:
        return found
    raise Missing("no record for it is there yet")


def smooth(losses):
    """The mean over the last WINDOW steps, for each step that has as many."""
    return [mean(losses[end - WINDOW:end]) for end in range(WINDOW, len(losses) + 1)]


def forgetting(records, name):
    """{rate: (rise of the loss on general text, held-out loss)} of seed 0, in the order of the rates."""
    losses = study.losses_by_rate(records, name)
    return {rate: (forgot, losses[rate]) for rate, forgot in study.by_rate(records, name, "forgot").items()
            if math.isfinite(forgot)}


def arms(records):
    """{(place of the method among LOOKS, SORSA's gamma, name, rate): [{step: spectra}, one of each seed]}."""
    found = {}
    for name in study.WITH_SPECTRA:
        for record in study.reported(records, name).values():
            if "spectra" in record and record["name"] == name:
                arm = list(LOOKS).index(record["method"]), record.get("gamma", 0), name, record["lr"]
                found.setdefault(arm, []).append({int(step): numbers for step, numbers in record["spectra"].items()})
    return dict(sorted(found.items()))


def curve(some, keys):
    """{step: mean over seeds, and over keys} of [{step: spectra}], for the steps that have all."""
    return {step: mean(spectra[step][key] for spectra in some for key in keys) for step in some[0]
            if all(key in spectra.get(step, ()) for spectra in some for key in keys)}


# ---- the figures ----------------------------------------------------------------------------------------------------

def loss_by_step(records):
    """Training loss of each method at its best rate, beside LoRA's."""
    found = of_each(records, study.reported)
    figure, grid = method_panels(
        "The training loss of each method beside LoRA's", f"At each one's best learning rate, averaged over {WINDOW} "
        "steps: mean and range of the seeds. Dashed: LoRA",
        {name: at_rate(by_seed.values()) for name, by_seed in found.items()}, "step", LOSS)
    for name, axes in grid.items():
        for shown in dict.fromkeys(["lora", name] if "lora" in found else [name]):
            band(axes, shown, [smooth(record["losses"]) for record in found[shown].values()])
    return figure, found


def lead_by_step(records):
    """Training loss of each method less LoRA's on the same batches, which takes out what the batches differ by."""
    found = of_each(records, study.reported)
    lora = found.pop("lora", {})
    pairs = {name: [(by_seed[seed], lora[seed]) for seed in by_seed if seed in lora] for name, by_seed in found.items()}
    pairs = {name: some for name, some in pairs.items() if some}
    if not pairs:
        raise Missing("no seed with both LoRA and another method is there yet")
    figure, grid = method_panels(
        "How far the training loss of each method lies above LoRA's on the same batches", "At each one's best "
        f"learning rate, averaged over {WINDOW} steps: mean and range of the seeds. Below 0: ahead of LoRA",
        {name: at_rate([record for record, _ in some]) for name, some in pairs.items()}, "step",
        LOSS.replace("loss", "difference of the loss"))
    for name, axes in grid.items():
        axes.axhline(0, color=SOFT, linestyle=DASHED, linewidth=1)
        band(axes, name, [smooth([mine - its for mine, its in zip(record["losses"], other["losses"])])
                          for record, other in pairs[name]])
    return figure, {**pairs, "lora": lora}


def loss_by_rate(records):
    """Held-out loss after training at each learning rate."""
    points = {name: {rate: (float(rate), loss) for rate, loss in line.items()}
              for name, line in of_each(records, study.losses_by_rate).items()}
    return rate_panels("The loss after training at each learning rate",
                       "Held-out examples, one seed. Filled: the best; at the top: higher (bar), diverged (cross)",
                       points, "{1:.3f}", "peak learning rate", {"value": "log"}, power)


def loss_by_forgetting(records):
    """Held-out loss after training against what the loss on other text has risen by, at each rate."""
    return rate_panels("What each method learns and what it forgets",
                       "A point per rate; filled: the best, above: what it forgets; at the top: higher; "
                       "x: linear to 0.01",
                       of_each(records, forgetting), "{0:+.4f}",
                       "forgotten: rise of the loss on Python's manual (nats per token)",
                       {"value": "symlog", "linthresh": 0.01}, "{x:g}")


def sara_ranks(records):
    """SARA's rank of every projection, layer by layer."""
    made = sorted((record for record in records if "ranks" in record), key=lambda record: record["name"] != "sara")
    if not made:
        raise Missing("no record of SARA with its ranks is there yet")
    ranks, m, size = made[0]["ranks"], made[0]["adapter"]["threshold"], amount(made[0]["trainable_parameters"])
    figure, grid = panels("The ranks that SARA reads off the spectrum of each weight",
                          f"m = {m:g}, {size} trained parameters. Dashed: the mean of a projection", len(ranks),
                          "layer", "rank k", height=120)
    for axes, (projection, ks) in zip(grid, ranks.items()):
        head(axes, projection, f"mean {mean(ks):.1f}")
        axes.bar(range(len(ks)), ks, color=LOOKS["sara"][0], width=0.75)
        axes.axhline(mean(ks), color=INK, linestyle=DASHED, linewidth=1)
        axes.locator_params(integer=True)
        axes.grid(axis="x", visible=False)
    return figure, LOOKS


def spectra_by_step(records):
    """What training does to singular values and vectors, by method, learning rate and SORSA's gamma."""
    found = arms(records)
    if not found:
        raise Missing("no record with spectra is there yet")
    looks = {arm: SHADES.get(arm[2], LOOKS[list(LOOKS)[arm[0]]][::2]) for arm in found}
    figure, grid = panels("What training does to the singular values and vectors of the weights",
                          "Means over the adapted matrices and seeds, by method, SORSA's γ, and peak learning rate",
                          len(SPECTRA), "step", "", columns=2, height=200, right=190, between=255, share=False)
    for axes, (words, keys) in zip(grid, SPECTRA.items()):
        head(axes, words)
        curves = {arm: line for arm, some in found.items() if (line := curve(some, keys))}
        if keys == ("kappa",):
            curves = {arm: {step: 100 * (kappa / line[0] - 1) for step, kappa in line.items()}
                      for arm, line in curves.items()}
        else:  # these begin at zero, or at its rounding, which a logarithm would show
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(power)
            curves = {arm: {step: value for step, value in line.items() if step} for arm, line in curves.items()}
        for arm, line in curves.items():
            axes.plot(list(line), list(line.values()), color=looks[arm][0], marker=looks[arm][1],
                      linestyle=LOOKS[list(LOOKS)[arm[0]]][1])
        axes.autoscale_view()
        if curves:
            label(axes, [(arm_in_words(*arm), *list(line.items())[-1], looks[arm][0]) for arm, line in curves.items()])
    return figure, LOOKS


def loss_by_parameters(records):
    """Loss on the examples that were kept for the report, from many trained parameters to few."""
    found = of_each(records, lambda records, name: list(study.reported(records, name).values()), (*LOOKS, *OTHER_SIZES))
    rows = sorted(found, key=lambda name: found[name][0]["trainable_parameters"])
    losses = {name: [record["report_loss"] for record in some] for name, some in found.items()}
    figure, (axes,) = panels(
        "The loss after training, from many trained parameters to few", "Examples kept for the report, best learning "
        "rates, mean of the seeds. Bar: 95 % interval of the difference to LoRA (dashed)", 1, LOSS, "",
        height=24 * len(rows), left=230, right=80)
    axes.set_yticks(range(len(rows)), [
        f"{in_words(name)}{seeds(found[name])}: {amount(found[name][0]['trainable_parameters'])}" for name in rows])
    axes.set_ylim(-0.6, len(rows) - 0.4)
    for row, name in enumerate(rows):
        colour, _, marker = LOOKS[name.partition(",")[0]]
        if "lora" in found and name != "lora" and (beside := study.difference(records, name, "lora")):
            axes.plot([mean(losses["lora"]) + end for end in (beside.low, beside.high)], [row, row], color=colour)
        axes.plot(mean(losses[name]), row, color=colour, marker=marker, markersize=7)
        axes.text(1.02, row, f"{mean(losses[name]):.4f}", transform=axes.get_yaxis_transform(), va="center")
    if "lora" in found:
        axes.axvline(mean(losses["lora"]), color=SOFT, linestyle=DASHED, linewidth=1, zorder=0.5)
    axes.tick_params(axis="y", labelcolor=INK)
    return figure, found


FIGURES = (loss_by_step, lead_by_step, loss_by_rate, loss_by_forgetting, loss_by_parameters, sara_ranks,
           spectra_by_step)


# ---- the command ----------------------------------------------------------------------------------------------------

def svg(figure):
    """The SVG's text: in pixels, in the reader's own font, paths to a hundredth of a pixel."""
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={
        "Title": figure.get_label(), **dict.fromkeys(("Date", "Creator", "Format", "Type"))})
    text = file.getvalue().replace("'DejaVu Sans'", FONTS).replace("<svg ", '<svg role="img" ', 1)
    text = re.sub(r'(width|height)="(\d+)pt"', r'\1="\2"', text, count=2)
    return re.sub(r'(?<= d=")[^"]+', lambda path: re.sub(r"(\.\d\d)\d+", r"\1", path[0]), text)


def main(argv=None):
    parser = Parser(prog="python -m tools.plot", description=__doc__)
    parser.add_argument("--records", type=Path, default=study.RECORDS)
    parser.add_argument("--out", type=Path, default=study.RECORDS.parent, help="folder of the figures")
    args = parser.parse_args(argv)
    try:
        import matplotlib
    except ModuleNotFoundError:
        raise ValueError("figures need matplotlib: python -m pip install matplotlib") from None
    check_folder(args.out, "--out")
    if not args.records.is_file():
        raise ValueError(f"--records {args.records}: no such file: name one that tools.study has made")
    args.out.mkdir(parents=True, exist_ok=True)
    records = read_records(args.records)
    for draw in FIGURES:
        path = args.out / f"{draw.__name__}.svg"
        with matplotlib.rc_context():
            matplotlib.rcdefaults()  # whatever the user's own settings are
            matplotlib.rcParams.update(STYLE)
            try:
                figure, shown = draw(records)
            except Missing as missing:
                print(f"{path}: not drawn, {missing}")
                continue
            path.write_text(svg(figure), encoding="utf-8")
        lacking = ", ".join(name for name in LOOKS if name not in shown)
        print(f"{path}" + f", without {lacking}: no records yet" * bool(lacking))


if __name__ == "__main__":
    run_script(main)
