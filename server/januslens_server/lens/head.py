"""The logit lens: the model's own final norm and unembedding, applied to any vector."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch

from januslens_server.lens.cpu import TokenBlock, Unembedding, on_free_cores
from januslens_server.specs import LensKind


@dataclass(frozen=True)
class Norm:
    """LayerNorm (`centred`) or RMSNorm with its learned numbers.

    `weight` and `bias` are `[d_model]`, in float32; `weight` is what the normalised vector is
    multiplied by (families that store `weight - 1` add the one in their adapter).
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    eps: float
    centred: bool

    def __call__(self, vectors: torch.Tensor) -> torch.Tensor:
        """Normalised `[..., d_model]`, computed in float32."""
        vectors = vectors.float()
        if self.centred:
            return torch.nn.functional.layer_norm(
                vectors, self.weight.shape, self.weight, self.bias, self.eps
            )
        return vectors * self.inverse_scale(vectors) * self.weight

    def inverse_scale(self, at: torch.Tensor) -> torch.Tensor:
        """1 / the denominator `[..., 1]` that the norm divides `at: [..., d_model]` by."""
        at = at.float()
        variance = (
            at.var(-1, unbiased=False, keepdim=True)
            if self.centred
            else at.square().mean(-1, keepdim=True)
        )
        return torch.rsqrt(variance + self.eps)

    def pull_back(self, direction: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        """J^T direction, J the norm's linear part at `at` with its scale held fixed.

        Shapes `[..., d_model]`. For every part x of `at`: `<J x, direction>` is
        `<x, pull_back(direction)>`.
        """
        pulled = direction.float() * self.weight * self.inverse_scale(at)
        if self.centred:
            pulled = pulled - pulled.mean(-1, keepdim=True)
        return pulled


# Logits of one chunk of rows take at most this many bytes, unless the operator says otherwise.
CHUNK_BYTES = 64 * 2**20
# The Backward Lens authors' guard against dividing by a zero norm (appendix H).
SMALLEST_NORM = 1e-12


@dataclass(frozen=True)
class LensHead:
    """`lens(v) = unembed(final_norm(v))`, everything in float32.

    `bias` is `[vocab]` or None; `logit_scale` multiplies the logits, then `soft_cap` bounds them:
    `cap * tanh(logits / cap)`. `chunk_bytes` of logits are held at once.
    """

    final_norm: Norm
    unembedding: Unembedding
    bias: torch.Tensor | None = None
    logit_scale: float = 1.0
    soft_cap: float | None = None
    chunk_bytes: int = CHUNK_BYTES

    def prepare(self, vectors: torch.Tensor, kind: LensKind) -> torch.Tensor:
        """Vectors `[n, d_model]` of the residual basis as the unembedding takes them."""
        vectors = vectors.float()
        if kind is LensKind.RAW:
            return vectors
        if kind is LensKind.NORMALIZED:
            vectors = vectors / vectors.norm(dim=-1, keepdim=True).clamp_min(SMALLEST_NORM)
        return self.final_norm(vectors)

    def logits(self, prepared: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """Logits `[n, vocab]` of prepared vectors, before the soft-cap; in `out` if it is given."""
        logits = prepared.new_empty(len(prepared), self.unembedding.vocab) if out is None else out
        on_free_cores(partial(self._columns, prepared, logits), self.unembedding.blocks)
        return logits

    def _columns(self, prepared: torch.Tensor, logits: torch.Tensor, block: TokenBlock) -> None:
        """The logits of one block of tokens."""
        columns = logits[:, block.tokens]
        block.logits(prepared, columns)
        if self.bias is not None:
            columns += self.bias[block.tokens]
        if self.logit_scale != 1.0:
            columns *= self.logit_scale

    def cap(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits as the model reports them; its cap saturates, so ranks are taken before."""
        if self.soft_cap is None:
            return logits
        return self.soft_cap * torch.tanh(logits / self.soft_cap)

    def target_logits(self, residual: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Logits `[n]` of `targets` `[n]` before the soft-cap, from the last block's output."""
        rows = self.unembedding.rows(targets)
        logits = (self.final_norm(residual) * rows).sum(-1)
        if self.bias is not None:
            logits = logits + self.bias[targets]
        return logits * self.logit_scale

    def attribution(self, residual: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Directions `[n, d_model]` whose dot product with a part is its logit contribution.

        `residual` `[n, d_model]` is the last block's output, `targets` `[n]` the tokens:
        `logit_scale * <N(part), U_t>`, N the final norm with its scale fixed at `residual`.
        """
        rows = self.unembedding.rows(targets) * self.logit_scale
        return self.final_norm.pull_back(rows, at=residual)

    def attribution_constant(self, targets: torch.Tensor) -> torch.Tensor:
        """The part `[n]` of the targets' logits that comes from the biases of norm and head."""
        constant = torch.zeros(targets.shape, device=self.unembedding.device)
        if self.final_norm.bias is not None:
            constant = constant + self.unembedding.rows(targets) @ self.final_norm.bias
        if self.bias is not None:
            constant = constant + self.bias[targets]
        return constant * self.logit_scale
