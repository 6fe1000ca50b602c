"""What is checked: a model, an SAE, a plan for it, and a few prompts of real text.

Two ways to compute one thing differ in the last bits of floating point. How far they may lie apart is not a guess: the
plain model is computed in the same two ways, and the steered one may be `SLACK` times as far apart.
"""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from saeguard.capturing import capture
from saeguard.checking.readers import Reader, reader_of
from saeguard.engines import engine_for
from saeguard.engines.base import Engine
from saeguard.engines.corrections import on_plain_weights
from saeguard.engines.layouts import Layout
from saeguard.errors import NotSliceable, SelfCheckFailed
from saeguard.evaluating.places import Pair, own_pair
from saeguard.evaluating.prose import token_rows
from saeguard.evaluating.self_check import special_ids_of
from saeguard.ops import Add, Clamp
from saeguard.plans import Plan, Rule
from saeguard.sae import SAE
from saeguard.steering import Run, steer

ROWS, LENGTH = 4, 16
"""Prompts, and tokens of each."""
SLACK = 8.0
FLOOR = 256.0
"""Times the dtype's epsilon and the largest logit: differences below it are rounding, whatever the plain model does."""
LATENTS = 4
"""How many of the SAE's latents are moved, by themselves or together."""
PUSH = 0.3
"""Of a typical |x|: how far the probe pushes."""
START = 3
"""The first position at which the probe's second rule edits."""
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


class Saw(NamedTuple):
    """Logits ``row column vocab`` in float32, and per rule and row the absolute positions that were edited."""

    logits: Tensor
    edits: tuple[tuple[tuple[int, ...], ...], ...]


