"""The figures of the study, from a few records that are written here."""
import json
import sys
import xml.etree.ElementTree as ElementTree

import pytest

from support.script import run_script
from tools import plot, study

SVG = "{http://www.w3.org/2000/svg}"
RATES = {name: (middle.replace("3e", "1e"), middle.replace("1e", "3e")) for name, (_, middle) in study.METHODS.items()}
drawn = pytest.mark.peers  # needs matplotlib


def record(name, rate, seed="0", loss=0.8, **more):
    """A record of the study: its losses fall by 0.01 a step to `loss`, its first seed's."""
    losses = [round(loss + 0.01 * left + 0.001 * int(seed), 5) for left in range(11, -1, -1)]
    report = {"report_loss": losses[-1] + 0.02, "report_tokens": [1, 1], "report_losses": [losses[-1], losses[-1] + 0.04]}
    return {"name": name, "flags": " ".join(study.job(name, study.METHODS[name][0], rate, seed).flags), "method": name,
            "lr": float(rate), "seed": int(seed), "held_out_before": 1.4, "held_out_after": losses[-1], "losses": losses,
            "forgot": float(rate) / 2, "trainable_parameters": 10**8 if name == "full" else 1_200_000,
            "adapter": {"threshold": 0.018} if name == "sara" else {}, **(report if seed != "0" else {}), **more}


def diverged(name, rate):
    return {"name": name, "flags": record(name, rate)["flags"], "error": "step 3: loss nan: lower --lr"}


def spectra(height, *keys):
    return {"spectra": {step: dict.fromkeys(keys, height * (1 + int(step))) for step in ("0", "8", "16")}}


def arm(name, rate="1e-4", height=1e-3, **more):
    """A record of one of SORSA's arms, or of another method, with spectra."""
    method = name.partition(",")[0]
    keys = ["delta_sigma", "delta_d"] + ["kappa"] * (method in ("pissa", "sorsa")) + ["u_error", "v_error"] * (method == "sorsa")
    return {**record(method, rate, "1"), "name": name, **spectra(height, *keys), **more}


def study_of_all():
    """Two rates of each method, the lower one better; three seeds there; runs that diverged; ranks; spectra."""
    records = []
    for place, (name, rates) in enumerate(RATES.items()):
        more = {"ranks": {"q_proj": [1, 2, 6], "v_proj": [4, 4, 4]}} if name == "sara" else {}
        records += [record(name, rate, loss=0.8 + 0.01 * place + 0.2 * i, **more) for i, rate in enumerate(rates)]
        records += [record(name, rates[0], seed, 0.8 + 0.01 * place) for seed in study.SEEDS]
    records += [diverged("lotr", "3e-1"), record("cora", "1e0", loss=5.0)]
    records += [arm(f"sorsa, gamma {gamma}", height=height, gamma=float(gamma)) for gamma, height in (("0", 1e-2), ("4e-5", 1e-6))]
    records += [arm("sorsa, sum", gamma=4e-4), arm("pissa"), arm("lora", "1e-3")]
    return [*records, {**record("sara", RATES["sara"][0], "1"), "name": "sara, q and v"}]


@pytest.fixture
def draw(tmp_path):
    """draw(records) -> {name of a figure: its text}, as the command makes them."""
    pytest.importorskip("matplotlib")

    def run(records):
        path, out = tmp_path / "study.jsonl", tmp_path / "figures"
        path.write_text("".join(json.dumps(line) + "\n" for line in records))
        plot.main(["--records", str(path), "--out", str(out)])
        return {file.stem: file.read_text(encoding="utf-8") for file in sorted(out.iterdir())}
    return run


@pytest.fixture
def panels():
    """panels(function, records) -> {title: axes} of a figure."""
    pytest.importorskip("matplotlib")
    return lambda function, records: {axes.get_title("left"): axes for axes in function(records)[0].axes}


def lines(axes):
    """[(x, y)] of the lines in a panel."""
    return [([round(float(x), 6) for x in line.get_xdata()], [round(float(y), 6) for y in line.get_ydata()]) for line in axes.lines]


