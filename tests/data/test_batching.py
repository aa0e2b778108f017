"""What is trained on: the split, the batches of an epoch, tokens and targets."""
import types

import pytest
import torch

from data import batching
from tests.toy import toy_examples
from weights import base_model

EXAMPLES = [{"question": str(i)} for i in range(100)]


def numbers(examples):
    return [int(example["question"]) for example in examples]


def test_an_epoch_covers_every_example_once():
    """Every index comes once per epoch; the order depends on the seed and the epoch and on nothing else."""
    lengths = [len(ids) for ids, _ in toy_examples(96)]

    def epoch(seed, number):
        return batching.epoch_batches(lengths, 8, seed, number, window=4)
    first = epoch(0, 0)
    assert sorted(i for batch in first for i in batch) == list(range(96)) and {len(batch) for batch in first} == {8}
    assert first == epoch(0, 0) and first != epoch(0, 1) != epoch(1, 1)


def test_unfilled_batches_are_left_out_unless_alone():
    """97 examples make 12 batches of 8, and not always the longest is left out; 5 examples make one batch of 5."""
    epochs = [batching.epoch_batches(list(range(97)), 8, 0, epoch) for epoch in range(5)]
    assert all([len(batch) for batch in batches] == [8] * 12 for batches in epochs)
    assert any(96 in batch for batches in epochs for batch in batches)
    assert [len(batch) for batch in batching.epoch_batches([3] * 5, 8, 0, 0)] == [5]


def test_batches_of_similar_length_leave_little_padding():
    """Under 10 % padding, where random batches have over 30 %; the batches themselves do not come by length."""
    lengths = [10 + i % 200 for i in range(2000)]
    batches = batching.epoch_batches(lengths, 16, 0, 0)
    longest = [max(lengths[i] for i in batch) for batch in batches]
    assert sum(lengths) / (16 * sum(longest)) > 0.9
    assert longest != sorted(longest) and longest != sorted(longest, reverse=True)


def test_the_held_out_examples_are_always_the_same():
    """They are apart from what is trained on and nothing is lost; a limit takes the first of the others, in their order."""
    rest, held_out = batching.split(EXAMPLES, 10)
    assert len(held_out) == 10 and sorted(numbers(rest + held_out)) == list(range(100))
    some, same = batching.split(EXAMPLES, 10, 30)
    assert same == held_out and sorted(numbers(some)) == sorted(numbers(rest))[:30]
    assert some == [example for example in rest if example in some]
    assert batching.split(EXAMPLES, 10, 5000) == (rest, held_out)
    with pytest.raises(ValueError, match="the 100 examples of --held-out and --report leave nothing to train on"):
        batching.split(EXAMPLES, 100)


def test_targets_are_the_next_tokens_of_the_answers():
    """Shifted by one; the question and the padding carry no loss. A multiple rounds the width up, with more of the same."""
    encoded = [([5, 6, 7, 8, 9], 3), ([1, 2, 3], 1)]
    tokens, targets = batching.collate(encoded, "cpu")
    assert tokens.tolist() == [[5, 6, 7, 8], [1, 2, 0, 0]]
    assert targets.tolist() == [[-100, -100, 8, 9], [2, 3, -100, -100]]
    padded, padded_targets = batching.collate(encoded, "cpu", multiple=64)
    assert padded.shape == padded_targets.shape == (2, 64) and torch.equal(padded[:, :4], tokens) and not padded[:, 4:].any()
    assert torch.equal(padded_targets[:, :4], targets) and (padded_targets[:, 4:] == -100).all()


def encoded_data(base, examples, **changes):
    """The Data that train.py makes of examples, with the flags that are given."""
    flags = {"answers": "full", "strip_annotations": False, "max_tokens": None, "held_out": 4, "report": 0, "forgetting": False,
             "limit": None, "template": "plain", "cut": None}
    return batching.encode_data(types.SimpleNamespace(**{**flags, **changes}), examples, base)


