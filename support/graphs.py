"""CUDA graphs: the decoder's passes in training, and the steps of generation, recorded for a shape and then replayed.

A training step of the default model with LoRA starts 5,000 kernels. On an H100 they run for 36 ms at 32 examples a
step; to start them one by one takes Python, autograd and the driver 160 ms. A graph starts them all with one call.

Of training is recorded what the decoder does with tokens (B, T), its gradients included; the loss, clipping and the
optimizer stay as they are. A replay reads and writes the memory that the recording did: so the tokens are copied to
where they were then, and every gradient is kept in one place for good. Of generation it is the step from one token of
every row to the next: of 512 rows it took 26 ms to start its kernels, and 5.5 to replay them (results/speed.md says on
which cards).
"""
import torch

import adapter

LARGEST = 2e9  # weights: the kernels of larger models run for longer than it takes to start them


def wanted(graphs, model):
    """Whether --graphs, auto, on or off, means to record this model: by default on a CUDA GPU, if the model is not
    large, nor memory short enough for --recompute. ValueError for `on` without such a GPU."""
    on_gpu = model.lm_head.weight.device.type == "cuda"
    if graphs == "on" and not on_gpu:
        raise ValueError("--graphs on: only a CUDA GPU can record what it does: leave it out")
    small = on_gpu and not model.model.recompute and sum(p.numel() for p in model.parameters()) < LARGEST
    return graphs == "on" or graphs == "auto" and small


# ---- training -------------------------------------------------------------------------------------------------------

class RecordedDecoder:
    """What `model.model` does from here on with whole rows in training; without gradients, or over a cache, it does
    what it did. To be made once all that trains is attached and on its device."""

    def __init__(self, model):
        self.plain, model.model.forward = model.model.forward, self.forward
        self.parameters = list(adapter.trainable(model).values())
        self.trains = any(p.requires_grad for p in model.model.parameters())  # or the head alone does
        self.gradients = [torch.zeros_like(p) for p in self.parameters]
        device = self.gradients[0].device
        self.followed = torch.zeros((), device=device, requires_grad=True)  # leads autograd to Replay
        self.recordings, self.side = {}, Side(device)
        # An embedding that is the head has gradients of two streams; `Replay` waits for both, and torch need not warn.
        if hasattr(torch.autograd.graph, "set_warn_on_accumulate_grad_stream_mismatch"):
            torch.autograd.graph.set_warn_on_accumulate_grad_stream_mismatch(False)

    def forward(self, tokens, cache=None):
        if cache is not None or not torch.is_grad_enabled() or not self.trains:
            return self.plain(tokens, cache)
        if self.parameters[0].grad is None:  # a new step
            torch._foreach_zero_(self.gradients)
            for parameter, gradient in zip(self.parameters, self.gradients):
                parameter.grad = gradient
        if tokens.shape not in self.recordings:
            self.recordings[tokens.shape] = Recording(self.plain, tokens, self.side)
        return Replay.apply(self.followed, self.recordings[tokens.shape], tokens)


class Recording:
    """The passes over tokens of one shape (B, T): `forward()` and `backward()` do again what is recorded."""

    def __init__(self, decoder, tokens, side):
        self.decoder, self.tokens, self.hidden, self.d_hidden = decoder, tokens.clone(), None, None
        self.side = side
        side.run(self.run_forward, self.run_backward)
        self.forward, self.backward = side.record(self.run_forward), side.record(self.run_backward)

    def run_forward(self):
        self.hidden = self.decoder(self.tokens)  # (B, T, d)

    def run_backward(self):
        if self.d_hidden is None:
            self.d_hidden = torch.zeros_like(self.hidden)  # (B, T, d): for the first pass, which is to add nothing
        with torch.autocast(self.hidden.device.type, enabled=False):  # as where backward is called outside of it
            torch.autograd.backward(self.hidden, self.d_hidden)  # adds to the gradients of all that trains


class Side:
    """The stream on which passes are recorded, and the memory that all recordings share: each is used up before the
    next begins."""

    def __init__(self, device):
        self.stream, self.memory = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()

    def run(self, *passes):
        """Make passes here without recording them: what is set up by the first call of a kernel is no part of it."""
        before = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(before)
        with torch.cuda.stream(self.stream):
            for one in passes:
                one()
        before.wait_stream(self.stream)

    def join(self):
        """What comes next waits for what was begun here."""
        torch.cuda.current_stream(self.stream.device).wait_stream(self.stream)

    def record(self, work):
        """A function that starts all the kernels that `work` starts; now none of them runs."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.memory, stream=self.stream):
            work()
        return graph.replay


class Replay(torch.autograd.Function):
    """Tokens (B, T) -> hidden states (B, T, d) by a Recording; its backward pass adds to the parameters' gradients."""

    @staticmethod
    def forward(ctx, followed, recording, tokens):
        ctx.recording = recording
        recording.tokens.copy_(tokens)
        recording.forward()
        return recording.hidden.detach()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_hidden):
        ctx.recording.side.join()  # there autograd adds up the gradient of a head that is the embedding, too
        ctx.recording.d_hidden.copy_(d_hidden)
        ctx.recording.backward()
        return None, None, None


# ---- generation -----------------------------------------------------------------------------------------------------

def decoding(step, device):
    """How `generate_batch` takes a step: as it is written. (support/fast.py puts RecordedStep here.)"""
    return step


class RecordedStep:
    """`step(chosen, cache)`, which makes of the tokens `chosen` (B,) of a KVCache's rows their next ones (B,): recorded
    where it has the same shapes a second time. What it returns holds until the next call."""

    def __init__(self, step, device):
        self.step, self.side = step, Side(device)
        # Of all shapes so far, though none comes again once rows have left or more slots are seen: they share memory,
        # which torch gives up with the last recording, and can't take again.
        self.recordings = {}

    def __call__(self, chosen, cache):
        shapes = len(chosen), cache.slots(1)
        if shapes not in self.recordings:
            self.recordings[shapes] = None
            return self.step(chosen, cache)
        if self.recordings[shapes] is None:
            self.recordings[shapes] = StepRecording(self.step, chosen, cache, self.side)
        return self.recordings[shapes].again(chosen)


class StepRecording:
    """A step from tokens of one shape (B,), over a cache."""

    def __init__(self, step, chosen, cache, side):
        self.chosen, self.following = chosen.clone(), None
        self.replay = side.record(lambda: self.run(step, cache))

    def run(self, step, cache):
        self.following = step(self.chosen, cache)

    def again(self, chosen):
        self.chosen.copy_(chosen)
        self.replay()
        return self.following
