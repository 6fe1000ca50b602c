"""Every published family loads to its authors' equations, whole or a few latents at a time, and edits exactly."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from saeguard import SAE, Clamp, Rule, Scale, Site, load_sae
from saeguard.editor import BoundRule, Editor
from saeguard.loaders import LOADERS, open_sae
from saeguard.loaders.native import save_sae
from saeguard.loaders.source import Source
from saeguard.tokens import TokenBatch
from tests import readme_families
from tests.lookalikes import LOOKALIKES
from tests.lookalikes.base import LookAlike, inputs

TOLERANCE = 1e-4
SOME = (40, 3, 17, 0)


@pytest.fixture(params=sorted(LOOKALIKES))
def like(request) -> LookAlike:
    return LOOKALIKES[request.param]


@pytest.fixture
def source(like: LookAlike, tmp_path: Path) -> Path:
    return like.write(tmp_path)


def close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=TOLERANCE, atol=TOLERANCE * float(b.abs().max().clamp(min=1)))


def same_support(a: Tensor, b: Tensor) -> bool:
    """The same latents are active, but for those that rounding decides."""
    return bool((((a != 0) == (b != 0)) | ((a - b).abs() < TOLERANCE)).all())


def test_activations_are_those_that_the_authors_publish(like, source):
    x = inputs(like.d_in)

    f, expected = load_sae(source, **like.options).encode(x), like.acts(x)

    assert close(f, expected)
    assert same_support(f, expected)
    assert 0 < float((expected != 0).float().mean()) < 1, "the case says nothing"


def test_reconstruction_is_that_of_the_authors(like, source):
    x, sae = inputs(like.d_in), load_sae(source, **like.options)

    x_hat = sae.decode(sae.encode(x), x)

    assert close(x_hat, like.decode(like.acts(x), x))


def test_site_and_model_are_found(like, source):
    sae = load_sae(source, **like.options)

    assert (str(sae.site or ""), str(sae.site_out or "")) == (like.site or "", like.site_out or "")
    assert sae.model == (like.options.get("model") or like.model)


def test_some_latents_compute_what_the_whole_does(like, source):
    x, whole = inputs(like.d_in), load_sae(source, **like.options)

    part = load_sae(source, latents=SOME, **like.options)

    f = part.encode_at(x, SOME)
    assert close(f, whole.encode(x)[..., SOME])
    assert same_support(f, whole.encode(x)[..., SOME])
    assert part.W_dec.shape == (len(SOME), whole.d_out)
    assert torch.equal(part.W_dec, whole.W_dec[list(SOME)])


def test_an_edit_changes_the_stream_as_editing_the_full_reconstruction_with_its_error_kept_does(like, source):
    """y + scale (f' - f) @ W_dec = decode(f') + (y - decode(f)), with the authors' own decode."""
    x, sae = inputs(like.d_in), load_sae(source, **like.options)
    y = x if sae.d_out == like.d_in and not like.site_out else torch.randn(*x.shape[:-1], sae.d_out)
    rules = [Rule(sae.name, SOME[:2], Clamp((3.0, -1.5), when="always")), Rule(sae.name, SOME[2:], Scale(-2.0))]

    edited = y + edit(sae, rules, x, y)

    f = like.acts(x)
    f_new = f.clone()
    f_new[..., SOME[0]], f_new[..., SOME[1]] = 3.0, -1.5
    f_new[..., list(SOME[2:])] = f[..., list(SOME[2:])] * -2.0
    assert close(edited, like.decode(f_new, x) + (y - like.decode(f, x)))


def edit(sae: SAE, rules: list[Rule], x: Tensor, y: Tensor) -> Tensor:
    reads, site = Site("resid_pre", 0), Site("resid_post", 0)
    if y is x:
        site = reads
    bound = [BoundRule(rule, site, None, reads) for rule in rules]
    everywhere = torch.ones(x.shape[:2], dtype=torch.bool)
    places = torch.arange(x.shape[1]).expand(x.shape[:2])
    tokens = TokenBatch(everywhere, places, ~everywhere, None, 0)
    covers = torch.ones(x.shape[0], len(rules), dtype=torch.bool)
    editor = Editor(site, bound, {sae.name: sae}, device=torch.device("cpu"))
    return editor(y, tokens, covers, {} if y is x else {reads: x}).dx


def test_exactly_one_family_recognises_it(like, source):
    assert [name for name, loader in LOADERS.items() if loader.recognises(Source(source))] == [like.family]


def test_saved_in_our_format_it_computes_the_same(like, source, tmp_path):
    x, sae = inputs(like.d_in), load_sae(source, **like.options)

    ours = load_sae(save_sae(sae, tmp_path / "ours"))

    assert close(ours.encode(x), sae.encode(x))
    assert close(ours.decode(ours.encode(x), x), sae.decode(sae.encode(x), x))
    assert (ours.site, ours.site_out, ours.norm, ours.d_sae) == (sae.site, sae.site_out, sae.norm, sae.d_sae)


def test_a_few_latents_of_a_sliceable_family_look_at_few_bytes(like, source):
    stored = open_sae(source, **like.options)

    if not stored.ranks:
        assert stored.bytes_for(2) < stored.bytes_for(None) / 4
    else:
        assert stored.bytes_for(2) == stored.bytes_for(None)


@pytest.mark.parametrize("family", [name for name in LOADERS if name not in ("saeguard", "refused", "vectors")])
def test_every_family_has_a_look_alike(family):
    assert any(like.family == family for like in LOOKALIKES.values())


def test_readme_tables_say_what_loads_and_what_is_refused():
    shown = readme_families.block(readme_families.README.read_text(encoding="utf-8"))

    assert shown == readme_families.render(), "run: make format"
