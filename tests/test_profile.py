"""Deployment profiles: defaults that a user's options go before."""

from __future__ import annotations

import json
import re

import click
import pytest
from click.testing import CliRunner

from l2c_export.cli import cli
from l2c_export.core.profile import (
    Profile,
    parse_bytes,
    profile_folder,
    profile_names,
    read_profile,
)
from l2c_export.engines.request import parse_targets
from l2c_export.errors import L2CError, UnsupportedError


@pytest.fixture
def profile(tmp_path):
    """Write a profile and return its path as text."""

    def write(text: str) -> str:
        path = tmp_path / "target.toml"
        path.write_text('description = "a target"\n' + text, encoding="utf-8")
        return str(path)

    return write


@pytest.fixture
def plan(tiny_files):
    """Plan the tiny model with more options; return what was printed as JSON."""

    def run(*options: str) -> dict:
        files = [
            "--model-config",
            tiny_files / "model.json",
            "--router",
            tiny_files / "router.safetensors",
        ]
        result = CliRunner().invoke(cli, ["plan", "--json", *map(str, files), *options])
        assert result.exit_code == 0, result.stderr
        return json.loads(result.stdout)

    return run


def test_every_shipped_profile_can_be_read_and_says_what_it_is():
    names = {"cpu", "cpu-batch", "cuda", "rtx-desktop", "laptop-8gb", "l4", "a10", "h100"}
    names |= {"jetson-orin", "jetson-thor"}
    assert names <= set(profile_names())
    for name in profile_names():
        profile = read_profile(name)
        assert re.fullmatch(r"[^\n]{10,80}", profile.description)
        assert profile == read_profile(str(profile_folder() / f"{name}.toml"))


@pytest.mark.parametrize("name", ["build", "plan", "run", "verify", "bench"])
def test_every_shipped_profile_is_offered_by_the_commands(name):
    shown = " ".join(CliRunner().invoke(cli, [name, "-h"]).stdout.split()).replace("- ", "-")
    assert f"Defaults for a deployment target: {', '.join(profile_names())}" in shown


def test_what_a_profile_does_not_say_has_a_default(profile):
    assert read_profile(profile("")) == Profile("a target", "ort", "float32", "1", None, None)
    assert read_profile(profile("threads = 3\nmax_graphs = 4")).max_graphs == 4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('colour = "red"', r"unknown key\(s\) colour; known: description, backend, precision, batch"),
        ('threads = "4"', r"threads is '4'; it must be a whole number"),
        ("threads = true", r"threads is True; it must be a whole number"),
        ("max_graphs = 1.5", r"max_graphs is 1.5; it must be a whole number"),
        ("batch = 4", r"batch is 4; it must be text in quotes"),
        ("[backend]\nname = 1", r"backend is \{'name': 1\}; it must be text in quotes"),
        ("batch = ", r"is not TOML"),
        ('batch = "1"\nbatch = "2"', r"is not TOML"),
        ("threads = " + "9" * 5000, r"is not TOML"),
        ("threads = " + "[" * 100_000, r"is not TOML"),
    ],
)
def test_a_profile_that_is_none_is_refused_with_its_path(profile, text, message):
    with pytest.raises(L2CError, match=rf"target.toml.*{message}") as error:
        read_profile(profile(text))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", profile_names())
def test_every_shipped_profile_is_taken_by_the_commands_that_it_is_for(name):
    profile = read_profile(name)
    if profile.target:
        assert ",".join(parse_targets(profile.target)) == profile.target
    code = CliRunner().invoke(
        cli, ["plan", "--model", "dit-s-8", "--uncached", "--json", "--profile", name]
    )
    assert code.exit_code == 0, code.stderr
    # a bundle that is not there is found out after the options have been read
    for command in ("engines", "build"):
        where = ["nowhere"] if command == "engines" else ["--model", "dit-s-8", "--uncached"]
        result = CliRunner().invoke(cli, [command, *where, "--profile", name, "--dry-run"])
        assert result.exit_code != 2, result.stderr


def test_amounts_of_memory_are_in_powers_of_1024():
    assert [parse_bytes(text) for text in ("8G", "1.5 GiB", "512m", "7")] == [
        8 << 30,
        3 << 29,
        512 << 20,
        7,
    ]
    for text in ("", "G", "8T", "-1", "8 G B", "lots"):
        with pytest.raises(L2CError, match="is not an amount of memory such as 8G"):
            parse_bytes(text)


def test_what_engines_take_from_a_profile_is_read_and_checked(profile):
    read = read_profile(
        profile('target = "sm87"\nmax_vram = "4G"\ntf32 = true\noptimization_level = 3')
    )
    assert (read.target, read.max_vram, read.tf32, read.optimization_level) == ("sm87", "4G", True, 3)
    for text in ('max_vram = "lots"', 'workspace = "1 T"'):
        with pytest.raises(L2CError, match=r"target.toml.* is not an amount of memory"):
            read_profile(profile(text))
    with pytest.raises(L2CError, match="tf32 is 1; it must be true or false"):
        read_profile(profile("tf32 = 1"))


def test_a_profile_without_a_description_is_refused(tmp_path):
    (tmp_path / "p.toml").write_text('backend = "ort"')
    with pytest.raises(L2CError, match=r"p.toml lacks a description"):
        read_profile(str(tmp_path / "p.toml"))


def test_a_profile_that_is_not_text_is_refused(tmp_path):
    (tmp_path / "p.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(L2CError, match=r"p.toml is not TOML"):
        read_profile(str(tmp_path / "p.toml"))


@pytest.mark.parametrize("name", ["toaster", "../cpu", "cpu.toml", "", "."])
def test_an_unknown_profile_is_refused_with_those_there_are(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        L2CError, match=rf"profile '{re.escape(name)}' is neither .* one of: a10, cpu, cpu-batch"
    ):
        read_profile(name)


def test_a_precision_that_this_release_does_not_make_is_unsupported(profile):
    path = profile('precision = "float8"')
    with pytest.raises(
        UnsupportedError, match=r"precision 'float8'; this release has: float32, float16"
    ):
        read_profile(path)
    result = CliRunner().invoke(cli, ["build", "--model", "dit-s-8", "--uncached", "--profile", path])
    assert result.exit_code == 4
    assert "precision 'float8'" in result.stderr


def test_an_option_goes_before_the_profile_and_the_profile_before_the_default(profile, plan):
    path = profile("max_graphs = 2")
    default, by_profile, by_option = (
        len(plan(*options)["graphs"])
        for options in ([], ["--profile", path], ["--max-graphs", "1", "--profile", path])
    )
    assert (default > 3, by_profile, by_option) == (True, 2, 1)
    assert plan("--profile", path, "--max-graphs", "1") == plan("--max-graphs", "1")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('batch = "8-1"', "'8-1' is not N or LO-HI"),
        ("max_graphs = 0", "0 is not in the range"),
        ('backend = "abacus"', "'abacus' is not"),
    ],
)
def test_a_value_that_no_option_could_have_is_a_usage_error(profile, text, message):
    arguments = ["build", "--model", "dit-s-8", "--uncached", "--dry-run", "--profile", profile(text)]
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == click.UsageError.exit_code
    assert message in result.stderr
