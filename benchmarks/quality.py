"""Quality beside lightly: one command, one table.

    python benchmarks/quality.py [--data FOLDER] [--jobs 2] [--device cuda]

Every method is trained by us and, but for MoCo v3 and DINOv2, by lightly, with the same images, backbone,
steps, batch, optimizer, schedule and precision, and scored by the same evaluation. Each (implementation,
method, seed) is a process of one thread, or of two on a GPU that all share; its result is kept in the work
folder, so that an interrupted benchmark goes on where it stopped. A result is used again only if recipe, data
folder, code and package versions are unchanged.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from quality_report import write_report

ROOT = Path(__file__).resolve().parent.parent
RECIPES = ROOT / "hf_ssl" / "training" / "recipes"
DATA = ROOT.parent / "shared" / "data"
METHODS = ("simclr", "moco", "mocov3", "mae", "dino", "ibot", "dinov2")
ABLATIONS: dict[str, tuple[str, dict[str, Any]]] = {  # method, and what is set beside its small recipe
    "dinov2_without_patches": ("dinov2", {"patch_loss_weight": 0.0}),
}
COMPARED = ("simclr", "moco", "mae", "dino", "ibot")  # also trained with lightly
PACKAGES = ("torch", "torchvision", "transformers", "timm", "lightly", "datasets", "scikit-learn", "pillow")
EVALUATION = ["hf_ssl/evaluation", "hf_ssl/data", "hf_ssl/modeling", "benchmarks/quality_jobs.py"]
CODE = {  # whose change makes a kept result worthless
    "ours": [*EVALUATION, "hf_ssl/training"],
    "lightly": [
        "hf_ssl/evaluation",
        "hf_ssl/modeling/shared/backbone.py",
        "benchmarks/quality_jobs.py",
        "benchmarks/lightly_views.py",
        "benchmarks/quality_lightly.py",
        "benchmarks/quality_lightly_methods.py",
        "benchmarks/quality_lightly_distillation.py",
    ],
    "pixels": ["hf_ssl/evaluation"],
}
OUR_VIEWS = ["hf_ssl/data", "hf_ssl/training"]  # on a GPU, lightly's side trains on them

Job = dict[str, Any]


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Quality of our methods beside lightly's, in one table.")
    parser.add_argument("--data", default=str(DATA / "cifar10"), help="folder with a train and a test split")
    parser.add_argument("--methods", nargs="+", choices=(*METHODS, *ABLATIONS), default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time, one thread each")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cuda: both take our views")
    parser.add_argument(
        "--bf16", choices=("auto", "yes", "no"), default="auto", help="auto: where it is faster"
    )
    parser.add_argument("--steps-scale", type=float, default=1.0, help="factor on all steps, for smoke tests")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "quality", help="results of single jobs")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "quality.md")
    return parser.parse_args()


def list_jobs(arguments: argparse.Namespace) -> list[Job]:
    """All jobs, both implementations side by side, so that a change in the machine's load meets both."""
    data = str(Path(arguments.data).resolve())
    shared = {
        "data": data,
        "steps_scale": arguments.steps_scale,
        "bf16": choose_bf16(arguments),
        "device": arguments.device,
    }
    untrained = {"data": data, "steps_scale": 1.0, "bf16": False}
    jobs: list[Job] = [{"implementation": "pixels", "method": "", "seed": 0, **untrained}]
    for seed in arguments.seeds:
        for method in arguments.methods:
            base, changes = ABLATIONS.get(method, (method, {}))
            job = {"method": method, "recipe_name": f"{base}_small", "seed": seed, **shared}
            jobs.append({"implementation": "ours", "changes": changes, **job})
            if method in COMPARED:
                jobs.append({"implementation": "lightly", **job})
    return jobs


def choose_bf16(arguments: argparse.Namespace) -> bool:
    """One precision for all jobs, also when continued: which one is faster is measured, and may waver."""
    if arguments.bf16 != "auto":
        return bool(arguments.bf16 == "yes")
    kept = arguments.work / f"bf16_{arguments.device}.json"
    if not kept.is_file():
        code = "from hf_ssl.modeling.shared.precision import has_fast_bf16; print(int(has_fast_bf16()))"
        command = [sys.executable, "-c", code]
        done = subprocess.run(
            command, env=job_environment(arguments.device), stdout=subprocess.PIPE, text=True, check=True
        )
        kept.write_text(json.dumps(done.stdout.strip() == "1"), encoding="utf-8")
    return bool(json.loads(kept.read_text(encoding="utf-8")))