def test_what_flags_make_of_the_data(tiny_gguf):
    """Long examples are left out, or cut; annotations go; the records keep their numbers; the checksum knows it all."""
    base = base_model.load(str(tiny_gguf))
    examples = [{"question": "?" * (i + 1), "answer": f"<<1+{i}={i + 1}>>{i + 1}"} for i in range(20)]
    seen = set()

    def encode(**changes):
        data = encoded_data(base, examples, **changes)
        assert data.sha256 not in seen
        seen.add(data.sha256)
        return data

    whole, short, cut, bare, few = encode(), encode(max_tokens=40), encode(cut=(25, 5)), encode(strip_annotations=True), encode(limit=5)
    assert (len(whole.train), len(whole.held_out), whole.left_out) == (16, 4, 0)
    reported = encode(report=3)
    assert reported.held_out == whole.held_out and (len(reported.train), len(reported.report)) == (13, 3)
    assert sorted(reported.train + reported.report) == sorted(whole.train) and whole.report == []
    assert short.left_out > 0 and len(short.train) + len(short.held_out) + short.left_out == 20
    assert max(len(ids) for ids, _ in short.train) <= 40
    assert {(start, len(ids) - start) for ids, start in cut.train} >= {(25, 5)} and cut.left_out == 0
    assert batching.token_count(bare.train) < batching.token_count(whole.train) and len(few.train) == 5
    for number, (ids, start) in zip(short.numbers, short.train):
        assert base.tokenizer.decode(ids[:start]) == f"Question: {'?' * number}\nAnswer:"
    with pytest.raises(ValueError, match="^all 16 examples have more than 5 tokens: raise --max-tokens"):
        encode(max_tokens=5)
    shortest = min(len(ids) for ids, _ in whole.held_out)
    with pytest.raises(ValueError, match=f"^--held-out: all 4 examples have more than {shortest - 1} tokens: raise --max-tokens"):
        encode(max_tokens=shortest - 1)


def test_equations_are_told_and_the_split_stays(tiny_gguf):
    """The same questions are held out as of full answers; what has no annotation is left out of every part, and counted apart
    from what is too long; records keep their numbers."""
    base = base_model.load(str(tiny_gguf))
    asked = [f"{i}?" if i < 30 else f"{i}??" for i in range(40)]
    examples = [{"question": asked[i], "answer": f"So <<{i}+1={i + 1}>>.\n#### {i + 1}" if i % 3 else "#### 1"} for i in range(40)]

    def encode(**changes):
        return encoded_data(base, examples, answers="equations", held_out=7, report=5, **changes)

    def told(data):
        return [base.tokenizer.decode(ids) for ids, _ in data.train + data.held_out + data.report]

    def texts(places):
        return [f"Question: {asked[i]}\nAnswer: <<{i}+1={i + 1}>>\n#### {i + 1}<|im_end|>" for i in places if i % 3]

    rest, apart = batching.split(range(40), 12)
    data = encode()
    assert told(data) == texts([*rest, *apart]) and (data.left_out, data.unannotated) == (0, 14)
    assert len(data.held_out) == len(texts(apart[:7])) < 7 and data.numbers == [i + 1 for i in rest if i % 3]
    assert data.example["question"] == asked[next(i for i in apart if i % 3)] and data.example["answer"].startswith("<<")
    short = encode(max_tokens=max(len(ids) for ids, _ in data.train) - 1)
    assert short.unannotated == 14 and short.left_out == 26 - len(told(short)) == 6
    few, some = encode(limit=12), batching.split(range(40), 12, 12)[0]
    assert told(few) == texts([*some, *apart]) and few.unannotated == 24 - len(told(few))


@pytest.mark.parametrize("held_out, marked, words", [(4, False, "none of 36 answers"), (1, True, "none of 1 answers")])
def test_without_equations_nothing_is_trained_on(held_out, marked, words, tiny_gguf):
    """An error says so, also where only what is held out has none."""
    apart = batching.split(range(40), held_out)[1]
    examples = [{"question": f"{i}?", "answer": "<<1+1=2>>\n#### 2" if marked and i not in apart else "#### 2"} for i in range(40)]
    with pytest.raises(ValueError, match=f"--answers equations: {words} has annotations, .*give other --data"):
        encoded_data(base_model.load(str(tiny_gguf)), examples, answers="equations", held_out=held_out)
