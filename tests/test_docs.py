"""What README and docs/ name exists: links and their anchors, every key with its default, every command's options."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import typer
import yaml
from pydantic import BaseModel

from eat_dist.cli import app
from eat_dist.config import RunConfig, load_config

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CHANGELOG.md",
    *sorted(ROOT.glob("docs/*.md")),
    *sorted(ROOT.glob("deploy/**/*.md")),
]
# What a commit that is named beside it had, and a pattern.
NOT_HERE = {"benchmarks/omniglot_table.py", "eat_dist/defenses/NAME.py"}
SUBMIT_OPTIONS = {"--address", "--env", "--working-dir"}


def prose(page: Path) -> str:
    return re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """Of a page's headings, as code forges make them."""
    headings = re.findall(r"^#+ (.*)$", prose(page), flags=re.MULTILINE)
    texts = [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower() for heading in headings]
    return {re.sub(r"[^\w\- ]", "", text).replace(" ", "-") for text in texts}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_and_every_path_of_a_page_leads_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if not link.startswith("http"):
            path, _, anchor = link.partition("#")
            target = page.parent / path if path else page
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link
    folders = "docs|configs|tune_spaces|benchmarks|tests|deploy|jobs|eat_dist"
    for path in re.findall(rf"(?<![\w/])((?:{folders})/[\w./-]+\.(?:md|yaml|py|png))", text):
        assert path in NOT_HERE or (ROOT / path).exists(), path


def keys(section: BaseModel, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            yield from keys(value, f"{prefix}{name}.")
        else:
            yield prefix + name, list(value) if isinstance(value, tuple) else value


def test_the_page_on_configuration_has_every_key_with_its_default() -> None:
    documented: dict[str, str] = {}
    section: str | None = None
    for line in (ROOT / "docs/configuration.md").read_text(encoding="utf-8").splitlines():
        if heading := re.match(r"## (?:`(\w+)`|(Top level))?", line):
            section = "" if heading[2] else f"{heading[1]}." if heading[1] else None
        elif section is not None and (row := re.match(r"\| `([\w.]+)` \| (.+?) \|", line)):
            documented[section + row[1]] = row[2].strip("`")
    defaults = dict(keys(RunConfig()))
    assert set(documented) == set(defaults)
    # In words there, since they are a list of names.
    assert documented.pop("evaluation.objectives") == "the second to fourth"
    for key, text in documented.items():
        value = yaml.safe_load(text)
        number = isinstance(defaults[key], float) and isinstance(value, str)  # YAML takes 5e-4 for text
        assert (float(value) if number else value) == defaults[key], key


def commands(page: Path) -> Iterator[list[str]]:
    """The words after ``eat-dist`` of every command that stands in a block of a page."""
    blocks = page.read_text(encoding="utf-8").replace("\\\n", " ").split("\n```")[1::2]
    for line in "\n".join(blocks).splitlines():
        if shown := re.match(r"(?:.*; do)?\s*eat-dist ([a-z]+ .*)", line):
            yield shlex.split(re.split(r"\s#\s|; done|\s&&\s", shown[1])[0])


def without_submit(words: list[str]) -> list[str]:
    """The command that is submitted, without what belongs to ``submit``."""
    if words[0] != "submit":
        return words
    kept, position = [], 1
    while position < len(words):
        word = words[position]
        position += 2 if word in SUBMIT_OPTIONS else 1
        if word not in SUBMIT_OPTIONS | {"--no-wait", "--stop-on-interrupt"}:
            kept.append(word)
    return kept


def found(words: list[str]) -> tuple[click.Command, list[str]]:
    command: Any = typer.main.get_command(app)
    rest = list(words)
    while hasattr(command, "commands"):
        assert rest, words
        assert rest[0] in command.commands, words
        command = command.commands[rest.pop(0)]
    return command, rest


def test_every_command_that_is_shown_has_its_options_its_files_and_a_valid_config() -> None:
    seen = 0
    for page in PAGES:
        for words in commands(page):
            seen += 1
            command, rest = found(without_submit(words))
            options = {name: option for option in command.params for name in (*option.opts, *option.secondary_opts)}
            given: dict[str, list[str]] = {}
            while rest:
                name, _, value = rest.pop(0).partition("=")
                if not name.startswith("-"):
                    continue
                assert name in options, (page.name, words)
                if not getattr(options[name], "is_flag", False):
                    given.setdefault(name, []).append(value or (rest.pop(0) if rest else ""))
            config = next(iter(given.get("--config", [])), None)
            if config is not None and config.startswith("configs/"):
                assert (ROOT / config).exists(), (page.name, words)
            for space in given.get("--space", []):
                assert not space.startswith("tune_spaces/") or (ROOT / space).exists(), (page.name, words)
            if command.name in ("train", "evaluate", "sweep"):
                known = ROOT / config if config is not None and config.startswith("configs/") else None
                load_config(known, [setting for setting in given.get("--set", []) if "$" not in setting])
    assert seen > 60
