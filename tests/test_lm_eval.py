"""lm-eval measures a steered and a guarded model: its answers are those that are computed by hand, row by row."""

from typing import Any

import pytest
import torch
from datasets import Dataset
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from torch import Tensor

from saeguard import steer
from saeguard.errors import PhaseUnknown, RowsMismatch, UnguardedCall, UnsupportedMode
from saeguard.guarding.audit import AuditLog
from saeguard.guarding.verify import read
from tests import laws, tiny
from tests.counts import cases
from tests.idioms import LATE, PHASED, PUSH, SAE, TEXTS, attach, by_hand, policy, refusing, tokenizer

pytestmark = pytest.mark.filterwarnings("ignore")

SAES = [tiny.tiny_sae(activation=kind, name=kind, seed=i) for i, kind in enumerate(("relu", "jumprelu", "topk"))]
PAIRS = [("w5 w9 w11", "w7 w8"), ("w5", "w9"), ("w40 w41 w9 w22 w51", "w10 w12 w13"), ("w5", "w30"), ("w7 w7", "w6")]


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny.fresh_model()


def harness(model: Any, batch_size: int = 4, **options: Any) -> HFLM:
    return HFLM(pretrained=model, tokenizer=tokenizer(), batch_size=batch_size, **options)


def asked(kind: Any, arguments: list[tuple]) -> list[Instance]:
    return [Instance(request_type=kind, doc={}, arguments=one, idx=0) for one in arguments]


def likelihoods(model: Any, pairs: Any = PAIRS, **options: Any) -> Tensor:
    pairs = [(context, f" {answer}") for context, answer in pairs]
    answers = harness(model, **options).loglikelihood(asked("loglikelihood", pairs), disable_tqdm=True)
    return torch.tensor([value for value, _ in answers])


def rolling(model: Any, **options: Any) -> Tensor:
    requests = asked("loglikelihood_rolling", [(text,) for text in TEXTS])
    return torch.tensor(harness(model, **options).loglikelihood_rolling(requests, disable_tqdm=True))


def written(model: Any, **options: Any) -> list[str]:
    how = {"until": ["w9"], "max_gen_toks": 6, "do_sample": False}
    return harness(model, **options).generate_until(asked("generate_until", [(t, how) for t in TEXTS]), True)


def likelihood(model: Any, context: list[int], answer: list[int]) -> float:
    """Of one text in a batch of its own."""
    with torch.no_grad():
        told = model(torch.tensor([context + answer[:-1]])).logits[0].log_softmax(-1)
    return sum(float(told[len(context) - 1 + i, token]) for i, token in enumerate(answer))


def ids(text: str) -> list[int]:
    return tokenizer()(text)["input_ids"]


@pytest.mark.parametrize("batch_size", [1, 4])
def test_lm_eval_in_a_steer_block_gives_what_is_computed_by_hand(model, batch_size):
    with steer(model, PUSH, saes=SAE, tokenizer=tokenizer()):
        found, walked = likelihoods(model, batch_size=batch_size), rolling(model, batch_size=batch_size)
        texts = written(model, batch_size=batch_size)
        right = [likelihood(model, ids(context), ids(answer)) for context, answer in PAIRS]
        straight = [likelihood(model, [tiny.BOS], ids(text)) for text in TEXTS]

    assert torch.allclose(found, torch.tensor(right), atol=1e-4)
    assert torch.allclose(walked, torch.tensor(straight), atol=1e-4)
    assert texts == [answer.split("w9")[0] for answer in by_hand(model, TEXTS, PUSH)]
    assert not torch.allclose(found, likelihoods(model, batch_size=batch_size), atol=0.1)
    assert not torch.allclose(walked, rolling(model, batch_size=batch_size), atol=0.1)
    assert texts != written(model, batch_size=batch_size)


@settings(max_examples=cases(400))
@given(laws.plans(SAES, where=laws.wheres(phases=("all",)), gated=True), st.integers(0, 2**20))
def test_lm_eval_pads_without_a_mask_and_no_answer_depends_on_it(plan, seed):
    """Its rows are padded behind their end and have no mask: padding is edited like words, and nothing looks back."""
    subject = tiny.tiny_model()
    draw = torch.Generator().manual_seed(seed)
    pairs = [tuple(words(int(n), draw) for n in torch.randint(1, 7, (2,), generator=draw)) for _ in range(4)]
    for context, answer in pairs:
        assume(not laws.near_edge(subject, plan, SAES, torch.tensor([(ids(context) + ids(answer))[:-1]])))

    with steer(subject, plan, saes=SAES):
        together = likelihoods(subject, pairs, batch_size=4)
        alone = torch.tensor([likelihood(subject, ids(context), ids(answer)) for context, answer in pairs])

    assert torch.allclose(together, alone, atol=1e-3, rtol=1e-4)


