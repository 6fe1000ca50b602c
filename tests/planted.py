"""A policy that triggers on one known word alone, its model and SAE in folders, and questions about it."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from saeguard import SAE, Add, Plan, Rule, Site
from saeguard.cli.guarded import PLAIN, UnderPolicy
from saeguard.gates import Count, Gate, Hits, Latched, Not, Watch
from saeguard.guarding.guardrail import Guardrail
from saeguard.guarding.policy import Policy, Refuse
from saeguard.loaders.native import save_sae
from tests import tiny
from tests.words import save_model, word_tokenizer

WORD = 50
"""Token ``w50``: questions with it are those that the policy is about."""
SITE = Site("resid_pre", 0)
HITS = Hits((0,))
GATE = Latched(Watch(HITS, Count(), 0.0))
TOKENIZER = word_tokenizer()


def planted_sae(model: Any, name: str = "planted") -> SAE:
    """Latent 0 fires at ``w50`` alone, where the model's embeddings are read; latent 1 points somewhere."""
    embeddings = model.get_input_embeddings().weight.detach()
    own = embeddings[WORD] / embeddings[WORD].square().sum()
    others = (embeddings @ own)[torch.arange(len(embeddings)) != WORD]
    assert others.max() < 0.9, "the word is too near to another one"
    generator = torch.Generator().manual_seed(1)
    return SAE(
        name=name, W_enc=torch.stack([own, torch.zeros_like(own)], 1), b_enc=torch.zeros(2),
        W_dec=torch.randn(2, len(own), generator=generator), b_dec=torch.zeros(len(own)), activation="jumprelu",
        threshold=torch.tensor([0.95, 0.95]), site=SITE,
    )  # fmt: skip


def editing(model: Any, sae: SAE, gate: Gate | None = GATE, **options: Any) -> Policy:
    """Pushes latent 1 from where the gate is open on."""
    plan = Plan((Rule(sae.name, (1,), Add(4.0), gate=gate),))
    return Policy.of(model, TOKENIZER, sae, plan, name="planted", **options)


def refusing(model: Any, sae: SAE, gate: Gate = GATE, **options: Any) -> Policy:
    """Stops rows where the gate opens."""
    stop = Refuse(gate, sae.name, None, "w9 w9 w8", "planted.word")
    return Policy.of(model, TOKENIZER, sae, None, name="planted, refusing", refusals=(stop,), **options)


@contextmanager
def under(model: Any, sae: Any, policy: Policy) -> Iterator[tuple[UnderPolicy, UnderPolicy]]:
    """Rows without a policy, and rows under this one."""
    with Guardrail.attach(model, {PLAIN: None, "guarded": policy}, tokenizer=TOKENIZER, saes=sae) as guard:
        yield UnderPolicy(guard, PLAIN), UnderPolicy(guard)


def rows_of(n: int, *, seed: int = 0) -> list[dict[str, Any]]:
    """Questions of two topics; those of "left" hold the word, and of "right" the first has it in a choice."""
    generator = torch.Generator().manual_seed(seed)

    def words(count: int) -> list[str]:
        return [f"w{i}" for i in torch.randint(3, 40, (count,), generator=generator).tolist()]

    found = []
    for number in range(n):
        left = number % 2 == 0
        asked = words(3 + number % 4)
        asked.insert(1, f"w{WORD}") if left else None
        choices = [" ".join(words(1 + i % 3)) for i in range(4)]
        if number == 1:
            choices[2] = f"w5 w{WORD}"
        found.append({"question": " ".join(asked), "choices": choices, "gold": number % 4,
                      "topic": "left" if left else "right"})  # fmt: skip
    return found


def save_questions(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """As JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def save_deployment(folder: Path) -> Path:
    """Model, SAE, questions.jsonl, text.jsonl and the files edit.json and refuse.json of two policies."""
    from saeguard.loaders import load_sae
    from saeguard.models import load_model

    model, tokenizer = load_model(save_model(folder / "model"))
    save_sae(planted_sae(model, str(folder / "sae")), folder / "sae")
    sae = load_sae(str(folder / "sae"))
    assert tokenizer.vocab_size == tiny.VOCAB
    for make, name in ((editing, "edit"), (refusing, "refuse")):
        options = {"sources": {sae.name: str(folder / "sae")}, "model_name": str(folder / "model")}
        make(model, sae, **options).save(folder / f"{name}.json")
    save_questions(folder / "questions.jsonl", rows_of(8))
    texts = [{"text": " ".join(f"w{3 + (7 * i + j) % 40}" for i in range(60))} for j in range(3)]
    (folder / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    return folder


def save_second(folder: Path) -> Path:
    """Beside `save_deployment`: second.json, a policy that edits from the first token without the planted word on."""
    from saeguard.loaders import load_sae
    from saeguard.models import load_model

    model, _ = load_model(str(folder / "model"))
    sae = load_sae(str(folder / "sae"))
    gate = Latched(Not(Watch(HITS, Count(), 0.0)))
    plan = Plan((Rule(sae.name, (0,), Add(2.0), gate=gate),))
    policy = Policy.of(model, TOKENIZER, sae, plan, name="second", sources={sae.name: str(folder / "sae")},
                       model_name=str(folder / "model"))  # fmt: skip
    policy.save(folder / "second.json")
    return folder
