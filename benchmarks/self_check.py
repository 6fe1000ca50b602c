"""How many wrong pairs of SAE and model the self-check refuses, and how many right ones.

    python benchmarks/self_check.py [--good 100] [--mutants 300] [--corpus FILE] [--cache FOLDER]

Trains small SAEs of several kinds at several streams of both demo models, on text that SmolLM2 writes (or on the
paragraphs of FILE), and keeps them in the cache folder. The first run takes half an hour on two cores, most of it for
writing the text, later ones five to ten minutes. A good pair is an SAE, a text that was not trained on and a way of
storing the SAE that computes the same. A mutant is one mistake of loaders or users made on purpose; it counts only if
it changes something: FVU grows by 0.02 and a tenth, or activations move by more than 5 % of their norm (for a wrong
place or model: FVU alone). Ends with one line of JSON.
"""

import argparse
import copy
import json
import os
import platform
import random
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

from saeguard import SAE, Site, capture, load_model, load_sae
from saeguard.evaluating import self_check as checking
from saeguard.evaluating.fits import Streams, fit
from saeguard.loaders import shipped
from saeguard.loaders.native import save_sae
from saeguard.models import cache_folder
from saeguard.norms import NORMS
from saeguard.training.trainer import TrainConfig, export, train

SMOL, GEMMA = "smollm2-135m-instruct", "gemma-3-270m"
N_TEXTS, N_TOKENS, N_HELD_OUT = 256, 192, 32
STEPS, BATCH = 300, 1024
STEPS_AWAY = (-2, -1, 0, 1, 2)
USUAL = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "mlp_in", "attn_z")
OPENERS = (
    "Once upon a time", "The committee met on", "def main():", "Dear editor,", "To prepare the dish,", "In algebra,",
    "She turned to him and said,", "The history of the", "Question: What is", "Scientists have found that",
    "import numpy as np", "My favourite book is", "The engine is started by", "On Monday the price of", "Patients who",
    "The river flows through", '"Where are you going?"', "1. ", "A computer program", "According to the law,",
    "The team lost", "Birds that", "In 1848,", "He walked slowly", "User: How do I", "The painting shows", "<html>",
    "Plants need", "Our hotel was", "The planet", "Chapter One", "If x is",
)  # fmt: skip


@dataclass(frozen=True)
class Spec:
    """A small SAE to train. ``kind`` is batch_topk (the project's own), relu (with an L1 penalty) or topk."""

    model: str
    site: str
    kind: str = "batch_topk"
    norm: str = "none"
    d_sae: int = 1024
    k: int = 32
    site_out: str | None = None

    @property
    def name(self) -> str:
        parts = (
            self.model,
            self.site,
            self.site_out,
            self.kind,
            None if self.norm == "none" else self.norm,
            self.d_sae,
        )
        return "_".join(str(part) for part in parts if part is not None)


SPECS = (
    Spec(SMOL, "resid_post.14"),
    Spec(SMOL, "resid_mid.11"),
    Spec(SMOL, "resid_pre.6"),
    Spec(SMOL, "mlp_out.17"),
    Spec(SMOL, "attn_out.8"),
    Spec(SMOL, "resid_post.24", norm="layer_norm"),
    Spec(SMOL, "resid_post.4", norm="const_norm"),
    Spec(SMOL, "resid_post.12", d_sae=576),
    Spec(SMOL, "resid_post.18", kind="relu"),
    Spec(SMOL, "resid_post.22", kind="topk"),
    Spec(SMOL, "mlp_in.12", kind="topk", site_out="mlp_out.12"),
    Spec(GEMMA, "resid_post.9"),
    Spec(GEMMA, "mlp_out.12"),
)


class Rows:
    """Batches of activations that are all in memory."""

    def __init__(self, x: Tensor):
        self.x, self.seen = x, -1

    def at(self, step: int) -> Tensor:
        generator = torch.Generator().manual_seed(step)
        return self.x[torch.randint(len(self.x), (BATCH,), generator=generator)].float()

    def sample(self, n: int) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return self.x[torch.randperm(len(self.x), generator=generator)[:n]].float()


