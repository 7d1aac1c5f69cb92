"""Guidance passes that run for one load of the weights: equal to the bit, and only where it is safe."""

import gc
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import pytest
import torch
from diffusers.utils.accelerate_utils import apply_forward_hook
from greenlet import greenlet
from guidance import Loop, Net, compare, offload
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from diffusers_offload import passes
from diffusers_offload.budget import DeviceBudget, _Known
from diffusers_offload.component import Component
from diffusers_offload.streams import open_streams
from diffusers_offload.timeline import Forecast

GRANULARITIES = ("block", "phase", "leaf")


@pytest.fixture(autouse=True)
def nobody_is_left_half_way(monkeypatch):
    made = []

    def make(run):
        made.append(greenlet(run))
        return made[-1]

    monkeypatch.setattr(passes, "greenlet", make)
    yield
    assert all(each.dead for each in made)


# --- what is gained ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("prompts", [2, 3])
def test_each_unit_comes_once_a_step(granularity, prompts):
    report, loop = compare(Net, lambda: Loop(prompts), offload_granularity=granularity)
    assert report.paired == 4 * (prompts - 1)
    assert not report.discarded
    assert not report.unpaired
    _, alone = compare(Net, lambda: Loop(prompts), offload_granularity=granularity, pair_passes=False)
    assert loop.per_step[1:] == [each // prompts for each in alone.per_step[1:]]
    assert loop.per_step[0] == alone.per_step[0] * (prompts + 1) // prompts  # the rehearsal


def test_a_second_call_needs_no_rehearsal():
    net = Net()
    handle = offload(net)
    with torch.no_grad():
        for paired in (4, 5, 5):
            handle.reset()
            with handle.calling():
                Loop().run(net)
            assert handle.report().paired == paired


def test_a_unit_takes_no_more_of_the_arena():
    report, _ = compare(Net)
    alone, _ = compare(Net, pair_passes=False)
    assert report.arena_bytes == alone.arena_bytes


def test_one_call_a_step_is_left_alone():
    report, loop = compare(Net, lambda: Loop(1))
    assert (report.paired, report.discarded, dict(report.unpaired)) == (0, 0, {})
    _, alone = compare(Net, lambda: Loop(1), pair_passes=False)
    assert loop.bytes == alone.bytes


def test_the_same_call_again_and_again_is_left_alone():
    def make():
        loop = Loop()
        loop.given = [0, 0]
        return loop

    assert compare(Net, make)[0].paired == 0


def test_a_time_that_is_computed_anew_for_each_call():
    report, _ = compare(Net, lambda: Loop(time_of=lambda time: time / 1000))
    assert report.paired == 4


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("skips", [(1, 2), (0,), ()])  # the passes that do
def test_passes_that_leave_blocks_out(skips, granularity):
    class Skipping(Loop):
        def call(self, net, time, number):
            skip = {"skip": (1, 2)} if number in skips else None
            return net(self.latents, time, self.prompts[number], options=skip)

    report, _ = compare(Net, lambda: Skipping(3), steps=7, offload_granularity=granularity)
    assert report.paired == 10
    assert not report.discarded


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_passes_that_use_the_units_in_another_order(granularity):
    class Reversing(Net):
        def forward(self, x, time, prompt, options=None):
            for block in reversed(self.blocks) if options else self.blocks:
                x = block(x + time, prompt)
            return self.out(x)

    class Both(Loop):
        def call(self, net, time, number):
            return net(self.latents, time, self.prompts[number], options=number == 1)

    report, _ = compare(Reversing, Both, offload_granularity=granularity)
    assert report.paired == 4


def test_it_can_be_turned_off():
    report, loop = compare(Net, pair_passes=False)
    assert report.paired == 0
    assert len(set(loop.per_step)) == 1


@pytest.mark.parametrize("wrong", [0, 1, "yes", "auto", [True]])
def test_other_words_are_refused(wrong):
    with pytest.raises(ValueError, match="pair_passes="):
        offload(Net(), pair_passes=wrong)


# --- what changes between the calls -----------------------------------------------------------------------


def other_prompt(loop, step):
    if step == 3:
        loop.prompts[1] = loop.prompts[1] * 2


def other_first_prompt(loop, step):
    if step == 3:
        loop.prompts[0] = loop.prompts[0] * 2


def edited_prompt(loop, step):
    if step >= 3:
        loop.prompts[1].mul_(1.5)


def guidance_off(loop, step):
    if step == 3:
        loop.given = [0]


def guidance_off_and_on(loop, step):
    loop.given = [0] if step in (3, 4) else [0, 1]


def another_order(loop, step):
    loop.given = [1, 0] if step >= 3 else [0, 1]


def now_and_then(loop, step):
    loop.given = [0] if step % 2 else [0, 1]


CHANGES = {
    "another prompt": (other_prompt, 1),
    "another first prompt": (other_first_prompt, 0),
    "a prompt edited in place": (edited_prompt, 0),
    "guidance off": (guidance_off, 1),
    "guidance off and on": (guidance_off_and_on, 1),
    "another order": (another_order, 0),
    "guidance now and then": (now_and_then, 0),
}


@pytest.mark.parametrize(("between", "discarded"), CHANGES.values(), ids=CHANGES)
def test_between_steps(between, discarded):
    report, _ = compare(Net, lambda: Loop(between=between), steps=9)
    assert report.discarded == discarded


class Disturbed(Loop):
    """Something happens between the two calls of step 4."""

    def __init__(self, disturb, after=None):
        super().__init__()
        self.disturb, self.after = disturb, after

    def call(self, net, time, number):
        if number == 0 and round(float(time) * 10) == 5 and self.after is not None:
            self.after(self, net)
        if number == 1 and round(float(time) * 10) == 4:
            self.disturb(self, net)
        return super().call(net, time, number)


def write_to(name):
    def write(loop, net):
        getattr(loop, name).mul_(1.25)

    return write


def write_to_prompt(loop, net):
    loop.prompts[1].mul_(1.25)


def equal_prompt(loop, net):
    loop.prompts[1] = loop.prompts[1].clone()


def equal_latents_but_for_a_bit(loop, net):
    loop.latents = loop.latents.clone()
    loop.latents[0, 0] = torch.nextafter(loop.latents[0, 0], torch.tensor(9.0))


def write_to_weights(loop, net):
    with torch.no_grad():
        net.blocks[2].two.bias.add_(1)


def replace_weights(loop, net):
    net.blocks[1].one.weight.data = net.blocks[1].one.weight.data * 2


def replace_stem(loop, net):
    net.out.weight.data = net.out.weight.data * 2


DISTURBANCES = {
    "latents written to": write_to("latents"),
    "prompt written to": write_to_prompt,
    "another object for the prompt": equal_prompt,
    "other latents": equal_latents_but_for_a_bit,
    "weights written to": write_to_weights,
    "weights replaced": replace_weights,
    "stem replaced": replace_stem,
}


@pytest.mark.parametrize("disturb", DISTURBANCES.values(), ids=DISTURBANCES)
def test_between_the_calls_of_a_step(disturb):
    report, _ = compare(Net, lambda: Disturbed(disturb), steps=8)
    assert report.discarded == 1
    assert report.paired in (1 + 2, 1 + 1, 1 + 3, 2 + 3, 5)


class Signed(Net):
    """Tells 0.0 from -0.0."""

    def forward(self, x, time, prompt, options=None):
        sign = torch.tensor(options["sign"]) if options else time
        return super().forward(x, torch.copysign(torch.ones(1), sign), prompt)


class Zeros(Loop):
    """Gives a negative zero to the second call of step 4: as a tensor, or as a number."""

    def __init__(self, as_number):
        super().__init__()
        self.as_number, self.calls = as_number, 0

    def call(self, net, time, number):
        self.calls += 1
        sign = -0.0 if self.calls == 10 else 0.0
        if self.as_number:
            return net(self.latents, time, self.prompts[number], options={"sign": sign})
        return net(self.latents, time * sign, self.prompts[number])


@pytest.mark.parametrize("as_number", [True, False])
def test_minus_zero_is_no_zero(as_number):
    report, _ = compare(Signed, lambda: Zeros(as_number), steps=7)
    assert report.discarded == 1


def within_suspended(handle, net):
    with handle.suspended():
        net.blocks[1].one.weight.data.mul_(2)


def as_double(handle, net):
    net.to(torch.float64)
    net.to(torch.float32)
    net.to(torch.bfloat16)
    net.to(torch.float32)


def replaced_and_used(handle, net):
    net.blocks[1].one.weight.data = net.blocks[1].one.weight.data * 2
    net.blocks[1](torch.zeros(1, 24), torch.zeros(1, 24))  # which takes the new weights in


@pytest.mark.parametrize("edit", [within_suspended, as_double, replaced_and_used])
def test_weights_edited_between_the_calls_of_a_step(edit):
    class Nothing:
        def suspended(self):
            return nullcontext()

    def play(net, handle):
        return Disturbed(lambda loop, net: edit(handle, net)).run(net, 8)

    with torch.no_grad():
        expected, net = play(Net(), Nothing()), Net()
        handle = offload(net)
        with handle.calling():
            assert torch.equal(play(net, handle), expected)
    assert handle.report().discarded == 1


def test_the_second_call_comes_from_another_thread():
    def elsewhere(loop, net, time):
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(torch.no_grad()(lambda: Loop.call(loop, net, time, 1))).result()

    class Threaded(Loop):
        def call(self, net, time, number):
            return elsewhere(self, net, time) if number else super().call(net, time, number)

    net = Net()
    with torch.no_grad():
        expected = Loop().run(net)
        handle = offload(net)
        assert torch.equal(Threaded().run(net), expected)
    assert handle.report().paired == 0


def test_two_threads_with_the_same_prompts():
    net = Net()
    loops = [Loop() for _ in range(2)]
    loops[1].prompts = loops[0].prompts
    with torch.no_grad():
        expected = Loop().run(net, 20)
        handle = offload(net)
    with ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(torch.no_grad()(lambda loop=loop: loop.run(net, 20))) for loop in loops]
        assert all(torch.equal(each.result(), expected) for each in runs)
    handle.disable()


