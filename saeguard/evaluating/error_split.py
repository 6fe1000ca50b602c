"""What an SAE leaves unexplained: how much of it follows linearly from x, at which tokens, and what it costs the model.

    e  = x - SAE(x)                     the error, on tokens that are neither special nor massive
    ê  = [x, 1] B                       its linear part: least squares on one share of the rows, measured on the others
    n  = |e|^2 ~ [x, 1] b               its squared norm, predicted; ``quadratic`` has |x|^2 among the features too
    CE                                  with SAE(x), SAE(x) + ê, SAE(x) + (e - ê) and x itself in the place of x

"Decomposing the Dark Matter of Sparse Autoencoders" (arXiv 2410.14670) fits B and b so; |x|^2 is ours. Massive tokens
(see `fits`) would own every sum: they are counted, left out of the fit and the shares, and keep x when CE is measured.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Float64
from torch import Tensor, nn

from saeguard.engines.layouts import Layout
from saeguard.errors import ScoreMismatch
from saeguard.evaluating.moments import Normal, Spread, share_of
from saeguard.evaluating.passes import Passes, Progress, Read, Replace, Text, code, cross_entropies, n_predicted
from saeguard.sae import SAE

PER_UNKNOWN = 2
"""Tokens in the fitted share for each number of a column of B, at least."""
OFTEN = 5
"""Occurrences before a token is listed by itself."""


@dataclass(frozen=True)
class Losses:
    """Mean cross-entropy in nats per token, over ``n_tokens``, with something in the place of x."""

    n_tokens: int
    plain: float
    sae: float
    with_linear: float
    with_nonlinear: float


@dataclass(frozen=True)
class Split:
    """The error on one text. Shares are of 1.

    ``unexplained`` is the share of x's variance that the SAE leaves (FVU), ``unexplained_nonlinear`` what it would
    leave with the linear part of its error restored. ``r2_error`` is the share of the error's own variance that its
    linear part explains, ``r2_norm`` and ``r2_norm_quadratic`` the same for its squared norm; they are below 0 where
    the mean would predict better.
    """

    name: str
    n_tokens: int
    n_massive: int
    l0: float
    unexplained: float
    unexplained_nonlinear: float
    r2_error: float
    r2_norm: float
    r2_norm_quadratic: float
    losses: Losses | None

    @property
    def linear_share(self) -> float:
        """The linear part's share of the error."""
        return 1.0 - share_of(self.unexplained_nonlinear, self.unexplained)


@dataclass(frozen=True)
class TokenError:
    """One token of the vocabulary: its mean |e|^2 as a share of the mean variance of all tokens, and of all error."""

    token: str
    token_id: int
    n: int
    unexplained: float
    linear_share: float
    share_of_error: float


@dataclass(frozen=True)
class ErrorSplit:
    """The error of one SAE over all texts and by text. ``tokens`` are those with the largest ``unexplained``."""

    sae: str
    model: str
    site: str
    n_fitted: int
    whole: Split
    texts: tuple[Split, ...]
    tokens: tuple[TokenError, ...]


@dataclass(frozen=True, eq=False)
class LinearLaw:
    """What follows from x: the error, and its squared norm without and with |x|^2 among the features."""

    B: Float64[Tensor, "d_in_1 d_in"]
    norm: Float64[Tensor, "d_in_1 1"]
    norm_quadratic: Float64[Tensor, "d_in_2 1"]

    def error(self, x: Float[Tensor, "tokens d_in"]) -> Float[Tensor, "tokens d_in"]:
        """The linear part of the error."""
        B = self.B.to(x.device, torch.float32 if x.device.type == "mps" else torch.float64)
        return (x.to(B.dtype) @ B[:-1] + B[-1]).float()


