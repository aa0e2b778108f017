"""What train.py tells: the plan before anything is spent, a line per logged step, what a step costs."""
import itertools
import math
import resource
import statistics
import sys

import torch

import adapter
from batching import answer_tokens, endless_batches, token_count
from kernels import onednn_multiplies
from loss import CHUNK


def describe(args, base, regularizer, device, source, data):
    """Print everything that was chosen, before anything is spent."""
    model, encoded, held_out = base.model, data.train, data.held_out
    settings, targets = {**model.adapter_config, **regularizer}, model.adapter_config["targets"]
    hidden, unset = ("method", "targets", "seed", "ks", "norms"), (None, [], False)
    shown = [f"{key} {value}" for key, value in settings.items() if key not in hidden and value not in unset]
    tokens, answers = token_count(encoded) / len(encoded), answer_tokens(encoded) / len(encoded)
    dtype = str(model.lm_head.weight.dtype).removeprefix("torch.")
    if args.autocast:
        dtype += f" computing in {args.autocast}"
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    if onednn_multiplies(model.lm_head.weight):
        hardware += ", fp32 products by oneDNN"
    print(f"device    {device} ({hardware}), weights {dtype}, torch {torch.__version__}")
    if args.recipe:
        words = {key: "+".join(map(str, value)) if key == "cut" else value for key, value in args.recipe_set.items()}
        print(f"recipe    {args.recipe} sets {', '.join(f'{key} {value}' for key, value in words.items())}")
    print(f"model     {base.name}: {len(model.model.layers)} layers, width {model.config.hidden_size}")
    print(f"data      {source}")
    print(f"          {len(encoded)} to train on, {len(held_out)} held out, {data.left_out} left out "
          f"(longer than {args.max_tokens} tokens)")
    print(f"          prompt {args.template}; {tokens:.0f} tokens per example, {answers:.0f} of them answer, "
          f"calculator annotations {'removed' if args.strip_annotations else 'kept'}")
    if args.cut:
        cut = sum(ids[-1] != base.tokenizer.eos_id for ids, _ in encoded)
        print(f"          prompts cut at {args.cut[0]} tokens, answers at {args.cut[1]} ({cut} of them were longer)")
    print(f"method    {', '.join([args.method, *shown])}; targets {', '.join(targets or ['every parameter'])}")
    if args.params:
        total = sum(p.numel() for p in adapter.trainable(model).values())
        size = "threshold" if "threshold" in settings else "rank"
        print(f"          nearest to --params {args.params:,}: {size} {settings[size]} with {total:,}")
    if "ks" in settings:
        print("          ranks k, layer by layer")
        print("\n".join(f"          {line}" for line in adapter.method_module(args.method).rank_table(model)))
    print("\n".join(f"          {line}" for line in adapter.parameter_table(model)))
    epochs = args.steps * args.batch / len(encoded)
    print(f"plan      {args.steps} steps of {args.batch} examples ({epochs:.2f} epochs), "
          f"{args.micro_batch} per forward pass{', checkpointing' * args.checkpointing}"
          f"{f', compiled ({args.compile})' if args.compile else ''}; "
          f"{gflop_per_token(model, answers / tokens)[1]:.2f} GFLOP per token")
    print(f"          AdamW, peak lr {args.lr:g}, {args.schedule}, warm-up {args.warmup:g}, "
          f"weight decay {args.weight_decay:g}, clip {args.clip:g}, seed {args.seed}")
    if regularizer.get("gamma"):
        print(f"          regularizer times gamma / peak lr = {regularizer['gamma'] / args.lr:g}, after clipping")
    saves = "" if args.save_every == args.eval_every else f", a checkpoint every {args.save_every}"
    print(f"out       {args.out}; held-out loss every {args.eval_every} steps{saves}", flush=True)


def activation_bytes(model, tokens, checkpointing):
    """About how many bytes of activations one forward pass over `tokens` tokens keeps for the backward pass."""
    config, size = model.config, model.lm_head.weight.element_size()
    d, ffn, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    q, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    # x, n(x), h, n(h); queries, what attention gives, twice; keys, values; gate, up, their product
    block = 4 * d + 3 * q + 2 * kv + 3 * ffn
    return tokens * size * (layers * d + block if checkpointing else layers * block)


def describe_first_step(args, base, data, step):
    """Print what --dry-run shows: the memory the run will take, and the batch after `step` steps, with its answers in
    [[ ]]."""
    model, lengths = base.model, [len(ids) for ids, _ in data.train]
    longest = max(lengths)
    weights, trained = (sum(p.numel() * p.element_size() for p in some)
                        for some in (model.parameters(), adapter.trainable(model).values()))
    head = 2 * 4 * CHUNK * model.config.vocab_size  # logits and their gradient, a chunk at a time
    activations = activation_bytes(model, args.micro_batch * longest, args.checkpointing) + head
    if model.lm_head.weight.device.type == "cpu":
        activations *= 1.25  # measured: so much more lies between tensors, where malloc finds no use for it
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
              f"{question}[[{answer}]]")
    print("\na dry run: nothing was trained, nothing was written")


def gflop_per_token(model, answer_share):
    """(forward, training) GFLOP per token: for every weight 2 forward, 2 for the gradient of its input, 2 more if it
    trains. The head is used at answer tokens only; attention's own products are small here and left out."""
    used = []  # (weights per token, do they train) of every matrix of every layer; shared ones count in each
    for layer in model.modules():
        if isinstance(layer, (torch.nn.Linear, adapter.AdaptedLinear)):
            matrices = [layer.weight, *(layer.factors() if isinstance(layer, adapter.AdaptedLinear) else ())]
            share = answer_share if layer is model.lm_head else 1
            used += [(share * matrix.numel(), matrix.requires_grad) for matrix in matrices]
    weights, trained = sum(n for n, _ in used), sum(n for n, trains in used if trains)
    return 2e-9 * weights, 1e-9 * (4 * weights + 2 * trained)


def expected_seconds(args, model, encoded, held_out, forward_seconds):
    """How long training should take, held-out losses included, from how long one held-out loss took."""
    forward_gflop, train_gflop = gflop_per_token(model, answer_tokens(encoded) / token_count(encoded))
    tokens = args.steps * args.batch * token_count(encoded) / len(encoded)
    per_token = forward_seconds / token_count(held_out) * train_gflop / forward_gflop
    return tokens * per_token + math.ceil(args.steps / args.eval_every) * forward_seconds


def log_line(line, steps, left):
    """One dense line of text for a logged step."""
    step, R = f"{line['step']:>{len(str(steps))}}/{steps}", line.get("regularizer")
    return (f"step {step}  loss {line['loss']:.4f}  lr {line['lr']:.1e}  |g| {line['grad_norm']:.2f}"
            + ("" if R is None else f"  R {R:.1e}")
            + f"  {line['tokens_per_second']:,.0f} tok/s  pad {100 * line['padding']:.0f}%"
              f"  {line['gflops']:,.0f} GFLOP/s  {line['memory_gb']:.2f} GB  {duration(left)} left"
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
    return text


def peak_memory(device):
    """Peak memory in GB: of the GPU's allocator, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def duration(seconds):
    """75 -> 1m15s."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds:02d}s" if minutes else f"{seconds}s"
