"""What an edit adds to a token, per engine, beside the framework's own way to make the same edit.

    python benchmarks/engines.py [--rounds 5] [--tokens 32] [--batch 1] [--latents 20] [--engines transformers ...]

Every engine generates the same tokens with the same model: plain, inside `steer`, and with its framework's own means:
a forward hook of torch, a hook function of TransformerLens, the code of an nnsight trace. Those encode x with the whole
SAE, set the latents, decode twice and keep the error, which is how hooks on SAEs are published:

    f = act(x W_enc + b_enc)        x' = decode(f with the latents set) + x - decode(f)

All of it runs in one process, in rounds, each of which takes every way of every engine in turn; what is added is taken
round by round from the plain time of the same round, and the medians are reported. Engines whose package is not
installed, or which this saeguard does not know, are named and left out. Ends with one line of JSON.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from saeguard import SAE, Clamp, Plan, Rule, load_model, load_sae, steer
from saeguard.engines import engine_for
from saeguard.errors import UnsupportedModel

MODEL, SAE_NAME = "smollm2-135m-instruct", "smollm2-135m-instruct/resid_post.20"
LEVEL = 2.0
OP = Clamp(LEVEL, when="always")
PROMPT = "Tell me about the sea."
Way = Callable[[], Tensor]


class Dense:
    """The edit with the full SAE: encode everything, decode everything twice."""

    def __init__(self, sae: SAE, latents: tuple[int, ...]):
        whole = sae.to(dtype=torch.float32)
        self.W_enc, self.b_enc, self.W_dec, self.b_dec = whole.W_enc, whole.b_enc, whole.W_dec, whole.b_dec
        self.threshold, self.latents, self.value = whole.threshold, list(latents), LEVEL

    def __call__(self, x: Tensor) -> Tensor:
        pre = x @ self.W_enc + self.b_enc
        f = pre.relu() if self.threshold is None else torch.where(pre > self.threshold, pre, 0.0)
        error = x - (f @ self.W_dec + self.b_dec)
        f[..., self.latents] = self.value
        return f @ self.W_dec + self.b_dec + error


class Bench:
    """What every engine is given."""

    def __init__(self, options: argparse.Namespace):
        self.options, self.sae = options, load_sae(SAE_NAME)
        assert self.sae.site is not None
        self.layer, latents = self.sae.site.layer, tuple(range(100, 100 + options.latents))
        self.plan, self.dense = Plan((Rule(self.sae.name, latents, OP),)), Dense(self.sae, latents)

    def ids(self, tokenizer: Any) -> Tensor:
        """One prompt, as often as there are rows."""
        return torch.tensor([tokenizer(PROMPT)["input_ids"]] * self.options.batch)

    def within(self, model: Any, way: Way) -> Way:
        """``way`` inside a block."""

        def steered() -> Tensor:
            with steer(model, self.plan, saes=self.sae, canary=False):
                return way()

        return steered


def transformers_ways(bench: Bench) -> Mapping[str, Way]:
    """A forward hook on the block."""
    loaded: Any = load_model(MODEL)
    model, ids, n = loaded.model, bench.ids(loaded.tokenizer), bench.options.tokens

    def plain() -> Tensor:
        return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=n, min_new_tokens=n,
                              do_sample=False)  # fmt: skip

    def own() -> Tensor:
        hook = model.model.layers[bench.layer].register_forward_hook(
            lambda module, args, output: bench.dense(output) if isinstance(output, Tensor)
            else (bench.dense(output[0]), *output[1:])
        )  # fmt: skip
        try:
            return plain()
        finally:
            hook.remove()

    return {"plain": plain, "saeguard": bench.within(model, plain), "own": own}


def lens_ways(bench: Bench) -> Mapping[str, Way]:
    """A hook function of TransformerLens at the block's hook point."""
    from transformer_lens.model_bridge import TransformerBridge

    loaded: Any = load_model(MODEL)
    model: Any = loaded.model
    model.config.architectures = [type(model).__name__]
    bridge: Any = TransformerBridge.boot_transformers(MODEL, hf_model=model, tokenizer=loaded.tokenizer, device="cpu")
    ids, n = bench.ids(loaded.tokenizer), bench.options.tokens

    def plain() -> Tensor:
        return bridge.generate(ids, max_new_tokens=n, do_sample=False, stop_at_eos=False, verbose=False,
                               return_type="tokens")  # fmt: skip

    def own() -> Tensor:
        point = f"blocks.{bench.layer}.hook_out"
        with bridge.hooks(fwd_hooks=[(point, lambda x, hook: bench.dense(x))]):
            return plain()

    return {"plain": plain, "saeguard": bench.within(bridge, plain), "own": own}


