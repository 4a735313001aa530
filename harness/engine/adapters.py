"""Layers as training has them: which get an adapter, and lean ways, of few passes over memory, for
plain adapters' products and norms.
"""
import functools
import inspect
import re
from contextlib import ExitStack, contextmanager

import torch
import torch.nn.functional as F
from peft.tuners.lora import LoraLayer

from harness.engine.weights import expanded_bytes, full_weight


def unadapted(model):
    """The names of modules that get no adapter: what sees pictures or hears, routers, which return
    more than a product, and matrices that Mamba's kernels read themselves.
    """
    left_out = []
    for name, module in model.named_modules():
        parent, _, own = name.rpartition(".")
        mixer = re.search("Mamba|Mixer", type(model.get_submodule(parent)).__name__)
        if (re.search("vision|visual|image|audio|multi_modal", name)
                or type(module).__name__.endswith("Router")
                or mixer and own in ("out_proj", "dt_proj")):
            left_out.append(name)
    return left_out


@contextmanager
def lean_layers(model, norms):
    """Let a bfloat16 model's plain LoRA layers, and if norms is true its plain RMSNorms, go over
    memory as few times as they can, and compute as PEFT and transformers do again after.

    PEFT writes the adapter's part, scales it and adds it, each a pass over memory of the layer's
    whole output; the gradient takes as many. transformers' norms are six such passes, their
    gradients more. (A CPU has no kernel for norms: there they would take longer.)
    """
    dtype = model.dtype
    with ExitStack() as undo:
        for layer in model.modules() if dtype == torch.bfloat16 else ():
            if is_plain(layer, dtype):
                lean = product
            elif norms and is_plain_norm(layer, dtype):
                lean = normed
            else:
                continue
            undo.callback(vars(layer).pop, "forward", None)
            layer.forward = functools.partial(lean, layer)
        yield


def is_plain_norm(layer, dtype):
    """Whether a layer is an RMSNorm as `normed` computes it."""
    return (norms_plainly(type(layer)) and layer.weight.dtype == dtype
            and "forward" not in vars(layer))


@functools.cache
def norms_plainly(kind):
    """Whether modules of a class are plain RMSNorms: tried on a small one, in float32."""
    if (not kind.__name__.endswith("RMSNorm")
            or list(inspect.signature(kind).parameters)[1:] != ["eps"]
            or len(inspect.signature(kind.forward).parameters) != 2):
        return False
    layer, x = kind(8), torch.linspace(-3, 2, 16).view(2, 8)
    if not hasattr(layer, "variance_epsilon"):  # Gemma's: they multiply by 1 + weight
        return False
    layer.weight.data.copy_(torch.linspace(0.5, 2, 8))
    return torch.allclose(layer(x), normed(layer, x), rtol=1e-5)


def normed(layer, x):
    """A plain RMSNorm's output: one kernel on CUDA, and one for the gradient."""
    with torch.autocast(x.device.type, enabled=False):  # which would make it float32
        return F.rms_norm(x, layer.weight.shape, layer.weight.to(x.dtype), layer.variance_epsilon)


def is_plain(layer, dtype):
    """Whether a layer adds to a frozen matrix's product that of one adapter, and nothing else."""
    # By name: PEFT has the class of 4 bits only where bitsandbytes is installed.
    known = isinstance(layer, LoraLayer) and type(layer).__name__ in ("Linear", "Linear4bit")
    if not known or "forward" in vars(layer):
        return False
    base = layer.get_base_layer()
    full = type(base) is torch.nn.Linear and base.weight.dtype == dtype
    return ((full or expanded_bytes(base, dtype)) and not base.weight.requires_grad
            and list(layer.active_adapters) == list(layer.lora_A) and len(layer.lora_A) == 1
            and not (layer.merged or layer.disable_adapters or layer.lora_variant)
            and not any(layer.lora_bias.values())
            and all(type(dropout) is torch.nn.Identity for dropout in layer.lora_dropout.values()))


def product(layer, x):
    """A plain LoRA layer's output, (..., features in) -> (..., features out)."""
    (name,) = layer.active_adapters
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    A, B = (part[name].weight.to(x.dtype) for part in (layer.lora_A, layer.lora_B))
    return AdaptedProduct.apply(x, A, B * layer.scaling[name], layer.get_base_layer())


class AdaptedProduct(torch.autograd.Function):
    """x W^T + b + (x A^T) B^T of a frozen base: x (..., I), A (r, I), B (O, r) -> (..., O)."""

    @staticmethod
    def forward(ctx, x, A, B, base):
        rows = x.reshape(-1, A.shape[1])                     # (T, I)
        low = rows @ A.T                                     # (T, r)
        ctx.save_for_backward(rows, low, A, B)
        ctx.base = base
        out = F.linear(rows, full_weight(base), base.bias).addmm_(low, B.T)
        return out.view(*x.shape[:-1], B.shape[0])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        rows, low, A, B = ctx.saved_tensors
        shape, grad = grad.shape, grad.reshape(-1, B.shape[0])  # (T, O)
        of_low, of_x = grad @ B, None                        # (T, r)
        if ctx.needs_input_grad[0]:
            of_x = (grad @ full_weight(ctx.base)).addmm_(of_low, A).view(*shape[:-1], A.shape[1])
        return of_x, of_low.T @ rows, grad.T @ low, None
