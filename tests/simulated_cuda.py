"""A GPU that is not there: tensors that say they are on cuda:0, compute on the CPU, and are held to CUDA's rules.

`python -m tests.simulated_cuda METHOD ...`, a process of its own as it changes torch, takes each method through train.py, a
stop after a checkpoint, --resume and eval.py on the tiny model, and prints a line of JSON per method: what it saw.

It proves that no operator gets tensors of two devices, that each has a kernel for CUDA, where the host waits for the GPU,
and how many operators a step hands to it. It proves nothing about numbers, speed or memory, about which kernel of several
runs, about autocast (full fine-tuning computes in fp32 here), --compile and CUDA graphs.
"""
import argparse
import collections
import contextlib
import json
import re
import sys
import tempfile
import traceback
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchgen
from torch.utils import _foreach_utils
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

import adapter
import eval as evaluation
import train
from methods import METHODS
from support import fast, graphs
from support.monitor import Monitor
from tests import tiny
from tests.again import Again
from tests.runs import Place, Stopped, begin, go_on, stopping
from tests.toy import attach, toy_examples, toy_model
from weights import base_model

ROOT, TESTS = (str(Path(__file__).resolve().parents[up]) for up in (1, 0))
CUDA = torch.device("cuda", 0)
aten = torch.ops.aten
INDEXING = (aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default)
# What gives the host a number, or tensors whose size or success depends on numbers.
ASKING = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_linalg_eigh", "_linalg_svd")
FREE = re.compile("_unsafe_view|(new_)?empty(_like|_strided)?")  # these start nothing on a GPU; neither do views


class Seen:
    """What happened, by the part of the program in which it did."""
    part = "start"
    faults = collections.Counter()  # {"part: what, at file: code": times}
    waits = collections.Counter()  # the same, of the host for the GPU
    operators = collections.Counter()  # {part: how many things a GPU is given to do}

    @staticmethod
    def note(kind, what):
        frames = [frame for frame in traceback.extract_stack()
                  if frame.filename.startswith(ROOT) and not frame.filename.startswith(TESTS)]
        at = f"{Path(frames[-1].filename).name}: {frames[-1].line}" if frames else "tests"
        kind[f"{Seen.part}: {what}, at {at}"] += 1


# ---- tensors --------------------------------------------------------------------------------------------------------

class Simulated(torch.Tensor):
    """A tensor on cuda:0 whose numbers are those of `numbers`, a CPU tensor. To torch's autograd it is one without any."""

    @staticmethod
    def __new__(cls, numbers, requires_grad=False):
        with torch._C._DisableTorchDispatch():
            shape = torch.empty_strided(numbers.size(), numbers.stride(), dtype=numbers.dtype, device="meta")
        tensor = torch.Tensor._make_subclass(cls, shape, requires_grad, device_for_backend_keys=CUDA)
        tensor.numbers = numbers
        return tensor

    device, is_cuda, is_cpu, is_meta = (property(lambda self, value=value: value) for value in (CUDA, True, False, False))
    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, operator, types, arguments=(), options=None):
        return run(operator, arguments, options or {})

    @property
    def data(self):
        return self.detach()

    @data.setter
    def data(self, value):
        torch.Tensor.data.__set__(self, value)
        self.numbers = value.numbers

    def __deepcopy__(self, memo):
        return Simulated(self.numbers.clone(), self.requires_grad)

    def tolist(self):
        Seen.note(Seen.waits, "tolist")
        return self.numbers.tolist()


class Mode(TorchDispatchMode):
    """Sees the operators without a tensor, too: those that make one."""

    def __torch_dispatch__(self, operator, types, arguments=(), options=None):
        return run(operator, arguments, options or {})


