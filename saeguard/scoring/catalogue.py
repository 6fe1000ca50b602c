"""Every score by its name: what it needs, what it gives, and the function that computes it; one row per score.

`compute` checks that all that is needed is there before anything runs, and lets scores share their work: one streaming
pass feeds all scores of the family "activation", and one sweep all that read the next token behind a push.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from jaxtyping import Int
from torch import Tensor, nn

from saeguard.errors import ScoreMismatch
from saeguard.sae import SAE
from saeguard.scoring import attribution, contrast, controls, forget_retain, frequency, output_score, probe
from saeguard.scoring import token_confidence as confidence
from saeguard.scoring.cache import Cache
from saeguard.scoring.causal_effect import causal_effect
from saeguard.scoring.fisher import fisher
from saeguard.scoring.generation_success import generation_success
from saeguard.scoring.input_score import input_score
from saeguard.scoring.labels import Label
from saeguard.scoring.logit_lens import top_tokens, unembedding
from saeguard.scoring.losses import Questions
from saeguard.scoring.pushed import Reading, pushed
from saeguard.scoring.sentences import Embedder
from saeguard.scoring.statistics import Statistics, gather
from saeguard.scoring.table import Meaning, ScoreTable
from saeguard.scoring.texts import Texts
from saeguard.scoring.topic import label_similarity, topic
from saeguard.scoring.topic_profile import CENTRED, TopicProfile

FAMILIES = ("output", "activation", "gradient", "topic")
"""Each is also the name of a set: its scores that need nothing beyond what is usual in it."""
STANDS_IN = {"positive": "forget", "negative": "retain"}
"""Texts that are taken where a score's own are not given."""
Progress = Callable[[str, int, int], None]
"""Told what is computed, and how many of how many rows or latents are done."""


@dataclass(frozen=True, eq=False)
class Job:
    """What scores are computed from; each names what it needs of it.

    ``texts`` are token rows by role, ``documents`` plain texts (``reference``, ``aligned``, ``opposed``). ``latents``
    limits scores that go latent by latent, and ``prefixes`` takes the place of their own; ``keep`` is g-SAE's k where
    the SAE has none. ``folder`` takes checkpoints.
    """

    model: nn.Module
    tokenizer: Any
    sae: SAE
    texts: Mapping[str, Texts] = field(default_factory=dict)
    documents: Mapping[str, Sequence[str]] = field(default_factory=dict)
    questions: Questions | None = None
    embedder: Embedder | None = None
    profile: TopicProfile | None = None
    labels: Sequence[Label] | None = None
    prefixes: Sequence[str] | None = None
    latents: Sequence[int] | None = None
    keep: int | None = None
    seed: int = 0
    cache: Cache | None = None
    folder: Path | None = None
    progress: Progress | None = None
    per_text: bool = False

    @cached_property
    def statistics(self) -> Statistics:
        """The sums over all texts, from one pass."""
        return gather(self.model, self.sae, self.texts, per_text=self.per_text, cache=self.cache,
                      progress=self.told("reading texts"))  # fmt: skip

    @cached_property
    def own(self) -> Int[Tensor, "d_sae k"]:
        """The tokens that each latent promotes."""
        return top_tokens(self.model, self.sae)

    def role(self, name: str) -> str:
        """The name of the text that stands for ``name``."""
        return name if name in self.texts else STANDS_IN.get(name, name)

    def told(self, stage: str) -> Callable[[int, int], None] | None:
        """What a score calls with its progress."""
        tell = self.progress
        return None if tell is None else lambda done, total: tell(stage, done, total)

    def options(self, score: str) -> dict[str, Any]:
        """Of a score that goes latent by latent."""
        path = None if self.folder is None else self.folder / f"{score}.safetensors"
        prefixes = {} if self.prefixes is None else {"prefixes": self.prefixes}
        return {"latents": self.latents, "checkpoint": path, "progress": self.told(score), **prefixes}

    def walk(self, score: str) -> dict[str, Any]:
        """Of a score that goes over texts."""
        return {"cache": self.cache, "progress": self.told(score)}

    def has(self, need: str) -> bool:
        """Whether something is there that `Score.needs` names."""
        if need == "groups":
            return "text" in self.texts and bool(self.texts["text"].groups)
        if need in ("questions", "profile", "labels", "embedder", "latents"):
            return getattr(self, need) is not None
        if need == "keep":
            return bool(self.keep or self.sae.top_k)
        if need == "reference":
            return need in self.documents and need in self.texts
        if need == "aligned":
            return bool(self.documents.get(need))
        return self.role(need) in self.texts


