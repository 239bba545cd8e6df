"""Trains a run without interruption, and again with SIGKILL at random moments; called by test_kill.py.

All that takes long to import is imported once. Every life of a run is then a fork of this process, which has
one thread (beside that of pyarrow's allocator, which survives a fork) and holds no lock, no socket and no
file of a run: what a life inherits are modules as `python` would have imported them. Its death is real: the
kernel ends it, its loader's workers and the other ranks by SIGKILL, so that no buffer is flushed and no
handler runs, and whatever it had written stays as it was.
"""

import json
import os
import random
import signal
import socket
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet  # noqa: F401  (a life would import it)
import torch
from transformers import Trainer

import hf_ssl.hub.landing  # noqa: F401
from hf_ssl.hub.cards import RECIPE_FILE
from hf_ssl.training.checkpoints import PARTIAL_FOLDER
from hf_ssl.training.run import train
from tests.training.conftest import random_image

SAVE_STEPS = 3
FIRST_KILL = 8
# Checkpoints fall into log entries and epochs (of 6.25 steps); drop path draws from the global random state.
OPTIONS: dict[str, Any] = {
    "weights": [3, 1],
    "streaming": True,
    "model_type": "hf_ssl_vit",
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
    "drop_path_rate": 0.2,
    "projection_size": 8,
    "queue_length": 64,
    "global_batch_size": 16,
    "per_device_train_batch_size": 4,
    "dataloader_num_workers": 2,
    "logging_steps": 2,
    "save_steps": SAVE_STEPS,
    "warmup_steps": 4,
    "weight_decay_end": 0.1,
    "bf16": False,
    **dict.fromkeys(("split", "probe_dataset", "probe_splits", "probe_config_names", "probe_label_column")),
}


def write_data(sources: list[Path]) -> None:
    """Two sources of parquet files with row groups of ten rows; 100 images in all."""
    child = os.fork()
    if child:  # this process must stay without the threads that writing starts
        assert os.waitpid(child, 0)[1] == 0
        return
    for number, (source, count) in enumerate(zip(sources, (60, 40), strict=True)):
        source.mkdir(parents=True)
        images = [{"bytes": random_image(100 * number + row), "path": None} for row in range(count)]
        features = datasets.Features({"image": datasets.Image()})
        rows = datasets.Dataset.from_dict({"image": images}, features=features)
        rows.to_parquet(source / "train.parquet", batch_size=10)
    os._exit(0)


def record_order(file: Path) -> None:
    """Append the ids of every step's images to a file as they are taken."""
    original = Trainer.get_batch_samples

    def recorded(self: Any, iterator: Any, count: int, device: Any) -> Any:
        batches, items = original(self, iterator, count, device)
        ids = [int(number) for batch in batches for number in batch["sample_id"]]
        with file.open("a") as lines:
            lines.write(json.dumps([self.state.global_step, ids]) + "\n")
        return batches, items

    Trainer.get_batch_samples = recorded  # type: ignore[method-assign]


