import io
import logging
import math
import pickle
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from PIL import Image

from objectives.lm import CausalView
from objectives.mlm import MaskedView
from vlp.config import build
from vlp.data.batch import Example, stable_hash
from vlp.data.fetch import image_identity, pair_example
from vlp.data.loader import DataConfig, Loader, check_hash
from vlp.data.reader import BadSample, RawSample, Sample
from vlp.data.tokenizer import TokenizerConfig, build_tokenizer
from vlp.data.transforms import ImageTransformConfig

SIZE = 23
WORDS = [f"w{i}" for i in range(SIZE)]
VIEWS = {"masked": MaskedView(0.5, False), "causal": CausalView()}


def png(value):
    """An image whose left half is brighter, so that a flip shows."""
    pixels = np.full((6, 8, 3), value, dtype=np.uint8)
    pixels[:, :4] += 50
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


IMAGES = [png(i) for i in range(SIZE)]


@dataclass
class MemoryReader:
    """A reader without files; ``bad`` images are broken, ``texts`` replaces a sample's captions."""

    size: int = SIZE
    bad: tuple[int, ...] = ()
    texts: dict[int, list[str]] | None = None
    fingerprint: str = "abc"

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        assert 0 <= index < self.size
        data = b"broken" if index in self.bad else IMAGES[index % SIZE]
        captions = (self.texts or {}).get(index, [f"{WORDS[index % SIZE]} a b c d e f", f"{WORDS[index % SIZE]} again"])
        return RawSample(f"k{index}", "memory", {"png": data}, {"captions": captions})


@pytest.fixture(scope="module")
def tokenizer():
    captions = [f"{word} a b c d e f again left" for word in WORDS] * 2
    return build_tokenizer(TokenizerConfig(size=200), captions)


def config(**changes):
    settings = {"workers": 0, "transform": ImageTransformConfig(image_size=4, rotation=20.0, color_jitter=0.2)}
    return DataConfig(**settings | changes)


def make(tokenizer, reader=None, prepare=pair_example, data=None, **options):
    settings = {"seed": 3, "global_batch": 8} | options
    return Loader(reader or MemoryReader(), prepare, tokenizer, VIEWS, data or config(), **settings)


def tensors(batch):
    """Every sample of a batch by position: all that training sees of it."""
    found = {}
    for row, position in enumerate(batch.position.tolist()):
        views = [
            (
                name,
                texts.ids[row][texts.keep[row]].tolist(),
                None if texts.labels is None else texts.labels[row][texts.keep[row]].tolist(),
            )
            for name, texts in batch.texts.items()
        ]
        pixels = batch.images["clean"].pixels[row].tolist()
        found[position] = (pixels, views, batch.image_id[row].item(), batch.caption_id[row].item())
    return found


def samples(steps):
    found = {}
    for batches in steps:
        for batch in batches:
            found |= tensors(batch)
    return found


@pytest.fixture(scope="module")
def expected(tokenizer):
    """Three and a half epochs, in one process."""
    return samples(make(tokenizer).steps(0, 80))


def test_every_position_once_and_epochs_differ(expected):
    assert sorted(expected) == list(range(80))
    ids = [[expected[p][2] for p in range(e * SIZE, (e + 1) * SIZE)] for e in range(3)]
    assert all(sorted(epoch) == sorted(ids[0]) for epoch in ids) and ids[0] != ids[1]
    assert len(set(ids[0])) == SIZE
    # The same sample looks, reads and is masked otherwise in the next epoch.
    again = {p: ids[1].index(ids[0][p]) + SIZE for p in range(SIZE)}
    assert sum(expected[p][0] != expected[q][0] for p, q in again.items()) > SIZE / 2
    assert 0 < sum(expected[p][3] != expected[q][3] for p, q in again.items()) < SIZE


