"""A model under policies for as long as it serves: every row of every call under one of them, or no call.

    guard = Guardrail.attach(model, {"pupils": policy, "teachers": None}, tokenizer=tokenizer, audit=log)
    answers = guard.generate(**inputs, rows=["pupils", "teachers"], max_new_tokens=64)

Hooks are placed once. Until `detach`, the model called around the guardrail, in any thread, refuses. What a gate
decides, what an edit did and how the request ended is on record before the last token goes out.
"""

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from saeguard.canary import canary
from saeguard.engines.base import Model, Request
from saeguard.engines.inside import inside
from saeguard.engines.session import bind, join, leave, participants
from saeguard.errors import BadRule, GuardError, GuardNotApplied, ModelBusy, UnguardedCall
from saeguard.guarding.asked import check_last, prompts_of
from saeguard.guarding.asked import request_ids as named
from saeguard.guarding.attached import Attached, Lent, Table, passes_cannot_stop, plan_of, stops_of
from saeguard.guarding.audit import AuditLog
from saeguard.guarding.deadline import Deadline
from saeguard.guarding.deciding import decide, opened
from saeguard.guarding.holding import Held
from saeguard.guarding.keys import AuditKey
from saeguard.guarding.lending import lent, stand_in
from saeguard.guarding.outcome import Decision, Guarded, Opened, replaced
from saeguard.guarding.pins import module_of
from saeguard.guarding.policy import Policy
from saeguard.guarding.recording import Recorder
from saeguard.guarding.stopping import EndStopped, check_ends
from saeguard.guarding.stops import Refuse
from saeguard.sae import SAE
from saeguard.steering import prepare, prompt_counts

Policies = Policy | Mapping[str, Policy | None]
DEFAULT = "default"


@dataclass(frozen=True, eq=False)
class Standing:
    """What is in force: the names of the policies, in the order of their numbers, and what hangs on the model."""

    names: tuple[str, ...]
    attached: Attached
    session: Any

    def numbers(self, rows: str | Sequence[str] | None, n: int) -> tuple[int, ...]:
        """The number of each row's policy. Raises `UnguardedCall` for an unknown name, and for none among several."""
        given = rows if rows is not None else self.names[0] if len(self.names) == 1 else ()
        listed = (given,) * n if isinstance(given, str) else _tuple(given)
        unknown = sorted({str(name) for name in listed} - set(self.names))
        if unknown or len(listed) != n:
            raise UnguardedCall(
                f"a call of {n} rows under the policies {list(listed)}",
                f"there is no policy {unknown[0]!r}" if unknown else f"{len(listed)} policies were named",
                f"Name one per row, or one for all, among {', '.join(self.names)}.",
            )
        return tuple(self.names.index(name) for name in listed)


