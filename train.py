"""Fine-tune a model on word problems with one of the methods: `python train.py --method sorsa`.

The loop is plain: batches of examples of similar length, the loss on answer tokens only, one optimizer step per batch
however it is cut into micro-batches. Everything that was chosen is printed; every choice is a flag. A run that was
stopped goes on with `python train.py --resume RUN`.
"""
import collections
import contextlib
import itertools
import json
import math
import os
import shutil
import sys
import time

import torch

import adapter
import checkpoint
import prompting
import resume
from batching import (answer_tokens, collate, data_name, encode_data, endless_batches, load_examples, padded_length,
                      token_count)
from eval import complete
from loss import answer_loss
from report import (change_text, describe, describe_first_step, duration, expected_seconds, gflop_per_token, log_line,
                    peak_memory, spike)
from script import choose_device, run_script, tune_cpu, write_json
from settings import (EVAL_FILES, check_out, choose_budget, choose_out, complete_options, flags_of, method_options,
                      parse_arguments)
from tensorfile import atomic_write

GRAPH_MULTIPLE = 64  # CUDA graphs are recorded anew for every shape: rows are padded to a multiple of so many tokens


@torch.no_grad()
def held_out_loss(model, encoded, batch, device, autocast):
    """Mean loss per answer token over a fixed set of examples."""
    by_length = sorted(encoded, key=lambda example: -len(example[0]))
    total = 0.0
    for start in range(0, len(by_length), batch):
        with autocast:
            total += answer_loss(model, *collate(by_length[start:start + batch], device)).item()
    return total / answer_tokens(encoded)


def change_statistics(method, model, tokens):
    """{"change": |dW| / |W|} of the adapted matrices; for Mo-SARA with the gates of its routers on tokens (B, T)."""
    if method == "mosara":
        return adapter.method_module(method).gate_statistics(model.model, tokens)
    return {"change": adapter.relative_change(model)} if adapter.adapted_layers(model) else {}


def learning_rate(step, steps, peak, schedule, warmup):
    """The rate of step 0 .. steps-1: a linear rise over `warmup` of them, then cosine, linear or constant."""
    rise = math.ceil(warmup * steps)
    if step < rise:
        return peak * (step + 1) / rise
    progress = (step - rise) / max(1, steps - rise)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return peak * {"cosine": cosine, "linear": 1 - progress, "constant": 1.0}[schedule]


def accumulate_gradients(model, encoded, micro_batch, device, autocast, multiple=1):
    """Forward and backward of one batch in pieces; returns the loss per answer token of the whole batch, a tensor.

    Every piece is divided by the answer tokens of the whole batch, so the gradient does not depend on where it is cut.
    """
    total, loss = answer_tokens(encoded), 0.0
    for start in range(0, len(encoded), micro_batch):
        tokens, targets = collate(encoded[start:start + micro_batch], device, multiple)
        with autocast:
            part = answer_loss(model, tokens, targets) / total
        part.backward()
        loss = loss + part.detach()
    return loss


def decay_groups(model, weight_decay):
    """Parameter groups for AdamW: what layers share (LoTR's A and B) is not decayed, it would be pulled to zero."""
    shared = {id(p) for module in model.modules() if isinstance(module, adapter.Shared) for p in module.parameters()}
    groups = {False: [], True: []}
    for parameter in adapter.trainable(model).values():
        groups[id(parameter) in shared].append(parameter)
    return [{"params": parameters, "weight_decay": 0.0 if is_shared else weight_decay}
            for is_shared, parameters in groups.items() if parameters]


def compile_blocks(model, mode):
    """torch.compile every block of the decoder, in place: one compilation serves all, whatever the ranks of layers.

    A first one is for the shapes of the first batch, a second one for any; mode "reduce-overhead" records CUDA graphs.
    The rest of a step stays as it is: the head's loss depends on how many answer tokens there are. Raises ValueError
    where a CPU has no C++ compiler.
    """
    compiler = os.environ.get("CXX", "g++")
    if model.lm_head.weight.device.type == "cpu" and shutil.which(compiler) is None:
        raise ValueError(f"--compile on a CPU needs a C++ compiler, and there is no {compiler} here: install one, name "
                         "it in $CXX, or leave --compile out")
    torch._dynamo.config.force_parameter_static_shapes = False  # else SARA's layers would each be compiled
    torch._dynamo.config.force_nn_module_property_static_shapes = False
    for block in model.model.layers:
        block.compile(mode=mode)
    if mode == "reduce-overhead":  # graphs write their results to the same memory again: say where a pass begins
        model.model.register_forward_pre_hook(lambda *_: torch.compiler.cudagraph_mark_step_begin())


