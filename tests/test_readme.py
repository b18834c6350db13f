from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_ci_runs_the_test_command_of_the_readme():
    command = next(
        line
        for line in (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
        if line.endswith(".venv/bin/pytest")
    )
    assert command in (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()


def test_nothing_is_left_to_fill_in():
    assert "@@" not in (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_map_of_the_code_names_every_module():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for path in (ROOT / "l2c_export").rglob("*.py"):
        if path.name != "__init__.py":
            assert f"`{path.relative_to(ROOT / 'l2c_export').as_posix()}`" in readme
