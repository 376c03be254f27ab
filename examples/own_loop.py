"""Train with this package's scheduler and network in a PyTorch loop of your own: Algorithm 1 of DDPM, then Algorithm 2.

python examples/own_loop.py [steps] [folder]
"""

import sys

import torch

from ddpm_from_scratch import ScratchDDPMPipeline, ScratchDDPMScheduler, ScratchUNet2DModel


def squares(count: int) -> torch.Tensor:
    """Stand-in for your data: bright squares on black, [count, 1, 16, 16] in [-1, 1]."""
    images = -torch.ones(count, 1, 16, 16)
    for image, (row, column) in zip(images, torch.randint(0, 10, (count, 2)).tolist(), strict=True):
        image[:, row : row + 6, column : column + 6] = 1
    return images


steps = int(sys.argv[1]) if len(sys.argv) > 1 else 300
folder = sys.argv[2] if len(sys.argv) > 2 else "own-loop-model"
torch.manual_seed(0)
scheduler = ScratchDDPMScheduler()
unet = ScratchUNet2DModel(
    sample_size=16,
    in_channels=1,
    out_channels=1,
    block_out_channels=(32, 64),
    down_block_types=("DownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "UpBlock2D"),
)
optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-3)
for step in range(steps):
    x_0 = squares(32)
    t = torch.randint(0, len(scheduler), (len(x_0),))
    noise = torch.randn_like(x_0)
    x_t = scheduler.add_noise(x_0, noise, t)
    loss = scheduler.simple_loss(unet(x_t, t).sample, x_0, noise, t).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 50 == 0 or step == steps - 1:
        print(f"step {step}: loss {loss.item():.4f}")

pipeline = ScratchDDPMPipeline(unet.eval(), scheduler)
pipeline.save_pretrained(folder)
pipeline(num_inference_steps=100, generator=torch.Generator().manual_seed(0)).images[0].save(f"{folder}/sample.png")
