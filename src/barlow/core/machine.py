"""The machine that a figure was measured on."""

from __future__ import annotations

import platform
import re
from collections import Counter
from pathlib import Path

from barlow.core import files


def hardware() -> str:
    """Name the processors this process may use, and all GPUs: `2 x AMD EPYC 9R14, 8 x NVIDIA H100`."""
    import torch  # here, since a benchmark may load another first

    described = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", described.read_text()) if described.exists() else None
    gpus = Counter(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    processors = {found[1] if found else platform.machine(): files.cpus()}
    return ", ".join(f"{count} x {name}" for name, count in [*processors.items(), *gpus.items()])
