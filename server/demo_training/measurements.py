"""Measure a demo model: recall, gradients of FF2, and forward shifts.

The gradients and shifts are those of Backward Lens (Katz et al., EMNLP 2024).
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, GPT2LMHeadModel, PreTrainedTokenizerBase

from demo_training.corpus import FactPrompt, Prompt, documents, fact_prompts, facts_of
from demo_training.tokenizer import END_OF_TEXT

BATCH = 256


@dataclass(frozen=True, slots=True)
class DemoModel:
    """A trained model in float32, with its tokenizer."""

    model: GPT2LMHeadModel
    tokenizer: PreTrainedTokenizerBase

    @classmethod
    def load(cls, folder: Path) -> "DemoModel":
        """Load a model folder with plain transformers."""
        model = GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32)
        return cls(model, AutoTokenizer.from_pretrained(folder))

    def ff2s(self) -> list[nn.Module]:
        """The second MLP matrix of every layer, lowest layer first."""
        return [block.get_submodule("mlp.c_proj") for block in self.model.transformer.h]

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text."""
        ids: list[int] = self.tokenizer(text)["input_ids"]
        return ids

    def answer_id(self, answer: str) -> int:
        """Return the single token of an answer with its leading space."""
        ids = self.encode(f" {answer}")
        if len(ids) != 1:
            raise ValueError(f"expected {answer!r} to be one token, got {len(ids)}")
        return ids[0]

    def last_subject_position(self, prompt: FactPrompt) -> int:
        """Return the position of the last token of a prompt's subject."""
        end = prompt.text.index(prompt.fact.subject) + len(prompt.fact.subject)
        return len(self.encode(prompt.text[:end])) - 1

    def batches(self, prompts: Sequence[Prompt]) -> Iterator[tuple[list[int], Tensor]]:
        """Group prompts by length, so that no prompt needs padding.

        Yields:
            The indices of the prompts, and their token ids `[batch, pos]`.
        """
        by_length: defaultdict[int, list[tuple[int, list[int]]]] = defaultdict(list)
        for index, prompt in enumerate(prompts):
            ids = self.encode(prompt.text)
            by_length[len(ids)].append((index, ids))
        for group in by_length.values():
            for start in range(0, len(group), BATCH):
                indices, rows = zip(*group[start : start + BATCH], strict=True)
                yield list(indices), torch.tensor(rows)


@torch.no_grad()
def predictions(demo: DemoModel, prompts: Sequence[Prompt]) -> list[int]:
    """Return the most likely next token of each prompt."""
    predicted = [0] * len(prompts)
    for indices, tokens in demo.batches(prompts):
        best = demo.model(input_ids=tokens).logits[:, -1].argmax(-1).tolist()
        for index, token in zip(indices, best, strict=True):
            predicted[index] = token
    return predicted


def failures(demo: DemoModel, prompts: Sequence[Prompt]) -> list[Prompt]:
    """Return the prompts for which the predicted token is wrong."""
    return [
        prompt
        for prompt, token in zip(prompts, predictions(demo, prompts), strict=True)
        if token != demo.answer_id(prompt.answer)
    ]


def accuracy(demo: DemoModel, prompts: Sequence[Prompt]) -> float:
    """Return the fraction of prompts for which the predicted token is right."""
    return 1 - len(failures(demo, prompts)) / len(prompts)


def after_other_documents(demo: DemoModel, prompts: Sequence[Prompt], seed: int) -> list[Prompt]:
    """Return the prompts, each after as many documents as fit into the context."""
    stream = documents(seed)
    return [_fill_context(demo, prompt, stream) for prompt in prompts]


def _fill_context(demo: DemoModel, prompt: Prompt, stream: Iterator[str]) -> Prompt:
    text = prompt.text
    for document in stream:
        longer = f"{document}{END_OF_TEXT}{text}"
        if len(demo.encode(longer)) > demo.model.config.n_positions:
            break
        text = longer
    return Prompt(text, prompt.answer)


