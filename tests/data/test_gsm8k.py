"""GSM-8K: reading the data, the four scoring rules."""
import hashlib
import http.client
import json
import os
import re
import subprocess
import sys
import time
import urllib.error
from fractions import Fraction
from pathlib import Path

import pytest

from data import gsm8k, prompting

GOOD = {"question": "How many legs have 3 cats?", "answer": "3*4 = <<3*4=12>>12 legs.\n#### 12"}
ANNOTATION = re.compile(r"<<(.*?)=(.*?)>>")


def write_jsonl(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


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
    ("\udcff", "not valid JSON"),
    ("[1, 2]", "'question'"),
    ('{"answer": "#### 1"}', "'question'"),
    ('{"question": "", "answer": "#### 1"}', "'question'"),
    ('{"question": "a"}', "'answer'"),
    ('{"question": "a", "answer": 5}', "'answer'"),
    ('{"question": "a", "answer": " \\n "}', "'answer'"),
    ('{"question": "a", "answer": "it is 5"}', "#### number"),
    ('{"question": "a", "answer": "#### five"}', "#### number"),
    ('{"question": "a", "answer": "####5"}', "#### number"),
    ('{"question": "a", "answer": "#### 5 apples"}', "#### number"),
])
def test_a_bad_line_is_named(tmp_path, line, complaint):
    """Malformed content raises one line with file, line number and fault."""
    path = write_jsonl(tmp_path / "train.jsonl", GOOD)
    with open(path, "a", encoding="utf-8", errors="surrogateescape") as file:
        file.write("\n" + line + "\n")
    with pytest.raises(ValueError) as error:
        gsm8k.load(tmp_path, "train")
    assert str(error.value).startswith(f"{path}:3: ") and complaint in str(error.value)
    assert "\n" not in str(error.value)


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
    """A folder that stands in for the dataset's repository, with a cache that is empty. Returns the folder."""
    folder = tmp_path / "repository"
    folder.mkdir()
    digests = {}
    for split in ("train", "test"):
        path = write_jsonl(folder / f"{split}.jsonl", {**GOOD, "question": f"A {split} question?"})
        digests[split] = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setattr(gsm8k, "URL", folder.as_uri() + "/{}.jsonl")
    monkeypatch.setattr(gsm8k, "SHA256", digests)
    monkeypatch.setenv("SORSA_CACHE", str(tmp_path / "cache"))
    return folder


@pytest.mark.parametrize("word", ["gsm8k", "auto"])
def test_download_fills_the_cache_once(repository, word):
    """Both splits are fetched at the first load; afterwards the cache alone is enough."""
    examples, source = gsm8k.load(word, "test")
    assert examples[0]["question"] == "A test question?" and source.startswith("GSM-8K test, 1 problems")
    for file in repository.iterdir():
        file.unlink()
    assert gsm8k.load(word, "train")[0][0]["question"] == "A train question?"
    cache = Path(os.environ["SORSA_CACHE"]) / "gsm8k"
    assert sorted(path.name for path in cache.iterdir()) == ["test.jsonl", "train.jsonl"]


def test_wrong_content_never_reaches_the_cache(repository):
    """A download with another sha256 (a login page, say) raises and leaves no file behind."""
    (repository / "train.jsonl").write_text("<html>please log in</html>")
    with pytest.raises(ConnectionError, match="train.jsonl: .*wrong sha256.*--data FOLDER"):
        gsm8k.load("gsm8k", "train")
    assert list((Path(os.environ["SORSA_CACHE"]) / "gsm8k").iterdir()) == []


@pytest.mark.parametrize("failure", [urllib.error.URLError("no route"), TimeoutError("timed out"),
                                     http.client.IncompleteRead(b"half")])
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


def test_malformed_data_is_not_papered_over_by_auto(repository):
    """Only a failed download falls back: damaged files in the cache are an error."""
    gsm8k.load("auto", "train")
    (Path(os.environ["SORSA_CACHE"]) / "gsm8k" / "train.jsonl").write_text("{")
    with pytest.raises(ValueError, match=r"train\.jsonl:1: not valid JSON"):
        gsm8k.load("auto", "train")


def test_real_data_has_the_published_size(gsm8k_data):
    """7473 and 1319 problems, no question in both, every gold number an integer."""
    train, source = gsm8k.load(gsm8k_data, "train")
    test, _ = gsm8k.load(str(gsm8k_data), "test")
    assert source == f"GSM-8K train, 7473 problems, from {gsm8k_data}" and len(train) == 7473 and len(test) == 1319
    assert not {example["question"] for example in train} & {example["question"] for example in test}
    assert all(re.fullmatch(r"-?\d+", gsm8k.gold(example["answer"])) for example in train + test)


@pytest.mark.parametrize("text, expected", [
    ("3*4 = <<3*4=12>>12 legs", "3*4 = 12 legs"), ("$<<1+1=2>>2 and <<2*2=4>>4", "$2 and 4"),
    ("no annotation, 1 < 2 >> 0", "no annotation, 1 < 2 >> 0"), ("open <<1+1=", "open <<1+1="),
])
def test_strip_annotations(text, expected):
    """Annotations go, what they stand beside stays."""
    assert gsm8k.strip_annotations(text) == expected


