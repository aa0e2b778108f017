"""A Python module that runs in a process of its own and ends with this one, however this one ends.

The child holds one end of a pipe as its stdin, this process the other: when that closes, even by SIGKILL, the child
sends itself SIGTERM, at which train.py saves and pip gives up. A terminal's Ctrl-C is for this process alone, which
then closes its end and waits.
"""
import os
import subprocess
import sys


def run(module, arguments, folder, stdout=subprocess.PIPE, **options):
    """`python -m module arguments`, with `folder` as the first place to import from, and without the current folder,
    where anybody's file may lie under a module's name. Returns what subprocess.run does, with stderr as text,
    and stdout unless that goes elsewhere; `options` are those of subprocess.Popen."""
    stdin, held = os.pipe()
    command = [sys.executable, __file__, str(folder), module, *map(str, arguments)]
    process = subprocess.Popen(command, stdin=stdin, stdout=stdout, stderr=subprocess.PIPE, text=True, errors="replace",
                               start_new_session=True, **options)
    os.close(stdin)
    try:
        said = process.communicate()
    finally:
        os.close(held)
        process.wait()
    return subprocess.CompletedProcess(command, process.returncode, *said)


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
