"""Golden cases through the tasks: what a case recorded is asked of a task's own evaluate, predict, prepare and adapt.

Recorded pixels and ids stand in for the batch that a task makes of its samples; labels go in as fields of samples, and
what comes out is compared with the recorded outputs.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import vlp
from downstream.captioning import CaptioningConfig, CaptionSurvey
from downstream.finetune_config import finetune_config
from downstream.gallery import Gallery
from downstream.nlvr2 import Nlvr2Config
from downstream.retrieval import RetrievalConfig
from downstream.search import Candidates
from downstream.snli_ve import SnliVeConfig
from downstream.task import TaskConfig
from downstream.verdict import VerdictConfig, VerdictSurvey, same
from downstream.vqa import VqaConfig, VqaSurvey
from encoders.types import Batch, Images, Regions, Texts, Vocabulary
from objectives.base import Replay
from scripts.goldens.base import Adapter, Case
from scripts.goldens.cases import ADAPTERS
from vlp.config import build
from vlp.data.reader import RawSample, Sample
from vlp.loaded import Loaded
from vlp.run import Parts, RunConfig

TOLERANCE = {"atol": 1e-4, "rtol": 1e-3}
FOLDER = Path(__file__).parent / "goldens"


class Ids:
    """A tokenizer of texts that are ids: "101 5 102"."""

    def __init__(self, size: int, **special: int) -> None:
        usual = {"pad": 0, "cls": 1, "sep": 2, "mask": 3, "bos": 1, "eos": 2}
        self.vocabulary = Vocabulary(size, **{**usual, **special})

    def encode(self, text: str, max_length: int) -> tuple[np.ndarray, np.ndarray]:
        ids = np.array([int(word) for word in text.split()], dtype=np.int64)[:max_length]
        return ids, np.ones(len(ids), dtype=bool)

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(map(str, ids))


@dataclass(frozen=True)
class Rows:
    """A reader of samples whose images and texts only stand for the recorded ones."""

    fields: Sequence[Mapping[str, Any]]
    images: int = 1
    features: int = 2
    fingerprint: str = "recorded"

    def __len__(self) -> int:
        return len(self.fields)

    def __getitem__(self, index: int) -> RawSample:
        before = [""] if self.images == 1 else [f"{number}." for number in range(self.images)]
        regions = {f"{one}npz": _npz(self.features) for one in before}
        files = regions | {f"{number}.png": PNG for number in range(self.images)}
        return RawSample(str(index), "recorded", files, dict(self.fields[index]), (f"text {index}",))

    def samples(self) -> list[Sample]:
        """As a training loader gives them, but for the images."""
        return [Sample(str(n), (), (f"text {n}",), dict(fields)) for n, fields in enumerate(self.fields)]


def _png() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 4)).save(file, "PNG")
    return file.getvalue()


def _npz(width: int) -> bytes:
    file = io.BytesIO()
    np.savez(file, features=np.zeros((1, width), dtype=np.float32), boxes=np.zeros((1, 4)), width=4, height=4)
    return file.getvalue()


PNG = _png()


@dataclass(frozen=True)
class Recorded:
    """A case, loaded, with its inputs as a batch."""

    case: Case
    more: Mapping[str, Any] = field(default_factory=dict)
    """Our settings over the adapter's."""

    @cached_property
    def adapter(self) -> Adapter:
        return next(one for pattern, one in ADAPTERS.items() if re.fullmatch(pattern, self.case.name))

    @cached_property
    def loaded(self) -> Loaded:
        settings = {**self.adapter.settings(self.case), **self.more}
        return vlp.load(self.case.weights, config=self.adapter.config(self.case), settings=settings)

    @cached_property
    def batch(self) -> Batch:
        return self.adapter.batch(self.case, self.loaded)

    @property
    def features(self) -> int:
        """Width of a region model's features."""
        return getattr(self.loaded.config.model.vision, "features", 2)

    def parts(self, tokenizer: Any = None, data: Mapping[str, Any] | None = None) -> Parts:
        """What tasks take."""
        config = self.loaded.config
        run = RunConfig(model=self.loaded.model.config, objectives=dict(config.objectives), data=config.data)
        changes = {"text": None, "image": None, **(data or {})}
        run = run.model_copy(update={"data": run.data.model_copy(update=changes)})
        return Parts(run, self.loaded.model, tokenizer or Ids(1000), None)

    def output(self, *names: str) -> Tensor:
        """The first recorded output of these names."""
        return next(self.case.outputs[name] for name in names if name in self.case.outputs)

    def loss(self, batch: Batch, *names: str) -> Tensor:
        """Weighted sum of objectives' training losses."""
        model, draw = self.loaded.model, Replay(self.adapter.draws(self.case))
        with torch.no_grad():
            model.before_step()
            found = model.losses(batch, draw, names)
        return torch.stack([model.weights[name] * found[name].loss for name in names]).sum()

    @contextmanager
    def instead(self) -> Iterator[None]:
        """The recorded batch in place of what a task makes of its samples."""

        def make_batch(parts: Parts, examples: Sequence[Any], places: Any = None) -> Batch:
            assert [one.key for one in examples] == [str(number) for number in range(len(examples))]
            return self.batch

        with mock.patch("downstream.task.make_batch", make_batch):
            yield


