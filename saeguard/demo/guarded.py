"""The guardrail's part of the demonstration: questions of two topics in one batch, under a policy and without one.

Each question stands twice in the batch, once per policy, so that everything is one call of generate, and is put on
record row by row. What is claimed is computed anew and compared, as in `saeguard.demo.proofs`.
"""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from saeguard.demo.proofs import hooks
from saeguard.drawing.scene import Batch, Proof, encode
from saeguard.errors import UnguardedCall
from saeguard.guarding.audit import AuditLog
from saeguard.guarding.guardrail import Guardrail
from saeguard.guarding.outcome import Guarded
from saeguard.guarding.policy import Policy
from saeguard.guarding.verify import verify
from saeguard.sae import SAE

QUESTIONS = ("What do mitochondria do in a cell?", "What caused the First World War?")
"""The first is about what the shipped policy is to forget, the second is not."""
OPEN, GUARDED = "plain", "guarded"


@dataclass(frozen=True)
class Answer:
    """One question, both answers, and what the guardrail made of it."""

    question: str
    plain: str
    guarded: str
    decision: str
    score: float
    tokens_edited: int


@dataclass(frozen=True)
class GuardScene:
    """What is shown of it."""

    policy: str
    answers: tuple[Answer, ...]
    proofs: tuple[Proof, ...]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"policy": self.policy, "answers": [asdict(answer) for answer in self.answers],
                "checks": [asdict(proof) for proof in self.proofs]}  # fmt: skip


@dataclass(frozen=True, eq=False)
class _Case:
    """A batch in which every question stands under both policies, first all plain ones, and its answers."""

    guard: Guardrail
    batch: Batch
    rows: tuple[str, ...]
    found: Guarded

    @property
    def n(self) -> int:
        return len(self.rows) // 2


def run_guarded(
    model: nn.Module,
    tokenizer: Any,
    policy: Policy,
    saes: Sequence[SAE],
    *,
    questions: Sequence[str] = QUESTIONS,
    max_new_tokens: int = 40,
    chat: bool = True,
    tick: Callable[[str], None] = lambda step: None,
) -> GuardScene:
    """Ask every question plainly and under ``policy``, in one batch, and check what is promised of it."""
    before, batch = hooks(model), encode(tokenizer, [*questions, *questions], chat=chat)
    rows = (OPEN,) * len(questions) + (GUARDED,) * len(questions)
    tick(f"{len(questions)} questions under a guardrail and without one")
    with tempfile.TemporaryDirectory() as folder:
        log = AuditLog(Path(folder) / "audit.jsonl")
        policies = {OPEN: None, GUARDED: policy}
        with Guardrail.attach(model, policies, tokenizer=tokenizer, saes=saes, audit=log) as guard:
            found = guard.generate(
                input_ids=batch.input_ids, attention_mask=batch.attention_mask, rows=rows,
                max_new_tokens=max_new_tokens, do_sample=False,
            )  # fmt: skip
            case = _Case(guard, batch, rows, found)
            tick("checking the guardrail")
            proofs = [_quiet_rows(case), _edited_rows(case), _goes_around(case)]
        proofs.append(_recorded(log, len(rows)))
    proofs.append(_detached(model, before))
    return GuardScene(policy.name, _answers(case, questions, tokenizer), tuple(proofs))


def _answers(case: _Case, questions: Sequence[str], tokenizer: Any) -> tuple[Answer, ...]:
    texts, made = case.found.texts(tokenizer), []
    for i, question in enumerate(questions):
        decision = case.found.decisions[case.n + i]
        edited = sum(fired.tokens for fired in decision.fired.values())
        score = max(decision.scores.values(), default=float("nan"))
        made.append(Answer(question, texts[i], texts[case.n + i], decision.decision, score, edited))
    return tuple(made)


def _quiet_rows(case: _Case) -> Proof:
    """A row whose gate stayed shut has the tokens of the plain row beside it, and, computed once more, its logits."""
    quiet = [i for i in range(case.n) if case.found.decisions[case.n + i].decision == "allow"]
    plain, under = _logits(case, (OPEN,) * len(case.rows)), _logits(case, case.rows)
    same = all(
        torch.equal(plain[case.n + i], under[case.n + i])
        and torch.equal(case.found.sequences[i], case.found.sequences[case.n + i])
        for i in quiet
    )
    found = f"{len(quiet) * plain[0].numel():,} logits of {len(quiet)} row compared bit by bit, and its tokens"
    return Proof("A row whose gate stays shut is bit-identical to the plain model", found, same and bool(quiet))


def _edited_rows(case: _Case) -> Proof:
    """In a row whose gate opened, every token from there to the last was edited."""
    fired = [
        one for decision in case.found.decisions[case.n :] if decision.decision == "steer"
        for one in decision.fired.values()
    ]  # fmt: skip
    edited, expected = sum(one.tokens for one in fired), sum(one.expected for one in fired)
    found = f"{edited} of {expected} tokens, the generated ones included"
    return Proof("Where the gate opened, every token was edited", found, 0 < edited == expected)


def _logits(case: _Case, rows: Sequence[str]) -> Tensor:
    ids = case.found.sequences
    new = torch.ones(len(ids), ids.shape[1] - case.found.prompt_columns, dtype=torch.long)
    mask, prompts = torch.cat([case.batch.attention_mask, new], 1), case.batch.attention_mask.sum(1).tolist()
    with torch.no_grad(), case.guard.rows(rows, n=len(rows), prompt_tokens=tuple(prompts), measuring=True):
        model: Any = case.guard.model
        return model(input_ids=ids, attention_mask=mask).logits


def _goes_around(case: _Case) -> Proof:
    """The guarded model, called as if there were no guardrail, refuses."""
    try:
        model: Any = case.guard.model
        model.generate(input_ids=case.batch.input_ids, attention_mask=case.batch.attention_mask, max_new_tokens=1)
        refused = "it answered"
    except UnguardedCall as error:
        refused = f"{type(error).__name__}: {error.found}"
    return Proof("The model called around the guardrail refuses", refused, refused != "it answered")


def _recorded(log: AuditLog, n: int) -> Proof:
    found = verify(log.path)
    text = f"{found.records} records in a chain of hashes, {'unbroken' if found.ok else 'broken'}, none with any text"
    return Proof("Every row is on record", text, found.ok and found.records == n)


def _detached(model: nn.Module, before: Any) -> Proof:
    """After `detach` the model has the hooks that it had."""
    return Proof("The guardrail leaves no hook behind", "hooks of all modules compared", hooks(model) == before)
