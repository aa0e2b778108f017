"""MATH: reading problems, the three ways to find an answer, the two to compare it, and the four rules made of them."""
import itertools
import json
import random
import re
import subprocess
import sys
import time
from fractions import Fraction

import pytest

from data import hendrycks_math

GOOD = {"problem": "What is $2+3$?", "solution": r"It is $2+3=\boxed{5}$.", "level": "Level 1", "type": "Prealgebra"}
READ = {"question": "What is $2+3$?", "answer": "5", "subject": "Prealgebra", "level": "1"}


def write(path, *records):
    """The records as a .jsonl file or, by its name, as a JSON list. Returns the path."""
    lines = [json.dumps(record) for record in records]
    text = "".join(line + "\n" for line in lines) if path.suffix == ".jsonl" else "[" + ",\n".join(lines) + "]"
    path.write_text(text, encoding="utf-8")
    return path


def parsed(**changes):
    """GOOD with some fields changed (None takes one away), as `example` reads it."""
    record = {key: value for key, value in {**GOOD, **changes}.items() if value is not None}
    return hendrycks_math.example(record, "here")


# ---- data -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["test.jsonl", "test.json"])
def test_both_kinds_of_file_are_read(tmp_path, name):
    """One problem per line, or one list of them; other fields go, and the source says how many and from where."""
    path = write(tmp_path / name, {**GOOD, "unique_id": 7}, {**GOOD, "answer": "five"})
    expected = [READ, {**READ, "answer": "five"}], f"MATH, 2 problems, from {path}"
    assert hendrycks_math.load(path) == hendrycks_math.load(str(path)) == expected


def test_missing_file_is_named(tmp_path):
    """A path that is no file, and a folder, are named in one line that says what is read."""
    for path in (tmp_path / "none.jsonl", tmp_path):
        with pytest.raises(FileNotFoundError) as error:
            hendrycks_math.load(path)
        assert str(error.value).startswith(f"{path}: no such file") and ".jsonl" in str(error.value)
        assert "problems" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name, text, complaint", [
    ("a.jsonl", "\n \n", ": holds no records"), ("a.json", "[]", ": holds no records"), ("a.json", "", ": not valid JSON: "),
    ("a.json", json.dumps(GOOD), ": expected a JSON list of records "),
    ("a.jsonl", "\n" + json.dumps(GOOD) + '\n\n{"problem": ', ":4: not valid JSON: "),
])
def test_a_file_without_problems_is_an_error(tmp_path, name, text, complaint):
    """No record, half a record, or no list around them: one line that names the file, and the line where there are lines."""
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError) as error:
        hendrycks_math.load(tmp_path / name)
    assert str(error.value).startswith(f"{tmp_path / name}{complaint}") and "\n" not in str(error.value)


NO_PROBLEM = "expected a JSON object with a non-empty text under 'problem'"
NO_ANSWER = r"no text under 'answer', and no 'solution' that ends in a \boxed{...} one"
WITHOUT_PROBLEM = [[1, 2], "text", None, 7, {}, {"solution": r"\boxed{5}"}, {"problem": "", "answer": "5"},
                   {"problem": " \n", "answer": "5"}, {"problem": 5, "answer": "5"}, {"problem": None, "answer": "5"},
                   {"problem": ["a"], "answer": "5"}]
WITHOUT_ANSWER = [
    {}, {"answer": " "}, {"answer": None}, {"answer": True}, {"answer": ["5"]}, {"answer": "", "solution": "It is 5."},
    {"solution": 5}, {"solution": ["\\boxed{5}"]}, {"solution": ""}, {"solution": "It is 5."}, {"solution": "boxed{5}"},
    {"solution": r"$\boxed{5$."}, {"solution": r"$\boxed{\frac{1}{2}$."}, {"solution": r"Not $\boxed{4}$ but $\boxed{5$."},
    {"solution": r"\boxed{}"}, {"solution": r"\boxed{ }"}, {"solution": r"$\boxed\frac{1}{2}$"}]


@pytest.mark.parametrize("record, complaint", [(record, NO_PROBLEM) for record in WITHOUT_PROBLEM] + [
    ({"problem": "a", **fields}, NO_ANSWER) for fields in WITHOUT_ANSWER])
def test_a_bad_record_is_named(tmp_path, record, complaint):
    """A record that is no problem, or has no gold answer, raises one line with file, place and fault."""
    for name, place in (("test.jsonl", ":2"), ("test.json", ": record 2")):
        path = write(tmp_path / name, GOOD, record, GOOD)
        with pytest.raises(ValueError) as error:
            hendrycks_math.load(path)
        assert str(error.value) == f"{path}{place}: {complaint}"


@pytest.mark.parametrize("solution, gold", [
    (r"$\boxed{5}$", "5"), (r"First $\boxed{4}$, then $\boxed{5}$.", "5"), (r"$\boxed{\frac{1}{2}}$.", r"\frac{1}{2}"),
    (r"$\boxed{\left\{\frac{1}{\sqrt{2}}\right\}}$ for {all}", r"\left\{\frac{1}{\sqrt{2}}\right\}"), (r"$\fbox{7}$", "7"),
    (r"$\boxed{x = 5\text{ cm}}$", r"x = 5\text{ cm}"), (r"$\boxed 7$ of $8$", "7"), (r"$\boxed{4}$ and $\fbox{5}$", "4"),
])
def test_gold_is_in_the_last_box_of_the_solution(solution, gold):
    """The gold answer is the last box, braces matched, untouched otherwise."""
    assert parsed(solution=solution) == {**READ, "answer": gold}


