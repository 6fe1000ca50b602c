"""One audit record per row of a request, written before the answer leaves."""

import time
from collections.abc import Sequence

from saeguard.errors import AuditFailed
from saeguard.guarding.attached import Attached, Table
from saeguard.guarding.audit import AuditLog
from saeguard.guarding.chain import Head
from saeguard.guarding.keys import AuditKey
from saeguard.guarding.outcome import Guarded
from saeguard.guarding.records import AuditRecord, class_name


class Recorder:
    """Writes to ``log``, if there is one; ``key`` makes what stands for prompts and tenants."""

    def __init__(self, log: AuditLog | None, key: AuditKey | None):
        self._log, self._key = log, key

    def records(self, guarded: Guarded, names: Sequence[str], tenant: str | None, prompts: Sequence[Sequence[int]],
                attached: Attached, owners: Sequence[int], started: float) -> list[AuditRecord]:  # fmt: skip
        """What was decided, for `write`: all of it or none. Raises `BadRecord`."""
        if self._log is None:
            return []
        total = 1000 * (time.perf_counter() - started)
        new = max(guarded.sequences.shape[1] - guarded.prompt_columns, 0)
        return [
            AuditRecord(
                request_id=names[row], decision=decision.decision, reason_code=decision.reason, guard_status="ran",
                fired=decision.fired, gates=decision.scores, max_delta_ratio=decision.max_delta_ratio,
                gen_tokens=new, latency_ms={"total": total}, **self._who(row, tenant, prompts, attached, owners),
            )
            for row, decision in enumerate(guarded.decisions)
        ]  # fmt: skip

    def write(self, records: Sequence[AuditRecord]) -> None:
        """Put records on the log. Raises `AuditError`."""
        for record in records:
            self._put(record)

    def write_error(self, error: BaseException, names: Sequence[str], tenant: str | None,
                    prompts: Sequence[Sequence[int]], attached: Attached, owners: Sequence[int], table: Table, *,
                    bypass: bool) -> None:  # fmt: skip
        """What was raised, and whether the request goes by. Raises `AuditError`."""
        if self._log is None:
            return
        status = "partial" if table.calls else "not_run"
        reason = f"bypass.{class_name(error)}" if bypass else "guard.failed"
        self.write([
            AuditRecord(
                request_id=name, decision="allow" if bypass else "error", reason_code=reason, guard_status=status,
                err=class_name(error), **self._who(row, tenant, prompts, attached, owners),
            )
            for row, name in enumerate(names)
        ])  # fmt: skip

    def _put(self, record: AuditRecord) -> None:
        """Write a record; a log that does not answer with its head has not written it."""
        assert self._log is not None
        if not isinstance(self._log.write(record), Head):
            raise AuditFailed(
                f"a record of {record.request_id}", "the log did not say that it stands", "Refuse the request."
            )

    def _who(
        self, row: int, tenant: str | None, prompts: Sequence[Sequence[int]], attached: Attached, owners: Sequence[int]
    ) -> dict:
        policy = attached.policies[owners[row]]
        ids = prompts[row] if row < len(prompts) else ()
        hidden = None if self._key is None or tenant is None else self._key.of_text(tenant, purpose="tenant")
        return {
            "tenant": hidden,
            "policy_fp": None if policy is None else policy.fingerprint(),
            "model_fp": None if policy is None else policy.model.weights,
            "sae_fp": None if policy is None or len(policy.saes) != 1 else policy.saes[0].fingerprint,
            "prompt_hmac": None if self._key is None else self._key.of_tokens(ids),
            "prompt_tokens": len(ids),
        }
