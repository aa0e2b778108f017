"""What train.py trains on: encoded examples, pairs of (ids, prompt_length), and batches of them.

An example is the prompt and the answer; the loss counts ids[prompt_length:] only. A batch has rows of similar length.
"""
import array
import hashlib
import itertools
import json
import random
from pathlib import Path
from typing import NamedTuple

import torch

from data import gsm8k, instructions, prompting, prose

IGNORE = -100  # the target of a position without loss: the question, and padding
ANSWERS = ("full", "equations")  # the forms that --answers asks for: as the data has them, or gsm8k.equations
LONGER = "raise --max-tokens, or --cut them"  # what to do where all examples are too long
SPLIT_SEED = 0  # which examples are held out never changes with --seed: held-out losses of all runs compare


def load_examples(data):
    """(examples, source): the training problems that --data names, a file or one of gsm8k.load's kinds."""
    return instructions.load(data) if instructions.is_file(data) else gsm8k.load(data, "train")


def without_annotations(examples):
    """The examples without calculator annotations in their answers. ValueError for one of which nothing is left."""
    stripped = [{**example, "answer": gsm8k.strip_annotations(example["answer"])} for example in examples]
    for number, example in enumerate(stripped, 1):
        if not example["answer"].strip():
            raise ValueError(f"--strip-annotations leaves nothing of the answer of record {number}, "
                             f"{examples[number - 1]['answer'][:40]!r}: take it out of the data, or leave the flag out")
    return stripped


def in_form(examples, places, answers):
    """{place: example} of the examples at `places`, with their answers in one of the forms ANSWERS; those whose answers
    have none are left out. ValueError if all are."""
    if answers == "full":
        return {place: examples[place] for place in places}
    texts = {place: gsm8k.equations(examples[place]["answer"]) for place in places}
    kept = {place: {**examples[place], "answer": text} for place, text in texts.items() if text}
    if not kept:
        raise ValueError(f"--answers equations: none of {len(places)} answers has annotations, as in <<48/2=24>>, and "
                         "#### 72 behind them: give other --data (gsm8k, practice), or more of it, or --answers full")
    return kept


def encode_examples(tokenizer, examples, max_tokens, template="plain", cut=(None, None), where="", fix=LONGER):
    """{place in examples: (ids, prompt_length)} of those of at most max_tokens tokens. ValueError if none is, which
    begins with `where` and ends with `fix`."""
    encoded = [prompting.encode(tokenizer, example, template, cut) for example in examples]
    kept = {place: pair for place, pair in enumerate(encoded) if len(pair[0]) <= max_tokens}
    if not kept:
        raise ValueError(f"{where}all {len(encoded)} examples have more than {max_tokens} tokens: {fix}")
    return kept


def split(examples, held_out, limit=None):
    """(examples to train on, `held_out` examples kept apart): the same split whatever the seed of the run.

    With a limit, the ones to train on are the first of the data that are not held out.
    """
    if held_out >= len(examples):
        raise ValueError(f"the {held_out} examples of --held-out and --report leave nothing to train on: the data has "
                         f"{len(examples)}; give a lower --held-out (or --report), or more data")
    order = random.Random(SPLIT_SEED).sample(range(len(examples)), len(examples))
    last = sorted(order[held_out:])[:limit][-1]
    return ([examples[i] for i in order[held_out:] if i <= last], [examples[i] for i in order[:held_out]])


class Data(NamedTuple):
    """What a run trains on and measures with: encoded examples are pairs (ids, prompt_length)."""
    train: list
    numbers: list  # which records of the data these are, from 1
    held_out: list
    report: list  # held out too, and measured at the end alone
    prose: list  # general text, to see what is forgotten; empty unless that is asked for
    example: dict  # a held-out one, as text
    left_out: int  # how many were too long
    unannotated: int  # how many were left out because --answers equations finds none in them
    sha256: str  # of all these
    held_out_sha256: str  # of the held-out records as texts, by which eval.py knows them again


