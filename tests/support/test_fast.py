"""Each fast form against the plain one, forward and gradient; whole steps and texts; what is switched on and off again."""
import copy
import itertools
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import adapter
import model as decoder
from data import batching
from methods import METHODS
from model import KVCache
from support import fast, generate, loss, report
from support.fast import bf16_pays, takes_less_than  # before conftest puts others in their place
from support.script import choose_device
from tests.runs import in_use
from tests.toy import attach, perturb, tokens, toy_examples, toy_model

ROOT = Path(fast.__file__).parent.parent
HAS_SWITCH = fast.has_onednn_switch()


def precision():
    """Who multiplies fp32 matrices on a CPU."""
    return torch.backends.mkldnn.matmul.fp32_precision if HAS_SWITCH else None


@pytest.fixture
def in_pieces(monkeypatch):
    """Attention in pieces, small ones, as where oneDNN multiplies. (That itself may round to bf16, on some CPUs.)"""
    monkeypatch.setattr(fast, "onednn_multiplies", fast.eager_on_cpu)
    monkeypatch.setattr(fast, "CACHED", 96)
    monkeypatch.setattr(fast, "QUERIES", 8)


# ---- one form -------------------------------------------------------------------------------------------------------
# Each case gives f -> f(inputs) for a form f, and the tensors whose gradients are compared.

def random(*shape, dtype):
    return torch.randn(shape).to(dtype).requires_grad_()


def heads(count, T, dtype):
    """(2, count, T, 8), strided as the model has it."""
    return random(2, T, count, 8, dtype=dtype).transpose(1, 2)


def a_rotation(dtype):
    x, angles = heads(3, 5, dtype), torch.randn(2, 1, 5, 4)
    return lambda f: f(x, angles.cos().to(dtype), angles.sin().to(dtype)), [x]


def attention(T, S=None, key_heads=2):
    """T queries of four heads, on themselves, or on a cache of S slots, of which the rows see some."""
    def case(dtype):
        q, k, v = heads(4, T, dtype), heads(key_heads, S or T, dtype), heads(key_heads, S or T, dtype)
        positions = torch.tensor([[0], [S - T]]) + torch.arange(T) if S else None
        seen = (torch.arange(S) <= positions[:, :, None])[:, None] if S else None
        return lambda f: f(q, k, v, seen), [q, k, v]
    return case


def a_norm(dtype):
    module, x = decoder.RMSNorm(24, 1e-5), random(2, 5, 24, dtype=dtype)
    nn.init.normal_(module.weight)
    module.to(dtype)
    return lambda f: f(module, x), [x, module.weight]


def an_mlp(dtype):
    module, x = decoder.MLP(toy_model().config).to(dtype), random(2, 5, 32, dtype=dtype)
    return lambda f: f(module, x), [x, *module.parameters()]


def a_head(trains):
    """20 hidden states, in chunks of 8, under a head that trains or is frozen."""
    def case(dtype):
        head, hidden = nn.Linear(16, 50, bias=False).to(dtype).requires_grad_(trains), random(20, 16, dtype=dtype)
        return lambda f: 0.3 * f(hidden, head, torch.arange(20)), [hidden, *([head.weight] if trains else [])]
    return case


CASES = [("rotate", a_rotation), ("attention", attention(13)), ("attention", attention(13, key_heads=4)), ("attention", attention(5, 9)),
         ("attention", attention(1, 9)), ("norm", a_norm), ("swiglu", an_mlp), ("head", a_head(False)), ("head", a_head(True))]


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name, case", CASES, ids=[f"{name} {i}" for i, (name, _) in enumerate(CASES)])
def test_a_fast_form_is_the_plain_one(name, case, dtype, tolerance, in_pieces, monkeypatch):
    """The same values and gradients, to a few roundings; of the same dtype."""
    monkeypatch.setattr(fast, "CHUNK", 8)
    torch.manual_seed(0)
    call, inputs = case(dtype)
    found = []
    for form in fast.FORMS[name][2:]:
        y = call(form)
        r = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
        found.append([y, *torch.autograd.grad((y.float() * r).sum(), inputs)])
    for plain, ours in zip(*found):
        assert ours.dtype == plain.dtype and ours.shape == plain.shape
        assert (ours.float() - plain.float()).norm() < tolerance * plain.float().norm()


