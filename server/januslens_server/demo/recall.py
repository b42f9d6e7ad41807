"""How often the model's next token is the right one."""

from collections.abc import Iterator, Sequence

import torch

from januslens_server.demo.checkpoint import Checkpoint
from januslens_server.demo.corpus import Prompt, documents
from januslens_server.demo.tokenizer import END_OF_TEXT


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


def after_other_documents(
    checkpoint: Checkpoint, prompts: Sequence[Prompt], seed: int
) -> list[Prompt]:
    """The prompts, each preceded by as many documents as the model's context holds."""
    stream = documents(seed)
    return [_fill_context(checkpoint, prompt, stream) for prompt in prompts]


def _fill_context(checkpoint: Checkpoint, prompt: Prompt, stream: Iterator[str]) -> Prompt:
    text = prompt.text
    for document in stream:
        longer = f"{document}{END_OF_TEXT}{text}"
        if len(checkpoint.encode(longer)) > checkpoint.model.config.n_positions:
            break
        text = longer
    return Prompt(text, prompt.answer)
