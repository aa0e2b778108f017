"""What train.py tells: the plan before anything is spent, a line per logged step, what a step costs."""
import itertools
import math
import platform
import shlex
import statistics
import sys

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import adapter
from data import instructions
from data.batching import answer_tokens, endless_batches, examples_sha256, token_count
from methods import METHODS
from model import Decoder
from support.fast import CHUNK, WIDENED, eagerly, onednn_multiplies, products
from support.script import device_name, has_bf16_units, one_line
from weights.files import printable

try:
    import resource
except ImportError:  # Windows has none
    resource = None

WORDS = {"loss": "loss", "grad_norm": "gradient norm", "regularizer": "R"}  # for the names in the log


def describe(args, base, optimizer, regularizer, device, source, data, gflop):
    """Print everything that was chosen, before anything is spent. gflop: of training, per token."""
    model, encoded, held_out = base.model, data.train, data.held_out
    settings, targets = {**model.adapter_config, **regularizer}, model.adapter_config.get("targets", [])
    hidden, unset = ("method", "targets", "seed", "ks", "norms"), (None, [], False)
    shown = [f"{key} {value}" for key, value in settings.items() if key not in hidden and value not in unset]
    tokens, answers = token_count(encoded) / len(encoded), answer_tokens(encoded) / len(encoded)
    dtype = str(model.lm_head.weight.dtype).removeprefix("torch.")
    if args.autocast:
        dtype += f" computing in {args.autocast}"
    print(f"device    {device} ({hardware(device, model.lm_head.weight)}), weights {dtype}, torch {torch.__version__}")
    if args.recipe:
        words = {key: "+".join(map(str, value)) if key == "cut" else value for key, value in args.recipe_set.items()}
        print(f"recipe    {args.recipe} sets {', '.join(f'{key} {value}' for key, value in words.items())}")
    print(f"model     {one_line(base.name)}: {len(model.model.layers)} layers, width {model.config.hidden_size}; "
          f"{one_line(base.tokenizer.end_text)}")
    for note in base.tokenizer.notes:
        print(f"          {one_line(note)}")
    print(f"data      {one_line(source)}")
    without = f"{data.unannotated} left out (without annotations), " if args.answers == "equations" else ""
    kept = f"{len(data.report)} kept for --report, " if data.report else ""
    print(f"          {len(encoded)} to train on, {len(held_out)} held out, {kept}{without}{data.left_out} left out "
          f"(longer than {args.max_tokens} tokens)")
    annotations = ("alone (answers equations)" if args.answers == "equations" else
                   "removed" if args.strip_annotations else "kept")
    print(f"          prompt {args.template}{base.tokenizer.chat_text}; {tokens:.0f} tokens per example, "
          f"{answers:.0f} of them answer, calculator annotations {annotations}")
    if args.cut:
        cut = sum(ids[-1] != base.tokenizer.eos_id for ids, _ in encoded)
        print(f"          prompts cut at {args.cut[0]} tokens, answers at {args.cut[1]} ({cut} answers were longer)")
    said = ", ".join(targets or ["every parameter"]) if targets != [] else "its own"
    print(f"method    {', '.join([args.method, *shown])}; targets {said}")
    if args.params:
        total = sum(p.numel() for p in adapter.trainable(model).values())
        sizes = [f"{size} {settings[size]} with " for size in ("threshold", "rank") if size in settings]
        print(f"          nearest to --params {args.params:,}: {''.join(sizes[:1])}{total:,}")
    own_table = METHODS[args.method].table
    for line in [*(own_table(model) if own_table else []), *parameter_table(model)]:
        print(f"          {line}")
    epochs = args.steps * args.batch / len(encoded)
    print(f"plan      {args.steps} steps of {args.batch} examples ({epochs:.2f} epochs), "
          f"{args.micro_batch} per forward pass{', blocks recomputed' * args.recompute}"
          f"{', compiled' * args.compile}{', recorded as CUDA graphs' * args.recorded}; "
          f"{gflop:.2f} GFLOP per token")
    print(f"          {type(optimizer).__name__}, peak lr {args.lr:g}, {args.schedule}, warm-up {args.warmup:g}, "
          f"weight decay {args.weight_decay:g}, clip {args.clip:g}, seed {args.seed}")
    if regularizer.get("gamma"):
        print(f"          regularizer times gamma / peak lr = {regularizer['gamma'] / args.lr:g}, after clipping")
    saves = "" if args.save_every == args.eval_every else f", a checkpoint every {args.save_every}"
    also = ", with that on general text" * args.forgetting
    also += f", spectra every {args.spectra_every}" if args.spectra_every else ""
    print(f"out       {args.out}; held-out loss every {args.eval_every} steps{also}{saves}", flush=True)


