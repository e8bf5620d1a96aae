"""Environments of the library verifiers, written as its users write them: a game of several turns, and tools."""

import verifiers as vf
from datasets import Dataset


class Higher(vf.MultiTurnEnv):
    """Guess a number; the environment says higher or lower."""

    async def setup_state(self, state):
        state["guesses"] = 0
        return state

    async def env_response(self, messages, state, **kwargs):
        state["guesses"] += 1
        guess, answer = int(messages[-1]["content"]), int(state["answer"])
        if guess == answer:
            state["final_env_response"] = [{"role": "user", "content": "right"}]
            return state["final_env_response"]
        return [{"role": "user", "content": "higher" if guess < answer else "lower"}]


def few_guesses(state):
    """1 for the first guess, 1/2 for the second."""
    return 1.0 / state["guesses"] if state.get("final_env_response") else 0.0


def double(number: int) -> int:
    """Twice a number."""
    return 2 * number


def right(completion, answer):
    return float(completion[-1]["content"] == answer)


def load_environment(kind="game", rows=20):
    data = Dataset.from_list([{"question": f"number {n}", "answer": str(n)} for n in range(rows)])
    if kind == "tools":
        return vf.ToolEnv(tools=[double], dataset=data, rubric=vf.Rubric(funcs=[right]), max_turns=5)
    return Higher(dataset=data, rubric=vf.Rubric(funcs=[few_guesses]), max_turns=3, system_prompt="Guess.")
