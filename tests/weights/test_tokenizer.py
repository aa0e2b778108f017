"""The tokenizers give the ids that a model was trained on: those of the Hugging Face tokenizer it came with."""
import copy
import json
import random
import unicodedata

import numpy as np
import pytest

from data import prompting
from tests.tiny import byte_vocabulary, one_line, tiny_metadata
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
def texts(gsm8k_data):
    """Every question and answer of GSM-8K, train and test."""
    lines = [line for name in ("train", "test") for line in open(gsm8k_data / f"{name}.jsonl", encoding="utf-8")]
    return [text for line in lines for text in json.loads(line).values()]


# ---- the default model's, from a GGUF file --------------------------------------------------------------------------

@pytest.fixture(scope="module")
def metadata(real_gguf):
    """What the default model's file says."""
    return base_model.read_gguf(real_gguf)[0]


@pytest.fixture(scope="module")
def ours(metadata):
    """Our tokenizer of the default model."""
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


@pytest.mark.peers
def test_gsm8k_ids_equal_hugging_face_and_decode_to_the_text(ours, theirs, texts):
    """Every question and answer of GSM-8K."""
    assert len(texts) == 2 * (7473 + 1319)
    same(ours, theirs, texts)
    assert all(ours.decode(ours.encode(text)) == text for text in texts)


@pytest.mark.peers
def test_nasty_ids_equal_hugging_face(ours, theirs):
    """The nasty page as a whole, by line, and from every position of it; runs of thousands of one character."""
    same(ours, theirs, [NASTY, *NASTY.splitlines(), *(NASTY[i:i + 40] for i in range(len(NASTY)))])
    same(ours, theirs, [unit * 3000 for unit in (" ", "\n", "\t ", "a", "7", "!", " 7", "é", "🙂", "ab", "- ")])


@pytest.mark.peers
def test_random_ids_equal_hugging_face(ours, theirs, metadata):
    """Random strings over nasty characters, and random concatenations of pieces of the vocabulary."""
    byte_of, choose = tokenizer.byte_alphabet(), random.Random(0)
    nasty = [*" \t\n\r 05'.,!-_sStTdmrevlLaéا日本🙂\u0301\u200d\u00a0\u3000\x00\x1c\x85²Ⅷ३", "'s", "'LL", "  ", "the"]
    pieces = [bytes(byte_of[c] for c in token) for token in metadata["tokenizer.ggml.tokens"][17:]]
    for _ in range(4000):
        same(ours, theirs, ["".join(choose.choices(nasty, k=choose.randint(1, 60)))])
        same(ours, theirs, [b"".join(choose.choices(pieces, k=choose.randint(1, 12))).decode(errors="ignore")])


@pytest.mark.peers
def test_characters_equal_hugging_face(ours, theirs):
    """Characters of all scripts between letters, spaces, digits and punctuation. (Left out: characters newer than this
    Python, which libraries of different age put in different classes, and those without a token, tested below.)"""
    characters = [chr(i) for i in [*range(0x3000), *range(0x3000, 0x110000, 13)]]
    known = [c for c in characters if unicodedata.category(c) not in ("Cn", "Cs") and c not in ABSENT]
    assert len(known) > 15000
    same(ours, theirs, (f"a{c}b {c}  {c}5 {c}? {c}" for c in known))


@pytest.mark.peers
def test_absent_bytes_are_dropped_as_hugging_face_drops_them(ours, theirs):
    """A character without a token is left out and the pieces beside it stay as they are. Next to punctuation only the
    text is the same: Hugging Face may merge over the gap."""
    assert ours.encode(ABSENT) == []
    same(ours, theirs, [f"a{c}b {c} {c}5{c}\n {c}{c}x{c} 中{c}文" for c in ABSENT])
    same(ours, theirs, ["\U00040000", "a\U000bfffeb"])  # their first bytes, F1 and F2, have no token
    assert all(ours.decode(ours.encode(f"a!{c}!b")) == "a!!b" for c in ABSENT)


