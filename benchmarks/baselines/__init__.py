"""What `benchmarks/unlearning.py` compares a policy with: other gates, other edits, other ways to forget."""
