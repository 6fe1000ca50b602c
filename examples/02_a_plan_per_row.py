"""One batch, another plan for every row: push, turn around, leave alone; plans are saved and read back as JSON.

python examples/02_a_plan_per_row.py
"""

import tempfile
from pathlib import Path

import torch

from saeguard import AtLeast, Plan, Rule, Scale, load_model, load_sae, steer
from saeguard.latents import LatentTable

SAE_NAME = "smollm2-135m-instruct/resid_post.20"
PROMPTS = (
    "The journey began in",
    "A living cell is made of",
    "Three things that every traveller should pack are",
)

model, tokenizer = load_model("smollm2-135m-instruct")
sae, table = load_sae(SAE_NAME), LatentTable.load(SAE_NAME)


def latent(word: str) -> int:
    """The latent that ``word`` belongs to most."""
    return table.search(word)[0].row.latent


push = Plan((Rule(SAE_NAME, (latent("Earth"),), AtLeast(1.0, unit="max"), phase="generated"),), name="push")
turn = Plan((Rule(SAE_NAME, (latent("cells"),), Scale(-1.0)),), name="turn around")

with tempfile.TemporaryDirectory() as folder:
    push.save(Path(folder) / "push.json")
    assert Plan.load(Path(folder) / "push.json") == push
    print(f"{push.name}: {push.fingerprint()[:16]}   {turn.name}: {turn.fingerprint()[:16]}")

batch = tokenizer(list(PROMPTS), padding=True, padding_side="left", return_tensors="pt")
plain = model.generate(**batch, max_new_tokens=24, do_sample=False)
with steer(model, [push, turn, None], saes=sae, tokenizer=tokenizer) as run:
    steered = model.generate(**batch, max_new_tokens=24, do_sample=False)

for row, prompt in enumerate(PROMPTS):
    start = batch["input_ids"].shape[1]
    print(f"\n{prompt} ...")
    print("  plain:  ", tokenizer.decode(plain[row, start:], skip_special_tokens=True))
    print("  steered:", tokenizer.decode(steered[row, start:], skip_special_tokens=True))

assert torch.equal(plain[2], steered[2]), "the row without a plan"
print()
print(run.report)