@pytest.mark.parametrize("name, case", CASES, ids=[f"{name} {i}" for i, (name, _) in enumerate(CASES)])
def test_bf16_is_rounded_no_more_than_in_the_plain_form(name, case, in_pieces, monkeypatch):
    """Scores, softmax, sums of squares and losses are fp32 inside: what comes out is as near to an fp32 computation. (The head's gradient
    is rounded once more, as it waits for the factor that comes from above, and is a sum over chunks where the head trains.)"""
    monkeypatch.setattr(fast, "CHUNK", 8)
    errors = []
    for form in fast.FORMS[name][2:]:
        total = torch.zeros(2)
        for seed in range(8):
            found = []
            for dtype in (torch.bfloat16, torch.float32):
                torch.manual_seed(seed)
                call, inputs = case(dtype)
                with torch.no_grad():
                    for tensor in inputs:
                        tensor.copy_(tensor.bfloat16())  # the same numbers for both
                y = call(form)
                r = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
                found.append([y.detach(), *torch.autograd.grad((y * r).float().sum(), inputs)])
            total += torch.tensor([sum((a.float() - b).square().sum() for a, b in pairs)
                                   for pairs in ([[found[0][0], found[1][0]]], list(zip(found[0][1:], found[1][1:])))])
        errors.append(total.sqrt())
    plain, ours = errors
    assert (ours <= (1.5 if name == "head" else 1.05) * plain).all(), (plain, ours)


def test_every_form_is_compared():
    """A new one needs a case above; "decode", which is for a GPU, has its own in test_graphs.py."""
    assert {name for name, _ in CASES} == set(fast.FORMS) - {"decode"}


ANGLES = torch.randn(2, 1, 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
FUNCTIONS = {
    "rotation": (lambda x: fast.rotate(x, ANGLES.cos(), ANGLES.sin()), [(2, 3, 4, 6)]),
    "norm": (lambda x, weight: fast.LeanRMSNorm.apply(x, weight, 1e-3), [(2, 3, 7), (7,)]),
    "swiglu": (fast.SwiGLU.apply, [(4, 6), (4, 6)]),
    "attention": (fast.AttentionInPieces.apply, 3 * [(1, 2, 3, 4)]),
    "head": (lambda hidden: fast.FrozenHeadLoss.apply(hidden, torch.ones(20, 8, dtype=torch.float64), torch.arange(4)), [(4, 8)])}


def inputs_of(name):
    torch.manual_seed(0)
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in FUNCTIONS[name][1]]


@pytest.mark.parametrize("name", ["rotation", "norm", "swiglu"])  # attention: below; the head's sum is fp32
def test_gradients_are_finite_differences(name):
    """What is derived by hand, in float64."""
    assert torch.autograd.gradcheck(FUNCTIONS[name][0], inputs_of(name))


@pytest.mark.parametrize("function, inputs", [  # those that compiled blocks have
    (fast.Rotation, [torch.ones(1, 2, 3, 4), torch.ones(3, 2), torch.ones(3, 2)]), (fast.LeanRMSNorm, [torch.ones(3), torch.ones(3), 1e-5]),
    (fast.SwiGLU, [torch.ones(3), torch.ones(3)])])
