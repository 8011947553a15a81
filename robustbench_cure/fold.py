"""Batch-norm folded into the convolution before it: the inference form of a model.

In evaluation mode a batch-norm is a fixed affine map of each channel, so a convolution (or linear
layer) followed by it alone equals one convolution. What follows it alone and needs no copy (a rectifier,
the sum at the end of a residual block) is computed in place: large buffers are not asked for again and
again, which costs a third of a forward pass on a CPU. The graph is found with torch.fx; a model that
cannot be traced, or whose folded form does not reproduce its logits, is used as it is.
"""

from __future__ import annotations

import operator
import warnings

import torch
from torch import Tensor, fx, nn
from torch.nn import functional
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from robustbench_cure.adapt import copied

#: Largest logit difference of a folded form, relative to the logits' own scale.
FOLD_TOLERANCE = 1e-4


def fold_batchnorm(module: nn.Module, example: Tensor) -> nn.Module:
    """Return an equal module with batch-norms folded, or a copy where that is not possible.

    Args:
        module: in evaluation mode; left untouched.
        example: float32 images (B,C,H,W) on the module's device, at least two; to check the folded form with.

    Guarantees: the result's logits differ by at most `FOLD_TOLERANCE` on the negatives of ``example``.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            traced = fx.symbolic_trace(copied(module))
        folded = _in_place(_fold(traced))
        # The call that torch.fx gives a traced module prints a traceback wherever the network raises.
        setattr(type(folded), "__call__", nn.Module.__call__)  # noqa: B010
        # Other images, and fewer, than tracing can have seen: what the network kept of an earlier pass
        # is a constant in the graph.
        shown = 1 - example[1:]
        with torch.no_grad():
            before = module(shown.clone())
        with torch.enable_grad():
            after = folded(shown.clone().requires_grad_(True).clone())
            if after.requires_grad:  # autograd itself refuses a buffer that was overwritten too early
                after.sum().backward()
        scale = before.abs().amax().clamp_min(1.0)
        if bool(((before - after).abs().amax() <= FOLD_TOLERANCE * scale).item()):
            return folded
    except KeyboardInterrupt:
        raise
    except BaseException:  # noqa: S110 - whatever tracing trips over, the model itself is still right
        pass
    return copied(module)


def _fold(traced: fx.GraphModule) -> fx.GraphModule:
    modules = dict(traced.named_modules())
    for node in list(traced.graph.nodes):
        if node.op != "call_module" or not isinstance(modules[node.target], nn.modules.batchnorm._BatchNorm):
            continue
        before = node.args[0]
        if not isinstance(before, fx.Node) or before.op != "call_module" or len(before.users) != 1:
            continue
        layer, norm = modules[before.target], modules[node.target]
        shared = sum(other.target == before.target for other in traced.graph.nodes) > 1
        if norm.running_mean is None or shared:
            continue
        if isinstance(layer, nn.Conv2d):
            fused: nn.Module = fuse_conv_bn_eval(layer, norm)
        elif isinstance(layer, nn.Linear):
            fused = fuse_linear_bn_eval(layer, norm)
        else:
            continue
        traced.set_submodule(str(before.target), fused)
        node.replace_all_uses_with(before)
        traced.graph.erase_node(node)
    traced.delete_all_unused_submodules()
    traced.graph.lint()
    traced.recompile()
    return traced


#: Layers whose own backward pass does not need their output: it may be overwritten.
_OVERWRITABLE = (nn.Conv2d, nn.Linear, nn.modules.batchnorm._BatchNorm)
_RECTIFIERS = (functional.relu, torch.relu)
_SUMS = (operator.add, torch.add)


def _in_place(traced: fx.GraphModule) -> nn.Module:
    """Overwrite outputs of layers, and of sums of them, that nothing else reads."""
    modules = dict(traced.named_modules())
    free: set[fx.Node] = set()
    for node in traced.graph.nodes:
        if node.op == "call_module" and isinstance(modules[str(node.target)], _OVERWRITABLE):
            free.add(node)
            continue
        source = node.args[0] if node.args else None
        if not isinstance(source, fx.Node) or source not in free or len(source.users) != 1:
            continue
        if node.op == "call_function" and node.target in _RECTIFIERS:
            node.target, node.args, node.kwargs = functional.relu, (source,), {"inplace": True}
        elif node.op == "call_function" and node.target in _SUMS and len(node.args) == 2 and not node.kwargs:
            node.target = operator.iadd
            free.add(node)
        elif node.op == "call_module" and type(modules[str(node.target)]) is nn.ReLU:
            node.op, node.target, node.kwargs = "call_function", functional.relu, {"inplace": True}
    traced.graph.lint()
    traced.recompile()
    return traced
