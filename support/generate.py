"""Greedy generation in batches, from a KV cache."""
import functools

import torch

from data import prompting
from data.calculator import insertion
from model import KVCache
from support import graphs
from support.fast import row_multiple

CHECK_EVERY = 8  # decode steps between two looks, on a GPU, at which rows have finished: each look waits for it
# Rows that have finished leave as soon as so small a share of the batch is left: copying what a GPU's cache holds, and
# setting attention up for a new shape, cost more than rows that nobody needs.
LEFT = {"cpu": 1, "cuda": 0.5}
PREFILL_TOKENS = {"cpu": 2048, "cuda": 65536}  # of prompts read at once: few, of similar length, need little padding


@torch.inference_mode()
def generate_batch(model, prompts, eos_id, max_new=256, is_done=None, force=None, progress=None):
    """Greedy continuation of every prompt (lists of token ids) up to and including eos_id (one, or any of several),
    or max_new tokens.

    The right-padded prompts are read first, some rows at a time, then comes one token per row and step from a static KV
    cache; rows do not see each other, so a row's text does not depend on its neighbours. Rows that have finished leave
    the batch (see LEFT).
    `is_done(ids)` may end a row early, `force(ids)` may return tokens to be taken instead of the next choices; both are
    given the row's new tokens so far. `progress(finished, tokens)` hears now and then how many rows have finished and
    how many tokens were made. Returns a list of token lists in the order of `prompts`.
    """
    device = model.lm_head.weight.device
    cache = KVCache(model.config, len(prompts), max(map(len, prompts)) + max_new, model.lm_head.weight.dtype, device)
    chosen = _prefill(model, prompts, cache)  # (B,)
    ends = torch.tensor(eos_id, device=device).reshape(-1)  # (ends,)
    new = ends[0].repeat(len(prompts), max_new)  # (B, max_new)
    alive = torch.arange(len(prompts), device=device)  # the prompt that each row of the cache belongs to
    finished = torch.zeros(len(prompts), dtype=torch.bool, device=device)  # when it was last looked at
    next_step = graphs.decoding(functools.partial(_step, model), device)
    forced = None if force is None else Forced(force, len(prompts))
    running, tokens = len(prompts), 0
    for step in range(max_new):
        if forced:
            chosen = forced.choice(chosen, alive)
        new[alive, step] = chosen
        tokens += running
        if step + 1 == max_new:
            break
        at_check = step % CHECK_EVERY == CHECK_EVERY - 1
        if progress is not None and at_check:
            progress(len(prompts) - running, tokens)
        if device.type == "cpu" or at_check:
            _mark(finished, alive[~finished[alive]], new[:, :step + 1], ends, is_done if at_check else None)
            unfinished = ~finished[alive]  # (rows alive,)
            running = int(unfinished.sum())
            if not running:
                break
            if running < len(alive) and running <= LEFT.get(device.type, 1) * len(alive):
                order = cache.keep(unfinished)
                alive, chosen = alive[order], chosen[order]
        chosen = next_step(chosen, cache)  # (rows alive,)
        cache.advance(1, 1)
    return [_through_first(ids, ends.tolist()) for ids in new[:, :step + 1].tolist()]


def _step(model, chosen, cache):
    """The model's choice (B,) of what follows the tokens `chosen` (B,), which go into the cache."""
    hidden = model.model(chosen[:, None], cache)  # (B, 1, d)
    return model.lm_head(hidden[:, 0]).max(-1).indices


def _mark(finished, rows, new, ends, is_done):
    """Mark in `finished` those of `rows` that have one of `ends` among their new tokens, or are done by them."""
    finished[rows] = torch.isin(new[rows], ends).any(dim=1)
    if is_done is not None:
        finished[rows] |= torch.tensor([is_done(ids) for ids in new[rows].tolist()], device=finished.device)