def test_what_was_changed_in_place_is_returned_as_a_view(function, inputs):
    """Else torch.compile of torch 2.11 would lose its gradient."""
    y = function.forward(types.SimpleNamespace(save_for_backward=lambda *_: None), *inputs)
    assert y._version == 0 or y._is_view()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_second_derivatives_are_refused_not_wrong(name):
    """The gradients by hand are not differentiable again, and say so."""
    inputs = inputs_of(name)
    first, *_ = torch.autograd.grad(FUNCTIONS[name][0](*inputs).square().sum(), inputs, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@pytest.mark.parametrize("H, K, T, cached, queries", [
    (4, 2, 3, 1 << 20, 64), (3, 3, 3, 54, 64), (4, 1, 1, 8, 64), (2, 1, 5, 1, 2), (3, 3, 3, 1, 1)])
def test_attention_in_pieces_of_any_size(H, K, T, cached, queries, monkeypatch):
    """Grouped heads or not; all rows at once, or two, or one; all queries, or some, or one: torch's values, and finite
    differences."""
    monkeypatch.setattr(fast, "CACHED", cached)
    monkeypatch.setattr(fast, "QUERIES", queries)
    torch.manual_seed(0)
    q, k, v = (torch.randn(3, n, T, 2, dtype=torch.float64, requires_grad=True) for n in (H, K, K))
    theirs = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    assert torch.allclose(fast.AttentionInPieces.apply(q, k, v), theirs, rtol=1e-10)
    assert torch.autograd.gradcheck(fast.AttentionInPieces.apply, (q, k, v))


# ---- a whole step, a whole text -------------------------------------------------------------------------------------

MODELS = {"llama": {}, "untied, own key heads": {"num_key_value_heads": 4, "tie_word_embeddings": False},
          "qwen": {"qk_norm": True, "attention_bias": True}, "gpt2": {"gpt2": True, "num_key_value_heads": 4}}


def loss_and_gradients(model):
    """Of one batch, by name."""
    model.zero_grad()
    value = loss.answer_loss(model, *batching.collate(toy_examples(6), "cpu"))
    value.backward()
    return {"loss": value.detach(), **{name: p.grad.clone() for name, p in adapter.trainable(model).items()}}


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 6e-2)], ids=["fp32", "bf16"])
@pytest.mark.parametrize("method, changes", [*(("lora", changes) for changes in MODELS.values()), ("full", {}), ("mosara", {})],
                         ids=[*MODELS, "full", "mosara"])
def test_a_step_with_everything_on(method, changes, dtype, tolerance, in_pieces, monkeypatch):
    """The loss and every gradient are those of the plain text, to rounding. (In bf16 both are 3 % from fp32's, or 9 %.)"""
    monkeypatch.setattr(fast, "CHUNK", 8)
    model = perturb(attach(toy_model(**changes).to(dtype), method))
    plain = loss_and_gradients(model)
    fast.switch_on(fast.FORMS)
    for name, ours in loss_and_gradients(model).items():
        assert (ours - plain[name]).float().norm() < tolerance * plain[name].float().norm(), name


@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)
def test_a_text_with_everything_on(changes):
    """Cached greedy generation writes the same tokens, for rows of different lengths that end at different times."""
    model, prompts = toy_model(seed=3, **changes), [tokens(1, 1 + 7 * i, seed=i)[0].tolist() for i in range(6)]
    eos = generate.generate(model, prompts, -1, max_new=10)[0][-1]
    plain = generate.generate(model, prompts, eos, max_new=40)
    assert len({len(ids) for ids in plain}) > 1
    fast.switch_on()
    assert generate.generate(model, prompts, eos, max_new=40) == plain


# ---- on and off -----------------------------------------------------------------------------------------------------

def state():
    """What is in use, in this process as a whole."""
    return f"{in_use()} {precision()} {torch.backends.cuda.cudnn_sdp_enabled()}\n"


def test_switching_on_and_off():
    """All, or those that are named; off again, everything is as a new process has it. Nothing is on by import."""
    code = "import torch, train, eval; from tests.support import test_fast as t; print(t.state(), end='')"
    new = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert new == state() and in_use() == set()
    fast.switch_on(["norm", "head"])
    assert in_use() == {"norm", "head"} and torch.backends.cuda.cudnn_sdp_enabled()
    fast.switch_on()
    assert in_use() == set(fast.FORMS) and not torch.backends.cuda.cudnn_sdp_enabled()
    fast.switch_off()
    assert new == state()


