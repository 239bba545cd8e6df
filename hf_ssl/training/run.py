"""One run from a recipe: data, model, training, probes, and the folder it leaves."""

import contextlib
import json
import logging
import shlex
import shutil
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments, set_seed

from hf_ssl.data.sources import DataError, ImageSource, open_images
from hf_ssl.evaluation.protocol import ENCODER, Scores
from hf_ssl.modeling import METHODS
from hf_ssl.modeling.shared.image_processing import SSLImageProcessor
from hf_ssl.modeling.shared.pretraining import SSLForPreTraining
from hf_ssl.training.arguments import SSLTrainingArguments
from hf_ssl.training.probes import OnlineProbe
from hf_ssl.training.recipes import (
    DataArguments,
    Recipe,
    RecipeError,
    check_method,
    load_recipe,
    override,
    training_arguments,
)
from hf_ssl.training.trainer import SSLTrainer

logger = logging.getLogger(__name__)

RECIPE_FILE = "recipe.yaml"
SIGNIFICANT_MARGIN = 0.03  # about two standard errors at 2,000 test images
HELD_OUT_EVERY = 5  # without a test split, every fifth labelled image is scored against the others


class Interrupted(RuntimeError):
    """The user stopped the run; a checkpoint was written."""


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
        """Whether the encoder is above all floors, in one line."""
        if self.scores is None:
            return "no labels, no verdict"
        pool = next(row.pool for row in self.scores.rows if row.features == ENCODER)
        margins = self.scores.margins(pool)
        points = ", ".join(f"{name} {100 * value:+.1f} points" for name, value in margins.items())
        learned = max(margins.values()) > SIGNIFICANT_MARGIN
        return f"{'learned' if learned else 'not above its floors'}: {points} against the best of pixels and random init"


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
        resume: folder of an interrupted run to continue; excludes everything else.
        init_from: a pre-training checkpoint or an encoder to start from.
        **overrides: any key of the recipe by its plain name.

    Raises:
        RecipeError: method, recipe or key unknown, or a value that does not fit.
        DataError: images cannot be found or read.
        Interrupted: stopped by Ctrl-C after a checkpoint was written.
    """
    if resume is not None:
        return _continue(Path(resume), overrides)
    resolved = override(_choose_recipe(method, recipe), overrides)
    folder = _new_folder(output_dir, resolved.name)
    with _clean_up_unless_started(folder):
        trainer = build_trainer(resolved, folder, init_from=init_from)
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
    trainer = build_trainer(recipe, folder)
    return _train_and_save(trainer, recipe, folder, checkpoint=True)


def _new_folder(output_dir: str | None, name: str) -> Path:
    if output_dir is not None:
        folder = Path(output_dir)
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
def _clean_up_unless_started(folder: Path) -> Iterator[None]:
    """Leave no empty run behind when the data or the model are refused."""
    existed = folder.exists()
    try:
        yield
    except BaseException:
        if not existed:
            shutil.rmtree(folder, ignore_errors=True)
        raise


def build_trainer(recipe: Recipe, folder: Path, init_from: str | None = None) -> SSLTrainer:
    """Open the data, build the model and put both into a trainer.

    Raises:
        RecipeError: a value that does not fit.
        DataError: images cannot be found or read.
    """
    args = training_arguments(recipe, str(folder))
    config = recipe.config()
    set_seed(args.seed)
    sources = open_sources(recipe.data)
    processor = METHODS[recipe.method].processor_class.for_image_size(config.image_size, **recipe.processor)
    model = _build_model(recipe, config, init_from)
    probe = build_probe(recipe.data, processor, args)
    if probe is None:
        args.eval_strategy, args.metric_for_best_model = "no", None
    try:
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
        raise RecipeError(str(error)) from error
    logger.info(_describe(recipe, trainer))
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


def _build_model(recipe: Recipe, config: Any, init_from: str | None) -> SSLForPreTraining:
    model_class = METHODS[recipe.method].pretraining_class
    try:
        if init_from is None:
            return model_class(config)  # type: ignore[no-any-return]
        return model_class.from_pretrained(init_from, config=config, allow_new_heads=True)  # type: ignore[no-any-return]
    except (ValueError, OSError) as error:
        raise RecipeError(" ".join(str(error).split())) from error


def build_probe(
    data: DataArguments, processor: SSLImageProcessor, args: SSLTrainingArguments
) -> OnlineProbe | None:
    """The online probe of a recipe; None, and said so, where no labels can be found."""
    pair = probe_sources(data)
    if pair is None:
        logger.info("probe     none: the data have no labels; give --probe_dataset to see whether it learns")
        return None
    return OnlineProbe(
        *pair,
        processor=processor,
        pools=data.probe_pools,
        num_neighbors=data.probe_num_neighbors,
        linear=data.probe_linear,
        limit=data.probe_limit,
        dtype=torch.bfloat16 if args.bf16 else None,
    )


def probe_sources(data: DataArguments) -> tuple[Any, Any] | None:
    """Labelled bank and queries of a recipe's probe; None where the data have no labels.

    Raises:
        DataError: named data, splits or columns do not exist.
    """
    dataset = data.probe_dataset or (data.dataset if isinstance(data.dataset, str) else data.dataset[0])
    splits = data.probe_splits or _probe_splits(dataset, data)
    if splits is None:
        return _held_out(dataset, data)
    configs = data.probe_config_names or [data.config_name] * 2
    bank, query = (
        open_images(
            dataset,
            split=split,
            config_name=config,
            image_column=data.image_column if data.probe_dataset is None else None,
            label_column=data.probe_label_column,
        )
        for split, config in zip(splits, configs, strict=True)
    )
    if bank.label_column is None:
        if data.probe_dataset is None:
            return None
        raise DataError(
            f"the probe needs labels: {bank.name} has no label column; name it with --probe_label_column"
        )
    return bank, query


def _probe_splits(dataset: str, data: DataArguments) -> list[str] | None:
    """Train and test split where both exist, else None."""
    for test in ("test", "validation"):
        with contextlib.suppress(DataError):
            open_images(dataset, split=test, config_name=data.config_name)
            return ["train", test]
    return None


def _held_out(dataset: str, data: DataArguments) -> tuple[Any, Any] | None:
    """Bank and queries cut from one labelled split."""
    source = open_images(
        dataset,
        split=data.split,
        config_name=data.config_name,
        image_column=data.image_column,
        label_column=data.probe_label_column,
    )
    if source.label_column is None:
        return None
    rows = list(source.rows(limit=data.probe_limit * HELD_OUT_EVERY // (HELD_OUT_EVERY - 1)))
    query = rows[::HELD_OUT_EVERY]
    bank = [row for index, row in enumerate(rows) if index % HELD_OUT_EVERY]
    return bank, query


def _describe(recipe: Recipe, trainer: SSLTrainer) -> str:
    """What a user checks before waiting: data, backbone, parameters, steps, batch."""
    args, model = trainer.args, trainer.model
    backbone = model.published_branch().backbone
    encoder = sum(value.numel() for value in backbone.parameters())
    trained = sum(value.numel() for _, value in model.trainable_parameters())
    epochs = trainer.epoch_at(args.max_steps)
    lines = [f"method    {recipe.method} (recipe {recipe.name})"]
    lines += [f"data      {source.describe()}" for source in trainer.sources]
    lines += [
        f"backbone  {_backbone_name(model)}, {encoder / 1e6:.2f} M parameters ({trained / 1e6:.2f} M trained with heads)",
        f"training  {args.max_steps} steps of {args.global_batch_size} images"
        + (f" = {epochs:.1f} epochs" if epochs else "")
        + f" ({args.per_device_train_batch_size} per device x {args.world_size} x {args.gradient_accumulation_steps}), "
        f"{args.optimizer}, learning rate {args.learning_rate:g}, {'bf16' if args.bf16 else 'fp32'}",
        f"folder    {args.output_dir}",
    ]
    return "\n".join(lines)


def _backbone_name(model: SSLForPreTraining) -> str:
    config: Any = model.config.backbone_config
    if config.model_type == "hf_ssl_timm":
        stem = f", 3x3 stem of stride {config.small_stem_stride}" if config.small_stem_stride else ""
        return f"timm {config.architecture} at {config.image_size} px{stem}"
    return (
        f"ViT of width {config.hidden_size}, {config.num_hidden_layers} layers, patch {config.patch_size} "
        f"at {config.image_size} px"
    )


class _StopOnInterrupt(TrainerCallback):
    """Ctrl-C: finish the step, write a checkpoint, stop; a second one stops at once."""

    def __init__(self) -> None:
        self.interrupted = False

    def __enter__(self) -> "_StopOnInterrupt":
        self.previous = signal.signal(signal.SIGINT, self._request)
        return self

    def __exit__(self, *error: Any) -> None:
        signal.signal(signal.SIGINT, self.previous)

    def _request(self, signum: int, frame: Any) -> None:
        if self.interrupted:
            raise KeyboardInterrupt
        self.interrupted = True
        logger.warning("stopping after this step; press Ctrl-C again to stop at once")

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.interrupted:
            control.should_save = control.should_training_stop = True


def _train_and_save(trainer: SSLTrainer, recipe: Recipe, folder: Path, checkpoint: bool | None) -> Run:
    folder.mkdir(parents=True, exist_ok=True)
    if trainer.is_world_process_zero():
        recipe.save(folder / RECIPE_FILE)
    floors = trainer.probe.measure_floors(trainer.model) if isinstance(trainer.probe, OnlineProbe) else {}
    if floors:
        logger.info("floors    " + ", ".join(f"{name} {100 * value:.1f} %" for name, value in floors.items()))
        trainer.floors = floors
    with _StopOnInterrupt() as stopper:
        trainer.add_callback(stopper)
        trainer.train(resume_from_checkpoint=checkpoint)
    if stopper.interrupted and trainer.state.global_step < trainer.args.max_steps:
        raise Interrupted(
            f"stopped at step {trainer.state.global_step} of {trainer.args.max_steps}; the checkpoint is in {folder}; "
            f"continue with: hf-ssl train --resume {shlex.quote(str(folder))}"
        )
    scores = _final_scores(trainer)
    native_class = _save(trainer, folder, scores)
    return Run(folder, scores, native_class, trainer)


def _final_scores(trainer: SSLTrainer) -> Scores | None:
    if not isinstance(trainer.probe, OnlineProbe):
        return None
    last = next((entry for entry in reversed(trainer.state.log_history) if "eval_knn" in entry), None)
    if last is None or last["step"] != trainer.state.global_step:
        trainer.evaluate()
    return trainer.probe.scores


def _save(trainer: SSLTrainer, folder: Path, scores: Scores | None) -> str:
    """Fill the run folder: a pre-training checkpoint, its log and the native encoder, whose class is returned."""
    from hf_ssl.hub import export_encoder

    trainer.save_model(str(folder))
    trainer.save_state()
    if not trainer.is_world_process_zero():
        return ""
    if scores is not None:
        (folder / "scores.json").write_text(json.dumps(scores.to_dict(), indent=1), encoding="utf-8")
    return export_encoder(folder, folder / "encoder", overwrite=True).native_class
