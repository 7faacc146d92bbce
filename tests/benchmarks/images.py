"""Trained image models and images of the shared data: CIFAR ResNets."""

import numpy as np
import torch
from common import shared
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Block(nn.Module):
    """Two 3 x 3 convolutions around a shortcut without parameters (He et al. 2016, option A)."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.stride = width // inputs
        self.conv1 = nn.Conv2d(inputs, width, 3, self.stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        """Apply to (batch, inputs, height, width)."""
        h = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.stride > 1:
            added = h.shape[1] // 4
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, added, added))
        return F.relu(h + x)


class ResNet(nn.Module):
    """The ResNet of depth 6 * blocks + 2 for images of 32 x 32."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        for stage, (inputs, width) in enumerate(((16, 16), (16, 32), (32, 64)), 1):
            made = [Block(inputs if i == 0 else width, width) for i in range(blocks)]
            self.add_module(f"layer{stage}", nn.Sequential(*made))
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of (batch, 3, 32, 32)."""
        h = F.relu(self.bn1(self.conv1(x)))
        h = self.layer3(self.layer2(self.layer1(h)))
        return self.linear(h.mean((2, 3)))


def resnet20() -> nn.Module:
    """The trained ResNet-20 (81.35 % on the test images of the shared data)."""
    model = ResNet(3)
    model.load_state_dict(load_file(shared("cifar10") / "resnet20.safetensors"), strict=False)
    return model.eval()


def cifar(split: str) -> tuple[Tensor, Tensor]:
    """The normalised images (N, 3, 32, 32) and labels of `train_1000` or `test_2000`."""
    arrays = np.load(shared("cifar10") / f"{split}.npz")
    images = torch.from_numpy(arrays["images"]).permute(0, 3, 1, 2).float() / 255
    normal = (images - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    return normal, torch.from_numpy(arrays["labels"]).long()


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """The share of images whose largest logit is that of the label."""
    right = sum(int((model(x).argmax(1) == y).sum()) for x, y in zip(images.split(250), labels.split(250), strict=True))
    return right / len(labels)
