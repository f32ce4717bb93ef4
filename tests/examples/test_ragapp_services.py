"""The local servers run in one process, say where they are, and stop cleanly."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from email.message import EmailMessage
from pathlib import Path

import httpx
import pytest

from examples.ragapp import mail, settings
from examples.ragapp.settings import ServicesNotRunningError, Settings
from tests.waiting import wait_until


@pytest.mark.parametrize("stop_by", [signal.SIGINT, signal.SIGTERM])
def test_services_answer_and_stop_when_told(config: Settings, stop_by: signal.Signals) -> None:
    """Both servers answer at the addresses in the file; a signal ends the process with 0 and removes the file."""
    environment = {**os.environ, "RAGAPP_HOME": str(config.home), "RAGAPP_STUB_SEED": "3"}
    process = subprocess.Popen([sys.executable, "-m", "examples.ragapp", "services"], env=environment)
    try:
        wait_until(config.services_file.exists, timeout=60)
        where = settings.addresses(config)

        refused = httpx.post(f"{where.llm_url}/nowhere", json={})
        mail.send(letter(), where.smtp_host, where.smtp_port)
    finally:
        process.send_signal(stop_by)

    assert process.wait(timeout=30) == 0
    assert refused.status_code == 404
    assert len(list((config.maildir / "new").iterdir())) == 1
    assert not config.services_file.exists()


def test_without_services_the_error_says_what_to_start(config: Settings) -> None:
    """Asking for addresses that nobody wrote down names the command and the variables."""
    with pytest.raises(ServicesNotRunningError, match=r"examples\.ragapp services.*RAGAPP_LLM_URL"):
        settings.addresses(config)


def test_servers_of_ones_own_need_no_services(tmp_path: Path) -> None:
    """The environment can name an endpoint and a mail server."""
    environment = {"RAGAPP_LLM_URL": "https://llm.example/v1", "RAGAPP_SMTP": "mail.example:25"}
    config = settings.read({"RAGAPP_HOME": str(tmp_path), **environment})

    assert settings.addresses(config) == settings.Addresses(
        llm_url="https://llm.example/v1", smtp_host="mail.example", smtp_port=25
    )


def letter() -> EmailMessage:
    return mail.compose("bob@example.org", "ann@example.org", "Hello", "Hello Ann")