def near(found: Tensor | Sequence[float], wanted: Tensor, **tolerance: float) -> None:
    torch.testing.assert_close(
        torch.as_tensor(found).double(), wanted.double(), **(TOLERANCE | tolerance), check_dtype=False
    )


def verdicts(case: Case, task: VerdictConfig) -> None:
    """NLVR2 and SNLI-VE: probabilities, metrics, what adapt keeps, labels from prepare, the training loss."""
    recorded = Recorded(case)
    model, config = recorded.loaded.model, recorded.loaded.config
    ((name, head),) = [(n, one) for n, one in config.objectives.items() if hasattr(one, "answers")]
    order = [[same(answer) for answer in head.answers].index(same(label)) for label in task.labels]
    logits = recorded.output("prediction", "nlvr2_logits", "logits", "scores").double()
    wanted = logits.sigmoid() if getattr(head, "loss", "ce") in ("bce", None) else logits.softmax(1)
    truth = recorded.batch.targets["answer_scores"].argmax(1)
    fields = [
        {"label": head.answers[label].upper(), "identifier": f"dev-{row}-0-0"}
        for row, label in enumerate(truth.tolist())
    ]
    reader, parts = Rows(fields, task.images, recorded.features), recorded.parts()
    assert task.lacks(model) is None
    with recorded.instead():
        result = task.evaluate(parts, reader, VerdictSurvey({task.labels[0]: 1}))
        said = list(task.predict(parts, reader))
    found = torch.tensor([[row["probabilities"][label] for label in task.labels] for row in said])
    near(found, wanted[:, order])
    best = [task.labels[number] for number in wanted[:, order].argmax(1).tolist()]
    assert [row["prediction"] for row in result.predictions] == [row["prediction"] for row in said] == best
    accuracy = (wanted.argmax(1) == truth).double().mean().item()
    assert abs(result.metrics["accuracy"] - accuracy) < 1e-6 and not result.bad
    if "consistency" in result.metrics:  # each sentence is of one pair here
        assert abs(result.metrics["consistency"] - accuracy) < 1e-6

    run = finetune_config(recorded.loaded, "x", {"task": {"kind": task.kind}})
    run = task.adapt(run, config.objectives, VerdictSurvey({task.labels[0]: 1}))
    assert run.objectives == {name: head} and run.model.fusion == config.model.fusion
    prepare = task.prepare(run)
    examples = [prepare(one, np.random.default_rng(0)) for one in reader.samples()]
    scores = torch.stack([torch.from_numpy(one.targets["answer_scores"]) for one in examples])
    found_loss = recorded.loss(replace(recorded.batch, targets={"answer_scores": scores}), name)
    near(found_loss, recorded.output("loss", "loss_nlvr2"))


