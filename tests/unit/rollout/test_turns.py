"""Completions over turns: their record, against plain forwards, and the same bits for any arrival and engine."""

import copy
import dataclasses
import math
import string

import pytest
import torch
from chat_tokenizers import small_model
from local_engine import EOS, PROMPTS, Policy, model, plain_logprobs, tokenizer
from turn_environments import ARRIVALS, SAMPLING, Here, Lengths, Timed, talked, talking
from turn_tokenizers import byte_bpe
from vllm_stand_in import StandIn

from rltrain.config import EnvironmentConfig, ModelConfig, SamplingConfig
from rltrain.errors import RunError
from rltrain.rollout.continuation_types import ContinuationRequest, ContinuationSampling
from rltrain.rollout.local import LocalRollout, LocalRolloutConfig
from rltrain.rollout.observations import plain_ids
from rltrain.rollout.shared_prompt_decoder import SharedDecoder
from rltrain.rollout.turns import TurnRollout
from rltrain.rollout.vllm import VllmRollout, VllmRolloutConfig
from rltrain.rollout.vllm_requests import request_seed
from rltrain.runs.completions import facts_of, flat_ids, flat_logprobs, restored
from rltrain.types import Environment, Problem, Prompt, Reply


def completions(groups):
    return [(group, completion) for group in groups for completion in group.completions]


def spans(completion):
    """Of each turn its written ids and its observed ids."""
    ids = list(completion.token_ids)
    for turn in completion.turns:
        written, observed = ids[: turn.written], ids[turn.written : turn.written + turn.observed]
        del ids[: turn.written + turn.observed]
        yield turn, tuple(written), tuple(observed)
    assert not ids


@pytest.mark.parametrize("name", ["qwen3", "llama", "gemma2", "gpt2", "mamba"])
def test_logprobs_of_written_ids_are_those_of_a_plain_forward(name):
    groups = talked(talking(name, check_steps=2))
    seen = set()
    for group, completion in completions(groups):
        expected = plain_logprobs(model(name), group.prompt, completion.token_ids, 1.0)
        for logprob, exact, written in zip(completion.logprobs, expected, completion.written_T, strict=True):
            assert math.isnan(logprob) if not written else abs(logprob - float(exact)) < 2e-5
        seen.add(len(completion.turns))
    assert len(seen) > 1


def test_a_record_is_what_was_written_and_answered():
    environment, ends = Lengths(), set()
    for group, completion in completions(talked(talking(check_steps=2))):
        state = environment.start(group.prompt.problem)
        for number, (turn, written, observed) in enumerate(spans(completion), 1):
            text_ids = written[:-1] if written[-1] == EOS else written
            assert turn.text == tokenizer().decode(text_ids) and turn.state_key == environment.key(state)
            assert not any(stop in turn.text[:-1] for stop in environment.stop)
            reply = environment.respond(state, turn.text)
            last = number == len(completion.turns)
            if last and completion.finish == "length" and not turn.called:
                assert len(completion.token_ids) == 40 and turn.reward == 0
                continue
            assert (turn.reward, turn.called, turn.latency_s) == (reply.reward, reply.called, 0.25)
            assert observed == (() if last else plain_ids(tokenizer(), reply.text))
            assert turn.reply == ("" if last else reply.text)
            state = reply.state
        ends.add((completion.finish, len(completion.turns) == 4, len(completion.token_ids) == 40))
        assert completion.text == completion.turns[-1].text and not completion.failed
        if len(completion.turns) == 4 and completion.turns[-1].called:
            assert completion.finish == "length", "max_turns"
    assert len(ends) >= 3


@pytest.mark.parametrize("name", ["qwen3", "gpt2"])
def test_no_arrival_changes_a_bit(name):
    by_arrival = [talked(talking(name, arrival=arrival, check_steps=2)) for arrival in ARRIVALS]
    assert by_arrival[0] == by_arrival[1] == by_arrival[2]


