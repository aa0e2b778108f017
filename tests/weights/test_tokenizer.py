"""The tokenizer gives the ids that the model was trained on: those of the Hugging Face tokenizer it came with."""

import json
import random
import unicodedata

import numpy as np
import pytest

from tests.tiny import tiny_metadata
from weights import base_model, tokenizer

ABSENT = "\x04\x06\x13\x14\x16\x1d"  # control characters for which the default model has no token

NASTY = """\
0 1 12 123 4567 1,234.56 7 8  9   10 x1 1x 1 x x  1 a1b2c3 1\t2\t\t3 \t4 5\n6
\n7 \n 8  \n  9 ½ ² Ⅷ ३४ ١٢ 5' 5's $5 -5 5% 5  
 leading  two   three    four\ttab\t\ttabs \t mixed\t end of line  \n\n\n  three newlines \r\n CRLF\r\n\r\n \r alone\r
don't DON'T I'll I'LL we've WE'VE they're THEY'RE I'm I'M he'd HE'D it's IT'S 'tis 'quoted' ''s '  's o'clock ’s don’t
café naïve Ångström a\u0301 e\u0301\u0323 n\u0303o \u0301alone Ｆｕｌｌ　ｗｉｄｔｈ ﬁ ß ẞ İi
🙂 👩‍👩‍👧‍👦 🏳️‍🌈 🇩🇪🇫🇷 👍🏽 🏴󠁧󠁢󠁥󠁮󠁧󠁿 x🙂5🙂 5
中文字符和 English 混排，标点。数字123 こんにちは カタカナ 한국어 العربية ١٢٣ עברית ไทยสวัสดี हिन्दी
no-break\u00a0space\u00a05 em\u2003space\u20035 thin\u2009x ideographic\u3000 5 zero\u200bwidth
line\u2028sep par\u2029sep nel\x85x
def f(x):\n    return {"a": [x**2, x//3]}  # why?\n\tif x != 0x1F: print(f'{x:>8}')\n<div class="a">&nbsp;</div>
<<48/2=24>>24 #### 72 \\frac{1}{2} $x^2$ <|im_end|> <|endoftext|> <|im_start|>user
\x00 \x01a\x02\x03 \x07\x1b[0m\x1c \x1e5\x1f \x7f\x80\ufeff \ue000 \ufffd \U000e0001 \U0010ffff
"""


@pytest.fixture(scope="module")
def metadata(real_gguf):
    return base_model.read_gguf(real_gguf)[0]


@pytest.fixture(scope="module")
def ours(metadata):
    return tokenizer.from_gguf(metadata)


@pytest.fixture(scope="module")
def theirs(metadata):
    """The Hugging Face tokenizer of SmolLM, put together from its parts and the file's vocabulary."""
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {token: i for i, token in enumerate(metadata["tokenizer.ggml.tokens"])}
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    reference = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges))
    reference.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([
        tokenizers.pre_tokenizers.Digits(individual_digits=True),
        tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)])
    reference.decoder = tokenizers.decoders.ByteLevel()
    return reference


def same(ours, theirs, texts):
    """Assert equal ids for every text."""
    for text in texts:
        assert ours.encode(text) == theirs.encode(text).ids, repr(text)


def test_gsm8k_ids_equal_hugging_face_and_decode_to_the_text(ours, theirs, gsm8k_data):
    """Every question and answer of GSM-8K, train and test."""
    lines = [line for name in ("train", "test") for line in open(gsm8k_data / f"{name}.jsonl", encoding="utf-8")]
    texts = [text for line in lines for text in json.loads(line).values()]
    assert len(texts) == 2 * (7473 + 1319)
    same(ours, theirs, texts)
    assert all(ours.decode(ours.encode(text)) == text for text in texts)


def test_nasty_ids_equal_hugging_face(ours, theirs):
    """The nasty page as a whole, by line, and from every position of it."""
    same(ours, theirs, [NASTY, *NASTY.splitlines(), *(NASTY[i:i + 40] for i in range(len(NASTY)))])


