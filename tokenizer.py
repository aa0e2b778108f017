"""
Text to token ids and back: byte-level BPE as GPT-2 invented it, run by tiktoken, built from a model's own vocabulary.

Encoding has two steps. A regular expression cuts the text into pieces (words, numbers, punctuation, white space) that
no token may cross; then, inside each piece, neighbouring tokens are merged, earliest-learned merge first, until no
merge applies. Both the expression and the merges are part of the model: another cut gives other ids, and the model
has never seen them.
"""

import numpy as np
import tiktoken

# The GPT-2 cut: contractions, then words, numbers and punctuation runs, each with at most one leading space, then
# white space, which leaves its last character to the word that follows.
GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

# SmolLM first sets every digit apart and applies the GPT-2 cut to what lies between. In one expression: a digit is a
# piece and takes no leading space, and white space that ends at a digit ends its stretch of text, so it stays whole.
SMOLLM = r"\p{N}|'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"

PATTERNS = {"gpt-2": GPT2, "smollm": SMOLLM}  # by the value of tokenizer.ggml.pre
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

    encoding    the tiktoken.Encoding (its n_vocab counts the stand-ins for absent bytes too: use vocab_size)
    vocab_size  number of ids the model knows: encode returns and decode accepts 0 .. vocab_size - 1
    special     control tokens, string -> id
    eos_id      the token that ends an answer
    """

    def __init__(self, encoding, vocab_size, special, eos_id):
        self.encoding, self.vocab_size, self.special, self.eos_id = encoding, vocab_size, special, eos_id

    def encode(self, text):
        """str -> list of ids. Control tokens spelled out in the text are encoded as the plain characters they are."""
        return [token for token in self.encoding.encode_ordinary(text) if token < self.vocab_size]

    def decode(self, ids):
        """list of ids -> str. Bytes that are not UTF-8 (an answer cut inside a character) become U+FFFD."""
        return self.encoding.decode(ids)


def from_gguf(metadata, path="GGUF metadata"):
    """The tokenizer described by the metadata of the GGUF file `path` (dict, as read by `ggufile.read_gguf`).

    A vocabulary may lack bytes: SmolLM's has no token for six control characters nor for bytes that hardly occur in
    UTF-8. The Hugging Face tokenizer drops such a byte, then merges what is left. tiktoken needs all 256, so an absent
    byte gets an id above the vocabulary, which `encode` removes. The ids are the same, unless the byte stands beside
    punctuation: there Hugging Face may merge across the gap, and we do not.

    Raises ValueError for a missing field, another kind of tokenizer, or parts that do not fit together.
    """
    model = required(metadata, "tokenizer.ggml.model", str, path)
    pre = required(metadata, "tokenizer.ggml.pre", str, path)
    tokens = required(metadata, "tokenizer.ggml.tokens", list, path)
    types = required(metadata, "tokenizer.ggml.token_type", np.ndarray, path).tolist()
    merges = required(metadata, "tokenizer.ggml.merges", list, path)
    eos_id = required(metadata, "tokenizer.ggml.eos_token_id", int, path)
    if model != "gpt2" or pre not in PATTERNS:
        raise ValueError(f"{path}: tokenizer {model!r} with splitting rule {pre!r} is not supported; "
                         f"supported: 'gpt2' with {' or '.join(map(repr, PATTERNS))}")
    normal = {token: i for i, (token, type) in enumerate(zip(tokens, types)) if type == NORMAL}
    special = {token: i for i, (token, type) in enumerate(zip(tokens, types)) if type != NORMAL}
    if not len(tokens) == len(types) == len(normal) + len(special) or not 0 <= eos_id < len(tokens):
        raise ValueError(f"{path}: {len(tokens)} tokens, {len(normal) + len(special)} of them distinct, {len(types)} "
                         f"token types, end token {eos_id}: these do not fit together; download it again")

    # To tiktoken an id is also a priority: lower ids merge first. So ids must follow the order of the merges.
    if [merge.replace(" ", "", 1) for merge in merges] != [token for token in normal if len(token) > 1]:
        raise ValueError(f"{path}: the {len(merges)} merges do not make the tokens in the order of their ids; "
                         "only such vocabularies are supported")
    byte_of = byte_alphabet()
    if not set().union(*normal) <= byte_of.keys():
        raise ValueError(f"{path}: a token has a character that stands for no byte; download it again")
    ranks = {bytes(map(byte_of.get, token)): i for token, i in normal.items()}
    absent = [bytes([byte]) for byte in range(256) if bytes([byte]) not in ranks]
    ranks |= {byte: len(tokens) + i for i, byte in enumerate(absent)}
    encoding = tiktoken.Encoding(pre, pat_str=PATTERNS[pre], mergeable_ranks=ranks, special_tokens=special)
    return Tokenizer(encoding, len(tokens), special, eos_id)


def required(metadata, key, kind, path):
    """The metadata field `key` of the file `path`. ValueError if it is missing or not of type `kind`."""
    if key not in metadata:
        raise ValueError(f"{path}: metadata field {key} is missing; the file is incomplete or of another kind")
    value = metadata[key]
    if type(value) is not kind:  # a bool is not an int here
        raise ValueError(f"{path}: metadata field {key} is a {type(value).__name__}, expected a {kind.__name__}")
    return value
