"""Curves of a run, from the log that transformers keeps in `trainer_state.json`."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from hf_ssl.pictures.canvas import COLORS, FAINT, INK

_SCORES = {"knn": "kNN", "linear": "linear probe"}
_Series = dict[str, tuple[list[float], list[float]]]  # steps and values by name
_FLOORS = ("eval_pixels", "eval_random")
_PANEL_INCHES, _LEGEND_INCHES = (4.0, 3.1), 2.2
_DASHES = ((5, 3), (1.5, 2), (7, 2, 1.5, 2), (10, 4))


def draw_history(log_history: Sequence[Mapping[str, Any]]) -> Image.Image | None:
    """Draws the log of a trainer: its scores over steps, the floors logged beside them as lines.

    Args:
        log_history: as in `trainer_state.json`.

    Returns:
        The picture; None where nothing that could be drawn was logged.
    """
    last: Mapping[str, Any] = next((entry for entry in reversed(log_history) if "eval_knn" in entry), {})
    floors = {
        name.removeprefix("eval_").replace("_", " "): value
        for name, value in last.items()
        if name.startswith(_FLOORS)
    }
    scores = [
        {key: value for key, value in entry.items() if not key.startswith(_FLOORS)} for entry in log_history
    ]
    return draw_curves(scores, baselines=floors) if _panels(_series(scores))[0] else None


def draw_curves(
    log_history: Sequence[Mapping[str, Any]],
    *,
    baselines: Mapping[str, float] | None = None,
    title: str = "Training",
) -> Image.Image:
    """Draws loss, learning rate and scores over optimizer steps; what was not logged has no panel.

    Args:
        log_history: entries with `step`, and `loss`, `learning_rate` or scores whose names contain "knn" or
            "linear" and whose values are shares (0 to 1).
        baselines: name and share of what the scores have to beat, such as raw pixels; horizontal lines.
        title: above the panels.

    Returns:
        The picture.

    Raises:
        ValueError: nothing that could be drawn was logged.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    series = _series(log_history)
    panels, scores = _panels(series)
    if not panels:
        raise ValueError("the log has no loss, learning_rate or score; nothing to draw")
    figure = Figure(
        figsize=(_PANEL_INCHES[0] * len(panels), _PANEL_INCHES[1]),
        dpi=110,
    )
    figure.set_layout_engine("constrained", w_pad=0.15, h_pad=0.12, wspace=0.04)
    figure.suptitle(title, x=0.012, ha="left", fontsize=14, fontweight="bold", color=INK)
    for axes, name in zip(
        figure.subplots(1, len(panels), squeeze=False, sharex=True)[0], panels, strict=True
    ):
        _style(axes)
        if name == "scores":
            _draw_scores(axes, scores, baselines or {})
        elif name == "loss":
            _draw_loss(axes, *series["loss"])
        else:
            axes.set_title("learning rate", loc="left", fontsize=11, color=INK)
            axes.plot(*series[name], color=COLORS[0], linewidth=1.8)
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:.3g}")
            axes.set_ylim(bottom=0)
    buffer = io.BytesIO()
    FigureCanvasAgg(figure)
    figure.savefig(buffer, format="png")
    return Image.open(buffer).convert("RGB")


def _panels(series: _Series) -> tuple[list[str], _Series]:
    """Names of the panels, and the series of the one of scores."""
    scores = {name: s for name, s in series.items() if any(word in name for word in _SCORES)}
    return [name for name in ("loss", "learning_rate") if name in series] + ["scores"] * bool(scores), scores


def _series(log_history: Sequence[Mapping[str, Any]]) -> _Series:
    """Steps and values of every logged number; of a step logged twice (resumed), the later one counts."""
    values: dict[str, dict[float, float]] = {}
    for entry in log_history:
        for name, value in entry.items():
            if "step" in entry and isinstance(value, (int, float)):
                values.setdefault(name, {})[entry["step"]] = value
    return {
        name: (sorted(points), [points[step] for step in sorted(points)]) for name, points in values.items()
    }


def _style(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#c8ccd0")
    axes.tick_params(colors=FAINT, labelsize=9, length=3)
    axes.grid(axis="y", color="#e6e8eb", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_xlabel("step", fontsize=9, color=FAINT)


def _draw_loss(axes: Any, steps: list[float], losses: list[float]) -> None:
    axes.set_title("loss", loc="left", fontsize=11, color=INK)
    if len(losses) < 40:
        axes.plot(steps, losses, color=COLORS[0], linewidth=1.8)
        return
    axes.plot(steps, losses, color=COLORS[0], linewidth=0.8, alpha=0.3)
    window = len(losses) // 20 * 2 + 1
    padded = np.pad(np.array(losses), window // 2, mode="edge")
    smooth = np.convolve(padded, np.ones(window) / window, mode="valid")
    axes.plot(steps, smooth, color=COLORS[0], linewidth=1.8)


def _draw_scores(
    axes: Any, scores: Mapping[str, tuple[list[float], list[float]]], baselines: Mapping[str, float]
) -> None:
    axes.set_title("accuracy, %", loc="left", fontsize=11, color=INK)
    colors = {name: COLORS[number % len(COLORS)] for number, name in enumerate(scores)}
    for name, (steps, values) in scores.items():
        label, percents = f"{_label(name)}  {100 * values[-1]:.1f}", [100 * value for value in values]
        axes.plot(steps, percents, color=colors[name], linewidth=1.8, marker="o", markersize=4, label=label)
    for number, (name, value) in enumerate(baselines.items()):
        # A baseline has the colour of the first score of its kind, and a dash pattern of its own.
        kinds = [word for word in _SCORES if word in name.lower()]
        color = next((colors[score] for score in scores if any(word in score for word in kinds)), FAINT)
        dashes = (0, _DASHES[number % len(_DASHES)])
        axes.axhline(
            100 * value, color=color, linewidth=1.3, linestyle=dashes, label=f"{name}  {100 * value:.1f}"
        )
    axes.legend(loc="upper left", bbox_to_anchor=(1.02, 1.0), frameon=False, fontsize=9, labelcolor=INK)


def _label(name: str) -> str:
    label = name.removeprefix("eval_").replace("_", " ")
    return " ".join(_SCORES.get(word, word) for word in label.split())
