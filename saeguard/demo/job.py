"""Run the demonstration from prompts to files: report.json, demo.html and demo.png."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from saeguard.demo.guarded import GuardScene, run_guarded
from saeguard.demo.proofs import Case, hooks, prove
from saeguard.demo.rows import ROWS, DemoRow
from saeguard.drawing.page import write_page
from saeguard.drawing.picture import write_picture
from saeguard.drawing.scene import Scene, encode, make_lines, play, reads, sites_of
from saeguard.guarding.policy import Policy
from saeguard.guarding.shipped import load_policy
from saeguard.latents import LatentTable
from saeguard.loaders import load_sae
from saeguard.models import load_model
from saeguard.sae import SAE

MODEL = "smollm2-135m-instruct"
POLICIES = ("biology", "biology-edits")
"""One that refuses, and one that edits."""
Tick = Callable[[str], None]


@dataclass(frozen=True)
class Result:
    """What a demonstration gave. ``seconds`` is wall time, imports left out; ``guard`` is None without a policy."""

    scene: Scene
    guard: GuardScene | None
    files: tuple[Path, ...]
    seconds: float

    @property
    def holds(self) -> bool:
        """Whether every check held."""
        guard = self.guard.proofs if self.guard is not None else ()
        return all(proof.holds for proof in (*self.scene.proofs, *guard))

    def to_json(self) -> str:
        """Everything but the activations."""
        guard = None if self.guard is None else self.guard.to_dict()
        return json.dumps(json.loads(self.scene.to_json()) | {"guardrail": guard}, indent=2, ensure_ascii=False)


def run_demo(
    out: str | Path,
    *,
    rows: Sequence[DemoRow] = ROWS,
    model: nn.Module | None = None,
    tokenizer: Any = None,
    saes: Mapping[str, SAE] | None = None,
    labels: dict[int, str] | None = None,
    policies: Mapping[str, Policy] | None = None,
    max_new_tokens: int = 40,
    chat: bool = True,
    picture: bool = True,
    tick: Tick = lambda step: None,
) -> Result:
    """Steer a batch of ``rows``, ask questions under ``policies``, check every promise, write the files to ``out``.

    ``model``, ``tokenizer``, ``saes`` and ``policies`` default to the demo model, the shipped SAEs that the plans
    name and the shipped policies; ``tick`` is told what is being done.
    """
    start = time.perf_counter()
    if model is None:
        tick(f"loading {MODEL} (the first time it is fetched and kept)")
        model, tokenizer = load_model(MODEL)
        policies = policies or {name: load_policy(name) for name in POLICIES}
    if saes is None:
        tick("loading SAEs")
        names = dict.fromkeys(rule.sae for row in rows if row.plan for rule in row.plan.rules)
        saes = {name: load_sae(name) for name in names}
        labels = _labels(rows)
    scene = perform(model, tokenizer, saes, rows, max_new_tokens=max_new_tokens, chat=chat, tick=tick)
    guard = None
    if policies:
        pins = {pin.name: pin.source for policy in policies.values() for pin in policy.saes}
        pinned = [saes[name] if name in saes else load_sae(source) for name, source in pins.items()]
        guard = run_guarded(model, tokenizer, policies, pinned, max_new_tokens=max_new_tokens, chat=chat, tick=tick)
    tick("drawing")
    made = Result(replace(scene, labels=labels), guard, (), 0.0)
    files = _written(made, Path(out), picture=picture)
    return replace(made, files=files, seconds=time.perf_counter() - start)


def _written(result: Result, folder: Path, *, picture: bool) -> tuple[Path, ...]:
    folder.mkdir(parents=True, exist_ok=True)
    report = folder / "report.json"
    report.write_text(result.to_json() + "\n", encoding="utf-8")
    files = [report, write_page(result.scene, folder / "demo.html")]
    if picture:
        files.append(write_picture(result.scene, folder / "demo.png"))
    return tuple(files)


def perform(
    model: nn.Module, tokenizer: Any, saes: Mapping[str, SAE], rows: Sequence[DemoRow], *,
    max_new_tokens: int, chat: bool, tick: Tick,
) -> Scene:  # fmt: skip
    """Run the batch plain and steered, check it, and put it together."""
    hooks_before = hooks(model)
    plans = tuple(row.plan for row in rows)
    batch = encode(tokenizer, [row.prompt for row in rows], chat=chat)
    tick(f"{len(rows)} rows, {max_new_tokens} tokens each, plain")
    options: dict[str, Any] = {
        "tokenizer": tokenizer, "saes": saes, "sites": sites_of(plans, saes), "max_new_tokens": max_new_tokens,
    }  # fmt: skip
    plain = play(model, batch, None, **options)
    tick("the same batch, one plan per row")
    steered = play(model, batch, plans, **options)
    case = Case(model, tokenizer, plans, saes, plain, steered, hooks_before)
    proofs = prove(case, tick=lambda claim: tick(f"checking: {claim}"))
    lines = make_lines(plain, steered, plans, saes, tokenizer, [row.title for row in rows])
    name = Path(getattr(getattr(model, "config", None), "name_or_path", "") or type(model).__name__).name
    return Scene("One batch, a plan per row", name, lines, steered.run.report, proofs)


def _labels(rows: Sequence[DemoRow]) -> dict[int, str]:
    """A name for every latent that the rows use; latents of different SAEs with one number get the first one's."""
    labels: dict[int, str] = {}
    for rule in (rule for row in rows if row.plan for rule in row.plan.rules):
        table = LatentTable.load(rule.sae)
        for latent in reads(rule):
            labels.setdefault(latent, table.row(latent).label)
    return labels
