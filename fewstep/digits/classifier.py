"""The small CNN whose features judge pictures of digits, and how it is trained.

Its 64 penultimate features are the space of every Frechet distance, recall and diversity figure
fewstep reports on digits. Trained on four fifths of the real scans; accuracy on the other fifth.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from fewstep.digits.data import NUM_CLASSES, Digits

NUM_FEATURES = 64


class DigitClassifier(nn.Module):
    """Pictures to features and class logits.

    The picture is reduced to 16x16 grey pixels first (the scans hold 8x8), so the features
    describe strokes, not the decoder's texture.
    """

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.Conv2d(32, 48, 3, stride=2, padding=1),
            nn.BatchNorm2d(48),
            nn.ReLU(),
            nn.Conv2d(48, 64, 3, stride=2, padding=1),
            nn.BatchNorm2d(64),
            nn.ReLU(),
            nn.Flatten(),
            nn.Dropout(0.3),
            nn.Linear(64 * 16, NUM_FEATURES),
        )
        self.head = nn.Linear(NUM_FEATURES, NUM_CLASSES)

    def features(self, images: Tensor) -> Tensor:
        """Penultimate features.

        Args:
            images: Shape (B, 3, 64, 64), values -1 to 1.

        Returns:
            Shape (B, 64), float32.
        """
        grey = functional.adaptive_avg_pool2d(images.float().mean(dim=1, keepdim=True), 16)
        return self.convs(grey)

    def forward(self, images: Tensor) -> Tensor:
        """Class logits, shape (B, 10), for pictures of shape (B, 3, 64, 64) in -1 to 1."""
        return self.head(functional.relu(self.features(images)))


def to_tensor(images: object) -> Tensor:
    """uint8 pictures (N, H, W, 3) as float32 (N, 3, H, W) in -1 to 1."""
    return torch.as_tensor(images).permute(0, 3, 1, 2).float() / 127.5 - 1.0


@torch.no_grad()
def accuracy(model: DigitClassifier, digits: Digits) -> float:
    """Share of pictures whose class is recognised, 0 to 1."""
    predicted = model.eval()(to_tensor(digits.images)).argmax(dim=1)
    return float((predicted == torch.as_tensor(digits.labels)).float().mean())


def train_classifier(
    digits: Digits, *, num_steps: int, seed: int, report: Callable[[int, dict[str, float]], None]
) -> DigitClassifier:
    """Train on jittered copies of the training scans.

    Args:
        digits: All real digits; the held-out fifth is not used.
        num_steps: Optimizer steps of 64 pictures.
        seed: Initial weights, batches and jitter.
        report: Called with (step, {name: value}) after each step.
    """
    torch.manual_seed(seed)
    model = DigitClassifier()
    data = digits.train()
    images, labels = to_tensor(data.images), torch.as_tensor(data.labels)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=num_steps)
    for step in range(num_steps):
        model.train()
        chosen = torch.randint(len(labels), (64,))
        logits = model(_jitter(images[chosen]))
        loss = functional.cross_entropy(logits, labels[chosen], label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        report(step, {"classifier/loss": loss.item()})
    return model.eval()


def _jitter(images: Tensor) -> Tensor:
    """Random rotation up to 10 degrees, scale 0.9-1.1 and shift up to 4 px, white outside."""
    count = len(images)
    angle = (torch.rand(count) - 0.5) * 0.35
    scale = 1.0 + (torch.rand(count) - 0.5) * 0.2
    shift = (torch.rand(count, 2) - 0.5) * 0.25
    rows = torch.stack(
        [
            torch.stack([angle.cos() * scale, -angle.sin() * scale, shift[:, 0]], dim=1),
            torch.stack([angle.sin() * scale, angle.cos() * scale, shift[:, 1]], dim=1),
        ],
        dim=1,
    )
    grid = functional.affine_grid(rows, list(images.shape), align_corners=False)
    ink = functional.grid_sample(1.0 - images, grid, align_corners=False)
    return 1.0 - ink