def test_on_a_gpu_nothing_is_chosen_for_a_cpus_products(monkeypatch):
    """Its switch makes torch.get_float32_matmul_precision fail, which compiling for a GPU calls."""
    asked = []
    monkeypatch.setattr(fast, "fast_products", lambda chosen: asked.append(1))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    fast.switch_on(device="cuda:0")
    fast.switch_on()
    assert not asked and in_use() == set(fast.FORMS)
    fast.switch_on(device="cpu")
    assert asked


@pytest.mark.parametrize("device, recorded, context, multiple", [
    ("cpu", False, 1024, 1), ("cuda", False, 1024, 16), ("cuda", True, 2048, 64), ("cuda", False, 1000, 8), ("cuda", True, 1023, 1)])
def test_what_rows_are_padded_to(device, recorded, context, multiple):
    """Few shapes on a GPU, fewer for CUDA graphs; and the longest row still fits the context, for learned positions."""
    assert fast.row_multiple(torch.device(device), recorded, context) == multiple
    longest = [([1] * context, 3)]
    assert batching.padded_length(longest, multiple) <= context


def test_an_older_torch_has_no_choice(monkeypatch):
    """Without the switch nothing is chosen, and nothing fails."""
    monkeypatch.setattr(fast, "has_onednn_switch", lambda: False)
    fast.switch_on()
    with fast.onednn("bf16"):
        assert precision() in (None, "none") and not fast.onednn_multiplies(torch.zeros(2))


needs_switch = pytest.mark.skipif(not HAS_SWITCH, reason="this torch has no such switch")


@needs_switch
@pytest.mark.parametrize("chosen", ["ieee", "bf16"])
def test_an_error_leaves_the_choice_of_products_as_it_was(chosen, monkeypatch):
    """In a block of onednn's, and in attention on a cache, which runs with torch's own products whatever is chosen."""
    torch.backends.mkldnn.matmul.fp32_precision = chosen
    with pytest.raises(KeyError):
        with fast.onednn("bf16"):
            assert precision() == "bf16"
            raise KeyError
    assert precision() == chosen
    seen, attend = [], F.scaled_dot_product_attention

    def failing(*inputs, **options):
        seen.append(precision())
        if len(seen) == 5:
            raise MemoryError
        return attend(*inputs, **options)
    monkeypatch.setattr(F, "scaled_dot_product_attention", failing)
    fast.switch_on(fast.FORMS)
    with pytest.raises(MemoryError):
        generate.generate(toy_model(), [[1, 2, 3]], 0, max_new=9)
    assert seen == ["ieee"] * 5 and precision() == chosen


@needs_switch
@pytest.mark.parametrize("slow, rounds, before, chosen", [
    ("ieee", False, None, "bf16"), ("bf16", False, None, "ieee"), (None, False, None, "ieee"), ("ieee", True, None, "ieee"),
    ("ieee", False, "ieee", "ieee"), ("bf16", False, "bf16", "bf16"), ("ieee", True, "bf16", "ieee"), ("ieee", False, "none", "bf16")])
def test_products_are_given_to_onednn_only_where_faster_and_exact(slow, rounds, before, chosen, monkeypatch):
    """A CPU where the default is slow, one where oneDNN is, one where they are alike, one that rounds. What was chosen before is chosen
    again, but where it rounds."""
    multiply, clock = torch.Tensor.__matmul__, [0.0]

    def pretended(a, b):
        if a.dtype == torch.float64:
            return multiply(a, b)
        clock[0] += 2.0 if precision() == slow else 1.0
        rounded = rounds and precision() == "bf16"
        with fast.onednn("ieee"):
            y = multiply(a, b)
        return y.bfloat16().float() if rounded else y

    monkeypatch.setattr(torch.Tensor, "__matmul__", pretended)
    monkeypatch.setattr(fast.time, "thread_time", lambda: clock[0])
    monkeypatch.setattr(fast, "takes_less_than", takes_less_than)
    fast.fast_products(before)
    assert precision() == chosen


