"""The visual dictionary of a grid: nearest entries, how they follow their cells, and what is hidden together."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import tiny_batch, tiny_model

from encoders import GridConfig
from encoders.dictionary import Dictionary, DictionaryConfig, same_entry
from encoders.grid import GridEncoder
from encoders.positions import sine_positions
from encoders.types import Images
from objectives import ItcConfig, ItmConfig
from vlp.train.optim import OptimConfig
from vlp.train.step import TrainStep

PIXELS = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
SMALL = {"output_stride": 8, "channels": (8, 8, 8, 12), "stem_width": 8}
ENTRIES = {"entries": 10, "width": 8}


def cells(seed: int = 0, images: int = 3) -> torch.Tensor:
    return torch.randn(images, 6, 5, generator=torch.Generator().manual_seed(seed))


def dictionary(**more: Any) -> Dictionary:
    torch.manual_seed(0)
    return Dictionary(DictionaryConfig(**ENTRIES | more), 5)


def encoder(masks: bool = True, **more: Any) -> GridEncoder:
    torch.manual_seed(0)
    own = DictionaryConfig(**ENTRIES, mask_token=masks)
    return GridConfig(model="resnet10t", image_size=32, arguments=SMALL, dictionary=own, **more).build()


def test_a_cell_becomes_its_nearest_entry_and_passes_its_gradient_on() -> None:
    own, given = dictionary().eval(), cells().requires_grad_()
    tokens, labels = own(given)
    values = own.norm(own.project(given))
    assert labels is None
    nearest = torch.cdist(values.flatten(0, 1), own.entries).argmin(1)
    torch.testing.assert_close(tokens.flatten(0, 1), own.entries[nearest])
    towards = torch.randn_like(tokens)
    found = torch.autograd.grad((tokens * towards).sum(), given, retain_graph=True)[0]
    torch.testing.assert_close(found, torch.autograd.grad((values * towards).sum(), given)[0])


def test_entries_follow_the_mean_of_their_cells() -> None:
    own = dictionary(momentum=0.75).train()
    own.placed.fill_(True)
    before = own.entries.clone()
    values = own.norm(own.project(cells())).detach().flatten(0, 1)
    numbers = own.numbers(values)
    own(cells())
    assert torch.equal(own.entries, before), "nothing moves before the step is done"
    own.follow(lambda x: x)
    for number, entry in enumerate(own.entries):
        mine = values[numbers == number]
        wanted = before[number] if len(mine) == 0 else 0.75 * before[number] + 0.25 * mine.mean(0)
        torch.testing.assert_close(entry, wanted)
    assert 1 < len(numbers.unique()) < 10 and not own.totals.any()
    after = own.entries.clone()
    own.eval()(cells())
    own.follow(lambda x: x)
    assert torch.equal(own.entries, after), "what is only read moves nothing"
    own.train().requires_grad_(False)(cells())
    own.follow(lambda x: x)
    assert torch.equal(own.entries, after), "a frozen part stays as it is"


def test_a_step_in_parts_or_on_several_ranks_is_the_same_step() -> None:
    whole, parts, first, second = (dictionary().train() for _ in range(4))
    for step in range(3):
        one, other = cells(2 * step), cells(2 * step + 1, images=1)
        whole(torch.cat([one, other]))
        parts(one), parts(other)
        first(one), second(other)
        sums = {1: first.totals + second.totals, 8: first.squares + second.squares}
        for own in (whole, parts):
            own.follow(lambda x: x)
        for rank in (first, second):
            rank.follow(lambda x, sums=sums: sums[1 if x.dim() == 2 else 8])
        for own in (parts, first, second):
            torch.testing.assert_close(own.entries, whole.entries)


def test_the_first_step_spreads_entries_as_the_cells_are_spread() -> None:
    own, many = dictionary(entries=4000).train(), cells(images=200)
    values = own.norm(own.project(many)).detach().flatten(0, 1)
    own(many)
    own.follow(lambda x: x)
    torch.testing.assert_close(own.entries.mean(0), values.mean(0), atol=0.05, rtol=0)
    torch.testing.assert_close(own.entries.std(0), values.std(0), atol=0.05, rtol=0)
    placed = own.entries.clone()
    own(many)
    own.follow(lambda x: x)
    assert 0 < (own.entries != placed).any(1).sum() < 4000, "and never again"


def test_all_cells_of_a_hidden_entry_are_hidden() -> None:
    numbers = torch.tensor([[4, 4, 1, 0, 4, 1], [2, 2, 2, 2, 2, 2], [0, 1, 2, 3, 4, 5]])
    named = torch.zeros(3, 6, dtype=torch.bool)
    named[0, 1] = named[0, 3] = named[1, 5] = True
    wanted = torch.tensor([[1, 1, 0, 1, 1, 0], [1] * 6, [0] * 6], dtype=torch.bool)
    assert torch.equal(same_entry(numbers, named), wanted)
    own = dictionary(mask_token=True).eval()
    torch.nn.init.normal_(own.mask)
    shown, _ = own(cells())
    numbers = own.numbers(own.norm(own.project(cells())))
    tokens, labels = own(cells(), named)
    hidden = same_entry(numbers, named)
    assert torch.equal(labels, torch.where(hidden, numbers, -100)) and hidden.any()
    assert torch.equal(tokens[~hidden], shown[~hidden])
    assert torch.equal(tokens[hidden], own.mask.expand(int(hidden.sum()), -1))
    own(cells())[0].sum().backward()
    assert own.mask.grad is not None and not own.mask.grad.any(), "ranks wait for it also where nothing is hidden"
    with pytest.raises(ValueError, match=r"mask_token is false; set it to true"):
        dictionary()(cells(), named)


def test_what_is_hidden_is_known_of_the_cells_that_are_read() -> None:
    own = encoder(sample=5, mean_token=True, positions="sine")
    named = torch.zeros(3, 16, dtype=torch.bool)
    named[:2, 7] = True
    whole = own.eval()(Images(PIXELS, masked=named))
    assert whole.states.shape == (3, 17, 8) and whole.labels is not None and (whole.labels[:, 0] == -100).all()
    assert (whole.labels != -100).any(1).tolist() == [True, True, False]
    part = own.train()(Images(PIXELS, masked=named))
    assert part.states.shape == (3, 6, 8) and part.labels is not None
    for row in range(3):
        for state, label in zip(part.states[row, 1:], part.labels[row, 1:], strict=True):
            at = (whole.states[row, 1:] - state).abs().sum(1).argmin()
            torch.testing.assert_close(whole.states[row, 1 + at], state)
            assert label == whole.labels[row, 1 + at]


def test_cells_are_counted_without_running_them() -> None:
    assert encoder().hideable == (10, 16) and encoder(max_pool=True).hideable == (10, 4)
    assert encoder(masks=False).hideable is None and encoder(mean_token=True, sample=3).hideable == (10, 16)
    swin = {"img_size": 32, "embed_dim": 16, "depths": (1, 1), "num_heads": (1, 2), "window_size": 4}
    own = DictionaryConfig(**ENTRIES, mask_token=True)
    config = GridConfig(model="swin_tiny_patch4_window7_224", image_size=32, arguments=swin, dictionary=own)
    built = config.build().eval()
    named = torch.ones(3, 16, dtype=torch.bool)
    assert built.hideable == (10, 16) and built(Images(PIXELS, masked=named)).states.shape == (3, 16, 8)


def test_what_cannot_be_hidden_is_refused() -> None:
    plain = GridConfig(model="resnet10t", image_size=32, arguments=SMALL).build()
    with pytest.raises(ValueError, match=r"set model\.vision\.dictionary"):
        plain(Images(PIXELS, masked=torch.ones(3, 16, dtype=torch.bool)))
    with pytest.raises(ValueError, match=r"hide some of 9 cells, but .* grid has 16"):
        encoder()(Images(PIXELS, masked=torch.ones(3, 9, dtype=torch.bool)))
    with pytest.raises(ValueError, match="multiple of 4, not 6"):
        sine_positions((2, 2), 6)


def test_sines_and_cosines_say_row_and_column() -> None:
    """By hand, as DETR's paper has them: of a half of the width for rows, then as much for columns."""
    found = sine_positions((2, 3), 8).unflatten(0, (2, 3))
    for row in range(2):
        for column in range(3):
            wanted = []
            for place in (2 * math.pi * (row + 1) / 2, 2 * math.pi * (column + 1) / 3):
                for pair in range(2):
                    angle = place / 10000 ** (2 * pair / 4)
                    wanted += [math.sin(angle), math.cos(angle)]
            torch.testing.assert_close(found[row, column], torch.tensor(wanted))


