"""A Python module that runs in a process of its own and ends with this one, however this one ends.

The child holds one end of a pipe as its stdin, this process the other: when that closes, even by SIGKILL, the child
sends itself SIGTERM, at which train.py saves and pip gives up.
"""
import os
import subprocess
import sys


def run(module, arguments, folder, **options):
    """`python -m module arguments`, with `folder` as the first place to import from, and without the current folder,
    where anybody's file may lie under a module's name. Returns what subprocess.run does, and takes its options."""
    stdin, held = os.pipe()
    try:
        command = [sys.executable, __file__, str(folder), module, *map(str, arguments)]
        return subprocess.run(command, stdin=stdin, **options)
    finally:
        os.close(stdin)
        os.close(held)


def end_with_parent():
    """Wait for the other end of the pipe to be closed."""
    os.read(0, 1)
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    sys.path[:] = [sys.argv[1], *(place for place in sys.path if place != os.path.dirname(__file__))]
    import runpy
    import signal
    import threading
    threading.Thread(target=end_with_parent, daemon=True).start()
    sys.argv = sys.argv[2:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
