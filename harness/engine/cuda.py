"""What a card has: memory, and whether it was too little; FlashAttention's kernel."""
import torch


def out_of_memory(error):
    """Whether this is CUDA's want of memory, which libraries report in their own ways."""
    signs = ("out of memory", "ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError) or any(s in str(error) for s in signs)


def free_memory():
    """Bytes of CUDA memory that are free, those included that PyTorch holds and does not use."""
    return (torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()
            - torch.cuda.memory_allocated())


def has_kernel(query):
    """Whether FlashAttention takes such queries (..., D): on Ampere and later, in 16 bits."""
    return (query.is_cuda and torch.cuda.get_device_capability(query.device) >= (8, 0)
            and torch.backends.cuda.is_flash_attention_available() and query.dtype.itemsize == 2
            and query.shape[-1] % 8 == 0 and query.shape[-1] <= 256)
