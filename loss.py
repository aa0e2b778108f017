"""The loss on answer tokens, without holding the logits of a batch.

The head turns d = 576 numbers into V = 49,152: the logits of 2000 tokens are 390 MB, and the plain path keeps two or
three copies. Here only positions that carry loss reach the head, a chunk at a time, and where the head is frozen its
gradient is taken in the forward pass, so that nothing of size V outlives its chunk. (Where the head trains, autograd
keeps the answers' logits for it.)
"""
import torch
import torch.nn.functional as F

IGNORE = -100  # the target of a position without loss: the question, and padding
CHUNK = 512  # answer tokens whose logits live at once: 512 x 49,152 fp32 are 100 MB


class FrozenHeadLoss(torch.autograd.Function):
    """Summed cross entropy of hidden (n, d) under a frozen head (V, d).

    The gradient of a token's loss with respect to its logits is softmax - onehot, known as soon as the logits are:
    taken at once and multiplied by the head, it leaves (n, d) numbers to keep instead of (n, V).
    """

    @staticmethod
    def forward(ctx, hidden, head, targets):
        loss, gradient = torch.zeros((), device=hidden.device), torch.empty_like(hidden)  # (), (n, d)
        for start in range(0, len(hidden), CHUNK):
            rows = slice(start, start + CHUNK)
            logits = (hidden[rows] @ head.T).float()  # (chunk, V)
            logits -= logits.amax(dim=1, keepdim=True)
            at_target = logits.gather(1, targets[rows, None])  # (chunk, 1)
            total = logits.exp_().sum(dim=1, keepdim=True)  # (chunk, 1)
            loss += (total.log() - at_target).sum()
            if ctx.needs_input_grad[0]:
                logits.div_(total).scatter_add_(1, targets[rows, None], torch.full_like(total, -1.0))
                gradient[rows] = logits.to(head.dtype) @ head
        ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    def backward(ctx, upstream):
        gradient, = ctx.saved_tensors
        return upstream * gradient, None, None


def answer_loss(model, tokens, targets):
    """Summed cross entropy over the positions of `targets` (B, T) that are not IGNORE, for tokens (B, T).

    How many there are decides shapes, so a GPU would have to be waited for: targets may stay on the CPU.
    """
    answers = (targets.flatten() != IGNORE).nonzero()[:, 0]  # (n,)
    targets = targets.flatten()[answers].to(tokens.device)  # (n,)
    hidden = model.model(tokens).flatten(0, 1).index_select(0, answers.to(tokens.device))  # (n, d)
    if not any(parameter.requires_grad for parameter in model.lm_head.parameters()):
        return FrozenHeadLoss.apply(hidden, model.lm_head.weight, targets)
    return sum(F.cross_entropy(model.lm_head(h).float(), t, reduction="sum")
               for h, t in zip(hidden.split(CHUNK), targets.split(CHUNK)))
