"""What a network holds: its weights and buffers, bit for bit, and digests of them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor, nn


def bits(tensor: Tensor) -> Tensor:
    """The bytes of a tensor, uint8 (N,), on its device: NaN is equal to itself, -0.0 is not 0.0."""
    plain = tensor.detach()
    plain = plain.int_repr() if plain.is_quantized else plain
    return plain.resolve_conj().contiguous().flatten().view(torch.uint8)


def state_digest(module: nn.Module) -> str:
    """SHA-256 over names and bytes of the state dict, hex; of nothing for a network without a state."""
    digest = hashlib.sha256()
    for key, value in sorted(module.state_dict().items()):
        # Quantised layers and others keep what is no tensor there, too.
        held = bits(value).cpu().numpy().tobytes() if isinstance(value, Tensor) else repr(value).encode()
        digest.update(key.encode() + held)
    return digest.hexdigest()


def tensors_digest(module: nn.Module) -> str:
    """SHA-256 over names, shapes, dtypes and values of a network's weights and buffers, hex.

    Equal for equal tensors, whatever file they came from. Names are those of the bare network, without what
    compilation puts before them; counters of batch-norm, which evaluation never reads and old files lack,
    are left out.

    Args:
        module: the bare network, see `adapt.bare`.
    """
    digest = hashlib.sha256()
    for key, value in sorted(module.state_dict().items()):
        name = key.replace("_orig_mod.", "")
        if name.endswith("num_batches_tracked"):
            continue
        if isinstance(value, Tensor):
            digest.update(f"{name} {tuple(value.shape)} {value.dtype}\0".encode())
            digest.update(bits(value).cpu().numpy().tobytes())
        else:  # quantised layers and others keep what is no tensor there, too
            digest.update(f"{name} {value!r}\0".encode())
    return digest.hexdigest()


class Fingerprint:
    """Weights, buffers and modes at one moment; equal to another only if every bit is.

    Args:
        forms: the modules looked at.
        ignored: names of buffers that need not stay.
    """

    def __init__(self, forms: Iterable[nn.Module], ignored: frozenset[str]) -> None:
        forms = tuple(forms)
        self.tensors = {
            (k, name): bits(tensor).clone()
            for k, form in enumerate(forms)
            for name, tensor in (*form.named_parameters(), *form.named_buffers())
            if name not in ignored
        }
        self.modes = [[getattr(part, "training", False) for part in form.modules()] for form in forms]
        self.frozen = [[not p.requires_grad for p in form.parameters()] for form in forms]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Fingerprint):
            return NotImplemented
        return (
            self.modes == other.modes
            and self.frozen == other.frozen
            and self.tensors.keys() == other.tensors.keys()
            and all(torch.equal(held, other.tensors[key]) for key, held in self.tensors.items())
        )

    __hash__ = None  # type: ignore[assignment]