@dataclass(frozen=True, slots=True)
class Edit:
    """A trained prompt and a counterfactual answer of the same relation."""

    prompt: FactPrompt
    target: str


def sample_edits(stride: int) -> list[Edit]:
    """Return every `stride`-th trained prompt, with the answer of another fact of its relation."""
    return [Edit(prompt, _other_answer(prompt)) for prompt in fact_prompts("trained")[::stride]]


def _other_answer(prompt: FactPrompt) -> str:
    facts = facts_of(prompt.fact.relation)
    middle = facts.index(prompt.fact) + len(facts) // 2
    rotated = (facts[(middle + step) % len(facts)].answer for step in range(len(facts)))
    return next(answer for answer in rotated if answer != prompt.answer)


@dataclass(frozen=True, slots=True)
class VjpFigures:
    """Means over a sample of edits, one entry per layer, lowest layer first.

    Attributes:
        target_rank: Rank of the target in the projected VJP of FF2 at the last position, divided by
            the last rank. 1.0 is the last rank, which a descent step promotes.
        dominance: How often the largest VJP is at the last position or at the subject's last one.
            In the last layer only the last position has a gradient.
    """

    target_rank: tuple[float, ...]
    dominance: tuple[float, ...]


def measure_vjps(demo: DemoModel, edits: Sequence[Edit]) -> VjpFigures:
    """Measure the gradients of -log p(target | prompt) for every edit."""
    ranks, dominated = [], []
    for edit in edits:
        target = demo.answer_id(edit.target)
        deltas = ff2_vjps(demo, demo.encode(edit.prompt.text), target)
        ranks.append([_normalised_rank(demo, delta[-1], target) for delta in deltas])
        expected = {deltas.shape[1] - 1, demo.last_subject_position(edit.prompt)}
        largest = deltas.norm(dim=-1).argmax(dim=-1).tolist()
        dominated.append([float(position in expected) for position in largest])
    return VjpFigures(_column_means(ranks), _column_means(dominated))


def ff2_vjps(demo: DemoModel, ids: list[int], target: int) -> Tensor:
    """Return the gradients of -log p(target) at the FF2 outputs, `[layer, pos, d_model]`."""
    outputs: list[Tensor] = []

    def keep(_module: nn.Module, _args: tuple[Tensor, ...], output: Tensor) -> None:
        outputs.append(output)

    hooks = [ff2.register_forward_hook(keep) for ff2 in demo.ff2s()]
    try:
        logits: Tensor = demo.model(input_ids=torch.tensor([ids])).logits[0, -1]
    finally:
        for hook in hooks:
            hook.remove()
    loss = -logits.log_softmax(-1)[target]
    return torch.cat(torch.autograd.grad(loss, outputs))


@torch.no_grad()
def _normalised_rank(demo: DemoModel, delta: Tensor, target: int) -> float:
    """Return the target's rank in the lens of `delta` `[d_model]`, divided by the last rank."""
    model = demo.model
    logits = model.lm_head(model.transformer.ln_f(nn.functional.normalize(delta, dim=0)))
    above = int((logits > logits[target]).sum())
    return above / (len(logits) - 1)


def _column_means(rows: list[list[float]]) -> tuple[float, ...]:
    return tuple(torch.tensor(rows).mean(dim=0).tolist())


ETA = 0.15
# After an edit, only every n-th prompt about other facts is tested again.
ELSEWHERE_STRIDE = 10


@dataclass(frozen=True, slots=True)
class ShiftFigures:
    """Fractions over a sample of edits, each made to the original model.

    Attributes:
        efficacy: Edits after which the prompt's next token is the target.
        paraphrases: Other wordings of the edited fact for which the next token is the target.
        same_relation: Prompts about other facts of the relation with an unchanged next token.
        other_relations: Prompts about other relations with an unchanged next token.
    """

    efficacy: float
    paraphrases: float
    same_relation: float
    other_relations: float