@pytest.mark.parametrize("name", ["qwen3", "gemma2", "mamba"])
def test_rounds_of_continuations_give_the_same_spans(name):
    """Any engine by its continuations, and the local one with its rows kept: the same ids and turns."""
    whole, rounds = talked(talking(name)), talked(talking(name, rounds=True))
    for (_, one), (_, other) in zip(completions(whole), completions(rounds), strict=True):
        assert (one.token_ids, one.turns, one.finish) == (other.token_ids, other.turns, other.finish)
        torch.testing.assert_close(
            torch.tensor(one.logprobs), torch.tensor(other.logprobs), atol=2e-5, rtol=0, equal_nan=True
        )


def test_batching_changes_no_token():
    def ids(rollout, prompts=PROMPTS):
        return {group.prompt.problem.id: group.completion_ids for group in talked(rollout, prompts)}

    expected = ids(talking(check_steps=4))
    assert ids(talking(max_rows=6, check_steps=1, compact_share=0.01)) == expected
    assert ids(talking(compact_share=1.0, reply_steps=9), PROMPTS[::-1]) == expected
    assert ids(talking(speculate_tokens=3, speculate_rows=64)) == expected
    assert ids(talking(max_cache_tokens=24 + 4 * 40, check_steps=2)) == expected


def test_the_first_turn_is_that_of_a_completion_without_turns():
    for (_, plain), (_, turns) in zip(
        completions(talking().engine.generate(PROMPTS, step=3, group_size=4, sampling=SAMPLING)),
        completions(talked(talking())),
        strict=True,
    ):
        first = turns.turns[0].written
        assert plain.token_ids[:first] == turns.token_ids[:first]


def test_others_decode_while_replies_are_pending(monkeypatch):
    """Decode steps done while an answer was still out, counted, with answers that come only when waited for."""
    answers, hidden, step = Here(Lengths(), "at last"), [], SharedDecoder.step

    def counted(self, tokens):
        hidden.append(any(future._state != "FINISHED" for future in answers.pending[len(PROMPTS) :]))
        return step(self, tokens)

    monkeypatch.setattr(SharedDecoder, "step", counted)
    talked(talking(answers=answers, check_steps=2, reply_steps=4))
    assert sum(hidden) > 0.5 * len(hidden)


class Failing(Lengths):
    """Fails at the second turn, by a failure and a text of its own."""

    def __init__(self, failure, text="nothing came"):
        self.failure, self.text = failure, text

    def respond(self, state, text):
        if state["turn"] == 2 and text.endswith(self.stop):
            return Reply(text=self.text, state=state, failure=self.failure)
        return super().respond(state, text)


def failed(groups):
    return [one for _, one in completions(groups) if any(turn.failure for turn in one.turns)]


def test_a_failure_ends_the_completion_or_is_told():
    wrong = failed(talked(talking(environment=Failing("timeout"), on_failure="wrong")))
    assert wrong and {(len(one.turns), one.finish, one.failed, one.text) for one in wrong} == {
        (2, "stop", "timeout", "")
    }
    assert {one.turns[-1].observed for one in wrong} == {0}
    told = failed(talked(talking(environment=Failing("timeout"), on_failure="tell")))
    assert {one.failed for one in told} == {""} and {one.turns[1].failure for one in told} == {"timeout"}
    assert any(one.turns[1].reply == "nothing came" and len(one.turns) > 2 for one in told)


def test_a_long_reply_is_cut_or_fails():
    megabyte = Failing("", "x" * 2**20)
    for _, one in completions(talked(talking(environment=megabyte, long_reply="cut", reply_tokens=8))):
        assert not one.failed and all(turn.observed <= 8 for turn in one.turns)
    fails = talked(talking(environment=megabyte, long_reply="fail", reply_tokens=8, on_failure="wrong"))
    assert {one.failed for one in failed(fails)} == {"too_long"}
    told = talked(talking(environment=megabyte, long_reply="fail", reply_tokens=12, on_failure="tell"))
    assert any(turn.reply.startswith("[too_long") for one in failed(told) for turn in one.turns)


