"""The classifier of `training/classifier.py` learns, is the same each time, and is counted right."""

import math

import numpy as np
import pytest
import torch

from ddpm_from_scratch.evaluation import classifier

NUM_CLASSES, SIDE = 10, 8


def shades(count, channels=1, seed=0):
    """Images of the classes in turn, each of a gray of its own, and these classes."""
    labels = np.arange(count) % NUM_CLASSES
    noise = np.random.default_rng(seed).integers(0, 10, (count, SIDE, SIDE, channels))
    return (25 * labels[:, None, None, None] + noise).astype(np.uint8), labels


@pytest.fixture
def enough(monkeypatch):
    """As much training as few images need."""
    monkeypatch.setattr(classifier, "BATCH", 5)
    monkeypatch.setattr(classifier, "EPOCHS", 20)


@pytest.mark.parametrize("channels", [1, 3])
def test_it_learns_and_is_the_same_each_time(enough, channels):
    images, labels = shades(50, channels)
    state = torch.get_rng_state()
    network = classifier.train_classifier(images, labels)
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(1)
    again = classifier.train_classifier(images, labels, progress=False)
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), again.parameters(), strict=True))
    others, wanted = shades(30, channels, seed=1)
    found = classifier.classify(network, others)
    assert found.shape == (30,) and classifier.accuracy(found, wanted)["accuracy"] > 0.5
    assert classifier.accuracy(found, (wanted + 5) % NUM_CLASSES)["accuracy"] < 0.5


def test_a_last_batch_of_one_image_is_learnt_from_too(enough):
    network = classifier.train_classifier(*shades(51), progress=False)
    assert not any(parameter.isnan().any() for parameter in network.parameters())


def test_an_image_is_of_the_same_class_in_every_batch(monkeypatch):
    images, labels = shades(40)
    network = classifier.train_classifier(images, labels, progress=False)
    found = classifier.classify(network, images)
    monkeypatch.setattr(classifier, "BATCH", 13)
    assert np.array_equal(classifier.classify(network, images), found)


def test_shares_of_labels_that_were_found():
    found, labels = np.array([0, 0, 1, 3, 3, 3]), np.array([0, 1, 1, 3, 3, 3])
    expected = {"accuracy": pytest.approx(5 / 6), "accuracy_error": pytest.approx(math.sqrt(5 / 6 * 1 / 6 / 6))}
    assert classifier.accuracy(found, labels) == expected
    names = ["shoe", "coat", "bag", "shirt"]
    by_class = {"shoe": 1.0, "coat": 0.5, "shirt": 1.0}  # of bags there is none
    assert classifier.accuracy_by_class(found, labels, names) == {**expected, "by_class": by_class}
