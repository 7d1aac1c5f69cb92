"""Passes that run together when something fails, under other modes, under a bound; and calls in any sequence."""

import gc

import pytest
import torch
from guidance import Disturbed, Loop, Net, compare, offload
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusers_offload.component import Component
from diffusers_offload.planning.budget import DeviceBudget, _Known
from diffusers_offload.planning.timeline import Forecast
from diffusers_offload.streams import open_streams

pytestmark = pytest.mark.usefixtures("nobody_is_left_half_way")
GRANULARITIES = ("block", "phase", "leaf")


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

    def guidance_ends(loop, step):
        if step == 3:
            loop.given = [0]

    loop = Loop(between=guidance_ends)
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
    return Forecast(step=step, transfer=step, reading=0.0, stall=stall, stalls=())


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
