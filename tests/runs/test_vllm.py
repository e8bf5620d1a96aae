"""Everything of rollout=vllm that needs no vLLM: requests, weights, and servers that die, hang, refuse or come back."""

import dataclasses
import logging
import math

import pytest
import torch
from safetensors.torch import load_file
from tiny_run import config, metrics
from two_ranks import PERSISTENCE, assert_same_run, train
from vllm_stand_in import UNKNOWN, tiny_model

from rltrain import trainer
from rltrain.config import SamplingConfig
from rltrain.errors import ConfigError, RunError
from rltrain.evaluate import held_out_prompts
from rltrain.policy.load import load_policy
from rltrain.rollout import RolloutLost
from rltrain.rollout.sampling import row_key
from rltrain.rollout.stopping import StopRule
from rltrain.rollout.vllm import VllmRollout, VllmRolloutConfig, completion
from rltrain.rollout.vllm_requests import Request, Sampled, request_seed, sampling_fields
from rltrain.rollout.vllm_server import Server, ServerDown, Servers
from rltrain.rollout.vllm_weights import checkpoint_weights, write_files
from rltrain.runs import checkpoint
from rltrain.runtime.interrupts import EXIT_INTERRUPTED


@pytest.fixture
def policy():
    return load_policy(tiny_model())


def servers(folder, urls, **options):
    defaults = {"request_s": 60.0, "restart_s": 0.0, "max_requests": 4, "longest": 100}
    return Servers(urls, folder, **defaults | options)


def requests(count):
    return [Request(prompt_ids=(7, 8, 9 + index), seed=index) for index in range(count)]


FIELDS = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "max_tokens": 6, "stop_token_ids": [1], "logprobs": 0}


