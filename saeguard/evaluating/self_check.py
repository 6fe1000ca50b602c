"""Whether an SAE belongs to a model, judged by what it does there: a few hundred tokens, one forward pass.

How well an SAE explains its stream says little by itself, as good ones range from an FVU of 0.1 to 0.7. What gives a
mistake away is that something else does better: another site of the same width, or the same weights read under
another convention; or that the error keeps what training would have removed (see `fits`).
"""

import inspect
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from saeguard.capturing import capture
from saeguard.engines import engine_for
from saeguard.engines.base import Engine
from saeguard.engines.corrections import on_plain_weights
from saeguard.engines.layouts import Layout
from saeguard.errors import NotSliceable, SelfCheckFailed
from saeguard.evaluating.fits import Streams, fit, gains_off, other_readings, row_cosine, weak_scale
from saeguard.evaluating.places import Pair, other_pairs, own_pair
from saeguard.evaluating.prose import Rows, token_rows
from saeguard.evaluating.verdict import FEWEST_TOKENS, LOUDER, SHRINKING, SelfCheck, reasons_against
from saeguard.sae import SAE
from saeguard.sites import Site


@torch.no_grad()
def self_check(
    model: nn.Module,
    sae: SAE,
    tokenizer: Any = None,
    *,
    text: Sequence[str] | None = None,
    ids: Any = None,
    layout: Layout | None = None,
) -> SelfCheck:
    """Measure ``sae`` at its site of ``model``, on the text that comes with saeguard, or ``text``, or token ``ids``.

    ``ids`` are taken as they are, ``text`` is cut into rows behind a BOS where the tokenizer has one. What speaks
    against the pair is in ``reasons``; `SelfCheck.require` raises it. Raises `SiteNotFound`, `WidthMismatch`,
    `NotSliceable` for an SAE read in part, `TokensUnknown`, `MissingBOS`, and `SelfCheckFailed` for too short a text.
    """
    if sae.held is not None:
        raise NotSliceable(
            f"a self-check of SAE {sae.name}",
            f"only {len(sae.held)} of its {sae.d_sae} latents were read, and reconstructing takes all of them",
            "Load it without latents=....",
        )
    engine = engine_for(model, layout)
    own = own_pair(sae, engine)
    rows = token_rows(sae, tokenizer, text, ids, special_ids_of(tokenizer, engine, sae))
    sae = on_plain_weights(sae, engine)
    others = other_pairs(own, sae, engine)
    x = read_sites(model, list(dict.fromkeys(site for pair in (own, *others) for site in pair)), rows, layout)
    streams = {pair: streams_at(x, pair, rows, sae.W_enc.device) for pair in (own, *others)}
    special = x[own.read][rows.special].float().to(sae.W_enc.device)
    check = _measured(sae, own, streams, special, next(iter(engine.model_names()), type(model).__name__))
    return replace(check, reasons=reasons_against(check))


def special_ids_of(tokenizer: Any, engine: Engine, sae: SAE) -> set[int]:
    """Ids that the tokenizer, the model or the SAE's manifest calls special."""
    named = set() if tokenizer is None else set(tokenizer.all_special_ids)
    return named | set(engine.special_ids()) | set(sae.manifest.get("special_ids", ()))


def read_sites(model: nn.Module, sites: Sequence[Site], rows: Rows, layout: Layout | None) -> dict[Site, Tensor]:
    """The streams at ``sites``, all from one pass over the rows."""
    place = next(model.parameters()).device
    short = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    with capture(model, sites, layout=layout) as tape:
        model(input_ids=rows.ids.to(place), attention_mask=rows.real.long().to(place), use_cache=False, **short)
    return {site: tape[site] for site in sites}


def streams_at(x: dict[Site, Tensor], pair: Pair, rows: Rows, device: torch.device) -> Streams:
    """The measured tokens of one pair."""
    read, write = (x[site][rows.measured].float().to(device) for site in pair)
    return Streams(read, write)


def _measured(sae: SAE, own: Pair, streams: dict[Pair, Streams], special: Tensor, model: str) -> SelfCheck:
    everywhere = torch.stack([there.typical() for there in streams.values()])
    at, paired = streams[own].at(everywhere[0]), everywhere.all(0)
    paired = paired if int(paired.sum()) >= FEWEST_TOKENS else everywhere[0]
    if len(at.x) < FEWEST_TOKENS:
        raise SelfCheckFailed(
            f"SAE {sae.name} at {own} of {model}",
            f"the text has {len(at.x)} tokens that are not special or massive, and {FEWEST_TOKENS} are needed",
            "Give a few hundred tokens of ordinary text.",
        )
    others = {str(pair): there.at(paired).some() for pair, there in streams.items() if pair != own}
    here, fires = fit(sae, at), sae.encode(at.x) != 0
    here_paired, base = fit(sae, streams[own].at(paired).some()), fit(sae, at.some())
    overshoot, undershoot = gains_off(sae, at)
    readings = {name: fit(other, at.some()) for name, other in other_readings(sae, at, here.l0)}
    return SelfCheck(
        sae=sae.name, model=model, place=str(own),
        d_in=sae.d_in, n_tokens=len(at.x), n_massive=len(streams[own].x) - len(at.x), n_special=len(special),
        fvu=here.fvu, l0=here.l0, l0_expected=_l0_expected(sae),
        l0_special=float((sae.encode(special) != 0).float().sum(-1).mean()) if len(special) else None,
        scale=here.scale, mean_share=here.mean_share, overshoot=overshoot, undershoot=undershoot,
        weak_scale=weak_scale(sae, at), shrinks=sae.activation in SHRINKING,
        row_cosine=row_cosine(sae, at), silent=float((~fires.any(0)).float().mean()),
        elsewhere={name: fit(sae, there).over(here_paired) for name, there in others.items()},
        readings={name: found.over(base) for name, found in readings.items()},
        louder=tuple(name for name, found in readings.items() if found.l0 > LOUDER * base.l0),
    )  # fmt: skip


def _l0_expected(sae: SAE) -> float | None:
    stated = sae.manifest.get("l0", sae.top_k)
    return float(stated) if isinstance(stated, int | float) and not isinstance(stated, bool) else None
