"""What train.py and eval.py need beside their own text; here the little that comes before everything else."""
import os
import signal
import sys


def interrupted(number=signal.SIGINT, frame=None):
    """Say so in one line and end at once, with status 130."""
    print("error: interrupted", file=sys.stderr, flush=True)
    os._exit(130)


def interruptible(name):
    """For the head of a script, with its __name__: Ctrl-C in the seconds that importing torch takes ends it without a
    traceback, until script.run_script listens. What the shell has set to be ignored stays so."""
    if name == "__main__" and signal.getsignal(signal.SIGINT) == signal.default_int_handler:
        signal.signal(signal.SIGINT, interrupted)
