"""Hard negatives are never a true pair, and contrastive targets are what they say."""

import numpy as np
import pytest
import torch
from helpers import tiny_batch
from torch.nn import functional as F

from encoders.types import Batch
from objectives import ItcConfig, ItmConfig
from objectives.base import Draw, Embed, Fuse, Fused, ModelSpec, Results
from objectives.itc import contrastive, similarities

SPEC = ModelSpec(
    vocabulary_size=9, text_width=4, pooled_width=4, decoder_width=None, embed_width=4, word_embedding=None
)


def random_batch(seed: int) -> tuple[Batch, Results]:
    """Up to 9 images with one or two captions each, ids and captions from small sets, embeds that often coincide."""
    generator = np.random.default_rng(seed)
    n = int(generator.integers(1, 10))
    own = np.sort(np.concatenate([np.arange(n), generator.integers(0, n, int(generator.integers(0, 4)))]))
    images, texts = tiny_batch(n).images, tiny_batch(len(own)).texts
    batch = Batch(
        images=images,
        texts=texts,
        image_of_text=None if len(own) == n else torch.from_numpy(own),
        image_id=torch.from_numpy(generator.integers(0, 6, n)),
        caption_id=torch.from_numpy(generator.integers(0, 6, len(own))),
        seen=int(generator.integers(0, 300)),
    )
    results = Results({"main": torch.tensor([float(generator.uniform(0, 4.6))])})
    for name, rows in (("image", n), ("text", len(own))):
        vectors = torch.from_numpy(generator.integers(-2, 3, (rows, 4)).astype(np.float32)) + 0.01
        results[Embed(name)] = F.normalize(vectors, dim=-1)
    return batch, results


def is_true(batch: Batch, image: int, text: int) -> bool:
    """By definition: the text's own image, or one of equal id, or one that has a caption of equal words."""
    own = batch.image_of_text.tolist() if batch.image_of_text is not None else list(range(batch.num_texts))
    ids, words = batch.image_id.tolist(), batch.caption_id.tolist()
    captions_of_image = [words[t] for t, i in enumerate(own) if i == image]
    return own[text] == image or ids[own[text]] == ids[image] or words[text] in captions_of_image


