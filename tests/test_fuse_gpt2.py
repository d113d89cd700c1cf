"""Fused blocks and losses of GPT-2: the same function, and everything else as before."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from pixelfly import PixelflyConfig, densify_, sparsify_

transformers = pytest.importorskip("transformers")
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
CONFIG = PixelflyConfig(
    density=0.5, block_size=16, rank=0, fuse_mlp=True, fuse_blocks=True, fuse_loss=True
)


def pair(device="cpu", **options):
    """A GPT-2 with fused blocks and loss, and the same one without."""
    config = transformers.GPT2Config(
        vocab_size=101, n_positions=32, n_embd=64, n_layer=2, n_head=2,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **{"use_cache": False, **options},
    )  # fmt: skip
    fused = transformers.GPT2LMHeadModel(config).to(device).train()
    report = sparsify_(fused, CONFIG, "gpt2")
    assert report.fused_losses == ["the model"] and "fused losses" in str(report)
    assert report.fused_blocks == ["transformer.h.0", "transformer.h.1"]
    plain = copy.deepcopy(fused)
    for module in (plain, *plain.transformer.h):
        del module.forward
    return fused, plain, torch.randint(0, 101, (2, 32), device=device)


def step(model, ids, **options):
    model.zero_grad()
    out = model(input_ids=ids, labels=ids, **options)
    out.loss.backward()
    return out, {n.removeprefix("_orig_mod."): p.grad for n, p in model.named_parameters()}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("compiled", [False, True])
def test_same_loss_and_gradients(device, compiled):
    torch._dynamo.reset()
    fused, plain, ids = pair(device)
    backend = "inductor" if device == "cuda" else "aot_eager"
    model = torch.compile(fused, backend=backend) if compiled else fused
    exact, exact_grads = step(plain, ids)
    with torch.autocast(device, torch.bfloat16):
        ours, our_grads = step(model, ids)
        theirs, their_grads = step(plain, ids)
    assert ours.logits is None and ours.loss.dtype == torch.float32
    assert abs(ours.loss - exact.loss) <= 2 * abs(theirs.loss - exact.loss) + 2e-3
    for name, want in exact_grads.items():
        bound = 2 * (their_grads[name] - want).norm() + 0.01 * want.norm() + 1e-5
        assert (our_grads[name] - want).norm() <= bound, name


@pytest.mark.parametrize("way", ["eager", "compiled", "checkpointed"])
def test_sharded(process_group_of_one, way):
    """FSDP2 gives the modules other classes, and the weights while they are used only."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    fused, plain, ids = pair()
    exact, exact_grads = step(plain, ids)
    mesh = init_device_mesh("cpu", (1,))
    for block in fused.transformer.h:
        fully_shard(block, mesh=mesh)
    model = fully_shard(fused, mesh=mesh)
    if way == "checkpointed":
        model.gradient_checkpointing_enable()
    call = torch.compile(model, backend="aot_eager") if way == "compiled" else model
    ours, our_grads = step(call, ids)
    torch.testing.assert_close(ours.loss, exact.loss)
    for name, want in exact_grads.items():
        torch.testing.assert_close(our_grads[name].full_tensor(), want, msg=name)


def test_what_transformers_passes():
    fused, plain, ids = pair()
    labels = ids.clone()
    labels[0, :7] = -100
    for options in (
        {"num_items_in_batch": 50},
        {"num_items_in_batch": torch.tensor(50)},
        {"shift_labels": labels.roll(-1, 1)},
        {"attention_mask": torch.ones_like(ids)},
    ):
        mine = fused(ids, labels=labels, **options)
        torch.testing.assert_close(mine.loss, plain(ids, labels=labels, **options).loss)
        assert mine.logits is None
    mine = fused(input_ids=ids, labels=labels, output_hidden_states=True)
    assert len(mine.hidden_states) == 3


def test_everything_else_is_the_class_own():
    fused, plain, ids = pair()
    for options in ({}, {"labels": ids, "return_dict": False}, {"logits_to_keep": 1}):
        mine, theirs = fused(ids, **options), plain(ids, **options)
        if isinstance(mine, tuple):
            mine, theirs = {"logits": mine[1]}, {"logits": theirs[1]}
        torch.testing.assert_close(mine["logits"], theirs["logits"])
    fused.eval()
    assert fused(ids, labels=ids).logits.shape == (2, 32, 101)


def test_gradient_checkpointing():
    fused, plain, ids = pair()
    exact = step(plain, ids)[1]
    fused.gradient_checkpointing_enable()
    runs = []
    hook = fused.transformer.h[0].ln_1.register_forward_hook(lambda *_: runs.append(1))
    for name, grad in step(fused, ids)[1].items():
        torch.testing.assert_close(grad, exact[name], rtol=1e-3, atol=1e-5)
    assert len(runs) == 2  # forward, and again in the backward
    hook.remove()


def test_decoding_with_a_cache_and_cross_attention():
    fused, plain, ids = pair(use_cache=True, add_cross_attention=True)
    for model in (fused.eval(), plain.eval()):
        model.generation_config.pad_token_id = 0
    options = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(fused.generate(ids[:, :9], **options), plain.generate(ids[:, :9], **options))
    context = torch.randn(2, 7, 64)
    torch.testing.assert_close(
        fused(ids, encoder_hidden_states=context).logits,
        plain(ids, encoder_hidden_states=context).logits,
    )


def test_pickled(tmp_path):
    fused, _, ids = pair()
    torch.save(fused, tmp_path / "model.pt")
    again = torch.load(tmp_path / "model.pt", weights_only=False)
    ours, theirs = step(again, ids), step(fused, ids)
    assert ours[0].logits is None and torch.equal(ours[0].loss, theirs[0].loss)
    assert again.transformer.h[1].forward.args == (again.transformer.h[1],)


def test_copies_and_densify():
    fused, plain, ids = pair()
    twin = copy.deepcopy(fused)
    with torch.no_grad():
        for p in twin.parameters():
            p.zero_()
    out = twin(input_ids=ids, labels=ids)
    assert out.logits is None  # its own weights, not the first one's:
    torch.testing.assert_close(out.loss, torch.tensor(101.0).log())
    assert list(fused.state_dict()) == list(plain.state_dict())
    densify_(fused)
    assert not [m for m in fused.modules() if "forward" in vars(m)]
    assert fused(input_ids=ids, labels=ids).logits is not None


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda m: m.lm_head.register_forward_hook(lambda *_: None), "its lm_head has hooks"),
        (lambda m: setattr(m, "lm_head", nn.Linear(64, 101)), "no nn.Linear without a bias"),
        (lambda m: setattr(m, "forward", m.forward), "its forward was replaced"),
    ],
)
def test_what_is_left(spoil, reason):
    config = transformers.GPT2Config(vocab_size=101, n_embd=64, n_layer=1, n_head=2)
    model = transformers.GPT2LMHeadModel(config)
    spoil(model)
    report = sparsify_(model, CONFIG, "gpt2")
    assert not report.fused_losses and any(reason in note for note in report.notes)


def test_no_known_model():
    report = sparsify_(nn.Sequential(nn.Linear(64, 64)), CONFIG)
    assert any("no GPT2LMHeadModel" in note for note in report.notes)
