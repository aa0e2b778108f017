"""The house: which room may use which, what stands alone, and what a fork costs."""
import ast
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from methods import FILES
from tests.toy import write_sums

ROOT = Path(__file__).resolve().parent.parent
# From the ground up: what stands in one of these may use what stands in those before it, and its own.
ROOMS = [["adapter", "model"], [*FILES, "methods"], ["weights"], ["data"], ["support"], ["train", "eval"], ["tools"]]
FLOOR = {room: number for number, rooms in enumerate(ROOMS) for room in rooms}
SOURCES = [path for path in ROOT.rglob("*.py") if path.relative_to(ROOT).parts[0].removesuffix(".py") in FLOOR]


def imported(path):
    """The modules that a file imports, by their full names."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def run(folder, *arguments):
    """The output of a Python command in a folder; its last words where it fails."""
    done = subprocess.run([sys.executable, *map(str, arguments)], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_room_imports_upwards(path):
    """Arrows go one way: tools -> train, eval -> support -> data -> weights -> methods -> adapter, model."""
    here = FLOOR[path.relative_to(ROOT).parts[0].removesuffix(".py")]
    above = {name for name in imported(path) if FLOOR.get(name.split(".")[0], -1) > here}
    assert not above


def test_the_ground_floor_needs_torch_alone():
    """adapter.py and model.py import torch and the standard library; the top level has at most 12 files."""
    for name in ("adapter.py", "model.py"):
        others = {root for root in (module.split(".")[0] for module in imported(ROOT / name)) if root not in sys.stdlib_module_names}
        assert others == {"torch"}
    assert len(list(ROOT.glob("*.py"))) <= 12


@pytest.mark.parametrize("file", [file for file in FILES if file != "full"])
def test_a_method_file_runs_where_it_is_copied_with_adapter_py(file, tmp_path):
    """Alone in a folder (PiSSA and CoRA with lora.py) it shows the method: the base at step 0, a loss that falls, what stayed."""
    for name in {file, "adapter", *(["lora"] if file in ("pissa", "cora") else [])}:
        shutil.copy(ROOT / f"{name}.py", tmp_path)
    shown = run(tmp_path, f"{file}.py")
    assert all(float(difference) < 1e-5 for difference in re.findall(r"\|output - base's\| (\S+)", shown))
    losses = re.findall(r"loss (\S+) -> (\S+) in", shown)
    assert losses and all(float(last) < 0.8 * float(first) for first, last in losses)
    assert shown.count("frozen by 0.0e+00\n") == len(losses)
    assert all(float(difference) < 1e-5 for difference in re.findall(r"\|merged - trained\| (\S+),", shown))
    assert len(re.findall("^merge|^no merge", shown, re.MULTILINE)) == len(losses)


# ---- forks ----------------------------------------------------------------------------------------------------------

@pytest.fixture
def fork(tmp_path):
    """A copy of the repository's code."""
    for path in SOURCES:
        copied = tmp_path / "fork" / path.relative_to(ROOT)
        copied.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copied)
    return tmp_path / "fork"


def change(path, before, after):
    """Replace one place in a file."""
    text = path.read_text()
    assert text.count(before) == 1
    path.write_text(text.replace(before, after))


DORA = '''"""DoRA (arXiv 2402.09353): W = m * (W0 + B A) / |W0 + B A|, row by row. Its change has no low rank."""
import torch

import adapter


class DoRALinear(adapter.AdaptedLinear):
    def __init__(self, linear, A, B):
        super().__init__(linear)
        self.A, self.B = self.factor(A), self.factor(B)
        self.m = self.factor(linear.weight.norm(dim=1))

    def direction(self):
        return self.weight + self.B.to(self.weight) @ self.A.to(self.weight)

    def forward(self, x):
        V = self.direction()
        return x @ (self.m[:, None] * V / V.norm(dim=1, keepdim=True)).to(x).T

    def delta(self):
        V = self.direction()
        return self.m[:, None] * V / V.norm(dim=1, keepdim=True) - self.weight


def attach(model, rank: int = 4, targets: list = adapter.TARGETS, shrink: float = 1.0, seed: int = 0):
    linears = adapter.find_linears(model, targets, rank)
    adapter.freeze(model)
    generator = torch.Generator().manual_seed(seed)
    for name, linear in linears:
        A = shrink * adapter.uniform_factor(rank, linear.in_features, generator)
        adapter.replace(model, name, DoRALinear(linear, A, torch.zeros(linear.out_features, rank)))
    adapter.record(model, "dora", rank=rank, targets=list(targets), shrink=shrink, seed=seed)


METHODS = {"dora": adapter.Method(attach, learning_rate=2e-3, help={"shrink": "factor of A at the start"})}
'''


