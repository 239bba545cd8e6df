"""Training loops with lightly's parts, with the settings of our recipes.

Taken from lightly: transforms, heads, losses with memory bank, momentum update, masked ViT and decoder, split
of parameters by weight decay; the order of a step is that of its examples. Same as ours: backbone, images,
steps, batch, AdamW (fused), schedule, autocast. Losses are computed in float32, outside autocast.
"""

import io
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from lightly.models import utils
from lightly_views import lightly_transform
from PIL import Image
from quality_lightly_distillation import DINO, iBOT
from quality_lightly_methods import MAE, MoCo, SimCLR
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from hf_ssl.data.loader import BATCH_KEYS
from hf_ssl.data.sources import open_images
from hf_ssl.training.arguments import SSLTrainingArguments
from hf_ssl.training.recipes import Recipe
from hf_ssl.training.schedules import ScheduleSpan, learning_rate_schedule
from hf_ssl.training.trainer import SSLTrainer


class EncodedImages(Dataset[list[Tensor]]):
    """JPEG bytes in memory, decoded when they are used, as our loader does."""

    def __init__(self, source: Any, transform: Callable[[Image.Image], list[Tensor]]) -> None:
        self.images = [row["image"] for row in source.rows()]
        self.transform = transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> list[Tensor]:
        image = self.images[index]
        picture = Image.open(io.BytesIO(image)) if isinstance(image, bytes) else image
        return self.transform(picture.convert("RGB"))


MODELS = {"simclr": SimCLR, "moco": MoCo, "mae": MAE, "dino": DINO, "ibot": iBOT}


def build_transform(recipe: Recipe) -> Callable[[Image.Image], list[Tensor]]:
    """lightly's transform with the sizes and strengths of the recipe's views."""
    views = [{"size": recipe.config().image_size, **view} for view in recipe.processor["views"]]
    return lightly_transform(recipe.method, views)


class OurViews:
    """Batches of views as our trainer makes them, on its device, in the form that lightly's loops take."""

    def __init__(self, trainer: SSLTrainer) -> None:
        self.trainer = trainer

    def __iter__(self) -> Iterator[list[Tensor]]:
        for batch in self.trainer.get_train_dataloader():
            inputs = {name: value for name, value in batch.items() if name in BATCH_KEYS.values()}
            views = self.trainer._prepare_inputs(inputs)
            yield [view for name in BATCH_KEYS.values() if name in views for view in views[name].unbind(1)]


class LightlyRun:
    """Model, data and optimizer of one run.

    Args:
        recipe: settings that both sides share.
        args: the recipe's, as arguments of a training.
        trainer: take views and device of this one; None: lightly's own views, on the CPU.
    """

    def __init__(self, recipe: Recipe, args: SSLTrainingArguments, trainer: SSLTrainer | None = None) -> None:
        self.args = args
        self.device = torch.device("cpu") if trainer is None else args.device
        self.model = MODELS[recipe.method](recipe.config()).to(self.device)
        self.encoder = self.model.encoder
        if trainer is None:
            images = open_images(recipe.data.dataset, split="train")
            dataset = EncodedImages(images, build_transform(recipe))
            self.loader = DataLoader(dataset, batch_size=args.global_batch_size, shuffle=True, drop_last=True)
        else:
            self.loader = OurViews(trainer)
        decayed, undecayed = utils.get_weight_decay_parameters(self.model.trained)
        groups = [
            {"params": decayed, "weight_decay": args.weight_decay},
            {"params": undecayed, "weight_decay": 0.0},
        ]
        betas = (args.adam_beta1, args.adam_beta2)
        self.optimizer = torch.optim.AdamW(groups, lr=args.learning_rate, betas=betas, fused=True)
        span = ScheduleSpan(args.max_steps, args.get_warmup_steps(args.max_steps))
        factor = partial(learning_rate_schedule(args.learning_rate_schedule), span=span)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, factor)

    def batches(self) -> Iterator[list[Tensor]]:
        """Batches of views, epoch after epoch."""
        while True:
            yield from self.loader

    def clip_gradients(self) -> None:
        """Each tensor by itself, as our recipes of self-distillation say; none at 0."""
        for parameter in self.model.parameters() if self.args.max_grad_norm else ():
            if parameter.grad is not None:
                nn.utils.clip_grad_norm_(parameter, self.args.max_grad_norm)

    def train(self, after_step: Callable[[int], None] | None = None) -> list[float]:
        """All steps; the loss of each. `after_step` gets the number of steps done."""
        autocast = partial(torch.autocast, self.device.type, dtype=torch.bfloat16, enabled=self.args.bf16)
        self.model.train()
        losses = []
        for step, views in zip(range(self.args.max_steps), self.batches(), strict=False):
            self.model.move_teacher(step, self.args.max_steps)
            loss = self.model.loss(views, autocast)
            loss.backward()
            self.clip_gradients()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.scheduler.step()
            losses.append(loss.detach())
            if after_step is not None:
                after_step(step + 1)
        return torch.stack(losses).tolist()
