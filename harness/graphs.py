"""The sampler's step as CUDA graphs, and how a lack of memory is told."""
import sys
import weakref
from contextlib import suppress

import torch


class CannotCapture(Exception):
    """No CUDA graph can hold this model's step."""


uncapturable = weakref.WeakSet()  # models of which that is known


class StepGraphs:
    """A step as CUDA graphs, one per Shape: the GPU need not wait for Python.

    What a step reads must stand at the same place each time. This must go when the sampler's Batch
    does, so it holds nothing of that: a graph that the garbage collector finds while another one is
    captured would spoil it.
    """

    def __init__(self, rows):
        self.rows, self.graphs, self.out, self.pool = rows, {}, None, None

    def run(self, model, shape, forward):
        """forward()'s logits (B, V), by a graph unless no graph can hold this model's step."""
        if model not in uncapturable:
            try:
                return self.replay(shape, forward)
            except CannotCapture as error:
                print(f"this model samples without CUDA graphs, which is slower: {error}",
                      file=sys.stderr)
                uncapturable.add(model)
        return forward()

    def replay(self, shape, forward):
        """What forward() would return, (B, V). Raises CannotCapture."""
        if shape not in self.graphs:
            self.graphs[shape] = self.capture(forward)
        self.graphs[shape].replay()
        return self.out[: shape.T]

    def capture(self, forward):
        logits = forward()  # libraries set themselves up, which they may not in a capture
        if self.out is None:  # one buffer for all graphs
            self.out = logits.new_empty(self.rows, logits.shape[-1])
            self.pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        try:
            # The outer context sets the stream back if the capture fails.
            with torch.cuda.stream(torch.cuda.current_stream()), \
                    torch.cuda.graph(graph, pool=self.pool):
                self.out[: len(logits)] = forward()
        except RuntimeError as error:
            end_capture(logits.device, self.pool)
            if out_of_memory(error):
                raise
            raise CannotCapture(str(error).splitlines()[0]) from None
        return graph


def end_capture(device, pool):
    """After a capture that failed: PyTorch would go on to allocate, and to draw, as if in one."""
    with suppress(RuntimeError):  # it has ended
        torch._C._cuda_endAllocateToPool(device.index, pool)
        torch._C._cuda_releasePool(device.index, pool)
    with torch.cuda.graph(torch.cuda.CUDAGraph()):  # ends what the failed one began
        torch.zeros(1, device=device)


def out_of_memory(error):
    """Whether this is CUDA's want of memory, which libraries report in their own ways."""
    signs = ("out of memory", "ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError) or any(s in str(error) for s in signs)
