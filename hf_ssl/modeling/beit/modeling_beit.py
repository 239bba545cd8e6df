"""BEiT: predict the visual tokens of hidden patches.

Source: Bao et al. 2021 (arXiv 2106.08254), section 2, and Peng et al. 2022 (2208.06366); compared with the
authors' `modeling_pretrain.py`, `masking_generator.py` and `engine_for_pretraining.py`. Deliberate
differences: the mask of an image depends on (seed, step, row) alone; encoder and tokenizer see one view,
resized where the tokenizer has another image size; the class-token branch of version 2 is left out.
Shape suffixes: B = images, N = patches, M = hidden patches of all images, D = encoder width.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_ssl.modeling.shared.backbone import build_backbone
from hf_ssl.modeling.shared.codebook import usage_of
from hf_ssl.modeling.shared.initialization import set_weight_initialization
from hf_ssl.modeling.shared.losses import full_precision, without_autocast
from hf_ssl.modeling.shared.masks import block_mask, fill_up, generator_of_row
from hf_ssl.modeling.shared.outputs import SSLOutput
from hf_ssl.modeling.shared.patches import patch_grid
from hf_ssl.modeling.shared.pretraining import SSLForPreTraining, SSLModel
from hf_ssl.modeling.shared.tokenizer import VisualTokenizer, resized

from .configuration_beit import BEiTConfig

CUT_STD = 0.0108  # of weights drawn with std 0.02 and cut at one std


class BEiTModel(SSLModel):
    """The encoder on whole images; nothing is hidden."""

    config_class = BEiTConfig


class BEiTBranch(nn.Module):
    """Encoder, and the layer that tells tokens apart (lm_head)."""

    def __init__(self, config: BEiTConfig) -> None:
        super().__init__()
        self.backbone = build_backbone(config.backbone_config)
        self.head = nn.Linear(self.backbone.hidden_size, config.vocab_size)
        set_weight_initialization(self.head, config.encoder_config.weight_initialization)


class BEiTForPreTraining(SSLForPreTraining):
    """Encoder, token head, the frozen tokenizer and the loss."""

    config_class = BEiTConfig
    _keep_in_fp32_modules_strict = [r"^tokenizer\.(?!.*(num_batches_tracked|has_started)$)"]
    # As `get_parameter_groups` of the authors' optim_factory.py.
    undecayed = ("cls_token", "position_embeddings")
    config: BEiTConfig
    student: BEiTBranch

    def __init__(self, config: BEiTConfig) -> None:
        super().__init__(config)
        self.student = BEiTBranch(config)
        self.tokenizer = VisualTokenizer(config.tokenizer_backbone(), config.vocab_size, config.code_size)
        self._step = (0, 0)
        self.finish_construction()
        self.train(self.training)

    def train(self, mode: bool = True) -> "BEiTForPreTraining":
        """The tokenizer stays in eval mode: its codes stand still."""
        super().train(mode)
        self.tokenizer.eval()
        return self

    def freeze_targets(self) -> None:
        """The tokenizer makes targets only."""
        super().freeze_targets()
        self.tokenizer.requires_grad_(False)

    @torch.no_grad()
    def take_tokenizer(self, source: VisualTokenizer) -> None:
        """Copy a tokenizer that was trained.

        Raises:
            ValueError: it is not the one that `tokenizer_config` describes.
        """
        try:
            self.tokenizer.load_state_dict(source.state_dict())
        except RuntimeError as error:
            raise ValueError(f"the tokenizer is not as tokenizer_config says: {error}") from error

    def tokens(self, pixel_values: Tensor) -> Tensor:
        """The tokenizer's tokens (B, N) int64 of images (B, C, H, W)."""
        return self.tokenizer.tokens(resized(pixel_values, int(self.tokenizer.backbone.config.image_size)))

    @torch.no_grad()
    def name_tokens(self, pixel_values: Tensor, bool_masked_pos: Tensor) -> Tensor:
        """The most likely token of every patch (B, N) int64, where `bool_masked_pos` (B, N) are hidden."""
        return self.student.head(self._patches(pixel_values, bool_masked_pos)[1]).argmax(dim=-1)

    def _patches(self, pixel_values: Tensor, bool_masked_pos: Tensor) -> tuple[Tensor, Tensor]:
        """All tokens of the encoder (B, T, D), and those of patches (B, N, D)."""
        states = self.student.backbone(pixel_values, bool_masked_pos=bool_masked_pos).last_hidden_state
        return states, states[:, self.config.encoder_config.num_prefix_tokens :]

    def begin_step(self, step: int, total_steps: int, seed: int = 0) -> None:
        """Masks of a step depend on (seed, step) and the row alone."""
        self._step = (seed, step)

    @torch.compiler.disable  # numbers of Python's generator, which cannot be traced
    def draw_masks(self, row_index: Tensor, grid: tuple[int, int], seed: tuple[int, int]) -> Tensor:
        """Masks (B, N) bool, True = hidden.

        Args:
            row_index: (B,) rows of the global batch.
            grid: (rows, columns) of patches.
            seed: the run's seed and the step.
        """
        config = self.config
        count = config.num_hidden_patches(grid[0] * grid[1])
        masks = []
        for row in row_index.tolist():
            generator = generator_of_row(*seed, row)
            largest = config.max_block_patches or count
            mask = block_mask(grid, count, config.min_block_patches, largest, generator)
            masks.append((fill_up(mask, count, generator) if config.exact_mask else mask).flatten())
        return torch.stack(masks)

    def forward(
        self,
        pixel_values: Tensor,
        row_index: Tensor | None = None,
        bool_masked_pos: Tensor | None = None,
        tokens: Tensor | None = None,
    ) -> SSLOutput:
        """Predict the tokens of hidden patches.

        Args:
            pixel_values: (B, C, H, W), normalised as the tokenizer wants it.
            row_index: (B,) rows of the global batch, which choose the masks of the step.
            bool_masked_pos: (B, N) bool, masks to use instead, True = hidden.
            tokens: (B, N) int64, tokens to predict instead of the tokenizer's.

        Returns:
            `loss` in nats, the mean over all hidden patches, about ln V at the start; `parts`: `accuracy`,
            `token_entropy` (the best loss of who knows only how frequent tokens are), `perplexity`;
            `is_masked` (B, N).
        """
        grid = patch_grid(pixel_values, self.config.encoder_config.patch_size)
        is_masked_BN = self._choose_masks(pixel_values, grid, row_index, bool_masked_pos)
        if tokens is None:
            tokens = self.tokens(pixel_values)
        states, patches_BND = self._patches(pixel_values, is_masked_BN)
        logits_MV = self.student.head(patches_BND[is_masked_BN])
        wanted_M = tokens[is_masked_BN]
        with without_autocast(logits_MV):
            loss = F.cross_entropy(full_precision(logits_MV), wanted_M)
        accuracy = (logits_MV.detach().argmax(dim=1) == wanted_M).float().mean()
        return SSLOutput(
            loss=loss,
            parts={"accuracy": accuracy, **usage_of(tokens, self.config.vocab_size)},
            features=states.detach().mean(dim=1),
            is_masked=is_masked_BN,
        )

    def _choose_masks(
        self,
        pixel_values: Tensor,
        grid: tuple[int, int],
        row_index: Tensor | None,
        bool_masked_pos: Tensor | None,
    ) -> Tensor:
        if bool_masked_pos is not None:
            return bool_masked_pos
        seed = self._step
        if row_index is None:
            row_index, seed = torch.arange(len(pixel_values)), (int(torch.randint(2**31, ())), 0)
        return self.draw_masks(row_index, grid, seed).to(pixel_values.device)

    def expectations(self, num_images: int = 256) -> dict[str, float]:
        """Loss of a fresh head on normed tokens, and of one that prefers no token."""
        log_v = math.log(self.config.vocab_size)
        spread = self.config.encoder_config.hidden_size * CUT_STD**2 / 2
        return {"loss_at_start": log_v + spread, "loss_of_uniform": log_v}
