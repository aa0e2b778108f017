"""The way of a GPU, without one: every method on the simulated device of simulated_cuda.py, which says what that proves."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from methods import METHODS

# Most operators that a step gives a GPU: for each block, and beside the blocks. Of LoRA's 135 for a block 56 are products,
# 28 cast factors and their gradients, 21 are sums, 18 rotate, 6 are SwiGLU's, 4 the norms', 2 attention's.
# (torch 2.6 takes one more.)
OPERATORS = {"full": (65, 46), "lora": (136, 42), "pissa": (136, 42), "sorsa": (192, 87), "sara": (178, 42),
             "mosara": (290, 42), "cora": (122, 42), "cora-init": (136, 42), "lotr": (192, 42)}
WAITS_IN_A_STEP = set()  # for which the host stops until the GPU has caught up


@pytest.fixture(scope="module")
def seen():
    """{method: what simulated_cuda.py saw of it}."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-m", "tests.simulated_cuda"], cwd=Path(__file__).parent.parent, env=environment,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return {record["method"]: record for record in map(json.loads, done.stdout.splitlines())}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_keeps_cudas_rules(method, seen):
    """Training, a checkpoint, a run that goes on, merging, loading and generating: no device is mixed, every operator has a
    kernel, masks and rows have shapes that repeat; the loss falls, and problems are answered."""
    record = seen[method]
    assert record["faults"] == {}
    assert record["losses"][1] < record["losses"][0] and record["answered"] == 2


@pytest.mark.parametrize("method", METHODS)
def test_a_step_is_not_waited_for_and_takes_few_operators(method, seen):
    """The host runs ahead of the GPU through a whole step; what it has to start is bounded."""
    record, (block, rest) = seen[method], OPERATORS[method]
    assert {wait for wait in record["waits"] if wait.startswith("step: ")} == WAITS_IN_A_STEP
    assert record["block"] <= block and record["rest"] <= rest
