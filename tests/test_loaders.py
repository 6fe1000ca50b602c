"""What is saved in saeguard's own format is recognised by its loader and by no other."""

from saeguard.loaders import LOADERS
from saeguard.loaders.native import save_sae
from saeguard.loaders.source import Source
from tests.tiny import tiny_sae


def test_exactly_one_family_recognises_what_saeguard_writes(tmp_path):
    folder = save_sae(tiny_sae(), tmp_path / "native").parent

    assert [name for name, loader in LOADERS.items() if loader.recognises(Source(folder))] == ["saeguard"]