def run(operator, arguments, options):
    """An operator by CUDA's rules, computed on the CPU."""
    if operator is torch.ops.prim.device.default:
        return CUDA
    if torch.is_inference_mode_enabled():  # elsewhere it is autograd that takes apart what consists of other operators
        with Mode():
            result = operator.decompose(*arguments, **options)
        if result is not NotImplemented:
            return result
    tensors = [leaf for leaf in tree_leaves((arguments, options)) if isinstance(leaf, torch.Tensor)]
    there, here = ([x for x in tensors if isinstance(x, Simulated) is on_gpu] for on_gpu in (True, False))
    target = torch.device(options["device"]).type if options.get("device") is not None else None
    to_gpu = target in ("cuda", "meta")  # what autograd makes is for tensors without numbers
    on_gpu = to_gpu or bool(there) and target is None
    if there or to_gpu:
        check(operator, arguments, options, there, here, to_gpu)
    if to_gpu:
        options = {**options, "device": torch.device("cpu")}
    bare_arguments, bare_options = tree_map_only(Simulated, lambda tensor: tensor.numbers, (arguments, options))
    with torch._C._DisableTorchDispatch():
        result = operator(*bare_arguments, **bare_options)
    known = {id(tensor.numbers): tensor for tensor in there}  # what was changed in place stays the same tensor

    def on_its_device(tensor):
        return tensor if not on_gpu else known[id(tensor)] if id(tensor) in known else Simulated(tensor)
    return arguments[0] if operator is aten.copy_.default else tree_map_only(torch.Tensor, on_its_device, result)


def check(operator, arguments, options, there, here, to_gpu):
    """Note what CUDA would not do, and what would make the host wait for it; count."""
    name = operator._schema.name.removeprefix("aten::")
    first, others = arguments[0] if arguments else None, arguments[1:]
    if not has_kernel(operator):
        Seen.note(Seen.faults, f"no kernel for {operator}")
    if name == "_to_copy" and to_gpu and there and options.get("dtype") in (None, first.dtype):
        return  # to where it is: nothing
    Seen.operators[Seen.part] += not operator.is_view and not FREE.fullmatch(name)
    if name in ("_to_copy", "copy_"):
        source = others[0] if name == "copy_" else first
        arrives = isinstance(first, Simulated) if name == "copy_" else to_gpu or (there and "device" not in options)
        without_waiting = options.get("non_blocking") and (not arrives or getattr(source, "is_pinned_here", False))
        if isinstance(source, Simulated) != bool(arrives) and not without_waiting:
            Seen.note(Seen.waits, f"copy to the {'GPU' if arrives else 'CPU'}")
    elif operator in INDEXING:
        indices = [index for index in others[0] if index is not None]
        if not isinstance(first, Simulated) or any(value is x for value in others[1:2] for x in here if x.dim()):
            Seen.note(Seen.faults, f"{name} mixes devices")
        if any(not isinstance(index, Simulated) or index.dtype == torch.bool for index in indices):
            Seen.note(Seen.waits, "index from the CPU, or of booleans")
    elif there and any(x.dim() for x in here):
        Seen.note(Seen.faults, f"{name} mixes devices")
    if there and name in ASKING:
        Seen.note(Seen.waits, name)


def known_operators():
    """{operator: the lines on it in torch's own list}."""
    text = (Path(torchgen.__file__).parent / "packaged/ATen/native/native_functions.yaml").read_text()
    return {block.partition("(")[0]: block for block in re.split(r"^- func: ", text, flags=re.MULTILINE)[1:]}


KNOWN = known_operators()


def has_kernel(operator):
    """Whether torch's list has a kernel for CUDA, or makes the operator of others. (A CPU's torch has no kernels to ask.)"""
    name = operator._schema.name.removeprefix("aten::")
    block = KNOWN.get(f"{name}.{operator._schema.overload_name}".removesuffix("."), "")
    delegate = re.search(r"structured_delegate: (\S+)", block)
    block = KNOWN[delegate[1]] if delegate else block
    listed = re.search(r"^ +[\w, ]*\b(CUDA|Composite(Ex|Im)plicitAutograd)\b[\w, ]*:|ufunc_inner_loop:", block, re.MULTILINE)
    return listed is not None or "dispatch:" not in block


