"""Activations that were sent to host memory come back as they were, and their memory goes when it should."""

import gc
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis
from hypothesis import strategies as st
from torch import nn

from medcot import activations
from medcot.activations import Sender, arrange_activations
from medcot.gpus import layer_bytes
from medcot.profiles import PROFILES

CPU = hypothesis(max_examples=60, deadline=None)


class Layer(nn.Module):
    """Saves views, transposed tensors, one tensor twice and one that is broadcast, as attention and projections do."""

    def __init__(self, size):
        super().__init__()
        self.up, self.down = nn.Linear(size, 4 * size), nn.Linear(4 * size, size)

    def forward(self, x):
        wide = self.up(x)
        first, second = wide.unflatten(-1, (2, -1)).unbind(-2)  # two views of one storage, neither dense
        mixed = torch.einsum("btd,bsd->bts", first, second).softmax(-1) @ second
        gate = wide.mean(1, keepdim=True).expand_as(wide)
        return x + self.down(
            torch.cat([first * first, mixed.transpose(1, 2).contiguous().transpose(1, 2)], -1) * gate.exp()
        )


class Model(nn.Module):
    def __init__(self, layers=5, size=8):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Layer(size) for _ in range(layers))
        self.config = SimpleNamespace(hidden_size=size, intermediate_size=4 * size)

    def get_decoder(self):
        return self

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x.square().mean()


def gradients(model, batches, between=lambda: None):
    """Gradients after the backward passes of several micro-batches."""
    model.zero_grad()
    for batch in batches:
        model(batch).backward()
        between()
    return [weight.grad.clone() for weight in model.parameters()]


def batches(*lengths):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(2, length, 8, generator=generator, requires_grad=True) for length in lengths]


@pytest.fixture(autouse=True)
def small_model(monkeypatch):
    monkeypatch.setattr(activations, "CHUNK", 2**12)  # so that storages are cut into pieces too
    monkeypatch.setattr(activations, "SMALLEST", 64)


@pytest.mark.parametrize("sent", [1, 3, 5])
def test_gradients_are_bit_for_bit_those_without_sending(sent):
    model, data = Model(), batches(7, 40, 3, 40)
    plain = gradients(model, data)
    sender = Sender(model.layers, sent, model.parameters())

    def evaluate():
        with torch.no_grad():
            model(data[1])

    for found, expected in zip(gradients(model, data, evaluate), plain, strict=True):
        assert torch.equal(found, expected)
    assert sender.chunks and not sender.away


def test_what_was_sent_is_not_held_on_the_card_until_it_is_needed():
    model, (data,) = Model(), batches(40)
    sender = Sender(model.layers, 3, model.parameters())
    loss = model(data)
    held = [list(this.storages.values()) for this in sorted(sender.away, key=id)]
    assert [len(one) > 3 for one in held] == [True] * 3
    assert all(one.storage is None and one.host for this in held for one in this)
    assert sum(sum(map(len, one.host)) for this in held for one in this) <= sender.used <= len(sender.chunks) * 2**12
    del held
    loss.backward()
    assert not sender.away


def test_a_storage_travels_once_and_parameters_do_not(monkeypatch):
    monkeypatch.setattr(activations, "SMALLEST", 1)
    (data,) = batches(40)
    model, saved = Model(1), []
    parameters = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        model.layers[0](data)
    distinct = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in saved}
    assert len(saved) > len(distinct) and parameters & set(distinct)
    sender = Sender(model.layers, 1, model.parameters())
    loss = model.layers[0](data).sum()
    (this,) = sender.away
    sizes = sorted(held.storage.nbytes() for held in this.storages.values())
    assert sizes == sorted(size for address, size in distinct.items() if address not in parameters)
    loss.backward()


def test_two_forward_passes_before_their_backward_passes_keep_apart():
    model, (one, other) = Model(), batches(20, 33)
    plain = gradients(model, [one, other])
    sender = Sender(model.layers, 4, model.parameters())
    model.zero_grad()
    losses = [model(one), model(other)]
    for loss in losses:
        loss.backward()
    for weight, expected in zip(model.parameters(), plain, strict=True):
        assert torch.allclose(weight.grad, expected, atol=1e-7)
    assert not sender.away


def test_host_memory_is_used_again_and_given_back():
    model, data = Model(), batches(40, 40, 20)
    sender = Sender(model.layers, 4, model.parameters())
    gradients(model, data[:1])
    taken = len(sender.chunks)
    gradients(model, data[1:])
    assert len(sender.chunks) == taken > 1
    loss = model(data[0])
    sender.release()
    assert len(sender.chunks) == taken  # a backward pass is still to come
    loss.backward()
    sender.release()
    assert not sender.chunks
    gradients(model, data)
    assert len(sender.chunks) == taken
    sender.close()
    gradients(model, data)
    assert not sender.chunks


