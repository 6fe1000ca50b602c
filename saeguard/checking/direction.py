"""Whether an edit reaches the logits with the right sign and the right size.

Some latents are moved by +a and -a at the last token, so little that the logits answer in proportion:

    (logit(+a) - logit(-a)) / 2  =  a * grad logit . W_dec[latent]      up to the third order in a

The gradient is taken where the next module reads the stream, and knows nothing of how saeguard edits. The token is, of
those that the latent promotes (`saeguard.scoring.logit_lens`), the one that the same push raises most when it is made
there by hand.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from saeguard.capturing import capture
from saeguard.checking.claims import Claim, Found, claim
from saeguard.checking.subject import Subject
from saeguard.errors import UnsupportedModel, WidthMismatch
from saeguard.ops import Add
from saeguard.plans import Plan, Rule
from saeguard.scoring.logit_lens import top_tokens

STEP, STEP_COARSE = 0.01, 0.1
"""Of |x|: how far a latent is pushed, in float32 and in dtypes too coarse to show so little."""
OFF, OFF_COARSE = 0.1, 0.5
"""What the measured change may be off the gradient's, as a share of it."""


def claims_of_direction(subject: Subject) -> tuple[Claim, ...]:
    """``direction``."""
    return (
        claim("direction", "+a raises a promoted token, -a lowers it, as far as the gradient says",
              lambda: _direction(subject)),
    )  # fmt: skip


@dataclass(frozen=True, eq=False)
class _Pushes:
    """Two rows per latent, by how much each is pushed, and how that moves the stream at the last token."""

    latents: tuple[int, ...]
    amounts: Tensor
    moves: Tensor


def _direction(subject: Subject) -> Found:
    if not subject.reader.carries:
        return None, f"no module carries {subject.pair.write} as it is", {}
    ids = subject.prompts[:1]
    pushes = _pushes(subject, ids)
    batch = ids.expand(len(pushes.amounts), -1)
    plain = subject.plain(ids)[0, -1]
    by_hand = _by_hand(subject, batch, pushes)
    tokens = _tokens(subject, pushes, (by_hand[::2] - by_hand[1::2]) / 2)
    slopes = _slopes(subject, ids, pushes, tokens)
    last = ids.shape[1] - 1
    plans = [
        Plan((Rule(subject.own.name, (latent,), Add(float(amount)), start=last, special=True),))
        for latent, amount in zip([n for n in pushes.latents for _ in "+-"], pushes.amounts.tolist(), strict=True)
    ]
    steered = subject.saw(plans, batch).logits[:, -1]
    up, down = (steered[first::2].gather(1, tokens[:, None])[:, 0] - plain[tokens] for first in (0, 1))
    off = ((up - down) / 2 - slopes).abs() / slopes.abs().clamp(min=1e-30)
    most = OFF if subject.exact else OFF_COARSE
    signs = int(((up > 0) & (down < 0) & (slopes > 0)).sum())
    n, worst = len(tokens), float(off.max())
    found = f"{signs} of {n} latents up and down; off the gradient by at most {worst:.2%} (limit {most:.0%})"
    return signs == n and worst <= most, found, {"signs": signs, "latents": n, "off": worst}


def _pushes(subject: Subject, ids: Tensor) -> _Pushes:
    sae, latents = subject.sae, subject.latents
    with capture(subject.model, list(dict.fromkeys(subject.pair)), layout=subject.layout) as tape:
        subject.run(ids)
    read, written = (tape[site][0, -1].float().to(sae.W_dec.device) for site in subject.pair)
    scale = sae.read(read).scale
    rows = sae.W_dec[list(latents)].float() * (1.0 if scale is None else scale)
    size = (STEP if subject.exact else STEP_COARSE) * written.norm() / rows.norm(dim=-1)
    amounts = torch.stack([size, -size], 1).flatten().cpu()
    return _Pushes(latents, amounts, amounts[:, None] * rows.cpu().repeat_interleave(2, dim=0))


def _by_hand(subject: Subject, batch: Tensor, pushes: _Pushes) -> Tensor:
    """Last logits of each row, pushed where the next module reads."""

    def push(x: Tensor) -> Tensor:
        moved = x.clone()
        moved[:, -1] += pushes.moves.to(x)
        return moved

    with subject.reader.through(push):
        return subject.run(batch)[:, -1]


def _tokens(subject: Subject, pushes: _Pushes, rise: Tensor) -> Tensor:
    """Per latent, the promoted token that rises most; of all tokens where none of those does, or none is known."""
    try:
        narrow = subject.sae.narrow(pushes.latents)
        promoted = top_tokens(subject.model, narrow)[list(pushes.latents)]
    except (UnsupportedModel, WidthMismatch):
        return rise.argmax(-1)
    rises = rise.gather(1, promoted)
    best = promoted.gather(1, rises.argmax(-1, keepdim=True))[:, 0]
    return torch.where(rises.max(-1).values > 0, best, rise.argmax(-1))


def _slopes(subject: Subject, ids: Tensor, pushes: _Pushes, tokens: Sequence[int] | Tensor) -> Tensor:
    """Per latent, what the gradient says of its token's logit under the push of positive sign."""
    leaves: list[Tensor] = []

    def leaf(x: Tensor) -> Tensor:
        leaves.append(x.detach().requires_grad_())
        return leaves[-1]

    place = next(subject.model.parameters()).device
    with torch.enable_grad(), subject.reader.through(leaf):
        output = subject.model(input_ids=ids.to(place), attention_mask=torch.ones_like(ids).to(place), use_cache=False)
    logits, found = output.logits[0, -1].float(), []
    for token, move in zip(torch.as_tensor(tokens).tolist(), pushes.moves[::2], strict=True):
        (gradient,) = torch.autograd.grad(logits[token], leaves[0], retain_graph=True)
        found.append(gradient[0, -1].float().cpu() @ move)
    return torch.stack(found)
