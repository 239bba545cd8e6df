"""Draw the pictures of docs/figures: one run of each method's tiny recipe on the built-in sample.

    python docs/draw_figures.py

Runs are kept in runs/docs and used again; all four take about a quarter of an hour on two cores.
"""

import logging
import sys
from pathlib import Path

from hf_ssl.modeling import METHODS
from hf_ssl.training.figures import draw_run
from hf_ssl.training.run import train

ROOT = Path(__file__).resolve().parent.parent
RUNS = ROOT / "runs" / "docs"
FIGURES = ROOT / "docs" / "figures"


def main() -> None:
    """Train what is missing, draw everything."""
    logging.basicConfig(stream=sys.stderr, format="%(message)s")
    for name in METHODS:
        run = RUNS / name
        if not (run / "scores.json").is_file():
            finished = train(name, output_dir=str(run))
            sys.stderr.write(f"{name}: {finished.verdict()}\n{finished.scores.table()}\n")
        for path in draw_run(str(run), str(FIGURES / name)):
            sys.stderr.write(f"{path.relative_to(ROOT)}\n")


if __name__ == "__main__":
    main()
