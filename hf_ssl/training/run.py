"""One run from a recipe: data, model, training, probes, and the folder it leaves."""

import contextlib
import json
import logging
import shlex
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed

from hf_ssl.data.sources import DataError, ImageSource, open_images
from hf_ssl.evaluation.protocol import ENCODER, Scores
from hf_ssl.modeling import METHODS
from hf_ssl.modeling.shared.image_processing import SSLImageProcessor
from hf_ssl.training.arguments import SSLTrainingArguments
from hf_ssl.training.checkpoints import WRITE_ERRORS, CheckpointError, checkpoints, write_failed
from hf_ssl.training.interrupt import Interrupted, StopOnInterrupt
from hf_ssl.training.probe_data import probe_sources
from hf_ssl.training.probes import OnlineProbe
from hf_ssl.training.progress import format_scores
from hf_ssl.training.recipes import (
    DataArguments,
    Recipe,
    RecipeError,
    check_method,
    load_recipe,
    override,
    training_arguments,
)
from hf_ssl.training.starting_points import build_model
from hf_ssl.training.summary import describe_run
from hf_ssl.training.trainer import SSLTrainer

logger = logging.getLogger(__name__)

RECIPE_FILE = "recipe.yaml"
FLOORS_FILE = "floors.json"  # measured once: a resumed run no longer has the encoder of step 0
FINAL_FILES = ("config.json", "model.safetensors", "preprocessor_config.json", "training_args.bin")
SIGNIFICANT_MARGIN = 0.03  # about two standard errors at 2,000 test images


@dataclass
class Run:
    """What a finished run offers.

    Attributes:
        folder: a pre-training checkpoint with recipe, processor, log and the native encoder in `encoder/`.
        scores: last probe beside its floors; None without labels.
        native_class: class of the exported encoder.
        trainer: the trainer, for the model and the log.
    """

    folder: Path
    scores: Scores | None
    native_class: str
    trainer: SSLTrainer

    def verdict(self) -> str:
        """Whether the encoder is above all floors by more than chance, in one line."""
        if self.scores is None:
            return "no labels, no verdict"
        pool = next(row.pool for row in self.scores.rows if row.features == ENCODER)
        margins = self.scores.margins(pool)
        points = ", ".join(f"{name} {100 * value:+.1f} points" for name, value in margins.items())
        chance = SIGNIFICANT_MARGIN * (2000 / self.scores.protocol["test_images"]) ** 0.5
        learned = max(margins.values()) > chance
        return (
            f"{'learned' if learned else 'not above its floors'}: {points} against the best of pixels and "
            f"random init ({100 * chance:.1f} can be chance)"
        )


def train(
    method: str | None = None,
    *,
    recipe: str | Recipe | None = None,
    output_dir: str | None = None,
    resume: str | None = None,
    init_from: str | None = None,
    **overrides: Any,
) -> Run:
    """Pre-train an encoder.

    Args:
        method: name of a method; with nothing else its tiny recipe runs on the built-in sample.
        recipe: name or file of a recipe, or a `Recipe`.
        output_dir: folder of the run; by default a new one in `runs/`.
        resume: folder of an interrupted run to continue; excludes all the above, and `init_from`.
        init_from: a pre-training checkpoint or an encoder to start from.
        **overrides: any key of the recipe by its plain name.

    Raises:
        RecipeError: method, recipe or key unknown, or a value that does not fit.
        DataError: images cannot be found or read.
        CheckpointError: a checkpoint cannot be written, or not be continued from.
        TrainingDiverged: the loss is no longer a number.
        Interrupted: stopped by Ctrl-C after a checkpoint was written.
    """
    if resume is not None:
        given = {"method": method, "recipe": recipe, "output_dir": output_dir, "init_from": init_from}
        for name, value in given.items():
            if value is not None:
                raise RecipeError(
                    f"a resumed run has its {name} already; leave {name} out, or start a new run"
                )
        return _continue(Path(resume), overrides)
    resolved = override(_choose_recipe(method, recipe), overrides)
    resolved.init_from = init_from or resolved.init_from
    args = training_arguments(resolved, output_dir or ".")
    folder = Path(_agreed(args, lambda: str(_new_folder(output_dir, resolved.name))))
    with _removed_without_checkpoint(folder):
        trainer = build_trainer(resolved, folder, args)
        return _train_and_save(trainer, resolved, folder, checkpoint=None)