@pytest.mark.parametrize("share, took, other, expected", [
    (0.75, [1.0], [2.0], True), (0.75, [1.5], [2.0], False), (0.75, [2.0], [1.0], False), (0.75, [0.0], [0.0], False),
    (0.75, [1.0, 1.3], [1.3, 1.0], False),  # alike, on a CPU that others share
    (0.75, [1.0, 1.0, 3.0], [2.0], True), (0.75, [1.0, 1.0, 0.1], [1.0], False)])  # one in three disturbed
def test_the_faster_of_two_functions_is_that_of_most_pairs(share, took, other, expected, monkeypatch):
    """Whatever a single call takes, and on a clock that stands still; the threads are again as many as they were."""
    clock, threads = [0.0], torch.get_num_threads()

    def taking(seconds):
        seconds = itertools.cycle(seconds)

        def function():
            assert torch.get_num_threads() == 1
            clock[0] += next(seconds)
        return function
    monkeypatch.setattr(fast.time, "thread_time", lambda: clock[0])
    assert takes_less_than(share, taking(took), taking(other)) == expected and torch.get_num_threads() == threads


@pytest.mark.parametrize("units, fp32, bf16, pays", [
    (True, 3.0, 1.9, True), (True, 3.0, 2.0, False), (True, 1.0, 5.0, False), (True, 0.0, 0.0, False), (False, 3.0, 1.9, False)])
def test_bf16_is_chosen_where_it_pays(units, fp32, bf16, pays, monkeypatch):
    """On a CPU that multiplies it 1.5 times as fast; not for a plain run, nor where another is asked for. (One clock stands still.) Where
    oneDNN does not multiply it no time is lost on a trial, and products of bf16 are widened where it is asked for, but by a plain run."""
    tried = []
    monkeypatch.setattr(fast, "takes_less_than", lambda share, *_: tried.append(1) or bf16 < share * fp32)
    monkeypatch.setattr(fast, "multiplies_bf16", lambda: units)
    monkeypatch.setattr(fast, "bf16_pays", bf16_pays)
    chosen = torch.bfloat16 if pays else torch.float32
    assert choose_device("cpu")[1] == choose_device("cpu", "auto")[1] == chosen
    assert choose_device("cpu", plain=True)[1] == choose_device("cpu", "float32")[1] == torch.float32
    assert choose_device("cpu", "bfloat16", plain=True)[1] == torch.bfloat16 and not fast.WIDENED
    assert choose_device("cpu", "bfloat16")[1] == torch.bfloat16
    assert bool(tried) == units and bool(fast.WIDENED) == (not units)


def products_of(a, b, bias):
    """Every way in which torch takes products here, with a of (4, 5, 6), b of (6, 3) and a bias (3,): by operators, as layers do with
    and without a bias, in a batch, and of an empty row."""
    return [a @ b, a[0] @ b, F.linear(a, b.T), F.linear(a, b.T, bias), F.linear(a[0], b.T, bias), torch.bmm(a, b.expand(4, 6, 3)),
            torch.addmm(bias, a[0], b, beta=0.5, alpha=2), a[:0] @ b, a[0, :0] @ b]


