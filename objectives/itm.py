"""Image-text matching (ITM): does this text belong to this image?

Negatives are drawn from the contrastive similarities (Li et al. 2021, ALBEF, section 3.2), or at random; both in one
draw per row, without a host synchronisation.
Shapes: B images, T texts, M rows, C candidates.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from encoders.layers import initialise
from encoders.types import Batch
from objectives.base import MAIN, Draw, Embed, Fuse, LossOutput, ModelSpec, Objective, Results, Rows, Side
from objectives.collectives import gather_no_grad
from objectives.heads import MlpHead
from objectives.itc import similarities
from objectives.pairs import Positives, find_pairs, first_numbers, image_of_text, true_pairs
from objectives.settings import ObjectiveSettings


class ItmConfig(ObjectiveSettings):
    """Binary matching on the pooled fused vector."""

    kind: Literal["itm"] = "itm"
    weight: float = 1.0
    """Weight of this loss in the sum."""
    negatives: Literal["auto", "hard", "random"] = "auto"
    """Drawn by contrastive similarity, or evenly. `auto`: hard where an objective trains the embeddings."""
    head: Literal["linear", "mlp"] = "linear"
    """`mlp`: linear, norm, GELU, linear (X-VLM)."""
    scheme: Literal["both", "replace_image", "given"] = "both"
    """`both`: each pair with one false image and one false text (ALBEF). `replace_image`: each pair's image is replaced
    with probability 0.5 (UNITER, ViLT, METER). `given`: the data have false pairs, too, and ``targets["match"]`` [T]
    says which are true (VisualBERT, ViLBERT, LXMERT)."""
    classes: Literal[2, 3] = 2
    """Of the scheme `given`: true or not; or 0 = a false text, 1 = true, 2 = false object tags, the text's second
    segment (VinVL)."""
    masked: bool = False
    """Read pairs with the words, regions and patches hidden that other objectives hide (ViLBERT, LXMERT, FLAVA)."""
    candidates: Literal["microbatch", "global"] = "microbatch"
    """Where negatives come from: the batch that one rank runs at a time; or those of all ranks (VLMo), whose states are
    then gathered, texts padded to `model.text.max_length`."""
    number: int = Field(1, ge=1)
    """False images and false texts drawn for each pair of the scheme `both`, all different."""
    listwise: float = Field(0.0, ge=0)
    """Of the scheme `both`: weight, beside the binary cross-entropy, of that over each text's images and each image's
    texts, the true one among those drawn: reranking compares pairs (as the objective `rank` does)."""
    exclude: Positives = "id_or_caption"
    """Pairs that are never drawn as negatives."""
    floor: float = 0.0
    """Added to every candidate's softmax weight (BLIP 1e-4, X-VLM 1e-5)."""
    random_until: int = 0
    """Samples up to which negatives are drawn evenly."""
    hard_from: int = 0
    """Samples from which negatives are drawn by similarity alone; between the two the weights are mixed linearly."""
    score: Literal["log_odds", "logit"] = "log_odds"
    """What orders pairs where texts or images are reranked: the log odds of a match, whose sigmoid is its probability;
    or the logit of class 1 alone, as ALBEF's, BLIP's and X-VLM's retrieval does (their `itm_head(...)[:, 1]`)."""

    trains_embed: ClassVar[bool] = False
    reads: ClassVar[frozenset[Side]] = frozenset({"pooled"})

    def build(self, spec: ModelSpec) -> Itm:
        """Build the objective.

        Raises:
            ValueError: there is no fusion to match with, or no embedding to find hard negatives by.
        """
        if spec.pooled_width is None:
            raise ValueError(
                "objective itm needs a fusion, but model.fusion.kind is none; "
                "use single_stream or dual_stream, or remove itm"
            )
        if self.classes == 3 and self.scheme != "given":
            raise ValueError(
                "objectives.itm.classes 3 tells false texts from false tags, which only the data know; use scheme given"
            )
        if self.listwise and self.scheme != "both":
            raise ValueError(
                f"objectives.itm.listwise {self.listwise:g} compares a pair with false ones of its own, which scheme "
                f"{self.scheme} does not draw; use scheme both, or leave listwise out"
            )
        if self.negatives == "hard" and spec.embed_width is None:
            raise ValueError(
                "objectives.itm.negatives hard needs an objective that trains the embeddings; "
                "add itc or set negatives to random"
            )
        return Itm(self, spec.pooled_width, hard=self.negatives != "random" and spec.embed_width is not None)


