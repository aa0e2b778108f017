"""Files of problems to train on: MetaMathQA and the like."""
import itertools
import json

import pytest

from data import instructions

QUERY = {"query": "How many legs have 3 cats?", "response": "3*4 = 12 legs. The answer is: 12"}
GSM8K = {"question": "How many eyes has a cat?", "answer": "Two.\n#### 2"}
MATH = {"problem": "What is $1+1$?", "solution": r"It is $\boxed{2}$."}
READ = {"question": QUERY["query"], "answer": QUERY["response"]}


def write(path, *records):
    """The records as a .jsonl file or, by its name, as a JSON list. Returns the path."""
    lines = [json.dumps(record) for record in records]
    text = "".join(line + "\n" for line in lines) if path.suffix == ".jsonl" else "[" + ",\n".join(lines) + "]"
    path.write_text(text, encoding="utf-8")
    return path


def fault(path):
    """What is wrong with the file at this path, in one line that begins with its name; the name is left out."""
    with pytest.raises(ValueError) as error:
        instructions.load(path)
    message = str(error.value)
    assert message.startswith(f"{path}:") and "\n" not in message
    return message.removeprefix(str(path))


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_both_kinds_of_file_are_read(tmp_path, suffix):
    """A list and one record per line: the same examples under our names, in order; the source says how many and from where."""
    path = write(tmp_path / f"data{suffix}", QUERY, GSM8K, MATH)
    expected = [READ, GSM8K, {"question": MATH["problem"], "answer": MATH["solution"]}], f"{path}, 3 problems"
    assert instructions.load(path) == instructions.load(str(path)) == expected


def test_records_come_with_their_places(tmp_path):
    """Any JSON value is a record; its place is a line of the file, blank ones counted, or its number in the list."""
    for name in ("data.jsonl", "data.JSONL"):
        (tmp_path / name).write_text('\n{"a": 1}\n \n\nnull\n[2]')
        assert instructions.read_records(tmp_path / name) == [
            (f"{tmp_path / name}:2", {"a": 1}), (f"{tmp_path / name}:5", None), (f"{tmp_path / name}:6", [2])]
    for name in ("data.json", "data.txt"):
        (tmp_path / name).write_text('[{"a": 1},\n\nnull, [2]]')
        assert instructions.read_records(str(tmp_path / name)) == [
            (f"{tmp_path / name}: record 1", {"a": 1}), (f"{tmp_path / name}: record 2", None), (f"{tmp_path / name}: record 3", [2])]


def test_names_of_files():
    """The names by which `--data` tells a file of problems from a folder or a word."""
    assert all(instructions.is_file(name) for name in ("MetaMathQA-395K.json", "runs/a.jsonl", "A.JSONL"))
    assert not any(instructions.is_file(name) for name in ("gsm8k", "data/json", "a.json.gz", "practice"))


@pytest.mark.parametrize("record, expected", [
    ({**MATH, **GSM8K, **QUERY}, READ), ({**MATH, **QUERY}, READ), ({**MATH, **GSM8K}, GSM8K),
    ({"query": "q", "answer": "a", "problem": "p", "solution": "s"}, {"question": "p", "answer": "s"}),
    ({**GSM8K, "query": "q", "response": " "}, GSM8K), ({**GSM8K, "query": "q", "response": None}, GSM8K),
    ({**GSM8K, "query": 1, "response": "r"}, GSM8K),
    ({"query": "q", **MATH}, {"question": MATH["problem"], "answer": MATH["solution"]}),
    ({**QUERY, "type": "MATH_Rephrased", "original_question": "Cats?", "id": 7, "extra": {"a": [1]}}, READ),
    ({"query": " q\n", "response": "\tr "}, {"question": " q\n", "answer": "\tr "}), ({"query": "q", "response": "0"},
    {"question": "q", "answer": "0"}),
])
def test_the_first_complete_pair_counts(record, expected):
    """The texts of the first pair that is complete, as they are; other fields go."""
    assert instructions.example(record, "here") == expected


@pytest.mark.parametrize("text", [
    "\ufeff" + json.dumps(QUERY) + "\n" + json.dumps(QUERY), json.dumps(QUERY) + "\r\n\r\n  \n\t\n" + json.dumps(QUERY) + "\r\n",
    "\n" + json.dumps(QUERY) + "\n\n" + json.dumps(QUERY) + "\n\n", "  " + json.dumps(QUERY) + "  \n" + json.dumps(QUERY),
])
def test_lines_with_nothing_in_them_are_skipped(tmp_path, text):
    """A .jsonl file may have a byte order mark, CRLF, blank lines and no newline at its end."""
    (tmp_path / "data.jsonl").write_text(text, encoding="utf-8", newline="")
    assert instructions.load(tmp_path / "data.jsonl")[0] == [READ, READ]


