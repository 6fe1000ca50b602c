"""What boosts for several domains add to a shipped SAE, alone and stacked, and what the baselines add instead.

    python benchmarks/boosting.py --corpora FOLDER [--domains biology,government_law,software] [--base NAME] ...

FOLDER holds TOPIC.train.jsonl.gz and TOPIC.val.jsonl.gz, rows with a text field. Boosts are fitted to a domain's train
split with several seeds, silent on the train splits of the other domains and of the --general topics, and measured on
the val splits of the domain and of the --general topics. Activations,
boosts and baselines are kept in the cache folder, so a second run only measures. Without --corpora nothing is measured.
Ends with one line of JSON: per domain ev_before, ev_after, ce_gap_before, ce_gap_after and general_ev_change of the
first seed, the same with all boosts stacked, the range over seeds, and the baselines of the first domain.
"""

import argparse
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from saeguard import SAE, Boosted, load_model, load_sae, save_sae
from saeguard.models import cache_folder
from saeguard.training.activations import ActivationStore, Batches, write_activations
from saeguard.training.boost import check_base, fit_boost
from saeguard.training.boost_pipeline import Measured, changes, fit_baselines
from saeguard.training.corpus import Chunks, read_corpus
from saeguard.training.evaluate import evaluate_saes
from saeguard.training.pipeline import Progress, Subject
from saeguard.training.trainer import TrainConfig

console = Console(stderr=True, width=190)
SHOWN = ("ev_before", "ev_after", "unexplained_fell_by", "ce_gap_before", "ce_gap_after", "ce_gap_fell_by",
         "general_ev_change", "l0_before", "l0_after")  # fmt: skip