def result_file(job: Job, work: Path) -> Path:
    """Where a job's result is kept; the name changes with everything that the result depends on."""
    digest = hashlib.sha256(json.dumps([job, package_versions()], sort_keys=True).encode())
    if job["method"]:
        digest.update((RECIPES / f"{job['recipe_name']}.yaml").read_bytes())
    code = CODE[job["implementation"]]
    for name in code if job.get("device") != "cuda" else [*code, *OUR_VIEWS]:
        path = ROOT / name
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            digest.update(file.read_bytes())
    stem = "-".join(str(job[key]) for key in ("implementation", "method", "seed") if job[key] != "")
    return work / f"{stem}-{digest.hexdigest()[:12]}.json"


def package_versions() -> dict[str, str]:
    """Versions that results depend on."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return versions


class Runner:
    """Runs jobs in processes; after a failure it starts no new one.

    Args:
        num_jobs: processes at a time.
    """

    def __init__(self, num_jobs: int) -> None:
        self.num_jobs = num_jobs
        self.failures: list[str] = []
        self._lock = threading.Lock()
        self._num_started = 0

    def run(self, jobs: list[tuple[Job, Path]]) -> None:
        """Run all, and say which one is at work.

        Raises:
            SystemExit: a job failed; its last lines are shown.
        """
        with ThreadPoolExecutor(self.num_jobs) as pool:
            list(pool.map(lambda pair: self._run_one(*pair, total=len(jobs)), jobs))
        if self.failures:
            raise SystemExit("\n\n".join(self.failures))

    def _run_one(self, job: Job, result: Path, total: int) -> None:
        with self._lock:
            if self.failures:
                return
            self._num_started += 1
            names = [str(job[key]) for key in ("implementation", "method") if job[key]]
            say(f"[{self._num_started}/{total}] {' '.join(names)}, seed {job['seed']}")
        job_file = result.with_suffix(".job")
        job_file.write_text(json.dumps(job), encoding="utf-8")
        command = [sys.executable, str(ROOT / "benchmarks" / "quality_jobs.py"), str(job_file), str(result)]
        done = subprocess.run(
            command,
            env=job_environment(job.get("device", "cpu")),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        job_file.unlink()
        if done.returncode:
            with self._lock:
                lines = done.stderr[-2000:] or done.stdout[-2000:] or f"ended with code {done.returncode}"
                self.failures.append(f"{' '.join(command)}\n{lines}")


def job_environment(device: str) -> dict[str, str]:
    """One thread, no network, no GPU unless asked for, and the code of this checkout, installed or not."""
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "PYTHONWARNINGS": "ignore",
    }
    return environment | ({"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {})


def describe_machine(device: str = "cpu") -> dict[str, Any]:
    """Processor, number of cores, and the GPU if it is used."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    machine = {"cpu": models[0] if models else "unknown", "cores": os.cpu_count()}
    if device == "cuda":
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        machine["gpu"] = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
    return machine


def git_commit() -> str:
    """Commit of the checkout, marked if it has changes beside results; "unknown" in a copy without git."""
    if shutil.which("git") is None:
        return "unknown"

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True)
        return done.stdout.strip()

    results = ":(exclude)benchmarks/results*"
    is_changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", results)
    return (git("rev-parse", "--short", "HEAD") or "unknown") + ("-dirty" if is_changed else "")


def say(text: str) -> None:
    """A line for whoever waits."""
    sys.stderr.write(f"{datetime.now():%H:%M:%S} {text}\n")


def main() -> None:
    """Run what is missing and write the table."""
    arguments = parse_arguments()
    if not Path(arguments.data).is_dir():
        raise SystemExit(
            f"--data '{arguments.data}' is no folder; it must hold images in a train and a test split"
        )
    arguments.work.mkdir(parents=True, exist_ok=True)
    pairs = [(job, result_file(job, arguments.work)) for job in list_jobs(arguments)]
    missing = [(job, path) for job, path in pairs if not path.is_file()]
    say(f"{len(missing)} of {len(pairs)} jobs to run, {arguments.jobs} at a time")
    Runner(arguments.jobs).run(missing)
    results = [json.loads(path.read_text(encoding="utf-8")) for _, path in pairs]
    for result in results:
        result["job"]["data"] = Path(arguments.data).name  # a path of this machine means nothing elsewhere
    facts = {
        "date": f"{datetime.now(timezone.utc):%Y-%m-%d}",
        "commit": git_commit(),
        "data": Path(arguments.data).name,
        "machine": describe_machine(arguments.device),
        "jobs_at_a_time": arguments.jobs,
        "seeds": arguments.seeds,
        "steps_scale": arguments.steps_scale,
        "versions": package_versions(),
    }
    write_report(arguments.output, facts, results)
    say(f"wrote {arguments.output} and {arguments.output.with_suffix('.json')}")


if __name__ == "__main__":
    main()
