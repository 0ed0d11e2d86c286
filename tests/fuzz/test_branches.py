"""libFuzzer is told each side of a branch and each round of a loop, also of patched kernels."""

import subprocess
import sys

import pytest

pytest.importorskip("atheris", reason="atheris is not installed")

PROBE = """
from vapama.bugs.mistakes import MISTAKES
from vapama.fuzz.branches import COUNTERS, instrument
from vapama.impl.kernels import long_mode

def counted(address, *memory):
    COUNTERS[:] = bytes(len(COUNTERS))
    kernels.walk(memory, len(memory), 0, 0, 0, 0, 0, address, 0, [0] * 6)
    return bytes(COUNTERS)

kernels = {kernels}
assert not any(counted(0, 7))
instrument(kernels)
absent, outside, long, again = counted(0, 0), counted(0), counted(0, 7), counted(0, 7)
assert long == again
assert max(long) == 4  # rounds: a table that references itself, four times
assert len({{absent, outside, long, counted(1 << 50)}}) == 4
"""


@pytest.mark.parametrize("kernels", ["long_mode", "MISTAKES['smep-is-ignored'].module()"])
def test_each_side_of_a_branch_and_each_round_of_a_loop_is_counted(kernels: str) -> None:
    # In a process of its own, for functions stay instrumented.
    probe = [sys.executable, "-c", PROBE.format(kernels=kernels)]
    done = subprocess.run(probe, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
