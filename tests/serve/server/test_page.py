"""The page at `/` in headless Chromium, over the scripted backend."""

import json
import shutil

import pytest

from dsv3_jax.config import ServeConfig
from dsv3_jax.serve.server.keys import make_key
from dsv3_jax.serve.server.templates import ChatTemplate
from tests.serve.server.live import serving, wait_for

pytestmark = pytest.mark.slow
ANSWER = "the experts returns é漢🙂 <b>to</b> the model\n"
TEMPLATE = "{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}"


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright  # of the extra `fuzz`, which only this needs

    path = shutil.which("chromium") or shutil.which("google-chrome")
    assert path is not None, "Debian's chromium is needed: apt-get install chromium"
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def page(browser):
    """A page that fails the test on any error, and on any request to another origin."""
    opened = browser.new_page(viewport={"width": 1240, "height": 800})
    troubles = []
    opened.on("pageerror", lambda error: troubles.append(str(error)))
    opened.on("console", lambda line: troubles.append(line.text) if line.type == "error" else None)
    opened.on(
        "request",
        lambda request: (
            None
            if request.url.startswith(("http://127.0.0.1", "data:"))
            else troubles.append(request.url)
        ),
    )
    opened.troubles = troubles
    yield opened
    opened.close()


def test_a_chat_streams_and_goes_on(page, make, tokenizer):
    template = ChatTemplate(TEMPLATE, tokenizer)
    app, backend = make(
        ANSWER, template=template, tokens_per_step=1, step_seconds=0.1, cached_tokens=3
    )
    with serving(app) as url:
        page.goto(url)
        page.get_by_text("tiny · up to 256 tokens").wait_for()
        assert page.locator("#mode").input_value() == "chat"
        page.locator("#prompt").fill("the <i>model</i>?")
        page.keyboard.press("Enter")
        answer = page.locator(".turn.assistant")
        seen = set()
        while "first token" not in (text := answer.text_content()):
            seen.add(text)
            page.wait_for_timeout(30)
        assert len(seen) > 4  # it grew before our eyes
        assert answer.text_content().startswith(ANSWER)  # as text: `<b>` is no markup
        assert "3 of them in the cache" in answer.text_content()
        assert page.locator(".turn.user").text_content() == "the <i>model</i>?"
        page.locator("#prompt").fill("to")
        page.locator("#send").click()
        wait_for(lambda: len(backend.requests) == 2)
        prompt = tokenizer.decode(backend.requests[1].prompt)
        assert prompt == f"user:the <i>model</i>?;assistant:{ANSWER};user:to;"
        page.locator("#state.ready").wait_for()
        page.locator("#tpot_p95", has_text="ms").wait_for()
        assert float(page.locator("#rate").text_content()) > 0
        assert page.locator("#acceptance").text_content() == "75 % (off)"
    assert page.troubles == []


def test_stop_cancels(page, make):
    app, backend = make("the " * 200, tokens_per_step=1, step_seconds=0.02)
    with serving(app) as url:
        page.goto(url)
        page.get_by_text("continues texts").wait_for()
        assert page.locator("#mode").input_value() == "complete"
        page.locator("#prompt").fill("the ")
        page.keyboard.press("Enter")
        page.locator(".turn.text mark").wait_for()
        wait_for(lambda: backend.open == 1)
        page.locator("#stop").click()
        page.locator(".turn small", has_text="stopped").wait_for()
        wait_for(lambda: backend.open == 0)
        assert list(backend.finishes.values()) == [["cancelled"]]
    assert page.troubles == []


def test_errors_are_shown_and_a_key_is_asked_for(page, make, tmp_path):
    secret, key = make_key("ann")
    file = tmp_path / "keys.jsonl"
    file.write_text(json.dumps({"name": key.name, "sha256": key.sha256}))
    app, _ = make("the model", serve=ServeConfig(slots=4, api_keys_file=str(file)))
    with serving(app) as url:
        page.goto(url)
        page.locator("#key").fill(secret)
        page.locator("#key").blur()
        page.get_by_text("tiny · up to").wait_for()
        page.locator("#tokens").fill("5000")
        page.locator("#prompt").fill("the")
        page.keyboard.press("Enter")
        page.locator(".turn.failed", has_text="maximum context length").wait_for()


def test_it_fits_a_phone_and_is_dark_in_the_dark(browser, make):
    app, _ = make("the model")
    with serving(app) as url:
        for scheme, is_dark in (("light", False), ("dark", True)):
            page = browser.new_page(viewport={"width": 380, "height": 700}, color_scheme=scheme)
            page.goto(url)
            page.get_by_text("continues texts").wait_for()
            assert page.evaluate("document.documentElement.scrollWidth") <= 380
            colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
            red = int(colour.removeprefix("rgb(").partition(",")[0])
            assert (red < 64) == is_dark
            page.close()