@pytest.mark.peers
def test_every_token_of_the_vocabulary_encodes_to_itself(ours, theirs, metadata):
    """Looked up whole, as tiktoken does, or merged step by step, as Hugging Face does, a token is the same id."""
    byte_of = tokenizer.byte_alphabet()
    for i, token in enumerate(metadata["tokenizer.ggml.tokens"][17:], start=17):
        assert ours.ids[ours.encoding.encode_single_token(bytes(byte_of[c] for c in token))] == (i,)
        assert [part.id for part in theirs.model.tokenize(token)] == [i]


def test_attributes_of_the_default_model(ours):
    """49152 ids, 17 of them control tokens; an answer ends with <|im_end|>."""
    assert (ours.vocab_size, len(ours.special), ours.eos_id) == (49152, 17, 2)
    assert ours.special["<|im_end|>"] == 2 and ours.encoding.name == "smollm"


def test_what_is_encoded_decodes_to_itself(ours):
    """The nasty page, whose bytes the vocabulary has; an answer that ends inside a character is still a string."""
    assert not set(NASTY) & set(ABSENT) and ours.decode(ours.encode(NASTY)) == NASTY
    assert ours.decode(ours.encode("𐍈")[:1]) == "\ufffd"


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


# ---- any GGUF file's ------------------------------------------------------------------------------------------------

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


@pytest.mark.parametrize("changes, message", [
    ({"merges": None}, "tokenizer.ggml.merges is missing"),
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
    one_line(error)


# ---- from tokenizer.json --------------------------------------------------------------------------------------------

LLAMA3_CUT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
              r"|\s+(?!\S)|\s+")
QWEN_CUT = LLAMA3_CUT.replace(r"\p{N}{1,3}", r"\p{N}")


def trained(kind, texts, size=3000):
    """A Hugging Face tokenizer as a family has it, trained on `texts`: its tokenizer.json."""
    tokenizers = pytest.importorskip("tokenizers")
    pre, normalizers, special = tokenizers.pre_tokenizers, tokenizers.normalizers, ["<unk>", "<s>", "</s>"]
    if kind in ("llama2", "mistral"):
        return trained_sentencepiece(kind, texts, size, special)
    built = tokenizers.Tokenizer(tokenizers.models.BPE(ignore_merges=kind == "llama3"))
    cut = {"llama3": LLAMA3_CUT, "qwen": QWEN_CUT}.get(kind)
    steps = [pre.ByteLevel(add_prefix_space=False, use_regex=cut is None)]
    if cut:
        steps.insert(0, pre.Split(tokenizers.Regex(cut), "isolated"))
    elif kind == "smollm":
        steps.insert(0, pre.Digits(individual_digits=True))
    built.pre_tokenizer = pre.Sequence(steps) if len(steps) > 1 else steps[0]
    if kind == "qwen":
        built.normalizer = normalizers.NFC()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=size, special_tokens=special, initial_alphabet=pre.ByteLevel.alphabet())
    built.train_from_iterator(texts, trainer)
    return json.loads(built.to_str())


def trained_sentencepiece(kind, texts, size, special):
    """The same with characters for bytes. Words are learned from words; the vocabulary then serves whole texts, as
    SentencePiece's own do."""
    import tokenizers
    pre, normalizers = tokenizers.pre_tokenizers, tokenizers.normalizers
    model = tokenizers.models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>")
    built, learner = tokenizers.Tokenizer(model), tokenizers.Tokenizer(copy.deepcopy(model))
    if kind == "llama2":
        built.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    else:
        built.pre_tokenizer = pre.Metaspace(replacement="\u2581", prepend_scheme="first", split=False)
    learner.normalizer = normalizers.Replace(" ", "\u2581")
    learner.pre_tokenizer = pre.Split(tokenizers.Regex("\u2581[^\u2581]*"), "isolated")
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=size, special_tokens=special + [f"<0x{b:02X}>" for b in range(256)])
    learner.train_from_iterator(texts, trainer)
    learned, fields = json.loads(learner.to_str()), json.loads(built.to_str())
    fields["model"] |= {key: learned["model"][key] for key in ("vocab", "merges")}
    return {**fields, "added_tokens": learned["added_tokens"][:3]}


