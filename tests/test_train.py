"""The training script: the loss and gradients of a batch, the order of a step, and whole runs on a tiny model."""
import json
import types

import pytest
import torch

import adapter
import train
from data import batching
from methods import METHODS
from sorsa import regularize
from support import fast, resume
from support.loss import answer_loss
from support.monitor import Monitor
from tests.runs import in_use
from tests.toy import SIZES, attach, perturb, toy_examples, toy_model, write_sums
from tools import export
from weights import adapter_file, base_model

KINDS = ["lora", "mosara", "full"]  # a sum of matrices, a router that looks at each token, no adapter


def chosen(**changes):
    """What the loop reads of a command line."""
    return types.SimpleNamespace(**{**dict(
        autocast=None, compile=None, lr=1e-2, weight_decay=0.0, clip=1.0, steps=4, seed=0, batch=4, micro_batch=4, multiple=1,
        schedule="constant", warmup=0.0, eval_every=100, save_every=100, log_every=1, out="run"), **changes})


def test_learning_rate_schedules():
    """Warm-up rises to the peak, cosine and linear end near zero, constant stays."""
    cosine, linear, constant = ([train.learning_rate(step, 100, 2.0, name, 0.1) for step in range(100)]
                                for name in ("cosine", "linear", "constant"))
    for rates in (cosine, linear, constant):
        assert rates[0] == pytest.approx(0.2) and rates[9] == rates[10] == 2.0 == max(rates)
    assert cosine[55] == pytest.approx(1.0) and linear[55] == pytest.approx(1.0) and constant[-1] == 2.0
    assert 0 < cosine[-1] < 0.001 < linear[-1] < 0.03
    assert train.learning_rate(0, 1, 2.0, "cosine", 0.03) == 2.0


# ---- one batch ------------------------------------------------------------------------------------------------------

def loss_and_gradients(model, **changes):
    """Of eight examples whose answers differ in length: {"loss": ..., name: gradient}."""
    loss = train.accumulate_gradients(chosen(**changes), model, toy_examples(8))
    return {"loss": loss, **{name: p.grad for name, p in adapter.trainable(model).items()}}


@pytest.mark.parametrize("method", KINDS)
def test_a_batch_may_be_cut_anywhere(method):
    """One batch of 8, two of 4, eight of 1, or padded to more: the same loss and gradients, to rounding."""
    whole, *others = (loss_and_gradients(perturb(attach(toy_model(), method), 0.02), micro_batch=size, multiple=multiple)
                      for size, multiple in ((8, 1), (4, 1), (1, 1), (8, 64)))
    for parts in others:
        for name, expected in whole.items():
            assert (expected - parts[name]).abs().max() < 1e-5 * max(1, expected.abs().max()), name


@pytest.mark.parametrize("method", KINDS)
def test_recomputing_keeps_the_gradients_and_less_memory(method):
    """The same loss and gradients, bit by bit; of four layers only their inputs wait for the backward pass."""
    results = []
    for recompute in (False, True):
        model, saved = perturb(attach(toy_model(num_hidden_layers=4), method), 0.02), {}
        model.model.recompute = recompute

        def keep(tensor):
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            found = loss_and_gradients(model, micro_batch=8)
        weights = {p.untyped_storage().data_ptr() for p in model.state_dict().values()}
        results.append((found, sum(size for place, size in saved.items() if place not in weights)))
    (kept, all_saved), (again, few_saved) = results
    assert all(torch.equal(kept[name], again[name]) for name in kept) and few_saved < all_saved / 3


