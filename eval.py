"""Accuracy on GSM-8K or MATH by greedy generation; on a file of instructions and responses, the held-out loss.

    python eval.py runs/sorsa                        a fine-tuned run on GSM-8K's test set
    python eval.py --model smollm2-135m --shots 4    a base model alone
    python eval.py runs/sorsa --ask "Ann has 3 bags of 4 apples and eats 2. How many are left?"
    python eval.py runs/sorsa --benchmark math --data MATH_test.jsonl
    python eval.py runs/sorsa --benchmark loss --data FILE.jsonl     what a run on a FILE of its own is measured by
    python eval.py runs/sorsa --forgetting           its loss on general text, and its base's

Adapters are merged first where the method can be. Every prediction goes to predictions.jsonl, scored by four rules at
once (data/gsm8k.py and data/hendrycks_math.py say which), so that the printed accuracies can be recomputed from it.
"""
import support

support.interruptible(__name__)  # before torch, which takes seconds to import

import contextlib
import json
import math
import platform
import shlex
import time
from pathlib import Path

import torch

import adapter
from data import batching, gsm8k, hendrycks_math, instructions, prompting, prose
from support import fast, resume, run_folder
from support.generate import complete, usual_batch
from support.loss import mean_loss
from support.report import duration, per_second
from support.script import (Parser, check_folder, choose_device, device_name, filled, folder, one_line, positive,
                            run_script, whole, write_json)
from weights import adapter_file, base_model
from weights.files import atomic_write, fault, printable, read_json

BENCHMARKS = {"gsm8k": gsm8k, "math": hendrycks_math}  # those with answers: each has gold and score
SKIPPED = {"text": "", "new_tokens": 0, "finish": "skipped"}  # in place of a completion: the question is too long
SHOWN_EVERY = 5  # seconds between two lines of progress


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
    """n, accuracy and its standard error per rule, the shares that were capped and that gave no answer, how many
    questions were skipped, new tokens."""
    n = len(records)
    accuracy = {rule: sum(record["scores"][rule]["correct"] for record in records) / n for rule in records[0]["scores"]}
    return {"n": n, "accuracy": accuracy,
            "standard_error": {rule: math.sqrt(p * (1 - p) / n) for rule, p in accuracy.items()},
            "capped": sum(record["finish"] == "cap" for record in records) / n,
            "no_answer": sum(record["scores"]["answer"]["extracted"] is None for record in records) / n,
            "skipped": sum(record["finish"] == SKIPPED["finish"] for record in records),
            "new_tokens": sum(record["new_tokens"] for record in records)}


def by_field(records, field):
    """{value: {"n", "accuracy"}} of our rule over the records with each value of a field; empty where none has one."""
    values = sorted({record[field] for record in records if record.get(field) is not None})
    groups = {value: [r["scores"]["answer"]["correct"] for r in records if r[field] == value] for value in values}
    return {value: {"n": len(right), "accuracy": sum(right) / len(right)} for value, right in groups.items()}


# ---- what is evaluated ----------------------------------------------------------------------------------------------