def _choose_recipe(method: str | None, recipe: str | Recipe | None) -> Recipe:
    if method is None and recipe is None:
        raise RecipeError("name a method or a recipe; `hf-ssl methods` lists them")
    if method is not None:
        check_method(method)
    if recipe is None:
        return load_recipe(f"{method}_tiny")
    chosen = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    if method is not None and chosen.method != method:
        raise RecipeError(f"recipe {chosen.name} is for {chosen.method}, not {method}")
    return chosen


def _continue(folder: Path, overrides: dict[str, Any]) -> Run:
    if not (folder / RECIPE_FILE).is_file():
        raise RecipeError(f"'{folder}' is no run: it has no {RECIPE_FILE}")
    recipe = override(load_recipe(str(folder / RECIPE_FILE)), overrides)
    whole = checkpoints(folder)
    if not whole:
        logger.warning("%s has no checkpoint; it starts again from step 0", folder)
    elif any(key.startswith("probe_") for key in overrides):
        (folder / FLOORS_FILE).unlink(missing_ok=True)  # they belong to the earlier protocol
    trainer = build_trainer(recipe, folder)
    return _train_and_save(trainer, recipe, folder, checkpoint=whole[-1] if whole else None)


def _agreed(args: SSLTrainingArguments, choose: Callable[[], str]) -> str:
    """What the first process chooses, in all: another would already see the first one's folder.

    Raises:
        RecipeError: what `choose` raised, in all processes.
    """
    outcome: list[Any] = [None]
    if args.process_index == 0:
        try:
            outcome = [choose()]
        except RecipeError as error:
            outcome = [error]
    if args.world_size > 1:
        torch.distributed.broadcast_object_list(outcome, device=args.device)
    if isinstance(outcome[0], RecipeError):
        raise outcome[0]
    return str(outcome[0])


def _new_folder(output_dir: str | None, name: str) -> Path:
    if output_dir is not None:
        folder = Path(output_dir)
        if folder.exists() and not folder.is_dir():
            raise RecipeError(f"output_dir '{folder}' is a file; choose a new folder")
        if folder.exists() and any(folder.iterdir()):
            raise RecipeError(
                f"output_dir '{folder}' is not empty; choose another, or continue it with --resume {folder}"
            )
        return folder
    count = 1
    folder = Path("runs") / name
    while folder.exists():
        count += 1
        folder = Path("runs") / f"{name}-{count}"
    return folder


@contextlib.contextmanager
def _removed_without_checkpoint(folder: Path) -> Iterator[None]:
    """Leave nothing behind when a new run fails before it has anything worth keeping."""
    existed = folder.exists()
    try:
        yield
    except BaseException:
        if not checkpoints(folder):
            for path in folder.glob("*"):  # the folder was empty before
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            if folder.exists() and not existed:
                folder.rmdir()
        raise


def build_trainer(recipe: Recipe, folder: Path, args: SSLTrainingArguments | None = None) -> SSLTrainer:
    """Open the data, build the model and put both into a trainer.

    Args:
        recipe: all values.
        folder: of the run; nothing is written before training.
        args: the recipe's training arguments, where they have been built already.

    Raises:
        RecipeError: a value that does not fit.
        DataError: images cannot be found or read.
    """
    config = recipe.config()
    args = args or training_arguments(recipe, str(folder))
    args.output_dir = str(folder)
    set_seed(args.seed)
    sources = open_sources(recipe.data)
    try:
        processor = METHODS[recipe.method].processor_class.for_image_size(
            config.image_size, **recipe.processor
        )
        model = build_model(recipe, config)
        probe = build_probe(recipe.data, processor, args)
        trainer = SSLTrainer(
            model=model,
            args=args,
            train_dataset=sources,
            processing_class=processor,
            weights=recipe.data.weights,
            probe=probe,
        )
    except (DataError, RecipeError):
        raise
    except ValueError as error:
        raise RecipeError(" ".join(str(error).split())) from error
    logger.info(describe_run(recipe, trainer))
    return trainer


def open_sources(data: DataArguments) -> list[ImageSource]:
    """Training images of a recipe."""
    names = data.dataset if isinstance(data.dataset, list) else [data.dataset]
    return [
        open_images(
            name,
            split=data.split,
            config_name=data.config_name,
            image_column=data.image_column,
            streaming=data.streaming,
        )
        for name in names
    ]


