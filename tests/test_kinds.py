"""Every activation kind under every norm: kernels against the slow loop, latents alone, chunks and transcoders."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from saeguard import SAE, Reweight, Rule, Site
from saeguard import activations as activations_module
from saeguard.activations import KINDS, Pursuit
from saeguard.editor import BoundRule, Editor
from saeguard.errors import BrokenFile, LatentOutOfRange, NotSliceable
from saeguard.norms import NORMS
from saeguard.tokens import TokenBatch
from tests import laws, slow_maths
from tests.counts import cases

READS, WRITES = Site("mlp_in", 0), Site("mlp_out", 0)
NEAR = 1e-4


def random_sae(
    kind: str, norm: str = "none", *, d_in: int = 6, d_sae: int = 12, d_out: int | None = None, seed: int = 0,
    rank_by: bool = False,
) -> SAE:  # fmt: skip
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) * 0.6

    return SAE(
        name="random", W_enc=normal(d_in, d_sae), b_enc=normal(d_sae), W_dec=normal(d_sae, d_out or d_in),
        b_dec=normal(d_out or d_in), activation=kind,  # type: ignore[arg-type]
        threshold=normal(d_sae).abs() if kind == "jumprelu" else None,
        top_k=4 if "top_k" in KINDS[kind].needs else None,
        pursuit=Pursuit(3, signed=bool(seed % 2), residual=0.3, stops_on_repeat=seed % 3 == 0)
        if kind == "pursuit"
        else None,
        rank_by=normal(d_sae).abs() + 0.1 if rank_by and kind in ("topk", "topk_norelu", "abstopk") else None,
        norm=norm, maximum=normal(d_sae).abs() + 1, site=READS,  # type: ignore[arg-type]
        site_out=None if d_out is None else WRITES,
        skip=None if d_out is None else normal(d_in, d_out),
    )  # fmt: skip


def hesitates(x: list[float], sae: SAE) -> bool:
    """Whether a bend of x that is far below what is compared changes which latents are active."""
    exact = slow_maths.activations(slow_maths.normed(x, sae)[0], sae)
    for bend in (1 - 1e-5, 1 + 1e-5):
        for place in range(len(x)):
            moved = [v * bend + (bend - 1 if i == place else 0.0) for i, v in enumerate(x)]
            other = slow_maths.activations(slow_maths.normed(moved, sae)[0], sae)
            if any((a != 0) != (b != 0) or abs(a - b) > 1e-2 * (1 + abs(a)) for a, b in zip(exact, other, strict=True)):
                return True
    return False


def batch_of(rows: int, width: int) -> TokenBatch:
    real = torch.ones(rows, width, dtype=torch.bool)
    return TokenBatch(real, torch.arange(width).expand(rows, width), ~real, None, 0)


def changed(sae: SAE, rules: list[Rule], x: Tensor, y: Tensor, kernel: Any) -> Tensor:
    reads, writes = (READS, WRITES) if sae.is_transcoder else (READS, READS)
    bound = [BoundRule(rule, writes, None, reads) for rule in rules]
    editor = Editor(writes, bound, {sae.name: sae}, device=torch.device("cpu"), kernel=kernel)
    covers = torch.ones(x.shape[0], len(rules), dtype=torch.bool)
    return editor(y, batch_of(*x.shape[:2]), covers, {reads: x} if sae.is_transcoder else {}).dx


@settings(max_examples=cases(6_000))
@given(st.data())
def test_kernels_compute_the_formula_for_every_kind_norm_and_transcoder(data):
    kind, norm = data.draw(st.sampled_from(sorted(KINDS))), data.draw(st.sampled_from(sorted(NORMS)))
    d_out = data.draw(st.sampled_from((None, 5))) if kind != "pursuit" else None
    sae = random_sae(kind, norm, d_out=d_out, seed=data.draw(st.integers(0, 9999)), rank_by=data.draw(st.booleans()))
    sae = laws.with_boosts(sae, data.draw(st.lists(st.integers(0, 4), max_size=2)), seed=data.draw(st.integers(0, 99)))
    where = st.just({"special": True})
    rules = laws.compatible(data.draw(st.lists(laws.rules(sae, where=where), min_size=1, max_size=3)))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 9999)))
    x = torch.randn(1, 2, sae.d_in, generator=generator)
    y = torch.randn(1, 2, sae.d_out, generator=generator) if sae.is_transcoder else x
    others = [laws.weighted(rule, sae) for rule in rules if isinstance(rule.op, Reweight)]
    assume(not any(hesitates(token.tolist(), other) for token in x[0] for other in [sae, *others]))
    token = {"real": True, "special": False, "covers": [True] * len(rules), "absolute": 0, "since": 0}

    told = [slow_maths.tell(x[0, t].tolist(), token, rules, {"random": sae}, y[0, t].tolist()) for t in range(2)]

    assume(not any(_triggered_near(rule, x[0, t].tolist(), sae) for rule in rules for t in range(2)))
    for kernel in ("sliced", "reference"):
        after = y + changed(sae, rules, x, y, kernel)
        wanted = torch.tensor([t.x for t in told], dtype=torch.float64)
        assert laws.distance(after[0], wanted) <= 2e-5, (kernel, kind, norm, rules)


def _triggered_near(rule: Rule, x: list[float], sae: SAE) -> bool:
    """A decision at an activation that lies where rounding decides: a trigger's, or a clamp's at f > 0."""
    f = slow_maths.activations(slow_maths.normed(x, sae)[0], sae)
    watched = rule.trigger.latents if rule.trigger else ()
    return any(abs(f[i] - rule.trigger.threshold) < NEAR for i in watched if rule.trigger and f[i])


@pytest.mark.parametrize("norm", sorted(NORMS))
@pytest.mark.parametrize("kind", sorted(KINDS))
def test_some_latents_are_what_all_latents_say_of_them(kind, norm):
    sae, x = random_sae(kind, norm, d_sae=64, rank_by=True), torch.randn(5, 7, 6)
    some = (63, 0, 17, 17, 2)

    assert torch.allclose(sae.encode_at(x, some), sae.encode(x)[..., list(some)], atol=1e-6)
    again = sae.narrow((63, 2, 0, 17)).encode_at(x, (17, 63))
    assert torch.allclose(again, sae.encode(x)[..., [17, 63]], atol=1e-6)


@pytest.mark.parametrize("kind", [kind for kind in sorted(KINDS) if KINDS[kind].ranks])
@pytest.mark.parametrize("chunk", [1, 5, 16, 64])
def test_chunks_of_any_size_rank_alike(kind, chunk, monkeypatch):
    sae, x = random_sae(kind, d_sae=64, rank_by=True), torch.randn(5, 7, 6)
    whole = sae.encode(x)

    monkeypatch.setattr(activations_module, "CHUNK", chunk)

    assert torch.allclose(replace(sae).encode(x), whole, atol=1e-6)
    assert torch.allclose(replace(sae).encode_at(x, (3, 60)), whole[..., [3, 60]], atol=1e-6)


def test_top_k_within_a_slice_would_be_wrong():
    """Ranking only the latents of a plan keeps latents that the whole dictionary silences."""
    sae, x = random_sae("topk", d_sae=512, d_in=16), torch.randn(64, 16)
    some = tuple(range(100))
    mutant = replace(sae, W_enc=sae.W_enc[:, :100], b_enc=sae.b_enc[:100], W_dec=sae.W_dec[:100], maximum=None)

    f, wrong = sae.encode_at(x, some), mutant.encode(x)

    assert torch.equal(f != 0, sae.encode(x)[:, :100] != 0)
    assert int((wrong != 0).sum()) > 2 * int((f != 0).sum())


def test_ranking_never_holds_tokens_times_latents():
    """No tensor that is made on the way has more latents than a chunk, and a list of the k largest."""
    sae, x = random_sae("topk", d_sae=65_536, d_in=8), torch.randn(512, 8)
    seen: list[int] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            seen.extend(t.numel() for t in (out if isinstance(out, tuple | list) else (out,)) if isinstance(t, Tensor))
            return out

    with Watch():
        sae.encode_at(x, (5, 60_000))

    assert max(seen) <= 512 * (activations_module.CHUNK + 4)


def test_latents_that_tie_with_the_last_are_all_kept():
    sae = SAE("tie", torch.eye(3), torch.zeros(3), torch.eye(3), torch.zeros(3), "topk", top_k=1)

    assert sae.encode(torch.tensor([[2.0, 2.0, 1.0]])).tolist() == [[2.0, 2.0, 0.0]]


def test_latents_that_were_not_read_are_refused():
    part = random_sae("jumprelu").narrow((3, 5))

    with pytest.raises(LatentOutOfRange, match="2 of its 12 latents were read"):
        part.encode_at(torch.zeros(1, 6), (4,))
    with pytest.raises(NotSliceable, match="only 2 of them were read"):
        part.encode(torch.zeros(1, 6))


def test_groups_of_unequal_size_are_refused():
    with pytest.raises(BrokenFile, match="12 latents in 5 groups"):
        replace(random_sae("groupmax"), top_k=5)


@pytest.mark.parametrize("norm", sorted(NORMS))
def test_transcoder_does_not_undo_its_norm(norm):
    sae, x = random_sae("relu", norm, d_out=5), torch.randn(3, 6)
    f = sae.encode(x)

    expected = f @ sae.W_dec + sae.b_dec + x @ (sae.skip if sae.skip is not None else 0)

    assert torch.allclose(sae.decode(f, x), expected, atol=1e-5)


def test_shift_of_the_stream_is_taken_off_and_put_back():
    sae, x, offset = random_sae("jumprelu"), torch.randn(9, 6), torch.randn(6)

    shifted = sae.shifted(offset)

    assert torch.allclose(shifted.encode(x + offset), sae.encode(x), atol=1e-5)
    assert torch.allclose(shifted.decode(sae.encode(x)), sae.decode(sae.encode(x)) + offset, atol=1e-5)


def test_shift_of_what_a_transcoder_reads_leaves_what_it_writes():
    sae, x, offset = random_sae("relu", d_out=5), torch.randn(9, 6), torch.randn(6)

    shifted = sae.shifted(offset)

    f = sae.encode(x)
    assert torch.allclose(shifted.encode(x + offset), f, atol=1e-5)
    assert torch.allclose(shifted.decode(f, x + offset), sae.decode(f, x), atol=1e-5)


def test_fingerprint_tells_kinds_norms_sites_and_ranks_apart():
    sae = random_sae("topk")
    others = [
        replace(sae, activation="topk_norelu"), replace(sae, norm="const_norm"), replace(sae, site_out=WRITES),
        replace(sae, rank_by=torch.ones(12)), replace(sae, norm="layer_norm"), replace(sae, skip=torch.eye(6)),
        replace(sae, norm="layer_norm", eps=1e-6), sae.narrow((1, 2)),
    ]  # fmt: skip

    assert len({other.fingerprint() for other in [sae, *others]}) == len(others) + 1
