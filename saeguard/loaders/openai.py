"""OpenAI's SAEs of GPT-2 small, and those of SDXL Turbo, whose authors built on the same code.

    gpt2-small/resid_post_mlp_v5_32k/autoencoders/8.pt
        pre_bias (d_in)  encoder.weight (d_sae, d_in)  latent_bias (d_sae)  decoder.weight (d_in, d_sae), or where it
        is tied decoder.linear.weight (d_sae, d_in); and beside the tensors activation "TopK" or "ReLU" or nothing,
        activation_state_dict {"k": 32, "postact_fn": "ReLU"}
    unet.mid_block.attentions.0_.../final/config.json + state_dict.pth
        {"n_dirs_local", "d_model", "k", ...}            {"state_dict": the same tensors}, no norm

    TopK (v5)     xn = (x - mean) / (std + 1e-5)    p = (xn - pre_bias) W + latent_bias    the k largest, ReLU on them
                  x_hat = std (f W_dec + pre_bias) + mean
    ReLU          the same without the norm: v1 and v4

    resid_delta_attn -> attn_out    resid_post_attn -> resid_mid    resid_delta_mlp -> mlp_out
    resid_post_mlp -> resid_post    mlp_post_act -> mlp_post        layer: the file's number

They were trained on the plain residual stream, so nothing is centred. pre_bias is folded into b_enc.
"""

import os
import re
from pathlib import Path
from reprlib import repr as short

from torch import Tensor

from saeguard.activations import Activation
from saeguard.archives import Archive
from saeguard.errors import UnsupportedFormat
from saeguard.loaders import fields
from saeguard.loaders.source import Hints, Source, broken
from saeguard.loaders.stored import Piece, Stored, check_specs, matrix
from saeguard.sites import Site

CONFIG, NESTED = "config.json", "state_dict."
_NUMBERED = r"(\d{1,4})\.pt"
_FILES = r".+\.(?:pth|pt|safetensors)"
_WEIGHTS = {"pre_bias", "latent_bias", "encoder.weight"}
_RECORDS = {"stats_last_nonzero", "latents_activation_frequency", "latents_mean_square"}
_STREAMS = {
    "resid_delta_attn": "attn_out", "resid_post_attn": "resid_mid", "resid_delta_mlp": "mlp_out",
    "resid_post_mlp": "resid_post", "mlp_post_act": "mlp_post",
}  # fmt: skip
_PLACE = re.compile(rf"(?:^|/)(({'|'.join(_STREAMS)})(?:_v\w+)?)(?:/autoencoders)?/(\d{{1,4}})\.pt$")


def recognises(source: Source) -> bool:
    """Whether there are a pre_bias, a latent_bias and an encoder, at the top of the file or in its state_dict."""
    if (file := _file(source)) is None:
        return False
    keys = source.keys(file)
    return any(keys >= {prefix + name for name in _WEIGHTS} for prefix in ("", NESTED))


