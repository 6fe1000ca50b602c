"""A boost for biology in one picture: what it explains beside its base, some of its latents found by what they do,
where they fire, and what the model writes when they are pushed.

python examples/08_a_boost.py [out/boost.png]
"""

import sys

import torch
from topic_sentences import BIOLOGY, SHOW_ON, TOPICS

from saeguard import Add, Plan, Rule, capture, load_model, load_sae, steer
from saeguard.drawing.boost_picture import Answer, Bar, BoostPicture, Strip, write_boost_picture
from saeguard.evaluating.fluency import continuation_nats, perplexity_ratio, word_share
from saeguard.evaluating.passes import Text
from saeguard.evaluating.portrait import portrait
from saeguard.scoring.pushed import Reading, pushed
from saeguard.scoring.table import Meaning
from saeguard.scoring.texts import Texts

PUSHED, AMOUNT = 5, 2.0

model, tokenizer = load_model("smollm2-135m-instruct")
base, sae = load_sae("smollm2-135m-instruct/resid_post.20"), load_sae("smollm2-135m-instruct/resid_post.20+biology")
topics, words = {"biology": BIOLOGY, **TOPICS}, BIOLOGY[1].split()
texts = []
for topic, (text, _) in topics.items():
    rows = Texts.from_text([part.strip() + "." for part in text.split(".") if part.strip()], tokenizer, sae, name=topic)
    texts.append(Text(topic, rows.ids, rows.mask, rows.kept))

# Compared: what each leaves of the stream, and what its reconstruction in the place of the stream costs the model.
sides = [portrait(model, one, texts).texts for one in (base, sae)]
unexplained = [[100 * of.fvu_typical for of in side] for side in sides]
costs = [[(of.ce_spliced or 0.0) - (of.ce or 0.0) for of in side] for side in sides]
panels = {"Variance left unexplained, %": tuple(map(Bar, topics, *unexplained)),
          "Cross-entropy above the plain model, nats per token": tuple(map(Bar, topics, *costs))}  # fmt: skip

# Found: the latents of the boost that make words of biology likeliest when pushed behind prompts about nothing.
first = torch.tensor([tokenizer(" " + word)["input_ids"][0] for word in words])
gain = Reading(lambda prefix, log_p, rows: {"gain": log_p[:, first].logsumexp(1) - prefix.clean[first].logsumexp(0)},
               {"gain": Meaning("log odds of the words", "this example")}, {"score": "gain"})  # fmt: skip
scores = pushed(model, tokenizer, sae, [gain], factor=5.0, of="recorded", latents=range(base.d_sae, sae.d_sae),
                prefixes=("I would like to talk about the", "She wrote a letter about", "A book about"))  # fmt: skip
best = scores.column("gain").nan_to_num(-torch.inf).topk(PUSHED)
latents, raised = tuple(best.indices.tolist()), ", ".join(f"{nats:.1f}" for nats in best.values.tolist())


def strip(text: Text) -> Strip:
    """On how many tokens of a topic each of them fires, and the sentence on which they fire most."""
    with torch.no_grad(), capture(model, sae.site) as tape:
        model(input_ids=text.ids, attention_mask=text.real.long())
    f = sae.encode(tape[sae.site])[..., list(latents)] * text.counted[..., None]
    row = int(f.sum((1, 2)).argmax())
    here, shares = text.counted[row], (f[text.counted] > 0).float().mean(0).tolist()
    names = [f"{latent}, on {share:.0%}" for latent, share in zip(latents, shares, strict=True)]
    tokens = tuple(tokenizer.decode([token]) for token in text.ids[row][here].tolist())
    shown = tuple(zip(names, map(tuple, f[row][here].T.tolist()), strict=True))
    return Strip(f"share of all tokens about {text.name}, and the sentence on which they fire most", tokens, shown)


# Steered: they are raised at every token that the model writes; what the SAE does not explain passes through.
plan = Plan((Rule(sae.name, latents, Add(AMOUNT, unit="max"), phase="generated"),))
batch, n = tokenizer([*SHOW_ON] * 2, padding=True, padding_side="left", return_tensors="pt"), len(SHOW_ON)
with steer(model, [None] * n + [plan] * n, saes=sae, tokenizer=tokenizer):
    ids = model.generate(**batch, max_new_tokens=30, do_sample=False)
nats = continuation_nats(model, ids, batch["attention_mask"], stop_ids=[tokenizer.eos_token_id])
written = tokenizer.batch_decode(ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
plain, steered = (sum(word_share(text, words) for text in side) / n for side in (written[:n], written[n:]))
told = (f"Steered: all {PUSHED} raised by {AMOUNT:g} times their maximum. Words of biology: {plain:.1%} plain, "
        f"{steered:.1%} steered, {n} prompts; perplexity x {perplexity_ratio(nats[n:], nats[:n]):.2f}")  # fmt: skip
print(*(f"{bar.name:10}{bar.before:7.1f} %{bar.after:7.1f} %" for bar in next(iter(panels.values()))), told, sep="\n")
picture = BoostPicture(
    "A boost for biology: compared, found, steered",
    f"{sae.name}   |   {sae.d_sae - base.d_sae} latents behind the base's {base.d_sae}   |   ten sentences per topic",
    ("base", "base + biology"), panels,
    f"Found: the latents of the boost that make words of biology likeliest when pushed, by {raised} nats",
    (strip(texts[0]), strip(texts[4])), told, tuple(map(Answer, SHOW_ON[:5], written, written[n:])), words,
)  # fmt: skip
print(write_boost_picture(picture, sys.argv[1] if sys.argv[1:] else "out/boost.png"))