@dataclass(frozen=True, eq=False)
class Bench:
    """What every stage needs."""

    subject: Subject
    base: SAE
    options: argparse.Namespace
    folder: Path

    def chunks(self, topics: list[str], split: str, n_tokens: int) -> Chunks:
        """Text of some topics."""
        files = [Path(self.options.corpora) / f"{topic}.{split}.jsonl.gz" for topic in topics]
        return read_corpus(files, self.subject.tokenizer, n_tokens=n_tokens, seed=0 if split == "train" else 1)

    def store(self, domain: str, topics: Sequence[str] = ()) -> ActivationStore:
        """Activations of the train split of the domain, or of several topics, from the cache where they are there."""
        site, chunks = check_base(self.base), self.chunks(list(topics) or [domain], "train", self.options.tokens)
        folder = self.folder / f"{domain}-{site}-{chunks.fingerprint()[:8]}"
        tell = said(f"activations of {domain}")
        return write_activations(self.subject.model, chunks, [site], folder, rows_per_shard=128, progress=tell)

    def config(self, store: ActivationStore, seed: int) -> TrainConfig:
        """The same for every domain; steps from the number of epochs."""
        asked = self.options
        per_epoch = Batches(store, check_base(self.base), batch=asked.batch, seed=seed).steps_per_epoch
        steps = round(asked.epochs * per_epoch)
        return TrainConfig(d_sae=asked.latents, k=asked.k, steps=steps, batch=asked.batch, lr=asked.lr,
                           warmup=min(100, steps // 10), seed=seed)  # fmt: skip


def said(what: str) -> Callable[[int, int], None]:
    """A line now and then."""
    last = [time.time()]

    def tell(done: int, total: int) -> None:
        if time.time() - last[0] > 20 or done == total:
            last[0] = time.time()
            console.print(f"{what}: {done} of {total}", style="dim")

    return tell


def stages(domain: str) -> Progress:
    """The same for work of several stages."""
    told: dict[str, Callable[[int, int], None]] = {}
    return lambda stage, done, total, note: told.setdefault(stage, said(f"{domain}: {stage}"))(done, total)


def kept(bench: Bench, name: str, key: Any, make: Callable[[Path], Mapping[str, SAE]]) -> dict[str, SAE]:
    """SAEs from the cache, or made and put there; ``key`` is what they depend on. ``make`` is told their folder."""
    said_key = json.dumps([bench.base.fingerprint(), key], sort_keys=True, default=str)
    folder = bench.folder / f"{name}-{sha256(said_key.encode()).hexdigest()[:12]}"
    if not (folder / "done").exists():
        console.print(f"fitting {name}")
        for each, sae in make(folder).items():
            save_sae(sae, folder / each)
        (folder / "done").write_text(said_key, encoding="utf-8")
    return {path.name: load_sae(path) for path in sorted(folder.iterdir()) if path.is_dir()}


def boost_of(bench: Bench, domain: str, stores: Mapping[str, ActivationStore], seed: int) -> SAE:
    """The domain's boost with one seed; the other stores are where it is to be silent."""
    store, others = stores[domain], [other for name, other in stores.items() if name != domain]
    config = bench.config(store, seed)
    tell = said(f"boost for {domain}, seed {seed}")

    def make(folder: Path) -> dict[str, SAE]:
        return {"boost": fit_boost(
            bench.base, store, config, name=f"{bench.base.name}/boosts/{domain}", domain=domain,
            checkpoint=folder / "checkpoint.pt", elsewhere=others, share=bench.options.share, resume=True,
            progress=lambda p: tell(p.step, p.steps), writing=said(f"errors on {domain}"),
        )}  # fmt: skip

    texts = [each.chunks.fingerprint() for each in (store, *others)]
    return kept(bench, f"{domain}-seed{seed}", [asdict(config), bench.options.share, *texts], make)["boost"]


def baselines_of(bench: Bench, domain: str, store: ActivationStore, seed: int) -> dict[str, SAE]:
    """The baselines with one seed."""
    config = bench.config(store, seed)
    steps = bench.options.tuning_steps
    fit = partial(fit_baselines, bench.base, store, config, tuning_steps=steps, progress=stages(domain))
    key = [asdict(config), steps, store.chunks.fingerprint()]
    return kept(bench, f"{domain}-baselines-seed{seed}", key, lambda _: fit())


def evaluated(
    bench: Bench, saes: Mapping[str, Mapping[str, SAE]], everywhere: Mapping[str, SAE]
) -> dict[str, dict[str, dict[str, float]]]:
    """What each SAE changed on its domain's val split and on general text, which is read once for all.

    ``everywhere`` are SAEs that every domain measures too; the base is one of them.
    """
    asked = bench.options
    named = dict(everywhere)
    named |= {f"{domain}: {name}": sae for domain, found in saes.items() for name, sae in found.items()}
    general = bench.chunks(asked.general.split(","), "val", asked.val_tokens)
    on_general = evaluate_saes(list(named.values()), bench.subject.model, general,
                               n_ce_chunks=asked.ce_chunks, progress=said("measuring on general text"))  # fmt: skip
    of = dict(zip(named, on_general, strict=True))
    rows: dict[str, dict[str, dict[str, float]]] = {}
    for domain, found in saes.items():
        chunks, mine = bench.chunks([domain], "val", asked.val_tokens), {**everywhere, **found}
        on_domain = evaluate_saes(list(mine.values()), bench.subject.model, chunks, n_ce_chunks=asked.ce_chunks,
                                  progress=said(f"measuring on {domain}"))  # fmt: skip
        other = {name: of[name if name in everywhere else f"{domain}: {name}"] for name in mine}
        measured = Measured(dict(zip(mine, on_domain, strict=True)), other)
        rows[domain] = {name: changes(measured, name) for name in mine if name != "base"}
        report(domain, rows[domain])
    return rows


def report(title: str, found: Mapping[str, Mapping[str, float]]) -> None:
    """One table: a row per SAE."""
    table = Table(title=title)
    for name in ("", *SHOWN):
        table.add_column(name, justify="right")
    for name, row in found.items():
        table.add_row(name, *(f"{row[key]:.4f}" for key in SHOWN))
    console.print(table)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpora", default=os.environ.get("SAEGUARD_CORPORA", ""))
    parser.add_argument("--domains", default="biology,government_law,software")
    parser.add_argument("--general", default="wikipedia,fiction,film_reviews")
    parser.add_argument("--base", default="smollm2-135m-instruct/resid_post.20")
    parser.add_argument("--tokens", type=int, default=250_000)
    parser.add_argument("--val-tokens", type=int, default=20_000)
    parser.add_argument("--ce-chunks", type=int, default=16)
    parser.add_argument("--latents", type=int, default=1024)
    parser.add_argument("--k", type=float, default=128.0)
    parser.add_argument("--epochs", type=float, default=6.0)
    parser.add_argument("--share", type=float, default=0.5, help="tokens of other text per token of the domain")
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--lr", type=float, default=5e-3)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--baselines", type=int, default=1, help="seeds of the first domain's baselines")
    parser.add_argument("--tuning-steps", type=int, default=300, help="of the baselines that begin as the base")
    parser.add_argument("--cache", default=None)
    return parser.parse_args()


def main() -> None:
    """Fit, measure, print."""
    asked = arguments()
    if not asked.corpora:
        print(json.dumps({"benchmark": "boosting", "skipped": "give --corpora FOLDER, or set SAEGUARD_CORPORA"}))
        return
    base = load_sae(asked.base)
    loaded = load_model(base.model or "")
    folder = Path(asked.cache) if asked.cache else cache_folder() / "benchmarks" / "boosting"
    bench = Bench(Subject(base.model or "", loaded.model, loaded.tokenizer), base, asked, folder)
    domains, started = asked.domains.split(","), time.time()
    stores = {domain: bench.store(domain) for domain in domains}
    everything = stores | {"general": bench.store("general", asked.general.split(","))}
    boosts = {d: [boost_of(bench, d, everything, seed) for seed in range(asked.seeds)] for d in domains}
    stacked = Boosted(base, [found[0] for found in boosts.values()])
    sewn = [baselines_of(bench, domains[0], stores[domains[0]], seed) for seed in range(asked.baselines)]
    saes = {d: {f"seed {i}": Boosted(base, [boost]) for i, boost in enumerate(found)} for d, found in boosts.items()}
    for seed, fitted in enumerate(sewn):
        saes[domains[0]] |= {f"{name}, seed {seed}": sae for name, sae in fitted.items()}
    result: dict[str, Any] = {}
    for domain, rows in evaluated(bench, saes, {"base": base, "stacked": stacked}).items():
        first = rows.pop("seed 0")
        result[domain] = {**first, "stacked": rows.pop("stacked"), "others": rows}
    print(json.dumps({
        "benchmark": "boosting", "base": base.name, "domains": result, "latents": asked.latents, "k": asked.k,
        "epochs": asked.epochs, "share": asked.share, "tuning_steps": asked.tuning_steps,
        "tokens": {domain: store.chunks.n_tokens for domain, store in stores.items()}, "seeds": asked.seeds,
        "general": asked.general.split(","), "minutes": round((time.time() - started) / 60, 1),
        "torch": torch.__version__, "threads": torch.get_num_threads(),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
