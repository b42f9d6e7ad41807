"""Read, change and continue forward passes.

Generated from `_requests.py` by client/generate.py; do not edit.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING, Literal, cast

from januslens._requests import activations_request, generate_request, intervene_request
from januslens.aio_calls import AsyncCalls, AsyncEventStream, AsyncGeneration
from januslens.arguments import (
    Layers,
    Messages,
    Positions,
    Prompt,
    TargetLike,
)
from januslens.assemblers import (
    ActivationsAssembler,
    ActivationsEvent,
    GenerateAssembler,
    GenerationEvent,
    InterveneAssembler,
    InterveneEvent,
)
from januslens.interventions import (
    Experiment,
    Intervention,
    SweepOver,
)
from januslens.results.activations import Activations
from januslens.results.intervene import InterventionEffects
from januslens.results.kinds import (
    Site,
)
from januslens.results.models import CostEstimate
from januslens.v1 import (
    cost_pb2,
)

if TYPE_CHECKING:
    from januslens.aio import AsyncClient


class AsyncPasses(AsyncCalls):
    """Read, change and continue forward passes. `AsyncClient` has these methods."""

    async def activations(
        self,
        prompt: Prompt | None = None,
        *,
        messages: Messages | None = None,
        sites: Site | str | Iterable[Site | str] = Site.BLOCK_OUTPUT,
        layers: Layers | None = None,
        positions: Positions | None = None,
        heads: int | Iterable[int] | None = None,
        experts: int | Iterable[int] | None = None,
        float32: bool = False,
        interventions: Iterable[Intervention] = (),
        model: str = "",
        revision: str = "",
        timeout: float | None = None,
    ) -> Activations:
        """Read tensors of the forward pass, bit for bit those of the model.

        Args:
            prompt: Text, which gets the tokenizer's special tokens, or token ids, used as they are.
            messages: A conversation instead of a prompt: messages with `role` and `content`, or a
                `Chat`.
            sites: The sites to read, such as `["HEAD_RESULT", "BLOCK_OUTPUT"]`.
            layers: Layers to read, from 0 or negative from the last; None = every layer that has
                the site.
            positions: Positions to read, negative from the end; None or `"all"` = all of them.
            heads: Heads to read at sites with heads, from 0; None = all. KEY and VALUE have
                key-value heads.
            experts: Routed experts to read the NEURONS of, from 0; None = all.
            float32: Convert the values to float32. By default they have the model's data type.
            interventions: Changes of the forward pass, made by `januslens.interventions`.
            model: The model's name; may be empty if only one is loaded.
            revision: The expected revision; any other is refused. Empty = any.
            timeout: Maximum seconds for the whole stream; None = the client's.

        Raises:
            TypeError: An argument has an invalid type.
            ValueError: An argument has a value that no server accepts.
            ActivationsInterrupted: The stream was interrupted; `partial` has the tensors received.
            JanuslensError: The call failed; `januslens.errors` has the types.
        """
        stream = self.stream_activations(
            prompt,
            messages=messages,
            sites=sites,
            layers=layers,
            positions=positions,
            heads=heads,
            experts=experts,
            float32=float32,
            interventions=interventions,
            model=model,
            revision=revision,
            timeout=timeout,
        )
        async with stream:
            return await stream.result()

    def stream_activations(
        self,
        prompt: Prompt | None = None,
        *,
        messages: Messages | None = None,
        sites: Site | str | Iterable[Site | str] = Site.BLOCK_OUTPUT,
        layers: Layers | None = None,
        positions: Positions | None = None,
        heads: int | Iterable[int] | None = None,
        experts: int | Iterable[int] | None = None,
        float32: bool = False,
        interventions: Iterable[Intervention] = (),
        model: str = "",
        revision: str = "",
        timeout: float | None = None,
    ) -> AsyncEventStream[ActivationsEvent, Activations]:
        """Read tensors as in `activations`, and receive each one when it is complete.

        Args:
            prompt: Text, which gets the tokenizer's special tokens, or token ids, used as they are.
            messages: A conversation instead of a prompt: messages with `role` and `content`, or a
                `Chat`.
            sites: The sites to read, such as `["HEAD_RESULT", "BLOCK_OUTPUT"]`.
            layers: Layers to read, from 0 or negative from the last; None = every layer that has
                the site.
            positions: Positions to read, negative from the end; None or `"all"` = all of them.
            heads: Heads to read at sites with heads, from 0; None = all. KEY and VALUE have
                key-value heads.
            experts: Routed experts to read the NEURONS of, from 0; None = all.
            float32: Convert the values to float32. By default they have the model's data type.
            interventions: Changes of the forward pass, made by `januslens.interventions`.
            model: The model's name; may be empty if only one is loaded.
            revision: The expected revision; any other is refused. Empty = any.
            timeout: Maximum seconds for the whole stream; None = the client's.

        Returns:
            A stream of the header, the tensors and the summary. Use it as a context manager.

        Raises:
            TypeError: An argument has an invalid type.
            ValueError: An argument has a value that no server accepts.
            JanuslensError: While iterating: the call failed; `partial` has the tensors received.
        """
        request = activations_request(
            prompt,
            messages=messages,
            sites=sites,
            layers=layers,
            positions=positions,
            heads=heads,
            experts=experts,
            float32=float32,
            interventions=interventions,
            model=model,
            revision=revision,
        )
        return self._stream("Activations", request, timeout, ActivationsAssembler())

    async def estimate_activations(
        self,
        prompt: Prompt | None = None,
        *,
        messages: Messages | None = None,
        sites: Site | str | Iterable[Site | str] = Site.BLOCK_OUTPUT,
        layers: Layers | None = None,
        positions: Positions | None = None,
        heads: int | Iterable[int] | None = None,
        experts: int | Iterable[int] | None = None,
        float32: bool = False,
        interventions: Iterable[Intervention] = (),
        model: str = "",
        revision: str = "",
        timeout: float | None = None,
    ) -> CostEstimate:
        """Estimate the cost of `activations` with the same arguments, without running it.

        Args:
            prompt: Text, which gets the tokenizer's special tokens, or token ids, used as they are.
            messages: A conversation instead of a prompt: messages with `role` and `content`, or a
                `Chat`.
            sites: The sites to read, such as `["HEAD_RESULT", "BLOCK_OUTPUT"]`.
            layers: Layers to read, from 0 or negative from the last; None = every layer that has
                the site.
            positions: Positions to read, negative from the end; None or `"all"` = all of them.
            heads: Heads to read at sites with heads, from 0; None = all. KEY and VALUE have
                key-value heads.
            experts: Routed experts to read the NEURONS of, from 0; None = all.
            float32: Convert the values to float32. By default they have the model's data type.
            interventions: Changes of the forward pass, made by `januslens.interventions`.
            model: The model's name; may be empty if only one is loaded.
            revision: The expected revision; any other is refused. Empty = any.
            timeout: Maximum seconds for the call; None = the client's.

        Raises:
            TypeError: An argument has an invalid type.
            ValueError: An argument has a value that no server accepts.
            JanuslensError: The call failed; `januslens.errors` has the types.
        """
        request = activations_request(
            prompt,
            messages=messages,
            sites=sites,
            layers=layers,
            positions=positions,
            heads=heads,
            experts=experts,
            float32=float32,
            interventions=interventions,
            model=model,
            revision=revision,
        )
        return await self._estimate(cost_pb2.EstimateCostRequest(activations=request), timeout)

    async def intervene(
        self,
        prompt: Prompt | None = None,
        experiments: Iterable[Experiment | Intervention] = (),
        *,
        messages: Messages | None = None,
        target: TargetLike | None = None,
        other: TargetLike | None = None,
        sweep: SweepOver | None = None,
        always: Iterable[Intervention] = (),
        positions: int | Iterable[int] | None = None,
        top_k: int | None = None,
        model: str = "",
        revision: str = "",
        timeout: float | None = None,
    ) -> InterventionEffects:
        """Measure the effects of many experiments, each a changed forward pass, in one request.

        With `resume=True` of the client, an interrupted stream is requested again as a whole, and
        the effects received before are kept.

        Args:
            prompt: Text, which gets the tokenizer's special tokens, or token ids, used as they are.
            experiments: Experiments, or interventions that are experiments by themselves.
            messages: A conversation instead of a prompt: messages with `role` and `content`, or a
                `Chat`.
            target: The token whose probability is reported, as text, in which a leading space
                counts, or as an id; None = the model's own prediction without interventions.
            other: A second token; the difference of both logits is reported.
            sweep: Further experiments: an intervention split by layer, position, head, neuron or
                source. There may be 16,384 experiments in all.
            always: Interventions of every experiment, before its own, but not of the header.
            positions: Positions where the prediction is read, negative from the end; None = the
                last.
            top_k: Number of tokens to list in each prediction, at most 100; None = 5.
            model: The model's name; may be empty if only one is loaded.
            revision: The expected revision; any other is refused. Empty = any.
            timeout: Maximum seconds for the whole stream; None = the client's.

        Returns:
            The predictions without interventions, and the effects by number of the experiment.

        Raises:
            TypeError: An argument has an invalid type.
            ValueError: An argument has a value that no server accepts.
            InterveneInterrupted: The stream was interrupted; `partial` has the effects received.
            JanuslensError: The call failed; `januslens.errors` has the types.
        """
        stream = self.stream_intervene(
            prompt,
            experiments,
            messages=messages,
            target=target,
            other=other,
            sweep=sweep,
            always=always,
            positions=positions,
            top_k=top_k,
            model=model,
            revision=revision,
            timeout=timeout,
        )
        async with stream:
            return await stream.result()

    def stream_intervene(
        self,
        prompt: Prompt | None = None,
        experiments: Iterable[Experiment | Intervention] = (),
        *,
        messages: Messages | None = None,
        target: TargetLike | None = None,
        other: TargetLike | None = None,
        sweep: SweepOver | None = None,
        always: Iterable[Intervention] = (),
        positions: int | Iterable[int] | None = None,
        top_k: int | None = None,
        model: str = "",
        revision: str = "",
        timeout: float | None = None,
    ) -> AsyncEventStream[InterveneEvent, InterventionEffects]:
        """Measure effects as in `intervene`, and receive each one when it is known.

        Experiments that change lower layers run first, so their numbers may not ascend.

        Args:
            prompt: Text, which gets the tokenizer's special tokens, or token ids, used as they are.
            experiments: Experiments, or interventions that are experiments by themselves.
            messages: A conversation instead of a prompt: messages with `role` and `content`, or a
                `Chat`.
            target: The token whose probability is reported, as text, in which a leading space
                counts, or as an id; None = the model's own prediction without interventions.
            other: A second token; the difference of both logits is reported.
            sweep: Further experiments: an intervention split by layer, position, head, neuron or
                source. There may be 16,384 experiments in all.
            always: Interventions of every experiment, before its own, but not of the header.
            positions: Positions where the prediction is read, negative from the end; None = the
                last.
            top_k: Number of tokens to list in each prediction, at most 100; None = 5.
            model: The model's name; may be empty if only one is loaded.
            revision: The expected revision; any other is refused. Empty = any.
            timeout: Maximum seconds for the whole stream; None = the client's.

        Returns:
            A stream of the header, the effects and the summary. Use it as a context manager.

        Raises:
            TypeError: An argument has an invalid type.
            ValueError: An argument has a value that no server accepts.
            JanuslensError: While iterating: the call failed; `partial` has the effects received.
        """
        request = intervene_request(
            prompt,
            experiments,
            messages=messages,
            target=target,
            other=other,
            sweep=sweep,
            always=always,
            positions=positions,
            top_k=top_k,
            model=model,
            revision=revision,
        )
        return self._stream("Intervene", request, timeout, InterveneAssembler())

    async def estimate_intervene(
        self,
        prompt: Prompt | None = None,
        experiments: Iterable[Experiment | Intervention] = (),
        *,
        messages: Messages | None = None,
        target: TargetLike | None = None,
        other: TargetLike | None = None,
        sweep: SweepOver | None = None,
        always: Iterable[Intervention] = (),
        positions: int | Iterable[int] | None = None,
        top_k: int | None = None,
        model: str = "",
        revision: str = "",
        timeout: float | None = None,
    ) -> CostEstimate:
        """Estimate the cost of `intervene` with the same arguments, without running it.

        Args:
            prompt: Text, which gets the tokenizer's special tokens, or token ids, used as they are.
            experiments: Experiments, or interventions that are experiments by themselves.
            messages: A conversation instead of a prompt: messages with `role` and `content`, or a
                `Chat`.
            target: The token whose probability is reported, as text, in which a leading space
                counts, or as an id; None = the model's own prediction without interventions.
            other: A second token; the difference of both logits is reported.
            sweep: Further experiments: an intervention split by layer, position, head, neuron or
                source. There may be 16,384 experiments in all.
            always: Interventions of every experiment, before its own, but not of the header.
            positions: Positions where the prediction is read, negative from the end; None = the
                last.
            top_k: Number of tokens to list in each prediction, at most 100; None = 5.
            model: The model's name; may be empty if only one is loaded.
            revision: The expected revision; any other is refused. Empty = any.
            timeout: Maximum seconds for the call; None = the client's.

        Raises:
            TypeError: An argument has an invalid type.
            ValueError: An argument has a value that no server accepts.
            JanuslensError: The call failed; `januslens.errors` has the types.
        """
        request = intervene_request(
            prompt,
            experiments,
            messages=messages,
            target=target,
            other=other,
            sweep=sweep,
            always=always,
            positions=positions,
            top_k=top_k,
            model=model,
            revision=revision,
        )
        return await self._estimate(cost_pb2.EstimateCostRequest(intervene=request), timeout)

    async def generate(
        self,
        prompt: Prompt | None = None,
        *,
        messages: Messages | None = None,
        max_new_tokens: int | None = None,
        temperature: float = 0.0,
        sample_top_k: int = 0,
        top_p: float = 0.0,
        seed: int = 0,
        stop: str | Iterable[str] = (),
        top_k: int | None = None,
        layers: Layers | Literal["all"] | None = None,
        layer_top_k: int | None = None,
        interventions: Iterable[Intervention] = (),
        model: str = "",
        revision: str = "",
        timeout: float | None = None,
    ) -> AsyncGeneration:
        """Continue a prompt, and report what the model and its layers predicted at each step.

        Args:
            prompt: Text, which gets the tokenizer's special tokens, or token ids, used as they are.
            messages: A conversation instead of a prompt: messages with `role` and `content`, or a
                `Chat`.
            max_new_tokens: Maximum number of tokens; None = the server's default.
            temperature: Divides the logits before a token is drawn; 0 = take the most likely token.
            sample_top_k: Number of most likely tokens to draw from; 0 = all.
            top_p: Draw from the fewest most likely tokens whose probabilities add up to at least
                this; 0 = all.
            seed: Seed of the draws; the same seed draws the same tokens.
            stop: Text or texts that end the generation; the last token completes the text.
            top_k: Most likely tokens to list at each step; None = the server's default, 0 = none.
            layers: Layers whose output is read at each step, from 0, or `"all"`; None = none.
            layer_top_k: Most likely tokens to list per layer; None = the server's default, 0 =
                none.
            interventions: Changes of the forward passes, made by `januslens.interventions`. Those
                without positions also apply to every generated token.
            model: The model's name; may be empty if only one is loaded.
            revision: The expected revision; any other is refused. Empty = any.
            timeout: Maximum seconds for the whole stream; None = the client's.

        Raises:
            TypeError: An argument has an invalid type.
            ValueError: An argument has a value that no server accepts.
            GenerationInterrupted: The stream was interrupted; `partial` has the tokens received.
            JanuslensError: The call failed; `januslens.errors` has the types.
        """
        stream = self.stream_generate(
            prompt,
            messages=messages,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            sample_top_k=sample_top_k,
            top_p=top_p,
            seed=seed,
            stop=stop,
            top_k=top_k,
            layers=layers,
            layer_top_k=layer_top_k,
            interventions=interventions,
            model=model,
            revision=revision,
            timeout=timeout,
        )
        async with stream:
            return await stream.result()

    def stream_generate(
        self,
        prompt: Prompt | None = None,
        *,
        messages: Messages | None = None,
        max_new_tokens: int | None = None,
        temperature: float = 0.0,
        sample_top_k: int = 0,
        top_p: float = 0.0,
        seed: int = 0,
        stop: str | Iterable[str] = (),
        top_k: int | None = None,
        layers: Layers | Literal["all"] | None = None,
        layer_top_k: int | None = None,
        interventions: Iterable[Intervention] = (),
        model: str = "",
        revision: str = "",
        timeout: float | None = None,
    ) -> AsyncEventStream[GenerationEvent, AsyncGeneration]:
        """Continue a prompt as in `generate`, and receive each token when it is generated.

        Args:
            prompt: Text, which gets the tokenizer's special tokens, or token ids, used as they are.
            messages: A conversation instead of a prompt: messages with `role` and `content`, or a
                `Chat`.
            max_new_tokens: Maximum number of tokens; None = the server's default.
            temperature: Divides the logits before a token is drawn; 0 = take the most likely token.
            sample_top_k: Number of most likely tokens to draw from; 0 = all.
            top_p: Draw from the fewest most likely tokens whose probabilities add up to at least
                this; 0 = all.
            seed: Seed of the draws; the same seed draws the same tokens.
            stop: Text or texts that end the generation; the last token completes the text.
            top_k: Most likely tokens to list at each step; None = the server's default, 0 = none.
            layers: Layers whose output is read at each step, from 0, or `"all"`; None = none.
            layer_top_k: Most likely tokens to list per layer; None = the server's default, 0 =
                none.
            interventions: Changes of the forward passes, made by `januslens.interventions`. Those
                without positions also apply to every generated token.
            model: The model's name; may be empty if only one is loaded.
            revision: The expected revision; any other is refused. Empty = any.
            timeout: Maximum seconds for the whole stream; None = the client's.

        Returns:
            A stream of the header, the tokens and the summary. Use it as a context manager.

        Raises:
            TypeError: An argument has an invalid type.
            ValueError: An argument has a value that no server accepts.
            JanuslensError: While iterating: the call failed; `partial` has the tokens received.
        """
        request = generate_request(
            prompt,
            messages=messages,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            sample_top_k=sample_top_k,
            top_p=top_p,
            seed=seed,
            stop=stop,
            top_k=top_k,
            layers=layers,
            layer_top_k=layer_top_k,
            interventions=interventions,
            model=model,
            revision=revision,
        )
        return self._stream(
            "Generate",
            request,
            timeout,
            GenerateAssembler(
                partial(
                    AsyncGeneration,
                    client=cast("AsyncClient", self),
                    changes=tuple(request.interventions),
                )
            ),
        )

    async def estimate_generate(
        self,
        prompt: Prompt | None = None,
        *,
        messages: Messages | None = None,
        max_new_tokens: int | None = None,
        temperature: float = 0.0,
        sample_top_k: int = 0,
        top_p: float = 0.0,
        seed: int = 0,
        stop: str | Iterable[str] = (),
        top_k: int | None = None,
        layers: Layers | Literal["all"] | None = None,
        layer_top_k: int | None = None,
        interventions: Iterable[Intervention] = (),
        model: str = "",
        revision: str = "",
        timeout: float | None = None,
    ) -> CostEstimate:
        """Estimate the cost of `generate` with the same arguments, without running it.

        Args:
            prompt: Text, which gets the tokenizer's special tokens, or token ids, used as they are.
            messages: A conversation instead of a prompt: messages with `role` and `content`, or a
                `Chat`.
            max_new_tokens: Maximum number of tokens; None = the server's default.
            temperature: Divides the logits before a token is drawn; 0 = take the most likely token.
            sample_top_k: Number of most likely tokens to draw from; 0 = all.
            top_p: Draw from the fewest most likely tokens whose probabilities add up to at least
                this; 0 = all.
            seed: Seed of the draws; the same seed draws the same tokens.
            stop: Text or texts that end the generation; the last token completes the text.
            top_k: Most likely tokens to list at each step; None = the server's default, 0 = none.
            layers: Layers whose output is read at each step, from 0, or `"all"`; None = none.
            layer_top_k: Most likely tokens to list per layer; None = the server's default, 0 =
                none.
            interventions: Changes of the forward passes, made by `januslens.interventions`. Those
                without positions also apply to every generated token.
            model: The model's name; may be empty if only one is loaded.
            revision: The expected revision; any other is refused. Empty = any.
            timeout: Maximum seconds for the call; None = the client's.

        Raises:
            TypeError: An argument has an invalid type.
            ValueError: An argument has a value that no server accepts.
            JanuslensError: The call failed; `januslens.errors` has the types.
        """
        request = generate_request(
            prompt,
            messages=messages,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            sample_top_k=sample_top_k,
            top_p=top_p,
            seed=seed,
            stop=stop,
            top_k=top_k,
            layers=layers,
            layer_top_k=layer_top_k,
            interventions=interventions,
            model=model,
            revision=revision,
        )
        return await self._estimate(cost_pb2.EstimateCostRequest(generate=request), timeout)