@pytest.mark.parametrize(
    "settings", [{}, {"random_until": 100, "hard_from": 200}, {"negatives": "random"}, {"floor": 1e-4}, {"number": 3}]
)
def test_negatives_are_never_true_pairs(settings):
    objective = ItmConfig(**settings).build(SPEC)
    found, missing = 0, 0
    for seed in range(150):
        batch, results = random_batch(seed)
        rows = objective.rows(results, batch, Draw(1, seed))["itm"]
        own = batch.image_of_text.tolist() if batch.image_of_text is not None else list(range(batch.num_texts))
        pairs = list(zip(rows.image_index.tolist(), rows.text_index.tolist(), strict=True))
        assert len(pairs) == 2 * objective.config.number * batch.num_texts
        for number, (image, text) in enumerate(pairs):
            first_half, at = number < len(pairs) / 2, number % batch.num_texts
            # A false image for each text, then a false text for each text's image.
            assert text == at if first_half else image == own[at]
            others = range(batch.num_images) if first_half else range(batch.num_texts)
            false = {n for n in others if not (is_true(batch, n, at) if first_half else is_true(batch, own[at], n))}
            before = pairs[at if first_half else len(pairs) // 2 + at : number : batch.num_texts]
            if (image, text) == (own[at], at):  # all false ones are drawn already: the row has no loss
                assert {pair[0 if first_half else 1] for pair in before} - {own[at] if first_half else at} == false
                missing += 1
            else:
                assert not is_true(batch, image, text) and (image, text) not in before
                found += 1
    assert found > 1000 and missing > 10


def test_replaced_images_are_never_true_pairs():
    objective = ItmConfig(scheme="replace_image").build(SPEC)
    replaced = total = 0
    for seed in range(100):
        batch, results = random_batch(seed)
        rows = objective.rows(results, batch, Draw(1, seed))["itm"]
        own = batch.image_of_text.tolist() if batch.image_of_text is not None else list(range(batch.num_texts))
        for image, text in zip(rows.image_index.tolist(), rows.text_index.tolist(), strict=True):
            assert image == own[text] or not is_true(batch, image, text)
            replaced, total = replaced + (image != own[text]), total + 1
    assert 0.3 < replaced / total < 0.6


def test_rows_are_a_function_of_the_draw():
    objective = ItmConfig().build(SPEC)
    batch, results = random_batch(3)

    def rows(*key):
        found = objective.rows(results, batch, Draw(*key))["itm"]
        return [*found.image_index.tolist(), *found.text_index.tolist()]

    assert rows(1, 2, 3) == rows(1, 2, 3)
    assert len({tuple(rows(*key)) for key in ((1, 2, 3), (2, 2, 3), (1, 3, 3), (1, 2, 4))}) > 1


def test_hard_negatives_follow_the_similarity_and_the_ramp_leads_there():
    """Each text's only similar false image is drawn almost always when hard, one time in three at random."""
    batch = tiny_batch(4)
    results = Results({"main": torch.tensor([4.6])})
    results[Embed("image")] = torch.eye(4)
    results[Embed("text")] = F.normalize(torch.eye(4) + 0.9 * torch.eye(4).roll(1, 0), dim=1)
    objective = ItmConfig(random_until=100, hard_from=200).build(SPEC)
    hardest = (results[Embed("text")] @ results[Embed("image")].T - 9 * torch.eye(4)).argmax(1)
    shares = []
    for seen in (100, 150, 200):
        at = Batch(images=batch.images, texts=batch.texts, image_id=batch.image_id, seen=seen)
        drawn = [objective.rows(results, at, Draw(0, step))["itm"].image_index[:4] for step in range(200)]
        shares.append((torch.stack(drawn) == hardest).float().mean().item())
    assert shares == pytest.approx([1 / 3, 2 / 3, 1], abs=0.05)


@pytest.mark.parametrize("listwise", [0.0, 0.5])
def test_rows_without_a_negative_have_no_loss(listwise):
    objective = ItmConfig(listwise=listwise).build(SPEC)
    batch = tiny_batch(3, ids=[5, 5, 5])
    results = random_batch(0)[1]
    results[Embed("image")] = results[Embed("text")] = torch.eye(4)[:3]
    results.rows = objective.rows(results, batch, Draw(0))
    generator = torch.Generator().manual_seed(0)
    pooled = torch.randn(9, 4, generator=generator)
    results[Fuse()] = Fused(None, None, pooled[:3])
    results[Fuse(rows="itm")] = Fused(None, None, pooled[3:].requires_grad_())
    loss = objective(results, batch, Draw(0)).loss
    loss.backward()
    assert results[Fuse(rows="itm")].pooled.grad.abs().max() == 0
    assert loss.isfinite() and loss > 0


def test_lists_are_each_texts_images_and_each_images_texts():
    """Against the definition, pair by pair; false pairs that were not found are in no list."""
    objective = ItmConfig(number=2, listwise=0.7).build(SPEC)
    plain = ItmConfig(number=2).build(SPEC)
    plain.load_state_dict(objective.state_dict())
    generator = torch.Generator().manual_seed(1)
    lists_of_one = 0
    for seed in range(30):
        batch, results = random_batch(seed)
        results.rows = objective.rows(results, batch, Draw(1, seed))
        rows, texts = results.rows["itm"], batch.num_texts
        own = batch.image_of_text.tolist() if batch.image_of_text is not None else list(range(texts))
        results[Fuse()] = Fused(None, None, torch.randn(texts, 4, generator=generator))
        results[Fuse(rows="itm")] = Fused(None, None, torch.randn(4 * texts, 4, generator=generator))
        true, false = (objective.log_odds(results[one].pooled) for one in (Fuse(), Fuse(rows="itm")))
        losses = []
        for text in range(texts):
            for first in (0, 2 * texts):  # false images of this text, then false texts of its image
                at = [first + text, first + texts + text]
                drawn = [(rows.image_index[n].item(), rows.text_index[n].item()) for n in at]
                scores = [false[n] for n, pair in zip(at, drawn, strict=True) if pair != (own[text], text)]
                lists_of_one += not scores
                losses.append(-torch.stack([true[text], *scores]).log_softmax(0)[0])
        expected = plain(results, batch, Draw(0)).loss + 0.7 * torch.stack(losses).mean()
        torch.testing.assert_close(objective(results, batch, Draw(0)).loss, expected)
    assert lists_of_one > 5
    assert objective.chance(9) == pytest.approx(plain.chance(9) + 0.7 * np.log(3))


def test_lists_want_false_pairs_of_their_own():
    with pytest.raises(ValueError, match=r"objectives\.itm\.listwise 1 .* use scheme both"):
        ItmConfig(scheme="replace_image", listwise=1).build(SPEC)


def test_contrastive_loss_with_several_positives():
    """Against the definition, pair by pair."""
    for seed in range(20):
        batch, results = random_batch(seed)
        image, text, scale = results[Embed("image")], results[Embed("text")], results.scales["main"].exp()
        output = ItcConfig().build(SPEC)(results, batch, Draw(0))
        logits = scale * image @ text.T
        true = torch.tensor([[is_true(batch, i, t) for t in range(text.shape[0])] for i in range(image.shape[0])])
        by_image = [-logits[i].log_softmax(0)[true[i]].mean() for i in range(image.shape[0]) if true[i].any()]
        by_text = [-logits[:, t].log_softmax(0)[true[:, t]].mean() for t in range(text.shape[0])]
        wanted = (torch.stack(by_image).sum() / image.shape[0] + torch.stack(by_text).mean()) / 2
        torch.testing.assert_close(output.loss, wanted, rtol=1e-5, atol=1e-6)


def test_one_positive_is_cross_entropy():
    logits = torch.randn(5, 5, generator=torch.Generator().manual_seed(1))
    expected = F.cross_entropy(logits, torch.arange(5))
    torch.testing.assert_close(contrastive(logits, torch.eye(5, dtype=torch.bool)), expected)


def test_masks_do_not_depend_on_ranks():
    """A sample's view is drawn from (seed, view, position): the same alone, in any batch, on any rank."""
    from encoders.types import Vocabulary
    from objectives.mlm import MaskedView

    vocabulary = Vocabulary(size=50, pad=0, cls=1, sep=2, mask=3, bos=1, eos=2)
    view = MaskedView(0.3, whole_word=False)
    ids = np.array([1, 10, 11, 12, 13, 14, 15, 16, 2])
    starts = np.ones(9, dtype=bool)

    def make(positions, rank):
        return {
            p: view.make(ids, starts, vocabulary, Draw(7, 99, rank).sample("masked", p)).ids.tolist() for p in positions
        }

    one = make(range(8), 0)
    two = make(range(0, 4), 0) | make(range(4, 8), 1)
    assert one == two
    assert len({tuple(x) for x in one.values()}) > 1


def test_similarities_keep_their_precision_under_autocast():
    left, right = (F.normalize(torch.randn(64, 32, generator=torch.Generator().manual_seed(i)), dim=-1) for i in (0, 1))
    scale = torch.tensor([np.log(100.0)], dtype=torch.float32)
    wanted = 100 * left.double() @ right.double().T
    with torch.autocast("cpu", torch.bfloat16):
        found = similarities(left, right, scale)
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=1e-4)