def written(folder: Path, corpus: Path | None) -> list[str]:
    """Texts to train and measure on: of ``corpus``, or sampled from SmolLM2 behind short openers."""
    if corpus is not None:
        return [part for part in corpus.read_text(encoding="utf-8").split("\n\n") if len(part) > 200]
    path = folder / "texts.json"
    if not path.is_file():
        model, tokenizer = load_model(SMOL)
        torch.manual_seed(0)
        openers = [OPENERS[i % len(OPENERS)] for i in range(N_TEXTS)]
        given = tokenizer(openers, add_special_tokens=False, padding=True, padding_side="left", return_tensors="pt")
        first = torch.full((N_TEXTS, 1), tokenizer.bos_token_id)
        said: Any = model.generate(  # type: ignore[operator]
            torch.cat([first, given["input_ids"]], dim=1),
            attention_mask=torch.cat([torch.ones_like(first), given["attention_mask"]], dim=1),
            do_sample=True, temperature=0.9, top_k=0, max_new_tokens=N_TOKENS, pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        path.write_text(json.dumps(tokenizer.batch_decode(said, skip_special_tokens=True)), encoding="utf-8")
    return json.loads(path.read_text(encoding="utf-8"))


@torch.no_grad()
def activations(name: str, texts: list[str], sites: list[Site]) -> dict[Site, Tensor]:
    """Every site's activations on the texts behind BOS, without special tokens."""
    model, tokenizer = load_model(name)
    found: dict[Site, list[Tensor]] = {site: [] for site in sites}
    for text in texts:
        ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]])
        with capture(model, sites) as tape:
            model(input_ids=ids, use_cache=False, logits_to_keep=1)
        for site in sites:
            found[site].append(tape[site][0, 1:].bfloat16())
    return {site: torch.cat(parts) for site, parts in found.items()}


def trained(folder: Path, texts: list[str]) -> dict[str, SAE]:
    """The small SAEs, from the folder where they are there already."""
    for model in (SMOL, GEMMA):
        specs = [spec for spec in SPECS if spec.model == model and not (folder / spec.name).is_dir()]
        if not specs:
            continue
        sites = {Site.parse(site) for spec in specs for site in (spec.site, spec.site_out) if site}
        x = activations(model, texts[:-N_HELD_OUT], sorted(sites, key=str))
        for spec in specs:
            started = time.monotonic()
            sae = train_one(spec, x)
            save_sae(sae, folder / spec.name)
            Console().print(f"trained {spec.name} in {time.monotonic() - started:.0f} s")
    return {spec.name: load_sae(folder / spec.name) for spec in SPECS}


def train_one(spec: Spec, x: dict[Site, Tensor]) -> SAE:
    """One SAE in the units of its stream, or of its norm."""
    site, site_out = Site.parse(spec.site), Site.parse(spec.site_out) if spec.site_out else None
    read = NORMS[spec.norm](x[site].float(), 1e-5).x
    manifest = {"bos": True}
    if spec.kind == "batch_topk":
        batches = Rows(read)
        config = TrainConfig(d_sae=spec.d_sae, k=spec.k, steps=STEPS, batch=BATCH, lr=2e-3, dead_after=100_000)
        state = train(batches, config)
        sae = export(state, batches.sample(16_384), l0=spec.k, name=spec.name, site=site, model=spec.model)
        return replace(sae.to(dtype=torch.float32), norm=spec.norm, manifest=manifest)  # type: ignore[arg-type]
    sae = train_plainly(spec, read, x[site_out].float() if site_out else read)
    return replace(sae, site=site, site_out=site_out, model=spec.model, manifest=manifest)


