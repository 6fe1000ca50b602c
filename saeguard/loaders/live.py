"""SAEs that are in memory as objects of sae_lens: saved by their own method, and read back as its files are.

Nothing of sae_lens is imported before it is needed, and its objects are not changed.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import nn

from saeguard.errors import MissingExtra, UnsupportedFormat
from saeguard.loaders import saelens
from saeguard.loaders.source import Hints, Source
from saeguard.sae import SAE, TENSORS
from saeguard.sites import Site

SAEs = SAE | nn.Module | Iterable[SAE | nn.Module] | Mapping[str, SAE | nn.Module]
"""One SAE or several, with names or without: ours, or live ones of sae_lens."""


def as_ours(sae: SAE | nn.Module) -> SAE:
    """``sae``, or what `load_saelens` makes of it where it is not one of ours."""
    return sae if isinstance(sae, SAE) else load_saelens(sae)


def load_saelens(
    sae: Any,
    site: Site | str | None = None,
    *,
    site_out: Site | str | None = None,
    model: str | None = None,
    input_scale: float | None = None,
    name: str | None = None,
) -> SAE:
    """The `SAE` of a live ``sae_lens.SAE``; one in training becomes what sae_lens would save for inference.

    Its weights are copied to the CPU. ``name`` is sae_lens's own by default; the other arguments are those of
    `saeguard.load_sae`. Raises `MissingExtra` without sae_lens, `UnsupportedFormat` for any other object and for
    what `saeguard.loaders.saelens` refuses.
    """
    hints = Hints(
        Site.parse(site) if site else None, Site.parse(site_out) if site_out else None, model, input_scale=input_scale
    )
    save = _save_method(sae)
    known_as = name or str(sae.get_name())
    with TemporaryDirectory() as temporary:
        folder = Path(temporary) / re.sub(r"[^\w-]", "_", known_as)[:100]  # errors name it
        try:
            save(folder)
        except (RuntimeError, TypeError, ValueError) as error:
            raise UnsupportedFormat(
                f"an object {type(sae).__name__} of sae_lens", f"sae_lens cannot save it ({error})", "Save it yourself."
            ) from error
        found = replace(saelens.open(Source(folder), hints), name=known_as).sae()
        copies = {key: getattr(found, key).clone() for key in TENSORS if getattr(found, key) is not None}
        return replace(found, **copies)  # what was read may still be mapped to the files, which go now


def _save_method(sae: Any) -> Any:
    """How the object saves itself for inference."""
    try:
        import sae_lens
    except ImportError as error:
        raise MissingExtra(
            f"an SAE from an object {type(sae).__name__}",
            f"sae_lens cannot be imported here ({error})",
            "Run pip install sae-lens, or give load_sae the folder where the SAE is saved.",
        ) from error
    if not isinstance(sae, sae_lens.SAE):
        raise UnsupportedFormat(
            f"an SAE from an object {type(sae).__name__}",
            "it is not one of sae_lens",
            "Give load_saelens an SAE of sae_lens, and load_sae a name or a path.",
        )
    return sae.save_inference_model if isinstance(sae, sae_lens.TrainingSAE) else sae.save_model
