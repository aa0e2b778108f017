"""GSM-8K: reading the data, the four scoring rules."""
import contextlib
import hashlib
import http.client
import json
import random
import re
import urllib.error
from fractions import Fraction

import pytest

from data import gsm8k, prompting
from data.calculator import decimal as written
from tests.data.texts import CASES, assert_linear, fault, random_garbage, random_number, random_words, shown, write_records

GOOD = {"question": "How many legs have 3 cats?", "answer": "3*4 = <<3*4=12>>12 legs.\n#### 12"}


# ---- data -----------------------------------------------------------------------------------------------------------

def test_folder_is_read_without_blank_lines_and_extra_fields(tmp_path):
    """A folder's file becomes question/answer dicts; blank lines and other fields go; BOM and CRLF are accepted."""
    text = "\ufeff" + json.dumps({**GOOD, "id": 7}) + "\r\n\r\n  \n" + json.dumps(GOOD)
    (tmp_path / "test.jsonl").write_text(text, newline="")
    examples, source = gsm8k.load(str(tmp_path), "test")
    assert examples == [GOOD, GOOD]
    assert "2 problems" in source and str(tmp_path) in source and "not the published GSM-8K" in source


@pytest.mark.parametrize("line, complaint", [
    ('{"question": "a", "answer": ', "not valid JSON"),
    ("[1, 2]", "'question'"),
    ('{"answer": "#### 1"}', "'question'"),
    ('{"question": "\\ud800", "answer": "#### 1"}', "not valid JSON"),  # could not be written to predictions.jsonl
    ('{"question": "a", "answer": 5}', "'answer'"),
    ('{"question": "a", "answer": " \\n "}', "'answer'"),
    ('{"question": "a", "answer": "it is 5"}', "#### number"),
    ('{"question": "a", "answer": "####5"}', "#### number"),
    ('{"question": "a", "answer": "#### 5 apples"}', "#### number"),
    ('{"question": "a", "answer": "#### ' + "1" * 5000 + '"}', "the number behind '####' has more than 300 characters"),
], ids=lambda text: text[:40])
def test_a_bad_line_is_named(tmp_path, line, complaint):
    """Malformed content raises one line with file, line number and fault."""
    path = tmp_path / "train.jsonl"
    path.write_text(json.dumps(GOOD) + f"\n\n{line}\n")
    message = fault(lambda path: gsm8k.load(path.parent, "train"), path)
    assert message.startswith(":3: ") and complaint in message


def test_an_empty_file_is_an_error(tmp_path):
    """A data file with blank lines only is not an empty data set but a mistake."""
    (tmp_path / "train.jsonl").write_text("\n \n")
    with pytest.raises(ValueError, match=r"train\.jsonl: holds no problems"):
        gsm8k.load(tmp_path, "train")


def test_missing_files_folders_and_splits_are_named(tmp_path):
    """A folder without the file, no folder at all and an unknown split each say what was expected."""
    with pytest.raises(FileNotFoundError, match=r"train\.jsonl: .*holds train\.jsonl and test\.jsonl"):
        gsm8k.load(tmp_path, "train")
    with pytest.raises(FileNotFoundError, match="gms8k.*auto, gsm8k, practice"):
        gsm8k.load("gms8k", "train")
    with pytest.raises(ValueError, match="'validation': expected train or test"):
        gsm8k.load("practice", "validation")


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A folder that stands in for the dataset's repository, with a cache that is empty. Returns both folders."""
    folder = tmp_path / "repository"
    folder.mkdir()
    paths = {split: write_records(folder / f"{split}.jsonl", {**GOOD, "question": f"A {split} question?"}) for split in ("train", "test")}
    monkeypatch.setattr(gsm8k, "URL", folder.as_uri() + "/{}.jsonl")
    monkeypatch.setattr(gsm8k, "SHA256", {split: hashlib.sha256(path.read_bytes()).hexdigest() for split, path in paths.items()})
    monkeypatch.setenv("SORSA_CACHE", str(tmp_path / "cache"))
    return folder, tmp_path / "cache" / "gsm8k"