def _prefill(model, prompts, cache):
    """Read the prompts into the cache, as many rows at a time as PREFILL_TOKENS allow; returns every row's choice for
    its first token, (B,)."""
    device, first, chosen = model.lm_head.weight.device, 0, []
    multiple = row_multiple(device, False, model.config.max_position_embeddings)
    cache.clear(cache.slots(max(map(len, prompts))))
    while first < len(prompts):
        last, longest = first + 1, len(prompts[first])
        while last < len(prompts):
            longer = max(longest, len(prompts[last]))
            if longer * (last + 1 - first) > PREFILL_TOKENS.get(device.type, 2048):
                break
            last, longest = last + 1, longer
        lengths = torch.tensor([len(prompt) for prompt in prompts[first:last]])  # (rows,)
        tokens = torch.zeros(last - first, -(-longest // multiple) * multiple, dtype=torch.long)  # (rows, T)
        for row, prompt in enumerate(prompts[first:last]):
            tokens[row, :len(prompt)] = torch.tensor(prompt)
        rows = cache.window(first, last)
        hidden = model.model(tokens.to(device), rows)[range(last - first), lengths - 1]  # (rows, d)
        rows.advance(lengths.to(device), longest)
        chosen.append(model.lm_head(hidden).max(-1).indices)
        first = last
    cache.longest = max(map(len, prompts))
    return torch.cat(chosen)


def _through_first(ids, ends):
    """ids up to and including the first of `ends`."""
    return ids[:next((place + 1 for place, i in enumerate(ids) if i in ends), None)]


class Forced:
    """Which tokens `force`, given what a row has so far, puts in place of the model's choices."""

    def __init__(self, force, rows):
        self.force = force
        self.so_far, self.waiting = [[] for _ in range(rows)], [[] for _ in range(rows)]  # of every row: ids

    def choice(self, chosen, alive):
        """`chosen` (rows alive,), with the tokens that wait for a row in place of the model's."""
        ids, rows = chosen.tolist(), alive.tolist()
        for place, row in enumerate(rows):
            so_far, waiting = self.so_far[row], self.waiting[row]
            if so_far and not waiting:
                waiting.extend(self.force(so_far) or ())
            if waiting:
                ids[place] = waiting.pop(0)
            so_far.append(ids[place])
        return torch.tensor(ids, device=chosen.device)


def generate(model, prompts, eos_id, max_new=256, batch=64, is_done=None, force=None, progress=None):
    """`generate_batch` over any number of prompts, in batches of similar length, longest first.

    Longest first shows at once whether memory suffices. `progress(finished, tokens)` hears now and then how many
    prompts are answered and how many tokens were made.
    Raises ValueError if a prompt leaves no room for max_new tokens in the model's context.
    """
    longest, context = max(map(len, prompts)), model.config.max_position_embeddings
    if longest + max_new > context:
        raise ValueError(f"a prompt of {longest} tokens and {max_new} new ones do not fit the model's context of "
                         f"{context}: lower --max-new or --shots, or shorten the question")
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    outputs, tokens = [None] * len(prompts), 0
    for start in range(0, len(order), batch):
        indices = order[start:start + batch]
        inner = progress and (lambda finished, more: progress(start + finished, tokens + more))
        results = generate_batch(model, [prompts[i] for i in indices], eos_id, max_new, is_done, force, inner)
        for i, ids in zip(indices, results):
            outputs[i] = ids
        tokens += sum(map(len, results))
        if progress is not None:
            progress(start + len(indices), tokens)
    return outputs


def usual_batch(model):
    """How many rows to generate together: 128 on a CPU; on a CUDA GPU as many as can keep 1024 tokens each in half of
    its free memory, 2048 at most."""
    weight = model.lm_head.weight
    if weight.device.type != "cuda":
        return 128
    row = KVCache(model.config, 1, 1024, weight.dtype, "meta")
    torch.cuda.empty_cache()  # what loading needed
    free, _ = torch.cuda.mem_get_info(weight.device)
    return max(1, min(2048, free // 2 // (row.k.nbytes + row.v.nbytes)))


def complete(model, tokenizer, texts, max_new=256, batch=64, calculator=False, progress=None, template="plain"):
    """Completions of prompts (`texts`): dicts of text (cut where another question begins), new_tokens, and finish.

    finish is "eos", "stop" (a next problem began, as in the template) or "cap". With `calculator`, what follows the "="
    of an open annotation `<<48/2=` is computed instead of generated.
    """
    tail = CHECK_EVERY + len(prompting.TEMPLATES[template].next)  # tokens: what was there before has been looked at

    def is_done(ids):
        text = tokenizer.decode(ids[-tail:])
        return prompting.truncate(text, template) != text

    def force(ids):
        if "=" not in tokenizer.decode(ids[-1:]):
            return None
        insert = insertion(tokenizer.decode(ids))
        return tokenizer.encode(insert, start=False) if insert else None

    prompts = [prompting.encode_prompt(tokenizer, text) for text in texts]
    outputs = generate(model, prompts, tokenizer.end_ids, max_new, batch, is_done, force if calculator else None,
                       progress)
    completions = []
    for ids in outputs:
        ended = ids[-1] in tokenizer.end_ids
        text = tokenizer.decode(ids[:-1] if ended else ids)
        cut = prompting.truncate(text, template)
        finish = "stop" if cut != text else "eos" if ended else "cap"
        # A row that began another question ran on until the next check: only what is kept counts.
        new_tokens = len(tokenizer.encode(cut, start=False)) if finish == "stop" else len(ids)
        completions.append({"text": cut, "new_tokens": new_tokens, "finish": finish})
    return completions
