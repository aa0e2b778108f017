"""A child process ends with its parent, and imports nothing from where it happens to run."""
import os
import signal
import time

import pytest

from tests.child import CONTEXT, ended
from weights import child


def parent(folder):
    """A process that waits for a child which would take a minute."""
    child.run("sleeper", [folder / "pid"], folder)


def gone(pid):
    """Whether a process has ended, within some seconds."""
    for _ in range(500):
        try:
            os.kill(pid, 0)
            if open(f"/proc/{pid}/stat").read().split()[2] == "Z":  # it waits for nobody to ask
                return True
        except (ProcessLookupError, FileNotFoundError):
            return True
        time.sleep(0.01)
    return False


@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGTERM])
def test_a_child_ends_with_its_parent(kind, tmp_path):
    """However that ends."""
    (tmp_path / "sleeper.py").write_text("import os, sys, time\nopen(sys.argv[1], 'w').write(f'{os.getpid()}\\n')\ntime.sleep(60)\n")
    process = CONTEXT.Process(target=parent, args=(tmp_path,))
    process.start()
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text().endswith("\n"):
        time.sleep(0.01)
    os.kill(process.pid, kind)
    assert ended(process) == 128 + kind
    assert gone(int((tmp_path / "pid").read_text()))


def test_a_child_is_the_module_and_no_file_beside(tmp_path, monkeypatch):
    """The current folder is not where it imports from; its arguments, output and status are its own."""
    (tmp_path / "here").mkdir()
    for folder, status in ((tmp_path, 3), (tmp_path / "here", 4)):
        for name in ("work", "runpy", "threading"):
            (folder / f"{name}.py").write_text(f"import sys\nprint(__name__, *sys.argv[1:])\nsys.exit({status})\n")
    (tmp_path / "runpy.py").unlink()
    (tmp_path / "threading.py").unlink()
    monkeypatch.chdir(tmp_path / "here")
    done = child.run("work", ["a", 1], tmp_path)
    assert (done.returncode, done.stdout) == (3, "__main__ a 1\n")
