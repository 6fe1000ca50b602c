"""Five topics, ten sentences each: latents by STA, the largest strength that stays fluent, and a page that shows it.

python examples/05_five_topics.py [out/topics.html]
"""

import sys

import torch
from topic_sentences import CHOOSE_ON, SHOW_ON, TOPICS

from saeguard import Add, Plan, load_model, load_sae, steer
from saeguard.drawing.page import write_page
from saeguard.drawing.scene import Proof, Scene, encode, make_lines, play, sites_of
from saeguard.evaluating.fluency import continuation_nats, perplexity_ratio, word_share
from saeguard.scoring.contrast import sta
from saeguard.scoring.select import Selection, select
from saeguard.scoring.statistics import gather
from saeguard.scoring.texts import Texts

SAE_NAME, LATENTS, STRENGTHS, FLUENT = "smollm2-135m-instruct/resid_post.20", 20, (1.0, 1.5, 2.0, 2.5), 1.25

model, tokenizer = load_model("smollm2-135m-instruct")
sae = load_sae(SAE_NAME)


def latents(topic: str) -> Selection:
    """Those of which the topic's sentences have most more than the other topics' sentences."""
    texts = {name: [part.strip() + "." for part in TOPICS[name][0].split(".") if part.strip()] for name in TOPICS}
    sides = {"positive": texts.pop(topic), "negative": sum(texts.values(), [])}
    found = gather(model, sae, {name: Texts.from_text(side, tokenizer, sae) for name, side in sides.items()})
    return select(sta(found), "sta", top=LATENTS)


def push(chosen: Selection, strength: float) -> Plan:
    """Add ``strength`` times that difference at every token that the model writes."""
    return chosen.plan(Add(tuple(strength * (amount or 0.0) for amount in chosen.scores["sta"])), phase="generated")


def write(rows: list[tuple[str, Plan | None]]) -> tuple[list[str], torch.Tensor]:
    """What the model writes behind each prompt, and how many nats per token the plain model finds in it."""
    batch = tokenizer([prompt for prompt, _ in rows], padding=True, padding_side="left", return_tensors="pt")
    torch.manual_seed(0)
    with steer(model, [plan for _, plan in rows], saes=sae, tokenizer=tokenizer):
        ids = model.generate(**batch, max_new_tokens=40, do_sample=True, temperature=0.7)
    nats = continuation_nats(model, ids, batch["attention_mask"], stop_ids=[tokenizer.eos_token_id])
    return tokenizer.batch_decode(ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True), nats


tried: dict[tuple[str, float], Plan | None] = {("", 0.0): None}
for topic in TOPICS:
    tried |= {(topic, strength): push(chosen, strength) for chosen in [latents(topic)] for strength in STRENGTHS}
plain, *others = write([(prompt, plan) for plan in tried.values() for prompt in CHOOSE_ON])[1].view(-1, len(CHOOSE_ON))
ratios = {key: perplexity_ratio(nats, plain) for key, nats in zip(list(tried)[1:], others, strict=True)}
best = {topic: max([s for s in STRENGTHS if ratios[topic, s] <= FLUENT], default=STRENGTHS[0]) for topic in TOPICS}
plans = [None, *(tried[topic, best[topic]] for topic in TOPICS)]

texts, nats = write([(prompt, plan) for plan in plans for prompt in SHOW_ON])
proofs, n, shown = [], len(SHOW_ON), []
for number, (topic, (_, words)) in enumerate(TOPICS.items(), start=1):
    written, ratio = texts[number * n : number * n + n], perplexity_ratio(nats[number * n : number * n + n], nats[:n])
    before, after = (sum(word_share(text, words.split()) for text in some) / n for some in (texts[:n], written))
    found = f"{before:.1%} of the words plain, {after:.1%} steered, {n} prompts, perplexity x {ratio:.2f}"
    claim, holds = f"{topic}, strength {best[topic]}: more of its words, still fluent", before < after and ratio <= 1.5
    proofs.append(Proof(claim, found, holds))
    most = max(range(n), key=lambda i: word_share(written[i], words.split()))
    shown.append(SHOW_ON[most])  # of twelve, the one that is most about it
    print(f"{topic:9}{found}\n         {SHOW_ON[most]} ...{' '.join(written[most].split())}")

saes = {SAE_NAME: sae}
batch = encode(tokenizer, shown, chat=False)
takes = [play(model, batch, given, tokenizer=tokenizer, saes=saes, sites=sites_of(plans, saes), max_new_tokens=60)
         for given in (None, plans[1:])]  # fmt: skip
lines = make_lines(*takes, plans[1:], saes, tokenizer, list(TOPICS))
scene = Scene("Five topics, ten sentences each", "smollm2-135m-instruct", lines, takes[1].run.report, tuple(proofs))
print(write_page(scene, sys.argv[1] if sys.argv[1:] else "out/topics.html"))
