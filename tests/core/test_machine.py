import os
from pathlib import Path

import torch

from barlow.core import machine


def test_hardware_names_processors_and_gpus(monkeypatch):
    names = ["NVIDIA A", "NVIDIA B", "NVIDIA A"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_name", names.__getitem__)
    processors, *gpus = machine.hardware().split(", ")
    count, _, name = processors.partition(" x ")
    assert int(count) == len(os.sched_getaffinity(0))
    assert f": {name}\n" in Path("/proc/cpuinfo").read_text()
    assert gpus == ["2 x NVIDIA A", "1 x NVIDIA B"]
