"""What BEiT learns from which tokens, beside MAE on the same images and updates.

    python benchmarks/tokens.py [--data ../shared/data/cifar10] [--seeds 0] [--steps-scale 1]

MAE is trained first; then tokenizers: one whose codes give pixels back, one that distils MAE's encoder, one
left untrained; then BEiT with each, all by the `*_small` recipes, one thread; runs are kept. Scores are those
of the mean of each quarter of the patches (grid2) on all images, beside a network that was never trained; the
curve is the online probe's, on 1,000 images.
"""

import argparse
import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ |= {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from quality import DATA, ROOT  # noqa: E402
from report_files import RESULTS, table, write_report  # noqa: E402

from hf_ssl.cli.loading import load_encoder  # noqa: E402
from hf_ssl.data.sources import open_images  # noqa: E402
from hf_ssl.evaluation.protocol import evaluate_encoder  # noqa: E402
from hf_ssl.modeling import METHODS  # noqa: E402
from hf_ssl.training.recipes import load_recipe  # noqa: E402
from hf_ssl.training.run import train  # noqa: E402

TOKENIZERS = ("pixels", "distilled", "untrained")


def main() -> None:
    """Train what is missing, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, default=DATA / "cifar10")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--tokenizers", nargs="+", choices=TOKENIZERS, default=list(TOKENIZERS))
    parser.add_argument("--steps-scale", type=float, default=1.0, help="factor on all steps, for smoke tests")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "tokens", help="kept, and used again")
    parser.add_argument("--output", type=Path, default=RESULTS / "tokens.md")
    options = parser.parse_args()
    rows = [row for seed in options.seeds for row in rows_of(seed, options)]
    cells = [
        [
            row["name"],
            str(row["seed"]),
            "" if row["perplexity"] is None else f"{row['perplexity']:.0f}",
            "" if row["accuracy"] is None else f"{row['accuracy']:.1%}",
            " / ".join(f"{knn:.1%}" for knn in row["knn_curve"]),
            f"{row['knn']:.1%}",
            f"{row['linear']:.1%}",
            f"{row['random_knn']:.1%} / {row['random_linear']:.1%}",
        ]
        for row in rows
    ]
    header = ["tokens", "seed", "perplexity", "accuracy", "kNN over the run", "kNN", "linear", "random init"]
    pixels = rows[0]
    body = [
        "ViT of width 128, 4 layers, patches of 4 on images of 32 px; small recipes of each method. Pixels: "
        f"kNN {pixels['pixels_knn']:.1%}, linear {pixels['pixels_linear']:.1%}. Perplexity of tokens of a "
        "batch, and share of hidden patches whose token was named, at the end.",
        "",
        *table(header, cells),
    ]
    print(write_report("Tokens", "tokens.py", body, {"rows": rows}, options.output))


def rows_of(seed: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """MAE and the three BEiTs of a seed."""
    folder = options.runs / f"{options.data.name}_{options.steps_scale:g}_{seed}"
    mae = trained(folder / "mae", "mae_small", seed, options)
    rows = [row_of("MAE (no tokens)", mae, options, seed)]
    for name in options.tokenizers:
        made = folder / f"tokens_{name}"
        if name == "untrained":
            untrained(made)
        else:
            distilled = {"distill_from": f"{mae}/encoder"} if name == "distilled" else {}
            trained(made, "beit_tokenizer_small", seed, options, **distilled)
        run = trained(folder / f"beit_{name}", "beit_small", seed, options, tokenizer=str(made))
        rows.append(row_of(name, run, options, seed))
    return rows


def trained(folder: Path, recipe: str, seed: int, options: argparse.Namespace, **more: Any) -> Path:
    """The folder of a run, trained unless it is there."""
    if (folder / "scores.json").is_file():
        return folder
    print(f"{time.strftime('%H:%M:%S')} {folder.name}, seed {seed}", flush=True)
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was stopped
    steps = max(round(load_recipe(recipe).training["max_steps"] * options.steps_scale), 4)
    train(
        recipe=recipe, output_dir=str(folder), dataset=str(options.data), split="train", max_steps=steps,
        eval_steps=max(steps // 4, 1), save_steps=steps, logging_steps=max(steps // 20, 1), seed=seed,
        probe_limit=1_000, probe_linear=False, disable_tqdm=True, report_to="none", **more,
    )  # fmt: skip
    return folder


def untrained(folder: Path) -> Path:
    """A tokenizer with the weights and codes that it starts with."""
    if not (folder / "config.json").is_file():
        recipe = load_recipe("beit_tokenizer_small")
        method = METHODS["beit_tokenizer"]
        method.pretraining_class(recipe.config()).save_pretrained(folder)
        method.processor_class.for_image_size(recipe.config().image_size).save_pretrained(folder)
    return folder


def row_of(name: str, run: Path, options: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Scores on all images, and last figures of a run."""
    history = json.loads((run / "trainer_state.json").read_text())["log_history"]
    last = next(entry for entry in reversed(history) if "loss" in entry)
    found = {(row["features"], row["pool"]): row for row in scores_of(run, options)}
    own, start = found["encoder", "grid2"], found["random init", "grid2"]
    pixels = [row for (features, _), row in found.items() if features == "pixels"]
    return {
        "name": name,
        "seed": seed,
        "perplexity": last.get("perplexity"),
        "accuracy": last.get("accuracy"),
        "knn_curve": [entry["eval_knn"] for entry in history if "eval_knn" in entry],
        "knn": best_knn(own),
        "linear": own["linear"],
        "random_knn": best_knn(start),
        "random_linear": start["linear"],
        "pixels_knn": max(map(best_knn, pixels)),
        "pixels_linear": max(row["linear"] for row in pixels),
    }


def scores_of(run: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of the evaluation, made once."""
    file = run / "all_scores.json"
    if not file.is_file():
        encoder, processor = load_encoder(str(run))
        train_images, test_images = (
            open_images(str(options.data), split=split) for split in ("train", "test")
        )
        scores = evaluate_encoder(encoder, processor, train_images, test_images, ["grid2"])
        file.write_text(json.dumps(scores.to_dict()))
    rows: list[dict[str, Any]] = json.loads(file.read_text())["rows"]
    return rows


def best_knn(row: dict[str, Any]) -> float:
    """The best of raw, centred and standardised features."""
    return float(max(value for key, value in row.items() if key.startswith("knn")))


if __name__ == "__main__":
    main()
