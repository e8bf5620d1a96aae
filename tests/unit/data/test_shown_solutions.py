import pytest

from rltrain.data.random_calculation import RandomCalculation
from rltrain.data.shown_solutions import ShownSolutions, ShownSolutionsConfig
from rltrain.errors import ConfigError


def test_a_shown_problem_has_its_solution_before_it():
    """Every problem, none, or about half of them; id, answer and solution stay those of the plain problem."""
    plain = RandomCalculation(ShownSolutionsConfig(), "train")[:400]
    none, every, half = (
        ShownSolutions(ShownSolutionsConfig(shown_share=share), "train")[:400] for share in (0, 1, 0.5)
    )
    assert none == plain
    for problem, bare in zip(every, plain, strict=True):
        assert problem.prompt == f"{bare.prompt}{bare.meta['solution']}\n{bare.prompt}"
        assert (problem.id, problem.answer, problem.meta) == (bare.id, bare.answer, bare.meta)
    assert 160 < sum(problem != bare for problem, bare in zip(half, plain, strict=True)) < 240
    assert ShownSolutions(ShownSolutionsConfig(), "train")[7] == half[7]


def test_a_template_without_a_place_is_refused():
    with pytest.raises(ConfigError, match=r"data.shown='\{prompt\}': lacks \{solution\}; add it"):
        ShownSolutionsConfig(shown="{prompt}")
    with pytest.raises(ConfigError, match="data.shown_share=2"):
        ShownSolutionsConfig(shown_share=2)
