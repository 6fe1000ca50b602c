"""What a deployment puts in front of a steered model; so far the record of what happened to every request."""
