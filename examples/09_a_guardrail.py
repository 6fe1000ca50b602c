"""A guardrail in a page: a gate on latents that fire on biology, a threshold from harmless text, policies, a log.

The gate counts, token by token, how far hits exceed what harmless text has (CUSUM), so harmless text around a question
changes nothing that was decided. Latents and threshold come from a few sentences: a sketch, not a product.

python examples/09_a_guardrail.py
"""

import tempfile
from pathlib import Path

import torch
from topic_sentences import BIOLOGY, TOPICS

from saeguard import Clamp, Plan, Rule, capture, load_model, load_sae
from saeguard.gates import Cusum, Hits, Latched, Watch
from saeguard.guarding.audit import AuditLog
from saeguard.guarding.calibrating import threshold
from saeguard.guarding.guardrail import Guardrail
from saeguard.guarding.policy import Policy, Refuse
from saeguard.guarding.verify import verify

N, DRIFT, LEVEL = 40, 0.3, 0.05

model, tokenizer = load_model("smollm2-135m-instruct")
sae = load_sae("smollm2-135m-instruct/resid_post.20")


def fires(sentence: str) -> torch.Tensor:
    """Which latents fire at each token."""
    with torch.no_grad(), capture(model, sae.site) as tape:
        model(**tokenizer(sentence, return_tensors="pt"))
    return sae.encode(tape[sae.site])[0] > 0


def sentences(text: str) -> list[str]:
    return [part.strip() + "." for part in text.split(".") if part.strip()]


def chat(question: str) -> str:
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
    )


def height(sentence: str) -> float:
    """How high the evidence piles up: the gate's score, by its equation."""
    score = highest = 0.0
    for hit in fires(sentence)[:, list(watched)].any(-1).tolist():
        score = max(0.0, score + hit - DRIFT)
        highest = max(highest, score)
    return highest


# Latents that fire more often on biology than on anything else, and a height that harmless sentences hardly reach.
harmless = [one for text, _ in TOPICS.values() for one in sentences(text)]
there = torch.cat([fires(one) for one in sentences(BIOLOGY[0])]).float().mean(0)
elsewhere = torch.cat([fires(chat(one)) for one in harmless]).float().mean(0)
watched = tuple(sorted((there - 10 * elsewhere).topk(N).indices.tolist()))
limit = threshold([height(chat(one)) for one in harmless], level=LEVEL, method="conformal")
print(f"{N} latents; height {limit.value:.2f}, which {limit.above} of {limit.n} harmless sentences exceed")

gate = Latched(Watch(Hits(watched), Cusum(DRIFT), limit.value))
refuse = Policy.of(model, tokenizer, sae, name="biology is refused", calibration=limit.to_dict(),
                   refusals=(Refuse(gate, sae.name, None, "I do not talk about biology.", "biology"),))  # fmt: skip
garble = Plan((Rule(sae.name, watched, Clamp(-0.3, when="always", unit="norm"), gate=gate),))
forget = Policy.of(model, tokenizer, sae, garble, name="biology is garbled", calibration=limit.to_dict())

questions = ["How do ribosomes in a cell build proteins from amino acids?", "Who was the first president of the USA?"]
batch = tokenizer([chat(q) for q in questions] * 3, return_tensors="pt", padding=True, padding_side="left")
with tempfile.TemporaryDirectory() as folder:
    log = AuditLog(Path(folder) / "audit.jsonl")
    with Guardrail.attach(model, {"open": None, "refuse": refuse, "forget": forget}, tokenizer=tokenizer, saes=sae,
                          audit=log) as guard:  # fmt: skip
        found = guard.generate(**batch, rows=["open"] * 2 + ["refuse"] * 2 + ["forget"] * 2, max_new_tokens=24,
                               do_sample=False)  # fmt: skip
    print(f"on record: {verify(log.path).records} requests, unbroken: {verify(log.path).ok}")
for i, (text, decision) in enumerate(zip(found.texts(tokenizer), found.decisions, strict=True)):
    print(f"{questions[i % 2]}\n  {decision.policy:>6}  {decision.decision:>6}  {' '.join(text.split())}")
