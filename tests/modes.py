"""Ways to run a model: each runs it once inside ``block`` and says what went in, what came out and what was called."""

import copy
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedTokenizerFast, TextIteratorStreamer, pipeline

from tests.tiny import BOS, EOS, PAD, VOCAB, fresh_model, prompt

IDS = prompt(2, 6, seed=5)
PADDED = torch.cat([torch.full((2, 2), PAD), IDS], dim=1)
PADDED[1, :2] = torch.tensor([9, 11])
MASK = torch.ones_like(PADDED)
MASK[0, :2] = 0
NEW = 5
GREEDY = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": PAD}
WORDS = GREEDY | {"suppress_tokens": [PAD, BOS, EOS]}
"""For beams: the edited set is the union over all beams ever alive, which then is the same for all of them."""
SAMPLED = {"max_new_tokens": NEW, "do_sample": True, "pad_token_id": PAD}


@dataclass(eq=False)
class Done:
    """``sequences`` holds every token per forward row, ``columns`` is the width of the prompt."""

    run: Any
    out: Tensor
    sequences: Tensor
    columns: int
    generates: bool = True
    per_request: int = 1
    real: Tensor | None = None


Block = Callable[[nn.Module], AbstractContextManager[Any]]
Mode = Callable[[nn.Module, Block], Done]
FORWARD: dict[str, Mode] = {}
COMPILED: dict[str, Mode] = {}
GENERATE: dict[str, Mode] = {}


def mode(table: dict[str, Mode]) -> Callable[[Mode], Mode]:
    def register(function: Mode) -> Mode:
        table[function.__name__] = function
        return function

    return register


def passed(run: Any, logits: Tensor, ids: Tensor = IDS, **more: Any) -> Done:
    return Done(run, logits.detach().float(), ids, ids.shape[1], generates=False, **more)


def backbone(model: nn.Module) -> nn.Module:
    return getattr(model, model.base_model_prefix)


def blocks(model: nn.Module) -> nn.ModuleList:
    return next(m for m in backbone(model).children() if isinstance(m, nn.ModuleList) and len(m) == 3)


@mode(FORWARD)
def raw_forward(model: nn.Module, block: Block) -> Done:
    with block(model) as run:
        return passed(run, model(IDS).logits)


@mode(FORWARD)
def forward_without_cache(model: nn.Module, block: Block) -> Done:
    with block(model) as run:
        return passed(run, model(input_ids=IDS, use_cache=False).logits)


@mode(FORWARD)
def forward_of_padded_rows(model: nn.Module, block: Block) -> Done:
    with block(model) as run:
        return passed(run, model(PADDED, attention_mask=MASK).logits, PADDED, real=MASK.bool())


@mode(FORWARD)
def forward_in_chunks(model: nn.Module, block: Block) -> Done:
    past = DynamicCache(config=model.config)
    with block(model) as run:
        parts = [model(chunk, past_key_values=past, use_cache=True).logits for chunk in IDS.split([3, 1, 2], dim=1)]
    return passed(run, torch.cat(parts, dim=1))


@mode(FORWARD)
def inside_a_wrapper(model: nn.Module, block: Block) -> Done:
    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, ids: Tensor) -> Tensor:
            return self.inner(ids).logits

    with block(model) as run:
        return passed(run, Wrapper()(IDS))


@mode(FORWARD)
def inside_data_parallel(model: nn.Module, block: Block) -> Done:
    with block(model) as run:
        return passed(run, nn.DataParallel(model)(IDS).logits)


@mode(FORWARD)
def inference_mode(model: nn.Module, block: Block) -> Done:
    with block(model) as run, torch.inference_mode():
        return passed(run, model(IDS).logits)


@mode(FORWARD)
def functional_call(model: nn.Module, block: Block) -> Done:
    weights = dict(model.named_parameters())
    with block(model) as run:
        return passed(run, torch.func.functional_call(model, weights, (IDS,)).logits)


