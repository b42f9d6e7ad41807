"""The classic causal experiments, as sweeps of interventions.

Each function sends one Intervene request, in which the server runs one forward pass per measured
value. A sweep that exceeds the server's limits is sent in several requests. The functions return
the target's probability and logit in each pass::

    with januslens.Client("127.0.0.1:50051") as client:
        print(januslens.head_knockouts(client, "The capital of Japan is the city of", " Tokyo"))

With an `AsyncClient`, await the result.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Iterable, Sequence
from functools import wraps
from typing import Any, Concatenate, ParamSpec, Protocol, cast, overload

import numpy as np

from januslens.aio import AsyncClient
from januslens.client import Client
from januslens.errors import LimitExceeded
from januslens.interventions import (
    Experiment,
    Intervention,
    SweepOver,
    knock_out_attention,
    noise,
    patch,
    zero,
)
from januslens.results.intervene import InterventionEffects, Prediction
from januslens.results.kinds import Site
from januslens.results.sweep import Outcome, Sweep
from januslens.results.tokens import Token

P = ParamSpec("P")


class _Procedure(Protocol[P]):
    """A function that returns a sweep with a `Client`, and a coroutine with an `AsyncClient`."""

    @overload
    def __call__(self, client: Client, *args: P.args, **kwargs: P.kwargs) -> Sweep: ...

    @overload
    def __call__(
        self, client: AsyncClient, *args: P.args, **kwargs: P.kwargs
    ) -> Coroutine[Any, Any, Sweep]: ...

    def __call__(self, client: Any, *args: P.args, **kwargs: P.kwargs) -> Any:
        """Run the experiments."""


def _for_both_clients(
    function: Callable[Concatenate[Client | AsyncClient, P], Coroutine[Any, Any, Sweep]],
) -> _Procedure[P]:
    """Run a coroutine function to its end if its client is a synchronous one."""

    @wraps(function)
    def run(client: Client | AsyncClient, *args: P.args, **kwargs: P.kwargs) -> Any:
        coroutine = function(client, *args, **kwargs)
        if isinstance(client, AsyncClient):
            return coroutine
        try:
            coroutine.send(None)  # never suspends, because no call of `_Immediate` does
        except StopIteration as done:
            return done.value
        raise TypeError(f"invalid client {client!r}; expected a Client or an AsyncClient")

    return cast("_Procedure[P]", run)


class _Immediate:
    """Calls a synchronous client in coroutines that never suspend."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def __getattr__(self, name: str) -> Callable[..., Coroutine[Any, Any, Any]]:
        method = getattr(self._client, name)

        async def call(*args: Any, **kwargs: Any) -> Any:
            return method(*args, **kwargs)

        return call


def _awaitable(client: Client | AsyncClient) -> AsyncClient:
    if isinstance(client, AsyncClient):
        return client
    if not isinstance(client, Client):
        raise TypeError(f"invalid client {client!r}; expected a Client or an AsyncClient")
    return cast("AsyncClient", _Immediate(client))


@_for_both_clients
async def head_knockouts(
    client: Client | AsyncClient,
    prompt: str,
    target: str | None = None,
    other: str | None = None,
    *,
    positions: Iterable[int] | None = None,
    model: str = "",
) -> Sweep:
    """Zero each head by itself (Wang et al., 2022, measure such knock-outs for indirect objects).

    Args:
        client: A `Client`, or an `AsyncClient`, with which the result is awaited.
        prompt: The prompt; the prediction at its last position is measured.
        target: Text of the token that is measured, in which a leading space counts; None = the
            prediction of the unchanged pass.
        other: Text of a token whose logit is subtracted from that of the target.
        positions: The positions where heads are zeroed, negative from the end; None = all.
        model: The model's name; may be empty if only one is loaded.

    Returns:
        A sweep by layer and head, compared with the unchanged pass.

    Raises:
        ValueError: A target is not one token.
        JanuslensError: A call failed; `januslens.errors` has the types.
    """
    measure = await _Measure.of(client, prompt, target, other, model)
    where = None if positions is None else list(positions)
    heads = range(measure.n_heads)
    return await measure.sweep(
        "Heads zeroed",
        "head",
        heads,
        [f"head {head}" for head in heads],
        lambda heads: zero(heads=heads, positions=where),
    )