def train_plainly(spec: Spec, x: Tensor, y: Tensor) -> SAE:
    """What the project's trainer has not: ReLU under an L1 penalty, and TopK transcoders."""
    shift, scale = x.mean(0), x.shape[-1] ** 0.5 / (x - x.mean(0)).norm(dim=-1).median()
    y_shift, y_scale = y.mean(0), y.shape[-1] ** 0.5 / (y - y.mean(0)).norm(dim=-1).median()
    x, y = (x - shift) * scale, (y - y_shift) * y_scale
    torch.manual_seed(0)
    D = F.normalize(torch.randn(spec.d_sae, y.shape[-1]), dim=-1)
    E = D.T.clone() if spec.site_out is None else F.normalize(torch.randn(x.shape[-1], spec.d_sae), dim=0)
    weights = [w.requires_grad_() for w in (E, torch.zeros(spec.d_sae), D, torch.zeros(y.shape[-1]))]
    steps, rate, l1 = (800, 4e-3, 1.5) if spec.kind == "relu" else (STEPS, 1e-3, 0.0)
    optimizer = torch.optim.Adam(weights, lr=rate)
    for step in range(steps):
        rows = torch.randint(len(x), (BATCH,), generator=torch.Generator().manual_seed(step))
        optimizer.param_groups[0]["lr"] = rate * min(1.0, 2 * (steps - step) / steps)
        f = (x[rows] @ weights[0] + weights[1]).relu()
        if spec.kind == "topk":
            f = torch.where(f < f.topk(spec.k).values[..., -1:], 0.0, f)
        error = (y[rows] - f @ weights[2] - weights[3]).square().sum(-1)
        penalty = (f * weights[2].norm(dim=-1)).sum(-1)
        loss = ((error + l1 * penalty) * (16 * y.shape[-1] / y[rows].square().sum(-1)).clamp(max=1.0)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    E, b_enc, D, b_dec = (w.detach() for w in weights)
    return SAE(
        spec.name, E * scale, b_enc - shift @ E * scale, D / y_scale, b_dec / y_scale + y_shift,
        activation=spec.kind, top_k=spec.k if spec.kind == "topk" else None,  # type: ignore[arg-type]
    )  # fmt: skip


Change = Callable[[SAE, Tensor], SAE | None]
"""From an SAE and the activations that it reads to the same SAE with one mistake, or None where it cannot be made."""


def lengths_of(sae: SAE) -> Tensor:
    """Decoder row lengths as SAEs have them whose rows are not held at 1: log-normal, median 1.5."""
    generator = torch.Generator().manual_seed(1)
    return 1.5 * torch.exp(0.4 * torch.randn(sae.d_sae, generator=generator))


def with_lengths(sae: SAE, *, encoder: bool = True, threshold: bool = True, decoder: bool = True) -> SAE:
    """Stored with rows of other lengths; with all three parts it computes the same."""
    n = lengths_of(sae)
    return replace(
        sae,
        W_enc=sae.W_enc / n if encoder else sae.W_enc,
        b_enc=sae.b_enc / n if encoder else sae.b_enc,
        threshold=sae.threshold / n if threshold and sae.threshold is not None else sae.threshold,
        W_dec=sae.W_dec * n[:, None] if decoder else sae.W_dec,
    )


def scaled(sae: SAE, s: float, *, encoder: bool = True, decoder: bool = True) -> SAE:
    out = s if decoder else 1.0
    return replace(sae, W_enc=sae.W_enc * (s if encoder else 1.0), W_dec=sae.W_dec / out, b_dec=sae.b_dec / out)


def input_scale(sae: SAE, x: Tensor) -> float:
    """What SAELens calls expected average: the factor that gives tokens a mean norm of sqrt(d_in)."""
    return float(sae.d_in**0.5 / sae.read(x).x.norm(dim=-1).mean())


def shuffled(n: int) -> Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(2))


def folded_bias(sae: SAE, times: float) -> SAE | None:
    return None if sae.is_transcoder else replace(sae, b_enc=sae.b_enc + times * (sae.b_dec @ sae.W_enc))


