"""Models whose blocks are built and used in every odd way that Python allows (`test_odd_blocks`)."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize

WIDTH = 16


def _noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Plain(nn.Module):
    """Two layers, the second twice as wide, so that units differ in size."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (
            nn.Linear(WIDTH, WIDTH),
            nn.Linear(WIDTH, 2 * WIDTH),
            nn.Linear(2 * WIDTH, WIDTH),
        )

    def forward(self, x, *_):
        return torch.tanh(x + self.c(torch.tanh(self.b(self.a(x)))))


class Net(nn.Module):
    """Runs its blocks one after the other."""

    def __init__(self, *blocks: nn.Module):
        super().__init__()
        self.embed, self.blocks, self.out = (
            nn.Linear(WIDTH, WIDTH),
            nn.ModuleList(blocks),
            nn.Linear(WIDTH, WIDTH),
        )

    def forward(self, x, step: int = 0):
        return self.out(self.run(self.embed(x), step))

    def run(self, x, step):
        for block in self.blocks:
            x = block(x)
        return x


STEPS = [
    lambda module, device, step=step: module(_noise(2, 3, WIDTH, seed=step).to(device), step=step)
    for step in range(4)
]


# --- who runs whom -----------------------------------------------------------------------------------------


class Recursive(Plain):
    def forward(self, x, depth: int = 2):
        x = super().forward(x)
        return self(x, depth - 1) * self.a.weight[0] if depth else x


class CallsAnother(Plain):
    """Runs a block of the list in its middle, one that it does not own."""

    def __init__(self, other: nn.Module):
        super().__init__()
        self.hidden = [other]

    def forward(self, x):
        return self.c(self.b(self.hidden[0](self.a(x))))


class Owns(Plain):
    """Has a block of the list among its own children as well."""

    def __init__(self, other: nn.Module):
        super().__init__()
        self.other = other

    def forward(self, x):
        return self.c(self.b(self.other(self.a(x))))


class Chain(Plain):
    """Each block runs the next from within: all of them are under way at once."""

    def __init__(self):
        super().__init__()
        self.following: list[nn.Module] = []

    def forward(self, x):
        x = self.a(x)
        for block in self.following:
            x = block(x)
        return self.c(torch.tanh(self.b(x)))


class Chained(Net):
    def __init__(self):
        super().__init__(*(Chain() for _ in range(5)))
        for block, following in zip(self.blocks, list(self.blocks)[1:], strict=False):
            block.following.append(following)

    def run(self, x, step):
        return self.blocks[0](x)


class Wrapped(nn.Module):
    def __init__(self, block: nn.Module):
        super().__init__()
        self.block = block

    def forward(self, *args: Any, **kwargs: Any):
        return self.block(*args, **kwargs)


class Passing(Wrapped):
    """Takes attributes that it does not have from what it wraps."""

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("block"), name)


class Stages(Net):
    """Lists in lists, in a Sequential and in a ModuleDict."""

    def __init__(self):
        super().__init__(Plain(), Plain())
        self.lists = nn.ModuleList([nn.ModuleList([Plain(), Plain()]), nn.ModuleList([Plain()])])
        self.sequential = nn.Sequential(Plain(), nn.Sequential(Plain(), nn.Tanh()), Plain())
        self.by_name = nn.ModuleDict({"one": nn.ModuleList([Plain(), Plain()]), "two": Plain()})

    def run(self, x, step):
        for block in (*self.lists[0], *self.lists[1], *self.blocks):
            x = block(x)
        x = self.sequential(x)
        for block in (*self.by_name["one"], self.by_name["two"]):
            x = block(x)
        return x


class SequentialBlocks(Net):
    def __init__(self):
        super().__init__(*(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), Plain()) for _ in range(4)))


class Twice(Net):
    def __init__(self):
        super().__init__(*(Plain() for _ in range(4)))

    def run(self, x, step):
        for block in (*self.blocks, *self.blocks):
            x = block(x)
        return x


class SameBlockManyTimes(Net):
    """The list holds one block at several places."""

    def __init__(self):
        one, two = Plain(), Plain()
        super().__init__(one, two, one, Plain(), two)