def hardware(device, weight):
    """What computes, in words, and what it lacks."""
    if device.type == "cuda":
        lacks = "" if has_bf16_units(device) else ", no bf16 units: fp32 by default"
        return device_name(device) + lacks
    if device.type == "mps":
        return "untried: this code has run on Linux only"
    how = ", products in fp32, as this CPU multiplies no bf16" if WIDENED else \
        ", fp32 products by oneDNN" * onednn_multiplies(weight)
    return f"{torch.get_num_threads()} threads{how}"


def parameter_table(model):
    """Lines of text: what trains, a line per kind of module (equal names but for layer numbers, equal shapes)."""
    modules = {}
    for name, parameter in adapter.trainable(model).items():
        module, _, last = name.rpartition(".")
        modules.setdefault(module, {})[last] = parameter
    kinds = {}
    for module, parameters in modules.items():
        kind = ".".join(part for part in module.split(".") if not part.isdigit() and part not in ("model", "layers"))
        kinds.setdefault((kind, tuple(parameters)), []).append([parameter.shape for parameter in parameters.values()])
    total = sum(parameter.numel() for parameter in adapter.trainable(model).values())
    everything = sum(parameter.numel() for parameter in model.parameters())
    shapes = ["  ".join(f"{name} {shape_range(shapes)}" for name, shapes in zip(names, zip(*layers)))
              for (_, names), layers in kinds.items()]
    width = max([37] + [len(text) + 2 for text in shapes])
    lines = [f"{'module':<26}{'trains':<{width}}{'layers':>7}{'parameters':>14}"]
    for ((kind, _), layers), text in zip(kinds.items(), shapes):
        lines.append(f"{kind:<26}{text:<{width}}{len(layers):>7}{sum(map(math.prod, sum(layers, []))):>14,}")
    lines.append(f"{'all':<{width + 33}}{total:>14,}  ({100 * total / everything:.2f} % of {everything:,})")
    frozen = sum(tensor.numel() for tensor in adapter.state(model).values()) - total
    if frozen:
        lines.append(f"{'frozen, added and saved beside them':<{width + 33}}{frozen:>14,}")
    return lines


def shape_range(shapes):
    """[[2, 64], [9, 64]] -> [2-9, 64]."""
    ends = [(min(sizes), max(sizes)) for sizes in zip(*shapes)]
    return "[" + ", ".join(str(low) if low == high else f"{low}-{high}" for low, high in ends) + "]"


def activation_bytes(model, tokens, recompute):
    """About how many bytes of activations one forward pass over `tokens` tokens keeps for the backward pass."""
    config, size = model.config, model.lm_head.weight.element_size()
    d, ffn, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    q, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    # x, n(x), h, n(h); queries, what attention gives, twice; keys, values; gate, up, their product
    block = 4 * d + 3 * q + 2 * kv + 3 * ffn
    return tokens * size * (layers * d + block if recompute else layers * block)


