"""Gradient pursuit: the activations that a decoder alone would find, one latent per round, and what they explain.

    r = x - b_dec, w = 0, S = {}        then, every round, with the decoder's rows D at length 1:
    p = D r;  S += argmax p;  g = p on S, 0 elsewhere;  c = g D
    w = max(w + (<c, r> / <c, c>) g, 0);  r = x - b_dec - w D

"Decomposing the Dark Matter of Sparse Autoencoders" (arXiv 2410.14670) encodes so where an SAE's own encoder is in
question. Each round costs two products with the whole dictionary: an encoder for analysis, not for generation.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from jaxtyping import Float
from torch import Tensor

from saeguard.errors import NotSliceable, UnsupportedFormat
from saeguard.evaluating.moments import Spread, share_of
from saeguard.sae import SAE

TOKENS = 256
"""Pursued at a time."""


@dataclass(frozen=True)
class Point:
    """Shares of variance left unexplained with ``k`` latents per token.

    ``encoder`` keeps the k of each token's own activations that write most; where the SAE has fewer active, all.
    """

    k: int
    pursuit: float
    encoder: float


@dataclass(frozen=True)
class Curve:
    """The curve, and beside it the SAE as it is: all its activations, ``l0`` on average."""

    points: tuple[Point, ...]
    n_tokens: int
    l0: float
    unexplained: float


def rounds_of_pursuit(
    x: Float[Tensor, "tokens d_in"], atoms: Float[Tensor, "latents d_in"]
) -> Iterator[Float[Tensor, "tokens latents"]]:
    """The coefficients after each round, without end; ``x`` without b_dec, ``atoms`` of length 1."""
    w = x.new_zeros(len(x), len(atoms))
    chosen, rest = torch.zeros_like(w, dtype=torch.bool), x
    while True:
        p = rest @ atoms.T
        chosen = chosen.scatter(1, p.argmax(-1, keepdim=True), True)
        g = torch.where(chosen, p, 0.0)
        c = g @ atoms
        size = c.square().sum(-1, keepdim=True)
        step = torch.where(size > 0, (c * rest).sum(-1, keepdim=True) / size, 0.0)
        w = (w + step * g).relu()
        rest = x - w @ atoms
        yield w


def gradient_pursuit(sae: SAE, x: Float[Tensor, "tokens d_in"], k: int) -> Float[Tensor, "tokens d_sae"]:
    """At most ``k`` activations per token, in the SAE's units; `SAE.decode` takes them.

    Raises `NotSliceable` for an SAE read in part, `UnsupportedFormat` for a transcoder and for k below 0.
    """
    _check_counts(sae, [k])
    target, atoms, lengths = _prepared(sae, x)
    parts = [_after(part, atoms, k) for part in target.split(TOKENS)]
    return torch.cat(parts) / lengths if parts else x.new_zeros(0, sae.d_sae)


def pursuit_curve(sae: SAE, x: Float[Tensor, "tokens d_in"], at: Sequence[int]) -> Curve:
    """What pursuit and the SAE's own encoder leave unexplained of ``x`` with ``at`` latents per token.

    Raises what `gradient_pursuit` raises.
    """
    _check_counts(sae, at)
    x = x.to(sae.W_dec.device)
    target, atoms, lengths = _prepared(sae, x)
    spread, wanted, active, left = Spread(sae.d_in), sorted(set(at)), 0, 0.0
    pursued, kept = dict.fromkeys(wanted, 0.0), dict.fromkeys(wanted, 0.0)
    for part, goal in zip(x.split(TOKENS), target.split(TOKENS), strict=True):
        f = sae.encode(part)
        spread.add(part.cpu())
        active += int((f != 0).sum())
        left += _squares(sae, f, part)
        for k, w in _some_rounds(goal, atoms, wanted):
            pursued[k] += _squares(sae, w / lengths, part)
            kept[k] += _squares(sae, _strongest(f, lengths, k), part)
    share = lambda squares: share_of(squares, spread.variance)
    points = tuple(Point(k, share(pursued[k]), share(kept[k])) for k in wanted)
    return Curve(points, len(x), share_of(active, len(x)), share(left))


def _check_counts(sae: SAE, counts: Sequence[int]) -> None:
    if min(counts, default=0) < 0:
        raise UnsupportedFormat(
            f"gradient pursuit with {sae.name}", f"{min(counts)} is no number of latents", "Give 0 or more."
        )


def _prepared(sae: SAE, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What is pursued, the decoder's rows at length 1, and how long they are."""
    if sae.is_transcoder or sae.skip is not None:
        raise UnsupportedFormat(
            f"gradient pursuit with {sae.name}", "it is a transcoder or has a skip",
            "Give an SAE, whose latents alone have to add up to what it reads.",
        )  # fmt: skip
    if sae.held is not None:
        raise NotSliceable(
            f"gradient pursuit with {sae.name}", f"only {len(sae.held)} of its {sae.d_sae} latents were read",
            "Load it without latents=...",
        )  # fmt: skip
    lengths = torch.linalg.vector_norm(sae.W_dec.float(), dim=-1)
    lengths = torch.where(lengths > 0, lengths, 1.0)
    return sae.read(x.to(sae.W_dec.device)).x - sae.b_dec.float(), sae.W_dec.float() / lengths[:, None], lengths


def _after(target: Tensor, atoms: Tensor, k: int) -> Tensor:
    nothing = target.new_zeros(len(target), len(atoms))
    return next(islice(rounds_of_pursuit(target, atoms), k - 1, None)) if k else nothing


def _some_rounds(target: Tensor, atoms: Tensor, wanted: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
    if 0 in wanted:
        yield 0, target.new_zeros(len(target), len(atoms))
    for k, w in enumerate(islice(rounds_of_pursuit(target, atoms), max(wanted, default=0)), 1):
        if k in wanted:
            yield k, w


def _strongest(f: Tensor, lengths: Tensor, k: int) -> Tensor:
    """The k of each token's activations that write most."""
    places = (f * lengths).abs().topk(min(k, f.shape[-1]), dim=-1).indices
    return torch.zeros_like(f).scatter(-1, places, f.gather(-1, places))


def _squares(sae: SAE, f: Tensor, x: Tensor) -> float:
    return float((x.float() - sae.decode(f, x)).double().square().sum())
