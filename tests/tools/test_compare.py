"""Methods and learning rates side by side, on a tiny model."""
import json

from tests.toy import write_sums
from tools import compare


def test_every_run_is_recorded(tiny_gguf, tmp_path, monkeypatch, capsys):
    """Each method and rate gets a line in the table and in the results; a diverged run is one too."""
    results = tmp_path / "results.jsonl"
    flags = ["--data", str(write_sums(tmp_path / "data")), "--results", str(results), "--", "--model", str(tiny_gguf), "--steps", "2",
             "--batch", "4", "--held-out", "8", "--device", "cpu"]
    monkeypatch.chdir(tmp_path)
    compare.main(["--methods", "lora", "--lrs", "1e-2", "1e30", "--params", "5k", *flags])
    good, bad = [json.loads(line) for line in results.read_text().splitlines()]
    assert good["held_out_after"] < good["held_out_before"] and good["adapter"]["rank"] == 3
    assert bad["held_out_after"] is None and "lower --lr" in bad["error"]
    printed = capsys.readouterr().out
    assert "| `lora` | r 3 | 0.01 | " in printed and "| `lora` | - | 1e+30 | - | - | diverged | - | - |" in printed