@dataclass(frozen=True, eq=False)
class Subject:
    """Everything that the claims are computed from; ``sae`` is corrected for the model's plain weights.

    ``own`` is the SAE as it was given. ``probe`` adds ``amounts`` to the first two of ``latents``, to one at every
    ordinary token and to the other from position `START` on, and sets the third to ``level`` where it is active, all
    in activation units. ``state`` is what `state_of` gave before anything ran.
    """

    model: nn.Module
    tokenizer: Any
    engine: Engine
    layout: Layout | None
    own: SAE
    sae: SAE
    pair: Pair
    reader: Reader
    special: frozenset[int]
    prompts: Int[Tensor, "row column"]
    latents: tuple[int, ...]
    amounts: tuple[float, float]
    level: float
    probe: Plan
    stream_dtype: torch.dtype
    state: Any
    _plain: dict[tuple[Any, ...], Tensor] = field(default_factory=dict)

    @property
    def dtype(self) -> torch.dtype:
        """The model's."""
        return next(self.model.parameters()).dtype

    @property
    def exact(self) -> bool:
        """Whether the model's numbers are fine enough for edited sets to be the same however they are computed."""
        return torch.finfo(self.dtype).eps < 1e-6

    def steer(self, plans: Any, **options: Any) -> AbstractContextManager[Run]:
        """A block on the subject's model; SAEs that a plan names otherwise are loaded. The canary has its own claim."""
        return steer(self.model, plans, saes={self.own.name: self.own}, special_ids=self.special, layout=self.layout,
                     canary=False, **options)  # fmt: skip

    def real(self, ids: Tensor) -> Bool[Tensor, "row column"]:
        """Every column."""
        return torch.ones_like(ids, dtype=torch.bool)

    def run(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """The model's logits in one pass without a cache."""
        place = next(self.model.parameters()).device
        mask = self.real(ids) if mask is None else mask
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        call: Mapping[str, Any] = {"input_ids": ids, "attention_mask": mask.long(), "position_ids": positions}
        with torch.no_grad():
            output = self.model(**{name: value.to(place) for name, value in call.items()}, use_cache=False)
        return output.logits.detach().float().cpu()

    def plain(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """What `run` gives without any block, computed once."""
        mask = self.real(ids) if mask is None else mask
        key = (ids.shape, ids.numpy().tobytes(), mask.numpy().tobytes())
        if key not in self._plain:
            self._plain[key] = self.run(ids, mask)
        return self._plain[key]

    def generate(self, ids: Tensor, n: int, **options: Any) -> Any:
        """``generate`` for exactly ``n`` tokens, none of them special: no row ends, and none looks like padding."""
        model: Any = self.model
        ids = ids.to(next(self.model.parameters()).device)
        special = sorted(self.special)
        return model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=n, min_new_tokens=n,
            suppress_tokens=special or None, pad_token_id=min(special, default=0), **options,
        )  # fmt: skip

    def saw(self, plans: Any, ids: Tensor, mask: Tensor | None = None, **options: Any) -> Saw:
        """One pass under ``plans``, or plain; ``prompt_tokens`` is half of each row unless it is given."""
        mask = self.real(ids) if mask is None else mask
        if plans is None:
            return Saw(self.plain(ids, mask), ())
        options = {"prompt_tokens": (mask.sum(1) // 2).tolist()} | options
        with self.steer(plans, **options) as run:
            logits = self.run(ids, mask)
        return Saw(logits, edits_of(run))

    def limit(self, noise: float, logits: Tensor) -> float:
        """The largest distance that passes for rounding."""
        return max(SLACK * noise, FLOOR * torch.finfo(self.dtype).eps * float(logits.abs().max()))


def edits_of(run: Run) -> tuple[tuple[tuple[int, ...], ...], ...]:
    """``[rule][row]``: the positions edited in the run's last call."""
    return tuple(rule.edited_positions[-1] for rule in run.report.rules)


def of_row(edits: Sequence[Sequence[tuple[int, ...]]], row: int) -> tuple[tuple[int, ...], ...]:
    """``[rule]``: the positions that were edited in one row."""
    return tuple(rule[row] if rule else () for rule in edits)


def subject(
    model: nn.Module, sae: SAE, tokenizer: Any = None, *, ids: Any = None, layout: Layout | None = None
) -> Subject:
    """Bind everything, choose latents that fire on the prompts, and make the probe.

    Raises `BindError` where the SAE does not fit the model, and `SelfCheckFailed` for too little text.
    """
    state, engine = state_of(model), engine_for(model, layout)
    pair = own_pair(sae, engine)
    special = frozenset(special_ids_of(tokenizer, engine, sae))
    prompts = _prompts(sae, tokenizer, ids, special)
    plain = on_plain_weights(sae, engine)
    place = next(model.parameters()).device
    with torch.no_grad(), capture(model, [pair.read, pair.write], layout=layout) as tape:
        model(input_ids=prompts.to(place), attention_mask=torch.ones_like(prompts).to(place), use_cache=False)
    ordinary = ~torch.isin(prompts, torch.tensor(sorted(special), dtype=torch.long))
    read, written = (tape[site][ordinary].float().to(sae.W_enc.device) for site in pair)
    latents, amounts, level = _pick(plain, read, written)
    rules = (
        Rule(sae.name, latents[:1], Add(amounts[0])),
        Rule(sae.name, latents[1:2], Add(amounts[1]), start=START),
        Rule(sae.name, latents[2:3], Clamp(level, when="active")),
    )
    return Subject(model, tokenizer, engine, layout, sae, plain, pair, reader_of(model, engine, pair.write), special,
                   prompts, latents, amounts, level, Plan(rules, "probe"), tape[pair.write].dtype, state)  # fmt: skip


def state_of(model: nn.Module) -> Any:
    """What a block must leave as it was: hooks and modes of all modules, methods of the model, and the grad mode."""
    hooks = [
        (name, module.training, *(tuple(getattr(module, kind)) for kind in _HOOKS))
        for name, module in model.named_modules()
    ]
    methods = {name: id(method) for name in ("generate", "forward") if (method := vars(model).get(name)) is not None}
    return hooks, methods, torch.is_grad_enabled()


def _prompts(sae: SAE, tokenizer: Any, ids: Any, special: Iterable[int]) -> Int[Tensor, "row column"]:
    rows = token_rows(sae, tokenizer, None, ids, special)
    front = rows.ids[0, :1] if bool(rows.special[0, 0]) else rows.ids[0, :0]
    body, width = rows.ids[rows.real & ~rows.special], LENGTH - len(front)
    if len(body) < ROWS * width:
        raise SelfCheckFailed(
            f"a check of SAE {sae.name}",
            f"the text has {len(body)} ordinary tokens, and {ROWS * width} are needed",
            "Give a few hundred tokens of ordinary text.",
        )
    return torch.stack([torch.cat([front, body[row * width : (row + 1) * width]]) for row in range(ROWS)])


def _pick(sae: SAE, read: Tensor, written: Tensor) -> tuple[tuple[int, ...], tuple[float, float], float]:
    """Latents that fire on about a third of the tokens, or as near to it as there are, and what to do with three."""
    f = sae.encode(read)
    rates = (f > 0).float().mean(0)
    pushable = torch.linalg.vector_norm(sae.W_dec.float(), dim=-1) > 0
    latents = tuple(torch.where(pushable, (rates - 0.3).abs(), torch.inf).argsort()[:LATENTS].tolist())
    if len(latents) < LATENTS:
        raise NotSliceable(
            f"a check of SAE {sae.name}", f"it has {len(latents)} latents, and {LATENTS} are moved", "Use another SAE."
        )
    first, second, third = (push_of(sae, latent, read, written) for latent in latents[:3])
    active = f[:, latents[2]]
    level = 2 * float(active[active > 0].mean()) if bool((active > 0).any()) else third
    return latents, (first, second), level


def push_of(sae: SAE, latent: int, read: Tensor, written: Tensor) -> float:
    """The amount of a latent that moves the stream by `PUSH` of its typical norm."""
    scale = sae.read(read).scale
    unit = torch.linalg.vector_norm(sae.W_dec[latent].float()) * (1.0 if scale is None else float(scale.median()))
    return float(PUSH * torch.linalg.vector_norm(written, dim=-1).median() / unit)
