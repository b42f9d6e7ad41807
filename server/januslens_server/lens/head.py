"""The logit lens: the model's own final norm and unembedding, applied to any vector."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch

from januslens_server.lens.cpu import on_free_cores
from januslens_server.lens.unembedding import TokenBlock, Unembedding
from januslens_server.specs import LensKind


@dataclass(frozen=True)
class Norm:
    """LayerNorm (`centred`) or RMSNorm, with its learned parameters.

    `weight` and `bias` are `[d_model]`, in float32. The normalised vector is multiplied by
    `weight`; for families that store `weight - 1`, the adapter adds the 1.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    eps: float
    centred: bool

    def __call__(self, vectors: torch.Tensor) -> torch.Tensor:
        """Return the normalised vectors `[..., d_model]`, computed in float32."""
        vectors = vectors.float()
        if self.centred:
            return torch.nn.functional.layer_norm(
                vectors, self.weight.shape, self.weight, self.bias, self.eps
            )
        return vectors * self.inverse_scale(vectors) * self.weight

    def inverse_scale(self, at: torch.Tensor) -> torch.Tensor:
        """Return 1 / the norm's denominator `[..., 1]` for vectors `at` `[..., d_model]`."""
        at = at.float()
        variance = (
            at.var(-1, unbiased=False, keepdim=True)
            if self.centred
            else at.square().mean(-1, keepdim=True)
        )
        return torch.rsqrt(variance + self.eps)

    def pull_back(self, direction: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        """Return J^T direction, where J is the norm's linear part with its scale fixed at `at`.

        All shapes are `[..., d_model]`. For every part x of `at`, `<J x, direction>` equals
        `<x, pull_back(direction)>`.
        """
        pulled = direction.float() * self.weight * self.inverse_scale(at)
        if self.centred:
            pulled = pulled - pulled.mean(-1, keepdim=True)
        return pulled


@dataclass(frozen=True)
class NoNorm(Norm):
    """The identity, for models whose head reads the last block's output itself."""

    @classmethod
    def of_width(cls, width: int, device: torch.device) -> NoNorm:
        """Return the identity on vectors `[..., width]`."""
        return cls(torch.ones(width, device=device), None, eps=0.0, centred=False)

    def inverse_scale(self, at: torch.Tensor) -> torch.Tensor:
        """Return ones `[..., 1]`."""
        return torch.ones_like(at[..., :1], dtype=torch.float32)


# Default maximum bytes of the logits of one chunk of rows.
CHUNK_BYTES = 64 * 2**20
# Lower bound of a norm that vectors are divided by (Backward Lens, appendix H).
SMALLEST_NORM = 1e-12


@dataclass(frozen=True)
class LensHead:
    """The logit lens `lens(v) = unembed(final_norm(v))`, computed in float32.

    `bias` is `[vocab]` or None. `logit_scale` multiplies the logits; then `soft_cap` bounds them:
    `cap * tanh(logits / cap)`. At most `chunk_bytes` of logits are in memory at once.
    """

    final_norm: Norm
    unembedding: Unembedding
    bias: torch.Tensor | None = None
    logit_scale: float = 1.0
    soft_cap: float | None = None
    chunk_bytes: int = CHUNK_BYTES

    def prepare(self, vectors: torch.Tensor, kind: LensKind) -> torch.Tensor:
        """Prepare vectors `[n, d_model]` for the unembedding, according to the kind of lens."""
        vectors = vectors.float()
        if kind is LensKind.RAW:
            return vectors
        if kind is LensKind.NORMALIZED:
            vectors = vectors / vectors.norm(dim=-1, keepdim=True).clamp_min(SMALLEST_NORM)
        return self.final_norm(vectors)

    def logits(self, prepared: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """Return logits `[n, vocab]` of prepared vectors before the soft-cap, in `out` if given."""
        logits = prepared.new_empty(len(prepared), self.unembedding.vocab) if out is None else out
        on_free_cores(partial(self._columns, prepared, logits), self.unembedding.blocks)
        return logits

    def _columns(self, prepared: torch.Tensor, logits: torch.Tensor, block: TokenBlock) -> None:
        """Compute the logits of one block of tokens."""
        columns = logits[:, block.tokens]
        block.logits(prepared, columns)
        if self.bias is not None:
            columns += self.bias[block.tokens]
        if self.logit_scale != 1.0:
            columns *= self.logit_scale

    def cap(self, logits: torch.Tensor) -> torch.Tensor:
        """Apply the soft-cap, which maps large logits to equal ones; compute ranks before it."""
        if self.soft_cap is None:
            return logits
        return self.soft_cap * torch.tanh(logits / self.soft_cap)

    def target_logits(self, residual: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return the logits `[n]` of `targets` `[n]` before the soft-cap.

        `residual` `[n, d_model]` is the last block's output.
        """
        rows = self.unembedding.rows(targets)
        logits = (self.final_norm(residual) * rows).sum(-1)
        if self.bias is not None:
            logits = logits + self.bias[targets]
        return logits * self.logit_scale

    def attribution(self, residual: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return directions `[n, d_model]` whose dot products with parts are logit contributions.

        `residual` `[n, d_model]` is the last block's output, and `targets` `[n]` are tokens t. The
        contribution is `logit_scale * <N(part), U_t>`, where N is the linear part of the final norm
        with its scale fixed at `residual`.
        """
        rows = self.unembedding.rows(targets) * self.logit_scale
        return self.final_norm.pull_back(rows, at=residual)

    def attribution_constant(self, targets: torch.Tensor) -> torch.Tensor:
        """Return the contribution `[n]` of the biases of norm and head to the targets' logits."""
        constant = torch.zeros(targets.shape, device=self.unembedding.device)
        if self.final_norm.bias is not None:
            constant = constant + self.unembedding.rows(targets) @ self.final_norm.bias
        if self.bias is not None:
            constant = constant + self.bias[targets]
        return constant * self.logit_scale
