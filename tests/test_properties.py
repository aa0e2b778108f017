"""Random and hostile texts for the calculator and the rules of scoring, held against Python's own grammar and numbers.

A short version runs with every test; the long one is `pytest -m long tests/test_properties.py`.
"""
import contextlib
import ast
import decimal
import operator
import random
import re
import time
from fractions import Fraction

import pytest

import eval as evaluation
from data import gsm8k, hendrycks_math
from data.calculator import calculate, insertion

LONG = pytest.mark.long
CASES = pytest.mark.parametrize("cases", [2000, pytest.param(200_000, marks=LONG)])
OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
             ast.FloorDiv: lambda a, b: Fraction(a // b), ast.UAdd: operator.pos, ast.USub: operator.neg}


# ---- what the texts are held against --------------------------------------------------------------------------------

def python_value(text):
    """The value that Python's grammar gives an expression, in fractions: SyntaxError where it is no plain arithmetic,
    ZeroDivisionError where it has none."""
    text = re.sub(r"(?<![\d.])0+(?=\d)", "", text)  # 007, which Python refuses
    if text[:1].isspace():  # which Python takes for an indent, or strips
        raise SyntaxError(text)

    def value(node):
        if isinstance(node, ast.Constant) and node.value is not ...:
            return Fraction(text[node.col_offset:node.end_col_offset])
        if isinstance(node, ast.UnaryOp) and type(node.op) in OPERATORS:
            return OPERATORS[type(node.op)](value(node.operand))
        if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
            return OPERATORS[type(node.op)](value(node.left), value(node.right))
        raise SyntaxError(text)

    return value(ast.parse(text, mode="eval").body)


def written(value):
    """A Fraction as the decimal module writes it with at most six decimals."""
    with decimal.localcontext(decimal.Context(prec=600)):
        number = (decimal.Decimal(value.numerator) / value.denominator).quantize(decimal.Decimal("0.000001"))
    text = f"{number:f}".rstrip("0").rstrip(".")
    return "0" if text == "-0" else text


def random_expression(rng, depth):
    """An expression with all operators, signs, decimals and parentheses, as text."""
    kind = rng.random() if depth else 0
    if kind < 0.3:
        whole, digits = rng.randrange(10 ** rng.randrange(1, 7)), rng.randrange(1000)
        return rng.choice([f"{whole}", f"{whole}.{digits}", f".{digits}", f"{whole}.", f"0{whole}"])
    if kind < 0.4:
        return rng.choice("+-") + random_expression(rng, depth - 1)
    if kind < 0.6:
        return f"({random_expression(rng, depth - 1)})"
    sign = rng.choice(["+", "-", "*", "/", "//"])
    return random_expression(rng, depth - 1) + sign + random_expression(rng, depth - 1)


# ---- the calculator -------------------------------------------------------------------------------------------------

@CASES
def test_expressions_have_pythons_value(cases):
    """Random expressions come out as Python's own grammar, fractions and decimals have them, to the letter."""
    rng, counted = random.Random(0), 0
    while counted < cases:
        text = random_expression(rng, 4)
        if len(text) > 100:
            continue
        try:
            expected = written(python_value(text))
        except ZeroDivisionError:
            expected = None
        assert calculate(text) == expected, text
        counted += 1


@CASES
def test_only_what_python_would_parse_is_calculated(cases):
    """Random strings of digits, signs and parentheses have a value just where Python finds plain arithmetic in them."""
    rng, valued = random.Random(1), 0
    for _ in range(cases):
        text = "".join(rng.choices("0123456789+-*/(). ", [3] * 10 + [4, 4, 3, 3, 4, 4, 2, 0.3], k=rng.randrange(12)))
        try:
            expected = written(python_value(text))
        except (SyntaxError, ZeroDivisionError):
            expected = None
        expected = None if " " in text else expected
        assert calculate(text) == expected, text
        valued += expected is not None
    assert cases // 50 < valued < cases // 2


@CASES
def test_an_open_annotation_is_filled_in(cases):
    """Behind any text an open annotation gets its value, thousands separators or not; a closed one gets nothing."""
    rng = random.Random(2)
    for _ in range(cases):
        a, b, sign = rng.randrange(10**rng.randrange(1, 9)), rng.randrange(1, 10**5), rng.choice("+-*/")
        value = python_value(f"{a}{sign}{b}")
        before = random_words(rng) + rng.choice(["", "<<1+1=2>>2 ", "$", "<< "])
        text = f"{before}<<{a:,}{sign}{b:,}="
        assert insertion(text) == written(value) + ">>", text
        assert insertion(text + written(value) + ">>") is None and insertion(text + "\n") is None


HOSTILE = {
    "power": "9**9**9", "power of powers": "9**" * 30 + "9", "digits": "9" * 10**6, "decimals": "." + "9" * 10**6,
    "open": "(" * 10**4, "nested": "(" * 10**4 + "1" + ")" * 10**4, "signs": "-" * 10**6 + "1",
    "sum": "1+" * 10**5 + "1",
    "call": "print(1)", "import": "__import__('os').system('exit')", "attribute": "(1).__class__", "name": "x",
    "comprehension": "[1for(x)in(1,2)]", "lambda": "(lambda:1)()", "not a number": "nan", "infinite": "inf",
    "infinity": "-Infinity", "exponent": "1e9", "complex": "1j", "hexadecimal": "0xff", "underscore": "1_000",
    "shift": "1>>1", "not": "~1", "percent": "7%2", "by nothing": "1/0", "by no whole": "1//(1-1)",
    "format": "{0.__class__}", "null": "1\0+1", "wide digits": "\uff11+\uff11", "superscript": "2\u00b2",
    "surrogate": "\ud800", "newline": "1+\n1", "text": "two plus two",
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_what_is_no_short_arithmetic_is_refused_at_once(text):
    """Code, names, powers, endless numbers and divisions by zero have no value, no side effect, and take no time."""
    start = time.perf_counter()
    assert calculate(text) is None and insertion(f"<<{text}=") is None and insertion(text) is None
    assert time.perf_counter() - start < 0.5


@CASES
def test_the_calculator_takes_any_text(cases):
    """Random characters of every kind neither raise nor are worth anything but a number that Fraction reads."""
    rng = random.Random(3)
    for _ in range(cases // 4):
        garbage = random_garbage(rng)
        for text in (calculate(garbage), insertion(garbage)):
            assert text is None or re.fullmatch(r"-?[0-9]+(\.[0-9]{1,6})?(>>)?", text), garbage


# ---- texts with a number in them ------------------------------------------------------------------------------------

WORDS = ("so", "He", "pays", "\u00e9t\u00e9", "the", "cost", "is", "total", "\u4e00\u5171", "apples", "=", "(that",
         "left)", "and", "dollars", "a", "b", "\u20ac", "\U0001f34e", "%", "**sum**", "#", "##", "answer", "\n",
         "answer:", "-", "x", "per")


def random_words(rng, most=8):
    """Words and signs without any digit, each with a space behind it."""
    return "".join(rng.choice(WORDS) + " " for _ in range(rng.randrange(most)))


def random_garbage(rng, most=60):
    """Characters of every kind: signs that the rules look for, digits of all scripts, anything else."""
    pieces = ["####", "#### ", "The answer is", "The answer is: ", "<<", ">>", "\\boxed{", "\\frac", "\\sqrt", "{", "}",
              "$", "\\[", "\\]", ",", ".", "/", "-", "+", "(", ")", "*", "=", "%", "\n", " ", "0", "1", "23", "456",
              "7,890", "\\text{ ", "\\left", "\\!", "^\\circ", "\\", "_", "\u0663", "\uff11", "\u00b2", "\u2212", "\0",
              "\ud800"]
    return "".join(rng.choice(pieces) if rng.random() < 0.8 else chr(rng.randrange(0x110000))
                   for _ in range(rng.randrange(most)))


def random_number(rng, commas=True, dollar=True, decimals=4):
    """(text, Fraction): a number as people write it, with sign, thousands separators, dollar sign, decimals."""
    whole, places = rng.randrange(10 ** rng.randrange(1, 10)), rng.choice([0, 0, rng.randrange(decimals + 1)])
    tail = f".{rng.randrange(10**places):0{places}}" if places else ""
    text = f"{whole:,}" if commas and rng.random() < 0.5 else f"{whole}"
    if tail and rng.random() < 0.2:
        whole, text = 0, ""
    value = Fraction(f"{whole}{tail}")
    sign = rng.choice(["", "", "-"])
    money = "$" if dollar and rng.random() < 0.3 else ""
    return (sign + money if rng.random() < 0.8 else money + sign) + text + tail, -value if sign else value


END = ("", ".", "!", ",", ")", "%", " dollars", ".\n", "**", " %", "}", ";", "?", "\n", ".)", " .")


def with_numbers(rng):
    """Words with other numbers between them."""
    return "".join(random_words(rng, 4) + (random_number(rng)[0] + " " if rng.random() < 0.5 else "") for _ in range(3))


def marked_text(rng):
    """(text, Fraction): one number that answers, put where the first rule of scoring looks for it."""
    text, value = random_number(rng)
    place = rng.choice(["####", "The answer is", "last"])
    if place != "last" and rng.random() < 0.2:
        a, b = rng.randrange(10**6), rng.randrange(1, 1000)
        text, value = f"{a}{rng.choice(['/', ' / ', '/ '])}{b}", Fraction(a, b)
    before, end, start = with_numbers(rng), rng.choice(END), rng.choice([" ", ": ", " = ", " **", " (", "  "])
    if place == "last":
        if re.match(r"[0-9]{4}", text) and rng.random() < 0.3:
            start = " 1,"  # no thousands separator in front of four digits
        elif value >= 0 and "-" not in text and rng.random() < 0.3:
            start = rng.choice([" 7-", " x-", " (7)-"])  # no sign behind a term
        return f"{before}{start}{text}{end} {random_words(rng)}", value
    if place == "####":
        before += rng.choice(["", "#### 7 ", "The answer is 7. ", "\n"])
        line = random_words(rng, 3).replace("\n", "") + (start if rng.random() < 0.5 else " ")
        after = rng.choice(["", "\n" + with_numbers(rng), "\nThe answer is 7."])
        return f"{before}####{line}{text}{end}{after}", value
    before += rng.choice(["", "#### none\n7 of them. ", "The answer is 7. "])
    return f"{before}The answer is{start}{text}{end} {with_numbers(rng)}", value


def gold_of(rng, value):
    """(a dataset answer, its Fraction): the value itself in some way of writing it, or another one."""
    value = value if rng.random() < 0.5 else value + rng.choice([1, -1, Fraction(1, 100), 10**6])
    if written(value) != str(value) and Fraction(written(value)) != value:
        value = Fraction(round(value))
    text = written(value)
    whole, dot, tail = text.lstrip("-").partition(".")
    whole = f"{int(whole):,}" if rng.random() < 0.5 else whole
    zeros = rng.choice(["", "0", "00"]) if dot else rng.choice(["", ".0", ".00"])
    return f"{random_words(rng)}\n#### {'-' * text.startswith('-')}{whole}{dot}{tail}{zeros}", value


@CASES
def test_our_rule_reads_the_number_that_was_put_in(cases):
    """Behind `####`, behind "The answer is", or last of all: the number put into a random text is read, and right
    exactly where its Fraction equals that of the answer."""
    rng, right = random.Random(4), 0
    for _ in range(cases):
        text, value = marked_text(rng)
        assert gsm8k.extract_answer(text) == value, text
        answer, expected = gold_of(rng, value)
        result = gsm8k.score(text, answer)["answer"]
        assert result == {"extracted": written(value), "correct": value == expected}, (text, answer)
        right += result["correct"]
    assert cases // 4 < right < 3 * cases // 4


@CASES
def test_the_rules_of_others_read_the_number_where_they_look_for_it(cases):
    """First `#### x`, last number, and the one behind the last "The answer is: ", in texts that their flaws spare."""
    rng = random.Random(5)
    for _ in range(cases):
        (text, value), end = random_number(rng, dollar=False), rng.choice([".", ",", " dollars", "\n", "", ")", "!"])
        answer, _ = gold_of(rng, value)
        gold = gsm8k.gold(answer)
        strict = f"{with_numbers(rng)}#### {text}{end} {rng.choice(['', '#### 7'])}"
        last = f"{with_numbers(rng)} {text}{end} {random_words(rng)}"
        for rule, completion in (("strict", strict), ("flexible", last)):
            result = gsm8k.score(completion, answer)[rule]
            assert result["extracted"] == text.replace(",", "") and Fraction(result["extracted"]) == value, completion
            assert result["correct"] == (text.replace(",", "") == gold)
        text, value = random_number(rng, commas=False, dollar=False)
        between = random_words(rng, 2).replace("-", "")
        said = f"{with_numbers(rng)}The answer is: {between}{text}{end} {with_numbers(rng)}"
        result = gsm8k.score(said, answer)["metamath"]
        assert result == {"extracted": str(round(value)), "correct": round(value) == Fraction(gold)}, said


@CASES
def test_a_text_without_a_number_answers_nothing(cases):
    """No rule finds a number where there is no digit, and none counts that as right."""
    rng = random.Random(6)
    for _ in range(cases):
        sign = rng.choice(["", "####", "The answer is: ", "#### ", "$", "-"])
        words = random_words(rng) + sign + random_words(rng)
        results = gsm8k.score(words, f"#### {rng.choice(['0', '7', '-1'])}")
        assert all(result == {"extracted": None, "correct": False} for result in results.values()), words


def latex(rng, value):
    """A Fraction in one of the ways in which solutions write it."""
    sign, size = "-" * (value < 0), abs(value)
    ways = []
    if size.denominator == 1:
        ways += [f"{sign}{size}", f"{sign}{size.numerator:,}", f"{sign}{size.numerator:,}".replace(",", "{,}"),
                 f"{sign}{size}.0", f"{sign}\\${size}", f"{sign}{size}\\%", f"{sign}{size}^\\circ",
                 f"x = {sign}{size}", f"{sign}{size}.",
                 f"{sign}{size}\\text{{ apples}}", f"\\text{{{sign}{size}}}", f"{sign}{size}\\,\\mbox{{ cm}}"]
    if Fraction(written(value)) == value:
        text = written(value)
        ways += [text, re.sub(r"^(-?)0\.", r"\1.", text), f"${text}$", f"k={text}"]
    n = rng.randrange(1, 5)
    top, bottom = n * size.numerator, n * size.denominator
    ways += [f"{sign}\\frac{{{top}}}{{{bottom}}}", f"\\dfrac{{{sign}{top}}}{{{bottom}}}",
             f"{sign}\\tfrac{{{top}}}{{{bottom}}}", f"{sign}{top}/{bottom}", f"{sign}{top} / {bottom}",
             f"\\left{sign}\\frac{{{top}}}{{{bottom}}}\\right"]
    return rng.choice(ways)


@CASES
def test_math_answers_are_equal_where_their_fractions_are(cases):
    """A number in one LaTeX dress, boxed, said or in dollars, is right against another dress exactly if both are one
    number; the other comparison is never right about two different numbers."""
    rng, right = random.Random(7), 0
    for _ in range(cases // 2):
        numerator = rng.randrange(-10**rng.randrange(1, 6), 10**rng.randrange(1, 6))
        value = Fraction(numerator, rng.choice([1, 1, 2, 3, 7, 8, 100]))
        other = value if rng.random() < 0.5 else rng.choice([-value, value + 1, 1 / value if value else 1, value * 10])
        text, answer = latex(rng, value), latex(rng, Fraction(other))
        inside = text.replace("$", "") if not text.count("\\$") else text
        completion = random_words(rng) + rng.choice([
            f"\\boxed{{{text}}}.", f"\\boxed{{7}} or \\boxed{{{text}}}, {random_words(rng)}", f"The answer is: {text}",
            f"The answer is {text}.\n{random_words(rng)}", f"it is ${inside}$."])
        scores = hendrycks_math.score(completion, answer)
        assert scores["answer"]["correct"] == (value == other), (completion, answer)
        assert value == other or not any(score["correct"] for score in scores.values()), (completion, answer)
        right += value == other
    assert cases // 8 < right < 3 * cases // 8


@CASES
def test_the_last_box_is_read_whatever_is_in_it(cases):
    """Random LaTeX with balanced braces comes out of the box as it went in."""
    rng = random.Random(8)

    def balanced(depth):
        return "".join(f"{{{balanced(depth - 1)}}}" if depth and rng.random() < 0.3 else rng.choice("ab12$\\+ ")
                       for _ in range(4))

    for _ in range(cases // 2):
        inside = balanced(3)
        end = rng.choice(["", "}", "{", "$"])
        text = f"{random_words(rng)}\\boxed{{7}} {random_words(rng)}\\boxed{{{inside}}} {end}"
        assert hendrycks_math.last_box(text) == inside == hendrycks_math.extract_answer(text), text


# ---- any text at all ------------------------------------------------------------------------------------------------

@CASES
def test_garbage_is_scored_without_an_error(cases):
    """Any string, as completion or as answer, gets a verdict of every rule: text or None, true or false."""
    rng = random.Random(9)
    for _ in range(cases // 4):
        text, other = random_garbage(rng), random_garbage(rng)
        results = [*gsm8k.score(text, "#### 7").values(), *hendrycks_math.score(text, other).values()]
        for result in results:
            assert type(result["correct"]) is bool and type(result["extracted"]) in (str, type(None))


PATTERNS = ("1", "#", "#### ", "#### 1", "1,111", ",111", "1.", "-", "$", "$a", "$$a$$", "\\[", "\\]", "\\boxed{",
            "\\frac", "\\frac1", "\\sqrt", "{", "{a}", "}", " ", "1/", "1 / ", "The answer is: ", "<<", ">>",
            "\\text{ ", "=", "\u0663", "\n", "a")


def read_gold(text):
    with contextlib.suppress(ValueError):
        gsm8k.gold(text)


@pytest.mark.parametrize("size, seconds", [(30_000, 0.2), pytest.param(10**6, 1, marks=LONG)])
@pytest.mark.parametrize("start", ["", "#### ", "The answer is: 1", "\\["])
def test_long_texts_are_scored_in_linear_time(start, size, seconds):
    """A text of a million characters that repeats anything that a rule looks for is scored by all rules in a second."""
    rules = [gsm8k.extract_answer, gsm8k.extract_strict, gsm8k.extract_flexible, gsm8k.extract_metamath,
             read_gold, hendrycks_math.extract_answer, hendrycks_math.extract_harness,
             hendrycks_math.extract_metamath, lambda text: hendrycks_math.is_equiv(text, "5"),
             lambda text: hendrycks_math.equal("5", text), insertion]
    for pattern in PATTERNS:
        text = start + pattern * (size // len(pattern))
        for number, rule in enumerate(rules):
            for hostile in (text, text + "x"):
                before = time.process_time()
                rule(hostile)
                assert time.process_time() - before < seconds, (number, pattern)


@pytest.mark.parametrize("cases", [300, pytest.param(20_000, marks=LONG)])
def test_what_is_mended_is_mended_in_no_time(cases):
    """Texts just short enough to be mended, made of what the patterns of `mend` repeat, take a moment each."""
    rng = random.Random(10)
    for _ in range(cases):
        pieces = rng.choices(["{", "}", "{a}", "\\a", "a", "/", "\\frac", "\\text", " ", "^", "1", ".", "{a/"], k=3)
        text = ("".join(pieces) * 300)[:hendrycks_math.LONGEST]
        before = time.process_time()
        hendrycks_math.mend(text)
        assert time.process_time() - before < 0.5, text


def test_the_summary_counts_what_fractions_say():
    """Accuracy, its standard error and the share without an answer follow from the numbers that were put in."""
    rng, examples, completions, right = random.Random(11), [], [], 0
    for _ in range(500):
        text, value = marked_text(rng)
        answer, expected = gold_of(rng, value)
        silent = rng.random() < 0.1
        right += value == expected and not silent
        examples.append({"question": "?", "answer": answer})
        completions.append({"text": random_words(rng) if silent else text, "finish": "eos", "new_tokens": 3})
    records = evaluation.score_all(gsm8k, examples, completions)
    summary = evaluation.summarise(records)
    share = right / 500
    assert summary["accuracy"]["answer"] == pytest.approx(share) and summary["n"] == 500
    assert summary["standard_error"]["answer"] ** 2 == pytest.approx(share * (1 - share) / 500)
    silent = sum(record["scores"]["answer"]["extracted"] is None for record in records)
    assert summary["no_answer"] == silent / 500 > 0.05
    assert summary["new_tokens"] == 1500
