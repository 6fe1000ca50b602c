"""Run the demonstration from prompts to files: report.json, demo.html and demo.png."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from saeguard.demo.proofs import Case, hooks, prove
from saeguard.demo.rows import ROWS, DemoRow
from saeguard.drawing.page import write_page
from saeguard.drawing.picture import write_picture
from saeguard.drawing.scene import Scene, encode, make_lines, play, reads, sites_of
from saeguard.latents import LatentTable
from saeguard.loaders import load_sae
from saeguard.models import load_model
from saeguard.sae import SAE

MODEL = "smollm2-135m-instruct"
Tick = Callable[[str], None]


@dataclass(frozen=True)
class Result:
    """What a demonstration gave. ``seconds`` is wall time, imports left out."""

    scene: Scene
    files: tuple[Path, ...]
    seconds: float

    @property
    def holds(self) -> bool:
        """Whether every check held."""
        return all(proof.holds for proof in self.scene.proofs)


def run_demo(
    out: str | Path,
    *,
    rows: Sequence[DemoRow] = ROWS,
    model: nn.Module | None = None,
    tokenizer: Any = None,
    saes: Mapping[str, SAE] | None = None,
    labels: dict[int, str] | None = None,
    max_new_tokens: int = 40,
    chat: bool = True,
    picture: bool = True,
    tick: Tick = lambda step: None,
) -> Result:
    """Steer a batch of ``rows``, check every promise, and write the files to ``out``.

    ``model``, ``tokenizer`` and ``saes`` default to the demo model and the shipped SAEs that the plans name; ``tick``
    is told what is being done.
    """
    start = time.perf_counter()
    if model is None:
        tick(f"loading {MODEL} (the first time it is fetched and kept)")
        model, tokenizer = load_model(MODEL)
    if saes is None:
        tick("loading SAEs")
        names = dict.fromkeys(rule.sae for row in rows if row.plan for rule in row.plan.rules)
        saes = {name: load_sae(name) for name in names}
        labels = _labels(rows)
    scene = perform(model, tokenizer, saes, rows, max_new_tokens=max_new_tokens, chat=chat, tick=tick)
    scene = replace(scene, labels=labels)
    tick("drawing")
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    report = folder / "report.json"
    report.write_text(scene.to_json() + "\n", encoding="utf-8")
    files = [report, write_page(scene, folder / "demo.html")]
    if picture:
        files.append(write_picture(scene, folder / "demo.png"))
    return Result(scene, tuple(files), time.perf_counter() - start)


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
