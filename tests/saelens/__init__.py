"""Comparisons with the sae_lens package, which needs an environment of its own."""