def test_a_first_state_that_fails_ends_every_completion_after_its_first_turn():
    class Broken(Here):
        def _first(self, problem):
            return Timed(Reply(text="", state=None, failure="error"))

    ones = [one for _, one in completions(talked(talking(answers=Broken(Lengths()), on_failure="tell")))]
    assert {(len(one.turns), one.failed, one.turns[0].failure, one.text) for one in ones} == {(1, "error", "error", "")}
    assert {one.finish for one in ones} == {"stop", "length"}, "also those that never asked"


def test_a_failure_that_is_told_leaves_the_state_and_its_key():
    """What a continuation replays skips failed turns, so that both go on from the same state."""

    class Moving(Lengths):
        def respond(self, state, text):
            failure = "error" if state["turn"] == 2 else ""
            return dataclasses.replace(super().respond(state, text), failure=failure, done=False)

    told = failed(talked(talking(environment=Moving(), on_failure="tell")))
    three = [one for one in told if len(one.turns) > 2]
    assert three and all(one.turns[1].state_key == one.turns[2].state_key for one in three)


def test_a_turn_ends_at_its_own_limit():
    ones = [one for _, one in completions(talked(talking(turn_tokens=5)))]
    assert all(turn.written <= 5 for one in ones for turn in one.turns)
    cut = [one for one in ones if one.turns[-1].written == 5 and one.finish == "length"]
    assert cut and all(turn.called for one in cut for turn in one.turns[:-1])


def test_a_stop_string_of_the_sampling_ends_the_completion():
    sampling = dataclasses.replace(SAMPLING, stop=["+"])
    answers = Here(Lengths())
    ones = [one for _, one in completions(talked(talking(answers=answers, sampling=sampling)))]
    ended = [one for one in ones if one.turns[-1].text.endswith("+")]
    assert ended and {one.finish for one in ended} == {"stop"}
    assert all(one.turns[-1].reward == len(one.turns[-1].text) / 8 for one in ended)
    assert not any(turn.text.endswith("+") for one in ones for turn in one.turns[:-1])


def test_entropies_of_observed_ids_are_unknown():
    rollout = talking()
    rollout.engine.keeps_entropies = True
    for _, one in completions(talked(rollout)):
        finite = [math.isfinite(entropy) and math.isfinite(collision) for entropy, collision in one.entropies]
        assert tuple(finite) == one.written_T


class Chatty(Lengths):
    """Answers most turns, of a greedy model too."""

    stop = tuple("abcdefghijklmnop0123456789 ")


GREEDY = dataclasses.replace(SAMPLING, temperature=0.0)


def states(groups, every):
    """The groups' completions and requests at every so many places that a written id follows, one draw each."""
    for group in groups:
        for sample, completion in enumerate(group.completions):
            places = [t for t, written in enumerate(completion.written_T) if written][::every]
            for place in places:
                yield (
                    completion,
                    ContinuationRequest(
                        problem_id=group.prompt.problem.id,
                        sample_index=sample,
                        prompt_ids=group.prompt.token_ids,
                        completion_ids=completion.token_ids[:place],
                        draws=1,
                        max_new_tokens=SAMPLING.max_new_tokens - place,
                        problem=group.prompt.problem,
                        turns=completion.turns,
                        sampling=ContinuationSampling(temperature=0.0),
                    ),
                )


