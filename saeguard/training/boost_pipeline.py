"""From a base, a model and the text files of a domain to a boost in a folder; every stage resumes.

OUT/activations/                 shards of the domain's activations at the base's site, and of the base's errors
OUT/elsewhere/activations/       the same of other text, where some is given
OUT/checkpoint-<base>.pt         the training state, under the first digits of the base's fingerprint
OUT/                             sae.safetensors, card.json, latents.jsonl.gz
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from saeguard.boosted import Boosted
from saeguard.errors import TrainError
from saeguard.loaders.native import save_sae
from saeguard.sae import SAE
from saeguard.training.activations import ActivationStore, Batches
from saeguard.training.boost import SHARE, check_base, check_subject, fit_boost, write_errors
from saeguard.training.boost_baselines import ENCODED, at_random, extended, fine_tuned, stitched
from saeguard.training.card import data_of, read_attribution, read_origins, save_card, shared_facts
from saeguard.training.corpus import Chunks, read_corpus
from saeguard.training.describe import describe_latents, save_notes
from saeguard.training.evaluate import Evaluation, evaluate_saes
from saeguard.training.pipeline import Progress, Subject, Texts, collect, manifest_of, model_source
from saeguard.training.trainer import TrainConfig

TUNING_LR = 0.2
"""Of the boost's peak learning rate; what is trained already would be shaken apart by all of it."""


@dataclass(frozen=True)
class Domain:
    """A domain's name and text, other text on which a boost learns to be silent, and other text to measure on."""

    name: str
    texts: Texts
    general: tuple[Path, ...] = ()
    elsewhere: tuple[Path, ...] = ()
    share: float = SHARE
    """Tokens of the text elsewhere per token of the domain in training."""

    def __post_init__(self):
        if not self.name or {"/", "+"} & set(self.name):
            raise TrainError(
                f"a boost for {self.name!r}", "it is to be found as base+domain, in a folder of the domain's name",
                "Give a name without / and +, as with --domain law.",
            )  # fmt: skip
        if not 0 < self.share < math.inf:
            raise TrainError(
                f"{self.share} tokens of other text per token of the domain", "that is no number above 0",
                "Give one such as 0.5, or no text to be silent on.",
            )  # fmt: skip
        self._part("general text", self.general, (*self.texts.train, *self.elsewhere), "--general")
        self._part("other text", self.elsewhere, (*self.texts.train, *self.texts.held_out), "--elsewhere")

    def _part(self, what: str, files: tuple[Path, ...], others: tuple[Path, ...], option: str) -> None:
        seen = {path.resolve() for path in files} & {path.resolve() for path in others}
        if seen:
            raise TrainError(
                f"{what} for a boost for {self.name}",
                f"{', '.join(sorted(path.name for path in seen))} is already used to train or to measure it",
                f"Name other files with {option}.",
            )


@dataclass(frozen=True, eq=False)
class Measured:
    """Evaluations by the name of the SAE: ``base``, ``boosted``, and the baselines."""

    domain: Mapping[str, Evaluation]
    general: Mapping[str, Evaluation] = field(default_factory=dict)


