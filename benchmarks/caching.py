"""What gradient caching saves and costs: SimCLR on one large batch, with and without. One command, one table.

    python benchmarks/caching.py [--batch 4096] [--sizes 256 64]

Every setting trains in a process of its own with the real `SSLTrainer`, a small ViT at 32 px, on random
images. Memory is the highest resident set that the system saw; the base is the same process with a batch of
`SMALLEST` images. Times are processor time of the steps after the first one.
"""

import argparse
import multiprocessing
import os
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import datasets  # noqa: E402
import torch  # noqa: E402
from report_files import RESULTS, table, write_report  # noqa: E402
from torch import Tensor  # noqa: E402
from transformers import TrainerCallback  # noqa: E402

from hf_ssl.data.sources import ImageSource, open_images  # noqa: E402
from hf_ssl.modeling import METHODS  # noqa: E402
from hf_ssl.training.arguments import SSLTrainingArguments  # noqa: E402
from hf_ssl.training.trainer import SSLTrainer  # noqa: E402

SMALLEST = 16
STEPS = 2  # the first one is not timed
BACKBONE = {
    "model_type": "hf_ssl_vit",
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Memory and time of gradient caching, in one table.")
    parser.add_argument("--batch", type=int, default=4096, help="images that contrast with each other")
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 64], help="cached_microbatch_size")
    parser.add_argument("--output", type=Path, default=RESULTS / "caching.md")
    return parser.parse_args()


def main() -> None:
    """Measure, print, write."""
    options = parse_arguments()
    jobs: list[tuple[int, int | None]] = [(SMALLEST, None), (options.batch, None)]
    jobs += [(options.batch, size) for size in options.sizes] + [(options.batch // 2, options.sizes[-1])]
    results = [run(*job) for job in jobs]
    data = {"backbone": BACKBONE, "steps": STEPS, "results": results}
    print(write_report("Gradient caching", Path(__file__).name, report_lines(results), data, options.output))


def run(batch: int, size: int | None) -> dict[str, Any]:
    """One setting in a process of its own, which starts with what this one has imported."""
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(train, (batch, size))


class Clock(TrainerCallback):
    """Processor time of every step."""

    def __init__(self) -> None:
        self.starts: list[float] = []
        self.seconds: list[float] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.starts.append(time.process_time())

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.seconds.append(time.process_time() - self.starts[-1])


def train(batch: int, size: int | None) -> dict[str, Any]:
    """Train a few steps in this process."""

    def batches() -> Iterator[dict[str, Tensor]]:
        generator = torch.Generator().manual_seed(0)
        while True:
            yield {
                "pixel_values": torch.randint(
                    0, 256, (batch, 2, 3, 32, 32), generator=generator, dtype=torch.uint8
                )
            }

    def source() -> ImageSource:
        """As many rows as the trainer wants to see; never read, as batches are given."""
        features = datasets.Features({"image": datasets.Image()})
        rows = [{"bytes": b"", "path": None}] * batch
        return open_images(datasets.Dataset.from_dict({"image": rows}, features=features))

    method = METHODS["simclr"]
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        args = SSLTrainingArguments(
            output_dir=folder,
            max_steps=STEPS,
            per_device_train_batch_size=batch,
            cached_microbatch_size=size,
            learning_rate=1e-3,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
        )
        trainer = SSLTrainer(
            model=method.pretraining_class(method.config_class(backbone_config=BACKBONE)),
            args=args,
            train_dataset=source(),
            processing_class=method.processor_class.for_image_size(32),
        )
        trainer.get_train_dataloader = batches  # type: ignore
        clock = Clock()
        trainer.add_callback(clock)
        trainer.train()
    return {
        "batch": batch,
        "size": size,
        "peak_mebibytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "seconds_per_step": sum(clock.seconds[1:]) / (STEPS - 1),
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
    }


def report_lines(results: list[dict[str, Any]]) -> list[str]:
    """The table and how to read it."""
    base = results[0]["peak_mebibytes"]
    plain = {result["batch"]: result for result in results[1:] if result["size"] is None}
    rows = []
    for result in results[1:]:
        reference = plain.get(result["batch"])
        memory = result["peak_mebibytes"] - base
        shares = ["", ""]
        if reference:
            shares[0] = f"{memory / (reference['peak_mebibytes'] - base):.1%}"
            shares[1] = f"{result['seconds_per_step'] / reference['seconds_per_step']:.2f}"
        cells = [result["batch"], result["size"] or "-", f"{memory:.0f}", shares[0]]
        cells += [f"{result['seconds_per_step']:.1f}", shares[1], f"{result['losses'][0]:.4f}"]
        rows.append([str(cell) for cell in cells])
    head = ["images that contrast", "cached_microbatch_size", "peak MiB above base", "of plain", "s per step"]
    side = BACKBONE["image_size"]
    return [
        f"SimCLR, two views of {side} px, a ViT of width {BACKBONE['hidden_size']} with "
        f"{BACKBONE['num_hidden_layers']} layers and {(side // BACKBONE['patch_size']) ** 2} patches, "
        "fp32, one thread.",
        "",
        *table([*head, "time to plain", "loss of step 1"], rows),
        "",
        f"Base: {base:.0f} MiB, the same process with {SMALLEST} images. What still grows with the batch "
        "under caching: the bytes and features of the images, and the gradients of the features. "
        "Seconds are processor time, which load from elsewhere slows.",
    ]


if __name__ == "__main__":
    main()
