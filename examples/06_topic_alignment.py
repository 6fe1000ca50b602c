"""Topic alignment as IBM does it: every latent is scored for a topic, and modes steer by the scores in one batch.

Beside the published modes, whose scores are weights from 0 to 1 and which drop the SAE's error, stand three that keep
it and take the centred score: latents nearer to the topic than texts in general weigh up to 7 times as much.

python examples/06_topic_alignment.py [medical | reviews] [prompts.jsonl[.gz]]

A file of prompts has a text per line under "text" or "question"; its first words are what the model goes on with.
"""

import gzip
import json
import sys

import torch

from saeguard import load_model, load_sae, steer
from saeguard.evaluating.fluency import continuation_nats, perplexity_ratio
from saeguard.scoring.sentences import minilm
from saeguard.scoring.table import Meaning, ScoreTable
from saeguard.scoring.topic_modes import topic_plan
from saeguard.scoring.topic_profile import TopicProfile

SAE_NAME = "smollm2-135m-instruct/resid_post.20"
ALIGNED = {
    "medical": (
        "A skin disease with itching and redness, treated with creams and tablets.",
        "Symptoms include fever, a cough and shortness of breath; doctors prescribe antibiotics.",
        "The patient had surgery for a tumor and recovered in hospital.",
        "High blood pressure raises the risk of a stroke or a heart attack.",
    ),
    "reviews": (
        "I bought these shoes last month and they fell apart after two weeks. One star.",
        "Great headphones for the price, the sound is clear and delivery was quick. Five stars.",
        "The book was boring and I could not finish it. Do not waste your money.",
        "I love this vacuum cleaner, it works perfectly and I recommend it to everyone.",
    ),
}
PROMPTS = ("I would like to tell you about", "Last week I noticed", "My sister asked me",
           "The best thing about it is", "I have always wondered why")  # fmt: skip
K = {"top_k": 61}  # as many latents as usually fire: thresholds alone would only lose some
OURS = {"column": "weight", "keep_error": True}
MODES = {
    "original": {"mode": "original"}, "sae": {"mode": "sae"}, "clamp": {"mode": "clamp"},
    "weight": {"mode": "weight"} | K, "swap": {"mode": "swap"} | K,
    "clamp, centred": {"mode": "clamp", "top": 20, "amount": 5.0} | OURS,
    "weight, centred": {"mode": "weight"} | K | OURS, "swap, centred": {"mode": "swap"} | K | OURS,
}  # fmt: skip


def read(path: str) -> tuple[str, ...]:
    with (gzip.open if path.endswith(".gz") else open)(path, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    return tuple(" ".join(str(row.get("text") or row["question"]).split()[:8]) for row in rows[:8])


topic = sys.argv[1] if sys.argv[1:] else "medical"
prompts = read(sys.argv[2]) if sys.argv[2:] else PROMPTS
model, tokenizer = load_model("smollm2-135m-instruct")
sae, embedder = load_sae(SAE_NAME), minilm()
scores = TopicProfile.load(SAE_NAME, sae=sae).scores(ALIGNED[topic], embedder=embedder)
centred = torch.where(scores.column("topic_texts") >= 10, scores.column("topic_centred"), 0.0).clamp(min=0)
weight = Meaning("weight", "after arXiv 2506.12576")
scores = scores.join(ScoreTable.of(sae, {"weight": (1 + 6 * centred / centred.max(), weight)}))

plans = [topic_plan(scores, phase="generated", **how) for how in MODES.values()]
batch = tokenizer(list(prompts) * len(plans), padding=True, padding_side="left", return_tensors="pt")
torch.manual_seed(0)
with steer(model, [plan for plan in plans for _ in prompts], saes=sae, tokenizer=tokenizer):
    ids = model.generate(**batch, max_new_tokens=30, do_sample=True, temperature=0.7)
texts = tokenizer.batch_decode(ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
nats = continuation_nats(model, ids, batch["attention_mask"], stop_ids=[tokenizer.eos_token_id])
near = (embedder(texts) @ embedder(list(ALIGNED[topic])).T).amax(1)

print(f"{topic}: cosine of what is written with the topic's texts, and perplexity against the original's")
for number, mode in enumerate(MODES):
    mine = slice(number * len(prompts), (number + 1) * len(prompts))
    ratio = perplexity_ratio(nats[mine], nats[: len(prompts)])
    print(f"{mode:18} {float(near[mine].mean()):6.3f}  x {ratio:<8.2f} {texts[mine][0][:70]!r}")
