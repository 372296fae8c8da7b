"""Large blocks come from the heap and stay with it."""

from __future__ import annotations

import subprocess
import sys

import pytest

from runtime.memory import keep_freed_memory

PROGRAM = """
import resource, sys
from runtime.memory import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
def faults():
    blocks = [bytes(4096) * 100 for _ in range(20)]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(50):
        blocks = [bytes(4096) * 100 for _ in range(20)]
        blocks.clear()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(faults())
"""


def faults(how: str) -> int:
    ran = subprocess.run([sys.executable, "-c", PROGRAM, how], capture_output=True, text=True, check=True)
    return int(ran.stdout)


def test_blocks_are_used_again_without_page_faults() -> None:
    if not keep_freed_memory():
        pytest.skip("this C library has no mallopt")
    assert faults("keep") * 10 < faults("default")
