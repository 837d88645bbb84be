"""The wheel as the Dockerfile builds it, and the files that it must hold."""

import shutil
import subprocess
import sys
from pathlib import Path

from support.compose import ROOT, build_context


def build_wheel(folder: Path) -> Path:
    """Build from what .dockerignore lets through, as the Dockerfile does, without a network."""
    context, wheels = folder / "context", folder / "wheel"
    context.mkdir()
    for name in build_context():
        source = ROOT / name
        if source.is_dir():
            no_caches = shutil.ignore_patterns("__pycache__")
            shutil.copytree(source, context / name, symlinks=True, ignore=no_caches)
        else:
            shutil.copy(source, context / name)
    build = [sys.executable, "-P", "-m", "build", "--wheel", "--no-isolation", "--outdir"]
    done = subprocess.run(
        [*build, str(wheels), "."], cwd=context, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = wheels.iterdir()
    return wheel


def package_files() -> set[str]:
    """The files that git knows below src/tuneyard and below the folders linked there."""
    git = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard"]
    known = subprocess.run(git, check=True, capture_output=True, text=True).stdout.splitlines()
    package = ROOT / "src" / "tuneyard"
    links = {link.resolve().name: link.name for link in package.iterdir() if link.is_symlink()}
    linked = {
        f"tuneyard/{links[folder]}/{rest}"
        for folder, _, rest in (name.partition("/") for name in known)
        if folder in links
    }
    own = (name for name in known if name.startswith("src/") and not (ROOT / name).is_symlink())
    return linked | {name.removeprefix("src/") for name in own}