def test_without_matplotlib_the_message_names_what_to_install(monkeypatch, capsys, tmp_path):
    """One line, exit status 2, nothing written."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit) as stopped:
        run_script(lambda: plot.main(["--out", str(tmp_path / "figures")]))
    assert stopped.value.code == 2 and not (tmp_path / "figures").exists()
    assert capsys.readouterr().err == "error: figures need matplotlib: python -m pip install matplotlib\n"


@drawn
def test_every_figure_is_a_small_svg_with_its_names_as_text(draw, capsys):
    """With a title that is not only seen; of all methods, in words of the reader's font."""
    figures = draw(study_of_all())
    assert list(figures) == sorted(function.__name__ for function in plot.FIGURES)
    assert "yet" not in capsys.readouterr().out
    for name, text in figures.items():
        root = ElementTree.fromstring(text)
        said = [element.text for element in root.iter(f"{SVG}text")]
        assert root.get("width") == "880" and root.find(f"{SVG}title").text in said and len(text) < 100_000
        assert "Helvetica" in text and "DejaVu" not in text
        if name not in ("sara_ranks", "spectra_by_step"):
            assert all(any(method in words for words in said) for method in plot.NAMES.values())


@drawn
def test_the_same_records_give_the_same_bytes(draw):
    """Whatever matplotlib's settings are on a machine; they are left as they are."""
    figures, settings = draw(study_of_all()), {"font.size": 30, "axes.facecolor": "red", "svg.fonttype": "path"}
    import matplotlib
    with matplotlib.rc_context(settings):
        assert draw(study_of_all()) == figures
        assert {name: matplotlib.rcParams[name] for name in settings} == settings


@drawn
def test_nothing_is_written_over_another_thing_or_beyond_the_card(draw, monkeypatch):
    """Measured in matplotlib's own font, which is wider than those that readers have."""
    from matplotlib.text import Text
    written, write = {}, Text.draw

    def noted(text, renderer, *others, **more):
        if text.get_visible() and text.get_text().strip():
            figure = text.get_figure()
            written.setdefault(figure, (figure.bbox.frozen(), []))[1].append(
                (text.get_text(), Text.get_window_extent(text, renderer).padded(-1)))
        write(text, renderer, *others, **more)
    monkeypatch.setattr(Text, "draw", noted)
    draw(study_of_all())
    assert len(written) == len(plot.FIGURES)
    for figure, (card, texts) in written.items():
        for place, (words, box) in enumerate(texts):
            assert card.x0 <= box.x0 and box.x1 <= card.x1 and card.y0 <= box.y0 and box.y1 <= card.y1, words
            assert not [other for other, its in texts[:place] if box.overlaps(its)], (figure.get_label(), words)


@drawn
def test_losses_are_means_over_the_seeds(panels):
    """Of the last eight steps, for LoRA and the method; the lead is the difference on the same seed."""
    records = [record("lora", "1e-3"), record("sara", "1e-2")]
    records += [record("lora", "1e-3", seed, 0.7) for seed in ("1", "2")] + [record("sara", "1e-2", seed, 0.9) for seed in ("1", "2")]
    records.append(record("sara", "3e-2", "3", 0.1))  # not at the best rate
    axes = panels(plot.loss_by_step, records)["SARA"]
    # steps 5 .. 12 lie 0.07 .. 0 above the last, 0.035 on average, and each eight before them 0.01 higher; the two seeds
    # add 0.001 and 0.002, 0.0015 on average
    falling = [0.0765, 0.0665, 0.0565, 0.0465, 0.0365]
    assert lines(axes) == [(list(range(8, 13)), [round(0.7 + y, 6) for y in falling]),
                           (list(range(8, 13)), [round(0.9 + y, 6) for y in falling])]
    assert axes.get_title("right") == "at 1e-2, 2/3 seeds"
    (zero, lead) = lines(panels(plot.lead_by_step, records)["SARA"])
    assert zero[1] == [0, 0] and lead == (list(range(8, 13)), [0.2] * 5)