@_for_both_clients
async def causal_trace(  # noqa: PLR0913 - by keyword
    client: Client | AsyncClient,
    prompt: str,
    target: str | None = None,
    subject: str = "",
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
        client: A `Client`, or an `AsyncClient`, with which the result is awaited.
        prompt: The prompt; the prediction at its last position is measured.
        target: Text of the token that is measured, in which a leading space counts; None = the
            prediction of the unchanged pass.
        subject: The part of the prompt that is corrupted; required.
        site: The site that is restored, such as `BLOCK_OUTPUT` or `MLP_OUTPUT`.
        standard_deviation: That of the noise; None = three times that of the values of the
            prompt's embeddings.
        seed: Seed of the noise.
        window: Number of layers around each layer that are restored together; an even number has
            one more layer below than above.
        model: The model's name; may be empty if only one is loaded.

    Returns:
        A sweep by layer and position, compared with the corrupted pass.

    Raises:
        ValueError: The subject is not in the prompt, or the target is not one token.
        JanuslensError: A call failed; `januslens.errors` has the types.
    """
    measure = await _Measure.of(client, prompt, target, None, model)
    if standard_deviation is None:
        read = await measure.client.activations(
            prompt, sites=Site.EMBEDDING, float32=True, model=model
        )
        standard_deviation = 3.0 * float(read.array(Site.EMBEDDING).std())
    corrupted = noise(standard_deviation, seed=seed, positions=measure.positions_of(subject))
    return await measure.sweep(
        f"{Site.of(site)} restored",
        "position",
        range(len(measure.tokens)),
        [str(token) for token in measure.tokens],
        lambda positions: patch(site, source=prompt, positions=positions),
        window=window,
        always=[corrupted],
    )


@_for_both_clients
async def activation_patching(
    client: Client | AsyncClient,
    clean: str,
    corrupted: str,
    target: str | None = None,
    other: str | None = None,
    *,
    site: Site | str = Site.BLOCK_OUTPUT,
    model: str = "",
) -> Sweep:
    """Run the corrupted prompt, with the values of one layer and position from the clean prompt.

    Args:
        client: A `Client`, or an `AsyncClient`, with which the result is awaited.
        clean: The prompt whose values are taken.
        corrupted: The prompt that is run and measured, of the same number of tokens.
        target: Text of the token that is measured, in which a leading space counts; None = the
            prediction for the clean prompt.
        other: Text of a token whose logit is subtracted from that of the target.
        site: The site that is patched.
        model: The model's name; may be empty if only one is loaded.

    Returns:
        A sweep by layer and position, compared with the unchanged corrupted prompt.

    Raises:
        ValueError: The prompts have different lengths, or a target is not one token.
        JanuslensError: A call failed; `januslens.errors` has the types.
    """
    measure = await _Measure.of(client, corrupted, target, other, model)
    length = len(await measure.client.tokenize(clean, special_tokens=True, model=model))
    if length != len(measure.tokens):
        raise ValueError(
            f"the clean prompt has {length} tokens, the corrupted one {len(measure.tokens)}; "
            "give prompts of the same length"
        )
    if measure.target is None:
        plain = await measure.client.intervene(clean, experiments=[Experiment()], model=model)
        measure.target = plain.before[0].target
    return await measure.sweep(
        f"{Site.of(site)} patched",
        "position",
        range(length),
        [str(token) for token in measure.tokens],
        lambda positions: patch(site, source=clean, positions=positions),
    )


@_for_both_clients
async def attention_knockouts(
    client: Client | AsyncClient,
    prompt: str,
    target: str | None = None,
    *,
    window: int = 1,
    model: str = "",
) -> Sweep:
    """Hide each position from the last one (attention knock-out; Geva et al., 2023).

    Args:
        client: A `Client`, or an `AsyncClient`, with which the result is awaited.
        prompt: The prompt; the prediction at its last position is measured.
        target: Text of the token that is measured, in which a leading space counts; None = the
            prediction of the unchanged pass.
        window: Number of layers around each layer in which the position is hidden; an even number
            has one more layer below than above.
        model: The model's name; may be empty if only one is loaded.

    Returns:
        A sweep by layer and source position, compared with the unchanged pass.

    Raises:
        ValueError: The target is not one token.
        JanuslensError: A call failed; `januslens.errors` has the types.
    """
    measure = await _Measure.of(client, prompt, target, None, model)
    return await measure.sweep(
        "Sources hidden from the last position",
        "source",
        range(len(measure.tokens)),
        [str(token) for token in measure.tokens],
        lambda sources: knock_out_attention(sources=sources, positions=-1),
        window=window,
    )


# The most experiments that one request may have.
_MAX_EXPERIMENTS = 16_384


class _Measure:
    """Runs a prompt under interventions, and measures the prediction at its last position."""

    def __init__(self, client: AsyncClient, prompt: str, model: str) -> None:
        self.client = client
        self._prompt = prompt
        self._model = model
        self.tokens: Sequence[Token] = ()
        self.target: Token | None = None
        self._other: Token | None = None
        self._n_layers = self.n_heads = 0

    @classmethod
    async def of(
        cls,
        client: Client | AsyncClient,
        prompt: str,
        target: str | None,
        other: str | None,
        model: str,
    ) -> _Measure:
        """Look up the tokens and the sizes of the model."""
        made = cls(_awaitable(client), prompt, model)
        made.tokens = await made.client.tokenize(prompt, special_tokens=True, model=model)
        made.target = await made._one_token(target)
        made._other = await made._one_token(other)
        (found,) = (
            found
            for found in await made.client.list_models()
            if model in ("", found.name) and found.ready
        )
        made._n_layers, made.n_heads = found.n_layers, found.n_heads
        return made

    async def sweep(
        self,
        title: str,
        axis: str,
        columns: Sequence[int],
        labels: Sequence[str],
        template: Callable[[Sequence[int]], Intervention],
        *,
        window: int = 1,
        always: Sequence[Intervention] = (),
    ) -> Sweep:
        """Measure the parts of `template(columns)` by layer and column.

        The results are compared with the pass under the interventions `always`.
        """

        async def request(some: Sequence[int]) -> InterventionEffects:
            return await self.client.intervene(
                self._prompt,
                target=None if self.target is None else self.target.id,
                other=None if self._other is None else self._other.id,
                experiments=[Experiment()],
                sweep=SweepOver(template(some), by=["layer", axis], layer_window=window),
                always=always,
                top_k=1,
                model=self._model,
            )

        limit = max(1, (_MAX_EXPERIMENTS - 1) // self._n_layers)
        parts = await self._parts(columns, request, limit)
        outcomes = [[self._outcome(e.after[0]) for e in part.effects] for part in parts]
        layers = sorted({e.layer for e in parts[0].effects if e.layer is not None})
        # The first experiment of each request has no interventions of its own.
        values = [
            np.array([(one.probability, one.logit) for one in part[1:]]).reshape(len(layers), -1, 2)
            for part in outcomes
        ]
        table = np.concatenate(values, axis=1)
        return Sweep(
            title=title,
            target=parts[0].before[0].target,
            other=self._other,
            before=outcomes[0][0],
            layers=tuple(layers),
            columns=tuple(columns),
            axis=axis,
            labels=tuple(labels),
            probabilities=table[:, :, 0],
            logits=table[:, :, 1],
        )

    async def _parts(
        self,
        columns: Sequence[int],
        request: Callable[[Sequence[int]], Coroutine[Any, Any, InterventionEffects]],
        limit: int,
    ) -> list[InterventionEffects]:
        """Request up to `limit` columns at once, and fewer if the server refuses them."""
        if len(columns) <= limit:
            try:
                return [await request(columns)]
            except LimitExceeded:
                if len(columns) == 1:
                    raise
        half = (len(columns) + 1) // 2
        return [
            *await self._parts(columns[:half], request, limit),
            *await self._parts(columns[half:], request, limit),
        ]

    def positions_of(self, subject: str) -> list[int]:
        """Return the positions of the tokens that overlap a part of the prompt."""
        if not subject:
            raise ValueError("no subject given; give the part of the prompt that is corrupted")
        start = self._prompt.find(subject)
        if start < 0:
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

    def _outcome(self, after: Prediction) -> Outcome:
        logit = after.logit if after.logit_difference is None else after.logit_difference
        return Outcome(probability=after.probability, logit=logit)

    async def _one_token(self, target: str | None) -> Token | None:
        if target is None:
            return None
        tokens = await self.client.tokenize(target, model=self._model)
        if len(tokens) != 1:
            listed = ", ".join(str(token) for token in tokens)
            raise ValueError(f"{target!r} has {len(tokens)} tokens ({listed}); expected one token")
        return tokens[0]
