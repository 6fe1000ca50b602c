"""The tree drawn in errors.py is the tree that is there."""

import inspect
import re

from saeguard import errors

BRANCH = re.compile(r"^(?P<trunk>[| ]*)(?:\|-|'-) (?P<name>\w+)(?P<says> +\S.*)?$")


def drawn() -> list[tuple[str, str]]:
    """(class, its parent) in the order of the drawing."""
    lines = inspect.cleandoc(errors.__doc__ or "").splitlines()
    start = next(i for i, line in enumerate(lines) if line.strip() == "SaeguardError")
    indent = len(lines[start]) - len(lines[start].lstrip())
    pairs, path = [], ["SaeguardError"]
    for line in lines[start + 1 :]:
        match = BRANCH.match(line[indent:])
        if match is None:
            break
        depth = len(match["trunk"]) // 3 + 1
        assert match["says"], f"{match['name']} is drawn without a word on what it means"
        path[depth:] = [match["name"]]
        pairs.append((match["name"], path[depth - 1]))
    return pairs


def defined() -> list[tuple[str, str]]:
    """(class, its parent) in the order of the file."""
    classes = [value for value in vars(errors).values() if inspect.isclass(value)]
    ours = [cls for cls in classes if cls.__module__ == errors.__name__ and cls is not errors.SaeguardError]
    return [(cls.__name__, cls.__bases__[0].__name__) for cls in ours]


def test_drawing_names_exactly_the_classes_with_their_parents():
    assert sorted(drawn()) == sorted(defined())


def test_drawing_and_file_have_one_order():
    assert drawn() == defined()


def test_every_error_has_one_parent_and_says_what_it_means():
    for name, _ in defined():
        cls = getattr(errors, name)
        assert len(cls.__bases__) == 1, name
        assert cls.__dict__.get("__doc__"), name
