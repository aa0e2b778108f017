"""The spectra of finished runs, of every method, on the tiny model."""
import json

import numpy as np
import pytest

import adapter
from eval import load_run
from methods import METHODS
from tests.runs import Place, begin, trace
from tools import spectra
from weights import base_model

# {name of a run: its method and flags}
RUNS = {**{method: [method] for method in METHODS if method != "mosara"}, "full-qu": ["full", "--targets", "q_proj,up_proj"]}


@pytest.fixture(scope="module")
def runs(tiny_gguf, tmp_path_factory):
    """A folder with runs of three steps, their spectra in their logs."""
    place = Place(tmp_path_factory.mktemp("spectra"), tiny_gguf)
    for name, flags in RUNS.items():
        begin([*place.flags(*flags), "--steps", "3", "--save-every", "3", "--spectra-every", "3"], place.folder / name)
    return place.folder


@pytest.fixture(scope="module")
def records(runs):
    """{name of a run: the line that --results has written}."""
    results = runs / "results" / "all.jsonl"
    spectra.main([*(str(runs / name) for name in RUNS), "--results", str(results), "--device", "cpu"])
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    assert [(line["run"], line["method"]) for line in lines] == [(name, flags[0]) for name, flags in RUNS.items()]
    return {line["run"]: line for line in lines}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_loaded_again_has_moved_as_its_log_says(name, runs, records):
    """The means are those of the log's last line; the lines name what the run was."""
    logged = [line for line in trace(runs / name) if "spectra" in line][-1]
    record = records[name]
    assert logged["step"] == 3 and record["means"]["all"] == pytest.approx(logged["spectra"], rel=1e-3, abs=1e-9)
    result = json.loads((runs / name / "result.json").read_text())
    assert (record["lr"], record["seed"], record["steps"]) == (result["lr"], 0, 3)
    assert ("gamma" in record) == (name == "sorsa") and record["means"]["all"]["delta_d"] > 1e-8


@pytest.mark.parametrize("run", RUNS)
def test_layer_by_layer_it_is_numpys(run, runs, records, tiny_gguf):
    """Columns of six digits, one entry per adapted matrix: Delta Sigma and |dW|/|W| of the base's and the merged weights."""
    layers = records[run]["layers"]
    base, model = base_model.load(str(tiny_gguf)).model, load_run(runs / run, None)[0].model
    targets = model.adapter_config["targets"] or adapter.TARGETS
    names = [name for name in dict(model.named_modules()) if name.rpartition(".")[2] in targets]
    assert layers["name"] == names and all(len(column) == len(names) for column in layers.values())
    adapter.merge(model)
    for i, name in enumerate(names):
        W_0, W_t = (some.get_submodule(name).weight.detach().double().numpy() for some in (base, model))
        s_0, s_t = (np.linalg.svd(W, compute_uv=False) for W in (W_0, W_t))
        assert layers["delta_sigma"][i] == pytest.approx(abs(s_t - s_0).mean(), rel=1e-3, abs=1e-7)
        assert layers["change"][i] == pytest.approx(np.linalg.norm(W_t - W_0) / np.linalg.norm(W_0), rel=1e-3, abs=1e-7)
    numbers = [number for column in layers.values() for number in column if isinstance(number, float)]
    assert all(number == float(f"{number:.6g}") for number in numbers)


def test_the_means_are_over_the_layers_of_a_projection(records):
    """Of the two layers of each of the seven, and of all."""
    record = records["sorsa"]
    assert set(record["means"]) == {*adapter.TARGETS, "all"}
    for kind, means in record["means"].items():
        rows = [i for i, name in enumerate(record["layers"]["name"]) if kind in ("all", name.rpartition(".")[2])]
        assert len(rows) == (14 if kind == "all" else 2)
        for key, value in means.items():
            column = [record["layers"][key.removesuffix("_max")][i] for i in rows]
            assert value == pytest.approx(max(column) if key.endswith("_max") else sum(column) / len(rows), rel=1e-4, abs=1e-12)


def test_the_tables(runs, records, capsys):
    """A run after the other, kappa and errors where there is a principal part; with --per-layer every matrix; results are added."""
    results = runs / "results" / "more.jsonl"
    for _ in range(2):
        spectra.main([str(runs / "sorsa"), str(runs / "lora" / "adapter.safetensors"), "--per-layer", "--results", str(results)])
    assert [json.loads(line)["run"] for line in results.read_text().splitlines()] == ["sorsa", "lora"] * 2
    first, second = [text.splitlines() for text in capsys.readouterr().out.split("\n\n")[:2]]
    said = "lr 0.01, seed 0, steps 3, gamma 0.0004, reduction mean; 14 matrices"
    assert first[0].startswith(f"{runs / 'sorsa'}: sorsa on ") and said in first[0]
    assert "kappa(W_p)" in first[1] and "|V^T V - I|" in first[1] and "kappa" not in second[1]
    assert len(first) == len(second) == 2 + 14 + 7 + 1 and first[2].startswith("layers.0.self_attn.q_proj ")
    means = records["sorsa"]["means"]["all"]
    assert first[-1].split() == ["all", "14", *(f"{means[key]:.3e}" for key in ("delta_sigma", "delta_d", "change")),
                                 f"{means['kappa_start']:.6g}", "->", f"{means['kappa']:.6g}",
                                 *(word for key in ("u_error", "v_error")
                                   for word in (f"{means[f'{key}_start']:.1e}", "->", f"{means[key]:.1e}"))]


def test_a_base_of_zeros_has_no_table():
    """Said in one line, as by train.py --spectra-every."""
    with pytest.raises(ValueError, match="^all adapted matrices of the base are zero: there are no singular vectors to compare$"):
        spectra.print_table({}, per_layer=False)
