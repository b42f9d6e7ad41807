"""The logit lens: the model's own final norm and unembedding, applied to any vector."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch

from januslens_server.lens.cpu import on_free_cores
from januslens_server.lens.merge import Merge
from januslens_server.lens.norm import Norm
from januslens_server.lens.unembedding import TokenBlock, Unembedding
from januslens_server.specs import LensKind

# Default maximum bytes of the logits of one chunk of rows.
CHUNK_BYTES = 64 * 2**20
# Lower bound of a norm that vectors are divided by (Backward Lens, appendix H).
SMALLEST_NORM = 1e-12


@dataclass(frozen=True)
class LensHead:
    """The logit lens `lens(v) = unembed(final_norm(merge(v)))`, computed in float32.

    `merge` is None if the final norm reads the residual stream itself. `bias` is `[vocab]` or None.
    `logit_scale` multiplies the logits; then `soft_cap` bounds them: `cap * tanh(logits / cap)`. At
    most `chunk_bytes` of logits are in memory at once.
    """

    final_norm: Norm
    unembedding: Unembedding
    bias: torch.Tensor | None = None
    logit_scale: float = 1.0
    soft_cap: float | None = None
    chunk_bytes: int = CHUNK_BYTES
    merge: Merge | None = None

    def prepare(self, vectors: torch.Tensor, kind: LensKind) -> torch.Tensor:
        """Prepare vectors for the unembedding, according to the kind of lens.

        They are vectors of the residual stream `[n, streams * d_model]`, or `[n, d_model]` in a
        model with several streams: these are merged already.
        """
        vectors = vectors.float()
        if kind is LensKind.RAW:
            return (
                vectors if vectors.shape[-1] == self.unembedding.d_model else self._merged(vectors)
            )
        if kind is LensKind.NORMALIZED:
            vectors = vectors / vectors.norm(dim=-1, keepdim=True).clamp_min(SMALLEST_NORM)
        return self.normed(vectors)

    def normed(self, residual: torch.Tensor) -> torch.Tensor:
        """Return what the head reads `[..., d_model]`, given vectors as `prepare` takes them."""
        return self.final_norm(self._merged(residual))

    def of_all_streams(self, gradients: torch.Tensor) -> torch.Tensor:
        """Return gradients `[n, d_model]` with respect to a vector that is added to every stream.

        `gradients` `[n, streams * d_model]` are those with respect to the residual stream.
        """
        divided: torch.Tensor = gradients.unflatten(-1, (-1, self.unembedding.d_model))
        return divided.sum(-2)

    def _merged(self, residual: torch.Tensor) -> torch.Tensor:
        """Return what the final norm reads."""
        if self.merge is None:
            return residual
        whole = residual.shape[-1] == self.merge.streams * self.unembedding.d_model
        return self.merge(residual) if whole else residual

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

        `residual` `[n, streams * d_model]` is the last block's output.
        """
        rows = self.unembedding.rows(targets)
        logits = (self.normed(residual) * rows).sum(-1)
        if self.bias is not None:
            logits = logits + self.bias[targets]
        return logits * self.logit_scale

    def attribution(self, residual: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return directions whose dot products with parts of `residual` are logit contributions.

        `residual` `[n, streams * d_model]` is the last block's output, and `targets` `[n]` are
        tokens t; the directions have the shape of `residual`. The contribution is `logit_scale *
        <N(part), U_t>`, where N is the linear part of merge and final norm with its scales and
        weights fixed at `residual`.
        """
        rows = self.unembedding.rows(targets) * self.logit_scale
        pulled = self.final_norm.pull_back(rows, at=self._merged(residual))
        return pulled if self.merge is None else self.merge.pull_back(pulled, at=residual)

    def attribution_constant(self, residual: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return the contribution `[n]` of all biases to the targets' logits.

        These are the biases of merge, norm and head; `residual` is as in `attribution`.
        """
        constant = torch.zeros(targets.shape, device=self.unembedding.device)
        rows = self.unembedding.rows(targets)
        if self.final_norm.bias is not None:
            constant = constant + rows @ self.final_norm.bias
        if self.bias is not None:
            constant = constant + self.bias[targets]
        added = None if self.merge is None else self.merge.constant(residual)
        if added is not None:
            pulled = self.final_norm.pull_back(rows, at=self._merged(residual))
            constant = constant + (added * pulled).sum(-1)
        return constant * self.logit_scale