def parse_arguments(argv):
    parser = Parser(prog="eval.py", usage="eval.py RUN [flags], or eval.py --model MODEL [flags]",
                    description="Greedy generation, and accuracy on GSM-8K or MATH.")
    parser.add_argument("run", nargs="?", type=folder, metavar="RUN", help="folder that train.py made, or its adapter")
    parser.add_argument("--model", help="base model, as in train.py (default: the run's own base)")
    parser.add_argument("--force", action="store_true", help="take the adapter although it was trained on another base")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--benchmark", choices=[*BENCHMARKS, "loss"], help="accuracy on gsm8k or math, or the loss per "
                      "answer token on a file (default: gsm8k; loss for a run that was trained on a file)")
    what.add_argument("--forgetting", action="store_const", dest="benchmark", const="forgetting", help="measure the "
                      "loss on general English text instead, and by how much a run has raised that of its base")
    parser.add_argument("--data", type=filled, help="gsm8k, practice, or a folder with test.jsonl (default: the run's "
                        "own data); for math a .jsonl of problems; for loss a file of instructions and responses")
    parser.add_argument("--template", choices=list(prompting.TEMPLATES), help="of the prompt; alpaca-steps asks to "
                                                                              "think step by step (default: the run's)")
    parser.add_argument("--answers", choices=batching.ANSWERS, help="as in train.py: in what --shots shows and a loss "
                        "is taken on, and said of the accuracy (default: the run's)")
    parser.add_argument("--limit", type=whole, help="first N test problems, 0 for all (default: 128 on a CPU, else 0)")
    parser.add_argument("--batch", type=positive, help="rows generated together (default: 128 on a CPU, on a "
                        "CUDA GPU as many as half of its free memory has room for)")
    parser.add_argument("--max-new", type=positive, help="most new tokens per answer (default: 256, math: 1024)")
    parser.add_argument("--shots", type=whole, default=0, help="worked training problems in front of every question")
    parser.add_argument("--calculator", action="store_true", help="compute what follows '=' inside << >>")
    parser.add_argument("--ask", metavar="QUESTION", help="answer one question and stop")
    parser.add_argument("--out", type=folder, help="folder for predictions.jsonl and eval.json (default: the run)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps, which is untried")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="as in train.py")
    parser.add_argument("--plain", action="store_true", help="leave off what makes it fast (support/fast.py)")
    args = parser.parse_args(argv)
    if args.run is None and args.model is None:
        parser.error("name a run (a folder that train.py made), or a base model with --model")
    if args.ask is not None and not args.ask.strip():
        parser.error("--ask is empty: write a question behind it")
    if args.benchmark == "math" and args.data is None and args.ask is None:
        parser.error("--benchmark math needs --data FILE: a .jsonl file of problems with answers")
    given = {name.replace("_", "-") for name, value in vars(args).items() if value is not None}
    unused = given & {"ask", "data", "template", "answers", "limit", "max-new"}
    if args.benchmark == "forgetting" and unused:
        parser.error(f"--forgetting is measured on a text of its own: leave out --{min(unused)}")
    unused = given & {"limit", "batch", "out"}
    if args.ask is not None and unused:
        parser.error(f"--ask answers one question and writes nothing: leave out --{min(unused)}")
    if args.benchmark in ("math", "loss", "forgetting") and (args.shots or args.calculator):
        parser.error("--shots and --calculator are for GSM-8K: what is here has no training problems and no << >>")
    return args


def load_run(run, model, force=False):
    """(Base with the adapter of a run attached, the method's name), on `model` or else the base that the run names: in
    fp32 on the CPU, where it can be merged without rounding in between.
    `force` takes an adapter that was trained on another base."""
    path = run / run_folder.ADAPTER if run.is_dir() else run
    if not path.is_file():
        why = (f"this run has not ended: wait for it, or go on with python train.py --resume {shlex.quote(str(run))}"
               if (run / resume.FILE).is_file() else "give a folder that a finished train.py run has left")
        raise FileNotFoundError(f"{path}: no such file: {why}")
    if path.suffix != ".safetensors" or path.name == resume.FILE:
        raise ValueError(f"{path} is no adapter: give the folder of a finished run; a base model goes behind --model, "
                         "an unfinished run behind train.py's --resume")
    _, config, base_name, _ = adapter_file.read(path)
    if not model and ("\0" in base_name or not 0 < len(base_name) < 1000):
        raise fault(path, f"names no base model ({base_name[:40]!r})", "give it with --model")
    if not model and Path(base_name).is_absolute() and not Path(base_name).exists():
        raise FileNotFoundError(f"{path}: its base model {base_name} is not there any more: give it with --model")
    base = base_model.load(model or base_name)
    adapter_file.load(base.model, path, base.sha256, force)
    return base, config["method"]


def load_for_eval(args, device, dtype):
    """(Base that is ready to generate, the method's name): base, adapter, and merge where possible."""
    if args.run is None:
        base, method = base_model.load(args.model, dtype, device), "none"
    else:
        base, method = load_run(args.run, args.model, args.force)
    for name, tensor in base.model.state_dict().items():
        if not adapter.is_finite(tensor):
            raise ValueError(f"the base model {base.name} holds NaN or infinity in {name}: load another, or its file "
                             "again")
    if not any(layer.unmergeable for _, layer in adapter.adapted_layers(base.model)):
        adapter.merge(base.model)
        base.model.requires_grad_(False)  # full fine-tuning's parameters too
    adapter.cast_frozen(base.model, dtype)
    base.model.to(device).eval().requires_grad_(False)
    return base, method


def folder_of(run):
    """The folder of a run, which may be named by its adapter file."""
    return run if run.is_dir() else run.parent


