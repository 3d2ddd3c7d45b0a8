"""The chat page in a browser, where there is one."""

import shutil
import subprocess

import pytest

from experiments.shared import serve_clients
from tests.serving.http_client import Served

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)


@pytest.mark.slow
@pytest.mark.skipif(
    BROWSER is None, reason="no chromium, chromium-browser or google-chrome in PATH"
)
def test_scripts_of_the_page_run_under_its_policy(tmp_path):
    with serve_clients.listening(Served().app) as url:
        command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
        command += [f"--user-data-dir={tmp_path}", "--virtual-time-budget=5000", url]
        found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert '<span id="model">tiny</span>' in found.stdout, "the page asks the server for its name"
