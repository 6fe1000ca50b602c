"""A plan that only adds, as vectors for other programs: one per site, the sum of what its rules add at every token.

    v[site] = sum over rules, over latents of amount * W_dec[latent]

    control.gguf        llama.cpp, repeng, EasySteer      direction.N is resid_post.N, see `saeguard.loaders.vectors`
    v.safetensors       anybody                           a tensor for each site, called by it

Whatever makes a rule depend on x or on the token is refused, with the rule and the reason. That a rule leaves special
tokens alone is such a reason: a control vector does not. ``everywhere=True`` says that this is understood.
"""

import os
import struct
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor

from saeguard.editor import BoundRule, bind
from saeguard.errors import NotConstant, SiteNotFound, UnsupportedFormat
from saeguard.kernels.parts import lay_out
from saeguard.loaders.live import SAEs
from saeguard.naming import load_all
from saeguard.ops import Add
from saeguard.plans import Plan
from saeguard.sae import SAE
from saeguard.sites import Site
from saeguard.tokens import Where

Directions = Mapping[Site, Float[Tensor, " d"]]
_ALIGN, _MODE = 32, 0o644
_U32, _TEXT, _F32 = 4, 8, 0
"""GGUF's numbers for types."""


def constant_vectors(
    plan: Plan | Sequence[Plan | None],
    saes: SAEs = (),
    *,
    everywhere: bool = False,
) -> dict[Site, Float[Tensor, " d"]]:
    """What ``plan`` adds to each site at every token, in float32; rules find their SAEs as in `steer`.

    With ``everywhere`` rules that leave special tokens alone count as if they did not. Raises `NotConstant` where a
    rule does anything but add the same vector at every token, and what binding a plan raises.
    """
    if not isinstance(plan, Plan):
        raise NotConstant(
            f"vectors of {len(plan)} plans", "rows have plans of their own, and a vector is for all rows",
            "Export each plan by itself.",
        )  # fmt: skip
    loaded = load_all([plan], saes)
    found: dict[Site, Tensor] = {}
    bound = bind([plan], loaded, every_row=True)
    for one in bound:
        if why := _why_not(one, bound, loaded[one.rule.sae], everywhere):
            raise NotConstant(f"vectors of the rule {one.rule}", why[0], why[1])
        part = lay_out(loaded[one.rule.sae], [one.rule], [None])
        found[one.site] = found.get(one.site, 0.0) + part.shift.double() @ part.W_dec.double()
    return {site: vector.float() for site, vector in found.items()}


def export_vectors(directions: Directions, path: str | Path, *, model_type: str = "") -> Path:
    """Write vectors whole or not at all; the ending of ``path`` says how, .gguf or .safetensors.

    ``model_type`` is what a GGUF file says of its model ("llama"), which nothing checks. A folder that is not there is
    made. Raises `UnsupportedFormat` for another ending, and for anything but finite vectors, at one or more sites and
    of one width per stream; `SiteNotFound` for sites that a control vector cannot name.
    """
    target, writers = Path(path), {".gguf": _write_gguf, ".safetensors": _write_safetensors}
    if target.suffix not in writers:
        raise UnsupportedFormat(
            f"vectors in {target.name}", f"it ends in {target.suffix!r}", f"Endings: {' and '.join(writers)}."
        )
    plain = _plain(directions, target)
    if target.suffix == ".gguf":
        as_directions(plain)  # refused before a folder is made
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(target.name + ".partial")
    writers[target.suffix](plain, temporary, model_type)
    temporary.chmod(_MODE)  # safetensors writes files that only their owner can read
    os.replace(temporary, target)
    return target


def as_directions(directions: Directions) -> dict[int, Float[Tensor, " d"]]:
    """By N of ``direction.N``, ascending: what leaves block N, or enters block N + 1, which is the same stream.

    Raises `SiteNotFound` for other streams and for block 0, which llama.cpp has no direction for.
    """
    found: dict[int, Tensor] = {}
    for site, vector in directions.items():
        n = site.layer - (site.stream == "resid_pre")
        if site.stream not in ("resid_post", "resid_pre") or n < 1:
            raise SiteNotFound(
                f"{site} in a control vector", "its direction.N is resid_post.N, from N = 1 on",
                "Write .safetensors, which names any site, or steer at another one.",
            )  # fmt: skip
        found[n] = found[n] + vector if n in found else vector
    return dict(sorted(found.items()))


