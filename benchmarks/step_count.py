"""What a DPO step of an 8B model asks of a card, counted and not computed:

    python benchmarks/step_count.py

A pass of judge pairs goes through Llama-3-8B's layer, forward and backward, with tensors that have
shapes and no numbers. Told are, layer by layer, how many operations that is (on a card each is a
kernel, or a few), how many bytes these read and write, how many products they add up, and how long
the card of docs/gpu.md would take if each were as fast as its bandwidth or its matrix rate allows,
and none waited for another. What a layer of 4 bits does besides is added by hand: its weights are
expanded twice a pass.
"""
import sys
from collections import Counter
from pathlib import Path
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, LlamaConfig

sys.path.insert(0, str(Path(__file__).parent.parent))
import dpo
from harness.passes import PASS_TOKENS

BANDWIDTH, RATE = 3.0e12, 770e12  # bytes and operations a second of the H100 in docs/gpu.md
PROMPT, ANSWER = 900, 200         # tokens of a judge pair
SHAPE = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32,
         "num_key_value_heads": 8, "vocab_size": 1024, "max_position_embeddings": 8192}


class Count(TorchDispatchMode):
    """Counts what lies below autograd: {kind: Counter of operations, bytes, flops, seconds}."""

    def __init__(self):
        super().__init__()
        self.kinds = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [x for x in torch.utils._pytree.tree_leaves((args, kwargs, out))
                   if isinstance(x, torch.Tensor)]
        name = func._schema.name.removeprefix("aten::")
        if not func.is_view and name not in ("detach", "empty_like", "new_empty"):
            size, flops = sum(x.nbytes for x in tensors), products(name, args)
            self.kinds.setdefault(kind_of(name, args), Counter()).update(
                operations=1, bytes=size, flops=flops,
                seconds=max(size / BANDWIDTH, flops / RATE))
        return out


def products(name, args):
    """Twice the numbers that a product of two matrices multiplies."""
    if name not in ("mm", "addmm"):
        return 0
    left, right = [x for x in args if isinstance(x, torch.Tensor)][-2:]
    return 2 * left.shape[0] * left.shape[1] * right.shape[1]


def kind_of(name, args):
    if name in ("mm", "addmm"):
        slim = min(n for x in args if isinstance(x, torch.Tensor) for n in x.shape) <= 16
        return "the adapter's products" if slim else "products with the weights"
    if "attention" in name or name in ("index_select", "index_add", "cat", "split"):
        return f"attention: {name.replace('_', ' ').strip()}"
    return name


def count(layers):
    """What a pass through a model of so many layers counts."""
    config = LlamaConfig(num_hidden_layers=layers, **SHAPE)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).requires_grad_(False)
    model = dpo.add_lora(model, rank=16)
    weights = list(dpo.trainable(model).values())
    pairs = PASS_TOKENS["cuda"] // (PROMPT + 2 * ANSWER)
    prompts, answers = [[5] * PROMPT] * pairs, [[6] * ANSWER] * pairs
    with mock.patch.object(dpo, "can_pack", lambda model: True), \
            mock.patch.object(dpo, "causal_lower_right", lambda Q, K: None), \
            FakeTensorMode(allow_non_fake_inputs=True), Count() as counted:
        chosen, rejected = dpo.pair_logps(model, prompts, answers, answers)
        torch.autograd.grad((chosen - rejected).sum(), weights)
    return counted.kinds, pairs * (PROMPT + 2 * ANSWER)


def main():
    for way in ("piece by piece", "in one call"):
        with mock.patch.object(dpo, "has_kernel", lambda query, value: way == "in one call"):
            (two, tokens), (one, _) = count(2), count(1)
        print(f"\n{tokens} tokens, attention {way}")
        for kind in sorted(two, key=lambda kind: -two[kind]["seconds"]):
            row = {name: value - one.get(kind, Counter())[name]
                   for name, value in two[kind].items()}
            print(f"{kind:40} {row}")


if __name__ == "__main__":
    main()