@pytest.mark.parametrize("world, micro_batches", [(1, 3), (2, 1), (2, 2), (3, 2), (5, 4)])
def test_ranks_and_micro_batches_change_no_sample(tokenizer, expected, world, micro_batches):
    ranks = [list(make(tokenizer, micro_batches=micro_batches, rank=r, world=world).steps(0, 80)) for r in range(world)]
    parts = [samples(steps) for steps in ranks]
    assert sum(len(part) for part in parts) == 80
    assert {p: s for part in parts for p, s in part.items()} == expected
    for steps in zip(*ranks, strict=True):
        assert len({len(batches) for batches in steps}) == 1  # equally many micro-batches
        order = [p for batches in steps for batch in batches for p in batch.position.tolist()]
        assert order == list(range(steps[0][0].seen, steps[0][0].seen + 8))  # a step in rank order is the global batch


@pytest.mark.parametrize("start", [8, 40, 43])
def test_resuming_anywhere(tokenizer, expected, start):
    found = samples(make(tokenizer).steps(start, 80))
    assert found == {p: s for p, s in expected.items() if p >= start}


def test_workers_change_nothing_and_leave_the_global_generator(tokenizer, expected):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    loader = make(tokenizer, data=config(workers=2), micro_batches=2)
    found = samples(loader.steps(32, 80))
    assert found == {p: s for p, s in expected.items() if p >= 32}
    assert torch.equal(before, torch.get_rng_state())


def test_seeds_differ(tokenizer, expected):
    assert samples(make(tokenizer, seed=4).steps(0, 8)) != {p: expected[p] for p in range(8)}


def test_unshuffled(tokenizer):
    loader = make(tokenizer, shuffle=False)
    ids = [i for (batch,) in loader.steps(0, 16) for i in batch.image_id.tolist()]
    assert ids == [stable_hash(f"k{i}") for i in range(16)]


def test_the_last_step_is_short_and_uneven(tokenizer):
    ranks = [list(make(tokenizer, rank=r, world=3, micro_batches=2, global_batch=12).steps(0, 41)) for r in range(3)]
    assert [[b.seen for b in batches] for batches in ranks[0]] == [[0, 0], [12, 12], [24, 24], [36]]
    assert all(batch.counts is None for batches in ranks[0][:3] for batch in batches)
    # 5 samples on 3 ranks: 2, 2, 1; the rank with one cannot cut it, so nobody does.
    last = [steps[-1] for steps in ranks]
    assert [b.position.tolist() for (b,) in last] == [[36, 37], [38, 39], [40]]
    assert all(b.counts == ((2, 2), (2, 2), (1, 1)) for (b,) in last)


def test_counts_where_micro_batches_differ(tokenizer):
    ranks = [next(iter(make(tokenizer, rank=r, world=2, micro_batches=2, global_batch=7).steps(0, 7))) for r in (0, 1)]
    sizes = [[b.num_texts for b in batches] for batches in ranks]
    assert sizes == [[2, 2], [2, 1]]
    for k in range(2):
        counts = tuple((batches[k].num_images, batches[k].num_texts) for batches in ranks)
        assert all(b[k].counts == (None if counts[0] == counts[1] else counts) for b in ranks)


def test_a_rest_smaller_than_the_ranks_is_left_out(tokenizer, caplog):
    caplog.set_level(logging.INFO)
    steps = list(make(tokenizer, rank=1, world=4).steps(0, 19))
    assert [batch.position.tolist() for (batch,) in steps] == [[2, 3], [10, 11]]
    assert "the last 3 samples are fewer than the 4 ranks" in caplog.text
    assert list(make(tokenizer).steps(16, 16)) == []
    with pytest.raises(ValueError, match="global_batch 8 is less than the 9 ranks"):
        make(tokenizer, world=9)


