"""One run from a recipe: data, model, training, probes, and the folder it leaves."""

import contextlib
import json
import logging
import shlex
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed

from hf_ssl.data.sources import DataError, ImageSource, open_images
from hf_ssl.evaluation.protocol import ENCODER, PIXELS, RANDOM, START, Scores
from hf_ssl.hub.cards import RECIPE_FILE, chance_margin
from hf_ssl.hub.folders import write_whole_file
from hf_ssl.hub.publishing import PublishError
from hf_ssl.modeling import METHODS
from hf_ssl.modeling.shared.image_processing import SSLImageProcessor
from hf_ssl.modeling.shared.text_processing import save_tokenizer
from hf_ssl.training.arguments import SSLTrainingArguments
from hf_ssl.training.checkpoints import (
    WRITE_ERRORS,
    CheckpointError,
    checkpoint_folders,
    resume_hint,
    write_failed,
)
from hf_ssl.training.frozen_parts import build_model, with_distiller, with_tokenizer
from hf_ssl.training.interrupt import Interrupted, StopOnInterrupt
from hf_ssl.training.pinning import pin_datasets
from hf_ssl.training.probe_data import probe_sources
from hf_ssl.training.probes import OnlineProbe
from hf_ssl.training.processes import on_first_process
from hf_ssl.training.progress import FLOORS, format_scores
from hf_ssl.training.publishing import complete_folder
from hf_ssl.training.pulling import pulled
from hf_ssl.training.recipes import (
    DataArguments,
    Recipe,
    RecipeError,
    changed_values,
    check_method,
    load_recipe,
    override,
    training_arguments,
)
from hf_ssl.training.run_folder import new_run_folder
from hf_ssl.training.run_lock import run_lock
from hf_ssl.training.starting_points import with_start
from hf_ssl.training.summary import describe_run
from hf_ssl.training.texts import build_text_processor, takes_texts
from hf_ssl.training.trainer import SSLTrainer

logger = logging.getLogger(__name__)

FLOORS_FILE = "floors.json"  # measured once: a resumed run no longer has the encoder of step 0
FINAL_FILES = ("config.json", "model.safetensors", "preprocessor_config.json", "training_args.bin")
# Keys of a recipe that change what a run says, keeps and costs, but no weight of it.
WITHOUT_EFFECT_ON_TRAINING = (
    *("probe_", "eval_", "logging_", "save_", "dataloader_", "hub_", "push_to_hub", "report_to", "run_name"),
    *("metric_for_best_model", "greater_is_better", "max_bad_fraction", "disable_tqdm"),
)


@dataclass
class Run:
    """What a finished run offers.

    Attributes:
        folder: a pre-training checkpoint with recipe, processor, log and the native encoder in `encoder/`.
        scores: last probe beside its floors; None without labels.
        native_class: class of the exported encoder.
        trainer: the trainer, for the model and the log.
        url: of the commit that it was published by; None: it was not.
    """

    folder: Path
    scores: Scores | None
    native_class: str
    trainer: SSLTrainer
    url: str | None = None

    def verdict(self) -> str:
        """Whether the encoder is above all floors by more than chance, in one line."""
        if self.scores is None:
            return "no labels, no verdict"
        pool = next(row.pool for row in self.scores.rows if row.features == ENCODER)
        margins = self.scores.margins(pool)
        points = ", ".join(f"{name} {100 * value:+.1f} points" for name, value in margins.items())
        chance = chance_margin(self.scores.protocol["test_images"])
        learned = max(margins.values()) > chance
        began_as = next(row.features for row in self.scores.rows if row.features not in (ENCODER, PIXELS))
        return (
            f"{'learned' if learned else 'not above its floors'}: {points} against the best of pixels and "
            f"{began_as} ({100 * chance:.1f} can be chance)"
        )


