"""Fine-tune a model on word problems with one of the methods: `python train.py --method sorsa`.

The loop is plain: batches of examples of similar length, the loss on answer tokens only, one optimizer step per batch
however it is cut into micro-batches. Everything that was chosen is printed; every choice is a flag. A run that was
stopped goes on with `python train.py --resume RUN`.
"""
import support

support.interruptible(__name__)  # before torch, which takes seconds to import

import contextlib
import itertools
import json
import math
import shlex
import sys
import time

import torch

import adapter
from data import prompting
from data.batching import answer_tokens, collate, data_name, encode_data, endless_batches, load_examples
from methods import METHODS
from support import fast, graphs, report, resume, run_folder, spectra
from support.flags import choose_budget, complete_options, flags_of, method_options, parse_arguments
from support.generate import complete
from support.loss import answer_loss, example_losses, mean_loss
from support.monitor import Monitor
from support.script import choose_device, one_line, run_script, write_json
from weights import adapter_file, base_model
from weights.files import printable


# ---- the loop -------------------------------------------------------------------------------------------------------

def train(args, model, optimizer, encoded, monitor, regularize=None):
    """Train from where the monitor's progress is to the last step, on `encoded`: [(ids, prompt_length)].

    `regularize()` adds its gradient and returns the penalty R, or None. After a signal (resume.noted_signals) the
    monitor ends the step, saves, and raises SystemExit. A number that is not finite never reaches the weights:
    FloatingPointError (on a GPU at the next logged step).
    """
    parameters, done = list(adapter.trainable(model).values()), monitor.progress.step
    batches = endless_batches([len(ids) for ids, _ in encoded], args.batch, args.seed)
    for step, indices in enumerate(itertools.islice(batches, done, args.steps), done + 1):
        rate = learning_rate(step - 1, args.steps, args.lr, args.schedule, args.warmup)
        for group in optimizer.param_groups:  # one rate for all
            group["lr"] = rate
        loss = accumulate_gradients(args, model, [encoded[i] for i in indices])
        norm = torch.nn.utils.clip_grad_norm_(parameters, args.clip)
        numbers = {"loss": loss, "lr": rate, "grad_norm": norm}  # for the log: floats, or 0-d tensors
        R = regularize() if regularize else None  # after clipping, and outside the logged norm
        if R is not None:
            numbers["regularizer"] = R
        monitor.check(step, indices, numbers)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        monitor.after(step)


def learning_rate(step, steps, peak, schedule, warmup):
    """The rate of step 0 .. steps-1: a linear rise over the share `warmup` of them, then cosine, linear or constant."""
    rise = math.ceil(warmup * steps)
    if step < rise:
        return peak * (step + 1) / rise
    progress = (step - rise) / max(1, steps - rise)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return peak * {"cosine": cosine, "linear": 1 - progress, "constant": 1.0}[schedule]


def accumulate_gradients(args, model, encoded):
    """Forward and backward of one batch in pieces; returns the loss per answer token of the whole batch, a tensor.

    Every piece is divided by the answer tokens of the whole batch, so the gradient does not depend on where it is cut.
    """
    total, loss, device = answer_tokens(encoded), 0.0, model.lm_head.weight.device
    for start in range(0, len(encoded), args.micro_batch):
        tokens, targets = collate(encoded[start:start + args.micro_batch], device, args.multiple)
        with mixed_precision(args, device):
            part = answer_loss(model, tokens, targets) / total
        part.backward()
        loss = loss + part.detach()
    return loss


def decay_groups(model, weight_decay):
    """Parameter groups for an optimizer: what layers share (LoTR's A and B) is not decayed: it would go to zero."""
    shared = {id(p) for module in model.modules() if isinstance(module, adapter.Shared) for p in module.parameters()}
    groups = {False: [], True: []}
    for parameter in adapter.trainable(model).values():
        groups[id(parameter) in shared].append(parameter)
    return [{"params": parameters, "weight_decay": 0.0 if is_shared else weight_decay}
            for is_shared, parameters in groups.items() if parameters]


def mixed_precision(args, device):
    """A context in which products are taken in bf16 where args.autocast says so: full fine-tuning in bf16. Nothing is
    cached: each weight is used once, and a recorded pass has to round it anew."""
    return torch.autocast(device.type, torch.bfloat16, enabled=args.autocast is not None, cache_enabled=False)


@contextlib.contextmanager
def measuring(args, model):
    """A block in which compiled blocks run as they are written, and what knows a mode (dropout) is in evaluation's."""
    model.eval()
    with fast.eagerly(args.compile):
        yield
    model.train()


# ---- what is shown of a run -----------------------------------------------------------------------------------------

