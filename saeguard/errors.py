"""Everything saeguard raises on purpose.

    SaeguardError
    |- PlanError              the plan contradicts itself or its file
    |  |- EmptyPlan             no rule in it
    |  |- BadRule               a rule's field is out of its domain (amounts, latents, phases, units)
    |  |- OverlappingRules      two rules set the same latent of the same row
    |  |- UnknownSchema         the file was written by a newer saeguard
    |  |- UnknownOp             the file names an op that this version does not have
    |  |- BadPlanFile           the file is not a plan: truncated, oversized, not JSON, unknown fields
    |  '- NotConstant           more than one vector added everywhere, which a file of vectors cannot say
    |- BindError              the plan does not fit this model or this batch
    |  |- UnsupportedModel      no site table for this architecture, or a wrapper was given
    |  |- CompiledModel         torch.compile traced this model before the hooks were there
    |  |- MetaDevice            the model has no weights
    |  |- SiteNotFound          unknown stream, layer out of range
    |  |- WidthMismatch         the SAE reads vectors of another width
    |  |- WrongModel            the SAE's manifest names another model
    |  |- SelfCheckFailed       the SAE does not do on this model what an SAE does
    |  |- AmbiguousSAE          two SAEs of one name were given
    |  |- BoostMismatch         a boost does not belong to this base, or was given twice
    |  |- LatentOutOfRange      the SAE has fewer latents than that
    |  |- NotSliceable          what was asked needs more than was given: all latents, or x itself
    |  |- OpMismatch            the op asks for what this SAE does not have: boosts, pre-activations
    |  |- MissingMaximum        unit="max" without recorded maximum activations
    |  |- RowsMismatch          one plan per row, but another number of rows
    |  '- MissingBOS            the SAE wants a BOS token and the tokenizer has none
    |- LoadError              weights could not be read
    |  |- UnsupportedFormat     no loader, or more than one, recognises the files
    |  |- BrokenFile            truncated, wrong shapes, wrong dtypes, not finite
    |  |- MissingSite           the files do not say where the SAE reads or writes
    |  |- MissingScale          the files do not say by what their input is scaled
    |  |- ConversionStopped     a conversion ran into its limits of memory or time
    |  |- HashMismatch          the bytes are not the pinned ones
    |  |- UnsafePickle          a pickle that names code, which is never run
    |  '- ModelUnavailable      neither the hub nor the package index has the model for us
    |- MissingExtra           an optional package is not installed
    |- TrainError             training cannot start or go on
    |- ScoreMismatch          scores that do not belong together, or are not there
    |- StrengthUnreachable    no amount of an op moves the model's predictions as far as was asked
    |- CalibrationRefused     the rows cannot support the threshold that was asked for
    |- AuditError             a request cannot go on record, or the record is not what was written
    |  |- BadRecord             a field is out of its domain, or fields contradict each other
    |  |- BadAuditKey           the key is missing, too short, or others may read it
    |  |- AuditUnavailable      there is no file that can be opened as this log
    |  |- AuditFailed           a record could not be written, so its request must not be answered
    |  '- AuditTampered         the log is not the chain that was written
    |- PolicyError            a guardrail's policy is not to be trusted, or not for this model
    |  |- BadPolicy             a field is out of its domain, or names an SAE that the policy does not have
    |  |- BadPolicyFile         the file is not a policy: truncated, oversized, not JSON, unknown fields
    |  |- BadSignature          not signed, changed since, or signed by somebody who is not trusted
    |  |- StalePolicy           a policy that has been replaced is played back
    |  |- BadSigningKey         a key is missing, is none, or others may read it
    |  '- PolicyMismatch        the model, the tokenizer or an SAE is not the one it was made for
    '- GuardError             the model may have run without its edits
       |- GuardNotApplied       a forward pass went by and an edit did not run
       |- CanaryFailed          a probe, tried before a block began, did not arrive as it should
       |- PlanNeverRan          the block ended and the model was never called
       |- UnstableEdit          an edit produced NaN or infinity
       |- GateFailed            a gate has no score, or has not seen what it decides on
       |- UnguardedCall         a guarded model was called around its guardrail
       |- GuardTimeout          a guarded call had not ended at its deadline
       |- PhaseUnknown          prompt and generated tokens cannot be told apart here
       |- TokensUnknown         padding, special tokens or positions cannot be known here
       |- UnsupportedMode       an execution mode whose edits cannot be exact
       '- ModelBusy            another thread or task steers this model

Every message has three parts: what was asked, what was found, how to proceed.
"""


class SaeguardError(Exception):
    """Base of every error that saeguard raises on purpose.

    ``asked`` and ``found`` are clauses without a full stop; ``proceed`` is one or more sentences.
    """

    def __init__(self, asked: str, found: str, proceed: str):
        super().__init__(asked, found, proceed)
        self.asked, self.found, self.proceed = asked, found, proceed

    def __str__(self) -> str:
        return f"{self.asked}: {self.found}. {self.proceed}"


class PlanError(SaeguardError):
    """The plan contradicts itself or its file."""


class EmptyPlan(PlanError):
    """A plan without rules; a row without a plan is written ``None``."""


class BadRule(PlanError):
    """A field of a rule, op or trigger is out of its domain."""


class OverlappingRules(PlanError):
    """Two rules set the same latent of the same row at the same site."""


class UnknownSchema(PlanError):
    """The plan file has a schema version that this saeguard does not read."""


class UnknownOp(PlanError):
    """The plan file names an op or trigger that this saeguard does not have."""


class BadPlanFile(PlanError):
    """The text is not a plan: truncated, oversized, not JSON, or with unknown fields."""


