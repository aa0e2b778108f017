"""What the tests of data share: files of records, what a file prints, random texts for the calculator and the rules of scoring."""
import itertools
import json
import os
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import pytest

CASES = pytest.mark.parametrize("cases", [1000, pytest.param(200_000, marks=pytest.mark.long)])


def write_records(path, *records):
    """The records as a .jsonl file or, by its name, as a JSON list. Returns the path."""
    lines = [json.dumps(record) for record in records]
    text = "".join(line + "\n" for line in lines) if path.suffix == ".jsonl" else "[" + ",\n".join(lines) + "]"
    path.write_text(text, encoding="utf-8")
    return path


def fault(load, path, kind=ValueError):
    """What load(path) says is wrong, in one line that begins with the path; the path is left out."""
    with pytest.raises(kind) as error:
        load(path)
    message = str(error.value)
    assert message.startswith(f"{path}:") and "\n" not in message
    return message.removeprefix(str(path))


def shown(module, **environment):
    """What `python -m MODULE` prints."""
    done = subprocess.run([sys.executable, "-m", module], cwd=Path(__file__).parents[2], env={**os.environ, **environment},
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


# ---- random texts ---------------------------------------------------------------------------------------------------

WORDS = ("so", "He", "pays", "\u00e9t\u00e9", "the", "cost", "is", "\u4e00\u5171", "apples", "=", "(that", "left)", "\u20ac", "\U0001f34e",
         "%", "**sum**", "#", "##", "answer", "\n", "answer:", "-", "x", "per")
PIECES = ("####", "#### ", "The answer is", "The answer is: ", "<<", ">>", "\\boxed{", "\\fbox{", "\\frac", "\\dfrac", "\\sqrt", "{", "}",
          "$", "\\[", "\\]", ",", ".", "/", "-", "+", "(", ")", "*", "=", "%", "\n", " ", "0", "1", "23", "456", "7,890", "\\text{ ",
          "\\text{", "\\mbox{", "\\left", "\\!", "^\\circ", "\\", "_", "\u0663", "\uff11", "\u00b2", "\u2212", "\0", "\ud800")


def random_words(rng, most=8):
    """Words and signs without any digit, each with a space behind it."""
    return "".join(rng.choice(WORDS) + " " for _ in range(rng.randrange(most)))


def random_garbage(rng, most=60):
    """Characters of every kind: what the rules look for, digits of all scripts, anything else."""
    return "".join(rng.choice(PIECES) if rng.random() < 0.8 else chr(rng.randrange(0x110000)) for _ in range(rng.randrange(most)))


def random_number(rng, commas=True, dollar=True):
    """(text, Fraction): a number as people write it, with sign, thousands separators, dollar sign, decimals."""
    whole, places = rng.randrange(10 ** rng.randrange(1, 10)), rng.choice([0, 0, rng.randrange(5)])
    tail = f".{rng.randrange(10**places):0{places}}" if places else ""
    text = f"{whole:,}" if commas and rng.random() < 0.5 else f"{whole}"
    if tail and rng.random() < 0.2:
        whole, text = 0, ""
    value = Fraction(f"{whole}{tail}")
    sign, money = rng.choice(["", "", "-"]), "$" if dollar and rng.random() < 0.3 else ""
    return (sign + money if rng.random() < 0.8 else money + sign) + text + tail, -value if sign else value


# ---- endless texts --------------------------------------------------------------------------------------------------

STARTS = ("", "#### ", "The answer is: 1", "\\[", "a")
REPEATED = ("1", "#", "#### ", "#### 1", "1,111", ",111", "1.", "-", "$", "$a", "$$a$$", "\\[", "\\]", "\\boxed{", "\\frac", "\\frac{}",
            "\\frac1", "\\sqrt", "{", "{a", "{a}", "}", " ", "1/", "1 / ", "a/", "The answer is: ", "<<", ">>", "\\text{ ", "=", "\u0663",
            "\n", "a")


def assert_linear(*rules):
    """Each rule reads a million characters that repeat anything that a rule looks for in a second of its process's time."""
    for start, repeated, end in itertools.product(STARTS, REPEATED, ("", "x")):
        text = start + repeated * (10**6 // len(repeated)) + end
        for number, rule in enumerate(rules):
            before = time.process_time()
            rule(text)
            assert time.process_time() - before < 1, (number, start, repeated, end)
