"""An environment that answers most turns of a random policy, in a worker process."""

from rltrain.types import Environment, Reply


class Letters(Environment):
    """Answers a turn that ends in a digit or a small letter up to m; the state counts the turns."""

    stop = tuple("0123456789abcdefghijklm")
    role = None

    def start(self, problem):
        return 1

    def respond(self, state, text):
        called = text.endswith(self.stop)
        reward = float("aeiou".find(text[-1:]) >= 0)
        return Reply(
            text=f"[{state}]" if called else "", state=state + 1, done=not called, called=called, reward=reward
        )

    def key(self, state):
        return str(state)
