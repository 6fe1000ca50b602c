# ruff: noqa: E501  one case of the table is one line
"""Every bad input ends in an error of its own class, whose text says how to go on."""

import copy
import inspect
import json
import re
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import DynamicCache

from saeguard import (
    Ablate,
    Add,
    AnyActive,
    Boosted,
    Clamp,
    Layout,
    Plan,
    Reduce,
    Reweight,
    Rule,
    Scale,
    Site,
    Splice,
    boosts_of,
    capture,
    errors,
    load_sae,
    self_check,
    steer,
)  # fmt: skip
from saeguard.engines import engine_for
from saeguard.exporting import constant_vectors
from saeguard.gates import token_rate
from saeguard.guarding.audit import AuditLog
from saeguard.guarding.calibrating import threshold
from saeguard.guarding.deadline import Deadline
from saeguard.guarding.guardrail import Guardrail
from saeguard.guarding.keys import AuditKey
from saeguard.guarding.policy import Policy
from saeguard.guarding.records import AuditRecord
from saeguard.guarding.signing import SigningKey
from saeguard.loaders.convert import convert
from saeguard.loaders.native import save_sae
from saeguard.models import find_demo, verify_sha256
from saeguard.plans import MAX_BYTES
from saeguard.scoring.kl_strength import kl_strength
from saeguard.scoring.table import ScoreTable
from saeguard.scoring.texts import Texts
from saeguard.training.corpus import read_corpus
from tests import laws, policies
from tests.counts import cases
from tests.lookalikes import LOOKALIKES
from tests.tiny import fresh_model, prompt, tiny_model, tiny_sae
from tests.traces import add_plan, edited, nothing_left
from tests.words import word_tokenizer

IDS = prompt(2, 5)
SAE = tiny_sae()
TEXT = json.loads(add_plan(1).to_json())
Bad = Callable[[Path], Any]
Case = tuple[type[errors.SaeguardError], str, Bad]


def run(plan: Any, saes: Any = SAE, model: nn.Module | None = None, ids: torch.Tensor = IDS, **options: Any) -> None:
    model = tiny_model() if model is None else model
    with nothing_left(model), steer(model, plan, saes=saes, **options), torch.no_grad():
        model(ids)


def rule(*latents: int, op: Any = None, **more: Any) -> Plan:
    return Plan((Rule("tiny", latents, op or Add(1.0), **more),))


def plan_text(**changes: Any) -> str:
    return json.dumps(TEXT | changes)


def rule_text(**changes: Any) -> str:
    return plan_text(rules=[TEXT["rules"][0] | changes])


def written(folder: Path, sae: Any = SAE, **changes: torch.Tensor) -> Path:
    return save_sae(replace(sae, **changes), folder / "sae.safetensors")


def meta_model() -> nn.Module:
    return copy.deepcopy(tiny_model()).to("meta")


def named(name: str) -> nn.Module:
    model = copy.deepcopy(tiny_model())
    model.name_or_path = model.config._name_or_path = name
    return model


def bloom() -> nn.Module:
    from transformers import AutoModelForCausalLM, BloomConfig

    return AutoModelForCausalLM.from_config(BloomConfig(vocab_size=61, hidden_size=32, n_layer=2, n_head=4)).eval()


def no_bos() -> Any:
    return SimpleNamespace(bos_token_id=None, name_or_path="words", all_special_ids=[])


def huge(dtype: torch.dtype) -> Bad:
    return lambda _: run(rule(1, op=Add(1e30)), model=copy.deepcopy(tiny_model()).to(dtype))


def in_thread(call: Callable[[], Any]) -> None:
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as pool:
        pool.submit(call).result()


def busy(_: Path) -> None:
    with capture(tiny_model(), "resid_post.0"):
        in_thread(lambda: tiny_model()(IDS))


def compiled(_: Path) -> None:
    run(add_plan(1), model=torch.compile(tiny_model(), backend="eager"))  # type: ignore[arg-type]


