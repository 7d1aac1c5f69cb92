"""The hooks that tell the engine what runs: accelerate `ModelHook`s on components, stems and units."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from itertools import count
from threading import get_ident
from typing import Any, NoReturn, Protocol, TypeVar

import torch
from accelerate.hooks import ModelHook, SequentialHook, add_hook_to_module, remove_hook_from_module
from accelerate.utils import send_to_device
from torch import nn

from . import guards, recovery
from .component import Component, State, Unit
from .engine import Engine
from .inputs import elsewhere, shapes_of, tensors_of_output
from .pairing.pairs import Meeting, Pairs
from .pairing.together import run_together

_ATTEMPTS = 16  # times that a forward is run again: each leaves less on the device
_MARKER = "diffusers.utils.accelerate_utils"  # where the decorator's wrapper is from


class Holder(Protocol):
    """Whoever put a component under the engine, and can take it out again."""

    def restore(self) -> None: ...

    def take_back(self, hook: ComponentHook) -> None: ...

    def check(self) -> None: ...

    def fit(self, shapes: tuple) -> None: ...

    def recover(self, error: BaseException) -> bool: ...


class EngineHook(ModelHook):
    """A hook of ours: knows the engine, and hears of it when the forward raises.

    Attributes:
        execution_device: where the module computes; Diffusers reads it (`pipe._execution_device`).
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.retired = False  # taken off by us: nobody has to do without it

    @property
    def execution_device(self) -> torch.device:
        return self.engine.device

    def init_hook(self, module: nn.Module) -> nn.Module:
        """Wrap the forward that accelerate is about to call, so that a failure is heard of."""
        forward = module._old_forward
        guarded = functools.wraps(forward)(self.guarded(module, forward))
        guarded.unguarded = forward
        guarded.guard = self
        module._old_forward = guarded
        guards.refuse_copies(module)
        return module

    def guarded(self, module: nn.Module, forward: Callable) -> Callable:
        """`forward`, but a failure is heard of."""

        def guarded(*args: Any, **kwargs: Any) -> Any:
            try:
                return forward(*args, **kwargs)
            except BaseException:
                self.failed(module)
                raise

        return guarded

    def detach_hook(self, module: nn.Module) -> nn.Module:
        forward = module.__dict__.get("_old_forward")
        if getattr(forward, "guard", None) is self:
            module._old_forward = forward.unguarded
        guards.allow_copies(module)
        return module

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        guards.refuse_copy(type(self).__name__)

    def failed(self, module: nn.Module) -> None:
        """The module's forward raised; `post_forward` will not be called."""

    def send(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """What is given from outside, on the execution device, as accelerate's own offloading hooks do it.

        A pipeline that asks an offloaded component for its device makes inputs on the host. Whatever lies
        right, and scalars, which may lie anywhere, are passed through by identity.
        """
        device = self.engine.device
        if device.type == "cpu":
            return args, kwargs
        skip = getattr(module, "_skip_keys", None) or ()
        skip = (skip,) if isinstance(skip, str) else skip
        args = tuple(send_to_device(v, device) if elsewhere(v, device) else v for v in args)
        kwargs = {
            key: send_to_device(v, device) if key not in skip and elsewhere(v, device) else v
            for key, v in kwargs.items()
        }
        return args, kwargs


class ComponentHook(EngineHook):
    """On a component's root: brings its stem, and brackets its forward with the compute stream."""

    def __init__(self, engine: Engine, component: Component, held: Holder) -> None:
        super().__init__(engine)
        self.component = component
        self.held = held
        self._detached = False
        self._meetings: dict[int, Meeting | None] = {}  # by thread: of the calls that have begun

    def init_hook(self, module: nn.Module) -> nn.Module:
        module = super().init_hook(module)
        guards.guard(module, self.component.name)
        if self._detached:  # accelerate takes a hook off and puts it on again to chain another to it
            self._detached = False
            self.held.take_back(self)
        return module

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple, dict]:
        with self.engine.lock:  # a second thread waits here until the first one's call, or forward, is over
            self._check()
            meeting = self._meet(args, kwargs)
            self._meetings[get_ident()] = meeting
            if meeting is not None and meeting.result is not None:
                return args, kwargs
            return self._begin(module, args, kwargs, meeting)

    def _check(self) -> None:
        if not self.component.checked and not self.engine.busy:
            self.held.check()

    def _meet(self, args: tuple, kwargs: dict) -> Meeting | None:
        if self.engine.busy or not (args or kwargs):
            return None
        self.component.pairs = self.component.pairs or Pairs(self.engine, self.component)
        return self.component.pairs.meet(args, kwargs)

    def _begin(self, module: nn.Module, args: tuple, kwargs: dict, meeting: Meeting | None = None) -> tuple:
        # Diffusers calls this without arguments for methods that use the component past its forward, and
        # never calls `post_forward`. Those of an autoencoder we guard ourselves (`entry`).
        args, kwargs = self.send(module, args, kwargs)
        if args or kwargs:
            self.enter(args, kwargs, meeting)
        else:
            self.engine.touch(self.component)
        return args, kwargs

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        self.engine.leave(self.component)
        self.engine.streams.lend(tensors_of_output(output))
        return output

    def guarded(self, module: nn.Module, forward: Callable) -> Callable:
        """`forward`, run again where that helps."""

        def guarded(*args: Any, **kwargs: Any) -> Any:
            meeting = self._meetings.pop(get_ident(), None)
            if meeting is not None and meeting.result is not None:
                return meeting.result[0]
            inputs = recovery.Inputs(args, kwargs)
            given = (args, kwargs)

            def run() -> Any:
                if meeting is not None and meeting.take_followers():
                    return run_together(self, module, forward, meeting, inputs)
                output = forward(*given[0], **given[1])
                if meeting is not None:
                    meeting.pairs.ran(meeting, output, inputs.again(), given)
                return output

            def before_again() -> None:
                nonlocal given
                given = inputs.again()
                self.enter(*given)

            return self._persist(run, inputs.intact, before_again)

        return guarded

    def entry(self, module: nn.Module, method: Callable) -> Callable:
        """A method that uses the component past its forward, treated as its forward is."""
        guarded = self.guarded(module, method)

        @functools.wraps(method)
        def entry(*args: Any, **kwargs: Any) -> Any:
            with self.engine.lock:
                self._check()
                self._meetings.pop(get_ident(), None)
                args, kwargs = self._begin(module, args, kwargs)
            return self.post_forward(module, guarded(*args, **kwargs))

        return entry

    def enter(self, args: tuple, kwargs: dict, meeting: Meeting | None = None) -> None:
        """A forward with these inputs begins; together with its followers, if `meeting` has any that may."""
        shapes = ()
        if self.engine.budget is not None:
            shapes = shapes_of(args, kwargs)
            together = meeting.shapes(shapes) if meeting is not None else None
            if together is not None:
                shapes = together
            elif not self.engine.busy:
                self.held.fit(shapes)
        self._persist(lambda: self.engine.enter(self.component, shapes), lambda: True, lambda: None)

    def _persist(
        self, run: Callable[[], Any], may_run_again: Callable[[], bool], before_again: Callable[[], None]
    ) -> Any:
        """`run`; if it fails and that can be helped, help it and run again."""
        for attempt in count():
            try:
                return run()
            except BaseException as error:
                self.engine.leave(self.component, completed=False)
                failure = error
            gives_up = attempt >= _ATTEMPTS or self.engine.busy or not may_run_again()
            if gives_up or not self.held.recover(failure):
                if not self.engine.busy:
                    self.engine.call_ended()  # nobody else is going to say so
                try:
                    raise failure
                finally:
                    failure = None  # which knows this frame, and so would keep what it holds
            failure = None
            before_again()

    def detach_hook(self, module: nn.Module) -> nn.Module:
        """Give the component its weights back, where they came from."""
        self.held.restore()  # if it fails, nothing else has changed
        module = super().detach_hook(module)
        guards.unguard(module)
        self._detached = True
        return module


