r"""MATH (Hendrycks et al., arXiv 2103.03874): competition problems in seven subjects and five levels, their scoring.

A solution is LaTeX, and its answer stands in a box: "... so the probability is $\boxed{\frac{1}{2}}$." A prediction is
right if it means the same, which nobody can decide in full: 1/2, .5 and \dfrac12 are one number, x = 5 says 5. Four
rules, three of them other people's, repeated with their flaws to compare with their numbers:

    answer      the last box, else what follows the last "The answer is", else the last $...$; equal as mended below
    is_equiv    the same prediction, equal as in the data set's own code
    harness     lm-evaluation-harness 0.4.13, hendrycks_math: what lies between the first and the last dollar sign, else
                everything, of the text before any "Problem:"; compared as there, which is nearly is_equiv
    metamath    MetaMath, PiSSA and SORSA: what follows the last "The answer is: ", to the end of the sentence; is_equiv

The data set is not shipped: `eval.py --benchmark math --data FILE` reads it, one JSON object per line.
`python -m data.hendrycks_math` shows what each rule reads in one completion.
"""
import re
from fractions import Fraction

from data.calculator import LONGEST
from data.instructions import is_text, read_records

# ---- data -----------------------------------------------------------------------------------------------------------


def load(path):
    """(examples, source) of a .jsonl file (or a .json list) of MATH problems.

    A record has a problem, an answer or a solution with a boxed one, and may have a subject (or type) and a level. In
    MetaMath's own file the two are called instruction and output.
    An example is a dict of question, answer (the gold one, LaTeX), subject and level (text, or None). Raises
    FileNotFoundError for a missing file, ValueError naming the file and the record at fault.
    """
    examples = [example(record, where) for where, record in read_records(path)]
    return examples, f"MATH, {len(examples)} problems, from {path}"


def example(record, where):
    """One record as an example; `where` names it in the ValueError raised when it is none."""
    record = record if isinstance(record, dict) else {}
    problem, solution, answer, level = (record.get(key) for key in ("problem", "solution", "answer", "level"))
    if problem is None and solution is None:
        problem, solution = record.get("instruction"), record.get("output")
    if not is_text(problem):
        raise ValueError(f"{where}: expected a JSON object with a non-empty text under 'problem'")
    answer = str(answer) if type(answer) in (int, float) else answer
    if not is_text(answer):
        answer = last_box(solution) if isinstance(solution, str) else None
    if not is_text(answer):
        raise ValueError(f"{where}: no text under 'answer', and no 'solution' that ends in a \\boxed{{...}} one")
    subject, level = record.get("subject") or record.get("type"), str(level) if type(level) is int else level
    return {"question": problem, "answer": answer, "subject": subject if is_text(subject) else None,
            "level": level.removeprefix("Level ") if is_text(level) else None}


def gold(answer):
    """The text that a completion is held against: for MATH the answer as it is (GSM-8K's is the end of a solution)."""
    return answer


# ---- what a completion answers --------------------------------------------------------------------------------------

def last_box(text):
    r"""What stands in the last \boxed{...} of a text (without one, the last \fbox{...}), braces matched; \boxed 5 ends
    at the next dollar sign. None if there is none, or one that is not closed."""
    start = text.rfind(r"\boxed")
    start = start if start >= 0 else text.rfind(r"\fbox")
    if start < 0:
        return None
    after = text[start:].removeprefix(r"\boxed").removeprefix(r"\fbox")
    rest = after.lstrip()
    if not rest.startswith("{"):
        return rest.partition("$")[0].strip() if after.startswith(" ") else None
    depth = 0
    for end, letter in enumerate(rest):
        depth += {"{": 1, "}": -1}.get(letter, 0)
        if depth == 0:
            return rest[1:end]
    return None


