"""Whether an SAE belongs to a model, as far as its manifest says."""

from saeguard.engines.base import Engine
from saeguard.errors import WrongModel
from saeguard.sae import SAE
from saeguard.sites import Site


def check_model(sae: SAE, site: Site, engine: Engine) -> None:
    """Raise `WrongModel` where the manifest names another model, or a model of another shape, than ``engine``'s."""
    shape, wanted = engine.model_shape(), sae.manifest.get("model_shape", {})
    differing = [
        f"{key} {wanted[key]} (here {shape[key]})" for key in wanted if shape.get(key, wanted[key]) != wanted[key]
    ]
    if differing:
        raise WrongModel(
            f"SAE {sae.name} at {site}",
            f"its manifest asks for a model with {', '.join(differing)}",
            "Use the model it was trained on.",
        )
    names = [_short(name) for name in engine.model_names()]
    if sae.model and names and _short(sae.model) not in names:
        raise WrongModel(
            f"SAE {sae.name} at {site} of {', '.join(engine.model_names())}",
            f"its manifest says that it was trained on {sae.model}",
            "Use the model it was trained on; to try it on a relative, load it and set model=None with "
            "dataclasses.replace.",
        )


def _short(name: str) -> str:
    return name.rstrip("/").rpartition("/")[2].lower()