# ---- scoring --------------------------------------------------------------------------------------------------------

def verdicts(completion, gold):
    """What each rule extracts, "-" for nothing, followed by "wrong" where something was extracted and is not right."""
    scores = gsm8k.score(completion, f"Because.\n#### {gold}")
    assert json.loads(json.dumps(scores)) == scores
    words = {}
    for rule, result in scores.items():
        assert result["extracted"] is not None or not result["correct"]
        missed = result["extracted"] is not None and not result["correct"]
        words[rule] = "-" if result["extracted"] is None else result["extracted"] + " wrong" * missed
    return [words[rule] for rule in ("strict", "flexible", "metamath", "answer")]


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
    ("#### 5\nQuestion: 3+4", 5, ["5", "4 wrong", "-", "5"]),
    (prompting.truncate("#### 5\nQuestion: 3+4"), 5, ["5", "5", "-", "5"]),
    ("", 5, ["-", "-", "-", "-"]),
    ("I do not know.", 5, ["-", "-", "-", "-"]),
    ("#### 5", "1,005", ["5 wrong", "5 wrong", "-", "5 wrong"]),
    ("#### 1005", "1,005", ["1005", "1005", "-", "1005"]),
    ("#### 2.50", "2.5", ["2.50 wrong", "2.50 wrong", "-", "2.5"]),
])
def test_each_rule_reads_as_decided(completion, gold, expected):
    """The table of expected values in the evaluation rules, then further ones: strict, flexible, metamath, answer."""
    assert verdicts(completion, gold) == expected


@pytest.mark.parametrize("text, expected", [
    ("#### 0", 0), ("#### -7", -7), ("#### - 7", 7), ("#### +7", 7), ("#### -$7", -7), ("#### $-7", -7),
    ("#### $1,234.50", Fraction("1234.5")), ("#### .5", Fraction(1, 2)), ("#### 0.125", Fraction(1, 8)),
    ("#### 7%", 7), ("#### 7 apples", 7), ("#### x = 7", 7), ("#### about 7, not 8", 7), ("#### **7**", 7),
    ("#### \\boxed{7}", 7), ("####\t7", 7), ("##### 7", 7),
    ("#### 1/3", Fraction(1, 3)), ("#### -6 / 4", Fraction(-3, 2)), ("#### $6/4", Fraction(3, 2)), ("#### 6/0", 6),
    ("#### 1,000/10", 100), ("#### 24/7 is 3", Fraction(24, 7)), ("#### 3 of 4", 3),
    ("#### 12 -3", 12), ("#### 1 450", 1), ("#### 1,45", 1), ("#### 1234,567", 1234), ("#### 1,4500", 1),
    ("#### 5\u2212", 5), ("#### \u22125", 5),  # a Unicode minus is no sign
    ("#### 5.", 5), ("#### 5...", 5), ("#### 5,", 5), ("#### 2x7", 2), ("#### x7", 7), ("#### (3)-4", 3),
    ("#### (-4)", -4),
    ("#### 5\n#### 6", 6), ("#### 5 #### 6", 6),
    ("so 8 or 9\n####", 9), ("so 8\n#### \n7", 7), ("so 8\n#### none", 8), ("The answer is 8.\n#### none\n9", 8),
    ("#### 5\nThe answer is 6.", 5), ("The answer is 5, I think: 6.", 5), ("The answer is:\n5\n6", 5),
    ("The answer is 5. The answer is 6. 7", 6), ("The answer is unclear; 4 or 5", 4), ("6. The answer is five", 6),
    ("the answer is 5, not 6", 6), ("The final answer is 5.", 5), ("The answer is 3/4 of 8", Fraction(3, 4)),
    ("12 -3", -3), ("12-3", 3), ("(2)-3", 3), ("1 450", 450), ("6/2", 2), ("3 dollars and .25", Fraction(1, 4)),
    ("from 1,000 to 2,000,000", 2000000), ("1e3", 3), ("costs $5.", 5), ("\uff17 apples", 7),
    ("none", None), ("####", None), ("$, - . /", None), ("", None), ("#### " + "9" * 5000, None), ("9" * 5000, None),
    ("#### 1/" + "9" * 5000, None),
])
def test_our_rule(text, expected):
    """extract_answer: markers, signs, dollars, separators, decimals, ratios, and what it is known not to read."""
    assert gsm8k.extract_answer(text) == expected


@pytest.mark.parametrize("text, expected", [
    ("#### 7", "7"), ("#### -7", "-7"), ("#### 7,000", "7000"), ("#### 7.5.", "7.5"), ("#### 1\n#### 2", "1"),
    ("####  7", None), ("#### x7", None), ("#### -$7", None), ("#### +7", None), ("#### 7 of 8", "7"), ("#### ,", ""),
    ("#### 6/2", "6"), ("the answer is 7", None), ("### 7", None), ("##### 7", "7"), ("", None),
])
def test_strict_rule(text, expected):
    """extract_strict, as the harness reads."""
    assert gsm8k.extract_strict(text) == expected


