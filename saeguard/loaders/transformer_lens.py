"""What holds for an SAE trained on a model as TransformerLens loads it when it is asked for nothing else.

    center_writing_weights   the residual stream, and what is added to it, has no mean: the mean is taken off x here
    fold_value_biases        attn_z is without the values' bias, and with
    fold_ln                  without what the values make of the bias of ln1, and the MLP ignores the mean of what it
                             reads: the manifest's ``processing`` says so, and it is put right when the SAE is bound

Models without LayerNorm are not centred; which kind a model is, is known when a plan is bound to it.
"""

from typing import Any

from saeguard.errors import SiteNotFound
from saeguard.loaders.source import Hints
from saeguard.norms import Norm
from saeguard.sites import Site

WRITTEN = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")
"""The residual stream and what is added to it: streams that center_writing_weights leaves without a mean."""
_HUB_NAMES = {"gpt2-small": "gpt2", "mistral-7b": "mistralai/Mistral-7B-v0.1"}


def hub_name(name: str | None) -> str | None:
    """The hub's name of a model of TransformerLens, where the two differ in more than their owner."""
    return name if name is None else _HUB_NAMES.get(name, name)


def norm(site: Site | None, hints: Hints, *, processed: bool) -> Norm:
    """``center`` where the stream had no mean; ``processed`` is what is known where a release says nothing."""
    centred = hints.overrides.get("center_writing_weights", processed)
    return "center" if centred and site is not None and site.stream in WRITTEN else "none"


def processing(
    site: Site | None, *, value_biases: bool = True, fold_ln: bool = True, centers: bool = True
) -> dict[str, Any]:
    """What a manifest has to say of it, if anything; by default what TransformerLens does unless asked.

    Where the site is not known yet it says everything, and a plan's rule settles what of it matters.
    """
    stream = site.stream if site is not None else None
    wanted = {
        "center_writing_weights": centers and site is None,
        "fold_value_biases": value_biases and stream in (None, "attn_z"),
        "fold_ln": fold_ln,
    }
    if not any(wanted.values()) or stream not in (None, "attn_z", "mlp_normed"):
        return {}
    if stream == "attn_z":
        return {"processing": {"fold_value_biases": True, "fold_ln": fold_ln}} if value_biases else {}
    return {"processing": {key: value for key, value in wanted.items() if value}}


def site_of(hook: str | None, missing: str) -> tuple[Site | None, dict[str, Any]]:
    """The stream of a hook's name, or None with what a manifest says then; ``missing`` is why there is no name."""
    try:
        return (Site.parse(hook), {}) if hook else (None, {"site_unknown": missing})
    except SiteNotFound as error:
        return None, {"site_unknown": str(error)}