def test_a_bad_sample_is_replaced_by_the_next_good_one(tokenizer, caplog):
    reader = MemoryReader(bad=(3, 4, 22))
    lenient = config(bad_samples=0.5)
    loader = make(tokenizer, reader, data=lenient, shuffle=False)
    steps = list(loader.steps(0, 46))
    ids = [i for (batch,) in steps for i in batch.image_id.tolist()]
    assert ids[:SIZE] == [stable_hash(f"k{ {3: 5, 4: 5, 22: 0}.get(i, i) }") for i in range(SIZE)]
    assert ids[SIZE:] == ids[:SIZE] and len(steps) == 6
    assert sorted(loader.bad) == ["'k22'", "'k3'", "'k4'"] and "not an image" in loader.bad["'k3'"]
    assert caplog.text.count("bad sample 'k3'") == 1
    loader.report_bad()
    assert "3 samples were bad, of 46 read" in caplog.text
    for data in (lenient, config(bad_samples=0.5, workers=2)):
        parts = [make(tokenizer, reader, data=data, rank=r, world=2) for r in range(2)]
        found = samples(step for part in parts for step in part.steps(0, 46))
        assert found == samples(make(tokenizer, reader, data=lenient).steps(0, 46))
        assert set().union(*(part.bad for part in parts)) == {"'k3'", "'k4'", "'k22'"}


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_bad_samples_stop_the_run(tokenizer, workers):
    reader = MemoryReader(size=400, bad=tuple(range(100, 140)))
    loader = make(tokenizer, reader, data=config(workers=workers), shuffle=False)
    with pytest.raises(
        ValueError, match=r"^data: \d+ of the \d+ samples read so far are bad, more than .*'k100': "
    ) as caught:
        list(loader.steps(80, 400))
    assert "\n" not in str(caught.value) and "raise data.bad_samples" in str(caught.value)


def test_what_is_tolerated(tokenizer):
    def run(reader, end, **changes):
        return sum(len(b) for b in make(tokenizer, reader, data=config(**changes), shuffle=False).steps(0, end))

    ten = MemoryReader(size=200, bad=tuple(range(0, 20, 2)))
    assert run(ten, 24) == 3
    assert run(MemoryReader(bad=(1, 5, 9)), 24) == 3  # an eighth of 23, rounded up
    with pytest.raises(ValueError, match="4 of the"):
        run(MemoryReader(bad=(1, 5, 9, 11)), 24)
    with pytest.raises(ValueError, match="1 of the 8 samples"):
        run(MemoryReader(bad=(1,)), 24, bad_samples=0)
    assert run(MemoryReader(size=300, bad=tuple(range(0, 60, 2))), 300, bad_samples=0.9) == math.ceil(300 / 8)


@pytest.mark.parametrize("workers", [0, 1])
def test_nothing_but_bad_samples(tokenizer, workers):
    loader = make(tokenizer, MemoryReader(size=5, bad=tuple(range(5))), data=config(bad_samples=1.0, workers=workers))
    with pytest.raises(ValueError, match="5 samples in a row are unusable, the first is 'k") as caught:
        list(loader.steps(0, 8))
    assert "\n" not in str(caught.value)


def test_captions_are_drawn_and_empty_ones_dropped(tokenizer):
    sample = Sample("k", (), ("", "one", " ", "two"), {})
    drawn = {pair_example(sample, np.random.default_rng(i)).text for i in range(20)}
    assert drawn == {"one", "two"}
    for texts in ((), ("", " \n")):
        with pytest.raises(BadSample, match="no caption, or an empty one"):
            pair_example(Sample("k", (), texts, {}), np.random.default_rng(0))
    reader = MemoryReader(texts={0: ["", "w1"], 1: [" ", ""], 2: ["w2 \ud800"]})
    loader = make(tokenizer, reader, shuffle=False, data=config(bad_samples=0.5))
    (batch,) = next(iter(loader.steps(0, 8)))
    assert batch.caption_id[0] == stable_hash("w1") and batch.image_id[1:3].tolist() == [stable_hash("k3")] * 2
    assert set(loader.bad) == {"'k1'", "'k2'"} and "not Unicode" in loader.bad["'k2'"]


def test_images_are_mirrored_only_where_no_text_says_left(tokenizer):
    said = {i: ["w1 a"] if i % 2 else ["w1 a on the left"] for i in range(SIZE)}
    plain = config(transform=ImageTransformConfig(image_size=4))

    def mirrored(prepare, texts):
        loader = make(tokenizer, MemoryReader(texts=texts), prepare, plain, shuffle=False)
        pixels = torch.cat([b.images["clean"].pixels for (b,) in loader.steps(0, 4 * SIZE)])
        return (pixels[:, 0, 0, 0] < pixels[:, 0, 0, 3]).tolist()

    flips = mirrored(pair_example, said)
    assert {i % SIZE % 2 for i, flip in enumerate(flips) if flip} == {1} and 20 < sum(flips) < 70
    # A task that makes its text of a field is held to the same rule.
    fields = {i: [{"answer": "left"}] for i in range(SIZE)}
    assert not any(mirrored(answer_example, fields))


