"""Pins: what a policy was made for, by fingerprint, and in words what differs from it.

A threshold that was calibrated on one model says nothing on another, so nothing here is a matter of degree: a policy
stands on the very weights, tokenizer and SAEs that it was made with, or not at all.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from saeguard.engines.base import Model
from saeguard.errors import AmbiguousSAE, BadPolicy, UnsupportedModel
from saeguard.fingerprints import config_fingerprint, model_fingerprint, tokenizer_fingerprint
from saeguard.guarding.figures import check_text
from saeguard.guarding.records import DIGEST
from saeguard.sae import SAE
from saeguard.sites import Site

SAEs = SAE | Iterable[SAE] | Mapping[str, SAE]
MAX_NAME = 1_000


def module_of(model: Model) -> nn.Module:
    """``model``, which a guardrail can be attached to. Raises `UnsupportedModel` for what only wraps one."""
    if isinstance(model, nn.Module):
        return model
    raise UnsupportedModel(
        f"a guardrail on {type(model).__name__}",
        "it is not the model but wraps one, which others can call without it",
        "Use the model inside of it (for nnsight, model._module); what goes through the wrapper is then guarded too.",
    )


@dataclass(frozen=True)
class ModelPin:
    """A model by the SHA-256 of its weights and of its configuration; ``name`` is for people. Raises `BadPolicy`."""

    name: str
    weights: str
    config: str

    def __post_init__(self):
        check_text("the name of a policy's model", self.name, most=MAX_NAME)
        check_digest("the weights of a policy's model", self.weights)
        check_digest("the configuration of a policy's model", self.config)

    @classmethod
    def of(cls, model: Model, name: str | None = None) -> "ModelPin":
        """The pin of a live model, named by its folder or repository unless ``name`` says otherwise.

        Raises `UnsupportedModel`.
        """
        model = module_of(model)
        own = str(getattr(model, "name_or_path", "")).rstrip("/").rpartition("/")[2]
        return cls(name or own or type(model).__name__, model_fingerprint(model), config_fingerprint(model))

    def differences(self, model: nn.Module) -> list[str]:
        """How ``model`` is another one; empty when it is not."""
        found = []
        if model_fingerprint(model) != self.weights:
            found.append(f"the model's weights are not those of {self.name}")
        if config_fingerprint(model) != self.config:
            found.append(f"the model's configuration (heads, rotary bases, epsilons, ...) is not that of {self.name}")
        return found


@dataclass(frozen=True)
class SAEPin:
    """An SAE by its fingerprint and site. Rules call it ``name``; ``source`` is where `load_sae` finds it again.

    Raises `BadPolicy`.
    """

    name: str
    source: str
    fingerprint: str
    site: Site

    def __post_init__(self):
        check_text("the name of a policy's SAE", self.name, most=MAX_NAME)
        check_text(f"the source of SAE {self.name}", self.source, most=MAX_NAME)
        check_digest(f"the fingerprint of SAE {self.name}", self.fingerprint)
        if not isinstance(self.site, Site):
            raise BadPolicy(
                f"the site of SAE {self.name}", f"{self.site!r} is not a site", "Use Site('resid_post', 9)."
            )

    @classmethod
    def of(cls, sae: SAE, *, name: str | None = None, source: str | None = None) -> "SAEPin":
        """The pin of an SAE in memory. Raises `BadPolicy` for one that does not say where it reads."""
        if sae.site is None:
            raise BadPolicy(
                f"a pin of SAE {sae.name}", "it does not say which stream it reads",
                "Set it: dataclasses.replace(sae, site=Site('resid_post', 9)).",
            )  # fmt: skip
        return cls(name or sae.name, source or name or sae.name, sae.key, sae.site)

    def differences(self, sae: SAE | None) -> list[str]:
        """How ``sae`` is another one; empty when it is not."""
        if sae is None:
            return [f"SAE {self.name} is not there"]
        if sae.site != self.site:
            return [f"SAE {self.name} is at {sae.site}, not at {self.site}"]
        if sae.key == self.fingerprint:
            return []
        part = "" if sae.held is None else f" (only {len(sae.held)} of its {sae.d_sae} latents were read)"
        return [f"SAE {self.name} is not the one that the policy was made with{part}"]


def tokenizer_differences(pinned: str, tokenizer: Any) -> list[str]:
    """How ``tokenizer`` is another one than that of fingerprint ``pinned``; empty when it is not."""
    if tokenizer_fingerprint(tokenizer) == pinned:
        return []
    return ["the tokenizer is another one (vocabulary, merges, special tokens or chat template)"]


def by_name(saes: SAEs) -> dict[str, SAE]:
    """SAEs under the names by which rules call them. Raises `AmbiguousSAE`."""
    given: Any = [saes] if isinstance(saes, SAE) else saes
    if isinstance(given, Mapping):
        return dict(given)
    found: dict[str, SAE] = {}
    for sae in given:
        if sae.name in found and found[sae.name].key != sae.key:
            raise AmbiguousSAE(
                f"SAE {sae.name}", "two different ones of this name were given",
                "Give them as a mapping, {'a': first, 'b': second}, and name 'a' and 'b' in the rules.",
            )  # fmt: skip
        found[sae.name] = sae
    return found


def check_digest(asked: str, value: Any) -> None:
    """Raise `BadPolicy` unless ``value`` is a SHA-256 in lower-case hexadecimal."""
    if not isinstance(value, str) or DIGEST.fullmatch(value) is None:
        raise BadPolicy(asked, "it is not a SHA-256 of 64 lower-case hexadecimal digits", "Use Policy.of.")
