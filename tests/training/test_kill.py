"""SIGKILL at random moments, and the run ends as if it had not been: weights, queue, teacher, log, order.

The run: MoCo with queue and teacher on a weighted mixture of two streamed parquet sources, shuffled, two
loader workers, two or four accumulated micro-batches, drop path, checkpoints inside epochs and log entries.
HF_SSL_KILLS sets the number of kills of the slow tests.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(
    not Path("/proc/self/task").is_dir(), reason="counts threads in Linux's /proc"
)


def run_driver(folder: Path, kills: int, processes: int, max_steps: int, seed: int) -> dict[str, Any]:
    """Let the driver do it; what it reports."""
    numbers = [str(number) for number in (kills, processes, max_steps, seed)]
    done = subprocess.run(
        [sys.executable, "-m", "tests.training.kill_driver", str(folder), *numbers],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    report: dict[str, Any] = json.loads(done.stdout)
    assert len(report["kills"]) == kills and report["threads"] == 1
    return report


def assert_same(value: Any, expected: Any, place: str) -> None:
    """Equal to the last bit, in any nesting."""
    assert type(value) is type(expected), place
    if isinstance(value, torch.Tensor):
        assert value.dtype == expected.dtype and torch.equal(value, expected), place
    elif isinstance(value, dict):
        assert value.keys() == expected.keys(), place
        for key in value:
            assert_same(value[key], expected[key], f"{place}.{key}")
    elif isinstance(value, (list, tuple)):
        assert len(value) == len(expected), place
        for index, (one, other) in enumerate(zip(value, expected, strict=True)):
            assert_same(one, other, f"{place}.{index}")
    else:
        assert (value == expected) if not hasattr(value, "shape") else (value == expected).all(), place


def assert_same_runs(run: Path, whole: Path, max_steps: int) -> None:
    """The last checkpoints, file by file, and the published weights."""
    names = sorted(path.name for path in (whole / f"checkpoint-{max_steps}").iterdir())
    checkpoint, expected = (folder / f"checkpoint-{max_steps}" for folder in (run, whole))
    assert sorted(path.name for path in checkpoint.iterdir()) == names
    for name in names:
        if name.endswith((".pt", ".pth")):
            load = lambda folder: torch.load(folder / name, weights_only=False)  # noqa: B023, E731
            assert_same(load(checkpoint), load(expected), name)
        elif name == "trainer_state.json":
            states = [json.loads((folder / name).read_text()) for folder in (checkpoint, expected)]
            assert len(states[1]["log_history"]) == max_steps // 2
            assert_same(states[0], states[1], name)
        elif name not in ("training_args.bin", "checkpoint.json"):  # they hold the run's own name, and sizes
            assert (checkpoint / name).read_bytes() == (expected / name).read_bytes(), name
    assert {"model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json"} <= set(names)
    weights = load_file(expected / "model.safetensors")
    assert {"queue.keys", "queue.position"} <= weights.keys()
    assert any(name.startswith("teacher.") for name in weights)
    for name in ("model.safetensors", "encoder/model.safetensors"):
        assert (run / name).read_bytes() == (whole / name).read_bytes()


def images_of_steps(run: Path, rank: int) -> dict[int, list[int]]:
    """The images that every step took; a step done again took the same ones."""
    taken: dict[int, list[int]] = {}
    for line in run.with_name(f"{run.name}-order-{rank}").read_text().splitlines():
        step, ids = json.loads(line)
        assert taken.setdefault(step, ids) == ids
    return taken


def check(folder: Path, report: dict[str, Any], processes: int, max_steps: int) -> None:
    whole = folder / "whole"
    order = [images_of_steps(whole, rank) for rank in range(processes)]
    assert all(sorted(steps) == list(range(max_steps)) for steps in order)
    assert {number >> 48 for number in order[0][0]} <= {0, 1}
    for index in range(report["runs"]):
        run = folder / f"killed-{index}"
        assert [images_of_steps(run, rank) for rank in range(processes)] == order
        assert_same_runs(run, whole, max_steps)
        assert not [path.name for path in run.iterdir() if path.name.startswith(("_", "."))]
        assert sorted(path.name for path in run.glob("checkpoint-*")) == sorted(
            path.name for path in whole.glob("checkpoint-*")
        )


def test_a_killed_run_ends_as_if_it_had_not_been(tmp_path: Path):
    report = run_driver(tmp_path, kills=1, processes=1, max_steps=12, seed=0)
    assert report["kills"][0]["step"] >= 8  # an epoch has 6.25 steps
    check(tmp_path, report, processes=1, max_steps=12)


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "kills"), [(1, 20), (2, 20)])
def test_kills_at_random_moments_change_nothing(tmp_path: Path, processes: int, kills: int):
    kills = int(os.environ.get("HF_SSL_KILLS", kills))
    report = run_driver(tmp_path, kills, processes, max_steps=60, seed=processes)
    print(report)
    assert sum(kill["writing"] for kill in report["kills"]) >= kills // 5
    assert len({kill["step"] for kill in report["kills"]}) > kills // 3
    check(tmp_path, report, processes, max_steps=60)