def answer_example(sample, generator):
    return Example(sample.key, sample.images, "w1")


@dataclass
class QuestionReader(MemoryReader):
    """Five questions each about three images; the fourth image has one."""

    size: int = 16

    def __getitem__(self, index):
        image = index % 3 if index < 15 else 3
        data = b"broken" if image in self.bad else IMAGES[image]
        return RawSample(f"q{index}", "memory", {"png": data}, {"image_id": image}, (f"w{index}",))


def words(batch, tokenizer):
    """Each text of a batch, image by image."""
    texts = [tokenizer.decode(ids.tolist()) for ids in batch.texts["clean"].ids]
    return [[t for t, i in zip(texts, batch.image_of_text.tolist(), strict=True) if i == n] for n in range(4)]


def test_samples_of_a_group_are_texts_of_one_image(tokenizer):
    data = config(group="image_id", texts_per_image=3)
    loader = make(tokenizer, QuestionReader(), data=data, global_batch=4)
    assert loader.order.size == 4
    seen = set()
    for (batch,) in loader.steps(0, 80):
        assert batch.num_images == 4 and batch.num_texts == 12 and batch.counts is None
        assert sorted(batch.image_id.tolist()) == sorted(stable_hash(str(i)) for i in range(4))
        for image, texts in zip(batch.image_id.tolist(), words(batch, tokenizer), strict=True):
            own = next(i for i in range(4) if stable_hash(str(i)) == image)
            numbers = [int(text.removeprefix("w")) for text in texts]
            assert all((n % 3 if n < 15 else 3) == own for n in numbers)
            assert len(set(numbers)) == (1 if own == 3 else 3)  # repeated only where there are too few
            seen |= set(numbers)
    assert seen == set(range(16))


def test_captions_of_a_sample_are_texts_of_one_image(tokenizer):
    (batch,) = next(iter(make(tokenizer, data=config(texts_per_image=2)).steps(0, 8)))
    assert batch.num_images == 8 and batch.num_texts == 16
    captions = batch.caption_id.view(8, 2)
    assert (captions[:, 0] != captions[:, 1]).all()  # both captions, in either order
    assert len(set(captions.flatten().tolist())) == 16


def test_several_texts_do_not_depend_on_ranks_or_workers(tokenizer):
    def run(**options):
        data = config(group="image_id", texts_per_image=3, workers=options.pop("workers", 0))
        return list(make(tokenizer, QuestionReader(), data=data, **options).steps(0, 13))

    def texts(steps):
        return [
            row.tolist()
            for batches in steps
            for b in batches
            for row in b.texts["masked"].ids.view(b.num_images, 3, -1)
        ]

    one, ranks = run(), [run(rank=r, world=2, workers=r) for r in range(2)]
    joined = [row for steps in zip(*ranks, strict=True) for row in texts(steps)]
    assert joined == texts(one)
    # Thirteen images are eight and five: the last step's ranks differ, in images and in texts.
    assert [steps[-1][0].counts for steps in ranks] == [((3, 9), (2, 6))] * 2
    assert [steps[-1][0].position.tolist() for steps in ranks] == [[8, 9, 10], [11, 12]]


def test_a_bad_image_is_replaced_with_all_its_texts(tokenizer):
    data = config(group="image_id", texts_per_image=2, bad_samples=1.0)
    loader = make(tokenizer, QuestionReader(bad=(1,)), data=data, global_batch=4)
    (batch,) = next(iter(loader.steps(0, 4)))
    assert batch.num_texts == 8 and stable_hash("1") not in batch.image_id.tolist()
    assert len(loader.bad) == 1