@drawn
def test_a_run_that_diverged_is_a_cross_at_the_top(panels):
    """One that ends 0.3 above the lowest loss or higher, a bar; the best is filled and named."""
    records = [record("lora", "1e-3", loss=0.9), record("lotr", "1e-3", loss=0.8), record("lotr", "1e-2", loss=2.0),
               diverged("lotr", "1e-1")]
    axes = panels(plot.loss_by_rate, records)["LoTR"]
    marked = {line.get_marker(): (line.get_xdata()[0], round(line.get_ydata()[0], 6), line.get_markerfacecolor())
              for line in axes.lines if line.get_color() == plot.LOOKS["lotr"][0] and len(line.get_xdata()) == 1}
    assert marked == {">": (0.001, 0.8, plot.LOOKS["lotr"][0]), "_": (0.01, 1.1, "white"), "x": (0.1, 1.1, "white")}
    assert axes.get_title("right") == "0.800 at 1e-3"


@drawn
def test_ranks_spectra_and_sizes_are_those_of_the_records(panels):
    """Bars of k and their mean; means over the seeds of an arm; a row for each size, the largest above."""
    records = study_of_all()
    q = panels(plot.sara_ranks, records)["q_proj"]
    assert [bar.get_height() for bar in q.patches] == [1, 2, 6] and lines(q)[0][1] == [3, 3]
    second = arm("full", height=3e-3)
    second["flags"] = second["flags"].replace("--seed 1", "--seed 2")
    grid = panels(plot.spectra_by_step, [*records, arm("full"), second])
    turn, kappa, distance = [grid[words] for words in list(plot.SPECTRA)[1:]]
    assert ([8, 16], [0.018, 0.034]) in lines(turn)  # full: seeds of 1e-3 and 3e-3
    assert ([0, 8, 16], [0, 800, 1600]) in lines(kappa)  # in %
    assert [len(lines(axes)) for axes in (turn, kappa, distance)] == [6, 4, 3]
    assert {text.get_text() for text in distance.texts} == {"SORSA, γ 0, lr 1e-4", "SORSA, γ 4e-5, lr 1e-4",
                                                        "SORSA, sum, lr 1e-4"}
    (axes,) = plot.loss_by_parameters(records)[0].axes
    rows = [text.get_text() for text in axes.get_yticklabels()]
    assert rows[-1] == "Full: 100M" and "SARA, q and v, 1/3 seeds: 1.2M" in rows and len(rows) == 10
    assert ([round(0.8 + 0.022, 6)], [9]) in lines(axes)  # Full: of 0.821, 0.822, 0.823
    interval = study.difference(records, "full", "lora")
    lora = (0.8 + 0.81 + 0.81) / 3 + 0.002 + 0.02  # the first seed's is that of the arm
    assert ([round(lora + interval.low, 5), round(lora + interval.high, 5)], [9, 9]) in [
        ([round(x, 5) for x in xs], ys) for xs, ys in lines(axes)]
    assert sum(len(xs) == 2 for xs, _ in lines(axes)) == 10  # nine bars, of all but LoRA, and its own dashed line


@drawn
def test_what_the_records_lack_is_named_and_not_fatal(draw, capsys):
    """No records at all; one method's; a method that has only diverged."""
    assert draw([]) == {}
    assert capsys.readouterr().out.count(": not drawn, ") == len(plot.FIGURES)
    figures = draw([record("lora", "1e-3"), diverged("sara", "1e-1")])
    said = capsys.readouterr().out.splitlines()
    assert list(figures) == ["loss_by_forgetting", "loss_by_rate"]
    assert [line.partition(".svg")[2] for line in said if "loss_by_rate" in line] == [
        ", without full, pissa, sorsa, mosara, cora, cora-init, lotr: no records yet"]
    assert draw([diverged("lora", "1e-1")])


@pytest.mark.parametrize("heights, moved", [([], []), ([5], [5]), ([0, 3], [0, 3]), ([1, 1], [0.5, 1.5]), ([3, 0.1, 0], [3, 0.55, -0.45])])
def test_labels_are_moved_as_little_as_it_takes(heights, moved):
    """Those that are apart stay where they are."""
    assert plot.apart(heights, 1) == pytest.approx(moved)