def test_a_new_method_is_one_file_and_one_line(fork, tiny_gguf, tmp_path):
    """DoRA, which has no lora_factors: its flag, help and rate are there, it trains, saves, loads, merges, evaluates."""
    (fork / "dora.py").write_text(DORA)
    change(fork / "methods.py", '    "lotr",\n', '    "lotr",\n    "dora",\n')
    data = write_sums(tmp_path / "sums")
    assert re.search(r"--shrink SHRINK\s+factor of A at the start \(default:\s+1\)", run(fork, "train.py", "--help"))
    said = run(fork, "train.py", "--method", "dora", "--shrink", "0.5", "--model", tiny_gguf, "--data", data, "--steps", 3,
               "--held-out", 4, "--no-sample", "--out", tmp_path / "run")
    assert "dora, rank 4, shrink 0.5" in said and "peak lr 0.002" in said
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["adapter"]["shrink"] == 0.5 and result["held_out_after"] < result["held_out_before"]
    assert "method dora" in run(fork, "eval.py", tmp_path / "run", "--limit", 2, "--max-new", 4)
    code = f"""
import adapter, torch
from weights import adapter_file, base_model
base = base_model.load({str(tiny_gguf)!r}).model
adapter_file.load(base, {str(tmp_path / "run" / "adapter.safetensors")!r})
before = base(torch.arange(9)[None])
adapter.merge(base)
assert torch.allclose(base(torch.arange(9)[None]), before, atol=1e-4) and not adapter.adapted_layers(base)
"""
    run(fork, "-c", code)


def test_names_and_lists_of_a_fork(fork, tiny_gguf, tmp_path):
    """A method whose name has capitals, an argument that is a list."""
    (fork / "dora.py").write_text(DORA.replace('"dora"', '"DoRA"').replace("shrink: float = 1.0", 'words: list = ("a", "b")')
                                  .replace("shrink * adapter", "adapter").replace("shrink=shrink", "words=list(words)"))
    change(fork / "methods.py", '    "lotr",\n', '    "lotr",\n    "dora",\n')
    run(fork, "train.py", "--method", "dora", "--words", "x,y", "--model", tiny_gguf, "--data", write_sums(tmp_path / "sums"),
        "--held-out", 4, "--steps", 1, "--no-sample", "--out", tmp_path / "run")
    assert json.loads((tmp_path / "run" / "result.json").read_text())["adapter"]["words"] == ["x", "y"]


def test_what_a_fork_forgets_to_record_is_said_before_training(fork, tiny_gguf, tmp_path):
    """An argument without a kind would make an adapter that cannot be loaded: refused at once, in a line."""
    (fork / "dora.py").write_text(DORA.replace("shrink: float = 1.0", "shrink=None").replace("shrink * adapter", "adapter"))
    change(fork / "methods.py", '    "lotr",\n', '    "lotr",\n    "dora",\n')
    done = subprocess.run([sys.executable, "train.py", "--method", "dora", "--model", tiny_gguf, "--data", write_sums(tmp_path / "sums"),
                           "--held-out", "4"], cwd=fork, capture_output=True, text=True)
    assert done.returncode == 2 and "dora has no setting shrink; end attach with adapter.record" in done.stderr
    assert done.stderr.count("\n") == 1 and not (fork / "runs").exists()


@pytest.mark.parametrize("optimizer", ["SGD(decay_groups(model, args.weight_decay), lr=args.lr, momentum=0.9)", "SGD(decay_groups(model, args.weight_decay), lr=args.lr)",
                                       "Adafactor(decay_groups(model, args.weight_decay), lr=args.lr)"])
def test_a_new_optimizer_is_one_line_with_resume(fork, tiny_gguf, tmp_path, optimizer):
    """The plan names it; from its checkpoint a run goes on to the same adapter, to the last bit. A run cannot change it."""
    change(fork / "train.py", "AdamW(decay_groups(model, args.weight_decay), lr=args.lr, fused=True)", optimizer)
    keep = ("import shutil, sys, train, support.resume as r; save = r.save\n"
            f"def keep(path, *a):\n r.save = save; save(path, *a); shutil.copytree(path.parent, {str(tmp_path / 'parts')!r})\n"
            "r.save = keep; train.main(sys.argv[1:])")
    assert f"{optimizer.partition('(')[0]}, peak lr 0.05" in run(
        fork, "-c", keep, "--method", "lora", "--lr", "0.05", "--model", tiny_gguf, "--data", write_sums(tmp_path / "sums"),
        "--held-out", 4, "--no-sample", "--steps", 4, "--save-every", 2, "--out", tmp_path / "whole")
    assert (tmp_path / "parts" / "checkpoint.safetensors").exists()
    other = subprocess.run([sys.executable, "train.py", "--resume", tmp_path / "parts"], cwd=ROOT, capture_output=True, text=True)
    assert other.returncode == 2 and f"began with {optimizer.partition('(')[0]}, train.py now has AdamW" in other.stderr
    run(fork, "train.py", "--resume", tmp_path / "parts")
    assert (tmp_path / "parts" / "adapter.safetensors").read_bytes() == (tmp_path / "whole" / "adapter.safetensors").read_bytes()


def test_a_new_number_in_the_log_is_one_line(fork, tiny_gguf, tmp_path):
    """It comes into log.jsonl and into the printed line."""
    change(fork / "train.py", "        monitor.check(step, indices, numbers)\n",
           '        numbers["largest"] = max(p.abs().max() for p in parameters)\n        monitor.check(step, indices, numbers)\n')
    said = run(fork, "train.py", "--method", "lora", "--model", tiny_gguf, "--data", write_sums(tmp_path / "sums"), "--held-out", 4,
               "--no-sample", "--steps", 1, "--out", tmp_path / "run")
    line = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[1])
    assert f"largest {line['largest']:.4g}  " in said
