"""How fast is it? Each command measures in processes of its own, prints a table, and appends JSON lines to --results.

    train --methods lora sorsa --peer    real tokens per second, share of the machine's speed, memory
    generate --peer                      GSM-8K problems answered per second, and whether texts agree
    init --methods pissa sorsa sara      seconds to attach a method; also --width 2048 --layers 16
    load                                 seconds until the model is loaded, memory beside its weights
    merged                               a merged model beside its base
    memory --methods lora full --peer    peak memory of a training step, and what it consists of
    fast                                 what each form in support/fast.py buys: all but one, none
    cost                                 how the cost grows with batch, length, rank, width, problems
    gpu --minutes 7                      all that there is to learn on a GPU in minutes: tools/gpu.py

Each is a command `python -m tools.bench WHAT [flags]`.
With --peer (pip install transformers peft) the same weights and examples go through transformers + peft, in alternation
with ours. "peer" is set up as its users would: random batches padded to their longest row, its own head and loss, fused
AdamW; "strict" is the same on our batches of similar length, "tuned" besides in a process with our settings for a CPU
(support/fast.py). Counted are real tokens: padding is not work.
"""
import support

support.interruptible(__name__)  # before torch, which takes seconds to import

import argparse
import itertools
import json
import random
import re
import statistics
import sys
import time
from pathlib import Path

import torch

import adapter
import train
from data import batching, gsm8k, prompting
from methods import METHODS, arguments
from model import Config
from support import fast, graphs, report
from support.generate import complete, generate
from support.script import Parser, amount, choose_device, positive, run_script
from weights import base_model, child

ROOT = Path(__file__).parent.parent
PEERS = ("peer", "strict", "tuned")
DEVICE, _ = choose_device("auto", "float32")


def matmul_rate(device, dtype, size=2048):
    """The machine's own speed on square matrix products, in GFLOP/s: the limit that training cannot pass."""
    a, best = torch.randn(size, size, device=device, dtype=dtype), 0.0
    for _ in range(5):
        best = max(best, 2e-9 * size ** 3 / seconds(lambda: a @ a))
    return best


def seconds(work):
    """How long `work()` takes, a GPU's queue included."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    wait()
    started = time.perf_counter()
    work()
    wait()
    return max(1e-9, time.perf_counter() - started)  # where the clock stands still too


def attach(model, args):
    """Attach args.side to all seven projections, at --params or at --rank where the method has one, and round what is
    frozen to --dtype."""
    function, fit = METHODS[args.side].attach, METHODS[args.side].fit
    options = {} if args.side == "full" else {"targets": adapter.TARGETS}
    if args.params and fit:
        options.update(fit(model, args.params, targets=adapter.TARGETS))
    elif "rank" in arguments(function):
        options["rank"] = args.rank
    function(model, **options)
    adapter.cast_frozen(model, frozen_dtype(args))


def random_llama(args):
    """A random Llama of --width and --layers: with Llama 3.2's proportions, from width 4096 on with Llama 2 7B's."""
    heads, large = args.width // 64, args.width >= 4096
    key_heads = next(count for count in (heads // 4, heads // 3, 1) if count and heads % count == 0)
    config = Config(vocab_size=32_000 if large else 1024, hidden_size=args.width, head_dim=128 if large else 64,
                    intermediate_size=args.width * 43 // 16 if large else 4 * args.width,
                    num_hidden_layers=args.layers, num_attention_heads=heads // 2 if large else heads,
                    num_key_value_heads=heads // 2 if large else key_heads)
    return random_weights(config, frozen_dtype(args), DEVICE)


def random_weights(config, dtype, device):
    """A model with weights of a usual size, drawn on the device; norms of 1."""
    model = base_model.empty_model(config).to(dtype).to_empty(device=device)
    model.tie()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0) if parameter.dim() == 1 else parameter.normal_(std=parameter.shape[1] ** -0.5)
    return model


def frozen_dtype(args):
    """Of the frozen weights: --dtype, and fp32 where all of them train."""
    return torch.float32 if args.side == "full" else getattr(torch, args.dtype)


def loaded_model(args):
    """(model, tokenizer or None): --model, or a random one where --width is given. (--model as it was loaded, before
    `adapter.cast_frozen`.)"""
    if args.width:
        return random_llama(args), None
    base = base_model.load(args.model, frozen_dtype(args), DEVICE)
    return base.model, base.tokenizer


def peer_model(ours, dtype):
    """transformers' model around the same weight tensors, rounded to dtype."""
    import transformers
    config = transformers.LlamaConfig(**vars(ours.config))
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    adapter.cast_frozen(ours.requires_grad_(False), dtype)
    model.load_state_dict(ours.state_dict(), assign=True)
    model.tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(DEVICE)
    return model


