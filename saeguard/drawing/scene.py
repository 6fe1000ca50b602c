"""Run a batch twice, plain and steered, and keep what a drawing of it needs: texts, activations, edits.

    plain    = generate(batch)
    steered  = generate(batch) under one plan per row, with the stream recorded before and after the edits

What fired is read off the stream at the rule's own site, in activation units, with the SAE's own encoder.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from saeguard.capturing import Tape, capture
from saeguard.dense import Reweight
from saeguard.errors import UnsupportedModel
from saeguard.plans import Plan, Rule
from saeguard.reports import Report
from saeguard.sae import SAE
from saeguard.sites import Site
from saeguard.steering import Run, steer

Kind = Literal["frame", "prompt", "generated"]
SHOWN_LATENTS = 6
"""Per token and rule; the strongest are kept."""
SHOWN_WEIGHED = 12
"""Latents of a `Reweight` whose activations are shown."""


@dataclass(frozen=True)
class Fired:
    """One latent at one token: its activation in the stream before the edits, and in what they left."""

    latent: int
    before: float
    after: float


@dataclass(frozen=True)
class Token:
    """One token of a row. ``frame`` tokens are those of the chat template, system prompt included."""

    text: str
    kind: Kind
    fired: tuple[Fired, ...] = ()
    edited: bool = False

    @property
    def before(self) -> float:
        """The largest activation that the edits found here."""
        return max((latent.before for latent in self.fired), default=0.0)

    @property
    def after(self) -> float:
        """The largest activation that the edits left here."""
        return max((latent.after for latent in self.fired), default=0.0)


@dataclass(frozen=True)
class Line:
    """One row of the batch. ``rules`` says in words what its plan does and ``latents`` which ones it sets or watches.

    Both are empty for a row that has no plan.
    """

    title: str
    prompt: str
    rules: tuple[str, ...]
    latents: tuple[int, ...]
    plain: tuple[Token, ...]
    steered: tuple[Token, ...]

    @property
    def plain_text(self) -> str:
        return _generated(self.plain)

    @property
    def steered_text(self) -> str:
        return _generated(self.steered)

    @property
    def peak(self) -> float:
        """The largest activation in the prompt or the answers, at least a hair above 0.

        The template's tokens are left out: on role markers SAEs give huge numbers that mean nothing.
        """
        return max([self.peak_found, *(token.after for token in self._own())])

    @property
    def peak_found(self) -> float:
        """The same, of what was there before edits."""
        return max([1e-6, *(token.before for token in self._own())])

    def _own(self) -> list[Token]:
        return [token for token in self.plain + self.steered if token.kind != "frame"]


@dataclass(frozen=True)
class Proof:
    """One claim and what was compared to check it."""

    claim: str
    found: str
    holds: bool


@dataclass(frozen=True)
class Scene:
    """All that a drawing shows. ``proofs`` is empty unless somebody computed them."""

    title: str
    model: str
    lines: tuple[Line, ...]
    report: Report
    proofs: tuple[Proof, ...] = ()
    labels: Mapping[int, str] | None = None

    def to_json(self) -> str:
        """Texts, edits and checks, without the activations."""
        lines = [
            {
                "title": line.title,
                "prompt": line.prompt,
                "rules": line.rules,
                "plain": line.plain_text,
                "steered": line.steered_text,
                "tokens_edited": sum(token.edited for token in line.steered),
            }
            for line in self.lines
        ]
        document = {
            "title": self.title,
            "model": self.model,
            "rows": lines,
            "report": asdict(self.report),
            "checks": [asdict(proof) for proof in self.proofs],
        }
        return json.dumps(document, indent=2, ensure_ascii=False)


@dataclass(frozen=True, eq=False)
class Batch:
    """Prompts as the model reads them, padded on the left. ``own`` is true for tokens of the prompt itself."""

    prompts: tuple[str, ...]
    input_ids: Int[Tensor, "row column"]
    attention_mask: Int[Tensor, "row column"]
    own: Bool[Tensor, "row column"]

    @property
    def inputs(self) -> dict[str, Tensor]:
        """Arguments for ``generate``."""
        return {"input_ids": self.input_ids, "attention_mask": self.attention_mask}

    def alone(self, row: int) -> "Batch":
        """One row without its padding."""
        real = self.attention_mask[row].bool()
        picked = (tensor[row : row + 1, real] for tensor in (self.input_ids, self.attention_mask, self.own))
        return Batch((self.prompts[row],), *picked)


@dataclass(frozen=True, eq=False)
class Take:
    """One generate call: what came out, and the stream at the sites before and after any edits."""

    batch: Batch
    ids: Int[Tensor, "row column"]
    logits: tuple[Tensor, ...]
    """Per step, ``row vocab``."""
    before: Tape
    after: Tape
    run: Run
    stop_ids: tuple[int, ...]

    @property
    def ends(self) -> Int[Tensor, " row"]:
        """Per row, the column after its last token: generate fills rows that end early."""
        prompt = self.batch.input_ids.shape[1]
        stops = torch.tensor(self.stop_ids)
        over = (self.ids[:, prompt:, None] == stops).any(-1).cumsum(1) > 0
        return prompt + (~over).sum(1)


def encode(tokenizer: Any, prompts: Sequence[str], *, chat: bool = True) -> Batch:
    """Tokenise prompts for one batch, through the chat template or as they are. Raises `UnsupportedModel`."""
    texts = list(prompts)
    if chat and not getattr(tokenizer, "chat_template", None):
        raise UnsupportedModel(
            "prompts as turns of a conversation",
            "this tokenizer has no chat template",
            "Give the prompts as they are: chat=False, or --raw on the command line.",
        )
    if chat:
        turns = [[{"role": "user", "content": prompt}] for prompt in prompts]
        texts = [tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True) for turn in turns]
    found = tokenizer(
        texts, padding=True, padding_side="left", return_tensors="pt", return_offsets_mapping=True,
        add_special_tokens=not chat,
    )  # fmt: skip
    starts = [text.rfind(prompt) for text, prompt in zip(texts, prompts, strict=True)]
    ends = [start + len(prompt) for start, prompt in zip(starts, prompts, strict=True)]
    begin, end = found["offset_mapping"].unbind(-1)
    own = (begin >= torch.tensor(starts)[:, None]) & (end <= torch.tensor(ends)[:, None]) & (begin < end)
    return Batch(tuple(prompts), found["input_ids"], found["attention_mask"], own & found["attention_mask"].bool())


def sites_of(plans: Sequence[Plan | None], saes: Mapping[str, SAE]) -> tuple[Site, ...]:
    """Where the rules of ``plans`` read, each site once."""
    rules = [rule for plan in plans if plan is not None for rule in plan.rules]
    found = [rule.site or saes[rule.sae].site for rule in rules]
    return tuple(dict.fromkeys(site for site in found if site is not None))


def play(
    model: nn.Module,
    batch: Batch,
    plans: Plan | None | Sequence[Plan | None],
    *,
    tokenizer: Any,
    saes: Mapping[str, SAE],
    sites: Sequence[Site],
    max_new_tokens: int,
) -> Take:
    """Generate greedily under ``plans`` and record the stream at ``sites``; see `sites_of`."""
    with (
        steer(model, plans, saes=dict(saes), tokenizer=tokenizer) as run,
        capture(model, sites, side="before") as before,
        capture(model, sites, side="after") as after,
    ):
        output = model.generate(  # type: ignore[operator]  a transformers model
            **batch.inputs, max_new_tokens=max_new_tokens, do_sample=False, output_logits=True,
            return_dict_in_generate=True,
        )  # fmt: skip
    stops = {tokenizer.eos_token_id, tokenizer.pad_token_id} - {None}
    return Take(batch, output.sequences, output.logits, before, after, run, tuple(sorted(stops)))


def make_lines(
    plain: Take, steered: Take, plans: Sequence[Plan | None], saes: Mapping[str, SAE], tokenizer: Any,
    titles: Sequence[str] = (),
) -> tuple[Line, ...]:  # fmt: skip
    """Put the two runs of a batch side by side, row by row."""
    lines = []
    for row, plan in enumerate(plans):
        rules = plan.rules if plan is not None else ()
        lines.append(
            Line(
                title=titles[row] if titles else f"Row {row + 1}",
                prompt=plain.batch.prompts[row],
                rules=tuple(in_words(rule) for rule in rules),
                latents=tuple(dict.fromkeys(latent for rule in rules for latent in reads(rule))),
                plain=_tokens(plain, row, rules, saes, tokenizer),
                steered=_tokens(steered, row, rules, saes, tokenizer),
            )
        )
    return tuple(lines)


def in_words(rule: Rule) -> str:
    """The rule as its report names it, and where it acts."""
    parts = [str(rule)]
    if rule.phase != "all":
        parts.append(f"{rule.phase} tokens")
    if rule.trigger is not None:
        parts.append(f"where any of {list(rule.trigger.latents)} is above {rule.trigger.threshold:g}")
    return ", ".join(parts)


def reads(rule: Rule) -> tuple[int, ...]:
    """The latents that a rule sets, then those that its trigger watches; of a `Reweight` its heaviest."""
    latents, watched = rule.latents, rule.trigger.latents if rule.trigger else ()
    if isinstance(rule.op, Reweight) and isinstance(rule.op.weights, tuple):
        weight = dict(zip(latents, rule.op.weights, strict=True))
        latents = tuple(sorted(latents, key=lambda latent: -weight[latent]))
    return latents[:SHOWN_WEIGHED] + watched if rule.is_dense else latents + watched


def edited(report: Report, row: int, call: int = 0) -> frozenset[int]:
    """Absolute positions of a row that any rule edited in one call."""
    return frozenset(p for rule in report.rules for p in rule.edited_positions[call][row])


def _tokens(take: Take, row: int, rules: Sequence[Rule], saes: Mapping[str, SAE], tokenizer: Any) -> tuple[Token, ...]:
    prompt = take.batch.input_ids.shape[1]
    padding = int((take.batch.attention_mask[row] == 0).sum())
    positions = edited(take.run.report, row) if take.run.rules else frozenset()
    fired = [part for rule in rules for part in [_fired(take, row, rule, saes)] if part is not None]
    tokens = []
    for column in range(padding, int(take.ends[row])):
        own = column < prompt and bool(take.batch.own[row, column])
        kind: Kind = "generated" if column >= prompt else "prompt" if own else "frame"
        text = tokenizer.decode([int(take.ids[row, column])])
        here = tuple(latent for part in fired for latent in part.get(column, ()))
        tokens.append(Token(text, kind, here, column - padding in positions))
    return tuple(tokens)


def _fired(take: Take, row: int, rule: Rule, saes: Mapping[str, SAE]) -> dict[int, tuple[Fired, ...]] | None:
    """Per column, the strongest of the rule's latents, those that its trigger watches included."""
    sae = saes[rule.sae]
    site = rule.site or sae.site
    if site is None or site not in take.before.sites:
        return None
    latents = list(dict.fromkeys(reads(rule)))
    before, after = (_activations(sae, tape[site][row], latents) for tape in (take.before, take.after))
    found = {}
    for column, (old, new) in enumerate(zip(before.tolist(), after.tolist(), strict=True)):
        active = [Fired(i, a, b) for i, a, b in zip(latents, old, new, strict=True) if a > 0 or b > 0]
        active.sort(key=lambda latent: -max(latent.before, latent.after))
        found[column] = tuple(active[:SHOWN_LATENTS])
    return found


def _activations(sae: SAE, x: Tensor, latents: Sequence[int]) -> Tensor:
    if sae.ranks:
        return sae.encode(x)[..., list(latents)]
    return sae.encode_at(x, latents)


def _generated(tokens: Sequence[Token]) -> str:
    return "".join(token.text for token in tokens if token.kind == "generated").strip()
