"""Does going on with a published encoder keep what it knew? One command, one table.

    python benchmarks/continue.py

A small ViT is trained by SimCLR on CIFAR-10 images and stripped of its heads: its `encoder/` folder, a plain
`ViTModel`, is what anybody could have published. A method goes on from it in every way of `WAYS`: with the
defaults (heads alone first, then the kNN guard), and with fresh heads at once and nothing to watch over it.
Ends with code 1 if the defaults end below the start by more than the guard allows.
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ |= {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from quality import DATA  # noqa: E402
from report_files import RESULTS, table, write_report  # noqa: E402
from small_vit import small_vit  # noqa: E402

from hf_ssl.training.continuing import DEFAULT_DROP  # noqa: E402
from hf_ssl.training.run import Run, train  # noqa: E402

WAYS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "heads alone first, no guard": {"max_knn_drop": 1.0},
    "fresh heads at once, no guard": {"head_warmup_steps": 0, "max_knn_drop": 1.0},
}


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="kNN of an encoder that training goes on with.")
    parser.add_argument("--data", default=str(DATA / "cifar10"))
    parser.add_argument("--method", default="dinov2")
    parser.add_argument("--first_steps", type=int, default=900, help="Of the first training.")
    parser.add_argument("--steps", type=int, default=300, help="Of each further one.")
    parser.add_argument("--learning_rate", type=float, default=2e-3, help="Of the further training.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--output", type=Path, default=RESULTS / "continue.md")
    return parser.parse_args()


def main() -> int:
    """Train, go on, print, write."""
    options = parse_arguments()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in options.seeds:
            rows += measure(options, Path(folder) / str(seed), seed)
    header = ["seed", "way", "start", "lowest", "end", "steps", "CPU minutes"]
    cells = [
        [str(row["seed"]), row["way"], *(f"{row[key]:.1%}" for key in ("start", "lowest", "end")),
         str(row["steps"]), f"{row['minutes']:.1f}"]
        for row in rows
    ]  # fmt: skip
    body = [
        f"kNN of the encoder on 2,000 test images. {options.first_steps} steps of SimCLR, heads thrown away, "
        f"then {options.steps} steps of {options.method} at learning rate {options.learning_rate:g}.",
        "",
        *table(header, cells),
    ]
    print(write_report("Going on with an encoder", "continue.py", body, {"rows": rows}, options.output))
    kept = [row["end"] >= row["start"] - DEFAULT_DROP for row in rows if row["way"] == "defaults"]
    return 0 if all(kept) else 1


def measure(options: argparse.Namespace, folder: Path, seed: int) -> list[dict[str, Any]]:
    """Train an encoder and go on with it in every way; one row each."""
    shared = {
        "dataset": options.data, "split": "train", "probe_dataset": options.data, "probe_linear": False,
        "eval_steps": max(options.steps // 6, 1), "save_steps": max(options.steps, options.first_steps),
        "seed": seed, "disable_tqdm": True, "report_to": "none",
    }  # fmt: skip
    first = run("simclr", folder / "first", max_steps=options.first_steps, **shared)
    rows = []
    for number, (way, changes) in enumerate(WAYS.items()):
        began = time.process_time()
        options_of_way = {
            **shared,
            "max_steps": options.steps,
            "learning_rate": options.learning_rate,
            **changes,
        }
        went_on = run(
            options.method,
            folder / str(number),
            init_from=str(first.folder / "encoder"),
            **options_of_way,
        )
        rows.append(
            {
                "seed": seed,
                "way": way,
                **scores_of(went_on),
                "steps": went_on.trainer.state.global_step,
                "minutes": (time.process_time() - began) / 60,
            }
        )
    return rows


def run(method: str, folder: Path, **options: Any) -> Run:
    """A run of the small recipe of a method with the small ViT."""
    return train(recipe=f"{method}_small", output_dir=str(folder), **small_vit(32), **options)


def scores_of(went_on: Run) -> dict[str, float]:
    """kNN before the first step, the lowest on the way, and of the encoder that is left."""
    scores = [entry["eval_knn"] for entry in went_on.trainer.state.log_history if "eval_knn" in entry]
    return {
        "start": went_on.trainer.floors["start_knn"],
        "lowest": min(scores),
        "end": scores[-1],
    }


if __name__ == "__main__":
    sys.exit(main())
