"""Transformers models on these kernels: `register`, then `attn_implementation="cute_sparse"`.

    from cute_sparse.integrations import transformers as cute_sparse_transformers

    cute_sparse_transformers.register(threshold=1e-3)
    model = AutoModel.from_pretrained(folder, attn_implementation="cute_sparse")

Both of transformers' interfaces are registered: the attention function, and the mask function of the same name (without
it transformers passes no mask at all, and padding is attended to). Padded batches are packed and run as
`attention_varlen`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import flash_attention_mask

import cute_sparse

NAME = "cute_sparse"
HALF_DTYPES = (torch.bfloat16, torch.float16)
# Of transformers' attention functions: what would change the result.
UNSUPPORTED_OPTIONS = ("position_bias", "head_mask", "cache", "cu_seq_lens_q", "cu_seq_lens_k")
Threshold = float | torch.Tensor | None
PROBED_ROWS = 16  # query rows on which a model's mask is compared with the band that the kernels apply


def register(
    name: str = NAME,
    *,
    threshold: Threshold | Callable[[int | torch.Tensor], Threshold] = None,
    float32_as: torch.dtype | None = torch.float16,
    on_stats: Callable[[torch.nn.Module, cute_sparse.Stats], None] | None = None,
) -> None:
    """Register attention under `name` for `attn_implementation=name`; registering again replaces it.

    threshold   as in `cute_sparse.attention`, or a function of the number of keys that gives one: of an int, or, for a
                padded batch, of an int tensor (batch, 1). For instance `lambda keys: model.threshold(0.5, keys)`, where
                model is a `cute_sparse.calibration.ThresholdModel` of prefill
    float32_as  the type in which the attention of a float32 model is computed; None refuses such models
    on_stats    called with the attention module and its `Stats` after each layer
    """

    def forward(module, query, key, value, attention_mask, scaling=None, dropout=0.0, is_causal=None, **options):
        return (
            _attend(module, query, key, value, attention_mask, scaling, dropout, is_causal, options,
                    threshold, float32_as, on_stats),
            None,
        )  # fmt: skip

    AttentionInterface.register(name, forward)
    AttentionMaskInterface.register(name, padding_mask)


def padding_mask(
    batch_size: int, q_length: int, kv_length: int, q_offset: int = 0, kv_offset: int = 0, **options
) -> torch.Tensor | None:
    """transformers' mask hook: bool (batch, kv_length) of the tokens that are not padding, None where all are.

    Causality and windows are the kernels' own. A model whose mask is neither bidirectional, causal nor a causal
    window (chunks, prefixes, packed documents), or a cache with room behind the last token (StaticCache), raises
    NotImplementedError rather than run with another mask.
    """
    mask_function = options.get("mask_function")
    if mask_function is not None and kv_length:
        _check_is_band(mask_function, q_length, kv_length, int(q_offset), int(kv_offset), options.get("local_size"))
    mask = flash_attention_mask(batch_size, q_length, kv_length, q_offset, kv_offset, **options)
    return None if mask is None else mask.bool()


def _check_is_band(mask_function, q_length, kv_length, q_offset, kv_offset, window) -> None:
    step = max(1, q_length // PROBED_ROWS)
    q_idx = torch.arange(q_offset, q_offset + q_length, step, device="cpu")[:, None]
    kv_idx = torch.arange(kv_offset, kv_offset + kv_length, device="cpu")[None, :]
    zero = torch.zeros((), dtype=torch.long, device="cpu")
    visible = torch.as_tensor(mask_function(zero, zero, q_idx, kv_idx)).expand(q_idx.shape[0], kv_idx.shape[1]).cpu()
    diagonal = q_idx + (kv_offset + kv_length) - (q_offset + q_length)  # the kernels': the last query's is the last key
    causal = kv_idx <= diagonal
    bands = [torch.ones_like(causal), causal]
    if window is not None:
        bands.append(causal & (kv_idx > diagonal - window))
    if not any(torch.equal(visible, band) for band in bands):
        raise NotImplementedError(
            "this model's attention mask is not supported; supported are bidirectional, causal and causal windows, "
            "where the last query's own key is the last one (not so in a StaticCache)"
        )


def _attend(module, query, key, value, attention_mask, scaling, dropout, is_causal, options,
            threshold, float32_as, on_stats) -> torch.Tensor:  # fmt: skip
    """query (batch, heads_q, seqlen_q, head_dim), key and value likewise -> (batch, seqlen_q, heads_q, head_dim_v)."""
    if dropout:
        raise NotImplementedError(f"{dropout=} is not supported; supported is 0")
    unsupported = [name for name in UNSUPPORTED_OPTIONS if options.get(name) is not None]
    if options.get("output_attentions"):
        unsupported.append("output_attentions")
    if unsupported:
        raise NotImplementedError(f"{', '.join(unsupported)} of {type(module).__name__} is not supported")
    dtype = query.dtype
    if dtype == torch.float32 and float32_as is not None:
        query, key, value = (x.to(float32_as) for x in (query, key, value))
    if query.dtype not in HALF_DTYPES:
        raise NotImplementedError(f"a model in {dtype} is not supported; supported are bfloat16, float16, float32")
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    window = options.get("sliding_window")
    arguments = dict(
        softmax_scale=scaling,
        causal=bool(is_causal),
        window_size=(None, None) if window is None else (window - 1, None),
        softcap=options.get("softcap") or 0.0,
        learnable_sink=None if options.get("s_aux") is None else options["s_aux"].float(),
        return_stats=on_stats is not None,
    )
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))  # (batch, seqlen, heads, head_dim)
    if attention_mask is None:
        result = cute_sparse.attention(query, key, value, threshold=_of(threshold, key.shape[1]), **arguments)
    else:
        result = _attend_unpadded(query, key, value, attention_mask, threshold, arguments)
    if on_stats is not None:
        on_stats(module, result.stats)
        result = result.out
    return result.to(dtype)


def _of(threshold, keys: int | torch.Tensor) -> Threshold:
    return threshold(keys) if callable(threshold) else threshold


def _attend_unpadded(query, key, value, mask, threshold, arguments):
    """mask bool (batch, seqlen_k). Of causal attention, padding rows of the result are 0; otherwise every query is
    computed, because it may be a token of another sequence (cross-attention), of which the mask does not tell."""
    batch, seqlen_q, heads_q, _ = query.shape
    if mask.shape != key.shape[:2]:
        raise NotImplementedError(
            f"an attention mask of shape {tuple(mask.shape)} is not supported; supported is (batch, seqlen_k) = "
            f"{tuple(key.shape[:2])}"
        )
    if arguments["window_size"] != (None, None) and not _is_one_run(mask):
        raise NotImplementedError(
            "an attention mask with gaps between the tokens of a sequence is not supported in layers with a window"
        )
    # The queries of causal attention are the last tokens.
    q_mask = mask[:, -seqlen_q:] if arguments["causal"] else mask.new_ones((batch, seqlen_q))
    q_tokens, k_tokens = (m.flatten().nonzero().squeeze(1) for m in (q_mask, mask))
    lengths = [m.sum(1, dtype=torch.int32) for m in (q_mask, mask)]
    cu_q, cu_k = (torch.nn.functional.pad(n.cumsum(0, dtype=torch.int32), (1, 0)) for n in lengths)
    result = cute_sparse.attention_varlen(
        query.flatten(0, 1)[q_tokens], key.flatten(0, 1)[k_tokens], value.flatten(0, 1)[k_tokens],
        cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, max_seqlen_q=seqlen_q, max_seqlen_k=key.shape[1],
        threshold=_of(threshold, lengths[1][:, None]), **arguments,
    )  # fmt: skip
    packed = result.out if arguments["return_stats"] else result
    padded = packed.new_zeros((batch * seqlen_q, heads_q, packed.shape[-1]))
    padded[q_tokens] = packed
    padded = padded.unflatten(0, (batch, seqlen_q))
    return result._replace(out=padded) if arguments["return_stats"] else padded


def _is_one_run(mask: torch.Tensor) -> bool:
    """Whether the tokens of each row lie side by side, so that packed they are as far apart as they were."""
    begins = mask[:, 1:] & ~mask[:, :-1]
    return bool((begins.sum(1) + mask[:, 0] <= 1).all())
