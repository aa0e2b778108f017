"""The training script: batches, loss, accumulation, the order of a step, and whole runs on a tiny model."""
import copy
import json
import shutil
import types

import pytest
import torch

import adapter
import train
from data import batching
from methods import METHODS
from support import fast, flags, loss, report, resume
from support.loss import answer_loss
from support.script import run_script
from tests.tiny import tiny_metadata, tiny_tensors, write_gguf
from tests.toy import SIZES, attach, perturb, toy_examples, toy_model, write_sums
from tools import compare
from weights import adapter_file

METHODS = list(METHODS)
NO_AUTOCAST = torch.autocast("cpu", enabled=False)


def chosen(**changes):
    """What train.train reads of a command line."""
    return types.SimpleNamespace(**{**dict(
        compile=None, autocast=None, lr=1e-2, weight_decay=0.0, clip=1.0, steps=4, seed=0, batch=4, micro_batch=4, schedule="constant",
        warmup=0.0, eval_every=100, save_every=100, log_every=1, out="run"), **changes})


def adamw(args, model):
    return torch.optim.AdamW(train.decay_groups(model, args.weight_decay), lr=args.lr, fused=True)


def gradients(model):
    return {name: p.grad.clone() for name, p in adapter.trainable(model).items()}


# ---- batches --------------------------------------------------------------------------------------------------------

def test_an_epoch_covers_every_example_once():
    """Every index comes once per epoch; the order depends on the seed and the epoch and on nothing else."""
    lengths = [len(ids) for ids, _ in toy_examples(96)]
    first = batching.epoch_batches(lengths, 8, seed=0, epoch=0, window=4)
    assert sorted(i for batch in first for i in batch) == list(range(96)) and {len(b) for b in first} == {8}
    assert first == batching.epoch_batches(lengths, 8, seed=0, epoch=0, window=4)
    assert first != batching.epoch_batches(lengths, 8, seed=0, epoch=1, window=4) != batching.epoch_batches(lengths, 8, 1, 1, window=4)


def test_unfilled_batches_are_left_out_unless_alone():
    """97 examples make 12 batches of 8, and not always the longest is left out; 5 examples make one batch of 5."""
    epochs = [batching.epoch_batches(list(range(97)), 8, 0, epoch) for epoch in range(5)]
    assert all([len(b) for b in batches] == [8] * 12 for batches in epochs)
    assert any(96 in b for batches in epochs for b in batches)
    assert [len(b) for b in batching.epoch_batches([3] * 5, 8, 0, 0)] == [5]


def test_bucketing_leaves_little_padding_and_is_not_sorted():
    """Batches hold similar lengths (under 10 % padding where random ones have over 30 %), in an order that is not by length."""
    lengths = [10 + i % 200 for i in range(2000)]
    batches = batching.epoch_batches(lengths, 16, 0, 0)
    padded = sum(len(b) * max(lengths[i] for i in b) for b in batches)
    assert sum(lengths[i] for b in batches for i in b) / padded > 0.9
    longest = [max(lengths[i] for i in b) for b in batches]
    assert longest != sorted(longest) and longest != sorted(longest, reverse=True)


def test_held_out_examples_are_apart_and_the_same_for_every_seed():
    """The held-out slice is disjoint from the training examples and nothing is lost; too large a slice is refused."""
    examples = [{"question": str(i)} for i in range(50)]
    rest, held_out = batching.split(examples, 8)
    assert len(held_out) == 8 and sorted(map(str, rest + held_out)) == sorted(map(str, examples))
    assert batching.split(examples, 8) == (rest, held_out)
    with pytest.raises(ValueError, match="--held-out 50 leaves nothing to train on"):
        batching.split(examples, 50)


def test_collate_shifts_and_masks():
    """Targets are the next tokens of the answer; question and padding carry none."""
    inputs, targets = batching.collate([([5, 6, 7, 8, 9], 3), ([1, 2, 3], 1)], "cpu")
    assert inputs.tolist() == [[5, 6, 7, 8], [1, 2, 0, 0]]
    assert targets.tolist() == [[-100, -100, 8, 9], [2, 3, -100, -100]]
    assert batching.answer_tokens([([5, 6, 7, 8, 9], 3), ([1, 2, 3], 1)]) == 4


