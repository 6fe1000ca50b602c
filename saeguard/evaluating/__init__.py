"""Judge SAEs on a model: whether one fits it at all, before anything is steered through it."""
