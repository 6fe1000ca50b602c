"""What a model's logits are worth, one number per row: the functions whose gradients latents are scored by.

    cross entropy     sum_t -log p(token t + 1)                  over the row's counted tokens, in nats
    margin            logit(right) - mean logit(wrong)           at the last token of a question (arXiv 2410.19278)
    log p, p          of the right answer                        there too

A row's number depends on that row only, so neither the size of a batch nor padding changes a gradient.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saeguard.errors import ScoreMismatch
from saeguard.sae import SAE
from saeguard.scoring.texts import Batch, Texts, special_ids_of

Logits = Float[Tensor, "batch pos vocab"]
Loss = Callable[[Logits, Batch], Float[Tensor, " batch"]]


@dataclass(frozen=True)
class Questions:
    """Token ids of prompts, of each prompt's choices, and the place of the right one: ``choices[i][gold[i]]``.

    A choice is the one token that would come next; `from_text` takes the first of a longer answer. Raises
    `ScoreMismatch` where a question has no wrong choice, or a wrong one that begins as the right one does.
    """

    prompts: tuple[tuple[int, ...], ...]
    choices: tuple[tuple[int, ...], ...]
    gold: tuple[int, ...]
    special_ids: frozenset[int] = frozenset()
    name: str = "questions"

    def __post_init__(self):
        wrong = ""
        if not len(self.prompts) == len(self.choices) == len(self.gold) or not self.prompts:
            wrong = (
                f"there are {len(self.prompts)} prompts, {len(self.choices)} lists of choices, {len(self.gold)} gold"
            )
        for number, (prompt, choices, gold) in enumerate(zip(self.prompts, self.choices, self.gold, strict=False)):
            if not prompt:
                wrong = f"prompt {number} has no token"
            elif len(choices) < 2 or not 0 <= gold < len(choices):
                wrong = f"question {number} has {len(choices)} choices, and gold is {gold}"
            elif choices.count(choices[gold]) > 1:
                wrong = f"in question {number} a wrong choice begins with the right one's token {choices[gold]}"
        if wrong:
            raise ScoreMismatch(
                f"the questions {self.name!r}", wrong,
                "Give a prompt, choices that begin with different tokens, and the number of the right one.",
            )  # fmt: skip

    @classmethod
    def from_text(
        cls,
        prompts: Sequence[str],
        choices: Sequence[Sequence[str]],
        gold: Sequence[int],
        tokenizer: Any,
        sae: SAE,
        *,
        name: str = "questions",
    ) -> "Questions":
        """Prompts behind BOS unless the SAE wants none; choices as they would follow, with a space where there is one.

        Raises `ScoreMismatch`.
        """
        bos = tokenizer.bos_token_id if sae.manifest.get("bos") is not False else None
        plain = lambda text: tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
        rows = [plain(prompt) for prompt in prompts]
        rows = [row if bos is None or row[:1] == (bos,) else (bos, *row) for row in rows]
        firsts = [[plain(choice)[:1] for choice in several] for several in choices]
        if not all(first for several in firsts for first in several):
            raise ScoreMismatch(f"the questions {name!r}", "a choice has no token", "Give words.")
        tokens = tuple(tuple(token for (token,) in several) for several in firsts)
        return cls(tuple(rows), tokens, tuple(gold), special_ids_of(tokenizer, sae), name)

    @cached_property
    def text(self) -> Texts:
        """The prompts as rows of a text, each a document of its own."""
        width = max(map(len, self.prompts))
        ids = torch.tensor([[*prompt, *[0] * (width - len(prompt))] for prompt in self.prompts])
        mask = torch.arange(width) < torch.tensor([len(prompt) for prompt in self.prompts])[:, None]
        return Texts.from_ids(ids, mask=mask, special_ids=self.special_ids, name=self.name)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the prompts, the choices and which of them are right."""
        return hashlib.sha256(f"{self.text.fingerprint} {self.choices} {self.gold}".encode()).hexdigest()

    @property
    def right(self) -> Int[Tensor, " question"]:
        """Token of each right answer."""
        return torch.tensor([choices[gold] for choices, gold in zip(self.choices, self.gold, strict=True)])

    def weights(self, rows: range, vocabulary: int) -> Float[Tensor, "row vocab"]:
        """Per question 1 for the right answer's token and -1/n for each of the n wrong ones."""
        found = torch.zeros(len(rows), vocabulary)
        for i, row in enumerate(rows):
            choices, gold = self.choices[row], self.gold[row]
            for number, token in enumerate(choices):  # wrong choices may share their first token
                found[i, token] += 1.0 if number == gold else -1.0 / (len(choices) - 1)
        return found


def cross_entropy(logits: Logits, batch: Batch) -> Float[Tensor, " batch"]:
    """Sum of -log p over the row's counted tokens, each predicted from those before it, in nats."""
    counted, goal = batch.kept[:, 1:].to(logits.device), batch.ids[:, 1:].to(logits.device)
    row, column = counted.nonzero(as_tuple=True)
    nats = torch.nn.functional.cross_entropy(logits[row, column].float(), goal[row, column], reduction="none")
    return nats.new_zeros(len(logits)).index_add(0, row, nats)


def margin(questions: Questions) -> Loss:
    """logit(right) - mean logit(wrong)."""

    def loss(logits: Logits, batch: Batch) -> Float[Tensor, " batch"]:
        weights = questions.weights(batch.rows, logits.shape[-1])
        return (_last(logits, batch) * weights.to(logits.device)).sum(-1)

    return loss


def log_probability(questions: Questions) -> Loss:
    """log p(right answer), in nats."""

    def loss(logits: Logits, batch: Batch) -> Float[Tensor, " batch"]:
        right = questions.right[batch.rows.start : batch.rows.stop].to(logits.device)
        return _last(logits, batch).log_softmax(-1).gather(1, right[:, None])[:, 0]

    return loss


def probability(questions: Questions) -> Loss:
    """p(right answer)."""
    return lambda logits, batch: log_probability(questions)(logits, batch).exp()


def _last(logits: Logits, batch: Batch) -> Float[Tensor, "batch vocab"]:
    """Logits at the last token of each row, in float32."""
    last = batch.real.sum(1).to(logits.device) - 1
    return logits[torch.arange(len(logits), device=logits.device), last].float()