def other_norm(name: str) -> Change:
    return lambda sae, x: None if sae.norm == name else replace(sae, norm=name)  # type: ignore[arg-type]


def rotated(sae: SAE, basis: Tensor) -> SAE | None:
    if sae.is_transcoder or sae.norm != "none":
        return None
    return replace(sae, W_enc=basis @ sae.W_enc, W_dec=sae.W_dec @ basis.T, b_dec=basis @ sae.b_dec)


def orthogonal(d: int) -> Tensor:
    return torch.linalg.qr(torch.randn(d, d, generator=torch.Generator().manual_seed(3))).Q


def moved(step: int) -> Change:
    def change(sae: SAE, x: Tensor) -> SAE | None:
        sites = [None if s is None else Site(s.stream, s.layer + step) for s in (sae.site, sae.site_out)]
        return replace(sae, site=sites[0], site_out=sites[1])

    return change


def at_stream(stream: str) -> Change:
    def change(sae: SAE, x: Tensor) -> SAE | None:
        assert sae.site is not None
        if stream == "mlp_normed" and sae.model == GEMMA:  # some gains of its norms are 0: there is no such site
            return None
        if sae.is_transcoder and stream.startswith("resid"):
            return replace(sae, site=Site(stream, sae.site.layer))
        return (
            None if sae.is_transcoder or sae.site.stream == stream else replace(sae, site=Site(stream, sae.site.layer))
        )

    return change


def as_relu(sae: SAE, x: Tensor) -> SAE | None:
    return None if sae.activation == "relu" else replace(sae, activation="relu", threshold=None, top_k=None)


def other_model(seed: int) -> Callable[[nn.Module], nn.Module]:
    def make(model: Any) -> nn.Module:
        torch.manual_seed(seed)
        return type(model)(model.config).to(torch.float32).eval()

    return make


def scrambled(model: Any) -> nn.Module:
    """Every matrix keeps its entries and loses their order."""
    copied = copy.deepcopy(model)
    for parameter in copied.parameters():
        if parameter.ndim > 1:
            parameter.data = parameter.data.flatten()[shuffled(parameter.numel())].view_as(parameter)
    return copied


