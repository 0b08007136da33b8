"""Attention as it is arranged where there is no flash attention gives what PyTorch's own gives."""

import sys
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from medcot import kernels
from medcot.kernels import decoding_attention, in_one_call


@hypothesis(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 5), shared=st.integers(1, 4), each=st.integers(1, 4), tokens=st.integers(1, 40),
    new=st.sampled_from([1, 1, 3]), grouped=st.booleans(), padded=st.booleans(), seed=st.integers(0, 2**16),
)  # fmt: skip
def test_it_is_pytorchs_attention(rows, shared, each, tokens, new, grouped, padded, seed):
    torch.manual_seed(seed)
    heads = shared * each
    query = torch.randn(rows, new, heads, 8).transpose(1, 2)  # as projections leave it: no dense layout
    key, value = torch.randn(2, tokens, rows, shared, 8).permute(0, 2, 3, 1, 4)
    if not grouped:
        key, value = (part.repeat_interleave(each, dim=1) for part in (key, value))
    mask = None
    if padded:  # on the left, a different length in each row, the newest token always seen
        mask = torch.arange(tokens) >= torch.randint(0, tokens, (rows, 1))
        mask = mask[:, None, None, :]
    found = decoding_attention(query, key, value, enable_gqa=grouped, attn_mask=mask, is_causal=False)
    expected = scaled_dot_product_attention(query, key, value, enable_gqa=grouped, attn_mask=mask)
    assert found.shape == expected.shape == (rows, heads, new, 8)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_documents_are_left_to_unsloth_where_the_kernel_is_not():
    asked = []

    def one_by_one(*arguments, **options):
        asked.append((arguments, options))
        return "unsloth's"

    query = torch.zeros(1, 4, 6, 8)
    options = {"n_groups": 2, "is_causal": True, "sliding_window": None, "sdpa_kwargs": {}, "training": True}
    assert in_one_call(one_by_one)(query, query[:, :2], query[:, :2], (4, 2), **options) == "unsloth's"
    assert asked[0][0][3] == (4, 2) and asked[0][1] == options


@pytest.mark.parametrize(("weights_a_row", "by_triton"), [(128, False), (4096, True)])
def test_what_is_put_in_place_in_unsloth(monkeypatch, weights_a_row, by_triton):
    def one_by_one():
        pass

    llama, dispatch = SimpleNamespace(), SimpleNamespace(_sdpa_packed_segments=one_by_one)
    products = SimpleNamespace(_BNB_GEMM_4BIT_MAX_ROWS=16, _TRITON_GEMV_EAGER=True)
    names = ("unsloth.models.llama", "unsloth.utils.attention_dispatch", "unsloth.kernels.utils")
    for name, module in zip(names, (llama, dispatch, products), strict=True):
        monkeypatch.setitem(sys.modules, name, module)
    model = SimpleNamespace(config=SimpleNamespace(hidden_size=weights_a_row))
    for _ in range(2):  # a second model finds it in place
        kernels.install(model)
        assert llama.scaled_dot_product_attention is decoding_attention
        assert dispatch._sdpa_packed_segments.one_by_one is one_by_one
    assert (32, by_triton) == (products._BNB_GEMM_4BIT_MAX_ROWS, products._TRITON_GEMV_EAGER)
