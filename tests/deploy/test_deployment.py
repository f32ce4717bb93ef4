"""The files in deploy/: what can be checked without the machines that they are for."""

import re
import shutil
import subprocess
import sys
from configparser import RawConfigParser
from pathlib import Path
from typing import Any

import pytest
import yaml

from llmtasks.cli import procfile
from llmtasks.cli.procfile import Kind

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
SERVICES = sorted(DEPLOY.glob("*.service"))
COMPOSE: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
#: Seconds that a worker gives its runs, and as much again as it needs for the rest.
GRACE, MARGIN = 20, 30


class Unit(RawConfigParser):
    """A unit file: ini with repeated keys and case-sensitive names."""

    def __init__(self, path: Path) -> None:
        super().__init__(strict=False, delimiters=("=",), comment_prefixes=("#",), interpolation=None)
        self.optionxform = str  # type: ignore[assignment]
        self.read(path)


def variables(path: Path) -> set[str]:
    """Names in an example of an environment file, those that are commented out too."""
    return set(re.findall(r"^#?([A-Z][A-Z_]*)=", path.read_text(), re.MULTILINE))


def test_units_are_there() -> None:
    """One for each kind of process, and a target that wants them all."""
    assert [path.name for path in SERVICES] == [f"llmtasks-{name}.service" for name in ("beat", "flower", "worker")]
    assert Unit(DEPLOY / "llmtasks.target")["Unit"]["Wants"].split() == [
        f"llmtasks-{name}.service" for name in ("worker", "beat", "flower")
    ]


@pytest.mark.parametrize("path", SERVICES, ids=lambda path: path.stem)
def test_unit_stops_in_order_and_starts_again(path: Path) -> None:
    """SIGTERM to the main process alone, time for the runs to end, and a restart whatever happened."""
    service = Unit(path)["Service"]

    assert (service["KillSignal"], service["KillMode"], service["Restart"]) == ("SIGTERM", "mixed", "always")
    assert int(service["TimeoutStopSec"]) >= GRACE + MARGIN
    assert service["User"] != "root"
    assert service["NoNewPrivileges"] == "true"
    assert Unit(path)["Unit"]["PartOf"] == "llmtasks.target"


def test_dashboard_listens_on_this_machine_only() -> None:
    """It asks nobody for a password."""
    assert "--address=127.0.0.1" in Unit(DEPLOY / "llmtasks-flower.service")["Service"]["ExecStart"].split()


def test_systemd_accepts_the_units(tmp_path: Path) -> None:
    """systemd's own check; the programs' paths are replaced by those of this environment, which it looks for."""
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("systemd-analyze is not installed")
    for path in [*SERVICES, DEPLOY / "llmtasks.target"]:
        here = path.read_text().replace("/srv/llmtasks/.venv/bin", str(Path(sys.executable).parent))
        (tmp_path / path.name).write_text(here)

    checked = subprocess.run(
        [analyze, "verify", "--man=no", *map(str, sorted(tmp_path.iterdir()))],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )

    assert not [line for line in checked.stderr.splitlines() if "llmtasks" in line], checked.stderr
    assert checked.returncode == 0, checked.stderr


def test_environment_example_names_real_settings() -> None:
    """The two URLs, and nothing that nobody reads."""
    settings = (ROOT / "llmtasks" / "settings.py").read_text()
    names = variables(DEPLOY / "llmtasks.env.example")

    assert names >= {"LLMTASKS_DATABASE_URL", "LLMTASKS_BROKER_URL"}
    for name in names:
        assert f'get("{name.removeprefix("LLMTASKS_").lower()}"' in settings, name


def test_compose_accepts_the_file() -> None:
    """Compose's own check."""
    docker = shutil.which("docker")
    if docker is None or subprocess.run([docker, "compose", "version"], capture_output=True, check=False).returncode:
        pytest.skip("docker compose is not installed")
    command = [docker, "compose", "--env-file", ".env.example", "-f", "compose.yaml", "config", "--no-interpolate"]

    checked = subprocess.run(command, cwd=DEPLOY, capture_output=True, text=True, check=False, timeout=120)

    assert checked.returncode == 0, checked.stderr