PLACES: dict[str, Change] = {
    "one layer too high": moved(1),
    "one layer too low": moved(-1),
    "read at resid_mid": at_stream("resid_mid"),
    "read at mlp_out": at_stream("mlp_out"),
    "read at attn_out": at_stream("attn_out"),
    "read at mlp_in": at_stream("mlp_in"),
    "read at mlp_normed": at_stream("mlp_normed"),
}
WEIGHTS: dict[str, Change] = {
    "decoder rows shuffled": lambda sae, x: replace(sae, W_dec=sae.W_dec[shuffled(sae.d_sae)]),
    "encoder's sign flipped": lambda sae, x: replace(sae, W_enc=-sae.W_enc),
    "decoder's sign flipped": lambda sae, x: replace(sae, W_dec=-sae.W_dec),
    "b_dec's sign flipped": lambda sae, x: replace(sae, b_dec=-sae.b_dec),
    "encoder reshaped, not transposed": lambda sae, x: replace(sae, W_enc=sae.W_enc.T.reshape(sae.W_enc.shape)),
    "decoder reshaped, not transposed": lambda sae, x: replace(sae, W_dec=sae.W_dec.T.reshape(sae.W_dec.shape)),
    "encoder transposed": lambda sae, x: replace(sae, W_enc=sae.W_enc.T) if sae.d_in == sae.d_sae else None,
    "decoder transposed": lambda sae, x: replace(sae, W_dec=sae.W_dec.T) if sae.d_out == sae.d_sae else None,
    "b_dec not taken off the input": lambda sae, x: folded_bias(sae, 1.0),
    "b_dec taken off twice": lambda sae, x: folded_bias(sae, -1.0),
    "b_dec missing in the decoder": lambda sae, x: replace(sae, b_dec=torch.zeros_like(sae.b_dec)),
    "b_enc missing": lambda sae, x: replace(sae, b_enc=torch.zeros_like(sae.b_enc)),
    "TopK or threshold read as ReLU": as_relu,
    "input scale not applied": lambda sae, x: scaled(sae, 1 / input_scale(sae, x)),
    "input scale applied twice": lambda sae, x: scaled(sae, input_scale(sae, x)),
    "input scale in the encoder only": lambda sae, x: scaled(sae, input_scale(sae, x), decoder=False),
    "input scale in the decoder only": lambda sae, x: scaled(sae, input_scale(sae, x), encoder=False),
    "decoder norm in the encoder only": lambda sae, x: with_lengths(sae, decoder=False),
    "decoder norm in the decoder only": lambda sae, x: with_lengths(sae, encoder=False, threshold=False),
    "threshold not rescaled": lambda sae, x: None if sae.threshold is None else with_lengths(sae, threshold=False),
    "read without its norm": lambda sae, x: other_norm("none")(sae, x),
    "read with layer_norm": other_norm("layer_norm"),
    "read with const_norm": other_norm("const_norm"),
    "residual basis permuted": lambda sae, x: rotated(sae, torch.eye(sae.d_in)[shuffled(sae.d_in)]),
    "residual basis rotated": lambda sae, x: rotated(sae, orthogonal(sae.d_in)),
}  # fmt: skip
MODELS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "random weights": other_model(0), "scrambled weights": scrambled,
}  # fmt: skip
STORED: dict[str, Change] = {
    "as trained": lambda sae, x: sae,
    "float16": lambda sae, x: sae.to(dtype=torch.float16),
    "bfloat16": lambda sae, x: sae.to(dtype=torch.bfloat16),
    "rows of other lengths": lambda sae, x: with_lengths(sae) if not sae.ranks else sae,
    "latents in another order": lambda sae, x: reordered(sae, shuffled(sae.d_sae)),
    "with latents that never fire": lambda sae, x: with_dead(sae),
    "under its other name": lambda sae, x: renamed(sae),
}  # fmt: skip


def reordered(sae: SAE, order: Tensor) -> SAE:
    threshold = None if sae.threshold is None else sae.threshold[order]
    return replace(sae, W_enc=sae.W_enc[:, order], b_enc=sae.b_enc[order], W_dec=sae.W_dec[order], threshold=threshold)


def with_dead(sae: SAE, n: int = 512) -> SAE:
    def pad(w: Tensor | None, shape: tuple[int, ...], value: float, dim: int) -> Any:
        return None if w is None else torch.cat([w, torch.full(shape, value)], dim=dim)

    return replace(
        sae, W_enc=pad(sae.W_enc, (sae.d_in, n), 0.01, 1), b_enc=pad(sae.b_enc, (n,), -1e4, 0),
        W_dec=pad(sae.W_dec, (n, sae.d_out), 0.05, 0), threshold=pad(sae.threshold, (n,), 1.0, 0),
    )  # fmt: skip


def renamed(sae: SAE) -> SAE:
    """What leaves a block is what enters the next."""
    if sae.site is None or sae.site.stream not in ("resid_pre", "resid_post"):
        return sae
    pre = sae.site.stream == "resid_pre"
    return replace(sae, site=Site("resid_post" if pre else "resid_pre", sae.site.layer + (-1 if pre else 1)))


class Memory:
    """Forward passes over the same tokens, made once, for all the sites that some SAE here may ask for."""

    def __init__(self, read: Callable[..., dict[Site, Tensor]], layers: set[int]):
        self.read, self.layers = read, layers
        self.held: dict[tuple[int, bytes], dict[Site, Tensor]] = {}

    def __call__(self, model: Any, sites: Any, rows: Any, layout: Any) -> dict[Site, Tensor]:
        key = id(model), rows.ids.numpy().tobytes()
        if key not in self.held:
            layers = sorted(self.layers & set(range(model.config.num_hidden_layers)))
            every = [Site(stream, layer) for layer in layers for stream in USUAL]
            self.held[key] = self.read(model, every, rows, layout)
        missing = [site for site in sites if site not in self.held[key]]  # mlp_normed: not every layer has it
        if missing:
            self.held[key] |= self.read(model, missing, rows, layout)
        return {site: self.held[key][site] for site in sites}


