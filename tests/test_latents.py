"""A latent table is found beside its SAE, read row by row, and searched by words."""

import gzip
import json

import pytest

from saeguard.cards import read_card
from saeguard.errors import BrokenFile, LatentOutOfRange, UnsupportedFormat
from saeguard.latents import LatentRow, LatentTable
from saeguard.loaders import shipped

ROWS = [
    {"latent": 0, "frequency": 0.01, "maximum": 9.5, "fires_on": ["sea", "tide"], "shares": [0.6, 0.2],
     "promotes": [" water"], "label": "sea, tide -> water"},
    {"latent": 1, "frequency": 0.02, "maximum": 4.0, "fires_on": ["the"], "shares": [0.9],
     "promotes": [" sea", " ship"], "label": "the -> sea"},
    {"latent": 2, "frequency": 0.0, "maximum": 0.0, "fires_on": [], "shares": [], "promotes": [], "label": ""},
    {"latent": 3, "frequency": 0.1, "maximum": 2.0, "fires_on": [" phot", "ynthesis"], "promotes": [" leaf"]},
]  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    (tmp_path / "latents.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    return tmp_path


def test_table_in_a_folder_is_found_and_read(folder):
    table = LatentTable.load(folder)

    assert len(table) == 4
    assert table.row(0) == LatentRow(0, 0.01, 9.5, ("sea", "tide"), (0.6, 0.2), (" water",), "sea, tide -> water")


@pytest.mark.parametrize("name", ["latents.json.gz", "latents.json", "latents.jsonl"])
def test_every_spelling_of_the_file_gives_the_same_rows(tmp_path, folder, name):
    lines = name.startswith("latents.jsonl")
    text = "\n".join(json.dumps(row) for row in ROWS) if lines else json.dumps({"latents": ROWS})
    place = tmp_path / "other" / name
    place.parent.mkdir()
    place.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())

    assert LatentTable.load(place.parent).rows == LatentTable.load(folder).rows


def test_search_ranks_what_a_latent_fires_on_above_what_it_promotes(folder):
    hits = LatentTable.load(folder).search("sea")

    assert [hit.row.latent for hit in hits] == [0, 1]
    assert hits[0].where == ("fires_on", "label")
    assert hits[1].where == ("promotes", "label")


def test_search_finds_the_pieces_of_a_long_word(folder):
    assert [hit.row.latent for hit in LatentTable.load(folder).search("Photosynthesis")] == [3]


def test_search_of_nothing_known_is_empty(folder):
    assert LatentTable.load(folder).search("xylophone") == []
    assert LatentTable.load(folder).search("") == []


def test_search_keeps_to_the_number_asked_for(folder):
    assert len(LatentTable.load(folder).search("sea", top=1)) == 1


def test_row_that_is_not_there_is_refused(folder):
    with pytest.raises(LatentOutOfRange, match=r"latent 9 of .*: the table has 4 rows, latents 0 to 3\."):
        LatentTable.load(folder).row(9)


def test_folder_without_a_table_is_refused(tmp_path):
    with pytest.raises(UnsupportedFormat, match=r"the latent table of .*: there is no latents\.jsonl\.gz or"):
        LatentTable.load(tmp_path)


@pytest.mark.parametrize("text", ["{", '{"latent": 1}\n', "[1]\n"])
def test_row_that_cannot_be_read_is_named(tmp_path, text):
    (tmp_path / "latents.jsonl").write_text(text)

    with pytest.raises(BrokenFile, match=r"latent table latents\.jsonl: a row could not be read \(\w+: "):
        LatentTable.load(tmp_path)


@pytest.mark.parametrize("name", list(shipped()))
def test_shipped_sae_has_a_card_and_a_row_per_latent(name):
    from saeguard.loaders import load_sae

    sae, table, card = load_sae(name), LatentTable.load(name), read_card(name)

    assert [row.latent for row in table.rows] == list(range(sae.d_sae))
    assert card["site"] == str(sae.site)
    assert sae.name == name
