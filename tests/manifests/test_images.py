"""The Dockerfile: bases by digest, users by number, nothing copied that is not there, and every import installed."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys

import pytest

from tests.manifests.rendering import MANIFESTS, ROOT

TARGETS = ("operator", "spark", "training", "serving")
DOCKERFILE = re.sub(r"\\\n", "", (MANIFESTS / "images" / "Dockerfile").read_text())
INSTRUCTIONS = [line.split(None, 1) for line in DOCKERFILE.splitlines() if line.strip() and not line.startswith("#")]
PROBE = """
import importlib, importlib.metadata as metadata, sys
from importlib.machinery import PathFinder
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name as canonical

there, queue = set(), [Requirement(text) for text in sys.argv[2].split()]
while queue:
    wanted = queue.pop()
    try:
        required = metadata.requires(wanted.name) or []
    except metadata.PackageNotFoundError:
        continue
    key = canonical(wanted.name), *sorted(wanted.extras)
    if key not in there:
        there.add(key)
        extras = [{"extra": extra} for extra in ("", *wanted.extras)]
        queue += [r for r in map(Requirement, required) if not r.marker or any(map(r.marker.evaluate, extras))]
names = {name for name, *_ in there} | {"bluewhale"}
owners = metadata.packages_distributions()

class Image:
    # What the image has not is not found.
    def find_spec(self, name, path=None, target=None):
        distributions = {canonical(d) for d in owners.get(name.partition(".")[0], ())}
        if distributions and not distributions & names:
            raise ModuleNotFoundError(f"{name} of {', '.join(sorted(distributions))} is not installed", name=name)

sys.meta_path.insert(0, Image())
for module in sys.argv[1].split():
    importlib.import_module(module)
"""


def stages() -> dict[str, list[tuple[str, str]]]:
    found: dict[str, list[tuple[str, str]]] = {}
    name = ""
    for instruction, rest in INSTRUCTIONS:
        if instruction == "FROM":
            base, _, name = rest.partition(" AS ")
            found[name] = [("FROM", base)]
        elif name:
            found[name].append((instruction, rest))
    return found


def arguments() -> dict[str, str]:
    """Those before the first stage, with their defaults."""
    found = {}
    for instruction, rest in INSTRUCTIONS:
        if instruction == "FROM":
            break
        name, _, default = rest.partition("=")
        found[name] = default
    return found


def test_a_base_is_an_argument_whose_default_is_a_digest() -> None:
    names = stages()
    for name, instructions in names.items():
        base = instructions[0][1]
        if base not in names:
            argument = re.fullmatch(r"\$\{(\w+)\}", base)
            assert argument, f"{name} is built from {base}"
            assert re.search("@sha256:[0-9a-f]{64}$", arguments()[argument[1]])


@pytest.mark.parametrize("target", TARGETS)
def test_an_image_runs_as_a_user_of_a_number_other_than_root_s(target: str) -> None:
    users = [rest for instruction, rest in stages()[target] if instruction == "USER"]
    # restricted namespaces take runAsNonRoot from an image only by number.
    assert users == ["65532:65532"]
    assert stages()[target].index(("USER", users[0])) > max(
        i for i, (instruction, _) in enumerate(stages()[target]) if instruction in ("RUN", "COPY")
    )


def copied() -> list[str]:
    """Paths that come from the build's context."""
    rests = [r for instructions in stages().values() for i, r in instructions if i == "COPY" and "--from=" not in r]
    return [source for rest in rests for source in [w for w in rest.split() if not w.startswith("--")][:-1]]


def test_what_is_copied_is_there_and_not_ignored() -> None:
    ignore = (ROOT / ".dockerignore").read_text().splitlines()
    kept = {line[1:] for line in ignore if line.startswith("!")}
    assert "*" in ignore
    for source in copied():
        assert (ROOT / source).exists(), source
        assert any(source == path or source.startswith(f"{path}/") for path in kept), f"{source} is ignored"
    for path in kept:
        assert any(source == path or source.startswith(f"{path}/") for source in copied()), f"{path} is not copied"


def test_what_is_copied_from_a_stage_was_made_by_one_before() -> None:
    seen: list[str] = []
    for name, instructions in stages().items():
        for _, rest in instructions:
            for source in re.findall(r"from=(\w+)", rest):
                assert source in seen, f"{name} copies from {source}"
        seen.append(name)


def test_every_room_is_in_the_images() -> None:
    rooms = {p.parent.name for p in ROOT.glob("*/__init__.py") if p.parent.name != "tests"} | {"operator"}
    assert rooms <= set(copied())


def installed(stage: str) -> str:
    """What the stage's own environment is given by name, beside BlueWhale."""
    names = []
    for command in (c for i, rest in stages()[stage] if i == "RUN" for c in rest.split("&&")):
        words = shlex.split(command)
        if words[:2] == ["pip", "install"] and "--target" not in words and "--no-deps" not in words:
            values = {words[i + 1] for i, word in enumerate(words[:-1]) if word.startswith("--")}
            names += [word for word in words[2:] if not word.startswith("--") and word not in values]
    return " ".join(names)


@pytest.mark.parametrize(
    ("stage", "modules"),
    [
        ("controllers", "bluewhale_operator.main bluewhale_operator.run_spec"),
        ("triton", "serving.pod serving.analyst serving.triton"),
    ],
)
def test_a_small_image_has_what_its_code_imports(stage: str, modules: str) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROBE, modules, installed(stage)],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]


def test_executors_are_started_as_spark_asks_for_it() -> None:
    script = (MANIFESTS / "images" / "executor.sh").read_text()
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0
    assert ("ENTRYPOINT", '["/opt/entrypoint.sh"]') in stages()["spark"]
