"""Train the demo model: `python -m demo_training.train [--out DIR] [--steps N]`.

Training uses one thread and fixed seeds, and takes some minutes. With other thread counts or
releases of torch the weights differ in their last bits. So the weights are committed, and
`evaluate` checks the model's behaviour.
"""

import argparse
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from demo_training.corpus import documents
from demo_training.tokenizer import END_OF_TEXT_ID, build_tokenizer, save_tokenizer
from januslens_server.demo import model_path

SEED = 0
REPORT_EVERY = 100


@dataclass(frozen=True, slots=True)
class Recipe:
    """Sizes and hyper-parameters of the model and its training."""

    n_layers: int = 4
    d_model: int = 128
    n_heads: int = 4
    n_positions: int = 96
    # About 1 / sqrt(d_model). With the usual 0.02, such a narrow model learns too slowly at first.
    initial_std: float = 0.09
    row_length: int = 48
    batch: int = 32
    steps: int = 1_800
    warmup: int = 100
    learning_rate: float = 3e-3
    betas: tuple[float, float] = (0.9, 0.98)
    # Applied to every parameter, because edits stay local if embeddings and MLP activations are
    # small.
    weight_decay: float = 0.25
    # Fraction of the steps in which the lower half of the layers attends only to the current and
    # the previous token.
    local_share: float = 0.7


def new_model(recipe: Recipe, vocab: int) -> GPT2LMHeadModel:
    """Create a GPT-2 with tied embeddings and no dropout, initialised from `SEED`."""
    torch.manual_seed(SEED)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=vocab,
            n_positions=recipe.n_positions,
            n_embd=recipe.d_model,
            n_layer=recipe.n_layers,
            n_head=recipe.n_heads,
            initializer_range=recipe.initial_std,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=END_OF_TEXT_ID,
            eos_token_id=END_OF_TEXT_ID,
        )
    )