def test_learning_rate_schedules():
    """Warm-up rises to the peak, cosine and linear end near zero, constant stays."""
    cosine, linear, constant = ([train.learning_rate(s, 100, 2.0, name, 0.1) for s in range(100)] for name in ("cosine", "linear", "constant"))
    for rates in (cosine, linear, constant):
        assert rates[0] == pytest.approx(0.2) and rates[9] == rates[10] == 2.0 == max(rates)
    assert cosine[55] == pytest.approx(1.0) and linear[55] == pytest.approx(1.0) and constant[-1] == 2.0
    assert 0 < cosine[-1] < 0.001 < linear[-1] < 0.03
    assert train.learning_rate(0, 1, 2.0, "cosine", 0.03) == 2.0


# ---- one step -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("method", METHODS)
def test_accumulation_gives_the_same_update(method):
    """One batch of 8, two of 4 and eight of 1 give the same gradients to rounding, though their answers differ in length."""
    batch, results = toy_examples(8), []
    for micro_batch in (8, 4, 1):
        model = perturb(attach(toy_model(), method), 0.02)
        loss = train.accumulate_gradients(model, batch, micro_batch, "cpu", NO_AUTOCAST)
        if method == "sorsa":
            adapter.method_module("sorsa").add_regularizer_grad(model, 0.4)
        results.append((loss, gradients(model)))
    (loss, whole), *others = results
    for other_loss, parts in others:
        assert torch.allclose(loss, other_loss, rtol=1e-5)
        for name in whole:
            assert (whole[name] - parts[name]).abs().max() < 1e-5 * max(1, whole[name].abs().max()), name


