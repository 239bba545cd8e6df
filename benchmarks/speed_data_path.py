"""Rows per second of the data path beside `datasets` with a DataLoader, as transformers' examples have them.

    python benchmarks/speed_data_path.py [--data ../shared/data] [--rounds 5]

Small rows are CIFAR-10, big ones photographs of 500 x 375 pixels in JPEG; both shuffled, from parquet. Views
are MAE's on both sides: one random crop and a flip.
"""

import contextlib
import itertools
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from datasets import Dataset, Features, disable_progress_bars, load_dataset
from datasets import Image as ImageFeature
from interleaved import Gate, Part, Timing, interleave, option_parser, speedup_gate, timing_rows
from speed_views import MEAN, STD, photographs
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from hf_ssl.data.decoding import decode_image
from hf_ssl.data.loader import TrainLoader
from hf_ssl.data.sources import open_images
from hf_ssl.data.stream import make_plan
from hf_ssl.data.views import ViewMaker
from hf_ssl.modeling import METHODS

BATCH = 64
SHUFFLE_BUFFER = 1000  # of streamed datasets
UNDECODED = (
    "tried: columns looked up once a row group (5.0 to 1.9 µs a row beside reading), labels and texts as "
    "lists (1.9 to 1.35), the order of a block as a list; reading alone takes 2.4 µs"
)
Run = Callable[[], Any]


def write_big(folder: Path, data: Path, num_rows: int = 1200) -> Path:
    """A parquet file of photographs, row groups of 100."""
    images = photographs(data)
    rows = [{"bytes": images[number % len(images)], "path": None} for number in range(num_rows)]
    dataset = Dataset.from_dict({"image": rows}, features=Features({"image": ImageFeature()}))
    dataset.to_parquet(str(folder / "train-00000-of-00001.parquet"), batch_size=100)
    return folder


def parquet_files(folder: Path) -> list[str]:
    """Files of the train split."""
    return [str(path) for path in sorted(folder.glob("train*.parquet"))]


def undecoded(folder: Path, num_rows: int) -> dict[str, Run]:
    """One call goes through shuffled rows without decoding them."""
    source = open_images(str(folder), split="train")

    def ours() -> int:
        plan = make_plan([source], None, seed=0, batch_size=BATCH, rank=0, world_size=1)
        slots = (slot for number in itertools.count() for slot in plan.slots(number))
        rows = (slot.share.sample(slot.position).row["image"] for slot in slots)
        return sum(len(image) for image in itertools.islice(rows, num_rows))

    streamed = load_dataset("parquet", data_files=parquet_files(folder), split="train", streaming=True)
    streamed = streamed.cast_column("image", ImageFeature(decode=False)).shuffle(
        seed=0, buffer_size=SHUFFLE_BUFFER
    )

    def datasets() -> int:
        return sum(len(row["image"]["bytes"]) for row in itertools.islice(streamed, num_rows))

    def floor() -> int:
        total, count = 0, 0
        for path in parquet_files(folder):
            for batch in pq.ParquetFile(path).iter_batches(256, columns=["image"]):
                images = batch.column("image").field("bytes")
                total += sum(len(image.as_buffer()) for image in images)
                count += len(images)
                if count >= num_rows:
                    return total
        return total

    return {"datasets": datasets, "ours": ours, "reading alone": floor}


def transform() -> Any:
    """The training transform of transformers' `run_mae.py`."""
    return v2.Compose(
        [
            v2.RGB(),
            v2.RandomResizedCrop(224, (0.2, 1.0), interpolation=v2.InterpolationMode.BICUBIC),
            v2.RandomHorizontalFlip(),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
        ]
    )


