"""Where a run goes."""
import pytest

from support import flags, run_folder


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder to work in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def chosen(*argv):
    """The folder of a command line, or ValueError."""
    args = flags.parse_arguments(["--method", "lora", *argv])
    run_folder.check_out(args)
    return str(run_folder.choose_out(args))


def test_a_second_run_gets_its_own_folder(here):
    """Without --out the first free of runs/METHOD, runs/METHOD-2: any file of a run takes a folder."""
    (here / "runs" / "lora").mkdir(parents=True)
    assert chosen() == "runs/lora"
    for name in run_folder.FILES:
        (here / "runs" / "lora" / name).touch()
        assert chosen() == "runs/lora-2"
        (here / "runs" / "lora" / name).unlink()


def test_a_run_is_replaced_only_where_that_is_said(here):
    """--out over a run is refused, with --overwrite as the way; a checkpoint could also go on."""
    (here / "run").mkdir()
    (here / "run" / "log.jsonl").touch()
    with pytest.raises(ValueError, match="--out run already holds a run: give another folder, or --overwrite to replace it$"):
        chosen("--out", "run")
    (here / "run" / "checkpoint.safetensors").touch()
    with pytest.raises(ValueError, match="--overwrite to replace it, or --resume run to go on"):
        chosen("--out", "run")
    assert chosen("--out", "run", "--overwrite") == "run"