def test_regularizer_comes_after_clipping_and_outside_the_logged_norm(tmp_path):
    """With a tiny clip limit the pull on the factors still arrives in full, and the logged norm is the loss's own."""
    model, seen = attach(toy_model(), "lora"), []
    factors = adapter.trainable(model).values()
    start = [p.detach().clone() for p in factors]

    def regularize():
        seen.append(torch.cat([p.grad.flatten() for p in factors]).norm().item())
        for p in factors:
            p.grad += 5.0
        return torch.tensor(7.0)

    args = chosen(lr=1e-2, clip=1e-6, steps=1)
    with open(tmp_path / "log", "w") as log:
        train.train(args, model, adamw(args, model), resume.Progress(), toy_examples(8), range(8), regularize, lambda step: 0.0,
                    lambda: None, log)
    line = json.loads((tmp_path / "log").read_text())
    assert seen[0] == pytest.approx(1e-6, rel=1e-3) and line["grad_norm"] > 0.01 and line["regularizer"] == 7
    for p, before in zip(factors, start):  # AdamW's first step is lr times the gradient's sign
        assert torch.allclose(p, before - 1e-2, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_checkpointing_keeps_the_gradients_and_less_memory(method):
    """The same loss and gradients, bit by bit; of four layers only their inputs wait for the backward pass."""
    batch, results = toy_examples(8), []
    for checkpointing in (False, True):
        model, saved = perturb(attach(toy_model(num_hidden_layers=4), method), 0.02), {}
        model.model.recompute = checkpointing

        def keep(tensor):
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = train.accumulate_gradients(model, batch, 8, "cpu", NO_AUTOCAST)
        weights = {p.untyped_storage().data_ptr() for p in model.state_dict().values()}
        results.append((loss, gradients(model), sum(size for place, size in saved.items() if place not in weights)))
    (loss, kept, all_saved), (same_loss, again, few_saved) = results
    assert torch.equal(loss, same_loss) and all(torch.equal(kept[name], again[name]) for name in kept)
    assert few_saved < all_saved / 3


@pytest.mark.parametrize("method", METHODS)
def test_the_gpu_precisions_run_on_a_cpu(method):
    """A bf16 base with fp32 factors, and fp32 weights under bf16 autocast for full, give the fp32 loss and gradients to
    bf16 rounding, the gradients in fp32."""
    batch, exact = toy_examples(8), perturb(attach(toy_model(), method), 0.02)
    expected = train.accumulate_gradients(exact, batch, 4, "cpu", NO_AUTOCAST)
    mixed = toy_model() if method == "full" else toy_model().bfloat16()
    perturb(attach(mixed, method), 0.02)
    loss = train.accumulate_gradients(mixed, batch, 4, "cpu", torch.autocast("cpu", torch.bfloat16, enabled=method == "full"))
    assert abs(loss - expected) < 0.02 * expected
    for name, gradient in gradients(mixed).items():
        reference = gradients(exact)[name]
        assert gradient.dtype == torch.float32 and (gradient - reference).norm() < 0.25 * reference.norm(), name


def test_flop_count_of_the_reference_case():
    """4 N_b + 4 a N_e + 6 P per token for LoRA, 6 N_b + 6 a N_e for full fine-tuning."""
    for method, expected in (("lora", lambda body, head, P: 4 * body + 4 * head + 6 * P), ("full", lambda body, head, P: 6 * body + 6 * head)):
        model = toy_model()
        body = sum(p.numel() for n, p in model.named_parameters() if "proj" in n)
        attach(model, method)
        P = sum(p.numel() for p in adapter.trainable(model).values())
        assert report.gflop_per_token(model, 0.5)[1] * 1e9 == pytest.approx(expected(body, 0.5 * 97 * 32, P))


def test_flop_count_of_shared_and_frozen_factors():
    """A shared factor works in every layer that uses it, a frozen one costs no gradient of its own."""
    for method in ("lotr", "cora", "mosara"):
        model = toy_model()
        body = sum(p.numel() for n, p in model.named_parameters() if "proj" in n)
        attach(model, method)
        layers = [layer for _, layer in adapter.adapted_layers(model)]
        if method == "lotr":
            own = sum(6 * 4 * sum(layer.weight.shape) for layer in layers)  # a core acts on weights, not on tokens
        elif method == "cora":
            own = sum(6 * 4 * layer.in_features + 4 * 4 * layer.out_features for layer in layers)
        else:
            own = sum(4 * len(layer.Vt) * sum(layer.weight.shape) + 6 * (5 * len(layer.Vt) + len(layer.Vt) + 5) for layer in layers)
        assert report.gflop_per_token(model, 0.5)[1] * 1e9 == pytest.approx(4 * body + 4 * 0.5 * 97 * 32 + own)


@pytest.mark.parametrize("method", METHODS)
def test_help_lists_a_flag_under_the_methods_that_take_it(method, capsys):
    """Each flag of a method stands in --help in a group that names the method, and in no other method's."""
    with pytest.raises(SystemExit):
        flags.parse_arguments(["--help"])
    for section in capsys.readouterr().out.split("\n\n"):
        title = section.splitlines()[0].rstrip(":")
        listed = {word.lstrip("-").rstrip(",").replace("-", "_") for line in section.splitlines()[1:] for word in line.split()[:1]}
        for flag in listed & {flag for name in METHODS for flag in flags.method_arguments(name)}:
            assert (flag in flags.method_arguments(method)) == (method in title.split(", ")), (title, flag)


# ---- whole runs -----------------------------------------------------------------------------------------------------

@pytest.fixture
def run(tiny_gguf, tmp_path):
    """Six short steps of train.py on the tiny model, into the folder named."""
    data = write_sums(tmp_path / "data")
    return lambda name, *flags: train.main(["--model", str(tiny_gguf), "--data", str(data), "--held-out", "8", "--steps", "6", "--batch", "4",
                                            "--out", str(tmp_path / name), "--no-sample", "--device", "cpu", *flags])


@pytest.mark.parametrize("method", METHODS)
def test_a_run_learns_and_leaves_its_files(method, run, tiny_gguf, tmp_path, capsys):
    """Six steps lower the held-out loss; the log, the result and the adapter are there and agree with what was printed."""
    size = [f"--{key}={value}" for key, value in SIZES.get(method, {"rank": 4}).items()]
    targets = [] if method == "full" else ["--targets", ",".join(adapter.TARGETS)]
    result = run("run", "--method", method, "--lr", "3e-2" if "sara" in method else "1e-2", *size, *targets)
    assert result["held_out_after"] < result["held_out_before"] - 0.05
    assert result["held_out_after"] == list(result["held_out_loss"].values())[-1]
    printed = capsys.readouterr().out
    assert f"held-out loss {result['held_out_before']:.4f} -> {result['held_out_after']:.4f}" in printed.splitlines()[-2]
    assert json.loads((tmp_path / "run" / "result.json").read_text())["held_out_after"] == result["held_out_after"]
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in lines if "held_out_loss" in line] == [0, 2, 4, 6]
    assert ("regularizer" in lines[1]) == (method == "sorsa")
    tensors, config, name, _ = adapter_file.read(tmp_path / "run" / "adapter.safetensors")
    assert config["method"] == method and name == str(tiny_gguf)
    trained = result["trainable_parameters"]
    stored = sum(t.numel() for t in tensors.values())
    assert stored == 2 * trained if method in ("pissa", "sorsa") else stored > trained if method in ("mosara", "cora") else stored == trained


