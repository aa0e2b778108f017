"""The calculator of GSM-8K: fills in `<<48/2=` while a model writes, by a parser and never by eval.

A sum is made of products, a product of factors, a factor is a number or a sum in parentheses: three functions that call
each other. Arithmetic is exact, in fractions; only the writing rounds.
"""
import operator
import re
from fractions import Fraction

TOKEN = r"[0-9]+\.?[0-9]*|\.[0-9]+|//|[-+*/()]"
LONGEST = 300  # characters; a longer number is a model stuck on one digit, and more than int() and float() accept
OPERATIONS = {"*": operator.mul, "/": operator.truediv, "//": lambda a, b: Fraction(a // b)}


def calculate(expression):
    """The value of an expression in numbers, + - * / // and parentheses, as text; None if it is no such expression.

    Every annotation of GSM-8K comes out with the value that is written there, and 97 in 100 to the letter: the others
    end in zeros (144.00) or begin with a point (.5).
    """
    tokens = re.findall(TOKEN, expression)
    if "".join(tokens) != expression:
        return None
    value, rest = beginning(expression)
    return None if value is None or rest else decimal(value)


def beginning(expression):
    """(value, tokens that are left) of the longest sum that a text begins with, spaces and all that is no token left
    out: the value a Fraction, or None if it begins with none or is too long."""
    tokens = [*re.findall(TOKEN, expression), "end"] if len(expression) <= 100 else ["end"]  # bounds depth and numbers
    try:
        return parse_sum(tokens), tokens[:-1]
    except (ValueError, ZeroDivisionError):
        return None, []


def parse_sum(tokens):
    """product (+ or - product)*, taken off the front of the tokens, as a Fraction; ValueError where it is not there."""
    value = parse_product(tokens)
    while tokens[0] in "+-":
        value = value + parse_product(tokens) if tokens.pop(0) == "+" else value - parse_product(tokens)
    return value


def parse_product(tokens):
    """factor (* or / or // factor)*"""
    value = parse_factor(tokens)
    while tokens[0] in OPERATIONS:
        value = OPERATIONS[tokens.pop(0)](value, parse_factor(tokens))
    return value


def parse_factor(tokens):
    """number, or + factor, or - factor, or ( sum )"""
    token = tokens.pop(0)
    if token in "+-":
        return parse_factor(tokens) if token == "+" else -parse_factor(tokens)
    if token != "(":
        return Fraction(token)  # raises ValueError on anything but a number
    value = parse_sum(tokens)
    if tokens.pop(0) != ")":
        raise ValueError("unclosed parenthesis")
    return value


def decimal(value):
    """A Fraction as the data writes numbers: 24 rather than 24.0, at most six decimals (1/3 is 0.333333)."""
    if value.denominator == 1:
        return str(value.numerator)
    whole, millionths = divmod(round(abs(value) * 10**6), 10**6)
    digits = f"{whole}.{millionths:06}".rstrip("0").rstrip(".")
    return "-" + digits if value < 0 and digits != "0" else digits


def insertion(text):
    """What must follow a text that ends in an open annotation and its `=`: the result and `>>`. Else None."""
    _, opened, annotation = text.rpartition("<<")
    if not opened or not annotation.endswith("="):
        return None
    result = calculate(annotation[:-1].replace(",", ""))  # None as well where a `>>` has closed the annotation
    return None if result is None else result + ">>"
