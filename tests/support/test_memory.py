"""Memory and open files: what is said where they run out, what a run holds, what it is expected to take."""
import errno
import gc
import os
import resource
from pathlib import Path

import pytest
import torch

import train
from data.batching import IGNORE
from support import fast, report, resume, script
from support.loss import answer_loss
from tests.runs import assert_same, begin, copied, ends, go_on
from tests.toy import attach, toy_model
from weights.safetensors import read_safetensors


def out_of_gpu_memory():
    raise torch.OutOfMemoryError("CUDA out of memory.\nTried to")


# ---- where it runs out ----------------------------------------------------------------------------------------------

def raising(error):
    """A function that raises this."""
    def fail():
        raise error
    return fail


@pytest.mark.parametrize("fail", [
    lambda: torch.empty(1 << 50), lambda: bytearray(1 << 60), out_of_gpu_memory,
    raising(RuntimeError("could not create a primitive")), raising(OSError(errno.ENOMEM, "Cannot allocate memory")),
    raising(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"))],
    ids=["torch", "python", "gpu", "onednn", "system", "cublas"])
def test_out_of_memory_is_one_line_with_advice(fail, capsys):
    """From every allocator."""
    assert ends(capsys, script.run_script, fail, "lower --micro-batch") == (2, "error: out of memory: lower --micro-batch\n")


def test_other_errors_are_tracebacks():
    """A RuntimeError that is not about memory is ours to mend."""
    with pytest.raises(RuntimeError, match="size"):
        script.run_script(lambda: torch.zeros(3) @ torch.zeros(4))


# ---- what a run holds -----------------------------------------------------------------------------------------------

def held():
    """(open files, threads, resident bytes) of this process."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task")), pages * resource.getpagesize()


def test_a_run_holds_no_more_at_its_end(place, tmp_path, monkeypatch):
    """Sixty steps with a checkpoint after each second one: files, threads and memory (but 4 MB) are as after twenty."""
    seen, function = [], train.measure

    def watched(*arguments):
        seen.append(held())
        return function(*arguments)
    monkeypatch.setattr(train, "measure", watched)
    begin(place.flags("sorsa", "--steps", "60", "--eval-every", "20"), tmp_path / "run")
    _, early, _, late = seen
    assert late[:2] == early[:2] and late[2] < early[2] + (4 << 20)


def test_few_files_are_open_at_once(half, whole, tmp_path, monkeypatch):
    """A checkpoint of more tensors than a process may open files is read, and its file is let go before the next step."""
    run, before = copied(half, tmp_path / "run"), resource.getrlimit(resource.RLIMIT_NOFILE)
    assert len(read_safetensors(run / resume.FILE)[0]) > 100
    loop, saved = train.train, []
    gc.collect()
    monkeypatch.setattr(train, "train", lambda args, *rest: (saved.append(args.saved), loop(args, *rest)))
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + 20, before[1]))
        go_on(run)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert_same(whole, run)
    assert saved == [None]


# ---- what it is expected to take ------------------------------------------------------------------------------------

@pytest.mark.parametrize("recompute", [False, True])
def test_the_estimate_of_activations(recompute, monkeypatch):
    """Within 15 % of what autograd keeps for a LoRA on every projection, in the fast forms; with --recompute of what it
    keeps of all blocks, and of one more while its backward pass runs."""
    monkeypatch.setattr(fast, "onednn_multiplies", fast.eager_on_cpu)  # attention in pieces: torch's own keeps what it likes
    fast.switch_on(fast.FORMS)
    model = attach(toy_model(num_hidden_layers=6, hidden_size=64, intermediate_size=160, num_attention_heads=4,
                             num_key_value_heads=2, head_dim=16), "lora", rank=2)
    tokens = torch.randint(0, 97, (8, 40))
    targets = tokens.clone()
    targets[:, :-1] = IGNORE  # the head is counted apart
    weights = {tensor.untyped_storage().data_ptr() for tensor in model.state_dict().values()}

    def kept(recompute):
        storages, model.model.recompute = {}, recompute

        def keep(tensor):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = answer_loss(model, tokens, targets)
        return sum(size for place, size in storages.items() if place not in weights), loss  # which holds what was kept

    everything = kept(False)[0]
    measured = kept(True)[0] + everything / 6 if recompute else everything
    assert report.activation_bytes(model, tokens.numel(), recompute) == pytest.approx(measured, rel=0.15)
