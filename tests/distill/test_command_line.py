"""What the verbs set up before torch is imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

CHOICE = Path("/sys/kernel/mm/transparent_hugepage/enabled")
ALLOCATE = """
import re
from caprese_distill.command_line import prefer_huge_pages
prefer_huge_pages()
import torch, transformers
block = torch.ones(2**27, dtype=torch.uint8)
maps = re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", open("/proc/self/smaps").read(), flags=re.M)[1:]
def bounds(text):
    return [int(end, 16) for end in text.split(" ", 1)[0].split("-")]
(mapping,) = [text for text in maps if bounds(text)[0] <= block.data_ptr() < bounds(text)[1]]
print(re.search(r"AnonHugePages: +(\\d+) kB", mapping)[1])
"""


@pytest.mark.skipif(not CHOICE.exists() or "[never]" in CHOICE.read_text(), reason="Linux gives no huge pages here")
@pytest.mark.parametrize(("own", "huge"), [(None, True), ("0", False)])
def test_torch_gets_huge_pages(own: str | None, huge: bool) -> None:
    if not huge and "[always]" in CHOICE.read_text():
        pytest.skip("Linux gives huge pages to all here")
    env = {name: value for name, value in os.environ.items() if name != "THP_MEM_ALLOC_ENABLE"}
    env |= {} if own is None else {"THP_MEM_ALLOC_ENABLE": own}
    run = subprocess.run([sys.executable, "-c", ALLOCATE], env=env, capture_output=True, text=True, check=True)
    assert (int(run.stdout) > 2**15) == huge  # kB, of 2**17
