"""Recall and the chunked top-k against a brute force of a few lines."""

import pytest
import torch

from downstream.metrics import retrieval_metrics, topk_chunked


@pytest.mark.parametrize("chunk", [1, 3, 7, 1000])
@pytest.mark.parametrize("k", [1, 5, 40, 99])
def test_topk_is_a_stable_sort_of_all_similarities(chunk, k):
    generator = torch.Generator().manual_seed(k)
    # Small integers: exact in float32 and full of ties, negative scores and zeros of both signs included.
    queries, keys = (torch.randint(-2, 3, (n, 4), generator=generator).float() for n in (11, 40))
    full = queries @ keys.T
    order = full.argsort(dim=1, descending=True, stable=True)[:, :k]
    scores, indices = topk_chunked(queries, keys, k, chunk)
    assert torch.equal(indices, order)
    assert torch.equal(scores, full.gather(1, order))


def test_topk_of_real_embeddings_and_half_precision():
    generator = torch.Generator().manual_seed(0)
    queries, keys = (torch.nn.functional.normalize(torch.randn(n, 16, generator=generator), dim=1) for n in (50, 300))
    scores, indices = topk_chunked(queries, keys, 10, 64)
    expected = (queries @ keys.T).topk(10, dim=1)
    torch.testing.assert_close(scores, expected.values)
    assert torch.equal(indices, expected.indices)
    half, _ = topk_chunked(queries.bfloat16(), keys.bfloat16(), 10, 64)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, scores, atol=2e-2, rtol=0)


def test_topk_refuses_what_cannot_be_ranked():
    x = torch.ones(2, 3)
    with pytest.raises(ValueError, match="k: 0"):
        topk_chunked(x, x, 0)
    with pytest.raises(ValueError, match="keys: 0"):
        topk_chunked(x, x[:0], 1)
    with pytest.raises(ValueError, match="NaN"):
        topk_chunked(x * float("nan"), x, 1)
    assert topk_chunked(x[:0], x, 5)[1].shape == (0, 2)


def brute_force(similarity, image_of_text, k):
    """Recalls from the full matrix, one query at a time."""
    images, texts = similarity.shape
    anyone, mean, back = [], [], []
    for i in range(images):
        own = [t for t in range(texts) if image_of_text[t] == i]
        top = sorted(range(texts), key=lambda t: (-similarity[i, t].item(), t))[:k]
        anyone.append(any(t in top for t in own))
        mean.append(sum(t in top for t in own) / len(own))
    for t in range(texts):
        top = sorted(range(images), key=lambda i: (-similarity[i, t].item(), i))[:k]
        back.append(image_of_text[t] in top)
    return sum(anyone) / images, sum(mean) / images, sum(back) / texts


@pytest.mark.parametrize("seed", range(5))
def test_metrics_equal_brute_force(seed):
    generator = torch.Generator().manual_seed(seed)
    images, texts = 12, 31
    image_of_text = torch.cat([torch.arange(images), torch.randint(images, (texts - images,), generator=generator)])
    image, text = (torch.randint(-2, 3, (n, 5), generator=generator).float() for n in (images, texts))
    text += 2 * image[image_of_text]
    i2t, t2i = topk_chunked(image, text, texts, 7)[1], topk_chunked(text, image, images, 7)[1]
    result = retrieval_metrics(i2t, t2i, image_of_text)
    for k in (1, 5, 10):
        expected = brute_force(image @ text.T, image_of_text.tolist(), k)
        assert (result[f"i2t_any/R@{k}"], result[f"i2t_mean/R@{k}"], result[f"t2i/R@{k}"]) == pytest.approx(expected)
    recalls = [result[f"{side}/R@{k}"] for side in ("i2t_any", "t2i") for k in (1, 5, 10)]
    assert result["rSum"] == pytest.approx(100 * sum(recalls))
    short = retrieval_metrics(i2t[:, :10], t2i[:, :10], image_of_text)
    assert "i2t/median_rank" in result and "i2t/median_rank" not in short
    assert {key: result[key] for key in short} == short


def test_a_case_by_hand():
    # Two images, captions 0 and 1 of image 0, captions 2 and 3 of image 1.
    image_of_text = torch.tensor([0, 0, 1, 1])
    i2t = torch.tensor([[0, 2, 1, 3], [1, 0, 3, 2]])  # image 0: first at rank 1; image 1: first at rank 3
    t2i = torch.tensor([[0, 1], [1, 0], [1, 0], [0, 1]])  # ranks 1, 2, 1, 2
    result = retrieval_metrics(i2t, t2i, image_of_text, ks=(1, 3))
    expected = {
        "i2t_any/R@1": 1 / 2,
        "i2t_mean/R@1": 1 / 4,  # (1/2 + 0) / 2
        "t2i/R@1": 1 / 2,
        "i2t_any/R@3": 1.0,
        "i2t_mean/R@3": 3 / 4,  # (2/2 + 1/2) / 2
        "t2i/R@3": 1.0,
        "rSum": 300.0,
        "i2t/median_rank": 2.0,
        "t2i/median_rank": 1.5,
        "chance/i2t_any/R@1": 1 / 2,  # 2 of 4 texts are its own
        "chance/i2t_mean/R@1": 1 / 4,
        "chance/t2i/R@1": 1 / 2,
        "chance/i2t_any/R@3": 1.0,  # three of four texts cannot all be the other image's
        "chance/i2t_mean/R@3": 3 / 4,
        "chance/t2i/R@3": 1.0,
        "chance/rSum": 300.0,
    }
    assert result == pytest.approx(expected)


def test_one_text_per_image_makes_both_definitions_equal():
    ranked = torch.stack([torch.randperm(20, generator=torch.Generator().manual_seed(s)) for s in range(20)])
    result = retrieval_metrics(ranked, ranked, torch.arange(20))
    assert all(result[f"i2t_any/R@{k}"] == result[f"i2t_mean/R@{k}"] == result[f"t2i/R@{k}"] for k in (1, 5, 10))
    assert [result["chance/t2i/R@1"], result["chance/i2t_any/R@1"]] == pytest.approx([0.05, 0.05])


def test_refusals():
    ranked = torch.arange(20).repeat(20, 1)
    with pytest.raises(ValueError, match="i2t_ranked: 9 ranked candidates cannot give R@10"):
        retrieval_metrics(ranked[:, :9], ranked, torch.arange(20))
    with pytest.raises(ValueError, match="image_of_text: shape"):
        retrieval_metrics(ranked, ranked, torch.arange(19))
    with pytest.raises(ValueError, match="outside the 20 rows"):
        retrieval_metrics(ranked, ranked, torch.arange(20) + 1)
    with pytest.raises(ValueError, match="image 0 has no text"):
        retrieval_metrics(ranked, ranked, torch.arange(20).clamp(min=1))
