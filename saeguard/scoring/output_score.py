"""Output score: does moving a latent make the tokens that it promotes the likely ones?

    f_j += A M                        at the last token of a prefix, A = 10
    S_rank = 1 - min_{i in T_j} rank_i / V        S_prob = max_{i in T_j} p_i        S_out = S_rank S_prob

T_j are the latent's own tokens (`logit_lens.top_tokens`), rank is the 0-based position in descending p, V the size of
the vocabulary: Arad, Mueller & Belinkov 2025 (arXiv 2505.20063), section 3. Published, M is the largest activation of
any latent at the last position of any row of the batch, so scores depend on the batch; ``of="prefix"`` takes each
prefix by itself. Over several prefixes the scores are averaged.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor, nn

from saeguard.errors import ScoreMismatch
from saeguard.sae import SAE
from saeguard.scoring.logit_lens import top_tokens
from saeguard.scoring.next_token import PREFIX, MaxOf, own_tokens
from saeguard.scoring.pushed import FACTOR, Reading, pushed
from saeguard.scoring.sweep import Progress, chosen, digest_of
from saeguard.scoring.table import Meaning, ScoreTable

_SOURCE = "Arad et al. 2025, section 3"
_MEANINGS = {
    "output_score": Meaning("S_rank S_prob, 0 to 1", _SOURCE),
    "output_rank": Meaning("1 - best rank of its own tokens / vocabulary", _SOURCE),
    "output_probability": Meaning("largest probability of its own tokens", _SOURCE),
}


def score_rows(log_p: Float[Tensor, "rows vocab"], own: Int[Tensor, "rows k"]) -> dict[str, Float[Tensor, " rows"]]:
    """The three columns, from each row's next-token log-probabilities and own tokens."""
    probability, rank = own_tokens(log_p, own)
    by_rank = 1.0 - rank / log_p.shape[-1]
    return {"output_score": by_rank * probability, "output_rank": by_rank, "output_probability": probability}


def output_score(
    model: nn.Module,
    tokenizer: Any,
    sae: SAE,
    *,
    own: Int[Tensor, "d_sae k"] | None = None,
    prefixes: Sequence[str] = (PREFIX,),
    latents: Sequence[int] | None = None,
    factor: float = FACTOR,
    of: MaxOf = "batch",
    batch: int | None = None,
    checkpoint: str | Path | None = None,
    progress: Progress | None = None,
) -> ScoreTable:
    """Columns ``output_score``, ``output_rank`` and ``output_probability``.

    ``own`` are the latents' own tokens, by default the 20 of the logit lens. ``factor`` counts multiples of what
    ``of`` names. Raises `BindError`, `ScoreMismatch`.
    """
    return pushed(
        model, tokenizer, sae, [reading(model, sae, own=own, latents=latents)], prefixes=prefixes, latents=latents,
        factor=factor, of=of, batch=batch, checkpoint=checkpoint, progress=progress,
    )  # fmt: skip


def reading(
    model: nn.Module, sae: SAE, *, own: Int[Tensor, "d_sae k"] | None = None, latents: Sequence[int] | None = None
) -> Reading:
    """The three columns as a `Reading`, to share a sweep with others. Raises `ScoreMismatch`."""
    own = top_tokens(model, sae) if own is None else own
    if len(own) != sae.d_sae or bool((own[chosen(sae, latents)] < 0).any()):
        raise ScoreMismatch(
            f"output score of {sae.name}", f"own tokens are given for {len(own)} latents, or some are negative",
            "Give a row of token ids for every latent: logit_lens.top_tokens(model, sae).",
        )  # fmt: skip
    asked = {"score": "output_score", "own_tokens": own.shape[1]}
    return Reading(lambda prefix, log_p, rows: score_rows(log_p, own[rows]), _MEANINGS, asked, {"own": digest_of(own)})
