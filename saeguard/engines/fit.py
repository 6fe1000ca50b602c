"""Whether an SAE belongs to a model, as far as its manifest says, and a rule to the positions that it is about."""

from saeguard.editor import BoundRule
from saeguard.engines.base import Engine, Place
from saeguard.errors import PhaseUnknown, UnsupportedMode, WrongModel
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


def check_positions(bound: BoundRule, place: Place) -> None:
    """Raise `PhaseUnknown` or `UnsupportedMode` for a rule that follows a text, where positions are none."""
    if place.are_tokens:
        return
    if bound.rule.where.needs_phase:
        raise PhaseUnknown(
            f"a rule for {bound.rule.where.phase} tokens at {place.site}",
            f"the positions of {place.path} are no tokens, and none is prompt or generated",
            "Use phase='all', with start and stop for a range of positions; or name the tokens in the site map.",
        )
    if bound.gate is not None:
        raise UnsupportedMode(
            f"a rule with a gate at {place.site}",
            f"a gate decides on one token after the other, and the positions of {place.path} come all at once",
            "Use a trigger, AnyActive(latents), which decides at each position; or name the tokens in the site map.",
        )


def _short(name: str) -> str:
    return name.rstrip("/").rpartition("/")[2].lower()