@pytest.mark.peers
@pytest.mark.parametrize("kind", ["gpt2", "smollm", "llama3", "qwen", "llama2", "mistral"])
def test_tokenizers_equal_hugging_face(kind, texts):
    """The ids of every fifth text of GSM-8K, of the nasty page and of its pieces; decoding gives the text back."""
    tokenizers = pytest.importorskip("tokenizers")
    fields = trained(kind, [*texts[::7], NASTY])
    theirs = tokenizers.Tokenizer.from_str(json.dumps(fields))
    ours = tokenizer.from_tokenizer_json(fields, 2)
    assert ours.vocab_size == theirs.get_vocab_size() and ours.bos == []
    page = [NASTY, *NASTY.splitlines(), *(NASTY[i:i + 40] for i in range(0, len(NASTY), 3)), "", " ", "  a", "\u2581a"]
    for text in texts[::5] + page:
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False).ids, repr(text)
    again = texts[::5] + [text for text in page if "\u2581" not in text and kind != "qwen"]  # Qwen's normalises to NFC
    if kind == "mistral":  # it adds a space only where there is none, so a first space cannot be told from its own
        again = [text for text in again if not text.startswith(" ")]
    assert all(ours.decode(ours.encode(text)) == text for text in again)


@pytest.mark.parametrize("processor", ["TemplateProcessing", "Sequence"])
def test_texts_begin_with_what_the_post_processor_puts_before_them(processor):
    """The begin token comes once, before a text that begins a sequence, as tokenizers does it; not before a continuation."""
    template = {"type": "TemplateProcessing", "pair": [],
                "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
                "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}}
    steps = template if processor == "TemplateProcessing" else {"type": "Sequence", "processors": [
        {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}, template]}
    ours = tokenizer.from_tokenizer_json({**byte_vocabulary(), "post_processor": steps}, 2)
    assert ours.encode("ab")[0] == 1 and ours.encode("ab", start=False) == ours.encode("ab")[1:]
    example = {"question": "How many?", "answer": "One. #### 1"}
    ids, length = prompting.encode(ours, example)
    assert ids.count(1) == 1 and ids[0] == 1 and ids[:length] == ours.encode(prompting.prompt("How many?"))


def test_added_tokens_that_are_not_control_tokens_are_recognised():
    """An added token like <think> is one id in a text; a control token spelled out is its characters."""
    fields = byte_vocabulary()
    fields["added_tokens"].append({"id": 320, "content": "<think>", "special": False})
    ours = tokenizer.from_tokenizer_json(fields, 2)
    assert ours.encode("a<think>b")[1] == 320 and len(ours.encode("a<think>b")) == 3
    assert 1 not in ours.encode("a<s>b") and ours.decode(ours.encode("a<think>b</s>")) == "a<think>b</s>"


@pytest.mark.parametrize("change, message", [
    ({"added_tokens": [{"id": 0, "content": ""}]}, "a token without text or number"),
    ({"added_tokens": [{"id": 0, "content": "\ud800"}]}, "a token without text or number"),
    ({"added_tokens": [{"id": 9, "content": "<x>"}]}, "are not numbered 0, 1, 2"),
    ({"post_processor": {"type": "TemplateProcessing", "single": [{}]}}, "a template of the post-processor that gives no ids"),
    ({"model": {"type": "Unigram"}}, "a tokenizer of type 'Unigram' is not supported"),
    ({"pre_tokenizer": {"type": "Whitespace"}}, "a pre-tokenizer of Whitespace"),
    ({"normalizer": {"type": "Lowercase"}}, "a normalizer of Lowercase is not supported"),
    ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False},
        {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}]}}, "a splitting pattern that is not one of the 4 known ones"),
])
def test_tokenizers_of_another_kind_are_refused(change, message):
    """One line that names the file and what is not supported."""
    with pytest.raises(ValueError, match=f"^some.json: .*{message}") as error:
        tokenizer.from_tokenizer_json({**byte_vocabulary(), **change}, 2, "some.json")
    one_line(error)