def test_another_method_is_no_call_of_the_forward():
    class Coder(Net):
        @apply_forward_hook
        def decode(self, x, time, prompt):
            return self.out(x) * 2

    class Decoding(Loop):
        def call(self, net, time, number):
            if number:
                return net.decode(self.latents, time, self.prompts[number])
            return super().call(net, time, number)

    report, _ = compare(Coder, Decoding)
    assert report.paired == 0


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


@pytest.mark.parametrize("kind", [TurningToCount, TurningToDraw])
def test_what_begins_in_the_midst_of_a_run_is_undone(kind):
    report, _ = compare(kind, steps=8)
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


# --- the state that torch keeps ---------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [(4,), range(9)], ids=["once", "always"])
def test_autocast_for_one_of_two_calls(steps):
    class Cast(Loop):
        def call(self, net, time, number):
            with torch.autocast(
                "cpu", torch.bfloat16, enabled=number == 1 and round(float(time) * 10) in steps
            ):
                return super().call(net, time, number).float()

    report, _ = compare(Net, Cast, steps=8)
    assert report.paired == (5 if len(steps) == 1 else 0)
    assert report.discarded == (1 if len(steps) == 1 else 0)
    assert bool(report.unpaired) == (len(steps) > 1)


def test_autocast_around_both():
    class Cast(Loop):
        def call(self, net, time, number):
            with torch.autocast("cpu", torch.bfloat16):
                return super().call(net, time, number).float()

    report, _ = compare(Net, Cast)
    assert report.paired == 4


