"""The examples, each built and loaded once per session."""

from __future__ import annotations

from functools import cache

import pytest

from tests.reference.examples import Loaded, LoadExample, load_example_in


@pytest.fixture(scope="session")
def load_example(tmp_path_factory: pytest.TempPathFactory) -> LoadExample:
    folder = tmp_path_factory.mktemp("examples")

    @cache
    def loaded(name: str) -> Loaded:
        return load_example_in(folder, name)

    return loaded
