import os
import subprocess
import sys

import pytest

# Many pieces of sizes that glibc would come to keep in its heap, every other one freed: the rest is a third.
SCRIPT = """
import psutil, torch
{first}
process = psutil.Process()
torch.ones(2**22)  # once freed, pieces of up to 16 MiB would be taken from the heap
kept = [torch.ones(2**21) for _ in range(16)][::2]
print(process.memory_info().rss)
"""


def resident(first: str) -> int:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(first=first)], env=environment, capture_output=True, text=True, check=True
    )
    return int(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="the allocator of glibc")
def test_what_is_freed_goes_back_to_the_system() -> None:
    usual = resident("")
    returned = resident("from llmq.heap import return_freed_memory\nassert return_freed_memory()")
    assert usual - returned > 48 * 2**20  # 8 pieces of 8 MiB lie between others that are in use
