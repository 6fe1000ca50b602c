"""What steering costs on this machine: milliseconds per token in interleaved rounds, and memory."""

import statistics
import sys
import time
from typing import Any

import torch

from saeguard.checking.claims import Claim, Found, claim
from saeguard.checking.subject import Subject
from saeguard.plans import Plan

ROUNDS, TOKENS = 3, 6


def claim_of_cost(subject: Subject, plan: Plan) -> Claim:
    """``cost``: it holds where steered generation runs at all; its numbers are for the reader to judge."""
    return claim("cost", "what steering adds here, plain and steered in turn", lambda: _cost(subject, plan))


def _cost(subject: Subject, plan: Plan) -> Found:
    """Milliseconds per generated token and megabytes; ``peak_mb`` is the most that this process ever held.

    A machine that speeds up or slows down hits both alike: the differences are taken round by round. The laws have
    generated before, so that nothing is cold.
    """
    numbers: dict[str, int | float] = {
        "model_mb": _megabytes(subject.model.parameters()),
        "sae_mb": _sae_megabytes(subject),
    } | _peak()
    memory = ", ".join(f"{name.removesuffix('_mb').replace('_', ' ')} {size:,.1f} MB" for name, size in numbers.items())
    if not hasattr(subject.model, "generate"):
        return None, f"{type(subject.model).__name__} cannot generate; {memory}", numbers
    plain, added = _times(subject, plan)
    numbers |= {"plain_ms_per_token": plain, "added_ms_per_token": added}
    return True, f"{plain:.2f} ms per token, {added:+.2f} steered; {memory}", numbers


def _times(subject: Subject, plan: Plan) -> tuple[float, float]:
    """The medians of plain milliseconds per token, and of what steering adds to them."""
    plain, added = [], []
    with torch.inference_mode():
        for _ in range(ROUNDS):
            bare = _generate(subject)
            with subject.steer(plan):
                steered = _generate(subject)
            plain.append(bare)
            added.append(steered - bare)
    return statistics.median(plain), statistics.median(added)


def _generate(subject: Subject) -> float:
    start = time.perf_counter()
    subject.generate(subject.prompts[:1], TOKENS)
    return (time.perf_counter() - start) * 1000 / TOKENS


def _megabytes(tensors: Any) -> float:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors) / 1e6


def _sae_megabytes(subject: Subject) -> float:
    sae = subject.own
    held = [sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec, sae.threshold, sae.maximum, sae.skip]
    return _megabytes(tensor for tensor in held if tensor is not None)


def _peak() -> dict[str, float]:
    """The most memory that this process held, where the system says it."""
    found = {"cuda_peak_mb": torch.cuda.max_memory_allocated() / 1e6} if torch.cuda.is_available() else {}
    try:
        import resource
    except ImportError:  # Windows
        return found
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # kilobytes, and bytes on macOS
    return found | {"peak_mb": peak / 1e6 if sys.platform == "darwin" else peak / 1e3}