@dataclass(frozen=True, slots=True)
class LastLayer:
    """Tensors of the last block at each prompt's last position.

    Attributes:
        mlp_inner: Input of FF2, `[prompt, d_mlp]`.
        residual: Output of the block, `[prompt, d_model]`.
    """

    mlp_inner: Tensor
    residual: Tensor


def measure_shifts(demo: DemoModel, edits: Sequence[Edit]) -> ShiftFigures:
    """Apply each edit on its own, and test all wordings of its fact and many other prompts.

    Only the last FF2 changes. So the edited output of a prompt q is its residual plus
    eta (x_q . x_p) e_t, and all edits can be computed from one run of the original model.
    """
    prompts = [*fact_prompts("trained"), *fact_prompts("held_out")]
    states = last_layer(demo, prompts)
    before = _next_tokens(demo, states.residual)
    tallies = []
    for edit in edits:
        edited = prompts.index(edit.prompt)
        target = demo.answer_id(edit.target)
        after = _next_tokens(demo, shifted_residual(demo, states, edited, target))
        groups = _groups(prompts, edit.prompt)
        tallies.append(
            [
                float(after[edited] == target),
                _share(after[groups.paraphrases] == target),
                _share((after == before)[groups.same_relation]),
                _share((after == before)[groups.other_relations]),
            ]
        )
    return ShiftFigures(*torch.tensor(tallies).mean(dim=0).tolist())


@torch.no_grad()
def shifted_residual(demo: DemoModel, states: LastLayer, edited: int, target: int) -> Tensor:
    """Return all residuals `[prompt, d_model]` after the shift of prompt `edited` to `target`."""
    embedding = demo.model.transformer.wte.weight[target]
    similarity = states.mlp_inner @ states.mlp_inner[edited]
    return states.residual + ETA * similarity[:, None] * embedding


@torch.no_grad()
def last_layer(demo: DemoModel, prompts: Sequence[Prompt]) -> LastLayer:
    """Run the original model and keep the tensors that the shift needs."""
    config = demo.model.config
    inner = torch.empty(len(prompts), 4 * config.n_embd)
    residual = torch.empty(len(prompts), config.n_embd)
    kept: dict[str, Tensor] = {}

    def keep_input(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        kept["inner"] = args[0][:, -1]

    def keep_output(_module: nn.Module, _args: tuple[Tensor, ...], output: Tensor) -> None:
        kept["residual"] = output[:, -1]

    hooks = (
        demo.ff2s()[-1].register_forward_pre_hook(keep_input),
        demo.model.transformer.h[-1].register_forward_hook(keep_output),
    )
    try:
        for indices, tokens in demo.batches(prompts):
            demo.model(input_ids=tokens)
            inner[indices], residual[indices] = kept["inner"], kept["residual"]
    finally:
        for hook in hooks:
            hook.remove()
    return LastLayer(inner, residual)


@dataclass(frozen=True, slots=True)
class _Groups:
    """Indices of prompts by the expected effect of an edit."""

    paraphrases: list[int]
    same_relation: list[int]
    other_relations: list[int]


def _groups(prompts: Sequence[FactPrompt], edited: FactPrompt) -> _Groups:
    fact, relation = edited.fact, edited.fact.relation
    elsewhere = [i for i in range(0, len(prompts), ELSEWHERE_STRIDE) if prompts[i].fact != fact]
    return _Groups(
        paraphrases=[i for i, p in enumerate(prompts) if p.fact == fact and p != edited],
        same_relation=[i for i in elsewhere if prompts[i].fact.relation == relation],
        other_relations=[i for i in elsewhere if prompts[i].fact.relation != relation],
    )


@torch.no_grad()
def _next_tokens(demo: DemoModel, residual: Tensor) -> Tensor:
    """Return the most likely token `[prompt]` for each last residual `[prompt, d_model]`."""
    model = demo.model
    best: Tensor = model.lm_head(model.transformer.ln_f(residual)).argmax(-1)
    return best


def _share(hits: Tensor) -> float:
    return hits.float().mean().item()