class Within(Net):
    """Some of its blocks run under another mode."""

    def forward(self, x, time, prompt):
        x = self.blocks[0](x + time, prompt)
        with torch.autocast("cpu", torch.bfloat16):
            x = self.blocks[1](x, prompt)
            x = self.blocks[2](x, prompt)
        return self.out(self.blocks[3](x.float(), prompt))


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_autocast_within_the_forward(granularity):
    report, _ = compare(Within, offload_granularity=granularity)
    assert report.paired == 4


def test_inference_mode_is_left_alone():
    class Inferring(Loop):
        def call(self, net, time, number):
            with torch.inference_mode():
                made = super().call(net, time, number)
            return made.clone()

    report, _ = compare(Net, Inferring)
    assert report.paired == 0


def test_gradients_are_left_alone():
    class Grad(Loop):
        def call(self, net, time, number):
            with torch.enable_grad():
                return super().call(net, time, number)

    def make():
        return Net().requires_grad_(False)

    report, _ = compare(make, Grad)
    assert report.paired == 0
    assert "gradients" in report.unpaired["module"]


def test_settings_of_torch_between_the_calls():
    def disturb(loop, net):
        torch.use_deterministic_algorithms(not torch.are_deterministic_algorithms_enabled())

    report, _ = compare(Net, lambda: Disturbed(disturb), steps=8)
    assert report.discarded == 1


