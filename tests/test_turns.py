"""Stems of components that take turns within a step stay; those that follow one another leave."""

from helpers import build, run

from diffusers_offload.turns import Turns


def test_a_single_return_is_no_alternation():
    turns = Turns()
    turns.displaced("vae", "transformer")  # encoded before the steps ...
    turns.displaced("transformer", "vae")  # ... decoded behind them
    assert not turns.alternate("vae", "transformer")
    turns.call_ended()
    turns.displaced("vae", "transformer")
    turns.displaced("transformer", "vae")
    assert not turns.alternate("vae", "transformer")


def test_two_that_keep_displacing_each_other_alternate_from_then_on():
    turns = Turns()
    for _ in range(2):
        turns.displaced("controlnet", "transformer")
        turns.displaced("transformer", "controlnet")
    assert turns.alternate("transformer", "controlnet")
    turns.call_ended()
    assert turns.alternate("controlnet", "transformer")
    assert not turns.alternate("controlnet", "vae")


def stems_brought(pipe, name, steps):
    engine, brought = pipe.block_offload._engine, []
    stems = engine._stems

    def noted(unit, real=stems.bring_unit):
        brought.append(unit.component.name)
        real(unit)

    stems.bring_unit = noted
    run(pipe, name, num_inference_steps=steps)
    del stems.bring_unit
    return brought


def test_a_controlnet_and_its_transformer_come_once_a_call(device):
    name = "flux-controlnet"
    pipe = build(name)
    pipe.enable_block_offload(device=device, offload_ratio=1.0)
    run(pipe, name, num_inference_steps=5)
    assert stems_brought(pipe, name, 5).count("transformer") == 1


def test_the_two_transformers_of_wan_follow_one_another(device):
    pipe = build("wan22")
    pipe.enable_block_offload(device=device, offload_ratio=1.0)
    run(pipe, "wan22", num_inference_steps=5)
    present = []
    engine = pipe.block_offload._engine
    run(
        pipe,
        "wan22",
        num_inference_steps=5,
        callback_on_step_end=lambda p, i, t, k: (
            present.append({c.name for c in engine.components if c.present}),
            k,
        )[1],
    )
    assert {frozenset(p) for p in present} <= {frozenset({"transformer"}), frozenset({"transformer_2"})}
