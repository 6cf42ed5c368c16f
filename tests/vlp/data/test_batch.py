import string
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from objectives.base import ViewText
from objectives.lm import CausalView
from objectives.mlm import MaskedView
from vlp.data.batch import Example, caption_hash, collate, pad_texts, stable_hash
from vlp.data.tokenizer import TransformersTokenizer

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *string.ascii_lowercase]


@pytest.fixture(scope="module")
def tokenizer():
    backend = Backend(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    names = ("pad", "unk", "cls", "sep", "mask")
    return TransformersTokenizer(
        PreTrainedTokenizerFast(tokenizer_object=backend, **{f"{n}_token": f"[{n.upper()}]" for n in names}), "letters"
    )


def image(value=0, side=4):
    return torch.full((3, side, side), value, dtype=torch.uint8)


def example(text, key="k", images=1, **rest):
    return Example(key, tuple(image(i) for i in range(images)), text, **rest)


@dataclass(frozen=True)
class PrefixView:
    attention: str = "prefix"

    def make(self, ids, word_starts, vocabulary, generator):
        return ViewText(ids, np.append(ids[1:], -100), prefix=1 + int(generator.integers(len(ids) - 1)))


VIEWS = {"masked": MaskedView(0.4, False), "causal": CausalView(), "prefix": PrefixView()}


def view_text(length, labelled=(), prefix=None):
    labels = np.full(length, -100)
    labels[list(labelled)] = 7
    return ViewText(np.arange(1, length + 1), labels if labelled != () else None, prefix)


@pytest.mark.parametrize(
    "lengths, most, expected",
    [((3, 5), 32, 8), ((8, 2), 32, 8), ((9,), 32, 16), ((9, 3), 12, 12), ((3,), None, 8), ((40,), 32, 40)],
)
def test_padding_to_the_longest_rounded_up_and_capped(lengths, most, expected):
    texts = pad_texts([view_text(n) for n in lengths], "full", 99, most)
    assert texts.ids.shape == texts.keep.shape == (len(lengths), expected) and texts.ids.dtype == torch.int64
    assert texts.keep.sum(1).tolist() == list(lengths)
    assert (texts.ids[~texts.keep] == 99).all() and texts.ids[0, : lengths[0]].tolist() == list(
        range(1, lengths[0] + 1)
    )
    assert texts.labels is None and texts.label_at is None and texts.prefix is None and texts.attention == "full"


def test_label_positions_are_flat_and_padded():
    texts = pad_texts([view_text(5, (1, 4)), view_text(6, (0,))], "causal", 0)
    assert texts.label_at.tolist() == [1, 4, 8, -1, -1, -1, -1, -1]
    assert (texts.labels != -100).flatten().nonzero()[:, 0].tolist() == [1, 4, 8]
    nine = pad_texts([view_text(9, range(9))], "full", 0)
    assert nine.label_at.tolist() == [*range(9), *[-1] * 7]
    none = pad_texts([ViewText(np.arange(3), np.full(3, -100))], "full", 0)
    assert none.label_at.tolist() == [-1] * 8 and (none.labels == -100).all()


def test_prefix_and_labels_must_be_there_where_the_view_has_them():
    assert pad_texts([view_text(3, prefix=2), view_text(4, prefix=1)], "prefix", 0).prefix.tolist() == [2, 1]
    with pytest.raises(AssertionError, match="prefix"):
        pad_texts([view_text(3)], "prefix", 0)
    with pytest.raises(AssertionError, match="labels"):
        pad_texts([view_text(3), view_text(3, (1,))], "full", 0)


def test_a_batch_has_the_clean_view_and_the_others(tokenizer):
    batch = collate([example("a b c", "x"), example("d", "y")], [10, 11], tokenizer, VIEWS, 16, seed=1)
    assert set(batch.texts) == {"clean", "masked", "causal", "prefix"}
    assert batch.texts["clean"].ids.tolist() == [[2, 5, 6, 7, 3, 0, 0, 0], [2, 8, 3, 0, 0, 0, 0, 0]]
    assert batch.texts["clean"].labels is None and batch.texts["causal"].attention == "causal"
    assert batch.texts["causal"].labels[0].tolist() == [5, 6, 7, 3, -100, -100, -100, -100]
    assert batch.texts["causal"].label_at.tolist() == [0, 1, 2, 3, 8, 9, -1, -1]
    assert batch.texts["prefix"].prefix.shape == (2,) and batch.texts["masked"].labels.shape == (2, 8)
    assert batch.images["clean"].pixels.shape == (2, 3, 4, 4) and batch.images["clean"].pixels.dtype == torch.uint8
    assert batch.image_of_text is None and batch.position.tolist() == [10, 11] and batch.counts is None
    assert batch.image_id.tolist() == [stable_hash("x"), stable_hash("y")]


def test_masks_of_a_sample_do_not_depend_on_its_batch(tokenizer):
    texts = ["a b c d e f g h", "i j k", "l m n o p q r s t u v w x y z", "a b"]
    whole = collate([example(t) for t in texts], [0, 1, 2, 3], tokenizer, VIEWS, 32, seed=5)
    assert (whole.texts["masked"].labels != -100).any()
    for position, text in enumerate(texts):
        alone = collate([example(text)], [position], tokenizer, VIEWS, 32, seed=5)
        few = collate([example(text)], [position], tokenizer, {"masked": VIEWS["masked"]}, 32, seed=5)
        for name in VIEWS:
            length = int(alone.texts[name].keep.sum())
            for field in ("ids", "labels", "keep"):
                expected = getattr(alone.texts[name], field)[0, :length]
                assert torch.equal(getattr(whole.texts[name], field)[position, :length], expected), (name, field)
        assert whole.texts["prefix"].prefix[position] == alone.texts["prefix"].prefix[0]
        assert torch.equal(few.texts["masked"].ids, alone.texts["masked"].ids)  # other objectives change nothing

    def masked(position, seed):
        return collate([example(texts[2])], [position], tokenizer, VIEWS, 32, seed).texts["masked"].ids.tolist()

    assert masked(2, 5) != masked(3, 5) and masked(2, 5) != masked(2, 6)


def test_views_of_other_texts(tokenizer):
    views = {"lm:answer": CausalView(), "masked": VIEWS["masked"]}
    examples = [example("a b", other_texts={"lm:answer": "z"}), example("c d e", other_texts={"lm:answer": "x y"})]
    batch = collate(examples, [0, 1], tokenizer, views, 16, seed=0)
    assert batch.texts["lm:answer"].ids[:, :4].tolist() == [[2, 30, 3, 0], [2, 28, 29, 3]]
    assert batch.texts["clean"].ids[1, 1].item() == 7
    assert set(collate(examples, [0, 1], tokenizer, {}, 16, seed=0).texts) == {"clean"}


def test_caption_ids_mark_equal_words(tokenizer):
    texts = ["A  cat\non a mat", "a cat on a MAT ", "a cat on the mat", "a cat on a mat"]
    ids = collate([example(t) for t in texts], range(4), tokenizer, {}, 16, seed=0).caption_id
    assert ids.dtype == torch.int64 and ids[0] == ids[1] == ids[3] != ids[2] and (ids >= 0).all()
    assert caption_hash("a cat") == 5867787368591784627  # in every process and on every machine
    assert max(stable_hash(str(i)) for i in range(100)) > 2**62


def test_several_images_per_text(tokenizer):
    batch = collate([example("a", "x", 2), example("b", "y", 2), example("c", "x", 2)], [4, 5, 6], tokenizer, {}, 8, 0)
    assert batch.images["clean"].pixels.shape == (6, 3, 4, 4) and batch.num_texts == 3
    assert batch.images["clean"].pixels[:, 0, 0, 0].tolist() == [0, 1] * 3
    assert batch.image_of_text.tolist() == [[0, 1], [2, 3], [4, 5]] and batch.position.tolist() == [4, 5, 6]
    ids = batch.image_id.tolist()
    assert len(ids) == 6 and ids[:2] == ids[4:] and len(set(ids)) == 4


def test_several_texts_per_image(tokenizer):
    texts, positions = ["a b c d e f g h", "a b", "c d e f g h i j", "c"], [4, 4, 6, 6]
    examples = [example(t, f"k{p}") for t, p in zip(texts, positions)]
    batch = collate(examples, positions, tokenizer, VIEWS, 16, 0)
    assert batch.images["clean"].pixels.shape == (2, 3, 4, 4) and batch.num_texts == 4
    assert batch.image_of_text.tolist() == [0, 0, 1, 1] and batch.position.tolist() == [4, 6]
    assert batch.image_id.tolist() == [stable_hash("k4"), stable_hash("k6")]
    assert batch.caption_id.tolist() == [caption_hash(t) for t in texts]
    # The first text of a position is masked as if it were alone, the others as their number says, whatever the batch.
    alone = [collate([examples[i]], [positions[i]], tokenizer, VIEWS, 16, 0).texts["masked"] for i in range(4)]
    pair = collate(examples[2:], [6, 6], tokenizer, VIEWS, 16, 0).texts["masked"]
    masked = batch.texts["masked"]
    for row, same in ((0, alone[0].ids[0]), (2, alone[2].ids[0]), (2, pair.ids[0]), (3, pair.ids[1])):
        kept = masked.ids[row][masked.keep[row]]
        assert kept.tolist() == same[: len(kept)].tolist()
    long = collate([example("a b c d e f g h i j k l")] * 2, [3, 3], tokenizer, VIEWS, 16, 0).texts["masked"].ids
    assert not torch.equal(long[0], long[1])


def test_several_texts_of_two_images(tokenizer):
    batch = collate([example("a", "x", 2), example("b", "x", 2), example("c", "y", 2)], [4, 4, 5], tokenizer, {}, 8, 0)
    assert batch.image_of_text.tolist() == [[0, 1], [0, 1], [2, 3]] and batch.num_images == 4


def test_texts_alone(tokenizer):
    batch = collate([example("a", images=0)], [0], tokenizer, {}, 8, 0)
    assert batch.images == {} and batch.image_id is None and batch.image_of_text is None and batch.num_texts == 1


def test_targets_are_stacked(tokenizer):
    examples = [
        example("a", targets={"scores": np.eye(3, dtype=np.float32)[i], "label": np.int64(i)}) for i in range(2)
    ]
    targets = collate(examples, [0, 1], tokenizer, {}, 8, 0).targets
    assert targets["scores"].shape == (2, 3) and targets["scores"].dtype == torch.float32
    assert targets["label"].tolist() == [0, 1]


def test_images_that_do_not_fit_together(tokenizer):
    odd = Example("odd", (image(side=5),), "b")
    with pytest.raises(ValueError, match=r"'odd' is \(3, 5, 5\), one of 'k' is \(3, 4, 4\)"):
        collate([example("a"), odd], [0, 1], tokenizer, {}, 8, 0)
    with pytest.raises(ValueError, match="'two' has 2 images, sample 'k' has 1"):
        collate([example("a"), example("b", "two", 2)], [0, 1], tokenizer, {}, 8, 0)