@pytest.mark.parametrize("fast_forms", [False, True], ids=["plain", "fast"])
@pytest.mark.parametrize("method", METHODS)
def test_the_gpu_precisions_run_on_a_cpu(method, fast_forms):
    """A bf16 base with fp32 factors, and fp32 weights under bf16 autocast for full, give the fp32 loss and gradients to
    bf16 rounding, the gradients in fp32."""
    exact = loss_and_gradients(perturb(attach(toy_model(), method), 0.02))
    if fast_forms:
        fast.switch_on(fast.FORMS)
    mixed = toy_model() if method == "full" else toy_model().bfloat16()
    found = loss_and_gradients(perturb(attach(mixed, method), 0.02), autocast="bfloat16" if method == "full" else None)
    assert abs(found["loss"] - exact["loss"]) < 0.02 * exact["loss"]
    for name, reference in exact.items():
        assert found[name].dtype == torch.float32 and (found[name] - reference).norm() < 0.25 * reference.norm(), name


def test_the_loop_is_the_written_out_loop(tmp_path):
    """Three steps of `train.train` are, bit for bit, the loop by hand: schedule, micro-batches, clipping, then SORSA's
    regularizer once per step, AdamW, cleared gradients. Loss, norm before clipping, and R are logged."""
    data, args = toy_examples(16), chosen(weight_decay=0.01, clip=0.05, steps=3, micro_batch=2, schedule="linear", warmup=0.4)
    model, progress = perturb(attach(toy_model(), "sorsa"), 0.02), resume.Progress()
    optimizer = torch.optim.AdamW(train.decay_groups(model, args.weight_decay), lr=args.lr, fused=True)
    with open(tmp_path / "log", "w") as log:
        records = types.SimpleNamespace(train=data, numbers=range(16))
        monitor = Monitor(args, model, optimizer, records, 1.0, progress,
                          [(2, lambda step: progress.held_out.update({step: float(step)}))], lambda: None, log, [])
        train.train(args, model, optimizer, data, monitor, lambda: regularize(model, args.lr))

    twin, expected, tokens = perturb(attach(toy_model(), "sorsa"), 0.02), [], 0
    factors = list(adapter.trainable(twin).values())
    optimizer = torch.optim.AdamW(factors, weight_decay=0.01, fused=True)
    batches = batching.epoch_batches([len(ids) for ids, _ in data], 4, 0, 0)
    for rate, indices in zip((0.005, 0.01, 0.01), batches):
        batch, loss = [data[i] for i in indices], 0.0
        for part in (batch[:2], batch[2:]):
            part_loss = answer_loss(twin, *batching.collate(part, "cpu")) / batching.answer_tokens(batch)
            part_loss.backward()
            loss += part_loss.item()
        norm = torch.nn.utils.clip_grad_norm_(factors, 0.05)
        assert norm > 0.1
        expected.append((loss, rate, norm.item(), regularize(twin, args.lr).item()))
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
        tokens += batching.token_count(batch)
    for name, parameter in adapter.trainable(model).items():
        assert torch.equal(parameter, adapter.trainable(twin)[name]) and parameter.grad is None, name
    assert (progress.step, progress.tokens, progress.held_out) == (3, tokens, {2: 2.0, 3: 3.0})
    logged = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    for line, numbers in zip(logged, expected, strict=True):
        assert [line[key] for key in ("loss", "lr", "grad_norm", "regularizer")] == pytest.approx(numbers)


# ---- whole runs -----------------------------------------------------------------------------------------------------

@pytest.fixture
def run(tiny_gguf, tmp_path):
    """Six short steps of train.py on the tiny model, LoRA of rank 4 unless a method is given, into the folder named."""
    data = write_sums(tmp_path / "data")

    def run(name, *given):
        given = given if "--method" in given else ("--method", "lora", "--rank", "4", *given)
        return train.main(["--model", str(tiny_gguf), "--data", str(data), "--held-out", "8", "--steps", "6", "--batch", "4",
                           "--out", str(tmp_path / name), "--no-sample", "--device", "cpu", *given])
    return run


def log_of(folder, key="loss"):
    """The lines of a run's log that have a number of that name."""
    return [line for line in map(json.loads, (folder / "log.jsonl").read_text().splitlines()) if key in line]


