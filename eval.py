"""Greedy generation, and accuracy on GSM-8K or MATH.

    python eval.py runs/sorsa                        a fine-tuned run on GSM-8K's test set
    python eval.py --model smollm2-135m --shots 4    a base model alone
    python eval.py runs/sorsa --ask "Ann has 3 bags of 4 apples and eats 2. How many are left?"
    python eval.py runs/sorsa --benchmark math --data MATH_test.jsonl

Adapters are merged first where the method can be. Every prediction goes to predictions.jsonl, scored by four rules at
once (gsm8k.py and hendrycks_math.py say which), so that the printed accuracies can be recomputed from that file.
"""
import json
import math
import time
from pathlib import Path

import torch

import adapter
import checkpoint
import gsm8k
import hendrycks_math
import metamath
import prompting
from calculator import insertion
from model import KVCache
from script import Parser, check_folder, choose_device, positive, run_script, tune_cpu, whole, write_json
from tensorfile import atomic_write, fault, read_json

BENCHMARKS = {"gsm8k": gsm8k, "math": hendrycks_math}  # each with gold and score
RESULT_FILES = {"gsm8k": ("predictions.jsonl", "eval.json"), "math": ("predictions-math.jsonl", "eval-math.json")}
CHECK_EVERY = 8  # decode steps between two looks, on a GPU, at which rows have finished: each look waits for it
PREFILL_TOKENS = {"cpu": 2048, "cuda": 65536}  # of prompts read at once: few, of similar length, need little padding


# ---- generation -----------------------------------------------------------------------------------------------------

@torch.inference_mode()
def generate_batch(model, prompts, eos_id, max_new=256, is_done=None, force=None):
    """Greedy continuation of every prompt (lists of token ids) up to and including eos_id, or max_new tokens.

    The right-padded prompts are read first, some rows at a time, then comes one token per row and step from a static KV
    cache; rows do not see each other, so a row's text does not depend on its neighbours. Rows that have finished leave
    the batch.
    `is_done(ids)` may end a row early, `force(ids)` may return tokens to be taken instead of the next choices; both are
    given the row's new tokens so far. Returns a list of token lists in the order of `prompts`.
    """
    device = model.lm_head.weight.device
    cache = KVCache(model.config, len(prompts), max(map(len, prompts)) + max_new, model.lm_head.weight.dtype, device)
    chosen = _prefill(model, prompts, cache)  # (B,)
    new = torch.full((len(prompts), max_new), eos_id, device=device)  # (B, max_new)
    alive = torch.arange(len(prompts), device=device)  # the prompt that each row of the cache belongs to
    forced = [[] for _ in prompts]
    for step in range(max_new):
        if force is not None:
            chosen = _forced_choice(chosen, new, alive.tolist(), step, forced, force)
        new[alive, step] = chosen
        if step + 1 == max_new:
            break
        if device.type == "cpu" or step % CHECK_EVERY == CHECK_EVERY - 1:
            unfinished = ~(new[alive, :step + 1] == eos_id).any(dim=1)  # (rows alive,)
            if is_done is not None and step % CHECK_EVERY == CHECK_EVERY - 1:
                texts_done = [is_done(ids) for ids in new[alive, :step + 1].tolist()]
                unfinished &= ~torch.tensor(texts_done, device=device)
            if not unfinished.any():
                break
            if not unfinished.all():
                order = cache.keep(unfinished)
                alive, chosen = alive[order], chosen[order]
        hidden = model.model(chosen[:, None], cache)  # (rows alive, 1, d)
        cache.advance(1, 1)
        chosen = model.lm_head(hidden[:, 0]).argmax(-1)  # (rows alive,)
    return [_through_first(ids, eos_id) for ids in new[:, :step + 1].tolist()]


