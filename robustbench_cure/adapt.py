"""Any module that works in plain PyTorch, as an ordinary one: a copy in evaluation mode, float32, frozen.

Networks come compiled, parallel, scripted, half precise, with weights that are computed before each pass,
with code that asks for a memory layout. What a network can do is found by trying, once, on a few images.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim.swa_utils import AveragedModel
from torch.overrides import TorchFunctionMode

from robustbench_cure.state import bits

#: Wrappers of training whose forward pass is that of the network inside.
_WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel, AveragedModel)
#: Attributes that every module has, and that move with it.
_OWN = frozenset(vars(nn.Module()))
#: Largest difference between the answers in two memory layouts, relative to the scale of the logits.
LAYOUT_TOLERANCE = 1e-4
#: Brightness at which a single output is looked at: a sigmoid stays in [0, 1] whatever it is shown.
_BRIGHTNESS = (1.0, 30.0, 1000.0)


@dataclass(frozen=True)
class Adapted:
    """A network as this package uses it, and what was found out about it.

    Attributes:
        module: the copy.
        layout: memory format of images and weights in which it works.
        works: whether a forward pass succeeded.
        outputs: logits of an image; 0: not known.
        one_output: how its single output is read, in words; empty: it has several.
        no_gradient: why no gradient reaches the image, in words; empty: one does.
        refuses: it fails on images that ask for a gradient.
        moving: buffers that a forward pass changes, by name.
    """

    module: nn.Module
    layout: torch.memory_format
    works: bool
    outputs: int = 0
    one_output: str = ""
    no_gradient: str = ""
    refuses: bool = False
    moving: frozenset[str] = frozenset()


def adapt(module: nn.Module, device: torch.device, example: Tensor, num_classes: int) -> Adapted:
    """Copy a network and find out how it works.

    The copy is in float32; a network that works in its own precision alone (a cast in its code) keeps it.

    Args:
        module: maps images (B,C,H,W) to logits; not modified.
        device: where the copy goes.
        example: images to try it on, float32, on the device; at least two.
        num_classes: of the data; a single output is taken for two classes only if there are two.

    Raises:
        RuntimeError, TypeError: it cannot be copied or moved.
        torch.OutOfMemoryError: there is no room for one pass.
    """
    module = unwrapped(module)
    if _is_lazy(module):
        module = copied(module)
        materialise(module, example.shape[1:])
    forms: list[Callable[[], nn.Module]] = [lambda: ordinary(module, device, torch.float32)]
    own = _precision(module)
    if own is not None:
        forms += [
            lambda: ordinary(module, device, None),
            lambda: _behind(ordinary(module, device, None), lambda net: _Cast(net, own)),
        ]
    for make in forms:
        form = make()
        trial = _try(form, example)
        if trial is not None:
            break
    else:
        form = laid_out(forms[0](), torch.contiguous_format)
        return Adapted(form, torch.contiguous_format, works=False)
    images = example.to(memory_format=trial.layout)
    shape, one_output = tuple(trial.output.shape), ""
    if num_classes == 2 and shape in ((len(example),), (len(example), 1)):
        probability = _is_probability(form, images)
        one_output = "probability of class 1" if probability else "logit of class 1 against class 0"
        form = _behind(form, lambda net: _TwoClasses(net, probability))
        shape = (len(example), 2)
    return Adapted(
        form,
        trial.layout,
        works=True,
        outputs=shape[1] if len(shape) == 2 else 0,
        one_output=one_output,
        no_gradient=trial.no_gradient,
        refuses=trial.refuses,
        moving=_moving(form, images[:1]),
    )


def _moving(form: nn.Module, images: Tensor) -> frozenset[str]:
    """Names of the buffers that a forward pass changes: counters of calls, running statistics."""
    before = {name: bits(tensor).clone() for name, tensor in form.named_buffers()}
    with torch.no_grad():
        _output(form, images)
    after = {name: bits(tensor) for name, tensor in form.named_buffers()}
    return frozenset(
        name for name in before.keys() & after.keys() if not torch.equal(before[name], after[name])
    )


# --- copies ----------------------------------------------------------------------------------------------


class _Detached(TorchFunctionMode):
    """Copies tensors that are results of a computation without their history, which PyTorch refuses."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is Tensor.__deepcopy__ and not args[0].is_leaf:
            return args[1].setdefault(id(args[0]), args[0].detach().clone())
        return function(*args, **(kwargs or {}))


