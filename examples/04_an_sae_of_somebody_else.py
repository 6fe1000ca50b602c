"""Look at an SAE's files, read three of its latents, and ask the model whether the SAE belongs to it.

The SAE is one that ships with saeguard; ``hf://owner/repo/path``, a folder, a file or a SAELens release with its id
work alike.
"""

from saeguard import Clamp, Plan, Rule, Site, load_model, load_sae, open_sae, self_check, steer

SOURCE = "smollm2-135m-instruct/resid_post.9"
LATENTS = (7, 77, 777)

stored = open_sae(SOURCE)  # headers only
print(f"{stored.name}: {stored.family}, {stored.activation}, {stored.d_sae} latents at {stored.site}")
print(f"all of it: {stored.bytes_for(None):,} bytes; {len(LATENTS)} latents: {stored.bytes_for(len(LATENTS)):,}")

some = load_sae(SOURCE, latents=LATENTS)  # they keep their numbers
print(f"read: W_enc {tuple(some.W_enc.shape)} of {some.d_in} x {some.d_sae}")

model, tokenizer = load_model("smollm2-135m-instruct")
whole = load_sae(SOURCE)
print(self_check(model, whole, tokenizer))

wrong = load_sae(SOURCE, Site("resid_post", 10))  # one layer off
print(self_check(model, wrong, tokenizer).reasons[0].found)

# A plan that names an SAE by its source reads only its own latents.
plan = Plan((Rule(SOURCE, LATENTS, Clamp(4.0, when="always"), phase="generated"),))
inputs = tokenizer("The sea is", return_tensors="pt")
with steer(model, plan, tokenizer=tokenizer) as run:
    model.generate(**inputs, max_new_tokens=8, do_sample=False)
print(run.report)
