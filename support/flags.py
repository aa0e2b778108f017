"""The flags of train.py: what they are, what is chosen where they are not given, and which of them go together.

The flags of a method are the arguments of its attach and regularize functions: see methods.py.
"""
import argparse
import math
import sys

from data.batching import ANSWERS
from methods import METHODS, arguments, method, spelled
from support import resume
from support.script import Parser, above_zero, amount, at_least_zero, filled, folder, positive, two_lengths, whole
from weights import base_model
from weights.files import fault

# --recipe paper: what SORSA's authors trained Llama 2 7B with (Mistral and Gemma at rank 64), PiSSA's at the same
# settings but for the rate, LoRA and full fine-tuning as their baselines. The other papers trained on other tasks.
RECIPE = {"template": "alpaca", "limit": 100_000, "cut": (512, 512), "rank": 128, "epochs": 1.0, "batch": 128,
          "schedule": "cosine", "warmup": 0.03, "weight_decay": 0.0, "clip": 1.0, "seed": 42}
RECIPE_OF = {"sorsa": {"lr": 3e-5, "gamma": 4e-4, "reduction": "mean"}, "pissa": {"lr": 2e-5},
             "lora": {"lr": 2e-5}, "full": {"lr": 2e-5}}
# What a method's flag says, of those that several methods have.
HELP = {"rank": "r",
        "alpha": "the change is scaled by alpha / r (default: alpha = r; lotr 3 / sqrt(in); sara no scale)",
        "targets": "linear layers by the end of their names, with commas, as in q_proj or layers.2[0-9].* (default: "
                   "all seven; sara, mosara q_proj,v_proj; full every parameter)"}
# Flags that may change when a run goes on: not its mathematics, or they name what is known by its checksum.
FREE = ("resume", "out", "overwrite", "dry_run", "model", "data", "micro_batch", "recompute", "compile", "graphs",
        "plain", "eval_every", "save_every", "log_every", "spectra_every", "no_sample", "device")
NOT_SAVED = ("resume", "out", "overwrite", "dry_run")  # flags that belong to one command, not to the run


