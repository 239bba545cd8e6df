"""The same kill for three ways to pre-train: what does the run lose that is resumed as its docs say?

    python benchmarks/kill.py        (half a minute of CPU time, most of the rest is waiting for starts)

Each trains three times: without interruption, once more so (a run that does not repeat itself cannot be
resumed exactly), and with SIGKILL in its third epoch, then resumed. Every life is a fork of this process,
which has imported everything and has one thread; the kill takes the loader's workers too. Data, batch and
number of steps are the same; models are tiny, as only bookkeeping is compared.

- ours: `train` of MoCo, `train(resume=...)`; a checkpoint every 10 steps.
- transformers: its Trainer and `ViTMAEForPreTraining`, transforms and collation as in its example run_mae.py,
  on a shuffled `datasets` stream; a checkpoint every 10 steps, `train(resume_from_checkpoint=True)`.
- lightly: MoCo as in its Lightning example, with `NTXentLoss(memory_bank_size=...)`; Lightning's own
  checkpoint at the end of every epoch, as the example sets none; `fit(ckpt_path=...)` as its docs say.
"""

import argparse
import copy
import datetime
import io
import json
import os
import signal
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
import pytorch_lightning as lightning
import torch
from lightly.loss import NTXentLoss
from lightly.models.modules.heads import MoCoProjectionHead
from lightly.models.utils import deactivate_requires_grad, update_momentum
from lightly.transforms import MoCoV2Transform
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2
from transformers import Trainer, TrainingArguments, ViTMAEConfig, ViTMAEForPreTraining

import hf_ssl.hub.landing  # noqa: F401  (imported here, so that no life has to)
from hf_ssl.data.sample import load_sample
from hf_ssl.training.run import train
from hf_ssl.training.trainer import SSLTrainer

BATCH, STEPS_PER_EPOCH, EPOCHS = 16, 12, 3
NUM_IMAGES, NUM_STEPS = BATCH * STEPS_PER_EPOCH, STEPS_PER_EPOCH * EPOCHS
SAVE_STEPS = 10
KILL_STEP = 33  # in the third epoch, after the checkpoint of step 30
QUEUE, WIDTH, SIDE = 96, 32, 32
WORKERS = 2
RESULTS = Path(__file__).parent / "results"


