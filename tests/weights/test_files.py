"""Files: the cache folder, writing whole or not at all."""
import errno
import os
from pathlib import Path

import pytest

from weights import files


def test_the_cache_folder_follows_the_environment(tmp_path, monkeypatch):
    """$SORSA_CACHE itself, else `sorsa` under $XDG_CACHE_HOME, else under ~/.cache; created on the way."""
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
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


def test_a_checksum_is_of_all_the_files_bytes(tmp_path):
    """Several files count as one that holds their bytes one after the other."""
    for name, content in (("a", b"1" * (1 << 20) + b"2"), ("b", b"3"), ("both", b"1" * (1 << 20) + b"23")):
        (tmp_path / name).write_bytes(content)
    assert files.sha256(tmp_path / "a", tmp_path / "b") == files.sha256(tmp_path / "both") != files.sha256(tmp_path / "a")