def open(source: Source, hints: Hints) -> Stored:
    """Raises `BrokenFile`, `UnsupportedFormat`."""
    several = source.main is None and bool(source.matching(_NUMBERED))
    file = source.one(_NUMBERED, hints.site.layer if hints.site else None) if several else _file(source)
    assert file is not None
    archive = source.archive(file)
    prefix = "" if "encoder.weight" in archive.specs else NESTED
    d_in, d_sae, tied = _check(archive, prefix)
    activation, top_k = _from_config(source, hints, d_in, d_sae) if prefix else _from_file(archive)
    where = Path(os.path.abspath(archive.path)).as_posix()
    place = None if prefix else _PLACE.search(where)
    site = hints.site or (Site(_STREAMS[place[2]], int(place[3])) if place else None)
    name = f"gpt2-small/{place[1]}/{place[3]}" if place else "/".join(Path(where).parts[-3:-1] if prefix else [file])
    is_normed = not prefix and activation != "relu"
    why = "it is of an image model" if prefix else "the path has no location of OpenAI's with a layer's file in it"
    unknown = {} if site else {"site_unknown": why}
    return Stored(
        family="openai", name=name, d_in=d_in, d_sae=d_sae, d_out=d_in, activation=activation, top_k=top_k,
        pieces={
            "W_enc": Piece(archive, f"{prefix}encoder.weight", 0, turned=True),
            "b_enc": Piece(archive, f"{prefix}latent_bias", 0),
            "W_dec": Piece(archive, f"{prefix}decoder.linear.weight", 0) if tied
            else Piece(archive, f"{prefix}decoder.weight", 1, turned=True),
            "b_dec": Piece(archive, f"{prefix}pre_bias"),
        },
        fold=_fold, norm="layer_norm" if is_normed else "none", eps=1e-5, site=site,
        model=hints.model or ("gpt2" if place else None),
        manifest={"format": "sdxl_unbox" if prefix else "openai", "architecture": activation,
                  "bos": hints.overrides.get("prepend_bos"), "folds": ["pre_bias subtracted"]} | unknown,
    )  # fmt: skip


def _file(source: Source) -> str | None:
    """The file to look into: of numbered ones any."""
    if source.main is None and source.has("state_dict.pth"):
        return "state_dict.pth"
    names = source.matching(_FILES)
    numbered = source.matching(_NUMBERED)
    return names[0] if names and (len(names) == 1 or numbered == names) else None


def _check(archive: Archive, prefix: str) -> tuple[int, int, bool]:
    """d_in, d_sae and whether the decoder is the encoder."""
    d_sae, d_in = matrix(archive, f"{prefix}encoder.weight")
    names = {name.removeprefix(prefix) for name in archive.specs} - _RECORDS
    if names not in (_WEIGHTS | {"decoder.weight"}, _WEIGHTS | {"decoder.linear.weight"}):
        raise broken(archive.path, f"its tensors are {short(sorted(names))}")
    tied = "decoder.linear.weight" in names
    shapes = {"encoder.weight": (d_sae, d_in), "latent_bias": (d_sae,), "pre_bias": (d_in,)}
    shapes |= {"decoder.linear.weight": (d_sae, d_in)} if tied else {"decoder.weight": (d_in, d_sae)}
    check_specs(archive, {prefix + name: shape for name, shape in shapes.items()})
    return d_in, d_sae, tied


def _from_file(archive: Archive) -> tuple[Activation, int | None]:
    found, after = archive.values.get("activation", "ReLU"), archive.values.get("activation_state_dict.postact_fn")
    if found == "ReLU":
        return "relu", None
    kinds: dict[str, Activation] = {"ReLU": "topk", "Identity": "topk_norelu"}
    if found != "TopK" or not isinstance(after, str) or after not in kinds:
        raise UnsupportedFormat(
            f"SAE file {archive.path.name} with activation {short(found)} and {short(after)} after it",
            "this version does not compute that", "Use one with ReLU or TopK.",
        )  # fmt: skip
    top_k = fields.whole(archive.path, archive.values, "activation_state_dict.k", low=1)
    if top_k is None:
        raise broken(archive.path, "its activation is TopK, and there is no k")
    return kinds[after], top_k


def _from_config(source: Source, hints: Hints, d_in: int, d_sae: int) -> tuple[Activation, int]:
    config, path = source.json(CONFIG) if source.has(CONFIG) else {}, source.file(CONFIG)
    fields.widths(path, config, d_model=d_in, n_dirs_local=d_sae)
    top_k = fields.whole(path, config, "k", low=1) or hints.top_k
    if top_k is None:
        raise UnsupportedFormat(
            f"SAE folder {source.folder.name}", f"{CONFIG}, which has k, is not there", "Say top_k=...."
        )
    return "topk", top_k


def _fold(raw: dict[str, Tensor]) -> dict[str, Tensor]:
    return raw | {"b_enc": raw["b_enc"].float() - raw["b_dec"].float() @ raw["W_enc"].float()}