def deleted_log(folder: Path) -> None:
    log = AuditLog(folder / "a.jsonl")
    log.path.unlink()
    log.write(AuditRecord(request_id="r", decision="allow", reason_code="gate.quiet", guard_status="ran"))


def broken_model(_: Path) -> None:
    model = fresh_model()
    model.model.layers[1].mlp = nn.Linear(7, 7)
    with steer(model, add_plan(1), saes=SAE):
        pass


def foreign_log(folder: Path) -> None:
    (folder / "a.jsonl").write_text("2026-11-23 10:15 something happened\n")
    AuditLog(folder / "a.jsonl")


def bypassed(_: Path) -> None:
    with steer(tiny_model(), add_plan(1), saes=SAE):
        tiny_model().forward(IDS)


def embedded(_: Path) -> None:
    with steer(tiny_model(), add_plan(1), saes=SAE):
        tiny_model()(inputs_embeds=tiny_model().get_input_embeddings()(IDS))


def never(_: Path) -> None:
    with steer(tiny_model(), add_plan(1), saes=SAE):
        pass


def nested(_: Path) -> None:
    with capture(tiny_model(), "resid_post.0"), steer(tiny_model(), add_plan(1), saes=SAE):
        tiny_model()(IDS)
        run_again = steer(tiny_model(), add_plan(1), saes=SAE)
        run_again.__enter__()


def hash_mismatch(folder: Path) -> None:
    (folder / "x").write_bytes(b"x")
    verify_sha256(folder / "x", "0" * 64, what="wheel")


def corpus(folder: Path, text: str, tokenizer: Any, name: str = "a.jsonl") -> None:
    (folder / name).write_text(text)
    read_corpus([folder / name], tokenizer)


def two_loaders(folder: Path) -> None:
    from saeguard import loaders

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(loaders.LOADERS, "other", loaders.LOADERS["saeguard"])
        load_sae(written(folder))


def newer(folder: Path) -> None:
    path = written(folder)
    path.write_bytes(path.read_bytes().replace(b'\\"schema\\": 1', b'\\"schema\\": 9'))
    load_sae(path)


def pickled(folder: Path) -> Path:
    torch.save({"path": Path("x")}, folder / "sae.pt")
    return folder / "sae.pt"


def without_sites(folder: Path) -> Any:
    return load_sae(LOOKALIKES["circuit_tracer no config"].write(folder))


def without_scale(folder: Path) -> Any:
    return load_sae(LOOKALIKES["saelens average"].write(folder))


def gate_on_a_filled_cache(_: Path) -> None:
    cache = DynamicCache()
    with torch.no_grad():
        tiny_model()(IDS, past_key_values=cache)
        with steer(tiny_model(), rule(1, gate=token_rate((2,), 0.5)), saes=SAE):
            tiny_model()(IDS, past_key_values=cache)


def around_the_guardrail(_: Path) -> None:
    model, words = tiny_model(), word_tokenizer()
    with Guardrail.attach(model, Policy.of(model, words, SAE, add_plan(1), name="push"), tokenizer=words, saes=SAE):
        model(IDS)


def unsigned_policy(folder: Path) -> None:
    policies.example().save(folder / "p.json")
    Policy.load(folder / "p.json", signed_by=[policies.keys()[0].public])


def stale_policy(folder: Path) -> None:
    policies.example(serial=1).save(folder / "p.json")
    Policy.load(folder / "p.json", at_least=2)


