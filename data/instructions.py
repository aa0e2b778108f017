"""Files of instructions and responses to train on: `--data FILE`, a JSON list or a .jsonl with one object per line.

An object holds two texts, under one of the pairs of names in KEYS; an `input` (or `context`) beside them joins the
first, behind a blank line. MetaMathQA (arXiv 2309.12284) is such a file: the training problems of GSM-8K and MATH
rewritten in several ways, 395,000 records in one list, of which PiSSA and SORSA train on the first 100,000. Every
original problem is in it many times over, so a held-out loss on it says how well the text is fitted, not how well new
problems are solved: that is what the test sets of GSM-8K and MATH are for.
"""
import json
import re
from pathlib import Path

KEYS = (("query", "response"), ("question", "answer"), ("problem", "solution"),  # MetaMathQA, GSM-8K, MATH
        ("instruction", "output"), ("instruction", "response"), ("prompt", "completion"), ("prompt", "response"))


def is_file(data):
    """Whether --data names such a file."""
    return Path(data).suffix.lower() in (".json", ".jsonl")


def load(path):
    """(examples, source) of a JSON list, or of a .jsonl file with one record per line: dicts of question and answer.

    Raises FileNotFoundError for a missing file, ValueError naming the file and the records at fault.
    """
    examples, faults = [], {}
    for where, record in read_records(path):
        try:
            examples.append(example(record, where))
        except ValueError as fault:
            faults[where] = fault
    if faults:
        first, *others = faults
        names = ", ".join(where.removeprefix(f"{path}:").strip() for where in others[:20])
        more = f" (and {len(others)} more: {names}{', ...' * (len(others) > 20)})" if others else ""
        raise ValueError(f"{faults[first]}{more}")
    return examples, f"{path}, {len(examples)} records"


def read_records(path):
    """[(where, JSON value)] in a file: the lines of a .jsonl, or the items of a list. `where` names the place."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected a .json list or a .jsonl file of problems")
    if path.suffix.lower() == ".jsonl":
        with open(path, "rb") as file:
            lines = [(f"{path}:{number}", line) for number, line in enumerate(file, 1) if line.strip()]
        records = [(where, parse(line, where)) for where, line in lines]
        if records and isinstance(records[0][1], list):
            raise ValueError(f"{path}: expected a JSON object per line (a list of records goes into a .json file)")
    else:
        values = parse(path.read_bytes(), path)
        if not isinstance(values, list):
            raise ValueError(f"{path}: expected a JSON list of records (one record per line goes into a .jsonl file)")
        records = [(f"{path}: record {number}", value) for number, value in enumerate(values, 1)]
    if not records:
        raise ValueError(f"{path}: holds no records; expected one JSON object per line, or a list of them")
    return records


def parse(text, where):
    """The JSON value of some bytes of UTF-8; ValueError naming the place if it is none."""
    try:
        value = json.loads(str(text, "utf-8-sig"))
        if b"\\ud" in text.lower():  # half of a surrogate pair is JSON, but no text that could be written
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except (ValueError, RecursionError) as error:
        fix = ("one record per line goes into a .jsonl file" if str(error).startswith("Extra data: line 2") else
               "mend it or take it out")
        raise ValueError(f"{where}: not valid JSON: {error}; {fix}") from None


def is_text(value):
    """Whether a JSON value is a text of more than white space that UTF-8 can spell (no half of a surrogate pair)."""
    return isinstance(value, str) and value.strip() != "" and not re.search("[\ud800-\udfff]", value)


def example(record, where):
    """One record under our names. ValueError for one that has no pair of texts under any of KEYS, or an `input` that is
    no text."""
    record = record if isinstance(record, dict) else {}
    for keys in KEYS:
        if all(is_text(record.get(key)) for key in keys):
            question, answer = (record[key] for key in keys)
            name = "input" if "input" in record else "context"
            more = record.get(name)
            if more is None or isinstance(more, str) and not more.strip():
                return {"question": question, "answer": answer}
            if not is_text(more):
                raise ValueError(f"{where}: its {name!r} is {repr(more)[:40]}, expected a text")
            return {"question": f"{question}\n\n{more}", "answer": answer}
    for keys in KEYS:
        if record.keys() >= {*keys}:
            key = next(key for key in keys if not is_text(record[key]))
            raise ValueError(f"{where}: its {key!r} is {repr(record[key])[:40]}, expected a text that is not empty: "
                             "mend the record or take it out")
    pairs = ", ".join(" and ".join(keys) for keys in KEYS)
    raise ValueError(f"{where}: expected a JSON object with two texts, under {pairs}")