def test_ranks_are_printed_and_kept(run, tmp_path, capsys):
    """A SARA run shows a rank per layer and projection and keeps them in result.json; --params says what it chose."""
    result = run("run", "--method", "sara", "--params", "1k", "--steps", "1")
    printed, ks = capsys.readouterr().out, json.loads((tmp_path / "run" / "result.json").read_text())["adapter"]["ks"]
    assert ks.keys() == {f"model.layers.{i}.self_attn.{name}" for i in range(2) for name in ("q_proj", "v_proj")}
    for name in ("q_proj", "v_proj"):
        own = [ks[f"model.layers.{i}.self_attn.{name}"] for i in range(2)]
        assert [f"{own[0]}", f"{own[1]}", "mean", f"{sum(own) / 2:.1f}"] in [line.split()[1:] for line in printed.splitlines()
                                                                             if line.split()[:1] == [name]]
    threshold, trained = result["adapter"]["threshold"], result["trainable_parameters"]
    assert f"nearest to --params 1,000: threshold {threshold} with {trained:,}\n" in printed
    assert sum(k * (64 + (64 if "q_proj" in name else 32) + 1) for name, k in ks.items()) == trained


def test_routers_are_watched(run, tmp_path, capsys):
    """A Mo-SARA run logs and prints its gates and its change with every held-out loss; the change starts at zero."""
    run("run", "--method", "mosara", "--sets", "3", "--lr", "0.1")
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines() if "held_out_loss" in line]
    assert all(len(line["gates"]) == 3 and sum(line["gates"]) == pytest.approx(1, abs=1e-5) for line in lines)
    assert all(line["gates"] == sorted(line["gates"], reverse=True) for line in lines)
    assert all(1 / 3 <= line["top_gate"] <= 1 for line in lines)
    assert lines[0]["change"] == 0 < lines[1]["change"] < lines[-1]["change"]
    assert f"|dW|/|W| {lines[-1]['change']:.1e}  top gate {lines[-1]['top_gate']:.2f}, sets used " in capsys.readouterr().out


def test_further_checkpoints_join_the_basis(run, tiny_gguf, tmp_path):
    """--extra names models whose weights enter CoRA's basis; the base named again gives the base's own span."""
    other = tmp_path / "other.gguf"
    write_gguf(other, tiny_metadata(), tiny_tensors(seed=5))
    bases = []
    for extra in ([], ["--extra", str(tiny_gguf)], ["--extra", f"{other},{tiny_gguf}"]):
        result = run("run", "--method", "cora", "--rank", "4", "--steps", "1", "--overwrite", *extra)
        assert result["adapter"]["extra"] == (extra[1].split(",") if extra else [])
        bases.append(adapter_file.read(tmp_path / "run" / "adapter.safetensors")[0]["cora.model/layers/0/mlp/gate_up/96.B"])
    overlap = [torch.linalg.svdvals(bases[0].T @ B).min() for B in bases[1:]]
    assert overlap[0] > 1 - 1e-5 and overlap[1] < 0.99


