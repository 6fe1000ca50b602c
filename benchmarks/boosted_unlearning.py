"""Does forgetting get better with a boost's latents? Base latents alone against base and domain latents together.

    python benchmarks/boosted_unlearning.py --forget biology.train.jsonl.gz --retain physics.train.jsonl.gz ... \
        --questions glossary_mcq.val.jsonl.gz [--domain biology] [--keep physics history government_law]

SmolLM2-135M-Instruct with the shipped late SAE and its biology boost. Latents are chosen by DSG's ratio on the texts,
once among the base's latents and once among all, and turned around at every token (Scale by -s). Accuracy by
log-likelihood (sum) on questions that nothing was chosen on, with Wilson intervals. The last line is JSON;
without texts and questions it says that nothing was measured.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from saeguard import SAE, Plan, Rule, Scale, load_model, load_sae, steer
from saeguard.evaluating.multiple_choice import Answers, Question, answer, read_questions
from saeguard.scoring.forget_retain import dsg
from saeguard.scoring.select import select
from saeguard.scoring.statistics import Statistics, gather
from saeguard.scoring.texts import Texts
from saeguard.training.corpus import read_corpus

BASE = "smollm2-135m-instruct/resid_post.20"


def chosen(statistics: Statistics, n_base: int, top: int, *, domain: bool) -> tuple[int, ...]:
    """The ``top`` latents by mean activation on the text to forget, among the 5 % with the largest ratio."""
    found = select(dsg(statistics, floor=1e-3), "dsg", top=statistics.d_sae).latents
    return tuple(latent for latent in found if domain or latent < n_base)[:top]


def shares(answers: Answers, topics: list[str]) -> dict[str, dict[str, Any]]:
    found = {}
    for topic in topics:
        accuracy = answers.accuracy(topic=topic)
        low, high = accuracy.interval
        found[topic] = {
            "accuracy": round(accuracy.share, 4),
            "low": round(low, 4),
            "high": round(high, 4),
            "n": accuracy.n,
        }
    return found


def measure(model: Any, tokenizer: Any, sae: SAE, questions: list[Question], plan: Plan | None) -> Answers:
    with steer(model, plan, saes={sae.name: sae}, tokenizer=tokenizer):
        return answer(model, tokenizer, questions)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--forget", nargs="+", default=[])
    parser.add_argument("--retain", nargs="+", default=[])
    parser.add_argument("--questions")
    parser.add_argument("--domain", default="biology")
    parser.add_argument("--keep", nargs="+", default=["physics", "history", "government_law"])
    parser.add_argument("--tokens", type=int, default=40_000)
    parser.add_argument("--most", type=int, default=60, help="questions per topic")
    parser.add_argument("--top", type=int, nargs="+", default=[20, 50])
    parser.add_argument("--scale", type=float, nargs="+", default=[1.0, 3.0])
    given = parser.parse_args()
    if not (given.forget and given.retain and given.questions):
        print(json.dumps({"benchmark": "boosted_unlearning", "skipped": "give --forget, --retain and --questions"}))
        return
    start = time.perf_counter()
    model, tokenizer = load_model("smollm2-135m-instruct")
    sae = load_sae(f"{BASE}+{given.domain}")
    assert sae.n_base is not None
    texts = {}
    for name, files in (("forget", given.forget), ("retain", given.retain)):
        read = read_corpus([Path(file) for file in files], tokenizer, context=256, n_tokens=given.tokens, seed=0)
        texts[name] = Texts.from_chunks(read.ids, read.kept, name=name)
    statistics = gather(model, sae, texts)
    topics = [given.domain, *given.keep]
    questions = read_questions(given.questions, topics=topics, most=given.most)
    rows = [
        {
            "latents": "none",
            "top": 0,
            "scale": 0.0,
            "domain_latents": 0,
            **shares(measure(model, tokenizer, sae, questions, None), topics),
        }
    ]
    for top in given.top:
        for domain in (False, True):
            latents = chosen(statistics, sae.n_base, top, domain=domain)
            for scale in given.scale:
                plan = Plan((Rule(sae.name, latents, Scale(-scale)),))
                found = shares(measure(model, tokenizer, sae, questions, plan), topics)
                own = sum(latent >= sae.n_base for latent in latents)
                kind = "base and domain" if domain else "base"
                rows.append({"latents": kind, "top": top, "scale": -scale, "domain_latents": own, **found})
    table = Table(title=f"accuracy on {given.most} questions per topic")
    for head in ("latents", "top", "of the boost", "scale", *topics):
        table.add_column(head)
    for row in rows:
        cells = [f"{row[t]['accuracy']:.2f} ({row[t]['low']:.2f} to {row[t]['high']:.2f})" for t in topics]
        table.add_row(row["latents"], str(row["top"]), str(row["domain_latents"]), f"{row['scale']:g}", *cells)
    Console(width=160).print(table)
    print(json.dumps({"rows": rows, "seconds": round(time.perf_counter() - start)}))


if __name__ == "__main__":
    main()
