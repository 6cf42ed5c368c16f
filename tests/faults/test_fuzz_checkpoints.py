"""Damaged and hostile checkpoint files end in a report or one line; `make fuzz` is the long version."""

from __future__ import annotations

from scripts.fuzz_checkpoints import fuzz, seedlings


def test_a_minute_of_mutated_checkpoints() -> None:
    assert len(seedlings()) > 10, "the golden cases are what is mutated"
    outcomes, failures = fuzz(2000, seed=1, seconds=60)
    assert failures == []
    kinds = {what.partition(":")[0] for what in outcomes}
    assert kinds == {"truncate", "flip_bits", "rename_keys", "reshape", "poison", "bomb", "damage_settings"}