def test_a_sweep_records_every_run(tiny_gguf, tmp_path, monkeypatch, capsys):
    """Each method and rate gets a line in the table and in the results; a diverged run is recorded, a wrong flag stops."""
    data, results = write_sums(tmp_path / "data"), tmp_path / "results.jsonl"
    flags = ["--data", str(data), "--results", str(results), "--", "--model", str(tiny_gguf), "--steps", "2", "--batch", "4",
             "--held-out", "8", "--device", "cpu"]
    monkeypatch.chdir(tmp_path)
    compare.main(["--methods", "lora", "--lrs", "1e-2", "1e30", "--params", "5k", *flags])
    good, bad = [json.loads(line) for line in results.read_text().splitlines()]
    assert good["held_out_after"] < good["held_out_before"] and good["adapter"]["rank"] == 3
    assert bad["held_out_after"] is None and "lower --lr" in bad["error"]
    assert "| `lora` | r 3 | 0.01 | " in capsys.readouterr().out
    with pytest.raises(ValueError, match="lora: --gamma does not belong to lora"):
        compare.main(["--methods", "lora", *flags, "--gamma", "1"])


def test_same_seed_same_losses(run, tmp_path):
    """Two runs with one seed log the same losses to the last bit; another seed, or a regularizer, gives others."""
    def losses(name, *flags):
        run(name, "--method", "sorsa", "--rank", "4", *flags)
        return [line["loss"] for line in map(json.loads, (tmp_path / name / "log.jsonl").read_text().splitlines()) if "loss" in line]
    first = losses("a")
    assert first == losses("b") and first != losses("c", "--seed", "1")
    assert first != losses("d", "--gamma", "0")


def test_gamma_zero_is_training_without_a_regularizer(run, tmp_path, monkeypatch):
    """With gamma 0 the saved factors are bit for bit those of a SORSA that has no regularizer at all."""
    def factors(name, *flags):
        run(name, "--method", "sorsa", "--rank", "4", *flags)
        return adapter_file.read(tmp_path / name / "adapter.safetensors")[0]
    off = factors("off", "--gamma", "0")
    monkeypatch.delattr(adapter.method_module("sorsa"), "add_regularizer_grad")
    absent = factors("absent")
    assert all(torch.equal(off[name], absent[name]) for name in off)


def test_the_loop_is_the_written_out_loop(tmp_path):
    """Three steps of `train.train` are, bit for bit, the loop by hand: schedule, micro-batches, clipping, then SORSA's
    regularizer once per step, AdamW, cleared gradients."""
    data, sorsa = toy_examples(16), adapter.method_module("sorsa")
    args = chosen(lr=1e-2, weight_decay=0.01, clip=0.5, steps=3, micro_batch=2, schedule="linear", warmup=0.4, eval_every=2)
    model, calls = perturb(attach(toy_model(), "sorsa"), 0.02), []

    def regularize():
        calls.append(1)
        return sorsa.add_regularizer_grad(model, 0.4)

    with open(tmp_path / "log", "w") as log:
        progress = resume.Progress()
        train.train(args, model, adamw(args, model), progress, data, range(16), regularize, float, lambda: None, log)

    twin = perturb(attach(toy_model(), "sorsa"), 0.02)
    factors = list(adapter.trainable(twin).values())
    optimizer, seen = torch.optim.AdamW(factors, weight_decay=0.01, fused=True), 0
    batches = batching.epoch_batches([len(ids) for ids, _ in data], 4, 0, 0)
    for rate, indices in zip((0.005, 0.01, 0.01), batches):
        total = sum(len(data[i][0]) - data[i][1] for i in indices)
        for part in (indices[:2], indices[2:]):
            (answer_loss(twin, *batching.collate([data[i] for i in part], "cpu")) / total).backward()
        torch.nn.utils.clip_grad_norm_(factors, 0.5)
        sorsa.add_regularizer_grad(twin, 0.4)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
        seen += sum(len(data[i][0]) for i in indices)
    for name, parameter in adapter.trainable(model).items():
        assert torch.equal(parameter, adapter.trainable(twin)[name]), name
    assert len(calls) == 3 and progress.tokens == seen and progress.held_out == {2: 2.0, 3: 3.0} and progress.step == 3