def test_answer_field_wins_over_the_box():
    """A record's own answer is the gold one, whatever the solution boxes, or without a solution."""
    for solution in (GOOD["solution"], "No box here.", None, 7):
        assert parsed(solution=solution, answer=r"\frac12") == {**READ, "answer": r"\frac12"}
    for number, text in ((7, "7"), (0, "0"), (-2.5, "-2.5")):
        assert parsed(answer=number) == {**READ, "answer": text}
    for nothing in (None, "", " \n"):
        assert hendrycks_math.example({**GOOD, "answer": nothing}, "here") == READ
    assert hendrycks_math.gold(r" \frac12 ") == r" \frac12 "


@pytest.mark.parametrize("changes, subject, level", [
    ({}, "Prealgebra", "1"), ({"type": None}, None, "1"), ({"subject": "Algebra"}, "Algebra", "1"),
    ({"subject": "Algebra", "type": None}, "Algebra", "1"), ({"type": 7}, None, "1"), ({"level": "Level 5"}, "Prealgebra", "5"),
    ({"level": 5}, "Prealgebra", "5"), ({"level": "5"}, "Prealgebra", "5"), ({"level": "Level ?"}, "Prealgebra", "?"),
    ({"level": None}, "Prealgebra", None), ({"level": None, "type": None}, None, None),
])
def test_subject_and_level(changes, subject, level):
    """subject, else type, if it is text; the level as text without the word; None where there is none."""
    example = parsed(**changes)
    assert (example["subject"], example["level"]) == (subject, level)
    if "subject" not in changes:  # none under a name is as good as no such name
        assert hendrycks_math.example({**GOOD, **changes, "subject": None}, "here") == example


# ---- what a completion answers --------------------------------------------------------------------------------------

@pytest.mark.parametrize("text, expected", [
    ("", None), ("5", None), (r"\boxed", None), ("boxed{5}", None), (r"\boxed{5}", "5"), (r"\fbox{5}", "5"),
    (r"\boxed{}", ""), (r"\boxed{ 5 }", " 5 "), (r"\boxed{4} or \boxed{5}", "5"),
    (r"\fbox{4} or \fbox{5} ", "5"), (r"\fbox{4} or \boxed{5}", "5"),
    (r"\boxed{\boxed{5}}", "5"), (r"\boxed{\frac{1}{2}} and {more}", r"\frac{1}{2}"), (r"\boxed{{a}{b}}}", "{a}{b}"),
    (r"\boxed{a{b}", None), (r"\boxed{5", None), (r"\boxed{4} or \boxed{5", None), (r"\boxed{\{1,2\}}", r"\{1,2\}"),
    (r"\boxed{[1,2)}", "[1,2)"),
    ("\\boxed{1\n2}", "1\n2"), (r"{\boxed{5}}", "5"), (r"\boxed{4}, \fbox{5}", "4"), (r"\fbox{5}, \boxed", None),
    (r"$\boxed 5$, so $6$", "5"), (r"\boxed 5", "5"), (r"\boxed{4}, $\boxed 5 $", "5"), (r"$\fbox 5$", "5"),
    (r"\boxedx", None), (r"$\boxed5$", None), (r"$\boxed\frac{1}{2}$", None), (r"\boxed{4} \boxedx", None),
])
def test_last_box(text, expected):
    """The content of the last \\boxed (\\fbox without one), braces matched or up to a dollar; None without one or if open."""
    assert hendrycks_math.last_box(text) == expected


@pytest.mark.parametrize("text, expected", [
    (r"$\boxed{5}$. The answer is: 6. Or $7$.", "5"), (r"The answer is \boxed{\frac12}.", r"\frac12"), (r"\boxed{5} \boxed{6}", "6"),
    (r"\boxed{}", ""), (r"The answer is: \boxed{5", r"\boxed{5"), (r"The answer is: 6, $\boxed 5$", "5"),
    ("The answer is: 5", "5"), ("The answer is 5", "5"), ("The answer is:5", "5"), ("The answer is  :  5", "5"),
    ("The answer is: 5.", "5"), ("The answer is: 5. ", "5"), ("The answer is: 5..", "5."),
    ("The answer is: 5.\nThat is all, $6$.", "5"), ("The answer is: 5\t \n6", "5"), ("The answer is: 2.5", "2.5"),
    ("The answer is: 5. And $6$.", "5. And $6$"), ("The answer is: 4\nThe answer is: 5", "5"), ("The answer is 4. The answer is 5.", "5"),
    ("The answer is: $5$.", "$5$"), ("With $x=4$, $y=5$. The answer is: 9", "9"), ("The answer is: ", None), ("The answer is", None),
    ("The answer is: .", None), ("So $5$. The answer is: .", "5"), ("So $5$.\nThe answer is:\n6", "6"), ("The answer is:\n5.\n6", "5"),
    ("The answer is: 4\nThe answer is:\nor $5$", "or $5$"), ("So $5$.\nThe answer is:\n", "5"),
    ("So $4$ or $5$.", "5"), ("So $x = 5$", "x = 5"), ("So $$5$$", "5"), ("So $4$ and $\n5$", "\n5"), ("So $5", None),
    ("So $$", None), (r"$$x=5$$ so $y = 7$.", "y = 7"), (r"So $y = 7$, and $$x=5$$", "x=5"),
    (r"Tickets cost \$5, so the total is $15$.", "15"), (r"The total of $15$ is \$5 more.", "15"), (r"A \$5 and a \$10 ticket", None),
    ("5", None), ("", None), (r"\[5\]", None),
])
def test_our_extraction(text, expected):
    """A box before the marker before dollars; the last of each; the marker's line without spaces, colon and final dot."""
    assert hendrycks_math.extract_answer(text) == expected