@dataclass(frozen=True)
class Score:
    """One row. ``columns`` are all that it gives, the first one to choose latents by, whose ``meaning`` stands here.

    ``usual`` scores are in the set of their ``family``. ``reads`` instead of ``make``: it shares a sweep with others.
    """

    name: str
    family: str
    needs: tuple[str, ...]
    columns: tuple[str, ...]
    meaning: Meaning
    make: Callable[[Job], ScoreTable] | None = None
    reads: Callable[[Job], Reading] | None = None
    usual: bool = True
    per_text: bool = False


def sets() -> dict[str, tuple[str, ...]]:
    """The scores of each named set."""
    return {family: tuple(s.name for s in SCORES if s.family == family and s.usual) for family in FAMILIES}


def find(names: Sequence[str]) -> list[Score]:
    """The rows of these names, each once, in the catalogue's order. Raises `ScoreMismatch`."""
    known = {score.name: score for score in SCORES}
    for name in names:
        if name not in known:
            raise ScoreMismatch(f"the score {name!r}", "there is none of that name", f"Known are: {', '.join(known)}.")
    return [score for score in SCORES if score.name in names]


def needs_of(names: Sequence[str]) -> set[str]:
    """All that these scores need. Raises `ScoreMismatch`."""
    return {need for score in find(names) for need in score.needs}


def compute(names: Sequence[str], job: Job) -> ScoreTable:
    """The columns of all these scores, in one table. Raises `ScoreMismatch` for what is missing, before any work."""
    scores = find(names)
    if not scores:
        raise ScoreMismatch(f"scores of {job.sae.name}", "none is asked for", "Name at least one.")
    if any("random" in score.needs for score in scores) and "random" not in job.texts:
        vocabulary = min(len(job.tokenizer), unembedding(job.model).vocabulary)
        job = replace(
            job, texts={**job.texts, "random": Texts.random(vocabulary, job.sae, job.tokenizer, seed=job.seed)}
        )
    for score in scores:
        missing = [need for need in score.needs if not job.has(need)]
        if missing:
            raise ScoreMismatch(
                f"the score {score.name!r} of {job.sae.name}", f"it needs {' and '.join(map(repr, missing))}",
                "Give that, or leave the score out.",
            )  # fmt: skip
    passed = [score for score in scores if score.family in ("activation", "topic")]
    roles = {job.role(need) for score in passed for need in score.needs}
    texts = {role: text for role, text in job.texts.items() if role in roles}
    shared = replace(job, texts=texts, per_text=any(score.per_text for score in scores))
    tables = [score.make(shared if score in passed else job) for score in scores if score.make is not None]
    readings = [score.reads(job) for score in scores if score.reads is not None]
    if readings:
        stage = "+".join(score.name for score in scores if score.reads is not None)
        tables.append(pushed(job.model, job.tokenizer, job.sae, readings, **job.options(stage)))
    return tables[0].join(*tables[1:])


def _topic(job: Job) -> ScoreTable:
    assert job.embedder is not None
    return topic(job.statistics, job.documents["reference"], job.documents["aligned"], embedder=job.embedder,
                 opposed=job.documents.get("opposed", ()), cache=job.cache)  # fmt: skip


def _profile(job: Job) -> ScoreTable:
    assert job.embedder is not None
    assert job.profile is not None
    job.profile.check(job.sae)
    return job.profile.scores(job.documents["aligned"], embedder=job.embedder, name="topic_profile")


