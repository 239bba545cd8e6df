"""What methods of images with texts share: config, text towers in transformers' layouts, the two-tower model.

The image tower is any backbone; the text tower is a native transformers model, trained from scratch.
Shape suffixes: B = pairs in this process, L = tokens of a text, D = width of the image tower, E = embedding
width.
"""

from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling

from hf_ssl.modeling.shared.backbone import build_backbone
from hf_ssl.modeling.shared.configuration import SSLConfig
from hf_ssl.modeling.shared.distributed import convert_batchnorm
from hf_ssl.modeling.shared.image_text_losses import agreement_of_pairs
from hf_ssl.modeling.shared.outputs import SSLOutput
from hf_ssl.modeling.shared.pretraining import Branch, SSLForPreTraining


@strict
class SSLImageTextConfig(SSLConfig):
    """Base of the configs of methods that learn from images with texts.

    Vocabulary and special tokens are those of the tokenizer; a run writes them here.
    """

    text_hidden_size: int = 512
    text_num_hidden_layers: int = 12
    text_num_attention_heads: int = 8
    text_max_length: int = 77  # tokens; longer texts are cut
    vocab_size: int = 49408  # of a tokenizer that is trained on the captions at hand: at most so many
    bos_token_id: int | None = None  # None: the last but one, as CLIP's tokenizer has it
    eos_token_id: int | None = None  # None: the last
    pad_token_id: int | None = None  # None: the end token again
    lock_image_tower: bool = False  # LiT (arXiv 2111.07991): texts learn to match images as they are

    def __post_init__(self, **kwargs: Any) -> None:
        self.eos_token_id = self.vocab_size - 1 if self.eos_token_id is None else self.eos_token_id
        self.bos_token_id = self.vocab_size - 2 if self.bos_token_id is None else self.bos_token_id
        self.pad_token_id = self.eos_token_id if self.pad_token_id is None else self.pad_token_id
        super().__post_init__(**kwargs)

    def validate_text_tower(self) -> None:
        """Refuse sizes that make no tower, and special tokens outside the vocabulary."""
        width, heads = self.text_hidden_size, self.text_num_attention_heads
        if width < 1 or heads < 1 or width % heads:
            raise ValueError(
                f"text_hidden_size {width} is not a multiple of text_num_attention_heads {heads}"
            )
        if self.text_num_hidden_layers < 1 or self.text_max_length < 3:
            raise ValueError(
                f"text_num_hidden_layers {self.text_num_hidden_layers} must be at least 1, text_max_length "
                f"{self.text_max_length} at least 3: start, one token, end"
            )
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            token = getattr(self, name)
            if token is not None and not 0 <= token < self.vocab_size:
                raise ValueError(f"{name} {token} is outside a vocabulary of {self.vocab_size} tokens")

    @property
    def text_options(self) -> dict[str, Any]:
        """Fields of the native text config."""
        return {
            "hidden_size": self.text_hidden_size,
            "intermediate_size": 4 * self.text_hidden_size,
            "num_hidden_layers": self.text_num_hidden_layers,
            "num_attention_heads": self.text_num_attention_heads,
            "max_position_embeddings": self.text_max_length,
            "vocab_size": self.vocab_size,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": self.eos_token_id,
            "pad_token_id": self.pad_token_id,
        }


class Projection(nn.Linear):
    """Linear map without bias into the common space, CLIP's initialisation."""

    def __init__(self, width: int, embedding_size: int) -> None:
        super().__init__(width, embedding_size, bias=False)

    def initialize_parameters(self) -> None:
        """Normal with the standard deviation width^-0.5."""
        init.normal_(self.weight, std=self.in_features**-0.5)


class Similarity(nn.Module):
    """Learned scale, stored as its logarithm, and bias of the cosines; one element each, as FSDP wants it."""

    def __init__(self, scale_start: float, bias_start: float | None) -> None:
        super().__init__()
        self.scale_start, self.bias_start = scale_start, bias_start
        self.logit_scale = nn.Parameter(torch.empty(1))
        self.logit_bias = None if bias_start is None else nn.Parameter(torch.empty(1))

    def initialize_parameters(self) -> None:
        """Start at the configured values."""
        init.constant_(self.logit_scale, self.scale_start)
        if self.logit_bias is not None:
            init.constant_(self.logit_bias, self.bias_start)  # type: ignore[arg-type]

    def figures(self) -> dict[str, Tensor]:
        """Scale and bias as they are now, for the log."""
        figures = {"logit_scale": self.logit_scale.detach().float().exp().squeeze()}
        if self.logit_bias is not None:
            figures["logit_bias"] = self.logit_bias.detach().float().squeeze()
        return figures