def fit(model: GPT2LMHeadModel, token_batches: Iterable[Tensor], recipe: Recipe) -> None:
    """Train in two phases, the first with local attention in the lower layers."""
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=recipe.learning_rate,
        betas=recipe.betas,
        weight_decay=recipe.weight_decay,
    )
    schedule = LambdaLR(optimizer, lambda step: _rate(step, recipe))
    local_steps = round(recipe.local_share * recipe.steps)
    steps = _steps(model, token_batches, optimizer, schedule, recipe)
    with previous_token_attention(model.transformer.h[: recipe.n_layers // 2]):
        _report(islice(steps, local_steps), first=0)
    _report(steps, first=local_steps)


def _steps(
    model: GPT2LMHeadModel,
    token_batches: Iterable[Tensor],
    optimizer: torch.optim.Optimizer,
    schedule: LambdaLR,
    recipe: Recipe,
) -> Iterator[float]:
    """Take one step per iteration, and yield its loss."""
    generator = torch.Generator().manual_seed(SEED)
    for tokens in islice(token_batches, recipe.steps):
        positions = shifted_positions(tokens, recipe.n_positions, generator)
        loss: Tensor = model(input_ids=tokens, position_ids=positions, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        yield loss.item()


def _rate(step: int, recipe: Recipe) -> float:
    """Return the factor of the learning rate: linear warm-up, then linear decay to zero."""
    warm = (step + 1) / recipe.warmup
    decay = (recipe.steps - step) / max(1, recipe.steps - recipe.warmup)
    return max(0.0, min(warm, decay, 1.0))


def _report(losses: Iterator[float], first: int) -> None:
    """Run the steps and print the loss every `REPORT_EVERY` steps."""
    start = time.monotonic()
    for step, loss in enumerate(losses, start=first + 1):
        if step % REPORT_EVERY == 0:
            print(f"step {step:5d}  loss {loss:.3f}  {time.monotonic() - start:5.0f} s", flush=True)


def main() -> None:
    """Build the tokenizer, train the model and save both as a model folder."""
    parser = argparse.ArgumentParser(prog="python -m demo_training.train")
    parser.add_argument("--out", type=Path, default=model_path(), help="folder to write")
    parser.add_argument("--steps", type=int, default=Recipe().steps, help="training steps")
    arguments = parser.parse_args()
    recipe = Recipe(steps=arguments.steps)
    torch.set_num_threads(1)

    tokenizer = build_tokenizer(recipe.n_positions)
    model = new_model(recipe, vocab=len(tokenizer))
    print(f"{len(tokenizer)} tokens, {model.num_parameters():,} parameters", flush=True)
    rows = packed_rows(documents(SEED), tokenizer, recipe.row_length)
    fit(model, batches(rows, recipe.batch), recipe)

    arguments.out.mkdir(parents=True, exist_ok=True)
    model.half().save_pretrained(arguments.out)
    save_tokenizer(tokenizer, arguments.out)
    print(f"saved to {arguments.out}")


if __name__ == "__main__":
    main()


# Documents are encoded in batches, which is several times faster than one by one.
ENCODE_CHUNK = 1000


def packed_rows(
    texts: Iterable[str], tokenizer: PreTrainedTokenizerFast, length: int
) -> Iterator[list[int]]:
    """Yield rows of exactly `length` token ids, each of which starts with a new document.

    Documents end with the end-of-text token; the last document of a row is truncated. Rows do not
    start with that token, because prompts do not either.
    """
    row: list[int] = []
    for document in _encoded(texts, tokenizer):
        row += [*document, END_OF_TEXT_ID]
        if len(row) >= length:
            yield row[:length]
            row = []


def batches(rows: Iterable[list[int]], size: int) -> Iterator[Tensor]:
    """Yield batches of token ids `[size, length]`."""
    stream = iter(rows)
    while chunk := list(islice(stream, size)):
        yield torch.tensor(chunk)


def shifted_positions(tokens: Tensor, n_positions: int, generator: torch.Generator) -> Tensor:
    """Return position ids for `tokens` `[batch, length]`.

    A third of the rows starts at 0, a third at random positions, and a third ends at the last
    position. Rows are shorter than the context, so without this shift the embeddings of later
    positions would never be trained.
    """
    batch, length = tokens.shape
    starts = torch.randint(n_positions - length + 1, (batch, 1), generator=generator)
    starts[0::3] = 0
    starts[2::3] = n_positions - length
    return starts + torch.arange(length)


def _encoded(texts: Iterable[str], tokenizer: PreTrainedTokenizerFast) -> Iterator[list[int]]:
    stream = iter(texts)
    while chunk := list(islice(stream, ENCODE_CHUNK)):
        yield from tokenizer(chunk)["input_ids"]


@contextmanager
def previous_token_attention(blocks: Iterable[nn.Module]) -> Iterator[None]:
    """Limit the blocks' attention to the current and the previous token, within the context.

    Args:
        blocks: Transformer blocks of Hugging Face's GPT-2. Their `attn` takes the hidden states
            `[batch, pos, d_model]` and an additive `attention_mask` as a keyword argument.
    """
    with ExitStack() as hooks:
        for block in blocks:
            attention = block.get_submodule("attn")
            hooks.callback(
                attention.register_forward_pre_hook(_mask_distant_tokens, with_kwargs=True).remove
            )
        yield


def _mask_distant_tokens(
    _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    normed: Tensor = args[0]
    mask = previous_token_mask(normed.shape[1], normed.dtype)
    return args, {**kwargs, "attention_mask": mask}


def previous_token_mask(length: int, dtype: torch.dtype) -> Tensor:
    """Return an additive mask `[1, 1, query, key]`: 0 at distance 0 or 1, else the lowest value."""
    distance = torch.arange(length)[:, None] - torch.arange(length)
    allowed = (distance == 0) | (distance == 1)
    mask = torch.zeros(length, length, dtype=dtype).masked_fill(~allowed, torch.finfo(dtype).min)
    return mask[None, None]
