"""Forwards whose passes must not run together: they do more than compute, or others have a say in them."""

import pytest
import torch
from guidance import Disturbed, Loop, Net, compare
from torch import nn

pytestmark = pytest.mark.usefixtures("nobody_is_left_half_way")
GRANULARITIES = ("block", "phase", "leaf")


# --- what a forward does besides computing ----------------------------------------------------------------


class Counting(Net):
    """Computes another thing each time."""

    calls = 0

    def begin(self, x, prompt):
        self.calls += 1
        return x * (1 + self.calls / 7), prompt


class Drawing(Net):
    def begin(self, x, prompt):
        return x + torch.rand(1), prompt


class WritingToItsInput(Net):
    def forward(self, x, time, prompt):
        x.mul_(1.01)
        return super().forward(x, time, prompt)


class WritingToABuffer(Net):
    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(1))

    def begin(self, x, prompt):
        self.mean.add_(1)
        return x + self.mean, prompt


class Rescaling(Net):
    """As peft's LoRA: the scale is changed for the time of the forward, and put back."""

    def __init__(self):
        super().__init__()
        self.scaling = {"default": 2.0}

    def begin(self, x, prompt):
        self.scaling["default"] *= 0.5
        return x, prompt

    def end(self, x):
        x = x * self.scaling["default"]
        self.scaling["default"] /= 0.5
        return x


class Leaving(Net):
    """Leaves a note for the end of the forward where nobody looks; the last one to come is right."""

    notes = []  # noqa: RUF012

    def begin(self, x, prompt):
        self.notes[:] = [prompt]
        return x, prompt

    def end(self, x):
        x = x * self.notes[0]
        return x


class LeavingForTheNext(Leaving):
    """The same, but the first one to come is right."""

    notes = []  # noqa: RUF012

    def begin(self, x, prompt):
        if not self.notes:
            self.notes.append(prompt)
        return x, prompt

    def end(self, x):
        return x * self.notes.pop() if self.notes else x


class ReturningItsBuffer(Net):
    """Computes into memory of its own, that it returns."""

    memory = torch.zeros(3, 24)

    def end(self, x):
        return Holder.put(x)


class Holder:
    """Somewhere outside the module."""

    memory = torch.zeros(3, 24)

    @classmethod
    def put(cls, x):
        return cls.memory.copy_(x)


class Taking(Net):
    """Takes items out of the list that it is given."""

    def forward(self, x, time, prompt):
        return super().forward(x, time, prompt.pop())


class ListLoop(Loop):
    def call(self, net, time, number):
        given = [self.prompts[number]]
        made = net(self.latents, time, given)
        assert not given
        return made


class CloningLoop(Loop):
    """Keeps its own copy of what comes."""

    def call(self, net, time, number):
        return super().call(net, time, number).clone()


class ReturningAnObject(Net):
    def end(self, x):
        return Wrapped(x)


class Wrapped:
    def __init__(self, x):
        self.x = x


class UnwrappingLoop(Loop):
    def call(self, net, time, number):
        return super().call(net, time, number).x


class Passing(Net):
    """Returns what it was given besides."""

    def forward(self, x, time, prompt):
        return super().forward(x, time, prompt), x


class PassingLoop(Loop):
    def call(self, net, time, number):
        made, x = super().call(net, time, number)
        assert x is self.latents
        return made


STATEFUL = {
    "counts": (Counting, Loop, "changes its attribute calls"),
    "draws": (Drawing, Loop, "random numbers"),
    "writes to its input": (WritingToItsInput, Loop, "writes to its arguments"),
    "writes to a buffer": (WritingToABuffer, Loop, "weights or buffers"),
    "changes a scale": (Rescaling, Loop, "another result"),
    "leaves a note": (Leaving, Loop, "another result"),
    "leaves a note for the next": (LeavingForTheNext, Loop, "another result"),
    "returns its memory": (ReturningItsBuffer, CloningLoop, "share memory"),
    "takes from a list": (Taking, ListLoop, "writes to its arguments"),
    "returns an object": (ReturningAnObject, UnwrappingLoop, "returns a Wrapped"),
    "returns its input": (Passing, PassingLoop, "returns what it is given"),
}


@pytest.mark.parametrize(("kind", "loop", "why"), STATEFUL.values(), ids=STATEFUL)
def test_forwards_that_do_more_than_compute(kind, loop, why):
    report, loop = compare(kind, loop)
    assert report.paired == 0
    assert why in report.unpaired["module"]
    assert why in str(report)
    rehearsed = len(set(loop.per_step)) > 1
    assert rehearsed == (why in ("another result", "share memory"))


def test_every_pass_is_looked_at_before_it_runs_with_others():
    class Counted(Loop):
        def call(self, net, time, number):
            return net(self.latents, time, self.prompts[number], options={"number": number})

    class WritingInTheFifth(Net):
        def __init__(self):
            super().__init__()
            self.register_buffer("mean", torch.zeros(1))

        def forward(self, x, time, prompt, options):
            if options["number"] == 4:
                x = x + self.mean.add_(1)
            return Net.forward(self, x, time, prompt)

    report, _ = compare(WritingInTheFifth, lambda: Counted(5))
    assert report.paired == 0
    assert "buffers" in report.unpaired["module"]