CASES: dict[str, Case] = {
    "clamp as a vector": (errors.NotConstant, "Clamp depends on x.*Use Add", lambda _: constant_vectors(rule(1, op=Clamp(1.0, when="always")), SAE)),
    "unknown stream": (errors.SiteNotFound, "The streams are resid_pre, resid_mid, resid_post", lambda _: Site("resid", 1)),
    "site that is no site": (errors.SiteNotFound, "Write it as resid_post.12", lambda _: Site.parse("layer 3")),
    "negative layer": (errors.SiteNotFound, "a model with n blocks ends at layer n-1", lambda _: Site("resid_post", -1)),
    "layer out of range": (errors.SiteNotFound, "has layers 0-2. Use layer 2", lambda _: run(add_plan(1, site=Site("resid_post", 3)))),
    "capture out of range": (errors.SiteNotFound, "has layers 0-2. Use layer 2", lambda _: capture(tiny_model(), "mlp_out.7").__enter__()),
    "no site at all": (errors.SiteNotFound, "Give the rule a site", lambda _: run(rule(1), replace(SAE, site=None))),
    "width": (errors.WidthMismatch, "width 16, and resid_post.1 carries width 32.*another model", lambda _: run(rule(1), tiny_sae(d_in=16))),
    "another model by name": (errors.WrongModel, "trained on lab/other.*to try it on a relative, load it and set model=None", lambda _: run(rule(1), replace(SAE, model="lab/other"), named("lab/ours"))),
    "another model by shape": (errors.WrongModel, r"hidden_size 4096 \(here 32\). Use the model it was trained on", lambda _: run(rule(1), replace(SAE, manifest={"model_shape": {"hidden_size": 4096}}))),
    "latent out of range": (errors.LatentOutOfRange, r"latents 0\.\.47. Negative indices are not accepted", lambda _: run(rule(48))),
    "watched latent out of range": (errors.LatentOutOfRange, r"latents 0\.\.47", lambda _: run(rule(1, trigger=AnyActive((99,))))),
    "negative latent": (errors.BadRule, "Latents are integers from 0 upwards", lambda _: rule(-1)),
    "duplicate latents": (errors.BadRule, r"\[3\] are there more than once. Name each latent once", lambda _: rule(3, 3)),
    "empty plan": (errors.EmptyPlan, "Leave a row alone with None", lambda _: Plan(())),
    "NaN amount": (errors.BadRule, "nan is not a finite number. Amounts are finite", lambda _: Add(float("nan"))),
    "infinite factor": (errors.BadRule, "inf is not a finite number", lambda _: Scale(float("inf"))),
    "clamp mode": (errors.BadRule, 'Use "always" or "active"', lambda _: Clamp(1.0, when="sometimes")),  # type: ignore[arg-type]
    "unit": (errors.BadRule, "Units: activation, max, norm", lambda _: Add(1.0, unit="percent")),  # type: ignore[arg-type]
    "phase": (errors.BadRule, "Phases: all, prompt, generated", lambda _: rule(1, phase="start")),
    "positions backwards": (errors.BadRule, "Give start <= stop", lambda _: rule(1, start=5, stop=2)),
    "amounts of another number": (errors.BadRule, "Give as many, in the order of latents", lambda _: rule(1, 2, op=Add((1.0, 2.0, 3.0)))),
    "op that is none": (errors.BadRule, "Ops: clamp, scale, add", lambda _: rule(1, op="boost")),
    "prompt_tokens": (errors.BadRule, "Give one int, or one per row", lambda _: run(rule(1), prompt_tokens=-1)),
    "overlap in a plan": (errors.OverlappingRules, "give both rules different priorities", lambda _: Plan((*add_plan(1).rules, *add_plan(1, amount=2.0).rules))),
    "overlap of nested blocks": (errors.OverlappingRules, "Put both into one plan", nested),
    "newer plan": (errors.UnknownSchema, "schema 2.*reads schema 1. Update saeguard", lambda _: Plan.from_json(plan_text(schema=2))),
    "unknown op": (errors.UnknownOp, "Known: clamp, scale, add", lambda _: Plan.from_json(rule_text(op={"kind": "rotate"}))),
    "unknown trigger": (errors.UnknownOp, "Known: any_active", lambda _: Plan.from_json(rule_text(trigger={"kind": "moon"}))),
    "no plan": (errors.BadPlanFile, "Write it with Plan.to_json", lambda _: Plan.from_json("{}")),
    "unknown keys": (errors.BadPlanFile, r"unknown keys \['colour'\]", lambda _: Plan.from_json(rule_text(colour=1))),
    "key twice": (errors.BadPlanFile, "a key stands twice", lambda _: Plan.from_json('{"saeguard":"plan","saeguard":"plan"}')),
    "NaN in a plan": (errors.BadPlanFile, "NaN is not a number", lambda _: Plan.from_json('{"saeguard":NaN}')),
    "deep plan": (errors.BadPlanFile, "it is not JSON|nests deeper", lambda _: Plan.from_json("[" * 100_000 + "]" * 100_000)),
    "oversized plan": (errors.BadPlanFile, f"larger than {MAX_BYTES} bytes. Split", lambda _: Plan.from_json(" " * (MAX_BYTES + 1))),
    "unstable edit in float16": (errors.UnstableEdit, "Use smaller amounts, or a dtype with more range", huge(torch.float16)),
    "unstable edit in bfloat16": (errors.UnstableEdit, "nothing was sampled", lambda _: run(rule(1, 2, op=Add(3e38)), model=copy.deepcopy(tiny_model()).bfloat16())),
    "meta device": (errors.MetaDevice, "Load it with from_pretrained", lambda _: run(add_plan(1), model=meta_model())),
    "rows": (errors.RowsMismatch, "3 plans.*4 rows. Give as many plans as rows", lambda _: run([add_plan(1)] * 3, ids=prompt(4, 5))),
    "boost of another base": (errors.BoostMismatch, "trained on another base.*or train a boost of this one", lambda _: Boosted(replace(SAE, b_dec=SAE.b_dec + 1), boosts_of(laws.with_boosts(SAE, [2])))),
    "two SAEs of one name": (
        errors.AmbiguousSAE,
        "Give them as a mapping",
        lambda _: run(rule(1), [SAE, tiny_sae(seed=9)]),
    ),
    "no BOS for this SAE": (
        errors.MissingBOS,
        "Use the model's own tokenizer",
        lambda folder: run(rule(1), replace(SAE, manifest={"bos": True}), tokenizer=no_bos()),
    ),
    "no BOS": (errors.MissingBOS, "Set tokenizer.bos_token", lambda folder: corpus(folder, "", no_bos())),
    "no site table": (errors.UnsupportedModel, r"'bloom'.*Pass layout=Layout\(blocks=", lambda _: run(add_plan(1), model=bloom())),
    "module of no library": (errors.UnsupportedModel, r"Pass layout=Layout\(blocks=", lambda _: run(add_plan(1), model=nn.Linear(2, 2))),
    "wrong layout": (errors.SiteNotFound, "there is no list of blocks at transformer.blocks", lambda _: run(add_plan(1), model=bloom(), layout=Layout("transformer.blocks"))),
    "boosts that are not there": (errors.OpMismatch, "Boost it first", lambda _: run(rule(op=Splice("boosted")))),
    "a rank of more than there are": (errors.OpMismatch, "Give top_k from 1 to 48", lambda _: run(rule(1, op=Reweight(1.0, mode="swap", top_k=49)))),
    "dense op on some latents": (errors.NotSliceable, "load the SAE without latents=", lambda _: run(rule(op=Splice()), SAE.narrow([1]))),
    "two reconstructions": (errors.OverlappingRules, "other ops can stand beside it", lambda _: Plan((Rule("a", (), Splice()), Rule("a", (), Splice("kept"))))),
    "reweight and another op": (errors.OverlappingRules, "plans of different rows", lambda _: Plan((Rule("a", (), Reweight(1.0, mode="swap")), Rule("a", (1,), Add(1.0))))),
    "no maximum": (errors.MissingMaximum, "Give amounts in activation units", lambda _: run(rule(1, op=Add(1.0, unit="max")), replace(SAE, maximum=None))),
    "phase unknown": (errors.PhaseUnknown, "prompt_tokens=n", lambda _: run(rule(1, phase="generated"))),
    "tokens unknown": (errors.TokensUnknown, "Pass input_ids, or write special=True", embedded),
    "never ran": (errors.PlanNeverRan, "Call the model inside the block", never),
    "bypass": (errors.GuardNotApplied, "Call the model itself", bypassed),
    "busy": (errors.ModelBusy, r"Start the thread with run\.bind", busy),
    "compiled": (errors.CompiledModel, "Steer the original model first", compiled),
    "beams captured": (errors.UnsupportedMode, "Generate without dola_layers", lambda _: run_generate(dola_layers="low")),
    "self-check on a few tokens": (errors.SelfCheckFailed, "Give a few hundred tokens", lambda _: self_check(tiny_model(), tiny_sae(), ids=prompt(1, 9))),
    "score that is not there": (errors.ScoreMismatch, "Compute it first", lambda _: ScoreTable("a", "b", 3, {}, {}).column("x")),
    "all of some latents": (errors.NotSliceable, r"only 1 of them were read", lambda _: tiny_sae().narrow([1]).encode(torch.zeros(1, 32))),
    "decoding without x": (errors.NotSliceable, r"sae.decode\(f, x\)", lambda _: replace(SAE, norm="layer_norm").decode(torch.zeros(1, 48))),
    "no such SAE": (errors.UnsupportedFormat, "no such file or folder. Shipped are:", lambda folder: load_sae(folder / "nothing")),
    "SAE of a newer schema": (errors.UnsupportedFormat, "its schema is 9, this version reads 1. Update saeguard", newer),
    "unsupported file": (errors.UnsupportedFormat, "no loader recognises it.*Families of this version", lambda folder: load_sae(folder)),
    "two loaders": (errors.UnsupportedFormat, "both recognise it", two_loaders),
    "NaN weights": (errors.BrokenFile, "W_dec holds NaN or infinity. Fetch or export", lambda folder: load_sae(written(folder, W_dec=SAE.W_dec * float("nan")))),
    "orientation": (errors.BrokenFile, r"Check the orientation: W_enc is \(d_in, d_sae\)", lambda _: replace(SAE, W_dec=SAE.W_enc)),
    "top_k": (errors.BrokenFile, "Give 1..48", lambda _: replace(SAE, activation="topk", threshold=None, top_k=0)),
    "pickle that names code": (errors.UnsafePickle, "pathlib", lambda folder: load_sae(pickled(folder))),
    "transcoder without sites": (errors.MissingSite, "site", without_sites),
    "no scale": (errors.MissingScale, "input_scale", without_scale),
    "conversion without memory": (errors.ConversionStopped, "Allow more with memory_bytes", lambda folder: convert(LOOKALIKES["goodfire"].write(folder), folder / "out", memory_bytes=1)),
    "hash": (errors.HashMismatch, "Nothing of it was used", hash_mismatch),
    "no such model": (errors.ModelUnavailable, "Give one of these names, or the path", lambda _: find_demo("gpt-9")),
    "record that contradicts itself": (errors.BadRecord, 'reason_code that it went by the guard: "bypass."', lambda _: AuditRecord(request_id="r", decision="allow", reason_code="gate.quiet", guard_status="not_run")),
    "short audit key": (errors.BadAuditKey, "16 random bytes or more", lambda _: AuditKey(b"short")),
    "audit log in no folder": (errors.AuditUnavailable, "it cannot be written", lambda folder: AuditLog(folder / "none" / "a.jsonl")),
    "audit log that was deleted": (errors.AuditFailed, "Refuse the request, mend the cause", deleted_log),
    "policy that does nothing": (errors.BadPolicy, "it has neither a plan nor a refusal. Give one", lambda _: policies.example(plan=None, refusals=())),
    "policy file of nothing": (errors.BadPolicyFile, "it is not JSON.*Restore the file", lambda _: Policy.from_json("")),
    "policy without a signature": (errors.BadSignature, "saeguard policy sign", unsigned_policy),
    "policy that was replaced": (errors.StalePolicy, "Use the release in force", stale_policy),
    "key in no file": (errors.BadSigningKey, "saeguard policy keygen", lambda folder: SigningKey.from_file(folder / "none")),
    "policy of another model": (errors.PolicyMismatch, "the model's weights are not those of tiny.*thresholds do not carry over", lambda _: policies.example().check(fresh_model(seed=1), word_tokenizer(), SAE)),
    "gate on a cache that it has not seen": (errors.GateFailed, "Begin with an empty cache inside the block", gate_on_a_filled_cache),
    "model that cannot make a pass": (errors.CanaryFailed, "Mend the model; canary=False enters without", broken_model),
    "call that hangs": (errors.GuardTimeout, "find out what hangs", lambda _: Deadline(0.01).run(lambda: time.sleep(0.3))),
    "call around a guardrail": (errors.UnguardedCall, r"Call guard.generate", around_the_guardrail),
    "strength out of reach": (errors.StrengthUnreachable, "Ask for another KL", lambda _: kl_strength(tiny_model(), word_tokenizer(), SAE, rule(1, op=Reduce(1.0)).rules[0], Texts.from_ids(IDS, special_ids=(1,)), kappa=1e6)),
    "threshold from too few rows": (errors.CalibrationRefused, "Give at least 299", lambda _: threshold([0.0, 1.0])),
    "audit log of another kind": (errors.AuditTampered, "start a new log under another name", foreign_log),
    "no training text": (errors.TrainError, "there is no document in them. Give .txt files", lambda folder: corpus(folder, "", SimpleNamespace(bos_token_id=1))),
}  # fmt: skip