@pytest.mark.parametrize("name", ["data.json", "data.txt", "data"])
def test_a_list_may_be_indented_and_marked(tmp_path, name):
    """A file of any other name is one JSON list, over any number of lines, with or without a byte order mark."""
    for mark in ("", "\ufeff"):
        (tmp_path / name).write_text(mark + json.dumps([QUERY, GSM8K], indent=4) + "\n", encoding="utf-8")
        assert instructions.load(tmp_path / name)[0] == [READ, GSM8K]


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_text_is_unicode(tmp_path, suffix):
    """Characters beyond ASCII are read whether written out or escaped; a line separator in a text ends no record."""
    text = "\u00bd of 6\u00d7\u03c0 \u2028 \u5341 \U0001f408"
    lines = [json.dumps({"query": text, "response": text}, ensure_ascii=ascii_only) for ascii_only in (True, False)]
    path = tmp_path / f"data{suffix}"
    path.write_bytes(("\n".join(lines) if suffix == ".jsonl" else f"[{','.join(lines)}]").encode())
    assert instructions.load(path)[0] == [{"question": text, "answer": text}] * 2


def test_missing_file_is_named(tmp_path):
    """A path that is no file, and a folder, are named in one line that says what is taken."""
    for path, read in itertools.product((tmp_path / "none.json", tmp_path), (instructions.load, instructions.read_records)):
        with pytest.raises(FileNotFoundError) as error:
            read(path)
        assert str(error.value) == f"{path}: no such file; expected a .json list or a .jsonl file of problems"


LINE = json.dumps(QUERY).encode()


@pytest.mark.parametrize("name, content, place", [
    ("a.json", b"", ""), ("a.json", b"not JSON", ""), ("a.json", b"<html>\nplease log in\n</html>", ""), ("a.json", b"[" + LINE, ""),
    ("a.json", LINE + b"\n" + LINE, ""), ("a.json", b'[{"query": "\xff", "response": "r"}]', ""),
    ("a.json", b"[" * 200_000, ""), ("a.json", b'{"a":' * 200_000, ""),
    ("a.jsonl", b"not JSON", ":1"), ("a.jsonl", LINE + b"\n" + LINE[:-9], ":2"), ("a.jsonl", b"\n\r\n" + LINE + b"\n \nnot JSON", ":5"),
    ("a.jsonl", b"[" * 200_000, ":1"), ("a.jsonl", LINE + b'\n{"query": "\xff", "response": "r"}\n' + LINE, ":2"),
    ("a.jsonl", json.dumps([QUERY], indent=4).encode(), ":1"),
], ids=lambda value: repr(value[:30]))
def test_a_file_that_is_not_json_is_an_error(tmp_path, name, content, place):
    """Other text, half a file, bytes that are no text and endless nesting raise one line with the file, and the line in it."""
    (tmp_path / name).write_bytes(content)
    assert fault(tmp_path / name).startswith(f"{place}: not valid JSON: ")


@pytest.mark.parametrize("text", ["{}", json.dumps(QUERY), '"text"', "null", "7", json.dumps({"data": [QUERY]})])
def test_a_file_without_a_list_is_an_error(tmp_path, text):
    """JSON that is no list: the error says what was expected, and where lines of records belong."""
    (tmp_path / "a.json").write_text(text)
    message = fault(tmp_path / "a.json")
    assert message.startswith(": expected a JSON list of records ") and ".jsonl" in message


@pytest.mark.parametrize("name, text", [("a.json", "[]"), ("a.json", " [\n] "), ("a.jsonl", ""), ("a.jsonl", "\n \n")])
def test_a_file_without_records_is_an_error(tmp_path, name, text):
    """An empty list, and a .jsonl file of blank lines."""
    (tmp_path / name).write_text(text)
    assert fault(tmp_path / name).startswith(": holds no records; expected ")


@pytest.mark.parametrize("record", [
    None, 7, True, "text", [], [QUERY], {}, {"query": "q"}, {"response": "r"}, {"query": "q", "answer": "a"},
    {"Query": "q", "Response": "r"},
    {"query": "", "response": "r"}, {"query": "q", "response": ""}, {"query": " \n", "response": "r"}, {"query": "q", "response": "\t"},
    {"query": 1, "response": "r"}, {"query": "q", "response": 12}, {"query": None, "response": "r"}, {"query": "q", "response": ["r"]},
    {"question": "q", "answer": 5},
])
def test_a_bad_record_is_named(tmp_path, record):
    """A record without two texts raises one line with file, place and the names that were looked for."""
    for suffix, place in ((".json", ": record 3"), (".jsonl", ":3")):
        message = fault(write(tmp_path / f"data{suffix}", QUERY, GSM8K, record, QUERY))
        assert message.startswith(f"{place}: expected a JSON object with two texts")
        assert all(names in message for names in ("query and response", "question and answer", "problem and solution"))


def test_blank_lines_count_in_the_place_of_a_record(tmp_path):
    """The line named is the one an editor shows."""
    (tmp_path / "data.jsonl").write_text(f"\n{json.dumps(QUERY)}\n \n\n{{}}\n")
    assert fault(tmp_path / "data.jsonl").startswith(":5: ")
