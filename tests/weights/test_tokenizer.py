"""The tokenizers give the ids that a model was trained on: those of the Hugging Face tokenizer it came with."""
import copy
import itertools
import json
import random
import unicodedata

import numpy as np
import pytest
import tiktoken

from data import prompting
from data.practice import practice
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
    assert ours.special["<|im_end|>"] == 2 and ours.end_ids == (2,) and ours.bos == []
    assert ours.end_text == "answers end in '<|im_end|>' (2), says tokenizer.ggml" and ours.chat == "tokenizer.chat_template"


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


KINDS = {"gpt2": "gpt-2", "smollm": "smollm", "llama3": "llama-bpe", "qwen": "qwen2"}  # trained vocabularies, tokenizer.ggml.pre


def gguf_fields(fields, **more):
    """What a GGUF file says of a trained vocabulary."""
    tokens = sorted(fields["model"]["vocab"], key=fields["model"]["vocab"].get)
    said = {"tokens": tokens, "token_type": np.array([3] * 3 + [1] * (len(tokens) - 3), np.int32), "eos_token_id": 2, "bos_token_id": 1,
            "merges": [" ".join(pair) for pair in fields["model"]["merges"]], "model": "gpt2", **more}
    return {f"tokenizer.ggml.{key}": value for key, value in said.items() if value is not None}


@pytest.mark.peers
@pytest.mark.parametrize("kind", KINDS)
def test_byte_level_gguf_vocabularies_equal_hugging_face(kind, vocabularies):
    """The ids of the family's own tokenizer, an added token included; what export writes of them is the same tokenizer."""
    from tokenizers import Tokenizer
    said = gguf_fields(vocabularies[kind], pre=KINDS[kind])
    said["tokenizer.ggml.token_type"][600] = 4  # user-defined: is recognised
    word = said["tokenizer.ggml.tokens"][600]
    ours = tokenizer.from_gguf(said)
    theirs = Tokenizer.from_str(json.dumps({**vocabularies[kind], "added_tokens": vocabularies[kind]["added_tokens"] + [added(word)]}))
    written = Tokenizer.from_str(json.dumps(tokenizer.gguf_tokenizer_json(said)))
    theirs.encode_special_tokens = written.encode_special_tokens = True
    begin = [1] if kind == "llama3" else []  # llama.cpp's default for this cut
    for text in [NASTY, *NASTY.splitlines(), *(NASTY[i:i + 40] for i in range(0, len(NASTY), 7)), f"a {word}{word} b", "e\u0301"]:
        ids = ours.encode(text)
        assert ids == begin + theirs.encode(text).ids == written.encode(text).ids
        assert ours.decode(ids[len(begin):]) == written.decode(ids[len(begin):])


def by_score(text, tokens, scores):
    """SentencePiece's merges, slowly: of all neighbours that make a token, those of the highest score, the first of these."""
    parts, scores = list(text), dict(zip(tokens, scores))
    while True:
        made = [(scores[a + b], -i) for i, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in scores]
        if not made:
            return [byte for part in parts for byte in ([part] if part in scores else [f"<0x{b:02X}>" for b in part.encode()])]
        i = -max(made)[1]
        parts[i:i + 2] = [parts[i] + parts[i + 1]]


@pytest.mark.peers
@pytest.mark.parametrize("space, begin", [(None, None), (False, False), (True, True)])
def test_sentencepiece_gguf_vocabularies_are_merged_by_score(space, begin, vocabularies):
    """Its fields add_space_prefix and add_bos_token, which are true where they are missing; export writes the same tokenizer."""
    from tokenizers import Tokenizer
    said = gguf_fields(vocabularies["llama2"], model="llama", merges=None, pre="default", add_space_prefix=space, add_bos_token=begin)
    tokens = said["tokenizer.ggml.tokens"]
    said["tokenizer.ggml.token_type"][3:259] = 6
    said["tokenizer.ggml.scores"] = -np.arange(len(tokens), dtype=np.float32)
    said["tokenizer.ggml.scores"][3:259] = 0
    ours, written = tokenizer.from_gguf(said), Tokenizer.from_str(json.dumps(tokenizer.gguf_tokenizer_json(said)))
    written.encode_special_tokens = True
    reachable = {token: score for token, score in zip(tokens[259:], said["tokenizer.ggml.scores"][259:].tolist())}
    for text in [*NASTY.splitlines(), *(NASTY[i:i + 40] for i in range(0, len(NASTY), 7))]:
        before = "\u2581" * (space is not False) if text else ""
        expected = by_score(before + text.replace(" ", "\u2581"), reachable.keys(), reachable.values())
        expected = [1] * (begin is not False) + [tokens.index(token) for token in expected]
        assert ours.encode(text) == expected == written.encode(text).ids
    assert ours.decode(ours.encode("ab  c", start=False)) == "ab  c"


