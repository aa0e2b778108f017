"""Greedy generation and GSM-8K accuracy.

    python eval.py runs/sorsa                        a fine-tuned run on the test set
    python eval.py --model smollm2-135m --shots 4    a base model alone
    python eval.py runs/sorsa --ask "Ann has 3 bags of 4 apples and eats 2. How many are left?"

Adapters are merged first where the method can be. Every prediction goes to predictions.jsonl, scored by four rules at
once (gsm8k.py says which), so that the printed accuracies can be recomputed from that file.
"""
import json
import math
import time
from pathlib import Path

import torch

import adapter
import checkpoint
import gsm8k
from calculator import insertion
from model import KVCache
from script import Parser, choose_device, positive, run_script, write_json
from tensorfile import atomic_write

CHECK_EVERY = 8  # decode steps between two looks at which rows have finished: each look waits for the GPU


# ---- generation -----------------------------------------------------------------------------------------------------

@torch.inference_mode()
def generate_batch(model, prompts, eos_id, max_new=256, is_done=None, force=None):
    """Greedy continuation of every prompt (lists of token ids) up to and including eos_id, or max_new tokens.

    One prefill of the right-padded prompts, then one token per row and step from a static KV cache; rows do not see
    each other, so a row's text does not depend on its neighbours. Rows that have finished leave the batch, every
    CHECK_EVERY steps if a quarter of the rows has.
    `is_done(ids)` may end a row early, `force(ids)` may return tokens to be taken instead of the next choices; both are
    given the row's new tokens so far. Returns a list of token lists in the order of `prompts`.
    """
    device = model.lm_head.weight.device
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)  # (B,)
    longest = max(map(len, prompts))
    tokens = torch.full((len(prompts), longest), eos_id)  # (B, T)
    for row, prompt in enumerate(prompts):
        tokens[row, :len(prompt)] = torch.tensor(prompt)
    cache = KVCache(model.config, len(prompts), longest + max_new, model.lm_head.weight.dtype, device)
    hidden = model.model(tokens.to(device), cache)  # (B, T, d)
    cache.advance(lengths, longest)
    chosen = model.lm_head(hidden[torch.arange(len(prompts), device=device), lengths - 1]).argmax(-1)  # (B,)
    del hidden

    new = torch.full((len(prompts), max_new), eos_id, device=device)  # (B, max_new)
    alive = torch.arange(len(prompts), device=device)  # the prompt that each row of the cache belongs to
    forced = [[] for _ in prompts]
    for step in range(max_new):
        if force is not None:
            chosen = _forced_choice(chosen, new, alive.tolist(), step, forced, force)
        new[alive, step] = chosen
        if step + 1 == max_new:
            break
        if step % CHECK_EVERY == CHECK_EVERY - 1:
            unfinished = ~(new[alive, :step + 1] == eos_id).any(dim=1)  # (rows alive,)
            if is_done is not None:
                texts_done = [is_done(ids) for ids in new[alive, :step + 1].tolist()]
                unfinished &= ~torch.tensor(texts_done, device=device)
            rows = unfinished.nonzero()[:, 0]
            if len(rows) == 0:
                break
            if len(rows) < 0.75 * len(alive):  # copying the cache costs something: only when it pays
                cache.keep(rows)
                alive, chosen = alive[rows], chosen[rows]
        hidden = model.model(chosen[:, None], cache)  # (rows alive, 1, d)
        cache.advance(1, 1)
        chosen = model.lm_head(hidden[:, 0]).argmax(-1)  # (rows alive,)
    return [_through_first(ids, eos_id) for ids in new[:, :step + 1].tolist()]


def _through_first(ids, eos_id):
    """ids up to and including the first eos_id."""
    return ids[:ids.index(eos_id) + 1] if eos_id in ids else ids


def _forced_choice(chosen, new, alive, step, forced, force):
    """`chosen`, with the tokens that wait in a row's queue in place of the model's; `force` fills empty queues."""
    chosen, so_far = chosen.clone(), new[:, :step].tolist()
    for i, row in enumerate(alive):
        if not forced[row] and step:
            forced[row] = list(force(so_far[row]) or ())
        if forced[row]:
            chosen[i] = forced[row].pop(0)
    return chosen


