"""The guardrail's part of the demonstration: questions of two topics in one batch, under policies and without one.

Each question stands in the batch plainly and once per policy, so that everything is one call of generate, and is put on
record row by row. What is claimed is computed anew and compared, as in `saeguard.demo.proofs`.
"""

import tempfile
from collections.abc import Callable, Mapping, Sequence
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
from saeguard.guarding.stops import Refuse
from saeguard.guarding.verify import verify
from saeguard.sae import SAE

QUESTIONS = ("What do mitochondria do in a cell?", "What caused the First World War?")
"""The first is about what the shipped policies are to forget, the second is not."""
OPEN = "plain"


@dataclass(frozen=True)
class Under:
    """One answer under a policy, and what the guardrail made of the row."""

    policy: str
    text: str
    decision: str
    score: float
    tokens_edited: int


@dataclass(frozen=True)
class Answer:
    """One question, its plain answer, and the one under each policy."""

    question: str
    plain: str
    under: tuple[Under, ...]


@dataclass(frozen=True)
class GuardScene:
    """What is shown of it."""

    answers: tuple[Answer, ...]
    proofs: tuple[Proof, ...]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"answers": [asdict(answer) for answer in self.answers],
                "checks": [asdict(proof) for proof in self.proofs]}  # fmt: skip


@dataclass(frozen=True, eq=False)
class _Case:
    """A batch of ``n`` plain questions, then the same under each policy, and the answers to it."""

    guard: Guardrail
    policies: Mapping[str, Policy]
    batch: Batch
    n: int
    rows: tuple[str, ...]
    found: Guarded
    tokenizer: Any

    def decided(self, *decisions: str) -> list[int]:
        """The rows under a policy of which this was decided."""
        return [i for i in range(self.n, len(self.rows)) if self.found.decisions[i].decision in decisions]


def run_guarded(
    model: nn.Module,
    tokenizer: Any,
    policies: Mapping[str, Policy],
    saes: Sequence[SAE],
    *,
    questions: Sequence[str] = QUESTIONS,
    max_new_tokens: int = 40,
    chat: bool = True,
    tick: Callable[[str], None] = lambda step: None,
) -> GuardScene:
    """Ask every question plainly and under each policy, in one batch, and check what is promised of it."""
    n, before = len(questions), hooks(model)
    rows = tuple(name for name in (OPEN, *policies) for _ in questions)
    batch = encode(tokenizer, [*questions] * (1 + len(policies)), chat=chat)
    tick(f"{n} questions under a guardrail and without one")
    with tempfile.TemporaryDirectory() as folder:
        log = AuditLog(Path(folder) / "audit.jsonl")
        named = {OPEN: None, **policies}
        with Guardrail.attach(model, named, tokenizer=tokenizer, saes=saes, audit=log) as guard:
            found = guard.generate(
                input_ids=batch.input_ids, attention_mask=batch.attention_mask, rows=rows,
                max_new_tokens=max_new_tokens, do_sample=False,
            )  # fmt: skip
            case = _Case(guard, policies, batch, n, rows, found, tokenizer)
            tick("checking the guardrail")
            proofs = [_quiet_rows(case), *_refused_rows(case), *_edited_rows(case), _goes_around(case)]
        proofs.append(_recorded(log, len(rows)))
    proofs.append(_detached(model, before))
    return GuardScene(_answers(case, questions), tuple(proofs))


def _answers(case: _Case, questions: Sequence[str]) -> tuple[Answer, ...]:
    texts, made = case.found.texts(case.tokenizer), []
    for i, question in enumerate(questions):
        under = []
        for row in range(case.n + i, len(case.rows), case.n):
            decision = case.found.decisions[row]
            edited = sum(fired.tokens for fired in decision.fired.values())
            score = max(decision.scores.values(), default=float("nan"))
            under.append(Under(case.rows[row], texts[row], decision.decision, score, edited))
        made.append(Answer(question, texts[i], tuple(under)))
    return tuple(made)


def _quiet_rows(case: _Case) -> Proof:
    """A row whose gate stayed shut has the tokens of the plain row beside it, and, computed once more, its logits."""
    quiet = case.decided("allow")
    plain, under = _logits(case, (OPEN,) * len(case.rows)), _logits(case, case.rows)
    same = all(
        torch.equal(plain[i], under[i]) and torch.equal(case.found.sequences[i % case.n], case.found.sequences[i])
        for i in quiet
    )
    found = f"{len(quiet) * plain[0].numel():,} logits of {len(quiet)} rows compared bit by bit, and their tokens"
    return Proof("A row whose gate stays shut is bit-identical to the plain model", found, same and bool(quiet))


def _refused_rows(case: _Case) -> list[Proof]:
    """A refused row holds the refusal and not one token of an answer; no claim where no policy refuses."""
    refusing = {name: [stop.text for stop in policy.refusals if isinstance(stop, Refuse)]
                for name, policy in case.policies.items() if policy.refusals}  # fmt: skip
    texts, refused = case.found.texts(case.tokenizer), case.decided("refuse")
    same = all(texts[i] in refusing[case.rows[i]] for i in refused)
    found = f"{len(refused)} row, ended at token {case.found.decisions[refused[0]].at}" if refused else "no row"
    proof = Proof("A refused row holds the refusal and nothing of an answer", found, same and bool(refused))
    return [proof] if refusing else []


def _edited_rows(case: _Case) -> list[Proof]:
    """In a row that was edited, every token from the first one on was; no claim where all policies refuse."""
    editing = [name for name, policy in case.policies.items() if not policy.refusals]
    fired = [one for i in case.decided("steer") for one in case.found.decisions[i].fired.values()]
    edited, expected = sum(one.tokens for one in fired), sum(one.expected for one in fired)
    found = f"{edited} of {expected} tokens, the generated ones included"
    return [Proof("Where the gate opened, every token was edited", found, 0 < edited == expected)] if editing else []


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