class StemHook(EngineHook):
    """On a module of the stem: when it is called on its own (`text_model.embeddings`), the stem comes."""

    def __init__(self, engine: Engine, component: Component) -> None:
        super().__init__(engine)
        self.component = component
        self._alone = 0  # uses under way outside the component's forward: other threads wait for these

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple, dict]:
        with self.engine.lock:
            if not self.component.depth:
                args, kwargs = self.send(module, args, kwargs)
                self.engine.touch(self.component)
                self.engine.lock.acquire()
                self._alone += 1
        return args, kwargs

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        self.failed(module)
        return output

    def failed(self, module: nn.Module) -> None:
        if self._alone:
            self._alone -= 1
            self.engine.lock.release()


class UnitHook(EngineHook):
    """On a module of a streamed unit: its weights are there while it computes, and free behind it."""

    opening = False

    def __init__(self, engine: Engine, unit: Unit, brings_stem: bool) -> None:
        super().__init__(engine)
        self.unit = unit
        self.brings_stem = brings_stem  # the module itself holds tensors that belong to the stem

    def init_hook(self, module: nn.Module) -> nn.Module:
        self.engine.roster.stream_again(self.unit)  # if it was detached before
        return super().init_hook(module)

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple, dict]:
        passes = self.engine.passes
        if passes is not None:
            passes.before(self.unit)
        if torch.is_grad_enabled():
            self._refuse_gradients((*self.unit.weights.tensors, *args, *kwargs.values()))
        if not self.unit.component.depth:
            args, kwargs = self.send(module, args, kwargs)
            if self.brings_stem:
                self.engine.touch(self.unit.component)
        self.engine.acquire(self.unit, self.opening)
        return args, kwargs

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        passes = None if self.opening else self.engine.passes
        if passes is not None:
            passes.make_way(self.unit)
        self.engine.release(self.unit)
        if passes is not None:
            passes.done()
        if torch.is_grad_enabled():  # an input may hide in a list or an object: what comes out tells
            self._refuse_gradients(output if isinstance(output, (list, tuple)) else (output,))
        return output

    def failed(self, module: nn.Module) -> None:
        self.engine.release(self.unit)

    def detach_hook(self, module: nn.Module) -> nn.Module:
        """Without its hook a unit can only work if it stays on the device."""
        if not self.retired:
            self.engine.roster.make_resident(self.unit)
        return super().detach_hook(module)

    def _refuse_gradients(self, values: Iterable[Any]) -> None:
        if self.unit.state is State.RESIDENT:
            return
        if any(isinstance(value, torch.Tensor) and value.requires_grad for value in values):
            raise RuntimeError(
                f"gradients are enabled through the streamed block {self.unit.component.name}.{self.unit.name}, "
                "whose weights leave the device after its forward. Call it under torch.no_grad() or "
                "torch.inference_mode(), set requires_grad_(False), or disable the block offload to train."
            )


