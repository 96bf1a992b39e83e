"""Page ownership against a brute-force account of what every page holds."""

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from dsv3_jax.serve.pages import CopyPage, DropHost, FromHost, PagePool, ToHost

SIZE = 4


class Contents:
    """What is in the pages: each place has the tokens that its latent was computed of."""

    def __init__(self, pages: int):
        self.pages = [[None] * SIZE for _ in range(pages)]
        self.host: dict[bytes, list] = {}
        self.most_on_host = 0

    def move(self, pool: PagePool) -> None:
        for move in pool.take_moves():
            match move:
                case CopyPage(source, target):
                    self.pages[target] = list(self.pages[source])
                case ToHost(page, key):
                    self.host[key] = list(self.pages[page])
                case FromHost(key, page):
                    self.pages[page] = list(self.host[key])
                case DropHost(key):
                    del self.host[key]
            self.most_on_host = max(self.most_on_host, len(self.host))

    def read(self, holding, count: int) -> list:
        return [self.pages[holding.pages[i // SIZE]][i % SIZE] for i in range(count)]

    def write(self, holding, tokens: list[int], start: int) -> None:
        for i in range(start, len(tokens)):
            self.pages[holding.pages[i // SIZE]][i % SIZE] = tuple(tokens[: i + 1])


def test_a_prompt_finds_the_pages_of_one_that_began_alike():
    pool, contents = PagePool(8, SIZE, keeps_prefixes=True), Contents(8)
    first = list(range(10))
    holding, found = pool.take(first, 12)
    assert found == 0 and len(holding.pages) == 3
    contents.write(holding, first, 0)
    pool.publish(holding, first)
    pool.release(holding)
    assert (pool.used, pool.kept, pool.available) == (0, 2, 8)
    same, found = pool.take(first, 12)
    assert found == 8 and len(same.pages) == 3
    other = [*first[:6], 77, 78, 79]
    assert pool.matched(other) == 6
    copied, found = pool.take(other, 9)
    contents.move(pool)
    assert found == 6 and copied.pages[0] == same.pages[0] and copied.pages[1] != same.pages[1]
    assert contents.read(copied, 6) == [tuple(other[: i + 1]) for i in range(6)]
    pool.check([same, copied])


def test_the_last_token_is_never_found():
    pool = PagePool(8, SIZE, keeps_prefixes=True)
    prompt = list(range(8))
    holding, _ = pool.take(prompt, 8)
    pool.publish(holding, prompt)
    assert pool.matched(prompt) == 7  # one page whole, of the other three tokens are copied
    assert pool.matched(prompt[:1]) == 0


def test_without_kept_prefixes_nothing_is_found():
    pool = PagePool(8, SIZE, keeps_prefixes=False)
    holding, _ = pool.take(list(range(8)), 8)
    pool.publish(holding, list(range(8)))
    pool.release(holding)
    assert pool.matched(list(range(8))) == 0 and pool.kept == 0


def test_a_page_never_counts_for_what_comes_after_other_tokens():
    pool = PagePool(8, SIZE, keeps_prefixes=True)
    first = [1, 2, 3, 4, 5, 6, 7, 8]
    holding, _ = pool.take(first, 8)
    pool.publish(holding, first)
    assert pool.matched([9, 9, 9, 9, 5, 6, 7, 8, 0]) == 0


@pytest.mark.parametrize("host_pages", [0, 1, 3])
@settings(max_examples=30)
@given(data=st.data())
def test_every_page_is_accounted_for_and_holds_what_it_says(host_pages, data):
    """Random requests over few tokens, so that they often begin alike."""
    pages = data.draw(st.integers(2, 7))
    pool = PagePool(pages, SIZE, keeps_prefixes=True, host_pages=host_pages)
    contents, running = Contents(pages), []
    for _ in range(data.draw(st.integers(1, 25))):
        action = data.draw(st.sampled_from(["take", "take", "extend", "release"]))
        if action == "take":
            tokens = data.draw(st.lists(st.integers(0, 1), min_size=1, max_size=14))
            before = pool.available
            taken = pool.take(tokens, len(tokens))
            if taken is None:
                assert pool.available == before
                continue
            holding, found = taken
            assert found < len(tokens)
            contents.move(pool)
            expected = [tuple(tokens[: i + 1]) for i in range(found)]
            assert contents.read(holding, found) == expected
            contents.write(holding, tokens, found)
            pool.publish(holding, tokens)
            running.append((holding, tokens))
        elif running:
            index = data.draw(st.integers(0, len(running) - 1))
            holding, tokens = running[index]
            if action == "release":
                pool.release(holding)
                del running[index]
            elif pool.extend(holding, len(tokens) + 1):
                contents.move(pool)
                tokens.append(data.draw(st.integers(0, 1)))
                contents.write(holding, tokens, len(tokens) - 1)
                pool.publish(holding, tokens)
        contents.move(pool)
        pool.check([holding for holding, _ in running])
        assert set(contents.host) == set(pool._on_host) and len(contents.host) <= host_pages
        for holding, tokens in running:  # nobody has written into another's pages
            assert contents.read(holding, len(tokens)) == [
                tuple(tokens[: i + 1]) for i in range(len(tokens))
            ]