@pytest.mark.parametrize("word", ["gsm8k", "auto"])
def test_download_fills_the_cache_once(repository, word):
    """Both splits are fetched at the first load; afterwards the cache alone is enough. auto stands by what is in it."""
    folder, cache = repository
    examples, source = gsm8k.load(word, "test")
    assert examples[0]["question"] == "A test question?" and source.startswith("GSM-8K test, 1 problems")
    for file in folder.iterdir():
        file.unlink()
    assert gsm8k.load(word, "train")[0][0]["question"] == "A train question?"
    assert sorted(path.name for path in cache.iterdir()) == ["test.jsonl", "train.jsonl"]
    (cache / "train.jsonl").write_text("{")
    with pytest.raises(ValueError, match=r"train\.jsonl is not the published GSM-8K: take it away, and it is downloaded again"):
        gsm8k.load(word, "train")


def test_wrong_content_never_reaches_the_cache(repository):
    """A download with another sha256 (a login page, say) raises and leaves no file behind."""
    folder, cache = repository
    (folder / "train.jsonl").write_text("<html>please log in</html>")
    with pytest.raises(ConnectionError, match="train.jsonl: .*wrong sha256.*--data FOLDER"):
        gsm8k.load("gsm8k", "train")
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize("failure", [urllib.error.URLError("no route"), TimeoutError("timed out"), http.client.IncompleteRead(b"half")])
def test_failed_download_raises_or_falls_back_loudly(repository, monkeypatch, capsys, failure):
    """gsm8k asked for by name raises one line with URL and fix; auto goes on with practice and says so on stderr."""
    timeouts = []

    def fail(url, timeout):
        timeouts.append(timeout)
        raise failure

    monkeypatch.setattr("urllib.request.urlopen", fail)
    with pytest.raises(ConnectionError) as error:
        gsm8k.load("gsm8k", "train")
    assert gsm8k.URL.format("train") in str(error.value) and "--data FOLDER" in str(error.value)
    assert "\n" not in str(error.value) and timeouts == [10]

    examples, source = gsm8k.load("auto", "test")
    assert examples == gsm8k.practice("test") and "not GSM-8K" in source
    assert str(error.value) in capsys.readouterr().err


def test_real_data_has_the_published_size(gsm8k_data):
    """7473 and 1319 problems, 95 without an equation, no question in both, every gold number an integer."""
    train, source = gsm8k.load(gsm8k_data, "train")
    test, _ = gsm8k.load(str(gsm8k_data), "test")
    assert source == f"GSM-8K train, 7473 problems, from {gsm8k_data}" and len(train) == 7473 and len(test) == 1319
    assert sum(gsm8k.equations(example["answer"]) is None for example in train) == 95
    assert not {example["question"] for example in train} & {example["question"] for example in test}
    assert all(re.fullmatch(r"-?\d+", gsm8k.gold(example["answer"])) for example in train + test)


@pytest.mark.parametrize("text, expected", [
    ("3*4 = <<3*4=12>>12 legs", "3*4 = 12 legs"), ("$<<1+1=2>>2 and <<2*2=4>>4", "$2 and 4"),
    ("no annotation, 1 < 2 >> 0", "no annotation, 1 < 2 >> 0"), ("open <<1+1=\n<<1>>2", "open <<1+1=\n2"),
])
def test_strip_annotations(text, expected):
    """Annotations go, what they stand beside stays."""
    assert gsm8k.strip_annotations(text) == expected


