"""What a DPO step asks of a card, counted and not computed: `python benchmarks/step_count.py`

A pass of judge pairs goes through one of Llama-3-8B's layers in bfloat16, forward and backward,
with tensors that have a shape and no numbers. Told are the operations (on a card each is a kernel
or two), the bytes that they read and write, and how long the card of docs/gpu.md would take if each
were as fast as its bandwidth or its matrix rate allows, and none waited for another. So it is a
bound, and says what is worth taking away. What 4 bits cost besides is reckoned from their layout.
"""
import sys
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, LlamaConfig

sys.path.insert(0, str(Path(__file__).parent.parent))
import dpo
from harness.engine.adapters import lean_layers

BANDWIDTH, RATE = 3.0e12, 770e12  # bytes and operations a second of the H100 in docs/gpu.md
RANK, PROMPT, ANSWER = 16, 900, 200  # of the adapter; tokens of a judge pair
PAIRS = 4                            # in a pass: what 80 GB hold of an 8B model in 4 bits
SHAPE = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32,
         "num_key_value_heads": 8, "vocab_size": 1024, "max_position_embeddings": 8192}
FREE = ("detach", "_unsafe_view", "empty_like", "new_empty")  # nothing is read or written
KINDS = ("products with the weights", "the adapter's products", "attention", "all else")


class Count(TorchDispatchMode):
    """Counts what lies below autograd: {kind: Counter of operations, bytes, seconds}."""

    def __init__(self):
        super().__init__()
        self.kinds = {kind: Counter() for kind in KINDS}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        space, name = func._schema.name.split("::")
        if space == "aten" and name not in FREE and not func.is_view:
            tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor)]
            size, product = sum(x.nbytes for x in tensors), name in ("mm", "addmm", "addmm_")
            seconds = size / BANDWIDTH
            if product:
                left, right = tensors[-3:-1]
                seconds = max(seconds, 2 * left.shape[0] * right.numel() / RATE)
                slim = RANK in (*left.shape, *right.shape)
            kind = KINDS[slim] if product else KINDS[2 if "attention" in name else 3]
            self.kinds[kind].update(operations=1, bytes=size, seconds=seconds)
        return out


def one_kernel(x, *_):
    """Stands in for F.rms_norm, which on CUDA is one kernel, and one for the gradient, and on a CPU
    is not: of a kernel that reads and writes as many bytes.
    """
    return torch.relu(x)


def count(layers, lean):
    """What a pass through a model of so many layers counts."""
    config = LlamaConfig(num_hidden_layers=layers, **SHAPE)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).requires_grad_(False)
    model = dpo.add_lora(model, RANK)
    weights = list(dpo.trainable(model).values())
    prompts, answers = [[5] * PROMPT] * PAIRS, [[6] * ANSWER] * PAIRS
    with mock.patch.object(dpo, "probe_packing", lambda model: True), \
            mock.patch.object(dpo, "causal_lower_right", lambda Q, K: None), \
            lean_layers(model, norms=True) if lean else nullcontext(), \
            mock.patch.object(torch.nn.functional, "rms_norm", one_kernel), \
            FakeTensorMode(allow_non_fake_inputs=True), Count() as counted:
        chosen, rejected = dpo.pair_logps(model, prompts, answers, answers)
        torch.autograd.grad((chosen - rejected).sum(), weights)
    return counted.kinds


def main():
    tokens = PAIRS * (PROMPT + 2 * ANSWER)
    print(f"A layer, {PAIRS} judge pairs, {tokens:,} tokens:\n")
    print("| attention, layers | of it | operations | GB | ms at least |\n|---|---|---|---|---|")
    for attention, layers in (("piece by piece", "PEFT's"), ("in one call", "PEFT's"),
                              ("in one call", "lean")):
        with mock.patch.object(dpo, "has_kernel", lambda *_: attention == "in one call"):
            two, one = (count(depth, layers == "lean") for depth in (2, 1))
        rows = {kind: [two[kind][name] - one[kind][name] for name in
                       ("operations", "bytes", "seconds")] for kind in KINDS}
        # Forward two products with the pairs of tokens that see each other, backward five.
        seen = PROMPT**2 / 2 + 2 * ANSWER * (PROMPT + ANSWER / 2)
        rows["attention"][2] += 7 * 2 * SHAPE["hidden_size"] * PAIRS * seen / RATE
        rows["together"] = [sum(column) for column in zip(*rows.values())]
        for kind, (operations, size, seconds) in rows.items():
            print(f"| {attention}, {layers} | {kind} | {operations} | {size / 1e9:.1f} | "
                  f"{1000 * seconds:.1f} |")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(LlamaConfig(num_hidden_layers=1, **SHAPE))
    linear = [module for module in model.model.layers.modules()
              if isinstance(module, torch.nn.Linear)]
    expand = sum(module.weight.numel() for module in linear) * (0.5 + 2) / BANDWIDTH
    copy = tokens * sum(module.out_features for module in linear) * 2 * 2 / BANDWIDTH
    print(f"\nIn 4 bits: its weights expanded once {1000 * expand:.1f} ms, PEFT's copy of what they"
          f" give {1000 * copy:.1f} ms")


if __name__ == "__main__":
    main()
