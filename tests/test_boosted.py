"""Boosted SAEs: a base of any kind keeps its bits, the sum is that of its parts, and strangers are refused."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from saeguard import (
    SAE,
    AnyActive,
    AtLeast,
    Boosted,
    Clamp,
    Plan,
    Rule,
    Scale,
    Site,
    base_of,
    boosts_of,
    load_sae,
    save_sae,
    steer,
)
from saeguard.errors import AmbiguousSAE, BoostMismatch, BrokenFile, NotSliceable, WidthMismatch
from saeguard.latents import LatentTable
from saeguard.loaders import shipped, shipped_boosts
from saeguard.scoring.accumulators import pieces
from tests import laws, words
from tests.test_kinds import random_sae
from tests.tiny import prompt, tiny_model, tiny_sae

KINDS_OF_BASE = ("relu", "tanh_relu", "jumprelu", "topk", "topk_norelu", "abstopk", "groupmax", "pursuit")


def base_of_kind(kind: str, *, norm: str = "none", dtype: torch.dtype = torch.float32, turned: bool = False) -> SAE:
    base = random_sae(kind, norm, d_in=24, d_sae=40, rank_by=True, seed=5).to(dtype=dtype)
    return replace(base, W_enc=base.W_enc.T.contiguous().T) if turned else base


def boost_for(base: SAE, n: int, domain: str = "moths", *, seed: int = 1) -> SAE:
    """A random boost of ``base``, in half precision as boosts are stored."""
    generator = torch.Generator().manual_seed(seed)
    W_enc, W_dec, b_enc = (
        torch.randn(*shape, generator=generator) for shape in ((base.d_in, n), (n, base.d_out), (n,))
    )
    return SAE(
        f"{base.name}/boosts/{domain}", W_enc.half(), b_enc, W_dec.half(), torch.zeros(base.d_out),
        activation="jumprelu", threshold=torch.full((n,), 0.5), norm=base.norm, eps=base.eps, site=base.site,
        manifest={"boost": {"base": base.fingerprint(), "domain": domain}},
    )  # fmt: skip


@pytest.mark.parametrize("turned", [False, True], ids=["row by row", "column by column"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("norm", ["none", "layer_norm"])
@pytest.mark.parametrize("kind", KINDS_OF_BASE)
def test_base_of_any_kind_keeps_its_bits_behind_boosts(kind, norm, dtype, turned):
    base, x = base_of_kind(kind, norm=norm, dtype=dtype, turned=turned), torch.randn(50, 24)
    law, moths = boost_for(base, 5, "law", seed=2), boost_for(base, 7)
    both = Boosted(base, [moths, law])
    none = torch.cat([base.encode(x), torch.zeros(50, 12)], dim=1)
    mixed = (44, 3, 41, 0, 39)

    assert torch.equal(both.encode(x)[:, :40], base.encode(x))
    assert torch.equal(both.encode_at(x, mixed)[:, [1, 3, 4]], base.encode_at(x, (3, 0, 39)))
    assert torch.allclose(both.encode_at(x, mixed), both.encode(x)[:, list(mixed)], atol=1e-4)
    assert torch.equal(both.decode(none, x), base.decode(base.encode(x), x))
    assert base_of(both).fingerprint() == base.fingerprint()
    assert [one.fingerprint() for one in boosts_of(both)] == [moths.fingerprint(), law.fingerprint()]


@pytest.mark.parametrize("kind", KINDS_OF_BASE)
def test_sum_is_that_of_base_and_boosts_in_any_order(kind):
    base, x = base_of_kind(kind, norm="const_norm"), torch.randn(50, 24)
    boosts = [boost_for(base, 7), boost_for(base, 5, "law", seed=2), boost_for(base, 3, "tea", seed=3)]
    scale = base.read(x).scale
    assert scale is not None
    apart = base.decode(base.encode(x), x)
    for boost in boosts:
        apart = apart + scale * (boost.encode(x) @ boost.W_dec.float())

    sums = [both.decode(both.encode(x), x) for both in (Boosted(base, boosts), Boosted(base, boosts[::-1]))]
    stacked = Boosted(Boosted(base, boosts[:1]), boosts[1:])

    assert all(torch.allclose(total, apart, atol=1e-4) for total in sums)
    assert stacked.fingerprint() == Boosted(base, boosts).fingerprint()
    assert stacked.name == "random+moths+law+tea"


def test_boost_of_zero_latents_is_the_base():
    base = base_of_kind("topk")

    assert Boosted(base, []) is base
    assert Boosted(base, [boost_for(base, 0), boost_for(base, 0, "law")]) is base


@pytest.mark.parametrize("kind", KINDS_OF_BASE)
def test_boosted_comes_back_from_its_file_whole_and_in_part(kind, tmp_path: Path):
    base, x = base_of_kind(kind), torch.randn(20, 24)
    both = Boosted(base, [boost_for(base, 7), boost_for(base, 5, "law", seed=2)])

    whole = load_sae(save_sae(both, tmp_path))
    part = load_sae(tmp_path, latents=(41, 2, 51))

    assert whole.fingerprint() == both.fingerprint()
    assert torch.equal(whole.encode(x), both.encode(x))
    assert base_of(whole).fingerprint() == base.fingerprint()
    assert torch.equal(part.encode_at(x, (51, 2)), both.encode_at(x, (51, 2)))


def test_boosted_is_found_by_the_names_of_base_and_domains(tmp_path: Path):
    base = base_of_kind("relu")
    save_sae(base, tmp_path / "base")
    for domain in ("moths", "law"):
        save_sae(boost_for(base, 6, domain, seed=len(domain)), tmp_path / "base" / "boosts" / domain)

    both = load_sae(f"{tmp_path}/base+moths+law")
    some = load_sae(f"{tmp_path}/base+law", latents=(45, 1))

    assert (both.n_base, both.d_sae, both.name) == (40, 52, f"{tmp_path}/base+moths+law")
    assert some.held == (45, 1)


def test_plus_in_a_folder_above_does_not_part_base_and_domain(tmp_path: Path):
    base = base_of_kind("relu")
    save_sae(base, tmp_path / "x+y" / "base")
    save_sae(boost_for(base, 6), tmp_path / "x+y" / "base" / "boosts" / "moths")

    assert load_sae(f"{tmp_path}/x+y/base+moths").d_sae == 46


def test_eps_of_a_base_without_a_norm_does_not_matter(tmp_path: Path):
    """Files do not keep it, so a boost comes back with another one."""
    base = replace(base_of_kind("relu"), eps=1e-6)
    boost = load_sae(save_sae(boost_for(base, 6), tmp_path))

    assert boost.eps != base.eps
    assert Boosted(base, [boost]).d_sae == 46


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"site": Site("resid_post", 0)}, "its site is resid_post.0, the base's mlp_in.0"),
        ({"norm": "center"}, "its norm is center, the base's none"),
        ({"model": "lab/other"}, "its model is lab/other"),
        ({"manifest": {}}, "it is no boost"),
        ({"b_dec": torch.ones(24)}, "it is no boost"),
        ({"manifest": {"boost": {"base": "0" * 64, "domain": "moths"}}}, "trained on another base.*is 000000000000"),
    ],
    ids=["site", "norm", "model", "no manifest", "b_dec", "another base"],
)
def test_boost_that_does_not_belong_to_the_base_is_refused(change, found):
    base = base_of_kind("jumprelu")
    boost = boost_for(base, 7)

    with pytest.raises(BoostMismatch, match=found):
        Boosted(base, [replace(boost, **change)])


def test_boost_of_another_width_twice_or_as_a_base_is_refused():
    base, narrow = base_of_kind("jumprelu"), random_sae("jumprelu")
    boost = boost_for(base, 7)

    with pytest.raises(WidthMismatch, match="reads 24 numbers and writes 24, the other 6 and 6"):
        Boosted(base, [boost_for(narrow, 3)])
    with pytest.raises(BoostMismatch, match="twice on random"):
        Boosted(base, [boost, boost])
    with pytest.raises(BoostMismatch, match="twice on random"):
        Boosted(Boosted(base, [boost]), [boost])
    with pytest.raises(BoostMismatch, match="it is a boost itself"):
        Boosted(boost, [boost])
    with pytest.raises(NotSliceable, match="only 1 latents of random were read"):
        Boosted(base.narrow([1]), [boost])
    with pytest.raises(BoostMismatch, match="its manifest does not say which they are"):
        base_of(base)


def test_changed_base_is_another_base():
    base = base_of_kind("jumprelu")
    boost = boost_for(base, 7)
    changed = replace(base, b_dec=base.b_dec + 1e-3)

    with pytest.raises(BoostMismatch, match="trained on another base"):
        Boosted(changed, [boost])


def test_n_base_that_the_weights_contradict_is_refused():
    both = laws.with_boosts(base_of_kind("topk"), [3])

    with pytest.raises(BrokenFile, match="n_base is 99 of 43 latents"):
        replace(both, n_base=99)
    with pytest.raises(BrokenFile, match="It needs threshold and top_k"):
        replace(both, threshold=None)
    with pytest.raises(BrokenFile, match=r"Give 1\.\.40"):
        replace(both, top_k=41)


def test_ranking_over_all_latents_would_silence_the_base():
    """A concatenation that does not know n_base lets boosts take places in the base's top k."""
    base, x = base_of_kind("topk"), torch.randn(200, 24)
    loud = boost_for(base, 10)
    both = Boosted(base, [replace(loud, b_enc=loud.b_enc + 50)])
    mutant = replace(both, n_base=None, threshold=None)

    assert torch.equal(both.encode(x)[:, :40], base.encode(x))
    assert not mutant.encode(x)[:, :40].any()


