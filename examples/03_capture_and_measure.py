"""Record the stream without changing it: how many latents fire, which ones, and how much of x they explain.

python examples/03_capture_and_measure.py
"""

import torch

from saeguard import capture, load_model, load_sae
from saeguard.latents import LatentTable

SAE_NAME = "smollm2-135m-instruct/resid_post.20"
TEXTS = (
    "The lighthouse keeper wrote down the height of the waves every morning before breakfast.",
    "To make a simple soup, fry an onion in butter, add potatoes and water, and wait.",
    "Our train was late, so we read the timetable twice and bought coffee at the station.",
)

model, tokenizer = load_model("smollm2-135m-instruct")
sae, table = load_sae(SAE_NAME), LatentTable.load(SAE_NAME)
assert sae.site is not None

batch = tokenizer([tokenizer.bos_token + text for text in TEXTS], padding=True, return_tensors="pt")
with torch.no_grad(), capture(model, sae.site) as tape:
    model(**batch)

special = torch.isin(batch["input_ids"], torch.tensor(tokenizer.all_special_ids))
kept = tape.real(sae.site) & ~special
x = tape[sae.site][kept]
f = sae.encode(x)
error = x - sae.decode(f)
fvu = error.square().sum() / (x - x.mean(0)).square().sum()
print(f"{len(x)} tokens at {sae.site}: {(f > 0).sum(1).float().mean():.1f} latents fire per token, FVU {fvu:.2f}")

for row, text in enumerate(TEXTS):
    here = sae.encode(tape[sae.site][row][kept[row]])
    # The sum over tokens favours latents that are on everywhere; weigh them down by how often they fire anywhere.
    rarity = torch.tensor([-torch.tensor(max(note.frequency, 1e-6)).log().item() for note in table.rows])
    strongest = (here.sum(0) * rarity).topk(4).indices.tolist()
    print(f"\n{text}")
    for latent in strongest:
        print(f"  {latent:5d}  {here[:, latent].max():7.1f}  {table.row(latent).label}")