class Turning(Net):
    """Begins to do more than compute in the midst of a run."""

    def forward(self, x, time, prompt):
        if float(time) > 0.35:
            x = self.turn(x)
        return super().forward(x, time, prompt)


class TurningToCount(Turning):
    def __init__(self):
        super().__init__()
        self.seen, self.calls = [], 0

    def turn(self, x):
        self.calls += 1
        self.seen.append(None)
        return x * (self.calls + len(self.seen))


class TurningToDraw(Turning):
    def turn(self, x):
        return x + torch.rand(1)


class TurningToWrite(Turning):
    def turn(self, x):
        return x.mul_(1.1)


class TurningToItsBuffer(Turning):
    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.ones(1))

    def turn(self, x):
        return x * self.mean.mul_(1.1)


class TurningToItsMemory(Turning):
    def forward(self, x, time, prompt):
        put = Holder.put if float(time) > 0.35 else torch.clone
        return put(Net.forward(self, x, time, prompt))


@pytest.mark.parametrize("kind", [TurningToCount, TurningToDraw, TurningToItsMemory])
def test_what_begins_in_the_midst_of_a_run_is_undone(kind):
    report, _ = compare(kind, CloningLoop, steps=8)
    assert report.paired == 2
    assert report.unpaired


@pytest.mark.parametrize(("kind", "why"), [(TurningToWrite, "arguments"), (TurningToItsBuffer, "buffers")])
def test_what_cannot_be_undone_is_told(kind, why):
    with pytest.raises(RuntimeError, match=f"{why}.*pair_passes=False"):
        compare(kind, steps=8)
    assert compare(kind, steps=8, pair_passes=False)[0].paired == 0


# --- who else has a say -----------------------------------------------------------------------------------


class Busy(Net):
    def __init__(self, prepare):
        super().__init__()
        prepare(self)


def torch_hook(net):
    net.blocks[1].register_forward_hook(lambda module, args, output: output * 1.5)


def torch_pre_hook(net):
    net.blocks[1].two.register_forward_pre_hook(lambda module, args: (args[0] * 1.5,))


def diffusers_hook(net):
    from diffusers.hooks import HookRegistry, ModelHook

    class Half(ModelHook):
        def post_forward(self, module, output):
            return output / 2

    HookRegistry.check_if_exists_or_initialize(net.blocks[2]).register_hook(Half(), "half")


def other_forward(net):
    forward = net.blocks[1].forward
    net.blocks[1].forward = lambda x, prompt: forward(x, prompt) * 2


def own_compiler(net):
    net.blocks[1]._compiled_call_impl = net.blocks[1]._call_impl


def training(net):
    net.train()


def accelerate_hook(net):
    from accelerate.hooks import ModelHook, add_hook_to_module

    class Half(ModelHook):
        def post_forward(self, module, output):
            return output / 2

    add_hook_to_module(net.blocks[1].two, Half())


def buffer_of_inference_mode(net):
    with torch.inference_mode():
        net.register_buffer("unused", torch.zeros(2))


COMPANY = {
    "hook of torch": (torch_hook, "torch hooks"),
    "hook of torch before": (torch_pre_hook, "torch hooks"),
    "hook of Diffusers": (diffusers_hook, "hooks of Diffusers"),
    "hook of accelerate": (accelerate_hook, "not ours"),
    "another forward": (other_forward, "put in place"),
    "compiled": (own_compiler, "compiled"),
    "training": (training, "training"),
    "uncounted": (buffer_of_inference_mode, "inference mode"),
}


@pytest.mark.parametrize(("prepare", "why"), COMPANY.values(), ids=COMPANY)
def test_the_company_of_others_is_shunned(prepare, why):
    report, _ = compare(lambda: Busy(prepare))
    assert report.paired == 0
    assert why in report.unpaired["module"]


def test_a_hook_for_all_modules():
    hook = nn.modules.module.register_module_forward_hook(lambda module, args, output: None)
    try:
        report, _ = compare(Net)
    finally:
        hook.remove()
    assert report.paired == 0
    assert "all modules" in report.unpaired["module"]


@pytest.mark.parametrize("prepare", [p for p, _ in list(COMPANY.values())[:3]], ids=list(COMPANY)[:3])
def test_company_that_comes_between_the_calls(prepare):
    report, _ = compare(Net, lambda: Disturbed(lambda loop, net: prepare(net)), steps=8)
    assert report.discarded == 1
    assert report.paired == 2


def test_a_setting_that_changes_between_the_calls():
    class Scaled(Net):
        def __init__(self):
            super().__init__()
            self.scale, self.options = 1.0, [1.0]

        def end(self, x):
            return x * self.scale * self.options[0]

    def scale(loop, net):
        net.scale = 2.0

    def option(loop, net):
        net.options[0] = 2.0

    for disturb in (scale, option):
        report, _ = compare(Scaled, lambda disturb=disturb: Disturbed(disturb), steps=9)
        assert report.discarded == 1
        assert report.paired == 5  # rehearsed again
