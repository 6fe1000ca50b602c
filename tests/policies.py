"""Policies for tests: one of about a kilobyte, and random ones of every gate, op and stop."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from hypothesis import strategies as st

from saeguard import Ablate, Clamp, Plan, Rule, Site
from saeguard.gates import (
    Always,
    And,
    Blend,
    Cosine,
    Count,
    Cusum,
    Hits,
    Latched,
    LogOdds,
    Not,
    Or,
    Peak,
    PooledHead,
    Probe,
    Rate,
    TopKMean,
    Watch,
    Window,
    Words,
    WordsCusum,
)  # fmt: skip
from saeguard.guarding.pins import ModelPin, SAEPin
from saeguard.guarding.policy import Policy
from saeguard.guarding.signing import SigningKey
from saeguard.guarding.stops import Halt, Refuse
from tests import laws, tiny
from tests.words import word_tokenizer

TEXT = "I cannot help with that."
GATE = Latched(Watch(Hits((3, 5), 0.5), Cusum(0.125), 2.0))
SAES = [tiny.tiny_sae(name=name, d_sae=100, d_in=1) for name in ("a", "ä/ö.1", 'quote " and \\')]
NAMES = st.sampled_from([sae.name for sae in SAES])
DIGESTS = st.integers(0, 2**256 - 1).map(lambda n: f"{n:064x}")
NUMBERS = st.floats(-1e300, 1e300, allow_nan=False)
LATENTS = st.lists(st.integers(0, 99), max_size=3, unique=True).map(tuple)
SITES = st.none() | st.builds(Site, st.sampled_from(("resid_pre", "resid_post", "attn_z")), st.integers(0, 99))
WORDS = st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1, max_size=12)
CODES = st.text("abcXYZ019._:-", min_size=1, max_size=8)
FIGURES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | NUMBERS | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3),
    max_leaves=5,
)


@cache
def keys() -> tuple[SigningKey, SigningKey]:
    """Two keys that stay the same while tests run."""
    return SigningKey.generate(), SigningKey.generate()


def example(**changes: Any) -> Policy:
    """A policy whose signed file has about a kilobyte, for the tiny model."""
    policy = _example()
    return replace(policy, **changes) if changes else policy


@cache
def _example() -> Policy:
    plan = Plan((Rule("tiny", (3, 5), Clamp(-2.0, when="active")),))
    return Policy.of(
        tiny.tiny_model(), word_tokenizer(), tiny.tiny_sae(), plan, name="biology", model_name="tiny",
        refusals=[Refuse(GATE, "tiny", None, TEXT, "biology.gate")], calibration={"level": 0.01, "n": 4000}, serial=7,
    )  # fmt: skip


def _where(draw: Callable[[Any], Any], *, sae: bool) -> dict[str, Any]:
    own = {"site": draw(SITES), "special": draw(st.booleans())}
    return own | ({"sae": draw(st.none() | NAMES)} if sae else {})


@st.composite
def _hits(draw: Any) -> Hits:
    return Hits(draw(LATENTS), draw(NUMBERS), **_where(draw, sae=True))


@st.composite
def _log_odds(draw: Any) -> LogOdds:
    latents = draw(LATENTS)
    weights = tuple(draw(NUMBERS) for _ in latents)
    caps = draw(st.none() | st.tuples(*(NUMBERS for _ in latents)))
    return LogOdds(latents, weights, draw(NUMBERS), caps=caps, **_where(draw, sae=True))


@st.composite
def _probes(draw: Any) -> Probe:
    return Probe(draw(st.lists(NUMBERS, min_size=1, max_size=3).map(tuple)), draw(NUMBERS), **_where(draw, sae=False))


@st.composite
def _cosines(draw: Any) -> Cosine:
    direction = draw(st.lists(st.integers(1, 9).map(float), min_size=1, max_size=3).map(tuple))
    return Cosine(direction, draw(st.floats(-1, 1)), **_where(draw, sae=False))


@st.composite
def _heads(draw: Any) -> PooledHead:
    latents = draw(LATENTS)
    pooling = draw(st.lists(st.sampled_from(("count", "binary", "frequency", "max", "mean")), min_size=1, max_size=2,
                            unique=True).map(tuple))  # fmt: skip
    weights = tuple(draw(NUMBERS) for _ in range(len(latents) * len(pooling)))
    return PooledHead(latents, pooling, weights, draw(NUMBERS), draw(NUMBERS), **_where(draw, sae=True))


@st.composite
def _words(draw: Any) -> Words:
    tokens = tuple(draw(st.lists(st.integers(0, 99), max_size=3, unique=True)))
    pairs = draw(st.lists(st.tuples(st.integers(0, 99), st.integers(0, 99)), max_size=2, unique=True))
    several = lambda one, n: tuple(draw(one) for _ in range(n))
    squares = st.floats(0, 1e300)
    return Words(
        tokens, several(NUMBERS, len(tokens)), several(squares, len(tokens)), tuple(i for pair in pairs for i in pair),
        several(NUMBERS, len(pairs)), several(squares, len(pairs)), draw(st.integers(1, 99)),
        draw(st.floats(1e-9, 1e300)), draw(NUMBERS),
    )  # fmt: skip


@st.composite
def _words_cusum(draw: Any) -> WordsCusum:
    one = draw(_words())
    return WordsCusum(
        one.tokens, one.weights, one.pairs, tuple(map(abs, one.pair_weights)), draw(NUMBERS), one.threshold
    )


@st.composite
def _blends(draw: Any) -> Blend:
    parts = tuple(draw(st.lists(LEAVES["watch"] | LEAVES["words"] | LEAVES["words_cusum"], min_size=1, max_size=2)))
    return Blend(parts, tuple(draw(NUMBERS) for _ in parts), draw(NUMBERS))


EVIDENCE = {"hits": _hits(), "log_odds": _log_odds(), "probe": _probes()}
POOLS = {
    "rate": st.builds(Rate, st.sampled_from(("running", "prompt"))), "window": st.builds(Window, st.integers(1, 99)),
    "cusum": st.builds(Cusum, NUMBERS), "count": st.just(Count()), "peak": st.just(Peak()),
    "top_k_mean": st.builds(TopKMean, st.integers(1, 9), st.none() | st.integers(9, 99), NUMBERS),
}  # fmt: skip
LEAVES = {
    "always": st.just(Always()), "cosine": _cosines(), "pooled_head": _heads(),
    "watch": st.builds(Watch, st.one_of(*EVIDENCE.values()), st.one_of(*POOLS.values()), NUMBERS),
    "words": _words(), "words_cusum": _words_cusum(), "blend": _blends(),
}  # fmt: skip


def _joined(inner: st.SearchStrategy[Any]) -> dict[str, st.SearchStrategy[Any]]:
    several = st.lists(inner, min_size=1, max_size=2).map(tuple)
    return {"and": st.builds(And, several), "or": st.builds(Or, several), "not": st.builds(Not, inner),
            "latched": st.builds(Latched, inner)}  # fmt: skip


GATES = LEAVES | _joined(st.one_of(*LEAVES.values()))
"""A strategy for each kind of gate."""
ANY_GATE = st.recursive(
    st.one_of(*LEAVES.values()), lambda inner: st.one_of(*_joined(inner).values()), max_leaves=3
)  # fmt: skip
STOPS = st.one_of(
    st.builds(Refuse, ANY_GATE, NAMES, SITES, WORDS, CODES), st.builds(Halt, ANY_GATE, NAMES, SITES, CODES)
)


@st.composite
def _plans(draw: Any) -> Plan:
    rule = st.one_of(*(laws.rules(sae, most=4, where=laws.wheres(longest=10**6)) for sae in SAES))
    gated = st.builds(lambda rule, gate: replace(rule, gate=gate), rule, st.none() | ANY_GATE)
    return Plan(laws.compatible(draw(st.lists(gated, min_size=1, max_size=3))), draw(WORDS))


@st.composite
def policies(draw: Any) -> Policy:
    """Any policy on three SAEs."""
    stops = {stop.reason: stop for stop in draw(st.lists(STOPS, max_size=2))}
    plan = draw(_plans() if not stops else st.none() | _plans())
    return Policy(
        name=draw(WORDS), model=ModelPin(draw(WORDS), draw(DIGESTS), draw(DIGESTS)), tokenizer=draw(DIGESTS),
        saes=tuple(SAEPin(sae.name, draw(WORDS), draw(DIGESTS), Site("resid_post", draw(st.integers(0, 9))))
                   for sae in SAES),
        plan=plan, refusals=tuple(stops.values()), on_error=draw(st.sampled_from(("refuse", "bypass"))),
        calibration=draw(st.dictionaries(WORDS, FIGURES, max_size=3)), serial=draw(st.integers(0, 2**53)),
        version=draw(WORDS),
    )  # fmt: skip


def with_gate(gate: Any) -> Policy:
    """A policy that has this gate in a rule and in a stop."""
    pins = tuple(SAEPin(sae.name, "x", "0" * 64, Site("resid_post", 1)) for sae in SAES)
    return Policy(
        name="gate", model=ModelPin("m", "0" * 64, "0" * 64), tokenizer="0" * 64, saes=pins,
        plan=Plan((Rule("a", (1,), Ablate(), gate=gate),)), refusals=(Halt(gate, "a", None, "r"),),
    )  # fmt: skip


def shifted_sae(**changes: Any) -> Any:
    """The example's SAE with something else in it."""
    sae = tiny.tiny_sae()
    return replace(sae, **changes) if changes else replace(sae, b_dec=sae.b_dec + torch.eye(1, sae.d_in)[0] / 8)
