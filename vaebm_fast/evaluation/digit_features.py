"""Features for evaluating small grey digits: the penultimate layer of a classifier trained on the training half.

FID's Inception features are not meaningful at 8x8 pixels; a classifier of the same classes is the usual substitute.
Distances are comparable only between models evaluated with the same seed and data.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vaebm_fast.data import ImageSource, to_tensor
from vaebm_fast.evaluation.fidelity import Features, frechet_distance
from vaebm_fast.models.building import building

EPOCHS, BATCH_SIZE, LEARNING_RATE = 30, 64, 1e-3
SAMPLES, SAMPLING_SEEDS = 1000, 3  # per evaluation: images per sampling seed, number of sampling seeds


class DigitClassifier(nn.Module):
    """Two convolutions and a hidden layer of 64: [N, 1, 8, 8] in [0, 1] -> 10 logits."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(64 * 4 * 4, 64),
            nn.ReLU(),
        )
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.trunk(x))

    @torch.no_grad()
    def features(self, x: Tensor) -> Features:
        """[N, 64] features of images [N, 1, 8, 8] in [0, 1]."""
        return self.trunk(x).numpy()

    @torch.no_grad()
    def accuracy(self, source: ImageSource) -> float:
        """Fraction of a labelled source that is classified correctly."""
        images, labels = everything(source)
        return float((self(images).argmax(dim=1) == labels).float().mean())


@dataclass(frozen=True)
class Judge:
    """Frechet distance to the held-out digits in classifier feature space."""

    classifier: DigitClassifier
    held_out: Features

    def distance(self, images: Tensor) -> float:
        """Distance of images [N, 1, 8, 8] in [0, 1]."""
        return frechet_distance(self.classifier.features(images), self.held_out)


def everything(source: ImageSource) -> tuple[Tensor, Tensor]:
    """All images [N, C, H, W] in [0, 1] and all labels [N] of a labelled source."""
    if source.labels is None:
        raise ValueError(f"{source.name} has no labels; a classifier needs them.")
    return to_tensor(source.read(np.arange(len(source)))), torch.from_numpy(source.labels)


def train_digit_classifier(source: ImageSource, *, seed: int = 0) -> DigitClassifier:
    """Train a classifier on a labelled source; weights are reproducible for the same seed and machine."""
    images, labels = everything(source)
    generator = torch.Generator().manual_seed(seed)
    with building(seed):
        classifier = DigitClassifier()
    optimizer = torch.optim.Adam(classifier.parameters(), lr=LEARNING_RATE)
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(images), generator=generator).split(BATCH_SIZE):
            loss = F.cross_entropy(classifier(images[rows]), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return classifier.eval()
