"""
Text to token ids and back: byte-pair encoding, run by tiktoken, built from a model's own vocabulary.

Encoding has two steps. A regular expression cuts the text into pieces (words, numbers, punctuation, white space) that
no token may cross; then, inside each piece, neighbouring tokens are merged, earliest-learned merge first, until no
merge applies. Both the expression and the merges are part of the model: another cut gives other ids, and the model
has never seen them.

Two kinds of vocabulary are read. Byte-level BPE (GPT-2, Llama 3, Qwen, SmolLM2) starts from bytes. SentencePiece's BPE
(Llama 2, Mistral) starts from characters, does not cut the text, writes a space as U+2581, and spells a character that
it lacks in bytes; told which bytes make its characters, tiktoken does the same.

Tokens that were added to a vocabulary are found in the text before all this, as Hugging Face's tokenizers finds them.
A GGUF file says in fields of its own what tokenizer.json says, and is read by way of it.
"""
import re
import unicodedata
from typing import NamedTuple

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
QWEN = LLAMA3.replace("{1,3}", "")
SPELLED_OUT = (GPT2.replace("'(?:[sdmt]|ll|ve|re)", "'s|'t|'re|'ve|'m|'ll|'d"), LLAMA3, QWEN, TEKKEN)

METASPACE = "\u2581"  # a space in SentencePiece vocabularies
# Unicode's white space; Python's has more.
SPACES = "\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(map(chr, range(0x2000, 0x200B)))
SPACE_RUN = re.compile(f"[{SPACES}]*")
# Joiners, and circled and squared letters, which Unicode counts as symbols and as alphabetic.
OTHERS_IN_WORDS = "[\u200c\u200d\u24b6-\u24e9\U0001f130-\U0001f149\U0001f150-\U0001f169\U0001f170-\U0001f189]"