def train(
    method: str | None = None,
    *,
    recipe: str | Recipe | None = None,
    output_dir: str | None = None,
    resume: str | None = None,
    init_from: str | None = None,
    allow_new_heads: bool = False,
    distill_from: str | None = None,
    tokenizer: str | None = None,
    **overrides: Any,
) -> Run:
    """Pre-train an encoder.

    Args:
        method: name of a method; with nothing else its tiny recipe runs on the built-in sample.
        recipe: name or file of a recipe, or a `Recipe`.
        output_dir: folder of the run; by default a new one in `runs/`.
        resume: folder of an interrupted run to continue, or one of its checkpoints; excludes all the above,
            and `init_from`.
        init_from: a pre-training checkpoint or an encoder to start from: a folder, `owner/name` or
            `owner/name@revision` on the Hub, or a model of timm. Where it is of the same method and no recipe
            is given, its model and views replace those of the tiny recipe.
        distill_from: a frozen teacher, named as `init_from`: for `dinov2` a larger one with its heads, for
            `beit_tokenizer` any encoder.
        tokenizer: a trained `beit_tokenizer`, named as `init_from`, for `beit`.
        allow_new_heads: start afresh what a checkpoint of the same method lacks, or has in another shape.
        **overrides: any key of the recipe by its plain name.

    Raises:
        RecipeError: method, recipe or key unknown, or a value that does not fit.
        DataError: images cannot be found or read.
        CheckpointError: a checkpoint cannot be written, or not be continued from, or another run writes into
            the folder.
        TrainingDiverged: the loss is no longer a number.
        Interrupted: stopped by Ctrl-C after a checkpoint was written.
        PublishError: `push_to_hub` was asked for and failed.
    """
    if resume is not None:
        given = {"method": method, "recipe": recipe, "output_dir": output_dir, "init_from": init_from}
        given |= {"distill_from": distill_from, "tokenizer": tokenizer}
        for name, value in given.items():
            if value is not None:
                raise RecipeError(
                    f"a resumed run has its {name} already; leave {name} out, or start a new run"
                )
        return _published(_continue(Path(resume), overrides))
    chosen = _choose_recipe(method, recipe)
    start = init_from or chosen.init_from
    started = pulled(start or "", lambda: with_start(chosen, start, adopt_model=recipe is None))
    teacher = distill_from or chosen.distill_from
    taught = pulled(teacher or "", lambda: with_distiller(started, teacher))
    vocabulary = tokenizer or chosen.tokenizer
    told = pulled(vocabulary or "", lambda: with_tokenizer(taught, vocabulary))
    resolved = override(told, overrides)
    resolved.allow_new_heads = allow_new_heads or resolved.allow_new_heads
    args = training_arguments(resolved, output_dir or ".")
    with contextlib.ExitStack() as stack:
        new_folder = new_run_folder(output_dir, resolved.name)
        folder = on_first_process(args, lambda: stack.enter_context(new_folder))
        trainer = build_trainer(resolved, folder, args)
        _save_recipe(trainer, resolved, folder)
        run = _train_and_save(trainer, folder, checkpoint=None)
    return _published(run)


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


def _published(run: Run) -> Run:
    """Push a finished run if its arguments ask for it; outside of what removes the folder of a failed run."""
    args = run.trainer.args
    if not args.push_to_hub:
        return run
    try:
        commit = run.trainer.publish_folder()
    except PublishError as error:
        raise PublishError(
            f"{error}; the run is whole, push it again with: hf-ssl push {shlex.quote(str(run.folder))} "
            f"{run.trainer.hub_model_id}"
        ) from error
    return run if commit is None else replace(run, url=commit.commit_url)


def _continue(named: Path, overrides: dict[str, Any]) -> Run:
    """Continue a run from its last whole checkpoint, or from the one that is named."""
    folder, wanted = named, True if (named / RECIPE_FILE).is_file() else str(named)
    if wanted is not True and named.name.startswith("checkpoint-"):
        folder = named.parent
    if not (folder / RECIPE_FILE).is_file():
        raise RecipeError(f"'{folder}' is no run: it has no {RECIPE_FILE}")
    earlier = load_recipe(str(folder / RECIPE_FILE))
    recipe = override(earlier, overrides)
    args = training_arguments(recipe, str(folder))
    with contextlib.ExitStack() as stack:
        on_first_process(args, lambda: stack.enter_context(run_lock(folder)))
        trainer = build_trainer(recipe, folder, args)
        checkpoint = None
        if checkpoint_folders(folder):
            checkpoint = trainer.choose_checkpoint(wanted)
        elif trainer.is_world_process_zero():
            logger.warning("%s has no checkpoint; it starts again from step 0", folder)
        _save_recipe(trainer, recipe, folder)
        if trainer.is_world_process_zero():
            _say_changes(earlier, recipe)
            if checkpoint is None or any(key.startswith("probe_") for key in overrides):
                (folder / FLOORS_FILE).unlink(missing_ok=True)  # of another protocol, or encoder
        return _train_and_save(trainer, folder, checkpoint)


def _say_changes(earlier: Recipe, recipe: Recipe) -> None:
    """Name the values by which the rest of a resumed run differs from what it would have been."""
    changes = [
        f"{key} {then} -> {now}"
        for key, then, now in changed_values(earlier, recipe)
        if not key.startswith(WITHOUT_EFFECT_ON_TRAINING)
    ]
    if changes:
        logger.warning("changed by this resume, so that the run goes another way: %s", ", ".join(changes))


