"""Files of the package mistral_sae: a TopK SAE behind a layer norm, whose k is in no file.

    {name}.pt     w_enc (d_in, d_sae)  b_enc  w_dec (d_sae, d_in)  b_pre (d_in)  [stats_last_nonzero]

    xn = (x - mean) / (std + 1e-5)       f = relu of the k largest of (xn - b_pre) @ w_enc + b_enc
    x_hat = std (f @ w_dec + b_pre) + mean

b_pre is folded into b_enc.
"""

from torch import Tensor

from saeguard.errors import UnsupportedFormat
from saeguard.loaders.source import Hints, Source
from saeguard.loaders.stored import Piece, Stored, check_specs, matrix

_KEYS = {"w_enc", "b_enc", "w_dec", "b_pre"}
_FILES = r".+\.(?:pth|pt|safetensors)"


def recognises(source: Source) -> bool:
    """Whether the file, or the folder's only file of tensors, has these four."""
    names = source.matching(_FILES)
    return len(names) == 1 and source.keys(names[0]) - {"stats_last_nonzero"} == _KEYS


def open(source: Source, hints: Hints) -> Stored:
    """Raises `BrokenFile`, `UnsupportedFormat`."""
    file = source.one(_FILES)
    archive = source.archive(file)
    d_in, d_sae = matrix(archive, "w_enc")
    check_specs(archive, {"w_enc": (d_in, d_sae), "b_enc": (d_sae,), "w_dec": (d_sae, d_in), "b_pre": (d_in,)})
    if hints.top_k is None:
        raise UnsupportedFormat(
            f"SAE file {file} of mistral_sae", "how many latents are active at a token is not in it",
            "Say so: load_sae(..., top_k=128) is what the package takes by itself.",
        )  # fmt: skip
    return Stored(
        family="mistral_sae", name=file.rpartition(".")[0], d_in=d_in, d_sae=d_sae, d_out=d_in,
        activation="topk", top_k=hints.top_k,
        pieces={"W_enc": Piece(archive, "w_enc", 1), "b_enc": Piece(archive, "b_enc", 0),
                "W_dec": Piece(archive, "w_dec", 0), "b_dec": Piece(archive, "b_pre")},
        fold=_fold, norm="layer_norm", eps=1e-5, site=hints.site, model=hints.model,
        manifest={"format": "mistral_sae", "architecture": "topk", "bos": hints.overrides.get("prepend_bos"),
                  "folds": ["b_pre subtracted"]} | ({} if hints.site else {"site_unknown": "its file names no site"}),
    )  # fmt: skip


def _fold(raw: dict[str, Tensor]) -> dict[str, Tensor]:
    return raw | {"b_enc": raw["b_enc"].float() - raw["b_dec"].float() @ raw["W_enc"].float()}
