"""Whether edits arrive: the site is the one that is meant, and what is read behind it is what the equations say.

    x' = x + scale(x) * (f' - f) @ W_dec      in float64, for every token that a rule is about
    x' = x, bit for bit                       for all others: special tokens, padding, rows without a plan

Both sides are read where the next module reads them, not where saeguard's hook says that it wrote them.
"""

import torch
from torch import Tensor

from saeguard.capturing import capture
from saeguard.checking.claims import Claim, Found, claim
from saeguard.checking.subject import START, Subject, edits_of

WIDE = 3
"""Columns of padding in front of some rows."""
RELATIVE = 1e-4
"""Of the largest change: what an edit in float32 may be off. An edit in bfloat16 is 40 times as far off."""
ULPS = 4.0


def claims_of_arrival(subject: Subject) -> tuple[Claim, ...]:
    """``site`` and ``edit``."""
    return (
        claim("site", "the stream that is read is the one that the next module reads", lambda: _site(subject)),
        claim("edit", "what the next module reads is x + (f' - f) W_dec, and x elsewhere", lambda: _edit(subject)),
    )


def _site(subject: Subject) -> Found:
    reader = subject.reader
    if not reader.independent:
        return None, f"no module reads {subject.pair.write} by itself; judged by the fit of the SAE alone", {}
    with capture(subject.model, subject.pair.write, layout=subject.layout) as tape, reader.seen() as passes:
        subject.run(subject.prompts)
    ours, theirs = tape[subject.pair.write], passes[-1].cpu()
    same = torch.equal(ours, theirs)
    off = float((ours.float() - theirs.float()).abs().max())
    return same, f"{ours.numel():,} numbers at {reader.path} {'equal' if same else f'differ by up to {off:.2g}'}", {}


def _edit(subject: Subject) -> Found:
    """On a batch in which every second row is padded on the left."""
    if not subject.reader.carries:
        return None, f"no module carries {subject.pair.write} as it is", {}
    ids, mask = padded(subject.prompts, WIDE)
    with capture(subject.model, subject.pair.read, layout=subject.layout) as tape, subject.reader.seen() as plain:
        subject.run(ids, mask)
    with subject.steer(subject.probe) as run, subject.reader.seen() as steered:
        subject.run(ids, mask)
    before, after = plain[-1].cpu(), steered[-1].cpu()
    dx, edited = expected(subject, tape[subject.pair.read], before, ids, mask)
    moved = (before != after).any(-1)
    stray, missed = int((moved & ~edited).sum()), int((edited & ~moved).sum())
    target = before.double() + dx
    off = ((after.double() - target).abs() - ULPS * torch.finfo(before.dtype).eps * target.abs())[edited]
    worst = float(off.max().clamp(min=0)) / max(float(dx.abs().max()), 1e-30) if len(off) else 0.0
    n = int(edited.sum())
    written = {(row, place) for rule in edits_of(run) for row, places in enumerate(rule) for place in places}
    logged = len(written) == n
    found = f"{n} tokens edited, largest error {worst:.1e} of the change (limit {RELATIVE}); "
    found += f"{stray} others moved, {missed} missed; the report {'says so' if logged else f'says {len(written)}'}"
    holds = n > 0 and worst <= RELATIVE and not stray and not missed and logged
    return holds, found, {"edited": n, "error": worst, "stray": stray, "missed": missed}


def padded(prompts: Tensor, wide: int) -> tuple[Tensor, Tensor]:
    """Every second row without its last ``wide`` tokens, and as much padding in front; the mask beside it."""
    ids, mask = prompts.clone(), torch.ones_like(prompts, dtype=torch.bool)
    ids[1::2, wide:] = prompts[1::2, :-wide]
    ids[1::2, :wide] = prompts[1::2, -1:]  # an ordinary token: padding is told by the mask alone
    mask[1::2, :wide] = False
    return ids, mask


def expected(subject: Subject, read: Tensor, before: Tensor, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """What the probe adds to ``before``, in float64, and at which tokens that changes it.

    All latents are encoded, and of the plan nothing but its three rules is known here.
    """
    sae, clamped = subject.sae, subject.latents[2]
    f = sae.encode(read.to(sae.W_enc.device)).double().cpu()
    special = torch.isin(ids, torch.tensor(sorted(subject.special), dtype=torch.long))
    about = mask & ~special
    late = about & ((mask.cumsum(1) - 1) >= START)
    active = about & (f[..., clamped] > 0)
    always, later = subject.amounts
    df = torch.stack([about * always, late * later, active * (subject.level - f[..., clamped])], -1).double()
    rows = sae.W_dec[list(subject.latents[:3])].double().cpu()
    scale = sae.read(read.to(sae.W_enc.device)).scale
    dx = df @ rows if scale is None else df @ rows * scale.double().cpu()
    return dx, (df != 0).any(-1) & ((before.double() + dx).to(before.dtype) != before).any(-1)
