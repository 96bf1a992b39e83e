"""A small tokenizer, and an application over a scripted backend."""

import pytest

from dsv3_jax.config import ServeConfig
from dsv3_jax.data.tokenizer import Tokenizer, train_tokenizer
from dsv3_jax.serve.server.app import make_app
from tests.serve.server.fake_backend import FakeBackend

TEXT = 'the model of the experts returns {"a": 1, "b": [true]} é漢🙂 to User: and Assistant:\n'


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return train_tokenizer([TEXT] * 3, vocab_size=400)


@pytest.fixture
def make(tokenizer):
    """make(text, ...) -> (application, backend) whose answers are `text` and the end token."""

    def build(text="the model", serve=None, template=None, **options):
        script = [*tokenizer.encode(text), tokenizer.eos_id]
        backend = FakeBackend(script=lambda _: script, **options)
        app = make_app(
            backend, tokenizer, serve or ServeConfig(slots=4), name="tiny", template=template
        )
        return app, backend

    return build