@pytest.mark.parametrize("answer, expected", [
    ("He sold 48/2 = <<48/2=24>>24 clips.\nIn all 48+24 = <<48+24=72>>72.\n#### 72", "<<48/2=24>> <<48+24=72>>\n#### 72"),
    ("$<<1+1=2>>2 and <<2*500=1,000>>1000.\n#### 1,000", "<<1+1=2>> <<2*500=1,000>>\n#### 1,000"),
    ("#### 2 first: <<1+1=2>>2\n#### <<2>>-4 \n", "<<1+1=2>>\n#### <<2>>-4 \n"),  # all behind the last mark, exactly
    ("<<1+<<1+1=2>>2=3>> <<>> <<=4>> <<4=>> <<4>> <4=4>\n#### 3", "<<1+1=2>>\n#### 3"),
    ("open <<1+1=\n2>>2, half <<2+2=4>\n#### 4", None), ("#### <<2*3=6>>6", None),
    ("It is 5.\n#### 5", None), ("<<2+3=5>>5 apples", None), ("cout << a >> b;", None), ("", None)])
def test_equations(answer, expected):
    """The annotations that are whole, in their order, and the end of the answer as it stands; None where either is missing."""
    assert gsm8k.equations(answer) == expected


def test_equations_of_problems():
    """Every annotation of every practice problem is there, and the number that counts is the same."""
    for problem in gsm8k.practice("train", 300):
        line, end = gsm8k.equations(problem["answer"]).split("\n")
        assert line.split() == re.findall("<<[^<]*>>", problem["answer"]) and end == problem["answer"].splitlines()[-1]
        assert gsm8k.score(f"{line}\n{end}", problem["answer"])["answer"]["correct"]


# ---- scoring --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("completion, gold, expected", [
    ("#### 72", 72, ["72", "72", "-", "72"]),
    ("#### 72.", 72, ["72", "72", "-", "72"]),
    ("#### 18.00", 18, ["18.00 wrong", "18.00 wrong", "-", "18"]),
    ("#### $18.00", 18, ["-", "18.00 wrong", "-", "18"]),
    ("####72", 72, ["-", "72", "-", "72"]),
    ("**72**", 72, ["-", "72", "-", "72"]),
    ("#### 1,450,000", 1450000, ["1450000", "1450000", "-", "1450000"]),
    ("The answer is: 1,450,000", 1450000, ["-", "1450000", "1450 wrong", "1450000"]),
    ("The answer is: -$5", -5, ["-", "-5", "5 wrong", "-5"]),
    ("The answer is: 12.5", 12, ["-", "12.5 wrong", "12", "12.5 wrong"]),
    ("The answer is: 6/2", 3, ["-", "2 wrong", "3", "3"]),
    ("The answer is: x = 5 apples, not 3", 5, ["-", "3 wrong", "5", "5"]),
    ("She needs 18 dollars...", 18, ["-", ".. wrong", "-", "18"]),  # the ellipsis, less its final dot
    ("10-5=5", 5, ["-", "5", "-", "5"]),
    ("#### 5\n#### 7", 5, ["5", "7 wrong", "-", "7 wrong"]),
    ("#### 5\nQuestion: 3+4", 5, ["5", "5", "-", "5"]),
    (prompting.truncate("#### 5\nQuestion: 3+4"), 5, ["5", "5", "-", "5"]),
    # further ones
    ("", 5, ["-", "-", "-", "-"]),
    ("#### 5", "1,005", ["5 wrong", "5 wrong", "-", "5 wrong"]),
    ("#### 1005", "1,005", ["1005", "1005", "-", "1005"]),
    ("#### 2.50", "2.5", ["2.50 wrong", "2.50 wrong", "-", "2.5"]),
])
def test_each_rule_reads_as_decided(completion, gold, expected):
    """The table of expected values in the evaluation rules: strict, flexible, metamath, answer; "-" where nothing is found."""
    scores = gsm8k.score(completion, f"Because.\n#### {gold}")
    assert json.loads(json.dumps(scores)) == scores
    words = {rule: "-" if result["extracted"] is None else result["extracted"] + " wrong" * (not result["correct"])
             for rule, result in scores.items()}
    assert [words[rule] for rule in ("strict", "flexible", "metamath", "answer")] == expected
    assert not any(result["correct"] for result in scores.values() if result["extracted"] is None)