def byte_alphabet():
    """The character that stands for each byte in a vocabulary file -> dict of character to byte.

    Printable Latin-1 characters stand for themselves; the other 68 bytes are renamed U+0100, U+0101, ... in order, so
    that no token contains a space or a control character ("Ġ" is the space).
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


# ---- added tokens ---------------------------------------------------------------------------------------------------

class AddedToken(NamedTuple):
    """A token that was added to a vocabulary, with its flags in tokenizer.json."""
    id: int
    content: str
    special: bool = False
    single_word: bool = False  # not inside a word
    lstrip: bool = False  # takes the white space before it along
    rstrip: bool = False  # and behind it
    normalized: bool = False  # is looked for, normalised, in the normalised text


class AddedTokens:
    """Finds added tokens, {spelling: AddedToken}: of those that begin first the longest. A special one hides what
    begins inside it, and stays the text it is: no data set can bring a control token in."""

    def __init__(self, tokens):
        self.tokens, longest_first = tokens, sorted(tokens, key=len, reverse=True)
        wanted = any(not token.special for token in tokens.values())
        self.pattern = re.compile("|".join(map(re.escape, longest_first))) if wanted else None

    def split(self, text):
        """The stretches of a text in their order: (where it begins, its text, the token that it is or None)."""
        done = 0
        for match in self.pattern.finditer(text) if self.pattern else ():
            token, (start, end) = self.tokens[match[0]], match.span()
            inside = in_word(text[start - 1:start]) or in_word(text[end:end + 1])
            if token.special or token.single_word and inside:
                continue
            if token.lstrip:
                start = done + len(text[done:start].rstrip(SPACES)) if start > done else done
            if token.rstrip:
                end = SPACE_RUN.match(text, end).end()
            if start > done:
                yield done, text[done:start], None
            if end > start:  # else the white space that it is has gone with the token before it
                yield start, text[start:end], token
            done = end
        if done < len(text):
            yield done, text[done:], None


def in_word(letter):
    """Whether a character (or none) is part of a word: a letter, mark, digit or connector as Unicode has them."""
    kind = unicodedata.category(letter) if letter else ""
    return kind[:1] in ("L", "M") or kind in ("Nd", "Nl", "Pc") or re.match(OTHERS_IN_WORDS, letter) is not None


# ---- the tokenizer --------------------------------------------------------------------------------------------------

class Tokenizer:
    """Encodes and decodes with one tiktoken encoding.

    encoding    the tiktoken.Encoding: its own numbers are ranks, the order in which merges apply
    ids         ids[rank]: a tuple of the model's ids: none for a byte that the model lacks, several for a character
                that it spells in bytes
    pieces      {id: bytes} of every id that the model knows
    special     control tokens, string -> id; spelled out in a text they are the plain characters they are
    added       other added tokens, string -> id, which are recognised in a text
    bos         the ids that a text begins with, often none
    eos_id      the token that training ends an answer with
    end_ids     the tokens that generation stops at, eos_id among them
    end_text    which these are and who says so, for the plan
    notes       what else the plan has to say of the files
    rows        how many ids the model has an embedding for (None: all)
    nfc         whether texts are normalised to NFC
    prefix      what SentencePiece does for the space that a first word lacks. By its normaliser: "prepend" (to every
                stretch between added tokens) or "replace" (nothing). By its pre-tokenizer, where there is none yet:
                "always" (to every such stretch), "first" (at the beginning of a text), "never". None: no SentencePiece
    chat        where the model's chat template is, "" if it has none
    """

    def __init__(self, encoding, ids, pieces, added_tokens, bos=(), nfc=False, prefix=None, rows=None):
        self.encoding, self.ids, self.pieces = encoding, ids, pieces
        self.special = {token.content: token.id for token in added_tokens if token.special}
        self.added = {token.content: token.id for token in added_tokens if not token.special}
        self.bos, self.nfc, self.prefix, self.rows = list(bos), nfc, prefix, rows
        self.eos_id, self.end_ids, self.end_text, self.chat, self.notes = None, (), "", "", []
        self.in_text = AddedTokens({token.content: token for token in added_tokens if not token.normalized})
        self.in_normalised = AddedTokens({self.normalise(token.content, True): token
                                          for token in added_tokens if token.normalized})

    @property
    def vocab_size(self):
        """How many ids there are."""
        return len(self.pieces)

    def encode(self, text, start=True):
        """str -> list of ids. `start` is False for a text that continues another one. ValueError for an added token
        that the model has no embedding for."""
        ids = list(self.bos) if start else []
        for place, stretch, token in self.in_text.split(text):
            if token:
                ids.append(self.checked(token))
                continue
            for inner, part, token in self.in_normalised.split(self.normalise(stretch, start or place > 0)):
                if token:
                    ids.append(self.checked(token))
                    continue
                if self.prefix == "always" and (start or place + inner) or \
                        self.prefix == "first" and start and place + inner == 0:
                    part = part if part[0] in (" ", METASPACE) else " " + part
                if self.prefix:
                    part = part.replace(METASPACE, " ")  # one and the same to such a vocabulary
                ids += [id for rank in self.encoding.encode_ordinary(part) for id in self.ids[rank]]
        return ids

    def normalise(self, text, begins):
        """What the model's normaliser makes of a stretch of text; where it does not begin, nothing is put before it."""
        if self.prefix in ("prepend", "replace"):
            return METASPACE * (self.prefix == "prepend" and begins) + text.replace(" ", METASPACE)
        return unicodedata.normalize("NFC", text) if self.nfc else text

    def checked(self, token):
        """The id of an added token that a text holds."""
        if self.rows is not None and token.id >= self.rows:
            raise ValueError(f"a text holds the added token {token.content!r}, number {token.id}, and the model's "
                             f"embedding has {self.rows} rows: take it out of the data")
        return token.id

    def decode(self, ids):
        """list of ids -> str. Bytes that are not UTF-8 (an answer cut inside a character) become U+FFFD."""
        text = b"".join(self.pieces.get(id, b"") for id in ids).decode("utf-8", errors="replace")
        return text.removeprefix(" ") if self.prefix in ("prepend", "always", "first") else text

    def end_at(self, ids, source, own=None, own_source="", path="tokenizer.json"):
        """Settle how answers end: generation stops at every one of `ids`, which `source` names; training teaches `own`,
        the tokenizer's end token as text, if it is one of them, else the first. ValueError where there is none."""
        there = self.pieces if self.rows is None else range(self.rows)
        known = [i for i in dict.fromkeys(ids) if i in there]
        own_id = next((i for i, piece in self.pieces.items() if own and piece == own.encode()), None)
        if not known and own_id in there:
            known, source = [own_id], own_source
        if not known:
            said = f"{source} names {list(ids)[:8] or 'none'}" + f" and {own_source} {own!r}" * bool(own_source)
            raise fault(path, f"no end token: {said}, of {self.vocab_size} tokens", "name one of its tokens there")
        first = own_id if own_id in known else known[0]
        self.eos_id, self.end_ids = first, (first, *(i for i in known if i != first))
        self.end_text = f"answers end in {self.named(first)}, says {own_source if first == own_id else source}"
        if len(known) > 1:
            self.end_text += f"; generation stops at {', '.join(map(self.named, self.end_ids[1:]))} too ({source})"
        if own_id not in (None, first):
            self.end_text += f", not at {self.named(own_id)} ({own_source})"

    def named(self, id):
        """A token for the eye: its text and number."""
        return f"{self.pieces.get(id, b'').decode(errors='replace')!r} ({id})"

    @property
    def chat_text(self):
        """What the plan says behind the name of the prompt's template."""
        return f" (not the model's chat template, {self.chat})" if self.chat else ""


