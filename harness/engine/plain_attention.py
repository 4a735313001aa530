"""Attention to stretches of the sampler's pool in plain PyTorch: on a CPU, in float32 on CUDA, on
cards before Ampere, and for heads that FlashAttention's kernel does not take.
"""
import math

import numpy as np
import torch

# Queries of a stretch from which a CPU's fused attention pays, which stores no scores; it pays for
# few stretches too. With 16 bits it is always taken, since it does not round scores.
FUSED = 16


def plain_attention(query, keys, values, pool, part, scaling, window):
    """What `kernel_attention` of sampling.py says, and with the same arguments."""
    now, kind = pool.now, (part is pool.now.own, window)
    if kind not in now.layouts:  # they are the same for all layers
        seat = now.position - now.before[1] if part is now.own else now.position
        numbers = (x.cpu().numpy() for x in (part.at, part.begin[:-1], part.length, seat))
        found = list(layouts(*numbers, window, pool.places, seat.device))
        order = torch.cat([layout.tokens for layout in found]).argsort() if len(found) > 1 else None
        now.layouts[kind] = found, order
    found, order = now.layouts[kind]
    results = [layout.attend(query, keys, values, scaling) for layout in found]
    return results[0] if order is None else tuple(torch.cat(x)[order] for x in zip(*results))


def layouts(at, begin, length, seat, window, places, device):
    """Layouts of all stretches that have queries.

    Short and long ones go apart where they would more than double each other's rectangles, unless
    these are a view.
    """
    queries = np.diff(at)
    todo = [np.flatnonzero(queries)]
    while todo:
        some = todo.pop()
        stretches = at[some], queries[some], begin[some], length[some]
        _, counts, begins, lengths = stretches
        size, view = lengths + counts, view_of(begins, lengths, counts, places)
        padded = len(some) * (lengths.max() + counts.max())
        large = 2 * size >= size.max()
        if view or large.all() or padded <= 2 * size.sum():
            yield Layout(stretches, view, seat, window, places, device)
        else:
            todo += [some[~large], some[large]]