def _save_recipe(trainer: SSLTrainer, recipe: Recipe, folder: Path) -> None:
    if trainer.is_world_process_zero():
        folder.mkdir(parents=True, exist_ok=True)
        if trainer.text_processor is not None:  # first: a run that has a recipe has its tokenizer
            save_tokenizer(trainer.text_processor.tokenizer, folder)
        recipe.save(folder / RECIPE_FILE)


def build_trainer(recipe: Recipe, folder: Path, args: SSLTrainingArguments | None = None) -> SSLTrainer:
    """Open the data, build the model and put both into a trainer.

    Args:
        recipe: all values; datasets on the Hub are pinned to the commit they have now.
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
    recipe.data = on_first_process(args, lambda: pin_datasets(recipe.data))
    sources = open_sources(recipe.data, takes_texts(recipe))
    try:
        processor = METHODS[recipe.method].processor_class.for_image_size(
            config.image_size, **recipe.processor
        )
        text_processor = build_text_processor(recipe, processor, sources, folder, args)
        config = recipe.config()  # with the vocabulary
        model = pulled(recipe.init_from or "", lambda: build_model(recipe, config))
        probe = build_probe(recipe.data, processor, args, started_as=START if recipe.init_from else RANDOM)
        trainer = SSLTrainer(
            model=model,
            args=args,
            train_dataset=sources,
            processing_class=processor,
            weights=recipe.data.weights,
            probe=probe,
            text_processor=text_processor,
        )
    except (DataError, RecipeError):
        raise
    except ValueError as error:
        raise RecipeError(" ".join(str(error).split())) from error
    logger.info(describe_run(recipe, trainer))
    return trainer


def open_sources(data: DataArguments, with_texts: bool = False) -> list[ImageSource]:
    """Training images of a recipe, with captions for methods that learn from them."""
    names = data.dataset if isinstance(data.dataset, list) else [data.dataset]
    return [
        open_images(
            name,
            split=data.split,
            config_name=data.config_name,
            image_column=data.image_column,
            text_column=(data.text_column or "") if with_texts else None,
            streaming=data.streaming,
        )
        for name in names
    ]


def build_probe(
    data: DataArguments, processor: SSLImageProcessor, args: SSLTrainingArguments, started_as: str = RANDOM
) -> OnlineProbe | None:
    """The online probe of a recipe; None, and said so, where no labels can be found.

    Args:
        data: where labelled images are.
        processor: of the model.
        args: of the run.
        started_as: what the encoder is before step one, see `OnlineProbe`.
    """
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
        started_as=started_as,
    )


def _check_metric(args: SSLTrainingArguments, has_linear: bool) -> None:
    scores = ["knn", "linear"] if has_linear else ["knn"]
    if args.metric_for_best_model not in (None, *scores, *(f"eval_{score}" for score in scores)):
        raise RecipeError(
            f"metric_for_best_model '{args.metric_for_best_model}' is not scored; use {' or '.join(scores)} "
            "(linear needs probe_linear)"
        )


def _train_and_save(trainer: SSLTrainer, folder: Path, checkpoint: Path | None) -> Run:
    _measure_floors(trainer, folder)
    with StopOnInterrupt() as stopper:
        trainer.add_callback(stopper)
        try:
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        except DataError as error:
            raise DataError("; ".join(filter(None, [str(error), resume_hint(folder)]))) from error
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
            write_whole_file(file, json.dumps(floors.to_dict(), indent=1))
    trainer.floors = on_first_process(trainer.args, probe.named_floors)
    for name in FLOORS:
        own = {key: value for key, value in trainer.floors.items() if key.startswith(name)}
        if not own:
            continue
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
    # Only the first process has a table, and all must agree on another evaluation.
    has_table = on_first_process(trainer.args, lambda: probe.scores is not None)
    if not is_scored:
        trainer.evaluate()
    elif not has_table:  # a finished run was resumed: its log has the scores already
        on_first_process(trainer.args, lambda: probe(trainer.model))
    return probe.scores


def _save(trainer: SSLTrainer, folder: Path, scores: Scores | None) -> str:
    """Fill the run folder: checkpoint, log, card and the native encoder, whose class is returned.

    Raises:
        CheckpointError: the disk is full; what was written is removed.
    """
    try:
        trainer.save_model(str(folder), _internal_call=True)  # a push comes later, with all the rest
        trainer.save_state()
    except WRITE_ERRORS as error:
        for name in FINAL_FILES:
            (folder / name).unlink(missing_ok=True)
        raise CheckpointError(write_failed("the trained model", folder, error)) from error
    if not trainer.is_world_process_zero():
        return ""
    if scores is not None:
        (folder / "scores.json").write_text(json.dumps(scores.to_dict(), indent=1), encoding="utf-8")
    return complete_folder(folder, trainer.state.log_history).native_class