def test_compose_runs_everything_and_two_beats() -> None:
    """Commands are those that people know, as lists, so that no shell stands between a signal and the process."""
    services = COMPOSE["services"]
    commands = {name: service["command"] for name, service in services.items() if "command" in service}

    assert [name for name, command in commands.items() if command[:2] == ["celery", "beat"]] == ["beat-1", "beat-2"]
    assert commands["worker"][:2] == ["celery", "worker"]
    assert commands["flower"][:2] == ["celery", "flower"]
    assert commands["migrate"] == ["celery", "llmtasks", "migrate"]
    assert all(isinstance(command, list) for command in commands.values())


def test_compose_waits_for_what_exists_and_says_when_it_is_ready() -> None:
    """Every dependency is a service, with a health check where its health is waited for."""
    services = COMPOSE["services"]
    for name, service in services.items():
        for other, how in service.get("depends_on", {}).items():
            assert other in services, f"{name} waits for {other}"
            if how["condition"] == "service_healthy":
                assert services[other]["healthcheck"]["test"], other
            elif how["condition"] == "service_completed_successfully":
                assert services[other]["restart"] == "no", other
    for name in ("worker", "beat-1", "beat-2", "flower"):
        assert services[name]["depends_on"]["migrate"] == {"condition": "service_completed_successfully"}
    assert "migrate" not in services["migrate"]["depends_on"]


def test_compose_opens_ports_to_this_machine_only() -> None:
    """Neither the broker nor the database is published at all."""
    services = COMPOSE["services"]

    published = {name: service["ports"] for name, service in services.items() if "ports" in service}

    assert list(published) == ["flower"]
    assert all(port.startswith("127.0.0.1:") for ports in published.values() for port in ports)


def test_compose_keeps_what_the_broker_and_the_database_took() -> None:
    """Append-only file, nothing evicted, and volumes that are declared."""
    services = COMPOSE["services"]
    command = services["redis"]["command"]

    assert command[command.index("--appendonly") + 1] == "yes"
    assert command[command.index("--maxmemory-policy") + 1] == "noeviction"
    for name in ("redis", "postgres"):
        assert services[name]["volumes"][0].split(":")[0] in COMPOSE["volumes"]


def test_compose_gives_runs_their_time_to_end() -> None:
    """Docker kills after stop_grace_period."""
    for name in ("worker", "beat-1", "beat-2", "flower"):
        assert int(COMPOSE["services"][name]["stop_grace_period"].removesuffix("s")) >= GRACE + MARGIN


def test_compose_variables_have_a_default_or_are_in_the_example() -> None:
    """Whoever copies the example is told of all that can be set; what is required says where."""
    text = re.sub(r"^\s*#.*$", "", (DEPLOY / "compose.yaml").read_text(), flags=re.MULTILINE).replace("$$", "")
    used = re.findall(r"\$\{(\w+)(:[-?])?", text)

    assert used
    for name, operator in used:
        assert operator == ":-" or name in variables(DEPLOY / ".env.example"), name
    assert not re.search(r"\$[A-Za-z_]", text), "a variable without braces"


def test_compose_uses_an_image_that_this_project_can_build() -> None:
    """The Dockerfile exists, what it copies exists and is not ignored, and the Python version is a supported one."""
    build = COMPOSE["services"]["worker"]["build"]
    dockerfile = (DEPLOY / build["context"] / build["dockerfile"]).resolve()
    text = dockerfile.read_text()
    kept = {line[1:] for line in (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines() if line.startswith("!")}

    copied = [name for line in re.findall(r"^COPY (.*) \S+$", text, re.MULTILINE) for name in line.split()]

    assert copied
    assert set(copied) <= kept
    # celeryconfig.py is the application's: it need not be there for the package to be.
    assert all((ROOT / name).exists() for name in copied if name != "celeryconfig.py")
    assert "FROM python:3.13-slim" in text
    extras = re.search(r"pip install \"\.\[(.*)\]\"", text)
    assert extras is not None
    pyproject = (ROOT / "pyproject.toml").read_text()
    assert all(re.search(rf"^{extra} = \[", pyproject, re.MULTILINE) for extra in extras[1].split(","))
    assert text.index("USER ") < text.index("CMD ")


def test_procfile_has_the_three_processes() -> None:
    """Its commands can be read, and the dashboard listens on this machine only."""
    entries = procfile.read(ROOT / "Procfile")

    assert [entry.kind for entry in entries] == [Kind.WORKER, Kind.BEAT, Kind.FLOWER]
    assert all(entry.command({})[1:3] == ["-m", "celery"] for entry in entries)
    assert entries[-1].option("address", {}) == "127.0.0.1"
