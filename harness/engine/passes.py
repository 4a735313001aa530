"""A batch in as many passes as memory takes, for training and its reference."""
import sys

import torch
from peft.tuners.lora import LoraLayer
from transformers.modeling_layers import GradientCheckpointingLayer

from harness.engine.adapters import lean_layers
from harness.engine.cuda import free_memory, out_of_memory

PASS_TOKENS = {"cuda": 16384, "cpu": 512}  # most tokens per pass: more are not faster


class Budget:
    """How many tokens a pass may have.

    On CUDA it is what free memory seems to hold, and half of that where it did not.
    """

    def __init__(self, model, examples):
        self.model, self.recomputing = model, False
        self.tokens = PASS_TOKENS[model.device.type]
        if model.device.type == "cuda":
            model.gradient_checkpointing_disable()
            fits = int(0.8 * free_memory() / activation_bytes(model))
            if fits < max(map(token_count, examples), default=0):
                self.recompute()
            else:
                self.tokens = min(self.tokens, fits)

    def recompute(self):
        """Gradient checkpointing: the backward pass computes each layer again from its input."""
        self.recomputing = True
        self.model.gradient_checkpointing_enable(
            gradient_checkpointing_kwargs={"use_reentrant": False})

    def passes(self, work, examples):
        """Split examples, in order, into parts that fit; yield (part, work(part)) for each."""
        done = 0
        with lean_layers(self.model, norms=self.model.device.type == "cuda"):
            while done < len(examples):
                part, result = next(blocks(examples[done:], token_count, self.tokens)), None
                try:
                    result = work(part)
                except RuntimeError as error:
                    if not out_of_memory(error):
                        raise
                if result is None:  # outside of `except`: the error holds on to its tensors
                    self.shrink(part)
                else:
                    done += len(part)
                    yield part, result

    def shrink(self, part):
        """After a pass ran out of memory: smaller ones, or for a single example recomputing."""
        total = sum(map(token_count, part))
        torch.cuda.empty_cache()
        if len(part) > 1:
            self.tokens = min(self.tokens, total) // 2
            print("out of memory: training goes on with passes half as large, "
                  f"{self.tokens} tokens", file=sys.stderr)
        elif self.model.training and not self.recomputing:
            self.recompute()
            train_without_noise(self.model)
            print("out of memory: training goes on with gradient checkpointing, which is slower",
                  file=sys.stderr)
        else:
            raise ValueError(f"an example of {total} tokens does not fit into the GPU's memory: "
                             "use --bits 4, or lower the limits on tokens")


def blocks(items, size, limit):
    """Split items, in order, into blocks of at most `limit` in all, at least one item each."""
    block, used = [], 0
    for item in items:
        if block and used + size(item) > limit:
            yield block
            block, used = [], 0
        block.append(item)
        used += size(item)
    if block:
        yield block


def token_count(example):
    """Tokens of a pair or of an SFT example, the prompt counted once."""
    return sum(len(ids) for name, ids in example.items() if name.endswith("_ids"))


def activation_bytes(model):
    """Roughly what the backward pass needs of each token of a training pass.

    That is what goes into and comes out of the adapted layers, and three quarters more for norms,
    rotations and gates.
    """
    features = sum(layer.in_features + layer.out_features
                   for layer in model.modules() if isinstance(layer, LoraLayer))
    return 1.75 * features * model.get_input_embeddings().weight.element_size()


def train_without_noise(model):
    """Training mode with neither dropout nor jitter, so that the policy begins as its reference.

    Layers ask for these where they are in training mode. So none is, but those that are computed
    again in the backward pass, which they would not be otherwise. (Falcon's drop out by themselves
    then, if their configuration says so.)
    """
    for module in model.modules():
        module.training = module is model or (isinstance(module, GradientCheckpointingLayer)
                                              and module.gradient_checkpointing)
