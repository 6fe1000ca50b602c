"""Ways to run a model past its edits: each has to end in a named error, whose text says what to do."""

import copy
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import nn
from transformers import CompileConfig, DynamicCache

from saeguard import errors
from tests.modes import GREEDY, IDS, Block, backbone, blocks

Refused = Callable[[nn.Module, Block], Any]
REFUSED: dict[str, tuple[Refused, type[errors.SaeguardError], str]] = {}
COMPILED_BEFORE: dict[str, tuple[Refused, type[errors.SaeguardError], str]] = {}


def refused(error: type[errors.SaeguardError], text: str, table: Any = REFUSED) -> Callable[[Refused], Refused]:
    def register(function: Refused) -> Refused:
        table[function.__name__] = function, error, text
        return function

    return register


def traced(function: Refused) -> Refused:
    return refused(errors.CompiledModel, r"call torch\._dynamo\.reset\(\) first", COMPILED_BEFORE)(function)


@traced
def compiled_and_called_before(model: nn.Module, block: Block) -> None:
    compiled = torch.compile(model, backend="eager")
    compiled(IDS)
    with block(model):
        compiled(IDS)


@traced
def function_around_the_model_called_before(model: nn.Module, block: Block) -> None:
    function = torch.compile(lambda ids: model(ids).logits, backend="eager")
    function(IDS)
    with block(model):
        model(IDS)
        function(IDS)  # without the refusal this is silently plain


@traced
def compiled_forward_called_before(model: nn.Module, block: Block) -> None:
    forward = torch.compile(model.forward, backend="eager")
    forward(IDS)
    with block(model):
        model(IDS)
        forward(IDS)  # without the refusal this is silently plain


@traced
def compiled_backbone_called_before(model: nn.Module, block: Block) -> None:
    inner = torch.compile(backbone(model), backend="eager")
    inner(IDS)
    with block(model):
        inner(IDS)


@traced
def aot_compiled_function_called_before(model: nn.Module, block: Block) -> None:
    function = torch.compile(lambda ids: model(ids).logits, backend="aot_eager")
    function(IDS)
    with block(model):
        function(IDS)


@traced
def generate_that_compiles_itself_called_before(model: nn.Module, block: Block) -> None:
    """On accelerators a static cache makes generate compile the decode step; the CPU is told that it is one."""
    model = copy.deepcopy(model)
    model._valid_auto_compile_criteria = lambda *_: True  # type: ignore[method-assign]
    compiling = CompileConfig(backend="eager", fullgraph=False)
    options = GREEDY | {"cache_implementation": "static", "compile_config": compiling}
    model.generate(IDS, **options)
    with block(model):
        model.generate(IDS, **options)


@traced
def block_compiled_by_itself(model: nn.Module, block: Block) -> None:
    model = copy.deepcopy(model)
    blocks(model)[1].compile(backend="eager")
    with block(model):
        model(IDS)


@refused(errors.CompiledModel, "Enter steer first, then compile inside")
def model_compile_before(model: nn.Module, block: Block) -> None:
    model = copy.deepcopy(model)
    model.compile(backend="eager")
    with block(model):
        model(IDS)


@refused(errors.CompiledModel, "Steer the original model first")
def compiled_wrapper_given(model: nn.Module, block: Block) -> None:
    with block(torch.compile(copy.deepcopy(model), backend="eager")):  # torch marks what it wraps
        raise AssertionError("entered")


@refused(errors.UnsupportedModel, r"Steer the wrapped model \(wrapper\.module\)")
def data_parallel_given(model: nn.Module, block: Block) -> None:
    with block(nn.DataParallel(model)):
        raise AssertionError("entered")


@refused(errors.UnsupportedModel, r"Pass layout=Layout\(blocks=")
def wrapper_given(model: nn.Module, block: Block) -> None:
    with block(nn.Sequential(model)):
        raise AssertionError("entered")


@refused(errors.GuardNotApplied, r"Call the model itself, as model\(\.\.\.\)")
def forward_called_by_name(model: nn.Module, block: Block) -> None:
    with block(model):
        model.forward(IDS)


@refused(errors.GuardNotApplied, r"Call the model itself, as model\(\.\.\.\)")
def backbone_called_alone(model: nn.Module, block: Block) -> None:
    with block(model):
        backbone(model)(IDS)


@refused(errors.GuardNotApplied, "replaced, skipped or called through .forward")
def layer_called_through_forward(model: nn.Module, block: Block) -> None:
    class Through(nn.Module):
        def __init__(self, inner: nn.Module):
            super().__init__()
            self.inner = inner

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return self.inner.forward(*args, **kwargs)

        def __getattr__(self, name: str) -> Any:
            try:
                return super().__getattr__(name)
            except AttributeError:
                return getattr(super().__getattr__("inner"), name)

    model = copy.deepcopy(model)
    with block(model):
        blocks(model)[1] = Through(blocks(model)[1])
        model(IDS)


@refused(errors.GuardNotApplied, "replaced, skipped or called through .forward")
def layer_replaced(model: nn.Module, block: Block) -> None:
    model = copy.deepcopy(model)
    other = copy.deepcopy(blocks(model)[1])
    with block(model):
        blocks(model)[1] = other
        model.generate(IDS, **GREEDY)


