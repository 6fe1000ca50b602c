"""What is drawn is what happened, every text is escaped, and a page needs nothing from outside."""

import re
import sys
from dataclasses import replace

import pytest
import torch

from saeguard import AtLeast, Plan, Rule, Scale, Site
from saeguard.drawing.histogram import write_histogram
from saeguard.drawing.page import render, write_page
from saeguard.drawing.picture import write_picture
from saeguard.drawing.scene import Batch, Line, Proof, Scene, Token, edited, make_lines, play, sites_of
from saeguard.errors import MissingExtra
from tests.tiny import BOS, PAD, prompt, tiny_model, tiny_sae


class Numbers:
    """A tokenizer whose tokens are their numbers; token 7 is HTML."""

    all_special_ids = (PAD, BOS, 2)
    eos_token_id, pad_token_id = 2, PAD

    def decode(self, ids):
        return "".join(" <b>&" if int(i) == 7 else f" {int(i)}" for i in ids)


@pytest.fixture(scope="module")
def plans():
    return [Plan((Rule("tiny", (1, 2), AtLeast(3.0)),)), None, Plan((Rule("tiny", (3,), Scale(-1.0), phase="prompt"),))]


@pytest.fixture(scope="module")
def takes(plans):
    ids = prompt(3, 6)
    mask = torch.ones_like(ids)
    ids[0, 1:3] = torch.tensor([BOS, 7])
    ids[0, 0], mask[0, 0] = PAD, 0
    own = mask.bool()
    own[:, 0] = False
    batch, saes = Batch(("a <i>", "b", "c"), ids, mask, own), {"tiny": tiny_sae()}
    options = {"tokenizer": Numbers(), "saes": saes, "sites": sites_of(plans, saes), "max_new_tokens": 5}
    return play(tiny_model(), batch, None, **options), play(tiny_model(), batch, plans, **options)


@pytest.fixture(scope="module")
def scene(takes, plans):
    plain, steered = takes
    lines = make_lines(plain, steered, plans, {"tiny": tiny_sae()}, Numbers(), ["One", "Two", "Three"])
    proofs = (Proof("it <holds>", "3 of 3", True), Proof("it fails", "2 of 3", False))
    return Scene("A <title>", "tiny", lines, steered.run.report, proofs, {1: "label & one"})


def test_line_marks_exactly_the_edited_positions(scene, takes):
    for row, line in enumerate(scene.lines):
        marked = {place for place, token in enumerate(line.steered) if token.edited}

        assert marked == edited(takes[1].run.report, row)
        assert not any(token.edited for token in line.plain)


def test_padding_is_not_shown(scene):
    assert [token.text for token in scene.lines[0].steered][:2] == [" 1", " <b>&"]


def test_fired_values_are_those_of_the_stream_before_and_after(scene, takes):
    take, sae, line = takes[1], tiny_sae(), scene.lines[0]
    before = sae.encode_at(take.before[Site("resid_post", 1)][0, 1:], (1, 2))

    for f, token in zip(before.tolist(), line.steered, strict=False):
        shown = {latent.latent: latent.before for latent in token.fired}
        assert shown.get(1, 0.0) == f[0]
        assert shown.get(2, 0.0) == f[1]


def test_row_without_a_plan_shows_nothing_fired(scene):
    line = scene.lines[1]

    assert not line.rules
    assert not any(token.fired or token.edited for token in line.plain + line.steered)
    assert line.plain_text == line.steered_text


def test_page_needs_nothing_from_outside(scene):
    page = render(scene)

    assert not re.search(r"""(src|href)=|url\(|@import|<script|<link|https?:""", page)


def test_page_escapes_every_text(scene):
    page = render(scene)

    for text in ("A <title>", "<b>&", "it <holds>", "<i>"):
        assert text not in page
    assert "A &lt;title&gt;" in page
    assert "label &amp; one" in page


def test_page_outlines_as_many_tokens_as_were_edited(scene):
    page = render(scene).partition("What was edited")[0]
    body = page.partition("</div>\n<section")[2]

    assert body.count('class="t e"') == sum(token.edited for line in scene.lines for token in line.steered)


def test_page_tells_checks_that_hold_from_those_that_fail(scene):
    page = render(scene)

    assert page.count('<li class="holds">') == 1
    assert page.count('<li class="fails">') == 1


def test_files_are_written_where_asked(scene, tmp_path):
    page = write_page(scene, tmp_path / "deep" / "page.html")
    picture = write_picture(scene, tmp_path / "deep" / "picture.png")

    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("text", ["$x$", "", "\n", "�", "ا", "a" * 80])
def test_picture_survives_any_token(text, scene, tmp_path):
    line = Line("$t", "$p", ("$r",), (), (), (Token(text, "prompt"), Token(text, "generated", edited=True)))
    odd = replace(scene, lines=(line,), title="$a$b")

    assert write_picture(odd, tmp_path / "odd.png").stat().st_size > 0
    assert render(odd)


def test_picture_without_matplotlib_says_what_to_install(scene, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)

    with pytest.raises(MissingExtra, match=r"needs matplotlib, .*pip install 'saeguard\[demo\]'"):
        write_picture(scene, tmp_path / "no.png")


@pytest.mark.parametrize("f", [torch.rand(500).sub(0.9).relu() * 80, torch.zeros(9), torch.zeros(0), torch.ones(1)])
def test_histogram_is_drawn_of_whatever_fires(f, tmp_path):
    path = write_histogram(
        f, tmp_path / "a" / "h.png", title="latent 3 $x", maximum=9.5, examples=[(2.0, "a$"), (0.5, "\n")]
    )

    assert path.read_bytes()[:4] == b"\x89PNG"


def test_histogram_without_matplotlib_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)

    with pytest.raises(MissingExtra, match="saeguard\\[demo\\]"):
        write_histogram(torch.ones(3), tmp_path / "h.png", title="x")
