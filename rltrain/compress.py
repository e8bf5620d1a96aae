"""ConMax's data set: compress traces with a trained policy, answer from the short traces, keep right answers.

python -m rltrain.compress +experiment=conmax model.path=COMPRESSOR scorer.path=FROZEN run_dir=FOLDER

FOLDER/compressed.jsonl   one line per trace as it is done: what came of it, and its lengths
FOLDER/sft.jsonl          at the end: the kept rows. Prompt and solution for rltrain.sft
FOLDER/compress.json      the config, and at the end the counts

The same command continues where a killed run stopped, and gives the same files.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rltrain import cli
from rltrain.config import RunConfig
from rltrain.data.handbook import problems_of
from rltrain.data.traces import Trace, TracePrompt
from rltrain.errors import ConfigError
from rltrain.policy.encode import encode_all, prompt_limit
from rltrain.policy.load import Policy, load_frozen, load_policy
from rltrain.policy.scorer import check_same_vocabulary
from rltrain.registry import part_of
from rltrain.rewards.compression import compressed_ids
from rltrain.rewards.scoring import score
from rltrain.rollout.ahead import check_rollout
from rltrain.runs import run_folder
from rltrain.runs.rows_file import JsonRow, append_rows, read_rows, refuse_other_config, write_whole
from rltrain.runtime import dist
from rltrain.types import Completion, Context, Group, Problem, Prompt, is_right

log = logging.getLogger(__name__)

# A step for sampling keys that neither training nor evaluation uses.
COMPRESSION_STEP = -2
FREE_KEYS = tuple({*run_folder.FREE_KEYS, "steps"} - {"compress"})
KEPT, WRONG, NO_TRACE, LEFT_OUT = "kept", "wrong", "no trace", "left out"


@dataclass(frozen=True, kw_only=True)
class Pipeline:
    """The compressor and the frozen model that answers, each with its rollout engine."""

    config: RunConfig
    compressor: Policy
    writing: Any
    answering: Any

    def rows(self, traces: Sequence[Problem]) -> list[JsonRow]:
        """The row of each trace, in order."""
        config = self.config
        limit = prompt_limit(self.compressor, config.sampling)
        prompts, dropped = encode_all(self.compressor, traces, config.model, max_prompt_tokens=limit)
        sampling = dataclasses.replace(config.sampling, temperature=config.compress.temperature)
        groups = self.writing.generate(prompts, step=COMPRESSION_STEP, group_size=1, sampling=sampling)
        written = [(_trace_prompt(group.prompt), group.completions[0]) for group in groups]
        short = [(prompt, compressed_ids(prompt, output, self.compressor.tokenizer)) for prompt, output in written]
        rows = {problem.id: _row(problem.id, LEFT_OUT) for problem in dropped}
        rows |= {prompt.problem.id: _row(prompt.problem.id, NO_TRACE) for prompt, ids in short if not ids}
        rows |= {row["id"]: row for row in self._answered([pair for pair in short if pair[1]])}
        return [rows[trace.id] for trace in traces]

    def _answered(self, short: Sequence[tuple[TracePrompt, tuple[int, ...]]]) -> Iterator[JsonRow]:
        """Rows of the compressed traces, after which the frozen model answers the question."""
        begun = self.config.compress.begin_answer
        starts = [prompt.before_answer_ids if begun else () for prompt, _ in short]
        prompts = [
            Prompt(problem=prompt.problem, token_ids=prompt.with_trace(ids) + start)
            for (prompt, ids), start in zip(short, starts, strict=True)
        ]
        sampling = dataclasses.replace(
            self.config.sampling,
            temperature=self.config.compress.answer_temperature,
            max_new_tokens=self.config.compress.max_answer_tokens,
            max_prompt_tokens=max((len(prompt.token_ids) for prompt in prompts), default=1),
            stop=[],
        )
        groups = self.answering.generate(prompts, step=COMPRESSION_STEP, group_size=1, sampling=sampling)
        if begun:
            groups = [
                _begun(group, prompt.config.before_answer) for group, (prompt, _) in zip(groups, short, strict=True)
            ]
        context = Context(seed=self.config.seed, tokenizer=self.compressor.tokenizer)
        assert self.config.compress.verifier is not None
        scored, _ = score(groups, {"answer": self.config.compress.verifier}, context)
        for (prompt, ids), group in zip(short, scored, strict=True):
            assert group.rewards_G is not None
            status = KEPT if is_right(float(group.rewards_G[0])) else WRONG
            yield self._row(prompt, ids, group.completions[0], status)

    def _row(self, prompt: TracePrompt, ids: tuple[int, ...], answer: Completion, status: str) -> JsonRow:
        trace, layout = prompt.problem, prompt.config
        assert isinstance(trace, Trace)

        def solution(text: str) -> str:
            return layout.before_trace + text + layout.after_trace + answer.text

        return _row(trace.id, status) | {
            "prompt": layout.ask.replace("{question}", trace.question),
            "solution": solution(self.compressor.tokenizer.decode(ids)),
            "original_solution": solution(trace.trace),
            "answer": trace.answer,
            "original_tokens": len(prompt.trace_ids),
            "compressed_tokens": len(ids),
        }


def _begun(group: Group, start: str) -> Group:
    """The group with the given start of its answers added to their text."""
    completions = tuple(
        dataclasses.replace(completion, text=start + completion.text) for completion in group.completions
    )
    return dataclasses.replace(group, completions=completions)


def _row(trace_id: str, status: str) -> JsonRow:
    return {"id": trace_id, "status": status}


def _trace_prompt(prompt: Prompt) -> TracePrompt:
    if not isinstance(prompt, TracePrompt):
        raise ConfigError(f"data: {prompt.problem.id} is no trace to compress; choose data of traces")
    return prompt


def load(config: RunConfig) -> Pipeline:
    """The compressor is the configured model. ``scorer.path`` is the frozen model, which may be the same."""
    if config.compress.verifier is None:
        raise ConfigError("compress.verifier: none is set; choose one, for example reward@compress.verifier=boxed")
    compressor = load_policy(config.model, device=dist.device())
    frozen = load_frozen(config.model, path=config.scorer.path, device=dist.device())
    check_same_vocabulary(compressor, frozen, name=f"scorer.path={config.scorer.path}")
    engines = []
    for policy in (compressor, frozen):
        policy.model.to(dist.device())
        engines.append(part_of(config.rollout).function(config.rollout, config.sampling, policy, seed=config.seed))
        check_rollout(engines[-1])
    return Pipeline(config=config, compressor=compressor, writing=engines[0], answering=engines[1])


def counts(rows: Sequence[JsonRow]) -> dict[str, float]:
    """Rows by status, the share dropped, and mean lengths in tokens over the kept rows."""
    kept = [row for row in rows if row["status"] == KEPT]
    by_status = Counter(str(row["status"]) for row in rows)
    means = {name: _mean([row[name] for row in kept]) for name in ("original_tokens", "compressed_tokens")}
    return {**by_status, "dropped_share": 1 - len(kept) / max(1, len(rows)), **means}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / max(1, len(values))


def compress(config: RunConfig) -> dict[str, float]:
    """Compress the traces that are not done yet. Returns the counts."""
    folder, resolved = Path(config.run_dir), run_folder.resolved(config)
    folder.mkdir(parents=True, exist_ok=True)
    refuse_other_config(folder / "compress.json", config, free_keys=FREE_KEYS)
    write_whole(folder / "compress.json", json.dumps({"config": resolved}))
    traces = problems_of(config.data, config.compress.split)
    total = min(config.compress.problems or len(traces), len(traces))
    path, pipeline = folder / "compressed.jsonl", load(config)
    rows = read_rows(path)
    for start in range(len(rows), total, config.compress.batch_size):
        done = pipeline.rows([traces[i] for i in range(start, min(start + config.compress.batch_size, total))])
        append_rows(path, done)
        rows += done
        log.info("%d of %d traces, %d kept", len(rows), total, sum(row["status"] == KEPT for row in rows))
    totals = counts(rows)
    write_whole(folder / "sft.jsonl", "".join(json.dumps(row) + "\n" for row in rows if row["status"] == KEPT))
    write_whole(folder / "compress.json", json.dumps({"config": resolved, "counts": totals}, indent=1))
    return totals


def main(config: RunConfig) -> None:
    """One process: compress, and print the counts."""
    if dist.world_size() > 1:
        raise ConfigError(
            f"rltrain.compress: started on {dist.world_size()} ranks; start one, and split the data instead"
        )
    with run_folder.opened(Path(config.run_dir)):
        print("\n".join(f"{name:20s} {value:.4g}" for name, value in compress(config).items()))


if __name__ == "__main__":
    cli.run(main)
