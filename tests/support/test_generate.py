"""Batched, cached generation against a loop without a cache."""
import types

import pytest
import torch

from data import prompting
from model import KVCache
from support import fast, generate
from tests.toy import tokens, toy_model
from weights import base_model

NEVER = -1  # an end that no model chooses


@torch.no_grad()
def naive_greedy(model, prompt, max_new, eos_id):
    """One row, no cache, no padding: the whole text through the model for every token."""
    ids = list(prompt)
    for _ in range(max_new):
        ids.append(model(torch.tensor([ids]))[0, -1].argmax().item())
        if ids[-1] == eos_id:
            break
    return ids[len(prompt):]


@pytest.fixture(scope="module")
def case():
    """(model, 13 prompts of different lengths, an end that rows reach at different times or never, the expected texts)."""
    model, prompts = toy_model(seed=3), [tokens(1, 1 + (7 * i) % 40, seed=i)[0].tolist() for i in range(13)]
    free = [naive_greedy(model, prompt, 40, NEVER) for prompt in prompts]
    eos = max(set(sum(free, [])), key=lambda token: sum(token in ids for ids in free))
    expected = [naive_greedy(model, prompt, 40, eos) for prompt in prompts]
    assert len({len(ids) for ids in expected}) > 3 and max(map(len, expected)) == 40
    return model, prompts, eos, expected


@pytest.mark.parametrize("batch, at_once", [(1, 2048), (5, 2048), (64, 2048), (64, 50), (64, 1)])
def test_batched_cached_generation_equals_the_naive_loop(batch, at_once, case, monkeypatch):
    """Token for token, for rows of different lengths that end at different times, however many prompts are read at once."""
    monkeypatch.setitem(generate.PREFILL_TOKENS, "cpu", at_once)
    model, prompts, eos, expected = case
    assert generate.generate(model, prompts, eos, max_new=40, batch=batch) == expected


@pytest.fixture
def rows(case, monkeypatch):
    """How many rows each call of the model carries."""
    seen, model = [], case[0].model
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda tokens, cache=None: seen.append(len(tokens)) or forward(tokens, cache))
    return seen


def test_rows_that_ended_leave_at_once(case, rows):
    """On a CPU no decode step carries a row whose text has ended."""
    model, prompts, eos, expected = case
    generate.generate_batch(model, prompts, eos, max_new=40)
    assert rows[-39:] == [sum(len(ids) > step for ids in expected) for step in range(1, 40)]


def test_on_a_gpu_rows_leave_when_half_have_finished(case, rows, monkeypatch):
    """Or another share, as here: the texts are the same; the batch takes few sizes, each at most that share of the one before;
    what is told counts rows that have finished, wherever they are."""
    monkeypatch.setitem(generate.LEFT, "cpu", 0.8)
    model, prompts, eos, expected = case
    told = []
    assert generate.generate_batch(model, prompts, eos, max_new=40, progress=lambda *numbers: told.append(numbers)) == expected
    sizes = list(dict.fromkeys(rows[-39:]))
    running = [sum(len(ids) > step for ids in expected) for step in range(1, 40)]
    assert sizes[0] == 13 and all(after <= 0.8 * before for before, after in zip(sizes, sizes[1:]))
    assert all(left <= size and 0.8 * size < max(left, 1) for left, size in zip(running, rows[-39:]))
    assert 1 < len(sizes) < len(set(running))
    assert [finished for finished, _ in told] == [13 - running[step - 1] for step in range(7, 39, 8)]


def test_the_usual_batch_fits_half_of_a_gpus_memory(case, monkeypatch):
    """By what the cache of a row of 1024 tokens takes; on a CPU it is 128."""
    model = case[0]
    assert generate.usual_batch(model) == 128
    weight = types.SimpleNamespace(device=torch.device("cuda"), dtype=torch.bfloat16)
    on_gpu = types.SimpleNamespace(lm_head=types.SimpleNamespace(weight=weight), config=model.config)
    cached = KVCache(model.config, 1, 1024, torch.bfloat16, "cpu")
    row = 2 * (cached.k.numel() + cached.v.numel())
    for free, rows_that_fit in ((10 * row, 5), (row, 1), (10 ** 6 * row, 2048)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 2 * free))
        assert generate.usual_batch(on_gpu) == rows_that_fit