@mode(FORWARD)
def bfloat16(model: nn.Module, block: Block) -> Done:
    half = copy.deepcopy(model).to(torch.bfloat16)
    with block(half) as run:
        return passed(run, half(IDS).logits)


@mode(FORWARD)
def float16(model: nn.Module, block: Block) -> Done:
    half = copy.deepcopy(model).to(torch.float16)
    with block(half) as run:
        return passed(run, half(IDS).logits)


@mode(FORWARD)
def training_step(model: nn.Module, block: Block) -> Done:
    model = copy.deepcopy(model).train()
    model.requires_grad_(True)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    with block(model) as run, torch.enable_grad():
        logits = model(IDS).logits
        logits.square().mean().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    return passed(run, logits)


@mode(FORWARD)
def output_of_every_layer(model: nn.Module, block: Block) -> Done:
    with block(model) as run:
        return passed(run, model(IDS, output_hidden_states=True).logits)


def compiled_before(model: nn.Module, block: Block, backend: str) -> Done:
    compiled = torch.compile(model, backend=backend)
    with block(model) as run:
        return passed(run, compiled(IDS).logits)


def compiled_inside(model: nn.Module, block: Block, backend: str) -> Done:
    with block(model) as run:
        return passed(run, torch.compile(model, backend=backend)(IDS).logits)


@mode(COMPILED)
def compiled_before_and_called_inside(model: nn.Module, block: Block) -> Done:
    return compiled_before(model, block, "eager")


@mode(COMPILED)
def compiled_inside_and_called_inside(model: nn.Module, block: Block) -> Done:
    return compiled_inside(model, block, "eager")


@mode(COMPILED)
def compiled_with_aot_autograd_before(model: nn.Module, block: Block) -> Done:
    return compiled_before(model, block, "aot_eager")


@mode(COMPILED)
def compiled_with_aot_autograd_inside(model: nn.Module, block: Block) -> Done:
    return compiled_inside(model, block, "aot_eager")


@mode(COMPILED)
def function_around_the_model_compiled(model: nn.Module, block: Block) -> Done:
    function = torch.compile(lambda ids: model(ids).logits * 1.0, backend="eager")
    with block(model) as run:
        return passed(run, function(IDS))


@mode(COMPILED)
def backbone_replaced_by_its_compiled_self(model: nn.Module, block: Block) -> Done:
    model = copy.deepcopy(model)
    setattr(model, model.base_model_prefix, torch.compile(backbone(model), backend="eager"))
    with block(model) as run:
        return passed(run, model(IDS).logits)


@mode(COMPILED)
def model_compile_inside(model: nn.Module, block: Block) -> Done:
    model = copy.deepcopy(model)
    with block(model) as run:
        model.compile(backend="eager")
        return passed(run, model(IDS).logits)


@mode(COMPILED)
def second_block_after_a_compiled_one(model: nn.Module, block: Block) -> Done:
    compiled = torch.compile(model, backend="eager")
    with block(model):
        compiled(IDS)
    compiled(IDS)
    with block(model) as run:
        return passed(run, compiled(IDS).logits)


def generated(name: str, ids: Tensor = IDS, /, copies: int = 1, per_request: int = 1, **options: Any) -> None:
    """A mode that is one generate call with ``options``."""

    def function(model: nn.Module, block: Block) -> Done:
        torch.manual_seed(0)
        with block(model) as run:
            out = model.generate(ids, **options)
        real = options.get("attention_mask")
        return Done(
            run, out, out, ids.shape[1], per_request=per_request,
            real=None if real is None else real.bool().repeat_interleave(copies, dim=0),
        )  # fmt: skip

    GENERATE[name] = function


