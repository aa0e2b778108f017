"""The text that forgetting is measured on: prose, cut evenly, the same for everybody with this Python."""
import pytest

from data import prose
from weights import base_model


def test_it_is_prose():
    """Sentences, no code, no headings, no grammar; enough of it."""
    paragraphs = prose.prose().split("\n\n")
    assert len(prose.prose()) > 100_000 and any(text.startswith("Assignment statements are used to") for text in paragraphs)
    lines = [line for text in paragraphs for line in text.splitlines()]
    assert not any(line.startswith((" ", ">>>", "*", "=", "-")) or "::=" in line for line in lines)
    assert all(text.endswith((".", ":")) for text in paragraphs)


def test_pieces_cover_the_text(tiny_gguf):
    """Of one length, from the first token to the last, none twice; all tokens but the first of each carry loss."""
    tokenizer = base_model.load(str(tiny_gguf)).tokenizer
    ids, pieces = tokenizer.encode(prose.prose()), prose.pieces(tokenizer)
    assert len(pieces) == prose.PIECES and {(len(piece), start) for piece, start in pieces} == {(prose.LENGTH, 1)}
    assert pieces[0][0] == ids[:prose.LENGTH] and pieces[-1][0] == ids[-prose.LENGTH:]
    assert len({tuple(piece) for piece, _ in pieces}) == prose.PIECES


def test_a_vocabulary_that_is_not_for_english_is_refused():
    """One line that says how many tokens there are."""
    class Few:
        def encode(self, text):
            return [1, 2, 3]
    with pytest.raises(ValueError, match="makes 3 tokens of the text for --forgetting, fewer than 16384: .* leave --forgetting out"):
        prose.pieces(Few())
