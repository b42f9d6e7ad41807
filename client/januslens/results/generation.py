"""A generated text: its tokens, their probabilities, and what each layer predicted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from typing import TYPE_CHECKING

from januslens.results.exports import PageFrame, json_lines, notebook_html, page_html, require
from januslens.results.kinds import NodeKind
from januslens.results.message_file import save_messages
from januslens.results.models import Provenance, StageTime
from januslens.results.tokens import Token, Tokens, TokenTable
from januslens.results.trace import Trace
from januslens.v1 import generation_pb2, streams_pb2

if TYPE_CHECKING:
    import pandas as pd

END_OF_SEQUENCE = "end_of_sequence"


@dataclass(frozen=True)
class GenerationHeader:
    """Model and prompt of a generation; the first event of its stream.

    Attributes:
        request_id: Id of the call, as in the server's log.
        provenance: The model's revision, data type, device and library versions.
        prompt_tokens: The prompt's tokens, one per position.
    """

    request_id: str
    provenance: Provenance
    prompt_tokens: tuple[Token, ...]

    @classmethod
    def from_message(cls, message: streams_pb2.StreamHeader) -> GenerationHeader:
        """Read the header."""
        return cls(
            request_id=message.request_id,
            provenance=Provenance.from_message(message.provenance),
            prompt_tokens=tuple(map(Token.from_message, message.prompt_tokens)),
        )


@dataclass(frozen=True)
class LayerOutcome:
    """What the output of a layer predicts at the position before a generated token.

    Attributes:
        layer: The layer, from 0.
        rank: Number of tokens with a larger logit than the generated one; 0 = it is predicted.
        probability: Probability of the generated token.
        log_probability: Natural logarithm of this probability, which does not underflow.
        top: The most likely tokens, best first.
    """

    layer: int
    rank: int
    probability: float
    log_probability: float
    top: tuple[Token, ...]


@dataclass(frozen=True)
class GeneratedToken:
    """A generated token. Its figures are those of the model's own distribution.

    Attributes:
        token: The token.
        log_probability: Natural logarithm of its probability.
        entropy_bits: Entropy of the distribution in bits.
        top: The most likely tokens with their probabilities, best first.
        layers: What each layer that was read predicts, ascending.
    """

    token: Token
    log_probability: float
    entropy_bits: float
    top: tuple[tuple[Token, float], ...]
    layers: tuple[LayerOutcome, ...]

    @classmethod
    def from_message(
        cls, message: generation_pb2.GeneratedToken, tokens: TokenTable
    ) -> GeneratedToken:
        """Read one token; `tokens` has the texts of the others."""
        ids, probabilities = message.top_token_ids, message.top_probabilities
        return cls(
            token=Token.from_message(message.token),
            log_probability=message.log_probability,
            entropy_bits=message.entropy_bits,
            top=tuple((tokens[i], p) for i, p in zip(ids, probabilities, strict=True)),
            layers=tuple(
                LayerOutcome(
                    read.layer,
                    read.rank,
                    read.probability,
                    read.log_probability,
                    tuple(tokens[i] for i in read.top_token_ids),
                )
                for read in message.layers
            ),
        )

    @property
    def decided(self) -> int | None:
        """The first layer read from which the token remains the prediction, or None."""
        found = None
        for read in reversed(self.layers):
            if read.rank > 0:
                break
            found = read.layer
        return found


@dataclass(frozen=True)
class GenerationSummary:
    """The last event of a generation.

    Attributes:
        messages: Number of tokens.
        times: Seconds by stage on the server.
        finish_reason: `end_of_sequence`, `stop_text`, `max_new_tokens`, or `max_positions` if the
            context is full.
    """

    messages: int
    times: tuple[StageTime, ...]
    finish_reason: str

    @classmethod
    def from_message(cls, message: streams_pb2.StreamSummary) -> GenerationSummary:
        """Read the summary."""
        times = tuple(StageTime.from_message(time) for time in message.times)
        return cls(message.messages, times, message.finish_reason)


@dataclass(frozen=True)
class GeneratedText:
    """A generated text, token by token. Its length is the number of tokens.

    Attributes:
        header: The model and the prompt.
        tokens: The generated tokens, the end-of-sequence token included.
        summary: Times and the reason for the end; None if the stream was interrupted.
        responses: The messages that this result was read from.
    """

    header: GenerationHeader
    tokens: tuple[GeneratedToken, ...]
    summary: GenerationSummary | None
    responses: tuple[generation_pb2.GenerateResponse, ...] = field(repr=False, compare=False)

    @property
    def provenance(self) -> Provenance:
        """The model's revision, data type, device and library versions."""
        return self.header.provenance

    @property
    def prompt_tokens(self) -> tuple[Token, ...]:
        """The prompt's tokens, one per position."""
        return self.header.prompt_tokens

    @property
    def finish_reason(self) -> str:
        """Why the generation ended; empty if the stream was interrupted."""
        return self.summary.finish_reason if self.summary else ""

    @property
    def text(self) -> str:
        """The generated text, without the end-of-sequence token."""
        said = self.tokens[:-1] if self.finish_reason == END_OF_SEQUENCE else self.tokens
        return b"".join(made.token.raw for made in said).decode(errors="replace")

    def __len__(self) -> int:
        return len(self.tokens)

    def __iter__(self) -> Iterator[GeneratedToken]:
        return iter(self.tokens)

    def ids_before(self, token: int) -> list[int]:
        """Return the ids of the prompt and of the generated tokens before number `token`.

        Negative numbers count from the end.

        Raises:
            IndexError: There is no such token.
        """
        if not -len(self.tokens) <= token < len(self.tokens):
            wanted = f"{-len(self.tokens)} to {len(self.tokens) - 1}"
            raise IndexError(f"no generated token {token}; expected {wanted}")
        said = [made.token.id for made in self.tokens]
        return [prompt.id for prompt in self.prompt_tokens] + said[: token % len(said)]

    def to_pandas(self) -> pd.DataFrame:
        """Return a data frame with one row per token. Requires pandas.

        With a reading it has the columns `decided` and, for each layer, `rank_0` and so on.
        """
        pandas = require("pandas", "analysis", "a frame of tokens")
        frame: pd.DataFrame = pandas.DataFrame([_row(made) for made in self.tokens])
        if "decided" in frame:
            frame["decided"] = frame["decided"].astype("Int64")
        return frame

    def save(self, path: str | PathLike[str]) -> None:
        """Write the messages of the stream to a file that `januslens.load` reads.

        Raises:
            OSError: The file cannot be written.
        """
        save_messages(path, self.responses)

    def to_json_lines(self) -> Iterator[str]:
        """Return the messages as JSON, one line each."""
        return json_lines(self.responses)

    def to_html(self, others: Mapping[str, GeneratedText] | None = None) -> str:
        """Return this text as a page: one HTML file that needs no network.

        Args:
            others: Texts to show beside this one, by title, for example what the model generates
                under interventions. The page marks where they differ from this text.
        """
        return page_html(self, others or {})

    def show(
        self, others: Mapping[str, GeneratedText] | None = None, *, height: int = 600
    ) -> PageFrame:
        """Show the page of `to_html` in a notebook; `height` is in pixels."""
        return PageFrame(self.to_html(others), height)

    def _repr_html_(self) -> str:
        """The HTML that a notebook shows."""
        return notebook_html(self)


