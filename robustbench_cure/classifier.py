"""The model under test as attacks and evaluator see it: images in [0, 1] in, logits out.

Two forms of one network. The *reference* form is the module as loaded, in float32 without TF32: every
claim is checked with it. The *search* form has batch-norm folded, channels_last memory and, where the
processor has it, bfloat16, but for the layer that computes the logits: attacks look for perturbations with
it. Reduced precision can only make the search weaker, never a claim wrong; `precision` says where it is too
weak to be used.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Literal, TypeAlias, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from robustbench_cure.adapt import adapt, bare, foreign, laid_out, one_line
from robustbench_cure.errors import RunError, UsageError
from robustbench_cure.fold import fold_batchnorm
from robustbench_cure.protocol.identity import ModelInfo
from robustbench_cure.state import Fingerprint, state_digest, tensors_digest

T = TypeVar("T")

Precision: TypeAlias = Literal["fp32", "bf16"]


class _Headed(nn.Module):
    """A network with a function of its float32 logits behind it."""

    def __init__(self, net: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.net, self.head = net, head

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.net(x).float())
        return out


def has_bf16(device: torch.device) -> bool:
    """Whether this device multiplies bfloat16 matrices natively (emulation is slower than fp32)."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    if device.type == "cpu" and hasattr(torch.cpu, "get_capabilities"):
        capabilities = torch.cpu.get_capabilities()
        return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
    return False


#: Images in a forward pass without gradient on a processor, at least.
FORWARD_ROWS = 16
#: Images that models are told apart by.
PROBES = 8