def closed_vqa(case: Case) -> None:
    """VQA by answer list: the best answer and its probability, soft scores from prepare, the training loss."""
    recorded, task = Recorded(case), VqaConfig()
    ((name, head),) = recorded.loaded.config.objectives.items()
    logits = recorded.output("vqa_logits", "logits", "scores").double()
    wanted = logits.sigmoid() if head.loss != "ce" else logits.softmax(1)
    targets = recorded.batch.targets["answer_scores"]
    fields = [
        {"answer_scores": {answer: score for answer, score in zip(head.answers, row, strict=True) if score}}
        for row in targets.tolist()
    ]
    fields = [one if one["answer_scores"] else {"answer_scores": {head.answers[0]: 0.0}} for one in fields]
    reader, parts = Rows(fields, features=recorded.features), recorded.parts()
    with recorded.instead():
        result = task.evaluate(parts, reader)
    best = wanted.max(1)
    assert [row["answer"] for row in result.predictions] == [head.answers[n] for n in best.indices.tolist()]
    near([row["probability"] for row in result.predictions], best.values)
    score = targets.double().gather(1, best.indices[:, None]).mean().item()
    assert abs(result.metrics["accuracy"] - score) < 1e-6

    run = finetune_config(recorded.loaded, "x", {"task": {"kind": "vqa"}})
    survey = VqaSurvey(head.answers, (1.0,) * len(head.answers), {}, 1)
    run = task.adapt(run, recorded.loaded.config.objectives, survey)
    assert run.objectives == {name: head}
    prepare = task.prepare(run)
    examples = [prepare(one, np.random.default_rng(0)) for one in reader.samples()]
    scores = torch.stack([torch.from_numpy(one.targets["answer_scores"]) for one in examples])
    near(recorded.loss(replace(recorded.batch, targets={"answer_scores": scores}), name), recorded.output(*LOSSES))


LOSSES = ("loss", "loss_vqa")


def written(ids: Tensor, keep: Tensor) -> list[str]:
    """Recorded texts as those that ``Ids`` reads."""
    return [" ".join(map(str, row[kept.bool()].tolist())) for row, kept in zip(ids, keep, strict=True)]


def ranked_vqa(case: Case, first: int, tmp_path: Path) -> None:
    """ALBEF's and BLIP's VQA: the best of given answers, which begin with the id ``first``."""
    recorded = Recorded(case)
    answers = written(case.inputs["answer.input_ids"], case.inputs["answer.attention_mask"])
    path = tmp_path / "answers.txt"
    path.write_text("\n".join(answers))
    task = VqaConfig(head="ranked", answer_file=str(path), k=int(case.inputs["k_test"]))
    number = len(case.inputs["question.input_ids"])
    parts = recorded.parts(Ids(200, pad=0, cls=101, sep=102, bos=first, eos=102), {"max_length": 32})
    with recorded.instead():
        rows = list(task.predict(parts, Rows([{}] * number)))
    if "topk_ids" in case.outputs:
        shares = case.outputs["topk_probs"].max(1)
        best = case.outputs["topk_ids"].gather(1, shares.indices[:, None])[:, 0]
        near([row["probability"] for row in rows], shares.values)
    else:
        best = case.outputs["rank_max_ids"]
    assert [row["answer"] for row in rows] == [answers[n] for n in best.tolist()]
    if "generate_beam3" in case.outputs:
        generation = {"method": "beam", "max_length": 10, "min_length": 1, "score_length": "all"}
        task = build(VqaConfig, {"head": "open", "generation": generation})
        with recorded.instead():
            assert len(list(task.predict(parts, Rows([{}] * number)))) == number


