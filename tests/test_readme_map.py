"""README.md shows every module, in that module's own words."""

import pytest

from tests import readme_map

SOURCES = {
    "__init__.py": '"""The public names. More words."""',
    "sites.py": '"""Where, in no\nframework\'s words.\n\nMore."""',
    "kernels/__init__.py": '"""Ways to run one edit."""',
    "kernels/sliced.py": "",
}


@pytest.fixture
def package(tmp_path):
    for name, source in SOURCES.items():
        path = tmp_path / "pkg" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source, encoding="utf-8")
    return tmp_path / "pkg"


def test_readme_map_is_what_the_modules_say():
    shown = readme_map.block(readme_map.README.read_text(encoding="utf-8"))

    assert shown == readme_map.render(readme_map.ROOT / "saeguard"), "run: make format"


@pytest.mark.parametrize("path", readme_map.modules(readme_map.ROOT / "saeguard"), ids=lambda p: p.stem)
def test_module_begins_with_a_sentence(path):
    assert readme_map.first_sentence(path).endswith((".", ":", "?")), f"{path}: no docstring, or no full stop"


def test_map_gives_one_line_per_module_and_joins_broken_lines(package):
    assert readme_map.render(package).splitlines() == [
        "```text",
        "pkg/__init__.py          The public names.",
        "pkg/sites.py             Where, in no framework's words.",
        "pkg/kernels/__init__.py  Ways to run one edit.",
        "pkg/kernels/sliced.py",
        "```",
    ]


def test_writing_the_map_keeps_the_rest_of_the_readme():
    readme = f"before\n{readme_map.BEGIN}\nold\n{readme_map.END}\nafter\n"

    written = readme_map.with_block(readme, "new")

    assert written == f"before\n{readme_map.BEGIN}\nnew\n{readme_map.END}\nafter\n"


def test_readme_without_markers_is_refused():
    with pytest.raises(ValueError, match=r"README\.md needs a line"):
        readme_map.with_block("no markers", "new")