class Itm(Objective):
    """Matching head and its negatives. Class 1 is a match."""

    def __init__(self, config: ItmConfig, width: int, hard: bool) -> None:
        super().__init__()
        self.config, self.hard = config, hard
        build = MlpHead if config.head == "mlp" else nn.Linear
        self.head: nn.Module = build(width, config.classes)
        if config.head == "linear":
            initialise(self.head)
        self.given, self.everywhere = config.scheme == "given", config.candidates == "global"
        self.pairs = Fuse("masked", "masked") if config.masked else Fuse()
        self.drawn = replace(self.pairs, rows="itm")
        self.needs = frozenset({self.pairs if self.given else self.drawn})
        if config.scheme == "both":
            self.needs |= {self.pairs}
        if hard and not self.given:
            self.needs |= {Embed("image"), Embed("text")}

    def chance(self, candidates: int) -> float | None:
        if self.config.classes == 3:
            return None  # the data's shares
        true = 1 / (1 + 2 * self.config.number) if self.config.scheme == "both" else 1 / 2
        lists = self.config.listwise * math.log(1 + self.config.number)
        return -true * math.log(true) - (1 - true) * math.log(1 - true) + lists

    @torch.no_grad()
    def rows(self, results: Results, batch: Batch, draw: Draw) -> dict[str, Rows]:
        """Return this step's false pairs (scheme "both": ``number`` times T false images, then as many false texts).

        Raises:
            ValueError: a text has several images, of which no single one could be replaced.
        """
        if batch.image_of_text is not None and batch.image_of_text.dim() > 1:
            number = batch.image_of_text.shape[1]
            raise ValueError(f"objective itm matches a text with one image, but here a text has {number}; remove itm")
        if self.given:
            return {}
        device = next(iter(batch.texts.values())).ids.device
        pairs = find_pairs(batch, self.config.exclude, device, self.everywhere)
        own, text = self._numbers(batch, device)
        text_weights, image_weights = self._weights(results, batch, *true_pairs(pairs))
        number = self.config.number if self.config.scheme == "both" else 1
        false_image = distinct(draw, "itm.image", image_weights, own, number)  # of each text
        if self.config.scheme == "replace_image":
            replaced = draw.bernoulli("itm.replace", 0.5, own.shape, device)
            return {"itm": Rows(torch.where(replaced, false_image, own), text, self.everywhere)}
        per_text = text_weights.index_select(0, own - pairs.first)
        false_text = distinct(draw, "itm.text", per_text, text, number)  # of each text's image
        own, text = own.repeat(number), text.repeat(number)
        return {"itm": Rows(torch.cat([false_image, own]), torch.cat([text, false_text]), self.everywhere)}

    def _numbers(self, batch: Batch, device: torch.device) -> tuple[Tensor, Tensor]:
        """Numbers among the candidates of each own text's image and of each own text, [T] each."""
        first_image, first_text = first_numbers(batch, self.everywhere)
        own = image_of_text(batch, device)
        return own + first_image, torch.arange(own.shape[0], device=device) + first_text

    def _weights(self, results: Results, batch: Batch, by_image: Tensor, by_text: Tensor) -> tuple[Tensor, Tensor]:
        """Weights of texts for each own image [B, S] and of images for each own text [T, N]; true pairs weigh 0."""
        even_text, even_image = (~by_image).float(), (~by_text).float()
        mix = self._hardness(batch.seen) if self.hard else 0.0
        if mix == 0.0:
            return even_text, even_image
        image, text, scale = results[Embed("image")], results[Embed("text")], results.scales[MAIN]
        sizes = batch.counts
        all_image, all_text = image, text
        if self.everywhere:
            all_image = gather_no_grad(image, None if sizes is None else [s[0] for s in sizes])
            all_text = gather_no_grad(text, None if sizes is None else [s[1] for s in sizes])
        hard_text = self._hard(similarities(image, all_text, scale), by_image)
        hard_image = self._hard(similarities(text, all_image, scale), by_text)
        return _blend(even_text, hard_text, mix), _blend(even_image, hard_image, mix)

    def _hard(self, logits: Tensor, true: Tensor) -> Tensor:
        """Softmax weights [R, C] of the false pairs; a row without one weighs nothing."""
        if self.config.floor > 0:
            return (logits.softmax(1) + self.config.floor) * ~true
        # Over the false pairs alone, and never 0: one that is not alike is drawn once those that are have been.
        return logits.masked_fill(true, -torch.inf).softmax(1).nan_to_num(0.0).clamp(min=1e-30) * ~true

    def _hardness(self, seen: int) -> float:
        first, last = self.config.random_until, self.config.hard_from
        if seen >= last:
            return 1.0 if seen >= first else 0.0
        return max(0.0, (seen - first) / (last - first)) if last > first else 0.0

    def forward(self, results: Results, batch: Batch, draw: Draw) -> LossOutput:
        """Cross-entropy of match against no match, mean over all rows, and of lists where they are asked for.

        A row that found no negative has no loss.
        """
        if self.given:
            logits = self.head(results[self.pairs].pooled)
            loss, right = match_terms(logits, self._label(batch))
            return LossOutput(loss.mean(), {"accuracy": right.mean()})
        drawn: Rows = results.rows["itm"]
        own, text = self._numbers(batch, drawn.image_index.device)
        logits = self.head(results[self.drawn].pooled)
        if self.config.scheme == "replace_image":
            label = (drawn.image_index == own).long()
            weight = torch.ones_like(logits[:, 0])
        else:
            times = 2 * self.config.number
            found = (drawn.image_index != own.repeat(times)) | (drawn.text_index != text.repeat(times))
            logits = torch.cat([self.head(results[self.pairs].pooled), logits])
            label = torch.cat([torch.ones_like(own), torch.zeros_like(drawn.image_index)])
            weight = torch.cat([torch.ones_like(own, dtype=logits.dtype), found.to(logits.dtype)])
        loss, right = match_terms(logits, label)
        total = (loss * weight).mean()
        if self.config.listwise:
            total = total + self.config.listwise * list_terms(_odds(logits), found, self.config.number).mean()
        return LossOutput(total, {"accuracy": (right * weight).sum() / weight.sum()})

    def _label(self, batch: Batch) -> Tensor:
        """Class of each given pair, [T] int64."""
        if "match" not in batch.targets:
            raise ValueError(
                "objectives.itm.scheme given needs data that say which pairs are true (match); make some false by "
                "data.pairing, or use another scheme"
            )
        match = batch.targets["match"].long()
        return match if self.config.classes == 3 else (match == 1).long()

    def score(self, pooled: Tensor) -> Tensor:
        """Pooled fused vectors [M, W] -> score [M] that orders pairs, larger = better, as `config.score` says."""
        return self.head(pooled)[:, 1] if self.config.score == "logit" else self.log_odds(pooled)

    def log_odds(self, pooled: Tensor) -> Tensor:
        """Pooled fused vectors [M, W] -> log odds [M] of a match."""
        return _odds(self.head(pooled))


