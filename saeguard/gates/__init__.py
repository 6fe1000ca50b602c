"""Gates: frozen data that decides, row by row and token by token, whether a rule's edits are on.

A trigger sees one token; a gate remembers. What it remembers of a row is a function of the row's tokens up to this one
alone, so a prompt that arrives whole, in chunks or token by token opens it at the same place. A `Watch` is made of
three parts that combine freely: evidence per token, a pool that makes one score of the evidence so far, and a
threshold.
"""

from saeguard.gates.base import Gate, Leaf, Seen, State, Verdict
from saeguard.gates.blend import Blend
from saeguard.gates.cast import Cosine
from saeguard.gates.combined import And, Latched, Not, Or
from saeguard.gates.evidence import Evidence, Hits, LogOdds, Probe
from saeguard.gates.pooled import PooledHead
from saeguard.gates.pools import Count, Cusum, Peak, Pool, Rate, TopKMean, Window
from saeguard.gates.watch import Always, Watch, token_rate
from saeguard.gates.words import Words
from saeguard.gates.words_cusum import WordsCusum

GATES = {
    "always": Always, "watch": Watch, "pooled_head": PooledHead, "cosine": Cosine, "and": And, "or": Or, "not": Not,
    "latched": Latched, "words": Words, "words_cusum": WordsCusum, "blend": Blend,
}  # fmt: skip
"""Names of the gates in a plan file; evidence and pools stand in the same place."""
EVIDENCE = {"hits": Hits, "log_odds": LogOdds, "probe": Probe}
POOLS = {"rate": Rate, "window": Window, "cusum": Cusum, "count": Count, "peak": Peak, "top_k_mean": TopKMean}

__all__ = [
    "EVIDENCE", "GATES", "POOLS", "Always", "And", "Blend", "Cosine", "Count", "Cusum", "Evidence", "Gate", "Hits",
    "Latched", "Leaf", "LogOdds", "Not", "Or", "Peak", "Pool", "PooledHead", "Probe", "Rate", "Seen", "State",
    "TopKMean", "Verdict", "Watch", "Window", "Words", "WordsCusum", "token_rate",
]  # fmt: skip