def copied(module: nn.Module) -> nn.Module:
    """A deep copy, of networks too that `deepcopy` refuses, without compilation.

    What cannot be copied at all (a lock, an open file) is shared with the network it comes from.
    """
    with _Detached(), torch.no_grad():
        memo = _not_copyable(module)
        for part in module.modules():
            if "_orig_mod" in part._modules:  # what `torch.compile` returns
                memo[id(part)] = copy.deepcopy(part._modules["_orig_mod"], memo)
        return copy.deepcopy(module, memo)


def _not_copyable(module: nn.Module) -> dict[int, Any]:
    """Attributes of the network and of its parts that no copy can be made of, by id."""
    parts: dict[int, Any] = {id(part): part for part in module.modules()}
    found: dict[int, Any] = {}
    for part in parts.values():
        if isinstance(part, torch.jit.ScriptModule):
            continue
        for name in vars(part).keys() - _OWN:
            value = vars(part)[name]
            try:
                copy.deepcopy(value, dict(parts))  # what refers to the network itself is no obstacle
            except Exception:
                found[id(value)] = value
    return found


def unwrapped(module: nn.Module) -> nn.Module:
    """The network inside what `torch.compile`, parallel training or averaging put around it."""
    while True:
        if "_orig_mod" in module._modules:
            module = module.get_submodule("_orig_mod")
        elif isinstance(module, _WRAPPERS):
            module = module.module
        else:
            return module


def materialise(module: nn.Module, shape: tuple[int, ...]) -> None:
    """Give lazy layers their size, in place, by a forward pass of one image of this shape (C,H,W)."""
    if _is_lazy(module):
        with torch.no_grad():
            module.eval()
            module(torch.zeros((1, *shape), dtype=torch.float32))


def _is_lazy(module: nn.Module) -> bool:
    return any(is_lazy(tensor) for tensor in (*module.parameters(), *module.buffers()))


def ordinary(module: nn.Module, device: torch.device, dtype: torch.dtype | None) -> nn.Module:
    """A copy on the device, in evaluation mode and frozen; its numbers in ``dtype``, None: as they are."""
    form = copied(module)

    def move(tensor: Tensor) -> Tensor:
        if dtype is not None and tensor.is_complex():
            return tensor.to(device, dtype.to_complex())
        return tensor.to(device, dtype if tensor.is_floating_point() else None)

    # `Module.to` would drop imaginary parts; a network's own `to`, `eval` and `train` need not return it.
    form._apply(move)  # type: ignore[no-untyped-call]
    form.eval()
    for part in form.modules():
        if isinstance(part, nn.DataParallel):
            part.__class__ = _Single
        if not isinstance(part, torch.jit.ScriptModule):
            for name in vars(part).keys() - _OWN:
                part.__dict__[name] = _moved(part.__dict__[name], move)
    for parameter in form.parameters():
        parameter.requires_grad_(False)
    return form


def _moved(value: Any, move: Callable[[Tensor], Tensor]) -> Any:
    """An attribute with its tensors moved: mean and deviation are often no buffers."""
    if isinstance(value, Tensor):
        return value if isinstance(value, nn.Parameter) else move(value)
    if type(value) in (list, tuple):
        items = [_moved(item, move) for item in value]
        return value if all(map(lambda a, b: a is b, items, value)) else type(value)(items)
    if type(value) is dict:
        named = {key: _moved(item, move) for key, item in value.items()}
        return value if all(named[key] is value[key] for key in value) else named
    return value


def _precision(module: nn.Module) -> torch.dtype | None:
    """The first precision other than float32 among a network's tensors; None: there is none."""
    held = [*module.parameters(), *module.buffers()]
    for part in module.modules():
        held += [value for value in vars(part).values() if isinstance(value, Tensor)]
    others = [t.dtype for t in held if t.is_floating_point() and t.dtype != torch.float32]
    return others[0] if others else None


