"""How a problem is put to a model: the two templates, and where a completion ends."""
import pytest
import regex

from data import gsm8k, prompting
from weights import tokenizer

GOOD = {"question": "How many legs have 3 cats?", "answer": "3*4 = <<3*4=12>>12 legs.\n#### 12"}


def test_prompt_and_target():
    """The decided texts, character by character, with and without shots."""
    assert prompting.prompt("Why?") == "Question: Why?\nAnswer:"
    assert prompting.target("So.\n#### 1") == " So.\n#### 1"
    shots = [{"question": "A?", "answer": "#### 1"}, {"question": "B?", "answer": "#### 2"}]
    assert prompting.prompt("C?", shots) == ("Question: A?\nAnswer: #### 1\n\nQuestion: B?\nAnswer: #### 2\n\n"
                                         "Question: C?\nAnswer:")


def test_alpaca_prompt_and_target():
    """The text of MetaMath, PiSSA and SORSA; the step-by-step phrase follows in its own template and is no part of training."""
    text = ("Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
            "### Instruction:\nWhy {so}?\n\n### Response:")
    assert prompting.prompt("Why {so}?", template="alpaca") == text
    assert prompting.prompt("Why {so}?", template="alpaca-steps") == text + " Let's think step by step."
    assert prompting.target("So.", "alpaca") == "So."
    shot = {"question": "A?", "answer": "The answer is: 1"}
    one = prompting.prompt("A?", template="alpaca") + "The answer is: 1"
    assert prompting.prompt("Why {so}?", [shot], "alpaca") == one + "\n\n" + text


class Letters:
    """A tokenizer with one token per character."""
    eos_id = 0

    def encode(self, text, start=True):
        return [ord(letter) for letter in text]


def test_encode():
    """ids are prompt, target and end token, cut where the answer begins."""
    ids, length = prompting.encode(Letters(), GOOD)
    assert "".join(map(chr, ids[:length])) == prompting.prompt(GOOD["question"])
    assert "".join(map(chr, ids[length:-1])) == prompting.target(GOOD["answer"])
    assert ids[-1] == 0 and 0 not in ids[:-1]


@pytest.mark.parametrize("template", ["plain", "alpaca"])
def test_cut(template):
    """The prompt keeps its first P tokens, the answer with its end its first A: a cut answer has no end token."""
    ids, length = prompting.encode(Letters(), GOOD, template)
    before, behind = ids[:length], ids[length:]
    for P, A in ((length, len(behind)), (9, 5), (10_000, len(behind) - 1)):
        cut, cut_length = prompting.encode(Letters(), GOOD, template, (P, A))
        assert cut == before[:P] + behind[:A] and cut_length == min(P, length)
    assert prompting.encode(Letters(), GOOD, template, (None, None)) == (ids, length)


def test_encoding_in_two_parts_changes_no_token_of_the_data(gsm8k_data, real_base):
    """encode(prompt) + encode(target) == encode(prompt + target) on all problems, with the default tokenizer."""
    real = real_base.tokenizer
    for example in gsm8k.load(gsm8k_data, "train")[0] + gsm8k.load(gsm8k_data, "test")[0]:
        text = prompting.prompt(example["question"]) + prompting.target(example["answer"])
        assert prompting.encode(real, example)[0] == real.encode(text) + [real.eos_id], text


@pytest.mark.parametrize("cut", sorted(tokenizer.PATTERNS))
def test_no_token_can_cross_from_prompt_to_target(cut):
    """Why it is so, for every known tokenizer: a token stays in its piece, and the cut into pieces is the same."""
    for example in gsm8k.practice("test"):
        before, behind = prompting.prompt(example["question"]), prompting.target(example["answer"])
        apart = regex.findall(tokenizer.PATTERNS[cut], before) + regex.findall(tokenizer.PATTERNS[cut], behind)
        assert regex.findall(tokenizer.PATTERNS[cut], before + behind) == apart


@pytest.mark.parametrize("template, completion, expected", [
    ("plain", " 5\n#### 5\n\nQuestion: next\nAnswer: 6", " 5\n#### 5\n"), ("plain", "A\nQuestion: B\nQuestion: C", "A"),
    ("plain", "The Question: is 5", "The Question: is 5"), ("plain", "\nQuestion is 5", "\nQuestion is 5"), ("plain", "", ""),
    ("plain", "5\n\n### Instruction:\nB", "5\n\n### Instruction:\nB"),
    ("alpaca", "So.\n#### 72\nThe answer is: 72", "So.\n#### 72\nThe answer is: 72"),
    ("alpaca", "So.\n#### 72\n\n### Instruction:\nB\n### C", "So.\n#### 72\n"), ("alpaca", "### A", "### A"),
    ("alpaca", "A\nQuestion: B", "A\nQuestion: B"), ("alpaca-steps", "A\n### Response: B", "A"),
])
def test_truncate(template, completion, expected):
    """The cut is where the template's next problem begins on a new line, and nowhere else."""
    assert prompting.truncate(completion, template) == expected
