"""The loss: cross entropy on answer tokens. Only positions that carry loss reach the head."""
import torch
import torch.nn.functional as F

from data.batching import IGNORE, answer_tokens, collate, sent


def answer_loss(model, tokens, targets):
    """Summed cross entropy over the positions of `targets` (B, T) that are not IGNORE, for tokens (B, T).

    Their number decides shapes. Counted on a GPU it would make the host wait, so targets may stay on the CPU.
    """
    return loss_where_told(model.model(tokens).flatten(0, 1), model.lm_head, targets.flatten())


def loss_where_told(hidden, head, targets):
    """Summed cross entropy of hidden (N, d) over the n of the N targets that are not IGNORE."""
    answers = (targets != IGNORE).nonzero()[:, 0]  # (n,)
    chosen = hidden.index_select(0, sent(answers, hidden.device))  # (n, d)
    return head_loss(chosen, head, sent(targets[answers], hidden.device))


def head_loss(hidden, head, targets):
    """Summed cross entropy of hidden (n, d) under the head, for targets (n,)."""
    return F.cross_entropy(head(hidden).float(), targets, reduction="sum")


@torch.no_grad()
def example_losses(model, encoded, batch, device, multiple=1):
    """The summed loss of each example, in their order: what two models may be compared by, example by example."""
    by_length, losses = sorted(range(len(encoded)), key=lambda i: -len(encoded[i][0])), {}
    for start in range(0, len(encoded), batch):
        places = by_length[start:start + batch]
        tokens, targets = collate([encoded[i] for i in places], device, multiple)
        found = [loss_where_told(hidden, model.lm_head, told) for hidden, told in zip(model.model(tokens), targets)]
        losses.update(zip(places, torch.stack(found).tolist()))
    return [losses[i] for i in range(len(encoded))]


@torch.no_grad()
def mean_loss(model, encoded, batch, device, multiple=1):
    """Mean loss per answer token over a fixed set of examples, the longest first, padded to a multiple of so many."""
    by_length, total = sorted(encoded, key=lambda example: -len(example[0])), 0.0
    for start in range(0, len(by_length), batch):
        total += answer_loss(model, *collate(by_length[start:start + batch], device, multiple)).item()
    return total / answer_tokens(encoded)
