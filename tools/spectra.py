"""How far runs have moved the weights, seen in their SVD, and the condition of what they train.

    python -m tools.spectra runs/sorsa runs/lora                a table per run: means over layers, by projection
    python -m tools.spectra runs/sorsa --per-layer              a line for every matrix
    python -m tools.spectra runs/* --results spectra.jsonl      appends a line of JSON per run, all layers in it

support/spectra.py says what the numbers are. train.py --spectra-every N has them in the log as a run goes on.
"""
import support

support.interruptible(__name__)  # before torch, which takes seconds to import

import time
from pathlib import Path

import adapter
from eval import SHOWN_EVERY, folder_of, load_run
from support import run_folder, spectra
from support.report import duration
from support.script import Parser, check_folder, choose_device, folder, one_line, run_script
from tools.compare import add_record, rounded
from weights import base_model
from weights.files import read_json

CHOICES = ("lr", "seed", "steps", "gamma", "reduction")  # of a run, as far as it has them
NUMBERS = {"delta_sigma": "Delta Sigma", "delta_d": "Delta D", "change": "|dW|/|W|"}
FROM_START = {"kappa": ("kappa(W_p)", ".6g"), "u_error": ("|U^T U - I|", ".1e"), "v_error": ("|V^T V - I|", ".1e")}


def choices_of(run):
    """{choice: value} that the result.json beside an adapter names; {} where there is none."""
    path = folder_of(run) / run_folder.RESULT
    result = read_json(path) if path.is_file() else {}
    return {key: result[key] for key in CHOICES if result.get(key) is not None}


def measured(args, run):
    """(base, method, {name of a matrix: its numbers}) of a run. ValueError where its method has no spectra."""
    base, method = load_run(run, args.model, args.force)
    originals = None
    if method == "full":  # its adapter is the whole model: W_0 is the base's, loaded again
        fresh = base_model.load(args.model or base.name).model
        originals = spectra.original_matrices(fresh, base.model.adapter_config["targets"])
    if why := spectra.unmeasurable(base.model, originals):
        raise ValueError(f"{run}: {why}")
    base.model.to(choose_device(args.device, "float32")[0])
    layers, total, shown = {}, len(originals or adapter.adapted_layers(base.model)), time.perf_counter()
    for name, numbers in spectra.measure(base.model, originals):
        layers[name] = numbers
        if time.perf_counter() - shown > SHOWN_EVERY:
            shown = time.perf_counter()
            print(f"  {len(layers)}/{total} matrices measured", flush=True)
    return base, method, layers


def by_projection(layers):
    """{kind of matrix: [numbers of its layers]}, then of all."""
    kinds = {}
    for name, numbers in layers.items():
        kinds.setdefault(name.rpartition(".")[2], []).append(numbers)
    return {**kinds, "all": list(layers.values())}


def print_table(layers, per_layer):
    """A line per kind of matrix, means over its layers; with per_layer one per matrix before them."""
    rows = {name.removeprefix("model."): [numbers] for name, numbers in layers.items()} if per_layer else {}
    rows |= by_projection(layers)
    known = spectra.means(rows["all"])
    width, pairs = max(map(len, rows)) + 2, {key: how for key, how in FROM_START.items() if key in known}
    print(f"{'matrix':<{width}}{'layers':>6}" + "".join(f"{title:>13}" for title in NUMBERS.values())
          + "".join(f"{title:>22}" for title, _ in pairs.values()))
    for label, some in rows.items():
        numbers = spectra.means(some)
        shown = [f"{numbers[f'{key}_start']:{form}} -> {numbers[key]:{form}}" for key, (_, form) in pairs.items()]
        print(one_line(f"{label:<{width}}{len(some):>6}" + "".join(f"{numbers[key]:>13.3e}" for key in NUMBERS)
                       + "".join(f"{text:>22}" for text in shown)))


def record(run, base, method, layers):
    """A run as a line of a results file; "layers" holds columns, their order that of the names."""
    rows = [rounded(numbers) for numbers in layers.values()]
    columns = {key: [row[key] for row in rows] for key in rows[0]}
    means = {kind: rounded(spectra.means(some)) for kind, some in by_projection(layers).items()}
    return {"run": folder_of(run).resolve().name, "method": method, "model": base.name, **choices_of(run),
            "means": means, "layers": {"name": list(layers), **columns}}


def main(argv=None):
    parser = Parser(prog="python -m tools.spectra", description=__doc__)
    parser.add_argument("runs", type=folder, nargs="+", metavar="RUN", help="folder that train.py made, or its adapter")
    parser.add_argument("--per-layer", action="store_true", help="a line for every matrix too")
    parser.add_argument("--results", type=Path, metavar="FILE", help="append a line of JSON per run to this file")
    parser.add_argument("--model", help="base model, as in train.py (default: each run's own base)")
    parser.add_argument("--force", action="store_true", help="take adapters although they were trained on another base")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps, which is untried")
    args = parser.parse_args(argv)
    if args.results:
        check_folder(args.results.parent, "--results in")
        if args.results.is_dir():
            parser.error(f"--results {args.results} is a folder: name a file, as in spectra.jsonl")
    for run in args.runs:
        started, chosen = time.perf_counter(), choices_of(run)
        base, method, layers = measured(args, run)
        said = ", ".join([f"{method} on {base.name}", *(f"{key} {value}" for key, value in chosen.items())])
        print(one_line(f"{run}: {said}; {len(layers)} matrices in {duration(time.perf_counter() - started)}"))
        print_table(layers, args.per_layer)
        print(flush=True)
        if args.results:
            args.results.parent.mkdir(parents=True, exist_ok=True)
            add_record(args.results, record(run, base, method, layers))


if __name__ == "__main__":
    run_script(main)