def measure(args, model, data, progress, step, log):
    """The held-out loss after `step` steps, and what --forgetting asks for, into `progress`: printed and logged with
    what the method's weights or routers look like."""
    device, watch = model.lm_head.weight.device, METHODS[args.method].watch
    with measuring(args, model):
        line = {"step": step, "held_out_loss": loss_of(args, model, data.held_out, step)}
        if data.prose:
            progress.prose[step] = loss_of(args, model, data.prose, step)
            line.update(prose_loss=progress.prose[step], forgot=progress.prose[step] - progress.prose[0])
        if watch:
            tokens = collate(data.held_out[:1], device)[0]  # one row (1, T): no padding to look at
            line.update(watch(model, tokens))
        elif adapter.adapted_layers(model):
            line["change"] = adapter.relative_change(model)
    progress.held_out[step] = line["held_out_loss"]
    log.write(json.dumps(line) + "\n")
    print(f"held-out loss after {step} steps: {line['held_out_loss']:.4f}{report.change_text(line)}", flush=True)


def measure_spectra(model, originals, step, log):
    """How far the weights have moved in their SVD after `step` steps, means over all matrices: printed and logged."""
    started = time.perf_counter()
    numbers = spectra.means([found for _, found in spectra.measure(model, originals)])
    log.write(json.dumps({"step": step, "spectra": numbers}) + "\n")
    print(f"spectra after {step} steps: {spectra.text(numbers)}  in {report.duration(time.perf_counter() - started)}",
          flush=True)


def loss_of(args, model, encoded, step):
    """The loss per answer token of examples that are not trained on. FloatingPointError if it is not finite."""
    device = model.lm_head.weight.device
    with mixed_precision(args, device):
        loss = mean_loss(model, encoded, args.micro_batch, device, args.multiple)
    if not math.isfinite(loss):
        fix = f"lower --lr, now {args.lr:g}" if step else "the base model itself gives it: load another"
        raise FloatingPointError(f"step {step}: held-out loss {loss:g}; {fix}")
    return loss


def losses_one_by_one(args, model, data):
    """{"report_losses": summed losses of the report's examples, "prose_losses": of the pieces of general text}, at the
    end of a run with --report; those that there are."""
    device = model.lm_head.weight.device
    measured = {"report_losses": data.report, "prose_losses": data.prose if data.report else []}
    with measuring(args, model), mixed_precision(args, device):
        losses = {name: example_losses(model, examples, args.micro_batch, device, args.multiple)
                  for name, examples in measured.items() if examples}
    return {name: [round(loss, 4) for loss in some] for name, some in losses.items()}


def print_sample(args, base, example, when):
    """The model's answer to a held-out question."""
    text = prompting.prompt(example["question"], template=args.template)
    lines = example["answer"].strip().splitlines()
    marks = [mark for mark in ("#### ", "The answer is: ") if lines[-1].startswith(mark)]
    right = lines[-1].removeprefix(marks[0]) if marks else lines[0][:80]
    room = base.model.config.max_position_embeddings - len(base.tokenizer.encode(text))
    if room > 0 and not args.no_sample:
        with measuring(args, base.model):
            done = complete(base.model, base.tokenizer, [text], min(128, room), template=args.template)
        shown = f"\n--- a held-out question, {when} training (right: {right})\n{text}{done[0]['text']}\n---\n"
        print(printable(shown), flush=True)


def record(args, model, encoded, device):
    """Have the decoder's passes recorded (support/graphs.py), those over the longest batch at once: in the memory that
    they take all others find room, and it is known before the first step whether there is enough."""
    graphs.RecordedDecoder(model)
    longest = max(encoded, key=lambda pair: len(pair[0]))
    with mixed_precision(args, device):
        model.model(collate([longest] * args.micro_batch, device, args.multiple)[0])
    model.zero_grad(set_to_none=True)


# ---- the script -----------------------------------------------------------------------------------------------------