def _labels(job: Job) -> ScoreTable:
    assert job.embedder is not None
    assert job.labels is not None
    return label_similarity(job.sae, job.labels, list(job.documents["aligned"]), embedder=job.embedder, cache=job.cache)


def _input(job: Job) -> ScoreTable:
    text = job.texts["text"].packed
    return input_score(job.model, job.sae, text.ids, text.kept, mask=text.mask, own=job.own,
                       progress=job.told("input_score"))  # fmt: skip


def _questions(score: Callable[..., ScoreTable], name: str) -> Callable[[Job], ScoreTable]:
    return lambda job: score(job.model, job.sae, job.questions, **job.walk(name))


def _generation(job: Job) -> ScoreTable:
    given = job.options("generation_success")
    return generation_success(job.model, job.tokenizer, job.sae, given.pop("latents"), own=job.own, **given)


def _gsae(job: Job) -> ScoreTable:
    return attribution.gsae(job.model, job.sae, job.texts["text"], k=job.keep, **job.walk("gsae"))


_ARAD, _DSG, _SHARE = "Arad et al. 2025, section 3", "DSG, arXiv 2504.08192, squared_mean", "share of tokens"
_WANG = Meaning(
    "change of -mean log p of the 1 likeliest tokens, nats; below 0 is surer", "Wang et al. 2025, appendix D"
)
_TOPIC = Meaning("similarity, 0 to 1 within the SAE", "Topic alignment, arXiv 2506.12576")
_PAIR, _SIGNED = ("forget", "retain"), ("positive", "negative")

