"""The classic causal experiments, as sweeps of interventions.

Each function runs one forward pass per measured value, so a sweep over all heads of a model with 12
layers of 12 heads makes 144 requests. It returns the change of the target's probability and logit::

    from januslens.experiments import causal_trace, head_knockouts

    with januslens.Client("127.0.0.1:50051") as client:
        print(head_knockouts(client, "The capital of Japan is the city of", " Tokyo"))
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import product

import numpy as np

from januslens.client import Client
from januslens.interventions import Intervention, knock_out_attention, noise, patch, zero
from januslens.results.kinds import Site
from januslens.results.sweep import Outcome, Sweep
from januslens.results.tokens import Token


def head_knockouts(
    client: Client,
    prompt: str,
    target: str,
    other: str | None = None,
    *,
    positions: Iterable[int] | None = None,
    model: str = "",
) -> Sweep:
    """Zero each head by itself (Wang et al., 2022, measure such knock-outs for indirect objects).

    Args:
        client: A connected client.
        prompt: The prompt; the prediction at its last position is measured.
        target: Text of the token that is measured, in which a leading space counts.
        other: Text of a token whose logit is subtracted from that of the target.
        positions: The positions where heads are zeroed, negative from the end; None = all.
        model: The model's name; may be empty if only one is loaded.

    Returns:
        A sweep by layer and head, compared with the unchanged pass.

    Raises:
        ValueError: A target is not one token.
        JanuslensError: A call failed; `januslens.errors` has the types.
    """
    measure = _Measure(client, prompt, target, other, model)
    where = None if positions is None else list(positions)
    heads = range(measure.n_heads)
    return measure.sweep(
        "Heads zeroed",
        "head",
        heads,
        [f"head {head}" for head in heads],
        lambda layer, head: [zero(heads=[(layer, head)], positions=where)],
    )


def causal_trace(  # noqa: PLR0913 - by keyword
    client: Client,
    prompt: str,
    target: str,
    subject: str,
    *,
    site: Site | str = Site.BLOCK_OUTPUT,
    standard_deviation: float | None = None,
    seed: int = 0,
    window: int = 1,
    model: str = "",
) -> Sweep:
    """Corrupt the subject, and restore single states (causal tracing; Meng et al., 2022).

    Noise is added to the embeddings of the subject. In each pass, the values of one site at one
    position are those of the uncorrupted pass.

    Args:
        client: A connected client.
        prompt: The prompt; the prediction at its last position is measured.
        target: Text of the token that is measured, in which a leading space counts.
        subject: The part of the prompt that is corrupted.
        site: The site that is restored, such as `BLOCK_OUTPUT` or `MLP_OUTPUT`.
        standard_deviation: That of the noise; None = three times that of the values of the
            prompt's embeddings.
        seed: Seed of the noise.
        window: Number of layers around each layer that are restored together.
        model: The model's name; may be empty if only one is loaded.

    Returns:
        A sweep by layer and position, compared with the corrupted pass.

    Raises:
        ValueError: The subject is not in the prompt, or the target is not one token.
        JanuslensError: A call failed; `januslens.errors` has the types.
    """
    measure = _Measure(client, prompt, target, None, model)
    if standard_deviation is None:
        read = client.activations(prompt, sites=Site.EMBEDDING, float32=True, model=model)
        standard_deviation = 3.0 * float(read.array(Site.EMBEDDING).std())
    corrupted = noise(standard_deviation, seed=seed, positions=measure.positions_of(subject))
    return measure.sweep(
        f"{Site.of(site)} restored",
        "position",
        range(len(measure.tokens)),
        [str(token) for token in measure.tokens],
        lambda layer, position: [
            corrupted,
            patch(site, source=prompt, layers=measure.window(layer, window), positions=position),
        ],
        always=[corrupted],
    )


def activation_patching(
    client: Client,
    clean: str,
    corrupted: str,
    target: str,
    other: str | None = None,
    *,
    site: Site | str = Site.BLOCK_OUTPUT,
    model: str = "",
) -> Sweep:
    """Run the corrupted prompt, with the values of one layer and position from the clean prompt.

    Args:
        client: A connected client.
        clean: The prompt whose values are taken.
        corrupted: The prompt that is run and measured, of the same number of tokens.
        target: Text of the token that is measured, in which a leading space counts.
        other: Text of a token whose logit is subtracted from that of the target.
        site: The site that is patched.
        model: The model's name; may be empty if only one is loaded.

    Returns:
        A sweep by layer and position, compared with the unchanged corrupted prompt.

    Raises:
        ValueError: The prompts have different lengths, or a target is not one token.
        JanuslensError: A call failed; `januslens.errors` has the types.
    """
    measure = _Measure(client, corrupted, target, other, model)
    length = len(client.tokenize(clean, special_tokens=True, model=model))
    if length != len(measure.tokens):
        raise ValueError(
            f"the clean prompt has {length} tokens, the corrupted one {len(measure.tokens)}; "
            "give prompts of the same length"
        )
    return measure.sweep(
        f"{Site.of(site)} patched",
        "position",
        range(length),
        [str(token) for token in measure.tokens],
        lambda layer, position: [patch(site, source=clean, layers=layer, positions=position)],
    )


def attention_knockouts(
    client: Client, prompt: str, target: str, *, window: int = 1, model: str = ""
) -> Sweep:
    """Hide each position from the last one (attention knock-out; Geva et al., 2023).

    Args:
        client: A connected client.
        prompt: The prompt; the prediction at its last position is measured.
        target: Text of the token that is measured, in which a leading space counts.
        window: Number of layers around each layer in which the position is hidden.
        model: The model's name; may be empty if only one is loaded.

    Returns:
        A sweep by layer and source position, compared with the unchanged pass.

    Raises:
        ValueError: The target is not one token.
        JanuslensError: A call failed; `januslens.errors` has the types.
    """
    measure = _Measure(client, prompt, target, None, model)
    return measure.sweep(
        "Sources hidden from the last position",
        "source",
        range(len(measure.tokens)),
        [str(token) for token in measure.tokens],
        lambda layer, source: [
            knock_out_attention(sources=source, layers=measure.window(layer, window), positions=-1)
        ],
    )


class _Measure:
    """Runs a prompt under interventions, and measures the prediction at its last position."""

    def __init__(
        self, client: Client, prompt: str, target: str, other: str | None, model: str
    ) -> None:
        self._client = client
        self._prompt = prompt
        self._model = model
        self.tokens = client.tokenize(prompt, special_tokens=True, model=model)
        self._target = self._one_token(target)
        self._other = None if other is None else self._one_token(other)
        (found,) = (
            found for found in client.list_models() if model in ("", found.name) and found.ready
        )
        self._n_layers, self.n_heads = found.n_layers, found.n_heads

    def sweep(
        self,
        title: str,
        axis: str,
        columns: Sequence[int],
        labels: Sequence[str],
        experiment: Callable[[int, int], list[Intervention]],
        always: Sequence[Intervention] = (),
    ) -> Sweep:
        """Measure `experiment(layer, column)` for all layers and columns.

        The results are compared with the pass under the interventions `always`.
        """
        layers = range(self._n_layers)
        found = [
            self._outcome(experiment(layer, column)) for layer, column in product(layers, columns)
        ]
        shape = len(layers), len(columns)
        return Sweep(
            title=title,
            target=self._target,
            other=self._other,
            before=self._outcome(always),
            layers=tuple(layers),
            columns=tuple(columns),
            axis=axis,
            labels=tuple(labels),
            probabilities=np.array([one.probability for one in found]).reshape(shape),
            logits=np.array([one.logit for one in found]).reshape(shape),
        )

    def positions_of(self, subject: str) -> list[int]:
        """Return the positions of the tokens that overlap a part of the prompt."""
        start = self._prompt.find(subject)
        if start < 0 or not subject:
            raise ValueError(f"subject {subject!r} is not in the prompt; give a part of it")
        end = start + len(subject)
        return [
            position
            for position, token in enumerate(self.tokens)
            if token.start is not None
            and token.end is not None
            and token.start < end
            and token.end > start
        ]

    def window(self, layer: int, size: int) -> list[int]:
        """Return the layers of a window around a layer, cut at the first and the last layer."""
        first = layer - size // 2
        return [i for i in range(first, first + size) if 0 <= i < self._n_layers]

    def _outcome(self, interventions: Sequence[Intervention]) -> Outcome:
        read = self._client.activations(
            self._prompt,
            sites=Site.LOGITS,
            positions=-1,
            float32=True,
            interventions=interventions,
            model=self._model,
        )
        logits = read.array(Site.LOGITS)[0].astype(np.float64)
        logit, exponentials = logits[self._target.id], np.exp(logits - logits.max())
        minus = 0.0 if self._other is None else logits[self._other.id]
        probability = exponentials[self._target.id] / exponentials.sum()
        return Outcome(probability=float(probability), logit=float(logit - minus))

    def _one_token(self, text: str) -> Token:
        tokens = self._client.tokenize(text, model=self._model)
        if len(tokens) != 1:
            listed = ", ".join(str(token) for token in tokens)
            raise ValueError(f"{text!r} has {len(tokens)} tokens ({listed}); expected one token")
        return tokens[0]