def test_rows_that_are_done_leave_too(case, rows):
    """A row may end by its text, which is looked at every few steps."""
    model, prompts, _, _ = case
    generate.generate_batch(model, prompts, NEVER, max_new=20, is_done=lambda ids: len(ids) == generate.CHECK_EVERY and ids[0] > 48)
    steps = rows[-19:]
    assert steps[:generate.CHECK_EVERY - 1] == [13] * (generate.CHECK_EVERY - 1) and 0 < steps[-1] == steps[generate.CHECK_EVERY - 1] < 13


def test_forced_tokens_enter_the_row(case):
    """What `force` returns is taken in place of the model's choices, and the model goes on from there."""
    model, prompts, _, _ = case
    force = lambda ids: [11, 12] if len(ids) == 3 else None  # noqa: E731
    forced = generate.generate(model, [prompts[3], prompts[3]], NEVER, max_new=12, force=force)[1]
    assert forced[:5] == naive_greedy(model, prompts[3], 3, NEVER) + [11, 12]
    assert forced[5:] == naive_greedy(model, prompts[3] + forced[:5], 7, NEVER)


def test_progress_is_told(case):
    """Every few steps and after each batch: how many prompts are answered, how many tokens were made; both only rise."""
    model, prompts, eos, expected = case
    told = []
    generate.generate(model, prompts, eos, max_new=40, batch=5, progress=lambda *numbers: told.append(numbers))
    assert told == sorted(told) and len(told) >= 3 * 40 // generate.CHECK_EVERY - 3
    assert told[-1] == (13, sum(map(len, expected))) and {5, 10, 13} <= {finished for finished, _ in told}


def test_a_prompt_longer_than_the_context_is_refused():
    """A prompt must leave room for the new tokens."""
    with pytest.raises(ValueError, match="a prompt of 250 tokens and 20 new ones do not fit the model's context of 256"):
        generate.generate(toy_model(), [[1] * 250], NEVER, max_new=20)


def test_a_completion_ends_where_another_question_begins(tiny_gguf, monkeypatch):
    """What follows "Question:" on a new line is cut and not counted, and the row may end there."""
    base, told = base_model.load(str(tiny_gguf)), []
    answer, short = (base.tokenizer.encode(text, start=False) for text in (" 3+4=7\n#### 7", " 7"))
    more = base.tokenizer.encode("\nQuestion: What else?", start=False)

    def generated(model, prompts, eos_id, max_new, batch, is_done, force, progress):
        told.extend([is_done(answer + more[:len(more) // 2]), is_done(answer)])
        return [answer + more, [*short, eos_id[-1]], short]
    monkeypatch.setattr(generate, "generate", generated)
    stopped, ended, capped = generate.complete(base.model, base.tokenizer, ["a", "b", "c"])
    assert told == [True, False]
    assert stopped == {"text": " 3+4=7\n#### 7", "new_tokens": len(answer), "finish": "stop"}
    assert ended == {"text": " 7", "new_tokens": len(short) + 1, "finish": "eos"}
    assert capped == {"text": " 7", "new_tokens": len(short), "finish": "cap"}


def test_what_follows_an_equals_sign_is_computed(tiny_gguf, monkeypatch):
    """With the calculator, inside << >>, and only there; the model goes on behind it."""
    base, forced = base_model.load(str(tiny_gguf)), []

    def generated(model, prompts, eos_id, max_new, batch, is_done, force, progress):
        forced.extend(force(base.tokenizer.encode(text)) for text in ("She has <<137*68=", "137*68=", "<<137*68"))
        return [[eos_id]]
    monkeypatch.setattr(generate, "generate", generated)
    generate.complete(base.model, base.tokenizer, ["a"], calculator=True)
    assert forced == [base.tokenizer.encode("9316>>", start=False), None, None]


def test_the_real_model_generates_what_the_naive_loop_does(real_base):
    """Token for token, with all that makes it fast."""
    questions = ["What is 3 plus 4?", "Tom has 12 eggs. He eats 2 each day. How many are left after 3 days?"]
    asked, eos = [real_base.tokenizer.encode(prompting.prompt(question)) for question in questions], real_base.tokenizer.eos_id
    expected = [naive_greedy(real_base.model, ids, 12, eos) for ids in asked]
    fast.switch_on()
    assert generate.generate(real_base.model, asked, eos, max_new=12) == expected