def test_mistakes_in_grouping(tokenizer):
    with pytest.raises(ValueError, match=r"data\.group 'scene': no sample has such a field"):
        make(tokenizer, QuestionReader(), data=config(group="scene"))
    loader = make(tokenizer, prepare=pair_example, data=config(texts_per_image=2), reader=PairReader())
    with pytest.raises(ValueError, match="texts_per_image 2 shares one image, but sample 'k0' has 2; set it to 1"):
        next(iter(loader.steps(0, 8)))


@dataclass
class PairReader(MemoryReader):
    """Two images a sample."""

    size: int = 1

    def __getitem__(self, index):
        return RawSample("k0", "memory", {"0.png": IMAGES[0], "1.png": IMAGES[1]}, {}, ("w1", "w2"))


def test_image_identity():
    raw = RawSample("7", "t", {"png": IMAGES[0]}, {}, ("w1",))
    other = RawSample("8", "t", {"png": IMAGES[0]}, {}, ("w2",))
    third = RawSample("7", "t2", {"png": IMAGES[1]}, {}, ("w1",))
    plain = Sample("7", (), (), {})
    assert image_identity(raw, plain) == image_identity(other, plain) != image_identity(third, plain)
    assert image_identity(RawSample("7", "s.tar", {"png": b""}), plain) == stable_hash("7")
    assert image_identity(raw, Sample("7", (), (), {"image_id": 12})) == stable_hash("12")


def test_a_task_may_give_its_own_image_id(tokenizer):
    (batch,) = next(iter(make(tokenizer, prepare=numbered_example).steps(0, 8)))
    assert batch.image_id.tolist() == [5] * 8


def numbered_example(sample, generator):
    return Example(sample.key, sample.images, "w1", image_id=5)


@pytest.mark.parametrize("workers", [0, 1])
def test_mistakes_in_workers_arrive_in_one_line(tokenizer, workers):
    loader = make(tokenizer, prepare=uneven_example, data=config(workers=workers))
    with pytest.raises(ValueError, match="all samples of a task need the same number") as caught:
        list(loader.steps(0, 8))
    assert "\n" not in str(caught.value)
    assert "uneven" not in str(caught.value) and "collate" in caught.value.__notes__[0]  # the place is not lost


def uneven_example(sample, generator):
    return Example(sample.key, sample.images * (1 + int(generator.integers(2))), "w1")


def test_config_and_hash():
    data = build(DataConfig, {"train": ["a.tar", "b.tar"], "where": {"split": "train", "fold": 3}, "max_length": 12})
    assert data.train == ("a.tar", "b.tar") and data.where == {"split": "train", "fold": 3}
    check_hash(MemoryReader(), data)
    check_hash(MemoryReader(), config(hash="abc"))
    with pytest.raises(ValueError, match=r"data.hash old is not that of data.train \(abc\)"):
        check_hash(MemoryReader(), config(hash="old"))


def test_what_workers_get_pickles(tokenizer):
    loader = make(tokenizer)
    slots = [(0, 5), (1, 6)]
    main = loader._fetches.by_source["main"]
    other = pickle.loads(pickle.dumps(main))
    assert tensors(other[slots].batch) == tensors(main[slots].batch)


def test_images_come_again_with_another_augmentation(tokenizer):
    """The view "again" is of the same images, drawn by position too, and changes nothing of the others."""
    steps = [batch for batches in make(tokenizer).steps(0, 16) for batch in batches]
    both = [batch for batches in make(tokenizer, again=True).steps(0, 16) for batch in batches]
    other = [batch for batches in make(tokenizer, again=True, micro_batches=2).steps(0, 16) for batch in batches]
    for alone, batch in zip(steps, both, strict=True):
        assert "again" not in alone.images and tensors(alone) == tensors(batch)
        clean, again = batch.images["clean"].pixels, batch.images["again"].pixels
        assert again.shape == clean.shape and again.dtype == clean.dtype and not torch.equal(again, clean)
    pixels = [torch.cat([batch.images["again"].pixels for batch in batches]) for batches in (both, other)]
    assert torch.equal(*pixels)