@pytest.mark.parametrize("text, expected", [
    (r"\[4\] $6$ \boxed{5} \[4\]", "5"), (r"\boxed{5} \boxed{6}", "6"), (r"\boxed{}", ""), (r"\[4\] \[5\] $6$", "4"), (r"$6$ \[4\]", "4"),
    ("\\[x =\n5\\]", "x =\n5"), (r"\[4\] \boxed{5", "4"), (r"\[4 and $5$", "5"), (r"4\] and $5$", "5"), (r"[4] and $5$", "5"),
    ("So $4$, $5$ or $6$.", "4$, $5$ or $6"), ("So $5$.", "5"), ("So $$5$$.", "$5$"), ("$$", ""), ("costs $5", "costs $5"), ("$", "$"),
    ("5", "5"), ("", ""), ("The answer is: 5", "The answer is: 5"), ("The answer is: $5$.", "5"),
    (r"So \[ x = 5 \]", "x = 5"), ("\\[\n5\n\\]", "5"), (r"\[\] $5$", "5"), (r"\[\]", r"\[\]"),
])
def test_harness_extraction(text, expected):
    """The last box, the first display (stripped), what the outermost dollars hold, or everything, in that order."""
    assert hendrycks_math.extract_harness(text) == expected


@pytest.mark.parametrize("text, expected", [
    ("The answer is: 5", "5"), ("The answer is: 5.", "5"), ("The answer is:   5 . ", "5"), ("The answer is: 5..", "5."),
    ("The answer is: 2.5", "2.5"),
    ("The answer is: 5.\nThe end.", "5"), ("The answer is: 5. \nThe end.", "5. \nThe end"), ("The answer is: 5\nThe end.\n", "5\nThe end"),
    ("The answer is: 4. The answer is: 5", "5"), ("The answer is: 5. Right?", "5. Right?"), ("The answer is: $5$.\n\nOk.\n", "$5$"),
    (r"The answer is: \boxed{5}", r"\boxed{5}"), ("The answer is: ", ""), ("The answer is: .", ""), ("The answer is: .\n5", ""),
    ("The answer is: \n5", "5"),
    ("The answer is 5", None), ("The answer is:5", None), ("The answer is:\n5", None), ("the answer is: 5", None), (r"\boxed{5}", None),
    ("$5$", None), ("", None),
])
def test_metamath_extraction(text, expected):
    """Behind the last marker, with colon and space exactly, up to a dot that ends a line, and without a final dot."""
    assert hendrycks_math.extract_metamath(text) == expected


# ---- what is equal --------------------------------------------------------------------------------------------------