def eagerly(compiled):
    """A context in which compiled blocks run as they are written: what has shapes of its own is not worth compiling."""
    return torch.compiler.set_stance("force_eager") if compiled else contextlib.nullcontext()


def mixed_precision(args, device):
    """A context in which products are taken in bf16 where args.autocast says so: full fine-tuning on a GPU."""
    return torch.autocast(device.type, torch.bfloat16, enabled=args.autocast is not None)


# ---- the loop -------------------------------------------------------------------------------------------------------

def check_finite(steps, numbers, lr):
    """FloatingPointError for the first of `steps`, tuples (step, indices, loss, gradient norm, R or None), whose
    values are not all finite. `numbers` says which record of the data an index is, from 1."""
    for step, indices, *values in steps:
        if not all(math.isfinite(value) for value in values if value is not None):
            named = ", ".join(str(numbers[i]) for i in indices[:16])
            more = f" and {len(indices) - 16} more" if len(indices) > 16 else ""
            said = ", ".join(f"{what} {value:g}" for what, value in zip(("loss", "gradient norm", "R"), values)
                             if value is not None)
            raise FloatingPointError(f"step {step}: {said}, on records {named}"
                                     f"{more} of the data; the weights are as they were before: lower --lr, now {lr:g}")


def skip_if_not_finite(optimizer, values):
    """Without waiting for a GPU: from the first step on whose values are not all finite, AdamW changes nothing more."""
    bad = ~torch.stack([torch.isfinite(value) for value in values if value is not None]).all()
    optimizer.found_inf = torch.maximum(getattr(optimizer, "found_inf", torch.zeros_like(bad.float())), bad.float())


def train(args, model, optimizer, progress, encoded, numbers, regularize, measure, save, log):
    """The loop, from where `progress` is to the last step; keeps `progress` up to date.

    encoded: [(ids, prompt_length)], `numbers` their places in the data. `regularize()` adds its gradient and returns R,
    or is None; `measure(step)` returns the held-out loss; `save()` writes a checkpoint; log is a text file.
    After SIGINT or SIGTERM it finishes the step, saves, and raises SystemExit. Raises FloatingPointError at the first
    step whose loss or gradient is not finite; on a GPU, which is not waited for, when that step is next logged.
    """
    device = model.lm_head.weight.device
    autocast = mixed_precision(args, device)
    lengths = [len(ids) for ids, _ in encoded]
    train_gflop = gflop_per_token(model, answer_tokens(encoded) / sum(lengths))[1]
    multiple = GRAPH_MULTIPLE if args.compile == "reduce-overhead" else 1
    parameters, recent = list(adapter.trainable(model).values()), collections.deque(maxlen=20)
    batches = itertools.islice(endless_batches(lengths, args.batch, args.seed), progress.step, args.steps)
    started, tokens, padded, since = time.perf_counter(), 0, 0, []  # since the last logged step
    with resume.noted_signals() as signals:
        for step, indices in enumerate(batches, progress.step + 1):
            rate = learning_rate(step - 1, args.steps, args.lr, args.schedule, args.warmup)
            for group in optimizer.param_groups:
                group["lr"] = rate
            batch = [encoded[i] for i in indices]
            loss = accumulate_gradients(model, batch, args.micro_batch, device, autocast, multiple)
            norm = torch.nn.utils.clip_grad_norm_(parameters, args.clip)
            R = regularize() if regularize else None  # after clipping, and outside the logged norm
            since.append((step, indices, loss, norm, R))
            if device.type == "cpu":
                check_finite(since[-1:], numbers, args.lr)
            else:
                skip_if_not_finite(optimizer, (loss, norm, R))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            parts = [batch[i:i + args.micro_batch] for i in range(0, len(batch), args.micro_batch)]
            tokens += token_count(batch)
            padded += sum(len(part) * (1 + padded_length(part, multiple)) for part in parts)

            to_measure = step % args.eval_every == 0 or step == args.steps
            to_stop = bool(signals) and step < args.steps  # a signal from here on is for the next step
            to_save = step % args.save_every == 0 or step == args.steps or to_stop
            if not (step % args.log_every == 0 or to_measure or to_save):
                continue
            check_finite(since, numbers, args.lr)  # waits for a GPU to finish
            line = {"step": step, "loss": loss.item(), "lr": rate, "grad_norm": norm.item(),
                    **spike([past.item() for _, _, past, _, _ in since], recent)}
            if R is not None:
                line["regularizer"] = R.item()
            recent.append(line["loss"])
            elapsed = time.perf_counter() - started
            progress.step, progress.tokens = step, progress.tokens + tokens
            progress.seconds_in_steps += elapsed
            line.update(tokens_per_second=tokens / elapsed, padding=1 - tokens / padded,
                        gflops=tokens * train_gflop / elapsed, memory_gb=peak_memory(device))
            log.write(json.dumps(line) + "\n")
            left = progress.seconds_in_steps / step * (args.steps - step)
            print(log_line(line, args.steps, left), flush=True)
            if to_measure:
                progress.held_out[step] = measure(step)
            if to_save:
                save()
            if to_stop:
                print(f"\nstopped by {signals[0].name} after step {step} of {args.steps}; to go on: "
                      f"python train.py --resume {args.out}", flush=True)
                raise SystemExit(128 + signals[0])
            started, tokens, padded, since = time.perf_counter(), 0, 0, []