# ---- from a GGUF file, as llama.cpp reads it -------------------------------------------------------------------------

class Cut(NamedTuple):
    """What a value of tokenizer.ggml.pre stands for."""
    pattern: str
    whole_words: bool = False  # a piece that is a token is taken as it is
    bos: bool = False  # texts begin with bos, unless add_bos_token says otherwise
    nfc: bool = False  # llama.cpp leaves this out; the model's own tokenizer has it


CUTS = {"gpt-2": Cut(GPT2), "smollm": Cut(SMOLLM), "qwen2": Cut(QWEN, nfc=True), "tekken": Cut(TEKKEN, True, True),
        **dict.fromkeys(("llama-bpe", "llama3", "llama-v3"), Cut(LLAMA3, True, True))}
PATTERNS = {name: cut.pattern for name, cut in CUTS.items()}
NORMAL, USER_DEFINED, BYTE = 1, 4, 6  # tokenizer.ggml.token_type; all others are control, unknown or unused tokens
LONGEST_PIECE = 256  # characters of a token that is put together from scores
END_OF_TURN = ("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>", "<EOT>",
               "_<EOT>")  # where a file does not say which it is: the first of these


def from_gguf(metadata, path="GGUF metadata"):
    """The tokenizer described by the metadata of the GGUF file `path` (dict, as read by `gguf.read_gguf`).

    add_eos_token is not needed: our texts end where an answer does, and training puts the end token there. Raises
    ValueError for a missing field, another kind of tokenizer, or parts that do not fit together.
    """
    fields = gguf_tokenizer_json(metadata, path)
    known = fields["model"]["vocab"]
    eos = gguf_id(metadata, "eos", len(known), path, 2 if metadata["tokenizer.ggml.model"] == "llama" else None)
    eot, eom = (gguf_id(metadata, name, len(known), path, next((known[text] for text in texts if text in known), None))
                for name, texts in (("eot", END_OF_TURN), ("eom", ["<|eom_id|>"])))
    tokenizer = from_tokenizer_json(fields, path=path)
    tokenizer.end_at([i for i in (eos, eot, eom) if i is not None], "tokenizer.ggml", path=path)
    tokenizer.chat = next((key for key in metadata if key.startswith("tokenizer.chat_template")), "")
    return tokenizer


def gguf_id(metadata, name, count, path, default=None):
    """The id in tokenizer.ggml.NAME_token_id; ValueError unless it is one of `count` tokens."""
    key = f"tokenizer.ggml.{name}_token_id"
    if key not in metadata:
        return default
    i = required(metadata, key, int, path)
    if not 0 <= i < count:
        raise fault(path, f"metadata field {key} is {i}, of {count} tokens")
    return i