def make_parser():
    parser = Parser(prog="train.py", usage="train.py --method METHOD [flags]",
                    description="Fine-tune a model on word problems.")
    add = parser.add_argument
    add("--method", default="sorsa", type=spelled, help=f"one of {', '.join(METHODS)}")
    add("--model", default=base_model.DEFAULT_MODEL,
        help="base model: a name, a .gguf file, a folder in Hugging Face layout, or a hub id (owner/name)")
    add("--data", default="auto", type=filled, help="gsm8k, practice, a folder with train.jsonl and test.jsonl, auto, "
        "or a .json or .jsonl file of instructions and responses, MetaMathQA-395K.json for one")
    add("--template", choices=("plain", "alpaca"), default="plain", help="of the prompt")
    add("--answers", choices=ANSWERS, default="full", help="equations: train on the <<48/2=24>> calculator annotations "
                                                           "and #### 72 alone; answers without them are left out")
    add("--recipe", choices=("paper",), help="the settings of SORSA's authors for MetaMathQA (for PiSSA, LoRA and full "
                                             "their baselines'); what is given beside it counts")
    add("--out", type=folder, help="folder of the run (default: runs/METHOD, or the next free runs/METHOD-N)")
    add("--overwrite", action="store_true", help="replace the run that --out already holds")
    add("--resume", type=folder, metavar="RUN", help="continue the run in this folder, with its own flags")
    add("--dry-run", action="store_true", help="load, attach, print the plan, the memory it will take and the first "
                                               "batch, and stop: nothing is written")

    add = parser.add_argument_group("all methods but full").add_argument
    add("--params", type=amount, help="a budget, as in 1.2M: the rank, or for sara and mosara the threshold, whose "
                                      "count of trainable parameters comes nearest")
    add_method_flags(parser)

    add = parser.add_argument_group("training").add_argument
    add("--steps", type=positive, help="optimizer steps (default: 40 on a CPU)")
    add("--epochs", type=above_zero, help="instead of --steps (default: 1 on a GPU)")
    add("--batch", type=positive, help="examples per optimizer step (default: 8 on a CPU, else 32)")
    add("--micro-batch", type=positive, help="examples per forward pass (default: 8 on a CPU, else 32)")
    rates = ", ".join(f"{name} {method.learning_rate:g}" for name, method in METHODS.items())
    add("--lr", type=above_zero, help=f"peak learning rate (default: {rates})")
    add("--schedule", choices=("cosine", "linear", "constant"), default="cosine", help="of the rate, after warm-up")
    add("--warmup", type=at_least_zero, default=0.03, help="share of the steps")
    add("--weight-decay", type=at_least_zero, default=0.0, help="of all but what layers share (lotr's A and B)")
    add("--clip", type=above_zero, default=1.0, help="largest gradient norm")
    add("--max-tokens", type=positive, help="longer examples are left out (default: 512)")
    add("--cut", type=two_lengths, metavar="P+A", help="cut prompts at P tokens and answers at A instead of leaving "
                                                       "long examples out, as in 512+512")
    add("--strip-annotations", action="store_true", help="remove the <<48/2=24>> calculator annotations")
    add("--limit", type=positive, help="train on the first N examples of the data only")
    add("--seed", type=whole, default=0, help="of the order of the data and of random factors")
    add("--recompute", action="store_true", help="keep only the input of each block and compute the rest again in the "
                                                 "backward pass: less memory, about 1.3 times the work")
    add("--plain", action="store_true", help="leave off what makes it fast (support/fast.py): the same losses to "
                                             "rounding")
    add("--compile", action="store_true", help="torch.compile every block: a minute or two at the start")
    add("--graphs", choices=("auto", "on", "off"), default="auto", help="record what a GPU does, once per shape of a "
        "batch, and replay it (support/graphs.py); auto: on a CUDA GPU, for models of less than 2 billion weights, "
        "without --recompute; off: no step of generation either")

    add = parser.add_argument_group("reporting").add_argument
    add("--held-out", type=positive, default=64, help="training examples kept apart to measure the loss")
    add("--report", type=whole, default=0, help="further training examples kept apart, to choose nothing by: the loss "
        "of each is measured at the end, into result.json")
    add("--forgetting", action="store_true", help="measure the loss on general English text beside every held-out "
        "loss: by how much it rises is what training has made the model forget")
    add("--eval-every", type=positive, help="steps between held-out losses (default: half a run, on a GPU a quarter)")
    add("--save-every", type=positive, help="steps between checkpoints for --resume (default: as --eval-every if that "
        "is given, else a quarter of a run)")
    add("--log-every", type=positive, help="steps between log lines (default: 1 on a CPU, else 10)")
    add("--spectra-every", type=positive, metavar="N", help="measure how far the weights have moved in their SVD, at "
        "the start, every N steps and at the end (default: never); support/spectra.py says what the numbers are")
    add("--no-sample", action="store_true", help="no sample answer before and after")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps, which is untried")
    add("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="of the frozen weights; auto: "
        "bfloat16 on a GPU with units for it, and on a CPU that multiplies it much faster than float32, by a trial at "
        "the start")
    return parser


def method_arguments(name):
    """{flag: methods.Argument} of a method: the arguments of its attach and regularize, but those that have no flag."""
    method = METHODS[name]
    found = {**arguments(method.attach), **(arguments(method.regularize) if method.regularize else {})}
    return {flag: argument for flag, argument in found.items() if flag != "seed" and argument.kind is not dict}


def add_method_flags(parser):
    """Add the flags of all methods, in a group for each set of methods that have them."""
    owners = {}  # flag: {method: Argument}
    for name in METHODS:
        for flag, argument in method_arguments(name).items():
            owners.setdefault(flag, {})[name] = argument
    groups = {}
    for flag, having in owners.items():
        methods = ", ".join(having)
        if methods not in groups:
            groups[methods] = parser.add_argument_group(methods)
        argument, text = next(iter(having.values())), HELP.get(flag, "")
        for name in having:
            text = METHODS[name].help.get(flag, text)
        if "default" not in text and argument.kind is not bool:
            text += default_text(having)
        kind = ({"action": "store_true", "default": None} if argument.kind is bool else
                {"choices": [c for c in dict.fromkeys(c for a in having.values() for c in a.choices)] or None,
                 "type": {int: positive, float: at_least_zero}.get(argument.kind, str)})
        groups[methods].add_argument(f"--{flag.replace('_', '-')}", help=text.replace("%", "%%"), **kind)