def split_error(
    model: nn.Module,
    sae: SAE,
    texts: Sequence[Text],
    *,
    tokenizer: Any = None,
    fit_share: float = 0.5,
    n_ce_rows: int | None = None,
    n_top: int = 20,
    batch_rows: int = 8,
    progress: Progress | None = None,
    layout: Layout | None = None,
) -> ErrorSplit:
    """Split the error of ``sae`` on ``model``; B is one for all texts, fitted to the first ``fit_share`` of each.

    Cross-entropy is taken on ``n_ce_rows`` rows of each text at most (0: none). ``tokenizer`` only writes tokens.
    Raises what `Passes` raises, and `ScoreMismatch` for too little text.
    """
    passes = Passes(model, sae, layout=layout)
    pairs = [text.split(fit_share) for text in texts]
    fitted, measured = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    massive = passes.massive_from(fitted)
    law, n_fitted = _fit(passes, fitted, massive, batch_rows, progress)
    by_token = _ByToken(1 + max(int(text.ids.max()) for text in texts))
    tallies = [_Tally(sae.d_in) for _ in texts]
    for read in passes.stream(measured, batch_rows=batch_rows, stage="measuring the error", progress=progress):
        x, error, active = _error(passes.sae, read, massive)
        rest = error - law.error(x)
        tallies[read.text].add(x, error, rest, active, law, n_massive=len(read.x) - len(x))
        by_token.add(read.ids[_typical(read.x, massive)], error, rest)
    losses = _losses(passes, law, massive, measured, n_ce_rows, progress)
    splits = [tally.split(text.name, loss) for tally, text, loss in zip(tallies, texts, losses, strict=True)]
    whole = _Tally(sae.d_in)
    for tally in tallies:
        whole = whole + tally
    return ErrorSplit(
        sae.name, passes.model_name, str(passes.site), n_fitted, whole.split("all", _mean_losses(losses)),
        tuple(splits), tuple(by_token.worst(whole, tokenizer, n_top)),
    )  # fmt: skip


def _fit(
    passes: Passes, texts: Sequence[Text], massive: float, batch_rows: int, progress: Progress | None
) -> tuple[LinearLaw, int]:
    d = passes.sae.d_in
    normal = Normal(d + 2, d + 1)
    for read in passes.stream(texts, batch_rows=batch_rows, stage="fitting", progress=progress):
        x, error, _ = _error(passes.sae, read, massive)
        normal.add(_features(x), torch.cat([error.double(), error.double().square().sum(-1, keepdim=True)], dim=-1))
    if normal.n < PER_UNKNOWN * (d + 1):
        raise ScoreMismatch(
            f"the linear part of an error in {d} dimensions",
            f"the fitted share of the text has {normal.n} tokens, and {PER_UNKNOWN * (d + 1)} are needed",
            "Give more text; some hundred tokens per dimension make it exact.",
        )
    linear = slice(d + 1)
    law = LinearLaw(
        normal.solve(linear, slice(d)), normal.solve(linear, slice(d, None)), normal.solve(targets=slice(d, None))
    )
    return law, normal.n


def _features(x: Float[Tensor, "tokens d_in"]) -> Float64[Tensor, "tokens d_in_2"]:
    """[x, 1, |x|^2]."""
    x = x.double()
    return torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype), x.square().sum(-1, keepdim=True)], dim=-1)


def _error(sae: SAE, read: Read, massive: float) -> tuple[Tensor, Tensor, Tensor]:
    """Of the tokens that are not massive: x, the error, and how many latents are active."""
    x = read.x[_typical(read.x, massive)]
    coded = code(sae, x)
    return x, x - coded.x_hat, coded.active


def _typical(x: Tensor, massive: float) -> Tensor:
    return torch.linalg.vector_norm(x, dim=-1) <= massive


def _losses(
    passes: Passes, law: LinearLaw, massive: float, texts: Sequence[Text], n_rows: int | None, progress: Progress | None
) -> list[Losses | None]:
    if n_rows == 0:
        return [None] * len(texts)
    variants: dict[str, Replace | None] = {
        "plain": None,
        "sae": _putting(massive, lambda x: code(passes.sae, x).x_hat),
        "with_linear": _putting(massive, lambda x: code(passes.sae, x).x_hat + law.error(x)),
        "with_nonlinear": _putting(massive, lambda x: x - law.error(x)),
    }
    some = [text.rows(slice(n_rows)) for text in texts]
    means = cross_entropies(passes, some, variants, progress=progress)
    counts = map(n_predicted, some)
    return [None if mean is None else Losses(n, **mean) for n, mean in zip(counts, means, strict=True)]


