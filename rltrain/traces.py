"""Traces for a cold start that a student can follow: reverse speculative decoding with a teacher (2509.22230).

python -m rltrain.traces model.path=STUDENT traces.teacher=TEACHER run_dir=FOLDER

FOLDER/traces.jsonl   one line per problem as it is done: its status, its solution, its tokens by origin
FOLDER/sft.jsonl      at the end: the kept rows. Prompt and solution for rltrain.sft
FOLDER/traces.json    the config, and at the end the counts and shares

The run's rewards say which answers are right, and only these are kept (``traces.keep``). The same command continues
where a killed run stopped, and gives the same files.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from rltrain import cli
from rltrain.config import RunConfig
from rltrain.data.handbook import problems_of
from rltrain.errors import ConfigError
from rltrain.policy.encode import encode_all, prompt_limit, refuse_long_entries
from rltrain.policy.load import Policy, load_frozen, load_policy
from rltrain.policy.scorer import check_same_vocabulary
from rltrain.registry import needs_of
from rltrain.rewards.scoring import score
from rltrain.rollout.decoder_check import DecoderKind, check_decoders
from rltrain.rollout.local import decoder_kinds
from rltrain.rollout.reverse_speculation import FIRST, LATER, STUDENT, FriendlyTrace, Veto, write
from rltrain.rollout.sampling import row_key
from rltrain.rollout.stopping import StopRule
from rltrain.runs import run_folder
from rltrain.runs.rows_file import JsonRow, append_rows, read_rows, refuse_other_config, write_whole
from rltrain.runtime import dist, progress
from rltrain.types import Completion, Context, Group, Problem, Prompt, UnknownLogprobs, bare_prompt, is_right

# A step for sampling keys that neither training, evaluation nor compression uses.
TRACES_STEP = -3
FREE_KEYS = tuple({*run_folder.FREE_KEYS, "steps", "cold_start"} - {"traces"})
KEPT, WRONG, CUT, LEFT_OUT = "kept", "wrong", "cut", "left out"


@dataclass(frozen=True, kw_only=True)
class Writers:
    """The student, the teacher, and how they share the work."""

    config: RunConfig
    student: Policy
    kinds: tuple[DecoderKind, DecoderKind]  # of the teacher, of the student

    @cached_property
    def _rule(self) -> StopRule:
        return StopRule.of(self.student, self.config.sampling)

    @cached_property
    def _veto(self) -> Veto:
        asked = self.config.traces
        sampling = dataclasses.replace(
            self.config.sampling, temperature=asked.temperature, top_p=asked.top_p, top_k=asked.top_k
        )
        return Veto(threshold=asked.threshold, tries=asked.tries, sampling=sampling)

    def rows(self, problems: Sequence[Problem]) -> list[JsonRow]:
        """The row of each problem, in order."""
        limit = prompt_limit(self.student, self.config.sampling)
        prompts, dropped = encode_all(self.student, problems, self.config.model, max_prompt_tokens=limit)
        refuse_long_entries(self.student, dropped, self.config.model, max_prompt_tokens=limit)
        rows = {problem.id: {"id": problem.id, "status": LEFT_OUT} for problem in dropped}
        if prompts:
            rows |= {row["id"]: row for row in self._written(prompts)}
        return [rows[problem.id] for problem in problems]

    def _written(self, prompts: Sequence[Prompt]) -> list[JsonRow]:
        traces = [
            FriendlyTrace(prompt_ids=prompt.token_ids, key=row_key(self.config.seed, TRACES_STEP, prompt.problem.id, 0))
            for prompt in prompts
        ]
        teacher, student = (kind.make(self._rule.max_new_tokens) for kind in self.kinds)
        write(traces, teacher, student, self._veto, self._rule)
        groups = [
            Group(prompt=prompt, completions=(self._completion(trace),))
            for prompt, trace in zip(prompts, traces, strict=True)
        ]
        return [_row(*each) for each in zip(groups, traces, self._statuses(groups), strict=True)]

    def _completion(self, trace: FriendlyTrace) -> Completion:
        made = self._rule.completion(trace.token_ids, [0.0] * len(trace.token_ids))
        return dataclasses.replace(made, logprobs=UnknownLogprobs(reason="two models wrote the trace"))

    def _statuses(self, groups: Sequence[Group]) -> list[str]:
        if self.config.traces.keep == "stopped":
            return [_unjudged(group.completions[0]) for group in groups]
        context = Context(seed=self.config.seed, tokenizer=self.student.tokenizer)
        scored, _ = score(groups, self.config.rewards, context)
        return [_judged(group) for group in scored]


def _unjudged(completion: Completion) -> str:
    return KEPT if completion.finish == "stop" else CUT


def _judged(group: Group) -> str:
    assert group.rewards_G is not None
    right = group.rewards_G if group.right_G is None else group.right_G.double()
    return KEPT if is_right(float(right[0])) else WRONG if group.completions[0].finish == "stop" else CUT


def _row(group: Group, trace: FriendlyTrace, status: str) -> JsonRow:
    problem, completion = group.prompt.problem, group.completions[0]
    origins = {name: trace.origins[name] for name in (FIRST, LATER, STUDENT)}
    facts = {"id": problem.id, "status": status, "prompt": bare_prompt(problem), "solution": completion.text}
    return facts | {"answer": problem.answer, "tokens": len(trace.token_ids)} | origins


def load(config: RunConfig) -> Writers:
    """Student and teacher, in eval mode, with decoders that were checked against their own forward."""
    if not config.traces.teacher:
        raise ConfigError("traces.teacher: none is set; give a folder or hub name of a model with model's vocabulary")
    if config.environment is not None:
        raise ConfigError("environment: traces are written in one turn; set environment=none")
    if serviced := [name for name, reward in config.rewards.items() if needs_of(reward)]:
        raise ConfigError(
            f"rewards.{serviced[0]}: it needs a service that only a training run has; choose rewards of the answer"
        )
    student = load_policy(config.model, device=dist.device())
    teacher = load_frozen(config.model, path=config.traces.teacher, device=dist.device())
    check_same_vocabulary(student, teacher, name=f"traces.teacher={config.traces.teacher}")
    student.model.requires_grad_(False).eval()
    return Writers(config=config, student=student, kinds=(_decoder(teacher), _decoder(student)))


def _decoder(policy: Policy) -> DecoderKind:
    policy.model.to(dist.device())
    return check_decoders(policy.model, decoder_kinds(policy.model, pad_id=policy.pad_token_id))[0]


def counts(rows: Sequence[JsonRow]) -> dict[str, float]:
    """Rows by status, tokens in all, and the share of the tokens by origin."""
    written = [row for row in rows if row["status"] != LEFT_OUT]
    tokens = sum(row["tokens"] for row in written)
    shares = {f"{name}_share": sum(row[name] for row in written) / max(1, tokens) for name in (FIRST, LATER, STUDENT)}
    return {**Counter(str(row["status"]) for row in rows), "tokens": tokens, **shares}


def make_traces(config: RunConfig) -> dict[str, float]:
    """Write the traces that are not done yet. Returns the counts."""
    folder, resolved, asked = Path(config.run_dir), run_folder.resolved(config), config.traces
    folder.mkdir(parents=True, exist_ok=True)
    refuse_other_config(folder / "traces.json", config, free_keys=FREE_KEYS)
    write_whole(folder / "traces.json", json.dumps({"config": resolved}))
    problems = problems_of(config.data, asked.split)
    total = min(asked.problems or len(problems), len(problems))
    path, writers = folder / "traces.jsonl", load(config)
    rows = read_rows(path)
    bar, start_s, before = progress.Bar("traces", total, done=len(rows), every_s=5.0), time.monotonic(), counts(rows)
    for start in range(len(rows), total, asked.batch_size):
        done = writers.rows([problems[i] for i in range(start, min(start + asked.batch_size, total))])
        append_rows(path, done)
        rows += done
        bar.update(len(rows), _told(counts(rows), counts(rows)["tokens"] - before["tokens"], start_s))
    bar.close()
    totals = counts(rows)
    write_whole(folder / "sft.jsonl", "".join(json.dumps(row) + "\n" for row in rows if row["status"] == KEPT))
    write_whole(folder / "traces.json", json.dumps({"config": resolved, "counts": totals}, indent=1))
    return totals


def _told(totals: dict[str, float], tokens: float, start_s: float) -> list[str]:
    rate = tokens / max(1e-9, time.monotonic() - start_s)
    return [f"{rate:.0f} tokens/s", f"kept {totals.get(KEPT, 0):.0f}", f"student {totals[f'{STUDENT}_share']:.1%}"]


def main(config: RunConfig) -> Any:
    """One process: write the traces, and print the counts."""
    if dist.world_size() > 1:
        raise ConfigError(
            f"rltrain.traces: started on {dist.world_size()} ranks; start one, and split the data instead"
        )
    with run_folder.opened(Path(config.run_dir)):
        print("\n".join(f"{name:20s} {value:.4g}" for name, value in make_traces(config).items()))


if __name__ == "__main__":
    cli.run(main)
