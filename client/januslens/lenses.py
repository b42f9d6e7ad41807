"""Project forward and backward passes to the vocabulary.

Generated from `_requests.py` by client/generate.py; do not edit.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from januslens._requests import gradient_lens_request, trace_request
from januslens.arguments import (
    Layers,
    Loss,
    Messages,
    Positions,
    Prompt,
    SubjectLike,
    TargetLike,
)
from januslens.assemblers import GradientAssembler, GradientEvent, TraceAssembler, TraceEvent
from januslens.calls import Calls, EventStream
from januslens.interventions import (
    Intervention,
)
from januslens.results.gradient import Gradient
from januslens.results.kinds import (
    Criterion,
    Lens,
    MatrixKind,
    NodeKind,
)
from januslens.results.models import CostEstimate
from januslens.results.trace import Trace
from januslens.v1 import (
    cost_pb2,
)


class Lenses(Calls):
    """Project forward and backward passes to the vocabulary. `Client` has these methods."""

    def trace(
        self,
        prompt: Prompt | None = None,
        target: TargetLike | None = None,
        *,
        messages: Messages | None = None,
        layers: Layers | None = None,
        positions: Positions | None = None,
        heads: int | None = None,
        memory_values: int | None = None,
        top_neurons: int | None = None,
        bottom_neurons: int | None = None,
        top_k: int | None = None,
        bottom_k: int | None = None,
        lens: Lens | str = Lens.FINAL_NORM,
        node_kinds: Iterable[NodeKind | str] | None = None,
        vectors: bool = False,
        logit_contribution: bool = True,
        overlap_k: int | None = None,
        checks: bool = False,
        projections: bool | None = None,
        interventions: Iterable[Intervention] = (),
        select_by: Criterion | str | None = None,
        other: TargetLike | None = None,
        attribution: bool = False,
        gradients: bool = False,
        only_heads: Iterable[tuple[int, int] | str] = (),
        only_neurons: Iterable[tuple[int, ...] | str] = (),
        only_sources: Iterable[tuple[int, int, int] | str] = (),
        targets: Mapping[int, TargetLike] | None = None,
        next_tokens: bool = False,
        model: str = "",
        revision: str = "",
        timeout: float | None = None,
    ) -> Trace:
        """Trace the forward pass as a flow graph of vectors projected to the vocabulary (VISIT).

        Args:
            prompt: Text, which gets the tokenizer's special tokens, or token ids, used as they are.
            target: The token whose rank every projection reports: text of one token, in which a
                leading space counts, or a token id. None = the model's own next token at each
                position.
            messages: A conversation instead of a prompt: messages with `role` and `content`, or a
                `Chat`.
            layers: Layers to send, from 0 or negative from the last; None = all.
            positions: Query positions, negative from the end, or `"all"`; None = the last one.
            heads: Maximum heads per layer, largest score first; None = the server's default, 0 =
                all.
            memory_values: Maximum source positions per head, largest score first; None = the
                server's default, 0 = all.
            top_neurons: Maximum neurons per MLP, largest score first; None = the server's default,
                0 = all.
            bottom_neurons: Maximum neurons per MLP, smallest score first; None = the server's
                default, 0 = none.
            top_k: Most likely tokens per projection; None = the server's default, 0 = none.
            bottom_k: Least likely tokens per projection; None = the server's default, 0 = none.
            lens: `FINAL_NORM`, `NORMALIZED` (scale each vector to length 1 first) or `RAW`.
            node_kinds: Node kinds to send; None = all. Hiding nodes does not change any sum.
            vectors: Send the vectors of the nodes.
            logit_contribution: Send each part's contribution to the target's logit.
            overlap_k: Send each edge's intersection score, computed on this many top tokens.
            checks: Repeat the model's self-check on this request and report it in the summary.
            projections: Project the nodes to the vocabulary, which takes most of the time of a
                trace; None = yes, unless `top_k` and `bottom_k` are 0.
            interventions: Changes of the forward pass, made by `januslens.interventions`.
            select_by: Score by which heads, sources and neurons are selected: `VISIT` (norm,
                attention, and activation times norm), `CONTRIBUTION` to the target's logit, or
                `ATTRIBUTION`; None = the server's default, `VISIT`.
            other: A second token: logit contributions and attributions are those of the difference
                between the target's logit and this token's logit.
            attribution: Send each part's first-order effect on the target's logit at the last
                position of the trace, and the norms of the states' gradients. This takes a backward
                pass.
            gradients: Send the gradients of the states, projected to the vocabulary.
            only_heads: Heads to send instead of those with the largest scores, as pairs of layer
                and head such as `[(9, 6), (9, 9)]`, or as ids of their nodes, whose position is not
                used. Unless `layers` is given, only their layers are sent.
            only_neurons: Neurons to send instead, as pairs of layer and neuron, as layer, expert
                and neuron in a mixture of experts, or as ids of their nodes.
            only_sources: Sources to send instead of those with the largest scores, as layer, head
                and source position such as `[(9, 6, -2)]`, or as ids of MEMORY_KEY or MEMORY_VALUE
                nodes. Of the heads, only these and those of `only_heads` are sent.
            targets: The targets of single positions, which replace `target` there.
            next_tokens: Take the next token of the prompt as the target of each position (teacher
                forcing). `target` is then the target of the last position only.
            model: The model's name; may be empty if only one is loaded.
            revision: The expected revision; any other is refused. Empty = any.
            timeout: Maximum seconds for the whole stream; None = the client's.

        Raises:
            TypeError: An argument has an invalid type.
            ValueError: An argument has a value that no server accepts.
            TraceInterrupted: The stream was interrupted; `partial` has the layers received.
            JanuslensError: The call failed; `januslens.errors` has the types.
        """
        stream = self.stream_trace(
            prompt,
            target,
            messages=messages,
            layers=layers,
            positions=positions,
            heads=heads,
            memory_values=memory_values,
            top_neurons=top_neurons,
            bottom_neurons=bottom_neurons,
            top_k=top_k,
            bottom_k=bottom_k,
            lens=lens,
            node_kinds=node_kinds,
            vectors=vectors,
            logit_contribution=logit_contribution,
            overlap_k=overlap_k,
            checks=checks,
            projections=projections,
            interventions=interventions,
            select_by=select_by,
            other=other,
            attribution=attribution,
            gradients=gradients,
            only_heads=only_heads,
            only_neurons=only_neurons,
            only_sources=only_sources,
            targets=targets,
            next_tokens=next_tokens,
            model=model,
            revision=revision,
            timeout=timeout,
        )
        with stream:
            return stream.result()

    def stream_trace(
        self,
        prompt: Prompt | None = None,
        target: TargetLike | None = None,
        *,
        messages: Messages | None = None,
        layers: Layers | None = None,
        positions: Positions | None = None,
        heads: int | None = None,
        memory_values: int | None = None,
        top_neurons: int | None = None,
        bottom_neurons: int | None = None,
        top_k: int | None = None,
        bottom_k: int | None = None,
        lens: Lens | str = Lens.FINAL_NORM,
        node_kinds: Iterable[NodeKind | str] | None = None,
        vectors: bool = False,
        logit_contribution: bool = True,
        overlap_k: int | None = None,
        checks: bool = False,
        projections: bool | None = None,
        interventions: Iterable[Intervention] = (),
        select_by: Criterion | str | None = None,
        other: TargetLike | None = None,
        attribution: bool = False,
        gradients: bool = False,
        only_heads: Iterable[tuple[int, int] | str] = (),
        only_neurons: Iterable[tuple[int, ...] | str] = (),
        only_sources: Iterable[tuple[int, int, int] | str] = (),
        targets: Mapping[int, TargetLike] | None = None,
        next_tokens: bool = False,
        model: str = "",
        revision: str = "",
        timeout: float | None = None,
    ) -> EventStream[TraceEvent, Trace]:
        """Trace the forward pass as in `trace`, and receive each layer when it is complete.

        Args:
            prompt: Text, which gets the tokenizer's special tokens, or token ids, used as they are.
            target: The token whose rank every projection reports: text of one token, in which a
                leading space counts, or a token id. None = the model's own next token at each
                position.
            messages: A conversation instead of a prompt: messages with `role` and `content`, or a
                `Chat`.
            layers: Layers to send, from 0 or negative from the last; None = all.
            positions: Query positions, negative from the end, or `"all"`; None = the last one.
            heads: Maximum heads per layer, largest score first; None = the server's default, 0 =
                all.
            memory_values: Maximum source positions per head, largest score first; None = the
                server's default, 0 = all.
            top_neurons: Maximum neurons per MLP, largest score first; None = the server's default,
                0 = all.
            bottom_neurons: Maximum neurons per MLP, smallest score first; None = the server's
                default, 0 = none.
            top_k: Most likely tokens per projection; None = the server's default, 0 = none.
            bottom_k: Least likely tokens per projection; None = the server's default, 0 = none.
            lens: `FINAL_NORM`, `NORMALIZED` (scale each vector to length 1 first) or `RAW`.
            node_kinds: Node kinds to send; None = all. Hiding nodes does not change any sum.
            vectors: Send the vectors of the nodes.
            logit_contribution: Send each part's contribution to the target's logit.
            overlap_k: Send each edge's intersection score, computed on this many top tokens.
            checks: Repeat the model's self-check on this request and report it in the summary.
            projections: Project the nodes to the vocabulary, which takes most of the time of a
                trace; None = yes, unless `top_k` and `bottom_k` are 0.
            interventions: Changes of the forward pass, made by `januslens.interventions`.
            select_by: Score by which heads, sources and neurons are selected: `VISIT` (norm,
                attention, and activation times norm), `CONTRIBUTION` to the target's logit, or
                `ATTRIBUTION`; None = the server's default, `VISIT`.
            other: A second token: logit contributions and attributions are those of the difference
                between the target's logit and this token's logit.
            attribution: Send each part's first-order effect on the target's logit at the last
                position of the trace, and the norms of the states' gradients. This takes a backward
                pass.
            gradients: Send the gradients of the states, projected to the vocabulary.
            only_heads: Heads to send instead of those with the largest scores, as pairs of layer
                and head such as `[(9, 6), (9, 9)]`, or as ids of their nodes, whose position is not
                used. Unless `layers` is given, only their layers are sent.
            only_neurons: Neurons to send instead, as pairs of layer and neuron, as layer, expert
                and neuron in a mixture of experts, or as ids of their nodes.
            only_sources: Sources to send instead of those with the largest scores, as layer, head
                and source position such as `[(9, 6, -2)]`, or as ids of MEMORY_KEY or MEMORY_VALUE
                nodes. Of the heads, only these and those of `only_heads` are sent.
            targets: The targets of single positions, which replace `target` there.
            next_tokens: Take the next token of the prompt as the target of each position (teacher
                forcing). `target` is then the target of the last position only.
            model: The model's name; may be empty if only one is loaded.
            revision: The expected revision; any other is refused. Empty = any.
            timeout: Maximum seconds for the whole stream; None = the client's.

        Returns:
            A stream of the header, the layers and the summary. Use it as a context manager.

        Raises:
            TypeError: An argument has an invalid type.
            ValueError: An argument has a value that no server accepts.
            JanuslensError: While iterating: the call failed; `partial` has the layers received.
        """
        request = trace_request(
            prompt,
            target,
            messages=messages,
            layers=layers,
            positions=positions,
            heads=heads,
            memory_values=memory_values,
            top_neurons=top_neurons,
            bottom_neurons=bottom_neurons,
            top_k=top_k,
            bottom_k=bottom_k,
            lens=lens,
            node_kinds=node_kinds,
            vectors=vectors,
            logit_contribution=logit_contribution,
            overlap_k=overlap_k,
            checks=checks,
            projections=projections,
            interventions=interventions,
            select_by=select_by,
            other=other,
            attribution=attribution,
            gradients=gradients,
            only_heads=only_heads,
            only_neurons=only_neurons,
            only_sources=only_sources,
            targets=targets,
            next_tokens=next_tokens,
            model=model,
            revision=revision,
        )
        return self._stream("Trace", request, timeout, TraceAssembler())

    def estimate_trace(
        self,
        prompt: Prompt | None = None,
        target: TargetLike | None = None,
        *,
        messages: Messages | None = None,
        layers: Layers | None = None,
        positions: Positions | None = None,
        heads: int | None = None,
        memory_values: int | None = None,
        top_neurons: int | None = None,
        bottom_neurons: int | None = None,
        top_k: int | None = None,
        bottom_k: int | None = None,
        lens: Lens | str = Lens.FINAL_NORM,
        node_kinds: Iterable[NodeKind | str] | None = None,
        vectors: bool = False,
        logit_contribution: bool = True,
        overlap_k: int | None = None,
        checks: bool = False,
        projections: bool | None = None,
        interventions: Iterable[Intervention] = (),
        select_by: Criterion | str | None = None,
        other: TargetLike | None = None,
        attribution: bool = False,
        gradients: bool = False,
        only_heads: Iterable[tuple[int, int] | str] = (),
        only_neurons: Iterable[tuple[int, ...] | str] = (),
        only_sources: Iterable[tuple[int, int, int] | str] = (),
        targets: Mapping[int, TargetLike] | None = None,
        next_tokens: bool = False,
        model: str = "",
        revision: str = "",
        timeout: float | None = None,
    ) -> CostEstimate:
        """Estimate the cost of `trace` with the same arguments, without running it.

        Args:
            prompt: Text, which gets the tokenizer's special tokens, or token ids, used as they are.
            target: The token whose rank every projection reports: text of one token, in which a
                leading space counts, or a token id. None = the model's own next token at each
                position.
            messages: A conversation instead of a prompt: messages with `role` and `content`, or a
                `Chat`.
            layers: Layers to send, from 0 or negative from the last; None = all.
            positions: Query positions, negative from the end, or `"all"`; None = the last one.
            heads: Maximum heads per layer, largest score first; None = the server's default, 0 =
                all.
            memory_values: Maximum source positions per head, largest score first; None = the
                server's default, 0 = all.
            top_neurons: Maximum neurons per MLP, largest score first; None = the server's default,
                0 = all.
            bottom_neurons: Maximum neurons per MLP, smallest score first; None = the server's
                default, 0 = none.
            top_k: Most likely tokens per projection; None = the server's default, 0 = none.
            bottom_k: Least likely tokens per projection; None = the server's default, 0 = none.
            lens: `FINAL_NORM`, `NORMALIZED` (scale each vector to length 1 first) or `RAW`.
            node_kinds: Node kinds to send; None = all. Hiding nodes does not change any sum.
            vectors: Send the vectors of the nodes.
            logit_contribution: Send each part's contribution to the target's logit.
            overlap_k: Send each edge's intersection score, computed on this many top tokens.
            checks: Repeat the model's self-check on this request and report it in the summary.
            projections: Project the nodes to the vocabulary, which takes most of the time of a
                trace; None = yes, unless `top_k` and `bottom_k` are 0.
            interventions: Changes of the forward pass, made by `januslens.interventions`.
            select_by: Score by which heads, sources and neurons are selected: `VISIT` (norm,
                attention, and activation times norm), `CONTRIBUTION` to the target's logit, or
                `ATTRIBUTION`; None = the server's default, `VISIT`.
            other: A second token: logit contributions and attributions are those of the difference
                between the target's logit and this token's logit.
            attribution: Send each part's first-order effect on the target's logit at the last
                position of the trace, and the norms of the states' gradients. This takes a backward
                pass.
            gradients: Send the gradients of the states, projected to the vocabulary.
            only_heads: Heads to send instead of those with the largest scores, as pairs of layer
                and head such as `[(9, 6), (9, 9)]`, or as ids of their nodes, whose position is not
                used. Unless `layers` is given, only their layers are sent.
            only_neurons: Neurons to send instead, as pairs of layer and neuron, as layer, expert
                and neuron in a mixture of experts, or as ids of their nodes.
            only_sources: Sources to send instead of those with the largest scores, as layer, head
                and source position such as `[(9, 6, -2)]`, or as ids of MEMORY_KEY or MEMORY_VALUE
                nodes. Of the heads, only these and those of `only_heads` are sent.
            targets: The targets of single positions, which replace `target` there.
            next_tokens: Take the next token of the prompt as the target of each position (teacher
                forcing). `target` is then the target of the last position only.
            model: The model's name; may be empty if only one is loaded.
            revision: The expected revision; any other is refused. Empty = any.
            timeout: Maximum seconds for the call; None = the client's.

        Raises:
            TypeError: An argument has an invalid type.
            ValueError: An argument has a value that no server accepts.
            JanuslensError: The call failed; `januslens.errors` has the types.
        """
        request = trace_request(
            prompt,
            target,
            messages=messages,
            layers=layers,
            positions=positions,
            heads=heads,
            memory_values=memory_values,
            top_neurons=top_neurons,
            bottom_neurons=bottom_neurons,
            top_k=top_k,
            bottom_k=bottom_k,
            lens=lens,
            node_kinds=node_kinds,
            vectors=vectors,
            logit_contribution=logit_contribution,
            overlap_k=overlap_k,
            checks=checks,
            projections=projections,
            interventions=interventions,
            select_by=select_by,
            other=other,
            attribution=attribution,
            gradients=gradients,
            only_heads=only_heads,
            only_neurons=only_neurons,
            only_sources=only_sources,
            targets=targets,
            next_tokens=next_tokens,
            model=model,
            revision=revision,
        )
        return self._estimate(cost_pb2.EstimateCostRequest(trace=request), timeout)

    def gradient_lens(
        self,
        prompt: Prompt | None = None,
        target: TargetLike | None = None,
        *,
        messages: Messages | None = None,
        loss: Loss | None = None,
        matrices: Iterable[MatrixKind | str] | None = None,
        modules: Iterable[str] = (),
        layers: Layers | None = None,
        top_k: int | None = None,
        bottom_k: int | None = None,
        lens: Lens | str = Lens.FINAL_NORM,
        components: int | None = None,
        spectrum: int = 0,
        neurons: int = 0,
        learning_rate: float | None = None,
        subject: SubjectLike | None = None,
        factors: bool = False,
        verify: bool = False,
        attention: bool = False,
        interventions: Iterable[Intervention] = (),
        model: str = "",
        revision: str = "",
        timeout: float | None = None,
    ) -> Gradient:
        """Compute the gradient of every weight matrix as factors, projected to the vocabulary.

        Source: Backward Lens (Katz et al., 2024).

        Args:
            prompt: Text, which gets the tokenizer's special tokens, or token ids, used as they are.
            target: The target of the loss `-log p(target | prompt)`: text, in which a leading space
                counts, one token id or several. Pass either `target` or `loss`.
            messages: A conversation instead of a prompt: messages with `role` and `content`, or a
                `Chat`.
            loss: A `LogitDifference`, `KlDivergence` or `NegativeLogLikelihood`.
            matrices: Kinds of matrices; None = `["FF1", "FF2"]`. For a gated MLP, FF1 means GATE
                and UP. None with `modules` = no kinds.
            modules: Linear maps to send as well, by the names of their modules in the block, for
                example `linear_attn.out_proj`; `*` stands for any characters. `Model.levels` has
                the names.
            layers: Layers to send, from 0 or negative from the last; None = all.
            top_k: Most likely tokens per projection; None = the server's default, 0 = none.
            bottom_k: Least likely tokens per projection; None = the server's default, 0 = none.
            lens: `FINAL_NORM`, `NORMALIZED` (for very small VJPs, as in the paper) or `RAW`.
            components: Maximum factor pairs per matrix, largest first; None = the server's default,
                0 = all, which the dense gradient needs.
            spectrum: Number of singular values and directions per matrix.
            neurons: Number of neurons per matrix, largest change by a descent step first.
            learning_rate: Learning rate of the descent step; None = report only the direction of
                the change.
            subject: The subject of the prompt, as text or as token positions `(start, end)`; adds
                norms and ranks by segment.
            factors: Send the factors, for `matrix.gradient()` and `gradient.save_factors()`.
            verify: Compare each matrix with autograd's dense gradient.
            attention: Send the attention patterns of the layers and their gradients (Reversed
                Attention; Katz & Wolf, 2025).
            interventions: Changes of the forward pass, made by `januslens.interventions`.
            model: The model's name; may be empty if only one is loaded.
            revision: The expected revision; any other is refused. Empty = any.
            timeout: Maximum seconds for the whole stream; None = the client's.

        Raises:
            TypeError: An argument has an invalid type.
            ValueError: An argument has a value that no server accepts.
            GradientInterrupted: The stream was interrupted; `partial` has the matrices received.
            JanuslensError: The call failed; `januslens.errors` has the types.
        """
        stream = self.stream_gradient_lens(
            prompt,
            target,
            messages=messages,
            loss=loss,
            matrices=matrices,
            modules=modules,
            layers=layers,
            top_k=top_k,
            bottom_k=bottom_k,
            lens=lens,
            components=components,
            spectrum=spectrum,
            neurons=neurons,
            learning_rate=learning_rate,
            subject=subject,
            factors=factors,
            verify=verify,
            attention=attention,
            interventions=interventions,
            model=model,
            revision=revision,
            timeout=timeout,
        )
        with stream:
            return stream.result()

    def stream_gradient_lens(
        self,
        prompt: Prompt | None = None,
        target: TargetLike | None = None,
        *,
        messages: Messages | None = None,
        loss: Loss | None = None,
        matrices: Iterable[MatrixKind | str] | None = None,
        modules: Iterable[str] = (),
        layers: Layers | None = None,
        top_k: int | None = None,
        bottom_k: int | None = None,
        lens: Lens | str = Lens.FINAL_NORM,
        components: int | None = None,
        spectrum: int = 0,
        neurons: int = 0,
        learning_rate: float | None = None,
        subject: SubjectLike | None = None,
        factors: bool = False,
        verify: bool = False,
        attention: bool = False,
        interventions: Iterable[Intervention] = (),
        model: str = "",
        revision: str = "",
        timeout: float | None = None,
    ) -> EventStream[GradientEvent, Gradient]:
        """Compute `gradient_lens`, and receive each matrix when it is complete, last layer first.

        Args:
            prompt: Text, which gets the tokenizer's special tokens, or token ids, used as they are.
            target: The target of the loss `-log p(target | prompt)`: text, in which a leading space
                counts, one token id or several. Pass either `target` or `loss`.
            messages: A conversation instead of a prompt: messages with `role` and `content`, or a
                `Chat`.
            loss: A `LogitDifference`, `KlDivergence` or `NegativeLogLikelihood`.
            matrices: Kinds of matrices; None = `["FF1", "FF2"]`. For a gated MLP, FF1 means GATE
                and UP. None with `modules` = no kinds.
            modules: Linear maps to send as well, by the names of their modules in the block, for
                example `linear_attn.out_proj`; `*` stands for any characters. `Model.levels` has
                the names.
            layers: Layers to send, from 0 or negative from the last; None = all.
            top_k: Most likely tokens per projection; None = the server's default, 0 = none.
            bottom_k: Least likely tokens per projection; None = the server's default, 0 = none.
            lens: `FINAL_NORM`, `NORMALIZED` (for very small VJPs, as in the paper) or `RAW`.
            components: Maximum factor pairs per matrix, largest first; None = the server's default,
                0 = all, which the dense gradient needs.
            spectrum: Number of singular values and directions per matrix.
            neurons: Number of neurons per matrix, largest change by a descent step first.
            learning_rate: Learning rate of the descent step; None = report only the direction of
                the change.
            subject: The subject of the prompt, as text or as token positions `(start, end)`; adds
                norms and ranks by segment.
            factors: Send the factors, for `matrix.gradient()` and `gradient.save_factors()`.
            verify: Compare each matrix with autograd's dense gradient.
            attention: Send the attention patterns of the layers and their gradients (Reversed
                Attention; Katz & Wolf, 2025).
            interventions: Changes of the forward pass, made by `januslens.interventions`.
            model: The model's name; may be empty if only one is loaded.
            revision: The expected revision; any other is refused. Empty = any.
            timeout: Maximum seconds for the whole stream; None = the client's.

        Returns:
            A stream of the header, the matrices and the summary. Use it as a context manager.

        Raises:
            TypeError: An argument has an invalid type.
            ValueError: An argument has a value that no server accepts.
            JanuslensError: While iterating: the call failed; `partial` has the matrices received.
        """
        request = gradient_lens_request(
            prompt,
            target,
            messages=messages,
            loss=loss,
            matrices=matrices,
            modules=modules,
            layers=layers,
            top_k=top_k,
            bottom_k=bottom_k,
            lens=lens,
            components=components,
            spectrum=spectrum,
            neurons=neurons,
            learning_rate=learning_rate,
            subject=subject,
            factors=factors,
            verify=verify,
            attention=attention,
            interventions=interventions,
            model=model,
            revision=revision,
        )
        return self._stream("GradientLens", request, timeout, GradientAssembler())

    def estimate_gradient_lens(
        self,
        prompt: Prompt | None = None,
        target: TargetLike | None = None,
        *,
        messages: Messages | None = None,
        loss: Loss | None = None,
        matrices: Iterable[MatrixKind | str] | None = None,
        modules: Iterable[str] = (),
        layers: Layers | None = None,
        top_k: int | None = None,
        bottom_k: int | None = None,
        lens: Lens | str = Lens.FINAL_NORM,
        components: int | None = None,
        spectrum: int = 0,
        neurons: int = 0,
        learning_rate: float | None = None,
        subject: SubjectLike | None = None,
        factors: bool = False,
        verify: bool = False,
        attention: bool = False,
        interventions: Iterable[Intervention] = (),
        model: str = "",
        revision: str = "",
        timeout: float | None = None,
    ) -> CostEstimate:
        """Estimate the cost of `gradient_lens` with the same arguments, without running it.

        Args:
            prompt: Text, which gets the tokenizer's special tokens, or token ids, used as they are.
            target: The target of the loss `-log p(target | prompt)`: text, in which a leading space
                counts, one token id or several. Pass either `target` or `loss`.
            messages: A conversation instead of a prompt: messages with `role` and `content`, or a
                `Chat`.
            loss: A `LogitDifference`, `KlDivergence` or `NegativeLogLikelihood`.
            matrices: Kinds of matrices; None = `["FF1", "FF2"]`. For a gated MLP, FF1 means GATE
                and UP. None with `modules` = no kinds.
            modules: Linear maps to send as well, by the names of their modules in the block, for
                example `linear_attn.out_proj`; `*` stands for any characters. `Model.levels` has
                the names.
            layers: Layers to send, from 0 or negative from the last; None = all.
            top_k: Most likely tokens per projection; None = the server's default, 0 = none.
            bottom_k: Least likely tokens per projection; None = the server's default, 0 = none.
            lens: `FINAL_NORM`, `NORMALIZED` (for very small VJPs, as in the paper) or `RAW`.
            components: Maximum factor pairs per matrix, largest first; None = the server's default,
                0 = all, which the dense gradient needs.
            spectrum: Number of singular values and directions per matrix.
            neurons: Number of neurons per matrix, largest change by a descent step first.
            learning_rate: Learning rate of the descent step; None = report only the direction of
                the change.
            subject: The subject of the prompt, as text or as token positions `(start, end)`; adds
                norms and ranks by segment.
            factors: Send the factors, for `matrix.gradient()` and `gradient.save_factors()`.
            verify: Compare each matrix with autograd's dense gradient.
            attention: Send the attention patterns of the layers and their gradients (Reversed
                Attention; Katz & Wolf, 2025).
            interventions: Changes of the forward pass, made by `januslens.interventions`.
            model: The model's name; may be empty if only one is loaded.
            revision: The expected revision; any other is refused. Empty = any.
            timeout: Maximum seconds for the call; None = the client's.

        Raises:
            TypeError: An argument has an invalid type.
            ValueError: An argument has a value that no server accepts.
            JanuslensError: The call failed; `januslens.errors` has the types.
        """
        request = gradient_lens_request(
            prompt,
            target,
            messages=messages,
            loss=loss,
            matrices=matrices,
            modules=modules,
            layers=layers,
            top_k=top_k,
            bottom_k=bottom_k,
            lens=lens,
            components=components,
            spectrum=spectrum,
            neurons=neurons,
            learning_rate=learning_rate,
            subject=subject,
            factors=factors,
            verify=verify,
            attention=attention,
            interventions=interventions,
            model=model,
            revision=revision,
        )
        return self._estimate(cost_pb2.EstimateCostRequest(gradient_lens=request), timeout)
