"""How a problem is put to a model, in training and in evaluation alike: two templates.

    plain     Question: How many legs have 3 cats?
              Answer: 3*4 = 12 legs.
    alpaca    Below is an instruction that describes a task. Write a response that appropriately completes the request.

              ### Instruction:
              How many legs have 3 cats?

              ### Response:3*4 = 12 legs.

The first is lm-evaluation-harness's for GSM-8K; the second is what MetaMath, PiSSA and SORSA train with, as Stanford
Alpaca wrote it, with nothing between its colon and the answer. A prompt ends without a space: the space belongs to the
first token of the answer. An answer ends in the model's end-of-sequence token, the same one that generation stops at.
"""
from typing import NamedTuple


class Template(NamedTuple):
    """Text before the question, text behind it, what the answer begins with, and where a model that does not stop goes
    on to a next problem."""
    before: str
    behind: str
    start: str
    next: str


INSTRUCTION = ("Below is an instruction that describes a task. Write a response that appropriately completes the "
               "request.\n\n### Instruction:\n")
TEMPLATES = {
    "plain": Template("Question: ", "\nAnswer:", " ", "\nQuestion:"),
    "alpaca": Template(INSTRUCTION, "\n\n### Response:", "", "\n### "),  # GSM-8K's "\n#### 72" is not a next problem
    # MetaMath and SORSA evaluate with a phrase that training does not show.
    "alpaca-steps": Template(INSTRUCTION, "\n\n### Response: Let's think step by step.", "", "\n### "),
}


def prompt(question, shots=(), template="plain"):
    """The text a model continues: solved problems (`shots`: dicts of question and answer), then the question."""
    before, behind, _, _ = TEMPLATES[template]
    solved = [prompt(shot["question"], template=template) + target(shot["answer"], template) for shot in shots]
    return "\n\n".join([*solved, before + question + behind])


def target(answer, template="plain"):
    """What the model shall write after the prompt."""
    return TEMPLATES[template].start + answer


def truncate(completion, template="plain"):
    """The completion up to where the model goes on to a next problem. (The bare word "Question" may be reasoning.)"""
    return completion.partition(TEMPLATES[template].next)[0]


def encode_prompt(tokenizer, text):
    """The ids of a prompt. ValueError where there are none: a vocabulary may lack every part of it."""
    ids = tokenizer.encode(text)
    if not ids:
        raise ValueError(f"the model's tokenizer has no token for any part of the prompt {text[:40]!r}: its vocabulary "
                         "is not whole, or not for such text; use another model")
    return ids


def encode(tokenizer, example, template="plain", cut=(None, None)):
    """(ids, prompt_length): prompt, target and end-of-sequence token; the loss counts ids[prompt_length:] only.

    The two are encoded apart, as they are in generation, so that no token begins in the prompt and ends in the answer.
    `cut` gives the most tokens of the prompt, and of the target with its end: what is beyond goes, as in the recipe of
    PiSSA and SORSA.
    """
    asked = encode_prompt(tokenizer, prompt(example["question"], template=template))[:cut[0]]
    told = [*tokenizer.encode(target(example["answer"], template), start=False), tokenizer.eos_id][:cut[1]]
    return asked + told, len(asked)
