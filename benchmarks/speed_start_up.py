"""Start-up beside other packages: processor seconds of whole processes, in turn.

python benchmarks/speed_start_up.py [--rounds 7]
"""

import argparse
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from interleaved import Gate, Part, interleave
from report_files import table

BIN = Path(sys.executable).parent
COMMANDS = {
    "python -c pass": [sys.executable, "-c", "pass"],
    "import hf_ssl": [sys.executable, "-c", "import hf_ssl"],
    "hf-ssl --help": [str(BIN / "hf-ssl"), "--help"],
    "hf-ssl train --help": [str(BIN / "hf-ssl"), "train", "--help"],
    "hf --help": [str(BIN / "hf"), "--help"],
    "transformers --help": [str(BIN / "transformers"), "--help"],
    "import timm": [sys.executable, "-c", "import timm"],
    "import lightly": [sys.executable, "-c", "import lightly.models"],
}
LIMITS = {
    "import hf_ssl": (0.05, 0.1),
    "hf-ssl --help": (0.15, 0.3),
}  # processor seconds, seconds on the wall
PEERS = {"import hf_ssl": "import lightly", "hf-ssl --help": "transformers --help"}


def processor_time() -> float:
    """Of all processes that this one has waited for."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def run_of(command: list[str], walls: list[float]) -> Callable[[], Any]:
    """One call runs the command, and notes its time on the wall."""

    def run() -> None:
        start = time.perf_counter()
        subprocess.run(
            command, check=True, stdout=subprocess.DEVNULL, env=os.environ | {"HF_HUB_OFFLINE": "1"}
        )
        walls.append(time.perf_counter() - start)

    return run


def main() -> None:
    """Time all commands and write the report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    walls: dict[str, list[float]] = {name: [] for name in COMMANDS}
    runs = {name: run_of(command, walls[name]) for name, command in COMMANDS.items()}
    timings = interleave(runs, reference="python -c pass", rounds=options.rounds, clock=processor_time)
    shortest = {name: min(seconds) for name, seconds in walls.items()}
    rows = [[name, f"{t.median:.3f}", f"{shortest[name]:.3f}"] for name, t in timings.items()]
    gates = []
    for name, (limit, wall_limit) in LIMITS.items():
        peer = PEERS[name]
        ratio = timings[peer].median / timings[name].median
        gates.append(Gate(f"{name}, processor seconds", "", timings[name].median, limit, at_most=True))
        gates.append(Gate(f"{name}, shortest on the wall", "", shortest[name], wall_limit, at_most=True))
        gates.append(Gate(name, peer, ratio, 1.0))
    body = ["Whole processes, files in the cache.", "", *table(["", "processor s", "shortest s"], rows)]
    data = {"processor_seconds": {name: t.seconds for name, t in timings.items()}, "wall_seconds": walls}
    Part("speed_start_up", "Start-up", "speed_start_up.py", body, gates, data).write()


if __name__ == "__main__":
    main()
