"""A demo model folder, loaded for measuring, and the batches of prompts it is measured on."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, GPT2LMHeadModel, PreTrainedTokenizerBase

from januslens_server.demo.corpus import FactPrompt, Prompt

BATCH = 256


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A trained model, computing in float32 whatever its weights are stored in."""

    model: GPT2LMHeadModel
    tokenizer: PreTrainedTokenizerBase

    @classmethod
    def load(cls, folder: Path) -> "Checkpoint":
        """Load a folder as any user would, with plain transformers."""
        model = GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32)
        return cls(model, AutoTokenizer.from_pretrained(folder))

    def ff2s(self) -> list[nn.Module]:
        """Every layer's second MLP matrix, from the bottom."""
        return [block.get_submodule("mlp.c_proj") for block in self.model.transformer.h]

    def encode(self, text: str) -> list[int]:
        """Token ids of a text."""
        ids: list[int] = self.tokenizer(text)["input_ids"]
        return ids

    def answer_id(self, answer: str) -> int:
        """The one token that an answer is; its leading space belongs to it."""
        ids = self.encode(f" {answer}")
        if len(ids) != 1:
            raise ValueError(f"expected {answer!r} to be one token, got {len(ids)}")
        return ids[0]

    def last_subject_position(self, prompt: FactPrompt) -> int:
        """The position of the last token of a prompt's subject."""
        end = prompt.text.index(prompt.fact.subject) + len(prompt.fact.subject)
        return len(self.encode(prompt.text[:end])) - 1

    def batches(self, prompts: Sequence[Prompt]) -> Iterator[tuple[list[int], Tensor]]:
        """Prompts of equal length together, so that none needs padding.

        Yields:
            The prompts' indices and their token ids `[batch, pos]`.
        """
        by_length: defaultdict[int, list[tuple[int, list[int]]]] = defaultdict(list)
        for index, prompt in enumerate(prompts):
            ids = self.encode(prompt.text)
            by_length[len(ids)].append((index, ids))
        for group in by_length.values():
            for start in range(0, len(group), BATCH):
                indices, rows = zip(*group[start : start + BATCH], strict=True)
                yield list(indices), torch.tensor(rows)
