"""Models whose blocks are built and used in every odd way that Python allows (`test_odd_blocks`)."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn
from torch.nn.utils import parametrizations

from .base import STEPS, WIDTH, Net, Plain
from .callers import (
    CallsAnother,
    Chained,
    Owns,
    Passing,
    Recursive,
    Reordered,
    SameBlockManyTimes,
    SequentialBlocks,
    SometimesRun,
    Stages,
    Twice,
    Wrapped,
)
from .changing import (
    Begins,
    BeginsEarly,
    Counts,
    HoldsList,
    KeepsView,
    Normalised,
    Odd,
    OnlyBuffers,
    Replaces,
    ViewsEarly,
    WithBuffersOnly,
)
from .passing import (
    Collects,
    CollectsLate,
    Generates,
    GivesBuffer,
    GivesDataclass,
    GivesDict,
    GivesInput,
    GivesParameter,
    GivesView,
    ManyArguments,
    PassesDataclass,
    PassesDict,
    PassesMany,
    UsesGifts,
    WritesInput,
)
from .strays import (
    Attends,
    AttendsAcross,
    CachesCopy,
    CachesView,
    Encodes,
    HoldsEncoder,
    KeepsTurned,
    LateBlock,
    LatePhases,
    LateStray,
    LeavesView,
    Recurrent,
    UsesLayers,
    UsesLeftView,
    UsesOther,
    _encoder_layer,
    _hooked,
    _parametrized,
    _scaled,
)

__all__ = ["NETS", "REPLACE_WEIGHTS", "STEPS", "WIDTH", "Counts", "Net", "Plain"]


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
