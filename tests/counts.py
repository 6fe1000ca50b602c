"""How many random cases a law is tried on: all of them with SAEGUARD_FULL=1, else a twentieth, the same every time."""

import os
from math import ceil

from hypothesis import HealthCheck, Phase, settings

FULL = os.environ.get("SAEGUARD_FULL") == "1"
SHARE = 20

settings.register_profile(
    "saeguard",
    deadline=None,  # a shared machine has slow moments
    derandomize=not FULL,
    database=None,
    print_blob=True,
    phases=(Phase.explicit, Phase.generate, Phase.shrink),
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("saeguard")


def cases(n: int, *, per_example: int = 1) -> int:
    """Hypothesis examples for a law that promises ``n`` cases, where one example tries ``per_example`` of them."""
    wanted = n if FULL else max(ceil(n / SHARE), 1)
    return max(ceil(wanted / per_example), 1)
