"""schemathesis on the published schema: what it forbids is refused, and nothing is a 5xx."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from dsv3_jax.config import ServeConfig
from tests.serve.server.live import serving, wait_for


@pytest.mark.slow
def test_the_schema_is_what_the_server_does(make, tmp_path):
    """All checks but one: a body may be within the schema and yet a 400, for rules that JSON Schema
    has no words for here (prompt and answer together are too long; logprobs that others need)."""
    app, backend = make(
        "the model of the experts",
        max_seq_len=300,
        slots=200,
        tokens_per_step=8,
        serve=ServeConfig(slots=200),
    )
    with serving(app) as url:
        ended = subprocess.run(
            [
                Path(sys.executable).with_name("schemathesis"),
                *("run", f"{url}/openapi.json", "--checks", "all"),
                *("--exclude-checks", "positive_data_acceptance"),
                *("--phases", "examples,coverage,fuzzing", "--max-examples", "60"),
                *("--seed", "1", "--request-timeout", "20", "--generation-database", "none"),
                "--no-color",
            ],
            capture_output=True,
            text=True,
            timeout=240,
            cwd=tmp_path,
        )
        wait_for(lambda: backend.open == 0)
    assert ended.returncode == 0, ended.stdout[-5000:]
    assert int(re.search(r"(\d+) generated", ended.stdout)[1]) > 500
    assert len(backend.requests) > 100  # so that it was not refusals alone
    assert {len(finishes) for finishes in backend.finishes.values()} == {1}


def test_the_schema_names_the_model_and_bounds_tokens(make, tokenizer):
    app, _ = make()
    schemas = app.openapi()["components"]["schemas"]
    chat = schemas["ChatBody"]["properties"]
    assert chat["model"] == {"enum": ["tiny", None]}
    tokens = schemas["DetokenizeBody"]["properties"]["tokens"]["items"]
    assert (tokens["minimum"], tokens["exclusiveMaximum"]) == (0, tokenizer.vocab_size)
    assert {"type": "null"} in chat["temperature"]["anyOf"]
    assert app.openapi()["paths"]["/v1/completions"]["post"]["requestBody"]["required"]
