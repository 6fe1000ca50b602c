"""Steer a region of an image at every denoising step, through the update that a transformer block makes.

The UNet and the SAE are tiny and random, so the picture is noise and only the numbers mean something. With SDXL Turbo
the map reads SiteMap({"mlp_out.0": "down_blocks.2.attentions.1"}, axes=..., delta=True), on pipe.unet.

python examples/10_a_diffusion_model.py        (needs diffusers)
"""

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel

from saeguard import SAE, Add, Plan, Rule, Site, SiteMap, capture, steer

torch.manual_seed(0)
SIZE, WIDTH, LATENTS = 8, 32, 64
unet = UNet2DConditionModel(
    sample_size=SIZE, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(WIDTH, WIDTH),
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    cross_attention_dim=16, attention_head_dim=8, norm_num_groups=8,
).eval()  # fmt: skip
W = torch.randn(LATENTS, WIDTH) / WIDTH**0.5
sae = SAE("random", W.T.clone(), torch.zeros(LATENTS), W, torch.zeros(WIDTH), "relu", site=Site("mlp_out", 0))

# The SAE reads what the block gives minus what it is given; positions are pixels, line by line.
sites = SiteMap({"mlp_out.0": "down_blocks.0.attentions.0"}, axes="batch d height width", delta=True)
text = torch.randn(1, 5, 16)


def box(lines: range, columns: range, rule: Rule) -> Plan:
    """``rule`` in a rectangle: one range of pixels per line. The priorities never meet, as the ranges are apart."""
    return Plan(
        tuple(
            Rule(rule.sae, rule.latents, rule.op, start=SIZE * line + columns.start, stop=SIZE * line + columns.stop,
                 priority=line)
            for line in lines
        )
    )  # fmt: skip


@torch.no_grad()
def denoise(steps: int = 4, guidance: float = 2.0) -> torch.Tensor:
    """With classifier-free guidance, each pass has two rows: without the text, and with it."""
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(steps)
    x = torch.randn(1, 4, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    for step in scheduler.timesteps:
        without, told = unet(torch.cat([x, x]), step, torch.cat([torch.zeros_like(text), text])).sample.chunk(2)
        x = scheduler.step(without + guidance * (told - without), step, x).prev_sample
    return x


plan = box(range(2, 5), range(1, 4), Rule("random", (7,), Add(3.0)))
with capture(unet, "mlp_out.0", layout=sites) as tape:
    plain = denoise()
update = tape["mlp_out.0"]
active = (sae.encode(update[1]) > 0).sum(-1).float().mean()
print(f"the block's update at the last step: {tuple(update.shape)}, {active:.0f} of {LATENTS} latents active")

capture_after = capture(unet, "mlp_out.0", layout=sites)
capture_before = capture(unet, "mlp_out.0", layout=sites, side="before")
with steer(unet, [None, plan], saes=sae, layout=sites) as run, capture_after as after, capture_before as before:
    steered = denoise()
print(run.report)

moved = (after["mlp_out.0"] != before["mlp_out.0"]).any(-1)
print("what was edited at the last step:")
for row, name in ((0, "without the text"), (1, "with it")):
    lines = moved[row].view(SIZE, SIZE).tolist()
    print(f"  {name}\n" + "\n".join("    " + " ".join("#" if here else "." for here in line) for line in lines))
print(f"the image moved by {float((steered - plain).norm() / plain.norm()):.2f} of its norm")
assert torch.equal(plain, denoise()), "nothing stays behind"
