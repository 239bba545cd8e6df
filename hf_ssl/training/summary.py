"""What a user reads before a run: data, backbone, parameters, steps, batch."""

from typing import Any

from hf_ssl.training.recipes import Recipe
from hf_ssl.training.trainer import SSLTrainer


def describe_run(recipe: Recipe, trainer: SSLTrainer) -> str:
    """One line for each thing worth a look before waiting."""
    model: Any = trainer.model
    encoder = sum(value.numel() for value in model.published_branch().backbone.parameters())
    trained = sum(value.numel() for _, value in model.trainable_parameters())
    lines = [f"method    {recipe.method} (recipe {recipe.name})"]
    lines += [f"data      {source.describe()}" for source in trainer.sources]
    views = "compiled" if trainer.view_maker.compiled else "plain; pip install hf-ssl[fast] is faster"
    lines += [
        f"views     {trainer.view_maker.num_views} of each image, {views}",
        f"backbone  {model.config.backbone_config.describe()}, {encoder / 1e6:.2f} M parameters "
        f"({trained / 1e6:.2f} M trained with heads)",
        f"training  {_describe_training(trainer)}",
        f"folder    {trainer.args.output_dir}",
    ]
    return "\n".join(lines)


def _describe_training(trainer: SSLTrainer) -> str:
    args = trainer.args
    epochs = trainer.epoch_at(args.max_steps)
    batch = f"{args.per_device_train_batch_size} per device x {args.world_size}"
    if args.cached_microbatch_size:
        batch += f", cached {args.cached_microbatch_size} at a time"
    if args.gradient_accumulation_steps > 1:
        batch += f" x {args.gradient_accumulation_steps} accumulated"
    return (
        f"{args.max_steps} steps of {args.global_batch_size} images"
        + (f" = {epochs:.1f} epochs" if epochs else "")
        + f" ({batch}), {args.optimizer}, learning rate {args.learning_rate:g}, "
        + ("bf16" if args.bf16 else "fp16" if args.fp16 else "fp32")
    )