@pytest.mark.parametrize(
    ("settings", "remedy"),
    [
        ({"mode": "elsewhere"}, "set one of colocated, server"),
        ({"mode": "server"}, r"for example rollout.urls=\[http://node1:8000\]"),
        ({"urls": ["http://a:1"]}, "set rollout.mode=server"),
        ({"mode": "server", "urls": ["a:1"]}, "write http://a:1"),
        ({"request_s": 0}, "rollout.request_s=0: must be > 0"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, remedy):
    with pytest.raises(ConfigError, match=remedy):
        VllmRolloutConfig(**settings)


def test_the_importance_correction_is_on_unless_a_setting_says_otherwise(tmp_path):
    def correction(*overrides):
        return config(tmp_path, *overrides).loss.importance_correction

    assert correction() == "none"
    assert correction("rollout=vllm") == "truncate"
    assert correction("rollout=vllm", "loss.importance_correction=mask") == "mask"
    assert correction("rollout=vllm", "loss.importance_correction=none") == "none"
    with pytest.raises(ConfigError, match="its support differs from the trainer's"):
        config(tmp_path, "rollout=vllm", "sampling.top_p=0.9")


def test_seeds_are_the_local_samplers_keys():
    key = row_key(3, 5, "problem", 2)
    assert request_seed(3, 5, "problem", 2) == key % 2**63
    assert request_seed(3, 5, "problem", 2, 1) == row_key(3, 5, "problem", 2, 1) % 2**63
    seeds = {request_seed(0, step, name, sample) for step in range(5) for name in "abc" for sample in range(8)}
    assert len(seeds) == 5 * 3 * 8
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_no_default_of_the_engine_decides_what_is_sampled(policy):
    sampling = SamplingConfig(temperature=0.7, top_k=5, max_new_tokens=9, stop=["}"])
    fields = sampling_fields(sampling, StopRule.of(policy, sampling))
    assert {
        "temperature": 0.7,
        "top_k": 5,
        "top_p": 1.0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
    }.items() <= fields.items()
    assert {"stop": ["}"], "stop_token_ids": [1], "ignore_eos": True, "detokenize": True}.items() <= fields.items()
    assert fields["max_tokens"] == 9


@pytest.mark.parametrize(
    ("text", "end", "finish"),
    [("ab<eos>cd", 3, "stop"), ("abcd", 4, "length"), ("a}bc", 2, "stop"), ("ab}<eos>", 3, "stop")],
)
def test_an_answer_is_cut_by_the_local_rule(policy, text, end, finish):
    rule = StopRule.of(policy, SamplingConfig(max_new_tokens=4, stop=["}"]))
    ids = tuple(policy.tokenizer(text)["input_ids"])
    cut = completion(Sampled(token_ids=ids, logprobs=tuple(-float(i) for i in range(len(ids)))), rule, greedy=False)
    assert (cut.token_ids, cut.finish) == (ids[:end], finish)
    assert cut.logprobs == tuple(-float(i) for i in range(end))
    greedy = completion(Sampled(token_ids=ids, logprobs=(-1.0,) * len(ids)), rule, greedy=True)
    assert greedy.logprobs == (0.0,) * end


def test_pushed_weights_are_those_of_a_saved_folder(policy, tmp_path):
    policy.model.save_pretrained(tmp_path / "saved")
    write_files(tmp_path, policy.model, file_bytes=20_000)
    files = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(files) > 2
    pushed = {name: tensor for file in files for name, tensor in load_file(file).items()}
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert pushed.keys() == saved.keys()
    assert all(torch.equal(pushed[name], saved[name]) for name in saved)


def test_lora_adapters_are_merged_into_what_is_pushed(tmp_path):
    policy = load_policy(config(tmp_path, "model.lora.rank=4", "model.lora.target_modules=[q_proj,down_proj]").model)
    for name, parameter in policy.model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter)
    pushed = {name: tensor.clone() for name, tensor in checkpoint_weights(policy.model)}
    merged = dict(policy.model.merge_and_unload().named_parameters())
    assert pushed.keys() == merged.keys()
    for name, weight in merged.items():
        torch.testing.assert_close(pushed[name], weight, rtol=1e-6, atol=1e-6)


def test_servers_sample_with_the_pushed_weights(policy, serve, tmp_path):
    """Two servers give what one gives, and log-probs of the policy rather than of what they started with."""
    one, two = serve(), serve()
    alone, both = servers(tmp_path / "a", [one.url]), servers(tmp_path / "b", [one.url, two.url])
    alone.push(policy.model)
    expected = alone.sample(requests(6), FIELDS)
    both.push(policy.model)
    assert both.sample(requests(6), FIELDS) == expected
    assert {*two.served} >= {1, 3, 5}
    for request, answer in zip(requests(6), expected, strict=True):
        ids = torch.tensor([[*request.prompt_ids, *answer.token_ids]])
        logprobs = policy.model(input_ids=ids).logits[0].log_softmax(-1)[2:-1]
        own = logprobs.gather(-1, ids[0, 3:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(answer.logprobs), own, rtol=0, atol=1e-5)


def test_only_the_newest_weights_stay_on_the_shared_folder(policy, serve, tmp_path):
    server = serve()
    engine = servers(tmp_path, [server.url])
    engine.push(policy.model)
    engine.push(policy.model)
    assert [path.name for path in tmp_path.iterdir() if path.is_dir() and path.name != "run"] == [server.version]
    assert len(set(server.pushes)) == 2


def test_a_server_that_dies_is_named_and_its_requests_go_to_the_others(policy, serve, tmp_path, caplog):
    steady, dying = serve(), serve(answers=3)
    engine = servers(tmp_path, [steady.url, dying.url])
    engine.push(policy.model)
    with caplog.at_level(logging.WARNING):
        answers = engine.sample(requests(12), FIELDS)
    assert dying.url in caplog.text
    assert answers == servers_alone(policy, serve, tmp_path).sample(requests(12), FIELDS)


def servers_alone(policy, serve, tmp_path):
    engine = servers(tmp_path / "alone", [serve().url])
    engine.push(policy.model)
    return engine


def test_a_server_that_comes_back_gets_the_newest_weights_before_it_is_asked(policy, serve, tmp_path):
    first = serve()
    engine = servers(tmp_path, [first.url], restart_s=30.0)
    engine.push(policy.model)
    expected = engine.sample(requests(4), FIELDS)
    first.stop()
    second = serve(port=first.server_port)
    assert second.version == UNKNOWN
    assert engine.sample(requests(4), FIELDS) == expected
    assert second.pushes == [first.version]


def test_without_any_server_the_error_names_all_of_them(policy, serve, tmp_path):
    dead = [serve(), serve()]
    engine = servers(tmp_path, [server.url for server in dead])
    for server in dead:
        server.stop()
    engine.push(policy.model)
    with pytest.raises(RolloutLost, match=f"{dead[0].url}.*refused.*{dead[1].url}.*refused"):
        engine.sample(requests(2), FIELDS)


def test_a_call_without_an_answer_ends_at_its_deadline(serve):
    server = serve(mute=True)
    with pytest.raises(ServerDown, match=f"{server.url}/inference/v1/generate: timed out"):
        Server(server.url, request_s=0.2).call("/inference/v1/generate", {"sampling_params": {}})


@pytest.mark.parametrize(("max_tokens", "seconds"), [(1, 600), (4096, 600), (8192, 1200), (32768, 4800)])
def test_the_deadline_of_a_completion_grows_with_its_length(max_tokens, seconds):
    assert Server("http://nobody", request_s=600).completion_s(max_tokens) == seconds


def test_a_completion_without_an_answer_ends_at_its_deadline(serve):
    with pytest.raises(ServerDown, match="generate: timed out"):
        Server(serve(mute=True).url, request_s=0.1).sample(requests(1)[0], FIELDS | {"max_tokens": 8192}, "1")


def test_a_server_that_fails_at_everything_does_not_keep_its_requests(policy, serve, tmp_path, caplog):
    steady, failing = serve(), serve()
    engine = servers(tmp_path, [steady.url, failing.url])
    engine.push(policy.model)
    engine.sample(requests(2), FIELDS)
    failing.failing = True
    with caplog.at_level(logging.WARNING):
        assert len(engine.sample(requests(5), FIELDS)) == 5
    assert f"{failing.url}/inference/v1/generate: 500" in caplog.text
    steady.failing = True
    with pytest.raises(RolloutLost, match="up but answer nothing: .*500.*500"):
        engine.sample(requests(2), FIELDS)


@pytest.mark.parametrize(
    ("options", "remedy"),
    [({"max_model_len": 64}, "restart it with --max-model-len 100"), ({"raw_logprobs": True}, "processed_logprobs")],
)
def test_an_unfit_server_is_refused_with_the_remedy(policy, serve, tmp_path, options, remedy):
    engine = servers(tmp_path, [serve(**options).url])
    with pytest.raises(RunError, match=remedy):
        engine.push(policy.model)


def test_a_request_that_is_refused_is_not_tried_again(policy, serve, tmp_path):
    server = serve()
    engine = servers(tmp_path, [server.url])
    engine.push(policy.model)
    with pytest.raises(RunError, match="refused with 400 .*scripts/vllm_server.sh"):
        engine.sample([Request(prompt_ids=(1,), seed=5)], FIELDS)
    assert server.served.count(5) == 1


def test_generate_keeps_the_order_of_prompts_and_samples(policy, serve, tmp_path):
    run = config(tmp_path / "run", "rollout=vllm", "rollout.mode=server", f"rollout.urls=[{serve().url}]")
    rollout = VllmRollout(run.rollout, run.sampling, policy, seed=4)
    prompts = held_out_prompts(run, policy)[:3]
    groups = rollout.generate(prompts, step=2, group_size=2)
    assert [group.prompt for group in groups] == prompts
    backwards = rollout.generate(prompts[::-1], step=2, group_size=2)[::-1]
    assert [group.completion_ids for group in backwards] == [group.completion_ids for group in groups]
    assert groups[0].completion_ids[0] != groups[0].completion_ids[1]
    greedy = dataclasses.replace(run.sampling, temperature=0.0)
    one, two = rollout.generate(prompts[:1], step=2, group_size=2, sampling=greedy)[0].completions
    assert one == two and set(one.logprobs) == {0.0}


def test_a_problem_that_a_step_holds_twice_is_drawn_afresh(policy, serve, tmp_path):
    server = serve()
    run = config(tmp_path / "run", "rollout=vllm", "rollout.mode=server", f"rollout.urls=[{server.url}]")
    rollout = VllmRollout(run.rollout, run.sampling, policy, seed=4)
    prompt = held_out_prompts(run, policy)[0]
    groups = rollout.generate([dataclasses.replace(prompt, occurrence=n) for n in range(3)], step=2, group_size=4)
    assert len({ids for group in groups for ids in group.completion_ids}) == 12
    seeds = [seed for seed in server.served if seed is not None]  # what tries the server has none
    assert sorted(seeds) == sorted(
        request_seed(4, 2, prompt.problem.id, sample, occurrence) for occurrence in range(3) for sample in range(4)
    )


def test_a_run_learns_from_servers_and_logs_the_difference(serve, tmp_path):
    urls = f"rollout.urls=[{serve().url},{serve().url}]"
    trainer.fit(config(tmp_path / "run", "rollout=vllm", "rollout.mode=server", urls))
    lines = metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4]
    differences = [line["sampling/sampling_logp_difference/max"] for line in lines[1:]]
    assert all(0 <= one < 1e-5 for one in differences)


def test_a_run_without_servers_saves_and_the_same_command_goes_on(serve, tmp_path):
    """The server dies in the second step; the first one is kept, and the run ends as one that was not interrupted."""
    mode = ["rollout.mode=server", "evaluation.every_steps=0", "rollout.restart_s=0.1"]
    steady = serve()
    trainer.fit(config(tmp_path / "unbroken", "rollout=vllm", *mode, f"rollout.urls=[{steady.url}]"))
    dying = serve(answers=20)  # one to try it out, 16 for the first step
    broken = config(tmp_path / "run", "rollout=vllm", *mode, f"rollout.urls=[{dying.url}]")
    with pytest.raises(RolloutLost, match=f"{dying.url}.*saved to .*step_000001, the same command resumes it") as lost:
        trainer.fit(broken)
    assert lost.value.exit_code == EXIT_INTERRUPTED
    assert checkpoint.list_checkpoints(tmp_path / "run")[-1].step == 1
    trainer.fit(config(tmp_path / "run", "rollout=vllm", *mode, f"rollout.urls=[{steady.url}]"))
    for line, expected in zip(metrics(tmp_path / "run"), metrics(tmp_path / "unbroken"), strict=True):
        assert line.keys() == expected.keys()
        assert all(math.isclose(line[key], expected[key], rel_tol=1e-6, abs_tol=1e-9) for key in line), line["step"]


@pytest.mark.parametrize("steps", [2, 4])
def test_servers_lost_in_an_evaluation_cost_nothing(serve, tmp_path, steps):
    """The step before it is kept, and the evaluation made when the run goes on; also if there is no step after it."""
    mode = [
        "rollout.mode=server",
        "evaluation.every_steps=2",
        "evaluation.problems=4",
        "rollout.restart_s=0.1",
        f"steps={steps}",
    ]
    steady = serve()
    trainer.fit(config(tmp_path / "unbroken", "rollout=vllm", *mode, f"rollout.urls=[{steady.url}]"))
    dying = serve(answers=1 + 4 + 2 * 16 + 2)
    with pytest.raises(RolloutLost, match="saved to .*step_000002, the same command resumes it"):
        trainer.fit(config(tmp_path / "run", "rollout=vllm", *mode, f"rollout.urls=[{dying.url}]"))
    assert [line["step"] for line in metrics(tmp_path / "run")] == [0, 1]
    trainer.fit(config(tmp_path / "run", "rollout=vllm", *mode, f"rollout.urls=[{steady.url}]"))
    for line, expected in zip(metrics(tmp_path / "run"), metrics(tmp_path / "unbroken"), strict=True):
        assert line.keys() == expected.keys()
        assert all(math.isclose(line[key], expected[key], rel_tol=1e-6, abs_tol=1e-9) for key in line), line["step"]


def test_two_ranks_under_zero_3_push_what_one_rank_does(serve, tmp_path):
    """Every weight cut into two: what reaches the server is whole, and the run is that of one rank."""
    options = ["steps=2", "evaluation.every_steps=0", "rollout=vllm", "rollout.mode=server"]
    sharded = ["deepspeed.zero_stage=3", *(f"+deepspeed.extra.zero_optimization.{key}=0" for key in PERSISTENCE)]
    for ranks, more in ((1, []), (2, sharded)):
        result = train(tmp_path / str(ranks), ranks, *options, f"rollout.urls=[{serve().url}]", *more)
        assert result.returncode == 0, result.stderr
    assert_same_run(tmp_path / "2", tmp_path / "1")