@dataclass(frozen=True)
class Pair:
    """A model, an SAE, a text; what was done to the SAE or the model, and the right pair that it came from."""

    label: str
    model: nn.Module
    tokenizer: Any
    sae: SAE
    text: str
    right: SAE
    right_model: nn.Module

    def check(self) -> checking.SelfCheck:
        return checking.self_check(self.model, self.sae, self.tokenizer, text=[self.text])


def saes_of(folder: Path, texts: list[str]) -> list[SAE]:
    ours = [load_sae(name) for name in shipped() if name.startswith(SMOL)]
    return [replace(sae.to(dtype=torch.float32), maximum=None) for sae in (*ours, *trained(folder, texts).values())]


def samples(texts: list[str], n: int = 8) -> list[str]:
    """Held-out text, some four hundred tokens at a time."""
    held_out = texts[-N_HELD_OUT:]
    size = len(held_out) // n
    return ["\n\n".join(held_out[i * size : i * size + size])[:1500] for i in range(n)]


def good_pairs(saes: list[SAE], models: dict[str, Any], texts: list[str], n: int) -> Iterator[Pair]:
    made, stored = 0, list(STORED.items())
    for round_, text in enumerate(texts):
        for place, sae in enumerate(saes):
            if made == n:
                return
            model, tokenizer = models[str(sae.model)]
            label, change = stored[(place + round_) % len(stored)]
            kept = change(sae, torch.zeros(0))
            assert kept is not None
            yield Pair(label, model, tokenizer, kept, text, sae, model)
            made += 1


def candidates(saes: list[SAE], models: dict[str, Any], texts: list[str]) -> Iterator[Pair]:
    """Every mistake on every SAE, in one random order, on one text; then again on the next."""
    changes = PLACES | WEIGHTS
    wrong = {(label, name): make(models[name].model) for label, make in MODELS.items() for name in (SMOL,)}
    drawn = [(label, sae) for label in (*changes, *MODELS) for sae in saes]
    for round_, text in enumerate(texts):
        random.Random(round_).shuffle(drawn)
        for label, sae in drawn:
            model, tokenizer = models[str(sae.model)]
            if label in changes:
                changed = changes[label](sae, activations_of(sae, model, tokenizer, text))
                if changed is not None:
                    yield Pair(label, model, tokenizer, changed, text, sae, model)
            elif (label, str(sae.model)) in wrong:
                yield Pair(label, wrong[label, str(sae.model)], tokenizer, sae, text, sae, model)


def activations_of(sae: SAE, model: nn.Module, tokenizer: Any, text: str) -> Tensor:
    return streams_of(sae, model, tokenizer, text).x


def streams_of(sae: SAE, model: nn.Module, tokenizer: Any, text: str) -> Streams:
    """What the check itself would see at the SAE's own site."""
    rows = checking.token_rows(
        sae, tokenizer, [text], None, checking.special_ids_of(tokenizer, checking.engine_for(model), sae)
    )
    pair = checking.Pair(sae.site, sae.site_out or sae.site)  # type: ignore[arg-type]
    return checking.streams_at(checking.read_sites(model, list(pair), rows, None), pair, rows, torch.device("cpu"))