def test_arguments_that_cannot_be_known_again():
    class Odd(Loop):
        def call(self, net, time, number):
            return net(self.latents, time, self.prompts[number], options={"who": object()})

    report, _ = compare(Net, Odd)
    assert report.paired == 0
    assert "object" in report.unpaired["module"]


# --- what fails -------------------------------------------------------------------------------------------


class Failing(Net):
    """Fails where it is told to: in which block, in how many passes that reach it, with what."""

    def __init__(self):
        super().__init__()
        self.error, self.countdown = None, Countdown()

    def forward(self, x, time, prompt):
        x = x + time
        for number, block in enumerate(self.blocks):
            x = block(x, prompt)
            self.countdown.tick(number)
        return self.out(x)


class Countdown:
    __slots__ = ("error", "left", "number")

    def __init__(self):
        self.left, self.number, self.error = 0, 0, None

    def tick(self, number):
        if self.left and number == self.number:
            self.left -= 1
            if not self.left:
                raise self.error


def expected_of(steps=8):
    with torch.no_grad():
        return Loop().run(Failing(), steps)


@pytest.mark.parametrize("step", [2, 4])  # the rehearsal, and a pair
@pytest.mark.parametrize("reached", [1, 2])  # the lead fails, or the follower
@pytest.mark.parametrize("number", [0, 2, 3])
def test_a_pass_that_fails(step, reached, number):
    net = Failing()
    handle = offload(net)

    def between(loop, now):
        if now + 1 == step:
            net.countdown.left, net.countdown.number = reached, number
            net.countdown.error = ValueError("no")

    loop = Loop(between=between)
    with torch.no_grad(), handle.calling():
        if reached == 1 and step > 2:  # the user's error: once it is known to be no fault of ours
            with pytest.raises(ValueError, match="no"):
                loop.run(net, 8)
        else:
            assert torch.equal(loop.run(net, 8), expected_of())
    with torch.no_grad(), handle.calling():
        assert torch.equal(Loop().run(net, 8), expected_of())
    handle.disable()


@pytest.mark.parametrize("reached", [1, 2])
@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_an_interruption_reaches_the_user(reached, error):
    net = Failing()
    handle = offload(net)
    for number in range(4):

        def between(loop, now, number=number):
            if now == 4:
                net.countdown.left, net.countdown.number, net.countdown.error = reached, number, error()

        with torch.no_grad(), pytest.raises(error), handle.calling():
            Loop(between=between).run(net, 8)
        engine = handle.engines[0]
        assert not engine.busy
        assert engine.passes is None
        assert not engine._using
        with torch.no_grad(), handle.calling():
            assert torch.equal(Loop().run(net, 8), expected_of())


@pytest.mark.parametrize("reached", [1, 2])
@pytest.mark.parametrize("step", [2, 4])
def test_too_little_memory_for_both(reached, step):
    net = Failing()
    handle = offload(net)

    def between(loop, now):
        if now + 1 == step:
            net.countdown.left, net.countdown.number = reached, 2
            net.countdown.error = torch.OutOfMemoryError("CUDA out of memory")

    with torch.no_grad(), handle.calling():
        assert torch.equal(Loop(between=between).run(net, 8), expected_of())
    report = handle.report()
    assert "OutOfMemoryError" in report.unpaired["module"]
    assert report.shortages == 0  # nothing else had to leave the device
    assert report.paired == (0 if step == 2 else 1)


def test_a_forward_that_will_not_end():
    class Stubborn(Failing):
        def forward(self, x, time, prompt):
            try:
                return super().forward(x, time, prompt)
            except greenlet_exit():
                return super().forward(x, time, prompt)

    net = Stubborn()
    handle = offload(net)

    def between(loop, now):
        if now == 4:
            net.countdown.left, net.countdown.number, net.countdown.error = 1, 2, ValueError("no")

    with torch.no_grad(), pytest.raises(ValueError, match="no"), handle.calling():
        Loop(between=between).run(net, 8)
    with torch.no_grad(), handle.calling():
        assert torch.equal(Loop().run(net, 8), expected_of())


def greenlet_exit():
    from greenlet import GreenletExit

    return GreenletExit


def test_nothing_is_kept_past_the_call():
    net = Net()
    handle = offload(net)
    loop = Loop(between=guidance_off)
    with torch.no_grad(), handle.calling():
        loop.run(net, 4)  # ends with a result that nobody asked for
    pairs = handle.engines[0].components[0].pairs
    assert not pairs._pending
    assert not len(pairs._history)
    assert handle.report().discarded == 1


