"""What becomes of a decoder layer's activations until the backward pass: kept on the card, sent to host memory, or recomputed."""

import weakref
from dataclasses import dataclass
from functools import partial

import torch

from .gpus import layer_bytes
from .model import exempt_from_recomputation

CHUNK = 2**28  # bytes of pinned host memory taken at a time: a power of two, or torch would round it up to one
SMALLEST = 2**20  # bytes: what is smaller stays on the card, where it costs less than a transfer
HOST_SHARE = 0.75  # of the free host memory; the rest is left to loading, saving and the notebook
_SENDERS = weakref.WeakKeyDictionary()  # the layers of a model -> their sender


@dataclass(frozen=True)
class Activations:
    """How many decoder layers have their activations kept, sent and recomputed, in this order from the last layer down."""

    kept: int
    """Layers whose activations stay on the card: the last ones, whose backward pass comes first."""
    sent: int
    """Layers whose activations travel to host memory and back: the first ones."""
    recomputed: int
    """Layers that keep their input only and compute the rest a second time: what stands between."""
    tokens: int
    """Tokens of the longest micro-batch that the training examples can make."""
    host_gib: float
    """GiB of host memory that the sent layers take at that micro-batch."""

    def __str__(self):
        return (
            f"activations: {self.kept} layers keep them, {self.sent} send them to host memory (up to "
            f"{self.host_gib:.1f} GiB), {self.recomputed} recompute them; the longest micro-batch has {self.tokens:,} tokens"
        )


def arrange_activations(model, lengths, settings) -> Activations:
    """Decides what each decoder layer does with its activations in training, and sees to it.

    `lengths` are the tokens of the training examples: the longest micro-batch that they can make must fit. As many layers
    as `activation_memory_gib` holds keep theirs; of the others as many as `activation_host_gib` and the host's free memory
    hold send theirs; the rest is recomputed. Host memory is taken when it is first needed (`release_host_memory` gives
    it back). Called again, it takes the place of the arrangement before. Nothing is changed on a CPU or without
    `gradient_checkpointing`, where every layer keeps its activations.
    """
    layers, config = model.get_decoder().layers, model.config
    if earlier := _SENDERS.pop(layers, None):
        earlier.close()
    longest = sum(sorted(lengths)[-settings.per_device_train_batch_size :])
    if settings.device == "cpu" or not settings.gradient_checkpointing:
        return Activations(len(layers), 0, 0, longest, 0.0)
    layer_gib = longest * layer_bytes(config) / 2**30
    kept = min(len(layers), int(settings.activation_memory_gib / layer_gib))
    host_gib = min(settings.activation_host_gib, free_host_gib(settings.nproc_per_node))
    sent = min(len(layers) - kept, int(host_gib / layer_gib))
    exempt_from_recomputation(model, {*range(sent), *range(len(layers) - kept, len(layers))})
    if sent:
        _SENDERS[layers] = Sender(layers, sent, model.parameters())
    return Activations(kept, sent, len(layers) - kept - sent, longest, sent * layer_gib)


def free_host_gib(processes: int) -> float:
    """GiB of host memory that one of so many processes may take for activations, from what is free now."""
    import psutil

    return HOST_SHARE * psutil.virtual_memory().available / 2**30 / processes


def release_host_memory(model):
    """Gives the host memory of sent activations back to the system; a next step of training takes it anew."""
    if sender := _SENDERS.get(model.get_decoder().layers):
        sender.release()


