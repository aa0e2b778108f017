"""What tests share: the default model (fetched once), the GSM-8K files, a tiny model in a file."""
import json
import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # toy tensors: handing them from thread to thread takes longer than the work

import pytest  # noqa: E402 (after the line that torch reads)
import torch  # noqa: E402

from data.practice import practice  # noqa: E402
from support import fast  # noqa: E402
from tests.tiny import tiny_metadata, tiny_tensors, write_gguf  # noqa: E402
from weights import base_model  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def onednn_is_faster():
    """Whether this CPU's fp32 products are oneDNN's: tried once for all tests."""
    fast.fast_products()
    found = fast.products() == "bf16"
    fast.switch_off()
    return found


@pytest.fixture(autouse=True)
def plain_forms(onednn_is_faster, monkeypatch):
    """What a script switches on for its process (support/fast.py) is not there in the next test; --dtype auto is fp32 on every CPU."""
    monkeypatch.setattr(fast, "bf16_pays", lambda: False)
    monkeypatch.setattr(fast, "takes_less_than", lambda *_: onednn_is_faster)
    yield
    fast.switch_off()


@pytest.fixture(scope="session")
def real_gguf():
    """Path of the default model's GGUF file. Without a connection: skipped, but failed in CI."""
    try:
        return base_model.default_model()
    except ConnectionError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def real_base(real_gguf):
    """The default model, loaded once for all tests: do not change it, `copy.deepcopy` it first."""
    return base_model.load(base_model.DEFAULT_MODEL)


@pytest.fixture(scope="session")
def gsm8k_data():
    """The folder with GSM-8K's train.jsonl and test.jsonl: $GSM8K_DATA, or shared/data/gsm8k beside the repository."""
    folder = Path(os.environ.get("GSM8K_DATA") or ROOT.parent / "shared" / "data" / "gsm8k")
    if not (folder / "train.jsonl").exists():
        pytest.skip("no GSM-8K files: set GSM8K_DATA to their folder")
    return folder


@pytest.fixture(scope="session")
def tiny_gguf(tmp_path_factory):
    """Path of a complete tiny Llama model (64 wide, 2 layers, 269 tokens) with seeded random weights."""
    return write_gguf(tmp_path_factory.mktemp("tiny") / "tiny.gguf", tiny_metadata(), tiny_tensors())


@pytest.fixture(scope="session")
def llama2(tmp_path_factory):
    """A folder in the shape of Llama 2 7B's: as many key heads as query heads, an own head, SentencePiece BPE, bf16."""
    transformers = pytest.importorskip("transformers")
    from tests.weights.test_tokenizer import trained
    folder = tmp_path_factory.mktemp("llama2")
    config = transformers.LlamaConfig(
        vocab_size=1600, hidden_size=128, intermediate_size=344, num_hidden_layers=2, num_attention_heads=4, rms_norm_eps=1e-5,
        max_position_embeddings=4096, bos_token_id=1, eos_token_id=2, tie_word_embeddings=False)
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    texts = [text for example in practice("train", 100) for text in example.values()]
    (folder / "tokenizer.json").write_text(json.dumps(trained("llama2", texts, 1600)))
    return folder
