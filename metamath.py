"""Files of problems with worked answers to train on, MetaMathQA first: `--data MetaMathQA-395K.json`.

MetaMathQA (arXiv 2309.12284) rewrites the training problems of GSM-8K and MATH in several ways: 395,000 records in one
JSON list, of which PiSSA and SORSA train on the first 100,000. An answer ends in "The answer is: 72". Every original
problem is in it many times over, so a held-out loss on it says how well the text is fitted, not how well new problems
are solved: that is what the test sets of GSM-8K and MATH are for.
"""
import json
from pathlib import Path

SUFFIXES = (".json", ".jsonl")
KEYS = (("query", "response"), ("question", "answer"), ("problem", "solution"))  # MetaMathQA, GSM-8K, MATH


def load(path):
    """(examples, source) of a JSON list, or of a .jsonl file with one record per line: dicts of question and answer.

    Raises FileNotFoundError for a missing file, ValueError naming the file and the record at fault.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; --data takes a .json list or a .jsonl file of problems")
    records = read_records(path)
    examples = [example(record, f"{path}: record {number}") for number, record in enumerate(records, 1)]
    return examples, f"{path}, {len(examples)} problems"


def read_records(path):
    """The JSON values in a file: the items of a list (.json), or one per line (.jsonl)."""
    try:
        if path.suffix == ".jsonl":
            with open(path, encoding="utf-8-sig") as file:
                records = [json.loads(line) for line in file if line.strip()]
        else:
            records = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(records, list) or not records:
        raise ValueError(f"{path}: holds no records; expected a JSON list of them (in a .jsonl file, one per line)")
    return records


def example(record, where):
    """One record under our names. ValueError for one that has no pair of texts under any of KEYS."""
    for keys in KEYS:
        texts = [record.get(key) for key in keys] if isinstance(record, dict) else []
        if all(isinstance(text, str) and text.strip() for text in texts) and texts:
            return dict(zip(("question", "answer"), texts))
    pairs = ", ".join(" and ".join(keys) for keys in KEYS)
    raise ValueError(f"{where}: expected a JSON object with two texts, under {pairs}")
