"""Points in the plane: Algorithm 1 of DDPM learns an S-curve, Algorithm 2 draws new points of it; half a minute.

python examples/points.py [steps]
"""

import math
import sys

import torch
from torch import Tensor, nn

from ddpm_from_scratch import ScratchDDPMScheduler


def s_curve(count: int) -> Tensor:
    """The data: [count, 2], near two three-quarters of a circle that meet at the origin."""
    angle = 3 * math.pi * (torch.rand(count) - 0.5)
    points = torch.stack([angle.sin(), angle.sign() * (angle.cos() - 1)], dim=1)
    return points + 0.05 * torch.randn_like(points)


class NoiseNetwork(nn.Module):
    """epsilon_theta(x_t, t) from the coordinates of x_t and from waves of t, slow and fast."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.register_buffer("frequencies", 1000 ** -torch.linspace(0, 1, 16))
        widths = [2 + 2 * 16, width, width, width]
        hidden = [layer for i in range(3) for layer in (nn.Linear(widths[i], widths[i + 1]), nn.SiLU())]
        self.layers = nn.Sequential(*hidden, nn.Linear(width, 2))

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        """x_t: [B, 2], t: [B]."""
        angles = t[:, None] * self.frequencies
        return self.layers(torch.cat([x_t, angles.sin(), angles.cos()], dim=1))


def train(network: NoiseNetwork, scheduler: ScratchDDPMScheduler, steps: int, batch: int = 512) -> list[float]:
    """Algorithm 1; the loss of every step."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=5e-3)
    learning_rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    losses = []
    for _ in range(steps):
        x_0 = s_curve(batch)
        t = torch.randint(0, len(scheduler), (batch,))
        noise = torch.randn_like(x_0)
        x_t = scheduler.add_noise(x_0, noise, t)
        loss = scheduler.simple_loss(network(x_t, t), x_0, noise, t).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        learning_rate.step()
        losses.append(loss.item())
    return losses


@torch.no_grad()
def sample(network: NoiseNetwork, scheduler: ScratchDDPMScheduler, count: int) -> dict[int, Tensor]:
    """Algorithm 2; all of the chain by t, from the noise at T - 1 to the new points at -1, [count, 2] each."""
    x_t = torch.randn(count, 2)
    chain = {}
    for t in scheduler.timesteps:
        chain[int(t)] = x_t
        x_t = scheduler.step(network(x_t, t.expand(count)), t, x_t).prev_sample
    return {**chain, -1: x_t}


def distance(points: Tensor, others: Tensor) -> float:
    """From a point of either set to the nearest one of the other set, on average."""
    apart = torch.cdist(points, others)
    return (apart.amin(0).mean() + apart.amin(1).mean()).item() / 2


def main() -> None:
    """Train, sample, and measure beside the least that can be expected: other points of the data."""
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else 5000
    torch.manual_seed(0)
    scheduler = ScratchDDPMScheduler(clip_sample=False)  # points may lie outside [-1, 1], unlike pixels
    network = NoiseNetwork()
    losses = train(network, scheduler, steps)
    print(f"loss {losses[0]:.3f} at first, {sum(losses[-100:]) / len(losses[-100:]):.3f} at last")
    chain, data = sample(network, scheduler, 2000), s_curve(2000)
    for name, points in {"noise": chain[len(scheduler) - 1], "samples": chain[-1], "other data": s_curve(2000)}.items():
        print(f"{name} to data: {distance(points, data):.4f}")


if __name__ == "__main__":
    main()