def gguf_tokenizer_json(metadata, path="GGUF metadata"):
    """The `tokenizer.json` that says what the fields tokenizer.ggml.* of a GGUF file say."""
    model = required(metadata, "tokenizer.ggml.model", str, path)
    pre = required({"tokenizer.ggml.pre": "default", **metadata}, "tokenizer.ggml.pre", str, path)
    if model not in ("llama", "gpt2") or model == "gpt2" and pre not in CUTS:
        raise fault(path, f"tokenizer {model!r} with splitting rule {pre!r} is not supported",
                    f"supported: 'llama', or 'gpt2' with {' or '.join(map(repr, CUTS))}")
    tokens = required(metadata, "tokenizer.ggml.tokens", list, path)
    types = required(metadata, "tokenizer.ggml.token_type", np.ndarray, path).tolist()
    vocabulary = {token: i for i, token in enumerate(tokens)}
    if not len(tokens) == len(types) == len(vocabulary):
        raise fault(path, f"{len(tokens)} tokens, {len(vocabulary)} of them distinct, {len(types)} token types: these "
                          "do not fit together")
    added = [AddedToken(i, token, special=type != USER_DEFINED or token in END_OF_TURN)._asdict()
             for i, (token, type) in enumerate(zip(tokens, types)) if type not in (NORMAL, BYTE)]
    cut = Cut("", bos=True) if model == "llama" else CUTS[pre]
    fields = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
              "pre_tokenizer": None, "post_processor": None, "decoder": None,
              "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                        "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": model == "llama",
                        "ignore_merges": cut.whole_words, "vocab": vocabulary}}
    if flag(metadata, "tokenizer.ggml.add_bos_token", cut.bos, path):
        bos = gguf_id(metadata, "bos", len(tokens), path, 1 if model == "llama" else None)
        if bos is None:
            raise fault(path, "texts begin with a token that tokenizer.ggml.bos_token_id does not name")
        fields["post_processor"] = begins_with(tokens[bos], bos)
    if model == "gpt2":
        fields["model"]["merges"] = required(metadata, "tokenizer.ggml.merges", list, path)
        fields["normalizer"] = {"type": "NFC"} if cut.nfc else None
        fields["pre_tokenizer"] = cut_steps(cut.pattern)
        fields["decoder"] = byte_level_step(True)
    else:
        fields["model"]["merges"] = merges_by_score(metadata, vocabulary, types, path)
        prepends = flag(metadata, "tokenizer.ggml.add_space_prefix", True, path)
        fields["normalizer"], fields["decoder"] = space_steps(prepends)
    return fields


def flag(metadata, key, default, path):
    """A metadata field that is true or false."""
    return required(metadata, key, bool, path) if key in metadata else default


def merges_by_score(metadata, vocabulary, types, path):
    """The merges of a SentencePiece vocabulary: every two tokens that make a third, the highest scores first."""
    scores = required(metadata, "tokenizer.ggml.scores", np.ndarray, path).tolist()
    if len(scores) < len(vocabulary):
        raise fault(path, f"{len(scores)} scores for {len(vocabulary)} tokens")
    merges = []
    for token, i in sorted(vocabulary.items(), key=lambda item: -scores[item[1]]):
        if len(token) > LONGEST_PIECE:
            raise fault(path, f"a token of {len(token)} characters", f"expected at most {LONGEST_PIECE}")
        if types[i] == NORMAL and " " not in token:
            pairs = [[token[:cut], token[cut:]] for cut in range(1, len(token))]
            merges += [pair for pair in pairs if pair[0] in vocabulary and pair[1] in vocabulary]
    return merges


def cut_steps(pattern):
    """The pre-tokenizer of a byte-level vocabulary, as tokenizer.json has it, that cuts by one of our expressions."""
    if pattern == GPT2:
        return byte_level_step(True)
    first = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    if pattern == SMOLLM:
        first = {"type": "Digits", "individual_digits": True}
    return {"type": "Sequence", "pretokenizers": [first, byte_level_step(pattern == SMOLLM)]}


def byte_level_step(cuts):
    """The step that spells a text in the byte alphabet, and cuts as GPT-2 does where it is told to."""
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": cuts}


