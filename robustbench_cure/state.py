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
    return plain.resolve_conj().resolve_neg().contiguous().flatten().view(torch.uint8)


def state_digest(module: nn.Module) -> str:
    """SHA-256 over names and bytes of the state dict, hex; empty where it cannot be read.

    What older records know a network by that came from no file; see `tensors_digest` for all others.
    """
    digest = hashlib.sha256()
    try:
        for key, value in sorted(module.state_dict().items()):
            # Quantised layers and others keep what is no tensor there, too.
            held = bits(value).cpu().numpy().tobytes() if isinstance(value, Tensor) else repr(value).encode()
            digest.update(key.encode() + held)
    except Exception:  # the user's own code, or tensors without bytes of their own
        return ""
    return digest.hexdigest()


def tensors_digest(module: nn.Module) -> str:
    """SHA-256 over names, shapes, dtypes and values of a network's weights and buffers, hex.

    Equal for equal tensors, whatever file they came from. Names are those of the bare network, without what
    compilation puts before them; counters of batch-norm, which evaluation never reads and old files lack,
    are left out.

    Args:
        module: the bare network, see `adapt.bare`.

    Returns:
        The digest; empty where the state cannot be read.
    """
    digest = hashlib.sha256()
    try:
        for key, value in sorted(module.state_dict().items()):
            if key.rpartition(".")[2] != "num_batches_tracked":
                digest.update(key.replace("_orig_mod.", "").encode() + b"\0")
                _add(digest, value)
    except Exception:  # the user's own code, or tensors without bytes of their own
        return ""
    return digest.hexdigest()


def _add(digest: hashlib._Hash, value: object) -> None:
    """Add shape, dtype and values of a tensor; quantised layers keep several of them, and other things."""
    if isinstance(value, Tensor):
        digest.update(f"{tuple(value.shape)} {value.dtype} {_scales(value)}\0".encode())
        digest.update(bits(value).cpu().numpy().tobytes())
    elif isinstance(value, list | tuple):
        for part in value:
            _add(digest, part)
    else:
        digest.update(f"{value!r}\0".encode())


def _scales(tensor: Tensor) -> object:
    """What turns the integers of a quantised tensor into its values; nothing for others."""
    if not tensor.is_quantized:
        return ""
    if tensor.qscheme() in (torch.per_tensor_affine, torch.per_tensor_symmetric):
        return tensor.q_scale(), tensor.q_zero_point()
    channels = tensor.q_per_channel_scales(), tensor.q_per_channel_zero_points()
    return tensor.q_per_channel_axis(), [values.tolist() for values in channels]


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