def boost_domain(
    subject: Subject,
    base: SAE,
    domain: Domain,
    store: ActivationStore,
    held_out: Chunks,
    config: TrainConfig,
    out: Path,
    *,
    command: str,
    elsewhere: ActivationStore | None = None,
    baselines: bool = False,
    resume: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Fit, describe and measure a boost of ``base``, write its three files and return its card.

    ``store`` has the domain's activations (`saeguard.training.pipeline.collect`), ``held_out`` is what to measure on,
    ``elsewhere`` the activations of the domain's ``elsewhere`` text, see `collect_elsewhere`.
    Raises `TrainError`, and what `check_subject` raises.
    """
    site, general = check_subject(base, subject.model), general_text(subject, domain)
    boost = fit_boost(
        base, store, config, name=f"{base.name}/boosts/{domain.name}", domain=domain.name, resume=resume,
        elsewhere=() if elsewhere is None else (elsewhere,), share=domain.share,
        checkpoint=out / f"checkpoint-{base.fingerprint()[:16]}.pt",
        progress=None if progress is None else lambda p: progress(
            f"boosting {site}", p.step, p.steps, f"FVU {p.fvu:.3f} of the error, dead {p.dead}"),
        writing=None if progress is None else lambda done, total: progress("errors of the base", done, total, "tokens"),
    )  # fmt: skip
    tell = progress or (lambda stage, done, total, note: None)
    tell("describing", 0, 1, "")
    notes = describe_latents(boost, subject.model, subject.tokenizer, store)
    tell("describing", 1, 1, "")
    manifest = {**manifest_of(subject, domain.texts.context), **boost.manifest}
    boost = replace(boost, maximum=torch.tensor([note.maximum for note in notes]), manifest=manifest)
    save_sae(boost, out)
    save_notes(notes, out)
    saes = {"base": base, "boosted": Boosted(base, [boost])}
    if baselines:
        saes |= fit_baselines(base, store, config, progress=progress)
    measured = measure(subject, saes, held_out, general, domain.texts.n_ce_chunks, progress)
    silent = None if elsewhere is None else elsewhere.chunks
    card = boost_card(subject, base, boost, domain, config, store.chunks, silent, held_out, measured, command)
    save_card(card, out)
    return card


def collect_elsewhere(
    subject: Subject, base: SAE, domain: Domain, n_tokens: int, out: Path, *, compiled: bool = False,
    progress: Progress | None = None,
) -> ActivationStore | None:  # fmt: skip
    """Activations of about ``n_tokens`` of the domain's ``elsewhere`` text, drawn evenly from its files."""
    if not domain.elsewhere:
        return None
    texts = domain.texts
    chunks = read_corpus(domain.elsewhere, subject.tokenizer, context=texts.context, n_tokens=n_tokens, seed=texts.seed)
    tell = None if progress is None else lambda stage, done, total, note: progress(
        f"{stage} elsewhere", done, total, note)  # fmt: skip
    return collect(subject, chunks, [check_base(base)], out / "elsewhere", compiled=compiled, progress=tell)


def fit_baselines(
    base: SAE,
    store: ActivationStore,
    config: TrainConfig,
    *,
    tuning_steps: int | None = None,
    progress: Progress | None = None,
) -> dict[str, SAE]:
    """The baselines on the activations that a boost was fitted to, with as many latents more and the L0 of both.

    What begins as the base learns at a fifth of the boost's rate, for ``tuning_steps`` steps or as many as the boost.
    Raises `TrainError` for a base that cannot be trained on.
    """
    site, n = check_base(base), config.d_sae
    batches, errors = (
        Batches(one, site, batch=config.batch, seed=config.seed) for one in (store, write_errors(base, store))
    )
    x = batches.sample(1 << 14)
    l0 = sum(int((base.encode(part) != 0).sum()) for part in x.split(ENCODED)) / len(x)
    tuning = replace(config, lr=TUNING_LR * config.lr, steps=tuning_steps or config.steps)
    larger = replace(tuning, d_sae=base.d_sae + n, k=l0 + config.k)
    tell = {
        name: None if progress is None else _teller(progress, name)
        for name in ("extended (active)", "extended (random)", "fine-tuned", "stitched")
    }
    return {
        "extended (active)": extended(base, batches, larger, start="active", progress=tell["extended (active)"]),
        "extended (random)": extended(base, batches, larger, start="random", progress=tell["extended (random)"]),
        "fine-tuned": fine_tuned(base, batches, replace(tuning, d_sae=base.d_sae, k=l0), progress=tell["fine-tuned"]),
        "stitched": stitched(
            base, batches, errors, replace(config, d_sae=2 * n, k=min(l0, float(n))), n, progress=tell["stitched"]
        ),
        "at random": at_random(base, batches, errors, n, k=config.k, seed=config.seed),
    }


def _teller(progress: Progress, name: str) -> Any:
    return lambda p: progress(name, p.step, p.steps, f"FVU {p.fvu:.3f}")


def general_text(subject: Subject, domain: Domain) -> Chunks | None:
    """Chunks of the domain's general text, as many tokens as are held out of its own."""
    if not domain.general:
        return None
    texts = domain.texts
    return read_corpus(domain.general, subject.tokenizer, context=texts.context, n_tokens=texts.n_held_out,
                       seed=texts.seed + 1)  # fmt: skip


def measure(
    subject: Subject,
    saes: Mapping[str, SAE],
    held_out: Chunks,
    general: Chunks | None,
    n_ce_chunks: int | None,
    progress: Progress | None = None,
) -> Measured:
    """Evaluate every SAE on the domain's held-out text, and on general text where there is some."""
    found: list[dict[str, Evaluation]] = []
    for name, chunks in (("domain text", held_out), ("general text", general)):
        tell = None if progress is None else _measuring(progress, name)
        each = [] if chunks is None else evaluate_saes(
            list(saes.values()), subject.model, chunks, n_ce_chunks=n_ce_chunks, progress=tell
        )  # fmt: skip
        found.append(dict(zip(saes, each, strict=False)))
    return Measured(*found)


def _measuring(progress: Progress, name: str) -> Any:
    return lambda done, total: progress(f"measuring on {name}", done, total, "chunks")


def changes(measured: Measured, name: str = "boosted") -> dict[str, float]:
    """What an SAE changed against the base: EV is 1 - FVU, and the CE gap is CE spliced - CE, in nats per token."""
    old, new = measured.domain["base"], measured.domain[name]
    found = {
        "ev_before": 1 - old.fvu, "ev_after": 1 - new.fvu, "unexplained_fell_by": 1 - new.fvu / old.fvu,
        "ce_gap_before": old.ce_spliced - old.ce, "ce_gap_after": new.ce_spliced - new.ce,
        "ce_gap_fell_by": 1 - (new.ce_spliced - new.ce) / (old.ce_spliced - old.ce),
        "l0_before": old.l0, "l0_after": new.l0,
    }  # fmt: skip
    if measured.general:
        old, new = measured.general["base"], measured.general[name]
        found |= {
            "general_ev_change": old.fvu - new.fvu, "general_l0_change": new.l0 - old.l0,
            "general_ce_gap_change": new.ce_spliced - old.ce_spliced,
        }  # fmt: skip
    return {key: round(value, 5) for key, value in found.items()}


def boost_card(
    subject: Subject,
    base: SAE,
    boost: SAE,
    domain: Domain,
    config: TrainConfig,
    chunks: Chunks,
    silent: Chunks | None,
    held_out: Chunks,
    measured: Measured,
    command: str,
) -> dict[str, Any]:
    """The card as a JSON object: what the boost is of, what it changed on which text, and how to make it again."""
    files = (*domain.texts.train, *domain.texts.held_out, *domain.general, *domain.elsewhere)
    origins = read_origins(files)
    names: Sequence[str] = [name for name in measured.domain if name != "base"]
    assert boost.threshold is not None
    return {
        "name": boost.name, "domain": domain.name, "site": str(boost.site), "model": boost.model,
        "base": {"name": base.name, "fingerprint": base.fingerprint(), "d_sae": base.d_sae},
        "changes": changes(measured),
        "baselines": {name: changes(measured, name) for name in names if name != "boosted"},
        "d_in": boost.d_in, "d_sae": boost.d_sae,
        "activation": f"{boost.activation}, one threshold for all latents: {float(boost.threshold[0]):.6g}",
        "evaluation": {
            "form": "jumprelu, float32 model; FVU and CE of the base and of the base with this boost behind it",
            "domain": {name: found.rounded() for name, found in measured.domain.items()},
            "general": {name: found.rounded() for name, found in measured.general.items()},
            "domain_data": data_of(held_out, origins), "general_files": [path.name for path in domain.general],
        },
        "training": {
            **asdict(config), "prefixes": list(config.prefixes), "tokens_seen": config.steps * config.batch,
            "method": "arXiv 2507.12990: reads x, target x - base(x), BatchTopK with aux-k, then one threshold for "
            "k latents per token of that text; no b_dec; target 0 on the text elsewhere, if any",
        },
        "data": data_of(chunks, origins),
        "elsewhere": None if silent is None else data_of(silent, origins) | {"share": domain.share},
        **shared_facts(command, model_source(subject), read_attribution(files)),
    }  # fmt: skip