# ---- train ----------------------------------------------------------------------------------------------------------

def batches(args, encoded):
    """args.steps batches of examples, and before them the largest once more, to warm up with: for the peer random ones,
    else ours of similar length."""
    rng, lengths = random.Random(0), [len(ids) for ids, _ in encoded]
    ours = batching.endless_batches(lengths, args.batch, seed=0)
    drawn = [rng.sample(range(len(encoded)), args.batch) if args.side == "peer" else next(ours)
             for _ in range(max(1, args.steps))]
    largest = max(drawn, key=lambda batch: max(lengths[i] for i in batch))
    return [[encoded[i] for i in batch] for batch in (largest, *drawn[:args.steps])]


def our_steps(args, model, encoded):
    """The calls of train.py's loop; yields the real tokens of each step after it."""
    attach(model, args)
    model.model.recompute = args.recompute
    if args.compile:
        fast.compile_blocks(model)
    recorded = graphs.wanted(args.graphs, model)
    if recorded:
        graphs.RecordedDecoder(model)
    args.autocast = "bfloat16" if args.side == "full" and args.dtype == "bfloat16" else None
    args.multiple = fast.row_multiple(DEVICE, recorded, model.config.max_position_embeddings)
    args.micro_batch = args.batch
    parameters = list(adapter.trainable(model).values())
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.0, fused=True)
    regularize = METHODS[args.side].regularize
    for chosen in batches(args, encoded):
        train.accumulate_gradients(args, model, chosen)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        if regularize:
            regularize(model, 1e-4)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        yield batching.token_count(chosen)