def describe_first_step(args, base, data, step):
    """Print what --dry-run shows: the memory the run will take, and the batch after `step` steps, with its answers in
    [[ ]]."""
    model, lengths = base.model, [len(ids) for ids, _ in data.train]
    longest = max(lengths)
    weights, trained = (sum(p.numel() * p.element_size() for p in some)
                        for some in (model.parameters(), adapter.trainable(model).values()))
    head = 2 * 4 * CHUNK * model.config.vocab_size  # logits and their gradient, a chunk at a time
    activations = activation_bytes(model, args.micro_batch * longest, args.recompute) + head
    if model.lm_head.weight.device.type == "cpu":
        activations *= 1.25  # measured: so much more lies between tensors, where malloc finds no use for it
    if args.recorded:
        activations *= 1.1  # measured, by what was allocated: 10.2 and 25.9 GB at 32 and 86 rows of 512 tokens
    total = weights + 3 * trained + activations
    print(f"memory    about {total / 1e9:.1f} GB and the program itself: {weights / 1e9:.2f} weights, "
          f"{3 * trained / 1e9:.2f} gradients and moments, {activations / 1e9:.2f} activations of {args.micro_batch} "
          f"rows of {longest} tokens, the longest")
    batches = itertools.islice(endless_batches(lengths, args.batch, args.seed), step, args.steps)
    batch = next(batches, [])  # none where all steps are made
    tokens = token_count([data.train[i] for i in batch])
    print(f"\nthe batch of step {step + 1}, {tokens} tokens; what carries loss is in [[ ]]" if batch else
          f"\nall {step} steps are made")
    for i in batch:
        ids, start = data.train[i]
        question, answer = base.tokenizer.decode(ids[:start]), base.tokenizer.decode(ids[start:])
        print(f"\n--- record {data.numbers[i]} of the data, {len(ids)} tokens, {len(ids) - start} of them answer\n"
              f"{printable(question)}[[{printable(answer)}]]")
    print("\na dry run: nothing was trained, nothing was written")


def gflop_per_token(model, encoded, compiled=None):
    """(forward, training) GFLOP per token of matrix products, for examples like `encoded`; recomputing is not counted.

    torch counts those of the decoder on a few tokens, where attention's own products are next to nothing. The head is
    used at answer tokens only: per weight 2 forward, 2 for the gradient of its input, 2 more if it trains.
    """
    tokens = torch.zeros(1, 8, dtype=torch.long, device=model.lm_head.weight.device)
    recompute, model.model.recompute = model.model.recompute, False
    with eagerly(compiled), sdpa_kernel(SDPBackend.MATH):  # of a GPU's kernels torch counts none with grouped queries
        with FlopCounterMode(display=False) as forward, torch.no_grad():
            model.model(tokens)
        with FlopCounterMode(display=False) as both:
            hidden = Decoder.forward(model.model, tokens)  # as written, also where graphs.py has another in its place
            if hidden.requires_grad:  # else the head alone trains
                hidden.sum().backward()
    model.model.recompute = recompute
    for parameter in adapter.trainable(model).values():
        parameter.grad = None
    head = model.lm_head.weight
    share = answer_tokens(encoded) / token_count(encoded) * head.numel()
    return (1e-9 * (forward.get_total_flops() / tokens.numel() + 2 * share),
            1e-9 * (both.get_total_flops() / tokens.numel() + (6 if head.requires_grad else 4) * share))


def expected_seconds(args, data, gflop, forward_seconds):
    """How long training should take, all losses that are measured included, from how long those before it took and
    what a token takes: gflop is (forward, training)."""
    forward_gflop, train_gflop = gflop
    tokens = args.steps * args.batch * token_count(data.train) / len(data.train)
    per_token = forward_seconds / token_count(data.held_out + data.prose)  # of a forward pass
    return (per_token * (tokens * train_gflop / forward_gflop + token_count(data.report))
            + math.ceil(args.steps / args.eval_every) * forward_seconds)


def log_line(line, steps, left):
    """One dense line of text for a logged step; numbers that have no place of their own come behind R."""
    step, R = f"{line['step']:>{len(str(steps))}}/{steps}", line.get("regularizer")
    known = ("step", "loss", "lr", "grad_norm", "regularizer", "tokens_per_second", "padding", "gflops", "memory_gb",
             "loss_max", "spike")
    more = "".join(f"  {name} {value:.4g}" for name, value in line.items() if name not in known)
    memory = "" if line["memory_gb"] is None else f"  {line['memory_gb']:.2f} GB"
    return (f"step {step}  loss {line['loss']:.4f}  lr {line['lr']:.1e}  |g| {line['grad_norm']:.2f}"
            + ("" if R is None else f"  R {R:.1e}") + more
            + f"  {line['tokens_per_second']:,.0f} tok/s  pad {100 * line['padding']:.0f}%"
              f"  {line['gflops']:,.0f} GFLOP/s{memory}  {duration(left)} left"
            + (f"  <- loss spike, {line['spike']:.1f} times the usual" if "spike" in line else ""))


