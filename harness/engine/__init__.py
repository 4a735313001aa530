"""What sampler and trainer share: text as ids, attention, weights, memory, processes."""
