import pickle

import numpy as np
import pytest

from objectives.base import Draw
from vlp.data.order import Order, batch_positions, rank_slice


def test_each_epoch_is_another_permutation():
    order = Order(101, seed=7)
    epochs = [[order.index(p) for p in range(e * 101, (e + 1) * 101)] for e in range(3)]
    assert all(sorted(epoch) == list(range(101)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert epochs[0] != list(range(101))
    assert order.permutation(0).dtype == np.int64


def test_index_depends_on_nothing_but_seed_and_position():
    expected = {p: Order(50, seed=3).index(p) for p in range(200)}
    order = Order(50, seed=3)
    for p in np.random.default_rng(0).permutation(200):
        assert order.index(int(p)) == expected[int(p)]
        assert len(order._epochs) <= 2
    other = pickle.loads(pickle.dumps(order))
    assert [other.index(p) for p in range(200)] == list(expected.values())
    assert [Order(50, seed=4).index(p) for p in range(200)] != list(expected.values())


def test_the_order_is_frozen():
    # A change here breaks the resume of every run: the values were computed once and are kept.
    assert Order(8, seed=1234).permutation(0).tolist() == FROZEN


FROZEN = [7, 3, 0, 1, 4, 2, 5, 6]


def test_unshuffled_order_repeats():
    order = Order(4, seed=0, shuffle=False)
    assert [order.index(p) for p in range(9)] == [0, 1, 2, 3, 0, 1, 2, 3, 0]
    assert order.permutation(5).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("count", [0, 1, 5, 12, 13])
@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_rank_slices_join_to_the_global_batch(count, world):
    parts = [rank_slice(100, count, rank, world) for rank in range(world)]
    assert [p for part in parts for p in part] == list(range(100, 100 + count))
    sizes = [len(part) for part in parts]
    assert sizes == sorted(sizes, reverse=True)
    assert max(sizes) - min(sizes) <= 1


def test_last_batch_is_short():
    assert batch_positions(0, 8, 20) == range(0, 8)
    assert batch_positions(16, 8, 20) == range(16, 20)
    assert len(batch_positions(20, 8, 20)) == 0


def test_per_sample_draws_are_pure_and_keys_are_independent():
    assert Draw(1).sample("image", 5).random() == Draw(1).sample("image", 5).random()
    draws = {Draw(s).sample(n, p).random() for s in (0, 1) for n in ("image", "mlm") for p in (0, 1)}
    assert len(draws) == 8


@pytest.mark.parametrize("size, seed, word", [(0, 0, "size"), (3, -1, "seed"), (3, 2**64, "seed")])
def test_out_of_range(size, seed, word):
    with pytest.raises(ValueError, match=word):
        Order(size, seed)
