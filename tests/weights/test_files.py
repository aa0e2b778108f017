"""Files: the cache folder, writing whole or not at all, locks, mappings."""
import errno
import os
import resource
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.child import CONTEXT, ended
from tests.tiny import write_gguf
from weights import files, gguf, safetensors
from weights.gguf import read_gguf
from weights.safetensors import read_safetensors, write_safetensors


def test_the_cache_folder_follows_the_environment(tmp_path, monkeypatch):
    """$SORSA_CACHE itself, else `sorsa` under $XDG_CACHE_HOME, else under ~/.cache; created on the way."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("SORSA_CACHE", str(tmp_path / "own" / "place"))
    assert files.cache_dir() == tmp_path / "own" / "place" and files.cache_dir().is_dir()
    monkeypatch.delenv("SORSA_CACHE")
    assert files.cache_dir() == tmp_path / "xdg" / "sorsa"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert files.cache_dir() == tmp_path / "home" / ".cache" / "sorsa" and files.cache_dir().is_dir()


@pytest.mark.parametrize("step", ["write", "fsync", "replace"])
def test_a_failed_write_leaves_the_old_file(step, tmp_path, monkeypatch):
    """Whether it fails while writing, at the end or after it: the old bytes, nothing else in the folder, and the name of the
    file in the error, which a full disk does not give."""
    path = tmp_path / "a"
    path.write_bytes(b"old")

    def full(*_):
        raise OSError(errno.ENOSPC, "disk full")

    if step != "write":
        monkeypatch.setattr(os, step, full)
    with pytest.raises(OSError, match="disk full") as error, files.atomic_write(path) as file:
        file.write(b"new")
        assert path.read_bytes() == b"old"
        if step == "write":
            full()
    assert error.value.filename == str(path)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_what_cannot_be_put_in_place_is_named_by_its_own_name(tmp_path):
    """Not by that of the temporary file, which is gone."""
    (tmp_path / "a").mkdir()
    with pytest.raises(OSError) as error, files.atomic_write(tmp_path / "a"):
        pass
    assert (error.value.filename, error.value.filename2) == (str(tmp_path / "a"), None) and len([*tmp_path.iterdir()]) == 1


def test_a_checksum_is_of_all_the_files_bytes(tmp_path):
    """Several files count as one that holds their bytes one after the other."""
    for name, content in (("a", b"1" * (1 << 20) + b"2"), ("b", b"3"), ("both", b"1" * (1 << 20) + b"23")):
        (tmp_path / name).write_bytes(content)
    assert files.sha256(tmp_path / "a", tmp_path / "b") == files.sha256(tmp_path / "both") != files.sha256(tmp_path / "a")


# ---- what is left behind, and locks -----------------------------------------------------------------------------------

@pytest.fixture
def dead():
    """The number of a process that has ended."""
    process = CONTEXT.Process(target=int)
    process.start()
    process.join()
    return process.pid


def test_only_what_dead_processes_of_ours_left_is_removed(tmp_path, dead):
    """Files and folders of that name; nothing of another name, of a process that lives, or of anybody else."""
    here, other = files.host(), "0badcafe"  # where the same number may be a process that lives
    theirs = [".thesis.docx.tmp", f".a.{dead}.tmp", f".a.{here}.x.sorsa.tmp", f".b.{here}.{dead}.sorsa.tmp", "a.sorsa.tmp",
              f".a.{here}.{os.getppid()}.sorsa.tmp", f".a.{other}.{dead}.sorsa.tmp"]
    for name in (*theirs, f".a.{here}.{dead}.sorsa.tmp", f".a.{here}.{10 ** 30}.sorsa.tmp"):
        (tmp_path / name).write_text("x")
    (tmp_path / f".a.{here}.0{dead}.sorsa.tmp").mkdir()
    (tmp_path / f".a.{here}.0{dead}.sorsa.tmp" / "file").touch()
    with files.atomic_write(tmp_path / "a") as file:
        file.write(b"new")
    assert {path.name for path in tmp_path.iterdir()} == {"a", *theirs}


def hold(path, said):
    """Take a lock, say so, and keep it."""
    with files.locked(path, lambda who: said.with_name("waiting").write_text(who)):
        said.touch()
        time.sleep(60)


def holding(path, said):
    """A process that has the lock."""
    process = CONTEXT.Process(target=hold, args=(path, said))
    process.start()
    while not said.exists():
        time.sleep(0.01)
    return process


@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGTERM])
def test_a_lock_is_held_as_long_as_its_process_lives(kind, tmp_path):
    """It is refused, with the process in words, also where that is stopped; then it is free, whatever was left."""
    lock = tmp_path / "lock"
    assert files.holder(lock) is None and not lock.exists()
    process = holding(lock, tmp_path / "said")
    os.kill(process.pid, signal.SIGSTOP)
    assert files.try_lock(lock) is None and files.holder(lock) == f"process {process.pid}"
    os.kill(process.pid, kind)
    os.kill(process.pid, signal.SIGCONT)
    assert ended(process) == 128 + kind and lock.exists()
    assert files.holder(lock) is None
    with files.locked(lock, None):
        assert files.holder(lock) == f"process {os.getpid()}"
        with pytest.raises(ZeroDivisionError), files.locked(lock, lambda who: 1 / 0):
            pass
    assert not lock.exists()


def test_a_lock_of_anything_else_is_free(tmp_path):
    """What a file of that name holds does not count: another's number, text, nothing."""
    for text in (str(os.getppid()), "x", ""):
        (tmp_path / "lock").write_text(text)
        with files.locked(tmp_path / "lock", None):
            assert (tmp_path / "lock").read_text() == str(os.getpid())


