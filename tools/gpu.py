"""What to learn on a GPU that is at hand for minutes: `python -m tools.bench gpu --minutes 7 --results FILE`.

Parts, the most valuable first, each in a process of its own with a time limit; every fact is a JSON line that is on
disk at once. What fails, takes too long or no longer fits is a line too. At the end each target stands as met, not met
or not measured. The command needs no file: its model has the default's shape and random weights, its rows GSM-8K's
lengths (see LENGTHS). With --real the default model, or --model FILE, is trained on GSM-8K for an epoch by each method
as a user would, and answers the test problems. --tiny rehearses either on a CPU.
"""
import support

support.interruptible(__name__)  # before torch, which takes seconds to import

import argparse
import contextlib
import gc
import importlib.util
import itertools
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

import adapter
import train
from methods import METHODS
from model import Config
from support import fast, graphs, report, run_folder
from support.generate import generate, generate_batch
from support.script import Parser, above_zero, is_out_of_memory, run_script
from tools.bench import (DEVICE, PEERS, ROOT, attach, device_name, matmul_rate, our_steps, peer_steps,
                         random_weights, seconds)
from weights import adapter_file, base_model
from weights.files import read_json

# (tokens, of which prompt) of GSM-8K's 7468 training problems of at most 512 tokens: each 2.5th percentile of the
# first, with the usual share of a prompt. Between them a line: on average 190 tokens, 125 of them answer, as the data.
LENGTHS = ((71, 30), (95, 40), (103, 42), (109, 44), (114, 46), (119, 47), (123, 48), (128, 49), (132, 52), (135, 51),
           (139, 53), (143, 53), (146, 54), (151, 56), (154, 56), (158, 58), (162, 61), (165, 60), (169, 62), (173, 62),
           (177, 63), (182, 62), (186, 65), (190, 65), (195, 67), (201, 70), (206, 69), (211, 70), (217, 71), (222, 71),
           (228, 74), (234, 77), (242, 78), (250, 82), (260, 83), (272, 89), (285, 87), (301, 92), (322, 93), (351, 97),
           (505, 138))
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
DATA = "random tokens, rows of GSM-8K's lengths"
EPOCH, PROBLEMS = 7468, 1319
LEAST = 10  # seconds: no part is begun with less
SHAPE = dict(vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
             num_key_value_heads=3, head_dim=64, rope_theta=1e5, max_position_embeddings=8192, tie_word_embeddings=True)
LLAMA_7B = dict(vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
                num_attention_heads=32, num_key_value_heads=32, head_dim=128)
TINY = dict(vocab_size=512, hidden_size=96, intermediate_size=128, num_hidden_layers=2, num_attention_heads=3,
            num_key_value_heads=1, head_dim=32)


class Task:
    """What a part is given: sizes, and where its facts go."""

    def __init__(self, name, args):
        self.name, self.args, self.tiny = name, args, args.tiny
        self.batches = (4, 3, 2) if args.tiny else (172, 86, 32)
        self.epoch, self.problems, self.max_new = (24, 5, 4) if args.tiny else (EPOCH, PROBLEMS, 256)

    def fact(self, **values):
        note(self.args, self.name, values)

    def model(self, dtype=DTYPE, device=DEVICE, **changes):
        return random_weights(Config(**{**SHAPE, **(TINY if self.tiny else {}), **changes}), dtype, device)

    def examples(self, count):
        """[(ids, prompt length)]: their lengths are GSM-8K's, spread over `count` rows."""
        rng, rows = random.Random(0), []
        for i in range(count):
            place, share = divmod((i + 0.5) / count * (len(LENGTHS) - 1), 1)
            (n, p), (more, q) = LENGTHS[int(place):int(place) + 2]
            n, p = round(n + share * (more - n)), round(p + share * (q - p))
            rows.append(([rng.randrange(512) for _ in range(n)], p))
        return rng.sample(rows, count)


