"""What a finetuning's new parts begin as."""

from __future__ import annotations

import pytest
import torch
from helpers import SIZES, tiny_model

from downstream.transfer import take_weights
from objectives import AnswerConfig, AssignConfig, ItcConfig, ItmConfig, LmConfig, MlmConfig
from vlp.fusion.dual import DualStreamConfig

PRETRAINED = {"itc": ItcConfig(queue=4, distill=0.4), "itm": ItmConfig(), "mlm": MlmConfig(distill=0.4)}


def test_a_fusion_that_reads_two_images_by_turns_begins_with_every_block_twice() -> None:
    source = tiny_model("dual_stream", PRETRAINED)
    with torch.no_grad():
        for weight in source.teacher.parameters():
            weight.add_(0.5)
    doubled = DualStreamConfig(**SIZES | {"layers": 4}, images="alternate")
    answer = AnswerConfig(answers=("False", "True"), loss="ce", head="relu", distill=0.4)
    model = tiny_model(doubled, {"answer": answer}, seed=1)
    report = take_weights(model, source)
    assert {name.split(".")[0] for name in report.missing} <= {"objectives", "teacher"}
    for part, other in ((model, source), (model.teacher, source.teacher)):
        for number, block in enumerate(part.fusion.blocks):
            for name, weight in block.state_dict().items():
                assert torch.equal(weight, other.fusion.blocks[number // 2].state_dict()[name]), (number, name)
    # A head that is new is new in the teacher too: it begins as its student.
    head, taught = model.objectives["answer"].head, model.teacher.heads["answer"].head
    assert all(torch.equal(a, b) for a, b in zip(head.parameters(), taught.parameters(), strict=True))


@pytest.mark.parametrize("images", ["parallel", "each"])
def test_a_second_image_begins_as_the_first(images: str) -> None:
    marked = {"modality_embedding": images == "each", "project": images == "each"}
    source = tiny_model(DualStreamConfig(**SIZES, **marked), {"itm": ItmConfig()})
    fusion = DualStreamConfig(**SIZES, **marked, images=images, merge_from=2)
    model = tiny_model(fusion, {"answer": AnswerConfig(answers=("False", "True"))}, seed=1)
    report = take_weights(model, source)
    assert {name.split(".")[0] for name in report.missing} == {"objectives"}
    if images == "each":
        old, new = source.fusion.modality.weight, model.fusion.modality.weight
        assert torch.equal(new[:2], old) and torch.equal(new[2], old[0])
        return
    for block, other in zip(model.fusion.blocks, source.fusion.blocks, strict=True):
        for twin in block.cross.twins:
            assert torch.equal(twin.key.weight, other.cross.key.weight)


def test_text_assignment_finds_images_alike_by_the_contrastive_projection() -> None:
    source = tiny_model("dual_stream", PRETRAINED)
    config = DualStreamConfig(**SIZES | {"layers": 4}, images="alternate")
    model = tiny_model(config, {"assign": AssignConfig(width=16)}, seed=1)
    take_weights(model, source)
    assert torch.equal(model.objectives["assign"].alike.weight, source.embed["main"].image.weight)


def test_a_decoder_begins_as_the_fusion_and_its_teacher_as_the_decoder() -> None:
    source = tiny_model("dual_stream", PRETRAINED)
    model = tiny_model("dual_stream", {"lm": LmConfig(memory="fused", view="lm:answer", distill=0.4)}, seed=1)
    take_weights(model, source)
    for name, weight in model.decoder.blocks.state_dict().items():
        assert torch.equal(weight, source.fusion.blocks.state_dict()[name])
        assert torch.equal(weight, model.teacher.decoder.blocks.state_dict()[name])


def test_wider_patches_give_the_tokens_of_the_checkpoints_on_a_picture_of_twice_the_size() -> None:
    source = tiny_model("dual_stream", PRETRAINED)
    vision = source.config.vision
    twice = vision.model_copy(update={"patch_size": 2 * vision.patch_size, "image_size": 2 * vision.image_size})
    model = tiny_model("dual_stream", {"answer": AnswerConfig(answers=("no", "yes"))}, seed=1, vision=twice)
    report = take_weights(model, source)
    assert not [name for name in report.missing if name.startswith("vision.")]
    colours = torch.rand(2, 3, *model.vision.grid)  # one for each patch
    small, large = (
        colours.repeat_interleave(one.patch_size, 2).repeat_interleave(one.patch_size, 3) for one in (vision, twice)
    )
    torch.testing.assert_close(
        model.vision.vit.patch_embed(large), source.vision.vit.patch_embed(small), atol=1e-4, rtol=1e-3
    )