def _prefill(model, prompts, cache):
    """Read the prompts into the cache, as many rows at a time as PREFILL_TOKENS allow; returns every row's choice for
    its first token, (B,)."""
    device, first, chosen = model.lm_head.weight.device, 0, []
    cache.slots(max(map(len, prompts)))  # clears them, before the windows write
    while first < len(prompts):
        last, longest = first + 1, len(prompts[first])
        while last < len(prompts):
            longer = max(longest, len(prompts[last]))
            if longer * (last + 1 - first) > PREFILL_TOKENS[device.type]:
                break
            last, longest = last + 1, longer
        lengths = torch.tensor([len(prompt) for prompt in prompts[first:last]])  # (rows,)
        tokens = torch.zeros(last - first, longest, dtype=torch.long)  # (rows, T)
        for row, prompt in enumerate(prompts[first:last]):
            tokens[row, :len(prompt)] = torch.tensor(prompt)
        rows = cache.window(first, last)
        hidden = model.model(tokens.to(device), rows)[range(last - first), lengths - 1]  # (rows, d)
        rows.advance(lengths.to(device), longest)
        chosen.append(model.lm_head(hidden).argmax(-1))
        first = last
    cache.longest = max(map(len, prompts))
    return torch.cat(chosen)


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

    outputs = generate(model, [tokenizer.encode(text) for text in texts], tokenizer.eos_id, max_new, batch,
                       is_done, force if calculator else None, progress)
    completions = []
    for ids in outputs:
        ended = ids[-1] == tokenizer.eos_id
        text = tokenizer.decode(ids[:-1] if ended else ids)
        cut = prompting.truncate(text, template)
        finish = "stop" if cut != text else "eos" if ended else "cap"
        # A row that began another question ran on until the next check: only what is kept counts.
        new_tokens = len(tokenizer.encode(cut, start=False)) if finish == "stop" else len(ids)
        completions.append({"text": cut, "new_tokens": new_tokens, "finish": finish})
    return completions


# ---- scoring --------------------------------------------------------------------------------------------------------

def score_all(benchmark, examples, completions):
    """One record per problem: question, gold, completion, and what each rule extracted and whether it was right; for
    MATH also subject and level."""
    return [{**{key: value for key, value in example.items() if key != "answer"},
             "gold": benchmark.gold(example["answer"]), "completion": completion["text"],
             "finish": completion["finish"], "new_tokens": completion["new_tokens"],
             "scores": benchmark.score(completion["text"], example["answer"])}
            for example, completion in zip(examples, completions)]


def summarise(records):
    """n, accuracy and its standard error per rule, the shares that were capped and that gave no answer, new tokens."""
    n = len(records)
    accuracy = {rule: sum(record["scores"][rule]["correct"] for record in records) / n for rule in records[0]["scores"]}
    return {"n": n, "accuracy": accuracy,
            "standard_error": {rule: math.sqrt(p * (1 - p) / n) for rule, p in accuracy.items()},
            "capped": sum(record["finish"] == "cap" for record in records) / n,
            "no_answer": sum(record["scores"]["answer"]["extracted"] is None for record in records) / n,
            "new_tokens": sum(record["new_tokens"] for record in records)}


def by_field(records, field):
    """{value: {"n", "accuracy"}} of our rule over the records with each value of a field; empty where none has one."""
    values = sorted({record[field] for record in records if record.get(field) is not None})
    groups = {value: [r["scores"]["answer"]["correct"] for r in records if r[field] == value] for value in values}
    return {value: {"n": len(right), "accuracy": sum(right) / len(right)} for value, right in groups.items()}


# ---- the script -----------------------------------------------------------------------------------------------------