@pytest.mark.parametrize("changes, ids, text", [
    ({}, [2], "answers end in '<|im_end|>' (2), says tokenizer.ggml"),
    ({"eot_token_id": 0}, [2, 0], "answers end in '<|im_end|>' (2), says tokenizer.ggml; "
     "generation stops at '<|endoftext|>' (0) too (tokenizer.ggml)"),
    ({"eos_token_id": 0}, [0, 2], "answers end in '<|endoftext|>' (0), says tokenizer.ggml; "
     "generation stops at '<|im_end|>' (2) too (tokenizer.ggml)"),
    ({"eos_token_id": None, "eom_token_id": 1}, [2, 1], None), ({"eos_token_id": None, "eot_token_id": 1}, [1], None)])
def test_every_end_token_of_a_gguf_file_ends_an_answer(changes, ids, text):
    """eos, eot and eom; an eot that the file does not name is known by its spelling, as in llama.cpp. The first is taught."""
    ours = tokenizer.from_gguf(read(**changes))
    assert (ours.eos_id, list(ours.end_ids)) == (ids[0], ids) and text in (None, ours.end_text)


@pytest.mark.parametrize("changes, message", [
    ({"merges": None}, "tokenizer.ggml.merges is missing"),
    ({"eos_token_id": True}, "tokenizer.ggml.eos_token_id is a bool, expected a int"),
    ({"eos_token_id": 269}, "tokenizer.ggml.eos_token_id is 269, of 269 tokens"),
    ({"add_bos_token": True}, "begin with a token that tokenizer.ggml.bos_token_id does not name"),
    ({"add_bos_token": 1}, "tokenizer.ggml.add_bos_token is a int, expected a bool"),
    ({"tokens": "abc"}, "tokenizer.ggml.tokens is a str, expected a list"),
    ({"pre": "default"}, "'default' is not supported; supported: 'llama', or 'gpt2' with 'gpt-2' or 'smollm' or 'qwen2'"),
    ({"pre": None}, "splitting rule 'default' is not supported"),
    ({"model": "bert"}, "tokenizer 'bert' .* not supported"),
    ({"model": "llama"}, "tokenizer.ggml.scores is missing"),
    ({"model": "llama", "scores": np.ones(5, np.float32)}, "5 scores for 269 tokens"),
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


def added(content, id=0, **flags):
    """An added token as tokenizer.json has it."""
    plain = {"special": False, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": id, "content": content, **plain, **flags}


def test_added_tokens_that_are_not_control_tokens_are_recognised():
    """An added token like <think> is one id in a text; a control token spelled out is its characters."""
    fields = byte_vocabulary()
    fields["added_tokens"].append({"id": 320, "content": "<think>", "special": False})
    ours = tokenizer.from_tokenizer_json(fields, 2)
    assert ours.encode("a<think>b")[1] == 320 and len(ours.encode("a<think>b")) == 3
    assert 1 not in ours.encode("a<s>b") and ours.decode(ours.encode("a<think>b</s>")) == "a<think>b</s>"


BITS = [*"<>m1ab_- \n\t\x85\x1c\u00a0\u2581\u0301\u0327\u200d\u2460\u24b6\u00e9\u00b2🙂",
        "<m>", "<m", "  ", "e\u0301", "<s>", "</s>", "s>", "12", "'s", "the", " the"]
FLAGS = {"special": 0.3, "single_word": 0.3, "lstrip": 0.4, "rstrip": 0.4, "normalized": 0.5}  # and how often each is set


@pytest.fixture(scope="module")
def vocabularies():
    """{kind: tokenizer.json} of every family, and of SentencePiece with each rule for the space that a text begins with."""
    texts = [NASTY, *(text for example in practice("train", 60) for text in example.values())]
    made = {kind: trained(kind, texts, 700) for kind in ("gpt2", "smollm", "llama3", "qwen", "llama2", "mistral")}
    for scheme in ("always", "never"):
        made[scheme] = {**made["mistral"], "pre_tokenizer": {**made["mistral"]["pre_tokenizer"], "prepend_scheme": scheme}}
    made["replace"] = {**made["mistral"], "pre_tokenizer": None, "normalizer": made["llama2"]["normalizer"]["normalizers"][1]}
    return made


def check_added_tokens(vocabulary, seeds, texts=25):
    """Random added tokens of all flags, numbered at random, in a vocabulary: the ids of random texts are those of tokenizers."""
    from tokenizers import Tokenizer
    for seed in seeds:
        choose, fields = random.Random(seed), copy.deepcopy(vocabulary)
        for _ in range(choose.randint(1, 8)):
            content = "".join(choose.choices(BITS, k=choose.choice((1, 1, 2, 3))))
            if choose.random() < 0.2:  # a word that merges make
                content = choose.choice(list(fields["model"]["vocab"]))
            flags = {flag: choose.random() < share for flag, share in FLAGS.items()}
            if content in ("\u2581\u2581", "  ", "e\u0301", "\u2581", " "):  # where two are one, normalised, tokenizers takes either
                flags["normalized"] = False
            fields["added_tokens"].append(added(content, choose.choice((3, 700, 5000)), **flags))
        theirs, ours = Tokenizer.from_str(json.dumps(fields)), tokenizer.from_tokenizer_json(fields, 2)
        theirs.encode_special_tokens = True
        words = BITS + 3 * [token["content"] for token in fields["added_tokens"]]
        for _ in range(texts):
            text = "".join(choose.choices(words, k=choose.randint(0, 12)))
            try:
                expected = theirs.encode(text, add_special_tokens=False).ids
            except BaseException as error:  # noqa: B902 (a panic of Rust: tokenizers ends where a token strips a token)
                assert "PanicException" in type(error).__name__
                continue
            assert ours.encode(text) == expected, (seed, text, fields["added_tokens"][3:])


@pytest.mark.peers
@pytest.mark.parametrize("kind", ["gpt2", "smollm", "llama3", "qwen", "llama2", "mistral", "always", "never", "replace"])
def test_added_tokens_are_found_as_hugging_face_finds_them(kind, vocabularies):
    """Which one wins, what it strips, whole words, normalised ones, and the space before what follows one."""
    check_added_tokens(vocabularies[kind], range(40))


@pytest.mark.peers
@pytest.mark.long
def test_thousands_of_added_tokens(vocabularies):
    """The same with 1000 vocabularies of each kind."""
    for fields in vocabularies.values():
        check_added_tokens(fields, range(1000))


@pytest.mark.peers
@pytest.mark.parametrize("kind, token, text, pieces", [
    ("gpt2", added("<m>", lstrip=True), "a <m> b", ["a", "<m>", " b"]),
    ("gpt2", added("<m>", rstrip=True), "a <m> b", ["a", " ", "<m>", "b"]),
    ("gpt2", added("<m>", single_word=True), "x<m> <m>", ["x", "<", "m", ">", " ", "<m>"]),
    ("mistral", added("<step>"), "1<step>2", [" ", "1", "<step>", "2"]), ("mistral", added("<step>"), "<step>2", ["<step>", "2"]),
    ("always", added("<step>"), "1<step>2", [" ", "1", "<step>", " ", "2"]), ("always", added("<step>"), "<step>2", ["<step>", " ", "2"]),
    ("never", added("<step>"), "1<step>2", ["1", "<step>", "2"]), ("llama2", added("<step>"), "1<step>2", [" ", "1", "<step>", " ", "2"]),
    ("llama2", added("<step>", normalized=True), "1<step>", [" ", "1", "<", "st", "ep", ">"]),  # it is looked for with its space
])
def test_added_tokens_by_example(kind, token, text, pieces, vocabularies):
    """What each flag does, and what SentencePiece puts before what follows; a text that goes on gets nothing before it."""
    fields = {**vocabularies[kind], "added_tokens": [*vocabularies[kind]["added_tokens"], token]}
    ours = tokenizer.from_tokenizer_json(fields, 2)
    shown = [ours.pieces[i].decode() for i in ours.encode(text)]
    assert "".join(shown) == "".join(pieces) and [piece for piece in shown if piece in ("<m>", "<step>")] == [
        piece for piece in pieces if piece in ("<m>", "<step>")]
    if not text.startswith("<") and kind in ("mistral", "always", "llama2"):
        assert [ours.pieces[i] for i in ours.encode(text, start=False)][0] != b" "


@pytest.mark.peers
def test_numbers_are_those_that_tokenizers_gives():
    """A vocabulary with holes; an added word that merges make; added tokens whose numbers in the file are not those they get."""
    tokenizers = pytest.importorskip("tokenizers")
    fields = copy.deepcopy(byte_vocabulary())
    fields["pre_tokenizer"]["trim_offsets"] = True
    fields["model"]["vocab"]["hm"] = 500  # where 319 was
    fields["added_tokens"] = [added("<unk>", special=True), added("ai"), added("<a>", 900), added("</s>", special=True), added("<b>", 900)]
    theirs, ours = tokenizers.Tokenizer.from_str(json.dumps(fields)), tokenizer.from_tokenizer_json(fields, 2)
    for text in ("hm", "ai hai <a> hm<b>x", "aai", "<a></s><b>"):
        theirs.encode_special_tokens = True
        assert ours.encode(text) == theirs.encode(text).ids
    assert ours.encode("hm") == [500] and ours.encode("ai") == [fields["model"]["vocab"]["ai"]]
    assert ours.added == {"ai": 259, "<a>": 320, "<b>": 321} and ours.vocab_size == 322
    assert ours.notes[0].startswith("added tokens numbered as Hugging Face tokenizers number them: 'ai' is 259, not 0, ")


def test_a_token_beyond_the_embedding_is_refused_in_a_text_only():
    """A pad token that was added without a row of its own loads; one that texts may hold is refused where one does."""
    fields = byte_vocabulary()
    fields["added_tokens"] += [added("<pad>", special=True), added("<x>")]
    ours = tokenizer.from_tokenizer_json(fields, 2, rows=320)
    assert ours.special["<pad>"] == 320 and 320 not in ours.encode("a<pad>")
    with pytest.raises(ValueError, match="a text holds the added token '<x>', number 321, and the model's embedding has 320 rows"):
        ours.encode("a<x>")
    with pytest.raises(ValueError, match="some.json: 320 tokens for an embedding of 319 rows"):
        tokenizer.from_tokenizer_json(byte_vocabulary(), 2, "some.json", 319)


@pytest.mark.parametrize("kind", ["gpt-2", "smollm", "llama-bpe", "tekken"])
def test_texts_of_one_thing_repeated_are_encoded(kind):
    """A million spaces, line breaks, letters, digits, marks, in every cut; the cut of long runs of white space is what it was."""
    ours = tokenizer.from_gguf(read(pre=kind, add_bos_token=False))
    for unit in (" ", "\n", "\t \n", "a", "7", "'", " a", "aB", "\u00e9"):
        assert len(ours.encode(unit * (10**6 // len(unit)) + "x")) > 5 * 10**5 / len(unit)
    plain = tiktoken.Encoding("plain", pat_str=tokenizer.PATTERNS[kind], mergeable_ranks=ours.encoding._mergeable_ranks, special_tokens={})
    for spaces, end in itertools.product((1, 2, 3, 99, 100, 101, 102, 200, 201, 202, 1001), ("", "a", "7", "!", "\n", "\n!")):
        text = "a" + " " * spaces + end
        assert ours.encoding.encode_ordinary(text) == plain.encode_ordinary(text)


def test_a_model_without_a_type_is_bpe():
    """As in the tokenizer.json that GPT-2 was published with."""
    fields = byte_vocabulary()
    typed = tokenizer.from_tokenizer_json(fields, 2).encode("ab the 12")
    untyped = {**fields, "model": {key: value for key, value in fields["model"].items() if key != "type"}}
    assert tokenizer.from_tokenizer_json(untyped, 2).encode("ab the 12") == typed
    with pytest.raises(ValueError, match="a tokenizer of type None is not supported"):
        tokenizer.from_tokenizer_json({**fields, "model": {**fields["model"], "type": None}}, 2)


@pytest.mark.parametrize("change, message", [
    ({"added_tokens": [{"id": 0, "content": ""}]}, "an added token without text, number or flags"),
    ({"added_tokens": [{"id": 0, "content": "\ud800"}]}, "an added token without text, number or flags"),
    ({"added_tokens": [{"id": 0, "content": "<s>", "lstrip": 1}]}, "an added token without text, number or flags: .'id': 0"),
    ({"model": {**byte_vocabulary()["model"], "vocab": {"a": 1, "b": -1}}}, "a token without a number"),
    ({"post_processor": {"type": "RobertaProcessing", "cls": ["<s>", 1]}}, "a post-processor of RobertaProcessing is not supported"),
    ({"post_processor": {"type": "TemplateProcessing", "single": [{}]}}, "a template of the post-processor that gives no ids"),
    ({"model": {"type": "Unigram"}}, "a tokenizer of type 'Unigram' is not supported"),
    ({"model": {**byte_vocabulary()["model"], "vocab": {"a": 1, "b": 1}}}, "two tokens with one number"),
    ({"model": {**byte_vocabulary()["model"], "vocab": {"a": 1, "ab": 2}, "merges": ["a b"]}}, "does not make a token of the vocabulary out of two"),
    ({"model": {**byte_vocabulary()["model"], "vocab": {"a": 1}, "merges": [], "unk_token": "a"}}, "bytes that have no token stand for 'a'"),
    ({"post_processor": {"type": "Sequence", "processors": 2 * [{"type": "TemplateProcessing", "single": []}]}}, "two templates"),
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