def generate(model, prompts, eos_id, max_new=256, batch=64, is_done=None, force=None, progress=None):
    """`generate_batch` over any number of prompts, in batches of similar length, longest first.

    Longest first shows at once whether memory suffices. `progress(indices, outputs)` is called after every batch.
    Raises ValueError if a prompt leaves no room for max_new tokens in the model's context.
    """
    longest, context = max(map(len, prompts)), model.config.max_position_embeddings
    if longest + max_new > context:
        raise ValueError(f"a prompt of {longest} tokens and {max_new} new ones do not fit the model's context of "
                         f"{context}: lower --max-new or --shots, or shorten the question")
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    outputs = [None] * len(prompts)
    for start in range(0, len(order), batch):
        indices = order[start:start + batch]
        results = generate_batch(model, [prompts[i] for i in indices], eos_id, max_new, is_done, force)
        for i, ids in zip(indices, results):
            outputs[i] = ids
        if progress is not None:
            progress(indices, outputs)
    return outputs


def complete(model, tokenizer, prompts, max_new=256, batch=64, calculator=False, progress=None):
    """Completions of prompt texts: dicts of text (cut where another question begins), new_tokens, and finish.

    finish is "eos", "stop" (a new "Question:" began) or "cap". With `calculator`, what follows the "=" of an open
    annotation `<<48/2=` is computed instead of generated.
    """
    def is_done(ids):
        text = tokenizer.decode(ids)
        return gsm8k.truncate(text) != text

    def force(ids):
        if "=" not in tokenizer.decode(ids[-1:]):
            return None
        insert = insertion(tokenizer.decode(ids))
        return tokenizer.encode(insert, start=False) if insert else None

    outputs = generate(model, [tokenizer.encode(prompt) for prompt in prompts], tokenizer.eos_id, max_new, batch,
                       is_done, force if calculator else None, progress)
    completions = []
    for ids in outputs:
        ended = ids[-1] == tokenizer.eos_id
        text = tokenizer.decode(ids[:-1] if ended else ids)
        cut = gsm8k.truncate(text)
        finish = "stop" if cut != text else "eos" if ended else "cap"
        # A row that began another question ran on until the next check: only what is kept counts.
        new_tokens = len(tokenizer.encode(cut, start=False)) if finish == "stop" else len(ids)
        completions.append({"text": cut, "new_tokens": new_tokens, "finish": finish})
    return completions


# ---- scoring --------------------------------------------------------------------------------------------------------

def score_all(examples, completions):
    """One record per problem: question, gold, completion, and what each rule extracted and whether it was right."""
    return [{"question": example["question"], "gold": gsm8k.gold(example["answer"]), "completion": completion["text"],
             "finish": completion["finish"], "new_tokens": completion["new_tokens"],
             "scores": gsm8k.score(completion["text"], example["answer"])}
            for example, completion in zip(examples, completions)]


def summarise(records):
    """n, accuracy and its standard error per rule, the shares that were capped and that gave no answer, new tokens."""
    n = len(records)
    accuracy = {rule: sum(record["scores"][rule]["correct"] for record in records) / n for rule in gsm8k.RULES}
    return {"n": n, "accuracy": accuracy,
            "standard_error": {rule: math.sqrt(p * (1 - p) / n) for rule, p in accuracy.items()},
            "capped": sum(record["finish"] == "cap" for record in records) / n,
            "no_answer": sum(record["scores"]["answer"]["extracted"] is None for record in records) / n,
            "new_tokens": sum(record["new_tokens"] for record in records)}


# ---- the script -----------------------------------------------------------------------------------------------------

def parse_arguments(argv):
    parser = Parser(prog="eval.py", usage="eval.py RUN [flags], or eval.py --model MODEL [flags]",
                    description="Greedy generation and GSM-8K accuracy.")
    parser.add_argument("run", nargs="?", type=Path, metavar="RUN", help="folder that train.py made, or its adapter")
    parser.add_argument("--model", help="base model, as in train.py (default: the run's own base)")
    parser.add_argument("--data", help="gsm8k, practice, or a folder with test.jsonl (default: the run's own data)")
    parser.add_argument("--limit", type=int, help="first N test problems, 0 for all (default: 128 on a CPU, else all)")
    parser.add_argument("--batch", type=positive, help="rows generated together (default: 64 on a CPU, else 512)")
    parser.add_argument("--max-new", type=positive, default=256, help="most new tokens per answer")
    parser.add_argument("--shots", type=int, default=0, help="worked training problems in front of every question")
    parser.add_argument("--calculator", action="store_true", help="compute what follows '=' inside << >>")
    parser.add_argument("--ask", metavar="QUESTION", help="answer one question and stop")
    parser.add_argument("--out", type=Path, help="folder for predictions.jsonl and eval.json (default: the run)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: float32 on a CPU, else bfloat16")
    args = parser.parse_args(argv)
    if args.run is None and args.model is None:
        parser.error("name a run (a folder that train.py made), or a base model with --model")
    if args.shots < 0 or (args.limit is not None and args.limit < 0):
        parser.error("--shots and --limit cannot be negative")
    return args


