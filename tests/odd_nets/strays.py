"""Weights that are used without the forward of the module that holds them."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from .base import WIDTH, Net, Plain
from .changing import Begins


class UsesOther(Plain):
    """Computes with another block's weight."""

    def __init__(self, other: Plain | None = None):
        super().__init__()
        self.others = [other] if other is not None else []

    def forward(self, x):
        x = super().forward(x)
        return F.linear(x, self.others[0].a.weight) if self.others else x


class UsesLayers(Plain):
    """Never runs its layers."""

    def forward(self, x):
        for layer in (self.a, self.b, self.c):
            x = torch.tanh(F.linear(x, layer.weight, layer.bias))
        return x


class KeepsTurned(Net):
    """The parent takes views before its loop, and uses them behind it."""

    def run(self, x, step):
        turned = [block.a.weight.T for block in self.blocks]
        x = super().run(x, step)
        for weight in turned:
            x = torch.tanh(x @ weight)
        return x


class LeavesView(Plain):
    """Leaves a view of its own weight on itself in its forward."""

    def forward(self, x):
        self.turned = self.a.weight.T
        return super().forward(x)


class UsesLeftView(Net):
    def run(self, x, step):
        x = super().run(x, step)
        for block in self.blocks:
            x = torch.tanh(x @ block.turned)
        return x


class CachesView(Plain):
    """Makes a view of its own weight once and uses it in each forward."""

    turned: Any = None

    def forward(self, x):
        if self.turned is None:
            self.turned = self.a.weight.T
        return super().forward(x) + x @ self.turned


class CachesCopy(Plain):
    """Makes something of its weight once and keeps it."""

    turned: Any = None

    def forward(self, x):
        if self.turned is None:
            self.turned = self.a.weight.T * 2
        return super().forward(x) + x @ self.turned


class LateStray(Net):
    """Uses a block's weight past its forward from the third step on."""

    def run(self, x, step):
        x = super().run(x, step)
        return x @ self.blocks[1].a.weight if step >= 2 else x


class LateBlock(Net):
    """A block that uses its layers' weights itself runs from the third step on."""

    def __init__(self):
        super().__init__(Plain(), Plain(), UsesOther(), Plain())
        self.blocks[2].others.append(self.blocks[0])

    def run(self, x, step):
        for number, block in enumerate(self.blocks):
            x = block(x) if step >= 2 or number != 2 else x
        return x


class LatePhases(Net):
    """A block whose own weights are used at its end runs from the third step on."""

    def __init__(self):
        super().__init__(Plain(), Begins(), Plain())

    def run(self, x, step):
        for number, block in enumerate(self.blocks):
            x = block(x) if step >= 2 or number != 1 else x
        return x


class Attends(Plain):
    """Torch's own attention: uses the weights of its parts without running them."""

    def __init__(self):
        super().__init__()
        self.attn = nn.MultiheadAttention(WIDTH, 4, batch_first=True)

    def forward(self, x):
        return super().forward(x + self.attn(x, x, x, need_weights=False)[0])


class AttendsAcross(Attends):
    """With other widths of key and value, where torch holds three matrices instead of one."""

    def __init__(self):
        super().__init__()
        self.attn = nn.MultiheadAttention(WIDTH, 4, batch_first=True, kdim=8, vdim=4, add_bias_kv=True)

    def forward(self, x):
        return Plain.forward(self, x + self.attn(x, x[..., :8], x[..., :4])[0])


class Encodes(nn.TransformerEncoderLayer):
    """A layer of torch's own, made into a class of the model."""

    def __init__(self):
        super().__init__(WIDTH, 4, 2 * WIDTH, batch_first=True)


def _encoder_layer() -> nn.Module:
    return nn.TransformerEncoderLayer(WIDTH, 4, 3 * WIDTH, batch_first=True, activation="gelu")


class HoldsEncoder(Plain):
    def __init__(self):
        super().__init__()
        self.encoder = nn.TransformerEncoder(_encoder_layer(), 2)

    def forward(self, x):
        return super().forward(self.encoder(x))


class Recurrent(Plain):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(WIDTH, WIDTH, num_layers=2, batch_first=True)

    def forward(self, x):
        return super().forward(self.lstm(x)[0])


class Scaled(nn.Module):
    """A parametrization with a weight of its own."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.rand(WIDTH))

    def forward(self, weight):
        return weight * self.scale


def _parametrized(how: Callable[[nn.Module], Any]) -> nn.Module:
    block = Plain()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        how(block.a)
        how(block.c)
    return block


def _scaled(layer: nn.Linear) -> None:
    if layer.in_features == WIDTH:
        parametrize.register_parametrization(layer, "weight", Scaled())


def _hooked(layer: nn.Linear) -> None:
    """Hooks of torch's own, which read the layer's weights before and after its forward."""
    layer.register_forward_pre_hook(lambda module, args: (args[0] * module.weight.mean(),))
    layer.register_forward_hook(lambda module, args, output: output + module.bias.sum())
