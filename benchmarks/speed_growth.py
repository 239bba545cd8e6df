"""How cost grows with batch, image size, queue length and rows of the dataset, on one thread.

    python benchmarks/speed_growth.py [--rounds 3]

Every measurement of the dataset is a process of its own; its rows are 8 x 8 pixels, in parquet.
"""

import argparse
import io
import itertools
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from interleaved import Gate, Part, in_fresh_process, interleave, peak_memory
from report_files import table
from speed_steps import SMALL_VIT, TINY_VIT, protocol_step

from hf_ssl.data.loader import TrainLoader
from hf_ssl.data.sources import open_images
from hf_ssl.data.views import ViewMaker
from hf_ssl.evaluation.knn import nearest_neighbors
from hf_ssl.modeling import METHODS

ROWS = (1_000, 10_000, 100_000, 1_000_000)
ROWS_PER_FILE, ROWS_PER_GROUP, BATCH = 100_000, 2_000, 64
DECODER = {"decoder_hidden_size": 128, "decoder_num_hidden_layers": 2, "decoder_num_attention_heads": 4}
BATCHES = (16, 64, 256)
SIZES = (64, 128, 224)
QUEUES = (1024, 8192, 65536)


def write_rows(folder: Path, num_rows: int) -> None:
    """Small PNG files in parquet, 64 different ones in turn."""
    from datasets import Dataset, Features
    from datasets import Image as ImageFeature
    from PIL import Image

    generator = np.random.default_rng(0)
    images = []
    for _ in range(64):
        buffer = io.BytesIO()
        Image.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(buffer, "PNG")
        images.append({"bytes": buffer.getvalue(), "path": None})
    features = Features({"image": ImageFeature()})
    num_files = -(-num_rows // ROWS_PER_FILE)
    first = None
    for number in range(num_files):
        count = min(ROWS_PER_FILE, num_rows - number * ROWS_PER_FILE)
        path = folder / f"train-{number:05d}-of-{num_files:05d}.parquet"
        if first is not None and count == ROWS_PER_FILE:
            path.hardlink_to(first)
            continue
        rows = list(itertools.islice(itertools.cycle(images), count))
        Dataset.from_dict({"image": rows}, features=features).to_parquet(str(path), batch_size=ROWS_PER_GROUP)
        first = path


def loader_of(folder: Path, start_row: int = 0) -> TrainLoader:
    """Of one view of 8 pixels."""
    views = METHODS["mae"].processor_class.for_image_size(8).views
    source = open_images(str(folder), split="train")
    return TrainLoader(source, ViewMaker(views), batch_size=BATCH, seed=0, start_batch=start_row // BATCH)


def measure_rows(folder: Path, num_rows: int) -> dict[str, float]:
    """For a process of its own: opening, rows a second, first batch after a resume, memory."""
    next(iter(loader_of(folder)))  # compiles and imports
    start = time.perf_counter()
    loader = loader_of(folder)
    opening = time.perf_counter() - start
    batches = iter(loader)
    first = num_rows // BATCH // 4
    for _ in range(min(first, 32)):
        next(batches)
    num_batches, start = 150, time.process_time()
    for _ in range(num_batches):
        next(batches)
    per_row = (time.process_time() - start) / num_batches / BATCH
    late = int(0.9 * num_rows)
    start = time.perf_counter()
    next(iter(loader_of(folder, late)))
    resumed = time.perf_counter() - start
    return {"opening": opening, "microseconds": 1e6 * per_row, "resumed": resumed}


def total_memory(folder: Path) -> float:
    """For a process of its own: MiB of opening and of 300 batches."""

    def run() -> None:
        for _ in itertools.islice(loader_of(folder), 300):
            pass

    return peak_memory(run)


def knn_memory(num_vectors: int = 1_000_000, width: int = 384) -> dict[str, float]:
    """For a process of its own: MiB beside the bank, and seconds, of 256 queries."""
    torch.set_num_threads(1)
    bank = torch.nn.functional.normalize(torch.randn(num_vectors, width), dim=1)
    query = bank[:256] + 0.01
    seconds = time.process_time()
    memory = peak_memory(lambda: nearest_neighbors(query, bank, 20))
    return {"memory": memory, "seconds": time.process_time() - seconds}


def step(method: str, batch: int, size: int | None, **config: Any) -> Any:
    """One optimizer step of a model on random images."""
    torch.manual_seed(0)
    model = METHODS[method].pretraining_class(METHODS[method].config_class(**config)).train()
    side = size or model.config.image_size
    shape = (batch, 3, side, side) if method == "mae" else (batch, 2, 3, side, side)
    return protocol_step(model, "adamw", {"pixel_values": torch.randn(shape)})


def per_image(runs: dict[int, Any], images: dict[int, int], rounds: int) -> dict[int, float]:
    """Milliseconds an image."""
    names = {str(key): run for key, run in runs.items()}
    timings = interleave(names, reference=next(iter(names)), rounds=rounds)
    return {key: 1000 * timings[str(key)].median / images[key] for key in runs}


def main() -> None:
    """Measure everything and write the report, or be one of its processes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--process", nargs="+", help=argparse.SUPPRESS)  # what to measure, folder, rows
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.process:
        what, *rest = options.process
        if what == "knn":
            print(json.dumps(knn_memory()))
        elif what == "memory":
            print(json.dumps(total_memory(Path(rest[0]))))
        else:
            print(json.dumps(measure_rows(Path(rest[0]), int(rest[1]))))
        return
    vit = {"backbone_config": SMALL_VIT}
    batches = per_image(
        {batch: step("moco", batch, None, queue_length=4096, **vit) for batch in BATCHES},
        {batch: batch for batch in BATCHES},
        options.rounds,
    )
    sizes = per_image(
        {
            size: step("mae", 8, None, backbone_config={**TINY_VIT, "image_size": size}, **DECODER)
            for size in SIZES
        },
        dict.fromkeys(SIZES, 8),
        options.rounds,
    )
    queues = per_image(
        {length: step("moco", 32, None, queue_length=length, **vit) for length in QUEUES},
        dict.fromkeys(QUEUES, 32),
        options.rounds,
    )
    rows = {}
    for num_rows in ROWS:
        with tempfile.TemporaryDirectory() as folder:
            write_rows(Path(folder), num_rows)
            rows[num_rows] = in_fresh_process("speed_growth.py", "--process", "rows", folder, str(num_rows))
            rows[num_rows]["memory"] = in_fresh_process("speed_growth.py", "--process", "memory", folder)
    knn = in_fresh_process("speed_growth.py", "--process", "knn")
    few, many = rows[10_000], rows[1_000_000]

    def ratio(name: str, what: str, aim: float) -> Gate:
        return Gate(f"{name}, a million rows", "ten thousand rows", many[what] / few[what], aim, at_most=True)

    gates = [
        Gate("time an image, batch 256", "batch 16", batches[256] / batches[16], at_most=True),
        Gate("step, queue of 65,536", "queue of 1,024", queues[65536] / queues[1024], at_most=True),
        ratio("time a row", "microseconds", 1.3),
        ratio("memory", "memory", 1.5),
        Gate("first batch after a resume at row 900,000, seconds", "", many["resumed"], 0.5, at_most=True),
        Gate("kNN among a million, GiB beside the bank", "", knn["memory"] / 1024, 1.25, at_most=True),
    ]
    body = [
        "One thread, float32. MoCo v2 on a small ViT at 32 px (batch, queue), MAE on ViT-Ti/16 (size).",
        "",
    ]
    for name, values in (("batch", batches), ("image size", sizes), ("queue", queues)):
        body += ["", *table([name, "ms an image"], [[f"{k:,}", f"{v:.2f}"] for k, v in values.items()])]
    columns = {"opening": "opening s", "microseconds": "µs a row", "resumed": "opening at nine tenths s"}
    columns |= {"memory": "peak MiB"}
    cells = [[f"{count:,}", *(f"{r[key]:.4g}" for key in columns)] for count, r in rows.items()]
    body += ["", *table(["rows", *columns.values()], cells), ""]
    cost = f"{knn['seconds']:.1f} s, {knn['memory']:.0f} MiB beside the bank"
    body += [f"256 queries among 1,000,000 vectors of 384 numbers: {cost}."]
    data = {"batch": batches, "size": sizes, "queue": queues, "rows": rows, "knn": knn}
    Part("speed_growth", "How cost grows", "speed_growth.py", body, gates, data).write()


if __name__ == "__main__":
    main()