class Guardrail:
    """See the module's text. Made by `attach`."""

    def __init__(
        self, model: nn.Module, tokenizer: Any, saes: Mapping[str, SAE], recorder: Recorder, seconds: float | None
    ):
        self.model, self.tokenizer, self.saes = model, tokenizer, saes
        self._recorder, self._seconds = recorder, seconds
        self._standing: Standing | None = None
        self._take_off: Callable[[], None] = lambda: None
        self._changing = threading.Condition()
        self._running: list[int] = []
        """The thread of each call and each `rows` block that runs."""

    @classmethod
    def attach(
        cls,
        model: Model,
        policies: Policies,
        *,
        tokenizer: Any,
        saes: SAE | Iterable[SAE] = (),
        audit: AuditLog | None = None,
        key: AuditKey | None = None,
        seconds: float | None = None,
    ) -> "Guardrail":
        """Put ``model`` under ``policies``: one for all rows, or several by name, None for rows that are let through.

        Every policy has to be made for this model, tokenizer and SAEs. ``audit`` gets one record per row of every
        request, in which ``key`` stands for the prompt. ``seconds`` is how long a call of `generate` may take. Raises
        `PolicyError`, `BindError`, `ModelBusy`, and `CanaryFailed` when edits of this model go wrong.
        """
        given = [saes] if isinstance(saes, SAE) else list(saes)
        guard = cls(module_of(model), tokenizer, {sae.name: sae for sae in given}, Recorder(audit, key), seconds)
        guard._standing = guard._stand(policies)
        guard._take_off = stand_in(guard)
        return guard

    def generate(
        self,
        *args: Any,
        rows: str | Sequence[str] | None = None,
        request_ids: Sequence[str] | None = None,
        tenant: str | None = None,
        **kwargs: Any,
    ) -> Guarded:
        """``model.generate`` with each row under its policy; ``rows`` names one per row, or one for all.

        Rows of a policy with a refusal end where its gate opens, and have its text in place of their answer. Raises
        `GuardError` when edits cannot be exact or time is up, unless the policies of all rows say "bypass", and
        `AuditError` when the request cannot go on record; nothing of the answer leaves then.
        """
        deadline = Deadline(self._seconds)
        if kwargs.get("streamer") is None:
            return deadline.run(lambda: self._answer(rows, request_ids, tenant, args, kwargs, deadline))
        held = Held(kwargs["streamer"])
        heard = kwargs | {"streamer": held}
        try:
            guarded = deadline.run(lambda: self._answer(rows, request_ids, tenant, args, heard, deadline))
        except BaseException:
            held.give_up()
            raise
        held.release(*self._told(guarded))
        return guarded

    def _answer(
        self, rows: str | Sequence[str] | None, request_ids: Sequence[str] | None, tenant: str | None, args: Any,
        kwargs: dict, deadline: Deadline,
    ) -> Guarded:  # fmt: skip
        """The answer, when it is on record."""
        started = time.perf_counter()
        with self._in_force() as standing:
            request = standing.session.engine.read_request(args, kwargs)
            owners = standing.numbers(rows, request.rows)
            names, prompts = named(request_ids, request.rows), prompts_of(args, kwargs, request)
            with standing.attached.rows(owners, is_request=True) as table:
                put = partial(self._recorder.write_error, names=names, tenant=tenant, prompts=prompts,
                              attached=standing.attached, owners=owners, table=table)  # fmt: skip
                deadline.tell(partial(put, bypass=False))
                try:
                    output = self._run(standing, owners, request, args, kwargs)
                    guarded = self._outcome(standing, table, request, output)
                    records = self._recorder.records(
                        guarded, names, tenant, prompts, standing.attached, owners, started
                    )
                except BaseException as error:
                    return self._failed(standing, owners, request, error, put, deadline, args, kwargs)
                deadline.commit(lambda: self._recorder.write(records))
        return guarded

    @contextmanager
    def rows(
        self, rows: str | Sequence[str] | None = None, *, n: int, prompt_tokens: int | Sequence[int] | None = None,
        measuring: bool = False,
    ) -> Iterator[Table]:  # fmt: skip
        """Passes of this thread inside the block are of ``n`` rows under these policies, edits and gates alike.

        For losses and log-likelihoods. Raises `UnsupportedMode` for policies that stop rows, which only generate can,
        unless ``measuring``: then passes go on where a row would have been stopped, and `opened` says which.
        """
        with self._in_force() as standing:
            owners, counts = standing.numbers(rows, n), prompt_counts(prompt_tokens, n, of="policies")
            if not measuring and any(standing.attached.stops(owner) for owner in owners):
                raise passes_cannot_stop()
            with standing.attached.rows(owners, counts) as table:
                yield table

    @contextmanager
    def __call__(
        self, model: Model, rows: str | Sequence[str] | None = None, *, tenant: str | None = None,
        prompt_tokens: int | Sequence[int] | None = None, measuring: bool = False,
    ) -> Iterator[None]:  # fmt: skip
        """Calls of ``model`` in this thread, inside the block and whoever makes them, are under these policies.

        ``rows`` names one policy per row of every batch, or one for all rows of batches of any size. ``model.generate``
        is then `generate`, and gives its sequences; passes are edited as in `rows`. Blocks nest: the inner one counts.
        Raises `UnguardedCall` for another model, a name that is none and, from ``generate``, another number of rows,
        which passes refuse with `RowsMismatch`; `BadRule` for ``prompt_tokens`` that do not fit; and `UnsupportedMode`
        from a pass under a policy that stops rows, unless ``measuring``.
        """
        if module_of(model) is not self.model:
            raise UnguardedCall(
                f"a block of a guardrail for {type(model).__name__}", "it is attached to another model",
                "Give the model that it is attached to, guard.model.",
            )  # fmt: skip
        each = None if rows is None or isinstance(rows, str) else _tuple(rows)
        with self._in_force() as standing:
            owners = standing.numbers(rows if each is None else each, 1 if each is None else max(len(each), 1))
            counts = prompt_counts(prompt_tokens, None if each is None else len(each), of="policies")
            how = Lent(any_rows=each is None, measuring=measuring)
            table = standing.attached.rows(owners, counts, lent=how)
            with table, lent(self, standing.attached, rows if each is None else each, tenant):
                yield

    def calls(
        self, policy: str | None = None, *, tenant: str | None = None,
        prompt_tokens: int | Sequence[int] | None = None, measuring: bool = False,
    ) -> AbstractContextManager[None]:  # fmt: skip
        """``guard(model, rows=policy)``: one policy for all rows, for pipelines and all that makes its own batches."""
        return self(self.model, policy, tenant=tenant, prompt_tokens=prompt_tokens, measuring=measuring)

    def opened(self, table: Table) -> tuple[Opened, ...]:
        """Of each row of a `rows` block: whether a gate of its policy has opened, and whether one that stops rows has.

        What the row's cache held before the block counts. Raises `UnguardedCall`.
        """
        return opened(self._known().attached, table)

    def bind(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function`` for another thread, in which it may call the model inside `rows`."""
        return bind(self._known().attached, function)

    def reload(self, policies: Policies) -> None:
        """Put other policies in force, once no call is running. What does not fit is refused, and the old ones stay.

        Raises `ModelBusy` inside of a call or a `rows` block, which it would wait for.
        """
        with self._changing:
            self._wait()
            before = self._known()
            with inside(before.session.number):
                self._standing = self._stand(policies, before.attached)
                leave(before.session, before.attached)

    def detach(self) -> None:
        """Take the hooks off, once no call is running; the model is plain again. Raises `ModelBusy` inside of one."""
        with self._changing:
            self._wait()
            if self._standing is not None:
                self._take_off()
                with inside(self._standing.session.number):
                    leave(self._standing.session, self._standing.attached)
                self._standing = None

    def __enter__(self) -> "Guardrail":
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    def _stand(self, policies: Policies, replaces: Attached | None = None) -> Standing:
        named = {DEFAULT: policies} if isinstance(policies, Policy) else dict(policies)
        if not named:
            raise BadRule("a guardrail", "there are no policies", "Give one, or several by name.")
        others = [one for one in participants(self.model) if isinstance(one, Attached) and one is not replaces]
        if others:
            raise ModelBusy(
                f"a guardrail on {type(self.model).__name__}", "another one is attached to it",
                "Give one guardrail all policies by name, or detach the other one.",
            )  # fmt: skip
        for policy in named.values():
            if policy is not None:
                policy.check(self.model, self.tokenizer, self.saes)
        listed = list(named.values())
        ready = prepare(self.model, [plan_of(policy) for policy in listed], every_row=False,
                        saes=self.saes, tokenizer=self.tokenizer, replaces=replaces)  # fmt: skip
        canary(ready.engine, ready.places)
        attached = Attached(listed, ready)
        session = join(ready.engine, attached, ready.places)
        return Standing(tuple(named), attached, session)

    def _known(self) -> Standing:
        if self._standing is None:
            raise UnguardedCall("a call through a guardrail", "it was detached", "Attach it again.")
        return self._standing

    def _wait(self) -> None:
        """Until no call is running. Raises `ModelBusy` where that would be for ever."""
        if threading.get_ident() in self._running:
            raise ModelBusy(
                "changing a guardrail", "this very thread is inside of a call or a rows block of it",
                "Reload and detach when it has ended, or from another thread.",
            )  # fmt: skip
        self._changing.wait_for(lambda: not self._running)

    @contextmanager
    def _in_force(self) -> Iterator[Standing]:
        """What is in force, which stays so for the block."""
        thread = threading.get_ident()
        with self._changing:
            standing = self._known()
            self._running.append(thread)
        try:
            with inside(standing.session.number):
                yield standing
        finally:
            with self._changing:
                self._running.remove(thread)
                self._changing.notify_all()

    def _run(self, standing: Standing, owners: Sequence[int], request: Request, args: Any, kwargs: dict) -> Any:
        check_last(args, kwargs, request, [standing.attached.policies[owner] is not None for owner in owners])
        if any(standing.attached.stops(owner) for owner in owners):
            check_ends(request.eos)
            last = EndStopped(standing.attached, request)
            kwargs = kwargs | {"logits_processor": [*(kwargs.get("logits_processor") or ()), last]}
        generate: Any = self.model.generate
        return bind(standing.attached, generate)(*args, **kwargs)

    def _outcome(self, standing: Standing, table: Table, request: Request, output: Any) -> Guarded:
        """The decisions, and the answers with refusals in their place."""
        sequences = output if isinstance(output, Tensor) else output.sequences
        if not table.calls or any(call.ends is None for call in table.calls):
            raise GuardNotApplied(
                "a guarded call", "it ended, and which of its tokens count is unknown", "The answer must not be used."
            )
        decisions = decide(standing.attached, standing.names, table, request)
        kept = sequences.shape[0] // request.rows
        answers = {
            row * kept + copy: self._refusal(standing, owner, decision, request)
            for row, (owner, decision) in enumerate(zip(table.owners, decisions, strict=True))
            if decision.decision == "refuse" and self._text(standing, owner, decision) is not None
            for copy in range(kept)
        }
        pad = request.pad[0] if request.pad else request.eos[0] if request.eos else 0
        return Guarded(replaced(sequences, answers, request.output_columns, pad), request.output_columns, decisions)

    def _text(self, standing: Standing, owner: int, decision: Decision) -> str | None:
        stop = next(s for s in stops_of(standing.attached.policies[owner]) if s.reason == decision.reason)
        return stop.text if isinstance(stop, Refuse) else None

    def _refusal(self, standing: Standing, owner: int, decision: Decision, request: Request) -> list[int]:
        ids = self.tokenizer(self._text(standing, owner, decision), add_special_tokens=False)["input_ids"]
        return [*ids, *request.eos[:1]]

    def _told(self, guarded: Guarded) -> list[Tensor]:
        """For a streamer: the refusal, which generate did not write."""
        if guarded.decisions[0].decision != "refuse":
            return []
        return [guarded.sequences[0, guarded.prompt_columns :].cpu()]

    def _failed(
        self, standing: Standing, owners: Sequence[int], request: Request, error: BaseException,
        put: Callable[..., None], deadline: Deadline, args: Any, kwargs: dict,
    ) -> Guarded:  # fmt: skip
        """Record what was raised and raise it; or, where all policies of the call say so, let the call go by."""
        policies = [standing.attached.policies[owner] for owner in owners]
        chosen = all(policy is not None and policy.on_error == "bypass" for policy in policies)
        # a streamer has heard a part, a cache holds a part
        afresh = kwargs.get("streamer") is None and kwargs.get("past_key_values") is None
        if not (chosen and afresh and isinstance(error, GuardError)):
            deadline.commit(lambda: put(error, bypass=False))
            raise error
        try:
            with standing.session.muted():
                output = bind(standing.attached, self.model.generate)(*args, **kwargs)  # type: ignore[operator]
        except BaseException as second:
            failure = second
            deadline.commit(lambda: put(failure, bypass=False))
            raise
        deadline.commit(lambda: put(error, bypass=True))
        sequences = output if isinstance(output, Tensor) else output.sequences
        decisions = tuple(
            Decision("allow", f"bypass.{type(error).__name__}", standing.names[owner], {}, {}, None) for owner in owners
        )
        return Guarded(sequences, request.output_columns, decisions)


def _tuple(given: Any) -> tuple[Any, ...]:
    """Names of policies; what cannot be gone through stands for itself, and will be no name."""
    return tuple(given) if isinstance(given, Iterable) else (given,)
