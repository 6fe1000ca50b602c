"""What a score has to be better than, and latents that no score should choose.

random             a random number per latent: what choosing blindly among the same latents gives
fake_ratio         frequency on tokens drawn at random / frequency on text; FaithfulSAE (arXiv 2506.17673) calls
                   latents fake that fire on text of no language
special_frequency  share of special tokens (BOS, roles) on which the latent fires
special_share      its activation on special tokens, as a share of all its activation on the text
"""

from collections.abc import Iterable

import torch

from saeguard.sae import SAE
from saeguard.scoring.statistics import Statistics
from saeguard.scoring.table import Meaning, ScoreTable


def random_control(sae: SAE, *, seed: int, among: Iterable[int] | None = None) -> ScoreTable:
    """A number between 0 and 1 for every latent, NaN for those not ``among``: ``ranked`` draws without replacement.

    The number of a latent depends on the seed alone, so two controls of one seed agree on the latents they share.
    """
    drawn = torch.rand(sae.d_sae, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    if among is not None:
        chosen = list(among)
        sae.check_latents(chosen)
        out = torch.ones(sae.d_sae, dtype=torch.bool)
        out[torch.tensor(chosen, dtype=torch.long)] = False
        drawn = drawn.masked_fill(out, float("nan"))
    return ScoreTable.of(sae, {"random": (drawn, Meaning("a random number", "control"))}, score="random", seed=seed)


def fake(statistics: Statistics, *, text: str = "text", random: str = "random") -> ScoreTable:
    """How a latent fires on random tokens (`Texts.random`), alone and against text; NaN where it fires on neither.

    A latent that fires on random tokens and never on text has an infinite ratio.
    """
    ours, theirs = statistics.of(text).frequency, statistics.of(random).frequency
    source = "Fake Feature Ratio, FaithfulSAE, arXiv 2506.17673"
    columns = {
        "random_frequency": (theirs, Meaning("share of random tokens", source, higher=False)),
        "fake_ratio": (theirs / ours, Meaning("ratio", source, higher=False)),
    }
    return statistics.table("fake", columns, {"text": text, "random": random})


def real(statistics: Statistics, *, random: str = "random", most: float = 0.1) -> list[int]:
    """Latents that fire on at most ``most`` of random tokens; the paper does not say what it takes for too often."""
    return (statistics.of(random).frequency <= most).nonzero()[:, 0].tolist()


def special(statistics: Statistics, corpus: str = "text") -> ScoreTable:
    """How a latent fires on the special tokens of a text; NaN where there are none, or where it never fires."""
    found = statistics.of(corpus)
    source = "special tokens, which no other score counts"
    everything = found.special_sum + found.sum
    columns = {
        "special_frequency": (
            found.special_active / found.n_special,
            Meaning("share of special tokens", source, False),
        ),
        "special_share": (found.special_sum / everything, Meaning("share of activation", source, False)),
    }
    return statistics.table("special", columns, {"corpus": corpus})
