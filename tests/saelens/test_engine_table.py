"""The column of the README's table of engines that needs TransformerLens 3."""

import pytest

from tests import engine_table
from tests.engine_table import FEATURES, README

NAME = "TransformerLens 3.9 HookedTransformer"
SHOWN = engine_table.shown(README.read_text(encoding="utf-8"))[NAME]


@pytest.mark.parametrize("feature", FEATURES)
def test_cell_is_what_the_engine_does(feature):
    assert SHOWN[list(FEATURES).index(feature)] == engine_table.cell(NAME, feature)
