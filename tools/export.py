"""A fine-tuned run in the formats of other tools.

    python -m tools.export runs/sorsa DIR --to peft     as a peft LoRA: PeftModel.from_pretrained(base, DIR)
    python -m tools.export runs/sorsa DIR --to hf       the merged model: AutoModelForCausalLM.from_pretrained(DIR)
    python -m tools.export DIR --model smollm2-135m --to hf     a base alone, to put the LoRA on

The LoRA is exact: every method but Mo-SARA and full fine-tuning changes a weight by a product of low rank, which its
layers give as `lora_factors()`; PiSSA's and SORSA's has rank 2r, against the original weights.
"""
import support

support.interruptible(__name__)  # before torch, which takes seconds to import

import shlex
import shutil
from collections import Counter

import torch

import adapter
from eval import load_run
from support.script import Parser, check_folder, folder, run_script, write_json
from weights import base_model
from weights.files import atomic_write, read_json
from weights.gguf import read_gguf
from weights.huggingface import gpt2_factors, hugging_face_names, llama_fields
from weights.safetensors import write_safetensors
from weights.tokenizer import gguf_tokenizer_json

# What a model folder holds beside weights and config.json; copied from a base that is a folder.
BESIDE = ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json",
          "merges.txt", "tokenizer.model", "chat_template.jinja")


# ---- the adapter as a peft LoRA -------------------------------------------------------------------------------------

@torch.no_grad()
def write_peft(model, base_name, folder):
    """adapter_config.json and adapter_model.safetensors of an adapted model, in peft's layout.

    peft computes (alpha / r) up @ down; the factors carry their scale, so alpha = r, layer by layer. ValueError where
    no linear is adapted.
    """
    layers = adapter.adapted_layers(model)
    if not layers:
        raise ValueError("full fine-tuning changes whole matrices, which is no LoRA: export it with --to hf")
    gpt2, factors = model.config.gpt2, {name: layer.lora_factors() for name, layer in layers}
    if gpt2:
        factors = gpt2_factors(factors, model.config.hidden_size)
    tensors, ranks = {}, {}
    for name, (down, up) in factors.items():  # (k, in), (out, k)
        tensors[f"base_model.model.{name}.lora_A.weight"] = down.float()
        tensors[f"base_model.model.{name}.lora_B.weight"] = up.float()
        ranks[name] = len(down)
    folder.mkdir(parents=True, exist_ok=True)
    rank = max(ranks.values())
    others = {name: k for name, k in ranks.items() if k != rank}
    write_safetensors(folder / "adapter_model.safetensors", tensors, {"format": "pt"})
    write_json(folder / "adapter_config.json", {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base_name, "r": rank,
        "lora_alpha": rank, "rank_pattern": others, "alpha_pattern": others, "lora_dropout": 0.0, "bias": "none",
        "fan_in_fan_out": gpt2, "inference_mode": True,
        "target_modules": target_modules(list(ranks), 2 if gpt2 else 1, model.config.num_hidden_layers)})


def target_modules(names, parts, layers):
    """What peft is to adapt: the last parts of the names, where all layers have each; else the names themselves."""
    ends = Counter(".".join(name.split(".")[-parts:]) for name in names)
    return sorted(ends if set(ends.values()) == {layers} else names)


# ---- the merged model as a Hugging Face folder ----------------------------------------------------------------------

