"""Points in the plane: a network that draws an S-curve in many steps is tuned to jump to it in one; a minute.

python examples/jump.py [steps]
"""

import math
import sys
from types import SimpleNamespace

import torch
from points import NoiseNetwork, distance, s_curve, sample, train
from torch import Tensor

from ddpm_from_scratch import ScratchDDPMScheduler
from ddpm_from_scratch.training.consistency import ConsistencyObjective

# Predicting v, x̂_0 is well behaved at pure noise too, from which jumps begin.
PROCESS = {"clip_sample": False, "prediction_type": "v_prediction", "beta_schedule": "squaredcos_cap_v2"}


def tune(network: NoiseNetwork, scheduler: ScratchDDPMScheduler, steps: int, batch: int = 512) -> None:
    """Consistency tuning: x̂_0 at t is drawn to x̂_0 at an earlier r of the same path, and so to where the path ends."""
    objective = ConsistencyObjective(scheduler, q=[4, 16, 64])
    sampler = objective.sampler()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    learning_rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        now = objective.at(step / steps)
        x_0 = s_curve(batch)
        t, _ = sampler.draw(torch.rand(batch, dtype=torch.float64))
        noise = torch.randn_like(x_0)
        x_t = scheduler.add_noise(x_0, noise, t)
        goal = now.goal(lambda x, r, class_labels: SimpleNamespace(sample=network(x, r)), x_0, noise, t, None)
        loss = now(network(x_t, t), goal, noise, x_t, t).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        learning_rate.step()


def jumps(network: NoiseNetwork, scheduler: ScratchDDPMScheduler, steps: int, count: int = 2000) -> Tensor:
    """Points drawn in so many steps, all noise fresh: [count, 2]."""
    sampler = ScratchDDPMScheduler.from_config(scheduler.config, eta=math.inf, timestep_spacing="trailing")
    sampler.set_timesteps(steps)
    return sample(network, sampler, count)[-1]


def main() -> None:
    """Train, jump, tune, jump again; the distances to the data beside the least that can be expected."""
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else 3000
    torch.manual_seed(0)
    scheduler, network, data = ScratchDDPMScheduler(**PROCESS), NoiseNetwork(), s_curve(2000)
    train(network, scheduler, steps)
    found = {f"{count} steps": jumps(network, scheduler, count) for count in (1, 2, 4)}
    tune(network, scheduler, steps)
    found |= {f"{count} steps, tuned": jumps(network, scheduler, count) for count in (1, 2, 4)}
    for name, points in {**found, "other data": s_curve(2000)}.items():
        print(f"{name}: {distance(points, data):.4f} from the data")


if __name__ == "__main__":
    main()
