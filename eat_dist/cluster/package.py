"""What of the user's folder goes along with a job: code and configs, packed once, and no results, data or secrets."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ray._private.ray_constants import DASHBOARD_CLIENT_MAX_SIZE
from ray._private.thirdparty.pathspec import PathSpec

from eat_dist.errors import StorageError

# The form is that of .gitignore. What begins with / stays at home only at the top: the package has folders `data` and
# `runs`, and HTML of its own.
EXCLUDED = (
    # versions, environments, caches
    *(".git", ".hg", ".svn", ".venv", "venv", "__pycache__/", "*.py[co]", "*.egg-info/", "/build/", "/dist/"),
    *(".*_cache/", ".cache/", ".ipynb_checkpoints/", "node_modules/", ".idea/", ".vscode/", ".DS_Store"),
    # secrets
    *(".env", ".env.*", ".netrc", ".aws/", ".ssh/", ".ray/", "auth_token", "*.pem", "*.key"),
    # logs: one that grows while a job is submitted would change what is sent
    *("*.log", "*.out", "/logs/", "nohup.out"),
    # results and databases
    *(
        "*.db",
        "*.db-*",
        "*.sqlite*",
        "/runs/",
        "/bench/",
        "/evaluations/",
        "/sweeps/",
        "/studies/",
        "/mlruns/",
        "/mlartifacts/",
    ),
    *("/ray_results/", "/*.html", "*.parquet"),
    # data and weights
    *("/data/", "/datasets/", "/shards/", "*.zip", "*.tar", "*.tar.*", "*.tgz", "*.npy", "*.npz"),
    *("*.safetensors", "*.pt", "*.pth", "*.ckpt", "*.bin", "*.pkl"),
)
# Files of the user's that say more, with `!` in front also less.
IGNORE_FILES = (".gitignore", ".rayignore")
# What the head's dashboard takes in one request.
MAX_BYTES = DASHBOARD_CLIENT_MAX_SIZE
MAX_FILES = 20_000
_NAMED = 3


@dataclass(frozen=True)
class Package:
    """The files of a folder that go along.

    Attributes:
        root: The folder.
        files: Their paths below it, with ``/``, sorted.
        bytes: Their size in all.
    """

    root: Path
    files: tuple[str, ...]
    bytes: int

    def has(self, path: str | Path) -> bool:
        """Whether a file, or something in a folder, of that path below the root goes along."""
        wanted = Path(path).as_posix()
        return wanted == "." or any(file == wanted or file.startswith(f"{wanted}/") for file in self.files)

    def write(self, archive: Path) -> None:
        """Write a zip of them; the same content gives the same bytes, so Ray keeps it once.

        Raises:
            StorageError: A file cannot be read.
        """
        with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as zipped:
            for name in self.files:
                path = self.root / name
                entry = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
                entry.compress_type = zipfile.ZIP_DEFLATED
                try:
                    entry.external_attr = (0o755 if os.access(path, os.X_OK) else 0o644) << 16
                    zipped.writestr(entry, path.read_bytes())
                except FileNotFoundError:
                    continue  # deleted in the meantime
                except OSError as error:
                    raise StorageError(
                        f"cannot read '{path}', which would go along with the job: {error.strerror}; list it in "
                        f"'{self.root / '.rayignore'}' if it is not needed"
                    ) from error


def find_root(here: Path) -> Path:
    """The checkout of eat_dist that a folder is in, whose code then runs; else the folder itself."""
    return next((path for path in (here, *here.parents) if (path / "eat_dist" / "__init__.py").is_file()), here)


def collect(root: Path) -> Package:
    """Choose what goes along: everything but ``EXCLUDED`` and what ``IGNORE_FILES`` name.

    Raises:
        StorageError: There is no such folder, or it holds more than Ray takes; the largest files are named.
    """
    if not root.is_dir():
        raise StorageError(f"there is no folder '{root}' to send along; stand in your project, or give --working-dir")
    sizes: dict[str, int] = {}
    for path in _walk(root, root, [], frozenset()):
        sizes[path.relative_to(root).as_posix()] = path.stat().st_size
        if len(sizes) > MAX_FILES:
            raise StorageError(
                f"'{root}' holds more than {MAX_FILES} files that would go along with the job; stand in your project, "
                f"give --working-dir, or list what is not needed in '{root / '.rayignore'}'"
            )
    total = sum(sizes.values())
    if total > MAX_BYTES:
        largest = sorted(sizes, key=lambda name: -sizes[name])[:_NAMED]
        raise StorageError(
            f"'{root}' has {_mib(total)} to send along with the job, Ray takes {_mib(MAX_BYTES)}; the largest: "
            f"{', '.join(f'{name} ({_mib(sizes[name])})' for name in largest)}. List what is not needed in "
            f"'{root / '.rayignore'}', and put data on a shared disk or into a bucket"
        )
    return Package(root, tuple(sorted(sizes)), total)


def _walk(root: Path, folder: Path, above: list[tuple[Path, PathSpec]], seen: frozenset[str]) -> Iterator[Path]:
    """Files below a folder that nothing excludes; links are followed, but not in a circle."""
    real = os.path.realpath(folder)
    if real in seen:
        return
    lines = [*(EXCLUDED if folder == root else ())]
    for name in IGNORE_FILES:
        if (folder / name).is_file():
            lines += (folder / name).read_text(encoding="utf-8", errors="replace").splitlines()
    specs = [*above, (folder, PathSpec.from_lines("gitwildmatch", lines))] if lines else above
    try:
        paths = sorted(folder.iterdir())
    except OSError as error:
        raise StorageError(f"cannot list '{folder}', which would go along with the job: {error.strerror}") from error
    for path in paths:
        is_folder = path.is_dir()
        end = "/" if is_folder else ""
        if any(spec.match_file(f"{path.relative_to(base).as_posix()}{end}") for base, spec in specs):
            continue
        if is_folder:
            yield from _walk(root, path, specs, seen | {real})
        elif path.is_file():
            yield path


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"