def default_text(having):
    """" (default: 16, lotr 64)": what most methods of {method: Argument} take, then the others; empty for no value."""
    defaults = {name: argument.default for name, argument in having.items() if argument.default not in (None, ())}
    usual = next(iter(defaults.values()), None)
    others = [f"{name} {default:g}" if isinstance(default, float) else f"{name} {default}"
              for name, default in defaults.items() if default != usual]
    shown = f"{usual:g}" if isinstance(usual, float) else usual
    return f" (default: {', '.join([str(shown), *others])})" if defaults else ""


def parse_arguments(argv):
    """The flags of a command line; with --resume those of the saved run, which come along as args.saved."""
    try:
        parser = make_parser()
    except argparse.ArgumentError as error:
        raise ValueError(f"{error}: a method's argument has the name of a flag of every run: call it "
                         "otherwise") from None
    saved, argv = None, sys.argv[1:] if argv is None else argv
    args = parser.parse_args(argv)
    if args.resume:
        saved = resume.read(args.resume)
        argv = resumed_flags(parser, args, saved, argv)
    args = settled(parser, argv)
    args.saved, args.out = saved, args.resume or args.out
    return args


def settled(parser, argv):
    """The flags with what --recipe sets; a parser error where they do not go together."""
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
    if args.graphs == "on" and args.plain:
        parser.error("--plain leaves off what --graphs on asks for: give one of them")
    if args.strip_annotations and args.answers == "equations":
        parser.error("--strip-annotations removes what --answers equations trains on: give one of them")
    if args.warmup > 1:
        parser.error(f"--warmup {args.warmup:g} is a share of the steps: at most 1")
    if args.overwrite and args.out is None:
        parser.error("--overwrite replaces the run in a folder: name it with --out")
    return args


def flags_of(args):
    """The flags of a run, all that was chosen included, as a command line for --resume."""
    left_out = {*NOT_SAVED, "saved", "recipe_set", "autocast", "recorded", "multiple"}
    left_out |= {"steps"} if args.epochs else set()
    return [flag_text(name, value, "=") for name, value in vars(args).items()
            if name not in left_out and value is not None and value is not False]


def flag_text(name, value, equals=" "):
    """A flag with its value, as on a command line."""
    flag = "--" + name.replace("_", "-")
    value = "+".join(map(str, value)) if isinstance(value, tuple) else value
    return flag if value is True else f"{flag}{equals}{value}"


def resumed_flags(parser, args, saved, argv):
    """The flags of a saved run with those of argv behind them, which then count; ValueError if one of these changes
    what the run computes."""
    if args.out or args.overwrite:
        parser.error(f"--resume {args.resume} goes on in that folder: leave out --out and --overwrite")

    def refuse(message):
        raise ValueError(message)

    savable = {flag_text(name, True) for name in vars(args) if name not in NOT_SAVED}
    parser.error, error = refuse, parser.error
    try:
        for flag in saved.flags:
            if flag.partition("=")[0] not in savable:  # --help, an abbreviation
                refuse(flag)
        before = settled(parser, saved.flags)
        method_options(before)
        if before.method != saved.config["method"]:
            refuse(f"{before.method}, and the adapter is of {saved.config['method']}")
    except ValueError as wrong:
        path = args.resume / resume.FILE
        raise fault(path, f"its flags are not those of a run: {wrong}", resume.AGAIN) from None
    finally:
        parser.error = error

    for name, new in vars(parser.parse_args([*saved.flags, *argv])).items():
        old = getattr(before, name)
        if name not in FREE and new != old:
            began = "without it" if old is None or old is False else f"with {flag_text(name, old)}"
            raise ValueError(f"{flag_text(name, new)}: the run in {args.resume} began {began}, and another value would "
                             "change what it computes: leave it out, or begin a new run")
    return [*saved.flags, *argv]