def tiny(objectives: Any = ("itm", "mlm")) -> Any:
    small = {**SMALL, "channels": (8, 8, 8, 8)}
    own = DictionaryConfig(**ENTRIES)
    vision = GridConfig(model="resnet10t", image_size=16, sample=3, arguments=small, dictionary=own)
    return tiny_model("single_stream", objectives, vision=vision).train()


def step_of(model: Any) -> TrainStep:
    return TrainStep(model, OptimConfig(lr=1e-3, ema=0.9), seed=0, total=64)


def test_entries_are_saved_and_come_back() -> None:
    """Two steps, saved, loaded and two more are four in one go; the average of the weights reads the same entries."""
    batches = [tiny_batch(4, seen=4 * number, first=4 * number) for number in range(4)]
    model, started = tiny(), tiny().vision.dictionary.entries.clone()
    step = step_of(model)
    for number, batch in enumerate(batches):
        if number == 2:
            weights, state = {n: x.clone() for n, x in model.state_dict().items()}, step.state_dict()
            state = {**state, "average": {n: x.clone() for n, x in state["average"].items()}}
            optimizer = {n: {k: v.clone() for k, v in s.items()} for n, s in state["optimizer"].items()}
        step([batch])
    assert {n for n in weights if "dictionary" in n and "project" not in n and "norm" not in n} == {
        "vision.dictionary.entries",
        "vision.dictionary.placed",
    }
    again = tiny()
    again.load_state_dict(weights)
    resumed = step_of(again)
    resumed.load_state_dict({**state, "optimizer": optimizer})
    for batch in batches[2:]:
        resumed([batch])
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    entries = model.vision.dictionary.entries
    assert not torch.equal(entries, started) and not torch.equal(entries, weights["vision.dictionary.entries"])
    assert torch.equal(step.average.module.vision.dictionary.entries, entries)


def test_the_teacher_reads_by_the_students_entries() -> None:
    model = tiny({"itc": ItcConfig(queue=8, distill=0.4), "itm": ItmConfig()})
    step = step_of(model)
    for number in range(2):
        step([replace(tiny_batch(4, seen=4 * number), seen=4 * number)])
    model.before_step()
    assert torch.equal(model.teacher.vision.dictionary.entries, model.vision.dictionary.entries)
    assert not model.teacher.vision.dictionary.totals.any()


def test_a_step_without_images_leaves_the_entries_to_the_first_that_has_some() -> None:
    own = dictionary().train()
    before = own.entries.clone()
    own.follow(lambda x: x)
    assert torch.equal(own.entries, before) and not own.placed
    own(cells())
    own.follow(lambda x: x)
    assert own.placed and len(own.entries.unique(dim=0)) == 10
