"""Small models that the tests build themselves."""
import json

import torch
import torch.nn as nn

import adapter
from methods import METHODS
from model import Config, Model

ATTACHED = [method for method in METHODS if method != "full"]  # methods that replace linears
MERGEABLE = [method for method in ATTACHED if method != "mosara"]
RANKED = [method for method in ATTACHED if method not in ("sara", "mosara")]  # methods with one rank for all layers
SIZES = {"full": {}, "sara": {"threshold": 0.4}, "mosara": {"threshold": 0.4}}  # the others: rank 4


def toy_model(seed=0, **changes):
    """A random Llama of width 32 with grouped-query attention, so that every projection has a shape of its own."""
    torch.manual_seed(seed)
    config = Config(**{**dict(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                              num_key_value_heads=2, head_dim=8, rope_theta=10000.0, max_position_embeddings=256,
                              tie_word_embeddings=True), **changes})
    model = Model(config)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    return model.eval()


def attach(model, method, **options):
    """Attach by name to all seven projections, at a size that fits the toy model."""
    targets = {} if method == "full" else {"targets": adapter.TARGETS}
    METHODS[method].attach(model, **{**SIZES.get(method, {"rank": 4}), **targets, **options})
    return model


@torch.no_grad()
def perturb(model, scale=0.1, seed=1):
    """Move everything that trains, as training would."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in adapter.trainable(model).values():
        parameter += scale * torch.randn(parameter.shape, generator=generator).to(parameter.device)
    return model


def tokens(rows=2, length=12, vocab=97, seed=2):
    return torch.randint(0, vocab, (rows, length), generator=torch.Generator().manual_seed(seed))


def toy_examples(count, seed=0):
    """(ids, prompt_length) pairs of very different lengths."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(2, 30, (count, 2), generator=generator).tolist()
    return [(tokens(1, p + a, seed=i)[0].tolist(), p) for i, (p, a) in enumerate(sizes)]


def snapshot(model):
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def write_sums(folder, train=40, test=11):
    """A data folder of the shortest problems there are: their tokens are bytes in the tiny model."""
    folder.mkdir()
    for name, count in (("train", train), ("test", test)):
        lines = [json.dumps({"question": f"What is {i}+1?", "answer": f"{i}+1=<<{i}+1={i + 1}>>{i + 1}\n#### {i + 1}"}) for i in range(count)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    return folder
