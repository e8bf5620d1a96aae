"""A run that dies by SIGKILL in the middle of a conversation: when replies are fed for the Nth time in a rollout.

python killed_in_turns.py ROLLOUT OVERRIDE …
"""

import os
import signal
import sys

from rltrain import cli, trainer
from rltrain.rollout.local import LocalRollout
from rltrain.rollout.shared_prompt_decoder import SharedDecoder

FEEDS = 2


class Killer:
    """Counts the calls of two methods that are left as they are."""

    def __init__(self, rollout: int) -> None:
        self.rollout, self.rollouts, self.feeds = rollout, 0, 0
        self.sample, self.feed = LocalRollout.sample, SharedDecoder.feed

    def sampled(self, engine, *arguments):
        self.rollouts, self.feeds = self.rollouts + 1, 0
        return self.sample(engine, *arguments)

    def fed(self, decoder, *arguments):
        self.feeds += 1
        if (self.rollouts, self.feeds) == (self.rollout, FEEDS):
            os.kill(os.getpid(), signal.SIGKILL)
        return self.feed(decoder, *arguments)


if __name__ == "__main__":
    killer = Killer(int(sys.argv[1]))
    LocalRollout.sample = lambda *arguments: killer.sampled(*arguments)
    SharedDecoder.feed = lambda *arguments: killer.fed(*arguments)
    trainer.fit(cli.compose(sys.argv[2:]))