NORMAL = [
    ("", ""), ("5", "5"), ("a\nb", "ab"), ("1\t2", "1\t2"), (r"1\!0", "10"), (r"10,\!000", "10,000"), (r"a\\b", r"a\b"),
    (r"a\\\\b", r"a\\b"),
    (r"5\\!", "5\\"), (r"\!", ""),
    (r"\tfrac12", r"\frac{1}{2}"), (r"\dfrac{1}{2}", r"\frac{1}{2}"), (r"\\dfrac12", r"\frac{1}{2}"), (r"\cfrac12", r"\cfrac12"),
    (r"\left(1, 2\right]", "(1,2]"), (r"a\leftarrow b", "aarrowb"), (r"\right\}", r"\}"),
    (r"90^\circ", "90"), (r"90^{\circ}", "90"), (r"90\circ", r"90\circ"), (r"\$5", "5"), ("$5$", "$5$"),
    (r"5\text{ cm}", "5"), (r"5 \text{ cm}^2 or so", "5"), (r"5\text{cm}", r"5\text{cm}"), (r"5\mbox{ cm}", r"5\mbox{cm}"),
    (r"\text{ cm}", ""), (r"\text{A}, \text{B}", r"\text{A},\text{B}"), (r"\text{A}\text{ or so}", r"\text{A}"),
    ("5\\text{\n cm}", "5"), (r"5\text{\$ each}", "5"), (r"5\text{\% each}", r"5\text{each}"), (r"50\text{ \%}", "50"),
    (r"1/2\text{ cm}", r"\frac{1}{2}"),
    (r"50\%", "50"), ("50%", "50%"), (r"\%", ""), (r"\%.5", r"\frac{1}{2}"),
    (".25", "0.25"), ("x .25", "x0.25"), (r"\frac{.5}{2}", r"\frac{0.5}{2}"), ("(.5,.5)", "(.5,.5)"), ("a.5", "a.5"),
    (r"x \%.25", "x0.25"), (".", "0."),
    ("x=5", "5"), ("x = 5", "5"), ("xy=5", "5"), ("=5", "5"), ("x=", ""), ("xyz=5", "xyz=5"), ("xy = 5", "xy=5"), ("x  = 5", "x=5"),
    ("x=y=5", "x=y=5"),
    ("x==5", "x==5"), ("x=.25", ".25"), ("x= .25", "0.25"), (".x=5", "0.x=5"), (r"\%x=5", "5"), (r"x=\frac12", r"\frac{1}{2}"),
    (r"x=\sqrt2", r"\sqrt{2}"),
    (r"\sqrt3", r"\sqrt{3}"), (r"\sqrt{3}", r"\sqrt{3}"), (r"\sqrt34", r"\sqrt{3}4"),
    (r"2\sqrt3+\sqrt{5}+\sqrt7", r"2\sqrt{3}+\sqrt{5}+\sqrt{7}"),
    (r"\sqrt 3", r"\sqrt{}3"), (r"\sqrt[3]{2}", r"\sqrt{[}3]{2}"), (r"\sqrt\pi", r"\sqrt{\}pi"), ("\\sqrt\n3", r"\sqrt{3}"),
    (r"\sqrt{\sqrt2}", r"\sqrt{\sqrt{2}}"),
    (" 1 , 2 ", "1,2"), ("1 2", "12"),
    (r"\frac12", r"\frac{1}{2}"), (r"\frac 1 2", r"\frac{1}{2}"), (r"\frac123", r"\frac{1}{2}3"), (r"\frac1{72}", r"\frac{1}{72}"),
    (r"\frac{72}1", r"\frac{72}1"),
    (r"-\frac12x+\frac{3}{4}+\frac5{6}", r"-\frac{1}{2}x+\frac{3}{4}+\frac{5}{6}"), (r"\frac1{72}+1", r"\frac{1}{72}+1"),
    (r"\frac\pi2", r"\frac{\}{p}i2"),
    (r"\frac1\sqrt2", r"\frac{1}{\}sqrt{2}"), (r"\frac1", r"\frac1"), (r"\frac12+\frac1", r"\frac12+\frac1"),
    (r"\frac1\frac", r"\frac1\frac"),
    (r"\frac{", r"\frac{"), (r"\frac1{", r"\frac{1}{"),
    ("0.5", r"\frac{1}{2}"), (".5", r"\frac{1}{2}"), ("0. 5", r"\frac{1}{2}"), ("x=0.5", r"\frac{1}{2}"), ("-0.5", "-0.5"),
    ("0.50", "0.50"), ("0.55", "0.55"), ("10.5", "10.5"),
    ("1/2", r"\frac{1}{2}"), ("1 / 2", r"\frac{1}{2}"), ("x=1/2", r"\frac{1}{2}"), ("10/205", r"\frac{10}{205}"),
    ("-1/2", r"\frac{-1}{2}"), ("1/-2", r"\frac{1}{-2}"),
    ("-10/-20", r"\frac{-10}{-20}"), ("0/2", r"\frac{0}{2}"), ("1/0", r"\frac{1}{0}"), ("-0/2", "-0/2"), ("01/2", "01/2"),
    ("1/02", "1/02"), ("+1/2", "+1/2"),
    ("--1/2", "--1/2"), ("1/2/3", "1/2/3"), ("1.0/2", "1.0/2"), ("a/2", "a/2"), ("2/a", "2/a"), ("/2", "/2"), ("2/", "2/"),
    ("1_0/2", "1_0/2"), ("1,000/2", "1,000/2"),
    ("1\u0663/2", "1\u0663/2"), ("1/2\u0663", "1/2\u0663"), (r"\pi/2", r"\pi/2"), ("(1/2)", "(1/2)"),
]


@pytest.mark.parametrize("text, expected", NORMAL)
def test_normal_form(text, expected):
    """normalise, step by step as the evaluation rules state it, flaws and order included."""
    assert hendrycks_math.normalise(text) == expected


WITHOUT_NORMAL = [r"\frac", r"1+\frac", r"\frac ", r"\frac\frac12", r"\frac12\frac", r"\sqrt", r"2\sqrt",
                  r"\sqrt\sqrt2", "\\sqrt\n", r"x=\sqrt",
                  r"\sqrt\text{ cm}", r"5\text{ cm}\text{ or so}", r"1\text{ a}2\text{ b}3\text{ c}"]


@pytest.mark.parametrize("text", WITHOUT_NORMAL)
def test_no_normal_form(text):
    """Where the data set's code fails, normalise raises ValueError, and is_equiv compares the texts as they are."""
    with pytest.raises(ValueError):
        hendrycks_math.normalise(text)
    assert hendrycks_math.is_equiv(text, text)
    for other in ("5", "", text + " ", text.replace(r"\frac", r"\dfrac") + r"\!"):
        assert not hendrycks_math.is_equiv(text, other) and not hendrycks_math.is_equiv(other, text)


SAME = [("\\frac12", "1/2", r"\dfrac{1}{2}", ".5", "0.5"), ("x=5", "5", r"5\text{ cm}"), (r"50\%", "50"), (r"90^\circ", "90"),
        (r"\sqrt3", r"\sqrt{3}"),
        ("(1, 2)", "(1,2)"), (r"\left[0, 1\right)", "[0,1)"), (r"\tfrac{a}{b}", r"\frac ab"), (r"\$ 12", "12")]
