"""How fast is it? `python bench.py train --peer` trains LoRA here and in transformers + peft, in alternation.

Both sides get the same weights, the same examples and the same LoRA (r=16, seven projections) on the same machine in
the same run, each round in a process of its own, so that its peak memory is its own. The peer is set up as its users
would: random batches padded to their longest row, its own head and loss, fused AdamW. Counted are real tokens: padding
is not work.
"""
import argparse
import contextlib
import inspect
import json
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

import adapter
import checkpoint
import gsm8k
import train
from script import Parser, choose_device, positive, run_script


def matmul_rate(device, dtype, size=2048):
    """The machine's own speed on square matrix products, in GFLOP/s: the limit that training cannot pass."""
    a, best = torch.randn(size, size, device=device, dtype=dtype), 0.0
    for _ in range(5):
        started = time.time()
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = max(best, 2e-9 * size ** 3 / (time.time() - started))
    return best


def our_steps(args, base, encoded):
    """The calls of train.py's loop; yields the real tokens of each step after it."""
    model = base.model
    attach = adapter.method_function(args.method, "attach")
    attach(model, **({"rank": args.rank} if "rank" in inspect.signature(attach).parameters else {}))
    parameters = list(adapter.trainable(model).values())
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.0, fused=True)
    device, lengths = model.lm_head.weight.device, [len(ids) for ids, _ in encoded]
    regularize = getattr(adapter.method_module(args.method), "add_regularizer_grad", None)
    for indices in train.endless_batches(lengths, args.batch, seed=0):
        train.accumulate_gradients(model, [encoded[i] for i in indices], args.batch, device, contextlib.nullcontext())
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        if regularize:
            regularize(model, 4.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        yield sum(lengths[i] for i in indices)


def peer_steps(args, base, encoded):
    """The same in transformers + peft: the peer's model around the same weight tensors, its loss over labels."""
    import peft
    import transformers
    config = transformers.LlamaConfig(**vars(base.model.config))
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    model.load_state_dict(base.model.state_dict(), assign=True)
    model.tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    model.train()
    lora = peft.LoraConfig(r=args.rank, lora_alpha=args.rank, target_modules=list(adapter.TARGETS))
    model = peft.get_peft_model(model, lora)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.0, fused=True)
    rng, device = random.Random(0), base.model.lm_head.weight.device
    while True:
        chosen = rng.sample(encoded, args.batch)
        longest = max(len(ids) for ids, _ in chosen)
        ids = torch.tensor([row + [0] * (longest - len(row)) for row, _ in chosen])
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row, _ in chosen])
        labels = torch.tensor([[-100] * start + row[start:] + [-100] * (longest - len(row)) for row, start in chosen])
        model(input_ids=ids.to(device), attention_mask=mask.to(device), labels=labels.to(device)).loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        yield sum(len(row) for row, _ in chosen)


def work(args):
    """One round of one side, first step not timed: tokens per second, peak memory, GFLOP/s and the machine's own."""
    device, dtype = choose_device("auto")
    base = checkpoint.load(args.model, dtype, device)
    examples = gsm8k.load(args.data, "train")[0][:2048]
    encoded = train.encode_examples(base.tokenizer, examples, 512)
    answer_share = train.answer_tokens(encoded) / train.token_count(encoded)
    limit = matmul_rate(device, dtype)
    steps = (peer_steps if args.side == "peer" else our_steps)(args, base, encoded)
    next(steps)
    started = time.time()
    tokens = sum(next(steps) for _ in range(args.steps))
    rate = tokens / (time.time() - started)
    record = {"side": args.side, "tokens_per_second": rate, "matmul_gflops": limit,
              "memory_gb": train.peak_memory(device)}
    if args.side == "ours":
        record.update(method=args.method, gflops=rate * train.gflop_per_token(base.model, answer_share)[1])
    return record


def bench_train(args):
    """Alternate the sides, print the table, append the rounds to the results file."""
    sides = ["ours", "peer"] if args.peer else ["ours"]
    rounds = {side: [] for side in sides}
    for number in range(args.rounds):
        for side in sides:
            command = [sys.executable, __file__, "train", "--side", side] + [
                f"--{name}={getattr(args, name)}" for name in ("method", "model", "data", "rank", "batch", "steps")]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                sys.exit(done.stderr)
            record = {**json.loads(done.stdout.splitlines()[-1]), "round": number, "batch": args.batch,
                      "rank": args.rank, "steps": args.steps, "torch": torch.__version__,
                      "command": " ".join(["python bench.py", *sys.argv[1:]])}
            rounds[side].append(record)
            share = f"{record['gflops']:.0f} of {record['matmul_gflops']:.0f} GFLOP/s" if side == "ours" else ""
            print(f"round {number + 1}  {side:<5} {record['tokens_per_second']:7.1f} real tokens/s  "
                  f"{record['memory_gb']:.2f} GB peak  {share}", flush=True)
            args.results.parent.mkdir(parents=True, exist_ok=True)
            with open(args.results, "a") as file:
                file.write(json.dumps(record) + "\n")
    if args.peer:
        ratios = sorted(a["tokens_per_second"] / b["tokens_per_second"] for a, b in zip(rounds["ours"], rounds["peer"]))
        memory = statistics.median(a["memory_gb"] / b["memory_gb"] for a, b in zip(rounds["ours"], rounds["peer"]))
        print(f"ours / peer: {statistics.median(ratios):.2f} times the tokens per second "
              f"({ratios[0]:.2f} to {ratios[-1]:.2f}), {100 * memory:.0f} % of the peak memory")


def main():
    parser = Parser(prog="bench.py", description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=["train"])
    parser.add_argument("--peer", action="store_true", help="also transformers + peft (pip install transformers peft)")
    parser.add_argument("--method", choices=list(adapter.METHODS), default="lora", help="ours; the peer is always LoRA")
    parser.add_argument("--model", default=checkpoint.DEFAULT_MODEL)
    parser.add_argument("--data", default="auto")
    parser.add_argument("--rank", type=positive, default=16)
    parser.add_argument("--batch", type=positive, default=16, help="examples per step")
    parser.add_argument("--steps", type=positive, default=4, help="timed steps per round")
    parser.add_argument("--rounds", type=positive, default=3)
    parser.add_argument("--side", choices=("ours", "peer"), help=argparse.SUPPRESS)
    parser.add_argument("--results", type=Path, default=Path("results/bench.jsonl"))
    args = parser.parse_args()
    if args.side:
        print(json.dumps(work(args)))
    else:
        bench_train(args)


if __name__ == "__main__":
    run_script(main)
