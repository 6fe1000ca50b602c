"""``saeguard boost``: a second SAE on what a first one leaves over of one domain's text, measured and described."""

import json
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from saeguard.cli.training import expand, progress_bars, steps_of

Elsewhere = Annotated[
    list[str] | None, typer.Option(help="Training text of other domains, on which it learns to be silent.")
]
Share = Annotated[float, typer.Option("--elsewhere-share", help="Tokens of it per token of the domain in training.")]
General = Annotated[list[str] | None, typer.Option(help="Other text to measure on: nothing should change.")]


def boost(
    base: Annotated[str, typer.Option(help="The SAE to boost: a shipped name, a folder, a file or hf://...")],
    corpus: Annotated[list[str], typer.Option(help="The domain's text (.txt, .jsonl, .jsonl.gz); repeatable.")],
    validation: Annotated[list[str], typer.Option(help="Held-out text of the domain, measured on only.")],
    out: Annotated[Path, typer.Option(help="Folder for activations, checkpoint and results.")],
    elsewhere: Elsewhere = None,
    share: Share = 0.5,
    general: General = None,
    domain: Annotated[str, typer.Option(help="The domain's name, by default that of --out.")] = "",
    model: Annotated[str, typer.Option(help="A demo model's name, or a local folder; by default the base's.")] = "",
    latents: Annotated[int, typer.Option(min=2, help="Number of latents of the boost.")] = 1024,
    k: Annotated[float, typer.Option(help="Latents of the boost active per token of the domain.")] = 128.0,
    tokens: Annotated[int | None, typer.Option(min=1, help="Training tokens, by default all there are.")] = None,
    epochs: Annotated[float, typer.Option(help="Passes over them, when --steps is not given.")] = 6.0,
    steps: Annotated[int | None, typer.Option(min=1, help="Optimiser steps.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Tokens per step.")] = 1024,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 5e-3,
    context: Annotated[int, typer.Option(min=8, help="Tokens per chunk, BOS included.")] = 256,
    validation_tokens: Annotated[int, typer.Option(min=1, help="Held-out tokens to measure on.")] = 60_000,
    ce_chunks: Annotated[int, typer.Option(min=1, help="Held-out chunks for cross-entropy.")] = 64,
    baselines: Annotated[bool, typer.Option("--baselines", help="Fit and measure the baselines too.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of the sample, the order and the first weights.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the checkpoint in --out.")] = False,
    compiled: Annotated[
        bool, typer.Option("--compile", help="torch.compile the blocks (needs a C++ compiler).")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the card as JSON and nothing else.")] = False,
) -> None:
    """Train an SAE on what another leaves over of a domain's text, to stand behind its latents.

    With --elsewhere it fires on the domain and hardly on other text, so that several boosts can be stacked.
    """
    from saeguard.loaders import load_sae
    from saeguard.models import load_model
    from saeguard.training.activations import Batches
    from saeguard.training.boost import check_subject
    from saeguard.training.boost_pipeline import Domain, boost_domain, collect_elsewhere
    from saeguard.training.pipeline import Subject, Texts, collect, read_texts
    from saeguard.training.trainer import TrainConfig

    texts = Texts(expand(corpus), expand(validation), n_tokens=tokens, n_held_out=validation_tokens,
                  n_ce_chunks=ce_chunks, context=context, seed=seed)  # fmt: skip
    told = Domain(domain or out.resolve().name, texts, expand(general or []), expand(elsewhere or []), share)
    command = "saeguard " + shlex.join(sys.argv[1:])
    with progress_bars(shown=not as_json) as progress:
        sae = load_sae(base)
        loaded = load_model(model or sae.model or "smollm2-135m-instruct")
        site = check_subject(sae, loaded.model)
        subject = Subject(Path(model or sae.model or "").name, loaded.model, loaded.tokenizer)
        chunks, held_out = read_texts(texts, subject.tokenizer)
        store = collect(subject, chunks, [site], out, compiled=compiled, progress=progress)
        others = collect_elsewhere(subject, sae, told, chunks.n_tokens, out, compiled=compiled, progress=progress)
        n_steps = steps or steps_of(epochs, Batches(store, site, batch=batch, seed=seed).steps_per_epoch)
        config = TrainConfig(d_sae=latents, k=k, steps=n_steps, batch=batch, lr=lr, seed=seed,
                             warmup=min(100, n_steps // 10))  # fmt: skip
        card = boost_domain(subject, sae, told, store, held_out, config, out, command=command, elsewhere=others,
                            baselines=baselines, resume=resume, progress=progress)  # fmt: skip
    typer.echo(json.dumps(card, indent=1, ensure_ascii=False) if as_json else summary(card, out))


def summary(card: dict, out: Path) -> str:
    """What the boost changed, in a few lines."""
    found = card["changes"]
    lines = [
        f"{card['name']}: {card['d_sae']} latents behind {card['base']['name']}; in {out}",
        f"  domain   explained variance {found['ev_before']:.4f} -> {found['ev_after']:.4f} "
        f"(unexplained falls by {found['unexplained_fell_by']:.1%}), cross-entropy gap {found['ce_gap_before']:.4f} -> "
        f"{found['ce_gap_after']:.4f} (falls by {found['ce_gap_fell_by']:.1%})",
    ]
    if "general_ev_change" in found:
        lines.append(
            f"  general  explained variance changes by {found['general_ev_change']:+.4f}, "
            f"cross-entropy gap by {found['general_ce_gap_change']:+.4f}"
        )
    for name, other in card["baselines"].items():
        on_general = f", general {other['general_ev_change']:+.4f}" if "general_ev_change" in other else ""
        lines.append(f"  {name}: explained variance -> {other['ev_after']:.4f}{on_general}")
    return "\n".join(lines)
