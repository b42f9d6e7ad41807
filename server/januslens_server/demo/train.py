"""Train the demo model: `python -m januslens_server.demo.train [--out DIR] [--steps N]`.

One thread, fixed seeds, some minutes. Another thread count or another torch gives other bits, which
is why the weights are committed and `evaluate` judges behaviour.
"""

import argparse
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import GPT2Config, GPT2LMHeadModel

from januslens_server.demo import model_path
from januslens_server.demo.corpus import documents
from januslens_server.demo.local_attention import previous_token_attention
from januslens_server.demo.rows import batches, packed_rows, shifted_positions
from januslens_server.demo.tokenizer import END_OF_TEXT_ID, build_tokenizer, save_tokenizer

SEED = 0
REPORT_EVERY = 100


@dataclass(frozen=True, slots=True)
class Recipe:
    """Sizes and hyper-parameters of the model and its training."""

    n_layers: int = 4
    d_model: int = 128
    n_heads: int = 4
    n_positions: int = 96
    # About 1 / sqrt(d_model): from the usual 0.02, so narrow a model starts too slowly.
    initial_std: float = 0.09
    row_length: int = 48
    batch: int = 32
    steps: int = 1_800
    warmup: int = 100
    learning_rate: float = 3e-3
    betas: tuple[float, float] = (0.9, 0.98)
    # On every parameter: it also keeps embeddings and MLP activations small, hence edits local.
    weight_decay: float = 0.25
    # The share of steps in which the lower half of the layers sees the previous token at most.
    local_share: float = 0.7


def new_model(recipe: Recipe, vocab: int) -> GPT2LMHeadModel:
    """A GPT-2 with tied embeddings and no dropout, initialised from `SEED`."""
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
    """Train in two phases: the lower layers local at first, then every layer unmasked."""
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
    """Take a step whenever asked for the next loss."""
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
    """The learning rate's factor: linear warm-up, then linear decay to zero."""
    warm = (step + 1) / recipe.warmup
    decay = (recipe.steps - step) / max(1, recipe.steps - recipe.warmup)
    return max(0.0, min(warm, decay, 1.0))


def _report(losses: Iterator[float], first: int) -> None:
    """Run through the steps, printing the loss now and then."""
    start = time.monotonic()
    for step, loss in enumerate(losses, start=first + 1):
        if step % REPORT_EVERY == 0:
            print(f"step {step:5d}  loss {loss:.3f}  {time.monotonic() - start:5.0f} s", flush=True)


def main() -> None:
    """Build the tokenizer, train the model and save both as one ordinary model folder."""
    parser = argparse.ArgumentParser(prog="python -m januslens_server.demo.train")
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
