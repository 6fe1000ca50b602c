"""Steer LLMs and make them unlearn at inference time, through the latents of sparse autoencoders."""

from saeguard.capturing import Tape, capture
from saeguard.engines.layouts import Layout
from saeguard.errors import SaeguardError
from saeguard.gates import AnyActive
from saeguard.loaders import load_sae
from saeguard.models import load_model
from saeguard.ops import Ablate, Add, AtLeast, AtMost, Clamp, Scale
from saeguard.plans import Plan, Rule
from saeguard.reports import Report
from saeguard.sae import SAE
from saeguard.sites import Site
from saeguard.steering import Run, steer

__version__ = "0.1.0"

__all__ = [
    "SAE",
    "Ablate",
    "Add",
    "AnyActive",
    "AtLeast",
    "AtMost",
    "Clamp",
    "Layout",
    "Plan",
    "Report",
    "Rule",
    "Run",
    "SaeguardError",
    "Scale",
    "Site",
    "Tape",
    "capture",
    "load_model",
    "load_sae",
    "steer",
]
