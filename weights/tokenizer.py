"""
Text to token ids and back: byte-pair encoding, run by tiktoken, built from a model's own vocabulary.

Encoding has two steps. A regular expression cuts the text into pieces (words, numbers, punctuation, white space) that
no token may cross; then, inside each piece, neighbouring tokens are merged, earliest-learned merge first, until no
merge applies. Both the expression and the merges are part of the model: another cut gives other ids, and the model
has never seen them.

Two kinds of vocabulary are read. Byte-level BPE (GPT-2, Llama 3, Qwen, SmolLM2) starts from bytes. SentencePiece's BPE
(Llama 2, Mistral) starts from characters, does not cut the text, writes a space as U+2581, and spells a character that
it lacks in bytes; told which bytes make its characters, tiktoken does the same.
"""

import unicodedata

import numpy as np
import tiktoken

from weights.files import fault

# The GPT-2 cut: contractions, then words, numbers and punctuation runs, each with at most one leading space, then
# white space, which leaves its last character to the word that follows.
GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

# SmolLM first sets every digit apart and applies the GPT-2 cut to what lies between. In one expression: a digit is a
# piece and takes no leading space, and white space that ends at a digit ends its stretch of text, so it stays whole.
SMOLLM = r"\p{N}|'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"

# Llama 3 takes up to three digits, a sign or space before a word along with it, and line breaks behind punctuation.
LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
          r"|\s+(?!\S)|\s+")
# Mistral's later models also cut before a capital inside a word.
TEKKEN = (r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
          r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}"
          r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+")

# Expressions that a tokenizer.json may spell out: GPT-2's, Llama 3's, Qwen's (digit by digit), Mistral's. No others are
# run: matching a hostile one would never end, or tiktoken abort.
SPELLED_OUT = (GPT2.replace("'(?:[sdmt]|ll|ve|re)", "'s|'t|'re|'ve|'m|'ll|'d"), LLAMA3, LLAMA3.replace("{1,3}", ""),
               TEKKEN)

PATTERNS = {"gpt-2": GPT2, "smollm": SMOLLM}  # by the value of tokenizer.ggml.pre
METASPACE = "\u2581"  # a space in SentencePiece vocabularies
NORMAL = 1  # tokenizer.ggml.token_type of a piece of text; every other type is a control, added or unused token