@pytest.mark.parametrize("kind", ["relu", "jumprelu", "topk"])
def test_rows_keep_to_themselves_when_latents_of_boosts_are_steered(kind):
    model, ids = tiny_model(), prompt(3, 6)
    sae = laws.with_boosts(tiny_sae(activation=kind), [5, 3])
    lift = Plan((Rule(sae.name, (2, 50, 55), AtLeast(1.0, unit="max"), trigger=AnyActive((49, 3))),))
    mute = Plan((Rule(sae.name, (48, 0), Clamp(-2.0, when="active")), Rule(sae.name, (54,), Scale(-1.5))))
    with torch.no_grad():
        plain = model(ids).logits
        with steer(model, [lift, None, mute], saes=sae):
            steered = model(ids).logits
        alone = []
        for row, plan in ((0, lift), (2, mute)):
            with steer(model, plan, saes=sae):
                alone.append(model(ids[row : row + 1]).logits[0])

    assert laws.same_bits(steered[1], plain[1])
    assert not torch.equal(steered[0], plain[0])
    assert not torch.equal(steered[2], plain[2])
    assert torch.allclose(steered[0], alone[0], atol=1e-4)
    assert torch.allclose(steered[2], alone[1], atol=1e-4)


@pytest.mark.parametrize("kind", ["relu", "topk"])
def test_steering_a_base_latent_is_the_same_with_and_without_boosts(kind):
    """Delta form on base latents: what stands behind them changes no bit of the stream."""
    model, ids, base = tiny_model(), prompt(2, 6), tiny_sae(activation=kind)
    plan = Plan((Rule("tiny", (2, 7), AtLeast(3.0)), Rule("tiny", (5,), Scale(0.0))))
    found = []

    for sae in (base, laws.with_boosts(base, [5, 3])):
        with torch.no_grad(), steer(model, plan, saes=sae):
            found.append(model(ids).logits)

    assert laws.same_bits(*found)


