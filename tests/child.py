"""train.py in a process of its own, without the seconds that importing takes: forked from a server that has imported it
and run nothing. (Forked from the tests, which have threads, a child may wait for ever.)"""
import contextlib
import itertools
import multiprocessing
import signal
import sys

import train
from support.script import run_script

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["train"])


def forked(arguments, said, signal_at=None):
    """A started process of train.py, whose output is added to the file `said`. signal_at: (signal, module name, function,
    call number, times), see `signalling`."""
    process = CONTEXT.Process(target=run, args=(list(map(str, arguments)), str(said), signal_at))
    process.start()
    return process


def ended(process):
    """The status of a process as a shell sees it, once it has ended."""
    process.join()
    return process.exitcode if process.exitcode >= 0 else 128 - process.exitcode


def run(arguments, said, signal_at):
    if signal_at:
        kind, module, *rest = signal_at
        signalling(kind, sys.modules[module], *rest)
    with open(said, "a") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        run_script(lambda: train.main(arguments))


def signalling(kind, owner, name, call, times=1, put=setattr):
    """Let the process send itself a signal in the call number `call` of a function, `times` times."""
    function, calls = getattr(owner, name), itertools.count(1)

    def watched(*arguments, **more):
        if next(calls) == call:
            for _ in range(times):
                signal.raise_signal(kind)
        return function(*arguments, **more)
    put(owner, name, watched)