# ---- torch.cuda, and what is one operator on a GPU ------------------------------------------------------------------

class Fused(torch.autograd.Function):
    """function(*inputs) as one operator, and one for its gradients: where a GPU has a kernel for it and a CPU several."""

    @staticmethod
    def forward(ctx, function, *inputs):
        Seen.operators[Seen.part] += 1
        with torch._C._DisableTorchDispatch(), torch.enable_grad():
            ctx.inputs = [x.numbers.clone().requires_grad_() for x in inputs]
            ctx.y = function(*ctx.inputs)
            return Simulated(ctx.y.detach().clone())

    @staticmethod
    def backward(ctx, g):
        Seen.operators[Seen.part] += 1
        with torch._C._DisableTorchDispatch():
            return None, *map(Simulated, torch.autograd.grad(ctx.y, ctx.inputs, g.numbers))


def fused(function, check=lambda *inputs: None):
    """torch's `function` of (tensors, other arguments) in a form for both devices."""
    def form(*arguments, attn_mask=None, **options):
        if not isinstance(arguments[0], Simulated):
            return function(*arguments, **({} if attn_mask is None else {"attn_mask": attn_mask}), **options)
        inputs = [x for x in arguments if isinstance(x, torch.Tensor)]
        check(*inputs, attn_mask)

        def call(*inputs):
            left = iter(inputs)
            mask = {} if attn_mask is None else {"attn_mask": inputs[-1]}
            return function(*(next(left) if isinstance(x, torch.Tensor) else x for x in arguments), **mask, **options)
        inputs += [] if attn_mask is None else [attn_mask]
        if torch.is_grad_enabled():
            return Fused.apply(call, *inputs)
        Seen.operators[Seen.part] += 1
        with torch._C._DisableTorchDispatch():
            return Simulated(call(*(x.numbers for x in inputs)))
    return form


def check_attention(q, k, v, mask):
    """Kernels for a GPU set themselves up for every shape, and want masks with aligned rows; in fp32 none of the fast ones
    shares keys between heads."""
    if mask is not None and mask.shape[-1] % 64:
        Seen.note(Seen.faults, f"a mask over {mask.shape[-1]} keys")
    if q.shape[1] != k.shape[1] and q.dtype == torch.float32:
        Seen.note(Seen.faults, "attention of grouped heads in fp32")
    if mask is None and len(q) > 1 and q.shape[2] % 16:
        Seen.note(Seen.faults, f"attention over {q.shape[2]} tokens")


def pinned(tensor):
    copy = tensor.clone()
    copy.is_pinned_here = True
    return copy


def on_the_way(make):
    """torch.tensor(numbers, device=...), which fills a CPU's tensor first."""
    def tensor(data, *, device=None, **options):
        return make(data, **options) if device is None else make(data, **options).to(device)
    return tensor


@contextlib.contextmanager
def simulated_cuda():
    """From here on there is a GPU in this process; inside the block its operators are seen."""
    answers = {"is_available": True, "device_count": 1, "current_device": 0, "get_device_name": "simulated", "_lazy_init": None,
               "get_device_capability": (9, 0), "is_bf16_supported": True, "max_memory_allocated": 0, "is_initialized": False,
               "mem_get_info": (10 ** 9, 10 ** 9),
               "reset_peak_memory_stats": None, "set_rng_state": None, "is_current_stream_capturing": False,
               "set_device": None}
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)
    torch.cuda.get_rng_state = lambda *_: torch.zeros(16, dtype=torch.uint8)
    torch.cuda.synchronize = lambda *_: Seen.note(Seen.waits, "synchronize")
    torch.Tensor.pin_memory, torch.tensor = pinned, on_the_way(torch.tensor)
    F.scaled_dot_product_attention = fused(F.scaled_dot_product_attention, check_attention)
    F.rms_norm = fused(F.rms_norm)
    _foreach_utils._foreach_supported_types.append(Simulated)
    _foreach_utils._device_has_foreach_support = lambda device: True
    if torch.version.cuda:
        getattr(torch._C, "_ensureCUDADeviceGuardSet", int)()  # a GPU's torch needs it where there is no GPU, but for old ones
    else:
        aten.silu_backward = fused(aten.silu_backward)  # which a CPU's torch takes apart
    torch.autograd.set_multithreading_enabled(False)
    torch.__future__.set_swap_module_params_on_conversion(True)  # module.to(device): else a parameter keeps its class
    with Mode():
        yield


