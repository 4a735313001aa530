"""LoRA layers for training: which modules get one, and their products in few passes over memory."""
import functools
import re
from contextlib import ExitStack, contextmanager

import torch
import torch.nn.functional as F
from peft.tuners.lora import Linear
from peft.tuners.lora.bnb import Linear4bit
from peft.utils.integrations import dequantize_module_weight

from harness.weights import expanded_bytes


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
def lean_adapters(model):
    """Let plain LoRA layers of a bfloat16 model compute as AdaptedProduct does, and as PEFT does
    again after.

    PEFT writes the adapter's part, scales it and adds it, each a pass over memory of the layer's
    whole output; the gradient takes as many.
    """
    with ExitStack() as undo:
        for layer in model.modules():
            if model.dtype == torch.bfloat16 and is_plain(layer, model.dtype):
                undo.callback(vars(layer).pop, "forward", None)
                layer.forward = functools.partial(product, layer)
        yield


def is_plain(layer, dtype):
    """Whether a layer adds to a frozen matrix's product that of one adapter, and nothing else."""
    if type(layer) not in (Linear, Linear4bit) or "forward" in vars(layer):
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
        out = F.linear(rows, weight_of(base), base.bias).addmm_(low, B.T)
        return out.view(*x.shape[:-1], B.shape[0])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        rows, low, A, B = ctx.saved_tensors
        shape, grad = grad.shape, grad.reshape(-1, B.shape[0])  # (T, O)
        of_low, of_x = grad @ B, None                        # (T, r)
        if ctx.needs_input_grad[0]:
            of_x = (grad @ weight_of(ctx.base)).addmm_(of_low, A).view(*shape[:-1], A.shape[1])
        return of_x, of_low.T @ rows, grad.T @ low, None


def weight_of(base):
    """A frozen matrix, (features out, features in); of 4 bits, the numbers they multiply by."""
    if type(base) is torch.nn.Linear:
        return base.weight
    return dequantize_module_weight(base).to(base.compute_dtype)
