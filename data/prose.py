"""General English to see what fine-tuning forgets: the text that every Python carries for its `help()`.

No corpus can be fetched everywhere, and this one needs no fetching. It differs a little between versions of Python, so
losses on it compare within one version only.
"""
from pydoc_data.topics import topics

PIECES, LENGTH = 64, 256


def prose():
    """The paragraphs of pydoc's topics that are running text: no line indented as code, no rule under a heading."""
    paragraphs = "\n\n".join(topics[name] for name in sorted(topics)).split("\n\n")
    return "\n\n".join(text for text in paragraphs if all(line[:1].isalnum() or line[:1] == '"'
                                                          for line in text.splitlines()) and text.endswith((".", ":")))


def pieces(tokenizer, context=LENGTH):
    """PIECES examples (ids, 1) of LENGTH tokens, evenly spaced over the text: all tokens but a piece's first carry
    loss. ValueError where a model's context is too short for them, or the tokenizer makes fewer tokens of the text."""
    if context < LENGTH:
        raise ValueError(f"--forgetting is measured on pieces of {LENGTH} tokens, and the model's context is "
                         f"{context}: leave it out")
    ids = tokenizer.encode(prose())
    if len(ids) < PIECES * LENGTH:
        raise ValueError(f"the tokenizer makes {len(ids)} tokens of the text for --forgetting, fewer than "
                         f"{PIECES * LENGTH}: its vocabulary is not one for English; leave --forgetting out")
    starts = [place * (len(ids) - LENGTH) // (PIECES - 1) for place in range(PIECES)]
    return [(ids[start:start + LENGTH], 1) for start in starts]