def peers(folder: Path, size: int, num_workers: int) -> dict[str, Callable[[], Iterator[Any]]]:
    """Fresh endless loaders: a map-style dataset with a transform, and a streamed one in torch's format."""
    preprocess = transform()
    preprocess.transforms[1].size = [size, size]

    def apply(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        return {"pixel_values": [preprocess(image) for image in rows["image"]]}

    def collate(rows: list[dict[str, Any]]) -> torch.Tensor:
        return torch.stack([row["pixel_values"] for row in rows])

    files = parquet_files(folder)
    stored = load_dataset("parquet", data_files=files, split="train").select_columns(["image"])
    stored = stored.with_transform(apply)
    streamed = load_dataset("parquet", data_files=files, split="train", streaming=True)
    streamed = streamed.select_columns(["image"]).shuffle(seed=0, buffer_size=SHUFFLE_BUFFER)
    streamed = streamed.map(apply, batched=True, batch_size=BATCH, remove_columns=["image"])

    def endless(dataset: Any, **options: Any) -> Iterator[Any]:
        loader = DataLoader(dataset, BATCH, num_workers=num_workers, collate_fn=collate, **options)
        while True:
            yield from loader

    return {
        "datasets, map-style": lambda: endless(stored, shuffle=True),
        "datasets, streamed": lambda: endless(streamed),
    }


def our_loader(folder: Path, size: int, num_workers: int) -> Iterator[Any]:
    """Ours with MAE's views."""
    views = METHODS["mae"].processor_class.for_image_size(size).views
    source = open_images(str(folder), split="train")
    loader = TrainLoader(source, ViewMaker(views), batch_size=BATCH, seed=0, num_workers=num_workers)
    return iter(loader)


def whole_path(folder: Path, size: int, num_workers: int, num_rows: int) -> dict[str, Run]:
    """One call takes so many rows as batches of views out of a loader that goes on."""
    num_batches = num_rows // BATCH
    sources = {**peers(folder, size, num_workers), "ours": lambda: our_loader(folder, size, num_workers)}
    loaders = {name: make() for name, make in sources.items()}
    return {
        name: lambda loader=loader: [len(batch) for batch in itertools.islice(loader, num_batches)]
        for name, loader in loaders.items()
    }


def first_batch(folder: Path, size: int) -> dict[str, Run]:
    """One call makes a loader with two workers and takes its first batch."""
    sources = {**peers(folder, size, 2), "ours": lambda: our_loader(folder, size, 2)}
    return {name: lambda make=make: next(make()) for name, make in sources.items()}


def decoding_alone(folder: Path, num_rows: int) -> Run:
    """One call reads rows in their order and decodes them: no order, no views."""
    files = parquet_files(folder)

    def run() -> int:
        images = (
            image.as_py()
            for path in files
            for batch in pq.ParquetFile(path).iter_batches(256, columns=["image"])
            for image in batch.column("image").field("bytes")
        )
        return sum(decode_image(image).size for image in itertools.islice(images, num_rows))

    return run


def torch_rows(folder: Path, num_rows: int) -> Run:
    """One call iterates decoded rows in torch's format, without views."""
    dataset = load_dataset("parquet", data_files=parquet_files(folder), split="train", streaming=True)
    dataset = dataset.with_format("torch")
    return lambda: sum(row["image"].numel() for row in itertools.islice(dataset, num_rows))


def main() -> None:
    """Time everything and write the report."""
    options = option_parser(__doc__, rounds=5).parse_args()
    torch.set_num_threads(1)
    disable_progress_bars()
    body = [
        "Small rows: CIFAR-10, JPEG of 32 px; big rows: photographs of 500 x 375, JPEG of quality 95. "
        f"Shuffled, from parquet, batches of {BATCH}. Views are MAE's on both sides. 0 workers: processor "
        "time of one thread; 2 workers: time on the wall, with two cores."
    ]
    gates: list[Gate] = []
    data: dict[str, Any] = {}

    def report(name: str, timings: dict[str, Timing], num_rows: int) -> None:
        body.extend(["", f"## {name}", "", *timing_rows(timings, num_rows, "rows")])
        data[name] = {candidate: timing.seconds for candidate, timing in timings.items()}

    with tempfile.TemporaryDirectory() as temporary, contextlib.redirect_stderr(open(os.devnull, "w")):
        big = write_big(Path(temporary), options.data)
        for kind, folder, size, num_rows in (
            ("small", options.data / "cifar10", 32, 4096),
            ("big", big, 224, 256),
        ):
            clocks = {"reference": "datasets", "rounds": options.rounds}
            timings = interleave(undecoded(folder, num_rows), **clocks)
            report(f"{kind} rows, undecoded", timings, num_rows)
            gates.append(speedup_gate(f"{kind} rows, undecoded", timings, "datasets", 5, note=UNDECODED))
            clocks["reference"] = "datasets, map-style"
            runs = whole_path(folder, size, 0, num_rows // 2)
            runs["decoding alone"] = decoding_alone(folder, num_rows // 2)
            runs["datasets, rows in torch's format"] = torch_rows(folder, num_rows // 2)
            timings = interleave(runs, **clocks)
            report(f"{kind} rows to views, 0 workers", timings, num_rows // 2)
            for peer in ("datasets, map-style", "datasets, streamed"):
                gates.append(speedup_gate(f"{kind} rows to views, 0 workers", timings, peer, 1.0))
            if kind == "small":
                peer = "datasets, rows in torch's format"
                gates.append(speedup_gate("small rows to views against rows alone", timings, peer, 5))
            timings = interleave(whole_path(folder, size, 2, num_rows), **clocks, clock=time.perf_counter)
            report(f"{kind} rows to views, 2 workers", timings, num_rows)
            for peer in ("datasets, map-style", "datasets, streamed"):
                gates.append(speedup_gate(f"{kind} rows to views, 2 workers", timings, peer, 1.0))
            clocks["rounds"] = 3
            timings = interleave(first_batch(folder, size), **clocks, clock=time.perf_counter)
            report(f"{kind} rows, first batch with 2 workers", timings, BATCH)
            gates.append(speedup_gate(f"{kind} rows, first batch", timings, "datasets, streamed", 1.0))
    Part("speed_data_path", "Data path", "speed_data_path.py", body, gates, {"seconds": data}).write()


if __name__ == "__main__":
    main()
