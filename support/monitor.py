"""What goes on beside the mathematics of a training step: finite numbers, the log, held-out losses, saving, signals."""
import collections
import json
import math
import shlex
import time

import torch

import adapter
from data.batching import padded_tokens, token_count
from support import report


class Monitor:
    """Watches over a run: `check` before the optimizer moves anything, `after` when it has.

    data is a batching.Data, gflop what training takes per token, progress a resume.Progress, which is kept up to date,
    log a text file, signals the list of resume.noted_signals. measures are [(every, measure)]: measure(step) is called
    after every so many steps, and after the last. save() writes a checkpoint. `numbers` of a step are {name: float or
    tensor ()}, with "loss" among them.
    """

    def __init__(self, args, model, optimizer, data, gflop, progress, measures, save, log, signals):
        self.args, self.optimizer, self.data, self.gflop, self.progress = args, optimizer, data, gflop, progress
        self.measures, self.save, self.log, self.signals = measures, save, log, signals
        self.device, self.parameters = model.lm_head.weight.device, list(adapter.trainable(model).values())
        # A fused optimizer on a CUDA GPU can be told to stand still; any other is waited for.
        self.waits = self.device.type != "cuda" or not optimizer.defaults.get("fused")
        self.usual = collections.deque(maxlen=20)  # the latest logged losses
        self.since = []  # (step, indices, numbers, norm of what the optimizer takes), for steps that are not logged yet
        self.first = progress.step + 1  # step of this process
        self.started = time.perf_counter()

    def check(self, step, indices, numbers):
        """FloatingPointError, before the weights move, if a number of this step is not finite, or the gradient as the
        optimizer is about to take it, whatever was added behind the one that is logged; or if the first gradient is 0.
        Without waiting for a GPU: all steps from one that is not finite on leave the weights alone, and `after` raises
        when it next logs."""
        taken = torch.nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        self.since.append((step, indices, numbers, taken))
        if self.waits:
            self.check_numbers(self.since[-1:])
        else:
            values = [taken, *(value for value in numbers.values() if isinstance(value, torch.Tensor))]
            bad = (~torch.stack([torch.isfinite(value) for value in values]).all()).float()
            self.optimizer.found_inf = torch.maximum(getattr(self.optimizer, "found_inf", torch.zeros_like(bad)), bad)

    def check_numbers(self, steps):
        """FloatingPointError for the first of `steps` whose numbers are not all finite, with the records it saw; and
        where the first gradient of a process is exactly 0: every method starts with one that is not."""
        for step, indices, numbers, taken in steps:
            if step == self.first and numbers.get("grad_norm") == 0:
                raise FloatingPointError(f"step {step}: the gradient of all that trains is exactly 0, so nothing would "
                                         "be learned: leave --compile out, or look at the method's start, where a "
                                         "product of two factors of zeros stays so for ever")
            sound = all(math.isfinite(value) for value in numbers.values())
            if not sound or not math.isfinite(taken):
                records = [str(self.data.numbers[i]) for i in indices]
                more = f" and {len(records) - 16} more" if len(records) > 16 else ""
                said = ", ".join(f"{report.WORDS.get(name, name)} {value:g}" for name, value in numbers.items()
                                 if isinstance(value, torch.Tensor) or not math.isfinite(value))
                said += f", gradient norm with R's part {taken:g}" if sound else ""
                fix = "lower --gamma" if sound else f"lower --lr, now {self.args.lr:g}"
                raise FloatingPointError(f"step {step}: {said}, on records {', '.join(records[:16])}{more} of the data;"
                                         f" the weights are as they were before: {fix}")

    def after(self, step):
        """Log, measure and save where it is due. SystemExit, saved, where a signal has come."""
        args, last = self.args, step == self.args.steps
        due = [measure for every, measure in self.measures if step % every == 0 or last]
        to_stop = bool(self.signals) and not last  # a signal from here on is for the next step
        to_save = step % args.save_every == 0 or last or to_stop
        if not (step % args.log_every == 0 or due or to_save):
            return
        self.check_numbers(self.since)  # waits for a GPU to finish
        self.write_line(step)
        for measure in due:
            measure(step)
        if to_save:
            if not torch.nn.utils.get_total_norm(self.parameters).isfinite():  # before a checkpoint is lost for it
                raise FloatingPointError(f"step {step}: the weights after it are not finite: lower --lr, now "
                                         f"{self.args.lr:g}")
            self.save()
        if to_stop:
            print(f"\nstopped by {self.signals[0].name} after step {step} of {args.steps}; to go on: "
                  f"python train.py --resume {shlex.quote(str(args.out))}", flush=True)
            raise SystemExit(128 + self.signals[0])
        self.since, self.started = [], time.perf_counter()

    def write_line(self, step):
        """Log and print the latest step's numbers, with the speed since the last line."""
        elapsed = time.perf_counter() - self.started
        batches = [[self.data.train[i] for i in indices] for _, indices, _, _ in self.since]
        tokens = sum(map(token_count, batches))
        padded = sum(padded_tokens(batch, self.args.micro_batch, self.args.multiple) for batch in batches)
        line = {"step": step, **{name: float(value) for name, value in self.since[-1][2].items()},
                **report.spike([float(numbers["loss"]) for _, _, numbers, _ in self.since], self.usual),
                "tokens_per_second": report.per_second(tokens, elapsed), "padding": 1 - tokens / padded,
                "gflops": report.per_second(tokens * self.gflop, elapsed), "memory_gb": report.peak_memory(self.device)}
        self.usual.append(line["loss"])
        self.progress.step, self.progress.tokens = step, self.progress.tokens + tokens
        self.progress.seconds_in_steps += elapsed
        self.log.write(json.dumps(line) + "\n")
        left = self.progress.seconds_in_steps / step * (self.args.steps - step)
        print(report.log_line(line, self.args.steps, left), flush=True)