MISSED = [  # by is_equiv: those of the evaluation rules first
    ("0.25", r"\frac14"), ("2/4", "1/2"), ("-1/2", r"-\frac{1}{2}"), ("5.0", "5"), ("1,000", "1000"), (r"\text{A}", "A"),
    (r"\frac{72}1", "72"),
    (r"\pi/2", r"\frac{\pi}{2}"), (r"5\mbox{ cm}", "5"), ("50%", "50"), ("$5$", "5"),
    ("18.00", r"\$18"), ("12.50", "25/2"), ("+7", "7"), ("-0.75", r"-\frac34"), ("-0.75", r"\frac{3}{-4}"), ("0.75", r"\frac{-3}{-4}"),
    (".5", r"-\frac{-1}{2}"),
    (r"\frac{3}{6}", "0.5"), ("2/6", "1/3"), ("6/3", "2"), ("-0", "0"), ("0.0", "0"), ("1,450,000", "1450000"), ("-1,000", "-1000"),
    ("1,234.50", "1234.5"),
    ("1{,}450", "1450"), (r"12\,000", "12,000"), (r"12\ 000", "12000"), ("+1,000.0", r"\frac{1000}{1}"),
    (r"\(7\)", "7"), ("$x = 7$", "7"), ("7.", "7"), ("x = 7.", "7"), ("$7$.", "7"), ("7 .", "7"), ("$7.$", "7"), ("$7. $", "7"),
    (r"\$7$", "7"), (" x = 7", "7"),
    ("$(1, 2)$", "(1,2)"), (r"\(A\)", r"\text{A}"),
    (r"\text{(B)}", "(B)"), (r"\textbf{B}", r"\text{B}"), (r"\textit{B}", "B"), (r"\textrm{B}", "B"), (r"\textnormal{B}", "B"),
    (r"\mathrm{No}", "No"), (r"\mathbf{B}", "B"),
    (r"\mbox{east}", r"\text{east}"), (r"\text{ east}", "east"), (r"\text{A}, \text{B}", "A,B"), (r"5\text{cm}", "5 cm"), (r"5\text {cm}", "5cm"), (r"5\mbox{cm}", r"5\text{cm}"),
    (r"5\mbox{ cm}^2", "5"),
    ("5\\mbox{ cm\nor so}", "5"), (r"5\text{ m}\text{ or so}", "5"), ("1/2\\mbox{ cup}", "0.5"), (r"90^\circ", "90.0"), ("7.50%", "7.5"),
    (r"\cfrac12", "0.5"), (r"\frac{1}2", "0.5"), (r"\frac {1} 2", "1/2"), (r"\dfrac{\pi}3", r"\pi/3"), (r"\frac{5}\pi", r"5/\pi"),
    (r"\frac{\sqrt{2}}3", r"\sqrt2/3"),
    (r"3\pi/2", r"\frac{3\pi}{2}"), (r"3\sqrt5/2", r"\frac{3\sqrt{5}}{2}"), (r"\sqrt{\sqrt{2}}/2", r"\frac{\sqrt{\sqrt{2}}}{2}"),
    ("a/b", r"\frac{a}{b}"), ("x_1/2", r"\frac{x_1}{2}"),
    (r"50\%", "50%"), (r"$50\%$", "50"), (r"50\%", "50.0"), (r"12.5\%", "12.50"), (r"\[7\]", "7"), (r"\[ x = 7. \]", "7"),
    ("-.5", r"-\frac12"), ("-.5", "-0.50"), ("x=.25", "1/4"), ("x = -.25", r"-\frac14"), ("(.5,.25)", "(0.5,0.25)"),
    (r"\text {A}", "A"), (r"\textbf {(B)}", "(B)"),
    ("(1/2, 3)", r"(\frac12,3)"), (r"\{1/2, 1/3\}", r"\{\frac{1}{2},\frac{1}{3}\}"), ("x+1/2", r"x+\frac{1}{2}"),
]
DIFFERENT = [
    ("12.5", "12"), ("(1,2)", "(2,1)"), ("1/3", "0.33"), ("5", "-5"), (r"\frac12", r"-\frac12"), ("-1/2", "1/2"), ("A", "B"), ("A", "a"),
    ("x", "y"), (r"\text{A}", r"\text{B}"),
    ("", "0"), ("", "5"), ("", "A"), ("", "()"), ("0", "-"), ("(1,234)", "1234"), ("(1,234)", "(1234)"), ("1,2", "12"), ("1,23", "123"),
    ("12,34", "1234"), ("1,2345", "12345"),
    ("1234,567", "1234567"), ("1,000", "1.000"), ("1,000,00", "100000"), ("1.2.3", "1.23"), ("[0,1)", "[0,1]"), ("(0,1)", "[0,1]"),
    ("1,2,3", "3,2,1"), ("1/2", "2"), ("1/2", "2/1"),
    ("1/0", "2/0"), ("1/0", "0"), ("0/0", "1"), ("x", "x^2"), ("x^2", "x_2"), (r"\sqrt2", "2"), (r"\sqrt{2}", "1.414"),
    (r"2\pi", r"\pi"), ("3.14", r"\pi"), ("10", "100"),
    ("50%", "0.5"), (r"5\text{ cm}", r"6\text{ cm}"), ("x=5", "x=6"), ("x=5", "-5"), (r"\pi/2", r"\pi/3"), ("a/b", "b/a"),
    (r"\frac{a}{b}", r"\frac{b}{a}"), ("10^3", "103"),
    ("0.3", r"0.\overline{3}"), (r"\infty", r"-\infty"), (r"\pm2", "2"), ("5 or 6", "5"), (r"\emptyset", "0"), ("100_8", "100"),
    ("7", "7!"), ("two", "2"), ("0.1", "0.10001"),
    ("3.0", "30"), (r"\frac{1}{2}", r"\frac{1}{20}"), (r"\frac34", r"\frac43"), ("1e3", "1"), (r"\text{yes}", r"\text{no}"),
    ("$5$", "6"), ("1,000", "1"),
    (r"\frac", ""), (r"\sqrt", ""), (r"\sqrt", r"\frac"), ("+-5", "-5"), ("--5", "5"), (r"\frac{1}{2}3", r"\frac{1}{2}"),
    ("1-2", "-1"), (r"+\frac{1}{2}", r"-\frac{1}{2}"),
    (r"-\frac{1}{3}", r"\frac{1}{3}"), ("2^3/4", r"2^\frac34"), ("e^x/2", r"e^\frac{x}{2}"), ("2^{3}/4", r"2^\frac{3}{4}"),
    ("x_1^2/3", r"x_1^\frac23"), ("10.5", "100.5"), (r"x\text{A}", r"x\text{B}"), ("-.5", ".5"), (r"50\%", "5"),
]
ALL = list(dict.fromkeys(itertools.chain(*SAME, *MISSED, WITHOUT_NORMAL)))


