"""What single patches know after each method: segmentation of street scenes on frozen features.

    python benchmarks/dense.py [--data ../shared/data] [--steps 300] [--jobs 2] [--variants dino ...]

Every method trains the same small ViT on the images of tiny_imagenet20 with its small recipe, the same steps
and batch; runs are kept. Linear layer and nearest patches are those of `hf_ssl.evaluation.dense`, on camvid.
"""

import argparse
import multiprocessing
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ |= {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from quality import DATA, ROOT  # noqa: E402
from report_files import RESULTS, table, write_report  # noqa: E402
from small_vit import small_vit  # noqa: E402

from hf_ssl.cli.loading import load_encoder  # noqa: E402
from hf_ssl.data.annotated import open_annotated  # noqa: E402
from hf_ssl.evaluation.dense import evaluate_segmentation  # noqa: E402
from hf_ssl.training.run import train  # noqa: E402

# The anchor is the teacher halfway.
GRAM = {"gram_weight": 2.0, "gram_snapshot": 0.5, "gram_start": 0.5, "gram_warmup": 0.1}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in ("simclr", "moco", "mocov3", "mae", "dino", "ibot", "dinov2")},
    "dinov2 with Gram": ("dinov2", GRAM),
    "ijepa": ("ijepa", {"use_class_token": False}),
}
NUM_CLASSES = IGNORED = 11  # the twelfth is "unlabelled"
NUM_PATCHES = 8_000


def main() -> None:
    """Train, score, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "dense", help="kept, and used again")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time, one thread each")
    parser.add_argument("--output", type=Path, default=RESULTS / "dense.md")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    options = parser.parse_args()
    spawning = multiprocessing.get_context("spawn")
    rows: list[dict[str, Any]] = []
    with ProcessPoolExecutor(options.jobs, spawning) as pool:
        for found in pool.map(partial(measure, options=options), options.variants):
            print(f"{time.strftime('%H:%M:%S')} {found[-1]}", flush=True)
            rows += found
    header = ["method", "features", "linear mIoU", "patch kNN mIoU"]
    cells = [
        [
            row["method"],
            row["features"],
            f"{row['linear_miou']:.1%}",
            f"{row['knn_miou']:.1%}",
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
    print(write_report("Dense features", "dense.py", body, {"rows": rows}, options.output))


def measure(variant: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Train one variant and score it; the floors too, which differ with the method's ViT."""
    method, changes = VARIANTS[variant]
    scenes = [open_annotated(str(options.data / "camvid"), split) for split in ("train", "test")]
    folder = options.runs / f"{variant.replace(' ', '_')}_{options.steps}x{options.batch}"
    if not (folder / "scores.json").is_file():
        settings: dict[str, Any] = {
            "dataset": str(options.data / "tiny_imagenet20"), "split": "train", "max_steps": options.steps,
            "global_batch_size": options.batch, "per_device_train_batch_size": options.batch,
            "probe_limit": 200, "probe_linear": False, "eval_steps": options.steps,
            "save_steps": options.steps, "disable_tqdm": True, "report_to": "none",
        }  # fmt: skip
        train(recipe=f"{method}_small", output_dir=str(folder), **small_vit(64), **settings, **changes)
    encoder, processor = load_encoder(str(folder))
    scores = evaluate_segmentation(
        encoder, processor, *scenes, NUM_CLASSES, ignore_index=IGNORED, num_patches=NUM_PATCHES
    )
    return [{"method": variant, **vars(score)} for score in scores]


if __name__ == "__main__":
    main()