def test_long_runs_equal_hugging_face(ours, theirs):
    """Runs of thousands of one character."""
    same(ours, theirs, [unit * 3000 for unit in (" ", "\n", "\t ", "a", "7", "!", " 7", "é", "🙂", "ab", "- ")])


def test_random_ids_equal_hugging_face(ours, theirs, metadata):
    """Random strings over nasty characters, and random concatenations of pieces of the vocabulary."""
    byte_of, choose = tokenizer.byte_alphabet(), random.Random(0)
    nasty = [*" \t\n\r 05'.,!-_sStTdmrevlLaéا日本🙂\u0301\u200d\u00a0\u3000\x00\x1c\x85²Ⅷ३", "'s", "'LL", "  ", "the"]
    pieces = [bytes(byte_of[c] for c in token) for token in metadata["tokenizer.ggml.tokens"][17:]]
    for _ in range(4000):
        same(ours, theirs, ["".join(choose.choices(nasty, k=choose.randint(1, 60)))])
        same(ours, theirs, [b"".join(choose.choices(pieces, k=choose.randint(1, 12))).decode(errors="ignore")])


def test_characters_equal_hugging_face(ours, theirs):
    """Characters of all scripts between letters, spaces, digits and punctuation. (Left out: characters newer than this
    Python, which libraries of different age put in different classes, and those without a token, tested below.)"""
    characters = [chr(i) for i in [*range(0x3000), *range(0x3000, 0x110000, 13)]]
    known = [c for c in characters if unicodedata.category(c) not in ("Cn", "Cs") and c not in ABSENT]
    assert len(known) > 15000
    same(ours, theirs, (f"a{c}b {c}  {c}5 {c}? {c}" for c in known))


def test_absent_bytes_are_dropped_as_hugging_face_drops_them(ours, theirs):
    """A character without a token is left out and the pieces beside it stay as they are. Next to punctuation only the
    text is the same: Hugging Face may merge over the gap."""
    assert ours.encode(ABSENT) == []
    same(ours, theirs, [f"a{c}b {c} {c}5{c}\n {c}{c}x{c} 中{c}文" for c in ABSENT])
    same(ours, theirs, ["\U00040000", "a\U000bfffeb"])  # their first bytes, F1 and F2, have no token
    assert all(ours.decode(ours.encode(f"a!{c}!b")) == "a!!b" for c in ABSENT)


def test_every_token_of_the_vocabulary_encodes_to_itself(ours, theirs, metadata):
    """Looked up whole, as tiktoken does, or merged step by step, as Hugging Face does, a token is the same id."""
    byte_of = tokenizer.byte_alphabet()
    for i, token in enumerate(metadata["tokenizer.ggml.tokens"][17:], start=17):
        assert ours.ids[ours.encoding.encode_single_token(bytes(byte_of[c] for c in token))] == (i,)
        assert [part.id for part in theirs.model.tokenize(token)] == [i]


def test_nasty_text_survives_encode_and_decode(ours):
    """decode(encode(text)) == text where the vocabulary has all bytes."""
    assert not set(NASTY) & set(ABSENT) and ours.decode(ours.encode(NASTY)) == NASTY


def test_digits_stand_alone_and_spaces_before_them_stay_whole(ours):
    """The splitting rule by example: "  5" is two spaces and a digit, "  a" a space and " a"."""
    def pieces(text):
        return [ours.decode([i]) for i in ours.encode(text)]

    assert pieces("12 345") == ["1", "2", " ", "3", "4", "5"]
    assert pieces("  5") == ["  ", "5"] and pieces("  a") == [" ", " a"]


def test_control_tokens_in_text_are_plain_text(ours):
    """A data set cannot inject a control token: its spelling is encoded as ordinary characters, and decodes back."""
    for text, i in ours.special.items():
        assert i not in ours.encode(f"a {text} b") and ours.decode(ours.encode(text)) == text
        assert ours.decode([i]) == text