@torch.no_grad()
def write_hf(base, folder):
    """config.json, model.safetensors and the tokenizer's files of a plain model, in Hugging Face layout.

    A base that came from a folder gives its config and tokenizer files; for a GGUF base they are written anew.
    """
    source = base_model.model_path(base.name)
    copied = beside(source)
    folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(folder / "model.safetensors", hugging_face_names(base.model), {"format": "pt"})
    if source.is_dir():
        fields = read_json(source / "config.json")
        for path in copied:
            with atomic_write(folder / path.name) as file, open(path, "rb") as original:
                shutil.copyfileobj(original, file)
    else:
        end_ids = list(base.tokenizer.end_ids)
        fields = llama_fields(base.model.config, end_ids[0] if len(end_ids) == 1 else end_ids)
        write_json(folder / "tokenizer.json", gguf_tokenizer_json(read_gguf(source)[0], source))
        eos = base.tokenizer.decode(end_ids[:1])
        write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": eos})
    fields.pop("torch_dtype", None)  # the older name of dtype
    write_json(folder / "config.json", {**fields, "dtype": str(base.model.lm_head.weight.dtype).rpartition(".")[2],
                                        "tie_word_embeddings": base.model.config.tie_word_embeddings})


def beside(source):
    """The files that a model folder holds beside weights and config.json. ValueError if one is a link out of the
    folder: what is exported is passed on, and such a link may point at anything. The hub's cache keeps all files behind
    links, in the folder `blobs` of the same model."""
    real = source.resolve()
    homes = [real, *([real.parent.parent / "blobs"] if real.parent.name == "snapshots" else [])]
    paths = [source / name for name in BESIDE if (source / name).is_file()]
    for path in paths:
        if not any(path.resolve().is_relative_to(home) for home in homes):
            raise ValueError(f"{path} is a link to {path.resolve()}, outside of the model's folder: put the file "
                             "itself there, or take the link out")
    return paths


# ---- the script -----------------------------------------------------------------------------------------------------

def main(argv=None):
    parser = Parser(prog="python -m tools.export",
                    usage="python -m tools.export RUN DIR --to peft|hf, or DIR --model MODEL --to hf",
                    description=__doc__)
    parser.add_argument("run", type=folder, nargs="?", metavar="RUN", help="folder that train.py made, or its adapter")
    parser.add_argument("folder", type=folder, metavar="DIR", help="where to write: a new or empty folder")
    parser.add_argument("--to", choices=("peft", "hf"), required=True, help="a LoRA for peft, or the merged model")
    parser.add_argument("--force", action="store_true", help="take the adapter although it was trained on another base")
    parser.add_argument("--model", help="base model, as in train.py (default: the run's own base)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the merged model")
    args = parser.parse_intermixed_args(argv)
    if args.run is None and (args.model is None or args.to == "peft"):
        parser.error("name a run and a folder, or for a base model alone --model MODEL --to hf")
    if args.folder.exists() and (not args.folder.is_dir() or any(args.folder.iterdir())):
        raise ValueError(f"{args.folder} is not an empty folder: name another")
    check_folder(args.folder, "DIR")
    if args.run is None:
        base, method = base_model.load(args.model), "no method"
    else:
        base, method = load_run(args.run, args.model, args.force)
    for name, layer in adapter.adapted_layers(base.model):
        if layer.unmergeable:
            raise ValueError(f"{name} cannot be exported: {layer.unmergeable}; eval.py takes the run as it is")
        if args.to == "peft" and not hasattr(layer, "lora_factors"):
            raise ValueError(f"{name}'s change has no low rank, which a LoRA has: export it with --to hf")
    try:
        if args.to == "hf":
            adapter.merge(base.model)
            adapter.cast_frozen(base.model.requires_grad_(False), getattr(torch, args.dtype))  # rounded after the merge
            write_hf(base, args.folder)
        else:
            write_peft(base.model, base.name, args.folder)
    except BaseException:  # the folder was empty: what is not whole goes again
        for path in args.folder.glob("*"):
            path.unlink()
        raise
    size = sum(path.stat().st_size for path in args.folder.iterdir())
    print(f"{args.folder}: {method} on {base.name} as {args.to}, {size / 1e6:.1f} MB")
    if args.to == "peft" and base_model.model_path(base.name).is_file():
        print(f"its base for transformers: python -m tools.export BASE_DIR --model {shlex.quote(base.name)} --to hf")


if __name__ == "__main__":
    run_script(main)