def parse_arguments(argv):
    parser = Parser(prog="eval.py", usage="eval.py RUN [flags], or eval.py --model MODEL [flags]",
                    description="Greedy generation, and accuracy on GSM-8K or MATH.")
    parser.add_argument("run", nargs="?", type=Path, metavar="RUN", help="folder that train.py made, or its adapter")
    parser.add_argument("--model", help="base model, as in train.py (default: the run's own base)")
    parser.add_argument("--force", action="store_true", help="take the adapter although it was trained on another base")
    parser.add_argument("--benchmark", choices=list(BENCHMARKS), default="gsm8k", help="which test")
    parser.add_argument("--data", help="gsm8k, practice, or a folder with test.jsonl (default: the run's own data); "
                                       "for math a .jsonl file of problems")
    parser.add_argument("--template", choices=list(prompting.TEMPLATES), help="of the prompt; alpaca-steps asks to "
                                                                              "think step by step (default: the run's)")
    parser.add_argument("--limit", type=whole, help="first N test problems, 0 for all (default: 128 on a CPU, else 0)")
    parser.add_argument("--batch", type=positive, help="rows generated together (default: 128 on a CPU, else 512)")
    parser.add_argument("--max-new", type=positive, help="most new tokens per answer (default: 256, math: 1024)")
    parser.add_argument("--shots", type=whole, default=0, help="worked training problems in front of every question")
    parser.add_argument("--calculator", action="store_true", help="compute what follows '=' inside << >>")
    parser.add_argument("--ask", metavar="QUESTION", help="answer one question and stop")
    parser.add_argument("--out", type=Path, help="folder for predictions.jsonl and eval.json (default: the run)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: float32 on a CPU, else bfloat16")
    args = parser.parse_args(argv)
    if args.run is None and args.model is None:
        parser.error("name a run (a folder that train.py made), or a base model with --model")
    if args.ask is not None and not args.ask.strip():
        parser.error("--ask is empty: write a question behind it")
    if args.benchmark == "math":
        if args.data is None and args.ask is None:
            parser.error("--benchmark math needs --data FILE: a .jsonl file of problems with answers")
        if args.shots or args.calculator:
            parser.error("--shots and --calculator are for GSM-8K: MATH has no training problems here and no << >>")
    args.max_new = args.max_new or {"gsm8k": 256, "math": 1024}[args.benchmark]
    return args


def load_run(run, model, device, dtype, force=False):
    """(Base with the adapter of a run attached, the method's name), on `model` or else the base that the run names.
    `force` takes an adapter that was trained on another base."""
    path = run / "adapter.safetensors" if run.is_dir() else run
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file: give a folder that a finished train.py run has left")
    _, config, base_name, _ = adapter.read_config(path)
    if not model and (not base_name.isprintable() or not 0 < len(base_name) < 1000):
        raise fault(path, f"names no base model ({base_name[:40]!r})", "give it with --model")
    if not model and Path(base_name).is_absolute() and not Path(base_name).exists():
        raise FileNotFoundError(f"{path}: its base model {base_name} is not there any more: give it with --model")
    base = checkpoint.load(model or base_name, dtype, device)
    adapter.load(base.model, path, base.sha256, force)
    return base, config["method"]


def load_for_eval(args, device, dtype):
    """(model ready to generate, tokenizer, its name, the method's name): base, adapter, and merge where possible."""
    if args.run is None:
        base = checkpoint.load(args.model, dtype, device)
        return base.model, base.tokenizer, base.name, "none"
    base, method = load_run(args.run, args.model, device, dtype, args.force)
    if not any(layer.unmergeable for _, layer in adapter.adapted_layers(base.model)):
        adapter.merge(base.model)
    return base.model, base.tokenizer, base.name, method


def run_folder(run):
    """The folder of a run, which may be named by its adapter file."""
    return run if run.is_dir() else run.parent


def recorded(run):
    """(data, template) of a run as the result.json beside its adapter says; ("auto", "plain") where there is none."""
    path = run_folder(run) / "result.json" if run else None
    if not path or not path.is_file():
        return "auto", "plain"
    fix = "name --data and --template"
    result = read_json(path, fix)
    data, template = result.get("data"), result.get("template", "plain")
    known = isinstance(data, str) and data.isprintable() and len(data) < 4096
    if not known or template not in tuple(prompting.TEMPLATES):
        raise fault(path, "not the result of a run", fix)
    return "auto" if metamath.is_problem_file(data) else data, template