@pytest.mark.parametrize("text, expected", [
    # signs, dollars, separators, decimals
    ("#### -$7", -7), ("#### $-7", -7), ("#### - 7", 7), ("#### +7", 7), ("#### $1,234.50", Fraction("1234.5")),
    ("#### .5", Fraction(1, 2)), ("#### 1,45", 1), ("#### 1234,567", 1234), ("#### 1,4500", 1),
    ("#### x7", 7), ("#### (-4)", -4), ("\uff17 apples", 7), ("#### \uff17", 7),
    ("#### \u22125", -5), ("#### -\u20ac5", -5), ("#### \\$5", 5),
    # grouped digits
    ("#### 1 450", 1450), ("#### 1 234 567", 1234567), ("#### 1'234", 1234), ("#### 1\u2019234\u2019567.5", Fraction("1234567.5")),
    ("#### 1_234", 1234), ("#### 12,34,567", 1234567), ("#### 1,23,456.5", Fraction("123456.5")), ("#### 1\u202f234", 1234),
    ("#### 1.234.567", 1234567), ("#### 1.234.567,89", Fraction("1234567.89")), ("#### 1.234,5", Fraction("1234.5")),
    ("#### 1 234,56", Fraction("1234.56")), ("#### 1,234.56", Fraction("1234.56")),
    ("#### 1.234", Fraction("1.234")), ("#### 1{,}450", 1450),
    ("#### 1234 567", 1234), ("#### 12 34 567", 12), ("#### 1 234'567", 1234), ("#### 1 2345", 1), ("#### 1,234,56", 1234),
    # what a line arrives at
    ("#### 5*3=15", 15), ("#### x = 5 + 3 = 8", 8), ("#### 3 - 5 = -2", -2), ("#### 3 - 5 = \u2212 2", -2),
    ("#### x = 5 + 3 = 8 apples, not 3 = 4", 8),
    ("#### 15 = 5*3", 15), ("#### 8 = x", 8), ("#### 5 * 3 =", 15), ("#### 10/3 \u2248 3.33", Fraction("3.33")), ("#### 5 -> 6", 6),
    ("#### 5 \u00d7 3", 15), ("#### 12 -3", 9), ("#### (3)-4", -1), ("#### 2*(3+4)", 14), ("#### -(3+4)*2", -14), ("#### (5 + 3", 8),
    ("#### 5 + apples", 5), ("#### 5 - \n3", 5), ("#### 5 3", 5), ("#### 2 1/2", Fraction(5, 2)), ("#### -2 1/2.", Fraction(-5, 2)),
    ("#### <<5*3=15>>15", 15), ("#### 5*3 = <<5*3=15>>", 15),
    ("#### <<5*3=15>>", 15), ("#### **5*3 = 15**", 15), ("#### 7 (2*3=6, so 7)", 7),
    ("#### 15 since x = 3", 15), ("#### since x = 3", 3), ("#### 5 (x = 3)", 5), ("#### (x = 3)", 3), ("#### f(x) = 3", 3),
    ("#### 20% of 50 = 10%", 10), ("#### 5 m\u00b2 = 5", 5), ("The answer is 5*3=15. 2+2=4", 15), ("The answer is Rs. 500. 7", 500),
    ("5*3=15", 15), ("The answer is:\n 4 + 1 = 5\n6", 5),
    # ratios
    ("#### 1/3", Fraction(1, 3)), ("#### -6 / 4", Fraction(-3, 2)), ("#### 6/0", 6),
    ("#### -6/0", -6), ("#### 1/2/4", Fraction(1, 8)), ("#### 1,000/10", 100), ("6/2", 2),
    # which marker counts
    ("#### **7**, not 8", 7), ("####\t7", 7), ("##### 7", 7), ("#### 5 #### 6", 6), ("so 8\n#### \n7", 7),
    ("The answer is 8.\n#### none\n9", 8), ("#### 5\nThe answer is 6.", 5), ("The answer is:\n5\n6", 5),
    ("The answer is 5. The answer is 6. 7", 6), ("6. The answer is five", 6), ("the answer is 5, not 6", 6),
    # the last number of all
    ("12 -3", -3), ("12-3", 3), ("(2)-3", 3), ("1 450", 1450), ("3 dollars and .25", Fraction(1, 4)), ("1e3", 3), ("costs $5.", 5),
    # nothing
    ("####", None), ("$, - . /", None), ("#### " + "9" * 5000, None), ("#### 1/" + "9" * 5000, None), ("9" * 5000, None),
], ids=lambda value: str(value)[:30])
def test_our_rule(text, expected):
    """extract_answer: signs, separators, ratios, arithmetic, markers, and what it is known not to read."""
    assert gsm8k.extract_answer(text) == expected


