"""Fine-tuning of a landed encoder for classification, by transformers' own Trainer and classes.

The folder is a native one (`RUN/encoder` or a Hub repository): nothing of ours is needed to load it.
"""

import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision.transforms import RandomResizedCrop

from hf_ssl.data.decoding import decode_image
from hf_ssl.evaluation.checks import check_labels
from hf_ssl.evaluation.images import Source, count_classes, decode_picture, label_tensor, read_rows
from hf_ssl.evaluation.metrics import top_k_accuracy

CROP_SCALE = (0.3, 1.0)  # share of the area; milder than for ImageNet, as images here are small
CROP_RATIO = (3 / 4, 4 / 3)
_LAYER = re.compile(r"\blayers?\.(\d+)\.")


@dataclass(frozen=True)
class FineTuneResult:
    """Accuracies on the test images between 0 and 1, and where the fine-tuned model is."""

    top1: float
    top5: float
    folder: str

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


def fine_tune(
    model: str | Path,
    train_source: Source,
    test_source: Source,
    output_dir: str | Path,
    *,
    epochs: float = 10,
    learning_rate: float = 1e-3,
    weight_decay: float = 0.05,
    layer_decay: float = 1.0,
    batch_size: int = 128,
    warmup_share: float = 0.1,
    augment: bool = True,
    train_limit: int | None = None,
    test_limit: int | None = None,
    seed: int = 0,
    **training_arguments: Any,
) -> FineTuneResult:
    """Trains encoder and a new classifier on labelled images, and saves the result in `output_dir`.

    Args:
        model: folder or Hub name of a landed encoder with its image processor.
        train_source: labelled images, an `ImageSource` or a list of rows.
        test_source: labelled images that are scored once, at the end.
        output_dir: where the fine-tuned model goes.
        epochs: passes over the training images.
        learning_rate: peak of AdamW, cosine after a linear warm-up.
        weight_decay: of AdamW.
        layer_decay: factor on the rate per layer below the classifier, as for MAE and BEiT (0.65 to 0.75);
            1: none.
        batch_size: images a step and device.
        warmup_share: part of the steps in which the rate rises.
        augment: random resized crop and flip of the training images.
        train_limit: at most so many training images, evenly spread.
        test_limit: at most so many test images.
        seed: of order, augmentation and classifier.
        **training_arguments: anything else of `transformers.TrainingArguments`.

    Raises:
        ValueError: no images, labels missing, one class only, or rates by layer of an encoder that has no
            layers to tell apart.
    """
    from transformers import (
        AutoConfig,
        AutoImageProcessor,
        AutoModelForImageClassification,
        Trainer,
        TrainingArguments,
        set_seed,
    )

    processor = AutoImageProcessor.from_pretrained(model)
    train = LabelledImages(train_source, processor, train_limit, augment=augment, name="train")
    test = LabelledImages(test_source, processor, test_limit, name="test")
    check_labels(train.labels, len(train), several=True, name="train labels")
    num_classes = max(count_classes(train_source, train.labels), count_classes(test_source, test.labels))
    names = _label_names(train_source, num_classes)
    set_seed(seed)
    options: dict[str, Any] = {"id2label": names, "label2id": {v: k for k, v in names.items()}}
    if AutoConfig.from_pretrained(model).model_type == "beit":
        options["use_mean_pooling"] = True  # its class token is not trained for anything
    classifier = AutoModelForImageClassification.from_pretrained(model, num_labels=num_classes, **options)
    steps = -(-len(train) // batch_size) * epochs
    settings: dict[str, Any] = {
        "output_dir": str(output_dir),
        "num_train_epochs": epochs,
        "learning_rate": learning_rate,
        "weight_decay": weight_decay,
        "lr_scheduler_type": "cosine",
        "warmup_steps": round(warmup_share * steps),
        "per_device_train_batch_size": min(batch_size, len(train)),
        "per_device_eval_batch_size": batch_size,
        "remove_unused_columns": False,
        "save_strategy": "no",
        "report_to": "none",
        "seed": seed,
    }
    optimizer = None
    if layer_decay != 1:
        groups = layer_groups(classifier, layer_decay, learning_rate, weight_decay)
        optimizer = torch.optim.AdamW(groups, lr=learning_rate)
    trainer = Trainer(
        model=classifier,
        args=TrainingArguments(**{**settings, **training_arguments}),
        train_dataset=train,
        eval_dataset=test,
        compute_metrics=accuracy_metrics,
        optimizers=(optimizer, None),
    )
    trainer.train()
    metrics = trainer.evaluate()
    trainer.save_model()
    processor.save_pretrained(output_dir)
    return FineTuneResult(metrics["eval_top1"], metrics["eval_top5"], str(output_dir))


def layer_groups(
    classifier: nn.Module, layer_decay: float, learning_rate: float, weight_decay: float
) -> list[dict[str, Any]]:
    """Parameter groups of a native ViT: one factor for each layer between a parameter and the classifier.

    Embeddings have all of them, the final norm, relative positions and the classifier none (the authors'
    `lr_decay.py` of MAE). Vectors are not decayed.

    Raises:
        ValueError: the network has no numbered layers.
    """
    numbers = {name: _LAYER.search(name) for name, _ in classifier.named_parameters()}
    depth = 1 + max((int(found[1]) for found in numbers.values() if found), default=-1)
    if not depth:
        raise ValueError(f"layer_decay {layer_decay} needs a ViT; leave it at 1")
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in classifier.named_parameters():
        found = numbers[name]
        above = depth - int(found[1]) if found else 0
        if ".embeddings." in f".{name}":
            above = depth + 1
        decays = parameter.ndim > 1
        group = {
            "params": [],
            "lr": learning_rate * layer_decay**above,
            "weight_decay": weight_decay if decays else 0.0,
        }
        groups.setdefault((above, decays), group)["params"].append(parameter)
    return list(groups.values())


def accuracy_metrics(prediction: Any) -> dict[str, float]:
    """`compute_metrics` of a Trainer: top-1 and top-5 accuracy."""
    logits = (
        prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
    )
    scores, labels = torch.from_numpy(np.asarray(logits)), torch.from_numpy(np.asarray(prediction.label_ids))
    return {"top1": top_k_accuracy(scores, labels, 1), "top5": top_k_accuracy(scores, labels, 5)}


class LabelledImages(Dataset[dict[str, Tensor]]):
    """Rows of a source as a Trainer reads them; files stay encoded in memory, broken images are left out.

    Args:
        source: labelled images, an `ImageSource` or a list of rows.
        processor: the image processor of the model.
        limit: at most so many rows, evenly spread over the source.
        augment: random resized crop and flip, drawn from torch's global generator.
        name: what the images are called in errors.

    Raises:
        ValueError: no image can be read, or labels are missing.
    """

    def __init__(
        self,
        source: Source,
        processor: Any,
        limit: int | None = None,
        *,
        augment: bool = False,
        name: str = "given",
    ) -> None:
        numbered = read_rows(source, limit)
        self.rows = [row for number, row in numbered if decode_picture(row["image"], number) is not None]
        if not self.rows:
            raise ValueError(f"the {name} source has no readable image; check its path, split and limit")
        labels = label_tensor([row.get("label") for row in self.rows], list(range(len(self.rows))))
        self.labels = check_labels(labels, len(self.rows), name=f"{name} labels")
        self.processor = processor
        self.augment = augment

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        picture = Image.fromarray(decode_image(self.rows[index]["image"]))
        if self.augment:
            picture = _crop_and_flip(picture)
        pixel_values = self.processor(images=[picture], return_tensors="pt")["pixel_values"][0]
        return {"pixel_values": pixel_values, "labels": self.labels[index]}


def _crop_and_flip(picture: Image.Image) -> Image.Image:
    top, left, height, width = RandomResizedCrop.get_params(picture, list(CROP_SCALE), list(CROP_RATIO))
    picture = picture.crop((left, top, left + width, top + height))
    return picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if torch.rand(()) < 0.5 else picture


def _label_names(source: Source, num_classes: int) -> dict[int, str]:
    names = list(getattr(source, "label_names", None) or [])
    return {c: names[c] if c < len(names) else f"class {c}" for c in range(num_classes)}