class OpenerHook(UnitHook):
    """On a block that holds some of its first phase's weights itself: they are there from its beginning."""

    opening = True


def _keep_later_wrappers(module: nn.Module) -> None:
    """Take accelerate's wrapper out from under those that Diffusers' own hooks put around it since.

    Accelerate's removal puts back the forward that it found, and would take them off with its own.
    """
    registry = getattr(module, "_diffusers_hook", None)
    for reference in registry._fn_refs if registry is not None else ():
        for slot in ("forward", "original_forward"):
            wrapped = getattr(reference, slot)
            if getattr(wrapped, "func", None) is not None and wrapped.func.__module__ == "accelerate.hooks":
                outermost = module.forward
                inner = module._old_forward
                setattr(reference, slot, getattr(inner, "unguarded", inner))
                module._old_forward = outermost
                return


_Hook = TypeVar("_Hook", bound=EngineHook)


def attach(module: nn.Module, hook: EngineHook) -> None:
    """Add a hook behind those that are there already."""
    add_hook_to_module(module, hook, append=True)


def find(module: nn.Module, kind: type[_Hook]) -> _Hook | None:
    """The hook of class `kind` on `module`, alone or in a chain."""
    return next((hook for hook in on(module) if isinstance(hook, kind)), None)


def on(module: nn.Module) -> Sequence[Any]:
    """The accelerate hooks on `module`, the first to run first."""
    present = getattr(module, "_hf_hook", None)
    return present.hooks if isinstance(present, SequentialHook) else (present,) if present is not None else ()


def detach(module: nn.Module, hook: EngineHook) -> None:
    """Remove one hook and leave the others as they are.

    accelerate puts a hook in place of another without taking that one off; what it left behind goes here.
    """
    present = getattr(module, "_hf_hook", None)
    if present is hook:
        _keep_later_wrappers(module)
        remove_hook_from_module(module)
    elif isinstance(present, SequentialHook) and hook in present.hooks:
        hook.detach_hook(module)
        rest = tuple(other for other in present.hooks if other is not hook)
        if len(rest) == 1:
            module._hf_hook = rest[0]
        else:
            present.hooks = rest
    else:
        hook.detach_hook(module)


def entries(module: nn.Module) -> list[str]:
    """The methods that use `module` past its forward, as Diffusers marks them (`apply_forward_hook`)."""
    marked = (
        name
        for kind in type(module).__mro__
        for name, method in vars(kind).items()
        if getattr(method, "__globals__", {}).get("__name__") == _MARKER
    )
    return list(dict.fromkeys(marked))