# ---- the runs -------------------------------------------------------------------------------------------------------

def operators_of_a_step(method, layers):
    """How many operators a GPU is given in one step of a model of so many blocks."""
    Seen.part = "start"
    toy = toy_model(num_hidden_layers=layers, rope_scaling={"rope_type": "factors", "factors": [1.0, 2.0, 4.0, 8.0]})
    model, dtype = base_model.empty_model(toy.config), torch.float32 if method == "full" else torch.bfloat16
    model.load_state_dict({name: x.detach().to(CUDA, dtype) for name, x in toy.state_dict().items()}, assign=True)
    model.tie()
    parameters = list(adapter.trainable(attach(model, method)).values())
    optimizer = torch.optim.AdamW(train.decay_groups(model, 0.0), lr=1e-3, fused=True)
    args = argparse.Namespace(micro_batch=4, multiple=16, autocast=None)
    for _ in range(2):  # the first one makes what is kept
        Seen.operators.clear()
        Seen.waits.clear()
        train.accumulate_gradients(args, model, toy_examples(4))
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        if METHODS[method].regularize:
            METHODS[method].regularize(model, 1e-3)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return Seen.operators["step"]


def as_parts():
    """From the first forward pass of a step until it is logged is the part "step"."""
    def entering(owner, name, part):
        function = getattr(owner, name)

        def entered(*arguments):
            Seen.part = part
            return function(*arguments)
        setattr(owner, name, entered)
    entering(train, "accumulate_gradients", "step")
    entering(Monitor, "after", "between steps")


def take(method, place, out):
    """Train, stop, go on, answer two problems: the losses, and what was seen."""
    Seen.part = "start"
    Seen.faults.clear()
    Seen.waits.clear()
    of_two, of_three = (operators_of_a_step(method, layers) for layers in (2, 3))
    Seen.part = "start"
    look = [] if method == "mosara" else ["--spectra-every", "2"]
    with stopping(2), pytest.raises(Stopped):
        begin(place.flags(method, "--device", "cuda:0", "--steps", "4", "--log-every", "2", *look), out)
    Seen.part = "resume"
    result = go_on(out)
    Seen.part = "evaluation"
    summary = evaluation.main([str(out), "--device", "cuda:0", "--limit", "2", "--max-new", "3", "--data", str(place.data)])
    return {"method": method, "block": of_three - of_two, "rest": 3 * of_two - 2 * of_three, "faults": Seen.faults,
            "waits": Seen.waits, "losses": [result["held_out_before"], result["held_out_after"]],
            "answered": summary["n"]}


def main(methods):
    as_parts()
    with tempfile.TemporaryDirectory() as folder, simulated_cuda():
        fast.switch_on(device=CUDA)
        graphs.Side = Again  # what is recorded runs again
        place = Place(Path(folder), tiny.write_gguf(Path(folder) / "tiny.gguf", tiny.tiny_metadata(), tiny.tiny_tensors()))
        for method in methods:
            with contextlib.redirect_stdout(sys.stderr):
                seen = take(method, place, Path(folder) / method)
            print(json.dumps(seen), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:] or METHODS)