def load_run(run, model, device, dtype):
    """(Base with the adapter of a run attached, the method's name), on `model` or else the base that the run names."""
    path = run / "adapter.safetensors" if run.is_dir() else run
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file: give a folder that a finished train.py run has left")
    _, config, base_name, _ = adapter.read_config(path)
    base = checkpoint.load(model or base_name, dtype, device)
    adapter.load(base.model, path, base.sha256)
    return base, config["method"]


def load_for_eval(args, device, dtype):
    """(model ready to generate, tokenizer, its name, the method's name): base, adapter, and merge where possible."""
    if args.run is None:
        base = checkpoint.load(args.model, dtype, device)
        return base.model, base.tokenizer, base.name, "none"
    base, method = load_run(args.run, args.model, device, dtype)
    if not any(layer.unmergeable for _, layer in adapter.adapted_layers(base.model)):
        adapter.merge(base.model)
    return base.model, base.tokenizer, base.name, method


def run_folder(run):
    """The folder of a run, which may be named by its adapter file."""
    return run if run.is_dir() else run.parent


def recorded_data(run):
    """The data a run was trained on, as the result.json beside its adapter says; "auto" where there is none."""
    path = run_folder(run) / "result.json" if run else None
    if not path or not path.is_file():
        return "auto"
    try:
        return json.loads(path.read_text())["data"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path}: not the result of a run: name the data with --data") from None


def main(argv=None):
    args = parse_arguments(argv)
    device, dtype = choose_device(args.device, args.dtype)
    model, tokenizer, name, method = load_for_eval(args, device, dtype)
    model.eval().requires_grad_(False)
    shown = f"{name}, method {method}, {str(dtype).removeprefix('torch.')} on {device}"
    data = args.data or recorded_data(args.run)
    shots = gsm8k.load(data, "train")[0][:args.shots] if args.shots else ()

    if args.ask is not None:
        prompt = gsm8k.prompt(args.ask, shots)
        answer = complete(model, tokenizer, [prompt], args.max_new, calculator=args.calculator)[0]
        print(f"{shown}\n\nQuestion: {args.ask}\nAnswer:{answer['text']}")
        if answer["finish"] == "cap":
            print(f"[stopped after {args.max_new} tokens: --max-new allows more]")
        return None

    examples, source = gsm8k.load(data, "test")
    total = len(examples)
    limit = args.limit if args.limit is not None else 128 if device.type == "cpu" else 0
    examples = examples[:limit or None]
    batch = args.batch or (64 if device.type == "cpu" else 512)
    print(f"model     {shown}")
    rest = " (--limit 0 for all)" if len(examples) < total else ""
    print(f"data      {source}; {len(examples)} of {total} problems{rest}")
    print(f"protocol  prompt 'Question: ... Answer:', {args.shots} shots, greedy, at most {args.max_new} new tokens, "
          f"batch {batch}, calculator {'on' if args.calculator else 'off'}")

    started, done = time.time(), 0

    def progress(indices, outputs):
        nonlocal done
        done += len(indices)
        seconds = time.time() - started
        tokens = sum(len(ids) for ids in outputs if ids is not None)
        rate = tokens / seconds
        print(f"  {done:>5}/{len(examples)} problems  {rate:,.0f} new tokens/s  {seconds:.0f} s", flush=True)

    completions = complete(model, tokenizer, [gsm8k.prompt(example["question"], shots) for example in examples],
                           args.max_new, batch, args.calculator, progress)
    seconds = time.time() - started
    records = score_all(examples, completions)
    summary = {"model": name, "method": method, "data": str(data), "source": source, **summarise(records),
               "seconds": round(seconds, 2), "batch": batch, "max_new": args.max_new, "shots": args.shots,
               "calculator": args.calculator, "dtype": str(dtype).removeprefix("torch."), "device": str(device),
               "torch": torch.__version__}

    out = args.out or (run_folder(args.run) if args.run else Path("runs") / f"base-{Path(name).stem}")
    out.mkdir(parents=True, exist_ok=True)
    with atomic_write(out / "predictions.jsonl") as file:
        file.write("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode())
    write_json(out / "eval.json", summary)

    print(f"\naccuracy on {summary['n']} problems (standard error)")
    for rule in gsm8k.RULES:
        print(f"  {rule:<9} {100 * summary['accuracy'][rule]:6.2f} %  (+- {100 * summary['standard_error'][rule]:.2f})")
    print(f"stopped at the cap of {args.max_new} tokens: {100 * summary['capped']:.1f} %   "
          f"no answer found: {100 * summary['no_answer']:.1f} %")
    print(f"{summary['new_tokens']:,} new tokens in {seconds:.1f} s   predictions: {out / 'predictions.jsonl'}")
    return summary


if __name__ == "__main__":
    run_script(main)