def note(args, part, values):
    """Print a fact, and put it on disk at once."""
    line = json.dumps({"what": "gpu", "part": part, "data": DATA, **values, "device": device_name(),
                       "torch": torch.__version__, "command": args.command})
    print(f"{part:<10} " + "  ".join(f"{key} {value}" for key, value in values.items()), flush=True)
    with open(args.results, "a") as file:
        file.write(line + "\n")
        file.flush()
        os.fsync(file.fileno())


def settings(side, batch, **more):
    """The arguments that bench's steps take."""
    return argparse.Namespace(**{"side": side, "batch": batch, "dtype": str(DTYPE).removeprefix("torch."),
                                 "params": None, "rank": 16, "recompute": False, "compile": False, "graphs": "off",
                                 **more})


def clean():
    """Nothing of the case before is left on the GPU, nor counts in the peak of the next."""
    gc.collect()  # a recorded model refers to itself
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def measured(steps):
    """Real tokens per second of the steps but the first, and the peak; the first is waited for and not counted."""
    warm_up, tokens = seconds(lambda: next(steps)), []
    elapsed = seconds(lambda: tokens.extend(steps))
    return {"tokens_per_second": round(sum(tokens) / elapsed), "seconds": round(elapsed, 3), "tokens": sum(tokens),
            "warm_up_seconds": round(warm_up, 3), "memory_gb": round(report.peak_memory(DEVICE), 2)}


@contextlib.contextmanager
def recordings():
    """A list of how long each recording takes that is made in the block, in seconds."""
    make, spent = graphs.Recording.__init__, []
    graphs.Recording.__init__ = lambda *arguments: spent.append(seconds(lambda: make(*arguments)))
    try:
        yield spent
    finally:
        graphs.Recording.__init__ = make


