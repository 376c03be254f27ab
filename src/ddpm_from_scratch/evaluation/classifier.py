"""A small classifier, trained on real images, that judges whether generated images show their class."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from ..sampling.generate import to_unit_range

SEED = 0
EPOCHS = 6
BATCH = 100
LEARNING_RATE = 3e-3
WIDTH = 16


def new_classifier(channels: int, size: tuple[int, int], classes: int) -> nn.Sequential:
    """Build an untrained classifier that maps images [B, C, H, W] in [-1, 1] to logits [B, classes]."""
    height, width = size
    layers: list[nn.Module] = []
    for wider in (WIDTH, 2 * WIDTH):
        layers += [nn.Conv2d(channels, wider, 3, padding=1), nn.BatchNorm2d(wider), nn.ReLU(), nn.MaxPool2d(2)]
        channels, height, width = wider, height // 2, width // 2
    layers += [nn.Flatten(), nn.Dropout(0.3), nn.Linear(channels * height * width, 128)]
    return nn.Sequential(*layers, nn.ReLU(), nn.Dropout(0.3), nn.Linear(128, classes))


def train_classifier(images: np.ndarray, labels: np.ndarray, progress: bool = True) -> nn.Sequential:
    """Train a classifier on images, uint8 [N, H, W, C], and their classes [N]: on the CPU, reproducibly."""
    targets = torch.from_numpy(labels)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        network = new_classifier(images.shape[3], images.shape[1:3], int(labels.max()) + 1)
        optimizer = torch.optim.Adam(network.parameters())
        total = EPOCHS * -(-len(images) // BATCH)
        rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=total)
        for _ in tqdm(range(EPOCHS), desc="classifier", unit="epoch", disable=not progress):
            for batch in torch.randperm(len(images)).split(BATCH):
                optimizer.zero_grad()
                nn.functional.cross_entropy(network(to_unit_range(images[batch.numpy()])), targets[batch]).backward()
                optimizer.step()
                rates.step()
    return network.eval()


@torch.no_grad()
def classify(network: nn.Module, images: np.ndarray) -> np.ndarray:
    """Predict the classes [N] of images, uint8 [N, H, W, C]."""
    batches = (images[first : first + BATCH] for first in range(0, len(images), BATCH))
    return torch.cat([network(to_unit_range(batch)).argmax(1) for batch in batches]).numpy()


def accuracy(found: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """The share of labels [N] that were predicted correctly, and its standard error."""
    share = float((found == labels).mean())
    return {"accuracy": share, "accuracy_error": float(np.sqrt(share * (1 - share) / len(labels)))}


def accuracy_by_class(found: np.ndarray, labels: np.ndarray, names: Sequence[str]) -> dict[str, Any]:
    """`accuracy`, with the accuracy of each class under its name."""
    shares = {names[label]: float((found == label)[labels == label].mean()) for label in np.unique(labels).tolist()}
    return {**accuracy(found, labels), "by_class": shares}
