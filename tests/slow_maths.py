"""The formula once more, in Python floats, one token and one latent at a time: what every kernel has to agree with.

    f' = clip(scale * f + shift, lo, hi)   where f > floor,   else f
    y' = y + apply * a * (f' - f) @ W_dec      y is x, but for a transcoder; a undoes the SAE's norm

and of the dense ops, where f' is f of weighted pre-activations, or y' is the reconstruction.

Written from the formula, without a line of the package's own arithmetic: nothing is shared but the data of a rule.
"""

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from saeguard import (
    SAE,
    Ablate,
    Add,
    AtLeast,
    AtMost,
    Clamp,
    ClampAbove,
    Misdirect,
    Project,
    Reduce,
    Reweight,
    Rule,
    Scale,
    Splice,
)

Token = dict[str, Any]
"""``real``, ``special``, ``covers`` (one yes or no per rule), ``absolute``, ``since`` (from the end of the prompt)."""


@dataclass
class Told:
    """What happens at one token: ``df[rule][i]`` is what the rule adds to the activation of its i-th latent.

    Of a dense rule it holds what is added to the stream.
    """

    x: list[float]
    df: list[list[float]]
    doubtful: bool = False
    """An amount in units of the norm of x is so near the activation that rounding decides whether they are equal."""


def tell(x: Sequence[float], token: Token, rules: Sequence[Rule], saes: Mapping[str, SAE],
         y: Sequence[float] | None = None) -> Told:  # fmt: skip
    """Edit one token: ``y``, or x itself."""
    weights = {name: _lists(saes[name]) for name in {rule.sae for rule in rules}}
    read = {name: normed(x, saes[name]) for name in weights}
    f = {name: activations(read[name][0], saes[name], weights[name]) for name in weights}
    y = x if y is None else y
    applies = [
        token["covers"][i] and selected(rule, token) and triggered(rule, f[rule.sae]) for i, rule in enumerate(rules)
    ]
    told = Told(list(y), [])
    norm = math.sqrt(sum(v * v for v in y))
    for i, rule in enumerate(rules):
        if rule.is_dense:
            change_of_y = dense_change(rule, x, y, saes[rule.sae], weights[rule.sae])
            told.df.append(change_of_y if applies[i] else [0.0] * len(y))
            size = math.sqrt(sum(v * v for v in told.df[-1]))
            told.doubtful |= not rule.needs_all and applies[i] and size < 1e-5 * (1 + norm)
            told.x = [v + d for v, d in zip(told.x, told.df[-1], strict=True)]
            continue
        changes = []
        for place, latent in enumerate(rule.latents):
            acts = applies[i] and not any(
                applies[j]
                and other.sae == rule.sae
                and latent in other.latents
                and other.priority is not None
                and rule.priority is not None
                and other.priority > rule.priority
                for j, other in enumerate(rules)
            )
            before = f[rule.sae][latent]
            maximum = saes[rule.sae].maximum
            unit = {"activation": 1.0, "max": float(maximum[latent]) if maximum is not None else 1.0, "norm": norm}
            after = change(rule.op, place, before, unit) if acts else before
            is_norm = getattr(rule.op, "unit", "") == "norm"
            told.doubtful |= is_norm and 0 < abs(after - before) < 1e-5 * (1 + abs(before))
            told.doubtful |= is_norm and acts and after == before
            changes.append(after - before)
            for d, v in enumerate(weights[rule.sae]["W_dec"][latent]):
                told.x[d] += read[rule.sae][1] * (after - before) * v
        told.df.append(changes)
    return told


def selected(rule: Rule, token: Token) -> bool:
    """Whether the rule is about this token."""
    if not token["real"] or (token["special"] and not rule.special):
        return False
    if token["absolute"] < rule.start or (rule.stop is not None and token["absolute"] >= rule.stop):
        return False
    if rule.phase in ("last", "newest"):
        place = token["since"] + 1  # 0 at the prompt's last token
        if place < 0 or (rule.phase == "last" and place > 0):
            return False
        return rule.first is None or place < rule.first
    if rule.phase == "generated":
        return token["since"] >= 0 and (rule.first is None or token["since"] < rule.first)
    if rule.phase == "prompt" and token["since"] >= 0:
        return False
    return rule.first is None or token["absolute"] < rule.first


def triggered(rule: Rule, f: Sequence[float]) -> bool:
    """Whether any watched latent is above the threshold."""
    return rule.trigger is None or any(f[latent] > rule.trigger.threshold for latent in rule.trigger.latents)


def normed(x: Sequence[float], sae: SAE) -> tuple[list[float], float]:
    """What the encoder reads, and by what a change is multiplied on its way back."""
    n, a = len(x), 1.0
    mean = sum(x) / n if sae.norm in ("center", "layer_norm") else 0.0
    out = [v - mean for v in x]
    if sae.norm == "layer_norm":
        a = math.sqrt(sum(v * v for v in out) / (n - 1))
        out = [v / (a + sae.eps) for v in out]
    if sae.norm == "const_norm":
        a = math.sqrt(sum(v * v for v in x) / n)
        out = [v / a if a else v for v in out]
    return out, 1.0 if sae.is_transcoder else a


