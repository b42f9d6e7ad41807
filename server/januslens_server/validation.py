"""Read YAML files that people write, and report each error in one line."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml
from pydantic_core import ErrorDetails

# What was expected, by pydantic's error type. These texts replace pydantic's own messages, which
# are written for Python programmers.
_EXPECTED = {
    "bool_parsing": "true or false",
    "bool_type": "true or false",
    "datetime_from_date_parsing": "a date or a time such as 2027-01-31",
    "datetime_parsing": "a date or a time such as 2027-01-31",
    "datetime_type": "a date or a time such as 2027-01-31",
    "finite_number": "a finite number",
    "float_parsing": "a number",
    "float_type": "a number",
    "frozen_set_type": "a list",
    "greater_than": "a number above {gt}",
    "greater_than_equal": "at least {ge}",
    "int_from_float": "a whole number",
    "int_parsing": "a whole number",
    "int_type": "a whole number",
    "less_than_equal": "at most {le}",
    "list_type": "a list",
    "literal_error": "{expected}",
    "model_type": "fields by name",
    "path_not_file": "an existing file",
    "string_type": "text",
    "tuple_type": "a list",
}


def load_yaml(path: Path) -> Any:
    """Return the content of a YAML file.

    Raises `OSError` if the file cannot be read, and `ValueError` with one line if it is not YAML.
    The line does not quote the file, because it may contain secrets.
    """
    try:
        return yaml.safe_load(path.read_text())
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = "" if mark is None else f", line {mark.line + 1}, column {mark.column + 1}"
        raise ValueError(f"{path}{where}: invalid YAML: {error.problem}") from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: invalid YAML: {' '.join(str(error).split())}") from error


def expectation(error: ErrorDetails) -> str:
    """Describe what was expected instead of a value, such as `expected at most 65535`."""
    template = _EXPECTED.get(error["type"])
    if template is not None:
        return f"expected {template.format_map(error.get('ctx', {}))}"
    return error["msg"].removeprefix("Value error, ")


def suggestion(name: str, known: Iterable[str]) -> str:
    """Return `; did you mean 'port'?`, or an empty string if no known name is similar."""
    nearest = get_close_matches(name, list(known), n=1)
    return f"; did you mean {nearest[0]!r}?" if nearest else ""