def _why_not(one: BoundRule, others: Iterable[BoundRule], sae: SAE, everywhere: bool) -> tuple[str, str] | None:
    """Why a rule is not one vector at every token, and what to do about it."""
    rule, keep = one.rule, "Export a plan without it."
    if not isinstance(rule.op, Add):
        return f"{type(rule.op).__name__} depends on x", "Use Add, as the others are no constant vectors."
    if rule.op.unit == "norm":
        return "its amount is a multiple of the norm of x", 'Use unit="activation" or "max".'
    if rule.gate is not None or rule.trigger is not None:
        return f"it has a {'gate' if rule.gate is not None else 'trigger'}", keep
    if sae.norm not in ("none", "center") and not sae.is_transcoder:
        return f"its SAE's {sae.norm} scales what is added by each token's norm", "Use an SAE without such a norm."
    if sae.manifest.get("processing", {}).get("fold_ln") and one.site.stream == "mlp_normed":
        return "what it adds there depends on the model's norm", keep
    for other in others:
        beside = other is not one and (other.site, other.rule.sae) == (one.site, rule.sae)
        if beside and (shared := set(rule.latents) & set(other.rule.latents)):
            return f"priorities decide on latents {sorted(shared)} between it and {other.rule}", "Keep one of them."
    if rule.where not in (Where(), Where(special=True)):
        return "it is about some tokens only", 'Use phase="all", and neither first, start nor stop.'
    if not rule.special and not everywhere:
        return (
            "it leaves special tokens alone, and a control vector is added at them too",
            "Write special=True in the rule, or say everywhere=True (--everywhere) if that is meant.",
        )
    return None


def _plain(directions: Directions, path: Path) -> dict[Site, Float[Tensor, " d"]]:
    """Copies in float32, of which safetensors wants that none share memory. Raises `UnsupportedFormat`."""
    what = f"vectors in {path.name}"
    if not directions:
        raise UnsupportedFormat(what, "there are none", "Give {Site('resid_post', 12): vector}.")
    if odd := [str(site) for site, given in directions.items() if not isinstance(given, Tensor) or given.ndim != 1]:
        raise UnsupportedFormat(
            what, f"those at {', '.join(odd)} are no tensors of one dimension", "Write one vector per site."
        )
    plain = {
        site: given.detach().to("cpu", torch.float32, copy=True).contiguous() for site, given in directions.items()
    }
    if broken := [str(site) for site, vector in plain.items() if not bool(torch.isfinite(vector).all())]:
        raise UnsupportedFormat(what, f"those at {', '.join(broken)} hold NaN or infinity", "Use smaller amounts.")
    widths: dict[str, set[int]] = {}
    for site, vector in plain.items():
        widths.setdefault("a control vector" if path.suffix == ".gguf" else site.stream, set()).add(len(vector))
    for stream, found in widths.items():
        if len(found) > 1 or 0 in found:
            text = " and ".join(map(str, sorted(found)))
            raise UnsupportedFormat(what, f"those of {stream} are {text} wide", "A stream of a model has one width.")
    return plain


def _write_safetensors(directions: Directions, path: Path, model_type: str) -> None:
    tensors = {str(site): vector for site, vector in directions.items()}
    save_file(tensors, path, metadata={"model_type": model_type} if model_type else None)


def _write_gguf(directions: Directions, path: Path, model_type: str) -> None:
    """Version 3: keys, where each tensor lies, and the numbers, each tensor at a multiple of 32 bytes."""
    by_layer = {f"direction.{n}": vector for n, vector in as_directions(directions).items()}
    keys = [
        _text("general.architecture") + struct.pack("<I", _TEXT) + _text("controlvector"),
        _text("controlvector.model_hint") + struct.pack("<I", _TEXT) + _text(model_type),
        _text("controlvector.layer_count") + struct.pack("<II", _U32, len(by_layer)),
    ]
    head = b"GGUF" + struct.pack("<IQQ", 3, len(by_layer), len(keys)) + b"".join(keys)
    data = b""
    for name, vector in by_layer.items():
        head += _text(name) + struct.pack("<IQIQ", 1, len(vector), _F32, len(data))
        data += _padded(vector.numpy().astype("<f4").tobytes())
    path.write_bytes(_padded(head) + data)


def _text(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def _padded(found: bytes) -> bytes:
    return found + bytes(-len(found) % _ALIGN)
