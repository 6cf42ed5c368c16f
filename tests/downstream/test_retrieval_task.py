"""The two stages of retrieval against brute force, its memory, its ranks, and a model that learns."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from helpers import FIRST_WORD, PIXELS, VOCABULARY, tiny_model
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from toys import COLORS, FILLINGS, TRAIN, caption_table, checkpoint, picture, write_table

import vlp.fusion.dual
from downstream.evaluate import parts_of
from downstream.gallery import Gallery, embed_shares, image_blocks, match_pairs, open_gallery
from downstream.metrics.retrieval import topk_chunked
from downstream.retrieval import ITC, ITM, SUM, RetrievalConfig, data_hash, image_names
from downstream.search import Candidates, Found, Share, choose_weight, true_ranks
from downstream.task import evaluating
from encoders.types import Batch, Images
from objectives import ItcConfig, ItmConfig
from objectives.base import Embed, Fuse
from objectives.itm import Itm
from vlp.checkpoint.load import load
from vlp.config import build
from vlp.data.benchmark import emoji_split_hash
from vlp.data.loader import DataConfig
from vlp.data.reader import BadSample, open_reader
from vlp.run import RunConfig, assemble
from vlp.train.loop import train


def make_gallery(images: int, captions: list[int], seed: int = 0) -> Gallery:
    """Random pixels and words; image i has captions[i % len] texts, of different lengths."""
    draw = np.random.default_rng(seed)
    owner = [i for i in range(images) for _ in range(captions[i % len(captions)])]
    ids = [np.array([1, *draw.integers(FIRST_WORD, VOCABULARY, int(draw.integers(1, 6))), 2]) for _ in owner]
    pixels = [torch.from_numpy(draw.integers(0, 256, (3, PIXELS, PIXELS), dtype=np.uint8)) for _ in range(images)]
    names = [f"image{i}" for i in range(images)]
    return Gallery(pixels, ids, torch.tensor(owner), names, [f"text{i}" for i in range(len(owner))], 0, 8)


def all_pairs(model, gallery: Gallery) -> tuple[torch.Tensor, torch.Tensor]:
    """ITC logits and ITM logits of all pairs [N, S], one image after the other."""
    texts = gallery.texts(range(gallery.num_texts))
    head = next(one for one in model.objectives.values() if isinstance(one, Itm))
    itc, itm = [], []
    with evaluating(model):
        for n in range(gallery.num_images):
            pixels = gallery.pixels[n][None]
            index = torch.zeros(gallery.num_texts, dtype=torch.int64)
            batch = Batch({"clean": Images(pixels)}, {"clean": texts}, image_of_text=index)
            found = model.run([Fuse(), Embed("image"), Embed("text")], batch)
            itm.append(head.score(found[Fuse()].pooled))
            itc.append((model.space().logit_scale.exp() * found[Embed("image")] @ found[Embed("text")].T)[0])
    return torch.stack(itc), torch.stack(itm)


def sharp_model(fusion: str = "dual_stream"):
    """An untrained model whose scores differ visibly from pair to pair."""
    model = tiny_model(fusion, ("itc", "itm"))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" not in name and weight.dim() > 1:
                weight.mul_(4)
    return model


@pytest.mark.parametrize("chunk", [3, 1024])
def test_true_ranks_equal_brute_force(chunk):
    draw = torch.Generator().manual_seed(0)
    queries, keys = (torch.randint(-2, 3, (n, 3), generator=draw).float() for n in (7, 11))  # many ties
    query_image, key_image = torch.arange(7), torch.randint(0, 8, (11,), generator=draw)
    found = true_ranks(queries, Share(keys, (11,)), query_image, key_image, chunk)
    order = topk_chunked(queries, keys, 11, chunk)[1]
    for query in range(7):
        hits = (key_image[order[query]] == query).nonzero()[:, 0].tolist()
        assert found[query] == (hits[0] + 1 if hits else 12)


def test_blocks_hold_whole_images():
    assert list(image_blocks([2, 2, 1], 4, 9)) == [slice(0, 4), slice(4, 5)]
    assert list(image_blocks([2, 2, 1], 9, 2)) == [slice(0, 4), slice(4, 5)]
    assert list(image_blocks([1, 7, 1, 1], 3, 9)) == [slice(0, 1), slice(1, 4), slice(4, 7), slice(7, 10)]
    assert list(image_blocks([], 3, 9)) == []


@pytest.mark.parametrize("fusion", ["dual_stream", "co", "single_stream"])
def test_rerank_of_everything_equals_all_pairs(fusion):
    """k = all: both directions, several captions an image, and blocks smaller than the gallery."""
    model, gallery = sharp_model(fusion), make_gallery(12, [1, 3])
    itc, itm = all_pairs(model, gallery)
    found = build(RetrievalConfig, {"k": 30, "batch": 5, "pairs": 17}).search(model, gallery, {})
    for side, contrast, match in ((found.i2t, itc, itm), (found.t2i, itc.T, itm.T)):
        torch.testing.assert_close(side.itc, contrast.gather(1, side.index), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(side.itm, match.gather(1, side.index), rtol=1e-4, atol=1e-4)
        for weight, score in ((0.0, match), (0.5, match + 0.5 * contrast), (None, contrast)):
            index, found_score, _ = side.ranked(weight)
            assert torch.equal(index.sort(1).values, torch.arange(score.shape[1]).expand(len(score), -1))
            torch.testing.assert_close(found_score, score.sort(1, descending=True).values, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(score.gather(1, index), found_score, rtol=1e-4, atol=1e-4)


def test_rank_of_the_truth_below_the_candidates():
    """What ITC ranks below the first k stays at its rank; the first k are reordered."""
    model, gallery = sharp_model(), make_gallery(40, [2])
    itc, itm = all_pairs(model, gallery)
    found = build(RetrievalConfig, {"k": 10}).search(model, gallery, {})
    order, own = itc.T.argsort(1, descending=True), gallery.image_of_text[:, None]
    by_itc = (order == own).int().argmax(1) + 1
    assert torch.equal(found.t2i.ranked(None)[2], by_itc) and (by_itc > 10).any() and (by_itc <= 10).any()
    again = order[:, :10].gather(1, itm.T.gather(1, order[:, :10]).argsort(1, descending=True))
    expected = torch.where(by_itc <= 10, (again == own).int().argmax(1) + 1, by_itc)
    assert torch.equal(found.t2i.ranked(0.0)[2], expected)
    assert torch.equal(found.t2i.ranked(0.0)[0], again)


def test_no_pair_is_matched_twice_and_images_are_projected_once_a_block(monkeypatch):
    model, gallery = sharp_model(), make_gallery(30, [2])
    rows, images, texts = [], [], []
    forward = vlp.fusion.dual.DualStream.forward

    def counted(self, image, text, *args, **kwargs):
        rows.append(text.states.shape[0])
        images.append(image.states.shape[0])
        return forward(self, image, text, *args, **kwargs)

    model.text.register_forward_hook(lambda module, given, out: texts.append(out.states.shape[0]))
    monkeypatch.setattr(vlp.fusion.dual.DualStream, "forward", counted)
    found = build(RetrievalConfig, {"k": 10, "pairs": 100}).search(model, gallery, {})
    wanted = {(n, s) for n, row in enumerate(found.i2t.index.tolist()) for s in row}
    wanted |= {(n, s) for s, row in enumerate(found.t2i.index.tolist()) for n in row}
    assert sum(rows) == len(wanted) < 30 * 10 + 60 * 10  # some pairs are in both directions
    assert max(rows) <= 100 and len(rows) > 5
    assert sum(images) == 30  # every image in one block
    assert all(one <= 60 for one in texts[-len(rows) :])  # a block's texts are encoded once, however many pairs


def test_an_image_in_very_many_pairs_is_cut():
    model, gallery = sharp_model(), make_gallery(3, [8])
    pairs = torch.arange(72)
    head = next(one for one in model.objectives.values() if isinstance(one, Itm))
    whole, cut = (match_pairs(model, gallery, pairs, head, limit) for limit in (512, 5))
    torch.testing.assert_close(whole, all_pairs(model, gallery)[1].flatten(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(cut, whole, rtol=1e-4, atol=1e-4)


class Largest(TorchDispatchMode):
    """Remembers the most elements of any tensor made."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self.elements = max(self.elements, leaf.numel())
        return out