def test_widened_products_are_rounded_once(monkeypatch):
    """bf16 products on a CPU without units for it: to the bit fp32's, rounded; their gradients too. Others stay as they are, also when
    it is asked for twice; off again, they are torch's own."""
    torch.manual_seed(0)
    taken, widened = [], fast.widened
    monkeypatch.setattr(fast, "widened", lambda *operands, **scales: taken.append(1) or widened(*operands, **scales))
    inputs = [torch.randn(shape).bfloat16() for shape in ((4, 5, 6), (6, 3), (3,))]
    other = {dtype: products_of(*(x.to(dtype) for x in inputs)) for dtype in (torch.float32, torch.float64, torch.int64)}
    fast.widen_products()
    fast.widen_products()
    for dtype, expected in other.items():
        assert all(torch.equal(y, z) and y.dtype == dtype for y, z in zip(products_of(*(x.to(dtype) for x in inputs)), expected))
    for y, z in zip(products_of(*inputs), other[torch.float32], strict=True):
        assert y.dtype == torch.bfloat16 and torch.equal(y, z.bfloat16())
    leaves = [x.clone().requires_grad_() for x in inputs[:2]]
    (leaves[0][0] @ leaves[1]).float().square().sum().backward()
    a, b = (x.detach() for x in leaves)
    g = (2 * (a[0] @ b).float()).bfloat16().float()
    assert torch.equal(leaves[1].grad, (a[0].float().T @ g).bfloat16())
    assert torch.equal(leaves[0].grad[0], (g @ b.float().T).bfloat16())
    fast.switch_off()
    count = len(taken)
    products_of(*inputs)
    assert count and len(taken) == count


FAULTS = """
import resource
import torch
from support import fast

def faults():
    counts = []
    for _ in range(3):  # the least, as a system that reclaims memory adds faults
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(8):
            torch.ones(10_000_000)
        counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    return min(counts)

usual = faults()
fast.keep_freed_memory()
print(usual, faults())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="malloc is tuned on Linux only")
def test_freed_memory_is_kept():
    """Eight tensors of 40 MB, one after the other, are mapped in once instead of every time."""
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True, cwd=ROOT)
    usual, kept = map(int, done.stdout.split())
    assert usual > 20_000 and kept < usual / 2


# ---- torch.compile --------------------------------------------------------------------------------------------------

INDUCTOR = pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")


@pytest.mark.parametrize("backend, method", [("eager", "sara"), pytest.param("inductor", "sara", marks=[pytest.mark.long, INDUCTOR]),
                                             *(pytest.param("eager", method, marks=pytest.mark.long) for method in METHODS)])
def test_compiled_blocks_give_the_same_gradients(backend, method, monkeypatch):
    """SARA, whose ranks differ by layer, or another, at several batch shapes: compiled, with the fast forms inside, the loss and
    every gradient are the same, and there is no compilation per layer. What is counted or runs eagerly before and after does not
    compile, nor keep the steps from it. (Backend eager traces and makes no machine code.)"""
    graphs, compile_block = torch._dynamo.utils.counters["stats"], nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda block: compile_block(block, backend=backend))
    torch._dynamo.reset()  # what other tests have compiled counts against a limit
    options = {"threshold": 0.5, "targets": ["q_proj", "v_proj"]} if method == "sara" else {}
    plain = perturb(attach(toy_model(num_hidden_layers=8), method, **options))
    compiled = copy.deepcopy(plain)
    fast.switch_on()
    fast.compile_blocks(compiled)
    before = graphs["unique_graphs"]
    report.gflop_per_token(compiled, toy_examples(3), True)
    assert graphs["unique_graphs"] == before
    for rows in (3, 5):
        batch, losses = batching.collate(toy_examples(rows, seed=rows), "cpu", fast.GRAPH_MULTIPLE), []
        for model in (plain, compiled):
            model.zero_grad()
            losses.append(loss.answer_loss(model, *batch))
            losses[-1].backward()
        assert torch.allclose(*losses, rtol=1e-5)
        for one, other in zip(adapter.trainable(plain).values(), adapter.trainable(compiled).values()):
            assert (one.grad - other.grad).norm() <= 1e-3 * one.grad.norm()
    after = graphs["unique_graphs"]
    assert 1 <= after - before < 8
    with fast.eagerly(True):
        loss.mean_loss(compiled, toy_examples(7), 7, "cpu")
        compiled(tokens(1, 5), KVCache(compiled.config, 1, 64, torch.float32, "cpu"))
    assert graphs["unique_graphs"] == after


def test_compiling_without_a_compiler_says_so(monkeypatch):
    """Before anything is trained: which compiler is missing, and the ways out."""
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ValueError, match=r"C\+\+ compiler.*no-such-compiler.*leave --compile out"):
        fast.compile_blocks(toy_model())