@pytest.mark.parametrize("text, expected", [
    ("7", "7"), ("-7", "-7"), ("1 and 2", "2"), ("$1,000.", "1000"), ("-$5", "-5"), ("5, 6", "6"), ("5,", "5"),
    ("12.50", "12.50"), ("10-5", "-5"), ("a 5 b $$", ""), ("5 ... ", ".."), ("5.", "5"), ("x", None), ("$", None),
    ("#### 5 (3+4)", "4"), ("<<3*4=12>>12 eggs", "12"), ("", None),
])
def test_flexible_rule(text, expected):
    """extract_flexible, as the harness reads."""
    assert gsm8k.extract_flexible(text) == expected


@pytest.mark.parametrize("text, expected", [
    ("The answer is: 7", 7), ("The answer is: 7 8", 7), ("The answer is: 1. The answer is: 2", 2), ("#### 7", None),
    ("The answer is 7", None), ("The answer is:7", None), ("the answer is: 7", None), ("The answer is: x", None),
    ("The answer is: +7", 7), ("The answer is: -7.", -7), ("The answer is: - 7", 7), ("The answer is: .5", 0),
    ("The answer is: 1.5", 2), ("The answer is: 2.5", 2), ("The answer is: 2,500", 2500),
    ("The answer is: $2,500.75", 2500),
    ("The answer is: 7/2", 4), ("The answer is: 5/2", 2), ("The answer is: -9/3", -3), ("The answer is: 7/0", 7),
    ("The answer is: /5", None), ("The answer is: " + "9" * 5000, None), ("The answer is: 1/" + "9" * 5000, 0),
    ("The answer is: " + "9" * 5000 + "/" + "9" * 5000, None), ("The answer is: ", None), ("", None),
])
def test_metamath_rule(text, expected):
    """extract_metamath, as MetaMath reads, rounding half to even."""
    assert gsm8k.extract_metamath(text) == expected


@pytest.mark.parametrize("answer, expected", [
    ("So.\n#### 72", "72"), ("#### 1,450,000", "1450000"), ("#### -47", "-47"), ("#### 2.5", "2.5"), ("#### 7 \n", "7"),
])
def test_gold(answer, expected):
    """gold is the text after the marker without commas."""
    assert gsm8k.gold(answer) == expected


@pytest.mark.parametrize("answer", ["72", "####72", "#### ", "#### many", "#### 7\nor 8", "#### 1.", ""])
def test_answer_without_gold(answer):
    """An answer that does not end in a marked number raises, whoever scores against it."""
    with pytest.raises(ValueError, match="#### number"):
        gsm8k.gold(answer)
    with pytest.raises(ValueError, match="#### number"):
        gsm8k.score("#### 7", answer)


def test_real_answers_score_as_right(gsm8k_data):
    """Every test answer, taken as a completion, is right by the three rules that know `#### `; 40 of them are 5."""
    examples = gsm8k.load(gsm8k_data, "test")[0]
    scores = [gsm8k.score(prompting.target(example["answer"]), example["answer"]) for example in examples]
    right = {rule: sum(score[rule]["correct"] for score in scores) for rule in gsm8k.RULES}
    assert right == {"answer": 1319, "strict": 1319, "flexible": 1319, "metamath": 0}
    assert sum(gsm8k.score("#### 5", example["answer"])["answer"]["correct"] for example in examples) == 40


def test_script_reads_one_completion_by_every_rule():
    """`python gsm8k.py` prints a line per rule."""
    run = subprocess.run([sys.executable, "-m", "data.gsm8k"], capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    assert [line.split(":")[0].strip() for line in run.stdout.splitlines()[-4:]] == list(gsm8k.RULES)


def test_long_lines_take_no_quadratic_time(tmp_path):
    """A number of 300,000 digits and as many open annotations are read, or refused, at once."""
    started = time.time()
    with pytest.raises(ValueError, match="train.jsonl:1: the number behind '####' has more than 300 characters"):
        write = json.dumps({"question": "?", "answer": "#### " + "1" * 300000 + "x"})
        (tmp_path / "train.jsonl").write_text(write)
        gsm8k.load(str(tmp_path), "train")
    assert gsm8k.strip_annotations("<<" * 300000 + "\n<<1>>2") == "<<" * 300000 + "\n2"
    assert time.time() - started < 2


def test_deep_json_and_half_a_letter_are_refused(tmp_path):
    """Both are named with their line; half of a surrogate pair could not be written to predictions.jsonl."""
    for line in ("[" * 100000, json.dumps({"question": "\ud800", "answer": "#### 1"})):
        (tmp_path / "train.jsonl").write_text(line)
        with pytest.raises(ValueError, match="train.jsonl:1: "):
            gsm8k.load(str(tmp_path), "train")
