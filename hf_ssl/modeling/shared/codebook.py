"""A codebook of unit vectors that follows what is assigned to it, without gradient.

Sources: van den Oord et al. 2017 (arXiv 1711.00937), appendix A.1; Peng et al. 2022 (arXiv 2208.06366),
section 3.1, compared with the authors' `norm_ema_quantizer.py`. Deliberate differences: the k-means start is
the same in all processes; codes that are hardly used start again at vectors of the step. All in at least
float32: in half precision distances tie.
Shape suffixes: M = vectors, K = codes, d = width of a code.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from hf_ssl.modeling.shared.losses import full_precision, normalize, without_autocast

KMEANS_ITERATIONS = 10
MOST_SCORES = 2**26  # at a time
LEAST_USE = 0.01  # of its even share; a code below it is not in use


class Codebook(nn.Module):
    """Unit codes; their use and whether they have started are training state too, and are saved.

    Args:
        num_codes: K.
        code_size: d.
    """

    vectors: Tensor
    cluster_size: Tensor
    has_started: Tensor

    def __init__(self, num_codes: int, code_size: int) -> None:
        super().__init__()
        self.register_buffer("vectors", torch.empty(num_codes, code_size, dtype=torch.float32))
        self.register_buffer("cluster_size", torch.empty(num_codes, dtype=torch.float32))
        self.register_buffer("has_started", torch.empty(1, dtype=torch.bool))
        self.initialize_parameters()

    def initialize_parameters(self) -> None:
        """Random unit vectors until `start`."""
        init.copy_(self.vectors, F.normalize(torch.randn_like(self.vectors), dim=1))
        init.zeros_(self.cluster_size)
        init.copy_(self.has_started, torch.zeros_like(self.has_started))

    @torch.no_grad()
    def nearest(self, vectors_Md: Tensor) -> Tensor:
        """Index (M,) int64 of the nearest code: of unit vectors the one of the largest cosine."""
        with without_autocast(vectors_Md):
            return nearest_rows(full_precision(vectors_Md), self.vectors)

    def forward(self, vectors_Md: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Put every vector onto its code; changes no state.

        Args:
            vectors_Md: of any length but 0.

        Returns:
            The codes (M, d), whose gradient is that of the unit vectors; indices (M,); and the commitment
            loss, the mean squared difference of unit vectors and codes over all M d values.
        """
        unit_Md = normalize(vectors_Md)
        index_M = self.nearest(unit_Md.detach())
        code_Md = self.vectors.to(unit_Md.dtype)[index_M]
        with without_autocast(unit_Md):
            commitment = F.mse_loss(unit_Md, code_Md)
        return unit_Md + (code_Md - unit_Md).detach(), index_M, commitment

    @torch.no_grad()
    def assigned(self, vectors_Md: Tensor, index_M: Tensor) -> dict[str, Tensor]:
        """What `update` adds up over a step: `hits` (K,) and `sums` (K, d) of unit vectors by code."""
        unit_Md = normalize(vectors_Md)
        hits_K = unit_Md.new_zeros(len(self.vectors)).index_add_(0, index_M, unit_Md.new_ones(len(index_M)))
        sums_Kd = torch.zeros_like(self.vectors, dtype=unit_Md.dtype).index_add_(0, index_M, unit_Md)
        return {"hits": hits_K, "sums": sums_Kd}

    @torch.no_grad()
    def update(self, hits: Tensor, sums: Tensor, momentum: float) -> None:
        """Move codes towards the mean direction of what was `assigned` to them; others stay."""
        means_Kd = torch.where(hits[:, None] > 0, F.normalize(sums, dim=1), self.vectors)
        self.vectors.copy_(
            F.normalize(self.vectors.lerp(means_Kd.to(self.vectors.dtype), 1 - momentum), dim=1)
        )
        self.cluster_size.lerp_(hits.to(self.cluster_size.dtype), 1 - momentum)

    @torch.no_grad()
    def start(self, vectors_Md: Tensor, generator: torch.Generator) -> None:
        """Take the centres of the first vectors, once.

        Args:
            vectors_Md: unit vectors of all processes, equal in each.
            generator: on the CPU, the same in every process.
        """
        num_codes, num_vectors = len(self.vectors), len(vectors_Md)
        order = torch.randperm(num_vectors, generator=generator).to(vectors_Md.device)
        first_K = order.repeat(-(-num_codes // num_vectors))[:num_codes]
        means_Kd, sizes_K = cosine_kmeans(vectors_Md, vectors_Md[first_K])
        self.vectors.copy_(means_Kd)
        self.cluster_size.copy_(sizes_K)
        self.has_started.fill_(True)

    @torch.no_grad()
    def restart(self, candidates_Rd: Tensor, generator: torch.Generator) -> None:
        """Put codes that are not in use onto candidates, as far as those suffice.

        Args:
            candidates_Rd: unit vectors of the step, equal in every process.
            generator: on the CPU, the same in every process.
        """
        even = self.cluster_size.mean()
        unused = (self.cluster_size <= LEAST_USE * even).nonzero().flatten()
        chosen = torch.randperm(len(candidates_Rd), generator=generator)[: len(unused)]
        unused = unused[: len(chosen)]
        self.vectors[unused] = candidates_Rd[chosen.to(candidates_Rd.device)].to(self.vectors.dtype)
        self.cluster_size[unused] = even


@torch.no_grad()
def nearest_rows(vectors_Md: Tensor, codes_Kd: Tensor) -> Tensor:
    """Index (M,) of the code with the largest product, a part of the rows at a time."""
    rows = max(MOST_SCORES // len(codes_Kd), 1)
    codes_dK = codes_Kd.to(vectors_Md.dtype).T
    return torch.cat([(part @ codes_dK).argmax(dim=1) for part in vectors_Md.split(rows)])


def cosine_kmeans(
    vectors_Md: Tensor, means_Kd: Tensor, iterations: int = KMEANS_ITERATIONS
) -> tuple[Tensor, Tensor]:
    """Centres of unit vectors on the sphere.

    Args:
        vectors_Md: unit vectors.
        means_Kd: unit vectors to start from.
        iterations: assignments followed by means; a centre without vectors keeps its place.

    Returns:
        The centres (K, d) and how many vectors the last assignment gave each (K,).
    """
    sizes_K = means_Kd.new_zeros(len(means_Kd))
    for _ in range(iterations):
        index_M = nearest_rows(vectors_Md, means_Kd)
        sizes_K = torch.bincount(index_M, minlength=len(means_Kd)).to(means_Kd.dtype)
        sums_Kd = torch.zeros_like(means_Kd).index_add_(0, index_M, vectors_Md)
        means_Kd = torch.where(sizes_K[:, None] > 0, F.normalize(sums_Kd, dim=1), means_Kd)
    return means_Kd, sizes_K


@torch.no_grad()
def usage_of(index: Tensor, num_codes: int) -> dict[str, Tensor]:
    """How many codes the indices (any shape) use as if evenly, `perplexity`, and its logarithm in nats."""
    ones = torch.ones(index.numel(), device=index.device)
    share_K = ones.new_zeros(num_codes).index_add_(0, index.flatten(), ones) / index.numel()
    entropy = torch.special.entr(share_K).sum()
    return {"token_entropy": entropy, "perplexity": entropy.exp()}


def share_in_use(codebook: Codebook) -> Tensor:
    """Share of codes that get 1 % of their even share or more."""
    return (codebook.cluster_size > LEAST_USE * codebook.cluster_size.mean()).float().mean()