generated("greedy", **GREEDY)
generated("one_new_token", **(GREEDY | {"max_new_tokens": 1}))
generated("without_cache", **GREEDY, use_cache=False)
generated("left_padded", PADDED, **GREEDY, attention_mask=MASK)
generated("static_cache", **GREEDY, cache_implementation="static")
generated("static_cache_left_padded", PADDED, **GREEDY, attention_mask=MASK, cache_implementation="static")
generated("prefill_in_chunks", **GREEDY, prefill_chunk_size=4)
generated("beams_2", per_request=2, **WORDS, num_beams=2, num_return_sequences=2)
generated("beams_3", per_request=3, **WORDS, num_beams=3, num_return_sequences=3)
generated("beams_sampled", per_request=2, **(WORDS | {"do_sample": True}), num_beams=2, num_return_sequences=2)
generated("sampling", **SAMPLED)
generated("two_sequences_per_prompt", **SAMPLED, num_return_sequences=2)
generated("three_padded_sequences_per_prompt", PADDED, copies=3, **SAMPLED, num_return_sequences=3, attention_mask=MASK)
generated("prompt_lookup", IDS[:1], **GREEDY, prompt_lookup_num_tokens=2)
generated("repetition_penalty", **GREEDY, repetition_penalty=1.3)


@mode(GENERATE)
def assisted(model: nn.Module, block: Block) -> Done:
    helper = fresh_model(seed=1)
    with block(model) as run:
        out = model.generate(IDS[:1], **GREEDY, assistant_model=helper)
    return Done(run, out, out, IDS.shape[1])


@mode(GENERATE)
def assisted_by_an_equal_model(model: nn.Module, block: Block) -> Done:
    twin = copy.deepcopy(model)
    with block(model) as run:
        out = model.generate(IDS[:1], **GREEDY, assistant_model=twin)
    return Done(run, out, out, IDS.shape[1])


@mode(GENERATE)
def dictionary_output(model: nn.Module, block: Block) -> Done:
    with block(model) as run:
        out = model.generate(IDS, **GREEDY, return_dict_in_generate=True, output_scores=True, output_logits=True)
    return Done(run, torch.stack(out.logits), out.sequences, IDS.shape[1])


@mode(GENERATE)
def generate_in_a_bound_streaming_thread(model: nn.Module, block: Block) -> Done:
    streamer = TextIteratorStreamer(word_tokenizer(), timeout=60)
    found: list[Tensor] = []

    def work(generate: Callable[..., Any]) -> None:
        found.append(generate(IDS[:1], **GREEDY, streamer=streamer))

    with block(model) as run:
        generate = model.generate if run is None else run.bind(model.generate)
        thread = threading.Thread(target=work, args=(generate,))
        thread.start()
        text = "".join(streamer)
        thread.join()
    assert text
    return Done(run, found[0], found[0], IDS.shape[1])


@mode(GENERATE)
def text_generation_pipeline(model: nn.Module, block: Block) -> Done:
    tokenizer = word_tokenizer()
    generate = pipeline("text-generation", model=model, tokenizer=tokenizer)
    with block(model) as run:
        out = generate(tokenizer.decode(IDS[0]), return_tensors=True, **GREEDY)
    ids = torch.tensor([out[0]["generated_token_ids"]])
    return Done(run, ids, ids, IDS.shape[1])


@mode(GENERATE)
def with_a_generation_config(model: nn.Module, block: Block) -> Done:
    config = copy.deepcopy(model.generation_config)
    config.update(**WORDS, num_beams=2, num_return_sequences=2)
    with block(model) as run:
        out = model.generate(IDS, config)
    return Done(run, out, out, IDS.shape[1], per_request=2)


@cache
def word_tokenizer() -> PreTrainedTokenizerFast:
    """Words w3, w4, ... are tokens 3, 4, ..., behind the special ones."""
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    words = {"<pad>": PAD, "<s>": BOS, "</s>": EOS} | {f"w{i}": i for i in range(3, VOCAB)}
    core = Tokenizer(models.WordLevel(words, unk_token="w3"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, **special)
