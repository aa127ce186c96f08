"""Transformers models on these kernels: `register`, then `attn_implementation="cute_sparse"`.

    from cute_sparse.integrations import transformers as cute_sparse_transformers

    cute_sparse_transformers.register(threshold=1e-3)
    model = AutoModel.from_pretrained(folder, attn_implementation="cute_sparse")

Both of transformers' interfaces are registered: the attention function, and the mask function of the same name (without
it transformers passes no mask at all, and padding is attended to). Padded batches are packed and run as
`attention_varlen`. `keep_dense` names layers that no threshold is for.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterable
from fnmatch import fnmatch

import torch
from transformers import AttentionInterface, AttentionMaskInterface, masking_utils

import cute_sparse

NAME = "cute_sparse"
HALF_DTYPES = (torch.bfloat16, torch.float16)
# What would change the result, of the options that the models of transformers 5.23 give an attention function.
UNSUPPORTED_OPTIONS = (
    "position_bias", "head_mask", "cache", "cu_seq_lens_q", "cu_seq_lens_k", "indices", "block_indices", "sinks",
)  # fmt: skip
# Arguments of an attention module that has its queries, keys and values from the same tokens, in those models.
SELF_ATTENTION_ARGUMENTS = frozenset(
    "self hidden_states attention_mask past_key_values past_key_value position_embeddings position_ids cache_position "
    "output_attentions use_cache kwargs".split()
)
DENSE = "cute_sparse_dense"  # attribute of a module, whether it is one of `keep_dense`
Threshold = float | torch.Tensor | None
MASK_ELEMENTS = 1 << 24  # of a model's own kind of mask, compared at once with the bands that the kernels apply


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


def keep_dense(model: torch.nn.Module, patterns: Iterable[str]) -> None:
    """Give no threshold to the modules whose names match one of the patterns (fnmatch), nor to what is in them.

    For `calibration.Checkpoint.ignore`. A model whose config.json names such layers is refused a threshold until this
    has been called with it. Raises ValueError for a pattern that no module of the model matches.
    """
    modules = dict(model.named_modules())
    for module in modules.values():
        setattr(module, DENSE, False)
    for pattern in patterns:
        matching = [module for name, module in modules.items() if fnmatch(name, pattern)]
        if not matching:
            raise ValueError(f"{pattern!r} matches no module of {type(model).__name__}")
        for module in matching:
            for inner in module.modules():
                setattr(inner, DENSE, True)


def padding_mask(
    batch_size: int, q_length: int, kv_length: int, q_offset: int = 0, kv_offset: int = 0, **options
) -> torch.Tensor | None:
    """transformers' mask hook: bool (batch, kv_length) of the tokens that are not padding, None where all are.

    Causality and windows are the kernels' own. A model whose mask is neither bidirectional, causal nor a causal
    window (chunks, prefixes, packed documents), a cache with room behind the last token (StaticCache), or a model with
    an attention of its own, which relies on the mask, raises NotImplementedError rather than run with another mask.
    """
    _check_takes_its_attention_from_transformers(type(options.get("config")))
    sizes = batch_size, q_length, kv_length, int(q_offset), int(kv_offset)
    mask_function = options.get("mask_function")
    if mask_function is not None and kv_length and not _is_standard(mask_function, *sizes[1:], options):
        _check_is_band(mask_function, *sizes, options)
    mask = masking_utils.flash_attention_mask(batch_size, q_length, kv_length, q_offset, kv_offset, **options)
    return None if mask is None else mask.bool()


@functools.cache
def _check_takes_its_attention_from_transformers(config: type) -> None:
    """Look, where the model of such a config is written, for AttentionInterface beside functions that make masks.

    Transformers asks for a mask by the name given also where a model never asks for the attention of that name.
    """
    package, _, name = config.__module__.rpartition(".")
    if not name.startswith("configuration"):
        return
    for name, module in list(sys.modules.items()):
        if not name.startswith(f"{package}.modeling"):
            continue
        values = list(vars(module).values())
        makes_masks = any(getattr(value, "__module__", None) == masking_utils.__name__ for value in values)
        calls_it = "ALL_ATTENTION_FUNCTIONS" in vars(module) or any(  # itself, or the models that it is made of
            isinstance(value, type) and getattr(value, "_supports_attention_backend", False) for value in values
        )
        if makes_masks and not calls_it:
            raise NotImplementedError(f"{name} has an attention of its own: it does not ask for one by name")


def _causal_window(options: dict) -> int | None:
    """Keys that a query sees in layers with a causal window, where this may be a mask of such layers: it is not where
    local_size is the size of chunks, and Gemma 3 asks for it without one."""
    window = getattr(options.get("config"), "sliding_window", None)
    return window if options.get("local_size") in (None, window) else None


def _is_standard(mask_function, q_length, kv_length, q_offset, kv_offset, options) -> bool:
    """Whether the function is one of transformers' own for a band of the kernels, which no element need be asked."""
    if mask_function is masking_utils.bidirectional_mask_function:
        return True
    if q_offset + q_length != kv_offset + kv_length:
        return False
    window = _causal_window(options)
    return mask_function is masking_utils.causal_mask_function or (
        window is not None and _is_same(mask_function, masking_utils.sliding_window_causal_mask_function(window))
    )


