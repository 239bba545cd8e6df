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
    elif args.gradient_accumulation_steps > 1:
        _warn_of_accumulation(model, args)
    _warn_of_processes(model, args)


def has_batch_norm(module: nn.Module) -> bool:
    """Whether it normalises by statistics of the batch."""
    return any("BatchNorm" in type(layer).__name__ for layer in module.modules())


def _check_caching(model: SSLForPreTraining, args: SSLTrainingArguments) -> None:
    name, size = type(model).__name__, args.cached_microbatch_size
    if not model.loss_couples_the_batch:
        raise ValueError(
            f"{name} has no use for cached_microbatch_size: accumulated micro-batches are one large batch "
            "already; give global_batch_size and a smaller per_device_train_batch_size"
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


def _warn_of_accumulation(model: SSLForPreTraining, args: SSLTrainingArguments) -> None:
    total = int(args.global_batch_size or 0)
    at_once = total // args.gradient_accumulation_steps
    if model.loss_couples_the_batch:
        logger.warning(
            "%s contrasts within a micro-batch: %d accumulated ones give %d images of negatives, not %d; "
            "cached_microbatch_size gives all of them",
            type(model).__name__,
            args.gradient_accumulation_steps,
            at_once,
            total,
        )
    if has_batch_norm(model):
        logger.warning("BatchNorm normalises by the %d images of a micro-batch, not by %d", at_once, total)


def _warn_of_processes(model: SSLForPreTraining, args: SSLTrainingArguments) -> None:
    own = [layer for layer in model.modules() if has_own_statistics(layer)]
    if args.world_size > 1 and own:
        logger.warning(
            "%s, as published, normalises by the %d images of a process, so that another number of processes "
            "is another run",
            type(model).__name__,
            args.per_device_train_batch_size,
        )


def has_own_statistics(layer: nn.Module) -> bool:
    """Whether a layer is a BatchNorm whose statistics are those of one process."""
    return "BatchNorm" in type(layer).__name__ and not isinstance(layer, SynchronizedBatchNorm)
