"""A sparse autoencoder: weights and the three things one does with them.

    pre = norm(x) @ W_enc + b_enc        b_enc has any pre-encoder bias folded in
    f   = act(pre)                       see `saeguard.activations`
    x_hat = scale * (f @ W_dec + b_dec) + shift + x @ skip       scale and shift undo the norm, see `saeguard.norms`

Activations are in the units that the SAE's authors published, whatever was folded on the way in. The arithmetic is
float32 whatever the stored dtype: half-precision sums make latents near their threshold flicker.
A transcoder is an SAE that reads one site and writes another: d_out may differ from d_in, and its norm is not undone.

A boosted SAE (see `saeguard.boosted`) has latents of other SAEs behind its own ``n_base``: boosts, which reconstruct
what the base leaves over. They are JumpReLU whatever the base's kind is, and the base's activations do not know them:

    f = [act(pre of the base's latents), jumprelu(pre of the boosts)]
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from saeguard.activations import KINDS, Activation, Pursuit, Ranking, elementwise, pursue
from saeguard.errors import BrokenFile, LatentOutOfRange, NotSliceable, UnsupportedFormat
from saeguard.norms import NORMS, Norm, Normed
from saeguard.sites import Site

_STRETCH = 256
TENSORS = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold", "maximum", "skip", "rank_by")


def _exactly(x: Tensor) -> torch.autocast:
    """float32 stays float32 under the caller's autocast."""
    return torch.autocast(x.device.type, enabled=False)


