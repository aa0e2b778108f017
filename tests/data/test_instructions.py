"""Files of instructions and responses to train on: MetaMathQA and the like."""
import json

import pytest

from data import instructions
from tests.data.texts import fault, write_records

QUERY = {"query": "How many legs have 3 cats?", "response": "3*4 = 12 legs. The answer is: 12"}
GSM8K = {"question": "How many eyes has a cat?", "answer": "Two.\n#### 2"}
MATH = {"problem": "What is $1+1$?", "solution": r"It is $\boxed{2}$."}
READ = {"question": QUERY["query"], "answer": QUERY["response"]}


# ---- files ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_both_kinds_of_file_are_read(tmp_path, suffix):
    """A list and one record per line: the same examples under our names, in order; the source says how many and from where."""
    path = write_records(tmp_path / f"data{suffix}", QUERY, GSM8K, MATH)
    expected = [READ, GSM8K, {"question": MATH["problem"], "answer": MATH["solution"]}], f"{path}, 3 records"
    assert instructions.load(path) == instructions.load(str(path)) == expected


def test_records_come_with_their_places(tmp_path):
    """Any JSON value is a record; its place is a line of the file, blank ones counted, or its number in the list."""
    lines, items = tmp_path / "data.JSONL", tmp_path / "data.txt"
    lines.write_text('\ufeff{"a": 1}\r\n \n\t\nnull\n [2] ', newline="", encoding="utf-8")
    assert instructions.read_records(lines) == [(f"{lines}:1", {"a": 1}), (f"{lines}:4", None), (f"{lines}:5", [2])]
    items.write_text('\ufeff[{"a": 1},\n\nnull, [2]]\n', encoding="utf-8")
    assert instructions.read_records(str(items)) == [
        (f"{items}: record 1", {"a": 1}), (f"{items}: record 2", None), (f"{items}: record 3", [2])]


def test_names_of_files():
    """The names by which `--data` tells a file of records from a folder or a word."""
    assert all(instructions.is_file(name) for name in ("MetaMathQA-395K.json", "runs/a.jsonl", "A.JSONL"))
    assert not any(instructions.is_file(name) for name in ("gsm8k", "data/json", "a.json.gz", "practice"))


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
    for path in (tmp_path / "none.json", tmp_path):
        expected = ": no such file; expected a .json list or a .jsonl file of problems"
        assert fault(instructions.load, path, FileNotFoundError) == expected


LINE = json.dumps(QUERY).encode()


@pytest.mark.parametrize("name, content, message", [
    ("a.json", b"", ": not valid JSON: "), ("a.json", b"<html>\nplease log in\n</html>", ": not valid JSON: "),
    ("a.json", b"[" + LINE, ": not valid JSON: "), ("a.json", b'[{"query": "\xff", "response": "r"}]', ": not valid JSON: "),
    ("a.json", b"[" * 200_000, ": not valid JSON: "), ("a.json", b'["\\uD800"]', ": not valid JSON: "),
    ("a.json", LINE + b"\n" + LINE, f": not valid JSON: Extra data: line 2 column 1 (char {len(LINE) + 1}); one record per line goes into a .jsonl file"),
    ("a.jsonl", b"\n\r\n" + LINE + b"\n \n" + LINE[:-9], ":5: not valid JSON: "),
    ("a.jsonl", b"[" * 200_000, ":1: not valid JSON: "), ("a.jsonl", LINE + b'\n{"query": "\xff"}\n', ":2: not valid JSON: "),
    ("a.json", LINE, ": expected a JSON list of records (one record per line goes into a .jsonl file)"),
    ("a.json", b"null", ": expected a JSON list of records "),
    ("a.json", b" [\n] ", ": holds no records; expected "), ("a.jsonl", b"\n \n", ": holds no records; expected "),
], ids=lambda value: repr(value[:30]))
def test_a_file_without_records_is_an_error(tmp_path, name, content, message):
    """Other text, half a file, no list, endless nesting, half a letter, nothing: one line with the file, and the line in it."""
    (tmp_path / name).write_bytes(content)
    assert fault(instructions.load, tmp_path / name).startswith(message)


