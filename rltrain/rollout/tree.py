"""Completions of a prompt as trees: chains, then rounds of branches from inside them (``rollout.tree``).

The cuts are EPTree's (TreeRL, arXiv 2506.11902): at the sampled tokens of the lowest probability.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from itertools import cycle, islice
from typing import Any

from rltrain.config import SamplingConfig, TreeConfig
from rltrain.rollout import Rollout
from rltrain.rollout.continuation_types import ContinuationRequest
from rltrain.rollout.probe_types import ProbeRequest, ProbeResult, ProbeSettings
from rltrain.rollout.stopping import StopRule
from rltrain.types import Completion, Group, Prompt


@dataclass(frozen=True, kw_only=True)
class Cut:
    """A place to branch from: the first ``tokens`` tokens of the leaf of that number in the group."""

    leaf: int
    tokens: int


@dataclass(frozen=True, kw_only=True)
class TreeLeaf:
    """A completion of a tree. Its first ``shared`` tokens are those of the leaf that it was branched from."""

    number: int
    completion: Completion
    shared: int = 0


def ranked_cuts(leaves: Sequence[TreeLeaf]) -> list[Cut]:
    """Every cut inside the leaves of one tree, before a token of larger -log p first.

    A cut before token t, which the model wrote, keeps the t tokens before it. A leaf has cuts before the tokens that
    are its own, but for the first of them: there it was branched off, or begins. Ties go to the older leaf, then to the
    earlier token.
    """
    costs = [
        (leaf.completion.logprobs[t], leaf.number, t)
        for leaf in leaves
        for t, written in enumerate(leaf.completion.written_T)
        if t > leaf.shared and written
    ]
    return [Cut(leaf=number, tokens=t) for _, number, t in sorted(costs)]


def next_cuts(leaves: Sequence[TreeLeaf], used: Collection[Cut], places: int) -> list[Cut]:
    """The ``places`` cuts of a tree's next round: the first of :func:`ranked_cuts` that were not used before.

    Where these are too few the used ones follow, then all again. Where no leaf has a second token of its own, it is the
    start of the completion: the branches are then chains of their own.
    """
    ranked = ranked_cuts(leaves)
    fresh = [cut for cut in ranked if cut not in used]
    again = [cut for cut in ranked if cut in used]
    return list(islice(cycle(fresh + again or [Cut(leaf=leaves[0].number, tokens=0)]), places))


class _Tree:
    """A chain of a group, its branches, and where they were cut."""

    def __init__(self, chain: TreeLeaf) -> None:
        self.leaves = [chain]
        self.used: set[Cut] = set()

    def cut(self, places: int) -> list[Cut]:
        cuts = next_cuts(self.leaves, self.used, places)
        self.used.update(cuts)
        return cuts


class TreeRollout:
    """An engine around ``engine``: :meth:`generate` gives the leaves of ``config.chains`` trees a prompt as its group.

    The engine samples the chains as it samples any completion. A branch continues a prefix of token ids, and its
    completion is that prefix and the continuation, ids and sampled log-probs. The draws of a branch are a function of
    (seed, step, problem, occurrence, number of the leaf, place of the cut), apart from those that estimators ask for.
    A call with a sampling of its own, as an evaluation makes, has no tree.
    """

    def __init__(self, engine: Rollout, config: TreeConfig, sampling: SamplingConfig, policy: Any) -> None:
        self._engine, self._config, self._sampling, self._policy = engine, config, sampling, policy

    @property
    def engine(self) -> Rollout:
        """What samples."""
        return self._engine

    @property
    def same_distribution(self) -> bool:
        """That of the engine."""
        return self._engine.same_distribution

    @property
    def uses_policy(self) -> bool:
        """That of the engine."""
        return self._engine.uses_policy

    def generate(
        self, prompts: Sequence[Prompt], *, step: int, group_size: int, sampling: SamplingConfig | None = None
    ) -> list[Group]:
        """The chains first, then the branches round by round, tree by tree, cut by cut; rewards are not set."""
        if sampling is not None:
            return self._engine.generate(prompts, step=step, group_size=group_size, sampling=sampling)
        assert group_size == self._config.leaves, "the config checks it"
        groups = self._engine.generate(prompts, step=step, group_size=self._config.chains)
        grown = [
            [_Tree(TreeLeaf(number=number, completion=chain)) for number, chain in enumerate(group.completions)]
            for group in groups
        ]
        for _ in range(self._config.rounds):
            self._branch(prompts, grown, step)
        return [
            Group(prompt=prompt, completions=_in_order(trees)) for prompt, trees in zip(prompts, grown, strict=True)
        ]

    def _branch(self, prompts: Sequence[Prompt], grown: Sequence[Sequence[_Tree]], step: int) -> None:
        """One round for every tree, in one call of the engine."""
        requests, places = [], []
        for prompt, trees in zip(prompts, grown, strict=True):
            number = sum(len(tree.leaves) for tree in trees)
            for tree in trees:
                for cut in tree.cut(self._config.places):
                    prefix = next(leaf for leaf in tree.leaves if leaf.number == cut.leaf).completion
                    requests.append(self._request(prompt, number, prefix, cut.tokens))
                    places.append((tree, prefix, cut, number))
                    number += self._config.branches
        continued = self._engine.continue_(requests, step=step)
        rule = StopRule.of(self._policy, self._sampling)
        for (tree, prefix, cut, number), branches in zip(places, continued, strict=True):
            tree.leaves += [
                TreeLeaf(number=number + k, completion=joined(prefix, cut.tokens, branch, rule), shared=cut.tokens)
                for k, branch in enumerate(branches)
            ]

    def _request(self, prompt: Prompt, number: int, prefix: Completion, tokens: int) -> ContinuationRequest:
        """The branches of a cut, keyed by the first new leaf; the name keeps them from an estimator's draws."""
        return ContinuationRequest(
            problem_id=f"tree/{prompt.problem.id}",
            sample_index=number,
            prompt_ids=prompt.token_ids,
            completion_ids=prefix.token_ids[:tokens],
            draws=self._config.branches,
            max_new_tokens=self._sampling.max_new_tokens - tokens,
            occurrence=prompt.occurrence,
            problem=prompt.problem,
            turns=prefix.turns,
        )

    def sync(self, policy: Any) -> None:
        """Give the engine the policy's weights."""
        self._engine.sync(policy)

    def probe(self, requests: Sequence[ProbeRequest], settings: ProbeSettings) -> list[ProbeResult]:
        """Those of the engine."""
        return self._engine.probe(requests, settings)

    def continue_(self, requests: Sequence[ContinuationRequest], *, step: int) -> list[list[Completion]]:
        """Those of the engine."""
        return self._engine.continue_(requests, step=step)


def joined(prefix: Completion, tokens: int, branch: Completion, rule: StopRule) -> Completion:
    """The first ``tokens`` tokens of a completion, and what continued them."""
    whole = prefix.continued(tokens, branch)
    return replace(whole, text=branch.text if whole.turns else rule.text(whole.token_ids))


def _in_order(trees: Sequence[_Tree]) -> tuple[Completion, ...]:
    leaves = sorted((leaf for tree in trees for leaf in tree.leaves), key=lambda leaf: leaf.number)
    return tuple(leaf.completion for leaf in leaves)
