"""What a model's name says of its architecture, for files that say nothing else of it."""

import re

_NORM_FOLLOWS = re.compile(r"gemma-?[234]|olmo-?[23]|glm-?4", re.IGNORECASE)


def norm_follows(model: str | None) -> bool:
    """Whether attention and the MLP are followed by a norm, so that what they return is not what they add."""
    return bool(model and _NORM_FOLLOWS.search(model))
