"""The bridge of TransformerLens 3.9 keeps the promises of the bridge of later versions, but for one way to call it."""

import pytest

from saeguard import steer
from saeguard.errors import UnsupportedMode
from tests import tiny
from tests.test_engine_lens import *  # noqa: F403
from tests.test_engine_lens import PUSH, SAES, WRITE, bridge


def test_replay_without_the_mask_is_refused():
    with pytest.raises(UnsupportedMode, match="return_cache"), steer(bridge("llama"), PUSH, saes=SAES):
        bridge("llama").generate(tiny.prompt(1, 4), return_cache=True, **WRITE)