def _putting(massive: float, new: Replace) -> Replace:
    """``new`` at typical tokens; massive ones keep x."""
    return lambda x: torch.where(_typical(x, massive)[:, None], new(x), x)


def _mean_losses(losses: Sequence[Losses | None]) -> Losses | None:
    """Over the tokens of all texts."""
    known = [loss for loss in losses if loss is not None]
    n = sum(loss.n_tokens for loss in known)
    if not n:
        return None
    mean = lambda name: sum(getattr(loss, name) * loss.n_tokens for loss in known) / n
    return Losses(n, *(mean(name) for name in ("plain", "sae", "with_linear", "with_nonlinear")))


class _Tally:
    """Sums over the typical tokens of one text."""

    def __init__(self, d_in: int):
        self.x, self.error, self.norm = Spread(d_in), Spread(d_in), Spread(1)
        self.rest, self.active, self.n_massive = 0.0, 0, 0
        self.norm_rest: Float64[Tensor, " 2"] = torch.zeros(2, dtype=torch.float64)

    def add(
        self, x: Tensor, error: Tensor, rest: Tensor, active: Tensor, law: LinearLaw, *, n_massive: int
    ) -> None:  # fmt: skip
        norm, features = error.double().square().sum(-1, keepdim=True), _features(x)
        predicted = torch.cat([features[:, :-1] @ law.norm, features @ law.norm_quadratic], dim=-1)
        self.x.add(x)
        self.error.add(error)
        self.norm.add(norm)
        self.rest += float(rest.double().square().sum())
        self.norm_rest += (norm - predicted).square().sum(0)
        self.active += int(active.sum())
        self.n_massive += n_massive

    def __add__(self, other: "_Tally") -> "_Tally":
        both = _Tally(len(self.x.total))
        for name, mine in vars(self).items():
            setattr(both, name, mine + getattr(other, name))
        return both

    def split(self, name: str, losses: Losses | None) -> Split:
        quality = [1.0 - share_of(rest, self.norm.variance) for rest in self.norm_rest.tolist()]
        return Split(
            name=name, n_tokens=self.x.n, n_massive=self.n_massive, l0=share_of(self.active, self.x.n),
            unexplained=share_of(self.error.squares, self.x.variance),
            unexplained_nonlinear=share_of(self.rest, self.x.variance),
            r2_error=1.0 - share_of(self.rest, self.error.variance),
            r2_norm=quality[0], r2_norm_quadratic=quality[1], losses=losses,
        )  # fmt: skip


class _ByToken:
    """Sums of |e|^2 and |e - ê|^2 by token id."""

    def __init__(self, n_ids: int):
        self.n: Float64[Tensor, " ids"] = torch.zeros(n_ids, dtype=torch.float64)
        self.error, self.rest = torch.zeros_like(self.n), torch.zeros_like(self.n)

    def add(self, ids: Tensor, error: Tensor, rest: Tensor) -> None:
        self.n.index_add_(0, ids, torch.ones(len(ids), dtype=torch.float64))
        self.error.index_add_(0, ids, error.double().square().sum(-1))
        self.rest.index_add_(0, ids, rest.double().square().sum(-1))

    def worst(self, whole: _Tally, tokenizer: Any, n_top: int) -> list[TokenError]:
        mean_variance = share_of(whole.x.variance, whole.x.n)
        mean = torch.where(self.n >= OFTEN, self.error / self.n.clamp(min=1), -1.0)
        order = mean.argsort(descending=True, stable=True)[:n_top].tolist()
        return [
            TokenError(
                token=str(token) if tokenizer is None else tokenizer.decode([token]), token_id=token,
                n=int(self.n[token]), unexplained=share_of(float(mean[token]), mean_variance),
                linear_share=1.0 - share_of(float(self.rest[token]), float(self.error[token])),
                share_of_error=share_of(float(self.error[token]), whole.error.squares),
            )
            for token in order if mean[token] >= 0
        ]  # fmt: skip