def byte_alphabet():
    """The character that stands for each byte in a vocabulary file -> dict of character to byte.

    Printable Latin-1 characters stand for themselves; the other 68 bytes are renamed U+0100, U+0101, ... in order, so
    that no token contains a space or a control character ("Ġ" is the space).
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


class Tokenizer:
    """Encodes and decodes with one tiktoken encoding.

    encoding    the tiktoken.Encoding: its own numbers are ranks, the order in which merges apply
    ids         ids[rank]: a tuple of the model's ids: none for a byte that the model lacks, several for a character
                that it spells in bytes
    pieces      {id: bytes} of every id that the model knows
    special     control tokens, string -> id; spelled out in a text they are the plain characters they are
    eos_id      the token that ends an answer
    bos         the ids that a text begins with, often none
    added       other added tokens, string -> id, which are recognised in a text
    nfc         whether texts are normalised to NFC first
    prefix      what SentencePiece puts before a text: "always" a space, "missing" one unless there is one, "" nothing
    """

    def __init__(self, encoding, ids, pieces, special, eos_id, bos=(), added=(), nfc=False, prefix=None):
        self.encoding, self.ids, self.pieces, self.special, self.eos_id = encoding, ids, pieces, special, eos_id
        self.bos, self.added, self.nfc, self.prefix = list(bos), dict(added), nfc, prefix

    @property
    def vocab_size(self):
        """How many ids there are."""
        return len(self.pieces)

    def encode(self, text, start=True):
        """str -> list of ids. `start` is False for a text that continues another one."""
        if self.nfc:
            text = unicodedata.normalize("NFC", text)
        if self.prefix is not None:
            text = text.replace(METASPACE, " ")  # one and the same to such a vocabulary
            if start and text and (self.prefix == "always" or self.prefix == "missing" and not text.startswith(" ")):
                text = " " + text
        ranks = self.encoding.encode(text, allowed_special=set(self.added), disallowed_special=())
        return (self.bos if start else []) + [id for rank in ranks for id in self.ids[rank]]

    def decode(self, ids):
        """list of ids -> str. Bytes that are not UTF-8 (an answer cut inside a character) become U+FFFD."""
        text = b"".join(self.pieces.get(id, b"") for id in ids).decode("utf-8", errors="replace")
        return text.removeprefix(" ") if self.prefix else text


def from_gguf(metadata, path="GGUF metadata"):
    """The tokenizer described by the metadata of the GGUF file `path` (dict, as read by `ggufile.read_gguf`).

    Raises ValueError for a missing field, another kind of tokenizer, or parts that do not fit together.
    """
    model = required(metadata, "tokenizer.ggml.model", str, path)
    pre = required(metadata, "tokenizer.ggml.pre", str, path)
    tokens = required(metadata, "tokenizer.ggml.tokens", list, path)
    types = required(metadata, "tokenizer.ggml.token_type", np.ndarray, path).tolist()
    merges = required(metadata, "tokenizer.ggml.merges", list, path)
    eos_id = required(metadata, "tokenizer.ggml.eos_token_id", int, path)
    if model != "gpt2" or pre not in PATTERNS:
        raise fault(path, f"tokenizer {model!r} with splitting rule {pre!r} is not supported",
                    f"supported: 'gpt2' with {' or '.join(map(repr, PATTERNS))}")
    normal = {token: i for i, (token, type) in enumerate(zip(tokens, types)) if type == NORMAL}
    special = {token: i for i, (token, type) in enumerate(zip(tokens, types)) if type != NORMAL}
    if not len(tokens) == len(types) == len(normal) + len(special) or not 0 <= eos_id < len(tokens):
        raise fault(path, f"{len(tokens)} tokens, {len(normal) + len(special)} of them distinct, {len(types)} token "
                          f"types, end token {eos_id}: these do not fit together")
    ranks, ids, pieces = byte_level(normal, merges, False, path)
    pieces |= {i: token.encode() for token, i in special.items()}
    encoding = tiktoken.Encoding(pre, pat_str=PATTERNS[pre], mergeable_ranks=ranks, special_tokens={})
    return Tokenizer(encoding, ids, pieces, special, eos_id)


def gguf_tokenizer_json(metadata):
    """The `tokenizer.json` that says what `from_gguf` reads."""
    tokens, types, pre = (metadata[f"tokenizer.ggml.{key}"] for key in ("tokens", "token_type", "pre"))
    added = [{"id": i, "content": token, "special": True, "single_word": False, "lstrip": False, "rstrip": False,
              "normalized": False} for i, (token, type) in enumerate(zip(tokens, types.tolist())) if type != NORMAL]
    bytes_cut = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    cut = bytes_cut if pre == "gpt-2" else {
        "type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, bytes_cut]}
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
            "pre_tokenizer": cut, "post_processor": None, "decoder": bytes_cut,
            "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                      "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
                      "vocab": {token: i for i, token in enumerate(tokens)},
                      "merges": metadata["tokenizer.ggml.merges"]}}


# ---- from tokenizer.json --------------------------------------------------------------------------------------------

def from_tokenizer_json(fields, eos_id, path="tokenizer.json"):
    """The tokenizer described by a Hugging Face `tokenizer.json` (its parsed `fields`), which ends answers with eos_id.

    Raises ValueError for a kind that this project has no code for, or parts that do not fit together.
    """
    model, added_tokens = required(fields, "model", dict, path), required(fields, "added_tokens", list, path)
    if model.get("type") != "BPE":
        raise fault(path, f"a tokenizer of type {model.get('type')!r} is not supported", "supported: 'BPE'")
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise fault(path, f"{key} = {model[key]!r} is not supported", "use another model")
    vocabulary, merges = required(model, "vocab", dict, path), required(model, "merges", list, path)
    if not all(isinstance(token, dict) and is_text(token.get("content")) and type(token.get("id")) is int
               for token in added_tokens) or not all(type(i) is int for i in vocabulary.values()):
        raise fault(path, "a token without text or number")
    special = {token["content"]: token["id"] for token in added_tokens if token.get("special")}
    added = {token["content"]: token["id"] for token in added_tokens if not token.get("special")}
    normal = {token: i for token, i in vocabulary.items() if token not in special and token not in added}
    bos = first_ids(fields.get("post_processor"), path)
    numbers = [*normal.values(), *special.values(), *added.values()]
    if sorted(numbers) != list(range(len(numbers))) or not all(0 <= i < len(numbers) for i in (eos_id, *bos)):
        raise fault(path, f"the {len(numbers)} tokens and the end token {eos_id} are not numbered 0, 1, 2, ...")

    nfc, prefix = normaliser(fields, path)
    if prefix is None:
        name, pattern = "byte-level", splitting_pattern(fields.get("pre_tokenizer"), path)
        ranks, ids, pieces = byte_level(normal, merges, model.get("ignore_merges") is True, path)
    else:
        name, pattern = "sentencepiece", r"(?s:.+)"
        ranks, ids, pieces = sentencepiece(normal, merges, model, path)
    pieces |= {i: token.encode() for token, i in (special | added).items()}
    ids = ids + [(i,) for i in added.values()]
    encoding = tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks,
                                 special_tokens={token: len(ranks) + n for n, token in enumerate(added)})
    return Tokenizer(encoding, ids, pieces, special, eos_id, bos, added, nfc, prefix)


def is_text(value):
    """Whether a JSON value is a text that is not empty and that UTF-8 can spell (no half of a surrogate pair)."""
    return isinstance(value, str) and value != "" and not any("\ud800" <= letter <= "\udfff" for letter in value)


def parts(step, list_key, path):
    """The steps of a normalizer, pre-tokenizer or post-processor: a Sequence's own, or the one there is, or none."""
    steps = [] if step is None else [step]
    if isinstance(step, dict) and step.get("type") == "Sequence":
        steps = step.get(list_key)
    if not isinstance(steps, list) or not all(isinstance(one, dict) and is_text(one.get("type")) for one in steps):
        raise fault(path, f"the steps among {list_key} are not objects with a type each")
    return steps


