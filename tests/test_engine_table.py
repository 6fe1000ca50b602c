"""The README's table of engines says what they do, cell by cell."""

import pytest

from tests import engine_table
from tests.engine_table import FEATURES, README, WAYS

pytestmark = pytest.mark.filterwarnings("ignore")

ELSEWHERE = "TransformerLens 3.9 HookedTransformer"
SHOWN = engine_table.shown(README.read_text(encoding="utf-8"))


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("name", [name for name in WAYS if name != ELSEWHERE])
def test_cell_is_what_the_engine_does(name, feature):
    assert SHOWN[name][list(FEATURES).index(feature)] == engine_table.cell(name, feature), "run: make format"


def test_table_has_every_engine_and_every_feature():
    assert list(SHOWN) == list(WAYS)
    assert engine_table.block(README.read_text(encoding="utf-8")) == engine_table.render(SHOWN)