@pytest.mark.parametrize("rule, text, expected", [
    ("strict", "#### -7,000.5.", "-7000.5"), ("strict", "####  7", None), ("strict", "#### x7", None), ("strict", "#### +7", None),
    ("strict", "#### 6/2", "6"), ("strict", "#### ,", ""), ("strict", "### 7", None), ("strict", "##### 7", "7"),
    ("flexible", "1 and -7", "-7"), ("flexible", "-$1,000.", "-1000"), ("flexible", "5,", "5"), ("flexible", "10-5", "-5"),
    ("flexible", "a 5 b $$", ""), ("flexible", "5.", "5"), ("flexible", "$", None), ("flexible", "#### 5 (3+4)", "4"),
    # the harness stops at these, inside a line too
    ("strict", "#### 7 Question: #### 8", "7"), ("strict", "Question: #### 7", None), ("strict", "so</s>#### 7", None),
    ("flexible", "7 apples. Question: 8", "7"), ("flexible", "7<|im_end|>8", "7"), ("flexible", "question: 8", "8"),
    ("metamath", "The answer is: 1. The answer is: 7 8", 7), ("metamath", "The answer is 7", None), ("metamath", "The answer is:7", None),
    ("metamath", "the answer is: 7", None), ("metamath", "The answer is: x", None), ("metamath", "The answer is: +7", 7),
    ("metamath", "The answer is: -7.", -7), ("metamath", "The answer is: - 7", 7), ("metamath", "The answer is: .5", 0),
    ("metamath", "The answer is: 1.5", 2), ("metamath", "The answer is: 2.5", 2), ("metamath", "The answer is: $2,500.75", 2500),
    ("metamath", "The answer is: 7/2", 4), ("metamath", "The answer is: 7/0", 7), ("metamath", "The answer is: /5", None),
    ("metamath", "The answer is: " + "9" * 5000, None), ("metamath", "The answer is: 1/" + "9" * 5000, 0),
], ids=lambda value: str(value)[:30])
def test_the_rules_of_others(rule, text, expected):
    """strict and flexible read as the harness, metamath as MetaMath does, rounding half to even; all with their flaws."""
    assert gsm8k.RULES[rule][0](text) == expected


@pytest.mark.parametrize("answer, expected", [
    ("So.\n#### 72", "72"), ("#### 1,450,000", "1450000"), ("#### -47", "-47"), ("#### 2.5", "2.5"), ("#### 7 \n", "7"),
    ("72", None), ("####72", None), ("#### ", None), ("#### many", None), ("#### 7\nor 8", None), ("#### 1.", None), ("", None),
])
def test_gold(answer, expected):
    """gold is the text after the marker without commas; an answer without one raises, whoever scores against it."""
    if expected is not None:
        assert gsm8k.gold(answer) == expected
        return
    for read in (gsm8k.gold, lambda answer: gsm8k.score("#### 7", answer)):
        with pytest.raises(ValueError, match="#### number"):
            read(answer)