def normaliser(fields, path):
    """(nfc, prefix) as in Tokenizer; prefix is None for byte-level vocabularies."""
    steps = parts(fields.get("normalizer"), "normalizers", path)
    kinds = [step["type"] for step in steps]
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": METASPACE}
    if kinds in ([], ["NFC"]):
        pre = parts(fields.get("pre_tokenizer"), "pretokenizers", path)
        if [step["type"] for step in pre] != ["Metaspace"]:
            return kinds == ["NFC"], None
        scheme = pre[0].get("prepend_scheme", "always")
        if pre[0].get("split", True) or pre[0].get("replacement") != METASPACE or kinds \
                or scheme not in ("always", "first", "never"):
            raise fault(path, "a Metaspace pre-tokenizer that splits is not supported", "use another model")
        return False, "" if scheme == "never" else "missing"
    if steps[-1] == spaces and (kinds == ["Replace"] or kinds == ["Prepend", "Replace"] and
                                steps[0].get("prepend") == METASPACE) and fields.get("pre_tokenizer") is None:
        return False, "always" if len(steps) == 2 else ""
    raise fault(path, f"a normalizer of {', '.join(kinds)} is not supported", "use another model")


def splitting_pattern(pre_tokenizer, path):
    """The regular expression that cuts a text into pieces, for a byte-level vocabulary."""
    steps = parts(pre_tokenizer, "pretokenizers", path)
    kinds = [step["type"] for step in steps]
    last = steps[-1] if steps else {}
    if kinds[-1:] == ["ByteLevel"] and not last.get("add_prefix_space"):
        own = last.get("use_regex", True)
        if kinds == ["ByteLevel"] and own:
            return GPT2
        if kinds == ["Digits", "ByteLevel"] and own and steps[0].get("individual_digits"):
            return SMOLLM
        pattern = steps[0].get("pattern")
        if kinds == ["Split", "ByteLevel"] and not own and isinstance(pattern, dict) and "Regex" in pattern \
                and steps[0].get("behavior") == "Isolated" and not steps[0].get("invert"):
            if pattern["Regex"] not in SPELLED_OUT:
                raise fault(path, f"a splitting pattern that is not one of the {len(SPELLED_OUT)} known ones",
                            "add it to tokenizer.py if you trust it")
            return pattern["Regex"]
    raise fault(path, f"a pre-tokenizer of {', '.join(kinds) or 'nothing'} with these settings is not supported",
                "supported: ByteLevel, alone or after Digits or an isolating Split")