def recipe_settings(args):
    """What --recipe paper sets for the method, less what --params and --steps replace; ValueError where it has none."""
    method(args.method)  # ValueError for no method at all
    if args.method not in RECIPE_OF:
        raise ValueError(f"--recipe paper is known for {', '.join(RECIPE_OF)}: the paper behind {args.method} trained "
                         "on other tasks")
    replaced = ["rank"] * (args.params is not None or args.method == "full") + ["epochs"] * (args.steps is not None)
    settings = {**RECIPE, **RECIPE_OF[args.method]}
    return {key: value for key, value in settings.items() if key not in replaced}


def method_options(args):
    """(arguments for attach, arguments for regularize): the method's own flags; ValueError for another's."""
    chosen = method(args.method)
    own = method_arguments(args.method)
    words = [flag.replace("_", "-") for flag in (*own, *(["params"] if chosen.fit else []))]
    flags = dict.fromkeys(flag for name in METHODS for flag in method_arguments(name))
    given = {flag: getattr(args, flag) for flag in (*flags, "params") if getattr(args, flag) is not None}
    for flag in given:
        if flag not in own and not (flag == "params" and chosen.fit):
            raise ValueError(f"--{flag.replace('_', '-')} does not belong to {args.method}: its own flags are "
                             f"--{', --'.join(words)}")
    for size in ("rank", "threshold"):
        if args.params and size in given:
            raise ValueError(f"--params chooses the {size}: give --params or --{size}, not both")
    attach = arguments(chosen.attach)
    options = {flag: value for flag, value in given.items() if flag in attach}
    for flag in options:
        if attach[flag].kind is list:
            options[flag] = [name.strip() for name in options[flag].split(",") if name.strip()]
            if not options[flag]:
                raise ValueError(f"--{flag.replace('_', '-')} is empty: give names with commas, as in --targets "
                                 "q_proj,v_proj")
    if "seed" in attach:
        options["seed"] = args.seed
    regularizing = arguments(chosen.regularize) if chosen.regularize else {}
    return options, {flag: given.get(flag, argument.default) for flag, argument in regularizing.items()}


def complete_options(args, options, model, dtype, device):
    """The options of attach that need the model: the size for --params, the weights of --extra."""
    if args.params:
        fit = method(args.method).fit
        known = {key: value for key, value in options.items() if key in arguments(fit)}
        found = fit(model, args.params, **known)
        if twice := sorted(found.keys() & options.keys()):
            raise ValueError(f"--params chooses the {twice[0]}: give --params or --{twice[0].replace('_', '-')}, "
                             "not both")
        options = {**options, **found}
    if "extra" in options:
        names = options["extra"]
        if len({base_model.model_path(name).resolve() for name in names}) < len(names):
            raise ValueError("--extra names a model twice: as in --extra one.gguf,two.gguf")
        extra = {name: base_model.load(name, dtype, device).model.state_dict() for name in names}
        options = {**options, "extra": extra}
    return options


def choose_budget(args, device, examples):
    """Fill in what was not given, by what is there: minutes of work on a CPU, an epoch on a GPU."""
    on_cpu = device.type == "cpu"
    args.lr = args.lr or METHODS[args.method].learning_rate
    args.batch = min(args.batch or (8 if on_cpu else 32), examples)
    args.micro_batch = min(args.micro_batch or (8 if on_cpu else 32), args.batch)
    if args.steps is None:
        whole_epochs = max(1, round((args.epochs or 1) * (examples // args.batch)))
        args.steps = 40 if on_cpu and args.epochs is None else whole_epochs
    args.log_every = args.log_every or (1 if on_cpu else 10)
    args.save_every = args.save_every or args.eval_every or math.ceil(args.steps / 4)
    args.eval_every = args.eval_every or math.ceil(args.steps / (2 if on_cpu else 4))
