"""These tests need sae-lens, which cannot be beside TransformerLens 4: `make test-saelens` runs them."""

from importlib.util import find_spec

collect_ignore_glob = [] if find_spec("sae_lens") else ["test_*.py"]
