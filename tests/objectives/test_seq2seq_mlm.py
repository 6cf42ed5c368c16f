"""Seq2seq MLM: its view and its loss."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from encoders.types import Vocabulary
from objectives.seq2seq_mlm import Seq2SeqView, mean_of_best, smoothed_divergence

WORDS = Vocabulary(size=40, pad=1, cls=0, sep=2, mask=39, bos=0, eos=2)


def test_view_masks_a_fixed_share_and_the_end_too() -> None:
    ids = np.array([0, *range(5, 13), 2])
    ended, kinds = 0, {"mask": 0, "same": 0, "other": 0}
    for seed in range(400):
        view = Seq2SeqView(0.7).make(ids, np.ones(10, bool), WORDS, np.random.default_rng(seed))
        chosen = view.labels != -100
        assert chosen.sum() == 7 and not chosen[0]
        assert (view.ids[~chosen] == ids[~chosen]).all() and (view.labels[chosen] == ids[chosen]).all()
        ended += chosen[-1]
        kinds["mask"] += (view.ids[chosen] == 39).sum()
        kinds["same"] += (view.ids[chosen] == ids[chosen]).sum()
        kinds["other"] += ((view.ids[chosen] != 39) & (view.ids[chosen] != ids[chosen])).sum()
        assert not set(view.ids[chosen]) & {0, 1}
    assert ended / 400 == pytest.approx(7 / 9, abs=0.08)
    assert kinds["mask"] / 2800 == pytest.approx(0.8, abs=0.03) and kinds["other"] / 2800 == pytest.approx(
        0.1, abs=0.03
    )


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_divergence_is_torchs(smoothing: float) -> None:
    logits, targets = torch.randn(6, 40), torch.tensor([3, 5, -100, 7, 39, 0])
    wanted = torch.full((6, 40), smoothing / 39).scatter(1, targets.clamp(min=0)[:, None], 1 - smoothing)
    wanted = F.kl_div(logits.log_softmax(1), wanted, reduction="none").sum(1) * (targets != -100)
    torch.testing.assert_close(smoothed_divergence(logits, targets, smoothing), wanted)


def test_the_worst_words_are_left_out_of_what_is_real() -> None:
    losses = torch.tensor([5.0, 1.0, 9.0, 2.0, 3.0, 100.0, 4.0])
    real = torch.tensor([True, True, True, True, True, False, True])
    assert mean_of_best(losses, real, 0.0).item() == 4.0
    assert mean_of_best(losses, real, 0.2).item() == (1 + 2 + 3 + 4) / 4  # 4.8 of 6, rounded down
    assert mean_of_best(losses, torch.zeros(7, dtype=torch.bool), 0.2).item() == 0.0
