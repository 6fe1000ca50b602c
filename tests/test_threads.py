"""One model, many threads and tasks: every result is somebody's own, or the call is refused by name."""

import asyncio
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from saeguard import capture, steer
from saeguard.errors import GuardNotApplied, ModelBusy
from tests.tiny import fresh_model, prompt, tiny_sae
from tests.traces import add_plan, edited, fed, nothing_left, should_edit

THREADS, CALLS = 8, 50
SAE = tiny_sae()
MODEL = fresh_model("llama")
IDS = prompt(1, 6)
GREEDY = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
Outcome = Tensor | type[ModelBusy]


@pytest.fixture(autouse=True)
def fast_switching() -> Iterator[None]:
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


@torch.no_grad()
def steered_alone(number: int) -> Tensor:
    """Thread 0 is a tenant without a plan."""
    if number == 0:
        return MODEL(IDS).logits
    with steer(MODEL, add_plan(number), saes=SAE):
        return MODEL(IDS).logits


def in_threads(work: Callable[[int], Any], n: int = THREADS) -> list[Any]:
    """``work(0)`` .. ``work(n-1)``, started together."""
    barrier = threading.Barrier(n)

    def start(number: int) -> Any:
        barrier.wait()
        return work(number)

    with ThreadPoolExecutor(n) as pool:
        return list(pool.map(start, range(n)))


def many(call: Callable[[int], Tensor]) -> Callable[[int], list[Outcome]]:
    def work(number: int) -> list[Outcome]:
        found: list[Outcome] = []
        for _ in range(CALLS):
            try:
                found.append(call(number))
            except ModelBusy:
                found.append(ModelBusy)
                time.sleep(0.001)
        return found

    return work


def test_threads_with_their_own_blocks_get_their_own_result_or_model_busy():
    expected = [steered_alone(number) for number in range(THREADS)]
    with nothing_left(MODEL):
        found = in_threads(many(steered_alone))

    results = [(number, one) for number, row in enumerate(found) for one in row]
    mixed = [number for number, one in results if isinstance(one, Tensor) and not torch.equal(one, expected[number])]
    assert len(results) == THREADS * CALLS
    assert not mixed, f"threads {sorted(set(mixed))} got somebody else's edits"
    assert sum(isinstance(one, Tensor) for _, one in results) >= THREADS, "hardly anybody got through"
    assert torch.equal(steered_alone(0), expected[0])


def test_threads_waiting_for_a_lock_all_get_their_own_result():
    lock, expected = threading.Lock(), [steered_alone(number) for number in range(THREADS)]

    def call(number: int) -> Tensor:
        with lock:
            return steered_alone(number)

    found = in_threads(many(call))

    assert all(torch.equal(one, expected[number]) for number, row in enumerate(found) for one in row)


def test_bound_threads_are_steered_at_once_inside_one_block():
    plan = add_plan(3)
    prompts = [prompt(1 + number % 3, 4 + number, seed=number) for number in range(THREADS)]
    with steer(MODEL, plan, saes=SAE):
        expected = [MODEL.generate(ids, **GREEDY) for ids in prompts]
    with steer(MODEL, plan, saes=SAE) as run:
        bound = run.bind(MODEL.generate)
        found = in_threads(lambda number: [bound(prompts[number], **GREEDY) for _ in range(5)])

    assert all(torch.equal(one, expected[number]) for number, row in enumerate(found) for one in row)
    assert run.report.calls == 5 * THREADS
    rule, columns = plan.rules[0], [ids.shape[1] for ids in prompts]
    due = [
        tuple(should_edit(rule, fed(row, columns[number]), columns=columns[number]) for row in one)
        for number, one in enumerate(expected)
    ]
    assert sorted(edited(run)[0]) == sorted(due * 5)