@dataclass(frozen=True, eq=False)
class SAE:
    """Weights of a sparse autoencoder, its site, and what its manifest says of its origin.

    ``threshold`` (jumprelu) and ``maximum`` (largest activation recorded on the training text, for ``unit="max"``)
    are per latent, in activation units. ``rank_by`` is what kinds that rank multiply pre-activations with before they
    compare them. ``site_out`` is where a transcoder writes, None for an SAE, which writes where it reads; ``skip`` is
    its linear path, from x as it is. Under ``pursuit`` the columns of W_enc are the atoms, and b_dec is taken off x
    first. ``model`` names the model it was trained on; ``manifest`` holds whatever else
    its file records (``bos``, ``special_ids``, ``dtype``, ``folds``, ...). Raises `BrokenFile` when shapes disagree.

    ``held`` is None, or the latents that were read of a dictionary of ``total``: the columns of W_dec, threshold and
    maximum are then these latents, in this order, and of W_enc and b_enc too, unless the kind ranks. Latents keep
    their numbers.

    ``n_base`` is None, or the number of latents of the base of a boosted SAE; those behind it are boosts: JumpReLU with
    a threshold, reading and writing what the base does. ``threshold`` and ``rank_by`` have an entry for every latent
    then; those are ignored that the kind of a latent has no use for.
    """

    name: str
    W_enc: Float[Tensor, "d_in d_sae"]
    b_enc: Float[Tensor, " d_sae"]
    W_dec: Float[Tensor, "held d_out"]
    b_dec: Float[Tensor, " d_out"]
    activation: Activation = "relu"
    threshold: Float[Tensor, " held"] | None = None
    top_k: int | None = None
    maximum: Float[Tensor, " held"] | None = None
    site: Site | None = None
    model: str | None = None
    manifest: Mapping[str, Any] = field(default_factory=dict)
    site_out: Site | None = None
    norm: Norm = "none"
    eps: float = 1e-5
    skip: Float[Tensor, "d_in d_out"] | None = None
    rank_by: Float[Tensor, " d_sae"] | None = None
    pursuit: Pursuit | None = None
    held: tuple[int, ...] | None = None
    total: int | None = None
    n_base: int | None = None

    def __post_init__(self):
        self._check_activation()
        if self.W_enc.ndim != 2 or self.W_dec.ndim != 2:
            raise BrokenFile(
                f"SAE {self.name}",
                f"W_enc is {tuple(self.W_enc.shape)}, W_dec {tuple(self.W_dec.shape)}",
                "W_enc is (d_in, d_sae), W_dec is (d_sae, d_out).",
            )
        (d_in, columns), d_out = self.W_enc.shape, self.W_dec.shape[1]
        held = columns if self.held is None else len(self.held)
        expected = {"b_enc": (columns,), "W_dec": (held, d_out), "b_dec": (d_out,), "threshold": (held,),
                    "maximum": (held,), "skip": (d_in, d_out), "rank_by": (columns,)}  # fmt: skip
        if self.held is not None and not self.ranks:
            expected["b_enc"] = (held,)
        if self.site_out is None and d_out != d_in:
            expected["W_dec"] = (held, d_in)
        for name, shape in expected.items():
            tensor = getattr(self, name)
            if tensor is not None and tuple(tensor.shape) != shape:
                raise BrokenFile(
                    f"SAE {self.name} with W_enc {d_in} x {columns} and activation {self.activation}",
                    f"{name} is {tuple(tensor.shape)}, not {shape}",
                    "Check the orientation: W_enc is (d_in, d_sae), W_dec is (d_sae, d_out).",
                )
        if not 0 < self._n_own <= self.d_sae and self.n_base is not None:
            raise BrokenFile(
                f"boosted SAE {self.name}", f"n_base is {self.n_base} of {self.d_sae} latents",
                "The base's latents come first; give their number.",
            )  # fmt: skip
        if self.top_k is not None and not 0 < self.top_k <= self._n_own:
            raise BrokenFile(
                f"SAE {self.name} with activation {self.activation}",
                f"top_k is {self.top_k}",
                f"Give 1..{self._n_own}.",
            )
        if self.pursuit is not None and self.is_transcoder:
            raise BrokenFile(
                f"SAE {self.name} with activation pursuit", f"it writes {self.site_out}",
                "Pursuit takes atoms out of what it reads, so it cannot be a transcoder.",
            )  # fmt: skip
        if self.activation == "groupmax" and self._n_own % (self.top_k or 1):
            raise BrokenFile(
                f"SAE {self.name} with activation groupmax", f"{self._n_own} latents in {self.top_k} groups",
                "The groups are of one size.",
            )  # fmt: skip

    def _check_activation(self) -> None:
        if self.activation not in KINDS or self.norm not in NORMS:
            raise BrokenFile(
                f"SAE {self.name} with activation {self.activation!r} and norm {self.norm!r}",
                "this version does not have both",
                f"Activations: {', '.join(KINDS)}; norms: {', '.join(NORMS)}.",
            )
        found = {name for name in ("threshold", "top_k", "pursuit") if getattr(self, name) is not None}
        needed = KINDS[self.activation].needs | ({"threshold"} if self.n_base is not None else set())
        if found != needed:
            raise BrokenFile(
                f"SAE {self.name} with activation {self.activation!r}{'' if self.n_base is None else ' and boosts'}",
                f"it comes with {' and '.join(sorted(found)) or 'no threshold, top_k or pursuit'}",
                f"It needs {' and '.join(sorted(needed)) or 'none of threshold, top_k and pursuit'}.",
            )

    @property
    def d_in(self) -> int:
        return self.W_enc.shape[0]

    @property
    def d_out(self) -> int:
        return self.W_dec.shape[1]

    @property
    def d_sae(self) -> int:
        return self.total if self.total is not None else self.W_enc.shape[1]

    @property
    def _n_own(self) -> int:
        """How many latents the kind is about: all but the boosts."""
        return self.d_sae if self.n_base is None else self.n_base

    @property
    def ranks(self) -> bool:
        """Whether a latent's activation depends on other latents, so that not every one can be computed alone."""
        return KINDS[self.activation].ranks

    @property
    def is_transcoder(self) -> bool:
        """Whether it writes another site than it reads."""
        return self.site_out is not None

    @property
    def is_vectors(self) -> bool:
        """Whether its latents are plain vectors without an encoder, which no x activates; see `loaders.vectors`."""
        return self.manifest.get("vectors") is True

    def read(self, x: Float[Tensor, "*tokens d_in"]) -> Normed:
        """x as the encoder reads it, in float32, with the scale and shift by which a reconstruction goes back."""
        normed = NORMS[self.norm](x.float(), self.eps)
        return Normed(normed.x) if self.is_transcoder else normed

    def encode(self, x: Float[Tensor, "*tokens d_in"]) -> Float[Tensor, "*tokens d_sae"]:
        """Activations of all latents, in float32. Raises `NotSliceable` when only some latents were read."""
        if self.held is not None:
            raise NotSliceable(
                f"activations of all {self.d_sae} latents of {self.name}",
                f"only {len(self.held)} of them were read",
                "Load it without latents=..., or use encode_at.",
            )
        with _exactly(x):
            return self.activate(self.read(x).x)

    def encode_at(self, x: Float[Tensor, "*tokens d_in"], latents: Sequence[int]) -> Float[Tensor, "*tokens k"]:
        """Activations of some latents; equal to ``encode(x)[..., latents]``.

        Elementwise kinds compute only these; kinds that rank look at all latents, a chunk at a time. Raises
        `LatentOutOfRange`.
        """
        part = self.narrow(latents)
        with _exactly(x):
            return part.activate(part.read(x).x)

    def activate(self, x: Float[Tensor, "*tokens d_in"]) -> Float[Tensor, "*tokens held"]:
        """Activations of the held latents from x as `read` gives it."""
        if self.n_base is not None:
            halves = [half for half, columns in self._halves if len(columns)] or [self._halves[0][0]]
            f = torch.cat([half.activate(x) for half in halves], dim=-1)
            return f if self._order is None else f[..., self._order]
        if self.activation == "pursuit" and self.pursuit is not None:
            return self._pursue(x, self.pursuit)
        if self.ranks:
            return self._ranking(self._pres(x), None if self.rank_by is None else self.rank_by.float())
        return elementwise(self.activation, x @ self.W_enc.float() + self.b_enc.float(), self.threshold)

    def decode(
        self, f: Float[Tensor, "*tokens held"], x: Float[Tensor, "*tokens d_in"] | None = None
    ) -> Float[Tensor, "*tokens d_out"]:
        """The reconstruction, in float32. A norm or a skip needs x too: raises `NotSliceable` without it."""
        if x is None and (self.norm != "none" or self.skip is not None):
            raise NotSliceable(
                f"decoding with {self.name}",
                f"it depends on x too (norm {self.norm}, {'a' if self.skip is not None else 'no'} skip)",
                "Give x as well: sae.decode(f, x).",
            )
        with _exactly(f):
            x_hat = self._sum(f.float())
            if x is None:
                return x_hat
            normed = self.read(x)
            x_hat = x_hat if normed.scale is None else x_hat * normed.scale
            x_hat = x_hat if normed.shift is None else x_hat + normed.shift
            return x_hat if self.skip is None else x_hat + x.float() @ self.skip.float()

    def _sum(self, f: Float[Tensor, "*tokens held"]) -> Float[Tensor, "*tokens d_out"]:
        """Boosts that do not fire leave the bits of the base's sum."""
        if self.n_base is None:
            return f @ self.W_dec.float() + self.b_dec.float()
        (base, mine), (boosts, others) = self._halves
        return base._sum(f[..., mine]) + f[..., others] @ boosts.W_dec.float()

    def narrow(self, latents: Sequence[int]) -> "SAE":
        """The same SAE holding only some latents, in the order given; they keep their numbers.

        What is held computes the same activations as before. Raises `LatentOutOfRange`.
        """
        self.check_latents(latents)
        place = None if self.held is None else {latent: i for i, latent in enumerate(self.held)}
        chosen = [latent if place is None else place[latent] for latent in latents]
        index = torch.as_tensor(chosen, dtype=torch.long, device=self.W_dec.device)
        cut: dict[str, Any] = {"W_dec": self.W_dec[index], "held": tuple(latents), "total": self.d_sae}
        for name in ("threshold", "maximum"):
            tensor = getattr(self, name)
            cut[name] = None if tensor is None else tensor[index]
        if not self.ranks:
            cut |= {"W_enc": self.W_enc[:, index], "b_enc": self.b_enc[index]}
        return replace(self, **cut)

    def check_latents(self, latents: Sequence[int]) -> None:
        """Raise `LatentOutOfRange` unless every latent is one of this SAE's, and was read."""
        self.check_range(self.name, self.d_sae, latents)
        unread = sorted(set(latents) - set(self.held)) if self.held is not None else []
        if unread:
            raise LatentOutOfRange(
                f"latent {', '.join(map(str, unread[:5]))} of {self.name}",
                f"{len(self.held or ())} of its {self.d_sae} latents were read, and this is not one of them",
                "Load it with these latents too, or without latents=...",
            )

    @staticmethod
    def check_range(name: str, d_sae: int, latents: Sequence[int]) -> None:
        """Raise `LatentOutOfRange` unless every latent is one of ``d_sae``."""
        wrong = [latent for latent in latents if not 0 <= latent < d_sae]
        if wrong:
            raise LatentOutOfRange(
                f"latent {', '.join(map(str, wrong[:5]))} of {name}",
                f"this SAE has latents 0..{d_sae - 1}",
                "Negative indices are not accepted.",
            )

    def shifted(self, offset: Float[Tensor, " d_in"]) -> "SAE":
        """The SAE for a stream that carries a constant ``offset`` more than the one it was trained on.

        Raises `UnsupportedFormat` where a per-token norm stands between the stream and the weights.
        """
        if self.norm != "none":
            raise UnsupportedFormat(
                f"SAE {self.name} with norm {self.norm} on a shifted stream",
                "the shift would have to be taken off before the norm of each token, and weights come behind it",
                "Take it off the stream: Add with special=True, or use the SAE on the model it was trained on.",
            )
        b_enc = self.b_enc.float() - offset.float() @ self.W_enc.float()
        b_dec = self.b_dec.float() if self.is_transcoder else self.b_dec.float() + offset.float()
        b_dec = b_dec if self.skip is None else b_dec - offset.float() @ self.skip.float()
        return replace(self, b_enc=b_enc, b_dec=b_dec)

    def to(self, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "SAE":
        """A copy on another device or in another storage dtype."""
        tensors = {name: getattr(self, name) for name in TENSORS if getattr(self, name) is not None}
        return replace(self, **{name: tensor.to(device=device, dtype=dtype) for name, tensor in tensors.items()})

    @cached_property
    def key(self) -> str:
        """Its identity among the SAEs of a plan: the same for two copies, whatever they are called, different when any
        weight differs."""
        return self.fingerprint()

    def fingerprint(self) -> str:
        """SHA-256 of the weights that are held and of what decides their meaning."""
        digest = hashlib.sha256(f"{self.activation} {self.top_k} {self.site} {self.model}".encode())
        rest = {name: getattr(self, name) for name in ("site_out", "pursuit", "held", "n_base")}
        rest["norm"] = None if self.norm == "none" else (self.norm, self.eps)
        for name, value in rest.items():
            if value is not None:
                digest.update(f"{name} {value}".encode())
        if processing := self.manifest.get("processing"):
            digest.update(f"processing {sorted(processing.items())}".encode())
        for name in TENSORS:
            if (tensor := getattr(self, name)) is not None:
                digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                for part in tensor.detach().split(_STRETCH):  # a copy of a whole encoder can be more than there is
                    digest.update(part.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        return digest.hexdigest()

    @cached_property
    def _order(self) -> Tensor | None:
        """Where each held latent is when the base's come first; None where they do."""
        order = torch.cat([columns for _, columns in self._halves]).argsort()
        return None if torch.equal(order.cpu(), torch.arange(len(order))) else order

    @cached_property
    def _halves(self) -> tuple[tuple["SAE", Tensor], tuple["SAE", Tensor]]:
        """A boosted SAE's base and its boosts, each an SAE of what is held, with its columns among all that are held.

        The base's arithmetic is its own, so its activations have the bits that they have without boosts.
        """
        n, held = self._n_own, range(self.d_sae) if self.held is None else self.held
        places = [i for i, latent in enumerate(held) if latent < n], [i for i, latent in enumerate(held) if latent >= n]
        rows: tuple[Any, Any] = (slice(n), slice(n, None)) if self.held is None else places
        columns = rows
        if self.ranks and self.held is not None:  # the encoder is whole
            columns = slice(n), [held[i] for i in places[1]]
        mine = None if self.held is None else tuple(held[i] for i in places[0])
        base = {"held": mine, "total": None if mine is None else n}
        if self.activation != "jumprelu":
            base["threshold"] = None
        if self.rank_by is not None:
            base["rank_by"] = self.rank_by[:n]
        boosts = {"activation": "jumprelu", "top_k": None, "pursuit": None, "rank_by": None, "skip": None,
                  "held": None, "total": None, "b_dec": torch.zeros_like(self.b_dec)}  # fmt: skip
        first, second = (
            (
                replace(self, **(self._part(row, column) | other)),
                torch.tensor(place, dtype=torch.long).to(self.W_dec.device),
            )
            for row, column, other, place in zip(rows, columns, (base, boosts), places, strict=True)
        )
        return first, second

    def _part(self, rows: Any, columns: Any) -> dict[str, Any]:
        W_enc = self.W_enc[:, columns]
        if not W_enc.T.is_contiguous():
            W_enc = W_enc.contiguous()  # the bits of a product can depend on how its factors lie in memory
        tensors = {name: getattr(self, name) for name in ("W_dec", "threshold", "maximum")}
        cut = {name: None if tensor is None else tensor[rows] for name, tensor in tensors.items()}
        return cut | {"W_enc": W_enc, "b_enc": self.b_enc[columns], "n_base": None}

    @cached_property
    def _ranking(self) -> Ranking:
        wanted = range(self.d_sae) if self.held is None else self.held
        return Ranking(self.activation, self.top_k or 1, self.d_sae, wanted, self.W_enc.device)

    def _pres(self, x: Float[Tensor, "*tokens d_in"]) -> Iterator[Tensor]:
        for low, high in self._ranking.chunks:
            yield x @ self.W_enc[:, low:high].float() + self.b_enc[low:high].float()

    def _pursue(self, x: Tensor, how: Pursuit) -> Float[Tensor, "*tokens held"]:
        latents, coefficients = pursue(x - self.b_dec.float(), self.W_enc, how)
        f = x.new_zeros(*x.shape[:-1], self.d_sae) if self.held is None else None
        if f is not None:
            return f.scatter_add(-1, latents, coefficients)
        wanted = torch.as_tensor(self.held, dtype=torch.long, device=x.device)
        return ((latents[..., None] == wanted) * coefficients[..., None]).sum(-2)
