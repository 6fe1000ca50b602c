"""Find a latent by a word, push it while the model writes, and compare with the plain text.

python examples/01_steer_one_prompt.py
python examples/01_steer_one_prompt.py --word king --amount 1.8
"""

import argparse

from saeguard import AtLeast, Plan, Rule, load_model, load_sae, steer
from saeguard.latents import LatentTable

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--sae", default="smollm2-135m-instruct/resid_post.20")
parser.add_argument("--word", default="Earth", help="what the latent should be about")
parser.add_argument("--amount", type=float, default=1.0, help="in multiples of the latent's recorded maximum")
parser.add_argument("--prompt", default="Tell me one interesting fact.")
options = parser.parse_args()

model, tokenizer = load_model("smollm2-135m-instruct")
sae = load_sae(options.sae)
row = LatentTable.load(options.sae).search(options.word)[0].row
print(f"latent {row.latent} fires on {', '.join(row.fires_on[:6])}")

plan = Plan((Rule(sae.name, (row.latent,), AtLeast(options.amount, unit="max"), phase="generated"),))
prompt = tokenizer.apply_chat_template(
    [{"role": "user", "content": options.prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True
)
length = prompt["input_ids"].shape[1]

plain = model.generate(**prompt, max_new_tokens=32, do_sample=False)
with steer(model, plan, saes=sae, tokenizer=tokenizer) as run:
    steered = model.generate(**prompt, max_new_tokens=32, do_sample=False)

print("plain:  ", tokenizer.decode(plain[0, length:], skip_special_tokens=True))
print("steered:", tokenizer.decode(steered[0, length:], skip_special_tokens=True))
print(run.report)