def test_thread_that_is_not_bound_is_refused_while_the_block_is_open():
    plain = MODEL.generate(IDS, **GREEDY)
    with steer(MODEL, add_plan(3), saes=SAE):
        MODEL(IDS)
        found = in_threads(many(lambda _: MODEL.generate(IDS, **GREEDY)), n=2)
        forward = in_threads(many(lambda _: MODEL(IDS).logits), n=2)

    afterwards = in_threads(many(lambda _: MODEL.generate(IDS, **GREEDY)), n=2)

    assert {one for row in found + forward for one in row} == {ModelBusy}
    assert all(torch.equal(one, plain) for row in afterwards for one in row)


def test_entering_from_another_thread_is_refused_and_leaves_the_open_block_whole():
    with steer(MODEL, add_plan(3), saes=SAE):
        steered = MODEL(IDS).logits
        found = in_threads(many(steered_alone), n=2)

        assert {one for row in found for one in row} == {ModelBusy}
        assert torch.equal(MODEL(IDS).logits, steered)


def test_pass_that_began_plain_never_gets_edits_of_a_block_that_opens_meanwhile():
    """Hooks placed in the middle of somebody's plain pass refuse it by name: they know nothing of its tokens."""
    middle, opened = threading.Event(), threading.Event()
    block = MODEL.model.layers[0]

    def wait(*_: Any) -> None:
        middle.set()
        opened.wait(20)

    handle = block.register_forward_hook(wait)
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(torch.no_grad()(lambda: MODEL(IDS).logits))
        middle.wait(20)
        handle.remove()
        with steer(MODEL, add_plan(3), saes=SAE):
            MODEL(IDS)
            opened.set()
            with pytest.raises(ModelBusy, match=r"run\.bind\(model\.generate\)"):
                future.result()


def test_generate_that_outlives_its_block_raises_instead_of_going_on_unedited():
    started, ended = threading.Event(), threading.Event()

    def streamed(ids: Tensor, scores: Tensor, **_: Any) -> bool:
        if ids.shape[1] == IDS.shape[1] + 2:
            started.set()
            ended.wait(20)
        return False

    with nothing_left(MODEL), ThreadPoolExecutor(1) as pool:
        with steer(MODEL, add_plan(3), saes=SAE) as run:
            options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "stopping_criteria": [streamed]}
            future = pool.submit(run.bind(MODEL.generate), IDS, **options)
            started.wait(20)
        ended.set()

        with pytest.raises(GuardNotApplied, match="a block that it began in ended while it ran"):
            future.result()


@pytest.mark.parametrize("nested", [False, True])
def test_generate_whose_streamer_ends_the_block_shows_no_token_that_was_not_edited(nested):
    """The streamer ends the (inner) block after its second token: the third may not come."""
    shown: list[Tensor] = []
    inner = steer(MODEL, add_plan(3), saes=SAE)

    class Ends:
        def put(self, value: Tensor) -> None:
            shown.append(value)
            if len(shown) == 3:  # the prompt is the first
                inner.__exit__(None, None, None)

        def end(self) -> None:
            pass

    with nothing_left(MODEL), capture(MODEL, "resid_post.1") if nested else nullcontext():
        inner.__enter__()
        with pytest.raises(GuardNotApplied, match="a block that it began in ended while it ran"):
            MODEL.generate(IDS, max_new_tokens=6, min_new_tokens=6, do_sample=False, streamer=Ends())

    assert len(shown) == 3


def test_pass_during_which_its_block_ends_is_refused():
    middle, ended = threading.Event(), threading.Event()

    def wait(*_: Any) -> None:
        middle.set()
        ended.wait(20)

    with nothing_left(MODEL), ThreadPoolExecutor(1) as pool:
        handle = MODEL.model.layers[0].register_forward_hook(wait)
        with steer(MODEL, add_plan(3), saes=SAE) as run:
            future = pool.submit(run.bind(torch.no_grad()(lambda: MODEL(IDS).logits)))
            middle.wait(20)
        handle.remove()
        ended.set()

        with pytest.raises(GuardNotApplied, match="or steer ended while it ran"):
            future.result()


