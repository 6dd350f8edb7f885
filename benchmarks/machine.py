"""The clock of a benchmark, and what its figures were made with."""

import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch


class Clock:
    """Processor time of this process for one thread on a CPU, else wall-clock time after the device is done."""

    def __init__(self, device: str, threads: int) -> None:
        self._cuda = device == "cuda"
        self.name = "processor time" if not self._cuda and threads == 1 else "wall clock"

    def __call__(self) -> float:
        if self._cuda:
            torch.cuda.synchronize()
        return time.process_time() if self.name == "processor time" else time.perf_counter()


def environment(script: str, clock: Clock) -> dict[str, Any]:
    """Return with what the figures of this run of ``script`` were made."""
    made = {
        "command": f"python benchmarks/{script} " + shlex.join(sys.argv[1:]),
        "clock": clock.name,
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
    }
    return made | ({"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {})


def keep(out: Path, text: str, figures: Mapping[str, Any]) -> None:
    """Write the files ``out``.md and ``out``.json of results; the folder is made if it is not there."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_name(f"{out.name}.md").write_text(text, encoding="utf-8")
    out.with_name(f"{out.name}.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


def processor() -> str:
    """Return the name of the processor, where the system tells it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.machine()
