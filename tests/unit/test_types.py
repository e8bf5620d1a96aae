"""Records that cross module borders: what they refuse, and what they refuse to be read as."""

import pickle

import numpy as np
import pytest
import torch

from rltrain.errors import RunError
from rltrain.types import Completion, Context, Need, RolloutServices, UnknownLogprobs

UNKNOWN = UnknownLogprobs(reason="the server returns none")
READERS = {
    "iteration": lambda values: [value for value in values],  # noqa: C416
    "length": len,
    "index": lambda values: values[-1],
    "slice": lambda values: values[:2],
    "truth": bool,
    "membership": lambda values: 0.0 in values,
    "sum": sum,
    "tuple": tuple,
    "torch.tensor": torch.tensor,
    "torch.as_tensor": torch.as_tensor,
    "rows of a tensor": lambda values: torch.tensor([values]),
    "np.array": np.array,
    "np.sum": np.sum,
}


@pytest.mark.parametrize("reader", READERS)
def test_unknown_log_probs_cannot_be_read(reader):
    completion = Completion(token_ids=(1, 2), logprobs=UNKNOWN, finish="stop")
    with pytest.raises(RunError) as caught:
        READERS[reader](completion.logprobs)
    assert str(caught.value) == (
        "Completion.logprobs: unknown, the server returns none; what reads sampled log-probs cannot run here"
    )


def test_completions_with_unknown_log_probs_are_shown_compared_and_sent():
    completion = Completion(token_ids=(1, 2), logprobs=UNKNOWN, finish="stop")
    assert pickle.loads(pickle.dumps(completion)) == completion
    assert completion != Completion(token_ids=(1, 2), logprobs=(0.0, 0.0), finish="stop")
    assert "the server returns none" in repr(completion)


def test_a_completion_has_one_log_prob_per_token():
    with pytest.raises(ValueError, match="Completion: 2 token ids but 1 log-probs; give one per token"):
        Completion(token_ids=(1, 2), logprobs=(0.0,), finish="stop")


USES = {
    "rollout.probe": (lambda context: context.rollout.probe([], None), Need.PROBES),
    "rollout.continue_": (lambda context: context.rollout.continue_([]), Need.CONTINUATIONS),
    "grade": (lambda context: context.grade([]), Need.CONTINUATIONS),
    "scorer.phi": (lambda context: context.scorer.phi([]), Need.SCORER),
    "state": (lambda context: context.state["sum"], Need.STATE),
    "state ": (lambda context: context.state.update(x=torch.zeros(1)), Need.STATE),
    "state  ": (lambda context: "sum" in context.state, Need.STATE),
    "state   ": (lambda context: bool(context.state), Need.STATE),
}


@pytest.mark.parametrize("use", USES)
def test_the_use_of_an_undeclared_service_is_one_line_that_says_how_to_declare_it(use):
    call, need = USES[use]
    with pytest.raises(RunError) as caught:
        call(Context())
    field = {"state ": "state.update"}.get(use, use.strip())
    assert str(caught.value) == (
        f"context.{field}: nothing declared this service; register the part with needs={{Need.{need.name}}}, or give "
        f"a function of yours needs = {{Need.{need.name}}}"
    )


class Echo:
    def probe(self, requests, settings):
        return [*requests, settings]

    def continue_(self, requests):
        return list(requests)


def test_probes_do_not_open_continuations_nor_the_other_way_round():
    probes, continuations = RolloutServices(prober=Echo()), RolloutServices(continuer=Echo())
    assert probes.probe([1], 2) == [1, 2]
    assert continuations.continue_([3]) == [3]
    with pytest.raises(RunError, match=r"context\.rollout\.continue_: nothing declared"):
        probes.continue_([3])
    with pytest.raises(RunError, match=r"context\.rollout\.probe: nothing declared"):
        continuations.probe([1], 2)


def test_a_part_has_a_state_where_it_declares_one_and_its_own():
    states = {}
    context = Context(state_of=lambda part: states.setdefault(part, {}))
    context.of_part("rewards/a", frozenset({Need.STATE})).state["seen"] = torch.ones(1)
    context.of_part("rewards/b", frozenset({Need.STATE})).state["seen"] = torch.zeros(1)
    assert context.of_part("rewards/a", frozenset({Need.STATE})).state["seen"].item() == 1
    with pytest.raises(RunError, match=r"context\.state: nothing declared"):
        context.of_part("rewards/a", frozenset()).state["seen"]
