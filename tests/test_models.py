"""A model that is offloaded answers the device it computes on; whoever puts weights into it learns where they lie.

On the CPU both are the same device, so an engine here says that it computes elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import zoo
from helpers import build, run
from zoo.unets import ip_adapter_weights

import diffusers_offload

CPU, ELSEWHERE = torch.device("cpu"), torch.device("meta")


@contextmanager
def computing_elsewhere(pipe) -> Iterator[None]:
    engines = {held.engine for held in pipe.block_offload._held.values()}
    for engine in engines:
        engine.device = ELSEWHERE
    try:
        yield
    finally:
        for engine in engines:
            engine.device = CPU


def devices_of(module) -> set[torch.device]:
    return {tensor.device for tensor in (*module.parameters(), *module.buffers())}


@pytest.mark.parametrize("granularity", ["block", "phase", "leaf", "model"])
def test_an_offloaded_model_computes_where_it_says(granularity):
    pipe = build("flux")
    models = [pipe.transformer, pipe.text_encoder, pipe.text_encoder_2, pipe.vae, pipe.text_encoder_2.encoder]
    assert {model.device for model in models} == {CPU}
    pipe.enable_block_offload(device="cpu", offload_granularity=granularity)
    with computing_elsewhere(pipe):
        assert {model.device for model in models} == {ELSEWHERE}
        assert build("flux").transformer.device == CPU
        assert devices_of(pipe.transformer) == {CPU}
    assert {model.device for model in models} == {CPU}
    pipe.disable_block_offload()
    assert {model.device for model in models} == {CPU}


def test_what_is_offloaded_no_longer_is_as_before():
    pipe = build("flux")
    pipe.enable_block_offload(device="cpu")
    held = dict(pipe.block_offload._held)
    pipe.remove_all_hooks()
    for each in held.values():
        each.engine.device = ELSEWHERE
        assert each.module.device == CPU


def test_a_model_that_holds_an_offloaded_one_is_as_before():
    from transformers import PretrainedConfig, PreTrainedModel

    class Around(PreTrainedModel):
        config_class = PretrainedConfig

    pipe = build("flux")
    around = Around(PretrainedConfig())
    around.inner = pipe.text_encoder_2
    pipe.enable_block_offload(device="cpu")
    with computing_elsewhere(pipe):
        assert pipe.text_encoder_2.device == ELSEWHERE
        assert around.device == CPU


def test_a_pipeline_puts_its_inputs_where_the_model_computes(monkeypatch):
    class Seen(Exception):
        pass

    def seen(text_encoder, *inputs):
        raise Seen({tensor.device for tensor in inputs})

    pipe = zoo.build("ideogram4")
    monkeypatch.setattr(pipe, "_get_text_encoder_hidden_states", seen)
    pipe.enable_block_offload(device="cpu")
    with computing_elsewhere(pipe), pytest.raises(Seen) as caught:
        pipe.encode_prompt("a red fox in the snow", 3, 4, max_sequence_length=64, device=CPU)
    assert caught.value.args == ({ELSEWHERE},)


def test_adapters_of_a_text_encoder_are_loaded_beside_its_weights():
    peft = pytest.importorskip("peft")

    def lora(pipe):
        config = peft.LoraConfig(r=2, target_modules=["q_proj"])
        width = pipe.text_encoder.config.hidden_size
        names = [n for n, _ in pipe.text_encoder.named_modules() if n.endswith("q_proj")]
        generator = torch.Generator().manual_seed(0)
        state = {}
        for name in names:
            state[f"{name}.lora_A.weight"] = torch.randn(2, width, generator=generator)
            state[f"{name}.lora_B.weight"] = torch.randn(width, 2, generator=generator)
        assert names
        return {"adapter_state_dict": state, "peft_config": config}

    pipe = build("flux")
    before = run(pipe, "flux")
    pipe.text_encoder.load_adapter(**lora(pipe))
    expected = run(pipe, "flux")
    assert not torch.equal(before, expected)

    pipe = build("flux")
    pipe.enable_block_offload(device="cpu")
    with computing_elsewhere(pipe):
        pipe.text_encoder.load_adapter(**lora(pipe))
        assert devices_of(pipe.text_encoder) == {CPU}
    assert torch.equal(run(pipe, "flux"), expected)


def test_an_ip_adapter_is_loaded_beside_the_weights():
    pipe = zoo.build("sdxl-ip-adapter")
    weights = ip_adapter_weights(pipe, seed=1)
    pipe.enable_block_offload(device="cpu")
    with computing_elsewhere(pipe):
        pipe.unet._load_ip_adapter_weights([weights])
        assert devices_of(pipe.unet) == {CPU}


def test_textual_inversion_leaves_the_embeddings_where_they_are():
    pipe = zoo.build("sd")
    pipe.enable_block_offload(device="cpu")
    with computing_elsewhere(pipe):
        token = torch.randn(pipe.text_encoder.config.hidden_size)
        pipe.load_textual_inversion({"<fox>": token}, token="<fox>")
        assert devices_of(pipe.text_encoder) == {CPU}
    table = pipe.text_encoder.get_input_embeddings().weight
    assert torch.equal(table[pipe.tokenizer.convert_tokens_to_ids("<fox>")], token)


def test_weights_that_came_meanwhile_go_where_the_others_go():
    peft = pytest.importorskip("peft")
    pipe = build("flux")
    pipe.enable_block_offload(device="cpu")
    held = pipe.block_offload._held["transformer"]
    for unit in held.component.units:
        unit.weights.origin = [ELSEWHERE] * len(unit.weights.origin)
    pipe.transformer.add_adapter(peft.LoraConfig(r=4, target_modules=["to_q"]))
    run(pipe, "flux")
    adapter = {id(p) for name, p in pipe.transformer.named_parameters() if "lora" in name}
    assert adapter <= {id(tensor) for unit in held.component.units for tensor in unit.weights.tensors}
    assert {where for unit in held.component.units for where in unit.weights.origin} == {ELSEWHERE}


def test_to_the_device_that_it_says_moves_nothing_and_casts():
    pipe = build("flux")
    pipe.enable_block_offload(device="cpu")
    with computing_elsewhere(pipe):
        pipe.transformer.to(device=pipe.transformer.device, dtype=torch.bfloat16)
        assert devices_of(pipe.transformer) == {CPU}
        assert pipe.transformer.dtype == torch.bfloat16


def test_install_and_uninstall_are_inverse():
    from diffusers import ModelMixin
    from transformers import PreTrainedModel

    given = [cls.device for cls in (ModelMixin, PreTrainedModel)]
    assert given[0] is given[1]
    pipe = build("flux")
    pipe.enable_block_offload(device="cpu")
    with computing_elsewhere(pipe):
        assert pipe.transformer.device == ELSEWHERE
    try:
        diffusers_offload.uninstall()
        own = [cls.device for cls in (ModelMixin, PreTrainedModel)]
        assert given[0] not in own
        assert not hasattr(ModelMixin, "_diffusers_device") and not hasattr(
            PreTrainedModel, "_diffusers_device"
        )
        assert pipe.transformer.device == pipe.text_encoder.device == CPU
    finally:
        diffusers_offload.install()
    assert [cls.device for cls in (ModelMixin, PreTrainedModel)] == given


def test_a_compiled_forward_may_ask_for_the_device():
    from diffusers import ModelMixin

    class Model(ModelMixin):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(3, 3)

        def forward(self, x):
            return self.layer(x.to(self.device))

    model, x = Model(), torch.ones(1, 3)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), model(x))
