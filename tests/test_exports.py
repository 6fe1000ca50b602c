"""``from saeguard import ...`` offers what ``__all__`` says, and each name explains itself."""

import inspect
from dataclasses import is_dataclass
from types import ModuleType

import pytest

import saeguard


def own_docstring(value: object) -> str:
    """The docstring somebody wrote for ``value``: not inherited, not the signature a dataclass makes up."""
    if not inspect.isclass(value):
        return inspect.getdoc(value) or ""
    docstring = value.__dict__.get("__doc__") or ""
    made_up = is_dataclass(value) and docstring.startswith(f"{value.__name__}(")
    return "" if made_up else docstring


def public_names() -> set[str]:
    """The names bound in saeguard that are neither private nor a submodule that some import left there."""
    return {
        name
        for name, value in vars(saeguard).items()
        if not name.startswith("_") and (name in saeguard.__all__ or not isinstance(value, ModuleType))
    }


def test_all_is_exactly_the_public_names():
    exported = {name for name in saeguard.__all__ if not name.startswith("_")}
    lazy = {name for name in exported - set(vars(saeguard)) if getattr(saeguard, name) is not None}

    assert exported == public_names() | lazy


def test_all_names_nothing_twice():
    assert len(set(saeguard.__all__)) == len(saeguard.__all__)


@pytest.mark.parametrize("name", saeguard.__all__)
def test_public_name_has_its_own_docstring(name):
    value = getattr(saeguard, name)
    if not (callable(value) or isinstance(value, ModuleType)):
        pytest.skip("a constant or an alias: nowhere to put a docstring")

    assert own_docstring(value), f"saeguard.{name} has no docstring of its own"