def written_vqa(case: Case) -> None:
    """The training loss of answers that the decoder writes; adapt keeps decoder and writer as they are loaded."""
    recorded, task = Recorded(case), VqaConfig(head="ranked")
    run = finetune_config(recorded.loaded, "x", {"task": {"kind": "vqa", "head": "ranked"}})
    assert task.lacks(recorded.loaded.model) is None
    run = task.adapt(run, recorded.loaded.config.objectives, VqaSurvey(("a", "b"), (1.0, 1.0), {}, 1))
    assert run.model.decoder == recorded.loaded.config.model.decoder
    assert run.objectives.keys() == {"lm"} and run.objectives["lm"].view == "lm:answer"
    near(recorded.loss(recorded.batch, "lm"), recorded.output("loss"))


def gallery_of(pixels: Tensor, text: Texts, owner: Tensor, kind: type[Gallery] = Gallery, **more: Any) -> Gallery:
    """Recorded images and texts as a gallery."""
    words = [np.array(ids[keep].tolist()) for ids, keep in zip(text.ids, text.keep, strict=True)]
    pad = int(text.ids[~text.keep][0]) if not text.keep.all() else 0
    names, captions = [str(row) for row in range(len(pixels))], [str(row) for row in range(len(words))]
    stored: Any = list(pixels)
    return kind(stored, words, owner, names, captions, pad, **more)


def ranking(case: Case) -> None:
    """Scores of each image's own and drawn texts, as a gallery without embeddings finds them; the training loss."""
    recorded, task = Recorded(case), RetrievalConfig(k=10)
    model = recorded.loaded.model
    images, text = recorded.batch.images["clean"], recorded.batch.texts["clean"]
    assert isinstance(images, Images) and task.lacks(model) is None
    number = len(images.pixels)
    if images.keep is None or images.keep.all():
        found = task.search(model, gallery_of(images.pixels, text, torch.arange(len(text.ids)) % number), {}).i2t
        assert found.itc is None and found.itm is not None
        by_pair = torch.empty_like(found.itm).scatter(1, found.index, found.itm)
        wanted = case.outputs["score"].double().view(number, -1)
        places = torch.arange(number)[:, None] + number * torch.arange(wanted.shape[1])
        near(by_pair.gather(1, places), wanted)
    run = finetune_config(recorded.loaded, "x", {"task": {"kind": "retrieval"}})
    run = task.adapt(run, recorded.loaded.config.objectives, None)
    assert run.objectives == recorded.loaded.config.objectives
    near(recorded.loss(recorded.batch, "rank"), case.outputs["loss_irtr"])


@dataclass(frozen=True)
class RegionGallery(Gallery):
    """Images that are numbers of rows of recorded regions."""

    regions: Regions | None = None

    def shown(self, model: Any, pictures: Sequence[Any]) -> Regions:
        assert self.regions is not None and self.regions.keep is not None
        rows = torch.stack(list(pictures))
        return Regions(self.regions.features[rows], self.regions.boxes[rows], self.regions.keep[rows])


def region_ranking(case: Case) -> None:
    """UNITER's retrieval: the scores of recorded pairs as a gallery of regions finds them; the training loss."""
    recorded, task = Recorded(case), RetrievalConfig(k=10)
    model = recorded.loaded.model
    regions, text = recorded.batch.images["clean"], recorded.batch.texts["clean"]
    assert isinstance(regions, Regions) and task.lacks(model) is None
    rows = torch.arange(len(text.ids))
    found = task.search(model, gallery_of(rows, text, rows, RegionGallery, regions=regions), {}).i2t
    assert found.itc is None and found.itm is not None
    by_pair = torch.empty_like(found.itm).scatter(1, found.index, found.itm)
    near(by_pair.diagonal(), case.outputs["scores"][:, 0])
    run = finetune_config(recorded.loaded, "x", {"task": {"kind": "retrieval"}})
    assert task.adapt(run, recorded.loaded.config.objectives, None).objectives == recorded.loaded.config.objectives
    near(recorded.loss(recorded.batch, "rank"), case.outputs["loss"])


