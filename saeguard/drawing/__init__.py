"""Show what steering did: a scene of plain and steered text, drawn as a page or as a picture."""