class Record:
    """What a life leaves for the comparison, one line or file for every step."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def step(self, step: int, ids: list[int], queue: Tensor | None = None) -> None:
        """The images of a step, and the queue before it."""
        if queue is not None:
            torch.save(queue.clone(), self.folder / f"queue-{step}.pt")
        with (self.folder / "order").open("a") as lines:
            lines.write(json.dumps([step, ids]) + "\n")

    def end(self, state: dict[str, Tensor]) -> None:
        """The final weights."""
        torch.save({name: value for name, value in state.items()}, self.folder / "final.pt")

    def steps(self) -> list[tuple[int, list[int]]]:
        """All steps in the order they were done, those done twice twice."""
        file = self.folder / "order"
        return [tuple(json.loads(line)) for line in file.read_text().splitlines()] if file.exists() else []


# Ours


def run_ours(folder: Path, data: Path, resume: bool) -> None:
    record = Record(folder)
    take, start = SSLTrainer.get_batch_samples, SSLTrainer.start_step
    ids: list[int] = []

    def get_batch_samples(self: Any, iterator: Any, count: int, device: Any) -> Any:
        def recorded() -> Any:
            for batch in iterator:
                ids.extend(batch["sample_id"].tolist())
                yield batch

        ids.clear()
        return take(self, recorded(), count, device)

    def start_step(self: Any, step: int) -> None:
        record.step(step, ids, self.model.queue.keys)
        start(self, step)

    SSLTrainer.get_batch_samples, SSLTrainer.start_step = get_batch_samples, start_step  # type: ignore
    if resume:
        run = train(resume=str(folder / "run"))
    else:
        none = ("split", "probe_dataset", "probe_splits", "probe_config_names", "probe_label_column")
        run = train(
            "moco",
            output_dir=str(folder / "run"),
            dataset=str(data),
            max_steps=NUM_STEPS,
            save_steps=SAVE_STEPS,
            global_batch_size=BATCH,
            per_device_train_batch_size=BATCH,
            queue_length=QUEUE,
            projection_size=WIDTH,
            model_args={"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16]},
            dataloader_num_workers=WORKERS,
            bf16=False,
            **dict.fromkeys(none),
        )
    record.end(run.trainer.model.state_dict())


# transformers


def run_transformers(folder: Path, data: Path, resume: bool) -> None:
    record = Record(folder)
    transform = v2.Compose(
        [
            v2.RandomResizedCrop(SIDE, scale=(0.2, 1.0), interpolation=v2.InterpolationMode.BICUBIC),
            v2.RandomHorizontalFlip(),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize([0.5] * 3, [0.5] * 3),
        ]
    )
    stream = datasets.load_dataset("parquet", data_files=f"{data}/*.parquet", split="train", streaming=True)
    stream = stream.shuffle(seed=0, buffer_size=64).map(
        lambda row: {"pixel_values": transform(row["image"].convert("RGB")), "number": row["number"]},
        remove_columns=["image"],
    )
    config = ViTMAEConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        decoder_hidden_size=32,
        decoder_num_hidden_layers=1,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=64,
        image_size=SIDE,
        patch_size=8,
    )
    torch.manual_seed(0)
    args = TrainingArguments(
        output_dir=str(folder / "run"),
        max_steps=NUM_STEPS,
        per_device_train_batch_size=BATCH,
        save_steps=SAVE_STEPS,
        learning_rate=1e-3,
        remove_unused_columns=False,
        dataloader_num_workers=WORKERS,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        seed=0,
    )
    trainer = Trainer(
        model=ViTMAEForPreTraining(config), args=args, train_dataset=stream, data_collator=_collate
    )
    take = trainer.get_batch_samples

    def get_batch_samples(iterator: Any, count: int, device: Any) -> Any:
        batches, items = take(iterator, count, device)
        if batches:
            record.step(
                trainer.state.global_step, [n for batch in batches for n in batch.pop("number").tolist()]
            )
        return batches, items

    trainer.get_batch_samples = get_batch_samples
    trainer.train(resume_from_checkpoint=True if resume else None)
    record.end(trainer.model.state_dict())


def _collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    pixels = torch.stack([torch.as_tensor(row["pixel_values"]) for row in rows])
    return {"pixel_values": pixels, "number": torch.tensor([row["number"] for row in rows])}


# lightly


class LightlyMoCo(lightning.LightningModule):
    """MoCo from lightly's parts, in the order of its example."""

    def __init__(self, record: Record) -> None:
        super().__init__()
        self.record = record
        self.backbone = nn.Sequential(
            nn.Conv2d(3, 16, 3, 2), nn.ReLU(), nn.Conv2d(16, 32, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1)
        )
        self.projection_head = MoCoProjectionHead(32, 32, WIDTH)
        self.backbone_momentum = copy.deepcopy(self.backbone)
        self.projection_head_momentum = copy.deepcopy(self.projection_head)
        deactivate_requires_grad(self.backbone_momentum)
        deactivate_requires_grad(self.projection_head_momentum)
        self.criterion = NTXentLoss(memory_bank_size=(QUEUE, WIDTH))

    def training_step(self, batch: Any, batch_index: int) -> Tensor:
        (queries, keys), numbers = batch
        self.record.step(self.global_step, numbers.tolist(), self.criterion.memory_bank.bank.T)
        update_momentum(self.backbone, self.backbone_momentum, m=0.99)
        update_momentum(self.projection_head, self.projection_head_momentum, m=0.99)
        query = self.projection_head(self.backbone(queries).flatten(start_dim=1))
        with torch.no_grad():
            key = self.projection_head_momentum(self.backbone_momentum(keys).flatten(start_dim=1))
        loss: Tensor = self.criterion(query, key)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.06)


