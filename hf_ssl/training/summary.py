"""What a user reads before a run: data, backbone, parameters, steps, batch."""

from typing import Any

from hf_ssl.modeling.shared.pretraining import SSLForPreTraining
from hf_ssl.training.recipes import Recipe
from hf_ssl.training.trainer import SSLTrainer


def describe_run(recipe: Recipe, trainer: SSLTrainer) -> str:
    """One line for each thing worth a look before waiting."""
    model: Any = trainer.model
    encoder = sum(value.numel() for value in model.published_branch().backbone.parameters())
    trained = sum(value.numel() for _, value in model.trainable_parameters())
    lines = [f"method    {recipe.method} (recipe {recipe.name})"]
    lines += [f"data      {source.describe()}" for source in trainer.sources]
    lines += [
        f"backbone  {_describe_backbone(model)}, {encoder / 1e6:.2f} M parameters "
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


def _describe_backbone(model: SSLForPreTraining) -> str:
    config: Any = model.config.backbone_config
    if config.model_type == "hf_ssl_timm":
        stem = f", 3x3 stem of stride {config.small_stem_stride}" if config.small_stem_stride else ""
        return f"timm {config.architecture} at {config.image_size} px{stem}"
    return (
        f"ViT of width {config.hidden_size}, {config.num_hidden_layers} layers, patch {config.patch_size} "
        f"at {config.image_size} px"
    )