@pytest.mark.parametrize("texts", SAME)
def test_equal_by_every_comparison(texts):
    """What the data set's own code finds equal: so do we."""
    for left, right in itertools.product(texts, repeat=2):
        assert hendrycks_math.is_equiv(left, right) and hendrycks_math.equal(left, right), (left, right)


@pytest.mark.parametrize("left, right", MISSED)
def test_equal_as_mended_only(left, right):
    """What the data set's own code is known not to find equal, and we do."""
    assert not hendrycks_math.is_equiv(left, right) and not hendrycks_math.is_equiv(right, left)
    assert hendrycks_math.equal(left, right) and hendrycks_math.equal(right, left)


@pytest.mark.parametrize("left, right", DIFFERENT)
def test_different_by_every_comparison(left, right):
    """Another value, order, letter, sign or bracket is another answer; nothing is not an answer."""
    assert not hendrycks_math.is_equiv(left, right) and not hendrycks_math.is_equiv(right, left)
    assert not hendrycks_math.equal(left, right) and not hendrycks_math.equal(right, left)


def test_comparisons_are_symmetric():
    """Over pairs of the texts above: either order gives one verdict, and `equal` accepts what is_equiv accepts."""
    pairs = list(itertools.combinations(ALL, 2))
    for left, right in [*zip(ALL, ALL), *random.Random(1).sample(pairs, 4000)]:
        same, equivalent = hendrycks_math.equal(left, right), hendrycks_math.is_equiv(left, right)
        assert same == hendrycks_math.equal(right, left), (left, right)
        assert (same or not equivalent) and (equivalent or left != right), (left, right)


def test_no_answer_equals_nothing():
    """A missing prediction is wrong by both comparisons, also against a text that says None, or nothing."""
    for same in (hendrycks_math.is_equiv, hendrycks_math.equal):
        assert [same(None, answer) for answer in ("5", "", "None", None)] == [False] * 4
    assert [hendrycks_math.equal(blank, answer) for blank in ("", " \n") for answer in ("5", "", " \n", "$$")] == [False] * 8


@pytest.mark.parametrize("text, value", [
    ("5", 5), ("-5", -5), ("+5", 5), ("0", 0), ("2.50", Fraction(5, 2)), ("1,000", 1000), ("-1,234,567.5", Fraction(-2469135, 2)),
    ("1000", 1000),
    (r"\frac{3}{6}", Fraction(1, 2)), (r"-\frac{1}{2}", Fraction(-1, 2)), (r"+\frac{-1}{2}", Fraction(-1, 2)),
    (r"-\frac{-1}{2}", Fraction(1, 2)), (r"\frac{1}{-2}", Fraction(-1, 2)),
    (r"\frac{0}{5}", 0), (r"\frac{1}{0}", None), ("1,00", None), ("1,0000", None), ("1000,000", None), ("5.", None), (".5", None),
    ("1.2.3", None), ("5 ", None), ("5x", None), ("x", None),
    ("", None), ("1e3", None), ("1_000", None), ("- 5", None), ("--5", None), (r"\frac{1.5}{2}", None), (r"\frac{x}{2}", None),
    (r"\frac{1}{2}x", None), (r"1\frac{1}{2}", None),
    ("\u0665", None), ("\\frac{\u0661}{2}", None), ("5\n", None), ("9" * 300, 10 ** 300 - 1), ("9" * 301, None), ("9" * 5000, None),
    (rf"\frac{{1}}{{{'9' * 5000}}}", None),
])
def test_number(text, value):
    """Plain numbers and simple fractions have a value; anything else, division by zero and endless digits have none."""
    assert hendrycks_math.number(text) == value