def words(n: int, generator: torch.Generator) -> str:
    return " ".join(f"w{i}" for i in torch.randint(3, tiny.VOCAB, (n,), generator=generator).tolist())


def test_lm_eval_says_that_it_does_not_tell_prompts_from_answers(model):
    with steer(model, PHASED, saes=SAE), pytest.raises(PhaseUnknown):
        likelihoods(model)
    with steer(model, PHASED, saes=SAE, tokenizer=tokenizer()):
        texts = written(model)

    assert texts == [answer.split("w9")[0] for answer in by_hand(model, TEXTS, PHASED)]


def test_lm_eval_with_a_plan_per_row_is_refused_where_its_batches_are_others(model):
    with steer(model, [PUSH] * 3, saes=SAE), pytest.raises(RowsMismatch, match="the batch has 1 rows"):
        likelihoods(model, batch_size=3)


def task(name: str, kind: str, **options: Any) -> ConfigurableTask:
    rows = [
        {"question": "w5 w9 w11", "answers": ["w7 w8", "w9", "w10 w12 w13"], "gold": 1},
        {"question": "w40 w41", "answers": ["w7", "w30", "w12"], "gold": 2},
        {"question": "w7", "answers": ["w8 w5", "w9 w9", "w10"], "gold": 0},
    ]
    return ConfigurableTask(
        config={
            "task": name, "custom_dataset": lambda **_: {"test": Dataset.from_list(rows)}, "test_split": "test",
            "output_type": kind, "doc_to_text": "{{question}}", **options,
        }
    )  # fmt: skip


def tasks() -> list[ConfigurableTask]:
    choice = {"doc_to_choice": lambda doc: doc["answers"], "doc_to_target": "gold", "metric_list": [{"metric": "acc"}]}
    walk = {"doc_to_text": "", "doc_to_target": "{{question}}", "metric_list": [{"metric": "word_perplexity"}]}
    write = {
        "doc_to_target": lambda doc: doc["answers"][0], "metric_list": [{"metric": "exact_match"}],
        "generation_kwargs": {"until": ["w9"], "max_gen_toks": 5, "do_sample": False},
    }  # fmt: skip
    return [
        task("own_choice", "multiple_choice", **choice), task("own_words", "loglikelihood_rolling", **walk),
        task("own_answer", "generate_until", **write),
    ]  # fmt: skip


def evaluated(model: Any, batch_size: int) -> dict[str, Any]:
    """Every answer that lm-eval was given."""
    found: Any = simple_evaluate(
        model=harness(model, batch_size), tasks=tasks(), task_manager=TaskManager(include_defaults=False),
        bootstrap_iters=0, log_samples=True,
    )  # fmt: skip
    return {name: [sample["resps"] for sample in samples] for name, samples in found["samples"].items()}


def flat(found: Any) -> list[Any]:
    return [leaf for one in found for leaf in (flat(one) if isinstance(one, list | tuple) else [one])]


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return all(
        a == pytest.approx(b, abs=1e-4) if isinstance(a, float) else a == b
        for name in one
        for a, b in zip(flat(one[name]), flat(other[name]), strict=True)
    )


def test_lm_eval_runs_its_own_loop_on_a_steered_and_on_a_guarded_model(model, tmp_path):
    log = AuditLog(tmp_path / "log.jsonl")
    with steer(model, PUSH, saes=SAE, tokenizer=tokenizer()):
        right = evaluated(model, 4)
        assert same(evaluated(model, 1), right)
    with attach(model, {"push": policy(model), "open": None}, audit=log) as guard:
        with guard.calls("push"):
            guarded = evaluated(model, 4)
        with guard.calls("open"):
            let_through = evaluated(model, 4)
        with pytest.raises(UnguardedCall):
            evaluated(model, 4)

    assert same(guarded, right)
    assert set(right) == {"own_choice", "own_words", "own_answer"}
    plain = evaluated(model, 4)
    assert same(let_through, plain)
    assert not any(same({name: right[name]}, {name: plain[name]}) for name in right)
    assert [entry.record.decision for entry in read(log.path)] == ["steer"] * 3 + ["allow"] * 3


def test_lm_eval_under_a_policy_that_stops_rows_hears_its_refusals_and_measures_passes_on_request(model):
    with attach(model, refusing(model, LATE)) as guard:
        with guard.calls():
            texts = written(model, batch_size=3)
            with pytest.raises(UnsupportedMode, match="no answer that could be stopped"):
                likelihoods(model)
        with guard.calls(measuring=True):
            passed = likelihoods(model)

    assert torch.allclose(passed, likelihoods(model), atol=1e-5)
    assert "w9" not in "".join(texts)  # its stop word begins every refusal
    assert texts != written(model, batch_size=3)
