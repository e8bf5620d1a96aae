"""States of parts: what they take, what a checkpoint gets, and what must be equal on all ranks."""

import pytest
import torch

from rltrain.errors import RunError
from rltrain.runs.part_states import PartStates, copies, digest, refuse_difference

TENSORS = {
    "sums": torch.tensor([1.5, float("nan")], dtype=torch.float64),
    "count": torch.tensor(3),
    "half": torch.ones(2, 2, dtype=torch.bfloat16).mT,
    "seen": torch.tensor([True, False]),
    "none": torch.empty(0, 4),
}


def test_states_go_through_a_checkpoint_by_part_and_bit_for_bit():
    states = PartStates()
    states.of("rewards/answer").update(TENSORS)
    states.of("advantage/custom")["sums"] = torch.zeros(1, requires_grad=True)
    assert states.kept == {}  # until a step is done
    states.keep()
    again = PartStates(states.kept | {"policy/weight": torch.ones(1)})
    assert set(again.of("rewards/answer")) == set(TENSORS)
    for name, expected in TENSORS.items():
        assert digest(again.of("rewards/answer")[name]) == digest(expected)
    assert not again.of("advantage/custom")["sums"].requires_grad
    assert again.kept.keys() == states.kept.keys()


def test_a_checkpoint_holds_the_last_finished_step():
    states = PartStates()
    state = states.of("advantage/a")
    state["n"] = torch.tensor(1)
    states.keep()
    state["n"] += 1
    assert int(states.kept["state/advantage/a:n"]) == 1 and int(states.of("advantage/a")["n"]) == 2


def test_copies_are_used_and_forgotten():
    states = PartStates()
    states.of("rewards/a")["n"] = torch.tensor(1)
    copy = copies(states.of)("rewards/a")
    copy["n"] += 1
    copy["m"] = torch.tensor(5)
    assert dict(states.of("rewards/a")) == {"n": torch.tensor(1)}
    assert int(copies(states.of)("rewards/a")["n"]) == 1


@pytest.mark.parametrize(("name", "value"), [("n", 1.5), (3, torch.ones(1))], ids=["a number", "a key that is no text"])
def test_a_state_holds_tensors_under_names(name, value):
    with pytest.raises(RunError, match=r"^advantage/a: context\.state\[.*\] = a \w+; give a tensor under a text"):
        PartStates().of("advantage/a")[name] = value


def test_the_first_difference_between_ranks_is_named():
    same = {"state/advantage/a:n": "1", "state/rewards/b:m": "2"}
    refuse_difference([same, dict(same)])
    message = r"^rewards/b: context\.state\['m'\] of rank 2 differs from that of rank 0; sum over the ranks"
    for other in ({**same, "state/rewards/b:m": "3"}, {"state/advantage/a:n": "1"}):
        with pytest.raises(RunError, match=message):
            refuse_difference([same, same, other])
    assert digest(torch.zeros(2)) != digest(torch.zeros(2, 1)) != digest(torch.zeros(2, 1, dtype=torch.int32))