class Sender:
    """Sends what the first layers save for the backward pass to host memory, each while the next layer computes, and
    brings it back one layer ahead of its use.

    It works on storages, not on tensors: whatever views of a storage are saved, it travels once, byte for byte, and the
    views are laid over what comes back, so every layout and type survives. On a GPU the copies run on a stream of their
    own, to and from pinned memory; elsewhere they are plain copies. Parameters and small tensors stay where they are.
    """

    def __init__(self, layers, sent: int, parameters=()):
        self.chunks, self.used = [], 0
        self.parameters = {weight.untyped_storage().data_ptr() for weight in parameters}
        self.stream = torch.cuda.Stream() if torch.cuda.is_available() else None
        self.away = weakref.WeakSet()  # passes whose host memory is in use: they live as long as autograd holds them
        self.hooks = self.current = self.before = self.leaving = None
        self.handles = []
        for layer in layers[:sent]:
            first = layer is layers[0]
            self.handles.append(layer.register_forward_pre_hook(partial(self._enter, first)))
            self.handles.append(layer.register_forward_hook(self._leave, always_call=True))
        for layer in layers[sent : sent + 1]:  # while it computes, the last sent layer's activations leave
            self.handles.append(layer.register_forward_hook(lambda *_: self._has_left()))

    def close(self):
        """Takes the hooks off the layers and gives the host memory back."""
        for handle in self.handles:
            handle.remove()
        self.release()

    def release(self):
        """Gives the host memory back, unless a backward pass is still to come."""
        self.current = self.before = self.leaving = None
        if self.stream is not None:
            self.stream.synchronize()
        if not self.away:
            self.chunks, self.used = [], 0
            # Pinned memory goes back to torch's own cache first; the name of what empties that has changed.
            empty = getattr(torch.accelerator, "empty_host_cache", None) or getattr(torch._C, "_host_emptyCache", None)
            if empty is not None and self.stream is not None:
                empty()

    def _enter(self, first: bool, layer, arguments):
        if first:  # also after a pass that ran out of memory, of which copies may still be under way
            self.before = self.leaving = None
            if self.stream is not None:
                torch.cuda.current_stream().wait_stream(self.stream)
        if torch.is_grad_enabled():
            self.current = _Pass(self.before)
            self.hooks = torch.autograd.graph.saved_tensors_hooks(partial(self._pack, self.current), self._unpack)
            self.hooks.__enter__()

    def _leave(self, layer, arguments, output):
        if self.hooks is None:
            return
        self.hooks.__exit__(None, None, None)
        self.hooks, this, self.current = None, self.current, None
        if output is None:  # the layer failed
            return
        if not self.away:
            self.used = 0  # the backward pass before is over: from the start again
        self.away.add(this)
        pairs = []
        for held in this.storages.values():
            held.host = self._place(held.storage.nbytes())
            pairs += zip(held.host, _bytes(held.storage).split([len(piece) for piece in held.host]), strict=True)
        this.copied = self._copy(pairs)
        self._has_left()
        self.leaving = self.before = this

    def _has_left(self):
        """Lets go of the activations whose journey the layer just computed has covered; the card waits if it has not."""
        if self.leaving is not None:
            self._wait(self.leaving.copied)
            for held in self.leaving.storages.values():
                held.storage = None
            self.leaving = None

    def _pack(self, this, tensor):
        storage = tensor.untyped_storage()
        stays = storage.nbytes() < SMALLEST or storage.data_ptr() in self.parameters
        if stays or (self.stream is not None and not tensor.is_cuda):
            return tensor
        held = this.storages.setdefault(storage.data_ptr(), _Held(storage, tensor.device, this))
        return held, tensor.dtype, tensor.storage_offset(), tensor.size(), tensor.stride()

    def _unpack(self, packed):
        if isinstance(packed, torch.Tensor):
            return packed
        held, dtype, offset, size, stride = packed
        for this in (held.owner, held.owner.before):  # the layer before is brought along while this one computes
            if this is not None:
                self._bring_back(this)
        self._wait(held.owner.copied)
        return torch.empty(0, dtype=dtype, device=held.device).set_(held.storage, offset, size, stride)

    def _bring_back(self, this):
        if this is self.leaving:
            self.leaving = None  # it is still here
        if this not in self.away:
            return
        pairs = []
        for held in this.storages.values():
            if held.storage is None:
                back = torch.empty(sum(map(len, held.host)), dtype=torch.uint8, device=held.device)
                pairs += zip(back.split([len(piece) for piece in held.host]), held.host, strict=True)
                held.storage = back.untyped_storage()
            held.host = None
        if pairs:
            this.copied = self._copy(pairs)
        self.away.discard(this)

    def _copy(self, pairs):
        """Copies second to first of each pair beside the computation; the event that ends it, None if it is done."""
        if self.stream is None:
            for target, source in pairs:
                target.copy_(source)
            return None
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            for target, source in pairs:
                target.copy_(source, non_blocking=True)
        return self.stream.record_event()

    def _wait(self, event):
        if event is not None:
            torch.cuda.current_stream().wait_event(event)

    def _place(self, size: int) -> list:
        """Pieces of host memory, of `size` bytes together. Raises torch.OutOfMemoryError, as a full card does."""
        pieces = []
        while size:
            number, start = divmod(self.used, CHUNK)
            if number == len(self.chunks):
                try:
                    self.chunks.append(torch.empty(CHUNK, dtype=torch.uint8, pin_memory=self.stream is not None))
                except RuntimeError as error:
                    raise torch.OutOfMemoryError(
                        f"CUDA out of memory. No host memory for activations: {error}"
                    ) from error
            piece = self.chunks[number][start : start + size]
            pieces.append(piece)
            self.used, size = self.used + len(piece), size - len(piece)
        self.used += -self.used % 512
        return pieces


class _Pass:
    """What one layer saved in one forward pass; alive as long as autograd may ask for it."""

    def __init__(self, before):
        self.before, self.copied = before, None
        # By address. Weak, since each knows its pass: a cycle would keep them until the next collection.
        self.storages = weakref.WeakValueDictionary()


class _Held:
    """A saved storage: on the card, or None while it is only in `host`."""

    def __init__(self, storage, device, owner):
        self.storage, self.device, self.owner, self.host = storage, device, owner, None


def _bytes(storage):
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