def nnsight_ways(bench: Bench) -> Mapping[str, Way]:
    """The code of a trace of generate, at every step."""
    import nnsight

    loaded: Any = load_model(MODEL)
    model: Any = nnsight.TransformersModel(loaded.model, tokenizer=loaded.tokenizer, task="text-generation")
    ids, n, layer, dense = bench.ids(loaded.tokenizer), bench.options.tokens, bench.layer, bench.dense
    how = {"max_new_tokens": n, "min_new_tokens": n, "do_sample": False}

    def plain() -> Tensor:
        with model.generate(ids, **how) as tracer:
            out = tracer.result.save()
        return out  # noqa: RET504  nnsight fills it in

    def own() -> Tensor:
        with model.generate(ids, **how) as tracer:
            for _ in tracer.iter[:n]:
                model.model.layers[layer].output = dense(model.model.layers[layer].output)
            out = tracer.result.save()
        return out  # noqa: RET504

    engine_for(model)  # refused where this saeguard does not know it
    return {"plain": plain, "saeguard": bench.within(model, plain), "own": own}


ENGINES: dict[str, tuple[str, Callable[[Bench], Mapping[str, Way]]]] = {
    "transformers": ("transformers", transformers_ways),
    "TransformerLens": ("transformer_lens", lens_ways),
    "nnsight": ("nnsight", nnsight_ways),
}


def ways_of(bench: Bench) -> tuple[dict[str, Mapping[str, Way]], dict[str, str]]:
    """The ways of every engine that is there, and why the others are not."""
    found, missing = {}, {}
    for name in bench.options.engines:
        package, ways = ENGINES[name]
        if find_spec(package) is None:
            missing[name] = f"{package} is not installed"
            continue
        try:
            found[name] = ways(bench)
        except (ImportError, UnsupportedModel) as error:
            missing[name] = str(error)
    return found, missing


def measure(bench: Bench, found: Mapping[str, Mapping[str, Way]]) -> dict[str, dict[str, float]]:
    """Per engine: milliseconds of a plain token, and what the two edits add to it."""
    n = bench.options.tokens
    times: dict[tuple[str, str], list[float]] = {(engine, way): [] for engine in found for way in found[engine]}
    said = {}
    with torch.no_grad():
        for (engine, way), _ in times.items():  # warm, and what they write
            said[engine, way] = found[engine][way]()[:, -n:]
        for _ in range(bench.options.rounds):
            for (engine, way), taken in times.items():
                start = time.perf_counter()
                found[engine][way]()
                taken.append((time.perf_counter() - start) * 1000 / n)

    def added(engine: str, way: str) -> float:
        both = zip(times[engine, way], times[engine, "plain"], strict=True)
        return statistics.median(edited - plain for edited, plain in both)

    return {
        engine: {
            "plain_ms": statistics.median(times[engine, "plain"]),
            "saeguard_added_ms": added(engine, "saeguard"),
            "own_added_ms": added(engine, "own"),
            "same_tokens": float((said[engine, "saeguard"] == said[engine, "own"]).float().mean()),
        }
        for engine in found
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--latents", type=int, default=20)
    parser.add_argument("--engines", nargs="+", choices=list(ENGINES), default=list(ENGINES))
    bench = Bench(parser.parse_args())
    found, missing = ways_of(bench)
    results = measure(bench, found)

    table = Table("engine", "plain", "saeguard adds", "its own hook adds", "same tokens", title=(
        f"Milliseconds per token, SmolLM2-135M, batch {bench.options.batch}, {bench.options.latents} latents of "
        f"{bench.sae.d_sae}, {platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    ))  # fmt: skip
    for engine, row in results.items():
        table.add_row(engine, f"{row['plain_ms']:.1f}", f"{row['saeguard_added_ms']:+.2f}",
                      f"{row['own_added_ms']:+.2f}", f"{row['same_tokens']:.0%}")  # fmt: skip
    console = Console()
    console.print(table)
    for engine, why in missing.items():
        console.print(f"{engine} left out: {why}", markup=False)
    print(json.dumps({name: {key: round(x, 4) for key, x in row.items()} for name, row in results.items()}))


if __name__ == "__main__":
    main()