@pytest.mark.parametrize("micro_batch", [1, 3, 8])
def test_held_out_loss_is_the_mean_over_answer_tokens(micro_batch):
    """Every answer token of every example counts once, whatever the batch."""
    model, data, total = attach(toy_model(), "lora"), toy_examples(8), 0.0
    for ids, prompt_length in data:
        losses = torch.nn.functional.cross_entropy(model(torch.tensor([ids]))[0, :-1], torch.tensor(ids[1:]), reduction="none")
        total += losses[prompt_length - 1:].sum().item()
    expected = total / sum(len(ids) - prompt_length for ids, prompt_length in data)
    assert loss.mean_loss(model, data, micro_batch, "cpu", NO_AUTOCAST) == pytest.approx(expected, rel=1e-5)


def test_flags_that_change_the_data(run, tmp_path, capsys):
    """--limit, --epochs and --strip-annotations change what is trained on, and it shows."""
    everything = run("all", "--method", "lora", "--rank", "4")
    assert "32 to train on, 8 held out" in capsys.readouterr().out
    stripped = run("stripped", "--method", "lora", "--rank", "4", "--strip-annotations")
    assert "annotations removed" in capsys.readouterr().out and stripped["tokens"] < everything["tokens"]
    run("limited", "--method", "lora", "--rank", "4", "--limit", "12")
    assert "12 to train on, 8 held out" in capsys.readouterr().out
    args = flags.parse_arguments(["--epochs", "2.5", "--batch", "8"])
    flags.choose_budget(args, torch.device("cpu"), 100)
    assert args.steps == 30
    args = flags.parse_arguments([])
    flags.choose_budget(args, torch.device("cuda"), 3200)
    assert (args.steps, args.batch, args.log_every, args.eval_every) == (100, 32, 10, 25)


def test_a_run_whose_last_step_diverges_is_not_saved(run, tmp_path):
    """The update after the last loss that was checked shows in the held-out loss: no adapter, no result."""
    with pytest.raises(FloatingPointError, match="step 1: held-out loss nan; lower --lr"):
        run("run", "--method", "lora", "--rank", "4", "--steps", "1", "--lr", "1e30", "--clip", "1e30")
    assert not (tmp_path / "run" / "adapter.safetensors").exists() and not (tmp_path / "run" / "result.json").exists()


def test_an_overwriting_run_that_fails_leaves_the_old_adapter(run, tmp_path):
    """--overwrite replaces the adapter when the new one is there, not before."""
    run("run", "--method", "lora", "--rank", "4")
    before = (tmp_path / "run" / "adapter.safetensors").read_bytes()
    with pytest.raises(FloatingPointError):
        run("run", "--method", "lora", "--rank", "4", "--lr", "1e30", "--clip", "1e30", "--overwrite")
    assert (tmp_path / "run" / "adapter.safetensors").read_bytes() == before


def test_a_diverging_run_stops_before_it_saves(run, tmp_path):
    """A loss that is not finite ends the run with the step and a remedy; no adapter is written."""
    with pytest.raises(FloatingPointError, match=r"step \d: loss .*lower --lr"):
        run("run", "--method", "lora", "--rank", "4", "--lr", "1e30", "--clip", "1e30")
    assert not (tmp_path / "run" / "adapter.safetensors").exists()


def test_a_second_run_gets_its_own_folder(tiny_gguf, tmp_path, monkeypatch):
    """Without --out the first free of runs/METHOD, runs/METHOD-2 is taken; --out over a run is refused, or replaces it."""
    monkeypatch.chdir(tmp_path)
    folders = []
    for _ in range(2):
        args = flags.parse_arguments(["--method", "lora"])
        flags.choose_out(args)
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "log.jsonl").write_text("x")
        folders.append(str(args.out))
    assert folders == ["runs/lora", "runs/lora-2"]
    with pytest.raises(ValueError, match="--out runs/lora already holds a run"):
        flags.check_out(flags.parse_arguments(["--out", "runs/lora"]))
    args = flags.parse_arguments(["--out", "runs/lora", "--overwrite"])
    flags.check_out(args)
    flags.choose_out(args)
    assert str(args.out) == "runs/lora"
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="--out file is a file"):
        flags.check_out(flags.parse_arguments(["--out", "file"]))


