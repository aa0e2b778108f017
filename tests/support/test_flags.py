"""The flags of train.py: which there are, what is chosen where they are not given, the papers' recipe.

What is refused stands in the table of tests/test_bad_input.py, flags of a run that goes on in test_resume.py.
"""
import pytest
import torch

import adapter
from methods import METHODS
from support import flags


def test_help_lists_a_flag_under_the_methods_that_take_it(capsys):
    """Each flag of a method stands in --help in a group that names the methods that have it, and no other."""
    with pytest.raises(SystemExit):
        flags.parse_arguments(["--help"])
    owners = {}
    for name in METHODS:
        for flag in flags.method_arguments(name):
            owners.setdefault(f"--{flag.replace('_', '-')}", []).append(name)
    found = {}
    for section in capsys.readouterr().out.split("\n\n"):
        title, *lines = section.splitlines()
        found.update((word, title.rstrip(":").split(", ")) for line in lines for word in line.split()[:1] if word in owners)
    assert found == owners and {"--rank", "--gamma", "--sets", "--core-only", "--group-by"} <= owners.keys()


@pytest.mark.parametrize("given, device, examples, expected", [
    ([], "cpu", 100, (40, 8, 8, 1, 20, 10)), ([], "cuda", 3200, (100, 32, 32, 10, 25, 25)),
    (["--epochs", "2.5", "--batch", "8"], "cpu", 100, (30, 8, 8, 1, 15, 8)),
    (["--steps", "7", "--batch", "16", "--micro-batch", "32"], "cpu", 10, (7, 10, 10, 1, 4, 2)),
    (["--eval-every", "5"], "cpu", 100, (40, 8, 8, 1, 5, 5))])
def test_the_budget_by_what_is_there(given, device, examples, expected):
    """Minutes of work on a CPU, an epoch on a GPU, or what is given; a batch has no more examples than there are. The rate
    is the method's, whose name may be written in any case."""
    args = flags.parse_arguments(["--method", "LoRA", *given])
    flags.choose_budget(args, torch.device(device), examples)
    assert (args.steps, args.batch, args.micro_batch, args.log_every, args.eval_every, args.save_every) == expected
    assert args.lr == METHODS["lora"].learning_rate


RATES = {"sorsa": 3e-5, "pissa": 2e-5, "lora": 2e-5, "full": 2e-5}


@pytest.mark.parametrize("method", RATES)
def test_the_recipe_of_the_papers(method):
    """What SORSA's authors trained with, at the rate of each method; a regularizer for SORSA, a rank for all but full."""
    args = flags.parse_arguments(["--recipe", "paper", "--method", method])
    assert (args.template, args.limit, args.cut, args.epochs, args.batch) == ("alpaca", 100_000, (512, 512), 1.0, 128)
    assert (args.schedule, args.warmup, args.weight_decay, args.clip, args.seed) == ("cosine", 0.03, 0.0, 1.0, 42)
    assert (args.lr, args.rank) == (RATES[method], None if method == "full" else 128)
    assert (args.gamma, args.reduction) == ((4e-4, "mean") if method == "sorsa" else (None, None))


def test_what_is_given_beside_the_recipe_counts():
    """A flag replaces what the recipe sets, --steps its epoch, --params its rank; what it did set is known."""
    args = flags.parse_arguments(["--recipe", "paper", "--lr", "1e-3", "--batch", "16", "--steps", "3", "--params", "30k"])
    assert (args.lr, args.batch, args.steps, args.epochs, args.rank, args.params) == (1e-3, 16, 3, None, None, 30_000)
    assert args.recipe_set == {"template": "alpaca", "limit": 100_000, "cut": (512, 512), "schedule": "cosine", "warmup": 0.03,
                               "weight_decay": 0.0, "clip": 1.0, "seed": 42, "gamma": 4e-4, "reduction": "mean"}


def test_an_argument_named_like_a_flag_of_every_run_is_named(monkeypatch):
    """Instead of argparse's traceback; a % in a method's help is one."""
    def attach(model, warmup: int = 10):
        pass
    monkeypatch.setitem(METHODS, "mine", adapter.Method(attach, learning_rate=1e-3))
    with pytest.raises(ValueError, match="^argument --warmup: .*: a method's argument has the name of a flag of every run: "):
        flags.parse_arguments([])

    def attach(model, share: float = 0.1):
        pass
    monkeypatch.setitem(METHODS, "mine", adapter.Method(attach, learning_rate=1e-3, help={"share": "10 % is usual"}))
    assert "10 % is usual (default: 0.1)" in " ".join(flags.make_parser().format_help().split())