def space_steps(prepends):
    """(normalizer, decoder) of a SentencePiece vocabulary, as tokenizer.json has them."""
    there = {"type": "Replace", "pattern": {"String": " "}, "content": METASPACE}
    back = [{"type": "Replace", "pattern": {"String": METASPACE}, "content": " "}, {"type": "ByteFallback"},
            {"type": "Fuse"}]
    if not prepends:
        return there, {"type": "Sequence", "decoders": back}
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    return ({"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": METASPACE}, there]},
            {"type": "Sequence", "decoders": [*back, strip]})


def begins_with(token, i):
    """The post-processor that puts a token before every text."""
    def special(type_id):
        return {"SpecialToken": {"id": token, "type_id": type_id}}

    single = [special(0), {"Sequence": {"id": "A", "type_id": 0}}]
    return {"type": "TemplateProcessing", "single": single,
            "pair": [*single, special(1), {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {token: {"id": token, "ids": [i], "tokens": [token]}}}


# ---- from tokenizer.json --------------------------------------------------------------------------------------------

def from_tokenizer_json(fields, eos_id=None, path="tokenizer.json", rows=None, beside=()):
    """The tokenizer described by a Hugging Face `tokenizer.json` (its parsed `fields`), for a model with an embedding
    of `rows` rows. Tokens that texts are made of must have one; added ones need not, as long as no text holds them.
    Answers end with eos_id, or as `end_at` is told. `beside` lists more added tokens, or the same with other flags.

    Raises ValueError for a kind that this project has no code for, or parts that do not fit together.
    """
    model, listed = required(fields, "model", dict, path), required(fields, "added_tokens", list, path)
    if model.get("type", "BPE") != "BPE":  # GPT-2's own file has none
        raise fault(path, f"a tokenizer of type {model['type']!r} is not supported", "supported: 'BPE'")
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise fault(path, f"{key} = {model[key]!r} is not supported", "use another model")
    vocabulary, merges = required(model, "vocab", dict, path), required(model, "merges", list, path)
    if not all(type(i) is int and i >= 0 for i in vocabulary.values()):
        raise fault(path, "a token without a number")
    if len({*vocabulary.values()}) < len(vocabulary):
        raise fault(path, "two tokens with one number")
    if rows is not None and vocabulary and max(vocabulary.values()) >= rows:
        raise fault(path, f"{1 + max(vocabulary.values())} tokens for an embedding of {rows} rows", "use another model")
    added, notes = added_tokens([*listed, *beside], vocabulary, path)
    bos = first_ids(fields.get("post_processor"), path)
    known = {*vocabulary.values(), *(token.id for token in added)}
    if not known.issuperset(bos) or rows is not None and max([0, *bos]) >= rows:
        raise fault(path, f"texts begin with {bos}, which are not among the {len(known)} tokens")

    nfc, prefix = normaliser(fields, path)
    if prefix is None:
        name, pattern = "byte-level", splitting_pattern(fields.get("pre_tokenizer"), path)
        spelled = {token.content for token in added}
        ranks, ids, pieces = byte_level(vocabulary, merges, model.get("ignore_merges") is True, spelled, path)
        if model.get("unk_token") is not None and not {bytes([byte]) for byte in range(256)} <= {*pieces.values()}:
            raise fault(path, f"bytes that have no token stand for {model['unk_token']!r}: that is not supported",
                        "use another model")
    else:
        name, pattern = "sentencepiece", r"(?s:.+)"
        ranks, ids, pieces = sentencepiece(vocabulary, merges, model, path)
    pieces = {token.id: token.content.encode() for token in added} | pieces
    encoding = tiktoken.Encoding(name, pat_str=shallow(pattern), mergeable_ranks=ranks, special_tokens={})
    tokenizer = Tokenizer(encoding, ids, pieces, added, bos, nfc, prefix, rows)
    tokenizer.notes = notes
    if eos_id is not None:
        tokenizer.end_at([eos_id], "the call", path=path)
    return tokenizer


def added_tokens(listed, vocabulary, path):
    """([AddedToken] of a tokenizer.json, notes on them). They are numbered as tokenizers does it, whatever number
    stands there: one that is in the vocabulary has the vocabulary's, others follow behind."""
    added, following, other = {}, len(vocabulary), []
    for token in listed:
        flags = {}
        if isinstance(token, dict):
            flags = {key: token.get(key, key == "normalized" and not token.get("special"))
                     for key in AddedToken._fields[2:]}
        if not flags or not is_text(token.get("content")) or type(token.get("id")) is not int \
                or not all(type(value) is bool for value in flags.values()):
            raise fault(path, f"an added token without text, number or flags: {str(token)[:80]}")
        content, before = token["content"], added.get(token["content"])
        number = before.id if before else vocabulary.get(content, following)
        following = max(following, number + 1)
        flags["special"] |= before is not None and before.special
        added[content] = AddedToken(number, content, **flags)
        if number != token["id"]:
            other.append(f"{content!r} is {number}, not {token['id']}")
    notes = [f"added tokens numbered as Hugging Face tokenizers number them: {', '.join(other[:4])}"] if other else []
    return list(added.values()), notes


def shallow(pattern):
    """The same expression, which a text of nothing but white space can't exhaust: the engine notes every character
    that it might have to give back, here only every hundredth."""
    return pattern.replace(r"\s+(?!", r"(?:\s{100}(?=\s))*\s+(?!")


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
        return False, scheme
    if steps[-1] == spaces and (kinds == ["Replace"] or kinds == ["Prepend", "Replace"] and
                                steps[0].get("prepend") == METASPACE) and fields.get("pre_tokenizer") is None:
        return False, "prepend" if len(steps) == 2 else "replace"
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
    steps = parts(post_processor, "processors", path)
    if sum(step["type"] == "TemplateProcessing" for step in steps) > 1:
        raise fault(path, "two templates of the post-processor are not supported", "use another model")
    for step in steps:
        if step["type"] not in ("TemplateProcessing", "ByteLevel"):
            raise fault(path, f"a post-processor of {step['type']} is not supported", "supported: TemplateProcessing")
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

def byte_level(vocabulary, merges, whole_words, added, path):
    """Of a byte-level vocabulary {token: id}, its bytes spelled in the byte alphabet (those of `added` tokens need not
    be). With `whole_words` a piece that is a token is taken as it is even if no merges lead to it (tiktoken looks a
    piece up before it merges).

    A vocabulary may lack bytes: SmolLM's has no token for six control characters nor for bytes that hardly occur in
    UTF-8. The Hugging Face tokenizer drops such a byte, then merges what is left; tiktoken needs all 256, and their
    ranks get no ids. The ids are the same, unless the byte stands beside punctuation: there Hugging Face may merge
    across the gap, and we do not.
    """
    byte_of = byte_alphabet()
    spelled = {token: i for token, i in vocabulary.items() if byte_of.keys() >= set(token)}
    foreign = vocabulary.keys() - spelled.keys() - added
    if foreign:
        raise fault(path, f"a token has a character that stands for no byte: {min(foreign)[:40]!r}",
                    "use another model")
    pieces = {i: bytes(map(byte_of.get, token)) for token, i in spelled.items()}
    ranks = {bytes([byte]): byte for byte in range(256)}
    for left, right in merge_pairs(merges, spelled, path):
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
    if not model.get("byte_fallback") or None in byte_ids or model.get("ignore_merges"):
        raise fault(path, "a SentencePiece vocabulary without byte fallback, or that ignores its merges, is not "
                    "supported", "use another model")
    if not all(map(is_text, vocabulary)):
        raise fault(path, "a token without text")
    vocabulary = {token: i for token, i in vocabulary.items() if " " not in token}  # no text has spaces by then
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
    """The merges, written "a b" or ["a", "b"], as pairs of tokens. ValueError if one is not of known tokens."""
    for merge in merges:
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(token, str) for token in pair) \
                or not vocabulary.keys() >= {*pair, "".join(pair)}:
            raise fault(path, f"the merge {merge!r} does not make a token of the vocabulary out of two")
        yield pair


def required(metadata, key, kind, path):
    """The metadata field `key` of the file `path`. ValueError if it is missing or not of type `kind`."""
    if key not in metadata:
        raise fault(path, f"metadata field {key} is missing", "the file is incomplete or of another kind")
    value = metadata[key]
    if type(value) is not kind:  # a bool is not an int here
        raise fault(path, f"metadata field {key} is a {type(value).__name__}, expected a {kind.__name__}")
    return value