def _row(made: GeneratedToken) -> dict[str, object]:
    row: dict[str, object] = {
        "token": made.token.text,
        "id": made.token.id,
        "log_probability": made.log_probability,
        "entropy_bits": made.entropy_bits,
        "top_tokens": [token.text for token, _ in made.top],
    }
    if made.layers:
        row["decided"] = made.decided
        row |= {f"rank_{read.layer}": read.rank for read in made.layers}
    return row


@dataclass(frozen=True)
class Explanation:
    """The trace of one token of a text that another system generated, and how well it is repeated.

    Attributes:
        trace: The forward pass that predicts the token.
        token: Number of the token in the completion, from 0.
        tokens: The tokens of the completion.
        log_probabilities: Natural logarithms of their probabilities in this model.
        reported: The logarithms that the other system reported; empty if they are unknown.
    """

    trace: Trace
    token: int
    tokens: Tokens
    log_probabilities: tuple[float, ...]
    reported: tuple[float, ...] = ()

    @property
    def largest_difference(self) -> float | None:
        """Largest difference of `log_probabilities` from `reported`; None without them.

        A large difference means that the other system ran another model, prompt or precision.
        """
        if not self.reported:
            return None
        pairs = zip(self.log_probabilities, self.reported, strict=True)
        return max(abs(own - other) for own, other in pairs)


def check_completion(ids: Sequence[int], token: int, reported: Sequence[float]) -> None:
    """Check the arguments of an explanation.

    Raises:
        ValueError: There are no tokens, or not as many log-probabilities as tokens.
        IndexError: There is no such token.
    """
    if not ids:
        raise ValueError("completion is empty; give at least one token")
    if reported and len(reported) != len(ids):
        raise ValueError(
            f"got {len(reported)} log_probabilities; expected {len(ids)}, one per token"
        )
    if not -len(ids) <= token < len(ids):
        raise IndexError(f"no token {token}; expected {-len(ids)} to {len(ids) - 1}")


def listed_logarithm(predictions: Trace, position: int, token_id: int) -> float | None:
    """Return the log-probability of a token at a position; None if it is not listed there."""
    (node,) = predictions.nodes_of(NodeKind.PREDICTION, position=position)
    listed = node.projection.top if node.projection else ()
    found = [score.log_probability for score in listed if score.token.id == token_id]
    return found[0] if found else None
