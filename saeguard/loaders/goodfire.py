"""Goodfire's single files: two linear layers and a ReLU.

Llama-3.1-8B-Instruct-SAE-l19.pth    encoder_linear.weight (d_sae, d_in)    encoder_linear.bias
                                     decoder_linear.weight (d_in, d_sae)    decoder_linear.bias

f = relu(x @ encoder.T + bias)    x_hat = f @ decoder.T + bias    resid_post of the layer in the file's name
"""

import re

from saeguard.loaders.source import Hints, Source
from saeguard.loaders.stored import Piece, Stored, check_specs, matrix
from saeguard.sites import Site

_KEYS = {"encoder_linear.weight", "encoder_linear.bias", "decoder_linear.weight", "decoder_linear.bias"}
_FILES = r".+\.(?:pth|pt|safetensors)"
_NAME = re.compile(r"(.+?)-SAE-l(\d{1,4})")


def recognises(source: Source) -> bool:
    """Whether the file, or the folder's only file of tensors, has an encoder_linear and a decoder_linear."""
    names = source.matching(_FILES)
    return len(names) == 1 and source.keys(names[0]) == _KEYS


def open(source: Source, hints: Hints) -> Stored:
    """Raises `BrokenFile`."""
    file = source.one(_FILES)
    archive = source.archive(file)
    d_sae, d_in = matrix(archive, "encoder_linear.weight")
    check_specs(archive, {"encoder_linear.weight": (d_sae, d_in), "encoder_linear.bias": (d_sae,),
                          "decoder_linear.weight": (d_in, d_sae), "decoder_linear.bias": (d_in,)})  # fmt: skip
    named = _NAME.match(file)
    return Stored(
        family="goodfire",
        name=file.rpartition(".")[0],
        pieces={
            "W_enc": Piece(archive, "encoder_linear.weight", axis=0, turned=True),
            "b_enc": Piece(archive, "encoder_linear.bias", axis=0),
            "W_dec": Piece(archive, "decoder_linear.weight", axis=1, turned=True),
            "b_dec": Piece(archive, "decoder_linear.bias"),
        },
        d_in=d_in, d_sae=d_sae, d_out=d_in, activation="relu",
        site=hints.site or (Site("resid_post", int(named[2])) if named else None),
        model=hints.model or (f"meta-llama/{named[1]}" if named and named[1].startswith("Llama") else None),
        manifest={"format": "goodfire", "architecture": "relu", "bos": True},
    )  # fmt: skip
