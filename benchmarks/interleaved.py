"""Timing beside the peers: all candidates in turn in one process, and ratios of each round.

A round runs every candidate once, so that a change in the machine's load meets all of them; the ratio to the
reference is taken within a round, and its median over the rounds is what is reported. Peak memory is
measured in a process of its own per candidate, as the heap that one leaves behind hides the peak of the next.
"""

import argparse
import ctypes
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from quality import DATA
from report_files import RESULTS, table, write_report

MEBIBYTE = 2**20


@dataclass
class Timing:
    """One candidate: seconds of every round, and how often as fast as the reference it was in each."""

    seconds: list[float]
    speedups: list[float]  # seconds of the reference / own seconds, round by round

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def speedup(self) -> float:
        return statistics.median(self.speedups)

    @property
    def spread(self) -> tuple[float, float]:
        """Smallest and largest speedup of a round."""
        return min(self.speedups), max(self.speedups)


@dataclass
class Gate:
    """One promise: our figure beside a peer's, and what it should be at least (or, of memory, at most).

    Attributes:
        name: what was done.
        peer: beside whom.
        ratio: speedup; of memory, ours / theirs.
        aim: None: reported without a promise.
        spread: smallest and largest ratio of a round.
        at_most: the ratio should not be above the aim, as with memory.
        note: what was tried, where the aim is missed.
    """

    name: str
    peer: str
    ratio: float
    aim: float | None = None
    spread: tuple[float, float] | None = None
    at_most: bool = False
    note: str = ""

    @property
    def met(self) -> bool | None:
        if self.aim is None:
            return None
        return self.ratio <= self.aim if self.at_most else self.ratio >= self.aim


@dataclass
class Part:
    """What one benchmark reports: its gates, further lines, and all that they were made of."""

    name: str  # of the file in `results/`
    title: str
    script: str
    body: list[str]  # Markdown: setting, tables
    gates: list[Gate] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)

    def write(self, output: Path | None = None) -> None:
        """Write `results/<name>.md` and `.json`, and print the first."""
        body = [*self.body, "", *gate_lines(self.gates)] if self.gates else self.body
        data = {"title": self.title, "gates": [asdict(gate) | {"met": gate.met} for gate in self.gates]}
        output = output or RESULTS / f"{self.name}.md"
        print(write_report(self.title, self.script, body, data | self.data, output))


def interleave(
    candidates: dict[str, Callable[[], object]],
    *,
    reference: str,
    rounds: int = 5,
    clock: Callable[[], float] = time.process_time,
    warm_up: int = 1,
) -> dict[str, Timing]:
    """Time all candidates in turn.

    Args:
        candidates: what to run, by name; one call is one measurement and should take 0.05 to 3 seconds.
        reference: the candidate that ratios refer to.
        rounds: measurements of each.
        clock: seconds; CPU time of this process by default, `time.perf_counter` where other processes or a
            GPU do the work.
        warm_up: calls of each before anything is timed.

    Returns:
        Timings by name.
    """
    for run in candidates.values():
        for _ in range(warm_up):
            run()
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, run in candidates.items():
            start = clock()
            run()
            seconds[name].append(clock() - start)
    return {
        name: Timing(own, [r / o for r, o in zip(seconds[reference], own, strict=True)])
        for name, own in seconds.items()
    }


def timing_rows(timings: dict[str, Timing], units: int, unit: str) -> list[str]:
    """A Markdown table: units a second, median ratio and its spread.

    Args:
        timings: from `interleave`.
        units: of work in one call, such as images.
        unit: their name.
    """
    return table(
        ["", f"{unit} / s", "ratio", "lowest to highest"],
        [
            [
                name,
                f"{units / timing.median:,.0f}",
                f"{timing.speedup:.2f}",
                "{:.2f} to {:.2f}".format(*timing.spread),
            ]
            for name, timing in timings.items()
        ],
    )


def speedup_gate(
    what: str,
    timings: dict[str, Timing],
    peer: str,
    aim: float | None = None,
    *,
    own: str = "ours",
    note: str = "",
) -> Gate:
    """How often as fast as a peer, round by round; the note is kept where the aim is missed."""
    ratios = [other / mine for other, mine in zip(timings[peer].seconds, timings[own].seconds, strict=True)]
    gate = Gate(what, peer, statistics.median(ratios), aim, (min(ratios), max(ratios)))
    gate.note = note if gate.met is False else ""
    return gate


def option_parser(doc: str | None, rounds: int) -> argparse.ArgumentParser:
    """Parser of a benchmark's options, `--data` and `--rounds` among them.

    Args:
        doc: docstring of the benchmark; its first line is the help.
        rounds: by default.
    """
    parser = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    parser.add_argument("--data", type=Path, default=DATA, help="folder of the datasets")
    parser.add_argument("--rounds", type=int, default=rounds, help="measurements of each candidate")
    return parser


def gate_lines(gates: list[Gate]) -> list[str]:
    """A Markdown table of gates."""
    rows = []
    for gate in gates:
        sign = "≤" if gate.at_most else "≥"
        spread = "{:.2f} to {:.2f}".format(*gate.spread) if gate.spread else ""
        aim = "" if gate.aim is None else f"{sign} {gate.aim:g}"
        met = {None: "", True: "yes", False: "**no**"}[gate.met]
        rows.append([gate.name, gate.peer, f"{gate.ratio:.2f}", spread, aim, met, gate.note])
    return table(["what", "beside", "ratio", "lowest to highest", "aim", "met", "note"], rows)


def peak_memory(run: Callable[[], object]) -> float:
    """MiB that a call takes above what is there before; call it in a fresh process, after one warm-up."""
    import torch  # a benchmark of start-up must not import it

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return float(torch.cuda.max_memory_allocated() - before) / MEBIBYTE
    ctypes.CDLL(None).malloc_trim(0)  # memory that was freed but kept would hide what is taken
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = _status("VmRSS")
    run()
    return (_status("VmHWM") - before) / 1024


def in_fresh_process(script: str, *arguments: str) -> Any:
    """Run a benchmark's file as a process of its own and return the JSON of its last line."""
    command = [sys.executable, str(RESULTS.parent / script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {done.stderr.strip()}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1])
