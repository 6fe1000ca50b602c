"""From the options of ``saeguard score`` to a `Job`: what the scores need is read, and nothing given is ignored."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import typer

from saeguard.cli.texts import documents_of, read_questions, token_rows

NOT_TEXTS = frozenset({
    "aligned", "opposed", "reference", "questions", "labels", "groups", "embedder", "profile", "latents", "keep",
})  # fmt: skip
"""Needs of scores that are no token rows, so that ``--text`` cannot give them."""


@dataclass(frozen=True)
class Asked:
    """The options, as lists of names and patterns; ``texts`` and ``documents`` by role."""

    names: Sequence[str]
    sae: str
    model: str
    texts: Mapping[str, list[str]]
    documents: Mapping[str, list[str]]
    about: list[str]
    questions: list[str]
    labels: Path | None
    groups: Path | None
    tokens: int
    passages: int
    ask: int
    latents: list[int] | None
    sample: int
    prefixes: list[str] | None
    keep: int | None
    seed: int
    cache: Path | None
    folder: Path | None
    embedder: str


def make_job(asked: Asked, tell: Any) -> Any:
    """The `Job` for the asked scores. Refuses texts that none of them needs."""
    from saeguard.loaders import load_sae
    from saeguard.models import load_model
    from saeguard.scoring.cache import Cache
    from saeguard.scoring.catalogue import Job, needs_of

    needs = needs_of(asked.names)
    _check_used(asked, needs)
    sae, loaded = load_sae(asked.sae), load_model(asked.model)
    job = Job(
        loaded.model, loaded.tokenizer, sae, latents=_latents(asked, sae), prefixes=asked.prefixes, keep=asked.keep,
        seed=asked.seed, cache=Cache(asked.cache) if asked.cache is not None else Cache.default(), folder=asked.folder,
        progress=tell,
    )  # fmt: skip
    rows = token_rows(asked.texts, loaded.tokenizer, sae, n_tokens=asked.tokens, seed=asked.seed)
    if asked.groups is not None and "text" in rows:
        rows["text"] = rows["text"].with_groups(_groups(asked.groups, loaded.tokenizer))
    if "questions" in needs and asked.questions:
        read = read_questions(asked.questions, loaded.tokenizer, sae, most=asked.ask, seed=asked.seed)
        job = replace(job, questions=read)
    return _with_topics(replace(job, texts=rows), asked, needs)


def _check_used(asked: Asked, needs: set[str]) -> None:
    from saeguard.scoring.catalogue import STANDS_IN

    misplaced = sorted(set(asked.texts) & NOT_TEXTS)
    if misplaced:
        raise typer.BadParameter(f"--text {misplaced[0]}=FILE: {misplaced[0]} is no text that scores are taken over")
    if not all(text.strip() for text in asked.about):
        raise typer.BadParameter("--about is empty: say the topic in words")
    wanted = needs | {STANDS_IN[need] for need in needs & set(STANDS_IN)}
    wanted |= {"opposed"} if "reference" in needs else set()
    given = {*asked.texts, *asked.documents, *(["questions"] if asked.questions else [])}
    given |= {"aligned"} if asked.about else set()
    given |= {name for name in ("groups", "labels") if getattr(asked, name) is not None}
    unused = sorted(given - wanted)
    if unused:
        names = ", ".join(asked.names)
        raise typer.BadParameter(f"none of {names} needs {', '.join(unused)}: see saeguard score --list")


def _latents(asked: Asked, sae: Any) -> list[int] | None:
    """The latents that were named, or a sample of the SAE's, or None for all."""
    import torch

    from saeguard.scoring.sweep import chosen

    if not asked.sample:
        return asked.latents
    pool = chosen(sae, asked.latents)
    order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(asked.seed))[: asked.sample]
    return sorted(pool[i] for i in order.tolist())


def _with_topics(job: Any, asked: Asked, needs: set[str]) -> Any:
    """The job with what topic scores need: aligned, opposed and reference texts, embedder, profile, labels."""
    from saeguard.cli.profiles import make_embedder
    from saeguard.errors import ScoreMismatch
    from saeguard.latents import LatentTable
    from saeguard.scoring.labels import labels_of, read_labels
    from saeguard.scoring.texts import Texts
    from saeguard.scoring.topic import passages
    from saeguard.scoring.topic_profile import TopicProfile, draw_passages

    found = {role: documents_of(files, job.tokenizer) for role, files in asked.documents.items()}
    for role, files in found.items():
        if not any(files.values()):
            raise ScoreMismatch(
                f"texts for --{role} in {', '.join(files)}", "there is no document in them", "Give texts with words."
            )
    plain = {role: passages([text for texts in found.get(role, {}).values() for text in texts])
             for role in ("aligned", "opposed")}  # fmt: skip
    documents = {**plain, "aligned": [*asked.about, *plain["aligned"]]}
    texts = dict(job.texts)
    if "reference" in found:
        documents["reference"] = draw_passages(list(found["reference"].values()), asked.passages, seed=asked.seed)
        texts["reference"] = Texts.from_text(documents["reference"], job.tokenizer, job.sae, name="reference")
    if "embedder" in needs:
        job = replace(job, embedder=make_embedder(asked.embedder))
    if "profile" in needs:
        job = replace(job, profile=TopicProfile.load(asked.sae, sae=job.sae))
    if "labels" in needs:
        known = (
            read_labels(asked.labels, d_sae=job.sae.d_sae) if asked.labels else labels_of(LatentTable.load(asked.sae))
        )
        job = replace(job, labels=known)
    return replace(job, documents=documents, texts=texts)


def _groups(path: Path, tokenizer: Any) -> dict[str, list[int]]:
    """Token ids of each group's words, with and without a space in front; words of several tokens are refused."""
    from saeguard import strict_json
    from saeguard.errors import ScoreMismatch

    try:
        given = strict_json.parse(path.read_text(encoding="utf-8"))
        groups = {name: [*words] for name, words in given.items()}
        if not all(isinstance(words, list) and all(isinstance(w, str) for w in words) for words in given.values()):
            raise TypeError("a group is a list of words")
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise ScoreMismatch(
            f"groups of words in {path}", f"they cannot be read ({error})", 'Write {"group": ["word", "words"]}.'
        ) from error
    found: dict[str, list[int]] = {}
    for name, words in groups.items():
        for word in words:
            spelled = [tokenizer(form, add_special_tokens=False)["input_ids"] for form in (word, f" {word}")]
            single = [ids[0] for ids in spelled if len(ids) == 1]
            if not single:
                raise ScoreMismatch(
                    f"the word {word!r} of the group {name!r}", "it is more than one token", "Use words of one token."
                )
            found.setdefault(name, []).extend(single)
    return found
