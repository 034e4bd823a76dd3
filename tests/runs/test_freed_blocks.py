"""Blocks that are freed go back to the system once that is asked for."""

import subprocess
import sys

import pytest

BLOCKS, SIZE = 200, 1 << 20
# Freeing a large block teaches glibc to keep smaller ones; a block after each of them, too large for the gaps that
# imports have left, holds its place. Only what is written to is there.
PROGRAM = f"""
import sys
from fillm.runs.memory import give_back_freed_blocks

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096

if sys.argv[1] == "asked":
    give_back_freed_blocks()
del_me = bytearray(16 << 20)
del del_me
before = resident()
blocks = [(b"x" * {SIZE}, b"x" * (64 << 10)) for _ in range({BLOCKS})]
small = [few for _, few in blocks]
del blocks
print(resident() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_freed_blocks_go_back():
    def left(asked):
        done = subprocess.run([sys.executable, "-c", PROGRAM, asked], capture_output=True, text=True, check=True)
        return int(done.stdout)

    assert left("asked") < 0.1 * BLOCKS * SIZE < left("not asked")
