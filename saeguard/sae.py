"""A sparse autoencoder: weights and the three things one does with them.

    pre = x @ W_enc + b_enc          b_enc has any pre-encoder bias folded in
    f   = act(pre)                   relu: max(pre, 0)   jumprelu: pre where pre > threshold   topk: the top_k largest
    x_hat = f @ W_dec + b_dec

Activations are in the units that the SAE's authors published, whatever was folded on the way in. The arithmetic is
float32 whatever the stored dtype: half-precision sums make latents near their threshold flicker.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from saeguard.errors import BrokenFile, LatentOutOfRange, NotSliceable
from saeguard.sites import Site

Activation = Literal["relu", "jumprelu", "topk"]


@dataclass(frozen=True, eq=False)
class SAE:
    """Weights of a sparse autoencoder, its site, and what its manifest says of its origin.

    ``threshold`` (jumprelu) and ``maximum`` (largest activation recorded on the training text, for ``unit="max"``)
    are per latent, in activation units. ``model`` names the model it was trained on; ``manifest`` holds whatever
    else its file records (``bos``, ``special_ids``, ``model_type``, ...). Raises `BrokenFile` when shapes disagree.
    """

    name: str
    W_enc: Float[Tensor, "d_in d_sae"]
    b_enc: Float[Tensor, " d_sae"]
    W_dec: Float[Tensor, "d_sae d_in"]
    b_dec: Float[Tensor, " d_in"]
    activation: Activation = "relu"
    threshold: Float[Tensor, " d_sae"] | None = None
    top_k: int | None = None
    maximum: Float[Tensor, " d_sae"] | None = None
    site: Site | None = None
    model: str | None = None
    manifest: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        self._check_activation()
        if self.W_enc.ndim != 2:
            raise BrokenFile(f"SAE {self.name}", f"W_enc is {tuple(self.W_enc.shape)}", "W_enc is (d_in, d_sae).")
        d_in, d_sae = self.W_enc.shape
        expected = {"b_enc": (d_sae,), "W_dec": (d_sae, d_in), "b_dec": (d_in,)}
        if self.activation == "jumprelu":
            expected["threshold"] = (d_sae,)
        if self.maximum is not None:
            expected["maximum"] = (d_sae,)
        for name, shape in expected.items():
            tensor = getattr(self, name)
            if tensor is None or tuple(tensor.shape) != shape:
                raise BrokenFile(
                    f"SAE {self.name} with W_enc {d_in} x {d_sae} and activation {self.activation}",
                    f"{name} is {None if tensor is None else tuple(tensor.shape)}, not {shape}",
                    "Check the orientation: W_enc is (d_in, d_sae), W_dec is (d_sae, d_in).",
                )
        if self.activation == "topk" and not 0 < (self.top_k or 0) <= d_sae:
            raise BrokenFile(f"SAE {self.name} with activation topk", f"top_k is {self.top_k}", f"Give 1..{d_sae}.")

    def _check_activation(self) -> None:
        wanted = {"relu": (False, False), "jumprelu": (True, False), "topk": (False, True)}.get(self.activation)
        found = (self.threshold is not None, self.top_k is not None)
        if found != wanted:
            raise BrokenFile(
                f"SAE {self.name} with activation {self.activation!r}",
                f"it comes {'with' if found[0] else 'without'} threshold and {'with' if found[1] else 'without'} top_k",
                "relu has neither, jumprelu has a threshold per latent, topk has top_k.",
            )

    @property
    def d_in(self) -> int:
        return self.W_enc.shape[0]

    @property
    def d_sae(self) -> int:
        return self.W_enc.shape[1]

    @property
    def ranks(self) -> bool:
        """Whether a latent's activation depends on the other latents, so that none can be computed alone."""
        return self.activation == "topk"

    def encode(self, x: Float[Tensor, "*tokens d_in"]) -> Float[Tensor, "*tokens d_sae"]:
        """Activations of all latents, in float32."""
        pre = x.float() @ self.W_enc.float() + self.b_enc.float()
        if self.activation == "topk":
            values, places = pre.topk(self.top_k or 1, dim=-1)
            return torch.zeros_like(pre).scatter(-1, places, values.relu())
        return _activate(pre, self.threshold)

    def encode_at(self, x: Float[Tensor, "*tokens d_in"], latents: Sequence[int]) -> Float[Tensor, "*tokens k"]:
        """Activations of some latents, without computing the others; equal to ``encode(x)[..., latents]``.

        Under TopK a latent can be silenced by latents outside ``latents``: raises `NotSliceable` rather than return
        a near miss. Raises `LatentOutOfRange`.
        """
        if self.ranks:
            raise NotSliceable(
                f"activations of {len(latents)} latents of {self.name} alone",
                "its TopK activation ranks each latent against all others",
                "Use encode(x)[..., latents].",
            )
        part = self.at(latents)
        return _activate(x.float() @ part.W_enc.float() + part.b_enc.float(), part.threshold)

    def decode(self, f: Float[Tensor, "*tokens d_sae"]) -> Float[Tensor, "*tokens d_in"]:
        """The reconstruction, in float32."""
        return f.float() @ self.W_dec.float() + self.b_dec.float()

    def at(self, latents: Sequence[int]) -> "SAE":
        """The SAE made of some latents only, in the order given: an SAE that ranks cannot be cut (`NotSliceable`)."""
        self.check_latents(latents)
        index = torch.as_tensor(list(latents), dtype=torch.long, device=self.W_enc.device)
        return replace(
            self,
            W_enc=self.W_enc[:, index],
            b_enc=self.b_enc[index],
            W_dec=self.W_dec[index],
            threshold=None if self.threshold is None else self.threshold[index],
            maximum=None if self.maximum is None else self.maximum[index],
        )

    def check_latents(self, latents: Sequence[int]) -> None:
        """Raise `LatentOutOfRange` unless every latent is one of this SAE's."""
        wrong = [latent for latent in latents if not 0 <= latent < self.d_sae]
        if wrong:
            raise LatentOutOfRange(
                f"latent {', '.join(map(str, wrong[:5]))} of {self.name}",
                f"this SAE has latents 0..{self.d_sae - 1}",
                "Negative indices are not accepted.",
            )

    def to(self, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "SAE":
        """A copy on another device or in another storage dtype."""
        names = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold", "maximum")
        tensors = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return replace(self, **{name: tensor.to(device=device, dtype=dtype) for name, tensor in tensors.items()})

    @cached_property
    def key(self) -> str:
        """Its identity among the SAEs of a plan: the same for two copies, different when any weight differs."""
        return f"{self.name} {self.fingerprint()}"

    def fingerprint(self) -> str:
        """SHA-256 of the weights and of what decides their meaning."""
        digest = hashlib.sha256(f"{self.activation} {self.top_k} {self.site} {self.model}".encode())
        for name in ("W_enc", "b_enc", "W_dec", "b_dec", "threshold"):
            if (tensor := getattr(self, name)) is not None:
                digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


def _activate(pre: Float[Tensor, "*tokens k"], threshold: Float[Tensor, " k"] | None) -> Float[Tensor, "*tokens k"]:
    return pre.relu() if threshold is None else torch.where(pre > threshold.float(), pre, 0.0)
