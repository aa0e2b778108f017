"""Where a run goes, that it is alone there, and what is left of the run before."""
import contextlib
import itertools
import os
import resource
import signal
import time

import pytest

import train
from support import flags, resume, run_folder
from tests.child import ended, forked
from tests.runs import assert_same, begin, contents, copied, ends, go_on
from weights.files import LOCK


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


# ---- two at once ------------------------------------------------------------------------------------------------------

def two_runs(place, whole, folder):
    """The same --out twice: one of them is that run, the other is told so."""
    processes = [forked([*place.lora, "--out", folder / "run"], folder / f"said{i}") for i in range(2)]
    statuses = [ended(process) for process in processes]
    assert sorted(statuses) == [0, 2]
    said = (folder / f"said{statuses.index(2)}").read_text().splitlines()[-1]
    assert said.startswith(f"error: {folder / 'run'}: process {processes[statuses.index(0)].pid} writes its run there: wait ") \
        or said.startswith(f"error: --out {folder / 'run'} already holds a run")
    assert_same(whole, folder / "run")


def two_runs_without_a_name(place, whole, folder, monkeypatch):
    """Without --out each has a folder of its own."""
    monkeypatch.chdir(folder)
    assert [ended(process) for process in [forked(place.lora, folder / "said") for _ in range(2)]] == [0, 0]
    assert {path.name for path in (folder / "runs").iterdir()} == {"lora", "lora-2"}
    for path in (folder / "runs").iterdir():
        assert_same(whole, path)


def test_two_runs_do_not_share_a_folder(place, whole, tmp_path, monkeypatch):
    for trial in range(2):
        (tmp_path / str(trial)).mkdir()
        two_runs(place, whole, tmp_path / str(trial))
    two_runs_without_a_name(place, whole, tmp_path, monkeypatch)


@pytest.mark.long
def test_two_runs_do_not_share_a_folder_in_twenty_trials(place, whole, tmp_path, monkeypatch):
    for trial in range(20):
        (tmp_path / str(trial)).mkdir()
        two_runs(place, whole, tmp_path / str(trial))
        two_runs_without_a_name(place, whole, tmp_path / str(trial), monkeypatch)


def test_a_run_that_goes_on_is_left_alone(place, whole, tmp_path, monkeypatch, capsys):
    """While its process lives nothing resumes or replaces it, and a new run takes another folder; once that is killed it
    goes on, and what it left of its lock and of a file that it was writing goes too."""
    run = tmp_path / "runs" / "lora"
    monkeypatch.chdir(tmp_path)
    process = forked([*place.lora, "--out", run], tmp_path / "said", (signal.SIGSTOP, "os", "replace", 5))
    size = (whole / run_folder.ADAPTER).stat().st_size
    while not any(written.stat().st_size == size for written in run.glob(f".{run_folder.ADAPTER}.*")):  # and not yet in place
        time.sleep(0.01)
    before, words = contents(run), f"error: {run}: process {process.pid} writes its run there: wait until it has ended, or give "
    for function, arguments in ((go_on, (run,)), (begin, (place.lora, run, "--overwrite"))):
        status, said = ends(capsys, function, *arguments)
        assert status == 2 and said.startswith(words) and contents(run) == before
    args = flags.parse_arguments(place.lora)
    run_folder.check_out(args)
    assert str(run_folder.choose_out(args)) == "runs/lora-2"
    process.kill()
    assert ended(process) == 137
    go_on(run)
    assert_same(whole, run)


def test_what_others_left_in_the_folder_stays(half, tmp_path):
    """Also where it looks like a temporary file."""
    run = copied(half, tmp_path / "run")
    for name in (".thesis.docx.tmp", f".log.jsonl.{os.getppid()}.tmp"):
        (run / name).write_text("mine")
    go_on(run)
    assert {".thesis.docx.tmp", f".log.jsonl.{os.getppid()}.tmp"} < contents(run).keys()


def test_a_run_that_another_has_ended_is_not_gone_on_with(half, tmp_path, monkeypatch, capsys):
    """Between reading the checkpoint and writing a second process may have come to the end."""
    run, load = copied(half, tmp_path / "run"), train.load_examples
    monkeypatch.setattr(train, "load_examples", lambda *given: ((run / resume.FILE).unlink(), load(*given))[1])
    before = contents(run)
    status, said = ends(capsys, go_on, run)
    assert status == 2 and "so there is nothing to continue" in said
    assert contents(run) == {name: content for name, content in before.items() if name != resume.FILE}


# ---- replaced ---------------------------------------------------------------------------------------------------------

class Died(BaseException):
    """What ends a process, here."""


@contextlib.contextmanager
def dying(event):
    """Let nothing more happen to a file from event number `event` on: a replacing or a removing one."""
    events = itertools.count(1)

    def watched(function):
        def call(*arguments, **more):
            if next(events) >= event:
                raise Died
            return function(*arguments, **more)
        return call
    with pytest.MonkeyPatch.context() as patch:
        for name in ("replace", "unlink"):
            patch.setattr(os, name, watched(getattr(os, name)))
        yield


@pytest.mark.parametrize("stride", [3, pytest.param(1, marks=pytest.mark.long)])
def test_an_old_result_is_never_seen_beside_a_new_run(stride, place, whole, tmp_path):
    """Whenever a run that replaces another one ends, the folder holds files of one of them, and the run can be made."""
    names = (run_folder.LOG, run_folder.RESULT, run_folder.ADAPTER, *run_folder.ALL_EVAL_FILES)
    begin([*place.lora, "--seed", "5"], tmp_path / "old")
    for name in run_folder.ALL_EVAL_FILES:
        (tmp_path / "old" / name).write_text("{}")
    old, new = contents(tmp_path / "old"), contents(whole)
    for event in itertools.count(1, stride):
        run = copied(tmp_path / "old", tmp_path / str(event))
        try:
            with dying(event):
                begin(place.lora, run, "--overwrite")
            break
        except Died:
            pass
        found = {name: content for name, content in contents(run).items() if name in names}
        of_old = {name for name, content in found.items() if content == old[name]}
        assert not of_old or of_old == found.keys() and resume.FILE not in contents(run), event
        assert run_folder.ADAPTER in found or run_folder.RESULT not in found, event
        if found.get(run_folder.ADAPTER) == new[run_folder.ADAPTER]:
            assert (run / resume.FILE).exists() or run_folder.RESULT in found, event
        (run / LOCK).unlink()
        go_on(run) if (run / resume.FILE).exists() else begin(place.lora, run, "--overwrite")
        assert_same(whole, run)
    assert event > 15
    assert_same(whole, run)


# ---- the log ----------------------------------------------------------------------------------------------------------

def test_a_log_of_any_size_takes_no_memory(half, whole, tmp_path):
    """With lines of any length and depth: what is of no step before the checkpoint is dropped."""
    run = copied(half, tmp_path / "run")
    with open(run / run_folder.LOG, "ab") as file:
        file.write(b"[" * 100000 + b"\n" + b'{"step": ' * 50000 + b"\n" + b'{"step": 1' + b"0" * 100000 + b"}\n")
        file.truncate(file.tell() + (1 << 27))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with open(tmp_path / "kept", "wb") as kept:
        kept.writelines(run_folder.kept_lines(run / run_folder.LOG, 4))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < before + (40 << 10)  # in KiB
    assert (tmp_path / "kept").read_bytes() == (half / run_folder.LOG).read_bytes()
