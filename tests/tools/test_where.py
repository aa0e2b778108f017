"""The table of a step's time on the tiny model: every product has its place, and the shares are of the whole."""
import re
import sys

import pytest

from methods import METHODS
from tests.toy import write_sums
from tools import where


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", METHODS)
def test_the_shares_add_up(method, dtype, tiny_gguf, tmp_path, monkeypatch, capsys):
    """Products with the frozen layers, the head and what trains are told apart; full fine-tuning has no frozen layers."""
    monkeypatch.setattr(where.bench, "matmul_rate", lambda *_: 100.0)
    monkeypatch.setattr(sys, "argv", ["where.py", "--method", method, "--dtype", dtype, "--model", str(tiny_gguf), "--data",
                                      str(write_sums(tmp_path / "data")), "--batch", "4"])
    where.main()
    out = capsys.readouterr().out
    shares = [float(share) for share in re.findall(r"(\S+) %(?:\s|$)", re.sub(r"GFLOP/s, \d+ %", "", out))]
    assert abs(sum(shares) - 100) < 1 and ("products: frozen layers" in out) == (method != "full")
    assert "products: what trains" in out and "optimizer" in out and "attention" in out
    tokens, = re.findall(r", (\d+) tokens:", out)
    assert where.bench.DEVICE.type == "cpu" and int(tokens) > 0
