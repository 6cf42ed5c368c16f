"""The model: vision encoder x text encoder x fusion (x decoder), and the objectives with their heads.

``model.run(passes, batch)`` gives named results, ``model.losses(batch, draw)`` the objectives' losses; training,
downstream tasks and the goldens use these two.
Shapes: B images, T texts, D width, E embedding.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from encoders import TextConfig
from encoders.codebook import Codebook
from encoders.grid import GridEncoder
from encoders.patch import PatchEncoder
from encoders.region import RegionEncoder
from encoders.types import Batch, Modality
from objectives import ObjectiveConfig
from objectives.base import (
    AGAIN,
    MAIN,
    Draw,
    ImageView,
    LossOutput,
    ModelSpec,
    Objective,
    Pass,
    Results,
    Rows,
    Side,
    View,
)
from objectives.collectives import sum_no_grad, world_size
from vlp.embed import EmbedConfig, EmbedGradients, EmbedSpace
from vlp.fit import misfits
from vlp.fusion import Fusion, NoFusionConfig
from vlp.fusion.multiway import MultiwayConfig
from vlp.fusion.single import SingleStreamConfig
from vlp.model_config import ModelConfig
from vlp.multimodal import AnyDecoder
from vlp.parts import part_seed, share_head
from vlp.passes import Step, close, views
from vlp.teacher import Teacher
from vlp.usage import image_views, text_views, usable

__all__ = ["EmbedConfig", "Model", "ModelConfig", "build_model", "global_counts"]


class Model(nn.Module):
    """Encoders, fusion, decoder and objectives: the one module that training wraps.

    Args:
        config: sizes and kinds; ``config.text.vocabulary_size`` must be known.
        objectives: by name.
        seed: of the initial weights; each part draws from (seed, its name), so that models share the weights of the
            parts they share.

    Raises:
        ValueError: parts and objectives do not fit each other; the message names both and the ways out.
    """

    def __init__(self, config: ModelConfig, objectives: Mapping[str, ObjectiveConfig], seed: int = 0) -> None:
        super().__init__()
        trains_embed = any(one.trains_embed for one in objectives.values())
        reads = self._reads(config, objectives)
        with part_seed(seed, "vision"):
            self.vision = config.vision.build()
        with part_seed(seed, "text"):
            self.text = config.text.build()
        if isinstance(self.vision, RegionEncoder):
            self.vision.tie(self.text)
        with part_seed(seed, "fusion"):
            self.fusion: Fusion | None = None
            if not isinstance(config.fusion, NoFusionConfig):
                fusion = config.fusion.beside(self.text.stack)
                widths = self.vision.width, self.text.width
                if isinstance(fusion, MultiwayConfig):
                    self.fusion = fusion.build(*widths, reads, getattr(self.vision, "grid", None))
                elif isinstance(fusion, SingleStreamConfig):
                    grid = None if fusion.untied is None else getattr(self.vision, "whole_grid", None)
                    self.fusion = fusion.build(*widths, reads, grid)
                else:
                    self.fusion = fusion.build(*widths, reads)
        with part_seed(seed, "decoder"):
            self.decoder = self._build_decoder(config)
        with part_seed(seed, "codebook"):
            self.codebook: Codebook | None = None if config.codebook is None else config.codebook.build()
        with part_seed(seed, "embed"):
            self.embed = self._build_embed(config.embed) if trains_embed else nn.ModuleDict()
        spec = self._spec(config, trains_embed)
        built = {}
        for name, one in objectives.items():
            with part_seed(seed, f"objectives.{name}"):
                built[name] = one.build(spec)
                built[name].name, built[name].source = name, one.source
        for name, one in objectives.items():
            if one.head_of is not None:
                share_head(built, name, one.head_of)
        self.objectives = nn.ModuleDict(built)
        self.weights = {name: one.weight for name, one in objectives.items()}
        self.objective_configs = dict(objectives)
        self.config = config
        self.teacher = self._build_teacher()
        parts = {"vision": self.vision, "text": self.text, "fusion": self.fusion, "decoder": self.decoder}
        self.config = config.model_copy(update={name: part.config for name, part in parts.items() if part is not None})
        if problems := misfits(self, config):
            raise ValueError("; ".join(problems))

    def _build_decoder(self, config: ModelConfig) -> AnyDecoder | None:
        if config.decoder is None:
            return None
        fused_width = None if self.fusion is None else self.fusion.text_width
        memory_width = self.vision.width
        if config.decoder.memory != "image":
            memory_width = fused_width or self.text.width
        return config.decoder.beside(self.text.stack).build(memory_width, self.text, self.fusion)

    def _build_teacher(self) -> Teacher | None:
        """Copy what the objectives' teacher passes run through, where there are such."""
        passes = [one for one in close(self.needs()) if one.teacher]
        if not passes:
            return None
        return Teacher(self, passes, [name for name, one in self.named_objectives() if one.teaches_head])

    @staticmethod
    def _reads(config: ModelConfig, objectives: Mapping[str, ObjectiveConfig]) -> frozenset[Side]:
        """Which sides of the fusion anyone reads; of a model without objectives, all."""
        if not objectives or config.keep_unread:
            return frozenset({"image", "text", "pooled"})
        sides = frozenset[Side]().union(*(one.reads for one in objectives.values()))
        if config.decoder is None or "memory" not in sides:
            return sides
        return sides | ({"image", "text"} if config.decoder.memory == "both" else {config.decoder.memory})

    def _build_embed(self, config: EmbedConfig) -> nn.ModuleDict:
        widths = self._tower_width("image"), self._tower_width("text")
        return nn.ModuleDict({branch: EmbedSpace(config, *widths) for branch in (MAIN, *config.branches)})

    def space(self, branch: str = MAIN) -> EmbedSpace | None:
        """Return a contrastive space; None if the model has no such."""
        found = dict(self.embed.items()).get(branch)
        assert found is None or isinstance(found, EmbedSpace)
        return found

    def new_results(self) -> Results:
        """Return empty results that know the spaces' temperatures and biases."""
        spaces = dict(self.embed.items())
        biases = {name: one.logit_bias for name, one in spaces.items() if one.logit_bias is not None}
        results = Results({name: one.logit_scale for name, one in spaces.items()}, biases)  # type: ignore[arg-type, misc]
        results.codebook = self.codebook
        return results

    def _tower_width(self, modality: Modality) -> int:
        part = self.vision if modality == "image" else self.text
        return self.fusion.text_width if self.fusion is not None and self.is_tower(modality) else part.width

    def is_tower(self, modality: Modality) -> bool:
        """Whether the fusion is this modality's tower: its encoder gives bare embeddings (BLIP's text, ViLT's both)."""
        part = self.vision if modality == "image" else self.text
        return self.fusion is not None and part.bare

    def _spec(self, config: ModelConfig, trains_embed: bool) -> ModelSpec:
        fusion = self.fusion
        word = self.text.word_embedding
        return ModelSpec(
            vocabulary_size=word.shape[0],
            text_width=fusion.text_width if fusion else self.text.width,
            pooled_width=fusion.pooled_width if fusion else None,
            decoder_width=self.decoder.width if self.decoder else None,
            embed_width=config.embed.width if trains_embed else None,
            word_embedding=word,
            decoder_words=self.decoder.word_embedding if self.decoder else None,
            fusion=config.fusion.kind,
            fusion_attention=fusion.attention_kinds if fusion else (),
            text_eps=getattr(config.text, "eps", 1e-12),
            image_tower_width=self._tower_width("image"),
            image_prefix=getattr(self.vision, "num_prefix", 1),
            image_width=getattr(fusion, "image_width", None),
            image_grid=self.vision.grid if isinstance(self.vision, PatchEncoder) and self.vision.has_patches else None,
            patch_size=getattr(self.vision, "patch_size", 16),
            dictionary=self.vision.hideable if isinstance(self.vision, GridEncoder) else None,
            max_length=getattr(config.text, "max_length", None),
            reads_pixels=not isinstance(self.vision, RegionEncoder),
            feature_projection=getattr(self.vision, "feature_projection", None),
        )

    def named_objectives(self) -> Iterator[tuple[str, Objective]]:
        """Give each objective with its name."""
        for name, module in self.objectives.items():
            assert isinstance(module, Objective)
            yield name, module

    def before_step(self) -> None:
        """Prepare an optimizer step: the teacher follows the student, then every objective's own preparation."""
        if self.teacher is not None:
            self.teacher.update(self, self.config.momentum)
        for _, objective in self.named_objectives():
            objective.before_step()

    def after_step(self) -> None:
        """Run every objective's :meth:`Objective.after_step`; a dictionary follows the cells of all ranks."""
        if isinstance(self.vision, GridEncoder) and self.vision.dictionary is not None:
            self.vision.dictionary.follow(sum_no_grad)
        for _, objective in self.named_objectives():
            objective.after_step()

    def load_pretrained(self) -> None:
        """Fill every part that the recipe starts from published weights."""
        for part in (self.vision, self.text, self.fusion, self.decoder, self.codebook):
            if part is not None:
                part.load_pretrained()
        if self.teacher is not None:
            self.teacher.copy_from(self)

    def needs(self, names: Iterable[str] | None = None) -> frozenset[Pass]:
        """Return the union of what the objectives (of these names) need."""
        wanted = None if names is None else set(names)
        return frozenset[Pass]().union(*(o.needs for n, o in self.named_objectives() if wanted is None or n in wanted))

    def text_views(self) -> dict[str, View]:
        """Return how the text views of all objectives are made.

        Raises:
            ValueError: two objectives ask for the same name with different definitions.
        """
        return text_views(dict(self.named_objectives()))

    def image_names(self, names: Iterable[str] | None = None) -> set[str]:
        """Return the views of the images that objectives or the teacher read; the clean one always."""
        again = {AGAIN} if self.teacher is not None and self.config.teacher_view == AGAIN else set()
        return views(self.needs(names))["image"] | {"clean"} | again

    def image_views(self) -> dict[str, ImageView]:
        """Return how the image views of all objectives are made.

        Raises:
            ValueError: two objectives ask for the same name with different definitions.
        """
        return image_views(dict(self.named_objectives()))

    def run(
        self, passes: Iterable[Pass], batch: Batch, layers: bool = False, rows: Mapping[str, Rows] | None = None
    ) -> Results:
        """Compute passes by name -> {Encode: Tokens, Embed: [B, E], Fuse: Fused, Decode: Tokens}.

        Args:
            passes: what to compute; what they read is computed too, each once.
            batch: must hold the views that the passes name.
            layers: also keep every layer's states.
            rows: pairs for ``Fuse(rows=name)``, by name.
        """
        return Step(self, batch, layers).run(passes, None if rows is None else lambda results: rows)

    def losses(self, batch: Batch, draw: Draw, names: Iterable[str] | None = None) -> dict[str, LossOutput]:
        """Return each objective's loss over this batch, all from one set of shared passes.

        Args:
            batch: an image-only or text-only batch runs the objectives that need nothing else.
            draw: the step's randomness.
            names: only these objectives (sampled objectives, UNITER).
        """
        return self._losses(batch, draw, names, first=())[1]

    def _losses(
        self, batch: Batch, draw: Draw, names: Iterable[str] | None, first: Iterable[Pass]
    ) -> tuple[Results, dict[str, LossOutput]]:
        """Run the passes ``first``, then all others that the objectives need, then the objectives."""
        chosen = self.active(batch, names)

        def give_rows(results: Results) -> dict[str, Rows]:
            found: dict[str, Rows] = {}
            for objective in chosen.values():
                found |= objective.rows(results, batch, draw)
            return found

        step = Step(self, batch)
        step.run(first)
        results = step.run(self.needs(chosen), give_rows)
        return results, {name: objective(results, batch, draw) for name, objective in chosen.items()}

    def active(self, batch: Batch, names: Iterable[str] | None = None) -> dict[str, Objective]:
        """Return the objectives that a batch of these modalities can train.

        Raises:
            ValueError: none, or a name is unknown.
        """
        known = dict(self.named_objectives())
        wanted = list(known) if names is None else list(names)
        if unknown := [name for name in wanted if name not in known]:
            raise ValueError(f"unknown objectives {unknown}; the model has {sorted(known)}")
        missing = batch.missing
        found = usable({name: known[name] for name in wanted}, batch.source, missing)
        if wanted and not found:
            what = f"without {' and '.join(sorted(missing))}" if missing else "of pairs"
            what += f" of source {batch.source}" if batch.source else ""
            raise ValueError(f"no objective of {wanted} can use a batch {what}")
        return found

    def counts(self, batch: Batch, names: Iterable[str] | None = None) -> dict[str, Tensor]:
        """Return over how many terms each objective's mean goes, as device scalars."""
        device = self.device
        found = {name: objective.count(batch) for name, objective in self.active(batch, names).items()}
        # `full` writes a number on the device; `as_tensor` would copy it there and wait.
        return {
            name: n.to(device, torch.float32) if isinstance(n, Tensor) else torch.full((), n, device=device)
            for name, n in found.items()
        }

    def forward(
        self,
        batch: Batch,
        draw: Draw,
        totals: Mapping[str, Tensor] | None = None,
        names: Iterable[str] | None = None,
        received: EmbedGradients | None = None,
    ) -> tuple[Tensor, dict[str, LossOutput]]:
        """Return the loss whose mean over ranks is that of the joined batch, and every objective's output.

        Args:
            batch: this rank's micro-batch.
            draw: its randomness.
            totals: each objective's count over all ranks and micro-batches of the step; None: over all ranks.
            names: only these objectives.
            received: what losses over the whole step, which are not among ``names``, give this batch's embeds.
        """
        # The embeds come first, as where their gradients were found: dropout then draws the same.
        results, outputs = self._losses(batch, draw, names, () if received is None else received.embeds)
        counts = self.counts(batch, outputs)
        if totals is None:
            totals = global_counts(counts)
        parts = [
            self.weights[name] * out.loss * counts[name] * world_size() / totals[name].clamp(min=1)
            for name, out in outputs.items()
        ]
        if received is not None:
            parts.append(received.surrogate(results))
        return torch.stack([part.reshape(()) for part in parts]).sum(), outputs

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.parameters()).device


