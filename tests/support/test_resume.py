"""A run that stops, in whatever way, goes on as if it had not; what a checkpoint must hold, and what is refused."""
import json
import random
import resource
import shutil
import signal
import time

import pytest
import torch

import eval as evaluation
import lora
import train
from data.batching import collate
from methods import METHODS
from support import fast, flags, resume
from support.loss import answer_loss
from tests.child import ended, forked
from tests.runs import Stopped, assert_same, begin, contents, copied, ends, go_on, logged_steps, state_of, stopping, trace
from tests.tiny import tiny_metadata, tiny_tensors, write_gguf
from tests.toy import attach, toy_examples, toy_model, write_sums
from weights import base_model
from weights.safetensors import read_safetensors, write_safetensors


# ---- going on -------------------------------------------------------------------------------------------------------

def interrupted(flags, out, *steps):
    """Begin a run that stops after the checkpoints of `steps`, and continue it each time."""
    with stopping(*steps):
        with pytest.raises(Stopped):
            begin(flags, out)
        for _ in steps[1:]:
            with pytest.raises(Stopped):
                go_on(out)
        return go_on(out)


@pytest.mark.parametrize("method", METHODS)
def test_a_continued_run_is_the_uninterrupted_one(method, place, tmp_path):
    """Stopped twice, a run of every method has the losses, norms, rates, settings and weights of one that was not."""
    flags = place.flags(method, "--weight-decay", "0.01")
    begin(flags, tmp_path / "whole")
    result = interrupted(flags, tmp_path / "parts", 2, 4)
    assert result["resumed_at"] == [2, 4] and logged_steps(tmp_path / "parts") == [1, 2, 3, 4, 5, 6]
    assert_same(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.skipif(not fast.has_onednn_switch(), reason="this torch has no such switch")
@pytest.mark.parametrize("first, then", [("ieee", "bf16"), ("bf16", "ieee")])
def test_a_continued_run_multiplies_with_the_same_library(first, then, place, tmp_path, monkeypatch, capsys):
    """Which one it is follows from a trial at the start, which may end otherwise the next time; where it cannot be the same, it is said."""
    def trial(faster):
        monkeypatch.setattr(fast, "takes_less_than", lambda *_: faster == "bf16")
    trial(first)
    begin(place.lora, tmp_path / "whole")
    if fast.products() != first:
        pytest.skip("oneDNN rounds on this CPU")
    with stopping(2), pytest.raises(Stopped):
        begin(place.lora, tmp_path / "parts")
    trial(then)
    go_on(tmp_path / "parts")
    assert_same(tmp_path / "whole", tmp_path / "parts")
    assert fast.products() == first and "fp32 products ieee" not in capsys.readouterr().out
    if first == "bf16":
        with stopping(2), pytest.raises(Stopped):
            begin(place.lora, tmp_path / "other")
        monkeypatch.setattr(fast, "fast_products", lambda chosen: None)
        fast.switch_off()
        go_on(tmp_path / "other")
        assert "fp32 products none, when it began " in capsys.readouterr().out


@pytest.mark.parametrize("units", [True, False], ids=["units", "no units"])
@pytest.mark.parametrize("method", ["full", "sorsa", "mosara"])
def test_a_continued_run_in_bf16(method, units, place, tmp_path, monkeypatch, capsys):
    """The same, to the bit, where the frozen weights are bf16, or full fine-tuning multiplies in it; also on a CPU that multiplies none,
    which is said and recorded."""
    monkeypatch.setattr(fast, "multiplies_bf16", lambda: units)
    flags = place.flags(method, "--dtype", "bfloat16")
    begin(flags, tmp_path / "whole")
    interrupted(flags, tmp_path / "parts", 2)
    assert_same(tmp_path / "whole", tmp_path / "parts")
    assert ("products in fp32, as this CPU multiplies no bf16" in capsys.readouterr().out) == (not units)
    assert json.loads((tmp_path / "parts" / "result.json").read_text())["products_widened"] == (not units)


@pytest.mark.parametrize("more", [
    ["--method", "lora", "--epochs", "1.5", "--params", "3k", "--template", "alpaca", "--strip-annotations"],
    ["--method", "lora", "--steps", "6", "--rank", "3", "--alpha", "7", "--targets", "q_proj,down_proj", "--limit", "13",
     "--cut", "9+12", "--schedule", "linear", "--warmup", "0.5", "--clip", "0.3", "--plain", "--report", "2", "--forgetting"],
    ["--method", "lora", "--steps", "6", "--rank", "4", "--dtype", "bfloat16", "--max-tokens", "60", "--micro-batch", "3",
     "--answers", "equations", "--log-every", "4", "--recompute", "--seed", "5"],
    ["--method", "sorsa", "--steps", "6", "--recipe", "paper", "--params", "3k"]], ids=["epochs", "cut", "bf16", "recipe"])
def test_a_continued_run_keeps_its_settings(more, place, tmp_path, capsys):
    """Without being given again they are what they were, and the plan that is printed is the same."""
    flags = [*place.common, "--save-every", "2", *more]
    begin(flags, tmp_path / "whole")
    interrupted(flags, tmp_path / "parts", 2)
    assert_same(tmp_path / "whole", tmp_path / "parts")
    one, two, three = ["device" + text.partition("\nout  ")[0] for text in capsys.readouterr().out.split("\ndevice")[1:]]
    assert one == two == three and ("\nrecipe    paper sets " in one) == ("--recipe" in more)


def test_further_models_are_not_needed_again(place, tmp_path):
    """The basis that CoRA took from --extra is in the checkpoint: the run goes on though the other model is gone."""
    other = write_gguf(tmp_path / "other.gguf", tiny_metadata(), tiny_tensors(seed=5))
    flags = place.flags("cora", "--extra", str(other))
    begin(flags, tmp_path / "whole")
    with stopping(4), pytest.raises(Stopped):
        begin(flags, tmp_path / "parts")
    other.unlink()
    go_on(tmp_path / "parts")
    assert_same(tmp_path / "whole", tmp_path / "parts")


def test_a_run_that_has_made_every_step_is_finished(place, whole, tmp_path):
    """With result.json written or not, --resume only writes what was missing."""
    for name in ("without", "with"):
        with stopping(6), pytest.raises(Stopped):
            begin(place.lora, tmp_path / name)
    for file in ("result.json", "adapter.safetensors"):
        shutil.copy(whole / file, tmp_path / "with")
    for name in ("without", "with"):
        go_on(tmp_path / name)
        assert_same(whole, tmp_path / name)


@pytest.mark.parametrize("make", [
    lambda groups: torch.optim.AdamW(groups, fused=True), lambda groups: torch.optim.SGD(groups),
    lambda groups: torch.optim.SGD(groups, momentum=0.9), torch.optim.Adafactor, torch.optim.Adagrad],
    ids=["AdamW", "SGD", "momentum", "Adafactor", "Adagrad"])
def test_a_checkpoint_holds_all_that_the_next_step_depends_on(make, tmp_path):
    """Of any optimizer: a model that is continued takes the same next step, and torch draws the same numbers."""
    def take_step(model, optimizer):
        for group in optimizer.param_groups:
            group["lr"] = 0.1
        answer_loss(model, *collate(toy_examples(4), "cpu")).backward()
        optimizer.step()
        optimizer.zero_grad()

    model, twin = (base_model.Base(toy_model(), None, "base", "1" * 64) for _ in range(2))
    optimizer = make(train.decay_groups(attach(model.model, "lora"), 0.1))
    take_step(model.model, optimizer)
    progress = resume.Progress(1, {0: 1.0}, 9, 0.5, 1.0, [])
    resume.save(tmp_path / resume.FILE, model.model, optimizer, model, ["--method=lora"], "2" * 64, progress)
    take_step(model.model, optimizer)
    drawn = torch.rand(5)

    saved = resume.read(tmp_path)
    assert saved.progress == progress
    resume.attach(tmp_path, saved, twin, "2" * 64)
    optimizer = make(train.decay_groups(twin.model, 0.1))
    torch.manual_seed(7)
    resume.restore(tmp_path, saved, twin.model, optimizer, 3)
    take_step(twin.model, optimizer)
    assert torch.equal(torch.rand(5), drawn)
    for name, tensor in model.model.state_dict().items():
        assert torch.equal(tensor, twin.model.state_dict()[name]), name


def test_an_optimizer_that_keeps_more_than_tensors_is_refused(tmp_path):
    """A checkpoint is tensors: what else an optimizer keeps would be lost without a word."""
    model = attach(toy_model(), "lora")
    optimizer = torch.optim.SGD(model.parameters())
    optimizer.state[model.model.layers[1].mlp.up_proj.A]["pace"] = 3
    with pytest.raises(ValueError, match="SGD keeps pace = 3, no tensor: it cannot be saved"):
        resume.save(tmp_path / resume.FILE, model, optimizer, None, [], "", resume.Progress())


# ---- killed, and full disks -----------------------------------------------------------------------------------------

def next_command(flags, out):
    """The arguments that continue a run, or begin it again where no checkpoint is left to continue from."""
    return ["--resume", str(out)] if type(state_of(out)) is int else [*flags, "--out", str(out), "--overwrite"]


@pytest.mark.parametrize("module, name, call", [
    ("train", "accumulate_gradients", 4), ("os", "fsync", 3), *(("os", "replace", call) for call in (1, 2, 3, 5, 6))])
def test_a_run_killed_as_it_writes_goes_on(module, name, call, place, whole, tmp_path):
    """SIGKILL within a step, and as the log, the first or another checkpoint, the adapter and the result are written:
    every file is whole, and in the end all is as if nothing had happened."""
    process = forked([*place.lora, "--out", tmp_path / "run"], tmp_path / "said", (signal.SIGKILL, module, name, call))
    assert ended(process) == 137
    train.main(next_command(place.lora, tmp_path / "run"))
    assert_same(whole, tmp_path / "run")


@pytest.mark.long
@pytest.mark.parametrize("method", METHODS)
def test_a_run_killed_at_random_goes_on(method, place, tmp_path):
    """The same with six kills of each method, whenever they come."""
    flags, out, rng = place.flags(method, "--save-every", "1", "--steps", "16"), tmp_path / "parts", random.Random(method)
    since = time.perf_counter()
    assert ended(forked([*flags, "--out", tmp_path / "whole"], tmp_path / "said")) == 0
    seconds, kills = time.perf_counter() - since, 0
    while kills < 6:
        if state_of(out) == "finished":  # before it was killed often enough
            shutil.rmtree(out)
        process = forked(next_command(flags, out), tmp_path / "said")
        time.sleep(rng.uniform(0, seconds))
        process.kill()
        kills += ended(process) == 137
    if state_of(out) != "finished":
        train.main(next_command(flags, out))
    assert_same(tmp_path / "whole", out)


def test_a_full_disk_leaves_the_last_checkpoint(place, whole, tmp_path, monkeypatch, capsys):
    """The second checkpoint does not fit: one line names it, the first is there and goes on, nothing else is left."""
    run, save, before = tmp_path / "run", resume.save, resource.getrlimit(resource.RLIMIT_FSIZE)

    def save_on_a_full_disk(*arguments):
        if arguments[-1].step == 4:
            resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
        save(*arguments)
    with monkeypatch.context() as patch:
        patch.setattr(resume, "save", save_on_a_full_disk)
        try:
            status, said = ends(capsys, begin, place.lora, run)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (status, said) == (2, f"error: {run / resume.FILE}: File too large; check that path, its permissions and the space "
                                 "left there\n")
    assert contents(run).keys() == {"log.jsonl", resume.FILE} and state_of(run) == 2
    go_on(run)
    assert_same(whole, run)


# ---- what may change, and what is refused ---------------------------------------------------------------------------

# Another value of every flag that changes what a run computes; None for a switch.
OTHERS = {
    "method": "sorsa", "template": "alpaca", "answers": "equations", "recipe": "paper", "targets": "q_proj", "params": "5k",
    "rank": "5", "alpha": "3", "svd": "exact", "gamma": "0", "reduction": "sum", "threshold": "0.3", "init": "lora",
    "ranks": "even", "sets": "3", "router_rank": "2", "equal_gates": None,
    "v_mode": "output", "basis": "random", "extra": "a.gguf", "a_init": "random", "group_by": "name", "core_only": None,
    "steps": "7", "epochs": "2", "batch": "5", "lr": "0.02", "schedule": "linear", "warmup": "0.5", "weight_decay": "0.1",
    "clip": "2", "max_tokens": "99", "cut": "50+50", "strip_annotations": None, "limit": "20", "seed": "1", "held_out": "9",
    "report": "3", "forgetting": None, "dtype": "bfloat16"}


def test_what_changes_the_run_is_refused(half, capsys):
    """Every flag that is not free, with another value than the run began with: one line, and the run is as it was."""
    assert {*OTHERS, *flags.FREE} == vars(flags.make_parser().parse_args([])).keys() and not OTHERS.keys() & {*flags.FREE}
    before = contents(half)
    for name, value in OTHERS.items():
        flag = "--" + name.replace("_", "-")
        status, said = ends(capsys, go_on, half, flag, *([value] if value else []))
        assert status == 2 and said.startswith(f"error: {flag}") and f": the run in {half} began with" in said, said
    assert contents(half) == before


@pytest.mark.parametrize("flag, words", [
    (["--lr", "0.02"], "--lr 0.02: the run in {half} began with --lr 0.01, and another value would change what it computes"),
    (["--gamma", "0"], "--gamma 0.0: the run in {half} began without it, and"),
    (["--core-only"], "--core-only: the run in {half} began without it, and")])
def test_a_refusal_says_what_the_run_began_with(flag, words, half, capsys):
    """The flag with the new value and the old one."""
    assert ends(capsys, go_on, half, *flag)[1].startswith("error: " + words.format(half=half))


def test_the_same_value_and_free_flags_are_taken(half, whole, tmp_path):
    """What a run began with may be given again; how often it measures, saves and logs may change, and how it computes. A
    run that is stopped again goes on with what was changed."""
    run = copied(half, tmp_path / "run")
    with stopping(5), pytest.raises(Stopped):
        go_on(run, "--lr", "1e-2", "--rank", "4", "--micro-batch", "2", "--eval-every", "1", "--save-every", "1", "--recompute")
    assert resume.read(run).flags.count("--save-every=1") == 1 and "--save-every=2" not in resume.read(run).flags
    result = go_on(run)
    assert (result["micro_batch"], result["recompute"], set(result["held_out_loss"])) == (2, True, {0, 3, 5, 6})
    assert result["held_out_after"] == pytest.approx(trace(whole)[-1]["held_out_loss"], rel=1e-5)


def test_model_and_data_may_have_moved(half, place, whole, tmp_path):
    """Both are known by their checksums: --model and --data say where they are now."""
    run, model = copied(half, tmp_path / "run"), tmp_path / "moved.gguf"
    shutil.copy(place.model, model)
    shutil.copytree(place.data, tmp_path / "moved")
    result = go_on(run, "--model", model, "--data", tmp_path / "moved")
    assert (result["model"], result["data"]) == (str(model), str(tmp_path / "moved")) and trace(run) == trace(whole)


@pytest.mark.parametrize("more, words", [
    (lambda folder: ["--model", write_gguf(folder / "other.gguf", tiny_metadata(), tiny_tensors(seed=5))],
     "the run began with another model (sha256 "),
    (lambda folder: ["--data", write_sums(folder / "data", 41)], "the run began with another data (sha256 "),
    (lambda folder: ["--out", folder / "x"], "leave out --out and --overwrite")], ids=["model", "data", "out"])
def test_what_does_not_go_with_resume(more, words, half, tmp_path, capsys):
    """One line, and the run is as it was."""
    run = copied(half, tmp_path / "run")
    status, said = ends(capsys, go_on, run, *more(tmp_path))
    assert status == 2 and words in said and contents(run) == contents(half)


def test_a_folder_that_cannot_be_written_to(half, monkeypatch, capsys):
    """It can be copied and the copy resumed; a dry run, which writes nothing, needs no leave."""
    monkeypatch.setattr("os.access", lambda path, mode: False)
    status, said = ends(capsys, go_on, half)
    assert status == 2 and f"--resume {half}: no permission to write into {half}: copy the run to a folder where you may write" in said
    go_on(half, "--dry-run")


def test_an_unfinished_run_is_not_measured(half, capsys):
    """What is to be done is said."""
    status, said = ends(capsys, evaluation.main, [str(half)])
    assert status == 2 and f"this run has not ended: wait for it, or go on with python train.py --resume {half}" in said


def test_where_there_is_nothing_to_continue(whole, tmp_path, capsys):
    """A finished run, a folder that holds none, and no folder are told apart."""
    (tmp_path / "empty").mkdir()
    for folder, words in ((whole, "this run is finished"), (tmp_path / "empty", "nothing was saved before it stopped"),
                          (tmp_path / "no", "there is no such folder"), (whole / "log.jsonl", f"{whole / 'log.jsonl'} is a file: name the folder")):
        status, said = ends(capsys, go_on, folder)
        assert status == 2 and f"{folder / resume.FILE}: no such file, so there is nothing to continue: {words}" in said


# ---- damaged checkpoints --------------------------------------------------------------------------------------------

def rewritten(run, tensors=None, metadata=None, progress=None, **record):
    """Change a run's checkpoint: its tensors (None: left out), its metadata, the record in them, the progress in that."""
    path = run / resume.FILE
    found, texts = read_safetensors(path)
    found = {name: tensor.clone() for name, tensor in found.items()}
    for name, change in (tensors or {}).items():
        old = found.pop(name, None)
        if change is not None:
            found[name] = change(old)
    saved = {**json.loads(texts["run"]), **record}
    saved["progress"] = {**saved["progress"], **(progress or {})}
    write_safetensors(path, found, {**texts, "run": json.dumps(saved), **(metadata or {})})


Q = "model.layers.0.self_attn.q_proj.A"
OTHER_STEPS = "its progress is not that of a run of 6 steps"
NO_FLAGS = "its flags are not those of a run: "
DAMAGE = {
    "another optimizer": (dict(optimizer="SGD"), "the run began with SGD, train.py now has AdamW"),
    "a state tensor missing": (dict(tensors={f"exp_avg.{Q}": None}), f"the optimizer's state is missing: exp_avg.{Q}"),
    "a state tensor too many": (dict(tensors={"exp_avg_sq.x": lambda _: torch.zeros(3)}),
                                "the optimizer's state is unexpected: exp_avg_sq.x"),
    "a state tensor's shape": (dict(tensors={f"exp_avg.{Q}": lambda old: old.T.contiguous()}),
                               f"exp_avg.{Q} is not of shape (4, 64) in torch.float32"),
    "another step": (dict(tensors={f"step.{Q}": lambda old: old + 1}), f"step.{Q} is not 4, the step it was saved after"),
    "a factor missing": (dict(tensors={f"adapter.{Q}": None}), f"there is no tensor {Q}"),
    "a factor's shape": (dict(tensors={f"adapter.{Q}": lambda old: old[:2].contiguous()}),
                         f"{Q} has shape (2, 64) in the saved state, expected (4, 64)"),
    "no random state": (dict(tensors={"rng": None}), "no random state of torch's"),
    "numbers for a random state": (dict(tensors={"rng": lambda old: old.float()}), "no random state of torch's"),
    "no record": (dict(metadata={"run": "[]"}), "the 'run' metadata is not a JSON object"),
    "no adapter": (dict(metadata={"adapter": "{}"}), "unknown method None"),
    "no progress": (dict(progress={"tokens": "many"}), "its progress is none"),
    "step 7": (dict(progress={"step": 7}), OTHER_STEPS),
    "nothing measured": (dict(progress={"held_out": {}}), OTHER_STEPS),
    "a word among flags": (dict(flags=["--lr=1", "x"]), "its flags are no flags"),
    "a flag of one command": (dict(flags=["--help"]), f"{NO_FLAGS}--help"),
    "a flag cut short": (dict(flags=["--met=lora"]), f"{NO_FLAGS}--met=lora"),
    "a wrong value": (dict(flags=["--lr=x"]), f"{NO_FLAGS}argument --lr: 'x' is not a number"),
    "another's flag": (dict(flags=["--method=lora", "--sets=3"]), f"{NO_FLAGS}--sets does not belong to lora"),
    "another method": (dict(flags=["--method=full"]), f"{NO_FLAGS}full, and the adapter is of lora")}


def test_what_forgetting_began_with_must_be_there(place, tmp_path, monkeypatch, capsys):
    """Without the first loss on general text there is nothing to compare the last with."""
    monkeypatch.setattr("data.prose.PIECES", 2)
    with stopping(4), pytest.raises(Stopped):
        begin([*place.lora, "--forgetting"], tmp_path / "run")
    rewritten(tmp_path / "run", progress={"prose": {"3": 5.5}})
    assert OTHER_STEPS in ends(capsys, go_on, tmp_path / "run")[1]


@pytest.mark.parametrize("label", DAMAGE)
def test_a_damaged_checkpoint_is_named(label, half, tmp_path, capsys):
    """One line that names the file and what is wrong in it; nothing of the run has changed."""
    run, (changes, words) = copied(half, tmp_path / "run"), DAMAGE[label]
    rewritten(run, **changes)
    before = contents(run)
    status, said = ends(capsys, go_on, run)
    assert status == 2 and said.startswith(f"error: {run / resume.FILE}: ") and words in said, said
    assert contents(run) == before


@pytest.mark.parametrize("field, values", [
    ("step", (-1, 1.5, True)), ("seconds", (-1.0, None)), ("resumed_at", (3, [0.5])), ("x", (0,)),
    *[(field, ([], {"0": "x"}, {"a": 0.5}, {"0": 1}, {"0": float("nan")})) for field in ("held_out", "prose")]])
def test_what_is_no_progress(field, values):
    """Its JSON form has exactly the fields, each of its kind."""
    record = {"step": 1, "tokens": 9, "seconds_in_steps": 0.5, "seconds": 1.0, "held_out": {"0": 1.5}, "resumed_at": [1],
              "prose": {"0": 2.5}}
    assert resume.read_progress(record) and not any(resume.read_progress({**record, field: value}) for value in values)


def test_a_log_of_any_kind_is_mended(half, whole, tmp_path):
    """Lines that are cut, foreign, or of steps after the checkpoint are dropped; without a log there is a new one."""
    run = copied(half, tmp_path / "run")
    with open(run / "log.jsonl", "ab") as file:
        file.write(b'{"step": 5, "loss": 1.0}\n[1]\n7\n{}\n{"step": "x"}\n{"step": null}\n\xff\xfe\n{"step": 5, "lo')
    go_on(run)
    assert_same(whole, run)
    run = copied(half, tmp_path / "without")
    (run / "log.jsonl").unlink()
    go_on(run)
    assert trace(run) == trace(whole)[-3:]


def test_a_method_that_draws_goes_on_too(place, tmp_path, monkeypatch):
    """Dropout: off where a loss is measured, the same for a seed, and after a stop as it would have been."""
    class Dropped(lora.LoRALinear):
        def forward(self, x):
            return super().forward(torch.nn.functional.dropout(x, 0.3, self.training))
    monkeypatch.setattr(lora, "LoRALinear", Dropped)
    first, second = tmp_path / "first", tmp_path / "second"
    result = begin(place.lora, first)
    assert result["held_out_before"] == pytest.approx(loss_before(place), abs=1e-6)
    with stopping(4), pytest.raises(Stopped):
        begin(place.lora, second)
    torch.rand(7)  # the state that another process would have
    go_on(second)
    assert_same(first, second)


def loss_before(place):
    """The base's held-out loss."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lora, "LoRALinear", PLAIN)
        return begin([*place.lora, "--steps", "1", "--overwrite"], place.folder / "plain")["held_out_before"]


PLAIN = lora.LoRALinear
