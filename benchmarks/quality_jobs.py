"""One job of the quality benchmark, in its own process: train, evaluate, write one JSON file.

    python benchmarks/quality_jobs.py JOB.json RESULT.json

What both implementations share is here: settings, clock and evaluation. `quality.py` starts these jobs and
knows nothing of torch.
"""

import copy
import json
import os
import resource
import sys
import tempfile
import time
import warnings
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import TrainerCallback, set_seed

from hf_ssl.data.sources import open_images
from hf_ssl.evaluation.baselines import PixelExtractor, estimate_batchnorm_statistics
from hf_ssl.evaluation.features import collect_features
from hf_ssl.evaluation.images import ImageBatch, read_batches
from hf_ssl.evaluation.protocol import (
    NUM_STATISTICS_IMAGES,
    PIXELS,
    RANDOM,
    ScoreRow,
    evaluate_encoder,
    score_features,
)
from hf_ssl.modeling import METHODS
from hf_ssl.modeling.shared.configuration import SSLTimmConfig
from hf_ssl.training.recipes import Recipe, load_recipe, override, training_arguments
from hf_ssl.training.run import build_trainer

FEWEST_STEPS = 4  # of a smoke test: a warm-up and something after it
LOSSES_KEPT = 20


@dataclass(frozen=True)
class Job:
    """What one process does.

    Attributes:
        implementation: "ours", "lightly" or "pixels".
        method: row of the table; empty for pixels.
        seed: of weights, data order, views and masks.
        data: folder with a train and a test split.
        steps_scale: factor on the steps of the recipe.
        bf16: whether to train with bf16 autocast; decided once for all jobs.
        recipe_name: what is trained; empty for pixels.
        device: "cpu", or "cuda": then both sides train on our views, which a worker makes.
        changes: settings of this run beside the recipe's.
    """

    implementation: str
    method: str
    seed: int
    data: str
    steps_scale: float
    bf16: bool
    recipe_name: str = ""
    device: str = "cpu"
    changes: dict[str, Any] = field(default_factory=dict)

    def recipe(self) -> Recipe:
        """The method's recipe on the benchmark's data; both implementations take their settings from it."""
        recipe = load_recipe(self.recipe_name)
        steps = max(round(recipe.training["max_steps"] * self.steps_scale), FEWEST_STEPS)
        changes = {
            "dataset": self.data,
            "split": "train",
            "seed": self.seed,
            "max_steps": steps,
            "bf16": self.bf16,
            "logging_steps": max(steps // LOSSES_KEPT, 1),
            "logging_strategy": "steps",
            "disable_tqdm": True,
            "report_to": "none",
            "probe_limit": 100,  # built with the trainer, then taken out
            "dataloader_num_workers": int(self.device == "cuda"),
            **self.changes,
        }
        changed = override(recipe, changes)
        # Set here, as an override named "no" is read as YAML's false.
        changed.training |= {"eval_strategy": "no", "save_strategy": "no"}
        return changed


@dataclass
class Training:
    """What a training loop leaves.

    Attributes:
        encoder: the trained network.
        initial_encoder: the same network at step 0.
        processor: makes test images as the encoder wants them.
        cpu_seconds: processor time of the loop, all threads; decoding and views included, set-up not.
        wall_seconds: the same on the wall.
        losses: means over equal parts of the run.
        settings: what it was trained with.
    """

    encoder: nn.Module
    initial_encoder: nn.Module
    processor: Any
    cpu_seconds: float
    wall_seconds: float
    losses: list[float]
    settings: dict[str, Any]


class Clock(TrainerCallback):
    """Processor and wall time between the beginning and the end of a training loop."""

    def __init__(self) -> None:
        self.cpu_seconds = self.wall_seconds = 0.0

    def start(self) -> None:
        """Begin."""
        self._started = time.process_time(), time.perf_counter()

    def stop(self) -> None:
        """End."""
        self.cpu_seconds = time.process_time() - self._started[0]
        self.wall_seconds = time.perf_counter() - self._started[1]

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Called by the trainer before its first step."""
        self.start()

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        """Called by the trainer after its last step."""
        self.stop()


def train_ours(job: Job, folder: Path) -> Training:
    """The recipe as `hf_ssl.training.train` runs it, without probes and without writing the run's folder."""
    recipe = job.recipe()
    trainer = build_trainer(recipe, folder)
    trainer.probe = None
    clock = Clock()
    trainer.add_callback(clock)
    initial_encoder = copy.deepcopy(trainer.model.published_branch().backbone)
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    return Training(
        encoder=trainer.model.published_branch().backbone,
        initial_encoder=initial_encoder,
        processor=trainer.processing_class,
        cpu_seconds=clock.cpu_seconds,
        wall_seconds=clock.wall_seconds,
        losses=[entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        settings=shared_settings(recipe, folder),
    )


def train_lightly(job: Job, folder: Path) -> Training:
    """The same with lightly's views, heads, losses and its examples' order of a step."""
    from quality_lightly import LightlyRun  # only these jobs need lightly

    recipe = job.recipe()
    args = training_arguments(recipe, str(folder))
    set_seed(job.seed)
    trainer = build_trainer(recipe, folder) if job.device == "cuda" else None
    run = LightlyRun(recipe, args, trainer)
    initial_encoder = copy.deepcopy(run.encoder)
    clock = Clock()
    clock.start()
    losses = run.train()
    clock.stop()
    part = max(len(losses) // LOSSES_KEPT, 1)
    # Test images are normalised as the views were: by lightly's transforms with ImageNet's numbers.
    processor: Any = METHODS["moco"].processor_class.for_image_size(recipe.config().image_size)
    if trainer is not None:
        processor = trainer.processing_class
    return Training(
        encoder=run.encoder,
        initial_encoder=initial_encoder,
        processor=processor,
        cpu_seconds=clock.cpu_seconds,
        wall_seconds=clock.wall_seconds,
        losses=[sum(losses[i : i + part]) / len(losses[i : i + part]) for i in range(0, len(losses), part)],
        settings=shared_settings(recipe, folder),
    )


def shared_settings(recipe: Recipe, folder: Path) -> dict[str, Any]:
    """The numbers that must be equal on both sides, as they were used."""
    args = training_arguments(recipe, str(folder))
    return {
        "steps": args.max_steps,
        "batch": args.global_batch_size,
        "optimizer": args.optimizer,
        "learning_rate": args.learning_rate,
        "betas": [args.adam_beta1, args.adam_beta2],
        "weight_decay": args.weight_decay,
        "schedule": args.learning_rate_schedule,
        "warmup_steps": args.get_warmup_steps(args.max_steps),
        "bf16": args.bf16,
        "model": recipe.model,
        "views": recipe.processor.get("views"),
    }


def pools_of(recipe: Recipe) -> list[str]:
    """The features that are read: of a CNN its global mean, of a ViT what its method trains for."""
    if isinstance(recipe.config().backbone_config, SSLTimmConfig):
        return ["mean"]
    return ["grid2", "mean"] if recipe.method == "mae" else ["class_token", "mean"]


def read_splits(data: str, processor: Any) -> tuple[list[ImageBatch], list[ImageBatch]]:
    """All images of the train split and of the other one, processed."""
    held_out = "test" if any(Path(data).glob("test*")) else "validation"
    train, test = (open_images(data, split=split) for split in ("train", held_out))
    return list(read_batches(train, processor)), list(read_batches(test, processor))


def score_training(job: Job, training: Training) -> list[ScoreRow]:
    """Rows of the trained encoder and of its step 0, on all images."""
    train, test = read_splits(job.data, training.processor)
    statistics = [batch.pixel_values for batch in train][: NUM_STATISTICS_IMAGES // len(train[0].row_ids)]
    estimate_batchnorm_statistics(training.initial_encoder, statistics)
    score = partial(
        evaluate_encoder,
        processor=training.processor,
        train_source=train,
        test_source=test,
        pools=pools_of(job.recipe()),
        floors=False,
        device=job.device,
    )
    floors = [replace(row, features=RANDOM) for row in score(training.initial_encoder).rows]
    return [*score(training.encoder).rows, *floors]


def score_pixels(job: Job) -> list[ScoreRow]:
    """Rows of raw pixels, which no method changes."""
    processor = METHODS["moco"].processor_class.for_image_size(32)
    extractors = {PIXELS: PixelExtractor.of(processor)}
    train, test = (collect_features(extractors, split) for split in read_splits(job.data, processor))
    return score_features(train, test)


def run_job(job: Job, folder: Path) -> dict[str, Any]:
    """Result of a job as plain data."""
    result = {"job": asdict(job), "torch_threads": torch.get_num_threads(), "load": os.getloadavg()[0]}
    if job.implementation == "pixels":
        return result | {"rows": [asdict(row) for row in score_pixels(job)]}
    training = (train_ours if job.implementation == "ours" else train_lightly)(job, folder)
    images = training.settings["steps"] * training.settings["batch"]
    return result | {
        "settings": training.settings,
        "cpu_seconds": training.cpu_seconds,
        "wall_seconds": training.wall_seconds,
        "images_per_core_second": images / training.cpu_seconds,
        "images_per_second": images / training.wall_seconds,
        "losses": training.losses,
        "rows": [asdict(row) for row in score_training(job, training)],
        "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def main() -> None:
    """Run the job of the first file and write the second one, at once or not at all."""
    job_file, result_file = Path(sys.argv[1]), Path(sys.argv[2])
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as folder:
        result = run_job(Job(**json.loads(job_file.read_text())), Path(folder))
    unfinished = result_file.with_suffix(".part")
    unfinished.write_text(json.dumps(result, indent=1), encoding="utf-8")
    os.replace(unfinished, result_file)


if __name__ == "__main__":
    main()
