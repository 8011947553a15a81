"""Weights into networks: beside the card, by URL, or given. Nothing loaded here can run code.

Weights are safetensors, or pickles read with `weights_only=True`. A state dict must fit exactly: a key that
is missing, unexpected or of another shape would leave a layer at random and still print a number.
"""

from __future__ import annotations

import hashlib
import http.client
import io
import pickle
import urllib.error
import urllib.request
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from robustbench_cure.adapt import Normalised
from robustbench_cure.errors import UsageError
from robustbench_cure.files import write_atomically
from robustbench_cure.protocol.cards import ModelCard
from robustbench_cure.protocol.catalog import CardFile, cache_dir
from robustbench_cure.zoo import build

#: Keys under which training scripts put the state dict inside a checkpoint.
_WRAPPERS = ("state_dict", "model_state_dict", "net", "model")
#: What parallel training, frameworks and compilation put before every name of a state dict.
_PREFIXES = ("module.", "model.", "net.", "_orig_mod.")
#: Endings of files that `torch.save` wrote.
_PICKLES = (".pt", ".pth", ".ckpt", ".bin", ".tar")

#: Seconds without an answer after which a download is given up.
_TIMEOUT = 30.0


def build_from_card(card: ModelCard) -> Normalised:
    """The network a card describes, freshly initialised, behind the card's input normalisation.

    Raises:
        UsageError: unknown architecture or argument.
    """
    try:
        net = build(card.architecture, card.num_classes, card.input_shape[0], card.architecture_args)
    except UsageError as error:
        raise UsageError(f"model {card.id!r}: {error}") from None
    return Normalised(net, card.mean, card.std)


def load_card_module(
    card_file: CardFile[ModelCard], weights_file: Path | None = None
) -> tuple[Normalised, str]:
    """A card's network with weights.

    Args:
        card_file: the card and its place; `weights.file` lies beside it.
        weights_file: weights to use instead of the card's.

    Returns:
        The module in evaluation mode, and the SHA-256 of the weights file, hex.

    Raises:
        UsageError: no weights yet, or they are not what the card says.
    """
    card = card_file.card
    module = build_from_card(card)
    expected = ""
    trained = trained_weights(card.id)
    if weights_file is not None:
        path = weights_file
    elif card.weights is not None:
        expected = card.weights.sha256
        beside = card_file.path.parent / card.weights.file
        path = beside if card.weights.file else fetch(card.weights.url, expected)
    elif trained.is_file():
        path = trained
    else:
        raise UsageError(
            f"model {card.id!r} has no weights yet: make them with `cure-bench train {card.id}`, "
            "or give them with --weights FILE"
        )
    digest = load_weights(module.net, path, expected)
    return module.eval(), digest


def trained_weights(model_id: str) -> Path:
    """Where `cure-bench train` puts the weights of a model, and where they are looked for."""
    return cache_dir() / "trained" / f"{model_id}.safetensors"


def weights_digest(path: Path) -> str:
    """SHA-256 of a file, hex.

    Raises:
        UsageError: the file cannot be read.
    """
    return hashlib.sha256(_read(path)).hexdigest()


# --- state dicts -------------------------------------------------------------------------------------


def load_weights(module: nn.Module, path: Path, sha256: str = "") -> str:
    """Load a state dict strictly, in place.

    Args:
        module: the bare network; changed only if everything fits.
        path: .safetensors, or .pt and the like with tensors alone. Half-precision tensors are upcast, and
            what wrappers put before every key is removed.
        sha256: expected digest of the file, hex; empty: not checked.

    Returns:
        The SHA-256 of the file, hex.

    Raises:
        UsageError: unreadable, another digest, not weights, or weights of another network.
    """
    data = _read(path)
    digest = hashlib.sha256(data).hexdigest()
    if sha256 and digest != sha256:
        raise UsageError(
            f"{path}: sha256 is {digest[:12]}..., expected {sha256[:12]}...: "
            f"{_foreign(data) or 'the file was changed or truncated'}; fetch it again"
        )
    wanted = module.state_dict()
    state = _renamed(_parse(path, data), wanted)
    # Files written before batch-norm counted its batches lack the counter, which evaluation never reads.
    for key, value in wanted.items():
        if key.endswith(".num_batches_tracked"):
            state.setdefault(key, value)
    complaint = _mismatch(wanted, state)
    if complaint:
        raise UsageError(f"{path}: not the weights of this architecture: {complaint}")
    module.load_state_dict({key: state[key].to(value.dtype) for key, value in wanted.items()}, strict=True)
    return digest


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror or error}") from None


def _foreign(data: bytes) -> str:
    """What a file is that is certainly no weights, or nothing."""
    head = data[:512].lstrip().lower()
    if not data:
        return "the file is empty"
    if head.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "this is a web page, not weights (a login or error page was saved in their place)"
    if head.startswith(b"version https://git-lfs"):
        return "this is a git-lfs pointer, not weights (run `git lfs pull`)"
    return ""


