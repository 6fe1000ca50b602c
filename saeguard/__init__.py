"""Steer LLMs and make them unlearn at inference time, through the latents of sparse autoencoders.

Names are looked up when they are first used: ``saeguard --help`` should not wait for torch and transformers.
"""

import importlib
import typing

if typing.TYPE_CHECKING:
    from saeguard.boosted import Boosted, base_of, boosts_of
    from saeguard.capturing import Tape, capture
    from saeguard.dense import Misdirect, Project, Reweight, Splice
    from saeguard.engines.layouts import Layout
    from saeguard.engines.sitemaps import At, SiteMap
    from saeguard.errors import SaeguardError
    from saeguard.evaluating.self_check import self_check
    from saeguard.loaders import load_sae, open_sae
    from saeguard.loaders.live import load_saelens
    from saeguard.loaders.native import save_sae
    from saeguard.models import load_model
    from saeguard.ops import Ablate, Add, AtLeast, AtMost, Clamp, ClampAbove, Reduce, Scale
    from saeguard.plans import Plan, Rule
    from saeguard.reports import Report
    from saeguard.sae import SAE
    from saeguard.sites import Site
    from saeguard.steering import Run, steer
    from saeguard.triggers import AnyActive

__version__ = "0.1.0"

__all__ = [
    "SAE",
    "Ablate",
    "Add",
    "AnyActive",
    "At",
    "AtLeast",
    "AtMost",
    "Boosted",
    "Clamp",
    "ClampAbove",
    "Layout",
    "Misdirect",
    "Plan",
    "Project",
    "Reduce",
    "Report",
    "Reweight",
    "Rule",
    "Run",
    "SaeguardError",
    "Scale",
    "Site",
    "SiteMap",
    "Splice",
    "Tape",
    "base_of",
    "boosts_of",
    "capture",
    "load_model",
    "load_sae",
    "load_saelens",
    "open_sae",
    "save_sae",
    "self_check",
    "steer",
]

_HOMES = {
    "boosted": ("Boosted", "base_of", "boosts_of"),
    "capturing": ("Tape", "capture"),
    "dense": ("Misdirect", "Project", "Reweight", "Splice"),
    "engines.layouts": ("Layout",),
    "engines.sitemaps": ("At", "SiteMap"),
    "errors": ("SaeguardError",),
    "evaluating.self_check": ("self_check",),
    "loaders": ("load_sae", "open_sae"),
    "loaders.live": ("load_saelens",),
    "loaders.native": ("save_sae",),
    "models": ("load_model",),
    "ops": ("Ablate", "Add", "AtLeast", "AtMost", "Clamp", "ClampAbove", "Reduce", "Scale"),
    "plans": ("Plan", "Rule"),
    "reports": ("Report",),
    "sae": ("SAE",),
    "sites": ("Site",),
    "steering": ("Run", "steer"),
    "triggers": ("AnyActive",),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> typing.Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'saeguard' has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(f"saeguard.{_HOME_OF[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