def changes_something(pair: Pair) -> bool:
    """Whether a mutant is one: see the head of this file."""
    right_at = streams_of(pair.right, pair.right_model, pair.tokenizer, pair.text)
    here_at = streams_of(pair.sae, pair.model, pair.tokenizer, pair.text)
    right_at, here_at = right_at.at(right_at.typical()), here_at.at(here_at.typical())
    before, after = fit(pair.right, right_at).fvu, fit(pair.sae, here_at).fvu
    if not after < max(1.1 * before, before + 0.02):
        return True
    if pair.label in PLACES or pair.label in MODELS:
        return False
    f, g = pair.right.encode(right_at.x), pair.sae.encode(right_at.x)
    return bool((f - g).norm() > 0.05 * f.norm())


@dataclass
class Tally:
    """Per kind of mistake: how many, how many refused, by which numbers, and which pairs got through."""

    n: int = 0
    refused: int = 0
    numbers: Counter[str] = field(default_factory=Counter)
    through: list[str] = field(default_factory=list)

    def add(self, pair: Pair, check: checking.SelfCheck) -> None:
        self.n += 1
        self.refused += not check.passed
        self.numbers.update({reason.number for reason in check.reasons})
        if check.passed:
            self.through.append(f"{pair.right.name} (FVU {check.fvu:.3f})")


def table_of(tallies: dict[str, Tally]) -> Table:
    table = Table("kind", "pairs", "refused", "numbers that gave it away", "passed")
    for label, tally in tallies.items():
        numbers = ", ".join(f"{name} {n}" for name, n in tally.numbers.most_common(4))
        passed = ", ".join(tally.through) if len(tally.through) < 4 else f"{len(tally.through)} pairs"
        table.add_row(label, str(tally.n), str(tally.refused), numbers, passed)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--good", type=int, default=100)
    parser.add_argument("--mutants", type=int, default=300)
    parser.add_argument("--corpus", type=Path)
    parser.add_argument("--cache", type=Path, default=cache_folder() / "benchmarks" / "self_check")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--log", type=Path, help="write every check here, one JSON object a line")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.cache /= options.corpus.stem if options.corpus else "."
    options.cache.mkdir(parents=True, exist_ok=True)
    texts = written(options.cache, options.corpus)
    saes = saes_of(options.cache, texts)
    models = {name: load_model(name) for name in dict.fromkeys(str(sae.model) for sae in saes)}
    sites = [site for sae in saes for site in (sae.site, sae.site_out) if site is not None]
    layers = {site.layer + step for site in sites for step in STEPS_AWAY}
    checking.read_sites = Memory(checking.read_sites, layers)
    good, mutants, no_mutants, seconds = defaultdict(Tally), defaultdict(Tally), Counter[str](), []
    with torch.no_grad(), open(options.log or os.devnull, "w", encoding="utf-8") as log:
        for pair in good_pairs(saes, models, samples(texts), options.good):
            started = time.monotonic()
            good[pair.label].add(pair, check := pair.check())
            seconds.append(time.monotonic() - started)
            print(json.dumps({"good": True, "label": pair.label, **asdict(check)}), file=log, flush=True)
        for pair in candidates(saes, models, samples(texts)):
            if sum(tally.n for tally in mutants.values()) == options.mutants:
                break
            if not changes_something(pair):
                no_mutants[pair.label] += 1
                continue
            mutants[pair.label].add(pair, check := pair.check())
            print(json.dumps({"good": False, "label": pair.label, **asdict(check)}), file=log, flush=True)
    console = Console(width=160)
    console.print(table_of(good), table_of(mutants))
    console.print("changed nothing, so not counted as mutants:", dict(no_mutants))
    n_good, n_mutants = (sum(tally.n for tally in tallies.values()) for tallies in (good, mutants))
    print(json.dumps({
        "good_refused": sum(tally.refused for tally in good.values()), "good": n_good,
        "mutants_refused": sum(tally.refused for tally in mutants.values()), "mutants": n_mutants,
        "saes": len(saes), "no_mutants": sum(no_mutants.values()),
        "seconds_median": round(statistics.median(seconds or [0.0]), 2), "machine": platform.machine(),
        "threads": torch.get_num_threads(),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
