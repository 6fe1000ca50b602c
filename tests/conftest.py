"""What holds for every test: one thread per process, and no block left open on any model."""

from collections.abc import Iterator

import pytest
import torch
import transformers.modeling_utils  # noqa: F401  before jaxtyping's import hook, which would compile all of it anew
from jaxtyping import config as jaxtyping_config

from saeguard.engines import session
from tests import counts  # noqa: F401  registers the hypothesis profile before any test is collected

torch.set_num_threads(1)  # tiny tensors: a second thread costs more than it gives


def pytest_configure(config: pytest.Config) -> None:
    """beartype looks at one random element of each container; hypothesis sees that and warns the law's author."""
    config.addinivalue_line("filterwarnings", "ignore:Do not use the `random` module inside strategies")


@pytest.fixture(autouse=True)
def no_session_is_left_open() -> Iterator[None]:
    """A test that leaves a steer or capture block open fails, and the next one starts clean."""
    yield
    left = [type(model).__name__ for model in session._OPEN]
    session._OPEN.clear()
    assert not left, f"a steer or capture block is still open on {left}"


@pytest.fixture
def without_type_checks() -> Iterator[None]:
    """As users run it: the checking of annotations is faster than some of our errors, and most of the time of loads."""
    jaxtyping_config.update("jaxtyping_disable", True)
    yield
    jaxtyping_config.update("jaxtyping_disable", False)