def test_no_table_of_all_pairs_exists():
    images, texts, k = 1500, 3000, 10
    model, gallery = tiny_model("none", ("itc",)), make_gallery(images, [2])
    task = build(RetrievalConfig, {"k": k, "batch": 50})
    with Largest() as largest:
        found = task.search(model, gallery, {})
    assert found.t2i.index.shape == (texts, k)
    chunk = 1024 * 1024  # one chunk of similarities, with the k best so far
    assert largest.elements <= chunk + 1024 * k < images * texts / 4


def test_matching_holds_one_block_at_a_time():
    model, gallery = sharp_model(), make_gallery(60, [1])
    task = build(RetrievalConfig, {"k": 10, "batch": 8, "pairs": 40})
    with Largest() as largest:
        task.search(model, gallery, {})
    tokens, width, hidden, length = (PIXELS // 4) ** 2 + 1, 32, 128, 8
    assert largest.elements <= max(40 * tokens * width, 40 * length * hidden, 8 * tokens * hidden, 60 * 60)


def test_folds_are_means_over_galleries_of_their_own(monkeypatch):
    """COCO 1K: each fold's images are searched among its own texts, and each is what a task on it alone reports."""
    gallery = make_gallery(25, [2, 1])
    gallery.pixels[3] = BadSample("image3", "torn")
    model, bad = sharp_model(), {}
    parts = SimpleNamespace(model=model)
    monkeypatch.setattr(RetrievalConfig, "_open", lambda *_, **__: (gallery, bad))
    task = build(RetrievalConfig, {"folds": 2, "weight": 0.5, "k": 10, "batch": 7})
    result = task.evaluate(parts, open_reader("emoji:fluent3d"))
    assert result.counts == {"images": 24, "texts": 37} and result.bad == {"image3": "torn"}
    alone = build(RetrievalConfig, {"weight": 0.5, "k": 10})
    folds = []
    for dropped in ((3, *range(13, 25)), range(13)):
        part = gallery.without(set(dropped))
        monkeypatch.setattr(RetrievalConfig, "_open", lambda *_, part=part, **__: (part, {}))
        folds.append(alone.evaluate(parts, open_reader("emoji:fluent3d")))
    for name, value in folds[0].metrics.items():
        expected = (value + folds[1].metrics[name]) / 2
        assert result.metrics[f"2 folds/{name}"] == pytest.approx(expected, abs=1e-9), name
    assert result.floors["chance"]["2 folds/t2i/R@1"] == pytest.approx(1 / 12)
    assert any("galleries of 12 images" in note for note in result.notes)
    with pytest.raises(ValueError, match="folds 99 of 24 images"):
        monkeypatch.setattr(RetrievalConfig, "_open", lambda *_, **__: (gallery, bad))
        build(RetrievalConfig, {"folds": 99}).evaluate(parts, open_reader("emoji:fluent3d"))


def test_sums_with_the_cosine_as_blip():
    model, gallery = sharp_model(), make_gallery(12, [2])
    itc, itm = all_pairs(model, gallery)
    found = build(RetrievalConfig, {"k": 24, "weight_unit": "cosine"}).search(model, gallery, {})
    expected = (itm + itc / model.space().logit_scale.exp()).sort(1, descending=True).values
    torch.testing.assert_close(found.i2t.ranked(1.0)[1], expected, rtol=1e-4, atol=1e-4)


def test_what_rows_add_are_the_metrics(tmp_path):
    """Means of the rows' metrics are the task's recalls by any hit; mean and median rank are of the same ranks."""
    loaded = load(checkpoint(tmp_path))
    data, reader = loaded.config.data, open_reader(str(caption_table(tmp_path)))
    result = build(RetrievalConfig, {"weight": 1.0}).evaluate(parts_of(loaded, data), reader)
    for direction in ("i2t", "t2i"):
        rows = [row for row in result.predictions if row["direction"] == direction]
        for k in (1, 5):
            mean = sum(row["metrics"][f"{direction}/R@{k}"] for row in rows) / len(rows)
            assert mean == pytest.approx(result.metrics[f"{direction}/R@{k}"])
        ranks = sorted(row["ranks"][SUM] for row in rows)
        assert result.metrics[f"{direction}/mean_rank"] == pytest.approx(sum(ranks) / 8)
        assert result.metrics[f"{direction}/median_rank"] == (ranks[3] + ranks[4]) / 2


def test_choose_weight_by_reciprocal_rank():
    """ITM alone puts the truth second, ITC alone third; a little of both first, too much of ITC last."""
    itm, itc = torch.tensor([[1.0, 2.0, 0.0]]), torch.tensor([[2.0, 0.0, 3.0]])
    one = Candidates(torch.tensor([[0, 1, 2]]), itc, itm, torch.tensor([2]), torch.tensor([[True, False, False]]))
    found = Found(make_gallery(1, [1]), one, one, {})
    assert [one.ranked(w)[2].item() for w in (0.0, 0.6, 0.8, 5.0)] == [2, 1, 1, 2]
    assert choose_weight(found, (0.0, 0.6, 0.8, 5.0)) == 0.8  # of equals the nearer to ITC


@pytest.mark.parametrize(("better", "chosen"), [(5, 5.0), (40, 0.0)])
def test_what_few_queries_cannot_tell_apart_leaves_itc_its_weight(better, chosen):
    """Of 200 queries ITM alone loses four to ITC and wins some: five are within a standard error."""
    itm, itc = torch.tensor([1.0, 0.0]).repeat(200, 1), torch.tensor([1.0, 0.0]).repeat(200, 1)
    itc[:better] = itm[-4:] = torch.tensor([0.0, 1.0])
    true = torch.tensor([[True, False]]).expand(200, 2)
    one = Candidates(torch.tensor([[0, 1]]).expand(200, 2), itc, itm, torch.ones(200, dtype=torch.int64), true)
    found = Found(make_gallery(200, [1] * 200), one, one, {})
    assert choose_weight(found, (0.0, 5.0)) == chosen


def test_weight_is_chosen_by_those_that_ask_among_others():
    """Of two images ITM alone finds the first, ITC alone the second; the weight is that of the one that asks."""
    itm, itc = torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([[0.0, 1.0], [0.0, 1.0]])
    index, true = torch.tensor([[0, 1], [0, 1]]), torch.tensor([[True, False], [False, True]])
    one = Candidates(index, itc, itm, torch.tensor([2, 1]), true)
    found = Found(make_gallery(2, [1, 1]), one, one, {})
    first, second = found.gallery.image_keys
    assert choose_weight(found, (0.0, 5.0), {first}) == 0.0
    assert choose_weight(found, (0.0, 5.0), {second}) == 5.0


def test_a_model_without_embeddings_matches_all_pairs():
    model, gallery = tiny_model("single_stream", {"itm": ItmConfig(scheme="replace_image")}), make_gallery(6, [2])
    found = RetrievalConfig().search(model, gallery, {})
    assert found.i2t.index.shape == (6, 12) and found.t2i.index.shape == (12, 6) and found.i2t.itc is None
    assert found.t2i.ranked(0.0)[2].tolist() == [
        row.index(owner) + 1 for row, owner in zip(found.t2i.ranked(0.0)[0].tolist(), gallery.image_of_text.tolist())
    ]


def test_unusable_images_leave_the_gallery():
    model, gallery = sharp_model(), make_gallery(9, [1, 2])
    gallery.pixels[1] = BadSample("image1", "torn")
    bad: dict[str, str] = {}
    found = RetrievalConfig().search(model, gallery, bad)
    assert bad == {"image1": "torn"}
    assert found.gallery.image_keys == [f"image{i}" for i in range(9) if i != 1]
    expected = [i - (i > 1) for i in gallery.image_of_text.tolist() if i != 1]
    assert found.gallery.image_of_text.tolist() == expected
    assert [caption for caption in gallery.captions if caption not in found.gallery.captions] == ["text1", "text2"]


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    try:
        torch.save(searched(), f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


def searched() -> list[torch.Tensor]:
    """All numbers of a search in a gallery that two ranks cannot share evenly, one image being unusable."""
    model, gallery = sharp_model(), make_gallery(31, [1, 2])
    gallery.pixels[20] = BadSample("image20", "torn")
    found = build(RetrievalConfig, {"k": 10, "batch": 4, "pairs": 33}).search(model, gallery, {})
    sides = (found.i2t, found.t2i)
    return [getattr(side, name) for side in sides for name in ("index", "itc", "itm", "rank")]


def test_two_processes_equal_one(tmp_path):
    mp.spawn(work, (str(tmp_path),), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for first, second, one in zip(*ranks, searched(), strict=True):
        torch.testing.assert_close(first, second, rtol=0, atol=0)
        torch.testing.assert_close(first, one, rtol=1e-4, atol=1e-4)


def test_rows_of_one_image_become_one_image_with_several_captions(tmp_path):
    colors = list(COLORS)[:2]
    names = [picture(tmp_path / f"{color}.png", color) for color in colors]
    rows = [{"image": names[i % 2], "caption": f"a {colors[i % 2]} square {i}"} for i in range(5)]
    table = write_table(tmp_path / "data.csv", rows)
    loaded = load(checkpoint(tmp_path))
    data = loaded.config.data.model_copy(update={"text": None})
    gallery = open_gallery(open_reader(str(table)), data, loaded.tokenizer, loaded.config.model, {})
    assert gallery.image_keys == names and gallery.image_of_text.tolist() == [0, 1, 0, 1, 0]
    result = RetrievalConfig().evaluate(parts_of(loaded, data), open_reader(str(table)))
    assert {row["key"] for row in result.predictions} == {
        *(f"i2t/{name}" for name in names),
        *(f"t2i/{names[i % 2]}/{i // 2}" for i in range(5)),
    }
    assert result.metrics["ITC/i2t_mean/R@1"] <= 0.5 < result.metrics["ITC/i2t_any/R@5"] == 1
    assert result.floors["chance"]["t2i/R@1"] == 0.5
    assert any("2.5 captions an image" in note for note in result.notes)


def test_boxes_that_captions_name_are_refused():
    """Each text meets every image here, and its boxes are of one."""
    data = DataConfig(boxes="named")
    with pytest.raises(ValueError, match=r"^data\.boxes 'named': .* with --data\.boxes none$"):
        open_gallery(None, data, None, None, {})  # which none of is looked at


def test_adapt_keeps_what_retrieval_trains():
    run = SimpleNamespace(
        model=tiny_model("dual_stream", ("itc", "itm", "mlm", "lm")).config,
        objectives={},
        model_copy=lambda update: SimpleNamespace(**update),
    )
    ramp = build(ItmConfig, {"random_until": 100, "hard_from": 200})
    adapted = RetrievalConfig().adapt(run, {"itc": ItcConfig(), "itm": ramp, "mlm": object()}, None)
    assert list(adapted.objectives) == ["itc", "itm"] and adapted.model.decoder is None
    assert (adapted.objectives["itm"].random_until, adapted.objectives["itm"].hard_from) == (0, 0)
    bare = RetrievalConfig().adapt(run, {}, None)
    assert list(bare.objectives) == ["itc", "itm"]
    run.model = tiny_model("none", ("itc",)).config
    assert list(RetrievalConfig().adapt(run, {"itc": ItcConfig(), "itm": ramp}, None).objectives) == ["itc"]


def test_emoji_names_its_split():
    reader = open_reader("emoji:fluent3d", where={"split": "val"})
    assert emoji_split_hash() in data_hash(reader)


def test_training_beats_chance_and_the_weight_comes_from_other_data(tmp_path):
    """From a table of pairs to recalls of all three scorings."""
    table = caption_table(tmp_path)
    other = write_table(
        tmp_path / "other.csv",
        [
            {"image": picture(tmp_path / f"o{c}{f}.png", c, f, seed=9), "caption": f"a {f} {c} square"}
            for c in COLORS
            for f in FILLINGS
        ],
    )
    loaded = load(checkpoint(tmp_path))
    data = loaded.config.data.model_dump() | {"train": str(table), "workers": 0}
    tree = {
        "data": data,
        "train": {**TRAIN, "samples": 2400, "global_batch": 16},
        "model": loaded.config.model.model_dump(),
    }
    asking = {"caption": f"a {next(iter(FILLINGS))} {next(iter(COLORS))} square"}
    task = build(RetrievalConfig, {"weight_data": str(other), "weight_where": asking, "weight_among": {}})
    run = task.adapt(build(RunConfig, tree, {"objectives": {"itc": {}}}), loaded.config.objectives, None)
    parts = assemble(run, tokenizer=loaded.tokenizer, pretrained=False)
    reader = open_reader(str(table))
    before = task.evaluate(parts, reader)
    train(parts, tmp_path / "run", torch.device("cpu"), prepare=task.prepare(parts.run))
    after = task.evaluate(parts, reader)
    assert {name.split("/")[0] for name in after.metrics} == {
        ITC,
        ITM,
        SUM,
        "t2i",
        "i2t",
        "rSum",
    }
    assert after.metrics.keys() >= after.floors["chance"].keys() >= {"i2t/R@1", "t2i/R@1", "ITC/t2i/R@5", "rSum"}
    assert after.metrics["ITC/t2i/R@1"] > max(0.7, before.metrics["ITC/t2i/R@1"])
    assert after.metrics["t2i/R@1"] == after.metrics[f"{SUM}/t2i/R@1"] > 4 * after.floors["chance"]["t2i/R@1"]
    assert any("chosen on 1 samples" in note and "sought among 8" in note for note in after.notes)
    row = next(row for row in after.predictions if row["direction"] == "t2i")
    assert row["ranks"][SUM] == row["found"].index(row["true"][0]) + 1
    assert len(row["scores"]) == 8 and row["scores"] == sorted(row["scores"], reverse=True)
    predicted = list(task.predict(parts, reader))
    assert [one["found"] for one in predicted] == [one["found"] for one in after.predictions]
    assert not any({"true", "ranks"} & set(one) for one in predicted)
    assert parts.model.training  # as training left it


def test_embeddings_are_of_unit_norm_and_in_order():
    model, gallery = tiny_model("none", ("itc",)), make_gallery(7, [1, 2])
    (images, sizes), (texts, _), bad = embed_shares(model, gallery, 3)
    assert not bad and sizes == (7,)
    with evaluating(model):
        for n in range(7):
            alone = model.run([Embed("image")], Batch(images={"clean": Images(gallery.pixels[n][None])}))[
                Embed("image")
            ]
            torch.testing.assert_close(images[n], alone[0], rtol=1e-4, atol=1e-5)
        for s in range(gallery.num_texts):
            alone = model.run([Embed("text")], Batch(texts={"clean": gallery.texts([s])}))[Embed("text")]
            torch.testing.assert_close(texts[s], alone[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(images.norm(dim=1), torch.ones(7))


def test_data_that_cannot_be_used_say_so(tmp_path):
    picture(tmp_path / "a.png", "red")
    loaded = load(checkpoint(tmp_path))
    with pytest.raises(ValueError, match=r"none of its 1 samples can be used.*no text"):
        RetrievalConfig().evaluate(parts_of(loaded, DataConfig()), open_reader(str(write_folder(tmp_path))))


def write_folder(folder):
    (folder / "images").mkdir()
    picture(folder / "images" / "a.png", "red")
    return folder / "images"


def test_those_that_ask_are_named_as_in_the_gallery(tmp_path):
    """In a table samples are named by their rows, images by their paths."""
    (tmp_path / "data.csv").write_text("image,caption,split\n" + "".join(f"{n}.png,a {n},{n % 2}\n" for n in range(4)))
    for n in range(4):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{n}.png")
    reader = open_reader(str(tmp_path / "data.csv"), where={"split": "1"})
    assert image_names(reader, DataConfig()) == {"1.png", "3.png"}
    one = Candidates(
        torch.tensor([[0, 1]] * 2), torch.ones(2, 2), torch.ones(2, 2), torch.tensor([1, 1]), torch.eye(2).bool()
    )
    with pytest.raises(ValueError, match=r"weight_among has none of the images of task\.weight_where"):
        choose_weight(Found(make_gallery(2, [1, 1]), one, one, {}), (0.0, 5.0), {"nobody"})
