"""ITDA: a dictionary of activations that were seen, and matching pursuit in place of an encoder.

    metadata.yaml      {"layer", "lm_name", "k" (40 where it is missing), "activation_dim", "submodule_name", ...}
    atoms.pt           a tensor (d_sae, d_in)
    atom_indices.pt    (d_sae, 2): sequence and position that an atom was taken from; not read

    k rounds: the atom with the largest |<rest, atom>| is taken out of the rest with that product, which is added to
    its coefficient                            x_hat = f @ atoms, no biases                resid_post of the layer

Atoms are made unit vectors first, as the authors' evaluations do, and coefficients are in units of these.
"""

import torch
from torch import Tensor

from saeguard.activations import Pursuit
from saeguard.archives import Archive
from saeguard.loaders import fields, transformer_lens
from saeguard.loaders.source import Hints, Source, broken
from saeguard.loaders.stored import Piece, Stored, check_specs

FILE, CONFIG = "atoms.pt", "metadata.yaml"
_ROUNDS = 40


def recognises(source: Source) -> bool:
    """Whether there are atoms and metadata."""
    return source.main in (None, FILE) and source.has(FILE, CONFIG)


def open(source: Source, hints: Hints) -> Stored:
    """Raises `BrokenFile`."""
    archive, config, path = source.archive(FILE), source.yaml(CONFIG), source.file(CONFIG)
    name, d_sae, d_in = _atoms(archive)
    fields.widths(path, config, activation_dim=d_in)
    rounds = fields.whole(path, config, "k", low=1)
    rounds = _ROUNDS if rounds is None else rounds
    if rounds > d_sae:
        raise broken(path, f"k is {rounds}, and there are {d_sae} atoms")
    layer, submodule = fields.whole(path, config, "layer", high=10**9), fields.text(path, config, "submodule_name")
    where = f"resid_post.{layer}" if submodule is None and layer is not None else submodule
    named, unknown = transformer_lens.site_of(where, f"{CONFIG} has no layer")
    site = hints.site or named
    return Stored(
        family="itda", name=source.folder.name, pieces={"atoms": Piece(archive, name, 0)},
        d_in=d_in, d_sae=d_sae, d_out=d_in, activation="pursuit", fold=_fold, pursuit=Pursuit(rounds, signed=True),
        norm=transformer_lens.norm(site, hints, processed=False), site=site,
        model=hints.model or fields.text(path, config, "lm_name"),
        manifest={
            "format": "itda", "architecture": "itda", "bos": hints.overrides.get("prepend_bos"),
            "folds": ["atoms normalised"], "context": fields.whole(path, config, "seq_len"),
            "dataset": fields.text(path, config, "dataset"),
        } | ({} if site else unknown),
    )  # fmt: skip


def _atoms(archive: Archive) -> tuple[str, int, int]:
    """Name and shape of the only tensor."""
    if len(archive.specs) != 1 or len((spec := next(iter(archive.specs.values()))).shape) != 2 or not all(spec.shape):
        raise broken(archive.path, "it is not one matrix of atoms")
    name = next(iter(archive.specs))
    check_specs(archive, {name: spec.shape})
    return name, spec.shape[0], spec.shape[1]


def _fold(raw: dict[str, Tensor]) -> dict[str, Tensor]:
    atoms = raw["atoms"].float()
    atoms = atoms / atoms.norm(dim=1, keepdim=True).clamp_min(1e-9)
    d_sae, d_in = atoms.shape
    return {"W_enc": atoms.T, "b_enc": torch.zeros(d_sae), "W_dec": atoms, "b_dec": torch.zeros(d_in)}
