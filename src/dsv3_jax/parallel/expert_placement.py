"""Where experts and their replicas go, by measured load. No JAX.

Some experts are asked more than others. A decode unit hosts more experts than the model has: the
most loaded ones several times, each replica taking its share of the tokens. Balanced in three steps
where the router's groups divide among the nodes, so that a group's experts stay on one node (its
tokens cross to as few nodes as before):

    1. groups to nodes       heaviest group first, to the least loaded node that has room
    2. replicas in a node    again and again the expert with the most load a replica gets one more
    3. replicas to GPUs      heaviest first, to the least loaded GPU of the node that has room

Otherwise the same with one group and one node.
Source: DeepSeek-V3 Technical Report §3.4; the algorithm is that of DeepSeek's EPLB.
"""

import dataclasses
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from dsv3_jax.config.checks import require


@dataclass(frozen=True, kw_only=True, eq=False)
class Placement:
    """Of each layer, which expert is in each physical slot; GPU g has slots g*n to g*n + n - 1."""

    expert_of_slot: Int[np.ndarray, "layers slots"]
    replica_of_slot: Int[np.ndarray, "layers slots"]
    """Which of the expert's replicas it is, from 0."""
    replicas: Int[np.ndarray, "layers experts"]
    """How many slots each expert has."""

    def slots_of(self) -> Int[np.ndarray, "layers experts most"]:
        """Each expert's slots by replica, -1 behind its last."""
        layers, experts = self.replicas.shape
        slots = np.full((layers, experts, int(self.replicas.max())), -1)
        layer = np.arange(layers)[:, None]
        places = np.broadcast_to(np.arange(self.expert_of_slot.shape[1]), self.expert_of_slot.shape)
        slots[layer, self.expert_of_slot, self.replica_of_slot] = places
        return slots

    def with_layer(self, layer: int, placement: "Placement") -> "Placement":
        """This one but for a layer, which is as the one layer of `placement`."""
        changed = {}
        for field in dataclasses.fields(self):
            changed[field.name] = getattr(self, field.name).copy()
            changed[field.name][layer] = getattr(placement, field.name)[0]
        return Placement(**changed)


def place_experts(
    load: Float[np.ndarray, "layers experts"],
    *,
    slots: int,
    groups: int,
    nodes: int,
    gpus: int,
) -> Placement:
    """The placement that evens out `load`, tokens to each expert, over the GPUs of `nodes` nodes.

    Raises ValueError where the numbers do not divide, or there are fewer slots than experts.

    >>> place_experts(np.array([[1.0, 9.0]]), slots=4, groups=1, nodes=1, gpus=2).replicas
    array([[1, 3]])
    """
    experts = load.shape[1]
    require(slots >= experts, "slots", slots, f"at least the number of experts, {experts}")
    require(slots % gpus == 0, "slots", slots, f"a multiple of the number of GPUs, {gpus}")
    require(gpus % nodes == 0, "gpus", gpus, f"a multiple of the number of nodes, {nodes}")
    require(experts % groups == 0, "groups", groups, f"a divisor of the {experts} experts")
    require(bool(np.all(load >= 0)), "load", float(np.min(load)), "no negative number")
    if groups % nodes:
        groups = nodes = 1  # experts of a group would be on two nodes anyway
    parts = [_place_layer(of_layer, slots, groups, nodes, gpus) for of_layer in load]
    expert_of_slot = np.stack([expert for expert, _ in parts])
    replicas = np.stack([np.bincount(row, minlength=experts) for row in expert_of_slot])
    return Placement(
        expert_of_slot=expert_of_slot,
        replica_of_slot=np.stack([replica for _, replica in parts]),
        replicas=replicas,
    )


def gpu_loads(
    load: Float[np.ndarray, "layers experts"], placement: Placement, gpus: int
) -> Float[np.ndarray, "layers gpus"]:
    """Tokens to each GPU, an expert's shared evenly by its replicas."""
    share = load / placement.replicas
    of_slot = np.take_along_axis(share, placement.expert_of_slot, axis=1)
    return of_slot.reshape(load.shape[0], gpus, -1).sum(axis=2)


def _place_layer(
    load: Float[np.ndarray, " experts"], slots: int, groups: int, nodes: int, gpus: int
) -> tuple[Int[np.ndarray, " slots"], Int[np.ndarray, " slots"]]:
    """Expert and replica of each slot."""
    size = load.size // groups
    node_of_group = pack(load.reshape(groups, size).sum(axis=1), nodes)
    expert_of_slot, replica_of_slot = [], []
    for node in range(nodes):
        here = np.concatenate([np.arange(g * size, (g + 1) * size) for g in node_of_group[node]])
        expert, replica = replicate(load[here], slots // nodes)
        count = np.bincount(expert)
        for gpu in pack((load[here] / count)[expert], gpus // nodes):
            expert_of_slot.append(here[expert[gpu]])
            replica_of_slot.append(replica[gpu])
    return np.concatenate(expert_of_slot), np.concatenate(replica_of_slot)


def replicate(
    load: Float[np.ndarray, " experts"], slots: int
) -> tuple[Int[np.ndarray, " slots"], Int[np.ndarray, " slots"]]:
    """Expert and replica of each slot: each once, then one more of whoever has most a replica."""
    count = np.ones(load.size, int)
    expert, replica = list(range(load.size)), [0] * load.size
    while len(expert) < slots:
        most = int(np.argmax(load / count))
        expert.append(most)
        replica.append(int(count[most]))
        count[most] += 1
    return np.array(expert), np.array(replica)


def pack(load: Float[np.ndarray, " items"], bins: int) -> list[list[int]]:
    """Of each bin its items, equally many: the heaviest first, to the least loaded with room."""
    room, packed, total = load.size // bins, [[] for _ in range(bins)], np.zeros(bins)
    for item in np.argsort(-load, kind="stable"):
        open_bins = [b for b in range(bins) if len(packed[b]) < room]
        chosen = min(open_bins, key=lambda b: total[b])
        packed[chosen].append(int(item))
        total[chosen] += load[item]
    return packed
