"""Whole training runs beside lightly's loop with the same recipe, and the time to an equal score.

    python benchmarks/speed_end_to_end.py [--data ../shared/data] [--steps 100] [--race-steps 300]

SimCLR with the recipe `simclr_small` on CIFAR-10: same images, network, batch, steps, optimizer, schedule and
bf16 autocast where it is fast. Each run is a process of its own.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from interleaved import Gate, Part, Timing, timing_rows
from quality import DATA, ROOT
from report_files import table

EVERY = 25  # steps between two scores of the race
SCRIPT = Path(__file__)


def write_images(data: Path, folder: Path) -> Path:
    """The training images without their labels, so that no side scores anything."""
    import pyarrow.parquet as pq

    for path in sorted(data.glob("cifar10/train*.parquet")):
        images = pq.read_table(path).select(["image"])
        pq.write_table(images.replace_schema_metadata(None), folder / path.name, row_group_size=1000)
    return folder


def recipe_of(dataset: str, steps: int) -> Any:
    """The recipe with nothing but training in it."""
    from hf_ssl.training.recipes import load_recipe, override

    changes = {"dataset": dataset, "split": "train", "max_steps": steps, "seed": 0}
    recipe = override(load_recipe("simclr_small"), changes)
    recipe.training |= {"eval_strategy": "no", "save_strategy": "no", "logging_steps": steps}
    return recipe


def lightly_run(recipe: Any, num_workers: int = 0) -> Any:
    """lightly's loop with the recipe's settings."""
    from quality_lightly import LightlyRun
    from torch.utils.data import DataLoader
    from transformers import set_seed

    from hf_ssl.training.recipes import training_arguments

    set_seed(0)
    run = LightlyRun(recipe, training_arguments(recipe, "."))
    run.loader = DataLoader(
        run.loader.dataset,
        batch_size=run.args.global_batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
    )
    return run


def command(side: str, images: Path, steps: int, num_workers: int) -> list[str]:
    """A whole run: ours by its command line, which exports the encoder too; lightly's loop as a script."""
    if side == "lightly":
        options = ["--whole", str(images), "--steps", str(steps), "--workers", str(num_workers)]
        return [sys.executable, str(SCRIPT), *options]
    keys = {
        "recipe": "simclr_small",
        "dataset": str(images),
        "split": "train",
        "max_steps": steps,
        "eval_strategy": "no",
        "save_strategy": "no",
        "dataloader_num_workers": num_workers,
        "seed": 0,
    }
    options = [word for key, value in keys.items() for word in (f"--{key}", str(value))]
    return [sys.executable, "-m", "hf_ssl.cli.main", "train", "simclr", *options]


def seconds_of(words: list[str], threads: int) -> tuple[float, float]:
    """Processor seconds and seconds on the wall of a process."""
    environment = os.environ | {
        "OMP_NUM_THREADS": str(threads),
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
    }
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(words, env=environment, cwd=folder, capture_output=True, text=True)
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)} failed: {done.stderr[-2000:]}")
    processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return processor, wall


def whole_runs(
    images: Path, steps: int, settings: dict[str, tuple[int, int]], rounds: int, clock: int
) -> dict[str, Timing]:
    """Whole runs in turn. `settings`: name -> (workers, threads); `clock`: 0 processor, 1 wall."""
    seconds: dict[str, list[float]] = {name: [] for name in settings}
    for _ in range(rounds):
        for name, (workers, threads) in settings.items():
            words = command(name.split(",")[0], images, steps, workers)
            seconds[name].append(seconds_of(words, threads)[clock])
    reference = next(iter(seconds.values()))
    return {
        name: Timing(own, [r / o for r, o in zip(reference, own, strict=True)])
        for name, own in seconds.items()
    }