# ---- the script -----------------------------------------------------------------------------------------------------

def measure(args, model, held_out, step, log):
    """The held-out loss, printed and logged with what the method's weights or routers look like."""
    device = model.lm_head.weight.device
    autocast = mixed_precision(args, device)
    with eagerly(args.compile):
        loss = held_out_loss(model, held_out, args.micro_batch, device, autocast)
        if not math.isfinite(loss):
            raise FloatingPointError(f"step {step}: held-out loss {loss:g}; lower --lr, now {args.lr:g}")
        one = collate(held_out[:1], device)[0]  # (1, T), without padding, to look at routers with
        line = {"step": step, "held_out_loss": loss, **change_statistics(args.method, model, one)}
    log.write(json.dumps(line) + "\n")
    print(f"held-out loss after {step} steps: {loss:.4f}{change_text(line)}", flush=True)
    return loss


def print_sample(args, base, example, when):
    """The model's answer to a held-out question."""
    text = prompting.prompt(example["question"], template=args.template)
    right = example["answer"].rstrip().splitlines()[-1].removeprefix("#### ").removeprefix("The answer is: ")
    room = base.model.config.max_position_embeddings - len(base.tokenizer.encode(text))
    if room > 0 and not args.no_sample:
        with eagerly(args.compile):
            done = complete(base.model, base.tokenizer, [text], min(128, room), template=args.template)
        answer = done[0]["text"]
        print(f"\n--- a held-out question, {when} training (right: {right})\n{text}{answer}\n---\n", flush=True)


def open_log(args, step):
    """The run's log, to append to: new, or when a run goes on the lines up to its checkpoint's step. Line by line, so
    that a killed run leaves every line it printed."""
    path = args.out / "log.jsonl"
    args.out.mkdir(parents=True, exist_ok=True)
    for left in args.out.glob(".*.tmp"):  # of a run that was killed as it wrote
        left.unlink()
    if not args.resume:
        (args.out / resume.FILE).unlink(missing_ok=True)  # of the run that is overwritten
    kept = []
    if args.resume and path.is_file():
        for text in path.read_text(errors="replace").splitlines():
            with contextlib.suppress(ValueError, TypeError, KeyError):  # the last line may be cut
                if json.loads(text)["step"] <= step:
                    kept.append(text + "\n")
    with atomic_write(path) as file:
        file.write("".join(kept).encode())
    return open(path, "a", buffering=1)


