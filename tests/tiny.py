"""A tiny Llama model in a GGUF file: hidden 64, 2 layers, a vocabulary of bytes. For tests that need a file to load."""
import struct

import numpy as np

from weights.tokenizer import byte_alphabet

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["Ġ t", "h e", "i n", "Ġt he", "a n", "e r", "Ġ a", "Ġa n", "Ġan d", "Ġ Ġ"]
TYPE_NUMBERS = {"F32": 0, "Q8_0": 8, "Q2_K": 10}
LAYERS, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, FFN = 2, 64, 4, 2, 16, 96


def tiny_metadata():
    """Every metadata field that `base_model.load` reads, and a few it does not."""
    tokens = SPECIAL + list(byte_alphabet()) + [merge.replace(" ", "") for merge in MERGES]
    return {
        "general.architecture": "llama", "general.name": "tiny",
        "llama.block_count": LAYERS, "llama.context_length": 256, "llama.embedding_length": HIDDEN,
        "llama.feed_forward_length": FFN, "llama.attention.head_count": HEADS,
        "llama.attention.head_count_kv": KV_HEADS, "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.freq_base": 10000.0, "llama.rope.dimension_count": HEAD_DIM,
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm", "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3] * len(SPECIAL) + [1] * (len(tokens) - len(SPECIAL)),
        "tokenizer.ggml.merges": list(MERGES), "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_bos_token": False,
    }


def tiny_tensors(seed=0):
    """Random weights under GGUF names: dict of name -> float32 array, each matrix of scale 1 / sqrt(columns)."""
    shapes = {"attn_q": (HEADS * HEAD_DIM, HIDDEN), "attn_k": (KV_HEADS * HEAD_DIM, HIDDEN),
              "attn_v": (KV_HEADS * HEAD_DIM, HIDDEN), "attn_output": (HIDDEN, HEADS * HEAD_DIM),
              "ffn_gate": (FFN, HIDDEN), "ffn_up": (FFN, HIDDEN), "ffn_down": (HIDDEN, FFN)}
    random = np.random.default_rng(seed)

    def matrix(rows, columns):
        return (random.standard_normal((rows, columns)) / np.sqrt(columns)).astype(np.float32)

    vocabulary = len(tiny_metadata()["tokenizer.ggml.tokens"])
    tensors = {"token_embd.weight": matrix(vocabulary, HIDDEN), "output_norm.weight": np.ones(HIDDEN, np.float32)}
    for i in range(LAYERS):
        tensors |= {f"blk.{i}.{part}.weight": matrix(*shape) for part, shape in shapes.items()}
        tensors |= {f"blk.{i}.{part}.weight": np.ones(HIDDEN, np.float32) for part in ("attn_norm", "ffn_norm")}
    return tensors


def write_gguf(path, metadata, tensors, alignment=32):
    """Write a GGUF file, version 3.

    metadata: dict of key -> str, bool, int, float, or a list of str, int or float. tensors: dict of name -> float32 array,
    or (shape, type name, bytes) for another type.
    """
    def string(text):
        return struct.pack("<Q", len(text.encode())) + text.encode()

    def value(item):
        if isinstance(item, list):
            kind, encode = {str: (8, string), float: (6, lambda n: struct.pack("<f", n))}.get(
                type(item[0]), (5, lambda n: struct.pack("<i", n)))
            return struct.pack("<IIQ", 9, kind, len(item)) + b"".join(map(encode, item))
        if isinstance(item, str):
            return struct.pack("<I", 8) + string(item)
        kind, format = {bool: (7, "<?"), int: (4, "<I"), float: (6, "<f")}[type(item)]
        return struct.pack("<I", kind) + struct.pack(format, item)

    header = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata))
    header += b"".join(string(key) + value(item) for key, item in metadata.items())
    body = b""
    for name, tensor in tensors.items():
        shape, type_name, raw = tensor if isinstance(tensor, tuple) else (tensor.shape, "F32", tensor.tobytes())
        header += string(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
        header += struct.pack("<IQ", TYPE_NUMBERS[type_name], len(body))
        body += raw + bytes(-len(raw) % alignment)
    path.write_bytes(header + bytes(-len(header) % alignment) + body)
    return path


def byte_vocabulary(size=320):
    """tokenizer.json of bytes, three control tokens, and made-up merges."""
    tokens = ["<unk>", "<s>", "</s>", *byte_alphabet()]
    merges = [f"{a} {b}" for a in "abcdefgh" for b in "ijklmnop"][:size - len(tokens)]
    tokens += [merge.replace(" ", "") for merge in merges]
    return {"model": {"type": "BPE", "vocab": {token: i for i, token in enumerate(tokens)}, "merges": merges},
            "added_tokens": [{"id": i, "content": token, "special": True} for i, token in enumerate(tokens[:3])],
            "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}}


def one_line(error):
    """The message of an error, which must be one line."""
    assert "\n" not in str(error.value)
    return str(error.value)


def short(value):
    """The names of parametrised tests: messages, not files."""
    return value if isinstance(value, str) else ""
