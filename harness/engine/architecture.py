"""What differs between models, as sampling and training ask for it."""
import math


def windows_of(config):
    """How many layers see a window of the last tokens; None: some do something else."""
    kind = "sliding_attention" if getattr(config, "sliding_window", None) else "full_attention"
    kinds = getattr(config, "layer_types", None) or [kind] * config.num_hidden_layers
    known = set(kinds) <= {"full_attention", "sliding_attention"}
    return kinds.count("sliding_attention") if known else None


def rotation_limit(config):
    """The longest sequence, in tokens, beside which the others of its pass rotate as alone."""
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") not in ("dynamic", "longrope"):
        return math.inf
    return rope.get("original_max_position_embeddings") or config.max_position_embeddings


def changes_of_logits(config):
    """What a model does to its head's output: (soft cap, divisor, factor), None where nothing."""
    return [getattr(config, name, None)
            for name in ("final_logit_softcapping", "logits_scaling", "logit_scale")]