def peer_steps(args, model, encoded):
    """The same in transformers + peft."""
    import peft
    model = peer_model(model, frozen_dtype(args)).train()
    model.config.use_cache = False  # as their Trainer has it
    lora = peft.LoraConfig(r=args.rank, lora_alpha=args.rank, target_modules=list(adapter.TARGETS))
    model = peft.get_peft_model(model, lora)
    if args.recompute:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.0, fused=True)
    for chosen in batches(args, encoded):
        longest = max(len(ids) for ids, _ in chosen)
        ids = torch.tensor([row + [0] * (longest - len(row)) for row, _ in chosen])
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row, _ in chosen])
        labels = torch.tensor([[-100] * start + row[start:] + [-100] * (longest - len(row)) for row, start in chosen])
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=args.dtype == "bfloat16"):  # as their Trainer does
            loss = model(input_ids=ids.to(DEVICE), attention_mask=mask.to(DEVICE), labels=labels.to(DEVICE)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        yield batching.token_count(chosen)


def training_examples(args, model, tokenizer):
    """Encoded GSM-8K problems; for a random model random rows of --length tokens, two thirds of them answer."""
    if tokenizer is not None:
        return list(batching.encode_examples(tokenizer, gsm8k.load(args.data, "train")[0], 512).values())
    rows = torch.randint(0, model.config.vocab_size, (4 * args.batch, args.length)).tolist()
    return [(ids, args.length // 3) for ids in rows]


def train_side(args):
    """Tokens per second, peak memory, GFLOP/s and the machine's own; a first step, on the largest batch, is not
    timed."""
    model, tokenizer = loaded_model(args)
    encoded = training_examples(args, model, tokenizer)
    limit = matmul_rate(DEVICE, getattr(torch, args.dtype), 8192 if DEVICE.type == "cuda" else 2048)
    steps = (peer_steps if args.side in PEERS else our_steps)(args, model, encoded)
    warm_up = seconds(lambda: next(steps))
    tokens = []
    elapsed = seconds(lambda: tokens.extend(steps))
    record = {"tokens_per_second": sum(tokens) / elapsed, "seconds": elapsed, "tokens": sum(tokens),
              "matmul_gflops": limit, "memory_gb": report.peak_memory(DEVICE), "warm_up_seconds": warm_up}
    if args.side not in PEERS:
        gflops = sum(tokens) / elapsed * report.gflop_per_token(model, encoded, args.compile)[1]
        record.update(gflops=gflops, share=gflops / limit,
                      parameters=sum(p.numel() for p in adapter.trainable(model).values()))
    return record


def memory_side(args):
    """Peak memory of a training step on --batch rows of --length tokens, and how much of it is weights, and what
    AdamW keeps of the trained ones: itself, a gradient and two moments, which are there from the second step on. The
    rest is activations and the program."""
    model, tokenizer = loaded_model(args)
    ids = torch.randint(0, model.config.vocab_size, (args.length,)).tolist()
    weights = sum(p.numel() for p in model.parameters()) * frozen_dtype(args).itemsize
    args.steps = 1  # and one before it
    list((peer_steps if args.side in PEERS else our_steps)(args, model, [(ids, args.length // 3)] * args.batch))
    record = {"memory_gb": report.peak_memory(DEVICE), "weights_gb": 1e-9 * weights}
    if args.side not in PEERS:
        trained = sum(p.numel() * p.element_size() for p in adapter.trainable(model).values())
        record["trained_gb"] = 1e-9 * trained * (3 if args.side == "full" else 4)  # full: weights counted above
    return record


# ---- generate -------------------------------------------------------------------------------------------------------

def generate_side(args):
    """Problems per second over the first test problems, zero-shot, greedy, and the texts; a warm-up comes first."""
    model, tokenizer = loaded_model(args)
    adapter.cast_frozen(model.eval().requires_grad_(False), frozen_dtype(args))
    examples = gsm8k.load(args.data, "test")[0][:args.problems]
    asked = [prompting.prompt(example["question"]) for example in examples]
    peer = peer_model(model, frozen_dtype(args)).eval() if args.side == "peer" else None

    def answer(texts, cap):
        if peer is None:
            return [c["text"] for c in complete(model, tokenizer, texts, cap, args.batch)]
        answers = []
        for start in range(0, len(texts), args.batch):
            rows = [tokenizer.encode(text) for text in texts[start:start + args.batch]]
            longest = max(map(len, rows))
            ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows], device=DEVICE)
            mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=DEVICE)
            with torch.inference_mode():
                new = peer.generate(ids, attention_mask=mask, max_new_tokens=cap, do_sample=False, pad_token_id=0,
                                    eos_token_id=list(tokenizer.end_ids))[:, longest:].tolist()
            kept = [itertools.takewhile(lambda i: i not in tokenizer.end_ids, row) for row in new]
            answers += [prompting.truncate(tokenizer.decode(row)) for row in kept]
        return answers

    answer(asked[:2], 2)
    texts = []
    elapsed = seconds(lambda: texts.extend(answer(asked, args.max_new)))
    tokens = sum(len(tokenizer.encode(text, start=False)) for text in texts)
    return {"problems_per_second": len(texts) / elapsed, "seconds": elapsed, "new_tokens": tokens,
            "memory_gb": report.peak_memory(DEVICE), "texts": texts}


# ---- init, load, merged ---------------------------------------------------------------------------------------------

def init_side(args):
    """Seconds to attach a method (for the peer: peft's PiSSA start) to a loaded, or a random model."""
    model, _ = loaded_model(args)
    if args.side == "peer":
        import peft
        plain = peer_model(model, frozen_dtype(args))
        pissa = peft.LoraConfig(r=args.rank, lora_alpha=args.rank, target_modules=list(adapter.TARGETS),
                                init_lora_weights="pissa")
        return {"seconds": seconds(lambda: peft.get_peft_model(plain, pissa)), "memory_gb": report.peak_memory(DEVICE)}
    return {"seconds": seconds(lambda: attach(model, args)), "memory_gb": report.peak_memory(DEVICE)}


def resident():
    """Memory that this process holds now, in GB, mapped files included."""
    status = Path("/proc/self/status")
    return int(re.search(r"VmRSS:\s+(\d+)", status.read_text())[1]) * 1024e-9 if status.is_file() else float("nan")


def load_side(args):
    """Seconds to load the model, and how far memory rose above what it held before, in sizes of the loaded weights."""
    torch.ones(2, 2, device=DEVICE) @ torch.ones(2, 2, device=DEVICE)
    before, loaded = resident(), []
    elapsed = seconds(lambda: loaded.append(base_model.load(args.model, frozen_dtype(args), DEVICE).model))
    size = 1e-9 * sum(p.numel() * p.element_size() for p in loaded[0].parameters())
    record = {"seconds": elapsed, "weights_gb": size}
    if DEVICE.type == "cpu" and report.peak_memory(DEVICE) is not None:
        record["peak_in_sizes"] = (report.peak_memory(DEVICE) - before) / size
    return record


def merged_side(args):
    """Time of a forward pass of the merged model over the base's, in alternation: the median of 15 ratios."""
    base, merged = (base_model.load(args.model, frozen_dtype(args), DEVICE).model for _ in range(2))
    args.side = "lora"
    attach(merged, args)
    adapter.merge(merged)
    adapter.cast_frozen(base.requires_grad_(False), frozen_dtype(args))
    tokens = torch.randint(0, base.config.vocab_size, (args.batch, 128), device=DEVICE)
    with torch.inference_mode():
        times = [[seconds(lambda: model.model(tokens)) for model in (base, merged)] for _ in range(16)][1:]
    return {"ratio": statistics.median(after / before for before, after in times)}


# ---- cost -----------------------------------------------------------------------------------------------------------

def cost_side(args):
    """One training step of LoRA on random tokens, or one generation, at args.batch, length, rank, width, problems:
    microseconds and GFLOP/s per token."""
    model = random_llama(args)
    args.side = "lora"
    if args.problems:
        model.requires_grad_(False)
        rows = torch.randint(0, 1024, (args.problems, args.length)).tolist()
        elapsed = seconds(lambda: generate(model, rows, -1, args.max_new, args.batch))
        return {"us_per_token": 1e6 * elapsed / (args.problems * args.max_new)}
    attach(model, args)
    encoded = [(torch.randint(0, 1024, (args.length,)).tolist(), args.length // 3) for _ in range(args.batch)]
    args.micro_batch, args.multiple, args.autocast = args.batch, 1, None
    times = [seconds(lambda: train.accumulate_gradients(args, model, encoded)) for _ in range(3)]
    tokens = args.batch * args.length
    return {"us_per_token": 1e6 * min(times) / tokens,
            "gflops": tokens * report.gflop_per_token(model, encoded)[1] / min(times)}


COST = [{"batch": batch} for batch in (1, 4, 16)] + [{"length": length} for length in (64, 256, 1024)] + \
       [{"rank": rank} for rank in (4, 16, 64, 128)] + [{"width": width} for width in (256, 512, 1024, 2048)] + \
       [{"problems": problems, "batch": 128, "max_new": 32} for problems in (8, 32, 128, 512)]


# ---- what each fast form buys ---------------------------------------------------------------------------------------

def without_each(args):
    """Training and generation with all fast forms, without each one, and without any."""
    for name in (None, *fast.NAMES, "all"):
        yield "train", "lora", {"leave_out": name, "rank": args.rank, "batch": args.batch, "steps": args.steps}
    for name in (None, *fast.NAMES, "all"):
        yield "generate", "ours", {"leave_out": name, "batch": 64, "problems": args.problems, "max_new": 96}


# ---- the script -----------------------------------------------------------------------------------------------------

SIDES = {"train": train_side, "generate": generate_side, "init": init_side, "load": load_side, "merged": merged_side,
         "memory": memory_side, "cost": cost_side}
DEFAULTS = {  # of the flags that mean something else in some commands
    "train": {"batch": 16, "steps": 4, "rounds": 3, "methods": ["lora"]},
    "generate": {"batch": 128, "problems": 128, "rounds": 3},
    "init": {"methods": ["lora"]},
    "memory": {"batch": 16, "methods": ["lora"]},
    "merged": {"batch": 16},
    "fast": {"batch": 16, "steps": 3, "problems": 64},
    "cost": {"batch": 8, "width": 576, "layers": 4}}
COMMON = ("model", "data", "max_new")
OPTIONS = (*COMMON, "dtype", "rank", "params", "batch", "steps", "problems", "width", "layers", "length", "compile",
           "graphs", "recompute", "leave_out")


def side_arguments(what, side, options):
    """The command line of one measurement."""
    given = {f"--{name.replace('_', '-')}": value for name, value in options.items() if value not in (None, False)}
    return [what, "--side", side, *(flag if value is True else f"{flag}={value}" for flag, value in given.items())]


def run_side(arguments):
    """One measurement in a process of its own: its record. ValueError with its last words if it fails."""
    done = child.run("tools.bench", arguments, ROOT, cwd=ROOT)
    if done.returncode:
        raise ValueError(f"{' '.join(arguments[:3])}: {(done.stderr.strip().splitlines() or [done.returncode])[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def row(record):
    """A line of the table."""
    parts = [f"{record[key]:{form}} {unit}" for key, form, unit in (
        ("tokens_per_second", "7.1f", "real tokens/s"), ("problems_per_second", "6.2f", "problems/s"),
        ("seconds", "6.1f", "s"), ("us_per_token", "8.0f", "us/token"), ("ratio", ".3f", "of the base's time"),
        ("new_tokens", ",", "new tokens"), ("memory_gb", "5.2f", "GB peak"), ("parameters", ",", "parameters"),
        ("weights_gb", ".2f", "GB weights"), ("trained_gb", ".2f", "GB of and for what trains"),
        ("peak_in_sizes", ".2f", "times the weights at the peak")) if record.get(key) is not None]
    if "gflops" in record:
        share = f" of {record['matmul_gflops']:.0f} ({100 * record['share']:.0f} %)" if "share" in record else ""
        parts.append(f"{record['gflops']:.0f}{share} GFLOP/s")
    return "  ".join(parts)


def compare(rounds, key, first, other):
    """"first is 2.1 times other (2.0 to 2.2)": the median and spread over rounds of the ratio of a field."""
    ratios = sorted(a[key] / b[key] for a, b in zip(rounds[first], rounds[other]))
    return f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"


def plan(args):
    """[(command, side, options that differ from those given)] of one round: each in every --dtype."""
    return [(what, side, {"dtype": dtype, **case}) for what, side, case in cases(args) for dtype in args.dtype]


def cases(args):
    """[(command, side, options that differ from those given)] of one round, less the dtype."""
    if args.what == "fast":
        return list(without_each(args))
    if args.what == "cost":
        return [("cost", "ours", case) for case in COST]
    peers = {"train": PEERS, "memory": PEERS[:1], "generate": PEERS[:1], "init": PEERS[:1]}.get(args.what, ())
    return [(args.what, side, {}) for side in [*(args.methods or ["ours"]), *(peers if args.peer else ())]]


def bench(args):
    """Measure all sides in alternation, print the table and the ratios, append the records to the results file."""
    options = {name: getattr(args, name) for name in (COMMON if args.what == "fast" else OPTIONS)}
    rounds = {}
    for number, (what, side, case) in itertools.product(range(args.rounds), plan(args)):
        chosen = {**options, **case}
        record = {"what": what, "side": side, "round": number, **case, **run_side(side_arguments(what, side, chosen))}
        rounds.setdefault(side if len(args.dtype) == 1 else f"{side} {case['dtype']}", []).append(record)
        named = ", ".join(f"{key} {value}" for key, value in case.items() if value not in (None, False))
        print(f"round {number + 1}  {side:<9}  {named}{'  ' * bool(named)}{row(record)}", flush=True)
        kept = {key: value for key, value in record.items() if key != "texts"}
        kept.update(batch=chosen.get("batch"), rank=chosen.get("rank"), torch=torch.__version__, device=device_name(),
                    command=" ".join(["python -m tools.bench", *sys.argv[1:]]))
        args.results.parent.mkdir(parents=True, exist_ok=True)
        with open(args.results, "a") as file:
            file.write(json.dumps(kept) + "\n")
    print_ratios(args.what, rounds)


def print_ratios(what, rounds):
    """Print how the first side compares with each of the others."""
    first, *others = rounds
    keys = {"train": ("tokens_per_second",), "generate": ("problems_per_second",), "init": ("seconds",),
            "memory": ("memory_gb",)}.get(what, ())  # of train not memory: the peer's random batches have longer rows
    for other in others if keys else ():
        ratios = [f"{key.replace('_', ' ')} {compare(rounds, key, first, other)}" for key in keys
                  if rounds[first][0][key] is not None]
        print(f"{first} / {other}: {', '.join(ratios)}")
        if what == "generate":
            same = [a == b for a, b in zip(rounds[first][0]["texts"], rounds[other][0]["texts"])]
            print(f"the same text: {sum(same)} of {len(same)} problems")


def device_name():
    """What ran it."""
    return torch.cuda.get_device_name() if DEVICE.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"


def parse_arguments(argv=None):
    parser = Parser(prog="python -m tools.bench", usage="python -m tools.bench WHAT [flags]",
                    description=__doc__)
    parser.add_argument("what", choices=[*SIDES, "fast", "gpu"], help="of gpu see: python -m tools.bench gpu --help")
    parser.add_argument("--peer", action="store_true", help="also transformers + peft (pip install transformers peft)")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS),
                        help="ours, for train, memory, init (default: lora); the peer is LoRA (init: PiSSA)")
    parser.add_argument("--model", default=base_model.DEFAULT_MODEL)
    parser.add_argument("--dtype", nargs="+", choices=("float32", "bfloat16"), help="of the frozen weights, one after "
                        "the other where there are two (default: bfloat16 on a GPU, else float32)")
    parser.add_argument("--data", default="auto")
    parser.add_argument("--rank", type=positive, help="(default: 16)")
    parser.add_argument("--params", type=amount, help="a budget instead, as in train.py")
    parser.add_argument("--batch", type=positive, help="examples per step (default: 16; generate: 128 problems)")
    parser.add_argument("--steps", type=positive, help="timed steps per round (default: 4)")
    parser.add_argument("--problems", type=positive, help="how many are answered (default: 128)")
    parser.add_argument("--max-new", type=positive, default=256, help="most new tokens per answer")
    parser.add_argument("--width", type=positive, help="init, train, memory: a random Llama of this width instead")
    parser.add_argument("--layers", type=positive, help="of that Llama (default: 16)")
    parser.add_argument("--length", type=positive, help="tokens of a row of memory, and of a random Llama "
                                                        "(default: 256)")
    parser.add_argument("--compile", action="store_true", help="train, memory: as in train.py")
    parser.add_argument("--graphs", choices=("auto", "on", "off"), default="off", help="the same; the few steps here "
                        "would time recordings, for which see gpu")
    parser.add_argument("--recompute", action="store_true", help="train, memory: as in train.py, the peers too")
    parser.add_argument("--leave-out", choices=[*fast.NAMES, "all"], help="one of support/fast.py's forms, or all")
    parser.add_argument("--rounds", type=positive, help="(default: train, generate 3; else 1)")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--results", type=Path, default=Path("results/bench.jsonl"))
    args = parser.parse_args(argv)
    if args.side is None:
        dtype = ["bfloat16" if DEVICE.type == "cuda" else "float32"]
        defaults = {"rounds": 1, "rank": 16, "length": 256, "layers": 16, "dtype": dtype, **DEFAULTS.get(args.what, {})}
        for name, value in defaults.items():
            if getattr(args, name) is None:
                setattr(args, name, value)
        if args.peer and args.what not in ("train", "generate", "init", "memory"):
            parser.error("--peer is for train, generate, init and memory")
    else:
        args.dtype, = args.dtype or ["float32"]
    return args


def main():
    if sys.argv[1:2] == ["gpu"]:
        from tools import gpu  # which uses this file
        return gpu.main(sys.argv[2:])
    args = parse_arguments()
    if args.side is None:
        return bench(args)
    if args.side not in PEERS[:2]:
        fast.switch_on([name for name in fast.NAMES if args.leave_out not in (name, "all")])
        choose_device(DEVICE.type, args.dtype, plain=args.leave_out == "all")
    print(json.dumps(SIDES[args.what](args)))


if __name__ == "__main__":
    run_script(main, "lower --batch or --length")