@pytest.mark.parametrize("rounds", [False, True])
@pytest.mark.parametrize("name", ["qwen3", "gemma2", "gpt2"])
def test_greedy_continuations_through_the_environment_are_the_rest_of_the_completion(name, rounds):
    """From inside turns and from their begins: ids, turns with rewards and keys, and how it ended."""
    rollout = talking(name, rounds=rounds, sampling=GREEDY, environment=Chatty(), turn_tokens=9)
    whole, asked = zip(*states(talked(rollout, group_size=1), every=2), strict=True)
    crossed = 0
    for completion, request, (new,) in zip(whole, asked, rollout.continue_(asked, step=9), strict=True):
        joined = completion.continued(request.position, new)
        assert (joined.token_ids, joined.turns, joined.finish) == (
            completion.token_ids,
            completion.turns,
            completion.finish,
        )
        assert new.text == completion.text
        crossed += len(new.turns) > 1
    assert crossed > 3


def test_a_reply_that_its_worker_cut_is_cut_in_a_replay_too():
    """The pool names a megabyte too_long before its ids are counted."""

    class Megabytes(Chatty):
        def respond(self, state, text):
            return dataclasses.replace(super().respond(state, text), text="7" * 2**20, failure="too_long")

    settings = {"environment": Megabytes(), "sampling": GREEDY}
    rollout = talking(reply_tokens=8, turn_tokens=9, **settings)
    whole, asked = zip(*states(talked(rollout, group_size=1), every=2), strict=True)
    replayed = 0
    for completion, request, (new,) in zip(whole, asked, rollout.continue_(asked, step=9), strict=True):
        assert not new.failed and completion.continued(request.position, new).token_ids == completion.token_ids
        replayed += request.position > completion.turns[0].written
    assert replayed > 1
    fails = talked(talking(long_reply="fail", on_failure="tell", reply_tokens=12, **settings))
    assert {turn.reply for one in failed(fails) for turn in one.turns if turn.observed} == {"[too_long]"}


def test_draws_of_a_state_differ_and_depend_on_their_request_alone():
    rollout = talking()
    requests = [request for _, request in states(talked(rollout, group_size=2), every=5)]
    asked = [dataclasses.replace(request, draws=3, sampling=None) for request in requests]
    together = rollout.continue_(asked, step=2)
    alone = [rollout.continue_([each], step=2)[0] for each in asked[::4]]
    assert [[one.token_ids for one in ones] for ones in alone] == [
        [one.token_ids for one in ones] for ones in together[::4]
    ]
    assert sum(len({one.token_ids for one in ones}) > 1 for ones in together) > 0.8 * len(asked)
    in_rounds = talking(rounds=True).continue_(asked, step=2)
    assert [[(one.token_ids, one.turns) for one in ones] for ones in in_rounds] == [
        [(one.token_ids, one.turns) for one in ones] for ones in together
    ]


def test_states_that_nothing_goes_on_from_are_refused():
    rollout = talking()
    group, whole = next(each for each in completions(talked(rollout)) if each[1].turns[0].observed)
    _, request = next(states([group], every=1))
    request = dataclasses.replace(request, turns=whole.turns)
    for extra in (0, 1):
        ids = whole.token_ids[: whole.turns[0].written + extra]
        with pytest.raises(RunError, match="an environment wrote the id behind its first"):
            rollout.continue_([dataclasses.replace(request, completion_ids=ids, max_new_tokens=4)], step=1)
    with pytest.raises(RunError, match="give ContinuationRequest problem="):
        rollout.continue_([dataclasses.replace(request, problem=None)], step=1)