def count_up(lock, path, times):
    """Add 1 to the number in a file, in a way that only works alone."""
    for _ in range(times):
        with files.locked(lock, lambda who: None):
            number = int(path.read_text())
            time.sleep(0.001)
            path.write_text(str(number + 1))


def test_one_process_at_a_time_has_a_lock(tmp_path):
    """Three that take turns, each of which removes the file when it lets go: nothing is lost."""
    (tmp_path / "n").write_text("0")
    processes = [CONTEXT.Process(target=count_up, args=(tmp_path / "lock", tmp_path / "n", 5)) for _ in range(3)]
    for process in processes:
        process.start()
    assert [ended(process) for process in processes] == [0] * 3 and (tmp_path / "n").read_text() == "15"


# ---- mappings ---------------------------------------------------------------------------------------------------------

def many(path):
    """A file with 40 tensors of 1 MiB, and how to sum one up."""
    ones = {f"t{i}": np.full((512, 512), i, np.float32) for i in range(40)}
    if path.suffix == ".gguf":
        write_gguf(path, {"a": 1}, ones)
        return lambda: {name: tensor.raw.view(np.float32).sum() for name, tensor in read_gguf(path)[1].items()}
    write_safetensors(path, {name: torch.from_numpy(tensor) for name, tensor in ones.items()})
    return lambda: {name: tensor.sum().item() for name, tensor in read_safetensors(path)[0].items()}


@pytest.mark.parametrize("name", ["a.safetensors", "a.gguf"])
def test_a_file_is_one_open_file_however_many_tensors_it_holds(name, tmp_path):
    """Forty large ones where a process may open five more files."""
    sums, before = many(tmp_path / name), resource.getrlimit(resource.RLIMIT_NOFILE)
    free = sorted({*range(before[0])} - {*map(int, os.listdir("/proc/self/fd"))})
    resource.setrlimit(resource.RLIMIT_NOFILE, (free[5], before[1]))
    try:
        assert sums() == {f"t{i}": 512 * 512 * i for i in range(40)}
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def resident():
    """Bytes of memory that this process has."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def test_what_was_read_of_a_mapping_is_let_go_and_what_was_written_stays(tmp_path):
    """Memory of a tensor that is let go is free while the others stay, with what was written to them, also where they
    begin in the page in which it ends."""
    path, size = tmp_path / "a.safetensors", 8 * files.SMALL + 10
    write_safetensors(path, {name: torch.full((size,), i, dtype=torch.uint8) for i, name in enumerate("abc")})
    tensors = read_safetensors(path)[0]
    for name in "ac":
        tensors[name] += 5
    before = resident()
    assert (tensors.pop("b") == 1).all()
    assert resident() < before + files.SMALL
    assert (tensors["a"] == 5).all() and (tensors["c"] == 7).all()
    assert (read_safetensors(path)[0]["c"] == 2).all()


@pytest.mark.parametrize("count", [7, 8])
def test_how_many_entries_a_file_may_have(count, tmp_path, monkeypatch):
    """Tensors without numbers cost nothing in a file, and each some memory."""
    monkeypatch.setattr(safetensors, "MOST_ENTRIES", 7)
    monkeypatch.setattr(gguf, "MOST_ENTRIES", 7)
    path = tmp_path / "a.safetensors"
    write_safetensors(path, {str(i): torch.empty(0) for i in range(count)})
    fields = write_gguf(tmp_path / "fields.gguf", {str(i): True for i in range(count)}, {})
    tensors = write_gguf(tmp_path / "tensors.gguf", {}, {str(i): ((1,), "F32", b"1234") for i in range(count)})
    for read, path in ((read_safetensors, path), (read_gguf, fields), (read_gguf, tensors)):
        if count == 7:
            assert max(map(len, read(path))) == 7
        else:
            with pytest.raises(ValueError, match=f"^{path}: 8 (tensors|metadata fields); at most 7 are read"):
                read(path)