def retrieval(case: Case) -> None:
    """Similarities and matching logits of a small gallery as the two stages find them; the training losses."""
    recorded, task = Recorded(case), RetrievalConfig(k=10)
    model = recorded.loaded.model
    images, text = recorded.batch.images["clean"], recorded.batch.texts["clean"]
    assert isinstance(images, Images) and task.lacks(model) is None
    found = task.search(model, gallery_of(images.pixels, text, torch.arange(len(text.ids))), {})
    if found.i2t.itc is not None:
        space = model.space()
        assert space is not None
        scale = space.logit_scale.detach().double().exp()
        cosines = case.outputs.get("itc_similarity")
        if cosines is None:
            cosines = recorded.output("image_feat", "vision_cls") @ recorded.output("text_feat", "language_cls").T
        for side, wanted in ((found.i2t, cosines), (found.t2i, cosines.T)):
            assert side.itc is not None
            near(side.itc, (scale * wanted.double()).gather(1, side.index))
    if "itm_logits" in case.outputs:
        matched(recorded, found.i2t)
    run = finetune_config(recorded.loaded, "x", {"task": {"kind": "retrieval"}})
    run = task.adapt(run, recorded.loaded.config.objectives, None)
    losses = {"itc": ("loss_ita", "loss"), "itm": ("loss_itm",)}
    for name, outputs in losses.items():
        if name in recorded.loaded.config.objectives and any(one in case.outputs for one in outputs):
            assert name in run.objectives
            near(recorded.loss(recorded.batch, name), recorded.output(*outputs))


def matched(recorded: Recorded, found: Candidates) -> None:
    """Matching scores of every recorded pair of image and text: the true ones, then the drawn."""
    case, head = recorded.case, next(one for one in recorded.loaded.config.objectives.values() if one.kind == "itm")
    logits, own = case.outputs["itm_logits"].double(), torch.arange(len(found.index))
    drawn = [case.inputs.get(f"replay.neg_{side}_idx", own[:0]) for side in ("image", "text")]
    image = torch.cat([own, drawn[0], own[: len(drawn[1])]])
    text = torch.cat([own, own[: len(drawn[0])], drawn[1]])
    wanted = logits[:, 1] if head.score == "logit" else logits[:, 1] - logits[:, 0]
    assert found.itm is not None
    by_pair = torch.empty_like(found.itm).scatter(1, found.index, found.itm)
    near(by_pair[image, text], wanted)


def captions(
    case: Case,
    words: Ids,
    outputs: Mapping[str, Mapping[str, Any]],
    prompt: Sequence[int] = (),
    unended: slice = slice(None),
) -> None:
    """Written ids, by output and settings of generation; what adapt keeps; the training loss.

    Of texts without an end, only ``unended`` was recorded.
    """
    settings = {"objectives": {"lm": {"prompt": list(prompt)}}} if prompt else {}
    recorded = Recorded(case, settings)
    config = recorded.loaded.config
    number = len(recorded.batch.images["clean"].pixels)  # type: ignore[union-attr]
    (name,) = config.objectives
    for output, generation in outputs.items():
        task = build(CaptioningConfig, {"generation": {"method": "greedy", **generation}})
        assert task.lacks(recorded.loaded.model) is None
        with recorded.instead():
            rows = list(task.predict(recorded.parts(words, {"max_length": 30}), Rows([{}] * number)))
        # Ids that frame a text, which a tokenizer does not write as words, are left out of both.
        framed = words.vocabulary.special | {words.vocabulary.bos, words.vocabulary.eos}
        found = [[int(word) for word in row["caption"].split()] for row in rows]
        found = [row if row[-1] == words.vocabulary.eos else row[unended] for row in found]
        said = [[n for n in row if n not in framed] for row in found]
        wanted = [[n for n in row if n not in framed][len(prompt) :] for row in case.outputs[output].tolist()]
        assert said == wanted, (output, said, wanted)
    run = finetune_config(recorded.loaded, "x", {"task": {"kind": "captioning"}})
    run = CaptioningConfig().adapt(run, config.objectives, CaptionSurvey("a", 1, 1))
    assert run.objectives == config.objectives
    near(recorded.loss(recorded.batch, name), recorded.output("loss"))