def build_probe(
    data: DataArguments, processor: SSLImageProcessor, args: SSLTrainingArguments
) -> OnlineProbe | None:
    """The online probe of a recipe; None, and said so, where no labels can be found."""
    pair = probe_sources(data)
    if pair is None:
        logger.info("probe     none: the data have no labels; give --probe_dataset to see whether it learns")
        return None
    _check_metric(args, data.probe_linear)
    return OnlineProbe(
        *pair,
        processor=processor,
        pools=data.probe_pools,
        num_neighbors=data.probe_num_neighbors,
        linear=data.probe_linear,
        limit=data.probe_limit,
        dtype=torch.bfloat16 if args.bf16 else None,
    )


def _check_metric(args: SSLTrainingArguments, has_linear: bool) -> None:
    scores = ["knn", "linear"] if has_linear else ["knn"]
    if args.metric_for_best_model not in (None, *scores, *(f"eval_{score}" for score in scores)):
        raise RecipeError(
            f"metric_for_best_model '{args.metric_for_best_model}' is not scored; use {' or '.join(scores)} "
            "(linear needs probe_linear)"
        )


def _train_and_save(trainer: SSLTrainer, recipe: Recipe, folder: Path, checkpoint: Path | None) -> Run:
    folder.mkdir(parents=True, exist_ok=True)
    if trainer.is_world_process_zero():
        recipe.save(folder / RECIPE_FILE)
    _measure_floors(trainer, folder)
    with StopOnInterrupt() as stopper:
        trainer.add_callback(stopper)
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    _report_bad_images(trainer)
    if stopper.interrupted and trainer.state.global_step < trainer.args.max_steps:
        raise Interrupted(
            f"stopped at step {trainer.state.global_step} of {trainer.args.max_steps} with a checkpoint; "
            f"continue with: hf-ssl train --resume {shlex.quote(str(folder))}"
        )
    scores = _final_scores(trainer)
    return Run(folder, scores, _save(trainer, folder, scores), trainer)


def _measure_floors(trainer: SSLTrainer, folder: Path) -> None:
    """Pixels and the encoder of step 0, which a resumed run reads from its folder."""
    probe = trainer.probe
    if not isinstance(probe, OnlineProbe):
        return
    file = folder / FLOORS_FILE
    if trainer.is_world_process_zero():
        if file.is_file():
            probe.restore_floors(trainer.model, json.loads(file.read_text(encoding="utf-8")))
        else:
            floors = probe.measure_floors(trainer.model)
            file.write_text(json.dumps(floors.to_dict(), indent=1), encoding="utf-8")
    trainer.floors = trainer.on_first_process(probe.named_floors)
    for name in ("pixels", "random_init"):
        own = {key: value for key, value in trainer.floors.items() if key.startswith(name)}
        logger.info("floor     " + format_scores({key.replace("_", " "): v for key, v in own.items()}))


def _report_bad_images(trainer: SSLTrainer) -> None:
    bad = trainer.loader.bad_images
    if bad.count:
        logger.warning("%d images could not be read and were skipped, e.g. %s", bad.count, bad.names[0])


def _final_scores(trainer: SSLTrainer) -> Scores | None:
    if not isinstance(trainer.probe, OnlineProbe):
        return None
    probe = trainer.probe
    entries = (entry for entry in reversed(trainer.state.log_history) if "eval_knn" in entry)
    is_scored = next(entries, {}).get("step") == trainer.state.global_step
    # Only the first process has scores, and all must agree on another evaluation.
    has_table = trainer.on_first_process(lambda: {"scores": float(probe.scores is not None)})["scores"]
    if not (is_scored and has_table):
        trainer.evaluate()
    return probe.scores


def _save(trainer: SSLTrainer, folder: Path, scores: Scores | None) -> str:
    """Fill the run folder: checkpoint, log and the native encoder, whose class is returned.

    Raises:
        CheckpointError: the disk is full; what was written is removed.
    """
    from hf_ssl.hub import export_encoder

    try:
        trainer.save_model(str(folder))
        trainer.save_state()
    except WRITE_ERRORS as error:
        for name in FINAL_FILES:
            (folder / name).unlink(missing_ok=True)
        raise CheckpointError(write_failed("the trained model", folder, error)) from error
    if not trainer.is_world_process_zero():
        return ""
    if scores is not None:
        (folder / "scores.json").write_text(json.dumps(scores.to_dict(), indent=1), encoding="utf-8")
    return export_encoder(folder, folder / "encoder", overwrite=True).native_class
