"""With nothing asked for, an accelerator that has room for everything holds everything."""

import pytest
import torch
from helpers import build, run

from diffusers_offload.fitting import Limits, fit
from diffusers_offload.handle import OffloadHandle
from diffusers_offload.policy import OffloadPolicy, Request, parse_request
from diffusers_offload.routing import plan_targets

GPU = torch.device("cuda", 0)  # the decision needs none


def decide(pipe, limit, components=None, ratio=None, granularity="block", others=0):
    modules = pipe._offloadable_modules()
    request = parse_request(granularity, ratio, components, tuple(modules))
    limits = Limits(limit, given=False, others=others)
    return fit(lambda each: plan_targets(modules, each, GPU), request, limits, GPU)[1]


def test_everything_stays_if_it_fits_beside_what_computing_needs():
    pipe = build("flux")
    weights = sum(target.nbytes for target in decide(pipe, 2**40))
    assert all(target.stays for target in decide(pipe, int(weights * 1.3)))
    assert not any(target.stays for target in decide(pipe, int(weights * 1.1)))


def test_what_others_hold_is_not_there():
    pipe = build("flux")
    weights = sum(target.nbytes for target in decide(pipe, 2**40))
    assert all(target.stays for target in decide(pipe, 2 * weights))
    assert not any(target.stays for target in decide(pipe, 2 * weights, others=weights))
    with pytest.raises(ValueError, match=r"too little.*are taken by others"):
        decide(pipe, 2 * weights, others=2 * weights)


def test_what_was_asked_for_is_done_all_the_same():
    pipe = build("flux")
    targets = {t.name: t for t in decide(pipe, 2**40, components={"transformer": "block"})}
    assert not targets["transformer"].stays
    assert not targets["transformer"].residents
    assert targets["text_encoder"].stays
    assert not any(target.stays for target in decide(pipe, 2**40, ratio=1.0))
    assert not any(target.stays for target in decide(pipe, 2**40, granularity="model"))


def test_too_small_a_device_is_refused_with_what_is_missing():
    with pytest.raises(ValueError, match=r"the 1000 B that cuda:0 has free is .* too little"):
        decide(build("flux"), 1000)


def test_on_the_cpu_everything_streams():
    pipe = build("flux")
    pipe.enable_block_offload(device="cpu")
    assert any(component.streamed for component in pipe.block_offload.plan.components)


@pytest.mark.gpu
def test_nothing_moves_on_a_card_with_room():
    pipe = build("flux")
    expected = run(pipe.to("cuda"), "flux")
    pipe.to("cpu").enable_block_offload()
    assert "everything fits" in str(pipe.block_offload.plan)
    assert torch.equal(run(pipe, "flux"), expected)
    report = pipe.block_offload.report()
    assert (report.loads, report.host_bytes) == (0, 0)
    assert report.resident_bytes


def test_a_card_that_fills_up_later(device):
    """What was to stay streams once memory has run out."""
    pipe = build("flux")
    expected = run(pipe.to(device), "flux")
    pipe.to("cpu")
    if device == "cpu":  # the decision is an accelerator's
        targets = [target.resident() for target in route(pipe, torch.device("cpu"))]
        handle = OffloadHandle(
            targets, torch.device("cpu"), Request(OffloadPolicy(), {}, True), Limits(2**40)
        )
    else:
        pipe.enable_block_offload(device=device)
        handle = pipe.block_offload
    assert not any(component.streamed for component in handle.plan.components)
    assert torch.equal(run(pipe, "flux"), expected)

    def fail(*_):
        if any(component.residents for component in handle.plan.components):
            raise torch.OutOfMemoryError("out of memory")

    hook = pipe.transformer.proj_out.register_forward_pre_hook(fail)
    assert torch.equal(run(pipe, "flux"), expected)
    hook.remove()
    assert handle.report().uses
    assert handle.report().shortages == 1
    assert torch.equal(run(pipe, "flux"), expected)
    handle.disable()
    assert torch.equal(run(pipe.to(device), "flux"), expected)


def route(pipe, device):
    modules = pipe._offloadable_modules()
    return plan_targets(modules, parse_request("block", None, None, tuple(modules)), device)
