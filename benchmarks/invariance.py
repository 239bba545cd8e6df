"""Does a step depend on how its images are cut? One command, one table.

    python benchmarks/invariance.py

Every method of `tests/modeling/tiny.py` trains two steps on the same 64 images a step, in float64, cut in
every way that `tests/invariance.py` lists: accumulated, cached, in two gloo processes by accelerate's DDP,
sharded by FSDP2. The table holds the largest deviation from one process with one batch. Ends with code 1 if
one that must be equal is not, or one that differs does not say so.
"""

import argparse
import os
import sys
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ |= {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from report_files import RESULTS, table, write_report  # noqa: E402

from tests.invariance import (  # noqa: E402
    IN_ONE_PROCESS,
    IN_TWO_PROCESSES,
    NUM_IMAGES,
    NUM_STEPS,
    ONE,
    ONE_FROZEN,
    Layout,
    Measurement,
    applies,
    deviations,
    measure,
    measure_in_processes,
    verdict,
    was_said,
)
from tests.modeling.tiny import BY_NAME, TINY_METHODS  # noqa: E402

TOLERANCE = 1e-9

Cell = tuple[str, Layout]


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Deviations between ways to cut a batch, in one table.")
    parser.add_argument("--rows", nargs="+", choices=list(BY_NAME), default=list(BY_NAME))
    parser.add_argument("--output", type=Path, default=RESULTS / "invariance.md")
    return parser.parse_args()


def main() -> int:
    """Measure, print, write."""
    options = parse_arguments()
    rows = [row for row in TINY_METHODS if row.name in options.rows]
    results = measure_all([row.name for row in rows])
    entries = [describe(cell, measured, expected) for cell, (measured, expected) in results.items()]
    lines, data = report_lines(entries), {"cells": entries}
    print(write_report("Invariance", Path(__file__).name, lines, data, options.output))
    return 0 if all(entry["as announced"] for entry in entries) else 1


def measure_all(names: list[str]) -> dict[Cell, tuple[list[Any], Measurement]]:
    """For every cell what its processes measured, or were told, and what one process with one batch did."""
    expected = {(name, False): measure(name, ONE) for name in names}
    results: dict[Cell, list[Any]] = {}
    for name, layout in cells(names, IN_ONE_PROCESS):
        try:
            results[name, layout] = [measure(name, layout)]
        except ValueError as error:
            results[name, layout] = [str(error)]
    shared = cells(names, IN_TWO_PROCESSES)
    results |= {
        cell: list(of_ranks) for cell, *of_ranks in zip(shared, *measure_in_processes(shared), strict=True)
    }
    for name, layout in results:
        if layout.frozen_norms and (name, True) not in expected:
            expected[name, True] = measure(name, ONE_FROZEN)
    return {cell: (result, expected[cell[0], cell[1].frozen_norms]) for cell, result in results.items()}


def cells(names: list[str], layouts: list[Layout]) -> list[Cell]:
    """What there is to measure."""
    return [(name, layout) for name in names for layout in layouts if applies(BY_NAME[name], layout)]


def describe(cell: Cell, measured: list[Any], expected: Measurement) -> dict[str, Any]:
    """One entry: the largest deviations over processes, what was announced, and whether it came so."""
    name, layout = cell
    outcome, words = verdict(BY_NAME[name], layout)
    entry = {"method": name, "layout": layout.name, "outcome": outcome, "deviations": {}, "said": ""}
    if isinstance(measured[0], str):
        return entry | {"said": measured[0], "as announced": outcome == "refused"}
    found = [deviations(result, expected) for result in measured]
    entry["deviations"] = {quantity: max(each[quantity] for each in found) for quantity in found[0]}
    entry["mode"] = {key: str(value) for key, value in sorted(measured[0].facts.items())}
    if outcome == "equal":
        return entry | {"as announced": max(entry["deviations"].values()) < TOLERANCE}
    is_said = layout.sharded or was_said(words, measured[0].warnings)  # sharding goes without the trainer
    return entry | {"said": words, "as announced": outcome == "differs" and is_said}


def report_lines(entries: list[dict[str, Any]]) -> list[str]:
    """The table of what was trained, and the list of what was refused."""
    trained = [entry for entry in entries if entry["deviations"]]
    quantities = list(dict.fromkeys(name for entry in trained for name in entry["deviations"]))
    body = []
    for entry in sorted(trained, key=lambda entry: list(BY_NAME).index(entry["method"])):
        numbers = [format_deviation(entry["deviations"].get(quantity)) for quantity in quantities]
        remark = "equal" if entry["outcome"] == "equal" else f"different: {entry['said']}"
        remark += "" if entry["as announced"] else " **NOT AS ANNOUNCED**"
        body.append([entry["method"], entry["layout"], *numbers, remark])
    refused: dict[str, list[str]] = {}
    for entry in entries:
        if not entry["deviations"]:
            refused.setdefault(entry["said"], []).append(f"{entry['method']} ({entry['layout']})")
    return [
        f"Largest absolute deviation from one process with one batch of {NUM_IMAGES} images, in float64, "
        f"over {NUM_STEPS} steps of SGD: losses and averaged gradients of every step, state after the last. "
        f"Equal: under {TOLERANCE:g}. Processes but the first start with other weights, teacher and queue.",
        "",
        *table(["method", "batch", *quantities, "must be, and is said"], body),
        "",
        "Frozen norms: BatchNorm normalises by its running statistics, since those of a batch depend on its "
        "size. Masks: 0 if the same patches are hidden. Sharded: FSDP2 on student and teacher, driven by the "
        "step protocol alone, since the trainer refuses fsdp on a CPU.",
        "",
        "Refused before the first step:",
        "",
        *(f"- {', '.join(names)}: {words}" for words, names in refused.items()),
    ]


def format_deviation(value: float | None) -> str:
    """An empty cell for what the method does not have."""
    return "" if value is None else "0" if value == 0 else f"{value:.0e}"


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    sys.exit(main())
