"""When experts are placed anew, and by which load; and what a table of slots says."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dsv3_jax.model.expert_slots import ExpertSlots, slot_tables
from dsv3_jax.parallel.exchange_plan import NO_EXPERT
from dsv3_jax.parallel.expert_placement import Placement, place_experts
from dsv3_jax.serve.expert_balance import ExpertBalance

LAYERS, EXPERTS, SLOTS = 3, 4, 6


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def first_placement() -> Placement:
    return place_experts(np.ones((LAYERS, EXPERTS)), slots=SLOTS, groups=1, nodes=1, gpus=2)


def balance(seconds: float | None, clock: Clock) -> ExpertBalance:
    return ExpertBalance(first_placement(), groups=1, nodes=1, gpus=2, seconds=seconds, clock=clock)


def test_each_layer_with_a_load_is_placed_once_a_round():
    clock = Clock()
    balanced = balance(10.0, clock)
    load = np.array([[9.0, 1, 1, 1], [0, 0, 0, 0], [1, 1, 1, 9]])
    balanced.add(load)
    clock.now = 9.0
    assert balanced.next_layer() is None
    clock.now = 10.0
    found = [balanced.next_layer() for _ in range(3)]
    assert [None if f is None else f[0] for f in found] == [0, 2, None]
    # The two more slots go to whoever has most a replica: 9, then 4.5.
    assert found[0][1].replicas.tolist() == [[3, 1, 1, 1]]
    assert found[1][1].replicas.tolist() == [[1, 1, 1, 3]]
    first = first_placement().replicas.tolist()[1]
    assert balanced.placement.replicas.tolist() == [[3, 1, 1, 1], first, [1, 1, 1, 3]]
    assert balanced.rounds == 1
    clock.now = 30.0  # nothing since
    assert balanced.next_layer() is None and balanced.rounds == 1


def test_without_a_time_a_round_begins_when_it_is_told_to():
    balanced = balance(None, Clock())
    balanced.add(np.ones((LAYERS, EXPERTS)))
    assert balanced.next_layer() is None
    balanced.begin()
    assert [balanced.next_layer()[0] for _ in range(3)] == [0, 1, 2]


def test_how_uneven_the_gpus_are():
    balanced = balance(None, Clock())
    assert balanced.unevenness() == 1.0
    load = np.zeros((LAYERS, EXPERTS))
    load[0] = [3.0, 1, 1, 1]
    balanced.add(load)
    slots, share = first_placement().expert_of_slot[0], load[0] / first_placement().replicas[0]
    gpus = share[slots].reshape(2, 3).sum(axis=1)
    assert balanced.unevenness() == max(gpus) / 3


def test_rows_take_the_replicas_of_an_expert_in_turn():
    placement = place_experts(np.array([[9.0, 1, 1, 1]]), slots=6, groups=1, nodes=1, gpus=2)
    slots, replicas = slot_tables(placement, 4)
    assert slots.shape == (1, 4, 4) and replicas.tolist() == [[3, 1, 1, 1]]
    graph, state = nnx.split(ExpertSlots(placement, most=4))
    table = nnx.merge(graph, jax.tree.map(lambda of_layers: of_layers[0], state))
    experts = jnp.asarray([[0, 1], [0, 1], [0, NO_EXPERT], [0, 3]], jnp.int32)
    places = np.asarray(table(experts))
    expert_of = placement.expert_of_slot[0]
    assert places[2, 1] == NO_EXPERT
    assert [[expert_of[s] for s in row if s >= 0] for row in places] == [
        [0, 1],
        [0, 1],
        [0],
        [0, 3],
    ]
    assert len(set(places[:3, 0])) == 3 and places[3, 0] == places[0, 0]