@refused(errors.GuardNotApplied, "resid_post.1: the forward pass ended and they had not run")
def layer_skipped(model: nn.Module, block: Block) -> None:
    model = copy.deepcopy(model)
    with block(model):
        model.config.num_hidden_layers = 1
        for name, child in list(backbone(model).named_children()):
            if child is blocks(model):
                setattr(backbone(model), name, nn.ModuleList(list(child)[:1]))
                break
        model(IDS, use_cache=False)


@refused(errors.GuardNotApplied, "ran a second time in one pass")
def layer_used_twice(model: nn.Module, block: Block) -> None:
    model = copy.deepcopy(model)
    with block(model):
        blocks(model)[2] = blocks(model)[1]
        model(IDS, use_cache=False)


@refused(errors.GuardNotApplied, "it returned and no forward pass had gone through")
def all_hooks_cleared(model: nn.Module, block: Block) -> None:
    model = copy.deepcopy(model)
    with block(model):
        for module in model.modules():
            module._forward_hooks.clear()
            module._forward_pre_hooks.clear()
        model.generate(IDS, **GREEDY)


@refused(errors.GuardNotApplied, "only the passes up to column 6 went through")
def hooks_cleared_after_the_prefill(model: nn.Module, block: Block) -> None:
    model = copy.deepcopy(model)

    def clear(ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        for module in model.modules():
            module._forward_hooks.clear()
            module._forward_pre_hooks.clear()
        return torch.zeros(len(ids), dtype=torch.bool)

    with block(model):
        model.generate(IDS, **GREEDY, stopping_criteria=[clear])


@refused(errors.GuardNotApplied, "the forward pass ended and they had not run")
def site_hooks_cleared(model: nn.Module, block: Block) -> None:
    model = copy.deepcopy(model)
    with block(model):
        for layer in blocks(model):
            layer._forward_hooks.clear()
        model(IDS)


@refused(errors.PlanNeverRan, "Call the model inside the block")
def model_never_called(model: nn.Module, block: Block) -> None:
    with block(model):
        pass


@refused(errors.TokensUnknown, "Pass input_ids, or write special=True in every rule")
def embeddings_without_ids(model: nn.Module, block: Block) -> None:
    with block(model):
        model(inputs_embeds=model.get_input_embeddings()(IDS))


@refused(errors.TokensUnknown, "Give a mask of rows x")
def mask_that_covers_too_little(model: nn.Module, block: Block) -> None:
    past = DynamicCache(config=model.config)
    with block(model):
        model(IDS[:, :3], past_key_values=past, use_cache=True)
        model(IDS[:, 3:], past_key_values=past, attention_mask=torch.ones(2, 3))


@refused(errors.UnsupportedMode, "Pass attention_mask, past_key_values and the rest by name")
def mask_given_by_position(model: nn.Module, block: Block) -> None:
    with block(model):
        model(IDS, torch.ones_like(IDS))


@refused(errors.UnsupportedMode, r"Call model\.generate\(\.\.\.\), not the class's function")
def generate_of_the_class(model: nn.Module, block: Block) -> None:
    with block(model):
        type(model).generate(model, IDS, max_new_tokens=2, do_sample=False, num_beams=2)


@refused(errors.UnsupportedMode, "Use a transformers Cache, such as DynamicCache")
def cache_of_an_unknown_kind(model: nn.Module, block: Block) -> None:
    with block(model):
        model(IDS, past_key_values=((torch.zeros(2, 2, 3, 8),) * 2,) * 3)


def _foreign(name: str, **options: Any) -> None:
    def function(model: nn.Module, block: Block) -> None:
        with block(model):
            model.generate(IDS, **(GREEDY | options))

    REFUSED[f"generate_with_{name}"] = function, errors.UnsupportedMode, f"Generate without {name}"


_foreign("penalty_alpha", penalty_alpha=0.6, top_k=4)
_foreign("dola_layers", dola_layers="low")
_foreign("guidance_scale", guidance_scale=1.5)
_foreign("assistant_early_exit", assistant_early_exit=1)
_foreign("custom_generate", custom_generate=lambda model, **_: model)


def _in_a_thread(start: Callable[[Callable[[], Any]], Any]) -> Refused:
    def function(model: nn.Module, block: Block) -> None:
        with block(model):
            model(IDS)
            start(lambda: model.generate(IDS, **GREEDY))

    return function


def _plain_thread(work: Callable[[], Any]) -> None:
    caught: list[Exception] = []

    def run() -> None:
        try:
            work()
        except Exception as error:
            caught.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    raise caught[0]


def _executor(work: Callable[[], Any]) -> None:
    with ThreadPoolExecutor(1) as pool:
        pool.submit(work).result()


REFUSED["thread_that_is_not_bound"] = _in_a_thread(_plain_thread), errors.ModelBusy, r"run\.bind\(model\.generate\)"
REFUSED["executor_that_is_not_bound"] = _in_a_thread(_executor), errors.ModelBusy, r"run\.bind\(model\.generate\)"