def global_counts(counts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Sum counts over ranks in one collective."""
    names = list(counts)
    total = sum_no_grad(torch.stack([counts[name] for name in names]))
    return dict(zip(names, total.unbind(), strict=True))


def build_model(
    config: ModelConfig,
    objectives: Mapping[str, ObjectiveConfig],
    *,
    vocabulary_size: int | None = None,
    seed: int = 0,
    pretrained: bool = True,
) -> Model:
    """Build a model, its vocabulary size taken from the tokenizer where the recipe does not say it.

    Args:
        config: the recipe's model.
        objectives: by name.
        vocabulary_size: of the tokenizer.
        seed: of the initial weights.
        pretrained: fill parts from published weights where the recipe says so.

    Raises:
        ValueError: the parts do not fit each other, or the tokenizer has more words than the text encoder.
    """
    text = config.text
    if isinstance(text, TextConfig) and vocabulary_size is not None:
        if text.vocabulary_size is None:
            config = config.model_copy(update={"text": text.model_copy(update={"vocabulary_size": vocabulary_size})})
        elif text.vocabulary_size < vocabulary_size:
            raise ValueError(
                f"model.text.vocabulary_size {text.vocabulary_size} is less than the tokenizer's {vocabulary_size}; "
                "remove it from the recipe or use another tokenizer"
            )
    model = Model(config, objectives, seed)
    if pretrained:
        model.load_pretrained()
    return model
