"""What steering costs: steered over plain decode time on SmolLM2, and the sliced edit over the dense one.

    python benchmarks/overhead.py [--rounds 12] [--tokens 24]

Decode: one site, 20 latents. Plain, steered and dense (full encode, full decode, error term, as published hooks do
it) generate the same number of tokens in turn, and ratios are taken round by round, so that a machine that speeds up
or slows down hits all three alike; the medians are reported. The dense hook uses the same weights and the same edit.
Sliced against dense edit: the edit alone at the shapes of Gemma 2 2B with Gemma Scope (d 2304, 16,384 latents), one
token, as in a decode step. Ends with one line of JSON.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table

from saeguard import SAE, Clamp, Plan, Rule, Site, load_model, load_sae, steer
from saeguard.kernels import sliced
from saeguard.kernels.parts import lay_out
from saeguard.loaders import shipped

LATENTS = tuple(range(100, 120))
OP = Clamp(2.0, when="always")


def seconds(job: Callable[[], object]) -> float:
    start = time.perf_counter()
    job()
    return time.perf_counter() - start


def random_sae(d_in: int, d_sae: int, site: Site) -> SAE:
    generator = torch.Generator().manual_seed(0)

    def weights(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) / d_in**0.5

    return SAE("random", weights(d_in, d_sae), weights(d_sae), weights(d_sae, d_in), weights(d_in), "jumprelu",
               torch.full((d_sae,), 0.5), site=site)  # fmt: skip


def dense_edit(x: torch.Tensor, W_enc: torch.Tensor, sae: SAE) -> torch.Tensor:
    """The published form: encode everything, decode everything twice, keep the error."""
    pre = x @ W_enc + sae.b_enc
    f = torch.where(pre > sae.threshold, pre, 0.0) if sae.threshold is not None else pre.relu()
    error = x - (f @ sae.W_dec + sae.b_dec)
    f[..., list(LATENTS)] = OP.value
    return f @ sae.W_dec + sae.b_dec + error


def decode_ratios(batch: int, rounds: int, tokens: int) -> dict[str, float]:
    model, tokenizer = load_model("smollm2-135m-instruct")
    names = sorted(shipped())
    sae = load_sae(names[-1]) if names else random_sae(576, 4608, Site("resid_post", 20))
    whole = sae.to(dtype=torch.float32)
    block = model.model.layers[sae.site.layer]
    inputs = tokenizer(["Tell me about the sea."] * batch, return_tensors="pt")
    options = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}
    plan = Plan((Rule(sae.name, LATENTS, OP),))

    def plain() -> None:
        model.generate(**inputs, **options)

    def dense() -> None:
        hook = block.register_forward_hook(lambda module, args, output: dense_edit(output, whole.W_enc, whole))
        try:
            model.generate(**inputs, **options)
        finally:
            hook.remove()

    steered_times, dense_times = [], []
    with torch.inference_mode():
        plain(), dense()
        for _ in range(rounds):
            base = seconds(plain)
            with steer(model, plan, saes=sae):
                steered_times.append(seconds(plain) / base)
            dense_times.append(seconds(dense) / base)
    return {"steered": statistics.median(steered_times), "dense": statistics.median(dense_times)}


def edit_ratio(rounds: int) -> tuple[float, float, float]:
    """Dense over sliced, and both in milliseconds, for one token at Gemma 2 2B shapes."""
    sae = random_sae(2304, 16_384, Site("resid_post", 12))
    part = lay_out(sae, [Rule("random", LATENTS, OP)], [None])
    x, selected = torch.randn(1, 1, 2304), torch.ones(1, 1, 1, dtype=torch.bool)

    def sliced_job() -> None:
        for _ in range(20):
            dx, df, _ = sliced.edit(x, x, part, selected)
            torch.where((df != 0).any(-1, keepdim=True), x + dx, x)

    def dense_job() -> None:
        dense_edit(x, sae.W_enc, sae)

    with torch.inference_mode():
        sliced_job(), dense_job()
        pairs = [(seconds(sliced_job) / 20, seconds(dense_job)) for _ in range(rounds)]
    return (
        statistics.median(slow / fast for fast, slow in pairs),
        1e3 * statistics.median(fast for fast, _ in pairs),
        1e3 * statistics.median(slow for _, slow in pairs),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=24)
    options = parser.parse_args()
    one = decode_ratios(1, options.rounds, options.tokens)
    eight = decode_ratios(8, options.rounds, options.tokens)
    ratio, fast_ms, slow_ms = edit_ratio(4 * options.rounds)

    table = Table("", "batch 1", "batch 8", title=f"Decode time over plain, {platform.machine()}, "
                  f"{torch.get_num_threads()} threads, torch {torch.__version__}")  # fmt: skip
    table.add_row("steered (20 latents)", f"{one['steered']:.3f}", f"{eight['steered']:.3f}")
    table.add_row("dense hook, same edit", f"{one['dense']:.3f}", f"{eight['dense']:.3f}")
    Console().print(table)
    Console().print(f"One token at d 2304, 16,384 latents: sliced {fast_ms:.3f} ms, dense {slow_ms:.2f} ms")
    print(
        json.dumps(
            {
                "steered_over_plain_b1": round(one["steered"], 4),
                "steered_over_plain_b8": round(eight["steered"], 4),
                "dense_over_plain_b1": round(one["dense"], 4),
                "dense_over_plain_b8": round(eight["dense"], 4),
                "dense_over_sliced": round(ratio, 1),
            }
        )
    )


if __name__ == "__main__":
    main()