def main(argv=None):
    began = time.perf_counter()
    args = parse_arguments(argv)
    options, regularizer = method_options(args)
    method = METHODS[args.method]
    if not args.plain:
        names = [name for name in fast.NAMES if (name, args.graphs) != ("decode", "off")]
        fast.switch_on(names, args.saved and args.saved.products, args.device)
    device, dtype = choose_device(args.device, args.dtype, args.plain)
    # Full fine-tuning keeps fp32 weights, where small steps survive, and multiplies in --dtype.
    weights = torch.float32 if args.method == "full" else dtype
    args.autocast = "bfloat16" if weights != dtype else None
    args.dtype = str(dtype).removeprefix("torch.")
    run_folder.check_out(args)

    print(one_line(f"loading {args.model}, attaching {args.method} ..."), flush=True)
    examples, source = load_examples(args.data)
    base = base_model.load(args.model, weights, device)
    model = base.model
    torch.manual_seed(args.seed)  # for what draws by itself, as dropout would
    model.model.recompute = args.recompute
    args.recorded = not args.plain and graphs.wanted(args.graphs, model)
    args.multiple = fast.row_multiple(device, args.recorded, model.config.max_position_embeddings)
    data = encode_data(args, examples, base)
    originals = None
    if args.spectra_every and args.method == "full":  # whose W_0 is nowhere else
        targets = (args.saved.config if args.saved else options).get("targets")
        originals = {name: W.to("cpu", copy=True) for name, W in spectra.original_matrices(model, targets).items()}
    if args.saved:
        resume.attach(args.resume, args.saved, base, data.sha256)
    else:
        options = complete_options(args, options, model, weights, device)
        method.attach(model, **options)
        del options  # --extra can be large
    adapter_file.check_recorded(args.method, model)
    adapter.cast_frozen(model, weights)
    if args.spectra_every and (why := spectra.unmeasurable(model, originals)):
        raise ValueError(f"--spectra-every: {why}: leave it out")
    if args.compile:
        fast.compile_blocks(model)
    choose_budget(args, device, len(data.train))
    command = shlex.join(["python", "train.py", *(sys.argv[1:] if argv is None else argv)])
    with run_folder.claimed(args):  # args.out
        return carry_out(args, base, data, source, regularizer, originals, device, began, command)


def carry_out(args, base, data, source, regularizer, originals, device, began, command):
    """Print the plan, train, and write the adapter and the result, which is returned, into the run's folder."""
    model, method = base.model, METHODS[args.method]
    progress = args.saved.progress if args.saved else resume.Progress()
    optimizer = torch.optim.AdamW(decay_groups(model, args.weight_decay), lr=args.lr, fused=True)
    products = args.saved.products if args.saved else fast.products()
    gflop = report.gflop_per_token(model, data.train, args.compile)
    if args.saved:
        resume.restore(args.resume, args.saved, model, optimizer, args.steps)  # torch's random state with it
        args.saved = None  # its file, which the next checkpoint replaces, is let go
    report.describe(args, base, optimizer, regularizer, device, source, data, gflop[1])
    if args.dry_run:
        return report.describe_first_step(args, base, data, progress.step)

    args.model, args.data = base.name, data_name(args.data, source)  # by which --resume and eval.py find them again
    earlier = progress.seconds

    def held_out(step):
        measure(args, model, data, progress, step, log)

    def save():
        progress.seconds = earlier + time.perf_counter() - began
        resume.save(args.out / resume.FILE, model, optimizer, base, flags_of(args), data.sha256, progress)

    measures = [(args.eval_every, held_out)]
    if args.spectra_every:
        measures.append((args.spectra_every, lambda step: measure_spectra(model, originals, step, log)))
    with run_folder.open_log(args, progress.step) as log:
        if args.resume:
            progress.resumed_at.append(progress.step)
            print(f"going on  after step {progress.step} of {args.steps}", flush=True)
            if products != fast.products():
                print(f"          fp32 products {fast.products()}, when it began {products}: last digits may differ")
        else:
            print_sample(args, base, data.example, "before")
            started = time.perf_counter()
            held_out(0)
            expected = report.expected_seconds(args, data, gflop, time.perf_counter() - started)
            for every, look in measures[1:]:
                started = time.perf_counter()
                look(0)
                expected += math.ceil(args.steps / every) * (time.perf_counter() - started)
            print(f"expecting about {report.duration(expected)} of training", flush=True)
        if args.recorded:
            record(args, model, data.train, device)
        with resume.noted_signals() as signals:
            train(args, model, optimizer, data.train,
                  Monitor(args, model, optimizer, data, gflop[1], progress, measures, save, log, signals),
                  method.regularize and (lambda: method.regularize(model, args.lr, **regularizer)))

    path = args.out / run_folder.ADAPTER
    adapter_file.save(model, path, base.name, base.sha256)
    losses = losses_one_by_one(args, model, data)
    progress.seconds = earlier + time.perf_counter() - began
    result = report.result_of(args, regularizer, base, data, source, progress, losses, path, command)
    write_json(args.out / run_folder.RESULT, result)
    (args.out / resume.FILE).unlink()  # the run is finished: the adapter is all that is needed
    print_sample(args, base, data.example, "after")
    report.print_result(args, result, path)
    for changed in base_model.changed(base):
        print(f"{changed} has been written to since this run began: the adapter belongs to the base as it was then, "
              f"sha256 {base.sha256[:12]}...", file=sys.stderr)
    return result


if __name__ == "__main__":
    run_script(main, "lower --micro-batch, or --max-tokens, or give --recompute",
               "a run that has saved a checkpoint goes on with --resume RUN")
