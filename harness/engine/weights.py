"""Weights in a form that is quick to sample with: adapters merged, 4 bits expanded."""
import functools
import re
from collections import Counter
from contextlib import ExitStack, contextmanager

import torch
import torch.nn.functional as F
from peft.tuners.lora import LoraLayer
from peft.utils.integrations import dequantize_module_weight


@contextmanager
def prepared(model, spare=0):
    """Bring weights into a form that is quick to sample with, and put them back after it.

    An adapter of 32-bit weights is added to them, and the very same weights are put back. In 16 and
    4 bits it stays beside them: a change below their last bit would be rounded away, and another
    model would sample than trains; and it computes in 16 bits, as in training. 4-bit weights are
    expanded, as many layers as `spare` bytes hold: once, and not at every call.
    """
    users = Counter(id(weight) for _, weight in model.named_parameters(remove_duplicate=False))
    with torch.no_grad(), ExitStack() as undo:
        for name, weight in model.named_parameters():
            if model.dtype == torch.bfloat16 and re.search("lora_(embedding_)?[AB]", name):
                undo.callback(setattr, weight, "data", weight.data)
                weight.data = weight.data.to(model.dtype)
        for module in list(model.modules()):
            size = expanded_bytes(module, model.dtype)
            if isinstance(module, LoraLayer) and can_merge(module, users):
                weight = module.get_base_layer().weight
                undo.callback(module.merged_adapters.clear)
                undo.callback(weight.copy_, weight.clone())
                module.merge()
            elif 0 < size <= spare:
                weight = full_weight(module)
                undo.callback(vars(module).pop, "forward", None)
                module.forward = functools.partial(F.linear, weight=weight, bias=module.bias)
                spare -= size
        yield


def can_merge(layer, users):
    """Whether a LoRA layer lies on a plain 32-bit matrix that nothing else uses.

    The head may be the embedding, and some models share layers. users: how many use a weight.
    """
    base = layer.get_base_layer()
    if layer.merged or any(layer.lora_bias.values()) or type(base) is not torch.nn.Linear:
        return False
    return base.weight.dtype == torch.float32 and users[id(base.weight)] == 1


def expanded_bytes(module, dtype):
    """Bytes of a 4-bit layer's weights in the dtype it computes in; 0: it is no such layer."""
    state = getattr(getattr(module, "weight", None), "quant_state", None)
    # PEFT's wrapper of a 4-bit layer has its weight too, but no compute_dtype.
    if state is None or getattr(module, "compute_dtype", None) != dtype:
        return 0
    return state.shape.numel() * dtype.itemsize


def full_weight(layer):
    """A linear layer's matrix, (features out, features in); of 4 bits, what they multiply by."""
    if type(layer) is torch.nn.Linear:
        return layer.weight
    return dequantize_module_weight(layer).to(layer.compute_dtype)
