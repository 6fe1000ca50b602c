"""Llama Scope R1-Distill: the equations of `saeguard.loaders.lm_saes` over tensors named as linear layers are.

    L15R/config.json              as lm_saes
    L15R/sae_weights.safetensors  encoder.weight (d_sae, d_in)  encoder.bias  decoder.weight (d_in, d_sae)  decoder.bias
                                  log_jumprelu_threshold (d_sae)  [dataset_average_activation_norm.<hook point>]

The threshold is in units of the normed input, which its published release gives where the file does not.
"""

import re

from saeguard.loaders import lm_saes, openmoss
from saeguard.loaders.source import Hints, Source
from saeguard.loaders.stored import Stored
from saeguard.sites import Site

_LAYOUT = lm_saes.Layout(
    "llama_scope_r1",
    {"W_enc": "encoder.weight", "b_enc": "encoder.bias", "W_dec": "decoder.weight", "b_dec": "decoder.bias"},
    turned=True,
)
_NAMED = re.compile(r"L(\d{1,3})R")
_TRAINED = re.compile(r".*Slimpajama.*OpenR1-Math.*")


def recognises(source: Source) -> bool:
    """Whether the weights have a linear encoder, and the folder is one of OpenMOSS's."""
    if not lm_saes.is_folder(source):
        return False
    file = openmoss.weights(source) or ""
    return not file.endswith(".dcp") and f"{openmoss.prefix(file)}encoder.weight" in source.keys(file)


def open(source: Source, hints: Hints) -> Stored:
    """Raises `BrokenFile`, `UnsupportedFormat`, `MissingSite`, `MissingScale`."""
    folder = source.folder.absolute()
    named, published = _NAMED.fullmatch(folder.name), _TRAINED.fullmatch(folder.parent.name)
    return lm_saes.stored(
        source, hints, _LAYOUT, bos=True, name=f"{folder.parent.name}/{folder.name}" if published else folder.name,
        site=Site("resid_post", int(named[1])) if named else None,
        model="deepseek-ai/DeepSeek-R1-Distill-Llama-8B" if published else None,
    )  # fmt: skip
