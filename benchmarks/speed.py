"""Every speed benchmark, one after the other, and their promises in one table.

    python benchmarks/speed.py [--only views steps ...]

Writes `benchmarks/results.md` and `results.json` from the reports of the parts in `benchmarks/results/`.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from typing import Any

from interleaved import Gate, gate_lines
from report_files import RESULTS, write_report

PARTS = ("views", "steps", "parts", "data_path", "extraction", "end_to_end", "growth", "start_up")


def main() -> None:
    """Run the parts and write the summary."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    only = parser.parse_args().only
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    for part in only:
        start = time.monotonic()
        script = RESULTS.parent / f"speed_{part}.py"
        subprocess.run([sys.executable, str(script)], check=True, env=environment)
        print(f"{part}: {time.monotonic() - start:.0f} s", flush=True)
    reports = {part: json.loads(path.read_text()) for part in PARTS if (path := _report(part)).exists()}
    body = [
        "Ratios are medians over the rounds of one interleaved run: how often as fast as the peer we are; "
        "where the aim is an upper bound, our share of its memory. The reports have settings and tables.",
    ]
    for part, report in reports.items():
        gates = [
            Gate(**{key: value for key, value in gate.items() if key != "met"}) for gate in report["gates"]
        ]
        link = f"[{report['title']}](results/speed_{part}.md)"
        body += [
            "",
            f"## {link}",
            "",
            f"{report['date']}, commit {report['commit']}.",
            "",
            *gate_lines(gates),
        ]
    data: dict[str, Any] = {"parts": {part: report["gates"] for part, report in reports.items()}}
    print(write_report("Speed", "speed.py", body, data, RESULTS.parent / "results.md"))


def _report(part: str) -> Any:
    return RESULTS / f"speed_{part}.json"


if __name__ == "__main__":
    main()
