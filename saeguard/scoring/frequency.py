"""How often and how strongly a latent fires on a text.

frequency = #{t: f > 0} / T      mean = sum f / T      mean_active = sum f / #{t: f > 0}      maximum = max f
log_density = log10 frequency    document_frequency = share of documents in which it fires
"""

import torch

from saeguard.scoring.statistics import Statistics
from saeguard.scoring.table import Meaning, ScoreTable

_SOURCE = "counts over the text's tokens, padding and special tokens left out"


def frequency(statistics: Statistics, corpus: str = "text") -> ScoreTable:
    """How often and how strongly; what is a mean or a logarithm of nothing is NaN."""
    found = statistics.of(corpus)
    fires = found.active > 0
    nan = torch.tensor(float("nan"), dtype=torch.float64)
    columns = {
        "frequency": (found.frequency, Meaning("share of tokens", _SOURCE)),
        "log_density": (torch.where(fires, found.frequency.log10(), nan), Meaning("log10 share of tokens", _SOURCE)),
        "document_frequency": (found.document_active / found.n_documents, Meaning("share of documents", _SOURCE)),
        "mean": (found.mean, Meaning("activation units", _SOURCE)),
        "mean_active": (torch.where(fires, found.sum / found.active, nan), Meaning("activation units", _SOURCE)),
        "maximum": (torch.where(fires, found.maximum, nan), Meaning("activation units", _SOURCE)),
    }
    return statistics.table("frequency", columns, {"corpus": corpus})


def alive(statistics: Statistics, corpus: str = "text", *, above: float = 0.0, most: float = 1.0) -> list[int]:
    """Latents that fire on more than ``above`` and at most ``most`` of the tokens: the dead and the dense are out."""
    found = statistics.of(corpus).frequency
    return ((found > above) & (found <= most)).nonzero()[:, 0].tolist()