BAD = [
    (["--method", "lorra"], "unknown method 'lorra': choose one of full, lora, pissa, sorsa, sara, mosara, cora, cora-init, lotr"),
    (["--method", "lora", "--rank", "0"], "argument --rank: '0' is not a whole number of at least 1"),
    (["--method", "sorsa", "--rank", "33"], "rank 33 is out of range: it must be 1 .. 32, the smaller side of"),
    (["--method", "lora", "--targets", "q_proj,w_pack"], "target 'w_pack' matches no linear layer: this model has q_proj"),
    (["--method", "lora", "--targets", ","], "--targets is empty"),
    (["--lr", "-0.1"], "argument --lr: '-0.1' is not a number of at least 0"),
    (["--lr", "0"], "argument --lr: '0' is not above 0"),
    (["--lr", "nan"], "argument --lr: 'nan' is not a number of at least 0"),
    (["--lr", "fast"], "argument --lr: 'fast' is not a number of at least 0"),
    (["--warmup", "2"], "--warmup 2 is a share of the steps"),
    (["--steps", "0"], "argument --steps: '0' is not a whole number of at least 1"),
    (["--steps", "3", "--epochs", "1"], "give --steps or --epochs, not both"),
    (["--method", "lora", "--gamma", "1e-3"], "--gamma does not belong to lora: its own flags are --targets, --params, --rank, --alpha"),
    (["--method", "cora", "--threshold", "0.1"], "--threshold does not belong to cora: its own flags are --targets, --params, --rank"),
    (["--method", "sara", "--rank", "8"], "--rank does not belong to sara: its own flags are --targets, --params, --alpha, --threshold"),
    (["--method", "lora", "--router-rank", "2"], "--router-rank does not belong to lora"),
    (["--method", "sara", "--sets", "2"], "--sets does not belong to sara"),
    (["--method", "lora", "--core-only"], "--core-only does not belong to lora"),
    (["--method", "full", "--params", "1M"], "--params does not belong to full"),
    (["--method", "lora", "--params", "1M", "--rank", "8"], "--params chooses the rank: give --params or --rank, not both"),
    (["--method", "sara", "--params", "1M", "--threshold", "0.1"], "--params chooses the threshold"),
    (["--params", "1.2G"], "argument --params: '1.2G' is not a number of at least 1, as in 500k or 1.2M"),
    (["--params", "0"], "argument --params: '0' is not a number of at least 1"),
    (["--method", "sara", "--threshold", "1.5"], "threshold 1.5 is out of range: it is a share, above 0 and at most 1"),
    (["--method", "cora", "--basis", "input"], "basis='input' needs square weights: model.layers.0.self_attn.k_proj is 32 x 64"),
    (["--method", "cora", "--basis", "pca"], "argument --basis: invalid choice: 'pca'"),
    (["--method", "cora", "--extra", "no/such.gguf"], "no/such.gguf: no such file"),
    (["--method", "cora", "--extra", ","], "--extra is empty or names a model twice"),
    (["--method", "cora", "--extra", "a.gguf,a.gguf"], "--extra is empty or names a model twice"),

    (["--method", "full", "--rank", "8"], "--rank does not belong to full"),
    (["--held-out", "100000"], "--held-out 100000 leaves nothing to train on"),
    (["--data", "no/such/folder"], "no/such/folder"),
    (["--model", "no/such.gguf"], "no/such.gguf: no such file"),
    (["--model", "gpt5"], "model gpt5 is not known"),
    (["--max-tokens", "5"], "examples have more than 5 tokens: raise --max-tokens"),
    (["--device", "cuda:9"], "--device cuda:9: torch finds no such device here; choose auto, cpu"),
    (["--device", "gpu"], "--device gpu: torch finds no such device"),
]