def probes(shape: tuple[int, int, int]) -> Tensor:
    """`PROBES` fixed images of soft patches over fine grain, float32 (8, *shape) in [0, 1]."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand((PROBES, shape[0], 4, 4), generator=generator, dtype=torch.float32)
    soft = functional.interpolate(coarse, shape[1:], mode="bilinear", align_corners=False)
    fine = torch.rand((PROBES, *shape), generator=generator, dtype=torch.float32)
    return (0.8 * soft + 0.2 * fine).clamp(0, 1)


class Classifier:
    """A frozen snapshot of a network, in evaluation mode, that counts the work asked of it.

    Args:
        module: maps images in [0, 1], (B,C,H,W) float32, to logits (B, L). It is copied: the caller's
            module keeps its mode, its gradients and its weights; see `adapt`.
        num_classes: classes of the data; L is the network's own number of outputs, where it shows. A network
            with one output counts as two classes, where there are two.
        input_shape: (C, H, W).
        device: where the copy lives.
        precision: of the search form.
        batch_size: images in one forward pass.
        info: who this is, for the record; default: an anonymous model with a digest of its weights.

    Attributes:
        num_classes: L.
        one_output: how a single output is read as two, in words; empty: the network has several.
        no_gradient: why no gradient of the reference form reaches the image, in words; empty: one does.
        forwards: images passed forward so far, all forms together.
        backwards: input gradients computed so far, images times gradients.
        non_finite: images whose input gradient had NaN or infinite entries, so far; attacks see zero there.
        fallback: why the search is in float32 although bfloat16 was asked for; empty: it is as asked.
        callback: called after every pass; None: nobody listens.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        num_classes: int,
        input_shape: tuple[int, int, int],
        device: str | torch.device = "cpu",
        precision: Precision = "fp32",
        batch_size: int = 128,
        info: ModelInfo | None = None,
    ) -> None:
        self.device = torch.device(device)
        self.num_classes = num_classes
        self.input_shape = input_shape
        self.precision: Precision = precision
        self.batch_size = batch_size
        self._info, self._asked = info, False
        self.callback: Callable[[], None] | None = None
        self.forwards = 0
        self.backwards = 0
        self._non_finite = torch.zeros((), dtype=torch.int64)
        self._float32: nn.Module | None = None
        example = torch.linspace(0, 1, 4 * _size(input_shape), dtype=torch.float32, device=self.device)
        self.fallback = ""
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices), torch.inference_mode(False), full_precision():
            found = adapt(module, self.device, example.view(4, *input_shape)[::2], num_classes)
        self.module, self._layout, self._refuses = found.module, found.layout, found.refuses
        self.num_classes = found.outputs or num_classes
        self.one_output, self.no_gradient = found.one_output, found.no_gradient
        self._example = example.view(4, *input_shape).to(memory_format=found.layout)
        self._search = self._search_form(precision)
        self.folded = type(self._search) is not type(self.module)
        if precision == "bf16" and found.works:
            self._settle_bf16()
        self._moving = found.moving

    def _search_form(self, precision: Precision) -> nn.Module:
        with torch.inference_mode(False), full_precision():
            form = laid_out(fold_batchnorm(self.module, self._example), self._layout)
            for parameter in form.parameters():
                parameter.requires_grad_(False)
            if precision == "bf16":
                _store_bf16(form, self._example)
        return form

    def _settle_bf16(self) -> None:
        """Search in bfloat16 in the memory layout in which the network can, or not at all."""
        reason = self._failure()
        if reason and self._layout is torch.channels_last:
            before = self._search
            self._lay_out(torch.contiguous_format)
            self._search = self._search_form("bf16")
            if self._failure():
                self._lay_out(torch.channels_last)
                self._search = before
            else:
                reason = ""
        if reason:
            self.fall_back(f"the model fails in bfloat16: {reason}")

    def _lay_out(self, layout: torch.memory_format) -> None:
        self._layout = layout
        self.module, self._example = laid_out(self.module, layout), self._example.to(memory_format=layout)

    def _failure(self) -> str:
        """Why a pass of the search form fails; empty: it does not."""
        before = self.forwards, self.backwards
        try:
            self.value_and_gradient(self._example, lambda logits: logits.sum(1))
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # the user's own code
            return one_line(error)
        finally:
            self.forwards, self.backwards = before
        return ""

    def fall_back(self, reason: str) -> None:
        """Search in float32 from now on; ``fallback`` says why."""
        self.precision, self.fallback = "fp32", reason
        self._search = self._search_form("fp32")

    @contextmanager
    def in_float32(self) -> Iterator[None]:
        """Search in float32 for a while."""
        if self.precision == "fp32":
            yield
            return
        if self._float32 is None:
            self._float32 = self._search_form("fp32")
        before = self.precision, self._search
        self.precision, self._search = "fp32", self._float32
        try:
            yield
        finally:
            self.precision, self._search = before

    def __repr__(self) -> str:
        name = self._info.id if self._info else type(self.module).__name__
        return (
            f"<Classifier {name}: {self.num_classes} classes, images {self.input_shape}, {self.device}, "
            f"search in {self.precision}>"
        )

    @classmethod
    def live(cls, module: nn.Module, *, num_classes: int, batch_size: int = 1 << 30) -> Classifier:
        """A view of a network being trained: no copy, no folding, its mode as the caller set it."""
        self = cls.__new__(cls)
        self.device = next(module.parameters()).device
        self.num_classes, self.input_shape = num_classes, (0, 0, 0)
        self.precision, self.batch_size = "fp32", batch_size
        self.forwards = self.backwards = 0
        self._non_finite = torch.zeros((), dtype=torch.int64)
        self._info, self._asked = None, False
        self.callback = None
        self.folded, self.fallback, self.one_output, self.no_gradient = False, "", "", ""
        self._layout, self._refuses, self._moving = torch.channels_last, False, frozenset()
        self.module = self._search = module
        return self

    def followed_by(self, head: nn.Module, num_classes: int) -> Classifier:
        """Both forms with a function of the logits behind them; shares weights, counts its own work.

        Args:
            head: float32 logits (B, L) -> (B, num_classes).
            num_classes: of the head.
        """
        other = copy.copy(self)
        other.module, other._search = _Headed(self.module, head), _Headed(self._search, head)
        other.num_classes, other._info, other._asked, other.callback = num_classes, None, False, None
        other._float32, other._non_finite = None, torch.zeros_like(self._non_finite)
        other.forwards = other.backwards = 0
        other._moving = frozenset(f"net.{name}" for name in self._moving)
        return other

    # --- reference form ---------------------------------------------------------------------------

    def logits(self, x: Tensor) -> Tensor:
        """Reference logits, float32 (B, L), in chunks of at most ``batch_size``; no gradient."""
        self._count(len(x))
        rows = self.batch_size
        if self.device.type == "cpu":  # no backward pass follows: activations may stay in the cache
            rows = max(min(FORWARD_ROWS, rows), rows // 4)
        return torch.cat([self._logits(part, reference=True) for part in torch.split(x, rows)])

    # --- search form --------------------------------------------------------------------------------

    def search_logits(self, x: Tensor) -> Tensor:
        """Logits of the search form, float32 (B, L), one pass; no gradient."""
        self._count(len(x))
        return self._logits(x, reference=False)

    def _logits(self, x: Tensor, *, reference: bool) -> Tensor:
        if not len(x):  # many networks cannot flatten an empty batch
            return x.new_zeros((0, self.num_classes))
        with self._form(reference) as module, torch.no_grad():
            return self._forward(module, x)

    def value_and_gradient(
        self, x: Tensor, loss: Callable[[Tensor], Tensor], *, reference: bool = False, raw: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Logits and input gradient, one pass.

        Args:
            x: images (B,C,H,W).
            loss: logits (B, L) float32 -> loss (B,); summed, so each row's gradient is its own.
            reference: use the reference form instead of the search form.
            raw: leave in the gradient what is not finite.

        Returns:
            logits float32 (B, L) and gradient float32, shape of x; zero where the graph is cut, and in
            entries that are not finite.
        """
        if not len(x):
            return x.new_zeros((0, self.num_classes)), torch.zeros_like(x)
        with self._form(reference) as module, torch.enable_grad():
            leaf = _leaf(x)
            logits = self._forward(module, leaf)
            gradient = self._grad(loss(logits).sum(), leaf, keep=False, raw=raw)
        self._count(len(x), len(x))
        return logits.detach(), gradient

    def value_and_jacobian(
        self, x: Tensor, labels: Tensor, classes: Tensor, *, reference: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Logits and gradients of z_k - z_label for chosen classes, one forward and m backward passes.

        Args:
            x: images (B,C,H,W).
            labels: int64 (B,).
            classes: int64 (B, m), the k of each row.
            reference: use the reference form instead of the search form.

        Returns:
            logits float32 (B, L) and gradients float32 (B, m, C, H, W), zero in entries that are not finite.
        """

        def differences(logits: Tensor) -> Sequence[Tensor]:
            return (logits.gather(1, classes) - logits.gather(1, labels[:, None])).unbind(1)

        return self.value_and_gradients(x, differences, classes.shape[1], reference=reference)

    def value_and_gradients(
        self, x: Tensor, losses: Callable[[Tensor], Sequence[Tensor]], m: int, *, reference: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Logits and the input gradients of several losses, one forward and m backward passes.

        Args:
            x: images (B,C,H,W).
            losses: logits (B, L) float32 -> m losses (B,), each summed.
            m: how many.
            reference: use the reference form instead of the search form.

        Returns:
            logits float32 (B, L) and gradients float32 (B, m, C, H, W), zero in entries that are not finite.
        """
        if not len(x):
            return x.new_zeros((0, self.num_classes)), x.new_zeros((0, m, *x.shape[1:]))
        with self._form(reference) as module, torch.enable_grad():
            leaf = _leaf(x)
            logits = self._forward(module, leaf)
            totals = [loss.sum() for loss in losses(logits)]
            gradients = [self._grad(total, leaf, keep=k + 1 < m) for k, total in enumerate(totals)]
        self._count(len(x), len(x) * m)
        return logits.detach(), torch.stack(gradients, 1)

    def _count(self, forwards: int, backwards: int = 0) -> None:
        self.forwards += forwards
        self.backwards += backwards
        if self.callback is not None:
            self.callback()

    @property
    def non_finite(self) -> int:
        """Images whose input gradient had NaN or infinite entries, so far."""
        return int(self._non_finite)

    @contextmanager
    def _form(self, reference: bool) -> Iterator[nn.Module]:
        """The module of a form, in its precision; grad mode is to be set inside."""
        # Inside the caller's `torch.inference_mode` every gradient would be zero.
        with torch.inference_mode(False):
            if reference:
                with full_precision():
                    yield self.module
            elif self.precision == "bf16":
                with torch.autocast(self.device.type, dtype=torch.bfloat16):
                    yield self._search
            else:
                with full_precision():
                    yield self._search

    def _forward(self, module: nn.Module, x: Tensor) -> Tensor:
        shown = x.detach() if self._refuses else x
        # A copy always: networks that normalise in place must not reach the caller's images.
        with foreign():
            logits = module(shown.clone(memory_format=self._layout))
        if not isinstance(logits, Tensor):
            raise TypeError(f"it must return logits, a tensor (B, classes), not {_described(logits)}")
        if logits.is_complex():
            raise TypeError(f"it must return real logits, not {logits.dtype}")
        logits = (logits.clone() if logits.is_inference() else logits).float()
        if torch.is_grad_enabled() and x.requires_grad and not logits.requires_grad:
            return logits + x[:0].sum()  # attacks, those of other libraries too, get a gradient of zero
        return logits

    def _grad(self, value: Tensor, leaf: Tensor, *, keep: bool, raw: bool = False) -> Tensor:
        if not value.requires_grad:  # the model cut the graph: preflight flags it, attacks see zero
            return torch.zeros_like(leaf)
        (gradient,) = torch.autograd.grad(value, leaf, retain_graph=keep, allow_unused=True)
        if gradient is None:
            return torch.zeros_like(leaf)
        if raw:
            return gradient.float()
        # One such entry makes a direction in l2 meaningless, and sends a pixel to NaN.
        bad = ~gradient.isfinite()
        self._non_finite = self._non_finite.to(bad.device) + bad.flatten(1).any(1).sum()
        return gradient.float().masked_fill(bad, 0.0)

    # --- identity and integrity ------------------------------------------------------------------

    def bytes_per_image(self) -> int:
        """Bytes that a search-form forward pass keeps for its backward pass, for each further image."""

        def kept(images: int) -> int:
            sizes = []

            def pack(tensor: Tensor) -> Tensor:
                sizes.append(tensor.untyped_storage().nbytes())
                return tensor

            size = (images, *self.input_shape)
            x = torch.rand(size, dtype=torch.float32, device=self.device, generator=generator)
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                self.value_and_gradient(x, lambda logits: logits.sum(1))
            return sum(sizes)

        generator = torch.Generator(self.device).manual_seed(0)
        before = self.forwards, self.backwards
        # Weights are kept too, but only once: the difference leaves what grows with the batch.
        growth = (kept(4) - kept(2)) // 2
        self.forwards, self.backwards = before
        return growth

    def model_info(self) -> ModelInfo:
        """Who this is: as given, or an anonymous model known by a digest of its weights; with its answers."""
        if self._info is None:
            self._info = ModelInfo(
                id="model",
                name=type(self.module).__name__,
                source="a module in memory",
                architecture=type(self.module).__name__,
                parameters=sum(p.numel() for p in self.module.parameters()),
                weights_sha256=state_digest(self.module),
            )
        if not self._asked:
            self._asked = True
            known = {"answers": self.answers(), "tensors_sha256": tensors_digest(bare(self.module))}
            self._info = self._info.model_copy(update=known)
        return self._info

    def answers(self) -> list[float]:
        """What the network says of `PROBES` fixed images: one number each, six digits, for `same_answers`.

        A number mixes all logits of an image. Empty where they are not finite or not the same twice, and
        where the network fails: then weights alone tell who it is.
        """
        before, listener, self.callback = (self.forwards, self.backwards), self.callback, None
        devices = [self.device] if self.device.type == "cuda" else []
        try:
            with torch.random.fork_rng(devices):
                logits = [self.logits(probes(self.input_shape).to(self.device)).double() for _ in range(2)]
            if not bool(logits[0].isfinite().all()) or not torch.equal(*logits):
                return []
            mixed = logits[0] @ torch.arange(logits[0].shape[1], device=self.device).double().cos()
            return [float(f"{value:.6g}") for value in mixed.tolist()]
        except Exception:  # the user's own code; preflight says what is wrong with it
            return []
        finally:
            (self.forwards, self.backwards), self.callback = before, listener

    def fingerprint(self) -> Fingerprint:
        """Witness of weights, buffers and modes: differs after an edit.

        Buffers that the network itself changes at every pass are left out.
        """
        return Fingerprint((self.module, self._search), self._moving)


#: Where PyTorch keeps the precision of float32 products, the most general first; nowhere before 2.9.
_PRECISIONS: list[Any] = []
_CUDA_PRECISIONS: list[Any] = []
if hasattr(torch.backends, "fp32_precision"):
    _backends: Any = torch.backends
    _cudnn, _mkldnn = _backends.cudnn, _backends.mkldnn
    _CUDA_PRECISIONS = [_backends.cuda.matmul, _cudnn, _cudnn.conv, _cudnn.rnn]
    _PRECISIONS = [_backends, *_CUDA_PRECISIONS, _mkldnn, _mkldnn.matmul, _mkldnn.conv, _mkldnn.rnn]


@contextmanager
def full_precision() -> Iterator[None]:
    """float32 without TF32, bfloat16 products or autocast, restored on leaving."""
    with (
        float32_products(tf32=False),
        torch.autocast("cpu", enabled=False),
        torch.autocast("cuda", enabled=False),
    ):
        yield


@contextmanager
def float32_products(*, tf32: bool) -> Iterator[None]:
    """Products of float32 with TF32 on CUDA, or in full everywhere; restored on leaving.

    Works whichever of PyTorch's two interfaces was used before: the flags ``allow_tf32`` and
    ``set_float32_matmul_precision``, or ``fp32_precision`` (2.9 and later). Reading the flags fails where
    the other interface was used, so both are set, and what can be read is restored.
    """
    kept = [(part, part.fp32_precision) for part in _PRECISIONS]
    matmul, cudnn = "highest", False
    with suppress(RuntimeError):
        matmul = torch.get_float32_matmul_precision()
    with suppress(RuntimeError):
        cudnn = torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32
    for part, _ in kept:
        part.fp32_precision = "tf32" if tf32 and part in _CUDA_PRECISIONS else "ieee"
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(matmul)
        torch.backends.cudnn.allow_tf32 = cudnn
        for part, value in kept:
            part.fp32_precision = value


def with_memory(classifier: Classifier, work: Callable[[], T]) -> T:
    """Run; where the device's memory does not suffice, halve the batch and run again.

    Raises:
        RunError: not even one image fits.
    """
    while True:
        try:
            return work()
        except torch.OutOfMemoryError:
            if classifier.batch_size == 1:
                raise RunError("out of device memory even at batch size 1") from None
            classifier.batch_size //= 2
            if classifier.device.type == "cuda":
                torch.cuda.empty_cache()


def _described(output: object) -> str:
    """What a network returned in place of logits, and what to do about it."""
    kind = f"a {type(output).__name__}"
    if isinstance(output, Mapping) and "logits" in output:
        return f"{kind}: return its entry 'logits'"
    if hasattr(output, "logits"):
        return f"{kind}: return its attribute .logits"
    if isinstance(output, Sequence) and output and isinstance(output[0], Tensor):
        return f"{kind}: return the one of its {len(output)} parts that is the logits"
    return kind


def _leaf(x: Tensor) -> Tensor:
    """The images as a leaf of a new graph; those made in inference mode cannot be one."""
    return (x.clone() if x.is_inference() else x.detach()).requires_grad_(True)


class _InFloat32:
    """A layer that leaves autocast."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            out: Tensor = super().forward(x.float())  # type: ignore[misc]
            return out


class _Float32Linear(_InFloat32, nn.Linear):
    pass


class _Float32Conv2d(_InFloat32, nn.Conv2d):
    pass


def _store_bf16(module: nn.Module, example: Tensor) -> None:
    """Keep in bfloat16 the weights that autocast would convert at every pass, but those of the last layer.

    Logits in bfloat16 have eight bits: their differences, which SPSA lives on, drown in a common offset.
    """
    called: list[nn.Module] = []
    layers = [
        part
        for part in module.modules()
        if type(part) in (nn.Conv2d, nn.Linear) and not any(p.is_complex() for p in part.parameters())
    ]
    hooks = [part.register_forward_hook(lambda layer, *_: called.append(layer)) for part in layers]
    try:
        with foreign(), torch.no_grad():
            module(example.clone())
    except Exception:  # noqa: S110 - the user's own code; preflight says what is wrong with it
        pass
    finally:
        for hook in hooks:
            hook.remove()
    for part in layers:
        if called and part is called[-1]:
            part.__class__ = _Float32Linear if type(part) is nn.Linear else _Float32Conv2d
        else:
            part.to(torch.bfloat16)


def _size(shape: tuple[int, int, int]) -> int:
    return shape[0] * shape[1] * shape[2]


def resolve_device(name: str) -> torch.device:
    """``auto`` is CUDA if there is a device, else the CPU.

    Raises:
        UsageError: the named device is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).split("\n")[0]
        raise UsageError(f"--device {name}: not available here: {reason}") from None
    return device
