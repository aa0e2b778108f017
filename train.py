"""Fine-tune a model on word problems with one of the methods: `python train.py --method sorsa`.

The loop is plain: batches of examples of similar length, the loss on answer tokens only, one optimizer step per batch
however it is cut into micro-batches. Everything that was chosen is printed; every choice is a flag. A run that was
stopped goes on with `python train.py --resume RUN`.
"""
import collections
import contextlib
import inspect
import itertools
import json
import math
import os
import random
import resource
import shutil
import statistics
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch

import adapter
import checkpoint
import gsm8k
import metamath
import prompting
import resume
from eval import RESULT_FILES, complete
from loss import CHUNK, IGNORE, answer_loss
from script import (Parser, above_zero, amount, at_least_zero, check_folder, choose_device, keep_freed_memory, positive,
                    run_script, two_lengths, whole, write_json)
from tensorfile import atomic_write, fault

# The best of a small grid on the default model, GSM-8K, 24 steps of 6 (README, results/sweep.jsonl), the smaller of two
# that differ by less than 0.003: start there.
DEFAULT_LR = {"full": 1e-4, "lora": 3e-3, "pissa": 3e-4, "sorsa": 1e-4, "sara": 3e-2, "mosara": 1e-1,
              "cora": 3e-3, "cora-init": 3e-3, "lotr": 3e-3}
# --recipe paper: what SORSA's authors trained Llama 2 7B with (Mistral and Gemma at rank 64), PiSSA's at the same
# settings but for the rate, LoRA and full fine-tuning as their baselines. The other papers trained on other tasks.
RECIPE = {"template": "alpaca", "limit": 100_000, "cut": (512, 512), "rank": 128, "epochs": 1.0, "batch": 128,
          "schedule": "cosine", "warmup": 0.03, "weight_decay": 0.0, "clip": 1.0, "seed": 42}
RECIPE_OF = {"sorsa": {"lr": 3e-5, "gamma": 4e-4, "reduction": "mean"}, "pissa": {"lr": 2e-5},
             "lora": {"lr": 2e-5}, "full": {"lr": 2e-5}}
GRAPH_MULTIPLE = 64  # CUDA graphs are recorded anew for every shape: rows are padded to a multiple of so many tokens
SPLIT_SEED = 0  # which examples are held out never changes with --seed: held-out losses of all runs compare


# ---- batches --------------------------------------------------------------------------------------------------------

def load_examples(data):
    """(examples, source): the training problems that --data names, a file or one of gsm8k.load's kinds."""
    return metamath.load(data) if metamath.is_problem_file(data) else gsm8k.load(data, "train")


def encode_examples(tokenizer, examples, max_tokens, template="plain", cut=(None, None)):
    """{place in examples: (ids, prompt_length)} of those that have at most max_tokens tokens; ValueError if none has."""
    encoded = [prompting.encode(tokenizer, example, template, cut) for example in examples]
    kept = {place: pair for place, pair in enumerate(encoded) if len(pair[0]) <= max_tokens}
    if not kept:
        raise ValueError(f"all {len(encoded)} examples have more than {max_tokens} tokens: raise --max-tokens")
    return kept


def split(examples, held_out, limit=None):
    """(examples to train on, `held_out` examples kept apart): the same split whatever the seed of the run.

    With a limit, the ones to train on are the first of the data that are not held out.
    """
    if held_out >= len(examples):
        raise ValueError(f"--held-out {held_out} leaves nothing to train on: the data has {len(examples)} examples")
    order = random.Random(SPLIT_SEED).sample(range(len(examples)), len(examples))
    last = sorted(order[held_out:])[:limit][-1]
    return ([examples[i] for i in order[held_out:] if i <= last], [examples[i] for i in order[:held_out]])


class Data(NamedTuple):
    """What a run trains on and measures with: encoded examples are pairs (ids, prompt_length)."""
    train: list
    numbers: list  # which records of the data these are, from 1
    held_out: list
    example: dict  # a held-out one, as text
    left_out: int  # how many were too long
    sha256: str  # of train and held_out