def run_generate(**options: Any) -> None:
    with steer(tiny_model(), add_plan(1), saes=SAE):
        tiny_model().generate(IDS, max_new_tokens=2, **options)


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_refused_with_the_way_out(name, tmp_path):
    error, text, bad = CASES[name]
    with pytest.raises(error, match=re.compile(text, re.DOTALL)) as caught:
        bad(tmp_path)

    found = caught.value
    assert type(found) is error
    assert found.asked
    assert found.found
    assert str(found) == f"{found.asked}: {found.found}. {found.proceed}"
    assert found.proceed.strip().endswith((".", "?")), "the way out is one or more sentences"


ELSEWHERE = {"MissingExtra"}
"""Classes whose tests stand with the part of the package that raises them."""


def test_every_class_of_the_tree_is_raised_here():
    classes = [c for _, c in inspect.getmembers(errors, inspect.isclass) if issubclass(c, errors.SaeguardError)]
    leaves = {c for c in classes if not any(other is not c and issubclass(other, c) for other in classes)}

    assert {c.__name__ for c in leaves} - ELSEWHERE == {error.__name__ for error, _, _ in CASES.values()}


def test_model_without_a_site_table_is_steered_through_a_layout_of_the_callers():
    model, layout = bloom(), Layout("transformer.h", {"mlp_out": ("mlp", "output")})
    plain = model(IDS).logits
    with steer(model, add_plan(1), saes=SAE, layout=layout) as run:
        steered = model(IDS).logits

    assert edited(run) == [(((1, 2, 3, 4),) * 2,)]
    assert not torch.equal(steered, plain)
    assert engine_for(model, layout).resolve(Site("mlp_out", 0)).path == "transformer.h.0.mlp"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("site", ["resid_post.0", "mlp_out.1", "resid_pre.2"])