# ---- the rules ------------------------------------------------------------------------------------------------------

def verdicts(completion, answer):
    """1 or 0 per rule, in the order answer, is_equiv, harness, metamath."""
    scores = hendrycks_math.score(completion, answer)
    assert json.loads(json.dumps(scores)) == scores and list(scores) == ["answer", "is_equiv", "harness", "metamath"]
    for result in scores.values():
        assert list(result) == ["extracted", "correct"] and isinstance(result["correct"], bool)
        assert result["extracted"] is not None or not result["correct"]
    return "".join(str(int(result["correct"])) for result in scores.values())


def test_score_gives_what_each_rule_reads():
    """Two rules share one prediction and differ in the comparison; the others read for themselves."""
    completion = "So $x = 2/8$ and $y=1$.\nThe answer is: 0.25.\nThe end."
    assert hendrycks_math.score(completion, r"\frac14") == {
        "answer": {"extracted": "0.25", "correct": True}, "is_equiv": {"extracted": "0.25", "correct": False},
        "harness": {"extracted": "x = 2/8$ and $y=1", "correct": False}, "metamath": {"extracted": "0.25", "correct": False}}
    assert hendrycks_math.score("No idea.", "5") == {
        "answer": {"extracted": None, "correct": False}, "is_equiv": {"extracted": None, "correct": False},
        "harness": {"extracted": "No idea.", "correct": False}, "metamath": {"extracted": None, "correct": False}}
    assert verdicts(r"So \[ x = 5 \]", "5") == "0010"


PAGE = [  # subject, level, problem, solution, {completion: verdicts}
    ("Prealgebra", 1, "A baker fills 7 trays with 12 rolls each. How many rolls does she bake?",
     r"Seven trays hold $7\cdot 12=\boxed{84}$ rolls.", {
        r"She bakes $7\cdot12=\boxed{84}$ rolls.": "1110", "7*12 = 84 rolls.\nThe answer is: 84": "1101",
        "The answer is: 74": "0000", "84": "0010"}),
    ("Algebra", 2, "Solve $4x=3$.", r"Divide by four: $x=\boxed{\frac{3}{4}}$.", {
        "Divide.\nThe answer is: 0.75": "1000", r"$x=\boxed{\frac34}$": "1110", "The answer is: x = 3/4.": "1101",
        "The answer is $x = 3/4$": "1010"}),
    ("Geometry", 1, "A right triangle has two equal sides. How many degrees has each of the smaller angles?",
     r"Half of $90^\circ$: $\boxed{45^\circ}$.", {
        r"It is $45^\circ$.": "1110", "Because $x=45$, it is $45$.": "1100", "It is 45": "0000"}),
    ("Counting & Probability", 3, "How many three-digit codes do ten digits give?", r"There are $10^3=\boxed{1{,}000}$.", {
        "The answer is: 1000": "1000", "The answer is: 1{,}000.": "1101", "The answer is: 1,000.": "1000", "The answer is $100$.": "0000"}),
    ("Number Theory", 2, "What is the remainder of $17$ divided by $5$?", r"$17=3\cdot5+2$, so it is $\boxed{2}$.", {
        r"\[2\]": "0010", "The answer is 3": "0000", "The answer is 2": "1100", "The answer is: 2": "1101"}),
    ("Intermediate Algebra", 4, "What is the positive root of $x^2=x+1$?", r"By the formula, $x=\boxed{\frac{1+\sqrt{5}}{2}}$.", {
        r"$\boxed{\dfrac{1+\sqrt5}{2}}$": "1110", r"$\boxed{\frac{1-\sqrt5}{2}}$": "0000", r"The answer is: \frac{1 + \sqrt{5}}2": "1000"}),
    ("Precalculus", 5, r"For which $t$ between $0$ and $\frac{\pi}{2}$ is $\sin t=\frac12$?", r"At $t=\boxed{\frac{\pi}{6}}$.", {
        r"The answer is: $\pi/6$.": "1000", "The answer is: \\frac{\\pi}{6}.\nDone.": "1101", "The answer is: 30": "0000"}),
    ("Algebra", 3, "Where do the lines $x=3$ and $y=-2$ meet?", r"At $\boxed{(3,-2)}$.", {
        "The answer is: (3, -2).\nIs that right?": "1101", "The answer is: (-2, 3)": "0000",
        r"At $\left(3, -2\right)$.": "1110", r"\boxed{(3,2)}": "0000"}),
    ("Prealgebra", 2, "Today is Sunday. Which day is it nine days from now?", r"Two days after Sunday: $\boxed{\text{Tuesday}}$.", {
        "The answer is: Tuesday": "1000", r"\boxed{\text{Tuesday}}": "1110", "The answer is: Wednesday": "0000"}),
    ("Geometry", 2, "What is the area of a circle with a radius of $6$ cm?", r"$6^2\pi=\boxed{36\pi}$ square centimetres.", {
        r"\boxed{36\pi\text{ cm}^2}": "1110", r"\boxed{36\pi\mbox{ cm}^2}": "1000", r"\boxed{36}": "0000"}),
    ("Counting & Probability", 1, "Two of five balls are red. How probable is a red one?", r"It is $\boxed{\frac{2}{5}}$.", {
        r"Not $\boxed{\frac{1}{5}}$ but $\boxed{\frac{4}{10}}$.": "1000",
        "The answer is: \\frac{2}{5}.\nNo, $\\boxed{\\frac{3}{5}}$.": "0001", r"The answer is: \boxed{2/5}": "1110"}),
    ("Number Theory", "?", "Write eleven in base two.", r"$8+2+1$ gives $\fbox{1011_2}$.", {
        "I cannot do this.": "0000", "1011_2": "0010", "": "0000",
        r"\[1011_2\] is more than $1010_2$.": "0010", r"The answer is: \boxed{1011_2": "0000"}),
]


