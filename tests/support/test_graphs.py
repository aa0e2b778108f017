"""What is recorded and replayed, on a CPU: a recording that runs the same again stands in for a CUDA graph."""
import copy
import itertools
import types

import pytest
import torch

import adapter
import train
from methods import METHODS
from model import KVCache
from support import generate, graphs
from tests.again import Again
from tests.toy import attach, perturb, tokens, toy_examples, toy_model


@pytest.fixture(autouse=True)
def without_a_gpu(monkeypatch):
    monkeypatch.setattr(graphs, "Side", Again)
    monkeypatch.setattr(Again, "recorded", 0)


@pytest.mark.parametrize("method", METHODS)
def test_training_is_the_same(method):
    """Steps of two micro-batches each, of shapes that come again: every loss and every weight; each shape is recorded once,
    forward and backward."""
    plain = perturb(attach(toy_model(), method))
    replayed = copy.deepcopy(plain)
    graphs.RecordedDecoder(replayed)
    args = types.SimpleNamespace(micro_batch=3, multiple=8, autocast=None)
    batches = [toy_examples(6, seed=seed) for seed in (1, 2, 1, 3, 2)]
    losses, shapes = [], set()
    for model in (plain, replayed):
        model.model.register_forward_pre_hook(lambda _, inputs: shapes.add(inputs[0].shape))
        optimizer = torch.optim.AdamW(train.decay_groups(model, 0.01), lr=1e-2)
        for batch in batches:
            losses.append(train.accumulate_gradients(args, model, batch).item())
            if METHODS[method].regularize:
                METHODS[method].regularize(model, 1e-2)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    assert losses[:5] == pytest.approx(losses[5:], rel=1e-5)
    for one, other in zip(adapter.trainable(plain).values(), adapter.trainable(replayed).values()):
        assert torch.allclose(one, other, rtol=1e-3, atol=1e-5)
    assert Again.recorded == 2 * len(shapes) > 2


def test_only_training_passes_are_replayed():
    """Without gradients, or over a cache, the decoder does what it did."""
    model = attach(toy_model(), "lora")
    graphs.RecordedDecoder(model)
    with torch.no_grad():
        model(tokens())
    model(tokens(), KVCache(model.config, 2, 64, torch.float32, "cpu"))
    assert Again.recorded == 0
    model(tokens())
    assert Again.recorded == 2


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_head_that_trains_alone_needs_no_recording(method):
    """The hidden states have no gradient then."""
    model = attach(toy_model(tie_word_embeddings=False), method, targets=["lm_head"])
    graphs.RecordedDecoder(model)
    args = types.SimpleNamespace(micro_batch=3, multiple=8, autocast=None)
    assert train.accumulate_gradients(args, model, toy_examples(6)) > 0 and Again.recorded == 0
    assert any(p.grad.any() for p in adapter.trainable(model).values())


def test_the_longest_batch_is_recorded_first():
    """It is there before the first step, and leaves nothing in the gradients."""
    model, examples = attach(toy_model(), "lora"), toy_examples(6)
    args = types.SimpleNamespace(micro_batch=3, multiple=8, autocast=None)
    train.record(args, model, examples, torch.device("cpu"))
    assert all(p.grad is None for p in model.parameters()) and Again.recorded == 2
    train.accumulate_gradients(args, model, [max(examples, key=lambda pair: len(pair[0]))] * 3)
    assert Again.recorded == 2


@pytest.mark.parametrize("force", [None, lambda ids: [11, 12] if len(ids) in (3, 50) else None])
def test_generation_is_the_same(force, monkeypatch):
    """Token for token, with rows that leave together now and then and a cache that is seen further and further; a step is
    recorded once for each pair of these shapes that comes twice."""
    model, prompts = toy_model(seed=3), [tokens(1, 1 + (7 * i) % 40, seed=i)[0].tolist() for i in range(13)]
    monkeypatch.setitem(generate.LEFT, "cpu", 0.7)
    shapes, step = [], generate._step
    monkeypatch.setattr(generate, "_step", lambda model, chosen, cache:
                        shapes.append((len(chosen), cache.slots(1))) or step(model, chosen, cache))
    plain = [generate.generate(model, prompts, eos, 90, batch=9, force=force) for eos in (5, 13, -1)]
    twice = sum(len(list(group)) > 1 for _, group in itertools.groupby(shapes))
    monkeypatch.setattr(graphs, "decoding", graphs.RecordedStep)
    assert [generate.generate(model, prompts, eos, 90, batch=9, force=force) for eos in (5, 13, -1)] == plain
    assert Again.recorded == twice > 8


def test_what_is_recorded_by_default():
    """On a GPU, models that are not large where memory is not short; on a CPU nothing, and to ask for it there is an error that says so."""
    model = toy_model()
    assert not graphs.wanted("auto", model) and not graphs.wanted("off", model)
    with pytest.raises(ValueError, match="--graphs on: only a CUDA GPU .*: leave it out"):
        graphs.wanted("on", model)
    weight = types.SimpleNamespace(device=torch.device("cuda"), numel=lambda: 10 ** 9)
    small, large, short = [types.SimpleNamespace(lm_head=types.SimpleNamespace(weight=weight), parameters=lambda n=n: [weight] * n,
                                                 model=types.SimpleNamespace(recompute=recompute))
                           for n, recompute in ((1, False), (2, False), (1, True))]
    assert [graphs.wanted("auto", m) for m in (small, large, short)] == [True, False, False]
    assert graphs.wanted("on", large) and not graphs.wanted("off", small)
