"""A card's memory: what is free, and whether it was too little."""
import torch


def out_of_memory(error):
    """Whether this is CUDA's want of memory, which libraries report in their own ways."""
    signs = ("out of memory", "ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError) or any(s in str(error) for s in signs)


def free_memory():
    """Bytes of CUDA memory that are free, those included that PyTorch holds and does not use."""
    return (torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()
            - torch.cuda.memory_allocated())