class NotConstant(PlanError):
    """A plan does more than add one vector at every token, so that no file of vectors can stand for it."""


class BindError(SaeguardError):
    """The plan does not fit this model or this batch."""


class UnsupportedModel(BindError):
    """No site table for this architecture, or a wrapper was given instead of the model."""


class CompiledModel(BindError):
    """torch.compile has traced this model before the hooks were placed, so they would not run."""


class MetaDevice(BindError):
    """Some parameters of the model live on the meta device: there is nothing to steer."""


class SiteNotFound(BindError):
    """The model has no such stream or layer."""


class WidthMismatch(BindError):
    """The SAE reads vectors of another width than the site carries."""


class WrongModel(BindError):
    """The SAE's manifest names another model or another site."""


class SelfCheckFailed(BindError):
    """On this model and site the SAE does not reconstruct as it should."""


class AmbiguousSAE(BindError):
    """Two different SAEs of one name were given, and rules find their SAE by name."""


class BoostMismatch(BindError):
    """A boost was trained on another base, was given twice, or is none."""


class LatentOutOfRange(BindError):
    """A latent index is not in 0..d_sae-1."""


class NotSliceable(BindError):
    """What was asked of an SAE needs latents that were not read, or x itself."""


class OpMismatch(BindError):
    """A dense op asks for something that this SAE does not have, such as boosts or pre-activations."""


class MissingMaximum(BindError):
    """``unit="max"`` needs maximum activations that this SAE does not record."""


class RowsMismatch(BindError):
    """There is one plan per row, and the batch has another number of rows."""


class MissingBOS(BindError):
    """The SAE was trained behind a BOS token and this tokenizer has none."""


class LoadError(SaeguardError):
    """Weights could not be read."""


class UnsupportedFormat(LoadError):
    """No loader, or more than one, recognises the source."""


class BrokenFile(LoadError):
    """A weights file is truncated, has wrong shapes or dtypes, or holds non-finite numbers."""


class MissingSite(LoadError):
    """The files do not say where the SAE reads or writes, and nobody else did."""


class MissingScale(LoadError):
    """The files ask for a scaled input and do not say by what."""


class ConversionStopped(LoadError):
    """A conversion ran into its limits of memory or time, or died."""


class HashMismatch(LoadError):
    """The bytes that arrived are not the pinned ones."""


class UnsafePickle(LoadError):
    """A pickle names code, which saeguard never runs."""


class ModelUnavailable(LoadError):
    """Neither the hub nor the package index could give the model."""


class MissingExtra(SaeguardError):
    """Something optional that was asked for needs a package that is not installed."""


class TrainError(SaeguardError):
    """Training cannot start or go on."""


class ScoreMismatch(SaeguardError):
    """Scores of different SAEs, of the wrong number of latents, or that were not computed."""


class StrengthUnreachable(SaeguardError):
    """No amount of an op moves the model's predictions as far as was asked."""


class CalibrationRefused(SaeguardError):
    """The rows cannot support the threshold that was asked for: too few, or not scores."""


class AuditError(SaeguardError):
    """A request cannot go on record, or the record is not what was written."""


class BadRecord(AuditError):
    """A field of an audit record is out of its domain, or its fields contradict each other."""


class BadAuditKey(AuditError):
    """The key of an audit log is missing, too short, or readable by others."""


class AuditUnavailable(AuditError):
    """There is no file at this place that can be opened as an audit log."""


class AuditFailed(AuditError):
    """A record could not be written, so its request must not be answered."""


class AuditTampered(AuditError):
    """An audit log is not the chain that was written, or ends before a head that is known."""


class PolicyError(SaeguardError):
    """The policy of a guardrail is not to be trusted, or not for this model."""


class BadPolicy(PolicyError):
    """A field of a policy is out of its domain, or names an SAE that the policy does not have."""


class BadPolicyFile(PolicyError):
    """The file is not a policy: truncated, oversized, not JSON, with unknown fields, or signed and spelled anew."""


class BadSignature(PolicyError):
    """A policy has to be signed and is not, was changed since, or was signed by somebody who is not trusted."""


class StalePolicy(PolicyError):
    """The policy's serial is lower than demanded: it has been replaced, and is played back."""


class BadSigningKey(PolicyError):
    """A key of a policy's signature is missing, is none, or others than its owner may read it."""


class PolicyMismatch(PolicyError):
    """The model, the tokenizer or an SAE is not the one that the policy was made for."""


class GuardError(SaeguardError):
    """The model may have run without its edits."""


class GuardNotApplied(GuardError):
    """A forward pass went by and an edit that it had to make did not run."""


class CanaryFailed(GuardError):
    """Two passes of a few tokens, made before a block began, show that edits of this model go wrong."""


class PlanNeverRan(GuardError):
    """The block ended and the model was never called inside it."""


class UnstableEdit(GuardError):
    """An edit produced NaN or infinity; nothing was sampled from it."""


class GateFailed(GuardError):
    """A gate's score is NaN, or it has not seen all tokens of the row that it decides on."""


class UnguardedCall(GuardError):
    """A model under a guardrail was called without the guardrail saying which policy each row is under."""


class GuardTimeout(GuardError):
    """A guarded call had not come back and gone on record when its time was up."""


class PhaseUnknown(GuardError):
    """A rule depends on prompt or generated tokens, and this call does not tell them apart."""


class TokensUnknown(GuardError):
    """Padding, special tokens or absolute positions of this call cannot be known."""


class UnsupportedMode(GuardError):
    """An execution mode whose edits cannot be exact."""


class ModelBusy(GuardError):
    """Another thread or task steers this model, or a block is open on a part of it."""
