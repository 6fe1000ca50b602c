"""Train an SAE on a model's own activations: text -> activations on disk -> BatchTopK -> measured, described files."""