def test_edit_that_overflows_is_refused_before_anything_is_sampled(dtype, site):
    model = fresh_model(dtype=dtype)
    sampled: list[int] = []
    plan = Plan((Rule("tiny", (1, 2), Add(3.4e38), site=Site.parse(site)),))
    with pytest.raises(errors.UnstableEdit, match=site), steer(model, plan, saes=replace(SAE, W_dec=SAE.W_dec * 4)):
        model.generate(IDS, max_new_tokens=3, stopping_criteria=[lambda ids, scores, **_: bool(sampled.append(1))])

    assert not sampled


def test_nan_that_the_model_makes_itself_is_not_called_an_edit():
    model = fresh_model()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.fill_(float("nan"))
        with steer(model, Plan((Rule("tiny", (), Ablate()),)), saes=SAE) as run:
            logits = model(IDS).logits

    assert logits.isnan().any()
    assert run.report.rules[0].tokens_edited == 0


def documented(load: Callable[[], Any]) -> bool:
    """Whether it worked, or was refused by name; anything else goes up."""
    try:
        load()
    except errors.SaeguardError:
        return False
    return True


def test_truncated_plan_files_are_refused_at_every_length():
    text = Plan((Rule("tiny", (1, 2), Clamp(-2.0, when="active"), trigger=AnyActive((3,))),), name="x").to_json()

    assert not any(documented(lambda n=n: Plan.from_json(text[:n])) for n in range(len(text)))


