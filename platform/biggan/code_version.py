"""Which code runs: the package's version, its commit, and hashes that tell what differs from it.

A submitted job runs a copy of the working tree in which there is nothing of git but the names of
commits (jobs/runtime_env.yaml): enough for the commit. `sources_sha256` says whether it ran that
commit's code: `python -m biggan.code_version` prints it for a checkout.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).parent


def code_version() -> dict[str, str]:
    """The package's `version`, the hash of its sources, and if known the `commit` they came from.

    In a git checkout that differs from the commit, `diff_sha256` is the hash of `git diff HEAD`.
    """
    version = {
        "version": package_version("biggan-platform"),
        "sources_sha256": sources_sha256(PACKAGE),
    }
    return version | (_of_checkout() or _of_shipped_tree(version["sources_sha256"]))


def package_version(package: str) -> str:
    """Version of an installed package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def sources_sha256(package: Path) -> str:
    """One hash of all of a package's Python files, their names and contents."""
    sources = {path.relative_to(package).as_posix(): path for path in package.rglob("*.py")}
    lines = [
        f"{hashlib.sha256(sources[name].read_bytes()).hexdigest()}  {name}\n"
        for name in sorted(sources)
    ]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _of_checkout() -> dict[str, str]:
    """What git says, if the package lies in a checkout; empty if not."""

    def git(*arguments: str) -> bytes:
        command = ["git", *arguments]
        return subprocess.run(command, cwd=PACKAGE, capture_output=True, check=True).stdout

    try:
        git("ls-files", "--error-unmatch", ".")  # Not merely installed inside a checkout.
        commit = git("rev-parse", "HEAD").decode().strip()
        difference = git("diff", "HEAD", "--", ".")
    except (OSError, subprocess.CalledProcessError):
        return {}
    if difference:
        return {"commit": commit, "diff_sha256": hashlib.sha256(difference).hexdigest()}
    return {"commit": commit}


def _of_shipped_tree(sources: str) -> dict[str, str]:
    """The commit of the working tree that was shipped with this very code; empty if none was."""
    for folder in map(Path, [".", *sys.path]):
        package, git = folder / "platform" / PACKAGE.name, folder / ".git"
        if (git / "HEAD").is_file() and sources_sha256(package) == sources:
            commit = _head(git)
            return {"commit": commit} if commit else {}
    return {}


def _head(git: Path) -> str:
    """The commit that HEAD names, directly or by a branch; empty if there is none yet."""
    head = (git / "HEAD").read_text().strip()
    if not head.startswith("ref: "):
        return head
    branch = head.removeprefix("ref: ")
    if (git / branch).is_file():
        return (git / branch).read_text().strip()
    packed = git / "packed-refs"
    lines = packed.read_text().splitlines() if packed.is_file() else []
    return next((line.split()[0] for line in lines if line.endswith(f" {branch}")), "")


if __name__ == "__main__":
    print(json.dumps(code_version(), indent=2))