class SometimesRun(Net):
    """One list never runs, one from the third step on, one in every second."""

    def __init__(self):
        super().__init__(*(Plain() for _ in range(3)))
        self.never = nn.ModuleList([Plain(), Plain()])
        self.late = nn.ModuleList([Plain(), Plain(), Plain()])
        self.odd = nn.ModuleList([Plain(), Plain()])

    def run(self, x, step):
        for block in (*self.blocks, *(self.late if step >= 2 else ()), *(self.odd if step % 2 else ())):
            x = block(x)
        return x


class Reordered(Net):
    """Puts its list in another order before each step, as a list of other objects."""

    def __init__(self):
        super().__init__(*(Plain() for _ in range(5)))

    def run(self, x, step):
        self.blocks = nn.ModuleList([self.blocks[i] for i in (3, 0, 4, 2, 1)])
        return super().run(x, step)


# --- what goes in and comes out ----------------------------------------------------------------------------


class GivesParameter(Plain):
    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(3, WIDTH))

    def forward(self, x):
        return super().forward(x), self.table


class GivesView(GivesParameter):
    def forward(self, x):
        return Plain.forward(self, x), self.table[:2].T


class GivesBuffer(Plain):
    def __init__(self):
        super().__init__()
        self.register_buffer("positions", torch.randn(3, WIDTH))

    def forward(self, x):
        return super().forward(x), self.positions[None]


class UsesGifts(Net):
    """What blocks gave of their own weights is used after all of them have run."""

    def run(self, x, step):
        gifts = []
        for block in self.blocks:
            x, gift = block(x)
            gifts.append(gift)
        return x + sum(gift.sum() * (i + 1) for i, gift in enumerate(gifts))


class GivesInput(Plain):
    def forward(self, x):
        return x


class WritesInput(Plain):
    def forward(self, x):
        return x.add_(super().forward(x))


@dataclass
class Given:
    sample: torch.Tensor
    extra: torch.Tensor


class GivesDataclass(Plain):
    def forward(self, *, given: Given):
        return Given(super().forward(given.sample), self.a(given.extra))


class PassesDataclass(Net):
    def run(self, x, step):
        given = Given(x, x)
        for block in self.blocks:
            given = block(given=given)
        return given.sample + given.extra


class GivesDict(Plain):
    def forward(self, *, values: dict[str, Any]):
        return {"deep": [super().forward(values["deep"][0]), (values["deep"][1],)]}


class PassesDict(Net):
    def run(self, x, step):
        values = {"deep": [x, (x,)]}
        for block in self.blocks:
            values = block(values=values)
        return values["deep"][0]


class Generates(Plain):
    """A generator: it computes when it is asked, after its forward has returned."""

    def forward(self, x) -> Iterator[torch.Tensor]:
        x = self.a(x)
        yield x
        yield self.c(torch.tanh(F.linear(x, self.b.weight, self.b.bias)))


class Collects(Net):
    def run(self, x, step):
        for block in self.blocks:
            x = sum(block(x))
        return x


class CollectsLate(Net):
    def run(self, x, step):
        generators = [block(x) for block in self.blocks]
        return sum(part for generator in generators for part in generator)


class ManyArguments(Plain):
    def forward(self, x, *rest, scale: float = 1.0, **more):
        return super().forward(x) * scale + sum(rest) + sum(more.values())


class PassesMany(Net):
    def run(self, x, step):
        for block in self.blocks:
            x = block(x, x, x, scale=0.5, a=x, b=1)
        return x


# --- weights that change, or lie oddly ---------------------------------------------------------------------


class Counts(Plain):
    """Buffers that each forward writes to, in place and by `copy_`."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(WIDTH))
        self.register_buffer("calls", torch.tensor(0))
        self.register_buffer("latest", torch.zeros(WIDTH))

    def forward(self, x):
        self.mean.mul_(0.9).add_(x.mean((0, 1)))
        self.calls += 1
        self.latest.copy_(x[0, 0])
        return super().forward(x) + self.mean * self.calls + self.latest


class Replaces(Plain):
    """A buffer in whose place each forward puts another."""

    def __init__(self):
        super().__init__()
        self.register_buffer("latest", torch.zeros(WIDTH))

    def forward(self, x):
        self.latest = self.latest * 0.5 + x[0, 1]
        return super().forward(x) + self.latest


class Normalised(Plain):
    """A BatchNorm that keeps its running statistics while it runs."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(3)

    def forward(self, x):
        self.norm.train()
        return super().forward(x + self.norm(x))


