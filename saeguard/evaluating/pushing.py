"""A push on the stream that some latents cannot see: the hook of an attacker who is inside of the model.

    x_t' = x_t + |x_t| u        at every token t that is not special
    u W_enc[:, S] = 0           so that the pre-activations of the latents S stay as they were, to float32 rounding

That is exact for SAEs that neither norm their input nor rank. Hooks run in the order in which they are placed: a push
that is placed before a guardrail is what the guardrail reads and edits, one that is placed after it meets what is left.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from saeguard.axes import Stream
from saeguard.engines import engine_for
from saeguard.errors import ScoreMismatch
from saeguard.sae import SAE

AWAKE = 1e-4
"""An activation that counts as silence."""
LEAST = 1e-6
"""Of the largest one: what is left of an encoder row without those before it, so that it adds a direction."""


@dataclass(eq=False)
class Push:
    """The attacker's hook: ``u`` is what it adds, in multiples of each token's norm; None for nothing.

    While ``watches``, it notes how the guarded latents react.
    """

    engine: Any
    sae: SAE
    latents: tuple[int, ...]
    special: frozenset[int]
    u: Float[Tensor, " d_in"] | None = None
    watches: bool = False
    reactions: list[tuple[int, float, float, int]] = field(default_factory=list)
    """Per pass: tokens, sums of the guarded activations before and of their change, and tokens where one woke up."""
    _applies: Bool[Tensor, "batch pos"] | None = None

    def __post_init__(self):
        rows = self.sae.W_enc[:, list(self.latents)].float()
        basis, upper = torch.linalg.qr(rows)
        independent = upper.diagonal().abs() > LEAST * upper.abs().max()
        self._basis = basis[:, independent]
        if self._basis.shape[1] >= len(rows):
            raise ScoreMismatch(
                f"a push that {len(self.latents)} latents of {self.sae.name} cannot see",
                f"their encoder rows span all {len(rows)} directions of the stream", "Guard fewer latents.",
            )  # fmt: skip

    def allowed(self, u: Float[Tensor, " d_in"], budget: float) -> Float[Tensor, " d_in"]:
        """The nearest push that the guarded latents cannot see, cut to the budget."""
        basis = self._basis.to(u.device)
        u = u - basis @ (basis.T @ u)
        return u * min(1.0, budget / max(float(u.norm()), 1e-12))

    def read(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """In front of every pass: which tokens are pushed."""
        seen = self.engine.read_pass(args, kwargs)
        special = torch.tensor(sorted(self.special), device=seen.ids.device)
        real = torch.ones_like(seen.ids).bool() if seen.mask is None else seen.mask[:, seen.column :].bool()
        self._applies = real & ~torch.isin(seen.ids, special)

    def add(self, x: Stream) -> Stream:
        """The stream with the push; as it is where there is none."""
        if self.u is None or self._applies is None:
            return x
        norm = torch.linalg.vector_norm(x.detach().float(), dim=-1, keepdim=True)
        pushed = torch.where(self._applies[..., None], (x + norm * self.u).to(x.dtype), x)
        if self.watches:
            self._watch(x[self._applies].detach(), pushed[self._applies].detach())
        return pushed

    def _watch(self, x: Float[Tensor, "token d_in"], pushed: Float[Tensor, "token d_in"]) -> None:
        f, g = (self.sae.encode(one)[:, list(self.latents)] for one in (x, pushed))
        woken = ((g > 0) & (f <= AWAKE)).any(1)
        self.reactions.append((len(x), float(f.sum()), float((g - f).abs().sum()), int(woken.sum())))


@contextmanager
def pushing(model: nn.Module, tokenizer: Any, sae: SAE, latents: Sequence[int]) -> Iterator[Push]:
    """A push on ``model`` at the site that ``sae`` reads; nothing is pushed until its ``u`` is set.

    ``sae`` is whole, and ``latents`` are those that must not notice. No parameter has a gradient inside the block.
    Raises `SiteNotFound`, and `ScoreMismatch` for latents that leave no direction, or a site that no module carries.
    """
    engine = engine_for(model)
    place = engine.resolve(sae.site)  # type: ignore[arg-type]
    if place.base is not None or place.gain is not None:
        raise ScoreMismatch(
            f"an attack at {sae.site}", "that stream is computed and no module carries it", "Attack a resid_* site."
        )
    special = frozenset({*engine.special_ids(), *getattr(tokenizer, "all_special_ids", ())})
    push = Push(engine, sae.to(device=place.device), tuple(latents), special)
    grads = [(one, one.requires_grad) for one in model.parameters()]
    handles = [model.register_forward_pre_hook(push.read, with_kwargs=True), place.attach(push.add)]
    try:
        model.requires_grad_(False)
        yield push
    finally:
        for one, needed in grads:
            one.requires_grad_(needed)
        for handle in handles:
            handle.remove()