@pytest.mark.usefixtures("without_type_checks")
def test_damaged_plan_files_never_raise_anything_undocumented():
    text, generator = add_plan(1, 2).to_json(), torch.Generator().manual_seed(0)
    for _ in range(cases(20_000)):
        damaged = bytearray(text.encode())
        damaged[int(torch.randint(len(damaged), (1,), generator=generator))] = int(
            torch.randint(256, (1,), generator=generator)
        )
        documented(lambda found=bytes(damaged): Plan.from_json(found))


def test_truncated_sae_files_are_refused_at_every_length(tmp_path):
    path = written(tmp_path)
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    for n in [*range(0, header + 8, 5), *range(header + 8, len(whole), len(whole) // 40), len(whole) - 1]:
        path.write_bytes(whole[:n])

        assert not documented(lambda: load_sae(path)), f"{n} of {len(whole)} bytes"


@pytest.mark.usefixtures("without_type_checks")
def test_damaged_sae_headers_never_raise_anything_undocumented(tmp_path):
    path = written(tmp_path)
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    generator = torch.Generator().manual_seed(0)
    for _ in range(cases(20_000)):
        place, byte = (int(torch.randint(n, (1,), generator=generator)) for n in (header, 256))
        path.write_bytes(whole[:place] + bytes([byte]) + whole[place + 1 :])
        documented(lambda: load_sae(path))


@pytest.mark.parametrize("entry", [
    {"dtype": "F32", "shape": [-1, 2]},
    None, 3, [], {"dtype": "F32", "shape": "ab"},
])  # fmt: skip
def test_sae_header_with_an_entry_of_another_kind_is_refused(entry, tmp_path):
    check_header(tmp_path, lambda header: header | {"W_enc": entry})


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize("change", [
    {"name": None}, {"site": "x.1"}, {"top_k": "3", "activation": "topk"}, {"site": 7}, {"manifest": []}, {"model": 5},
])  # fmt: skip
def test_sae_header_with_a_field_of_another_kind_is_refused(change, tmp_path):
    def changed(header: dict[str, Any]) -> dict[str, Any]:
        meta = json.loads(header["__metadata__"]["saeguard"]) | change
        return header | {"__metadata__": {"saeguard": json.dumps(meta)}}

    check_header(tmp_path, changed)


def check_header(folder: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    path = written(folder)
    whole = path.read_bytes()
    n = int.from_bytes(whole[:8], "little")
    header = json.dumps(change(json.loads(whole[8 : 8 + n]))).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + whole[8 + n :])

    with pytest.raises(errors.SaeguardError):
        load_sae(path)
