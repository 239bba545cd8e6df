"""Images and texts to embeddings of one space, by a model of both."""

from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn


class ImageTextEncoder:
    """Two towers, frozen.

    Args:
        model: has `get_image_features` and `get_text_features`, as `SSLCLIPForPreTraining` and transformers'
            models of two towers have them.
        processor: its processor, with `image_processor` and `tokenize`.
    """

    def __init__(self, model: nn.Module, processor: Any) -> None:
        self.model: Any = model.eval()
        self.processor = processor

    @torch.inference_mode()
    def embed_images(self, pictures: Sequence[Any]) -> Tensor:
        """Embeddings (images, E) of RGB pictures, float32 on the CPU, any norm."""
        inputs = self.processor.image_processor(images=list(pictures), return_tensors="pt")
        outputs = self.model.get_image_features(pixel_values=self._placed(inputs["pixel_values"]))
        return outputs.pooler_output.float().cpu()

    def embed_in_turn(self, pictures: Iterable[Any], batch_size: int) -> Tensor:
        """Embeddings of many pictures, which are read as they are needed; (0, 0) of none."""
        remaining, found = iter(pictures), [torch.empty(0, 0)]
        while part := list(islice(remaining, batch_size)):
            found.append(self.embed_images(part))
        return torch.cat(found[1:] or found)

    @torch.inference_mode()
    def embed_texts(self, texts: Sequence[str], batch_size: int = 128) -> Tensor:
        """Embeddings (texts, E), float32 on the CPU, any norm."""
        found = []
        for first in range(0, len(texts), batch_size):
            tokens = self.processor.tokenize(list(texts[first : first + batch_size]))
            placed = {name: self._placed(value) for name, value in tokens.items()}
            found.append(self.model.get_text_features(**placed).pooler_output.float().cpu())
        return torch.cat(found)

    def _placed(self, x: Tensor) -> Tensor:
        parameter = next(self.model.parameters())
        return x.to(parameter.device, parameter.dtype if x.is_floating_point() else None)
