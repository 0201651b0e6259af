"""Hold the lines of scripts/Dockerfile: what it copies can be installed, and it installs what setup.py names."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from tests.helpers.ranks import REPOSITORY

_TEXT = (REPOSITORY / "scripts" / "Dockerfile").read_text()


def _instructions() -> list[tuple[str, str]]:
    lines = re.sub(r"^#.*\n", "", _TEXT, flags=re.MULTILINE).replace("\\\n", " ").splitlines()
    return [(line.partition(" ")[0], line.partition(" ")[2]) for line in lines if line.strip()]


def _all(name: str) -> list[str]:
    return [text for instruction, text in _instructions() if instruction == name]


def test_the_base_is_given_and_nothing_names_a_host() -> None:
    assert _instructions()[:2] == [("ARG", "BASE"), ("FROM", "${BASE}")]
    assert "://" not in re.sub(r"(dockerd|docker-daemon)://", "", _TEXT)
    assert not re.search(r"\b[\w-]+\.(com|io|org|net|ai)\b", _TEXT)


def test_fairseq_is_installed_by_hash_and_the_extras_exist() -> None:
    installs = [shlex.split(text) for text in _all("RUN") if "pip install" in text]
    first = ["--no-deps", "--require-hashes", "--only-binary", ":all:", "-r", "requirements/fairseq.txt"]
    assert [words[:4] for words in installs] == [["python", "-m", "pip", "install"]] * 2
    assert installs[0][4:] == first
    found = re.fullmatch(r"\.\[(.+)\]", installs[1][4])
    assert found is not None and len(installs[1]) == 5
    setup = (REPOSITORY / "setup.py").read_text()
    for extra in found[1].split(","):
        assert f'        "{extra}": ' in setup, extra
    assert "fairseq" in found[1].split(",")


def test_what_is_copied_is_all_that_an_installation_needs(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    for *sources, target in (text.split() for text in _all("COPY")):
        for source in sources:
            place = root / target / (Path(source).name if target.endswith("/") else "")
            if (REPOSITORY / source).is_dir():
                shutil.copytree(REPOSITORY / source, place, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                place.parent.mkdir(exist_ok=True, parents=True)
                shutil.copy(REPOSITORY / source, place)
    assert (root / "requirements/fairseq.txt").is_file()
    build = [sys.executable, "setup.py", "-q", "build", "--build-lib", str(tmp_path / "built")]
    subprocess.run(build, cwd=root, check=True, timeout=100, capture_output=True)
    built = {
        path.relative_to(tmp_path / "built") for path in (tmp_path / "built").rglob("*") if path.is_file()
    }
    wanted = {
        path.relative_to(REPOSITORY)
        for folder in ("fairseq_moe", "hydra_plugins")
        for path in (REPOSITORY / folder).rglob("*")
        if path.suffix in (".py", ".yaml")
    }
    assert built == wanted


def test_a_command_runs_as_it_is_given_from_any_directory() -> None:
    assert _all("ENTRYPOINT") == ["[]"]
    assert not _all("USER") and not _all("VOLUME")
    assert _all("WORKDIR")[-1] == "/"
    check = _all("RUN")[-1]
    # Imported after the sources are gone, or it would be they that are found.
    assert check.index("rm -r /opt/fairseq_moe") < check.index("import fairseq_moe, fairseq_cli.train")