@pytest.mark.parametrize("size", [7, 20, 100])
def test_slices_of_latents_fire_as_the_whole_boosted_sae(size):
    sae, x = laws.with_boosts(base_of_kind("relu"), [5, 6]), torch.randn(30, 24)

    parts = [piece.sae.activate(piece.sae.read(x).x) for piece in pieces(sae, size)]

    assert torch.allclose(torch.cat(parts, dim=1), sae.encode(x), atol=1e-5)


def test_table_of_a_boosted_sae_has_the_rows_of_both_under_its_numbers(tmp_path: Path):
    base = words.save_described_sae(tmp_path / "base")
    words.save_described_sae(tmp_path / "base" / "boosts" / "moths")

    table = LatentTable.load(f"{tmp_path}/base+moths")

    assert [row.latent for row in table.rows] == list(range(2 * base.d_sae))
    assert table.row(base.d_sae + 5).label == "w5 -> w9"


def test_boosts_are_not_listed_among_the_shipped_saes():
    assert not set(shipped()) & set(shipped_boosts())
    assert all(name.rpartition("/boosts/")[0] in shipped() for name in shipped_boosts())
    assert not [name for name in shipped() if "/boosts/" in name]


@pytest.mark.parametrize("name", sorted(shipped_boosts()))
def test_shipped_boost_stands_behind_its_base_and_its_card_says_so(name):
    base_name, _, domain = name.partition("/boosts/")

    both = load_sae(f"{base_name}+{domain}")

    card = json.loads((shipped_boosts()[name] / "card.json").read_text(encoding="utf-8"))
    assert both.n_base == load_sae(base_name).d_sae
    assert card["base"]["fingerprint"] == base_of(both).fingerprint()
    assert sum(path.stat().st_size for path in shipped_boosts()[name].iterdir()) < 3_000_000
    assert len(LatentTable.load(f"{base_name}+{domain}")) == both.d_sae


