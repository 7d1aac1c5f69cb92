"""Bad input is refused with the argument, its value and a remedy, before anything is changed."""

import pytest
import torch
from helpers import build, run, warnings_of_ours

import diffusers_offload
from diffusers_offload import OffloadPolicy


@pytest.fixture(scope="module")
def pipe():
    return build("flux")


@pytest.mark.parametrize(
    ("arguments", "error", "parts"),
    [
        (
            {"components": {"transformer_3": "block"}},
            ValueError,
            ["components", "transformer_3", "text_encoder_2"],
        ),
        ({"components": {"tokenizer": "model"}}, ValueError, ["components", "tokenizer"]),
        ({"components": {"vae": "sometimes"}}, ValueError, ["components", "vae", "sometimes", "resident"]),
        ({"components": {"vae": 3}}, ValueError, ["components", "vae", "3"]),
        ({"components": ["vae"]}, ValueError, ["components", "mapping"]),
        ({"offload_granularity": "atom"}, ValueError, ["offload_granularity", "atom", "block"]),
        ({"offload_ratio": 1.5}, ValueError, ["offload_ratio", "1.5", "0.0"]),
        ({"offload_ratio": -0.1}, ValueError, ["offload_ratio", "-0.1"]),
        ({"offload_ratio": float("nan")}, ValueError, ["offload_ratio", "nan"]),
        ({"offload_ratio": "half"}, ValueError, ["offload_ratio", "half"]),
        ({"offload_ratio": True}, ValueError, ["offload_ratio", "True"]),
        ({"offload_ratio": 0.5, "offload_granularity": "model"}, ValueError, ["offload_ratio", "model"]),
        ({"device": "potato"}, ValueError, ["device", "potato"]),
        ({"device": 3.5}, ValueError, ["device", "3.5"]),
        ({"device": "cuda:99"}, RuntimeError, ["cuda:99", "not there"]),
        ({"device": "npu"}, RuntimeError, ["npu", "not there"]),
    ],
)
def test_wrong_arguments(pipe, arguments, error, parts):
    arguments = {"device": "cpu", **arguments}
    before = {name: p.data_ptr() for name, p in pipe.transformer.named_parameters()}
    with pytest.raises(error) as raised:
        pipe.enable_block_offload(**arguments)
    assert all(part in str(raised.value) for part in parts), str(raised.value)
    assert pipe.block_offload is None
    assert {name: p.data_ptr() for name, p in pipe.transformer.named_parameters()} == before
    assert not any(hasattr(part, "_hf_hook") for part in pipe.transformer.modules())


def test_a_wrong_second_call_keeps_the_first(pipe):
    pipe.enable_block_offload(device="cpu")
    first = pipe.block_offload
    with pytest.raises(ValueError, match="offload_ratio"):
        pipe.enable_block_offload(device="cpu", offload_ratio=2)
    assert pipe.block_offload is first
    pipe.disable_block_offload()


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ({"granularity": "atom"}, "atom"),
        ({"ratio": 2.0}, "2.0"),
        ({"granularity": "model", "ratio": 0.5}, "block"),
    ],
)
def test_wrong_policies(arguments, part):
    with pytest.raises(ValueError, match=part):
        OffloadPolicy(**arguments)


def test_accelerates_offload_is_refused():
    from accelerate import cpu_offload, cpu_offload_with_hook

    for offload in (lambda m: cpu_offload_with_hook(m, "cpu"), lambda m: cpu_offload(m, torch.device("cpu"))):
        pipe = build("flux")
        offload(pipe.text_encoder)
        with pytest.raises(ValueError, match=r"text_encoder.*accelerate.*remove_all_hooks"):
            pipe.enable_block_offload(device="cpu")
        assert not hasattr(pipe.transformer, "_hf_hook")


def test_diffusers_group_offload_is_refused():
    pipe = build("flux")
    pipe.transformer.enable_group_offload(
        onload_device=torch.device("cpu"), offload_type="leaf_level", use_stream=False
    )
    with pytest.raises(ValueError, match=r"transformer.*group offloading"):
        pipe.enable_block_offload(device="cpu")
    assert not hasattr(pipe.vae, "_hf_hook")


def test_a_device_mapped_pipeline_is_refused():
    pipe = build("flux")
    pipe.hf_device_map = {"transformer": "cpu", "vae": "disk"}
    with pytest.raises(ValueError, match="reset_device_map"):
        pipe.enable_block_offload(device="cpu")


def test_no_blocks_under_block_by_name_is_an_error_and_else_a_warning():
    class Plain(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)

        def forward(self, x):
            return self.b(self.a(x))

    with pytest.raises(ValueError, match=r"plain .*no blocks"):
        diffusers_offload.enable_block_offload(Plain(), device="cpu", name="plain")

    pipe = build("flux")
    pipe.register_modules(image_encoder=Plain(), feature_extractor=None)
    with warnings_of_ours() as records:
        pipe.enable_block_offload(device="cpu")
    assert [r for r in records if "image_encoder" in r.getMessage()]
    assert len(records) == 1
    plan = {p.name: p for p in pipe.block_offload.plan.components}["image_encoder"]
    assert plan.policy.granularity == "model"
    pipe.disable_block_offload()
    with pytest.raises(ValueError, match="image_encoder"):
        pipe.enable_block_offload(device="cpu", components={"image_encoder": "block"})


def test_gradients_through_a_streamed_block_are_refused():
    pipe = build("wan")
    expected = run(pipe, "wan")
    pipe.enable_block_offload(device="cpu")
    model = pipe.transformer
    x = torch.randn(1, model.config.in_channels, 3, 8, 8)
    text = torch.randn(1, 7, model.config.text_dim)
    inputs = {"hidden_states": x, "timestep": torch.tensor([5]), "encoder_hidden_states": text}
    with pytest.raises(RuntimeError, match=r"transformer\.blocks\.0.*no_grad"):
        model(**inputs)
    model.requires_grad_(False)
    with pytest.raises(RuntimeError, match="gradients"):
        model(**{**inputs, "hidden_states": x.requires_grad_()})
    x = x.detach()

    class Listed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)

        def forward(self, values):
            return [self.b(self.a(values[0]))]

    net = torch.nn.ModuleDict({"blocks": torch.nn.ModuleList(Listed() for _ in range(3))}).requires_grad_(
        False
    )
    diffusers_offload.enable_block_offload(net, device="cpu")
    with pytest.raises(RuntimeError, match="gradients"):
        net["blocks"][0]([torch.ones(1, 4, requires_grad=True)])
    model(**{**inputs, "hidden_states": x})  # enabled, but nobody needs them
    assert torch.equal(run(pipe, "wan"), expected)


def test_weights_that_cannot_be_moved_are_named():
    pipe = build("flux")
    pipe.transformer.to("meta")
    with pytest.raises(ValueError, match=r"transformer\..*meta"):
        pipe.enable_block_offload(device="cpu")


def test_to_on_an_offloaded_pipeline_warns_and_changes_nothing():
    pipe = build("flux")
    pipe.enable_block_offload(device="cpu")
    before = [p.data_ptr() for p in pipe.transformer.parameters()]
    with warnings_of_ours() as records:
        pipe.transformer.to("meta")
    assert "disable_block_offload" in str([r.getMessage() for r in records])
    assert [p.data_ptr() for p in pipe.transformer.parameters()] == before


def test_only_modules_are_taken():
    with pytest.raises(TypeError, match="str"):
        diffusers_offload.enable_block_offload("a model")
