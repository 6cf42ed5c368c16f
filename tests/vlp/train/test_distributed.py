"""What a group of ranks does when one of them ends early."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from vlp.train.distributed import process_group


@pytest.fixture
def left(monkeypatch):
    """Stand in for the group; return the list that each leaving is noted in."""
    found: list[str] = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(dist, "init_process_group", lambda backend: None)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: found.append("left"))
    return found


def test_a_group_is_left_at_the_end(left):
    with process_group(torch.device("cpu")):
        assert left == []
    assert left == ["left"]


def test_an_error_is_seen_before_the_other_ranks_are_waited_for(left):
    """Leaving is a collective of NCCL: who waits in it for ranks that are in a step shows its error to nobody."""
    with pytest.raises(ValueError, match="too many bad samples"), process_group(torch.device("cpu")):
        raise ValueError("too many bad samples")
    assert left == []
