"""Measure the arithmetic alone: plain Hugging Face passes, and one product of all rows."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch

from januslens_server.models.resident import ResidentModel


class Floors:
    """Runs the floors of one model, each written without hooks, as in a plain script."""

    def __init__(self, model: ResidentModel) -> None:
        self._model = model

    @cached_property
    def _unembedding(self) -> torch.Tensor:
        """Return the unembedding in float32, as the lens uses it; copies half types on demand."""
        weight: torch.Tensor = self._model.network.get_output_embeddings().get_parameter("weight")
        return weight.detach().float()

    @torch.inference_mode()
    def forward(self, ids: Sequence[int]) -> torch.Tensor:
        """Return the logits `[pos, vocab]` of one prompt."""
        logits: torch.Tensor = self._model.network(
            input_ids=self._batch(ids), use_cache=False
        ).logits[0]
        return logits

    def generate(self, ids: Sequence[int], new: int) -> None:
        """Continue a prompt greedily by `new` tokens, as transformers does."""
        batch = self._batch(ids)
        network: Any = self._model.network
        network.generate(
            batch,
            attention_mask=torch.ones_like(batch),
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
            eos_token_id=None,
        )

    def backward(self, ids: Sequence[int], target: int) -> torch.Tensor:
        """Run a forward pass, and a backward pass to the embedding's output, without weights."""
        network = self._model.network
        with torch.no_grad():
            embedded = network.get_input_embeddings()(self._batch(ids))
        embedded.requires_grad_()
        logits = network(inputs_embeds=embedded, use_cache=False).logits[0, -1].float()
        loss = -logits.log_softmax(-1)[target]
        (gradient,) = torch.autograd.grad(loss, [embedded])
        return gradient

    @torch.inference_mode()
    def product(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the logits of `rows` `[n, d_model]` in one product."""
        return rows @ self._unembedding.T

    def rows(self, count: int) -> torch.Tensor:
        """Return vectors to project, `[count, d_model]`."""
        head = self._unembedding
        random = torch.Generator(head.device).manual_seed(0)
        return torch.randn(count, head.shape[1], generator=random, device=head.device)

    def _batch(self, ids: Sequence[int]) -> torch.Tensor:
        return torch.tensor([list(ids)], device=self._model.device)
