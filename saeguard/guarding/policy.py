"""A policy: what a guardrail does, and the model, tokenizer and SAEs that it was made for, as data to sign and send.

    policy = Policy.of(model, tokenizer, saes, plan, name="biology", refusals=[Refuse(...)])
    policy.save("biology.policy.json", key=SigningKey.from_file("release.key"))
    policy = Policy.load("biology.policy.json", signed_by=[PublicKey.from_file("release.key.pub")], at_least=3)
    policy.check(model, tokenizer, saes)

    fingerprint = SHA-256(canonical JSON of all fields)

Whether a signature is needed is said by who loads (``signed_by``), never by the file. ``serial`` counts releases, so
that an old file, well signed, can be told from the one in force.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, get_args

from torch import nn

from saeguard import strict_json
from saeguard.engines.base import Model
from saeguard.errors import BadPolicy, BadPolicyFile, PlanError, PolicyMismatch, SaeguardError, StalePolicy
from saeguard.fingerprints import tokenizer_fingerprint
from saeguard.gates.base import Gate
from saeguard.gates.written import gate_from_dict, gate_to_dict
from saeguard.guarding import figures, policy_file
from saeguard.guarding.figures import check_text, thawed
from saeguard.guarding.pins import ModelPin, SAEPin, SAEs, by_name, check_digest, tokenizer_differences
from saeguard.guarding.policy_file import MAX_BYTES, MAX_DEPTH, Envelope, canonical, check_keys
from saeguard.guarding.signing import PublicKey, SigningKey, demand
from saeguard.guarding.stops import STOPS, Halt, Refuse
from saeguard.plans import Plan, parse_json
from saeguard.sites import Site

__all__ = ["Halt", "ModelPin", "OnError", "Policy", "Refuse", "SAEPin"]

OnError = Literal["refuse", "bypass"]
SCHEMA = 1
MAX_SERIAL = 1 << 53


def _version() -> str:
    try:
        return version("saeguard")
    except PackageNotFoundError:
        return "not installed as a package"


@dataclass(frozen=True, eq=False, kw_only=True)
class Policy:
    """What a guardrail does, and for what it was made. `Policy.of` takes the fingerprints from live objects.

    ``plan`` edits rows, ``refusals`` stop them; one of both there has to be. The first refusal whose gate opens gives
    the answer, and no two have one ``reason``. Every SAE that a rule or gate names is in ``saes``. ``on_error`` is what
    becomes of a request when the guard itself fails: "refuse", or "bypass", which lets it go by, unguarded and on
    record. ``calibration`` is what is known of the thresholds: numbers and texts, see `saeguard.guarding.figures`.
    ``tokenizer`` is a fingerprint, ``version`` that of the saeguard that made the policy.

    Policies are equal when their canonical texts are. Raises `BadPolicy`.
    """

    name: str
    model: ModelPin
    tokenizer: str
    saes: tuple[SAEPin, ...]
    plan: Plan | None = None
    refusals: tuple[Refuse | Halt, ...] = ()
    on_error: OnError = "refuse"
    calibration: Mapping[str, Any] = field(default_factory=dict)
    serial: int = 0
    version: str = field(default_factory=_version)

    def __post_init__(self):
        check_text("the name of a policy", self.name, most=200)
        check_text("the version in a policy", self.version, most=200)
        check_digest("the tokenizer of a policy", self.tokenizer)
        for name, what, kinds in (("saes", "SAEPin", SAEPin), ("refusals", "Refuse or Halt", Refuse | Halt)):
            object.__setattr__(self, name, _several(name, getattr(self, name), what, kinds))
        if not isinstance(self.model, ModelPin) or not isinstance(self.plan, Plan | None):
            raise BadPolicy("a policy", "its model is no ModelPin, or its plan no Plan", "Use Policy.of.")
        if self.on_error not in get_args(OnError):
            raise BadPolicy(f"on_error={self.on_error!r:.60}", "there is no such way", 'Use "refuse" or "bypass".')
        if type(self.serial) is not int or not 0 <= self.serial <= MAX_SERIAL:
            raise BadPolicy(f"serial={self.serial!r:.60}", "it is not a whole number from 0 to 2^53", "Give a count.")
        object.__setattr__(self, "saes", tuple(sorted(self.saes, key=lambda pin: pin.name)))
        object.__setattr__(self, "refusals", _sharing(self.refusals, self.plan))
        object.__setattr__(self, "calibration", figures.frozen(self.calibration))
        self._check_whole()

    def _check_whole(self) -> None:
        """Refuse a policy that does nothing, that names what it does not have, or that could not be read back."""
        if self.plan is None and not self.refusals:
            raise BadPolicy(f"policy {self.name}", "it has neither a plan nor a refusal", "Give one of them.")
        names = [pin.name for pin in self.saes]
        if len(set(names)) != len(names):
            raise BadPolicy(f"policy {self.name}", "it has two SAEs of one name", "Give each a name of its own.")
        reasons = [stop.reason for stop in self.refusals]
        if len(set(reasons)) != len(reasons):
            raise BadPolicy(f"policy {self.name}", "two refusals have one reason", "Give each a reason of its own.")
        if missing := sorted({name for name in self._named() if name not in names}):
            raise BadPolicy(
                f"policy {self.name}", f"it names {', '.join(missing)[:200]}, which is none of its SAEs",
                f"Its SAEs: {', '.join(names)[:200] or 'none'}.",
            )  # fmt: skip
        try:
            if self.plan is not None:
                parse_json(self.plan.to_json())
        except PlanError as error:
            raise BadPolicy(f"the plan of policy {self.name}", error.found, error.proceed) from error
        if strict_json.rounded(_to_dict(self)) is not None:
            raise BadPolicy(f"policy {self.name}", policy_file.ROUNDED, "Give a smaller one; readers would round it.")
        if len(self.to_json()) > MAX_BYTES // 2 or strict_json.depth(_to_dict(self)) >= MAX_DEPTH:
            found = f"its text is longer than {MAX_BYTES // 2:,} bytes, or nests {MAX_DEPTH} levels"
            raise BadPolicy(f"policy {self.name}", found, "Make its plan or its gates smaller.")

    def _named(self) -> Iterator[str]:
        """The SAEs that rules, refusals and the leaves of their gates name."""
        owners: list[tuple[str, Gate | None]] = [(stop.sae, stop.gate) for stop in self.refusals]
        if self.plan is not None:
            owners += [(rule.sae, rule.gate) for rule in self.plan.rules]
        for sae, gate in owners:
            yield sae
            if gate is not None:
                yield from (leaf.sae for leaf in gate.leaves if leaf.sae is not None)

    @classmethod
    def of(
        cls,
        model: Model,
        tokenizer: Any,
        saes: SAEs,
        plan: Plan | None = None,
        *,
        name: str,
        refusals: Sequence[Refuse | Halt] = (),
        on_error: OnError = "refuse",
        calibration: Mapping[str, Any] | None = None,
        serial: int = 0,
        sources: Mapping[str, str] | None = None,
        model_name: str | None = None,
    ) -> "Policy":
        """A policy for these very objects; ``sources`` say of SAEs where `load_sae` finds them, else their names do.

        The weights are hashed, about one second per GB. Raises `BadPolicy`, `AmbiguousSAE`, `UnsupportedModel`.
        """
        where = sources or {}
        pins = [SAEPin.of(sae, name=own, source=where.get(own)) for own, sae in by_name(saes).items()]
        return cls(
            name=name, model=ModelPin.of(model, model_name), tokenizer=tokenizer_fingerprint(tokenizer),
            saes=tuple(pins), plan=plan, refusals=tuple(refusals), on_error=on_error,
            calibration=calibration or {}, serial=serial,
        )  # fmt: skip

    def check(self, model: nn.Module, tokenizer: Any, saes: SAEs) -> None:
        """Raise `PolicyMismatch`, which names all that differs, unless the policy was made for these objects.

        The model's weights are hashed, about one second per GB. Raises `BadPolicy` for a tokenizer without a
        fingerprint, `AmbiguousSAE`.
        """
        given = by_name(saes)
        differing = [
            *self.model.differences(model),
            *tokenizer_differences(self.tokenizer, tokenizer),
            *(found for pin in self.saes for found in pin.differences(given.get(pin.name))),
        ]
        if differing:
            raise PolicyMismatch(
                f"policy {self.name} on this model", "; ".join(differing),
                "Use what it was made for, or fit a policy for what is here: thresholds do not carry over.",
            )  # fmt: skip

    def to_json(self) -> str:
        """The canonical text: keys sorted, no spaces, ASCII."""
        return self._text

    @cached_property
    def _text(self) -> str:
        return canonical(_to_dict(self))

    def fingerprint(self) -> str:
        """SHA-256 of the canonical text."""
        return hashlib.sha256(self._text.encode()).hexdigest()

    @classmethod
    def from_json(cls, text: str) -> "Policy":
        """Read what `to_json` wrote, in whatever layout. Raises `BadPolicyFile`."""
        try:
            return cls(**_fields_of(policy_file.parse(text)))
        except BadPolicyFile:
            raise
        except SaeguardError as error:
            asked = f"a policy file: {error.asked}"  # may quote a value of any length
            raise BadPolicyFile(f"{asked:.500}", f"{error.found:.500}", error.proceed) from error

    def save(self, path: str | Path, *, key: SigningKey | None = None) -> None:
        """Write a file, signed with ``key`` where there is one, in place of what was there. Raises OSError."""
        policy_file.write(path, Envelope(self._text, None if key is None else key.sign(self._text)))

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        signed_by: Sequence[PublicKey] | None = None,
        at_least: int | None = None,
    ) -> "Policy":
        """Read a file that `save` wrote, if one of ``signed_by`` signed it.

        None asks for no signature, and one that is there then proves nothing; an empty list trusts nobody, and
        refuses every file. ``at_least`` is the lowest serial to accept. Raises `BadPolicyFile`, `BadSignature`,
        `StalePolicy`, OSError, and `MissingExtra` where signatures are asked for and cryptography is not installed.
        """
        envelope = policy_file.read(path)
        if signed_by is not None:
            demand(envelope.text, envelope.signature, signed_by)
        policy = cls.from_json(envelope.text)
        if envelope.signature is not None and policy.to_json() != envelope.text:
            raise policy_file.bad("it is signed, and not in the form that is written", "Sign it again.")
        if at_least is not None and policy.serial < at_least:
            raise StalePolicy(
                f"policy {policy.name} of serial {policy.serial}", f"at least {at_least} is demanded",
                "Use the release in force.",
            )  # fmt: skip
        return policy

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Policy) and self._text == other._text

    def __hash__(self) -> int:
        return hash(self._text)

    def __reduce__(self) -> Any:
        return Policy.from_json, (self._text,)


def _sharing(stops: tuple[Refuse | Halt, ...], plan: Plan | None) -> tuple[Refuse | Halt, ...]:
    """Stops with the very gates of the plan where they equal them: large ones are compared at every pass."""
    gates = [rule.gate for rule in (() if plan is None else plan.rules) if rule.gate is not None]
    known = lambda gate: next((one for one in gates if one == gate), gate)
    return tuple(replace(stop, gate=known(stop.gate)) for stop in stops)


def _several(name: str, given: Any, what: str, kinds: Any) -> tuple[Any, ...]:
    if not isinstance(given, list | tuple) or not all(isinstance(one, kinds) for one in given):
        raise BadPolicy(f"the {name} of a policy", f"they are not a tuple of {what}", "Use Policy.of.")
    return tuple(given)


def _to_dict(policy: Policy) -> dict[str, Any]:
    return {
        "saeguard": "policy", "schema": SCHEMA, "version": policy.version, "serial": policy.serial,
        "name": policy.name, "model": asdict(policy.model), "tokenizer": policy.tokenizer,
        "saes": {
            pin.name: {"source": pin.source, "fingerprint": pin.fingerprint, "site": str(pin.site)}
            for pin in policy.saes
        },
        "plan": None if policy.plan is None else json.loads(policy.plan.to_json()),
        "refusals": [_stop_to_dict(stop) for stop in policy.refusals],
        "on_error": policy.on_error, "calibration": thawed(policy.calibration),
    }  # fmt: skip


def _stop_to_dict(stop: Refuse | Halt) -> dict[str, Any]:
    kind = next(name for name, cls in STOPS.items() if type(stop) is cls)
    values = {entry.name: getattr(stop, entry.name) for entry in fields(stop)}
    site = None if stop.site is None else str(stop.site)
    return {"kind": kind} | values | {"gate": gate_to_dict(stop.gate), "site": site}


def _fields_of(document: Any) -> dict[str, Any]:
    """The arguments of a `Policy`. Raises `BadPolicyFile`, and what its parts raise."""
    if not isinstance(document, dict) or document.get("saeguard") != "policy":
        raise policy_file.bad('the key "saeguard": "policy" is missing', "Write it with Policy.save.")
    schema = document.get("schema")
    if type(schema) is not int or schema != SCHEMA:
        found = f"its schema is {schema!r:.60}, and this version of saeguard reads {SCHEMA}"
        raise policy_file.bad(found, "Update saeguard, or make the policy again with this version.")
    names = {entry.name for entry in fields(Policy)}
    check_keys("a policy", document, names | {"saeguard", "schema"}, {"name", "version", "model", "tokenizer", "saes"})
    values = {name: value for name, value in document.items() if name in names}
    check_keys("a policy's model", values["model"], {"name", "weights", "config"}, {"name", "weights", "config"})
    values["model"] = ModelPin(**values["model"])
    if not isinstance(values["saes"], dict) or not isinstance(values.get("refusals", []), list):
        raise policy_file.bad("its saes are no object, or its refusals no list", "Write it with Policy.save.")
    values["saes"] = tuple(_pin_from(name, entry) for name, entry in values["saes"].items())
    values["refusals"] = tuple(_stop_from(entry) for entry in values.get("refusals", []))
    if values.get("plan") is not None:
        values["plan"] = Plan.from_json(json.dumps(values["plan"]))
    return values


def _pin_from(name: str, entry: Any) -> SAEPin:
    check_keys("an SAE of a policy", entry, {"source", "fingerprint", "site"}, {"source", "fingerprint", "site"})
    return SAEPin(name, entry["source"], entry["fingerprint"], Site.parse(str(entry["site"])))


def _stop_from(entry: Any) -> Refuse | Halt:
    kind = entry.get("kind") if isinstance(entry, dict) else None
    if not isinstance(kind, str) or kind not in STOPS:
        raise policy_file.bad(f"a refusal is of the kind {kind!r:.60}", f"Kinds: {', '.join(STOPS)}.")
    cls = STOPS[kind]
    names = {field.name for field in fields(cls)}
    check_keys("a refusal", entry, names | {"kind"}, names - {"site"})
    values = {"site": None} | {name: value for name, value in entry.items() if name != "kind"}
    return cls(**values | {"gate": gate_from_dict(values["gate"])})