SCORES = (
    Score("output_score", "output", (), ("output_score", "output_rank", "output_probability"),
          Meaning("S_rank S_prob, 0 to 1", _ARAD),
          reads=lambda job: output_score.reading(job.model, job.sae, own=job.own, latents=job.latents)),
    Score("token_confidence", "output", (), ("confidence_change_1",), _WANG, reads=lambda job: confidence.additive()),
    Score("token_confidence_scaled", "output", (), ("confidence_change_scaled_1",), _WANG, usual=False,
          make=lambda job: confidence.token_confidence(job.model, job.tokenizer, job.sae, reading="scaled",
                                                       **job.options("token_confidence_scaled"))),
    Score("causal_effect", "output", (), ("effect", "strength_at_kl"),
          Meaning("KL(plain || moved) in nats, moved by 1 in activation units",
                  "arXiv 2410.13928, intervention scoring"),
          make=lambda job: causal_effect(job.model, job.tokenizer, job.sae, **job.options("causal_effect"))),
    Score("generation_success", "output", ("latents",),
          ("generation_success_20", "generation_success_5", "generation_success_1", "steering_factor"),
          Meaning("generated tokens among its top 20, mean over prefixes", "Arad et al. 2025, section 4"),
          make=_generation, usual=False),
    Score("input_score", "activation", ("text",), ("input_score", "input_examples"),
          Meaning("share of examples, 0 to 1", _ARAD), make=_input, usual=False),
    Score("frequency", "activation", ("text",),
          ("frequency", "log_density", "document_frequency", "mean", "mean_active", "maximum"),
          Meaning(_SHARE, "counts over the text's tokens, padding and special tokens left out"),
          make=lambda job: frequency.frequency(job.statistics)),
    Score("special", "activation", ("text",), ("special_frequency", "special_share"),
          Meaning("share of special tokens", "special tokens, which no other score counts", higher=False),
          make=lambda job: controls.special(job.statistics)),
    Score("fake", "activation", ("text", "random"), ("fake_ratio", "random_frequency"),
          Meaning("ratio", "Fake Feature Ratio, FaithfulSAE, arXiv 2506.17673", higher=False),
          make=lambda job: controls.fake(job.statistics)),
    Score("dsg", "activation", _PAIR, ("dsg", "dsg_ratio", "forget_importance", "retain_importance"),
          Meaning("squared activation units on the forget text", _DSG),
          make=lambda job: forget_retain.dsg(job.statistics)),
    Score("farrell", "activation", _PAIR, ("farrell", "forget_frequency", "retain_frequency"),
          Meaning("share of tokens to forget", "Farrell et al., arXiv 2410.19278"),
          make=lambda job: forget_retain.farrell(job.statistics)),
    Score("crisp", "activation", _PAIR, ("crisp", "crisp_delta", "crisp_rho"),
          Meaning("tokens", "CRISP, arXiv 2508.13650"), make=lambda job: forget_retain.crisp(job.statistics)),
    Score("sta", "activation", _SIGNED, ("sta", "sta_activation", "sta_frequency"),
          Meaning("activation units", "STA, arXiv 2505.20322"),
          make=lambda job: contrast.sta(job.statistics, positive=job.role("positive"), negative=job.role("negative"))),
    Score("mosaic", "activation", _SIGNED, ("mosaic_probe", "mosaic_mean", "mosaic_count"),
          Meaning("log odds per standard deviation", "MOSAIC, arXiv 2502.11367"), per_text=True,
          make=lambda job: probe.mosaic(job.statistics, positive=job.role("positive"), negative=job.role("negative"))),
    Score("reason", "activation", ("text", "groups"), ("reason", "reason_entropy"), usual=False,
          meaning=Meaning("difference of shares", "ReasonScore, arXiv 2503.18878"),
          make=lambda job: contrast.reason(job.statistics)),
    Score("conditional_difference", "activation", ("chosen", "rejected"), ("conditional_difference",),
          Meaning("activation units", "after DSPA, arXiv 2603.21461; the equation is saeguard's"), usual=False,
          per_text=True, make=lambda job: contrast.conditional_difference(job.statistics)),
    Score("fisher", "gradient", _PAIR,
          ("weighted_fisher_ratio", "weighted_fisher_forget", "weighted_fisher_retain",
           "fisher_ratio", "fisher_forget", "fisher_retain"),
          Meaning("ratio", "forget over retain, as DSG, arXiv 2504.08192"),
          make=lambda job: fisher(job.model, job.sae, job.texts["forget"], job.texts["retain"], **job.walk("fisher"))),
    Score("attribution", "gradient", ("questions",), ("attribution", "attribution_peak", "attribution_top"),
          Meaning("logits per question", "Farrell et al., arXiv 2410.19278"),
          make=_questions(attribution.attribution, "attribution")),
    Score("loss_attribution", "gradient", _PAIR,
          ("loss_attribution", "loss_attribution_forget", "loss_attribution_retain"),
          Meaning("nats per token", "after Farrell et al., arXiv 2410.19278, of the loss"),
          make=lambda job: attribution.loss_attribution(
              job.model, job.sae, job.texts["forget"], job.texts["retain"], **job.walk("loss_attribution"))),
    Score("grad_sae", "gradient", ("questions",), ("grad_sae", "grad_sae_half"),
          Meaning("probability per token", "GradSAE, arXiv 2505.08080"),
          make=_questions(attribution.grad_sae, "grad_sae")),
    Score("gsae", "gradient", ("text", "keep"), ("gsae", "gsae_top"),
          Meaning("activation units", "g-SAE, arXiv 2411.10397"), make=_gsae, usual=False),
    Score("topic", "topic", ("reference", "aligned", "embedder"), ("topic", "topic_distance", "topic_texts"), _TOPIC,
          make=_topic, per_text=True),
    Score("topic_profile", "topic", ("profile", "aligned", "embedder"),
          ("topic_profile_centred", "topic_profile_cosine", "topic_profile", "topic_profile_distance",
           "topic_profile_texts"),
          Meaning(CENTRED, "after Topic alignment, arXiv 2506.12576"), make=_profile, usual=False),
    Score("label_similarity", "topic", ("labels", "aligned", "embedder"), ("label_similarity",),
          Meaning("cosine", "Similarity of an explanation and a query"), make=_labels, usual=False),
    Score("random", "control", (), ("random",), Meaning("a random number", "control"),
          make=lambda job: controls.random_control(job.sae, seed=job.seed, among=job.latents)),
)  # fmt: skip
