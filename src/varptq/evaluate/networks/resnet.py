"""ResNet-56 for CIFAR: a small classifier whose 64 channel means serve as features of small images.

    x (B, 3, H, W) normalised -> means (B, 64), logits (B, classes)
Three stages of 9 basic blocks with 16, 32 and 64 channels; the shortcut into a new stage has no
parameters: every second pixel, zeros for the new channels. Names as in akamaster's
pytorch_resnet_cifar10 (`layer1.0.conv1.weight`, `linear.weight`). Its distances are not FIDs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BLOCKS_PER_STAGE = 9
WIDTHS = (16, 32, 64)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class _Block(nn.Module):
    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.new_channels = width - channels
        stride = 2 if self.new_channels else 1
        self.conv1 = nn.Conv2d(channels, width, 3, stride, 1, bias=False, dtype=torch.float32)
        self.bn1 = nn.BatchNorm2d(width, dtype=torch.float32)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False, dtype=torch.float32)
        self.bn2 = nn.BatchNorm2d(width, dtype=torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.new_channels:
            side = self.new_channels // 2
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, side, side))
        return F.relu(y + x)


class ResNet56(nn.Module):
    """The classifier that the file describes."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, WIDTHS[0], 3, 1, 1, bias=False, dtype=torch.float32)
        self.bn1 = nn.BatchNorm2d(WIDTHS[0], dtype=torch.float32)
        channels = WIDTHS[0]
        for stage, width in enumerate(WIDTHS, 1):
            first = _Block(channels, width)
            rest = (_Block(width, width) for _ in range(BLOCKS_PER_STAGE - 1))
            self.add_module(f"layer{stage}", nn.Sequential(first, *rest))
            channels = width
        self.linear = nn.Linear(channels, num_classes, dtype=torch.float32)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, 3, H, W) float32, (pixel / 255 - MEAN) / STD -> means (B, 64), logits."""
        x = F.relu(self.bn1(self.conv1(x)))
        for stage in range(1, len(WIDTHS) + 1):
            x = self.get_submodule(f"layer{stage}")(x)
        means = x.mean((2, 3))
        return means, self.linear(means)