def cases(task, sides, batches, steps, **more):
    """Train on each side at each batch, an epoch or at most `steps` steps: a fact each; memory that runs out is one."""
    examples = task.examples(task.epoch)
    for side, batch in itertools.product(sides, batches):
        args = settings(side, batch, steps=min(steps, task.epoch // batch), **more)
        case = {"side": side, "batch": batch, "steps": args.steps, "graphs": args.graphs, "compiled": args.compile}
        try:
            model = task.model(torch.float32 if side == "full" else DTYPE)
            with recordings() as spent:
                result = measured((peer_steps if side in PEERS else our_steps)(args, model, examples))
            if args.steps == task.epoch // batch:
                result["epoch_seconds"] = result["seconds"]
            if side not in PEERS:
                per_token = report.gflop_per_token(model, examples, args.compile)[1]
                result["gflops"] = round(result["tokens_per_second"] * per_token)
            if spent[1:]:  # the first is the warm-up's
                result.update(shapes_recorded=len(spent) - 1, recording_seconds=round(sum(spent[1:]), 2))
            task.fact(**case, **result)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            task.fact(**case, failed="out of memory")
        model = None
        clean()


# ---- the parts ------------------------------------------------------------------------------------------------------

def machine(task):
    """Versions; the limits: matrix products, copying, starting an operator."""
    sizes = (256, 256) if task.tiny else (8192, 4096)
    rates = [round(matmul_rate(DEVICE, dtype, size)) for dtype, size in zip((torch.bfloat16, torch.float32), sizes)]
    x, y = (torch.empty(1 << (18 if task.tiny else 28), device=DEVICE) for _ in range(2))
    copied = min(seconds(lambda: y.copy_(x)) for _ in range(5))
    small = torch.ones(8, device=DEVICE)
    started = seconds(lambda: [small.add_(1) for _ in range(2000)]) / 2000
    task.fact(python=sys.version.split()[0], cuda=torch.version.cuda, cudnn=torch.backends.cudnn.version(),
              cpus=os.cpu_count(), bf16_gflops=rates[0], fp32_gflops=rates[1],
              copy_gb_per_second=round(8e-9 * x.numel() / copied), start_us=round(1e6 * started, 2))


def small(task, method=None):
    """A model in fp32 on the CPU, the same each time, with a method attached and its parameters moved."""
    shape = dict(TINY, hidden_size=128, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=3)
    model = task.model(torch.float32, "cpu", **shape)
    if method:
        METHODS[method].attach(model, **SMALL.get(method, {"rank": 8}))
        with torch.no_grad():
            for p in adapter.trainable(model).values():
                p += 0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
    return model


def correct(task):
    """Every method on this device against the same on a CPU in fp32: the loss, its gradients; then five steps, a file
    and back, merging, and a text."""
    examples = [(ids[:40], 9) for ids, _ in task.examples(4)]
    for method in METHODS:
        reference = small(task, method)
        loss, exact = gradient(reference, examples)
        result, state = {}, {name: x.clone() for name, x in adapter.state(reference).items()}
        for dtype in (torch.float32, torch.bfloat16):
            weights = torch.float32 if method == "full" else dtype
            autocast = "bfloat16" if weights != dtype else None
            model = small(task).to(DEVICE)
            adapter_file.attach_saved(model, Path("the CPU's"), state, dict(reference.adapter_config))
            adapter.cast_frozen(model, weights)
            found, g = gradient(model, examples, autocast)
            result[str(dtype).removeprefix("torch.")] = [abs(found / loss - 1), distance(g, exact)]
        losses = few_steps(model, method, examples, autocast)
        ids = torch.tensor([examples[0][0]], device=DEVICE)
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            adapter_file.save(model, Path(folder) / "x.safetensors")
            loaded, logits = small(task).to(DEVICE), model(ids).float()
            adapter_file.load(loaded, Path(folder) / "x.safetensors")
            adapter.cast_frozen(loaded, weights)
            result["loaded"] = distance(loaded(ids).float(), logits)
            if method != "mosara":
                adapter.merge(model)
            result["merged"] = distance(model(ids).float(), logits)
        text = generate_batch(model, [examples[0][0], [3, 4, 5]], -1, 8)
        sound = (losses[-1] < losses[0] and result["float32"][1] < 1e-3 and result["bfloat16"][1] < 0.2
                 and max(result["loaded"], result["merged"]) < 0.05 and [len(ids) for ids in text] == [8, 8])
        task.fact(method=method, sound=sound, losses=losses, **result)


SMALL = {"full": {}, "sara": {"threshold": 0.3}, "mosara": {"threshold": 0.3}}  # the others: rank 8


def gradient(model, examples, autocast=None):
    """(the loss of these examples, all that trains has of gradient in one vector on the CPU)."""
    args = argparse.Namespace(micro_batch=len(examples), multiple=fast.CUDA_MULTIPLE, autocast=autocast)
    loss = train.accumulate_gradients(args, model, examples).item()
    found = torch.cat([p.grad.float().cpu().flatten() for p in adapter.trainable(model).values()])
    model.zero_grad()
    return loss, found


def distance(found, exact):
    return ((found - exact).norm() / exact.norm()).item()


def few_steps(model, method, examples, autocast):
    """The losses of five steps, AdamW at a tenth of the method's rate."""
    args = argparse.Namespace(micro_batch=2, multiple=fast.CUDA_MULTIPLE, autocast=autocast)
    rate, losses = METHODS[method].learning_rate, []
    optimizer = torch.optim.AdamW(adapter.trainable(model).values(), lr=rate / 10, fused=True)
    for _ in range(5):
        losses.append(train.accumulate_gradients(args, model, examples).item())
        if METHODS[method].regularize:
            METHODS[method].regularize(model, rate)
        optimizer.step()
        optimizer.zero_grad()
    return losses


def step(task):
    """A step as written, on the same examples each time, so that nothing is set up anew: how long it takes, how many
    kernels it starts, and for how long the GPU is busy with them."""
    for side, batch in (("lora", task.batches[2]), ("sorsa", task.batches[2]), ("lora", task.batches[1])):
        steps = our_steps(settings(side, batch, steps=9), task.model(), task.examples(batch))
        for _ in range(4):
            next(steps)
        elapsed = seconds(lambda: [next(steps) for _ in range(4)]) / 4
        with torch.profiler.profile() as profile:
            seconds(lambda: next(steps))
        kernels = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA
                   and not event.is_user_annotation]
        busy = sum(event.device_time_total for event in kernels)
        task.fact(side=side, batch=batch, step_ms=round(1e3 * elapsed, 1), kernels=len(kernels),
                  busy_ms=round(1e-3 * busy, 1))
        steps = None
        clean()


def as_written(task):
    """An epoch of LoRA and SORSA at the largest batch, some steps at the others."""
    cases(task, ("lora", "sorsa"), task.batches[:1], EPOCH)
    cases(task, ("lora", "sorsa"), task.batches[1:], 20)


def recorded(task):
    """The gradient of every method, replayed from a recording, against that as written, with other rows and weights
    than those that were recorded; then epochs."""
    rows = [(ids[:40], 9) for ids, _ in task.examples(8)]
    first, examples = rows[:4], rows[4:]
    for method in METHODS:
        model = small(task, method).to(DEVICE)
        if method != "full":
            adapter.cast_frozen(model, DTYPE)
        autocast = "bfloat16" if method == "full" else None
        recorder = graphs.RecordedDecoder(model)
        gradient(model, first, autocast)
        with torch.no_grad():
            for p in adapter.trainable(model).values():
                p *= 1.01
        replayed = [gradient(model, examples, autocast)[1] for _ in range(3)]
        model.model.forward = recorder.plain
        exact = gradient(model, examples, autocast)[1]
        task.fact(method=method, gradient_error=max(distance(found, exact) for found in replayed))
    cases(task, ("lora", "sorsa"), task.batches[1:], EPOCH, graphs="on")


def compiled(task):
    """The gradient through compiled blocks against that through the same as written, then epochs, recorded too."""
    model, examples = task.model(), task.examples(8)
    attach(model, settings("lora", 8))
    with torch.no_grad():
        for p in adapter.trainable(model).values():
            p += 0.01 * torch.randn_like(p)
    exact, found = gradient(model, examples)[1], []
    fast.compile_blocks(model)
    elapsed = seconds(lambda: found.append(gradient(model, examples)[1]))
    error, model = distance(found[0], exact), None
    clean()
    task.fact(compile_seconds=round(elapsed, 1), gradient_error=error)
    if error < 0.05:
        cases(task, ("lora",), task.batches[1:], EPOCH, compile=True, graphs="auto")


def answers(task):
    """All test problems in one batch. Random weights end no text: each has 256 tokens, twice the usual."""
    model = task.model().requires_grad_(False)
    prompts = [ids[:prompt] for ids, prompt in task.examples(task.problems)]
    for batch in (task.problems, 512):
        elapsed = seconds(lambda: generate(model, prompts, -1, task.max_new, batch))
        task.fact(problems=task.problems, batch=batch, max_new=task.max_new, seconds=round(elapsed, 2),
                  new_tokens_per_second=round(task.problems * task.max_new / elapsed),
                  memory_gb=round(report.peak_memory(DEVICE), 2))
        clean()


def with_cudnn(task):
    """What fast.switch_on leaves out: an epoch as written, one recorded, and the answers, by cuDNN's attention."""
    torch.backends.cuda.enable_cudnn_sdp(True)
    cases(task, ("lora",), task.batches[:1], EPOCH)
    cases(task, ("lora",), task.batches[1:2], EPOCH, graphs="on")
    answers(task)


def large(task):
    """Llama 2 7B's shape, LoRA r 128, steps of 8k tokens, and more with blocks recomputed; SORSA's start of a block."""
    shape, (rank, length) = ({}, (8, 32)) if task.tiny else (LLAMA_7B, (128, 512))
    limit, shape = matmul_rate(DEVICE, DTYPE, 256 if task.tiny else 8192), {**shape, "tie_word_embeddings": False}
    block = task.model(**{**shape, "num_hidden_layers": 1})
    elapsed = seconds(lambda: attach(block, settings("sorsa", 1, rank=rank)))
    task.fact(shape="7B", side="sorsa", start_seconds_per_block=round(elapsed, 2))
    block = None
    for recompute, rows in ((False, 16), (True, 64)):
        clean()
        args = settings("lora", rows, rank=rank, steps=4, recompute=recompute)
        case = {"shape": "7B", "side": "lora", "rank": rank, "tokens_per_step": rows * length, "recompute": recompute}
        try:
            model = task.model(**shape)
            examples = [([i % 500 for i in range(length)], length // 3)] * 4 * rows
            result = measured(our_steps(args, model, examples))
            gflops = result["tokens_per_second"] * report.gflop_per_token(model, examples)[1]
            task.fact(**case, **result, gflops=round(gflops), share=round(gflops / limit, 3),
                      data=f"random tokens, rows of {length}")
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            task.fact(**case, failed="out of memory")
        model = None


def peers(task):
    """transformers + peft, on random batches as its users would, and on ours: of shapes that are new in the first
    steps, as in an epoch, and seldom later."""
    if not importlib.util.find_spec("peft"):
        return task.fact(skipped="transformers and peft are not installed")
    cases(task, PEERS[:2], task.batches[1:], 60)


def others(task):
    """Some steps of the other methods."""
    cases(task, [method for method in METHODS if method not in ("lora", "sorsa")], task.batches[1:2], 20)


# {name: (function, limit in seconds)}
PARTS = {"machine": (machine, 40), "correct": (correct, 90), "recorded": (recorded, 110), "step": (step, 60),
         "answers": (answers, 60), "large": (large, 90), "peers": (peers, 150), "compiled": (compiled, 150),
         "as_written": (as_written, 120), "with_cudnn": (with_cudnn, 120), "others": (others, 90)}


# ---- the real model -------------------------------------------------------------------------------------------------

def real_parts(args):
    """{name: (command, limit in seconds, file with the result)}: SORSA, the base, LoRA, then the others."""
    folder, flags = args.results.parent / "runs-gpu", ["--model", args.model, "--data", args.data]
    steps = ["--steps", "2", "--batch", "2", "--held-out", "2", "--limit", "20"] if args.tiny else ["--epochs", "1"]
    some = ["--limit", "2", "--max-new", "8"] if args.tiny else ["--limit", "0", "--batch", str(PROBLEMS)]
    parts = {}
    for method in dict.fromkeys(("sorsa", "base", "lora", *METHODS)):
        run, base = folder / method, ["--out", str(folder / "base"), *flags]
        if method != "base":
            train_it = ["train.py", "--method", method, *flags, "--out", str(run), "--overwrite", "--no-sample", *steps]
            parts[f"{method} epoch"] = train_it, 120, run / run_folder.RESULT
        evaluate = ["eval.py", *(base if method == "base" else [str(run), "--data", args.data]), *some]
        parts[f"{method} answers"] = evaluate, 90, run / "eval.json"
    return parts


KEPT = ("method", "held_out_before", "held_out_after", "tokens_per_second", "seconds_in_steps", "seconds", "memory_gb",
        "steps", "batch", "n", "accuracy", "new_tokens", "capped")


def note_result(args, name, file):
    """The numbers of a finished command, from the file that it leaves."""
    result = read_json(file)
    note(args, name, {"data": result["source"], "model": args.model,
                      **{key: result[key] for key in KEPT if key in result}})


# ---- the targets ----------------------------------------------------------------------------------------------------

def targets(facts):
    """[(what is to be reached, what was found or None, whether that reaches it)], for one H100."""
    def found(key, *parts, **values):
        return [fact[key] for part in parts for fact in facts
                if fact["part"] == part and key in fact and values.items() <= fact.items()]

    def speeds(part, side):
        return {fact["batch"]: fact["tokens_per_second"] for fact in facts
                if fact["part"] == part and fact.get("side") == side and "tokens_per_second" in fact}

    ours, theirs = speeds("recorded", "lora"), speeds("peers", "peer")
    epochs = [*found("epoch_seconds", "recorded", "compiled"), *found("seconds_in_steps", "lora epoch", "sorsa epoch")]
    sound = found("sound", "correct")
    rows = [("methods that train, save, load, merge and answer", sum(sound) if sound else None, len(METHODS), 1),
            ("seconds for an epoch as written", min(found("epoch_seconds", "as_written"), default=None), 8, -1),
            ("seconds for an epoch recorded or compiled", min(epochs, default=None), 5, -1),
            ("seconds for all test problems", min(found("seconds", "answers", "sorsa answers"), default=None), 10, -1),
            ("share of the bf16 matrix speed at 7B's shape", max(found("share", "large"), default=None), 0.55, 1),
            ("times transformers + peft, at every batch",
             min((ours[batch] / theirs[batch] for batch in ours.keys() & theirs.keys()), default=None), 2, 1)]
    return [(f"{what}, at {'least' if sign > 0 else 'most'} {limit:g}", value,
             value is not None and sign * value >= sign * limit) for what, value, limit, sign in rows]


def print_targets(args, facts):
    """Print each of them with what was found."""
    print(f"targets, for one H100{', which tiny sizes say nothing about' * args.tiny}")
    for what, value, met in targets(facts):
        print(f"{'not measured' if value is None else 'met' if met else 'not met':<14}{what}"
              + ("" if value is None else f": {value:.3g}"))


# ---- the script -----------------------------------------------------------------------------------------------------

def run(words, limit):
    """Run a Python command for at most `limit` seconds: its last words where it failed, else None."""
    with tempfile.TemporaryFile("w+") as said:
        try:
            done = subprocess.run([sys.executable, *words], cwd=ROOT, stderr=said, timeout=limit)
        except subprocess.TimeoutExpired:
            return f"more than {limit:.0f} s"
        said.seek(0)
        lines = said.read().strip().splitlines()
    return (lines or [f"status {done.returncode}"])[-1] if done.returncode else None


def parse_arguments(argv):
    parser = Parser(prog="python -m tools.bench gpu", description=__doc__)
    parser.add_argument("--minutes", type=above_zero, default=7, help="when all must have ended")
    parser.add_argument("--results", type=Path, default=Path("results/gpu.jsonl"))
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS), help="these only (not --real)")
    parser.add_argument("--real", action="store_true", help="epochs and answers of the real model on GSM-8K")
    parser.add_argument("--model", default=base_model.DEFAULT_MODEL, help="with --real")
    parser.add_argument("--data", default="gsm8k", help="with --real: gsm8k, or a folder with its files")
    parser.add_argument("--tiny", action="store_true", help="sizes for a rehearsal, on a CPU too")
    parser.add_argument("--part", choices=list(PARTS), help=argparse.SUPPRESS)
    parser.add_argument("--command", default=" ".join(["python -m tools.bench gpu", *argv]), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if DEVICE.type == "cpu" and not args.tiny:
        parser.error("torch finds no GPU here: --tiny rehearses on a CPU")
    return args


def main(argv=None):
    args = parse_arguments(sys.argv[1:] if argv is None else argv)
    args.results = args.results.resolve()
    if args.part:
        if args.part != "peers":
            fast.switch_on()
        return PARTS[args.part][0](Task(args.part, args))
    deadline = time.monotonic() + 60 * args.minutes
    args.results.parent.mkdir(parents=True, exist_ok=True)
    before = args.results.stat().st_size if args.results.is_file() else 0
    own = ["--results", str(args.results), "--command", args.command, *["--tiny"] * args.tiny]
    plan = real_parts(args) if args.real else {
        name: (["-m", "tools.gpu", "--part", name, *own], PARTS[name][1], None) for name in args.parts}
    for name, (words, limit, file) in plan.items():
        left = deadline - time.monotonic()
        failed = run(words, min(limit, left)) if left > LEAST else None
        if left <= LEAST or failed:
            note(args, name, {"failed": failed} if failed else {"skipped": "no time left"})
        elif file:
            note_result(args, name, file)
    with open(args.results) as lines:
        lines.seek(before)
        print_targets(args, [json.loads(line) for line in lines])


if __name__ == "__main__":
    run_script(main, "take fewer --parts")
