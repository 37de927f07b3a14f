"""Requests made up from the OpenAPI document: no failure of ours, and every answer fits it.

`make test-api` makes thousands of them, the default run a sample.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

EXAMPLES = int(os.environ.get("BIGGAN_API_EXAMPLES", "10"))
"""Of each operation, besides those that the document's bounds suggest."""
CHECKS = (
    "not_a_server_error,status_code_conformance,content_type_conformance,"
    "response_schema_conformance,response_headers_conformance"
)
SEARCHES = "^/v1/(invert|upscale)$"


def made_up(endpoint, folder, examples, *options):
    """Let Schemathesis make requests up; the number of them."""
    command = [
        *(Path(sys.executable).with_name("schemathesis"), "run", f"{endpoint}/openapi.json"),
        *("--max-examples", str(examples), "--seed", "1", "--suppress-health-check", "all"),
        *("--checks", CHECKS, "--continue-on-failure", *options),
    ]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:]
    [cases] = re.findall(r"([\d,]+) generated", done.stdout)
    return int(cases.replace(",", ""))


def test_answers_fit_the_document(endpoint, tmp_path):
    phases = "--phases", "examples,coverage,fuzzing"
    cases = made_up(endpoint, tmp_path, EXAMPLES, *phases, "--exclude-path-regex", SEARCHES)
    assert cases >= 11 * EXAMPLES


def test_answers_to_searches_fit_the_document(endpoint, tmp_path):
    """Fewer of them: each that is not refused is some seconds of work."""
    phases = "--phases", "examples,fuzzing"
    assert made_up(endpoint, tmp_path, 2, *phases, "--include-path-regex", SEARCHES) >= 2
