"""What the reports of the small benchmarks begin with, and how they are written."""

import contextlib
import json
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from quality import ROOT, describe_machine, git_commit

RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = (
    "torch torchvision transformers accelerate timm datasets pillow numpy lightly albumentations kornia "
    "opencv-python-headless numba simplejpeg faiss-cpu scikit-learn"
).split()


def write_report(title: str, script: str, body: list[str], data: dict[str, Any], output: Path) -> str:
    """Write the Markdown file, with date, commit and versions, and everything as JSON beside it.

    Args:
        title: first line.
        script: name of the benchmark's file.
        body: lines of the report.
        data: what the lines were made of.
        output: the Markdown file.

    Returns:
        The Markdown.
    """
    machine, versions = describe_machine(), installed_versions()
    facts = {
        "date": f"{datetime.now(timezone.utc):%Y-%m-%d}",
        "commit": git_commit(),
        "machine": machine,
        "versions": versions,
    }
    head = [
        f"# {title}",
        "",
        f"{facts['date']}, commit {facts['commit']}. Written by `python benchmarks/{script}` on "
        f"{machine['cores']} cores of {machine['cpu']}; "
        + ", ".join(f"{name} {number}" for name, number in versions.items())
        + ".",
        "",
    ]
    text = "\n".join([*head, *body]) + "\n"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(text, encoding="utf-8")
    output.with_suffix(".json").write_text(json.dumps(facts | data, indent=1) + "\n", encoding="utf-8")
    return text


def installed_versions() -> dict[str, str]:
    """Versions of the packages that are there, peers included."""
    versions = {}
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)
    return versions


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    """Lines of a Markdown table."""
    return ["| " + " | ".join(cells) + " |" for cells in [head, ["---"] * len(head), *rows]]