def first_ids(post_processor, path):
    """The ids that the post-processor puts before a text."""
    for step in parts(post_processor, "processors", path):
        if step["type"] == "TemplateProcessing":
            try:
                single = [pair for piece in step["single"] for pair in piece.items()]
                before = single[:[kind for kind, _ in single].index("Sequence")]
                ids = [i for _, piece in before for i in step["special_tokens"][piece["id"]]["ids"]]
            except (KeyError, TypeError, AttributeError, ValueError):
                ids = [None]
            if not all(type(i) is int for i in ids):
                raise fault(path, "a template of the post-processor that gives no ids")
            return ids
    return []


# ---- vocabularies for tiktoken: {bytes: rank}, the model's ids of each rank, {id: bytes} ----------------------------

def byte_level(vocabulary, merges, whole_words, path):
    """Of a byte-level vocabulary {token: id}, its bytes spelled in the byte alphabet. With `whole_words` a piece that
    is a token is taken as it is even if no merges lead to it (tiktoken looks a piece up before it merges).

    A vocabulary may lack bytes: SmolLM's has no token for six control characters nor for bytes that hardly occur in
    UTF-8. The Hugging Face tokenizer drops such a byte, then merges what is left; tiktoken needs all 256, and their
    ranks get no ids. The ids are the same, unless the byte stands beside punctuation: there Hugging Face may merge
    across the gap, and we do not.
    """
    byte_of = byte_alphabet()
    if not set().union(*vocabulary) <= byte_of.keys():
        raise fault(path, "a token has a character that stands for no byte")
    pieces = {i: bytes(map(byte_of.get, token)) for token, i in vocabulary.items()}
    ranks = {bytes([byte]): byte for byte in range(256)}
    for left, right in merge_pairs(merges, vocabulary, path):
        ranks.setdefault(pieces[vocabulary[left + right]], len(ranks))
    for piece in pieces.values() if whole_words else ():
        ranks.setdefault(piece, len(ranks))
    id_of = {piece: i for i, piece in pieces.items()}
    return ranks, [(id_of[piece],) if piece in id_of else () for piece in ranks], pieces


def sentencepiece(vocabulary, merges, model, path):
    """Of a SentencePiece vocabulary {token: id} with byte fallback.

    The ranks: bytes, then the characters beyond ASCII with their unfinished beginnings, so that every character is put
    together before anything else is, then the merges. A byte or beginning that is left over is spelled in byte tokens.
    """
    byte_ids = [vocabulary.get(f"<0x{byte:02X}>") for byte in range(256)]
    if not model.get("byte_fallback") or None in byte_ids:
        raise fault(path, "a SentencePiece vocabulary without byte fallback is not supported", "use another model")
    if not all(map(is_text, vocabulary)):
        raise fault(path, "a token without text")
    pieces = {i: token.replace(METASPACE, " ").encode() for token, i in vocabulary.items()}
    ranks = {bytes([byte]): byte for byte in range(256)}
    for token, i in vocabulary.items():
        if len(token) == 1:
            for end in range(2, len(pieces[i]) + 1):
                ranks.setdefault(pieces[i][:end], len(ranks))
    for left, right in merge_pairs(merges, vocabulary, path):
        ranks.setdefault(pieces[vocabulary[left + right]], len(ranks))
    pieces |= {i: bytes([byte]) for byte, i in enumerate(byte_ids)}
    spelled = set(byte_ids)
    id_of = {piece: i for i, piece in pieces.items() if i not in spelled}
    ids = [(id_of[piece],) if piece in id_of else tuple(byte_ids[byte] for byte in piece) for piece in ranks]
    return ranks, ids, pieces


def merge_pairs(merges, vocabulary, path):
    """The merges, written "a b" or ["a", "b"], as pairs of tokens. ValueError if one makes no known token."""
    for merge in merges:
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(token, str) for token in pair) \
                or "".join(pair) not in vocabulary:
            raise fault(path, f"the merge {merge!r} does not make a token of the vocabulary")
        yield pair


def required(metadata, key, kind, path):
    """The metadata field `key` of the file `path`. ValueError if it is missing or not of type `kind`."""
    if key not in metadata:
        raise fault(path, f"metadata field {key} is missing", "the file is incomplete or of another kind")
    value = metadata[key]
    if type(value) is not kind:  # a bool is not an int here
        raise fault(path, f"metadata field {key} is a {type(value).__name__}, expected a {kind.__name__}")
    return value
