"""What scoring costs: the output score of every latent against one forward pass per latent, and all activation-type
scores against one plain forward pass over the same text.

    python benchmarks/scores.py [--sample 40] [--tokens 4096]

SmolLM2-135M-Instruct and the shipped SAE of layer 20. The published way of the output score is one full forward pass
per latent with a hook that encodes and decodes all latents and keeps the error in float64, measured before and after
the fast path on a sample and multiplied. The text is what the model writes. The last line is JSON.
"""

import argparse
import json
import platform
import resource
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from saeguard import SAE, load_model, load_sae
from saeguard.scoring import contrast, controls, forget_retain, frequency, probe
from saeguard.scoring.contexts import write_chunks
from saeguard.scoring.logit_lens import top_tokens
from saeguard.scoring.next_token import PREFIX, prefix_ids
from saeguard.scoring.output_score import output_score
from saeguard.scoring.statistics import Statistics, gather
from saeguard.scoring.texts import Texts


def timed(job: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    found = job()
    return time.perf_counter() - start, found


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


@torch.no_grad()
def published(model: Any, sae: SAE, ids: torch.Tensor, latent: int) -> float:
    """The output score of one latent, as its authors' code computes it: logit lens, one forward pass, two ranks."""
    own = model.lm_head(model.model.norm(sae.W_dec[latent])).softmax(-1).topk(20).indices

    def amplify(module: Any, args: Any, x: torch.Tensor) -> torch.Tensor:
        f = sae.encode(x)
        error = x.double() - sae.decode(f).double()
        f[:, -1, latent] += 10 * f[:, -1].max()
        return (sae.decode(f) + error).to(x.dtype)

    hook = model.model.layers[20].register_forward_hook(amplify)
    try:
        p = model(ids).logits[0, -1].softmax(-1)
    finally:
        hook.remove()
    order = p.argsort(descending=True)
    rank = min(int((order == token).nonzero()) for token in own)
    return (1 - rank / len(p)) * float(p[own].max())


def output_part(model: Any, tokenizer: Any, sae: SAE, n: int) -> dict[str, float]:
    ids = torch.tensor([prefix_ids(tokenizer, PREFIX)])
    sample = torch.randperm(sae.d_sae, generator=torch.Generator().manual_seed(0))[:n].tolist()
    published(model, sae, ids, 0)
    before, truth = timed(lambda: [published(model, sae, ids, latent) for latent in sample])
    seconds, table = timed(lambda: output_score(model, tokenizer, sae, own=top_tokens(model, sae)))
    after, _ = timed(lambda: [published(model, sae, ids, latent) for latent in sample])
    slow = (before + after) / 2 / n * sae.d_sae
    apart = (table.column("output_score")[sample] - torch.tensor(truth)).abs().max()
    return {"seconds": seconds, "speedup": slow / seconds, "slow": slow, "apart": float(apart), "peak_mb": peak_mb()}


def all_scores(statistics: Statistics) -> None:
    pair = {"positive": "forget", "negative": "retain"}
    frequency.frequency(statistics, "forget")
    forget_retain.dsg(statistics)
    forget_retain.farrell(statistics)
    forget_retain.crisp(statistics, target="forget", benign="retain")
    contrast.sta(statistics, **pair)
    contrast.conditional_difference(statistics, chosen="forget", rejected="retain")
    contrast.reason(statistics, "forget")
    probe.mosaic(statistics, **pair)
    controls.fake(statistics, text="forget", random="retain")
    controls.special(statistics, "forget")


def activation_part(model: Any, tokenizer: Any, sae: SAE, n_tokens: int, rounds: int = 3) -> dict[str, float]:
    ids, _ = write_chunks(model, tokenizer, n_tokens=n_tokens)
    halves = ids[: len(ids) // 2], ids[len(ids) // 2 :]
    counts = torch.bincount(ids.flatten())
    counts[tokenizer.all_special_ids] = 0
    groups = {str(place): [int(token)] for place, token in enumerate(counts.topk(3).indices)}
    texts = {
        name: Texts.from_ids(half, special_ids=tokenizer.all_special_ids, name=name).with_groups(groups)
        for name, half in zip(("forget", "retain"), halves, strict=True)
    }

    def forward() -> None:
        for half in halves:
            for start in range(0, len(half), 8):
                model(input_ids=half[start : start + 8], use_cache=False)

    def score() -> None:
        all_scores(gather(model, sae, texts, batch_rows=8, per_text=True))

    with torch.no_grad():
        forward(), score()
        pairs = [(timed(forward)[0], timed(score)[0]) for _ in range(rounds)]
    ratios = sorted(fast / plain for plain, fast in pairs)
    return {"forward": min(p for p, _ in pairs), "scores": min(s for _, s in pairs), "ratio": ratios[len(ratios) // 2]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sample", type=int, default=40)
    parser.add_argument("--tokens", type=int, default=4096)
    given = parser.parse_args()
    model, tokenizer = load_model("smollm2-135m-instruct")
    sae = load_sae("smollm2-135m-instruct/resid_post.20").to(dtype=torch.float32)
    output = output_part(model, tokenizer, sae, given.sample)
    activation = activation_part(model, tokenizer, sae, given.tokens)
    table = Table(
        "", "fast", "plain", title=f"{sae.d_sae} latents, {platform.machine()}, {torch.get_num_threads()} threads"
    )
    table.add_row(
        "output score of all, seconds", f"{output['seconds']:.1f}", f"{output['slow']:.0f} (from {given.sample})"
    )
    table.add_row("all activation-type scores over one forward pass, seconds", f"{activation['scores']:.1f}",
                  f"{activation['forward']:.1f}")  # fmt: skip
    Console().print(table)
    print(json.dumps({
        "output_score_speedup": round(output["speedup"], 1), "output_score_seconds": round(output["seconds"], 1),
        "output_score_largest_difference": output["apart"],
        "activation_scores_over_forward": round(activation["ratio"], 3), "peak_mb": round(peak_mb()),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