class NumberedImages(Dataset[Any]):
    """Views of an image, and its number."""

    def __init__(self, data: Path) -> None:
        files = sorted(str(path) for path in data.glob("*.parquet"))
        rows = datasets.Dataset.from_parquet(files, keep_in_memory=True, cache_dir=str(data / "cache"))
        self.images = [row["image"].convert("RGB") for row in rows]
        self.transform = MoCoV2Transform(input_size=SIDE)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Any:
        return self.transform(self.images[index]), index


def run_lightly(folder: Path, data: Path, resume: bool) -> None:
    lightning.seed_everything(0, workers=True)
    record = Record(folder)
    loader = DataLoader(
        NumberedImages(data), batch_size=BATCH, shuffle=True, drop_last=True, num_workers=WORKERS
    )
    model = LightlyMoCo(record)
    trainer = lightning.Trainer(
        max_epochs=EPOCHS,
        accelerator="cpu",
        devices=1,
        default_root_dir=str(folder),
        enable_progress_bar=False,
        logger=False,
    )
    # With logger=False the default checkpoints lie in `checkpoints`.
    checkpoints = sorted((folder / "checkpoints").glob("*.ckpt"), key=lambda path: path.stat().st_mtime)
    trainer.fit(model, loader, ckpt_path=str(checkpoints[-1]) if resume else None)
    record.end(model.state_dict())


# Lives and deaths


Run = Callable[[Path, Path, bool], None]


def start(run: Run, folder: Path, data: Path, resume: bool) -> int:
    """One life, in a process group of its own; its id."""
    folder.mkdir(parents=True, exist_ok=True)
    child = os.fork()
    if child:
        os.setpgid(child, child)
        return child
    code = 1
    try:
        os.setpgid(0, 0)
        log = os.open(folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        torch.set_num_threads(1)
        run(folder, data, resume)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def finish(child: int, folder: Path) -> None:
    """Wait for the end of a life."""
    if os.waitpid(child, 0)[1]:
        raise SystemExit(f"{folder.name} failed:\n{(folder / 'log.txt').read_text()[-3000:]}")


def kill_at(child: int, folder: Path, step: int) -> None:
    """SIGKILL to a life and its workers as soon as it has taken the images of a step."""
    record = Record(folder)
    while not any(done >= step for done, _ in record.steps()):
        if os.waitpid(child, os.WNOHANG)[0]:
            raise SystemExit(f"{folder.name} ended by itself:\n{(folder / 'log.txt').read_text()[-3000:]}")
        time.sleep(0.005)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)


def measure(name: str, run: Run, work: Path, data: Path) -> dict[str, Any]:
    """Train three times and compare."""
    whole, twin, killed = (work / f"{name}-{kind}" for kind in ("whole", "twin", "killed"))
    for folder in (whole, twin):
        finish(start(run, folder, data, False), folder)
    kill_at(start(run, killed, data, False), killed, KILL_STEP)
    before = len(Record(killed).steps())
    finish(start(run, killed, data, True), killed)
    return {"name": name, **compare(whole, twin, killed, before)}


def compare(whole: Path, twin: Path, killed: Path, before: int) -> dict[str, Any]:
    """What the kill cost; of a step done twice the second time counts."""
    steps = Record(killed).steps()
    resumed_at = steps[before][0]
    done, expected = dict(steps), dict(Record(whole).steps())
    seen, seen_by_whole = images_of_killed_epoch(done), images_of_killed_epoch(expected)
    return {
        "resumed_at_step": resumed_at,
        "steps_done_again": steps[before - 1][0] + 1 - resumed_at,
        "steps_missing": sum(step not in done for step in range(NUM_STEPS)),
        "never_seen": NUM_IMAGES - len(seen),
        "never_seen_without_interruption": NUM_IMAGES - len(seen_by_whole),
        "seen_twice": sum(count > 1 for count in seen.values()),
        "steps_with_other_images": sum(done.get(step) != expected[step] for step in range(NUM_STEPS)),
        "queue_kept": queue_kept(killed, whole, resumed_at),
        "weight_difference": weight_difference(killed, whole),
        "twin_weight_difference": weight_difference(twin, whole),
    }


def images_of_killed_epoch(steps: dict[int, list[int]]) -> Counter[int]:
    """How often each image was taken in the epoch of the kill."""
    first = KILL_STEP // STEPS_PER_EPOCH * STEPS_PER_EPOCH
    return Counter(number for step in range(first, first + STEPS_PER_EPOCH) for number in steps.get(step, []))


