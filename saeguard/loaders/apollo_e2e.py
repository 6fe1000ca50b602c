"""Apollo's end-to-end SAEs: one file for all hooks of a run, and decoder columns that are normalised when used.

    samples_400000.pt     for each hook, as blocks-6-hook_resid_pre, with its dots as hyphens:
                          {hook}.encoder.0.weight (d_sae, d_in) .bias   {hook}.decoder.weight (d_in, d_sae) .bias
    final_config.yaml     {"tlens_model_name", "tlens_model_path", ...}

    f = relu(x @ encoder.T + bias)       x_hat = f @ (decoder.T, each row of length 1) + bias

Of several hooks, ``site`` chooses one. They were trained on models as TransformerLens loads them by default, unless a
model of their own was named; see `transformer_lens`.
"""

from torch import Tensor

from saeguard.archives import Archive
from saeguard.errors import UnsupportedFormat
from saeguard.loaders import fields, transformer_lens
from saeguard.loaders.source import Hints, Source
from saeguard.loaders.stored import Piece, Stored, check_specs, matrix

CONFIG = "final_config.yaml"
_SAVED, _FILES = r"samples_(\d{1,12})\.pt", r".+\.(?:pth|pt|safetensors)"
_ENCODER, _DECODER = ".encoder.0.weight", ".decoder.weight"


def recognises(source: Source) -> bool:
    """Whether the file, or those of the folder that a run saved, has an encoder and a decoder under a hook's name."""
    names = source.matching(_SAVED) or source.matching(_FILES)
    saved = source.main is None and bool(source.matching(_SAVED))
    return (saved or len(names) == 1) and bool(_hooks(source.archive(names[0])))


def open(source: Source, hints: Hints) -> Stored:
    """Raises `BrokenFile`, `UnsupportedFormat`."""
    archive = source.archive(source.one(_SAVED if source.matching(_SAVED) else _FILES))
    hook = _choose(archive, hints)
    d_sae, d_in = matrix(archive, hook + _ENCODER)
    check_specs(archive, {
        f"{hook}{_ENCODER}": (d_sae, d_in), f"{hook}.encoder.0.bias": (d_sae,),
        f"{hook}{_DECODER}": (d_in, d_sae), f"{hook}.decoder.bias": (d_in,),
    })  # fmt: skip
    config = source.yaml(CONFIG) if source.has(CONFIG) else {}
    own = fields.text(source.file(CONFIG), config, "tlens_model_path") is not None
    named, unknown = transformer_lens.site_of(_name(hook), "")
    site = hints.site or named
    centers = hints.overrides.get("center_writing_weights", True)
    return Stored(
        family="apollo_e2e", name=f"{archive.path.stem}/{_name(hook)}", d_in=d_in, d_sae=d_sae, d_out=d_in,
        activation="relu",
        pieces={
            "W_enc": Piece(archive, f"{hook}{_ENCODER}", 0, turned=True),
            "b_enc": Piece(archive, f"{hook}.encoder.0.bias", 0),
            "W_dec": Piece(archive, f"{hook}{_DECODER}", 1, turned=True),
            "b_dec": Piece(archive, f"{hook}.decoder.bias"),
        },
        fold=_fold, norm=transformer_lens.norm(site, hints, processed=not own), site=site,
        model=hints.model
        or transformer_lens.hub_name(fields.text(source.file(CONFIG), config, "tlens_model_name")),
        manifest={"format": "apollo_e2e", "architecture": "relu", "bos": hints.overrides.get("prepend_bos"),
                  "folds": ["decoder normalised"]} | ({} if site else unknown)
        | ({} if own else transformer_lens.processing(site, centers=centers)),
    )  # fmt: skip


def _hooks(archive: Archive) -> list[str]:
    hooks = [name.removesuffix(_ENCODER) for name in archive.specs if name.endswith(_ENCODER)]
    return [hook for hook in hooks if hook + _DECODER in archive.specs]


def _name(hook: str) -> str:
    return hook.replace("-", ".")


def _choose(archive: Archive, hints: Hints) -> str:
    hooks = _hooks(archive)
    if len(hooks) == 1:
        return hooks[0]
    found = [hook for hook in hooks if hints.site and transformer_lens.site_of(_name(hook), "")[0] == hints.site]
    if len(found) != 1:
        raise UnsupportedFormat(
            f"SAE file {archive.path.name}" + (f" at {hints.site}" if hints.site else ""),
            f"it holds SAEs of {', '.join(map(_name, hooks[:20]))}", "Say which with site=....",
        )  # fmt: skip
    return found[0]


def _fold(raw: dict[str, Tensor]) -> dict[str, Tensor]:
    rows = raw["W_dec"].float()
    return raw | {"W_dec": rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-12)}