def _parse(path: Path, data: bytes) -> dict[str, Tensor]:
    foreign = _foreign(data)
    if foreign:
        raise UsageError(f"{path}: {foreign}")
    if path.suffix == ".safetensors":
        try:
            return safetensors.torch.load(data)
        except safetensors.SafetensorError as error:
            reason = str(error).split("\n")[0]
            raise UsageError(
                f"{path}: truncated, or not a safetensors file ({reason}); fetch or save it again"
            ) from None
    if path.suffix.lower() not in _PICKLES:
        known = f"{', '.join(_PICKLES[:-1])} or .pth.tar"
        raise UsageError(f"{path}: weights are read from .safetensors, {known}, not {path.suffix!r}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols: what follows is said below, in one line
            loaded: Any = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UsageError(
            f"{path}: holds Python objects besides tensors, or is damaged; loading it could run code, so it "
            "is refused: save model.state_dict() alone, best as .safetensors"
        ) from None
    except Exception as error:  # a damaged pickle raises whatever its bytes happen to spell
        if "TorchScript" in str(error):
            raise UsageError(
                f"{path}: is a TorchScript program, not weights; name a function that returns "
                "torch.jit.load(...) with --model"
            ) from None
        reason = str(error).split("\n")[0] or type(error).__name__
        raise UsageError(
            f"{path}: truncated, or not a PyTorch file ({reason}); fetch or save it again"
        ) from None
    return _state_dict(path, loaded)


def _state_dict(path: Path, loaded: Any) -> dict[str, Tensor]:
    """The state dict itself, or the one inside a training checkpoint."""
    if isinstance(loaded, Mapping):
        inner = [loaded[key] for key in _WRAPPERS if isinstance(loaded.get(key), Mapping)]
        for candidate in (loaded, *inner):
            if candidate and all(isinstance(value, Tensor) for value in candidate.values()):
                return {str(key): value for key, value in candidate.items()}
    raise UsageError(f"{path}: holds no state dict: save model.state_dict()")


def _renamed(state: dict[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict under the network's own names, where they differ by what wrappers put before all."""
    if "n_averaged" not in wanted:  # how many networks an average is of
        state = {key: value for key, value in state.items() if key != "n_averaged"}
    own = {bare: key for key, bare in _bare(wanted).items()}
    return {own.get(bare, bare): state[key] for key, bare in _bare(state).items()}


def _bare(keys: Iterable[str]) -> dict[str, str]:
    """Each key without the prefixes that all of them have; compiled parts may stand anywhere."""
    bare = {key: key.replace("_orig_mod.", "") for key in keys}
    while bare:
        shared = [p for p in _PREFIXES if all(name.startswith(p) for name in bare.values())]
        if not shared:
            break
        bare = {key: name.removeprefix(shared[0]) for key, name in bare.items()}
    return bare


def _mismatch(wanted: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> str:
    """The first complaint of each sort, or nothing."""
    complaints = []
    for sort, keys in (
        ("missing", [key for key in wanted if key not in given]),
        ("unexpected", [key for key in given if key not in wanted]),
    ):
        if keys:
            complaints.append(f"{sort} {keys[0]!r}{_more(keys)}")
    shaped = [key for key in wanted if key in given and wanted[key].shape != given[key].shape]
    if shaped:
        key = shaped[0]
        complaints.append(
            f"{key!r} is {tuple(given[key].shape)}, not {tuple(wanted[key].shape)}{_more(shaped)}"
        )
    typed = [
        key
        for key in wanted
        if key in given and wanted[key].is_floating_point() != given[key].is_floating_point()
    ]
    if typed:
        complaints.append(
            f"{typed[0]!r} is {given[typed[0]].dtype}, not {wanted[typed[0]].dtype}{_more(typed)}"
        )
    return "; ".join(complaints)


def _more(keys: list[str]) -> str:
    return f" (and {len(keys) - 1} more)" if len(keys) > 1 else ""


# --- URLs --------------------------------------------------------------------------------------------


def fetch(url: str, sha256: str) -> Path:
    """Download weights into the cache, once; what is there under its digest is never downloaded again.

    Args:
        url: http or https.
        sha256: the file's digest, hex; anything else is thrown away.

    Raises:
        UsageError: no connection, another digest, or a cache that cannot be written.
    """
    path = cache_dir() / "weights" / f"{sha256}.safetensors"
    if path.is_file() and weights_digest(path) == sha256:
        return path
    if not url.startswith(("https://", "http://")):
        raise UsageError(f"{url}: weights are fetched over https or http")
    offline = f"fetch it elsewhere and put it at {path}, or use --weights FILE"
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT) as answer:  # noqa: S310 - scheme checked above
            data = answer.read()
    except urllib.error.HTTPError as error:
        error.close()
        raise UsageError(f"{url}: cannot be fetched ({error}); {offline}") from None
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise UsageError(f"{url}: cannot be fetched ({reason}); {offline}") from None
    digest = hashlib.sha256(data).hexdigest()
    if digest != sha256:
        what = _foreign(data) or "the file changed since its card was written"
        raise UsageError(f"{url}: sha256 is {digest[:12]}..., the card says {sha256[:12]}...: {what}")
    write_atomically(path, lambda file: file.write_bytes(data))
    return path
