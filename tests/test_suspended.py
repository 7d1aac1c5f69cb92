"""While suspended, weights may be edited by any means; afterwards what they have become is what runs."""

import pytest
import torch
from helpers import build, run, weights_of


def in_place(pipe):
    with torch.no_grad():
        for parameter in pipe.transformer.parameters():
            parameter.mul_(1.25)


def in_place_without_a_trace(pipe):
    for parameter in pipe.transformer.parameters():
        parameter.data.mul_(1.25)


def replaced_data(pipe):
    for parameter in pipe.transformer.parameters():
        parameter.data = parameter.data * 1.25


def transposed_where_they_lie(pipe):
    for block in pipe.transformer.transformer_blocks:
        block.attn.to_q.weight.data = block.attn.to_q.weight.data.t()


def another_dtype(pipe):
    pipe.to(torch.bfloat16)


def replaced_modules(pipe):
    torch.manual_seed(3)
    for block in (pipe.transformer.transformer_blocks[0], pipe.transformer.single_transformer_blocks[-1]):
        old = block.attn.to_q
        block.attn.to_q = torch.nn.Linear(old.in_features, old.out_features).to(old.weight.device)
    pipe.transformer.proj_out.weight = torch.nn.Parameter(pipe.transformer.proj_out.weight.detach() * 2)


def replaced_blocks(pipe):
    blocks = pipe.transformer.transformer_blocks
    blocks[0], blocks[1] = blocks[1], blocks[0]


def another_list_of_blocks(pipe):
    other = build("flux").transformer
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    blocks = other.to(pipe.transformer.proj_out.weight.device).single_transformer_blocks
    pipe.transformer.single_transformer_blocks = blocks[:2]


def an_added_buffer(pipe):
    norm = pipe.transformer.norm_out
    norm.register_buffer("shift", torch.ones(1, device=norm.linear.weight.device))
    norm.register_forward_hook(lambda module, args, out: out + module.shift)


EDITS = [
    in_place,
    in_place_without_a_trace,
    replaced_data,
    transposed_where_they_lie,
    another_dtype,
    replaced_modules,
    replaced_blocks,
    another_list_of_blocks,
    an_added_buffer,
]


@pytest.mark.parametrize("ratio", [1.0, 0.5])
@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit.__name__)
def test_edits_of_any_kind_count(edit, ratio, device):
    pipe = build("flux", device=device)
    before = run(pipe, "flux")
    edit(pipe)
    expected = run(pipe, "flux")
    assert not torch.equal(before, expected)

    pipe = build("flux")
    pipe.enable_block_offload(device=device, offload_ratio=ratio)
    assert torch.equal(run(pipe, "flux"), before)
    with pipe.block_offload.suspended():
        edit(pipe)
    assert torch.equal(run(pipe, "flux"), expected)
    pipe.disable_block_offload()
    assert torch.equal(run(pipe.to(device), "flux"), expected)


def test_the_true_weights_are_in_place(device):
    pipe = build("flux")
    expected = weights_of(pipe.transformer)
    pipe.enable_block_offload(device=device, offload_ratio=1.0)
    run(pipe, "flux")
    with pipe.block_offload.suspended() as handle:
        assert handle is pipe.block_offload
        assert all(torch.equal(t.cpu(), expected[key]) for key, t in pipe.transformer.state_dict().items())
        assert {t.device.type for t in pipe.transformer.state_dict().values()} == {"cpu"}


def test_nothing_runs_while_suspended():
    pipe = build("flux")
    expected = run(pipe, "flux")
    pipe.enable_block_offload(device="cpu")
    with pipe.block_offload.suspended(), torch.no_grad():
        for call in (
            lambda: run(pipe, "flux"),
            lambda: pipe.vae.decode(torch.zeros(1, pipe.vae.config.latent_channels, 8, 8)),
            lambda: (
                pipe.transformer.transformer_blocks[0].attn.to_q and pipe.transformer.transformer_blocks[0]()
            ),
            lambda: pipe.transformer.x_embedder(torch.zeros(1, pipe.transformer.config.in_channels)),
        ):
            with pytest.raises(RuntimeError, match=r"is being edited.*suspended"):
                call()
    assert torch.equal(run(pipe, "flux"), expected)


def test_suspended_nests_and_only_the_outermost_ends_it():
    pipe = build("flux")
    in_place(pipe)
    expected = run(pipe, "flux")
    pipe = build("flux")
    pipe.enable_block_offload(device="cpu")
    with pipe.block_offload.suspended():
        with pipe.block_offload.suspended():
            in_place_without_a_trace(pipe)
        with pytest.raises(RuntimeError, match="is being edited"):
            run(pipe, "flux")
    assert torch.equal(run(pipe, "flux"), expected)


def test_an_exception_within_ends_it_and_what_was_edited_counts():
    pipe = build("flux")
    replaced_modules(pipe)
    expected = run(pipe, "flux")
    pipe = build("flux")
    pipe.enable_block_offload(device="cpu")

    def fail():
        with pipe.block_offload.suspended():
            replaced_modules(pipe)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert torch.equal(run(pipe, "flux"), expected)


def test_suspended_in_a_callback_counts_from_the_next_step_on(device):
    def edit(pipe, step, timestep, values):
        if step == 0:
            if pipe.block_offload is None:
                replaced_modules(pipe)
            else:
                with pipe.block_offload.suspended():
                    replaced_modules(pipe)
        return values

    expected = run(build("flux", device=device), "flux", callback_on_step_end=edit)
    pipe = build("flux")
    pipe.enable_block_offload(device=device, offload_ratio=1.0)
    assert torch.equal(run(pipe, "flux", callback_on_step_end=edit), expected)


def test_suspended_in_the_middle_of_a_forward_is_refused():
    pipe = build("flux")
    expected = run(pipe, "flux")
    pipe.enable_block_offload(device="cpu")

    def edit(*_):
        with pipe.block_offload.suspended():
            pass

    hook = pipe.transformer.norm_out.register_forward_pre_hook(edit)
    with pytest.raises(RuntimeError, match="in the middle of a forward"):
        run(pipe, "flux")
    hook.remove()
    assert torch.equal(run(pipe, "flux"), expected)


def test_disabling_while_suspended_ends_it_all():
    pipe = build("flux")
    in_place(pipe)
    expected = run(pipe, "flux")
    pipe = build("flux")
    pipe.enable_block_offload(device="cpu")
    with pipe.block_offload.suspended():
        pipe.disable_block_offload()
        in_place(pipe)
    assert not any(hasattr(part, "_hf_hook") for part in pipe.transformer.modules())
    assert torch.equal(run(pipe, "flux"), expected)


def test_a_weight_that_cannot_be_moved_is_named_until_it_is_mended():
    pipe = build("flux")
    expected = run(pipe, "flux")
    pipe.enable_block_offload(device="cpu")
    block = pipe.transformer.transformer_blocks[1]
    good = block.attn.to_q.weight
    named = r"transformer\.transformer_blocks\.1\.attn\.to_q\.weight.*meta"
    with pytest.raises(RuntimeError, match=named), pipe.block_offload.suspended():
        block.attn.to_q.weight = torch.nn.Parameter(torch.empty_like(good, device="meta"))
    with pytest.raises(RuntimeError, match="meta"):
        run(pipe, "flux")
    block.attn.to_q.weight = good
    assert torch.equal(run(pipe, "flux"), expected)