def blip_captions(case: Case) -> None:
    """BLIP's generation with its prompt, whose length counts as in transformers 4.15."""
    given: dict[str, Any] = {"max_length": 14, "min_length": 6, "score_length": "all"}
    beam = {**given, "method": "beam"}
    ways = {
        "generate_greedy": given,
        "generate_beam3": beam,
        "generate_beam2_rep15": {**beam, "beams": 2, "repetition_penalty": 1.5},
    }
    words = Ids(132, pad=0, cls=101, sep=102, bos=case.config["special"]["DEC"], eos=102)
    captions(case, words, ways, case.inputs["prompt_ids"][1:-1].tolist())


def hf_blip_captions(case: Case) -> None:
    """As transformers generates; the fourth of its outputs begins with words of its own."""
    bos, length = case.config["text_config"]["bos_token_id"], case.outputs["greedy_ids"].shape[1]
    ways = {"greedy_ids": {"max_length": length}, "beam3_ids": {"method": "beam", "max_length": length}}
    captions(case, Ids(124, pad=0, cls=101, sep=102, bos=bos, eos=102), ways)


def masked_captions(case: Case) -> None:
    """BEiT-3's captions, word by word in the place of a mask, which the recorded ids have instead of the last."""
    beam = {"method": "beam", "beams": 3, "length_penalty": 0.6, "score_length": "whole", "max_length": 7}
    captions(case, Ids(120, pad=1, cls=0, sep=2, mask=118, bos=0, eos=2), {"beam3_ids": beam}, unended=slice(-1))


Check = Callable[[Case, Path], None]

VERDICTS: dict[str, TaskConfig] = {
    r"(albef|xvlm)_nlvr": Nlvr2Config(),
    r"blip_nlvr(_merge)?": Nlvr2Config(),
    r"(vilt|meter|vlmo|beit3|hf_vilt)_nlvr2": Nlvr2Config(),
    r"uniter_nlvr2_paired(_attn)?": Nlvr2Config(),
    r"albef_ve": SnliVeConfig(),
}


def check(case: Case, tmp_path: Path) -> bool:
    """Run a case through its task; False if it is of none."""
    for pattern, task in VERDICTS.items():
        if re.fullmatch(pattern, case.name):
            assert isinstance(task, VerdictConfig)
            verdicts(case, task)
            return True
    for pattern, run in CHECKS.items():
        if re.fullmatch(pattern, case.name):
            run(case, tmp_path)
            return True
    return False


CHECKS: dict[str, Check] = {
    r"(vilt|meter|uniter|beit3|vlmo|hf_vilt)_vqa": lambda case, _: closed_vqa(case),
    r"albef_vqa_rank": lambda case, folder: ranked_vqa(case, 101, folder),
    r"blip_vqa_infer": lambda case, folder: ranked_vqa(case, case.config["special"]["DEC"], folder),
    r"(albef|blip)_vqa_train(_nodistill)?|xvlm_vqa": lambda case, _: written_vqa(case),
    r"blip_decoder": lambda case, _: blip_captions(case),
    r"hf_blip_caption": lambda case, _: hf_blip_captions(case),
    r"beit3_captioning": lambda case, _: masked_captions(case),
    r"(vilt|meter)_irtr": lambda case, _: ranking(case),
    r"uniter_itm_rank": lambda case, _: region_ranking(case),
    r"albef_retrieval(_nodistill)?|blip_retrieval(_negall)?|blip_itm|beit3_retrieval": lambda case, _: retrieval(case),
}
"""Which cases are of which task."""


def names(folder: Path = FOLDER) -> list[str]:
    """Cases at hand that are of a task."""
    patterns = [*VERDICTS, *CHECKS]
    found = sorted(path.parent.name for path in folder.glob("*/case.json"))
    return [name for name in found if any(re.fullmatch(pattern, name) for pattern in patterns)]
