"""Whether steering keeps its promises on this machine, with this model and this SAE, computed both ways."""
