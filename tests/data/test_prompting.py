"""How a problem is put to a model: the templates, and where a completion ends."""
import pytest
import regex

from data import gsm8k, prompting
from weights import tokenizer

GOOD = {"question": "How many legs have 3 cats?", "answer": "3*4 = <<3*4=12>>12 legs.\n#### 12"}
ALPACA = ("Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
          "### Instruction:\nWhy {so}?\n\n### Response:")


@pytest.mark.parametrize("template, asked, told", [
    ("plain", "Question: Why {so}?\nAnswer:", " So."), ("alpaca", ALPACA, "So."),
    ("alpaca-steps", ALPACA + " Let's think step by step.", "So."),
])
def test_prompt_and_target(template, asked, told):
    """The decided texts, character by character, with and without shots, which a blank line sets apart."""
    assert prompting.prompt("Why {so}?", template=template) == asked
    assert prompting.target("So.", template) == told
    shots = [{"question": "Why {so}?", "answer": "So."}] * 2
    assert prompting.prompt("Why {so}?", shots, template) == f"{asked}{told}\n\n{asked}{told}\n\n{asked}"
    assert prompting.prompt("A?") == "Question: A?\nAnswer:" and prompting.target("B") == " B"  # plain unless told otherwise


class Letters:
    """A tokenizer with one token per character."""
    eos_id = 0

    def encode(self, text, start=True):
        return [ord(letter) for letter in text]


@pytest.mark.parametrize("template", ["plain", "alpaca"])
def test_encode_and_cut(template):
    """ids are prompt, target and end token. Cut, the prompt keeps its first P tokens, the answer with its end its first A: a
    cut answer has no end token."""
    ids, length = prompting.encode(Letters(), GOOD, template)
    before, behind = ids[:length], ids[length:]
    assert "".join(map(chr, before)) == prompting.prompt(GOOD["question"], template=template)
    assert "".join(map(chr, behind)) == prompting.target(GOOD["answer"], template) + "\0"
    for P, A in ((length, len(behind)), (9, 5), (10_000, len(behind) - 1)):
        cut, cut_length = prompting.encode(Letters(), GOOD, template, (P, A))
        assert cut == before[:P] + behind[:A] and cut_length == min(P, length)


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
    ("plain", " 5\n#### 5\n\nQuestion: next\nAnswer: 6\nQuestion: C", " 5\n#### 5\n"), ("plain", "", ""),
    ("plain", "The Question: is 5", "The Question: is 5"), ("plain", "\nQuestion is 5", "\nQuestion is 5"),
    ("plain", "5\n\n### Instruction:\nB", "5\n\n### Instruction:\nB"),
    ("alpaca", "So.\n#### 72\nThe answer is: 72", "So.\n#### 72\nThe answer is: 72"),
    ("alpaca", "So.\n#### 72\n\n### Instruction:\nB\n### C", "So.\n#### 72\n"), ("alpaca", "### A", "### A"),
    ("alpaca", "A\nQuestion: B", "A\nQuestion: B"), ("alpaca-steps", "A\n### Response: B", "A"),
])
def test_truncate(template, completion, expected):
    """The cut is where the template's next problem begins on a new line, and nowhere else."""
    assert prompting.truncate(completion, template) == expected