class Life:
    """One life of a run: a process per rank, all in one process group."""

    def __init__(self, run: Path, sources: list[str], max_steps: int, num_processes: int) -> None:
        self.run = run
        self.order = run.with_name(f"{run.name}-order")
        environment = {}
        if num_processes > 1:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            environment = {
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "WORLD_SIZE": str(num_processes),
            }
        self.ranks: list[int] = []
        for rank in range(num_processes):
            numbers = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if environment else {}
            child = os.fork()
            if child == 0:
                os.setpgid(0, self.ranks[0] if self.ranks else 0)
                os.environ |= environment | numbers
                self._live(sources, max_steps, rank)
            os.setpgid(child, self.ranks[0] if self.ranks else child)
            self.ranks.append(child)

    def _live(self, sources: list[str], max_steps: int, rank: int) -> None:
        """Begin or continue the run, as a user would; never returns."""
        code = 1
        try:
            log = os.open(self.run.with_name("log.txt"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            record_order(Path(f"{self.order}-{rank}"))
            if (self.run / RECIPE_FILE).is_file():
                train(resume=str(self.run))
            else:
                train("moco", output_dir=str(self.run), dataset=sources, max_steps=max_steps, **OPTIONS)
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)

    def is_over(self) -> bool:
        """Whether the run came to its end by itself."""
        done, status = os.waitpid(self.ranks[0], os.WNOHANG)
        if not done:
            return False
        codes = [os.waitstatus_to_exitcode(status)]
        codes += [os.waitstatus_to_exitcode(os.waitpid(rank, 0)[1]) for rank in self.ranks[1:]]
        if any(codes):
            raise RuntimeError(
                f"{self.run.name} failed:\n{self.run.with_name('log.txt').read_text()[-4000:]}"
            )
        return True

    def kill(self) -> None:
        """End all its processes at once, as a lost machine would."""
        os.killpg(self.ranks[0], signal.SIGKILL)
        for rank in self.ranks:
            os.waitpid(rank, 0)

    def steps_taken(self) -> int:
        """Lines in the record of the first rank."""
        file = Path(f"{self.order}-0")
        return file.read_text().count("\n") if file.is_file() else 0

    def step(self) -> int:
        """The step whose images the first rank took last."""
        return int(json.loads(Path(f"{self.order}-0").read_text().splitlines()[-1])[0])


def wait_until(life: Life, condition: Any, seconds: float = 60.0) -> bool:
    """False if the run ended by itself before the condition came true."""
    deadline = time.monotonic() + seconds
    while not condition():
        if life.is_over():
            return False
        if time.monotonic() > deadline:
            life.kill()
            raise RuntimeError(f"{life.run.name} stands still")
        time.sleep(0.001)
    return True


def kill_sometime(life: Life, moment: str, chance: random.Random) -> bool:
    """Kill a life while it starts, trains or writes a checkpoint; False if it ended before."""
    # Leave it some checkpoints, else the run would never get on; the first kill is in the second epoch.
    enough = max(life.steps_taken() + chance.randrange(2 * SAVE_STEPS), FIRST_KILL)
    if moment != "starting" and not wait_until(life, lambda: life.steps_taken() > enough):
        return False
    if moment == "writing" and not wait_until(life, (life.run / PARTIAL_FOLDER).exists):
        return False
    limit = {"starting": 1.0, "training": 0.3, "writing": 0.02}[moment]
    end = time.monotonic() + chance.uniform(0, limit)
    if not wait_until(life, lambda: time.monotonic() >= end):
        return False
    life.kill()
    return True


def num_threads() -> int:
    """Of this process, without the one that jemalloc starts anew in a fork."""
    names = [task.read_text().strip() for task in Path("/proc/self/task").glob("*/comm")]
    return sum(name != "jemalloc_bg_thd" for name in names)


def main(folder: Path, num_kills: int, num_processes: int, max_steps: int, seed: int) -> dict[str, Any]:
    """Runs `whole` and as many of `killed-0`, `killed-1`, ... as the kills need; when and where they fell."""
    paths = [folder / "data" / name for name in ("first", "second")]
    write_data(paths)
    sources = [str(path) for path in paths]
    chance = random.Random(seed)
    whole = Life(folder / "whole", sources, max_steps, num_processes)
    wait_until(whole, lambda: False)
    moments = ["training", "writing", "training", "starting", "writing"]
    kills: list[dict[str, Any]] = []
    runs = 0
    while True:
        run = folder / f"killed-{runs}"
        life = Life(run, sources, max_steps, num_processes)
        if len(kills) < num_kills:
            moment = moments[len(kills) % len(moments)]
            if kill_sometime(life, moment, chance):
                # While it starts, what the life before left may still be there.
                is_torn = moment != "starting" and (run / PARTIAL_FOLDER).exists()
                kills.append({"moment": moment, "step": life.step(), "writing": is_torn})
                continue
        else:
            wait_until(life, lambda: False)
        runs += 1
        if len(kills) == num_kills:
            return {"kills": kills, "runs": runs, "threads": num_threads()}


if __name__ == "__main__":
    arguments = [int(argument) for argument in sys.argv[2:]]
    assert num_threads() == 1, "a fork would lose threads"
    print(json.dumps(main(Path(sys.argv[1]), *arguments)))