def test_loop_of_passes_that_outlives_its_block_is_refused_at_its_next_pass():
    """A loop of model(...) on one cache: the pass after the end of the block would be plain on a steered cache."""
    first, ended = threading.Event(), threading.Event()

    @torch.no_grad()
    def loop() -> Tensor:
        out = MODEL(IDS, use_cache=True)
        first.set()
        ended.wait(20)
        return MODEL(IDS[:, -1:], past_key_values=out.past_key_values, use_cache=True).logits

    with nothing_left(MODEL), ThreadPoolExecutor(1) as pool:
        with steer(MODEL, add_plan(3), saes=SAE) as run:
            future = pool.submit(run.bind(loop))
            first.wait(20)
        ended.set()

        with pytest.raises(GuardNotApplied, match="or a bound function, that goes on"):
            future.result()


@pytest.mark.parametrize("block", [lambda: steer(MODEL, add_plan(3), saes=SAE), lambda: capture(MODEL, "resid_post.1")])
def test_function_bound_to_a_block_that_has_ended_is_refused(block):
    with block() as run:
        bound = run.bind(lambda: MODEL(IDS))
        bound()

    with pytest.raises(GuardNotApplied, match="the block has ended, so that the call would run without its edits"):
        bound()


def test_asyncio_tasks_get_their_own_result_or_model_busy():
    expected = [steered_alone(number) for number in range(THREADS)]

    async def task(number: int) -> list[Outcome]:
        found: list[Outcome] = []
        for _ in range(10):
            try:
                with steer(MODEL, add_plan(number + 1), saes=SAE), torch.no_grad():
                    await asyncio.sleep(0)
                    found.append(MODEL(IDS).logits)
            except ModelBusy:
                found.append(ModelBusy)
                await asyncio.sleep(0)
        return found

    async def all_tasks() -> list[list[Outcome]]:
        return await asyncio.gather(*(task(number) for number in range(THREADS - 1)))

    with nothing_left(MODEL):
        rows = asyncio.run(all_tasks())

    tensors = [(number, one) for number, row in enumerate(rows) for one in row if isinstance(one, Tensor)]
    assert tensors
    assert ModelBusy in [one for row in rows for one in row]
    assert all(torch.equal(one, expected[number + 1]) for number, one in tensors)


def test_executor_and_to_thread_inside_a_block_are_refused_or_steered_never_plain():
    async def inside() -> tuple[Tensor, Tensor]:
        with steer(MODEL, add_plan(3), saes=SAE):
            direct = MODEL.generate(IDS, **GREEDY)
            copied = await asyncio.to_thread(MODEL.generate, IDS, **GREEDY)  # copies the context
            with pytest.raises(ModelBusy):
                await asyncio.get_running_loop().run_in_executor(None, lambda: MODEL.generate(IDS, **GREEDY))
            return direct, copied

    direct, copied = asyncio.run(inside())

    assert torch.equal(direct, copied)
    assert not torch.equal(direct, MODEL.generate(IDS, **GREEDY))


def test_task_cancelled_inside_a_block_leaves_nothing():
    async def stuck() -> None:
        with steer(MODEL, add_plan(3), saes=SAE), capture(MODEL, "resid_post.0"):
            MODEL(IDS)
            await asyncio.sleep(60)

    async def cancelled() -> None:
        task = asyncio.create_task(stuck())
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    with nothing_left(MODEL):
        asyncio.run(cancelled())


@contextmanager
def naive(block: nn.Module, number: int) -> Iterator[None]:
    """The mutant: a hook that edits whoever's pass comes by."""
    direction = SAE.W_dec[number] * 4.0
    handle = block.register_forward_hook(lambda module, args, output: output + direction)
    try:
        yield
    finally:
        handle.remove()


def test_naive_hooks_would_be_contaminated_here():
    block = MODEL.model.layers[1]
    meet = threading.Barrier(2)

    @torch.no_grad()
    def tenant(number: int) -> Tensor:
        with naive(block, number):
            meet.wait(20)
            logits = MODEL(IDS).logits
            meet.wait(20)
        return logits

    alone = []
    for number in range(2):
        with naive(block, number), torch.no_grad():
            alone.append(MODEL(IDS).logits)

    assert not any(map(torch.equal, in_threads(tenant, n=2), alone))