def test_a_vllm_server_gives_the_spans_of_the_local_engine(tmp_path):
    """Greedy, since the draws of later turns are vLLM's own; and sampled completions hold the same rules."""
    server = StandIn(copy.deepcopy(model("qwen3")), max_model_len=2048)
    try:
        config = VllmRolloutConfig(mode="server", urls=[server.url], folder=str(tmp_path), weights="files")
        served = talking(environment=Chatty(), sampling=GREEDY, turn_tokens=9)
        served._engine = VllmRollout(config, GREEDY, Policy(model("qwen3"), tokenizer()), seed=7)
        local = talked(talking(environment=Chatty(), sampling=GREEDY, turn_tokens=9), group_size=1)
        expected = [(one.token_ids, one.turns, one.finish) for _, one in completions(local)]
        assert [
            (one.token_ids, one.turns, one.finish) for _, one in completions(talked(served, group_size=1))
        ] == expected
        assert sum(len(turns) > 1 for _, turns, _ in expected) > 2
        sampled = served.generate(PROMPTS[:2], step=3, group_size=2, sampling=SAMPLING)
        seeds = server.served[-sum(len(one.turns) for _, one in completions(sampled)) :]
        assert len(set(seeds)) == len(seeds), "every turn has draws of its own"
        first = {request_seed(7, 3, prompt.problem.id, sample) for prompt in PROMPTS[:2] for sample in range(2)}
        assert first <= set(seeds), "the first turn has those of a completion without turns"
    finally:
        server.stop()


class Crossing(Environment):
    """Ends turns at letters, and answers with a text whose first character merges with a letter."""

    stop = tuple(string.ascii_letters)
    role = None

    def start(self, problem):
        return 0

    def respond(self, state, text):
        return Reply(text="12", state=state + 1)


def test_ids_are_kept_where_merges_cross_the_borders_of_turns():
    """The text of a completion has other ids; those of the record are what was sampled and what was observed."""
    bpe = byte_bpe()
    network = small_model(len(bpe))
    policy = Policy(network, bpe, (bpe.eos_token_id,))
    sampling = SamplingConfig(max_new_tokens=48)
    local = LocalRollout(LocalRolloutConfig(check_steps=2), sampling, policy, seed=3)
    config = EnvironmentConfig(max_turns=6, reply_tokens=4)
    rollout = TurnRollout(local, Here(Crossing()), config, sampling, policy, model=ModelConfig(), seed=3)
    prompt = Prompt(problem=Problem(id="p", prompt="", answer=""), token_ids=plain_ids(bpe, "3*4="))
    ones, other = rollout.generate([prompt], step=0, group_size=16)[0].completions, 0
    for one in ones:
        expected = plain_logprobs(network, prompt, one.token_ids, 1.0)
        for logprob, exact, written in zip(one.logprobs, expected, one.written_T, strict=True):
            assert math.isnan(logprob) if not written else abs(logprob - float(exact)) < 2e-5
        assert all(observed in ((), plain_ids(bpe, "12")) for _, _, observed in spans(one))
        retokenised = tuple(bpe(bpe.decode(one.token_ids), add_special_tokens=False)["input_ids"])
        other += len(one.turns) > 1 and retokenised != one.token_ids
    assert other > 8
    facts, ids = [facts_of(one) for one in ones], flat_ids(ones, torch.int32)
    assert restored(facts, ids, flat_logprobs(ones, torch.float64)) == list(ones), "as a checkpoint keeps them"


def test_rows_that_are_fed_stay_below_the_limit_of_the_cache(monkeypatch):
    """What is allocated after every step and feed; with a small cache rows leave and are prefilled again."""
    limit, seen, counts = 24 + 4 * 40, [], {"step": 0, "feed": 0}
    for method in counts:
        original = getattr(SharedDecoder, method)

        def measured(self, *arguments, original=original, method=method):
            logits = original(self, *arguments)
            layer = self.layers[0]
            seen.append(sum(x.shape[1] * x.shape[2] for x in (layer.prompt_keys, layer.own_keys)))
            counts[method] += 1
            return logits

        monkeypatch.setattr(SharedDecoder, method, measured)
    expected = [group.completion_ids for group in talked(talking(environment=Chatty(), check_steps=2))]
    fed = counts["feed"]
    seen.clear()
    small = talked(talking(environment=Chatty(), check_steps=2, max_cache_tokens=limit))
    assert [group.completion_ids for group in small] == expected
    assert max(seen) <= limit and fed > 3
