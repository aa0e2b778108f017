"""Where a run goes."""
import pytest

from support import flags, run_folder


def chosen(*argv):
    """The folder of a command line, or ValueError."""
    args = flags.parse_arguments(["--method", "lora", *argv])
    run_folder.check_out(args)
    return str(run_folder.choose_out(args))


def test_no_run_is_replaced_unless_that_is_said(tmp_path, monkeypatch):
    """Without --out the first free of runs/METHOD, runs/METHOD-2, whatever a run has left; --out over a run is refused,
    with the ways out, or with --overwrite replaces it."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs" / "lora"
    folder.mkdir(parents=True)
    assert chosen() == chosen("--out", "runs/lora") == "runs/lora"
    for name in run_folder.FILES:
        (folder / name).touch()
        assert chosen() == "runs/lora-2" and chosen("--out", "runs/lora", "--overwrite") == "runs/lora"
        way = "or --overwrite to replace it" + (", or --resume runs/lora to go on" if "checkpoint" in name else "")
        with pytest.raises(ValueError, match=f"^--out runs/lora already holds a run: give another folder, {way}$"):
            chosen("--out", "runs/lora")
        (folder / name).unlink()