def test_attributes_of_the_default_model(ours):
    """49152 ids, 17 of them control tokens; an answer ends with <|im_end|>."""
    assert (ours.vocab_size, len(ours.special), ours.eos_id) == (49152, 17, 2)
    assert ours.special["<|im_end|>"] == 2 and ours.encoding.name == "smollm"


def test_cut_characters_decode_to_the_replacement_character(ours):
    """An answer that ends inside a character is still a string."""
    assert ours.decode(ours.encode("𐍈")[:1]) == "\ufffd"


def read(**changes):
    """The tiny vocabulary as `read_gguf` returns it, with changed fields (None: left out)."""
    fields = {key.rpartition(".")[2]: value for key, value in tiny_metadata().items() if key.startswith("tokenizer")}
    fields["token_type"] = np.array(fields["token_type"], np.int32)
    fields |= changes
    return {f"tokenizer.ggml.{key}": value for key, value in fields.items() if value is not None}


def test_gpt2_rule_keeps_numbers_together():
    """Under "gpt-2" a number with its space is one piece, so a merge of digits applies; under "smollm" it cannot."""
    tokens = tiny_metadata()["tokenizer.ggml.tokens"] + ["12", "Ġ12"]
    types = np.array([3] * 3 + [1] * (len(tokens) - 3), np.int32)
    merges = tiny_metadata()["tokenizer.ggml.merges"] + ["1 2", "Ġ 12"]
    gpt2 = tokenizer.from_gguf(read(tokens=tokens, token_type=types, merges=merges, pre="gpt-2"))
    smollm = tokenizer.from_gguf(read(tokens=tokens, token_type=types, merges=merges))
    assert len(gpt2.encode(" 12")) == 1 and len(smollm.encode(" 12")) == 3


def test_gpt2_rule_equals_hugging_face():
    """The nasty page under the GPT-2 cut, over a vocabulary of bytes, so that the cut alone decides the ids."""
    tokenizers = pytest.importorskip("tokenizers")
    cut = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    regex = pytest.importorskip("regex")
    for text in [NASTY, *(NASTY[i:i + 40] for i in range(len(NASTY)))]:
        theirs = [text[a:b] for _, (a, b) in cut.pre_tokenize_str(text)]
        assert regex.findall(tokenizer.GPT2, text) == theirs


@pytest.mark.parametrize("changes, message", [
    ({"merges": None}, "tokenizer.ggml.merges is missing"),
    ({"eos_token_id": None}, "tokenizer.ggml.eos_token_id is missing"),
    ({"eos_token_id": True}, "tokenizer.ggml.eos_token_id is a bool, expected a int"),
    ({"eos_token_id": 269}, "end token 269"),
    ({"tokens": "abc"}, "tokenizer.ggml.tokens is a str, expected a list"),
    ({"pre": "qwen2"}, "'qwen2' is not supported; supported: 'gpt2' with 'gpt-2' or 'smollm'"),
    ({"model": "llama"}, "tokenizer 'llama' .* not supported"),
    ({"token_type": np.ones(5, np.int32)}, "269 tokens, .* 5 token types"),
    ({"tokens": ["x"] * 269}, "269 tokens, [12] of them distinct"),
    ({"merges": ["Ġ t", "x y"]}, "the merge 'x y' does not make a token of the vocabulary"),
    ({"merges": ["Ġ t a"]}, "the merge 'Ġ t a' does not make a token"),
    ({"tokens": [{"!": "€"}.get(t, t) for t in tiny_metadata()["tokenizer.ggml.tokens"]]}, "stands for no byte"),
])
def test_bad_vocabularies_are_refused(changes, message):
    """One line that names the file and what is wrong with it."""
    with pytest.raises(ValueError, match=f"^some.gguf: .*{message}") as error:
        tokenizer.from_gguf(read(**changes), "some.gguf")
    assert "\n" not in str(error.value)