def race(side: str, data: Path, steps: int) -> list[tuple[int, float, float]]:
    """Steps, processor seconds without scoring, and kNN, every `EVERY` steps; for a process of its own."""
    import torch
    from quality_jobs import read_split
    from transformers import TrainerCallback

    from hf_ssl.evaluation.features import FeatureExtractor, collect_features
    from hf_ssl.evaluation.knn import knn_accuracy
    from hf_ssl.modeling import METHODS
    from hf_ssl.training.run import build_trainer

    torch.set_num_threads(1)
    recipe = recipe_of(str(data / "cifar10"), steps)
    curve: list[tuple[int, float, float]] = []
    scoring, start = 0.0, 0.0

    def scorer(encoder: Any, processor: Any) -> Callable[[int], None]:
        bank, query = (read_split(str(data / "cifar10"), split, processor) for split in ("train", "test"))
        extractors = {"": FeatureExtractor(encoder, ["mean"])}

        def score(step: int) -> None:
            nonlocal scoring
            if step % EVERY:
                return
            before = time.process_time()
            train, test = collect_features(extractors, bank), collect_features(extractors, query)
            result = knn_accuracy(train.features["mean"], train.labels, test.features["mean"], test.labels)
            curve.append((step, before - start - scoring, result.top1))
            scoring += time.process_time() - before

        return score

    if side == "lightly":
        run = lightly_run(recipe)
        processor = METHODS["moco"].processor_class.for_image_size(
            32
        )  # ImageNet's moments, as its transforms
        score = scorer(run.encoder, processor)
        start = time.process_time()
        run.train(score)
        return curve
    with tempfile.TemporaryDirectory() as folder:
        trainer = build_trainer(recipe, Path(folder))
        trainer.probe = None
        score = scorer(trainer.model.published_branch().backbone, trainer.processing_class)

        class Score(TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                score(state.global_step)

        trainer.add_callback(Score())
        start = time.process_time()
        trainer.train()
    return curve


def first_at(curve: list[Any], bar: float) -> Any:
    """The first entry that reaches a kNN."""
    return next(entry for entry in curve if entry[2] >= bar)


def main() -> None:
    """Run everything and write the report, or be one side."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--race-steps", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--whole", help=argparse.SUPPRESS)  # a whole run of lightly on these images
    parser.add_argument("--workers", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--race", help=argparse.SUPPRESS)  # one side of the race
    options = parser.parse_args()
    if options.whole:
        losses = lightly_run(recipe_of(options.whole, options.steps), options.workers).train()
        assert len(losses) == options.steps and losses[-1] < losses[0], losses
        return
    if options.race:
        print(json.dumps(race(options.race, options.data, options.race_steps)))
        return
    with tempfile.TemporaryDirectory() as folder:
        images = write_images(options.data, Path(folder))
        one_core = whole_runs(
            images, options.steps, {"lightly": (0, 1), "ours": (0, 1)}, options.rounds, clock=0
        )
        two_cores = whole_runs(
            images,
            options.steps,
            {"lightly, 2 workers": (2, 1), "ours, 1 worker": (1, 1)},
            options.rounds,
            clock=1,
        )
    curves = {}
    for side in ("lightly", "ours"):
        words = [sys.executable, str(SCRIPT), "--race", side, "--race-steps", str(options.race_steps)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [*words, "--data", str(options.data)], env=environment, capture_output=True, text=True
        )
        if done.returncode:
            raise RuntimeError(done.stderr[-2000:])
        curves[side] = json.loads(done.stdout.strip().splitlines()[-1])
    bar = int(100 * min(max(knn for _, _, knn in curve) for curve in curves.values())) / 100
    reached = {side: first_at(curve, bar) for side, curve in curves.items()}
    rows = [
        [side, f"{step}", f"{seconds:.0f}", f"{100 * max(knn for _, _, knn in curves[side]):.1f}"]
        for side, (step, seconds, _) in reached.items()
    ]
    num_images = options.steps * 128
    body = [
        f"SimCLR, recipe `simclr_small`, CIFAR-10, batch 128, bf16 where it is fast. Whole processes of "
        f"{options.steps} steps, start-up included, ours with the export of the encoder at its end.",
        "",
        "One core, processor time:",
        "",
        *timing_rows(one_core, num_images, "images"),
        "",
        "Two cores, time on the wall:",
        "",
        *timing_rows(two_cores, num_images, "images"),
        "",
        f"One core, {options.race_steps} steps, one seed, scored every {EVERY} steps (not counted): "
        f"processor seconds until kNN first reaches {100 * bar:.0f} %, the highest whole per cent that both "
        "reach. The spread of seeds is in [quality.md](quality.md).",
        "",
        *table(["", "steps", "processor s", "best kNN"], rows),
    ]
    both_cores = two_cores["ours, 1 worker"]
    gates = [
        Gate("whole run, one core", "lightly", one_core["ours"].speedup, 1.0, one_core["ours"].spread),
        Gate("whole run, two cores", "lightly", both_cores.speedup, 1.0, both_cores.spread),
        Gate(f"time to kNN {100 * bar:.0f} %", "lightly", reached["lightly"][1] / reached["ours"][1], 1.0),
    ]
    data = {
        "seconds": {name: t.seconds for name, t in (one_core | two_cores).items()},
        "curves": curves,
        "bar": bar,
    }
    Part("speed_end_to_end", "End to end", "speed_end_to_end.py", body, gates, data).write()


if __name__ == "__main__":
    main()