def extract_answer(text):
    """Our prediction: the last box, else what follows the last "The answer is" on its line, else the last $...$."""
    box = last_box(text)
    if box is not None:
        return box
    said = text.rpartition("The answer is")[2] if "The answer is" in text else ""
    said = said.lstrip(": \r\n\t").partition("\n")[0].rstrip().removesuffix(".").rstrip()
    if said:
        return said
    dollars = re.findall(r"\$\$([^$]+)\$\$|\$([^$]+)\$", text.replace(r"\$", ""))
    return "".join(dollars[-1]) if dollars else None


def extract_harness(text):
    """lm-evaluation-harness. Flaws: no box is looked for; there is always an answer, at worst the whole text."""
    text = text.partition("Problem:")[0]
    first, last = text.find("$"), text.rfind("$")
    return text[first + 1:last] if first < last else text


def extract_metamath(text):
    """MetaMath, PiSSA, SORSA. Flaws: needs exactly "The answer is: "; a box alone counts for nothing."""
    _, marker, behind = text.rpartition("The answer is: ")
    return behind.partition(".\n")[0].strip().removesuffix(".").strip() if marker else None


# ---- what is equal --------------------------------------------------------------------------------------------------

def normalise(text):
    """The data set's own normal form of an answer, step by step as its `math_equivalence` has it, flaws included.

    ValueError where that code fails: two units, or \\frac or \\sqrt with nothing behind it but another one.
    """
    for old, new in (("\n", ""), (r"\!", ""), (r"\\", "\\"), ("tfrac", "frac"), ("dfrac", "frac"), (r"\left", ""),
                     (r"\right", ""), (r"^{\circ}", ""), (r"^\circ", ""), (r"\$", "")):
        text = text.replace(old, new)
    if text.count(r"\text{ ") > 1:
        raise ValueError("two units")
    text = text.partition(r"\text{ ")[0]  # a unit
    for old, new in ((r"\%", ""), (" .", " 0."), ("{.", "{0.")):
        text = text.replace(old, new)
    if text.startswith("."):
        text = "0" + text
    left, equals, right = text.partition("=")
    if equals and "=" not in right and len(left) <= 2:  # x = 5
        text = right
    if re.search(r"\\sqrt(\\sqrt|\Z)", text):
        raise ValueError("a root of nothing")
    text = re.sub(r"\\sqrt([^{])", r"\\sqrt{\1}", text).replace(" ", "")
    text = brace_fractions(text)
    text = r"\frac{1}{2}" if text == "0.5" else text
    simple = re.fullmatch(r"(0|-?[1-9]\d*)/(0|-?[1-9]\d*)", text, re.ASCII)
    return rf"\frac{{{simple[1]}}}{{{simple[2]}}}" if simple else text


def brace_fractions(text):
    r"""\frac12 and \frac1{72} with braces around both arguments. As the original has it: all the text stays unchanged
    if a \frac has a single character behind it, and it is a ValueError if one has none."""
    done, *parts = text.split(r"\frac")
    for part in parts:
        if not part:
            raise ValueError("a fraction of nothing")
        if not part.startswith("{"):
            if len(part) == 1:
                return text
            part = f"{{{part[0]}}}" + (part[1:] if part[1] == "{" else f"{{{part[1]}}}{part[2:]}")
        done += r"\frac" + part
    return done


WHOLE = r"\s*[-+]?\d+(?:_\d+)*\s*"  # what Python reads as an int


def normalise_harness(text):
    """The normal form of lm-evaluation-harness: the data set's, less that a single slash must divide whole numbers: its
    code fails at a/b."""
    text = normalise(text)
    if text.count("/") == 1 and not re.fullmatch(rf"{WHOLE}/{WHOLE}", text):
        raise ValueError("not a quotient of whole numbers")
    return text


def is_equiv(prediction, answer, form=normalise):
    """The data set's own comparison: equal normal forms; equal texts where there is none. None equals nothing."""
    if prediction is None:
        return False
    try:
        return form(prediction) == form(answer)
    except ValueError:
        return prediction == answer