def main(argv=None):
    began = time.perf_counter()
    args = parse_arguments(argv)
    tune_cpu()
    options, regularizer = method_options(args)
    device, dtype = choose_device(args.device, args.dtype)
    # Full fine-tuning keeps fp32 weights, where small steps survive, and computes in bf16 on a GPU.
    weights = torch.float32 if args.method == "full" else dtype
    args.autocast = "bfloat16" if weights != dtype else None
    args.dtype = str(dtype).removeprefix("torch.")
    check_out(args)

    print(f"loading {args.model}, attaching {args.method} ...", flush=True)
    examples, source = load_examples(args.data)
    base = checkpoint.load(args.model, weights, device)
    model = base.model
    model.model.checkpointing = args.checkpointing
    data = encode_data(args, examples, base)
    if args.saved:
        resume.attach(args.resume, args.saved, base, data.sha256)
    else:
        options = complete_options(args, options, model, weights, device)
        adapter.method_function(args.method, "attach")(model, **options)
        del options  # --extra can be large
    if args.compile:
        compile_blocks(model, args.compile)
    choose_budget(args, device, len(data.train))
    choose_out(args)
    progress = args.saved.progress if args.saved else resume.Progress()
    optimizer = torch.optim.AdamW(decay_groups(model, args.weight_decay), lr=args.lr, fused=True)
    if args.saved:
        resume.restore(args.resume, args.saved, model, optimizer, args.steps)
        args.saved = None  # its file, which the next checkpoint replaces, is let go
    describe(args, base, regularizer, device, source, data)
    if args.dry_run:
        return describe_first_step(args, base, data, progress.step)

    args.model, args.data = base.name, data_name(args.data, source)  # by which --resume and eval.py find them again
    earlier = progress.seconds

    def regularize():
        return adapter.method_module(args.method).add_regularizer_grad(model, regularizer["gamma"] / args.lr,
                                                                       regularizer["reduction"])

    def save():
        progress.seconds = earlier + time.perf_counter() - began
        resume.save(args.out / resume.FILE, model, optimizer, base, flags_of(args), data.sha256, progress)

    with open_log(args, progress.step) as log:
        if args.resume:
            progress.resumed_at.append(progress.step)
            print(f"going on  after step {progress.step} of {args.steps}", flush=True)
        else:
            print_sample(args, base, data.example, "before")
            measuring = time.perf_counter()
            progress.held_out[0] = measure(args, model, data.held_out, 0, log)
            expected = expected_seconds(args, model, data.train, data.held_out, time.perf_counter() - measuring)
            print(f"expecting about {duration(expected)} of training", flush=True)
        train(args, model, optimizer, progress, data.train, data.numbers, regularize if regularizer.get("gamma") else
              None, lambda step: measure(args, model, data.held_out, step, log), save, log)

    path = args.out / "adapter.safetensors"
    adapter.save(model, path, base.name, base.sha256)
    for stale in EVAL_FILES:  # of the adapter that was overwritten
        (args.out / stale).unlink(missing_ok=True)

    before, after, tokens, seconds = (progress.held_out[0], progress.held_out[args.steps], progress.tokens,
                                      progress.seconds_in_steps)
    settings = {key: value for key, value in vars(args).items() if key not in ("saved", "resume", "dry_run")}
    result = {**settings, **regularizer, "out": str(args.out), "adapter": model.adapter_config, "source": source,
              "base_sha256": base.sha256,
              "trainable_parameters": sum(p.numel() for p in adapter.trainable(model).values()),
              "adapter_bytes": path.stat().st_size, "held_out_examples": len(data.held_out),
              "held_out_loss": progress.held_out, "held_out_before": before, "held_out_after": after,
              "held_out_best": min(progress.held_out.values()), "resumed_at": progress.resumed_at,
              "tokens": tokens, "tokens_per_second": tokens / seconds, "seconds_in_steps": seconds,
              "seconds": earlier + time.perf_counter() - began, "memory_gb": peak_memory(device), "device": str(device),
              "dtype": str(weights).removeprefix("torch."), "torch": torch.__version__,
              "command": " ".join(["python train.py", *(sys.argv[1:] if argv is None else argv)])}
    write_json(args.out / "result.json", result)
    (args.out / resume.FILE).unlink()  # the run is finished: the adapter is all that is needed
    print_sample(args, base, data.example, "after")
    print(f"held-out loss {before:.4f} -> {after:.4f} ({100 * (after / before - 1):+.1f} %) after {args.steps} steps, "
          f"{tokens:,} tokens at {tokens / seconds:,.0f} per second; {duration(result['seconds'])} in all")
    print(f"adapter: {path}, {path.stat().st_size / 1e6:.1f} MB; its accuracy: python eval.py {args.out}")
    return result


if __name__ == "__main__":
    run_script(main, "lower --micro-batch, or --max-tokens, or give --checkpointing; a run that has saved a checkpoint "
                     "goes on with --resume RUN")
