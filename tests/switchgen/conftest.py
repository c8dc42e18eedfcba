"""What the tests of token routers share."""

from __future__ import annotations

import pytest
from pairs import make_pair

from switchgen import Pool


@pytest.fixture(scope="session")
def pair() -> Pool:
    """A base and an aligned model, made once."""
    return make_pair()