def test_real_answers_score_as_right(gsm8k_data):
    """Every test answer, taken as a completion, is right by the three rules that know `#### `; 40 of them are 5."""
    examples = gsm8k.load(gsm8k_data, "test")[0]
    scores = [gsm8k.score(prompting.target(example["answer"]), example["answer"]) for example in examples]
    right = {rule: sum(score[rule]["correct"] for score in scores) for rule in gsm8k.RULES}
    assert right == {"answer": 1319, "strict": 1319, "flexible": 1319, "metamath": 0}
    assert sum(gsm8k.score("#### 5", example["answer"])["answer"]["correct"] for example in examples) == 40


def test_script_reads_one_completion_by_every_rule():
    """`python -m data.gsm8k` prints a line per rule."""
    assert [line.split(":")[0].strip() for line in shown("data.gsm8k").splitlines()[-4:]] == list(gsm8k.RULES)


# ---- random completions ---------------------------------------------------------------------------------------------

END = ("", ".", "!", ",", ")", "%", " dollars", ".\n", "**", " %", "}", ";", "?", "\n", ".)", " .")


def with_numbers(rng):
    """Words with other numbers between them."""
    return "".join(random_words(rng, 4) + (random_number(rng)[0] + " " if rng.random() < 0.5 else "") for _ in range(3))


def marked_text(rng):
    """(text, Fraction): a number or ratio that answers, where our rule looks for it, among words and other numbers."""
    marker, (text, value) = rng.choice(["####", "The answer is", ""]), random_number(rng)
    if marker and rng.random() < 0.2:
        a, b = rng.randrange(10**6), rng.randrange(1, 1000)
        text, value = f"{a}{rng.choice(['/', ' / ', '/ '])}{b}", Fraction(a, b)
    start, end = rng.choice([" ", ": ", " = ", " **", " ("]), rng.choice(END)
    behind = {"####": "\n" + with_numbers(rng), "The answer is": ". " + with_numbers(rng), "": " " + random_words(rng)}[marker]
    return f"{with_numbers(rng)}{marker}{start}{text}{end}{behind}", value


UNITS = ("", " dollars", " apples", "%", " %", " km/h", "\u20ac", " m\u00b2", "kg", "th", " of them")
LEADS = ("", " ", "x = ", "Total: ", " She pays ", "**", "= ", "Answer: x = ", "<<2*3=6>>", "(a) ", "so ", "\\[ ", "f(n) = ")
ENDS = ("", ".", "!", " .", "**", " (as 2 + 2 = 4)", " because 9 = 3*3", ", not 7", " since x = 3", " \\]", "; done", "  ", " (see above)")
GROUPS = ("", ",", " ", "'", "\u2019", "_", "\u00a0", "\u202f", "indian", ".")


def grouped(rng, whole):
    """(digits of a whole number, the style): in thousands by some separator, or as they are grouped in India."""
    style = rng.choice(GROUPS)
    if style == "indian" and whole >= 100_000:
        head, tail = divmod(whole, 1000)
        pairs = re.findall(r"\d{2}", f"{head:0{len(str(head)) + len(str(head)) % 2}}")
        return ",".join(pairs).removeprefix("0") + f",{tail:03}", style
    if style == "indian" or style == "." and whole < 1_000_000:
        style = ""
    return f"{whole:,}".replace(",", style), style


def arithmetic(rng, depth):
    """(text, Fraction) of an expression: a number in some style, or two joined by an operator, perhaps in brackets."""
    if depth == 0 or rng.random() < 0.3:
        whole, decimals = rng.randrange(10 ** rng.randrange(1, 9)), rng.choice(["", "", str(rng.randrange(100))])
        text, style = grouped(rng, whole)
        point = "," if style == "." or style in (" ", "'") and style in text and rng.random() < 0.3 else "."
        return rng.choice(["", "", "$", "\u20ac"]) + text + (point + decimals if decimals else ""), Fraction(f"{whole}.{decimals or 0}")
    (left, a), (right, b) = arithmetic(rng, 0), arithmetic(rng, depth - 1)
    if depth > 1:
        right = f"({right})"
    sign = rng.choice("+-*/")
    written_sign = rng.choice({"+": "+", "-": "-\u2212", "*": "*\u00d7\u00b7", "/": "/\u00f7"}[sign])
    if sign == "/" and b == 0:
        sign = written_sign = "+"
    space = rng.choice(["", " "]) if not right.startswith("-") else " "
    value = {"+": a + b, "-": a - b, "*": a * b, "/": a / b if b else None}[sign]
    return left + space + written_sign + space + right, value