def test_what_is_kept_for_the_end_is_measured_one_by_one(run, tiny_gguf, tmp_path, capsys):
    """--report: the losses of the merged model on examples that nothing saw, in the order of the split; their sum is the report."""
    result = run("run", "--report", "5")
    base = base_model.load(str(tiny_gguf))
    adapter_file.load(base.model, tmp_path / "run" / "adapter.safetensors")
    adapter.merge(base.model)
    examples = batching.load_examples(str(tmp_path / "data"))[0]
    apart = batching.split(examples, 13)[1][8:]
    encoded = list(batching.encode_examples(base.tokenizer, apart, 256).values())
    losses = [answer_loss(base.model, *batching.collate([example], "cpu")).item() for example in encoded]
    assert result["report_losses"] == pytest.approx(losses, abs=2e-3) and len(losses) == 5
    assert result["report_tokens"] == [batching.answer_tokens([example]) for example in encoded]
    assert result["report_loss"] == pytest.approx(sum(losses) / batching.answer_tokens(encoded), abs=1e-4)
    assert f"report {result['report_loss']:.4f}: the loss on 5 examples of --report" in capsys.readouterr().out
    assert "report_loss" not in run("without") and result["held_out_examples"] == 8


@pytest.mark.parametrize("method", METHODS)
def test_a_run_learns_and_leaves_its_files(method, run, tiny_gguf, tmp_path, capsys):
    """Six steps lower the held-out loss; the log, the result and the adapter are there and agree with what was printed."""
    size = [f"--{key}={value}" for key, value in SIZES.get(method, {"rank": 4}).items()]
    targets = [] if method == "full" else ["--targets", ",".join(adapter.TARGETS)]
    result = run("run", "--method", method, "--lr", "3e-2" if "sara" in method else "1e-2", *size, *targets)
    before, after, folder = result["held_out_before"], result["held_out_after"], tmp_path / "run"
    assert after < before - 0.05 and after == result["held_out_loss"][6]
    assert f"held-out loss {before:.4f} -> {after:.4f}" in capsys.readouterr().out.splitlines()[-2]
    assert json.loads((folder / "result.json").read_text())["held_out_after"] == after
    assert [line["step"] for line in log_of(folder)] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in log_of(folder, "held_out_loss")] == [0, 3, 6]
    assert ("regularizer" in log_of(folder)[1]) == (method == "sorsa")
    _, config, name, _ = adapter_file.read(folder / "adapter.safetensors")
    assert config["method"] == method and name == str(tiny_gguf)


def test_ranks_are_printed_and_kept(run, capsys):
    """A SARA run shows a rank per layer and projection and keeps them in its result; --params says what it chose."""
    result = run("run", "--method", "sara", "--params", "1k", "--steps", "1")
    printed, ks = capsys.readouterr().out, result["adapter"]["ks"]
    assert ks.keys() == {f"model.layers.{i}.self_attn.{name}" for i in range(2) for name in ("q_proj", "v_proj")}
    rows = {words[0]: words[1:] for words in map(str.split, printed.splitlines()) if words[-2:-1] == ["mean"]}
    for name in ("q_proj", "v_proj"):
        first, second = (ks[f"model.layers.{i}.self_attn.{name}"] for i in range(2))
        assert rows[name] == [str(first), str(second), "mean", f"{(first + second) / 2:.1f}"]
    trained = result["trainable_parameters"]
    assert f"nearest to --params 1,000: threshold {result['adapter']['threshold']} with {trained:,}\n" in printed
    assert trained == sum(k * (64 + (64 if "q_proj" in name else 32) + 1) for name, k in ks.items())