def view_of(begin, length, counts, places):
    """(X, distance, first place) of the rectangle in which stretches stand in the pool, or None.

    It takes equal distances. Computing the gaps must cost less than copying the stretches would.
    """
    first, last, K = int(begin.min()), int(begin.max()), max(1, int(length.max()))
    apart = int(np.gcd.reduce(begin - first)) or K
    X = (last - first) // apart + 1
    fits = K <= apart and (X - len(begin)) * counts.max() <= len(begin) and last + K <= places
    if fits and np.bincount((begin - first) // apart).max() == 1:
        return X, apart, first


class Layout:
    """Stretches and their queries as rectangles, for attention in plain PyTorch.

    X of them, K places and Q queries each. Where stretches begin at equal distances, as rows do,
    their rectangle is a view of the pool, and nothing is copied.
    """

    def __init__(self, stretches, view, seat, window, places, device):
        """stretches: (X,) each of the first query, how many, the first place, and how many.

        seat (T,): how many places of its stretch stand before each query, of all stretches.
        """
        at, counts, begin, length = stretches
        X, Q, K = len(at), int(counts.max()), max(1, int(length.max()))
        self.view, slot = view, np.arange(X)  # where in the rectangle each stretch stands
        if view:
            X, apart, first = view
            slot = (begin - first) // apart
        else:
            place = (begin[:, None] + np.arange(K)).clip(max=places - 1)
            self.place = torch.from_numpy(place).to(device)                      # (X, K)
        of = np.arange(len(at)).repeat(counts)              # (T,) the stretch of each query here
        q = np.arange(len(of)) - (counts.cumsum() - counts)[of]
        tokens, x = at[of] + q, slot[of]                    # (T,) it stands at x, q
        query, seat = np.zeros((X, Q), dtype=np.int64), seat[tokens]
        query[x, q] = tokens
        start = (seat + 1 - window).clip(min=0) if window else np.zeros_like(seat)
        end = np.minimum(length[of], seat + 1)              # (T,) it sees places start to end
        self.alike = bool(Q == 1 or not start.any() and (end == length[of]).all())
        bias, sight = None, np.zeros((2, X, 1 if self.alike else Q), dtype=end.dtype)
        if self.alike or device.type != "cpu" or start.any() or (seat != q).any():  # else: causal
            sight[:, x, 0 if self.alike else q] = start, end
            starts, ends = sight[..., None]                                      # (X, 1 or Q, 1)
            seen = (starts <= np.arange(K)) & (np.arange(K) < ends)              # (X, 1 or Q, K)
            bias = torch.from_numpy(np.where(seen, np.float32(0), np.float32(-1e30))).to(device)
        self.query, self.tokens, blind, *cell = (torch.from_numpy(array).to(device) for array in (
            query, tokens, (end <= start)[:, None, None], x, q))
        self.blind, self.bias = blind if blind.any() else None, bias
        self.size, self.cell = (X, K), tuple(cell)

    def attend(self, query, keys, values, scaling):
        """The result for these stretches' queries, (T, H, D), and the log of the denominator."""
        h = query.shape[1] // keys.shape[1]
        cells = query[self.query].movedim(2, 0)                                 # (H, X, Q, D)
        keys, values = (self.rectangle(x).movedim(2, 0) for x in (keys, values))  # (Hkv, X, K, D)
        if self.alike:  # heads that share keys are further queries of the same stretch
            cells = cells.unflatten(0, (-1, h)).movedim(1, 3).flatten(2, 3)     # (Hkv, X, Q * h, D)
        else:
            keys, values = (x.repeat_interleave(h, 0) for x in (keys, values))  # (H, X, K, D)
        many = self.size[0] > 8 and cells.shape[2] < FUSED and query.dtype.itemsize >= 4
        if self.bias is not None and (query.is_cuda or many):
            heads = (x.split(len(x) if self.alike else 1) for x in (cells, keys, values))
            parts = [attend_part(*some, self.bias, scaling) for some in zip(*heads)]
            out, total = (torch.cat(x) for x in zip(*parts))
        else:
            mask = None if self.bias is None else self.bias[:, None].to(query.dtype)
            out, total = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                *(x.transpose(0, 1) for x in (cells, keys, values)), is_causal=mask is None,
                attn_mask=mask, scale=scaling)
            out, total = out.transpose(0, 1), total.transpose(0, 1)[..., None]
        out, total = (x.unflatten(2, (self.query.shape[1], -1)).movedim(0, 2)[self.cell]
                      .flatten(1, 2) for x in (out, total))                     # (T, H, D or 1)
        return out, total if self.blind is None else total.masked_fill(self.blind, -math.inf)

    def rectangle(self, whole):
        """The stretches of (places, Hkv, D), (X, K, Hkv, D)."""
        if not self.view:
            return whole.index_select(0, self.place.flatten()).unflatten(0, self.place.shape)
        (_, apart, first), stride = self.view, whole.stride(0)
        return whole.as_strided((*self.size, *whole.shape[1:]),
                                (apart * stride, *whole.stride()), first * stride)


def attend_part(query, key, value, bias, scaling):
    """Attention over one part of the context.

    query (H, X, Q, D), key and value (H, X, K, D), bias (X, 1 or Q, K), 0 or, where nothing is
    seen, -1e30 -> its output (H, X, Q, D) and the log of its softmax's denominator (H, X, Q, 1).
    """
    def product(a, b):  # head by head: keys of all heads would be copied first
        out = a.new_empty(*a.shape[:3], b.shape[3])
        for x, y, z in zip(a, b, out):
            torch.bmm(x, y, out=z)
        return out

    scores = bias + product(query * scaling, key.transpose(-1, -2))
    shares = scores.softmax(-1)                                                 # (H, X, Q, K)
    # The same as logsumexp, and cheaper: the largest share is exp(largest score - total).
    total = scores.amax(-1, keepdim=True) - shares.amax(-1, keepdim=True).log()
    return product(shares.to(value.dtype), value), total