class SSLImageTextForPreTraining(SSLForPreTraining):
    """Two towers into one space. Subclasses add the text tower and the loss.

    `student` is the image tower with its head, `text_tower` a native model whose pooled output
    `text_projection` maps into the common space.
    """

    config: SSLImageTextConfig
    student: Branch
    text_tower: nn.Module
    text_projection: nn.Module
    similarity: Similarity
    _no_split_modules = ["SSLViTLayer", "CLIPEncoderLayer", "SiglipEncoderLayer"]

    def __init__(self, config: SSLImageTextConfig) -> None:
        super().__init__(config)
        backbone = build_backbone(config.backbone_config)
        self.student = Branch(backbone, self.build_image_head(backbone))
        convert_batchnorm(self.student, "synchronized")
        self.build_text_tower()
        self.finish_construction()

    def _share_attention_implementation(self) -> None:
        """The text tower's too, whose config is a native one."""
        super()._share_attention_implementation()
        config: Any = self.text_tower.config
        config._attn_implementation = self.config._attn_implementation

    # What a method is

    def build_image_head(self, backbone: nn.Module) -> nn.Module:
        """The module from what `embed_images` takes of the backbone into the common space."""
        raise TypeError(f"{type(self).__name__} must define build_image_head")

    def build_text_tower(self) -> None:
        """Set `text_tower`, `text_projection` and `similarity`."""
        raise TypeError(f"{type(self).__name__} must define build_text_tower")

    def contrast(self, image_BE: Tensor, text_BE: Tensor) -> Tensor:
        """The loss of embeddings."""
        raise TypeError(f"{type(self).__name__} must define contrast")

    def head_input(self, outputs: BaseModelOutputWithPooling) -> Tensor:
        """What the image head takes of the backbone's outputs."""
        pooled_BD: Tensor = outputs.pooler_output  # type: ignore[assignment]
        return pooled_BD

    # Embeddings

    def get_image_features(self, pixel_values: Tensor) -> BaseModelOutputWithPooling:
        """Embed images (B, C, H, W); `pooler_output` (B, E) is the embedding, as in transformers' models."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.config.lock_image_tower):
            outputs = self.student.backbone(pixel_values)
        embedding_BE = self.student.head(self.head_input(outputs))
        return BaseModelOutputWithPooling(
            last_hidden_state=outputs.last_hidden_state, pooler_output=embedding_BE
        )

    def get_text_features(
        self, input_ids: Tensor, attention_mask: Tensor | None = None
    ) -> BaseModelOutputWithPooling:
        """Embed texts (B, L); `pooler_output` (B, E) is the embedding, as in transformers' models."""
        outputs = self.text_tower(input_ids=input_ids, attention_mask=attention_mask)
        return BaseModelOutputWithPooling(
            last_hidden_state=outputs.last_hidden_state,
            pooler_output=self.text_projection(outputs.pooler_output),
        )

    def forward(  # type: ignore[override]
        self,
        pixel_values: Tensor,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        row_index: Tensor | None = None,
        embed_only: bool = False,
    ) -> SSLOutput:
        """Contrast images with texts.

        Args:
            pixel_values: (B, C, H, W), normalised.
            input_ids: (B, L) tokens of the caption of each image, as the method's processor makes them.
            attention_mask: (B, L), 1 = a token, 0 = padding; only for text towers that take one.
            row_index: (B,) rows of the global batch; unused.
            embed_only: return `embeddings` for `loss_from_embeddings`.

        Raises:
            ValueError: there are no texts.
        """
        if input_ids is None:
            raise ValueError(f"{type(self).__name__} needs input_ids: the caption of every image, as tokens")
        embeddings: dict[str, Any] = {
            "image": self.get_image_features(pixel_values).pooler_output,
            "text": self.get_text_features(input_ids, attention_mask).pooler_output,
        }
        return SSLOutput(embeddings=embeddings) if embed_only else self.loss_from_embeddings(embeddings)

    def loss_from_embeddings(self, embeddings: dict[str, Tensor]) -> SSLOutput:
        """Loss of `image` and `text` (B, E)."""
        image_BE, text_BE = embeddings["image"], embeddings["text"]
        return SSLOutput(
            loss=self.contrast(image_BE, text_BE),
            parts={**agreement_of_pairs(image_BE, text_BE), **self.similarity.figures()},
            features=image_BE.detach(),
            projections=image_BE.detach(),
        )

    # Training

    @property
    def loss_couples_the_batch(self) -> bool:
        """Other images' texts are the negatives."""
        return True

    def check_global_batch(self, global_batch_size: int) -> None:
        """Refuse a batch without negatives."""
        if global_batch_size < 2:
            raise ValueError(
                f"{type(self).__name__} needs at least 2 pairs per step, for negatives, got "
                f"{global_batch_size}"
            )

    def freeze_targets(self) -> None:
        """A locked image tower receives no gradient; its head, if it has one, learns."""
        super().freeze_targets()
        if self.config.lock_image_tower:
            self.student.backbone.requires_grad_(False)

    def train(self, mode: bool = True) -> "SSLImageTextForPreTraining":
        """As torch has it; a locked image tower stays in eval mode: neither drop path nor BatchNorm moves."""
        super().train(mode)
        if self.config.lock_image_tower:
            self.student.backbone.eval()
        return self