def report(summary, path):
    """Print what a user wants to know of a summary; its records are in the file `path`."""
    print(f"\naccuracy on {summary['n']} problems (standard error)")
    for rule, accuracy in summary["accuracy"].items():
        print(f"  {rule:<9} {100 * accuracy:6.2f} %  (+- {100 * summary['standard_error'][rule]:.2f})")
    for field in ("subject", "level"):
        for value, group in summary.get(f"by_{field}", {}).items():
            print(f"  {field} {value:<24} {100 * group['accuracy']:6.2f} %  of {group['n']}")
    print(f"stopped at the cap of {summary['max_new']} tokens: {100 * summary['capped']:.1f} %   "
          f"no answer found: {100 * summary['no_answer']:.1f} %")
    print(f"{summary['new_tokens']:,} new tokens in {summary['seconds']:.1f} s   predictions: {path}")


def main(argv=None):
    args = parse_arguments(argv)
    tune_cpu()
    device, dtype = choose_device(args.device, args.dtype)
    if args.ask is None:
        check_folder(args.out or (run_folder(args.run) if args.run else Path("runs")), "--out")
    data, template = (args.data, args.template) if args.data and args.template else recorded(args.run)
    data, template = args.data or data, args.template or template
    model, tokenizer, name, method = load_for_eval(args, device, dtype)
    model.eval().requires_grad_(False)
    shown = f"{name}, method {method}, {str(dtype).removeprefix('torch.')} on {device}"
    shots = gsm8k.load(data, "train")[0][:args.shots] if args.shots else ()

    if args.ask is not None:
        text = prompting.prompt(args.ask, shots, template)
        answer = complete(model, tokenizer, [text], args.max_new, calculator=args.calculator, template=template)[0]
        print(f"{shown}\n\n{prompting.prompt(args.ask, template=template)}{answer['text']}")
        if answer["finish"] == "cap":
            print(f"[stopped after {args.max_new} tokens: --max-new allows more]")
        return None

    examples, source = hendrycks_math.load(data) if args.benchmark == "math" else gsm8k.load(data, "test")
    total = len(examples)
    limit = args.limit if args.limit is not None else 128 if device.type == "cpu" else 0
    examples = examples[:limit or None]
    batch = args.batch or (128 if device.type == "cpu" else 512)
    print(f"model     {shown}")
    rest = " (--limit 0 for all)" if len(examples) < total else ""
    print(f"data      {source}; {len(examples)} of {total} problems{rest}")
    print(f"protocol  prompt {template}, {args.shots} shots, greedy, at most {args.max_new} new tokens, "
          f"batch {batch}, calculator {'on' if args.calculator else 'off'}")

    started, done = time.time(), 0

    def progress(indices, outputs):
        nonlocal done
        done += len(indices)
        seconds = time.time() - started
        tokens = sum(len(ids) for ids in outputs if ids is not None)
        rate = tokens / seconds
        print(f"  {done:>5}/{len(examples)} problems  {rate:,.0f} new tokens/s  {seconds:.0f} s", flush=True)

    texts = [prompting.prompt(example["question"], shots, template) for example in examples]
    completions = complete(model, tokenizer, texts, args.max_new, batch, args.calculator, progress, template)
    seconds = time.time() - started
    records = score_all(BENCHMARKS[args.benchmark], examples, completions)
    summary = {"model": name, "method": method, "benchmark": args.benchmark, "data": str(data), "source": source,
               **summarise(records), "seconds": round(seconds, 2), "batch": batch, "max_new": args.max_new,
               "template": template, "shots": args.shots, "calculator": args.calculator,
               "dtype": str(dtype).removeprefix("torch."), "device": str(device), "torch": torch.__version__}
    if args.benchmark == "math":
        summary.update(by_subject=by_field(records, "subject"), by_level=by_field(records, "level"))

    out = args.out or (run_folder(args.run) if args.run else Path("runs") / f"base-{Path(name).stem}")
    out.mkdir(parents=True, exist_ok=True)
    predictions, result = RESULT_FILES[args.benchmark]
    with atomic_write(out / predictions) as file:
        file.write("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode())
    write_json(out / result, summary)
    report(summary, out / predictions)
    return summary


if __name__ == "__main__":
    run_script(main, "lower --batch or --max-new")