@pytest.mark.parametrize("flags, message", BAD, ids=[" ".join(flags) for flags, _ in BAD])
def test_bad_input_is_one_line_and_status_2(flags, message, tiny_gguf, tmp_path, capsys):
    """What a user can mend ends with status 2 and one line that names it; nothing is left behind."""
    arguments = ["--model", str(tiny_gguf), "--data", "practice", "--out", str(tmp_path / "run"), "--device", "cpu", *flags]
    with pytest.raises(SystemExit) as stopped:
        run_script(lambda: train.main(arguments))
    lines = capsys.readouterr().err.strip().splitlines()
    assert stopped.value.code == 2 and len(lines) == 1 and message in lines[0], lines
    assert not (tmp_path / "run").exists()


RECORD = '{"question": "How many?", "answer": "One and one. #### 2"}\n'
BAD_DATA = [
    ("", "holds no problems"),
    (RECORD + "{not json\n", "train.jsonl:2: not valid JSON"),
    ('{"question": "How many?"}\n', "train.jsonl:1"),
    ('{"answer": "#### 2"}\n', "train.jsonl:1"),
    (RECORD + '{"question": "How many?", "answer": "two"}\n', "train.jsonl:2"),
]


@pytest.mark.parametrize("text, message", BAD_DATA, ids=["empty", "json", "no answer", "no question", "no ####"])
def test_bad_data_is_named_by_file_and_line(text, message, tiny_gguf, tmp_path, capsys):
    """Malformed data stops before anything is trained, naming the file and the line."""
    (tmp_path / "train.jsonl").write_text(text)
    with pytest.raises(SystemExit) as stopped:
        run_script(lambda: train.main(["--model", str(tiny_gguf), "--data", str(tmp_path), "--out", str(tmp_path / "run"),
                                       "--device", "cpu"]))
    lines = capsys.readouterr().err.strip().splitlines()
    assert stopped.value.code == 2 and len(lines) == 1 and message in lines[0], lines


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=[
    pytest.mark.long, pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")])])
def test_compiled_blocks_give_the_same_gradients(backend, monkeypatch):
    """SARA, whose ranks differ by layer, at several batch shapes: compiled, the loss and every gradient are the same, and
    there is no compilation per layer; what runs eagerly inside does not compile either. (Backend eager traces and makes
    no machine code.)"""
    graphs, compile_block = torch._dynamo.utils.counters["stats"], torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda block, mode: compile_block(block, backend=backend))
    plain = perturb(attach(toy_model(num_hidden_layers=8), "sara", threshold=0.5))
    compiled = copy.deepcopy(plain)
    fast.compile_blocks(compiled, "default")
    before = graphs["unique_graphs"]
    for rows in (3, 5):
        encoded, losses = toy_examples(rows, seed=rows), []
        for model in (plain, compiled):
            model.zero_grad()
            losses.append(train.accumulate_gradients(model, encoded, rows, torch.device("cpu"), NO_AUTOCAST, 8))
        assert torch.allclose(*losses, rtol=1e-5)
        for one, other in zip(adapter.trainable(plain).values(), adapter.trainable(compiled).values()):
            assert torch.allclose(one.grad, other.grad, rtol=1e-3, atol=1e-6)
    after = graphs["unique_graphs"]
    assert 1 <= after - before < 8
    with fast.eagerly(True):
        loss.mean_loss(compiled, toy_examples(7), 7, torch.device("cpu"), NO_AUTOCAST)
    assert graphs["unique_graphs"] == after


def test_rows_are_padded_to_a_multiple():
    """With a multiple, every width is one; without, the longest row's; the targets say the same."""
    encoded = toy_examples(5)
    tokens, targets = batching.collate(encoded, torch.device("cpu"))
    padded, padded_targets = batching.collate(encoded, torch.device("cpu"), 64)
    T = tokens.shape[1]
    assert T == max(len(ids) for ids, _ in encoded) - 1 and padded.shape[1] == 64
    assert torch.equal(padded[:, :T], tokens) and torch.equal(padded_targets[:, :T], targets)
    assert (padded_targets[:, T:] == -100).all()


def test_compiling_without_a_compiler_says_so(monkeypatch):
    """Before anything is trained: which compiler is missing, and the ways out."""
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ValueError, match=r"C\+\+ compiler.*no-such-compiler.*leave --compile out"):
        fast.compile_blocks(toy_model(), "default")
