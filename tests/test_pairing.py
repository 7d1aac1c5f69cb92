"""Guidance passes that run for one load of the weights: equal to the bit, and only if the calls are those foreseen."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import pytest
import torch
from diffusers.utils.accelerate_utils import apply_forward_hook
from guidance import Disturbed, Loop, Net, compare, offload

from diffusers_offload.engine import Engine

pytestmark = pytest.mark.usefixtures("nobody_is_left_half_way")
GRANULARITIES = ("block", "phase", "leaf")


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


def test_a_unit_leaves_before_either_pass_goes_on(monkeypatch):
    """Otherwise the next load would wait for what lies between two units, too, or for a pass more."""
    seen = []

    class Telling(Net):
        def forward(self, x, time, prompt, options=None):
            x = x + time
            for number, block in enumerate(self.blocks):
                seen.append(f"before {number}")
                x = block(x, prompt)
                seen.append(f"after {number}")
            return self.out(x)

    retire = Engine._retire

    def retiring(self, unit, stream):
        seen.append(f"leaves {unit.name[-1]}")
        retire(self, unit, stream)

    monkeypatch.setattr(Engine, "_retire", retiring)
    net = Telling(3)
    handle = offload(net)
    with torch.no_grad(), handle.calling():
        Loop().run(net, 4)
    once = [
        "leaves 0",
        "after 0",
        "before 1",
        "after 0",
        "before 1",
        "leaves 1",
        "after 1",
        "before 2",
        "after 1",
        "before 2",
    ]
    assert seen[-len(once) - 5 :] == ["before 0", "before 0", *once, "leaves 2", "after 2", "after 2"]


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
