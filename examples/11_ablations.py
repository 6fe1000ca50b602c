"""Ablations in a page: which latents carry a difference between two prompts, by putting each into the other run.

Two prompts differ in one word. At that word the latents of the first prompt are put into the run on the second, one
latent in each row of a batch, and the margin between the two answers says how much of the difference each one carries.
Gradients say the same to first order, from a single backward pass. The best ones together become a control vector.

python examples/11_ablations.py
"""

import tempfile
from pathlib import Path

import torch

from saeguard import Ablate, Add, Plan, Rule, capture, load_model, load_sae, steer
from saeguard.exporting import constant_vectors, export_vectors
from saeguard.patching import interchange, patch, read_latents
from saeguard.vectors import load_vectors

SAE_NAME, K = "smollm2-135m-instruct/resid_post.9", 24
A, B = "In Europe, the capital of France is", "In Europe, the capital of Italy is"

model, tokenizer = load_model("smollm2-135m-instruct")
sae = load_sae(SAE_NAME)
a, b = (tokenizer(text, return_tensors="pt") for text in (A, B))
WORD = int((a["input_ids"] != b["input_ids"])[0].nonzero()[0])
paris, rome = (tokenizer(word)["input_ids"][0] for word in (" Paris", " Rome"))


def margin(output) -> torch.Tensor:
    """How much more the model expects Paris than Rome, in logits, for each row."""
    return output.logits[:, -1, paris] - output.logits[:, -1, rome]


with torch.no_grad():
    plain = [margin(model(**inputs)).item() for inputs in (a, b)]
print(f"Paris over Rome: {plain[0]:+.2f} behind {A!r}, {plain[1]:+.2f} behind {B!r}")

# The latents that differ most at the word, and the values that they have in the first run.
everything = range(sae.d_sae)
first, second = (read_latents(model, sae, everything, lambda text=text: model(**text)).f[0, WORD] for text in (a, b))
latents = (first - second).abs().topk(K).indices.tolist()

# One latent per row: K interventions in one pass.
values = first[latents].expand(K, 1, K)
with interchange(model, sae, values, latents, positions=[WORD], where=torch.eye(K).bool()[:, None]), torch.no_grad():
    one_by_one = margin(model(**{name: tensor.expand(K, -1) for name, tensor in b.items()})) - plain[1]

# The same to first order: the gradient at the latents that are there, times what would change.
there = second[latents].view(1, 1, K).clone().requires_grad_()
with interchange(model, sae, there, latents, positions=[WORD]):
    margin(model(**b)).sum().backward()
estimate = (there.grad[0, 0] * (first - second)[latents]).detach()
print(f"{'latent':>7} {'patched':>8} {'gradient':>8}")
for i in one_by_one.abs().topk(6).indices.tolist():
    print(f"{latents[i]:7d} {one_by_one[i]:+8.2f} {estimate[i]:+8.2f}")
together = torch.corrcoef(torch.stack([one_by_one, estimate]))[0, 1]
with torch.no_grad():
    all_of_them = margin(patch(model, sae, b, a, latents, positions=[WORD])).item()
print(f"all {K}: {all_of_them:+.2f}; patching and gradients correlate with {together:.2f}")

# Before and after an edit in one pass.
gone = Plan((Rule(sae.name, tuple(latents), Ablate()),))
with steer(model, gone, saes=sae), capture(model, sae.site, side="before") as before, capture(model, sae.site) as after:
    model(**b)
moved = (after[sae.site] - before[sae.site])[0, WORD]
print(f"ablating them moves the stream at the word by {float(moved.norm()):.2f}")

# What carries the difference, as a control vector for llama.cpp, repeng or EasySteer, and back.
push = Plan((Rule(sae.name, tuple(latents), Add((first - second)[latents].tolist()), special=True),), "to Paris")
with tempfile.TemporaryDirectory() as folder:
    path = export_vectors(constant_vectors(push, sae), Path(folder) / "paris.gguf", model_type="llama")
    again = load_vectors(path).plan(1.0, special=True)
    with torch.no_grad(), steer(model, push, saes=sae):
        ours = margin(model(**b)).item()
    with torch.no_grad(), steer(model, again):
        print(f"added everywhere: {ours:+.2f}; from {path.name}: {margin(model(**b)).item():+.2f}")