@pytest.mark.parametrize("fails", [0, 2, 4])
def test_after_a_pass_that_failed_the_next_one_is_whole(fails, monkeypatch):
    model, (data,) = Model(), batches(40)
    plain = gradients(model, [data])
    sender = Sender(model.layers, 4, model.parameters())
    forward = Layer.forward

    def out_of_memory(layer, x):
        if layer is model.layers[fails]:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return forward(layer, x)

    monkeypatch.setattr(Layer, "forward", out_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        model(data)
    monkeypatch.setattr(Layer, "forward", forward)
    sender.release()
    gc.collect()
    assert not sender.away
    for found, expected in zip(gradients(model, [data]), plain, strict=True):
        assert torch.equal(found, expected)


def test_no_host_memory_is_out_of_memory_as_the_training_loop_knows_it(monkeypatch):
    from accelerate.utils.memory import should_reduce_batch_size

    model, (data,) = Model(), batches(40)
    Sender(model.layers, 4, model.parameters())
    empty = torch.empty

    def none_left(*size, **options):
        if size == (2**12,):
            raise RuntimeError("CUDA error: out of memory")
        return empty(*size, **options)

    monkeypatch.setattr(torch, "empty", none_left)
    with pytest.raises(torch.OutOfMemoryError, match="No host memory for activations") as raised:
        model(data)
    assert should_reduce_batch_size(raised.value)


@CPU
@given(
    shape=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    order=st.randoms(use_true_random=False),
    dtype=st.sampled_from([torch.float16, torch.float32, torch.bfloat16, torch.int64, torch.bool]),
    start=st.integers(0, 3),
    step=st.integers(1, 2),
    broadcast=st.booleans(),
)
def test_any_layout_comes_back_as_it_was(shape, order, dtype, start, step, broadcast):
    whole = torch.randint(0, 2 if dtype == torch.bool else 100, [start + step * shape[0], *shape[1:]]).to(dtype)
    dimensions = list(range(len(shape)))
    order.shuffle(dimensions)
    tensor = whole[start::step].permute(dimensions)
    tensor = tensor.unsqueeze(0).expand(3, *tensor.shape) if broadcast else tensor
    sender = Sender(nn.ModuleList(), 0)
    this = activations._Pass(None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(activations, "SMALLEST", 0)
        packed = sender._pack(this, tensor)
    sender.current, sender.hooks = this, torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t)
    sender.hooks.__enter__()
    sender._leave(None, None, tensor)
    sender._has_left()
    assert packed[0].storage is None
    back = sender._unpack(packed)
    assert torch.equal(back, tensor) and back.dtype == tensor.dtype
    assert (back.stride(), back.storage_offset()) == (tensor.stride(), tensor.storage_offset())


def arranged(monkeypatch, free_gib=100.0, **changes):
    """How a model of the 8B's shape is arranged, without a card: (arrangement, layers that are not recomputed)."""
    exempt = []
    monkeypatch.setattr(activations, "exempt_from_recomputation", lambda model, indices: exempt.extend(sorted(indices)))
    monkeypatch.setattr(activations, "free_host_gib", lambda processes: free_gib / processes)
    model = Model(32)
    model.config = SimpleNamespace(hidden_size=4096, intermediate_size=14336)
    assert layer_bytes(model.config) == 126_976
    found = arrange_activations(model, [700] * 490 + [1000] * 10, replace(PROFILES["kaggle-t4-fast"], **changes))
    assert found.kept + found.sent + found.recomputed == 32 and found.tokens <= 8000
    hooked = [bool(layer._forward_pre_hooks) for layer in model.layers]
    assert hooked == [True] * found.sent + [False] * (32 - found.sent)
    assert exempt == [*range(found.sent), *range(32 - found.kept, 32)]
    return found


def test_layers_are_kept_then_sent_then_recomputed(monkeypatch):
    gib = 4000 * 126_976 / 2**30  # of one layer at 4 x 1,000 tokens
    found = arranged(monkeypatch, activation_memory_gib=10.5 * gib, activation_host_gib=15.5 * gib)
    assert (found.kept, found.sent, found.recomputed, found.tokens) == (10, 15, 7, 4000)
    assert found.host_gib == pytest.approx(15 * gib)
    assert str(found) == (
        "activations: 10 layers keep them, 15 send them to host memory (up to 7.1 GiB), 7 recompute them; the longest "
        "micro-batch has 4,000 tokens"
    )


def test_no_more_is_sent_than_the_host_has_room_for(monkeypatch):
    gib = 4000 * 126_976 / 2**30
    changes = {"activation_memory_gib": 10.5 * gib, "activation_host_gib": 100.0}
    assert arranged(monkeypatch, **changes).sent == 22
    assert arranged(monkeypatch, free_gib=10.5 * gib, **changes).sent == 10
    assert arranged(monkeypatch, free_gib=10.5 * gib, nproc_per_node=2, **changes).sent == 5
    assert arranged(monkeypatch, free_gib=0.0, **changes).recomputed == 22


def test_a_new_arrangement_takes_the_place_of_the_one_before(monkeypatch):
    model = Model(4)
    monkeypatch.setattr(activations, "exempt_from_recomputation", lambda *_: None)
    made = replace(PROFILES["kaggle-t4-fast"], activation_memory_gib=0.0)
    assert arrange_activations(model, [10] * 8, made).sent == 4
    assert arrange_activations(model, [10] * 8, replace(made, activation_host_gib=0.0)).recomputed == 4
    assert not any(layer._forward_pre_hooks or layer._forward_hooks for layer in model.layers)
    assert arrange_activations(model, [10] * 8, replace(made, device="cpu")).kept == 4


def test_free_host_memory_is_shared_by_the_processes(monkeypatch):
    import psutil

    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=20 * 2**30))
    assert activations.free_host_gib(1) == 15.0 and activations.free_host_gib(2) == 7.5