def test_a_page_of_problems(tmp_path):
    """Problems go through load and their completions through score; the verdicts are written down by hand."""
    records = [{"problem": problem, "level": f"Level {level}", "type": subject, "solution": solution}
               for subject, level, problem, solution, _ in PAGE]
    examples, source = hendrycks_math.load(write(tmp_path / "page.jsonl", *records))
    assert source.startswith("MATH, 12 problems, ")
    assert [example["answer"] for example in examples] == [
        "84", r"\frac{3}{4}", r"45^\circ", "1{,}000", "2", r"\frac{1+\sqrt{5}}{2}",
        r"\frac{\pi}{6}", "(3,-2)", r"\text{Tuesday}", r"36\pi", r"\frac{2}{5}", "1011_2"]
    for example, (subject, level, problem, solution, completions) in zip(examples, PAGE):
        assert (example["subject"], example["level"], example["question"]) == (subject, str(level), problem)
        assert verdicts(solution, example["answer"]) == "1110"  # a solution as the data has it: a box, and no marker
        assert {completion: verdicts(completion, hendrycks_math.gold(example["answer"])) for completion in completions} == completions


PIECES = [*r"0125xA.,-+/=()[]{}{}$%!:\ ", "\n", "\t", r"\frac", r"\dfrac", r"\sqrt", r"\boxed{", r"\fbox{",
          r"\text{ ", r"\text{", r"\mbox{", r"\left", r"\right", r"\pi", r"\%", r"\$",
          r"\[", r"\]", r"\(", r"\)", r"\,", "{,}", r"^\circ", r"^{\circ}", "The answer is", ": ", ".\n", "\u0665", "\u00b2"]


def test_any_text_is_scored():
    """Random LaTeX, as completion and as answer, never raises; every text but a blank one equals itself."""
    generator = random.Random(1)
    texts = ["".join(generator.choices(PIECES, k=generator.randrange(16))) for _ in range(3000)]
    for text, answer in zip(texts, texts[1:]):
        verdicts(text, answer)
        assert hendrycks_math.is_equiv(text, text) and hendrycks_math.equal(text, text) == bool(text.strip()), text


def test_endless_digits_are_an_answer_like_any_other():
    """More digits than int() accepts neither raise nor hang; they are no number, only a text."""
    assert verdicts(r"\boxed{" + "9" * 5000 + "}", "9") == "0000"
    assert verdicts("9" * 5000, "9" * 5000) == "0010"
    assert hendrycks_math.is_equiv("1/" + "9" * 5000, rf"\frac{{1}}{{{'9' * 5000}}}")


def test_only_texts_of_some_length_are_mended():
    """What is longer than LONGEST is compared as is_equiv compares it: no answer is as long."""
    for digits, same in ((hendrycks_math.LONGEST - 2, True), (hendrycks_math.LONGEST - 1, False)):
        text = f"${'9' * digits}$"
        assert (hendrycks_math.mend(text) == "9" * digits) == (hendrycks_math.mend(text) != text) == same
        assert hendrycks_math.equal(text, "9" * digits) == same and hendrycks_math.equal(text, text)


@pytest.mark.parametrize("text", [
    "The sum of $a$ and $b$ is\n\\[a + b = \\frac{1}{2}.\\]\n" * 400, r"\boxed{" * 3000, "$" * 20000, "$a" * 10000,
    "The answer is" * 1600, r"\text{ " * 3000, r"The answer is \text{" * 1100,
    r"\boxed{" + "9" * 20000 + "}", "The answer is " + "word " * 4000, "The answer is " + r"\frac{}" * 2800,
    "The answer is a" + " " * 20000 + "b",
    "{a" * 10000, r"\[" * 2000, "a/" * 10000, "9 " * 10000, "\n" * 20000,
], ids=lambda text: repr(text[:20]))
def test_long_completions_take_no_time(text):
    """A completion of 20,000 characters is scored in a moment."""
    start = time.perf_counter()
    verdicts(text, r"\frac{1}{2}")
    assert time.perf_counter() - start < 1


def test_script_reads_one_completion_by_every_rule():
    """`python hendrycks_math.py` prints a line per rule, and only ours finds the example right."""
    run = subprocess.run([sys.executable, "-m", "data.hendrycks_math"], capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    lines = [line.strip() for line in run.stdout.splitlines()[-4:]]
    assert [line.partition(":")[0] for line in lines] == list(hendrycks_math.RULES)
    assert [re.search(r"\((\w+)\)$", line)[1] for line in lines] == ["correct", "wrong", "wrong", "wrong"]