class Odd(Plain):
    """Weights of every kind that is dense: empty, expanded, strided, of all dtypes, scalars, slices."""

    def __init__(self):
        super().__init__()
        self.empty = nn.Parameter(torch.empty(0, WIDTH))
        self.expanded = nn.Parameter(torch.randn(1, WIDTH).expand(3, WIDTH))
        self.strided = nn.Parameter(torch.randn(WIDTH, 4).T[::2])
        self.scalar = nn.Parameter(torch.tensor(0.3))
        self.precise = nn.Parameter(torch.randn(5, WIDTH, dtype=torch.float64))
        self.coarse = nn.Parameter(torch.randn(5, WIDTH, dtype=torch.bfloat16))
        self.turns = nn.Parameter(torch.randn(WIDTH, dtype=torch.complex64))
        whole = torch.randn(10, WIDTH)
        self.left, self.right = nn.Parameter(whole[1:4]), nn.Parameter(whole[3:9:2])
        self.register_buffer("mask", torch.rand(WIDTH) > 0.3)
        self.register_buffer("index", torch.randperm(WIDTH))
        self.register_buffer("nothing", None)
        self.conv = nn.Conv2d(4, 4, 3, padding=1).to(memory_format=torch.channels_last)

    def forward(self, x):
        x = super().forward(x)[..., self.index] * self.mask + self.expanded.sum(0) * self.scalar
        x = (
            x
            + self.strided.sum(0)
            + self.empty.sum(0)
            + self.precise.sum(0).float()
            + self.coarse.sum(0).float()
        )
        x = x + self.turns.real + self.turns.angle() + self.left.sum(0) - self.right.prod(0)
        return x + self.conv(x[:, :, None, :].reshape(2, 4, 3, 4)).reshape(x.shape)


class OnlyBuffers(nn.Module):
    """Hardly anything but a buffer."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.rand(1))
        self.register_buffer("matrix", torch.randn(WIDTH, WIDTH))

    def forward(self, x):
        return torch.tanh(x @ self.matrix) * self.scale


class WithBuffersOnly(Plain):
    """A child has nothing but a buffer, which is larger than any parameter."""

    def __init__(self):
        super().__init__()
        self.only = OnlyBuffers()

    def forward(self, x):
        return self.only(super().forward(x))


class HoldsList(Plain):
    def __init__(self):
        super().__init__()
        self.tables = nn.ParameterList(nn.Parameter(torch.randn(WIDTH)) for _ in range(3))
        self.named = nn.ParameterDict({"x": nn.Parameter(torch.randn(WIDTH))})

    def forward(self, x):
        x = x * self.tables[0]
        x = super().forward(x) + self.tables[1] * self.named["x"]
        return x + self.tables[2]


class Begins(Plain):
    """Its own weights are used at the beginning, in the middle and at the end."""

    def __init__(self):
        super().__init__()
        self.first, self.middle, self.last = (nn.Parameter(torch.randn(WIDTH)) for _ in range(3))

    def forward(self, x):
        return self.c(self.b(self.a(x * self.first)) * self.middle.repeat(2)) + self.last


class BeginsEarly(Begins):
    """Looks at its weights once, at the beginning."""

    def forward(self, x):
        first, middle, last = torch.stack([self.first, self.middle, self.last]).unbind()
        return self.c(self.b(self.a(x * first)) * middle.repeat(2)) + last


class ViewsEarly(Begins):
    """Takes views of its own weights at the beginning, and uses them at the end."""

    def forward(self, x):
        first, middle, last = self.first[None], self.middle.view(-1), self.last.reshape(1, -1)
        return self.c(self.b(self.a(x * first)) * middle.repeat(2)) + last


class KeepsView(Plain):
    """Takes a view of a layer's weight at the beginning, and uses it after that layer and others ran."""

    def forward(self, x):
        turned = self.b.weight.T
        return super().forward(x) + (x @ turned)[..., :WIDTH]


