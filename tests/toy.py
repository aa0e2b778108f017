"""Small models that the tests build themselves."""
import json

import pytest
import torch
import torch.nn as nn

import adapter
from methods import METHODS
from model import Config, Model

ATTACHED = [method for method in METHODS if method != "full"]  # methods that replace linears
MERGEABLE = [method for method in ATTACHED if method != "mosara"]
RANKED = [method for method in ATTACHED if method not in ("sara", "mosara")]  # methods with one rank for all layers
SIZES = {"full": {}, "sara": {"threshold": 0.4}, "mosara": {"threshold": 0.4}}  # the others: rank 4
DEFAULT_MODEL = dict(vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
                     num_key_value_heads=3, head_dim=64, tie_word_embeddings=True)


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


class Logits(nn.Module):
    """A model of the transformers library that returns its logits, as ours do."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids):
        return self.model(ids).logits


def transformers_llama():
    """The toy model's sizes in transformers' own Llama; without that library the test is skipped."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    return Logits(transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        rope_theta=10000.0, rms_norm_eps=1e-5, tie_word_embeddings=True, max_position_embeddings=256))).eval()


def loss_of(model):
    """The mean loss of the next token, over `tokens()`."""
    return nn.functional.cross_entropy(model(tokens())[:, :-1].flatten(0, 1), tokens()[:, 1:].flatten())


def train_steps(model, steps, lr=1e-2):
    optimizer = torch.optim.AdamW(adapter.trainable(model).values(), lr=lr, weight_decay=0.0)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()


def toy_examples(count, seed=0):
    """(ids, prompt_length) pairs of very different lengths."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(2, 30, (count, 2), generator=generator).tolist()
    return [(tokens(1, p + a, seed=i)[0].tolist(), p) for i, (p, a) in enumerate(sizes)]


def snapshot(model):
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def same(first, second):
    """Two {name: tensor} have the same names, and the same numbers to the last bit."""
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def untouched(model):
    """No trace of an attach is left on a toy model: everything trains, and not a bit has changed."""
    attached = adapter.adapted_layers(model) or any(hasattr(model, name) for name in ("adapter_config", "base_keys", "cora", "lotr"))
    return not attached and all(p.requires_grad for p in model.parameters()) and same(model.state_dict(), toy_model().state_dict())


def refused(message, method, **options):
    """This attach raises ValueError with this message, before anything has changed."""
    model = toy_model()
    with pytest.raises(ValueError, match=message):
        attach(model, method, **options)
    assert untouched(model)


def shapes_without_svd(monkeypatch, config):
    """A large model of these sizes, as shapes without numbers, to which every method but SARA's can be attached."""
    def no_svd(weight, rank, svd="gram"):
        out, inner = weight.shape
        return [torch.empty(size, device=weight.device) for size in ((out, rank), (rank,), (rank, inner))]
    monkeypatch.setattr(adapter, "principal_triplets", no_svd)
    monkeypatch.setattr(adapter, "subtract", lambda *tensors: None)
    with torch.device("meta"):
        return Model(Config(**config))


def write_sums(folder, train=40, test=11):
    """A data folder of the shortest problems there are: their tokens are bytes in the tiny model."""
    folder.mkdir()
    for name, count in (("train", train), ("test", test)):
        lines = [json.dumps({"question": f"What is {i}+1?", "answer": f"{i}+1=<<{i}+1={i + 1}>>{i + 1}\n#### {i + 1}"})
                 for i in range(count)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    return folder