def recorded(run):
    """What the result.json beside a run's adapter says: {"data", "template", "answers", ...}; {} where there is none.
    ValueError where it is not the result of a run."""
    path = folder_of(run) / run_folder.RESULT if run else None
    if not path or not path.is_file():
        return {}
    fix = "name --data, --template and --answers"
    result = read_json(path, fix)
    data, template = result.get("data"), result.get("template", "plain")
    known = isinstance(data, str) and "\0" not in data and len(data) < 4096
    if not known or template not in tuple(prompting.TEMPLATES) or result.get("answers", "full") not in batching.ANSWERS:
        raise fault(path, "not the result of a run", fix)
    return result


def settle(args, on_cpu):
    """Fill in what was not given: from the run, or by what is there. Returns what the run's result.json says."""
    named = args.data and args.template and args.answers  # so that result.json is not needed
    run = {} if named and not instructions.is_file(args.data) else recorded(args.run)
    of_run = run.get("data", "auto")
    on_file = instructions.is_file(args.data or of_run)
    args.benchmark = args.benchmark or ("loss" if on_file else "gsm8k")
    if args.benchmark == "loss" and not on_file:
        raise ValueError("--benchmark loss needs --data FILE, a .json or .jsonl of instructions and responses (or a "
                         "run that was trained on one)")
    if args.benchmark == "loss" and args.ask is None and (args.shots or args.calculator):
        raise ValueError("--shots and --calculator are for GSM-8K: add --benchmark gsm8k, or leave them out")
    if args.benchmark == "gsm8k" and args.data is None and on_file:
        of_run = "auto"
    args.data, args.template = args.data or of_run, args.template or run.get("template", "plain")
    args.answers = args.answers or run.get("answers", "full")
    args.max_new = args.max_new or (1024 if args.benchmark == "math" else 256)
    if args.limit is None and args.benchmark != "loss":  # for a loss it hangs on whose records they are
        args.limit = 128 if on_cpu else 0
    args.out = args.out or (folder_of(args.run) if args.run else None)
    if args.ask is None:
        check_folder(args.out or Path("runs"), "--out")
    return run


# ---- answers and losses ---------------------------------------------------------------------------------------------

def answer_all(args, base, examples, shots):
    """The completions of all questions, with a line of progress every few seconds. A question that leaves no room for
    an answer in the model's context is skipped: it counts, and nothing answers it."""
    started = shown = time.perf_counter()

    def progress(done, tokens):
        nonlocal shown
        now = time.perf_counter()
        if now - shown > SHOWN_EVERY or done == len(asked):
            shown, rate = now, per_second(tokens, now - started)
            print(f"  {done:>5}/{len(asked)} answered  {tokens:,} new tokens, {rate:,.0f} per second  "
                  f"{duration(now - started)}", flush=True)

    texts = [prompting.prompt(example["question"], shots, args.template) for example in examples]
    room = base.model.config.max_position_embeddings - args.max_new
    fits = [len(base.tokenizer.encode(text)) <= room for text in texts]
    if not any(fits):
        fits = [True] * len(texts)  # `complete` says what to lower
    asked = [text for text, fit in zip(texts, fits) if fit]
    answers = iter(complete(base.model, base.tokenizer, asked, args.max_new, args.batch, args.calculator, progress,
                            args.template))
    return [next(answers) if fit else SKIPPED for fit in fits]


def held_out_places(args, run, told):
    """Where in the records `told` of the file --data those lie that the run held out, known by what they say, wherever
    the file lies now; None for another file. ValueError for the run's own file where it says something else now."""
    held_out = run.get("held_out")
    if type(held_out) is not int or not 0 < held_out < len(told):
        return None
    places = batching.split(range(len(told)), held_out)[1]
    named = run.get("data") == str(Path(args.data).resolve())
    sha256 = run.get("held_out_sha256")  # None: of a run before there was one
    same = sha256 == batching.texts_sha256([told[i] for i in places])
    if named and sha256 is not None and not same:
        raise ValueError(f"{args.data} is not the file that the run was trained on any more, so that which of its "
                         "records were held out is not known: put that file back, or copy this one and name the copy "
                         "with --data")
    return places if same or named else None


