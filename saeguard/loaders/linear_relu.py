"""Two linear layers and a ReLU without any config, as qresearch publishes them.

    DeepSeek-R1-Distill-Llama-8B-SAE-l19.pt    encoder.weight (d_sae, d_in) .bias  decoder.weight (d_in, d_sae) .bias

    f = relu(x @ encoder.T + bias)     x_hat = f @ decoder.T + bias     resid_post of the layer in the file's name

The same four tensors beside a config of dictionary_learning are its AutoEncoderNew, and that loader's.
"""

import re

from saeguard.loaders import dictionary_learning
from saeguard.loaders.source import Hints, Source
from saeguard.loaders.stored import Piece, Stored, check_specs, matrix
from saeguard.sites import Site

_KEYS = {"encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias"}
_FILES = r".+\.(?:pth|pt|safetensors)"
_NAME = re.compile(r"(.+?)-SAE-l(\d{1,4})\b")
_OWNERS = {"DeepSeek": "deepseek-ai", "Llama": "meta-llama"}


def recognises(source: Source) -> bool:
    """Whether the file, or the folder's only file of tensors, has these four and no other loader's config."""
    names = source.matching(_FILES)
    if len(names) != 1 or source.keys(names[0]) != _KEYS:
        return False
    is_matrix = len(source.archive(names[0]).specs["encoder.weight"].shape) < 3  # else a crosscoder, see refused.py
    return is_matrix and dictionary_learning.trainer(source) is None


def open(source: Source, hints: Hints) -> Stored:
    """Raises `BrokenFile`."""
    file = source.one(_FILES)
    archive = source.archive(file)
    d_sae, d_in = matrix(archive, "encoder.weight")
    check_specs(archive, {"encoder.weight": (d_sae, d_in), "encoder.bias": (d_sae,),
                          "decoder.weight": (d_in, d_sae), "decoder.bias": (d_in,)})  # fmt: skip
    named = _NAME.match(file)
    site = hints.site or (Site("resid_post", int(named[2])) if named else None)
    owner = _OWNERS.get(named[1].partition("-")[0]) if named else None
    return Stored(
        family="linear_relu",
        name=file.rpartition(".")[0],
        pieces={
            "W_enc": Piece(archive, "encoder.weight", axis=0, turned=True),
            "b_enc": Piece(archive, "encoder.bias", axis=0),
            "W_dec": Piece(archive, "decoder.weight", axis=1, turned=True),
            "b_dec": Piece(archive, "decoder.bias"),
        },
        d_in=d_in, d_sae=d_sae, d_out=d_in, activation="relu", site=site,
        model=hints.model or (f"{owner}/{named[1]}" if named and owner else None),
        manifest={"format": "linear_relu", "architecture": "relu", "bos": hints.overrides.get("prepend_bos"),
                  "folds": []} | ({} if site else {"site_unknown": "the file's name has no layer, as in -SAE-l19"}),
    )  # fmt: skip