def test_base_latent_that_is_named_with_and_without_boosts_is_refused():
    """Both rules would edit it, each from the same activation."""
    base = tiny_sae()
    rules = Rule("tiny", (2,), Scale(2.0)), Rule("both", (2,), Scale(3.0))
    apart = Rule("tiny", (2,), Scale(2.0)), Rule("both", (50,), Scale(3.0))
    saes = {"tiny": base, "both": laws.with_boosts(base, [5])}

    with pytest.raises(AmbiguousSAE, match="both are one SAE"), steer(tiny_model(), Plan(rules), saes=saes):
        pass
    narrow = {name: sae.narrow(latents) for (name, sae), latents in zip(saes.items(), ((2,), (50,)), strict=True)}
    with steer(tiny_model(), Plan(apart), saes=narrow):
        tiny_model()(prompt())


@pytest.mark.parametrize("n_base", [True, "4", -1, 0, 999, 1.5])
def test_file_whose_n_base_is_nonsense_is_refused(n_base, tmp_path: Path):
    path = save_sae(laws.with_boosts(base_of_kind("topk"), [3]), tmp_path)
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["saeguard"]) | {"n_base": n_base}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    save_file(tensors, path, metadata={"saeguard": json.dumps(header)})

    with pytest.raises(BrokenFile, match="n_base"):
        load_sae(path)


BASE_PART = {
    "name": "b",
    "fingerprint": "0",
    "d_sae": 40,
    "dtypes": dict.fromkeys(("W_enc", "b_enc", "W_dec", "b_dec"), "float32"),
}
BOOST_PART = BASE_PART | {"d_sae": 3, "manifest": {}}


@pytest.mark.parametrize(
    "said",
    [
        7, {}, {"base": 3}, {"base": BASE_PART}, {"base": BASE_PART, "boosts": 3}, {"base": BASE_PART, "boosts": [3]},
        {"base": BASE_PART, "boosts": [BOOST_PART | {"d_sae": 2}]},
        {"base": BASE_PART, "boosts": [BOOST_PART | {"d_sae": True}]},
        {"base": BASE_PART | {"dtypes": {"W_enc": "load"}}, "boosts": [BOOST_PART]},
        {"base": BASE_PART | {"dtypes": BASE_PART["dtypes"] | {"W_enc": "load"}}, "boosts": [BOOST_PART]},
        {"base": BASE_PART | {"name": 3}, "boosts": [BOOST_PART]},
        {"base": BASE_PART, "boosts": [BASE_PART | {"d_sae": 3}]},
    ],
)  # fmt: skip
def test_manifest_that_does_not_describe_the_parts_is_refused_in_words(said):
    both = laws.with_boosts(base_of_kind("relu"), [3])

    with pytest.raises(BoostMismatch, match="does not say which they are"):
        base_of(replace(both, manifest={"boosted": said}))
