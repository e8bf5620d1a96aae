"""A class or a module of the user's, with what it leaves out."""

from rltrain.environments.custom import CustomEnvironmentConfig, custom
from rltrain.types import Problem, Reply


def test_a_module_is_an_environment():
    made = custom(CustomEnvironmentConfig(import_path="module_environment"))
    assert (made.stop, made.role, made.key(0)) == ([";"], None, None)
    assert made.start(Problem(id="a", prompt="", answer="")) == 0
    assert made.respond(1, "so") == Reply(text="so", state=2, done=True)


def test_a_class_is_built_with_its_options():
    made = custom(CustomEnvironmentConfig(import_path="user_environments:Guess", options={"tries": 5}))
    assert made.start(Problem(id="a", prompt="", answer="7")) == {"answer": 7, "left": 5}
    assert (made.stop, made.role, made.key({"left": 4})) == (("\n",), None, "4")


def test_a_class_of_its_own_has_no_key():
    made = custom(CustomEnvironmentConfig(import_path="user_environments:Hostile"))
    assert (made.stop, made.role, made.key([])) == (("!",), "user", None)
