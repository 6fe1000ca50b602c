"""The ledger's account does not depend on when it is put together."""

import torch

from saeguard import Add, AtLeast, Plan, Rule, ledger, steer
from tests.tiny import prompt, tiny_model, tiny_sae

SAE = tiny_sae()
PLAN = Plan((Rule(SAE.name, (1, 5), AtLeast(2.0)), Rule(SAE.name, (7,), Add(1.0), phase="generated", first=9)))


def account(**options):
    with steer(tiny_model(), [PLAN, None], saes=SAE) as run:
        tiny_model().generate(prompt(2, 6), max_new_tokens=16, min_new_tokens=16, do_sample=False, **options)
    return run.report


def test_ledger_put_together_every_other_pass_gives_the_same_report(monkeypatch):
    late = account()
    monkeypatch.setattr(ledger, "COMPACT_EVERY", 2)
    early = account()

    assert early == late


def test_ledger_put_together_early_forgets_what_is_computed_again(monkeypatch):
    cached = account()
    monkeypatch.setattr(ledger, "COMPACT_EVERY", 2)
    uncached = account(use_cache=False)

    assert [r.edited_positions for r in uncached.rules] == [r.edited_positions for r in cached.rules]
    assert [r.tokens_seen for r in uncached.rules] == [r.tokens_seen for r in cached.rules]


def test_ledger_reports_the_size_of_the_change_that_was_made():
    model, ids = tiny_model(), prompt(1, 6)
    with steer(model, PLAN, saes=SAE, prompt_tokens=0) as run, torch.no_grad():
        model(ids, use_cache=False)

    expected = float(torch.linalg.vector_norm(SAE.W_dec[7]))
    assert abs(run.report.rules[1].mean_delta - expected) < 1e-5