def encode_data(args, examples, base):
    """Data from all examples: those that are held out apart, those that are too long left out."""
    if args.strip_annotations:
        examples = [{**example, "answer": gsm8k.strip_annotations(example["answer"])} for example in examples]
    args.max_tokens = min(args.max_tokens or sum(args.cut or (512,)), base.model.config.max_position_embeddings)
    places, apart = split(range(len(examples)), args.held_out, args.limit)
    encoded, held_out = (encode_examples(base.tokenizer, [examples[i] for i in part], args.max_tokens, args.template,
                                         args.cut or (None, None)) for part in (places, apart))
    kept, held_out = list(encoded.values()), list(held_out.values())
    return Data(kept, [1 + places[i] for i in encoded], held_out, examples[apart[0]],
                len(places) + len(apart) - len(kept) - len(held_out), resume.examples_sha256(kept, held_out))


def data_name(given, source):
    """What --data named, so that it is found again from any folder: a kind of data, or an absolute path."""
    name = {"auto": "practice" if source.startswith("practice") else "gsm8k"}.get(given, given)
    return name if name in ("practice", "gsm8k") else str(Path(name).resolve())


def epoch_batches(lengths, batch, seed, epoch, window=32):
    """Lists of `batch` indices that cover an epoch, with little padding: shuffle, sort windows by length, cut, shuffle.

    The order depends on (seed, epoch) alone. Examples that would not fill a batch are left out of this epoch.
    """
    rng = random.Random(f"{seed} {epoch}")
    order = rng.sample(range(len(lengths)), len(lengths))
    order = order[:len(order) // batch * batch] or order
    batches = []
    for start in range(0, len(order), window * batch):
        by_length = sorted(order[start:start + window * batch], key=lambda i: lengths[i])
        batches += [by_length[i:i + batch] for i in range(0, len(by_length), batch)]
    return rng.sample(batches, len(batches))


def endless_batches(lengths, batch, seed):
    """The batches of epoch after epoch."""
    for epoch in itertools.count():
        yield from epoch_batches(lengths, batch, seed, epoch)


def collate(encoded, device, multiple=1):
    """Tokens (B, T) on `device` and targets (B, T) on the CPU, where the loss counts them: the next tokens, IGNORE
    outside answers. Padded on the right, to a T that is a multiple of `multiple`."""
    T = padded_length(encoded, multiple)
    tokens = torch.zeros(len(encoded), T, dtype=torch.long)  # (B, T)
    targets = torch.full((len(encoded), T), IGNORE)  # (B, T)
    for row, (ids, prompt_length) in enumerate(encoded):
        tokens[row, :len(ids) - 1] = torch.tensor(ids[:-1])
        targets[row, prompt_length - 1:len(ids) - 1] = torch.tensor(ids[prompt_length:])
    return tokens.to(device, non_blocking=True), targets


def padded_length(encoded, multiple=1):
    """T of a batch: its longest row without the last token, which is a target only, rounded up to a multiple."""
    return -(-(max(len(ids) for ids, _ in encoded) - 1) // multiple) * multiple


def token_count(encoded):
    """How many tokens these examples have, padding not counted."""
    return sum(len(ids) for ids, _ in encoded)


def answer_tokens(encoded):
    """How many tokens of these examples carry loss."""
    return sum(len(ids) - prompt_length for ids, prompt_length in encoded)


# ---- one step -------------------------------------------------------------------------------------------------------

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


def change_text(line):
    """What a held-out line of the log says about the weights, in words."""
    text = "" if line.get("change") is None else f"  |dW|/|W| {line['change']:.1e}"
    if "gates" in line:
        text += f"  top gate {line['top_gate']:.2f}, sets used {' '.join(f'{gate:.2f}' for gate in line['gates'])}"
    return text


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


def decay_groups(model, weight_decay):
    """Parameter groups for AdamW: what layers share (LoTR's A and B) is not decayed, it would be pulled to zero."""
    shared = {id(p) for module in model.modules() if isinstance(module, adapter.Shared) for p in module.parameters()}
    groups = {False: [], True: []}
    for parameter in adapter.trainable(model).values():
        groups[id(parameter) in shared].append(parameter)
    return [{"params": parameters, "weight_decay": 0.0 if is_shared else weight_decay}
            for is_shared, parameters in groups.items() if parameters]


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


# ---- the script -----------------------------------------------------------------------------------------------------

def parse_arguments(argv):
    parser = Parser(prog="train.py", usage="train.py --method METHOD [flags]",
                    description="Fine-tune a model on word problems.")
    add = parser.add_argument
    add("--method", default="sorsa", help=f"one of {', '.join(adapter.METHODS)}")
    add("--model", default=checkpoint.DEFAULT_MODEL,
        help="base model: a name, a .gguf file, a folder in Hugging Face layout, or a hub id (owner/name)")
    add("--data", default="auto", help="gsm8k, practice, a folder with train.jsonl and test.jsonl, auto, or a file of "
                                       "problems with answers: MetaMathQA-395K.json, or a .jsonl")
    add("--template", choices=("plain", "alpaca"), default="plain", help="of the prompt")
    add("--recipe", choices=("paper",), help="the settings of SORSA's authors for MetaMathQA (for PiSSA, LoRA and full "
                                             "their baselines'); what is given beside it counts")
    add("--out", type=Path, help="folder of the run (default: runs/METHOD, or the next free runs/METHOD-N)")
    add("--overwrite", action="store_true", help="replace the run that --out already holds")
    add("--resume", type=Path, metavar="RUN", help="continue the run in this folder, with its own flags")
    add("--dry-run", action="store_true", help="load, attach, print the plan, the memory it will take and the first "
                                               "batch, and stop: nothing is written")

    add = parser.add_argument_group("every method (a flag that is not the method's own is refused)").add_argument
    add("--targets", help="names of linear layers, with commas (default: all seven; sara, mosara: q_proj,v_proj; "
                          "full: every parameter)")
    add("--params", type=amount, help="a budget, as in 1.2M: the rank, or for sara and mosara the threshold, whose "
                                      "count of trainable parameters comes nearest (not for full)")
    add = parser.add_argument_group("lora, pissa, sorsa, cora, cora-init, lotr").add_argument
    add("--rank", type=positive, help="r (default: 16, lotr: 64)")
    add = parser.add_argument_group("lora, sara, cora, cora-init, lotr").add_argument
    add("--alpha", type=above_zero, help="the change is scaled by alpha / r (default: alpha = r; lotr: 3 / sqrt(in))")
    add = parser.add_argument_group("pissa, sorsa").add_argument
    add("--svd", choices=("gram", "exact"), help="how the start is computed (default: gram)")
    add = parser.add_argument_group("sorsa").add_argument
    add("--gamma", type=at_least_zero, help="weight of the regularizer, 0 is off (default: 4e-4)")
    add("--reduction", choices=("mean", "sum"), help="of the regularizer's norms (default: mean)")
    add = parser.add_argument_group("sara, mosara").add_argument
    add("--threshold", type=above_zero, help="m: a layer's rank is how many leading singular values make up this share "
                                             "of their sum (default: sara 0.05, mosara 0.5)")
    add = parser.add_argument_group("sara").add_argument
    add("--init", choices=("lam", "lora"), help="which factor starts at zero: lam, or B as in LoRA (default: lam)")
    add = parser.add_argument_group("mosara").add_argument
    add("--sets", type=positive, help="n, sets of singular values (default: 5)")
    add("--router-rank", type=positive, help="q, inner width of the router (default: 1)")
    add("--v-mode", choices=("branch", "output"), help="what v scales; output does not start at the base "
                                                           "(default: branch)")
    add = parser.add_argument_group("cora, cora-init").add_argument
    add("--basis", choices=("weights", "input", "random"), help="where B comes from (default: weights)")
    add("--extra", help="further models, with commas, whose weights join the basis: same architecture and pretraining "
                         "(all are in memory at once while it is computed)")
    add("--a-init", choices=("zeros", "random"), help="start of A; random moves the output at step 0 (default: zeros)")
    add = parser.add_argument_group("lotr").add_argument
    add("--group-by", choices=("name", "shape"), help="which layers share A and B (default: name)")
    add("--core-only", action="store_true", default=None, help="freeze A and B at their random start, train the cores")

    add = parser.add_argument_group("training").add_argument
    add("--steps", type=positive, help="optimizer steps (default: 40 on a CPU)")
    add("--epochs", type=above_zero, help="instead of --steps (default: 1 on a GPU)")
    add("--batch", type=positive, help="examples per optimizer step (default: 8 on a CPU, else 32)")
    add("--micro-batch", type=positive, help="examples per forward pass (default: 8 on a CPU, else 32)")
    rates = ", ".join(f"{method} {lr:g}" for method, lr in DEFAULT_LR.items())
    add("--lr", type=above_zero, help=f"peak learning rate (default: {rates})")
    add("--schedule", choices=("cosine", "linear", "constant"), default="cosine", help="of the rate, after warm-up")
    add("--warmup", type=at_least_zero, default=0.03, help="share of the steps")
    add("--weight-decay", type=at_least_zero, default=0.0, help="AdamW's")
    add("--clip", type=above_zero, default=1.0, help="largest gradient norm")
    add("--max-tokens", type=positive, help="longer examples are left out (default: 512)")
    add("--cut", type=two_lengths, metavar="P+A", help="cut prompts at P tokens and answers at A instead of leaving "
                                                       "long examples out, as in 512+512")
    add("--strip-annotations", action="store_true", help="remove the <<48/2=24>> calculator annotations")
    add("--limit", type=positive, help="train on the first N examples of the data only")
    add("--seed", type=whole, default=0, help="of the order of the data and of random factors")
    add("--checkpointing", action="store_true", help="keep only the input of each block and compute the rest again in "
                                                     "the backward pass: less memory, about 1.3 times the work")

    add("--compile", choices=("default", "reduce-overhead"), metavar="MODE", help="torch.compile every block, MODE "
        "default or reduce-overhead (CUDA graphs: for a small model on a GPU); a minute or two at the start")

    add = parser.add_argument_group("reporting").add_argument
    add("--held-out", type=positive, default=64, help="training examples kept apart to measure the loss")
    add("--eval-every", type=positive, help="steps between held-out losses (default: a quarter of the run)")
    add("--save-every", type=positive, help="steps between checkpoints for --resume (default: as --eval-every)")
    add("--log-every", type=positive, help="steps between log lines (default: 1 on a CPU, else 10)")
    add("--no-sample", action="store_true", help="no sample answer before and after")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add("--dtype", choices=("float32", "bfloat16"), help="of the frozen weights (default: fp32 on a CPU, else bf16)")
    args = parser.parse_args(argv)
    saved = resume.read(args.resume) if args.resume else None
    if saved:
        argv = resumed_flags(parser, args, saved, sys.argv[1:] if argv is None else argv)
        args = parser.parse_args(argv)
    if args.recipe:
        settings = recipe_settings(args)
        parser.set_defaults(**settings)
        args = parser.parse_args(argv)
        args.recipe_set = {key: value for key, value in settings.items() if getattr(args, key) == value}
    if args.epochs and args.epochs > 1e6:
        parser.error(f"--epochs {args.epochs:g} is more than a million: give fewer")
    if args.steps and args.epochs:
        parser.error("give --steps or --epochs, not both")
    if args.warmup > 1:
        parser.error(f"--warmup {args.warmup:g} is a share of the steps: at most 1")
    if args.overwrite and args.out is None:
        parser.error("--overwrite replaces the run in a folder: name it with --out")
    args.saved, args.out = saved, args.resume or args.out
    return args


# Flags that may change when a run goes on: they do not touch its mathematics, or what they name is known by its checksum.
FREE = ("resume", "out", "overwrite", "dry_run", "model", "data", "micro_batch", "checkpointing", "compile", "eval_every",
        "save_every", "log_every", "no_sample", "device")


def flags_of(args):
    """The flags of a run, all that was chosen included, as a command line for --resume."""
    left_out = ("resume", "out", "overwrite", "dry_run", "epochs", "device", "saved", "recipe_set", "autocast")
    flags = []
    for name, value in vars(args).items():
        if name not in left_out and value is not None and value is not False:
            value = "+".join(map(str, value)) if name == "cut" else value
            flag = "--" + name.replace("_", "-")
            flags.append(flag if value is True else f"{flag}={value}")
    return flags


def resumed_flags(parser, args, saved, argv):
    """The flags of a saved run with those of argv behind them, which then count; ValueError if one of these changes what
    the run computes."""
    if args.out or args.overwrite:
        parser.error(f"--resume {args.resume} goes on in that folder: leave out --out and --overwrite")

    def refuse(message):
        raise fault(args.resume / resume.FILE, message, resume.AGAIN)

    parser.error, error = refuse, parser.error
    before = vars(parser.parse_args(saved.flags))
    parser.error = error
    now = vars(parser.parse_args([*saved.flags, *argv]))
    changed = [name for name in before if name not in FREE and now[name] != before[name]]
    if changed:
        flag = "--" + changed[0].replace("_", "-")
        raise ValueError(f"{flag} {now[changed[0]]} is not what the run in {args.resume} began with "
                         f"({before[changed[0]]}), and would change what it computes: leave {flag} out, or begin a new run")
    return [*saved.flags, *argv]


def recipe_settings(args):
    """What --recipe paper sets for the method, less what --params and --steps replace; ValueError where it has none."""
    adapter.method_module(args.method)  # ValueError for no method at all
    if args.method not in RECIPE_OF:
        raise ValueError(f"--recipe paper is known for {', '.join(RECIPE_OF)}: the paper behind {args.method} trained "
                         "on other tasks")
    replaced = ["rank"] * (args.params is not None or args.method == "full") + ["epochs"] * (args.steps is not None)
    settings = {**RECIPE, **RECIPE_OF[args.method]}
    return {key: value for key, value in settings.items() if key not in replaced}


METHOD_FLAGS = ("targets", "params", "rank", "alpha", "svd", "gamma", "reduction", "threshold", "init", "sets",
                "router_rank", "v_mode", "basis", "extra", "a_init", "group_by", "core_only")


def own_flags(method):
    """Those of METHOD_FLAGS that belong to a method: the arguments of its attach, and what train.py does for it."""
    accepted = inspect.signature(adapter.method_function(method, "attach")).parameters
    more = ["params"] if adapter.method_function(method, "fit") else []
    more += ["gamma", "reduction"] if hasattr(adapter.method_module(method), "add_regularizer_grad") else []
    return [flag for flag in METHOD_FLAGS if flag in accepted or flag in more]


def method_options(args):
    """(arguments for attach, arguments for the regularizer): the method's own flags; ValueError for another's."""
    own, module = own_flags(args.method), adapter.method_module(args.method)
    accepted = inspect.signature(adapter.method_function(args.method, "attach")).parameters
    regularized = hasattr(module, "add_regularizer_grad")
    given = {flag: getattr(args, flag) for flag in METHOD_FLAGS if getattr(args, flag) is not None}
    for flag in given:
        if flag not in own:
            word, *words = [name.replace("_", "-") for name in (flag, *own)]
            raise ValueError(f"--{word} does not belong to {args.method}: its own flags are --{', --'.join(words)}")
    for size in ("rank", "threshold"):
        if args.params and size in given:
            raise ValueError(f"--params chooses the {size}: give --params or --{size}, not both")
    options = {flag: value for flag, value in given.items() if flag in accepted}
    if "targets" in options:
        options["targets"] = [name for name in args.targets.split(",") if name]
        if not options["targets"]:
            raise ValueError("--targets is empty: name linear layers, as in --targets q_proj,v_proj")
    if "seed" in accepted:
        options["seed"] = args.seed
    regularizer = {"gamma": given.get("gamma", 4e-4), "reduction": given.get("reduction", "mean")}
    return options, regularizer if regularized else {}


def complete_options(args, options, model, dtype, device):
    """The options of attach that need the model: the size for --params, the weights of --extra."""
    if args.params:
        fit = adapter.method_function(args.method, "fit")
        known = {key: value for key, value in options.items() if key in inspect.signature(fit).parameters}
        options = {**options, **fit(model, args.params, **known)}
    if args.extra:
        names = [name for name in args.extra.split(",") if name]
        if not names or len(set(names)) < len(names):
            raise ValueError("--extra is empty or names a model twice: as in --extra one.gguf,two.gguf")
        extra = {name: checkpoint.load(name, dtype, device).model.state_dict() for name in names}
        options = {**options, "extra": extra}
    return options


EVAL_FILES = tuple(itertools.chain.from_iterable(RESULT_FILES.values()))
RUN_FILES = ("log.jsonl", "result.json", "adapter.safetensors", resume.FILE, *EVAL_FILES)


def holds_a_run(folder):
    return any((folder / name).exists() for name in RUN_FILES)


def check_out(args):
    """ValueError, before anything is loaded, if --out is no folder, or holds a run and there is no --overwrite."""
    check_folder(args.out or Path("runs"), "--out")
    if args.out and holds_a_run(args.out) and not args.overwrite and not args.resume:
        more = f", or --resume {args.out} to go on with it" if (args.out / resume.FILE).exists() else ""
        raise ValueError(f"--out {args.out} already holds a run: give another folder, or --overwrite to replace it{more}")


def choose_out(args):
    """Name the run's folder: --out, or the first free one of runs/METHOD, runs/METHOD-2, ..."""
    names = (args.method if n == 1 else f"{args.method}-{n}" for n in itertools.count(1))
    args.out = args.out or next(Path("runs") / name for name in names if not holds_a_run(Path("runs") / name))


def choose_budget(args, device, examples):
    """Fill in what was not given, by what is there: minutes of work on a CPU, an epoch on a GPU."""
    on_cpu = device.type == "cpu"
    args.lr = args.lr or DEFAULT_LR[args.method]
    args.batch = min(args.batch or (8 if on_cpu else 32), examples)
    args.micro_batch = min(args.micro_batch or (8 if on_cpu else 32), args.batch)
    if args.steps is None:
        whole_epochs = max(1, round((args.epochs or 1) * (examples // args.batch)))
        args.steps = 40 if on_cpu and args.epochs is None else whole_epochs
    args.log_every = args.log_every or (1 if on_cpu else 10)
    args.eval_every = args.eval_every or math.ceil(args.steps / 4)
    args.save_every = args.save_every or args.eval_every


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
    hardware = f"{torch.get_num_threads()} threads" if device.type == "cpu" else torch.cuda.get_device_name(device)
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
    block = 4 * d + 3 * q + 2 * kv + 3 * ffn  # x, n(x), h, n(h); queries, attention twice; keys, values; gate, up, product
    return tokens * size * (layers * d + block if checkpointing else layers * block)


def describe_first_step(args, base, data):
    """Print what --dry-run shows: the memory the run will take, and the first batch with its answers in [[ ]]."""
    model, first = base.model, next(endless_batches([len(ids) for ids, _ in data.train], args.batch, args.seed))
    longest = max(len(ids) for ids, _ in data.train)
    weights, trained = (sum(p.numel() * p.element_size() for p in some)
                        for some in (model.parameters(), adapter.trainable(model).values()))
    head = 2 * 4 * CHUNK * model.config.vocab_size  # logits and their gradient, a chunk at a time
    activations = activation_bytes(model, args.micro_batch * longest, args.checkpointing) + head
    total = weights + 3 * trained + activations
    print(f"memory    about {total / 1e9:.1f} GB and the program itself: {weights / 1e9:.2f} weights, {3 * trained / 1e9:.2f} "
          f"gradients and moments, {activations / 1e9:.2f} activations of {args.micro_batch} rows of {longest} tokens, the "
          "longest")
    print(f"\nthe first batch, {token_count([data.train[i] for i in first])} tokens; what carries loss is in [[ ]]")
    for i in first:
        ids, start = data.train[i]
        question, answer = base.tokenizer.decode(ids[:start]), base.tokenizer.decode(ids[start:])
        print(f"\n--- record {data.numbers[i]} of the data, {len(ids)} tokens, {len(ids) - start} of them answer\n"
              f"{question}[[{answer}]]")
    print("\na dry run: nothing was trained, nothing was written")


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


def check_finite(steps, numbers, lr):
    """FloatingPointError for the first of `steps`, tuples (step, indices, loss, gradient norm, R or None), whose
    values are not all finite. `numbers` says which record of the data an index is, from 1."""
    for step, indices, *values in steps:
        if not all(math.isfinite(value) for value in values if value is not None):
            named = ", ".join(str(numbers[i]) for i in indices[:16])
            more = f" and {len(indices) - 16} more" if len(indices) > 16 else ""
            raise FloatingPointError(f"step {step}: loss {values[0]:g}, gradient norm {values[1]:g}, on records {named}"
                                     f"{more} of the data; the weights stay as they were before: lower --lr, now {lr:g}")


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
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=args.autocast is not None)
    lengths = [len(ids) for ids, _ in encoded]
    train_gflop = gflop_per_token(model, answer_tokens(encoded) / sum(lengths))[1]
    multiple = GRAPH_MULTIPLE if args.compile == "reduce-overhead" else 1
    parameters, recent = list(adapter.trainable(model).values()), collections.deque(maxlen=20)
    batches = itertools.islice(endless_batches(lengths, args.batch, args.seed), progress.step, args.steps)
    started, tokens, padded, since = time.time(), 0, 0, []  # since the last logged step
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
            to_save = step % args.save_every == 0 or step == args.steps or bool(signals)
            if not (step % args.log_every == 0 or to_measure or to_save):
                continue
            check_finite(since, numbers, args.lr)  # waits for a GPU to finish
            line = {"step": step, "loss": loss.item(), "lr": rate, "grad_norm": norm.item(),
                    **spike([past.item() for _, _, past, _, _ in since], recent)}
            if R is not None:
                line["regularizer"] = R.item()
            recent.append(line["loss"])
            elapsed = time.time() - started
            progress.step, progress.tokens = step, progress.tokens + tokens
            progress.seconds_in_steps += elapsed
            line.update(tokens_per_second=tokens / elapsed, padding=1 - tokens / padded,
                        gflops=tokens * train_gflop / elapsed, memory_gb=peak_memory(device))
            log.write(json.dumps(line) + "\n")
            left = progress.seconds_in_steps / step * (args.steps - step)
            print(log_line(line, args.steps, left), flush=True)
            if to_measure:
                progress.held_out[step] = measure(step)
            if to_save or signals:
                save()
            if signals and step < args.steps:
                print(f"\nstopped by {signals[0].name} after step {step} of {args.steps}; to go on: "
                      f"python train.py --resume {args.out}", flush=True)
                raise SystemExit(128 + signals[0])
            started, tokens, padded, since = time.time(), 0, 0, []


def measure(args, model, held_out, step, log):
    """The held-out loss, printed and logged with what the method's weights or routers look like."""
    device = model.lm_head.weight.device
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=args.autocast is not None)
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
    began = time.time()
    args = parse_arguments(argv)
    keep_freed_memory()
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
    describe(args, base, regularizer, device, source, data)
    if args.dry_run:
        return describe_first_step(args, base, data)

    progress = args.saved.progress if args.saved else resume.Progress()
    earlier = progress.seconds
    optimizer = torch.optim.AdamW(decay_groups(model, args.weight_decay), lr=args.lr, fused=True)
    log = open_log(args, progress.step)
    args.model, args.data = base.name, data_name(args.data, source)  # by which --resume and eval.py find them again
    if args.saved:
        resume.restore(args.resume, args.saved, model, optimizer)
        progress.resumed_at.append(progress.step)
        print(f"going on  after step {progress.step} of {args.steps}", flush=True)
    else:
        print_sample(args, base, data.example, "before")
        measuring = time.time()
        progress.held_out[0] = measure(args, model, data.held_out, 0, log)
        expected = expected_seconds(args, model, data.train, data.held_out, time.time() - measuring)
        print(f"expecting about {duration(expected)} of training", flush=True)

    def regularize():
        return adapter.method_module(args.method).add_regularizer_grad(model, regularizer["gamma"] / args.lr,
                                                                       regularizer["reduction"])

    def save():
        progress.seconds = earlier + time.time() - began
        resume.save(args.out / resume.FILE, model, optimizer, base, flags_of(args), data.sha256, progress)

    train(args, model, optimizer, progress, data.train, data.numbers, regularize if regularizer.get("gamma") else None,
          lambda step: measure(args, model, data.held_out, step, log), save, log)
    log.close()
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
              "seconds": earlier + time.time() - began, "memory_gb": peak_memory(device), "device": str(device),
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