# --- weights used without their own forward ----------------------------------------------------------------


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


def _tied() -> nn.Module:
    blocks = [Plain() for _ in range(4)]
    blocks[2].a.weight = blocks[0].a.weight
    blocks[3].b.weight.data = blocks[1].b.weight.data
    blocks[3].c.weight = nn.Parameter(blocks[3].b.weight.data.T)
    return Net(*blocks)


def _linked(kind: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """The second block and the last have to do with the third."""
    third = Plain()
    return Net(Plain(), kind(third), third, Plain(), kind(third))


def _of(
    kind: Callable[[], nn.Module], net: Callable[..., nn.Module] = Net, count: int = 4
) -> Callable[[], nn.Module]:
    return lambda: net(*(kind() for _ in range(count)))


NETS: dict[str, Callable[[], nn.Module]] = {
    "recursive": _of(Recursive),
    "a block calls another": lambda: _linked(CallsAnother),
    "a block owns another": lambda: _linked(Owns),
    "each block calls the next": Chained,
    "wrapped": _of(lambda: Wrapped(Plain())),
    "wrapped twice, passing attributes on": _of(lambda: Passing(Wrapped(Passing(Plain())))),
    "lists in lists": Stages,
    "sequential blocks": SequentialBlocks,
    "a list run twice": Twice,
    "one block at several places": SameBlockManyTimes,
    "lists run never, late, at times": SometimesRun,
    "the list is put in order anew in each step": Reordered,
    "gives its parameter": _of(GivesParameter, UsesGifts),
    "gives a view of its parameter": _of(GivesView, UsesGifts),
    "gives a view of its buffer": _of(GivesBuffer, UsesGifts),
    "gives its input": lambda: Net(Plain(), GivesInput(), Plain(), GivesInput()),
    "writes to its input": _of(WritesInput),
    "dataclass": _of(GivesDataclass, PassesDataclass),
    "dict": _of(GivesDict, PassesDict),
    "generator": _of(Generates, Collects),
    "generators asked at the end": _of(Generates, CollectsLate),
    "all kinds of arguments": _of(ManyArguments, PassesMany),
    "counts": _of(Counts),
    "replaces its buffer": _of(Replaces),
    "batch norm": _of(Normalised),
    "odd weights": _of(Odd),
    "a child of buffers": _of(WithBuffersOnly),
    "blocks of buffers": lambda: Net(Plain(), OnlyBuffers(), Plain(), OnlyBuffers()),
    "parameter lists": _of(HoldsList),
    "begin, middle and end": _of(Begins),
    "all at the beginning": _of(BeginsEarly),
    "views at the beginning": _of(ViewsEarly),
    "a view kept in the block": _of(KeepsView),
    "another block's weight": lambda: _linked(UsesOther),
    "layers never run": _of(UsesLayers),
    "views kept by the parent": _of(Plain, KeepsTurned),
    "a view left on the block": _of(LeavesView, UsesLeftView),
    "a view kept for ever": _of(CachesView),
    "a copy kept for ever": _of(CachesCopy),
    "a stray from the third step on": _of(Plain, LateStray),
    "a block with a stray from the third step on": LateBlock,
    "a block with weights of its own from the third step on": LatePhases,
    "attention": _of(Attends),
    "attention across": _of(AttendsAcross),
    "encoder layers": _of(_encoder_layer),
    "a class of encoder layers": _of(Encodes),
    "encoder layers in blocks": _of(HoldsEncoder),
    "lstm": _of(Recurrent),
    "weight norm": _of(lambda: _parametrized(parametrizations.weight_norm)),
    "old weight norm": _of(lambda: _parametrized(nn.utils.weight_norm)),
    "spectral norm": _of(lambda: _parametrized(parametrizations.spectral_norm)),
    "old spectral norm": _of(lambda: _parametrized(nn.utils.spectral_norm)),
    "orthogonal": _of(lambda: _parametrized(parametrizations.orthogonal)),
    "parametrization with weights": _of(lambda: _parametrized(_scaled)),
    "torch's hooks": _of(lambda: _parametrized(_hooked)),
    "tied": _tied,
}

REPLACE_WEIGHTS = {"replaces its buffer"}