def held_out_examples(args, base, run):
    """(encoded examples, a description of them, whether the run held them out): of its own file all those that it held
    out, of another the first; --limit of them where that is given."""
    told, source = instructions.load(args.data)
    stripped = run.get("strip_annotations") is True and args.answers == "full"
    examples, apart = batching.without_annotations(told) if stripped else told, held_out_places(args, run, told)
    longest, own, limit = run.get("max_tokens", 512), apart is not None, args.limit
    if type(longest) is not int or not 1 <= longest <= base.model.config.max_position_embeddings:
        longest = base.model.config.max_position_embeddings
    if limit is None:  # what a run held out is measured whole
        limit = 0 if own or base.model.lm_head.weight.device.type != "cpu" else 128
    places = (apart if own else range(len(examples)))[:limit or None]
    if own:
        first = f", the first {limit} of them" * (len(places) < len(apart))
        source = f"{source}: the {len(apart)} that the run held out{first}"
    else:
        source = f"{source}: the first {len(places)}"
    chosen = list(batching.in_form(examples, places, args.answers).values())
    if args.answers == "equations":
        source = f"{source}, {len(chosen)} of them with annotations"
    cut = run.get("cut")
    if not isinstance(cut, list) or len(cut) != 2 or not all(type(length) is int and length > 0 for length in cut):
        cut = (None, None)
    encoded = batching.encode_examples(base.tokenizer, chosen, longest, args.template, cut, f"{args.data}: ",
                                       "give other --data")
    return list(encoded.values()), source, own


def evaluate_loss(args, base, run, described, path):
    """The mean loss per answer token on a file of instructions and responses, printed: its summary. ValueError, before
    it is measured, where the file `path` has that of more."""
    encoded, source, own = held_out_examples(args, base, run)
    keep_a_larger(path, len(encoded))
    print(f"data      {one_line(source)}; {batching.answer_tokens(encoded):,} answer tokens, prompt "
          f"{args.template}{base.tokenizer.chat_text}, answers {args.answers}")
    device, context = base.model.lm_head.weight.device, base.model.config.max_position_embeddings
    loss = mean_loss(base.model, encoded, min(args.batch, 8), device, fast.row_multiple(device, False, context))
    print(f"\n{'held-out ' * own}loss per answer token {loss:.4f} on {len(encoded)} examples (no accuracy: only "
          "GSM-8K's and MATH's answers are scored)")
    return {**described, "source": source, "n": len(encoded), "loss": loss, "template": args.template,
            "answers": args.answers}


def evaluate_forgetting(args, base, device, dtype, described):
    """The loss on general text, of a run beside that of its base, printed: its summary."""
    def loss_of(model):
        multiple = fast.row_multiple(device, False, model.config.max_position_embeddings)
        return mean_loss(model, pieces, min(args.batch, 8), device, multiple)

    pieces = prose.pieces(base.tokenizer, base.model.config.max_position_embeddings)
    print(f"data      {len(pieces)} pieces of {prose.LENGTH} tokens of pydoc_data.topics, Python "
          f"{platform.python_version()}", flush=True)
    loss = loss_of(base.model)
    summary = {**described, "data": "pydoc_data.topics", "prose_sha256": batching.examples_sha256(pieces),
               "python": platform.python_version(), "n": len(pieces), "loss": loss}
    if args.run is None:
        print(f"\nloss per token {loss:.4f}")
        return summary
    plain = base_model.load(args.model or base.name, dtype, device).model.requires_grad_(False)
    adapter.cast_frozen(plain, dtype)  # rounded as the run is
    before = loss_of(plain)
    print(f"\nforgot {loss - before:+.4f}: the loss per token on general text, {before:.4f} of the base, {loss:.4f} of "
          "the run")
    return {**summary, "loss_of_base": before, "forgot": loss - before}


def worked_problems(args):
    """The training problems that --shots puts in front of every question: the first that --answers has a form of."""
    if not args.shots:
        return []
    if instructions.is_file(args.data):
        raise ValueError(f"--shots takes training problems, and {args.data} is one file: give --data gsm8k, practice, "
                         "or a folder with train.jsonl and test.jsonl")
    examples = gsm8k.load(args.data, "train")[0]
    return list(batching.in_form(examples, range(len(examples)), args.answers).values())[:args.shots]


def keep_a_larger(path, n):
    """ValueError where the summary `path` of more than n examples would be replaced. One that cannot be read may go."""
    there = 0
    if path.is_file():
        with contextlib.suppress(ValueError):
            there = read_json(path).get("n")
    if type(there) is int and there > n:
        raise ValueError(f"{path} is of {there} examples, and {n} would take its place: name another folder with --out")