def match_terms(logits: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [M, 2 or 3] and labels [M] int64 -> each row's loss [M], and whether it is right [M], 0 or 1."""
    loss = F.cross_entropy(logits.float(), label, reduction="none")
    return loss, (logits.detach().argmax(1) == label).float()


def list_terms(odds: Tensor, found: Tensor, number: int) -> Tensor:
    """Cross-entropy of the true pair in each text's list of images and each image's list of texts.

    Args:
        odds: score of each pair [T x (1 + 2 number)]: the true ones, then those with false images, then false texts.
        found: whether a false pair is one [T x 2 number]; else it is left out.
        number: false images, and false texts, of each true pair.

    Returns:
        [2, T]: by text, by image.
    """
    lists = 2 * number + 1
    true, false = odds.unflatten(0, (lists, -1)).split([1, 2 * number])
    false = false.masked_fill(~found.unflatten(0, (2 * number, -1)), -torch.inf)
    return torch.stack([torch.cat([true, one]).logsumexp(0) - true[0] for one in false.split(number)])


def _odds(logits: Tensor) -> Tensor:
    """Logits [M, 2 or 3] -> log odds [M] of class 1, float32: differences of bf16 would be in steps of 1/32."""
    logits = logits.float()
    return logits[:, 1] - logits[:, [one for one in range(logits.shape[1]) if one != 1]].logsumexp(1)


def distinct(draw: Draw, name: str, weights: Tensor, otherwise: Tensor, number: int) -> Tensor:
    """Draw ``number`` different columns for each row of ``weights`` [R, C], in proportion and one after another.

    Returns:
        [number x R] int64, all rows' first ones first; where a row has none left, its ``otherwise`` [R].
    """
    drawn = []
    for n in range(number):
        column = draw.categorical(f"{name}.{n}" if n else name, weights)
        drawn.append(torch.where(weights.sum(1) > 0, column, otherwise))
        weights = weights.scatter(1, column[:, None], 0.0)
    return torch.cat(drawn)


def _blend(even: Tensor, hard: Tensor, mix: float) -> Tensor:
    """Mix two tables of weights row by row, each row normalised first."""
    normal = [w / w.sum(1, keepdim=True).clamp(min=1e-30) for w in (even, hard)]
    return (1 - mix) * normal[0] + mix * normal[1]
