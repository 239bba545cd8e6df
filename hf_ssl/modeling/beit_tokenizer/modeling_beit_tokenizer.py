"""BEiT v2's tokenizer (VQ-KD): discrete codes of patches from which a frozen encoder's features come back.

Source: Peng et al. 2022 (arXiv 2208.06366), section 3.1; compared with the authors' `modeling_vqkd.py` and
`norm_ema_quantizer.py`. Deliberate differences: the decoder has fixed positions and no class token; the
codebook moves once per optimizer step by the hits of all processes; the k-means start is shared; unused codes
start again; without an encoder to distil, codes must give normalised pixels back.
Shape suffixes: B = images, N = patches, D = encoder width, d = width of a code, E = width of the target,
P = pixel values of a patch.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from hf_ssl.modeling.shared.backbone import build_backbone
from hf_ssl.modeling.shared.codebook import share_in_use, usage_of
from hf_ssl.modeling.shared.distributed import all_gather, sum_over_processes, world_size
from hf_ssl.modeling.shared.initialization import set_weight_initialization
from hf_ssl.modeling.shared.losses import full_precision, normalize, patch_loss, without_autocast
from hf_ssl.modeling.shared.outputs import SSLOutput
from hf_ssl.modeling.shared.patches import normalize_patches, patch_grid, patchify
from hf_ssl.modeling.shared.predictor import PatchPredictor
from hf_ssl.modeling.shared.pretraining import SSLForPreTraining, SSLModel, generator_of_step
from hf_ssl.modeling.shared.tokenizer import CODE_TENSORS, VisualTokenizer, patch_features, resized

from .configuration_beit_tokenizer import BEiTTokenizerConfig


class BEiTTokenizerModel(SSLModel):
    """The encoder before its codes; `BEiTTokenizerForPreTraining.tokens` gives these."""

    config_class = BEiTTokenizerConfig


class BEiTTokenizerDecoder(PatchPredictor):
    """Transformer over codes that predicts what stands for each patch."""

    def __init__(self, config: BEiTTokenizerConfig, output_size: int) -> None:
        encoder = config.encoder_config
        width = encoder.hidden_size
        super().__init__(
            encoder,
            width,
            config.decoder_num_hidden_layers,
            encoder.num_attention_heads,
            output_size=width,
            input_size=config.code_size,
            has_mask_token=False,
        )
        self.last = nn.Sequential(nn.Tanh(), nn.Linear(width, output_size))
        set_weight_initialization(self.last, "trunc_normal")

    def forward(self, codes_BNd: Tensor, grid: tuple[int, int]) -> Tensor:
        """Predictions (B, N, E)."""
        tokens = self.embed(codes_BNd.to(self.embed.weight.dtype)) + self.positions(grid)
        return self.last(self.predict(self.layernorm(self.layers.run(tokens)[0][-1])))


class BEiTTokenizerForPreTraining(SSLForPreTraining):
    """Encoder, codebook, decoder, the frozen encoder that is distilled, and both losses."""

    config_class = BEiTTokenizerConfig
    _keep_in_fp32_modules_strict = [CODE_TENSORS, r"^distiller\..+(?<!num_batches_tracked)$"]
    config: BEiTTokenizerConfig
    student: VisualTokenizer

    def __init__(self, config: BEiTTokenizerConfig) -> None:
        super().__init__(config)
        encoder, distiller = config.encoder_config, config.distiller()
        self.student = VisualTokenizer(encoder, config.num_codes, config.code_size)
        self.distiller = None if distiller is None else build_backbone(distiller)
        pixels = encoder.num_channels * encoder.patch_size**2
        output_size = pixels if self.distiller is None else self.distiller.hidden_size
        self.decoder = BEiTTokenizerDecoder(config, output_size)
        self._step = (0, 0)
        self._may_start = config.kmeans_start  # asking the codebook would wait for the GPU in every step
        self.finish_construction()
        self.train(self.training)

    def train(self, mode: bool = True) -> "BEiTTokenizerForPreTraining":
        """The encoder distilled stays in eval mode."""
        super().train(mode)
        if self.distiller is not None:
            self.distiller.eval()
        return self

    def freeze_targets(self) -> None:
        """The encoder distilled makes targets only."""
        super().freeze_targets()
        if self.distiller is not None:
            self.distiller.requires_grad_(False)

    def tokens(self, pixel_values: Tensor) -> Tensor:
        """Index of the code of every patch (B, N) int64 of images (B, C, H, W)."""
        return self.student.tokens(pixel_values)

    # The step

    def begin_step(self, step: int, total_steps: int, seed: int = 0) -> None:
        """What is drawn depends on (seed, step) alone."""
        self._step = (seed, step)

    def prepare_step(self, batches: list[dict[str, Tensor]]) -> None:
        """Start the codes at the centres of the first step's vectors."""
        codebook = self.student.head.codebook
        may_start, self._may_start = self._may_start, False
        if not may_start or bool(codebook.has_started):
            return
        vectors = torch.cat([self.student.vectors(batch["pixel_values"]) for batch in batches])
        vectors_Rd = _in_row_order(vectors, len(batches)).flatten(0, 1)
        codebook.start(vectors_Rd, generator_of_step(*self._step))

    def end_step(self, updates: list[dict[str, Tensor]]) -> None:
        """Move the codes by all hits of the step; now and then put unused ones onto vectors of the step."""
        if not updates or not updates[0]:
            return
        codebook = self.student.head.codebook
        hits_K = sum_over_processes(torch.stack([update["hits"] for update in updates]).sum(dim=0))
        sums_Kd = sum_over_processes(torch.stack([update["sums"] for update in updates]).sum(dim=0))
        codebook.update(hits_K, sums_Kd, self.config.codebook_momentum)
        every, (seed, step) = self.config.restart_every, self._step
        if every and (step + 1) % every == 0:
            candidates_Rd = _in_row_order(
                torch.cat([update["candidates"] for update in updates]), len(updates)
            )
            codebook.restart(candidates_Rd, generator_of_step(seed, step))

    # The loss

    def forward(self, pixel_values: Tensor, row_index: Tensor | None = None) -> SSLOutput:
        """Code all patches and decode them.

        Args:
            pixel_values: (B, C, H, W), normalised.
            row_index: (B,) rows of the global batch.

        Returns:
            `loss`: 1 - cosine with the encoder distilled, or the squared error of normalised pixels, and the
            commitment. `parts`: both, `loss_of_mean` (of the best constant guess, which the first must beat),
            `token_entropy`, `perplexity`, `code_usage`. `predictions` (B, N, P) of pixels, in units of the
            normalised targets, None while training and where an encoder is distilled; `is_masked` (B, N), all
            of them: the decoder sees codes alone.
        """
        grid = patch_grid(pixel_values, self.config.encoder_config.patch_size)
        vectors_BNd = self.student.vectors(pixel_values)
        codebook = self.student.head.codebook
        codes_Md, index_M, commitment = codebook(vectors_BNd.flatten(0, 1))
        predictions = self.decoder(codes_Md.view(vectors_BNd.shape), grid)
        targets = self._targets(pixel_values)
        reconstruction = self._reconstruction(predictions, targets)
        with torch.no_grad():
            mean = self._best_constant(targets)
            parts = {
                "reconstruction_loss": reconstruction.detach(),
                "commitment_loss": commitment.detach(),
                "loss_of_mean": self._reconstruction(mean.expand_as(targets), targets),
                **usage_of(index_M, self.config.num_codes),
                "code_usage": share_in_use(codebook),
            }
            updates = codebook.assigned(vectors_BNd.flatten(0, 1), index_M)
            updates["candidates"] = _one_of_each(vectors_BNd.detach(), row_index)
        return SSLOutput(
            loss=reconstruction + self.config.commitment_weight * commitment,
            parts=parts,
            features=vectors_BNd.detach().mean(dim=1),
            predictions=None if self.training or self.distiller is not None else predictions.detach(),
            is_masked=torch.ones(vectors_BNd.shape[:2], dtype=torch.bool, device=vectors_BNd.device),
            updates=updates,
        )

    @torch.no_grad()
    def _targets(self, pixel_values: Tensor) -> Tensor:
        """What stands for each patch (B, N, E)."""
        if self.distiller is None:
            return normalize_patches(patchify(pixel_values, self.config.encoder_config.patch_size))
        side = int(self.distiller.config.image_size)
        targets = full_precision(patch_features(self.distiller, resized(pixel_values, side)))
        num_patches = math.prod(patch_grid(pixel_values, self.config.encoder_config.patch_size))
        if targets.shape[1] != num_patches:
            raise ValueError(
                f"the encoder distilled has {targets.shape[1]} places and the tokenizer {num_patches} "
                "patches; set image_size and patch_size so that both have as many"
            )
        return targets

    def _reconstruction(self, predictions: Tensor, targets: Tensor) -> Tensor:
        if self.distiller is None:
            return patch_loss(predictions, targets)
        return cosine_distance(predictions, targets)

    def _best_constant(self, targets: Tensor) -> Tensor:
        directions = targets if self.distiller is None else normalize(targets)
        return directions.mean(dim=(0, 1), keepdim=True)

    def expectations(self, num_images: int = 256) -> dict[str, float]:
        """The reconstruction of unrelated directions, and of normalised pixels guessed as zero."""
        return {"reconstruction_at_start": 1.0}


def cosine_distance(predictions_BNE: Tensor, targets_BNE: Tensor) -> Tensor:
    """Mean of 1 - cosine over all patches."""
    with without_autocast(predictions_BNE):
        cosine_BN = (normalize(predictions_BNE) * normalize(targets_BNE)).sum(dim=-1)
        return (1 - cosine_BN).mean()


def _one_of_each(vectors_BNd: Tensor, row_index: Tensor | None) -> Tensor:
    """One patch of every image (B, d), another place from row to row."""
    rows = torch.arange(len(vectors_BNd), device=vectors_BNd.device) if row_index is None else row_index
    place_B11 = (rows % vectors_BNd.shape[1])[:, None, None].expand(-1, 1, vectors_BNd.shape[2])
    return vectors_BNd.gather(1, place_B11)[:, 0]


def _in_row_order(x: Tensor, num_micro_batches: int) -> Tensor:
    """Rows of all processes, which each hold micro-batch after micro-batch, as those of the global batch."""
    gathered: Any = all_gather(x).unflatten(0, (world_size(), num_micro_batches, -1))
    return gathered.transpose(0, 1).flatten(0, 2)
