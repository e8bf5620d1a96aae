"""Records that cross module borders: what they refuse, and what they refuse to be read as."""

import pickle

import numpy as np
import pytest
import torch

from rltrain.errors import RunError
from rltrain.types import Completion, UnknownLogprobs

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