def _is_same(one, other) -> bool:
    """Whether two functions have the same code and, in their closures, the same numbers and such functions."""
    if type(one) is not type(other):
        return False
    if isinstance(one, tuple):
        return len(one) == len(other) and all(map(_is_same, one, other))
    if not inspect.isfunction(one):
        return isinstance(one, int) and one == other
    cells = (tuple(cell.cell_contents for cell in function.__closure__ or ()) for function in (one, other))
    return one.__code__ is other.__code__ and _is_same(*cells)


def _check_is_band(mask_function, batch_size, q_length, kv_length, q_offset, kv_offset, options) -> None:
    """Compare every element of the mask where the key is no padding, some rows at a time."""
    device = options.get("device", "cpu")
    tokens = options.get("attention_mask")  # (batch, kv_length or more; less before a cache with room)
    padding = False
    if tokens is not None:
        tokens = torch.nn.functional.pad(tokens, (0, max(kv_length - tokens.shape[1], 0)))
        padding = ~tokens[:, None, None, -kv_length:].to(device, torch.bool)
    window = _causal_window(options)
    kv_idx = torch.arange(kv_offset, kv_offset + kv_length, device=device)
    shift = (kv_offset + kv_length) - (q_offset + q_length)  # of the kernels: the last query's own key is the last one
    fits = {"full", "causal"} | ({"window"} if window is not None else set())
    rows = max(1, MASK_ELEMENTS // (batch_size * kv_length))
    for first in range(q_offset, q_offset + q_length, rows):
        count = min(rows, q_offset + q_length - first)
        visible = masking_utils.sdpa_mask(
            batch_size, count, kv_length, first, kv_offset, mask_function, allow_is_causal_skip=False,
            use_vmap=options.get("use_vmap", False), device=device,
        )  # fmt: skip
        diagonal = torch.arange(first, first + count, device=device)[:, None] + shift
        bands = {"full": kv_idx <= kv_idx[-1], "causal": kv_idx <= diagonal}
        if window is not None:
            bands["window"] = bands["causal"] & (kv_idx > diagonal - window)
        fits = {name for name in fits if bool(((visible == bands[name]) | padding).all())}
        if not fits:
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
    window = _window(module, options.get("sliding_window"), is_causal, key.shape[2])
    if threshold is not None and _is_dense(module):
        threshold = None
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
        result = _attend_unpadded(module, query, key, value, attention_mask, threshold, arguments)
    if on_stats is not None:
        on_stats(module, result.stats)
        result = result.out
    return result.to(dtype)


def _window(module, window: int | None, is_causal: bool, seqlen_k: int) -> int | None:
    """Keys that a query of the layer sees, its own the last of them; None: all."""
    own = getattr(module, "sliding_window", None) if getattr(module, "is_sliding", True) else None
    if window is None and own is not None and own < seqlen_k:
        raise NotImplementedError(f"{type(module).__name__} does not give its window to its attention function")
    if window is None or is_causal:
        return window
    if window < seqlen_k:
        raise NotImplementedError(f"the window of {type(module).__name__}, on both sides of a query, is not supported")
    return None


def _is_dense(module) -> bool:
    dense = getattr(module, DENSE, None)
    if dense is None and _ignored(getattr(module, "config", None)):
        raise ValueError("the model's config names layers that stay dense: call keep_dense(model, patterns) with them")
    return bool(dense)


def _ignored(config) -> bool:
    """Whether NVIDIA Model Optimizer wrote into the model's config.json that a threshold is not for some layers."""
    section = getattr(config, "sparse_attention_config", None)
    groups = section.get("config_groups") if isinstance(section, dict) else None
    return isinstance(groups, dict) and any(group.get("ignore") for group in groups.values())


def _of(threshold, keys: int | torch.Tensor) -> Threshold:
    return threshold(keys) if callable(threshold) else threshold


def _attend_unpadded(module, query, key, value, mask, threshold, arguments):
    """mask bool (batch, seqlen_k). Of self-attention, padding rows of the result are 0; in cross-attention, every query
    is computed, because it is a token of another sequence, of which the mask does not tell."""
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
    of_the_keys = arguments["causal"] or (seqlen_q == mask.shape[1] and _is_self_attention(type(module)))
    q_mask = mask[:, -seqlen_q:] if of_the_keys else mask.new_ones((batch, seqlen_q))
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


@functools.cache
def _is_self_attention(kind: type[torch.nn.Module]) -> bool:
    """Whether such modules are given no states but those of the queries' own tokens."""
    return SELF_ATTENTION_ARGUMENTS.issuperset(inspect.signature(kind.forward).parameters)


def _is_one_run(mask: torch.Tensor) -> bool:
    """Whether the tokens of each row lie side by side, so that packed they are as far apart as they were."""
    begins = mask[:, 1:] & ~mask[:, :-1]
    return bool((begins.sum(1) + mask[:, 0] <= 1).all())
