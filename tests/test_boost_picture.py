"""The picture of a boost draws whatever it is given, on one page that grows with it."""

import sys
from dataclasses import replace

import pytest

from saeguard.drawing.boost_picture import Answer, Bar, BoostPicture, Strip, write_boost_picture
from saeguard.drawing.picture import matplotlib_classes
from saeguard.errors import MissingExtra

STRIP = Strip("a $entence", (" The", " cell", "\n"), (("latent 3", (0.0, 2.5, 0.0)), ("latent 5", (0.0, 0.0, 0.1))))
FULL = BoostPicture(
    "A boost", "told $", ("before", "after"),
    {"first": (Bar("biology", 15.0, 10.0), Bar("law", 0.0, 0.0)), "second": (Bar("x$", 0.1, 0.2),)},
    "found", (STRIP, STRIP), "steered", (Answer("It is", "a plain text", "a Cell, a cell." * 40),), ("cell",),
)  # fmt: skip
EMPTY = BoostPicture("", "", ("", ""), {}, "", (), "", ())


def drawn(picture, monkeypatch, tmp_path):
    """The figure that was saved."""
    figures = []
    figure_class = matplotlib_classes()[0]
    monkeypatch.setattr(figure_class, "savefig", lambda self, *args, **kwargs: figures.append(self))
    write_boost_picture(picture, tmp_path / "x.png")
    return figures[0]


@pytest.mark.parametrize("picture", [
    FULL, EMPTY, replace(FULL, strips=()), replace(FULL, bars={}), replace(FULL, answers=()),
    replace(FULL, bars={"worse": (Bar("a", -0.1, 0.3),)}), replace(FULL, answers=(Answer("", "", "\n"),)),
    replace(FULL, strips=(Strip("silent", (), ()), Strip("zero", ("a",), (("l", (0.0,)),)))),
])  # fmt: skip
def test_whatever_there_is_is_drawn(picture, tmp_path):
    path = write_boost_picture(picture, tmp_path / "deep" / "boost.png")

    assert path.read_bytes().startswith(b"\x89PNG")


def test_bars_have_the_lengths_of_their_numbers_and_say_how_far_they_fell(monkeypatch, tmp_path):
    axes = drawn(FULL, monkeypatch, tmp_path).axes[0]

    assert [bar.get_width() for bar in axes.patches] == [15.0, 10.0, 0.0, 0.0]
    assert [text.get_text().strip() for text in axes.texts] == ["-33%", ""]


def test_strips_share_one_scale_of_colours(monkeypatch, tmp_path):
    weak = replace(STRIP, rows=(("latent 3", (0.0, 0.5, 0.0)),))
    figure = drawn(replace(FULL, strips=(STRIP, weak)), monkeypatch, tmp_path)
    meshes = [mesh for axes in figure.axes for mesh in axes.collections]

    assert [mesh.get_clim() for mesh in meshes] == [(0, 2.5), (0, 2.5)]
    assert meshes[0].get_array().tolist() == [[0.0, 2.5, 0.0], [0.0, 0.0, 0.1]]


def test_only_marked_words_are_coloured_whatever_their_case(monkeypatch, tmp_path):
    few = replace(FULL, answers=(Answer("It is", "a cellar", "a Cell, a cell."),))
    bold = [text.get_text() for text in drawn(few, monkeypatch, tmp_path).texts if text.get_color() == "#2f6fdb"]

    assert bold == ["Cell", "cell"]


def test_a_line_that_is_too_long_ends_in_dots_on_the_page(monkeypatch, tmp_path):
    figure = drawn(FULL, monkeypatch, tmp_path)
    ends = [text.get_window_extent().x1 for text in figure.texts]

    assert max(ends) <= figure.bbox.width
    assert figure.texts[-1].get_text() == "…"


def test_without_matplotlib_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)

    with pytest.raises(MissingExtra, match=r"needs matplotlib, .*pip install 'saeguard\[demo\]'"):
        write_boost_picture(FULL, tmp_path / "no.png")
