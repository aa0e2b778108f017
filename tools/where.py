"""Where the time of a training step goes: every operation of one step on the CPU, timed, by what it is for.

    python -m tools.where --method lora --dtype bfloat16 --data gsm8k

The first two steps are not counted; then one is timed by operations and the same again as a whole: what that takes
beyond the operations is Python's and autograd's. Products (the only work that GFLOP count) stand beside the speed of
square ones in the same process.
"""
import support

support.interruptible(__name__)  # before torch, which takes seconds to import

import sys
import time
from collections import defaultdict
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from methods import METHODS
from support import fast
from support.script import Parser, choose_device, positive, run_script
from tools import bench
from weights import base_model

ROOT = str(Path(__file__).parent.parent)
PRODUCTS = torch.ops.aten.mm, torch.ops.aten.bmm, torch.ops.aten.addmm
PLACES = {"LeanRMSNorm": "norms", "Rotation": "rotation", "SwiGLU": "activation",
          "FrozenHeadLoss": "loss on the logits",
          **dict.fromkeys(("attention", "AttentionInPieces", "attention_weights", "folded", "scaled", "wide"),
                          "attention: softmax and sums")}


class Timed(TorchDispatchMode):
    """Adds up {what for: [calls, seconds, GFLOP]} of every operation inside. `frozen`: {address of a weight: name}."""

    def __init__(self, frozen):
        super().__init__()
        self.frozen, self.spent = frozen, defaultdict(lambda: [0, 0.0, 0.0])

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        started = time.perf_counter()
        result = function(*args, **(kwargs or {}))
        taken = time.perf_counter() - started
        is_product = function.overloadpacket in PRODUCTS
        place = "attention: in one operator" if "scaled_dot_product" in str(function) else caller()
        if is_product:
            names = [self.frozen[a.data_ptr()] for a in args[-2:] if a.data_ptr() in self.frozen]
            what = f"products: {names[0] if names else 'attention' if place.startswith('attention') else 'what trains'}"
        else:
            what = "optimizer" if "_fused_" in str(function) else place
        spent = self.spent[what]
        spent[0], spent[1] = spent[0] + 1, spent[1] + taken
        spent[2] += 2e-9 * args[-2].numel() * args[-1].shape[-1] if is_product else 0.0
        return result


def caller():
    """What the innermost function of this repository that is on the stack is for."""
    frame = sys._getframe(2)
    while frame is not None:
        code = frame.f_code
        name = Path(code.co_filename)
        if code.co_filename.startswith(ROOT):
            if name.name == "fast.py":
                return PLACES.get(code.co_qualname.split(".")[0], code.co_qualname)
            if name.name in ("train.py", "loss.py", "batching.py", "bench.py", "where.py"):
                break
            return "residual sums, layout" if name.name == "model.py" else "what trains: casts, scale, sum"
        frame = frame.f_back
    return "gradients: sums, casts, layout"


def measure(args):
    """Print the table of one step of --method."""
    fast.switch_on(device="cpu")
    bench.DEVICE, _ = choose_device("cpu", args.dtype)  # where an operation has ended when it returns
    args.side, args.rank, args.steps = args.method, 16, 3  # and one step before these
    args.params = args.compile = args.width = args.recompute = None
    args.graphs = "off"
    model, tokenizer = bench.loaded_model(args)
    encoded = bench.batches(args, bench.training_examples(args, model, tokenizer))[-1]  # every step: the same batch
    limit = bench.matmul_rate(bench.DEVICE, getattr(torch, args.dtype))
    steps = bench.our_steps(args, model, encoded)
    next(steps), next(steps)
    frozen = {p.data_ptr(): "frozen layers" for p in model.parameters() if not p.requires_grad}
    frozen[model.lm_head.weight.data_ptr()] = "head"
    timed = Timed(frozen)
    started = time.perf_counter()
    with timed:
        tokens = next(steps)
    wall = time.perf_counter() - started
    plain = bench.seconds(lambda: next(steps))
    rows = sorted(timed.spent.items(), key=lambda pair: -pair[1][1])
    counted = sum(seconds for _, (_, seconds, _) in rows)
    whole = min(wall, plain)  # without what the timing itself takes
    print(f"{args.method}, {args.dtype}, {tokens} tokens: {wall:.2f} s timed, {plain:.2f} s untimed; "
          f"square products {limit:.0f} GFLOP/s")
    for what, (calls, seconds, gflop) in [*rows, ("Python and autograd between them", (0, whole - counted, 0.0))]:
        speed = f"{gflop / seconds:7.0f} GFLOP/s, {100 * gflop / seconds / limit:.0f} %" if gflop else ""
        print(f"{what:<34}{calls or '':>7}{1e3 * seconds:9.0f} ms{100 * seconds / whole:7.1f} %{speed}")


def main():
    parser = Parser(prog="python -m tools.where", description=__doc__)
    parser.add_argument("--method", choices=list(METHODS), default="lora")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the frozen weights")
    parser.add_argument("--model", default=base_model.DEFAULT_MODEL)
    parser.add_argument("--data", default="auto")
    parser.add_argument("--batch", type=positive, default=16)
    measure(parser.parse_args())


if __name__ == "__main__":
    run_script(main, "lower --batch")