def evaluate_accuracy(args, base, described, path):
    """(summary, records) of the answers to a benchmark's test problems. ValueError, before any is asked, where the file
    `path` has the summary of more."""
    examples, source = hendrycks_math.load(args.data) if args.benchmark == "math" else gsm8k.load(args.data, "test")
    total, shots = len(examples), worked_problems(args)
    examples = examples[:args.limit or None]
    keep_a_larger(path, len(examples))
    rest = " (--limit 0 for all)" if len(examples) < total else ""
    print(f"data      {one_line(source)}; {len(examples)} of {total} problems{rest}")
    print(f"protocol  prompt {args.template}{base.tokenizer.chat_text}, answers {args.answers}, {len(shots)} shots, "
          f"greedy, at most {args.max_new} new tokens, batch {args.batch}, "
          f"calculator {'on' if args.calculator else 'off'}", flush=True)
    started = time.perf_counter()
    completions = answer_all(args, base, examples, shots)
    seconds = time.perf_counter() - started
    records = score_all(BENCHMARKS[args.benchmark], examples, completions)
    summary = {**described, "source": source, **summarise(records), "seconds": round(seconds, 2), "batch": args.batch,
               "max_new": args.max_new, "template": args.template, "answers": args.answers, "shots": len(shots),
               "calculator": args.calculator}
    if args.benchmark == "math":
        summary.update(by_subject=by_field(records, "subject"), by_level=by_field(records, "level"))
    return summary, records


def print_accuracy(summary):
    """Print what a user wants to know of a summary."""
    print(f"\naccuracy on {summary['n']} problems (standard error)")
    for rule, accuracy in summary["accuracy"].items():
        print(f"  {rule:<9} {100 * accuracy:6.2f} %  (+- {100 * summary['standard_error'][rule]:.2f})")
    for field in ("subject", "level"):
        for value, group in summary.get(f"by_{field}", {}).items():
            print(f"  {field} {one_line(value):<24} {100 * group['accuracy']:6.2f} %  of {group['n']}")
    print(f"stopped at the cap of {summary['max_new']} tokens: {100 * summary['capped']:.1f} %   "
          f"no answer found: {100 * summary['no_answer']:.1f} %")
    if summary["skipped"]:
        print(f"skipped: {summary['skipped']} questions that do not fit the model's context with {summary['max_new']} "
              "new tokens; they count as wrong")
    print(f"{summary['new_tokens']:,} new tokens in {summary['seconds']:.1f} s", flush=True)


def answer_one(args, base, shown):
    """Print the answer to --ask."""
    asked = prompting.prompt(args.ask, template=args.template)
    text = prompting.prompt(args.ask, worked_problems(args), args.template)
    answer = complete(base.model, base.tokenizer, [text], args.max_new, calculator=args.calculator,
                      template=args.template)[0]
    print(printable(f"{shown}, answers {args.answers}\n\n{asked}{answer['text']}"))
    if answer["finish"] == "cap":
        print(f"[stopped after {args.max_new} tokens: --max-new allows more]")


def main(argv=None):
    args = parse_arguments(argv)
    if not args.plain:
        fast.switch_on(device=args.device)
    device, dtype = choose_device(args.device, args.dtype, args.plain)
    run = settle(args, device.type == "cpu")
    base, method = load_for_eval(args, device, dtype)
    args.batch = args.batch or usual_batch(base.model)
    precision = str(dtype).removeprefix("torch.")
    shown = f"{base.name}, method {method}, {precision} on {device}"
    if args.ask is not None:
        return answer_one(args, base, shown)

    print(f"model     {one_line(shown)}; {one_line(base.tokenizer.end_text)}")
    for note in base.tokenizer.notes:
        print(f"          {one_line(note)}")
    described = {"model": base.name, "method": method, "benchmark": args.benchmark, "data": str(args.data),
                 "dtype": precision, "device": device_name(device), "torch": torch.__version__}
    out = args.out or Path("runs") / f"base-{Path(base.name).name.removesuffix('.gguf')}"
    files = [out / name for name in run_folder.EVAL_FILES[args.benchmark]]
    for path in filter(Path.is_dir, files):
        raise ValueError(f"{path} is a folder, and a file is to be written there: name another folder with --out")
    if args.benchmark in ("loss", "forgetting"):
        summary = (evaluate_loss(args, base, run, described, files[-1]) if args.benchmark == "loss" else
                   evaluate_forgetting(args, base, device, dtype, described))
        out.mkdir(parents=True, exist_ok=True)
    else:
        summary, records = evaluate_accuracy(args, base, described, files[-1])
        print_accuracy(summary)  # first: whether it can be written is not sure
        out.mkdir(parents=True, exist_ok=True)
        with atomic_write(files[0]) as file:
            file.write("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode())
        print(f"predictions: {files[0]}")
    write_json(files[-1], summary)
    return summary


if __name__ == "__main__":
    run_script(main, "lower --batch or --max-new")
