"""A model under a policy for the commands that measure one: loaded by the policy's own pins, asked row by row."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

GUARDED, PLAIN = "guarded", "plain"


@dataclass(frozen=True, eq=False)
class UnderPolicy:
    """A `Subject` whose rows are under the policy called ``name`` of an attached guardrail."""

    guard: Any
    name: str = GUARDED

    @property
    def model(self) -> Any:
        """The model that is guarded."""
        return self.guard.model

    @property
    def tokenizer(self) -> Any:
        """The tokenizer that the guardrail was attached with."""
        return self.guard.tokenizer

    @contextmanager
    def passes(self, prompt_tokens: Sequence[int]) -> Iterator[Callable[[], Any]]:
        """See `Subject`."""
        from saeguard.evaluating.subject import Verdict

        n, prompts = len(prompt_tokens), tuple(prompt_tokens)
        with self.guard.rows(self.name, n=n, prompt_tokens=prompts, measuring=True) as table:
            yield lambda: [Verdict(one.gate or one.stop, one.stop) for one in self.guard.opened(table)]

    def write(self, ids: Any, mask: Any, **options: Any) -> tuple[Any, Any]:
        """See `Subject`; a row is opened where it was edited or stopped."""
        from saeguard.evaluating.subject import Verdict

        found = self.guard.generate(input_ids=ids, attention_mask=mask, rows=self.name, **options)
        verdicts = [
            Verdict(one.decision != "allow" or one.max_delta_ratio is not None, one.decision == "refuse")
            for one in found.decisions
        ]
        return found.sequences, verdicts


@dataclass(frozen=True, eq=False)
class Deployment:
    """A policy and what it was made for, all of it loaded."""

    policy: Any
    model: Any
    tokenizer: Any
    saes: tuple[Any, ...]

    @contextmanager
    def guarded(self) -> Iterator[tuple[UnderPolicy, UnderPolicy]]:
        """Rows without a policy and rows under it, while the guardrail stands. Raises what attaching raises."""
        from saeguard.guarding.guardrail import Guardrail

        policies = {PLAIN: None, GUARDED: self.policy}
        with Guardrail.attach(self.model, policies, tokenizer=self.tokenizer, saes=self.saes) as guard:
            yield UnderPolicy(guard, PLAIN), UnderPolicy(guard)

    def about(self) -> dict[str, Any]:
        """What identifies it in a document."""
        policy = self.policy
        return {
            "policy": {"name": policy.name, "serial": policy.serial, "fingerprint": policy.fingerprint()},
            "model": {"name": policy.model.name, "weights": policy.model.weights},
            "saes": [{"name": pin.name, "fingerprint": pin.fingerprint} for pin in policy.saes],
        }


def deploy(policy_file: Path, model: str, tell: Callable[[str], None]) -> Deployment:
    """Load a policy, the model that it names or ``model``, and its SAEs. Raises `PolicyError`, `LoadError`.

    That they are what the policy was made for is checked when the guardrail is attached, here once before any work.
    """
    from saeguard.guarding.policy import Policy

    return deployed(Policy.load(policy_file), model, tell)


def deployed(policy: Any, model: str, tell: Callable[[str], None]) -> Deployment:
    """`deploy` of a policy that is there already."""
    from saeguard.loaders import load_sae
    from saeguard.models import load_model

    tell(f"loading {model or policy.model.name}")
    loaded = load_model(model or policy.model.name)
    saes: list[Any] = []
    for pin in policy.saes:
        tell(f"loading SAE {pin.name}")
        sae: Any = load_sae(pin.source)
        saes.append(sae if sae.name == pin.name else replace(sae, name=pin.name))
    tell("comparing with the policy")
    policy.check(loaded.model, loaded.tokenizer, saes)
    return Deployment(policy, loaded.model, loaded.tokenizer, tuple(saes))