def is_equiv_harness(prediction, answer):
    """The same with the normal form of lm-evaluation-harness."""
    return is_equiv(prediction, answer, normalise_harness)


GROUP = r"\{(?:[^{}]|\{[^{}]*\})*\}"  # braces, with braces in them at most once
TERM = rf"((?:\\?\w|{GROUP})+)"  # 3\sqrt{2}, say


def mend(text):
    r"""A normal form that also knows what `normalise` misses: $5$, \text{A}, 5\mbox{ cm}, 50%, \frac{72}1, 3\pi/2."""
    if len(text) > LONGEST:
        return text
    for old, new in ((r"\$", ""), ("$", ""), (r"\%", ""), ("%", ""), (r"\(", ""), (r"\)", ""), (r"\[", ""), (r"\]", ""),
                     ("{,}", ","), (r"\,", ""), ("\\ ", " "), (r"\mbox", r"\text"), (r"\cfrac", r"\frac")):
        text = text.replace(old, new)
    text = text.strip().rstrip(". ")
    text = re.sub(r"(?<=.)\\text *\{ .*", "", text, flags=re.DOTALL)  # 5\text{ cm}, but not \text{ Monday} alone
    text = re.sub(r"\\(?:text(?:bf|it|rm|normal)?|mathrm|mathbf) *\{([^{}]*)\}", r"\1", text)  # \text{A}
    text = re.sub(rf"(frac *{GROUP} *)(\\[a-zA-Z]+|[^{{}}\\\s])", r"\1{\2}", text)  # \frac{72}1
    text = re.sub(r"(?<![\d}])\.(?=\d)", "0.", text)  # -.5
    try:
        text = normalise(text)
    except ValueError:
        pass
    if r"\begin" in text:  # a matrix: its rows end in backslashes, as commands begin
        return text
    return re.sub(rf"(?<![\^_\w\\}}.]){TERM}/{TERM}", r"\\frac{\1}{\2}", text)  # 3\pi/2, but not in 2^3/4


def number(text):
    r"""The value of a plain number (1,000 or -0.25) or a simple fraction (-\frac{3}{4}) in normal form, else None."""
    if len(text) > LONGEST:  # int() would refuse it
        return None
    match = re.fullmatch(r"([-+]?)((?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?)", text, re.ASCII)
    if match:
        return Fraction(match[1] + match[2].replace(",", ""))
    match = re.fullmatch(r"([-+]?)\\frac\{(-?\d+)\}\{(-?\d+)\}", text, re.ASCII)
    return Fraction(int(match[1] + "1") * int(match[2]), int(match[3])) if match and int(match[3]) else None


def equal(prediction, answer):
    """Our comparison: as `is_equiv`, or equal in the mended form, as texts or as numbers. Nothing equals nothing."""
    if prediction is None or not prediction.strip():
        return False
    ours, theirs = mend(prediction), mend(answer)
    value = number(ours)
    return is_equiv(prediction, answer) or ours == theirs or value is not None and value == number(theirs)


RULES = {"answer": (extract_answer, equal), "is_equiv": (extract_answer, is_equiv),
         "harness": (extract_harness, is_equiv_harness), "metamath": (extract_metamath, is_equiv)}


def score(completion, answer):
    """{rule: {"extracted": text or None, "correct": bool}} for a completion and the answer that is right."""
    found = {rule: extract(completion) for rule, (extract, _) in RULES.items()}
    return {rule: {"extracted": found[rule], "correct": same(found[rule], answer)}
            for rule, (_, same) in RULES.items()}


if __name__ == "__main__":
    completion = r"Two of the eight draws win. The probability is $\frac28$. The answer is: 2/8"
    print(rf"What each rule reads in {completion!r} where \frac{{1}}{{4}} is right:")
    for rule, result in score(completion, r"\frac{1}{4}").items():
        print(f"{rule:>8}: {result['extracted']} ({'correct' if result['correct'] else 'wrong'})")