def _behind(module: nn.Module, wrap: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """The network wrapped; where the package normalises its input, inside of that."""
    if isinstance(module, Normalised):
        module.net = wrap(module.net)
        return module
    return wrap(module)


class Normalised(nn.Module):
    """A network behind its own input normalisation: ``net((x - mean) / std)``.

    Args:
        net: maps normalised images to logits.
        mean: per channel, in units of x in [0, 1].
        std: per channel, positive.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, net: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.net = net
        self.register_buffer("mean", _constant(mean), persistent=False)
        self.register_buffer("std", _constant(std), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, L) of images (B,C,H,W) in [0, 1]."""
        logits: Tensor = self.net((x - self.mean) / self.std)
        return logits


def _constant(values: tuple[float, ...]) -> Tensor:
    return torch.tensor(values, dtype=torch.float32).view(-1, 1, 1)


def bare(module: nn.Module) -> nn.Module:
    """The network itself, without normalisation, casts and heads that this package put around it."""
    while isinstance(module, (Normalised, _Cast, _TwoClasses)):
        module = module.net
    return unwrapped(module)


class _Single(nn.DataParallel):  # type: ignore[type-arg]
    """What calls the network inside, plainly; the code around it may look for that by name."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


class _Cast(nn.Module):
    """A network that takes images of its own precision."""

    def __init__(self, net: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.net, self.dtype = net, dtype
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x.to(self.dtype))
        return out


class _TwoClasses(nn.Module):
    """A single output z as two: logits 0 and z, or probabilities 1 - z and z."""

    def __init__(self, net: nn.Module, probability: bool) -> None:
        super().__init__()
        self.net, self.probability = net, probability
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        z = self.net(x).reshape(-1, 1)
        return torch.cat((1 - z if self.probability else torch.zeros_like(z), z), 1)


# --- trials ----------------------------------------------------------------------------------------------


@contextmanager
def foreign() -> Iterator[None]:
    """Somebody else's code runs here: what would end the program is an error of that code.

    Raises:
        RuntimeError: the code called `sys.exit`, or raised another exception that nobody is to catch.
    """
    try:
        yield
    except (Exception, KeyboardInterrupt):
        raise
    except SystemExit as error:
        code = "" if error.code is None else repr(error.code)
        raise RuntimeError(f"it called sys.exit({code}), which only a script may") from error
    except BaseException as error:
        raise RuntimeError(f"it raised {type(error).__name__}: {error}") from error


@dataclass(frozen=True)
class _Trial:
    """What a form did in one memory layout."""

    layout: torch.memory_format
    output: Tensor
    no_gradient: str
    refuses: bool


def _try(form: nn.Module, example: Tensor) -> _Trial | None:
    """The layout in which a form works best, channels_last if it can; None: it fails in both."""
    first = _pass(form, example, torch.channels_last)
    if first is not None and not first.no_gradient:
        # A network may read memory as it lies; then its answers depend on the layout.
        with torch.no_grad():
            plain = _output(form, example)
        if plain is None or _agree(plain, first.output):
            return first
    second = _pass(form, example, torch.contiguous_format)
    if second is None and first is not None:
        return _pass(form, example, torch.channels_last)
    return second


def _agree(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape:
        return False
    a, b = a.nan_to_num(), b.nan_to_num()
    return bool((a - b).abs().amax() <= LAYOUT_TOLERANCE * b.abs().amax().clamp_min(1.0))


def _pass(form: nn.Module, example: Tensor, layout: torch.memory_format) -> _Trial | None:
    """Forward and backward in a layout; None: the forward pass fails."""
    images = example.to(memory_format=layout)
    form = laid_out(form, layout)
    try:
        with foreign(), torch.enable_grad():
            leaf = images.clone().requires_grad_(True)
            output = _real(form(leaf.clone()))
            if output is None:
                return None
            if not output.requires_grad:
                return _Trial(layout, output, "its forward pass cuts the graph", refuses=False)
            (slope,) = torch.autograd.grad(output.sum(), leaf, allow_unused=True)
        reason = "" if slope is not None else "its output does not depend on the image"
        return _Trial(layout, output.detach(), reason, refuses=False)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # the user's own code
        with torch.no_grad():
            output = _output(form, images)
        return None if output is None else _Trial(layout, output, one_line(error), refuses=True)


def _output(form: nn.Module, images: Tensor) -> Tensor | None:
    """What a form returns, or nothing where it fails or returns no tensor of real numbers."""
    try:
        with foreign():
            return _real(form(images.clone()))
    except torch.OutOfMemoryError:
        raise
    except Exception:  # the user's own code
        return None


def _real(output: object) -> Tensor | None:
    """An output as float32, if it is a tensor of real numbers."""
    if not isinstance(output, Tensor) or output.is_complex():
        return None
    return output.clone().float()


def laid_out(form: nn.Module, layout: torch.memory_format) -> nn.Module:
    """Convolutions follow the layout of their weights as they do that of their images."""
    for tensor in (*form.parameters(), *form.buffers()):
        if tensor.dim() == 4:
            tensor.data = tensor.data.contiguous(memory_format=layout)
    return form


def _is_probability(form: nn.Module, images: Tensor) -> bool:
    with torch.no_grad():
        shown = [_output(form, images * brightness) for brightness in _BRIGHTNESS]
    return all(z is not None and bool(((z >= 0) & (z <= 1)).all()) for z in shown)


def one_line(error: BaseException) -> str:
    """What an error says, or its name where it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__