def test_latents_are_not_kept_alive():
    import weakref

    net = Net()
    handle = offload(net)
    seen = []

    class Large(Loop):
        def call(self, net, time, number):
            seen.append(weakref.ref(self.latents))
            return super().call(net, time, number)

    loop = Large()
    loop.latents = torch.randn(1024, 24)
    with torch.no_grad(), handle.calling():
        loop.run(net, 5)
        gc.collect()
        assert sum(each() is not None for each in seen) == 0
    assert handle.report().paired == 3


# --- under a bound ----------------------------------------------------------------------------------------

ONE, BOTH = ((3, 24),), (((3, 24),), ((3, 24),))


def budget(limit, need_of_one, need_of_both=None, one=None, both=None):
    """A budget that has measured a component."""
    component = Component("module", Net())
    known = DeviceBudget(limit, open_streams(torch.device("cpu")))
    known._known[component, ONE] = _Known(need_of_one, forecast=one)
    if need_of_both is not None:
        known._known[component, BOTH] = _Known(need_of_both, forecast=both)
    return known.why_not_together(component, ONE, BOTH, 100)


def forecast(step, stall):
    return Forecast(step=step, transfer=step, stall=stall, stalls=())


def test_memory_for_the_activations_of_both():
    assert budget(200, 150) is None  # 100 of weights, twice 50
    assert "memory" in budget(199, 150)
    assert "memory" in budget(200, 150, need_of_both=201)
    assert budget(200, 190, need_of_both=200) is None  # measured


def test_nothing_is_gained_where_computing_is_the_limit():
    assert budget(200, 150, one=forecast(1.0, 0.5)) is None
    assert "computing" in budget(200, 150, one=forecast(1.0, 0.01))
    assert budget(200, 150, 200, forecast(1.0, 0.5), forecast(1.5, 0.5)) is None
    assert "one by one" in budget(200, 150, 200, forecast(1.0, 0.5), forecast(2.5, 0.5))


@pytest.mark.parametrize(("why", "pair_passes", "paired"), [("computing", None, 0), ("computing", True, 4)])
def test_who_insists_gets_pairs(why, pair_passes, paired, monkeypatch):
    monkeypatch.setattr(DeviceBudget, "why_not_together", lambda *_: why)
    report, _ = compare(Net, pair_passes=pair_passes, max_device_memory="1MiB")
    assert report.paired == paired


@pytest.mark.parametrize("pair_passes", [None, True])
def test_nobody_gets_more_memory_than_there_is(pair_passes, monkeypatch):
    monkeypatch.setattr(DeviceBudget, "why_not_together", lambda *_: "memory is short")
    report, _ = compare(Net, pair_passes=pair_passes, max_device_memory="1MiB")
    assert report.paired == 0
    assert report.unpaired == {"module": "memory is short"}


# --- everything at once -----------------------------------------------------------------------------------

ACTIONS = st.sampled_from(
    ["lead", "follower", "third", "new", "new", "edit", "swap", "weights", "latents", "call"]
)


@settings(max_examples=25, deadline=None)
@given(st.lists(ACTIONS, max_size=40), st.sampled_from(GRANULARITIES), st.booleans())
def test_any_sequence_of_calls(actions, granularity, regular):
    if regular:
        actions = [each for action in actions for each in ("new", "lead", "follower", action)]

    def play(net, calls=None):
        generator = torch.Generator().manual_seed(2)
        latents, time = torch.randn(3, 24, generator=generator), torch.zeros(1)
        prompts = {name: torch.randn(1, 24, generator=generator) for name in ("lead", "follower", "third")}
        made = []
        for action in actions:
            if action in prompts:
                made.append(net(latents, time / 3, prompts[action]))
            elif action == "new":
                latents, time = (made[-1] if made else latents) * 0.9, time + 1
            elif action == "edit":
                prompts["follower"].mul_(1.1)
            elif action == "swap":
                prompts["follower"] = prompts["follower"] * 1.1
            elif action == "weights":
                net.blocks[1].one.weight.mul_(1.01)
            elif action == "latents":
                latents.add_(0.1)
            elif calls is not None:
                calls.call_ended()
        return made

    with torch.no_grad():
        expected, net = play(Net(3)), Net(3)
        handle = offload(net, offload_granularity=granularity)
        got = play(net, handle)
        handle.disable()
    assert len(got) == len(expected)
    assert all(map(torch.equal, got, expected))
