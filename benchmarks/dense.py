"""What single patches know after each method: segmentation of street scenes on frozen features.

    python benchmarks/dense.py [--data ../shared/data] [--steps 300] [--methods dino ...]

Every method trains the same small ViT on the images of tiny_imagenet20 with its small recipe, the same steps
and batch. Linear layer and nearest patches are those of `hf_ssl.evaluation.dense`, on camvid.
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

from datasets import Dataset, load_dataset  # noqa: E402
from quality import DATA  # noqa: E402
from report_files import RESULTS, table, write_report  # noqa: E402
from small_vit import small_vit  # noqa: E402

from hf_ssl.cli.loading import load_encoder  # noqa: E402
from hf_ssl.evaluation.dense import DenseScore, evaluate_segmentation  # noqa: E402
from hf_ssl.evaluation.protocol import ENCODER  # noqa: E402
from hf_ssl.training.run import train  # noqa: E402

METHODS = ("simclr", "moco", "mocov3", "mae", "dino", "ibot", "dinov2", "ijepa")
NUM_CLASSES = IGNORED = 11  # the twelfth is "unlabelled"
NUM_PATCHES = 8_000


def main() -> None:
    """Train, score, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    options = parser.parse_args()
    scenes = [split_of(options.data / "camvid", split) for split in ("train", "test")]
    rows = []
    for method in options.methods:
        began = time.process_time()
        scores = measure(method, options, scenes)
        minutes = (time.process_time() - began) / 60
        rows += [
            {"method": method, **vars(score), "minutes": minutes if score.features == ENCODER else None}
            for score in scores
        ]
        print(f"{time.strftime('%H:%M:%S')} {method} {scores[-1]}", flush=True)
    header = ["method", "features", "linear mIoU", "patch kNN mIoU", "CPU minutes"]
    cells = [
        [
            row["method"],
            row["features"],
            f"{row['linear_miou']:.1%}",
            f"{row['knn_miou']:.1%}",
            "" if row["minutes"] is None else f"{row['minutes']:.1f}",
        ]
        for row in rows
    ]
    body = [
        f"ViT of width 128, 4 layers, patches of 8; {options.steps} steps of {options.batch} images of 64 px "
        "(tiny_imagenet20, small recipe of each method), one seed. Segmentation of camvid at 240 x 320, 11 "
        f"classes, 150 training and 100 test images, {NUM_PATCHES:,} training patches.",
        "",
        *table(header, cells),
    ]
    print(write_report("Dense features", "dense.py", body, {"rows": rows}, RESULTS / "dense.md"))


def split_of(folder: Path, split: str) -> Dataset:
    """One split of a folder of parquet files."""
    files = [str(path) for path in sorted(folder.glob(f"{split}-*.parquet"))]
    return load_dataset("parquet", data_files=files, split="train")


def measure(method: str, options: argparse.Namespace, scenes: list[Dataset]) -> list[DenseScore]:
    """Train one method and score it; the floors too, which differ with the method's ViT."""
    with tempfile.TemporaryDirectory() as folder:
        settings: dict[str, Any] = {
            "dataset": str(options.data / "tiny_imagenet20"), "split": "train", "max_steps": options.steps,
            "global_batch_size": options.batch, "per_device_train_batch_size": options.batch,
            "probe_limit": 200, "probe_linear": False, "eval_steps": options.steps,
            "save_steps": options.steps, "disable_tqdm": True, "report_to": "none",
        }  # fmt: skip
        run = train(recipe=f"{method}_small", output_dir=folder, **small_vit(64), **settings)
        encoder, processor = load_encoder(str(run.folder))
        return evaluate_segmentation(
            encoder, processor, *scenes, NUM_CLASSES, ignore_index=IGNORED, num_patches=NUM_PATCHES
        )


if __name__ == "__main__":
    main()