def test_routers_are_watched(run, tmp_path, capsys):
    """A Mo-SARA run logs and prints its gates and its change with every held-out loss; the change starts at zero."""
    run("run", "--method", "mosara", "--sets", "3", "--lr", "0.1")
    lines = log_of(tmp_path / "run", "held_out_loss")
    assert all(len(line["gates"]) == 3 and sum(line["gates"]) == pytest.approx(1, abs=1e-5) for line in lines)
    assert all(line["gates"] == sorted(line["gates"], reverse=True) and 1 / 3 <= line["top_gate"] <= 1 for line in lines)
    assert lines[0]["change"] == 0 < lines[1]["change"] < lines[-1]["change"]
    assert f"|dW|/|W| {lines[-1]['change']:.1e}  top gate {lines[-1]['top_gate']:.2f}, sets used " in capsys.readouterr().out


def test_the_seed_and_the_regularizer_change_a_run(run, tmp_path):
    """Two runs with one seed log the same losses to the last bit; another seed, or no regularizer, gives others."""
    def losses(name, *given):
        run(name, "--method", "sorsa", "--rank", "4", *given)
        return [line["loss"] for line in log_of(tmp_path / name)]
    first = losses("a")
    assert first == losses("b") and first != losses("c", "--seed", "1") and first != losses("d", "--gamma", "0")


@pytest.mark.parametrize("method, flag", [("lora", "--plain"), ("full", "--plain"), ("lora", "--recompute"), ("lora", "--micro-batch=1"),
                                          ("lora", "--graphs=off")])
def test_how_it_is_computed_changes_no_loss(method, flag, run, tmp_path):
    """The same losses to rounding, in training and held out. With --plain nothing of support/fast.py is in use, with --graphs off no
    recorded step of generation."""
    losses, left_out = [], {"--plain": set(fast.FORMS), "--graphs=off": {"decode"}}
    for name, given in (("usual", []), ("other", [flag])):
        fast.switch_off()
        result = run(name, "--method", method, *given)
        assert in_use() == set(fast.FORMS) - left_out.get("".join(given), set())
        losses.append([result["held_out_before"], result["held_out_after"], *(line["loss"] for line in log_of(tmp_path / name))])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize("steps, words", [("1", "step 1: held-out loss nan"), ("6", r"step \d: loss")], ids=["last step", "later"])
def test_a_run_that_diverges_saves_nothing(steps, words, run, tmp_path):
    """A loss that is not finite ends the run with the step and a remedy; of a run that it was to replace nothing is there."""
    run("run")
    for flags in (["run", "--overwrite"], ["new"]):
        with pytest.raises(FloatingPointError, match=f"{words}.*lower --lr"):
            run(*flags, "--lr", "1e30", "--clip", "1e30", "--steps", steps)
        assert not {path.name for path in (tmp_path / flags[0]).iterdir()} & {"adapter.safetensors", "result.json"}


@pytest.mark.parametrize("harm", ["written to", "cut"])
def test_a_base_that_changes_during_training_changes_nothing(harm, run, tiny_gguf, tmp_path, monkeypatch, capsys):
    """The run has the weights as it has read them, and what is saved belongs to those; that the file is another is said."""
    export.main([str(tmp_path / "base"), "--model", str(tiny_gguf), "--to", "hf"])
    flags, path, loop = ("--model", str(tmp_path / "base"), "--dtype", "float32"), tmp_path / "base" / "model.safetensors", train.train
    run("whole", *flags)
    assert "has been written to" not in capsys.readouterr().err

    def train_on_sand(*arguments):
        with open(path, "r+b") as file:
            file.truncate(path.stat().st_size // 2)
            file.write(b"" if harm == "cut" else bytes(100000))
        loop(*arguments)
    monkeypatch.setattr(train, "train", train_on_sand)
    run("changed", *flags)
    assert capsys.readouterr().err.startswith(f"{path} has been written to since this run began: the adapter belongs to the base as it was")
    adapters = [(tmp_path / name / "adapter.safetensors").read_bytes() for name in ("whole", "changed")]
    assert adapters[0] == adapters[1] and log_of(tmp_path / "whole", "held_out_loss") == log_of(tmp_path / "changed", "held_out_loss")
