"""Whether a batch, and the way it is cut into micro-batches, suits a method; said before the first step."""

import logging

from torch import nn

from hf_ssl.modeling.shared.distributed import SynchronizedBatchNorm
from hf_ssl.modeling.shared.pretraining import SSLForPreTraining
from hf_ssl.training.arguments import SSLTrainingArguments

logger = logging.getLogger(__name__)


def check_batch(model: SSLForPreTraining, args: SSLTrainingArguments) -> None:
    """Refuse what the method cannot work with, warn of where several small batches are not one large one.

    Raises:
        ValueError: too small for the method or its normalisation, no divisor of its queue, or gradient
            caching that the method has no use for or that would change its BatchNorm.
    """
    model.check_global_batch(int(args.global_batch_size or 1))
    smallest = args.cached_microbatch_size or args.per_device_train_batch_size
    if smallest < 2 and (has_batch_norm(model) or model.loss_couples_the_batch):
        reason = "negatives need" if model.loss_couples_the_batch else "BatchNorm needs"
        name = "cached_microbatch_size" if args.cached_microbatch_size else "per_device_train_batch_size"
        raise ValueError(f"{reason} other images: {name} must be at least 2, got {smallest}")
    if args.cached_microbatch_size:
        _check_caching(model, args)
    else:
        _warn_of_contrast(model, args)
        _warn_of_batch_norm(model, args)


def has_batch_norm(module: nn.Module) -> bool:
    """Whether it normalises by statistics of the batch."""
    return any("BatchNorm" in type(layer).__name__ for layer in module.modules())


def has_own_statistics(module: nn.Module) -> bool:
    """Whether it has a BatchNorm whose statistics are those of one process."""
    norms = (layer for layer in module.modules() if "BatchNorm" in type(layer).__name__)
    return any(not isinstance(norm, SynchronizedBatchNorm) for norm in norms)


def _check_caching(model: SSLForPreTraining, args: SSLTrainingArguments) -> None:
    name, size = type(model).__name__, args.cached_microbatch_size
    if not model.loss_couples_the_batch:
        raise ValueError(
            f"{name} has no use for cached_microbatch_size: its loss takes accumulated micro-batches as one "
            "batch; give global_batch_size and a smaller per_device_train_batch_size"
        )
    if not has_batch_norm(model.embedder):
        return
    images = f"{args.world_size} x {size}" if args.world_size > 1 else f"{size}"
    if args.cached_batch_norm != "ghost":
        raise ValueError(
            f"under cached_microbatch_size the backbone's BatchNorm normalises by {images} images instead of "
            f"{args.global_batch_size}; accept it with cached_batch_norm=ghost, or take a ViT backbone"
        )
    logger.warning(
        "ghost BatchNorm: the backbone of %s normalises by %s images at a time, not by %d; its gradients are "
        "not those of the large batch",
        name,
        images,
        args.global_batch_size,
    )


def _warn_of_contrast(model: SSLForPreTraining, args: SSLTrainingArguments) -> None:
    total, count = int(args.global_batch_size or 0), args.gradient_accumulation_steps
    if model.loss_couples_the_batch and count > 1:
        logger.warning(
            "%s contrasts within a micro-batch: %d accumulated ones give %d images of negatives, not %d; "
            "cached_microbatch_size gives all of them",
            type(model).__name__,
            count,
            total // count,
            total,
        )


def _warn_of_batch_norm(model: SSLForPreTraining, args: SSLTrainingArguments) -> None:
    if not has_batch_norm(model):
        return
    of_one_process = has_own_statistics(model)
    images = args.per_device_train_batch_size * (1 if of_one_process else args.world_size)
    if images != args.global_batch_size:
        logger.warning(
            "BatchNorm normalises by %d images, not by the %d of a step: with other %s it is another",
            images,
            args.global_batch_size,
            "processes or micro-batches" if of_one_process else "micro-batches",
        )
