"""The generated problems: right, readable, deterministic, and apart from the test split."""
import random
import re

import pytest

from data import gsm8k, practice as generator, prompting
from data.calculator import calculate
from tests.data.texts import shown


@pytest.fixture(scope="module")
def problems():
    """All default problems and some of another seed."""
    return generator.practice("train") + generator.practice("test") + generator.practice("train", 500, seed=1)


def test_practice_counts():
    """Defaults, and any count asked for; a smaller count is the beginning of a larger one."""
    assert len(generator.practice("train")) == 3000 and len(generator.practice("test")) == 500
    assert generator.practice("train", 0) == [] and generator.practice("train", 7) == generator.practice("train", 20)[:7]


def test_practice_splits_are_disjoint_for_all_seeds():
    """No question is in train and test, and none comes twice in a split."""
    train, test = ([[example["question"] for example in generator.practice(split, count, seed)] for seed in range(3)]
                   for split, count in (("train", 600), ("test", 300)))
    assert all(len(set(questions)) == len(questions) for questions in train + test)
    assert not set().union(*train) & set().union(*test)
    assert train[0] != train[1]


def test_every_step_of_practice_is_right(problems):
    """A line computes once: text, annotation and integer agree, the last is the answer. Its numbers stand in the question,
    come from earlier lines, or are constants such as the 4 legs of a goat."""
    step = re.compile(r"(.*?)([\d.]+(?: ?[-+*/] ?[\d.]+)+) = \$?<<([^<>=]+)=(\d+)>>(\d+)( .*)?\.")
    for problem in problems:
        known = {*re.findall(r"\d+", problem["question"]), "1", "1.5", "2", "4", "100"}
        *lines, last = problem["answer"].split("\n")
        assert 2 <= len(lines) <= 5
        for line in lines:
            _, shown, expression, value, repeated, _ = step.fullmatch(line).groups()
            assert shown.replace(" ", "") == expression and calculate(expression) == value == repeated
            assert int(value) >= 2 and set(re.findall(r"[\d.]+", expression)) <= known, problem
            known.add(value)
        assert last == f"#### {value}"


def test_practice_reads_as_text(problems):
    """Sentences begin with a capital or a number and end in a mark, nothing is left unfilled, plurals and pronouns fit."""
    for problem in problems:
        text = gsm8k.strip_annotations(problem["question"] + "\n" + problem["answer"])
        assert not re.search(r"[{}\[\]<>]|  | [.,?]|None", text), text
        assert not re.search(r"(?<![\d.,/])1 [a-z]+", text), text  # "1 apples"
        assert re.fullmatch(r"[A-Z].*\. (How many|How old|In how many|What) [^.?]*\?", problem["question"]), text
        assert all(re.fullmatch(r"[A-Z0-9].*\.", line) for line in text.split("\n")[1:-1]), text
        people = set(re.findall("|".join(generator.GIRLS + generator.BOYS), text))
        if len(people) == 1:
            pronouns = set(re.findall(r"\b(she|her|he|his)\b", text.lower()))
            assert pronouns <= ({"she", "her"} if people <= set(generator.GIRLS) else {"he", "his"}), text


def test_all_templates_serve():
    """There are twenty templates, and each gives a problem within a few draws."""
    templates = generator.TEMPLATES.strip().split("\n\n")
    assert len(templates) == 20
    for template in templates:
        rng = random.Random(0)
        assert sum(generator.draw_numbers(template, rng) is not None for _ in range(100)) >= 30, template


def test_practice_answers_score_as_right():
    """A practice answer, taken as a completion, is right by the rules that know its form."""
    for problem in generator.practice("test", 200):
        scores = gsm8k.score(prompting.target(problem["answer"]), problem["answer"])
        assert [scores[rule]["correct"] for rule in ("answer", "strict", "flexible")] == [True] * 3


def test_script_shows_the_same_problems_in_another_process():
    """`python -m data.practice` prints the first problems, whatever the hash seed."""
    printed = shown("data.practice", PYTHONHASHSEED="12345")
    for problem in generator.practice("train", 3):
        assert prompting.prompt(problem["question"]) + prompting.target(problem["answer"]) in printed
