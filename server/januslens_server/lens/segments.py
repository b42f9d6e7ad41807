"""The parts of a prompt that the Backward Lens paper compares (section 6, figures 5 and 6)."""

from __future__ import annotations

from enum import StrEnum


class Segment(StrEnum):
    """Where in the prompt a position stands; every position is in exactly one."""

    FIRST = "first_token"
    SUBJECT = "subject"
    LAST_SUBJECT = "last_subject_token"
    REST = "rest"
    LAST = "last_token"


def segment_positions(
    subject_start: int, subject_end: int, length: int
) -> dict[Segment, list[int]]:
    """Positions of each segment of a prompt of `length` tokens; `subject_end` is excluded.

    What stands first in this list wins: the last token, the subject's last, the rest of the
    subject, the first token. Segments without a position are left out.
    """
    segments: dict[Segment, list[int]] = {}
    for position in range(length):
        segments.setdefault(_segment(position, subject_start, subject_end, length), []).append(
            position
        )
    return {segment: segments[segment] for segment in Segment if segment in segments}


def _segment(position: int, subject_start: int, subject_end: int, length: int) -> Segment:
    if position == length - 1:
        return Segment.LAST
    if position == subject_end - 1:
        return Segment.LAST_SUBJECT
    if subject_start <= position < subject_end:
        return Segment.SUBJECT
    return Segment.FIRST if position == 0 else Segment.REST