@pytest.mark.parametrize("name, places", [("a.json", "record 5, record 7"), ("a.jsonl", "5, 7")])
def test_all_records_at_fault_are_named_at_once(tmp_path, name, places):
    """What is wrong with the first, and where the others are."""
    records = [QUERY] * 3 + [{**QUERY, "response": ""}, {"query": 1, "response": "r"}, QUERY, []]
    lines = [json.dumps(record) for record in records]
    (tmp_path / name).write_text("\n".join(lines) if name == "a.jsonl" else f"[{','.join(lines)}]")
    said = fault(instructions.load, tmp_path / name)
    assert "4: its 'response' is '', expected a text that is not empty: mend the record or take it out" in said
    assert said.endswith(f" (and 2 more: {places})")
    (tmp_path / "list.jsonl").write_text(f"[{','.join(lines)}]")
    assert "expected a JSON object per line (a list of records goes into a .json file)" in fault(instructions.load, tmp_path / "list.jsonl")


# ---- records --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("keys", instructions.KEYS, ids=" ".join)
@pytest.mark.parametrize("more, question", [
    ({}, "q"), ({"input": "i"}, "q\n\ni"), ({"input": ""}, "q"), ({"input": None}, "q"), ({"input": " \n"}, "q"),
    ({"context": "c"}, "q\n\nc"), ({"input": "i", "context": "c"}, "q\n\ni")], ids=repr)
def test_every_pair_of_names_is_read(keys, more, question):
    """Under each pair of names stand question and answer; an input, if there is one, follows the question behind a blank line."""
    record = {**dict(zip(keys, ("q", "a"))), **more, "type": "MATH_Rephrased", "id": 7}
    assert instructions.example(record, "here") == {"question": question, "answer": "a"}


def test_the_pairs_of_names_are_those_of_the_known_data_sets():
    """MetaMathQA, GSM-8K and MATH before Alpaca and its relatives."""
    assert [" ".join(keys) for keys in instructions.KEYS] == [
        "query response", "question answer", "problem solution", "instruction output", "instruction response",
        "prompt completion", "prompt response"]


@pytest.mark.parametrize("record, expected", [
    ({**MATH, **GSM8K, **QUERY}, READ), ({**MATH, **GSM8K, "input": ""}, GSM8K),
    ({"instruction": "i", "response": "r", "output": "o"}, {"question": "i", "answer": "o"}),
    ({"query": "q", "answer": "a", "problem": "p", "solution": "s"}, {"question": "p", "answer": "s"}),
    ({**GSM8K, "query": "q", "response": " "}, GSM8K), ({**GSM8K, "query": "q", "response": None}, GSM8K),
    ({**GSM8K, "query": 1, "response": "r"}, GSM8K), ({**GSM8K, "query": "\ud800", "response": "r"}, GSM8K),
    ({"query": " q\n", "response": "\t0 ", "input": " i\n"}, {"question": " q\n\n\n i\n", "answer": "\t0 "}),
])
def test_the_first_complete_pair_counts(record, expected):
    """The texts of the first pair that is complete, as they are; other fields go."""
    assert instructions.example(record, "here") == expected


@pytest.mark.parametrize("record", [
    None, 7, [QUERY], {}, {"query": "q"}, {"query": "q", "answer": "a"}, {"Query": "q", "Response": "r"}, {"input": "q", "output": "r"},
], ids=repr)
def test_a_bad_record_is_named(tmp_path, record):
    """A record without two texts raises one line with file, place and the names that were looked for."""
    for suffix, place in ((".json", ": record 3"), (".jsonl", ":3")):
        message = fault(instructions.load, write_records(tmp_path / f"data{suffix}", QUERY, GSM8K, record, QUERY))
        assert message.startswith(f"{place}: expected a JSON object with two texts")
        assert all(" and ".join(names) in message for names in instructions.KEYS)


@pytest.mark.parametrize("record, key", [
    ({"query": "q", "response": ""}, "response"), ({"query": " \n", "response": "r"}, "query"), ({"query": 1, "response": "r"}, "query"),
    ({"query": "q", "response": ["r"]}, "response"), ({"instruction": "", "input": "", "output": ""}, "instruction")], ids=repr)
def test_a_text_that_is_none_is_named(record, key):
    """Where both names are there, the message is about what stands under them."""
    with pytest.raises(ValueError, match=f"^here: its {key!r} is .*, expected a text that is not empty: mend the record or take it out$"):
        instructions.example(record, "here")


@pytest.mark.parametrize("value", [7, 0, False, ["a"], {}], ids=repr)
def test_an_input_that_is_no_text_is_named(value):
    """What stands under `input` is a text or nothing: anything else would be lost, or end up in the prompt as Python writes it."""
    with pytest.raises(ValueError) as error:
        instructions.example({"instruction": "q", "output": "a", "input": value}, "here")
    assert str(error.value) == f"here: its 'input' is {value!r}, expected a text"