def activations(x: Sequence[float], sae: SAE, weights: Mapping[str, Any] | None = None) -> list[float]:
    """All latents of one token, from what the encoder reads."""
    w = weights or _lists(sae)
    if sae.n_base is not None:
        return boosted(x, sae, w)
    if sae.pursuit is not None:
        return pursued(x, sae, w)
    return fired(preactivations(x, sae, w), sae, w)


def preactivations(x: Sequence[float], sae: SAE, w: Mapping[str, Any]) -> list[float]:
    """Of all latents of one token."""
    return [w["b_enc"][j] + sum(v * w["W_enc"][d][j] for d, v in enumerate(x)) for j in range(sae.d_sae)]


def fired(pre: Sequence[float], sae: SAE, w: Mapping[str, Any]) -> list[float]:
    """What a kind makes of the pre-activations of its own latents; those behind them are boosts, and JumpReLU."""
    n = sae.d_sae if sae.n_base is None else sae.n_base
    own, boosts = pre[:n], [p if p > w["threshold"][n + j] else 0.0 for j, p in enumerate(pre[n:])]
    if sae.activation == "relu":
        f = [max(p, 0.0) for p in own]
    elif sae.activation == "tanh_relu":
        f = [math.tanh(max(p, 0.0)) for p in own]
    elif sae.activation == "jumprelu":
        f = [p if p > w["threshold"][j] else 0.0 for j, p in enumerate(own)]
    elif sae.activation == "groupmax":
        size = n // (sae.top_k or 1)
        tops = [max(own[j // size * size : (j // size + 1) * size]) for j in range(n)]
        f = [max(p, 0.0) if p == top else 0.0 for p, top in zip(own, tops, strict=True)]
    else:
        f = largest(own, sae.activation, sae.top_k or 1, w.get("rank_by"))
    return f + boosts


def largest(pre: Sequence[float], kind: str, k: int, rank_by: Sequence[float] | None) -> list[float]:
    """The k largest, ties included."""
    rank = [p * (1.0 if rank_by is None else rank_by[j]) for j, p in enumerate(pre)]
    rank = [abs(p) for p in rank] if kind == "abstopk" else rank
    least = sorted(rank)[-k]
    kept = [p if r >= least else 0.0 for p, r in zip(pre, rank, strict=True)]
    return [max(p, 0.0) for p in kept] if kind == "topk" else kept


def dense_change(rule: Rule, x: Sequence[float], y: Sequence[float], sae: SAE, w: Mapping[str, Any]) -> list[float]:
    """What a dense op adds to the stream at one token."""
    read, a = normed(x, sae)
    f = activations(read, sae, w)
    match rule.op:
        case Splice(error="kept"):
            return [0.0] * len(y)
        case Splice(error):
            if error == "dropped" and sae.n_base is not None:
                f = [v if j < sae.n_base else 0.0 for j, v in enumerate(f)]
            return [v - old for v, old in zip(reconstruction(f, x, a, sae, w), y, strict=True)]
        case Misdirect(amount, seed=seed, unit=unit):
            drawn = random.Random(seed)
            u = [drawn.random() for _ in y]
            norm = math.sqrt(sum(v * v for v in y)) if unit == "norm" else 1.0
            return [amount * norm * v / math.sqrt(sum(w * w for w in u)) - old for v, old in zip(u, y, strict=True)]
        case Project(strength):
            return [-strength * v for v in projected(y, [w["W_dec"][latent] for latent in rule.latents])]
        case Reweight():
            after = reweighted(preactivations(read, sae, w), rule, sae, w)
            return [a * v for v in combined([new - old for new, old in zip(after, f, strict=True)], w, len(y))]
    raise AssertionError(rule.op)


def projected(y: Sequence[float], rows: Sequence[Sequence[float]]) -> list[float]:
    """The point nearest to y in the span of the rows: of each the part that is orthogonal to those before, in turn."""
    dot = lambda a, b: sum(v * w for v, w in zip(a, b, strict=True))
    found, kept = [0.0] * len(y), []
    for row in rows:
        rest = list(row)
        for other in kept * 2:
            share = dot(rest, other)
            rest = [v - share * w for v, w in zip(rest, other, strict=True)]
        if math.sqrt(dot(rest, rest)) > 1e-6 * math.sqrt(dot(row, row)):
            kept.append([v / math.sqrt(dot(rest, rest)) for v in rest])
            found = [v + dot(y, kept[-1]) * w for v, w in zip(found, kept[-1], strict=True)]
    return found


def reweighted(pre: Sequence[float], rule: Rule, sae: SAE, w: Mapping[str, Any]) -> list[float]:
    """The activations that weights make of all latents of one token."""
    op: Any = rule.op
    each = op.weights if isinstance(op.weights, tuple) else [op.weights] * len(rule.latents)
    weight = dict(zip(rule.latents, each, strict=True))
    p = [v * weight.get(j, op.others) for j, v in enumerate(pre)]
    n = sae.d_sae if sae.n_base is None else sae.n_base
    bent = lambda values: [math.tanh(v) if sae.activation == "tanh_relu" and j < n else v for j, v in enumerate(values)]
    if op.top_k is None:
        f = fired(p, sae, w)
    else:
        rank_by = [*w["rank_by"][:n], *[1.0] * (sae.d_sae - n)] if "rank_by" in w else None
        f = bent(largest(p, sae.activation if sae.ranks else "topk", op.top_k, rank_by))
    return f if op.mode == "weight" else [raw if v != 0 else 0.0 for raw, v in zip(bent(pre), f, strict=True)]


def reconstruction(f: Sequence[float], x: Sequence[float], a: float, sae: SAE, w: Mapping[str, Any]) -> list[float]:
    """x_hat of one token."""
    mean = sum(x) / len(x) if sae.norm in ("center", "layer_norm") and not sae.is_transcoder else 0.0
    x_hat = [a * (v + b) + mean for v, b in zip(combined(f, w, sae.d_out), w["b_dec"], strict=True)]
    skip = sae.skip.double().tolist() if sae.skip is not None else [[0.0] * sae.d_out] * len(x)
    return [v + sum(x[d] * skip[d][i] for d in range(len(x))) for i, v in enumerate(x_hat)]


def combined(f: Sequence[float], w: Mapping[str, Any], width: int) -> list[float]:
    """f @ W_dec."""
    return [sum(v * w["W_dec"][j][i] for j, v in enumerate(f)) for i in range(width)]


def boosted(x: Sequence[float], sae: SAE, w: Mapping[str, Any]) -> list[float]:
    """The base's latents, as if they were all there are, and behind them every boost's p where p > threshold."""
    n = sae.n_base or 0
    own = {"W_enc": 1, "b_enc": 0, "W_dec": 0, "threshold": 0, "maximum": 0, "rank_by": 0}
    cut = {name: getattr(sae, name) for name in own if getattr(sae, name) is not None}
    cut = {name: tensor[:, :n] if own[name] else tensor[:n] for name, tensor in cut.items()}
    cut["threshold"] = cut["threshold"] if sae.activation == "jumprelu" else None
    f = activations(x, replace(sae, n_base=None, **cut))
    for j in range(n, sae.d_sae):
        p = w["b_enc"][j] + sum(v * w["W_enc"][d][j] for d, v in enumerate(x))
        f.append(p if p > w["threshold"][j] else 0.0)
    return f


def pursued(x: Sequence[float], sae: SAE, w: Mapping[str, Any]) -> list[float]:
    """Matching pursuit of one token."""
    how, found = sae.pursuit, [0.0] * sae.d_sae
    rest = [v - b for v, b in zip(x, w["b_dec"], strict=True)]
    for _ in range(how.rounds if how else 0):
        products = [sum(v * w["W_enc"][d][j] for d, v in enumerate(rest)) for j in range(sae.d_sae)]
        fits = [abs(p) if how and how.signed else max(p, 0.0) for p in products]
        best = fits.index(max(fits))
        coefficient = products[best] if how and how.signed else fits[best]
        again = coefficient == 0 or found[best] != 0
        found[best] += coefficient
        rest = [v - coefficient * w["W_enc"][d][best] for d, v in enumerate(rest)]
        if how and (how.stops_on_repeat and again or math.sqrt(sum(v * v for v in rest)) < how.residual):
            break
    return found


def change(op: Any, place: int, f: float, unit: Mapping[str, float]) -> float:
    """What an op makes of an activation."""

    def amount(value: Any) -> float:
        return (value[place] if isinstance(value, tuple) else value) * unit[getattr(op, "unit", "activation")]

    match op:
        case Clamp(value, when="always"):
            return amount(value)
        case Clamp(value, when="active"):
            return amount(value) if f > 0 else f
        case Scale(factor):
            return amount(factor) * f
        case Add(value):
            return f + amount(value)
        case Ablate():
            return 0.0
        case AtLeast(value):
            return max(f, amount(value))
        case AtMost(value):
            return min(f, amount(value))
        case ClampAbove(value, above=above):
            return amount(value) if f > amount(above) else f
        case Reduce(value):
            return f - min(f, amount(value)) if f > 0 else f
    raise AssertionError(op)


def _lists(sae: SAE) -> dict[str, Any]:
    names = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold", "rank_by")
    return {name: getattr(sae, name).double().tolist() for name in names if getattr(sae, name) is not None}