@CASES
def test_a_line_counts_for_what_it_arrives_at(cases):
    """Lines of a small grammar, behind `####`: leading text, expressions that equal each other, the last of them with a sign, a
    unit, annotations, markup, an aside or an explanation behind it. The value is that of the last one, by exact arithmetic."""
    rng = random.Random(11)
    for _ in range(cases):
        steps = [arithmetic(rng, rng.randrange(3))[0] + rng.choice(UNITS) for _ in range(rng.choice([0, 0, 1, 1, 2, 3]))]
        last, value = arithmetic(rng, rng.choice([0, 0, 0, 1, 2]))
        lead = rng.choice(LEADS)
        if value and rng.random() < 0.3 and re.fullmatch(r"[\d.,'_ ]+", last):
            last, value = rng.choice(["-", "\u2212", "- " if steps else "-"]) + last, -value
        elif re.fullmatch(r"\d+", last) and rng.random() < 0.2:
            last, value = f"{last} 3/4", value + Fraction(3, 4)
        line = lead + rng.choice([" = ", "=", " \u2248 "]).join([*steps, last]) + rng.choice(UNITS) + rng.choice(ENDS)
        assert gsm8k.extract_answer(f"{with_numbers(rng)}\n####{rng.choice(['', ' '])}{line}\n{with_numbers(rng)}") == value, line


def test_every_line_of_the_data_keeps_its_number(gsm8k_data):
    """All 8792 solutions: the rule reads the number that they end with."""
    answers = [example["answer"] for split in ("train", "test") for example in gsm8k.load(gsm8k_data, split)[0]]
    assert len(answers) == 8792
    for answer in answers:
        assert gsm8k.extract_answer(answer) == Fraction(gsm8k.gold(answer)) == gsm8k.extract_answer(gsm8k.strip_annotations(answer))


def gold_of(rng, value):
    """(a dataset answer, its Fraction): the value itself in some way of writing it, or another one."""
    value = value if rng.random() < 0.5 else value + rng.choice([1, -1, Fraction(1, 100), 10**6])
    value = value if Fraction(written(value)) == value else Fraction(round(value))  # some ratios are no decimals
    whole, dot, tail = written(abs(value)).partition(".")
    whole = f"{int(whole):,}" if rng.random() < 0.5 else whole
    zeros = rng.choice(["", "0", "00"]) if dot else rng.choice(["", ".0", ".00"])
    return f"{random_words(rng)}\n#### {'-' * (value < 0)}{whole}{dot}{tail}{zeros}", value


@CASES
def test_our_rule_reads_the_number_that_was_put_in(cases):
    """Behind `####`, behind "The answer is", or last of all: the number put into a random text is read, and right exactly
    where its Fraction equals that of the answer."""
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
def test_garbage_is_scored_without_an_error(cases):
    """Any string gets a verdict of every rule: text or None, true or false."""
    rng = random.Random(9)
    for _ in range(cases // 4):
        for result in gsm8k.score(random_garbage(rng), "#### 7").values():
            assert type(result["correct"]) is bool and type(result["extracted"]) in (str, type(None))


@pytest.mark.long
def test_endless_texts_take_a_second():
    """Every rule, the reading of gold numbers, the stripping and the finding of annotations take linear time."""
    def read_gold(text):
        with contextlib.suppress(ValueError):
            gsm8k.gold(text)

    assert_linear(*(extract for extract, _ in gsm8k.RULES.values()), read_gold, gsm8k.strip_annotations, gsm8k.equations)
