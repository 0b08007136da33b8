"""What is arranged in the computing of others, where a T4 or the embedded model needs it.

A T4 has neither flash attention nor, on most images, xformers that loads: what is left is PyTorch's memory-efficient kernel,
which takes no keys that several query heads share.
"""

import functools
import sys

import torch
from torch.nn.functional import scaled_dot_product_attention


def install(model):
    """Puts what follows in place in unsloth, for a model that it has loaded; nothing without unsloth's GPU path."""
    if "unsloth.models.llama" not in sys.modules:
        return
    products, dispatch = sys.modules["unsloth.kernels.utils"], sys.modules["unsloth.utils.attention_dispatch"]
    sys.modules["unsloth.models.llama"].scaled_dot_product_attention = decoding_attention
    if not hasattr(dispatch._sdpa_packed_segments, "one_by_one"):
        dispatch._sdpa_packed_segments = in_one_call(dispatch._sdpa_packed_segments)
    # On a T4 unsloth multiplies by 4-bit weights as they are for up to 16 rows; beyond, each token unpacks all of them first.
    # bitsandbytes, asked for more, decides by what it measured on a T4: as they are up to 32 rows for every matrix of an 8B.
    products._BNB_GEMM_4BIT_MAX_ROWS = 32
    if model.config.hidden_size < 256:
        # Unsloth's own product of a single row is wrong for 128 weights a row under Triton 3.6, as the embedded model has
        # them (an error as large as the result; none from 256 on); bitsandbytes' is right.
        products._TRITON_GEMV_EAGER = False


def decoding_attention(query, key, value, enable_gqa=False, **arguments):
    """Attention of one new token a row, in which each key and value is read once; else PyTorch's own.

    query: rows x heads x 1 x size; key and value: rows x shared heads x tokens x size. Without flash attention, which takes
    no padding anywhere, PyTorch copies shared keys and values for each of their query heads, in float32. Here the query
    heads that share keys stand as so many queries of one head: the same sums, no copies.
    """
    rows, heads, new, size = query.shape
    if not enable_gqa or new > 1:
        return scaled_dot_product_attention(query, key, value, enable_gqa=enable_gqa, **arguments)
    grouped = query.reshape(rows, key.shape[1], heads // key.shape[1], size)
    return scaled_dot_product_attention(grouped, key, value, **arguments).reshape(rows, heads, 1, size)


def in_one_call(one_by_one):
    """Unsloth's causal attention of documents laid end to end (`one_by_one`, a call a document), as one call for all.

    The function takes query: 1 x heads x tokens x size, key and value: 1 x shared heads x tokens x size, and the documents'
    lengths, which add up to the tokens; it returns 1 x tokens x heads x size. xformers calls the same kernel for its
    block-diagonal causal mask. Cards with flash attention are left to unsloth, and so is what the kernel does not do.
    """

    def attention(query, key, value, lengths, **options):
        lengths = tuple(length for length in lengths if length)
        plain = options["is_causal"] and not options["sliding_window"] and not options["sdpa_kwargs"]
        if not (plain and sum(lengths) == query.shape[2] and query.is_cuda) or _takes_flash(query.device):
            return one_by_one(query, key, value, lengths, **options)
        keys, values = (x.repeat_interleave(options["n_groups"], dim=1).transpose(1, 2) for x in (key, value))
        starts = _starts(lengths, query.device, torch.is_inference_mode_enabled())
        return torch.ops.aten._efficient_attention_forward(
            query.transpose(1, 2), keys, values, None, starts, starts, max(lengths), max(lengths), 0.0,
            custom_mask_type=1, compute_log_sumexp=True,  # 1: causal, from the upper left corner of each document
        )[0]  # fmt: skip

    attention.one_by_one = one_by_one
    return attention


def _takes_flash(device) -> bool:
    return torch.backends.cuda.flash_sdp_enabled() and torch.cuda.get_device_capability(device) >= (8, 0)


@functools.lru_cache(maxsize=1)
def _starts(lengths, device, inference):
    """Where each document begins and the last ends, once for all layers; what inference mode made cannot be trained with."""
    return torch.tensor((0, *lengths), dtype=torch.int32).cumsum(0, dtype=torch.int32).to(device, non_blocking=True)
