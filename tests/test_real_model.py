"""Identity, phase and rows once more, on SmolLM2-135M-Instruct with real text and its own chat template.

Nothing here is skipped: without the model these tests fail with `ModelUnavailable`, which says how to get it. The SAE
is the first shipped one for this model, or a random one whose latents fire on about a third of the tokens.
"""

from dataclasses import replace
from itertools import pairwise
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from saeguard import SAE, Add, AnyActive, AtLeast, Clamp, Plan, Rule, Scale, Site, capture, load_model, load_sae, steer
from saeguard.loaders import shipped
from tests import laws, tiny

NAME = "smollm2-135m-instruct"
RANDOM_SITE = Site("resid_post", 15)
QUESTIONS = ("What is the capital of France?", "Name three rivers in Africa.", "Why is the sky blue, and the sea too?")


class Real(NamedTuple):
    model: Any
    tokenizer: Any
    sae: SAE
    latents: tuple[int, ...]
    """Six that fire often on the prompts."""

    def ids(self, *questions: str) -> tuple[Tensor, Tensor]:
        """Chat prompts, padded on the left, and their mask."""
        texts = [
            self.tokenizer.apply_chat_template(
                [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
            )
            for question in questions
        ]
        batch = self.tokenizer(texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
        return batch["input_ids"], batch["attention_mask"]


@pytest.fixture(scope="module")
def real() -> Real:
    model, tokenizer = load_model(NAME)
    names = [name for name in shipped() if name.startswith(NAME)]
    sae = load_sae(names[0]) if names else tiny.tiny_sae(d_in=576, activation="relu", name="random", site=RANDOM_SITE)
    assert sae.site is not None
    bare = Real(model, tokenizer, sae, ())
    ids, mask = bare.ids(*QUESTIONS)
    with torch.no_grad(), capture(model, sae.site) as tape:
        model(ids, attention_mask=mask)
    row = tape.real(sae.site)[0] & (ids[0] > 2)  # one row, as all begin with the same system prompt; no special tokens
    sae = sae if names else made_to_fire(sae, tape[sae.site][0, row])
    rates = (sae.encode(tape[sae.site][0, row]) > 0).float().mean(0)
    return bare._replace(sae=sae, latents=tuple((rates - 0.4).abs().argsort()[:6].tolist()))


def made_to_fire(sae: SAE, x: Tensor) -> SAE:
    """Of unit norms, and with biases at which each latent fires on a third of the tokens."""
    unit = lambda w, dim: w / torch.linalg.vector_norm(w, dim=dim, keepdim=True)
    W_enc = unit(sae.W_enc, 0)
    pre = (x @ W_enc).sort(dim=0).values
    third = 2 * len(pre) // 3
    between = (pre[third] + pre[third + 1]) / 2
    return replace(sae, W_enc=W_enc, b_enc=-between, W_dec=unit(sae.W_dec, 1))


def rule(real: Real, op: Any, *, of: slice = slice(0, 3), watch: slice | None = None, **parts: Any) -> Rule:
    """A rule on the ``of``-th of the latents that fire, triggered by the ``watch``-th of them."""
    trigger = AnyActive(real.latents[watch]) if watch is not None else None
    return Rule(real.sae.name, real.latents[of], op, **({"trigger": trigger} | parts))


def full_pass(real: Real, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        return real.model(ids, attention_mask=mask, use_cache=False).logits


def test_generation_under_edits_that_change_nothing_is_bit_identical(real):
    plan = Plan(
        (
            rule(real, Add(0.0), of=slice(0, 1), special=True),
            rule(real, Scale(1.0), of=slice(1, 3), special=True),
            rule(real, AtLeast(-1.0), of=slice(3, 4), special=True),
            rule(real, Clamp(9.0, when="always"), of=slice(4, 6), special=True, trigger=AnyActive((0, 1), 1e30)),
            rule(real, Clamp(9.0, when="always"), of=slice(0), special=True),
        )
    )
    ids, mask = real.ids(*QUESTIONS[:2])
    options: Any = {"attention_mask": mask, "max_new_tokens": 4, "do_sample": False, "output_logits": True}

    plain = real.model.generate(ids, return_dict_in_generate=True, **options)
    with steer(real.model, plan, saes=real.sae):
        steered = real.model.generate(ids, return_dict_in_generate=True, **options)

    assert torch.equal(plain.sequences, steered.sequences)
    assert all(laws.same_bits(a, b) for a, b in zip(plain.logits, steered.logits, strict=True))


@pytest.mark.parametrize(
    "parts",
    [
        {"op": Clamp(-20.0, when="active")},
        {"op": Clamp(15.0, when="always"), "phase": "prompt", "watch": slice(3, 5)},
        {"op": Add(4.0), "phase": "generated", "first": 3},
    ],
    ids=str,
)
def test_generation_edits_what_a_full_pass_and_chunks_edit(real, parts):
    ids, mask = real.ids(QUESTIONS[0])
    plan, prompt = Plan((rule(real, **parts),)), ids.shape[1]

    with steer(real.model, plan, saes=real.sae) as run:
        said = real.model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False)[:, :-1]
    with steer(real.model, plan, saes=real.sae, prompt_tokens=prompt) as whole:
        expected = full_pass(real, said)
    cache, pieces = DynamicCache(config=real.model.config), []
    with torch.no_grad(), steer(real.model, plan, saes=real.sae, prompt_tokens=prompt) as chunked:
        for a, b in pairwise((0, 5, prompt - 1, prompt + 2, said.shape[1])):
            pieces.append(real.model(said[:, a:b], past_key_values=cache, use_cache=True).logits)

    assert not laws.near_edge(real.model, plan, [real.sae], said, prompt_tokens=prompt)
    assert laws.edited(run) == laws.edited(whole) == laws.edited(chunked)
    assert laws.edited_by_row(whole)[0]
    assert laws.distance(torch.cat(pieces, dim=1), expected) <= laws.TOLERANCE


def test_rows_keep_to_their_own_plans_and_the_row_without_one_to_every_bit(real):
    ids, mask = real.ids(*QUESTIONS)
    plans = [Plan((rule(real, Clamp(-20.0, when="active")),)), None, Plan((rule(real, Clamp(15.0, when="always")),))]
    order = [2, 0]

    with steer(real.model, plans, saes=real.sae) as run:
        found = full_pass(real, ids, mask)
    with steer(real.model, [plans[i] for i in order], saes=real.sae) as other:
        again = full_pass(real, ids[order], mask[order])
    plain = full_pass(real, ids, mask)

    assert not laws.near_edge(real.model, plans, [real.sae], ids, attention_mask=mask)
    assert laws.same_bits(found[1], plain[1])
    assert all(laws.distance(found[i], plain[i]) > 1e-3 for i in order)
    assert [laws.edited_by_row(run)[i] for i in order] == laws.edited_by_row(other)
    for j, i in enumerate(order):
        real_tokens = mask[i].bool()
        assert laws.distance(again[j, real_tokens], found[i, real_tokens]) <= laws.TOLERANCE


def test_padding_of_a_real_prompt_changes_nothing(real):
    ids, mask = real.ids(*QUESTIONS)
    short = int(mask.sum(1).argmin())
    alone = ids[short : short + 1, mask[short].bool()]
    plan = Plan((rule(real, Clamp(-20.0, when="active"), start=3),))

    with steer(real.model, plan, saes=real.sae) as batched:
        found = full_pass(real, ids, mask)
    with steer(real.model, plan, saes=real.sae) as single:
        expected = full_pass(real, alone)

    assert mask[short].sum() < mask.shape[1]
    assert not laws.near_edge(real.model, plan, [real.sae], alone)
    assert laws.edited_by_row(batched)[short] == laws.edited_by_row(single)[0]
    assert laws.distance(found[short, mask[short].bool()], expected[0]) <= laws.TOLERANCE