def encode_data(args, examples, base):
    """Data from all examples: those that are held out apart, the same whatever --answers is; those that are too long,
    or without the answer that is asked for, left out."""
    places, apart = split(range(len(examples)), args.held_out + args.report, args.limit)
    apart_sha256 = texts_sha256([examples[i] for i in apart[:args.held_out]])
    if args.strip_annotations:
        examples = without_annotations(examples)
    context = base.model.config.max_position_embeddings
    args.max_tokens = min(args.max_tokens or sum(args.cut or (512,)), context)
    parts = places, apart[:args.held_out], *([apart[args.held_out:]] if args.report else [])
    told = [in_form(examples, part, args.answers) for part in parts]
    fix = ("that is the model's context; --cut them, or give other --data" if args.max_tokens == context else
           LONGER)
    encoded = [encode_examples(base.tokenizer, list(part.values()), args.max_tokens, args.template,
                               args.cut or (None, None), where, fix)
               for part, where in zip(told, ("", "--held-out: ", "--report: "))]
    kept, held_out, *report = [list(part.values()) for part in encoded]
    report = report[0] if report else []
    prose_pieces = prose.pieces(base.tokenizer, context) if args.forgetting else []
    places, example = list(told[0]), next(iter(told[1].values()))
    total, annotated, fitting = [sum(map(len, sets)) for sets in (parts, told, encoded)]
    return Data(kept, [1 + places[i] for i in encoded[0]], held_out, report, prose_pieces, example,
                annotated - fitting, total - annotated, examples_sha256(kept, held_out, report, prose_pieces),
                apart_sha256)


def data_name(given, source):
    """What --data named, so that it is found again from any folder: a kind of data, or an absolute path."""
    name = {"auto": "practice" if source.startswith("practice") else "gsm8k"}.get(given, given)
    return name if name in ("practice", "gsm8k") else str(Path(name).resolve())


def epoch_batches(lengths, batch, seed, epoch, window=32):
    """Lists of `batch` indices that cover an epoch, with little padding: shuffle, sort windows by length, cut, shuffle.

    The order depends on (seed, epoch) alone. Examples that would not fill a batch are left out of this epoch.
    """
    rng = random.Random(f"{seed} {epoch}")
    order = rng.sample(range(len(lengths)), len(lengths))
    order = order[:len(order) // batch * batch] or order
    batches = []
    for start in range(0, len(order), window * batch):
        by_length = sorted(order[start:start + window * batch], key=lambda i: lengths[i])
        batches += [by_length[i:i + batch] for i in range(0, len(by_length), batch)]
    return rng.sample(batches, len(batches))


def endless_batches(lengths, batch, seed):
    """The batches of epoch after epoch."""
    for epoch in itertools.count():
        yield from epoch_batches(lengths, batch, seed, epoch)


def collate(encoded, device, multiple=1):
    """Tokens (B, T) on `device` and targets (B, T) on the CPU, where the loss counts them: the next tokens, IGNORE
    outside answers. Padded on the right, to a T that is a multiple of `multiple`."""
    T = padded_length(encoded, multiple)
    tokens = torch.zeros(len(encoded), T, dtype=torch.long)  # (B, T)
    targets = torch.full((len(encoded), T), IGNORE)  # (B, T)
    for row, (ids, prompt_length) in enumerate(encoded):
        tokens[row, :len(ids) - 1] = torch.tensor(ids[:-1])
        targets[row, prompt_length - 1:len(ids) - 1] = torch.tensor(ids[prompt_length:])
    return sent(tokens, device), targets


def sent(tensor, device):
    """A CPU's tensor on `device`. To a GPU it goes from pinned memory, so that the host need not wait for it."""
    if torch.device(device).type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def padded_length(encoded, multiple=1):
    """T of a batch: its longest row without the last token, which is a target only, rounded up to a multiple."""
    return -(-(max(len(ids) for ids, _ in encoded) - 1) // multiple) * multiple


def padded_tokens(encoded, micro_batch, multiple=1):
    """How many tokens a batch has with its padding, cut into micro-batches."""
    parts = [encoded[i:i + micro_batch] for i in range(0, len(encoded), micro_batch)]
    return sum(len(part) * (1 + padded_length(part, multiple)) for part in parts)


def token_count(encoded):
    """How many tokens these examples have, padding not counted."""
    return sum(len(ids) for ids, _ in encoded)


def answer_tokens(encoded):
    """How many tokens of these examples carry loss."""
    return sum(len(ids) - prompt_length for ids, prompt_length in encoded)


def texts_sha256(examples):
    """A checksum of examples as texts, and of their order."""
    return hashlib.sha256(json.dumps(examples, sort_keys=True).encode()).hexdigest()


def examples_sha256(*sets):
    """A checksum of encoded examples: their tokens, where the answers begin, and their order."""
    digest = hashlib.sha256()
    for examples in sets:
        for ids, prompt_length in examples:
            digest.update(array.array("q", [len(ids), prompt_length, *ids]).tobytes())
    return digest.hexdigest()
