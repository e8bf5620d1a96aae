"""The rows that the local engine decodes together: which of them start, wait, go on and leave."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

from rltrain.config import SamplingConfig
from rltrain.rollout.continuations import ForkingDecoder
from rltrain.rollout.conversation import Answers, carry
from rltrain.rollout.decoder_check import Decoder
from rltrain.rollout.local_config import LocalRolloutConfig
from rltrain.rollout.rows import Job, Row, WaitingRows
from rltrain.rollout.sampling import entropy_and_collision, sample_with_distribution, uniforms
from rltrain.rollout.shared_prompt_decoder import SharedDecoder
from rltrain.rollout.speculation import GroupDrafts, RecycledTokens, accepted


class LocalBatch:
    """The rows in flight: a decoder's rows, the last token of each, and what was sampled so far."""

    def __init__(
        self,
        decoder: Decoder,
        sampling: SamplingConfig,
        config: LocalRolloutConfig,
        limit_tokens: int | None,
        answers: Answers | None = None,
    ) -> None:
        self._decoder, self._sampling, self._config, self._limit_tokens = decoder, sampling, config, limit_tokens
        self._answers, self._waiting = answers, WaitingRows()
        self._feeding = decoder if isinstance(decoder, (SharedDecoder, ForkingDecoder)) else None
        self._steps = 0  # decoded
        self._was_full = False  # rows were sent back, and none has ended since
        self._longest_tokens = 0  # of the completions that have ended
        self._rows: list[Row] = []
        self._jobs: list[Job] = []
        self._tokens_B: Tensor
        self._keys_B: Tensor
        self._positions_B: Tensor  # of the next completion token
        self._recycled = RecycledTokens() if config.speculate_from == "recycling" else None
        self._drafts: dict[int, tuple[GroupDrafts, int]] = {}  # of each row and its place in the group, by id

    def run(self, jobs: Sequence[Job]) -> None:
        """Sample every row of every job to its end."""
        queue = deque(jobs)
        while queue or self._rows or self._waiting.rows:
            while fitting := self._fitting(queue):
                self._admit(fitting)
            self._note_waiting()  # a turn may end with its first token, before the cache is made room in
            if not all(row.done for row in self._rows):
                self._make_room(queue)
            if not all(row.done for row in self._rows):  # those that decode may have left, and those that wait not
                if not queue and self._speculates():
                    self._decode_guessing()
                else:
                    self._decode()
            self._note_waiting()
            self._compact()
            if self._answers is not None:
                self._rejoin(queue, self._answers)

    def _fitting(self, queue: deque[Job]) -> list[Job]:
        """Take from the queue what may start now: jobs of as many rows each, and at least one if none is in flight."""
        chosen: list[Job] = []
        if self._rows and (self._was_full or not self._decoder.refills):
            return chosen
        while queue and self._alike(queue[0], (chosen or queue)[0]):
            if (self._rows or chosen) and not self._has_room([*chosen, queue[0]]):
                break
            chosen.append(queue.popleft())
        return chosen

    def _note_waiting(self) -> None:
        if self._answers is not None:
            self._waiting.add(self._jobs, self._steps)

    def _alike(self, job: Job, first: Job) -> bool:
        """Whether two jobs may start together: of as many rows and, in a conversation, both at or behind its start."""
        begun = bool(job.rows[0].token_ids), bool(first.rows[0].token_ids)
        return len(job.rows) == len(first.rows) and (self._answers is None or begun[0] == begun[1])

    def _rejoin(self, queue: deque[Job], answers: Answers) -> None:
        """Ask for the turns that ended, and let the rows go on whose answers are due: wait for these.

        Which rows are due is decided by tokens alone, so that no arrival changes a bit.
        """
        carry(self._waiting.conversations(), answers, wait=False)
        decoding = sum(not row.done for row in self._rows)
        if queue and not self._rows:
            return
        share, after_steps = self._config.compact_share, self._config.reply_steps
        due = self._waiting.take_due(self._steps, decoding, share=share, after_steps=after_steps)
        carry([row.conversation for job in due for row in job.rows if row.conversation], answers, wait=True)
        if due and self._feeding is None:
            self._keep(self._wanted())
        for job in due:
            job.rows[0].observe()
        going = [job for job in due if not job.rows[0].done]
        self._make_room_to_feed({id(job.rows[0]): 1 + job.rows[0].observed_tokens for job in going})
        place = {id(row): index for index, row in enumerate(self._rows)}
        here = sorted(((place[id(job.rows[0])], job) for job in going if id(job.rows[0]) in place), key=lambda x: x[0])
        queue.extendleft(reversed([job for job in going if id(job.rows[0]) not in place]))
        for fed in self._feeds(here):
            self._feed(fed)

    def _make_room_to_feed(self, tokens_of: dict[int, int]) -> None:
        """Let the rows that are to be fed leave where the cache has no room for a copy of them and their new tokens.

        They are prefilled with all of their tokens later.
        """
        if self._limit_tokens is None or not tokens_of or not isinstance(self._decoder, SharedDecoder):
            return
        here, width = sum(id(row) in tokens_of for row in self._rows), max(tokens_of.values())
        grown = self._decoder.cache_tokens(width, len(self._rows), grows=True)
        if here and grown + here * (self._decoder.capacity + width) > self._limit_tokens:
            self._keep([index for index, row in enumerate(self._rows) if id(row) not in tokens_of])
            self._was_full = True

    def _feeds(self, here: Sequence[tuple[int, Job]]) -> list[list[tuple[int, Job]]]:
        """Rows that are fed together, at most ``prefix_tokens_per_pass`` tokens with their padding, or one."""
        batches: list[list[tuple[int, Job]]] = []
        width = 0
        for index, job in here:
            width = max(width, 1 + job.rows[0].observed_tokens)
            if not batches or (len(batches[-1]) + 1) * width > self._config.prefix_tokens_per_pass:
                batches.append([])
                width = 1 + job.rows[0].observed_tokens
            batches[-1].append((index, job))
        return batches

    def _feed(self, fed: Sequence[tuple[int, Job]]) -> None:
        """Feed rows the last token of their turns and what they observe, and sample the first token of the next."""
        assert self._feeding is not None
        rows, indices = [job.rows[0] for _, job in fed], [index for index, _ in fed]
        ids = [row.token_ids[-1 - row.observed_tokens :] for row in rows]
        starts = [
            len(job.prompt_ids) + len(row.token_ids) - len(new)
            for (_, job), row, new in zip(fed, rows, ids, strict=True)
        ]
        logits_RV = self._feeding.feed(indices, starts, ids)
        index_R = torch.tensor(indices, device=self._keys_B.device)
        positions_R = torch.tensor([row.offset + len(row.token_ids) for row in rows], device=self._keys_B.device)
        tokens_R, facts_RF = self._sample(logits_RV, uniforms(self._keys_B[index_R], positions_R), rows)
        self._record(rows, tokens_R[None], facts_RF[None])
        self._tokens_B = self._tokens_B.index_copy(0, index_R, tokens_R)
        self._positions_B = self._positions_B.index_copy(0, index_R, positions_R + 1)

    def _has_room(self, jobs: Sequence[Job]) -> bool:
        """Whether the jobs fit into the rows and the cache and, where others may join later, into one prefill."""
        rows = [*self._rows, *(row for job in jobs for row in job.rows)]
        longest = max(len(job.prefix_ids) for job in jobs)
        pieces = self._decoder.refills and len(jobs) > 1
        if len(rows) > self._config.max_rows:
            return False
        if pieces and len(jobs) * longest > self._config.prefix_tokens_per_pass:
            return False
        if self._limit_tokens is None:
            return True
        if not isinstance(self._decoder, SharedDecoder):  # rows that are in flight end there: reserve for all of them
            prompt_tokens = sum(len(job.prompt_ids) for job in (*self._jobs, *jobs))
            return prompt_tokens + sum(row.most_tokens for row in rows) <= self._limit_tokens
        expected = max(self._longest_tokens, max(row.most_tokens for row in rows) // 4)
        expected_tokens = self._decoder.cache_tokens(expected, len(self._rows), more_prompts=[longest] * len(jobs))
        new_rows = len(rows) - len(self._rows)
        return expected_tokens + new_rows * max(expected, self._decoder.capacity) <= self._limit_tokens

    def _make_room(self, queue: deque[Job]) -> None:
        """Send the youngest rows back to the queue until the cache can grow for the next tokens of the others.

        They keep their tokens, which are prefilled with the prompt later. Until a row ends nothing starts.
        """
        if self._limit_tokens is None or not isinstance(self._decoder, SharedDecoder):
            return
        columns = max(self._config.steps_between_looks(self._keys_B.device.type), 1 + self._config.speculate_tokens)
        if self._decoder.cache_tokens(columns, len(self._rows), grows=True) <= self._limit_tokens:
            return
        self._keep(self._wanted())
        kept = len(self._rows)
        while kept > 1 and self._decoder.cache_tokens(columns, kept, grows=True) > self._limit_tokens:
            kept -= 1
        if kept < len(self._rows):
            prompt_of = {id(row): job.prompt_ids for job in self._jobs for row in job.rows}
            back = [Job(prompt_ids=prompt_of[id(row)], rows=[row]) for row in self._rows[kept:] if not row.done]
            queue.extendleft(reversed(back))
            self._keep(range(kept))
            self._was_full = True

    def _admit(self, jobs: Sequence[Job]) -> None:
        """Prefill the prompts and sample the next token of their rows."""
        rows = [row for job in jobs for row in job.rows]
        prefixes, fed = [job.prefix_ids for job in jobs], [len(job.rows[0].token_ids) for job in jobs]
        if any(fed) and isinstance(self._decoder, (SharedDecoder, ForkingDecoder)):
            logits_BV = self._decoder.admit(prefixes, len(jobs[0].rows), fed)
        else:
            logits_BV = self._decoder.admit(prefixes, len(jobs[0].rows))
        keys_B = torch.tensor([row.key for row in rows], device=logits_BV.device)
        positions_B = torch.tensor([row.offset + len(row.token_ids) for row in rows], device=logits_BV.device)
        tokens_B, facts_BF = self._sample(logits_BV, uniforms(keys_B, positions_B), rows)
        self._record(rows, tokens_B[None], facts_BF[None])
        positions_B = positions_B + 1
        if self._rows:
            tokens_B, keys_B = torch.cat([self._tokens_B, tokens_B]), torch.cat([self._keys_B, keys_B])
            positions_B = torch.cat([self._positions_B, positions_B])
        self._tokens_B, self._keys_B, self._positions_B = tokens_B, keys_B, positions_B
        self._rows += rows
        self._jobs += jobs
        if self._recycled is not None:
            for job in jobs:
                self._recycled.watch(job.prompt_ids, [row.token_ids for row in job.rows])

    def _decode(self) -> None:
        """``check_steps`` tokens for every row, and one look at them from the host at the end."""
        left = max(row.left_tokens for row in self._rows if not row.done)
        steps = min(self._config.steps_between_looks(self._keys_B.device.type), left)
        offsets_K1 = torch.arange(steps, device=self._keys_B.device)[:, None]
        sampled = []
        for uniforms_B in uniforms(self._keys_B, self._positions_B + offsets_K1):
            self._tokens_B, facts_BF = self._sample(self._decoder.step(self._tokens_B), uniforms_B, self._rows)
            sampled.append((self._tokens_B, facts_BF))
        self._positions_B, self._steps = self._positions_B + steps, self._steps + steps
        tokens_KB, facts_KBF = (torch.stack(columns) for columns in zip(*sampled, strict=True))
        self._record(self._rows, tokens_KB, facts_KBF)

    def _speculates(self) -> bool:
        few = sum(not row.done for row in self._rows) <= self._config.speculate_rows
        return bool(self._config.speculate_tokens) and few and isinstance(self._decoder, SharedDecoder)

    def _decode_guessing(self) -> None:
        """Feed every row its last token and guesses behind it; sample at all of them, keep what the guesses allow."""
        assert isinstance(self._decoder, SharedDecoder)
        left = min(row.left_tokens for row in self._rows if not row.done)
        if self._recycled is not None:
            self._recycled.refresh()
        guesses = [self._guess(row, min(self._config.speculate_tokens, left - 1)) for row in self._rows]
        guessed_BK = torch.tensor(guesses, device=self._keys_B.device, dtype=torch.int64)
        fed_BT = torch.cat([self._tokens_B[:, None], guessed_BK], dim=1)
        offsets_T = torch.arange(fed_BT.shape[1], device=fed_BT.device)
        uniforms_BT = uniforms(self._keys_B[:, None], self._positions_B[:, None] + offsets_T)
        logits_BTV = self._decoder.verify(fed_BT)
        tokens_N, facts_NF = self._sample(logits_BTV.flatten(0, 1), uniforms_BT.flatten(), self._rows)
        tokens_BT, facts_BTF = tokens_N.view_as(fed_BT), facts_NF.unflatten(0, fed_BT.shape)
        counts_B = accepted(fed_BT, tokens_BT)
        self._decoder.accept(counts_B)
        self._tokens_B = tokens_BT.gather(1, counts_B[:, None] - 1).squeeze(1)
        self._positions_B, self._steps = self._positions_B + counts_B, self._steps + 1
        counts = counts_B.tolist()
        rows = zip(self._rows, tokens_BT.tolist(), facts_BTF.tolist(), counts, strict=True)
        for row, tokens_T, facts_TF, count in rows:
            row.extend(tokens_T[:count], facts_TF[:count])

    def _guess(self, row: Row, count: int) -> list[int]:
        if row.done or count == 0:
            return [0] * count
        if self._recycled is not None:
            return self._recycled.guess(row.token_ids[-1], count)
        if not self._drafts:
            for job in self._jobs:
                drafts = GroupDrafts(job.prompt_ids, [one.token_ids for one in job.rows])
                self._drafts |= {id(one): (drafts, index) for index, one in enumerate(job.rows)}
        drafts, index = self._drafts[id(row)]
        return drafts.guess(index, count)

    def _sample(self, logits_BV: Tensor, uniforms_B: Tensor, rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
        """Tokens [B], and of each its log-prob and, where the rows want them, entropy and collision [B, F]."""
        config = self._sampling
        tokens_B, logprobs_B, probabilities_BV = sample_with_distribution(
            logits_BV, uniforms_B, temperature=config.temperature, top_k=config.top_k, top_p=config.top_p
        )
        if rows[0].entropies is None:
            return tokens_B, logprobs_B[:, None]
        if probabilities_BV is None:  # a point mass
            return tokens_B, torch.stack([logprobs_B, logprobs_B, torch.ones_like(logprobs_B)], dim=-1)
        return tokens_B, torch.cat([logprobs_B[:, None], entropy_and_collision(probabilities_BV)], dim=-1)

    def _record(self, rows: Sequence[Row], tokens_KB: Tensor, facts_KBF: Tensor) -> None:
        """Append K tokens to each row and cut those that ended."""
        facts = facts_KBF.transpose(0, 1).tolist()
        for row, tokens_K, facts_KF in zip(rows, tokens_KB.T.tolist(), facts, strict=True):
            row.extend(tokens_K, facts_KF)

    def _compact(self) -> None:
        """Drop finished rows once they are worth the copy."""
        kept = self._wanted()
        if len(self._rows) - len(kept) >= self._config.compact_share * len(self._rows):
            self._keep(kept)

    def _wanted(self) -> list[int]:
        """The rows whose caches are needed: those that decode and, where answers can be fed, those that wait."""
        return [index for index, row in enumerate(self._rows) if not row.done or (self._feeding and row.waits)]

    def _keep(self, kept: Sequence[int]) -> None:
        """Drop all rows but these. Where some had ended, others may start again."""
        self._decoder.keep(kept)
        ended = [len(row.token_ids) for row in self._rows if row.done]
        self._longest_tokens = max(self._longest_tokens, *ended, 0)
        self._was_full = self._was_full and not ended
        self._rows = [self._rows[index] for index in kept]
        in_flight = {id(row) for row in self._rows}
        self._jobs = [job for job in self._jobs if any(id(row) in in_flight for row in job.rows)]
        index_B = torch.tensor(kept, device=self._keys_B.device, dtype=torch.int64)
        self._tokens_B, self._keys_B = self._tokens_B[index_B], self._keys_B[index_B]
        self._positions_B = self._positions_B[index_B]