def queue_kept(killed: Path, whole: Path, step: int) -> int | None:
    """Keys that the resumed run began with, of those that were in the queue; None without a queue."""
    if not (whole / f"queue-{step}.pt").exists():
        return None
    queue, expected = (torch.load(folder / f"queue-{step}.pt") for folder in (killed, whole))
    return int((queue[:, None] == expected[None]).all(dim=2).any(dim=0).sum())


def weight_difference(folder: Path, other: Path) -> float:
    """The largest, over all tensors of the model."""
    state, expected = (torch.load(each / "final.pt") for each in (folder, other))
    assert state.keys() == expected.keys()
    return max(float((value.double() - expected[name].double()).abs().max()) for name, value in state.items())


# The table

HEAD = (
    "",
    "resumed at step (killed in step 34)",
    "steps begun again",
    "of 192 images in this epoch: never seen",
    "seen twice",
    "keys kept of the queue's 96",
    "largest weight difference to the uninterrupted run",
    "the same run twice differs by",
)
NAMES = {"ours": "hf_ssl (MoCo)", "transformers": "transformers Trainer (MAE)", "lightly": "lightly (MoCo)"}


def table(rows: list[dict[str, Any]]) -> str:
    """One row for each way to train."""
    lines = [f"| {' | '.join(HEAD)} |", f"|{'---|' * len(HEAD)}"]
    for row in rows:
        values = [NAMES[row["name"]], row["resumed_at_step"], row["steps_done_again"], row["never_seen"]]
        values += [row["seen_twice"], "-" if row["queue_kept"] is None else row["queue_kept"]]
        values += [f"{row[key]:.2g}" for key in ("weight_difference", "twin_weight_difference")]
        lines.append(f"| {' | '.join(str(value) for value in values)} |")
    return "\n".join(lines)


def write_images(data: Path) -> None:
    """The first emoji of the sample in eight files; in a child, which may have threads."""
    child = os.fork()
    if child:
        assert os.waitpid(child, 0)[1] == 0
        return
    data.mkdir(parents=True)
    for shard in range(8):
        count = NUM_IMAGES // 8
        rows = load_sample("train").select(range(shard * count, (shard + 1) * count))
        files = [_png(row["image"]) for row in rows]
        table = {
            "image": [{"bytes": file, "path": None} for file in files],
            "number": list(range(shard * count, (shard + 1) * count)),
        }
        features = datasets.Features({"image": datasets.Image(), "number": datasets.Value("int64")})
        datasets.Dataset.from_dict(table, features=features).to_parquet(data / f"train-{shard}.parquet")
    os._exit(0)


def _png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.convert("RGB").resize((SIDE, SIDE)).save(file, "PNG")
    return file.getvalue()


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--only", nargs="*", default=list(NAMES), choices=list(NAMES), help="leave out the others"
    )
    parser.add_argument("--output", type=Path, default=RESULTS / "kill.md")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    runs: dict[str, Run] = {"ours": run_ours, "transformers": run_transformers, "lightly": run_lightly}
    with tempfile.TemporaryDirectory() as work:
        write_images(Path(work) / "data")
        rows = [measure(name, runs[name], Path(work), Path(work) / "data") for name in options.only]
    packages = ("torch", "transformers", "datasets", "lightly", "pytorch-lightning")
    facts = {
        "date": datetime.date.today().isoformat(),
        "versions": {name: version(name) for name in packages},
    }
    head = (
        f"# The same kill, three ways to train\n\n{facts['date']}. Written by `python benchmarks/kill.py`; "
        f"{', '.join(f'{name} {number}' for name, number in facts['versions'].items())}.\n\n"  # type: ignore[union-attr]
    )
    print(table(rows))
    options.output.write_text(f"{head}{table(rows)}\n", encoding="utf-8")
    options.output.with_suffix(".json").write_text(
        json.dumps(facts | {"rows": rows}, indent=1) + "\n", "utf-8"
    )


if __name__ == "__main__":
    main()
