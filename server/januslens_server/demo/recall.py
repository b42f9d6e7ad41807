"""How often the model's next token is the right one."""

from collections.abc import Sequence

import torch

from januslens_server.demo.checkpoint import Checkpoint
from januslens_server.demo.corpus import Prompt


@torch.no_grad()
def predictions(checkpoint: Checkpoint, prompts: Sequence[Prompt]) -> list[int]:
    """The most likely next token of each prompt."""
    predicted = [0] * len(prompts)
    for indices, tokens in checkpoint.batches(prompts):
        best = checkpoint.model(input_ids=tokens).logits[:, -1].argmax(-1).tolist()
        for index, token in zip(indices, best, strict=True):
            predicted[index] = token
    return predicted


def failures(checkpoint: Checkpoint, prompts: Sequence[Prompt]) -> list[Prompt]:
    """The prompts whose next token is wrong."""
    return [
        prompt
        for prompt, token in zip(prompts, predictions(checkpoint, prompts), strict=True)
        if token != checkpoint.answer_id(prompt.answer)
    ]


def accuracy(checkpoint: Checkpoint, prompts: Sequence[Prompt]) -> float:
    """The share of prompts whose next token is the right one."""
    return 1 - len(failures(checkpoint, prompts)) / len(prompts)