def spike(losses, recent):
    """{"loss_max", "spike"} where they say something: the highest of the losses since the last line, if there were
    several, and what multiple it is of the median of the `recent` ones, if that is 2 or more."""
    line = {"loss_max": max(losses)} if len(losses) > 1 else {}
    usual = statistics.median(recent) if len(recent) >= 5 else math.inf
    return {**line, "spike": max(losses) / usual} if max(losses) >= 2 * usual else line


def change_text(line):
    """What a held-out line of the log says about the weights, in words."""
    text = "" if line.get("change") is None else f"  |dW|/|W| {line['change']:.1e}"
    if "gates" in line:
        text += f"  top gate {line['top_gate']:.2f}, sets used {' '.join(f'{gate:.2f}' for gate in line['gates'])}"
    if "forgot" in line:
        text += f"  forgot {line['forgot']:+.4f}"
    known = ("step", "held_out_loss", "change", "top_gate", "gates", "prose_loss", "forgot")
    return text + "".join(f"  {name} {value:.4g}" for name, value in line.items() if name not in known)


def result_of(args, regularizer, base, data, source, progress, losses, adapter_path, command):
    """The record of a finished run, as result.json keeps it. losses: {"report_losses": [...], ...}, what was measured
    example by example."""
    model, seconds = base.model, progress.seconds_in_steps
    device = model.lm_head.weight.device
    hidden = ("saved", "resume", "dry_run", "multiple")
    settings = {key: value for key, value in vars(args).items() if key not in hidden}
    more = {**losses}
    if data.report:
        more |= {"report_loss": sum(losses["report_losses"]) / answer_tokens(data.report),
                 "report_tokens": [answer_tokens([example]) for example in data.report]}
    if progress.prose:
        more |= {"prose_loss": progress.prose, "forgot": progress.prose[args.steps] - progress.prose[0],
                 "prose_sha256": examples_sha256(data.prose)}
    return {**settings, **regularizer, "out": str(args.out), "adapter": model.adapter_config, "source": source,
            "base_sha256": base.sha256, "data_sha256": data.sha256,
            "held_out_sha256": data.held_out_sha256,
            "trainable_parameters": sum(p.numel() for p in adapter.trainable(model).values()),
            "adapter_bytes": adapter_path.stat().st_size, "held_out_examples": len(data.held_out),
            "held_out_loss": progress.held_out, "held_out_before": progress.held_out[0],
            "held_out_after": progress.held_out[args.steps], "held_out_best": min(progress.held_out.values()),
            **more, "resumed_at": progress.resumed_at, "tokens": progress.tokens,
            "tokens_per_second": per_second(progress.tokens, seconds), "seconds_in_steps": seconds,
            "seconds": progress.seconds,
            "memory_gb": peak_memory(device), "device": device_name(device), "threads": torch.get_num_threads(),
            "dtype": str(model.lm_head.weight.dtype).removeprefix("torch."), "products_widened": bool(WIDENED),
            "products": products(),
            "torch": torch.__version__, "python": platform.python_version(), "command": command}


def print_result(args, result, adapter_path):
    """Print how a run ended."""
    before, after = result["held_out_before"], result["held_out_after"]
    print(f"held-out loss {before:.4f} -> {after:.4f} ({100 * (after / before - 1):+.1f} %) after {args.steps} steps, "
          f"{result['tokens']:,} tokens at {result['tokens_per_second']:,.0f} per second; "
          f"{duration(result['seconds'])} in all")
    if "report_loss" in result:
        print(f"report {result['report_loss']:.4f}: the loss on {len(result['report_losses'])} examples of --report")
    if "forgot" in result:
        first, *_, last = result["prose_loss"].values()
        print(f"forgot {result['forgot']:+.4f}: the loss on general text, {first:.4f} -> {last:.4f}")
    measured = "loss" if instructions.is_file(result["data"]) else "accuracy"
    print(f"adapter: {adapter_path}, {result['adapter_bytes'] / 1e6:.1f} MB; "
          f"its {measured}: python eval.py {shlex.quote(str(args.out))}")


def peak_memory(device):
    """Peak memory in GB: of the GPU's allocator, or of this process on a CPU; None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    if resource is None:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def per_second(count, seconds):
    """A rate; 0 where the clock stood still."""
    return count / seconds if seconds > 0 else 0.0


def duration(seconds):
    """75 -> 1m15s."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds:02d}s" if minutes else f"{seconds}s"
