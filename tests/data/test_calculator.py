"""The calculator, against Python's own grammar and numbers, and against the annotations of the data."""
import ast
import decimal
import operator
import random
import re
from fractions import Fraction

import pytest

from data import gsm8k
from data.calculator import calculate, decimal as written, insertion
from tests.data.texts import CASES, assert_linear, random_garbage

# ---- expressions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("expression, expected", [
    ("48/2", "24"), ("12/60", "0.2"), (".5", "0.5"), ("5.", "5"), ("0.1+0.2", "0.3"), ("007", "7"), ("--3", "3"), ("2*-3", "-6"),
    ("2+3*4", "14"), ("(2+3)*4", "20"), ("10-2-3", "5"), ("24/4/2", "3"), ("2-(3-(4-5))", "-2"), ("7//2", "3"), ("-7//2", "-4"),
    ("9/2//2*3", "6"), ("-0", "0"), ("1/3", "0.333333"), ("-2/3", "-0.666667"), ("1/3*3", "1"), ("1/1000000", "0.000001"),
    ("-1/10000000", "0"), ("99999.9999999", "100000"), ("9" * 49 + "*" + "9" * 49, str((10**49 - 1) ** 2)),
    ("(" * 49 + "1" + ")" * 49, "1"), ("-" * 98 + "1", "1"), ("1,000", None),  # the comma goes in `insertion`
])
def test_calculate(expression, expected):
    """Values as the data writes them: whole where they are whole, at most six decimals."""
    assert calculate(expression) == expected


@pytest.mark.parametrize("text", [
    "", "()", "2+", "*2", "2(3)", "(2", "2)", "2 3", "2 + 3", "1.2.3", ".", "5..", "3=3", "$5", "end", "2\n", "1+\n1", "1\0+1",
    "1/0", "1/(2-2)", "7//0", "2**3", "9**9**9", "7///2", "7/ /2", "7%2", "1>>1", "~1", "1e9", "0xff", "1j", "1_000", "nan", "-Infinity",
    "\u0663+1", "\uff11+\uff11", "2\u00b2", "\ud800", "two plus two", "abs(3)", "__import__('os').system('exit')", "(1).__class__",
    "[1for(x)in(1,2)]", "(lambda:1)()", "{0.__class__}",
    "1+" * 60 + "1", "(" * 10**4, "(" * 10**4 + "1" + ")" * 10**4, "-" * 10**6 + "1", "9" * 10**6, "." + "9" * 10**6, "9**" * 30 + "9",
], ids=lambda text: ascii(text[:20]))
def test_what_is_no_short_plain_arithmetic_has_no_value(text):
    """Code, names, powers, divisions by zero, digits of other scripts, and what is longer than 100 characters: None, no exception."""
    assert calculate(text) is None and insertion(f"<<{text}=") is None and insertion(text) is None


OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
             ast.FloorDiv: lambda a, b: Fraction(a // b), ast.UAdd: operator.pos, ast.USub: operator.neg}


def python_value(text):
    """The value that Python's grammar gives an expression, in fractions: SyntaxError where it is no plain arithmetic,
    ZeroDivisionError where it has none."""
    text = re.sub(r"(?<![\d.])0+(?=\d)", "", text)  # 007, which Python refuses
    if " " in text:  # which the calculator refuses
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


def random_expression(rng, depth=4):
    """An expression with all operators, signs, decimals and parentheses, as text."""
    kind = rng.random() if depth else 0
    if kind < 0.3:
        whole, digits = rng.randrange(10 ** rng.randrange(1, 7)), rng.randrange(1000)
        return rng.choice([f"{whole}", f"{whole}.{digits}", f".{digits}", f"{whole}.", f"0{whole}"])
    if kind < 0.4:
        return rng.choice("+-") + random_expression(rng, depth - 1)
    if kind < 0.6:
        return f"({random_expression(rng, depth - 1)})"
    return random_expression(rng, depth - 1) + rng.choice(["+", "-", "*", "/", "//"]) + random_expression(rng, depth - 1)


def random_signs(rng):
    """A string of digits, operators and parentheses, which may be an expression."""
    return "".join(rng.choices("0123456789+-*/(). ", [3] * 10 + [4, 4, 3, 3, 4, 4, 2, 0.3], k=rng.randrange(12)))


@CASES
@pytest.mark.parametrize("draw", [random_expression, random_signs])
def test_expressions_have_pythons_value(draw, cases):
    """Random expressions, and strings that are mostly none, have the value that Python's grammar and fractions give, or None."""
    rng, valued = random.Random(0), 0
    for text in (draw(rng) for _ in range(cases)):
        try:
            expected = python_value(text)
        except (SyntaxError, ZeroDivisionError):
            expected = None
        if len(text) <= 100:
            assert calculate(text) == (expected if expected is None else written(expected)), text
            valued += expected is not None
    assert valued > cases // 50


def test_numbers_are_written_as_the_decimal_module_writes_them():
    """Rounded half to even at six decimals, without zeros at the end."""
    rng = random.Random(1)
    for _ in range(1000):
        value = Fraction(rng.randrange(-10**9, 10**9), rng.choice([1, 2, 3, 7, 8, 10**6, 2 * 10**6, 10**8]))
        rounded = (decimal.Decimal(value.numerator) / value.denominator).quantize(decimal.Decimal("0.000001"))
        assert written(value) == re.sub(r"^-0$", "0", f"{rounded:f}".rstrip("0").rstrip(".")), value


# ---- annotations ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("split, total, same_text", [("train", 23716, 23049), ("test", 4282, 4126)])
def test_annotations_of_the_data_are_reproduced(gsm8k_data, split, total, same_text):
    """All annotations have the value the data gives them, and 97 in 100 the same text. The other texts have an idle zero
    at the end or none before the point; one is a fraction."""
    answers = [example["answer"] for example in gsm8k.load(gsm8k_data, split)[0]]
    annotations = [found for answer in answers for found in re.findall("<<(.*?)=(.*?)>>", answer)]
    results = [(calculate(expression), text) for expression, text in annotations]
    assert len(results) == total
    assert all(Fraction(result) == Fraction(text) for result, text in results)
    assert sum(result == text for result, text in results) == same_text
    odd = [text for result, text in results if result != text and not re.fullmatch(r"\d*\.\d*0|\.\d+", text)]
    assert odd == (["3/4"] if split == "test" else [])


@pytest.mark.parametrize("text, expected", [
    ("sold 48/2 = <<48/2=", "24>>"), ("<<1+1=2>>2 and <<2*3=", "6>>"), ("<<1,000*2=", "2000>>"), ("<<5-8=", "-3>>"),
    ("<<48/2=24", None), ("<<48/2=24>>24 =", None), ("48/2=", None), ("<<48/2", None), ("<<=", None), ("<<3=3=", None), ("=", None),
])
def test_insertion(text, expected):
    """A result is inserted behind the = of an open annotation, and nowhere else."""
    assert insertion(text) == expected


@CASES
def test_the_calculator_takes_any_text(cases):
    """Random characters of every kind neither raise nor are worth anything but a number that Fraction reads."""
    rng = random.Random(3)
    for _ in range(cases // 4):
        garbage = random_garbage(rng)
        for text in (calculate(garbage), insertion(garbage)):
            assert text is None or re.fullmatch(r"-?[0-9]+(\.[0-9]{1,6})?(>>)?", text), garbage


@pytest.mark.long
def test_endless_texts_take_a_second():
    """The calculator reads in linear time."""
    assert_linear(calculate, insertion)
