"""Twice as many short requests as the server can answer, a third of whose clients hang up.

    python experiments/serving/overload.py                    10,000 of them, a bench_tiny
    python experiments/serving/overload.py --checkpoint DIR --requests 600 --set serve.slots=4

First the capacity, with clients that wait for their answers; then Poisson arrivals at twice that,
which wait for nothing and never come again. Half of the answers are streamed. A line a thousand
requests, then which rules were broken, and exit code 1 if any was:

- no 5xx, no answer cut short, every 429 with a Retry-After;
- afterwards nothing waits or runs, no page is used, no connection is open, nothing was compiled;
  all pages can be had at once; the answers are those of before;
- resident memory is flat: from the first half to the second it grows by less than `GROWTH`.
"""

import argparse
import asyncio
import contextlib
import json
import random
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from against_peers import server, write_checkpoint

from dsv3_jax.config import RunConfig, ServeConfig, apply_overrides

PROMPT_TOKENS = 16
LAST_TOKENS, TRIES = 4, 20
LEAVING = 1 / 3
OVERLOAD = 2.0
SETTLE_SECONDS = 20
GROWTH = 0.03
"""Of the mean resident memory in the first half, its first fifth aside."""
SENT_SHARE = 0.9
"""Of the rate that was meant; with less the server was not overloaded as it should have been."""


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What became of one request."""

    what: str
    """answered, refused, left, or what was wrong."""
    text: str = ""


class Client:
    """Plain HTTP over a connection of its own for each request, as 10,000 clients would have."""

    def __init__(self, url: str):
        address = urlsplit(url)
        self._host, self._port = address.hostname, address.port

    async def get(self, path: str) -> tuple[int, bytes]:
        """The status and the body."""
        reader, writer = await asyncio.open_connection(self._host, self._port)
        writer.write(f"GET {path} HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n".encode())
        status, _, content = await _read(reader)
        writer.close()
        return status, content

    async def gauges(self) -> dict[str, float]:
        """Of /metrics, those without labels."""
        _, content = await self.get("/metrics")
        lines = [line for line in content.decode().splitlines() if line.startswith("dsv3_")]
        return {
            name.removeprefix("dsv3_"): float(value)
            for name, value in (line.split(" ") for line in lines)
            if "{" not in name
        }

    async def ask(
        self,
        prompt: list[int],
        *,
        stream: bool,
        new_tokens: int,
        patience: float | None = None,
        is_rude: bool = False,
    ) -> Seen:
        """One completion; with `patience` the client is gone after so many seconds, a rude one
        without closing its connection properly."""
        body = {"prompt": prompt, "max_tokens": new_tokens, "temperature": 0, "ignore_eos": True}
        content = json.dumps({**body, "stream": stream}).encode()
        head = (
            "POST /v1/completions HTTP/1.1\r\nhost: a\r\nconnection: close\r\n"
            f"content-type: application/json\r\ncontent-length: {len(content)}\r\n\r\n"
        )
        writer = None
        try:
            async with asyncio.timeout(patience):
                reader, writer = await asyncio.open_connection(self._host, self._port)
                writer.write(head.encode() + content)
                return judge(*await _read(reader), stream)
        except TimeoutError:
            if writer is not None and is_rude:
                writer.transport.abort()
            return Seen(what="left")
        except (OSError, asyncio.IncompleteReadError, ValueError) as error:
            return Seen(what=f"broken connection: {type(error).__name__}")
        finally:
            if writer is not None:
                writer.close()


async def _read(reader: asyncio.StreamReader) -> tuple[int, dict[str, str], bytes]:
    """Status, headers by their lower names, and the body without its chunks' frames."""
    first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().rstrip().split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (x.partition(":") for x in lines)}
    if headers.get("transfer-encoding") != "chunked":
        return int(first.split()[1]), headers, await reader.read()
    content = bytearray()
    while size := int(await reader.readuntil(b"\r\n"), 16):
        content += (await reader.readexactly(size + 2))[:-2]
    return int(first.split()[1]), headers, bytes(content)


def judge(status: int, headers: dict[str, str], content: bytes, stream: bool) -> Seen:
    """What a response was, to a request that wanted a whole answer or a stream."""
    if status == 429:
        after = headers.get("retry-after", "")
        is_right = after.isdecimal() and int(after) >= 1
        return Seen(what="refused" if is_right else "429 without Retry-After")
    if status != 200:
        return Seen(what=f"status {status}")
    lines = content.decode().removesuffix("\n\n").split("\n\n") if stream else []
    is_whole = lines[-1:] == ["data: [DONE]"]
    events = [json.loads(line.removeprefix("data: ")) for line in lines if line.endswith("}")]
    events = events if stream else [json.loads(content)]
    wrong = next((event["error"] for event in events if "error" in event), None)
    if wrong is not None:
        return Seen(what=f"status {wrong['code']} in a stream")
    if stream and not is_whole:
        return Seen(what="stream cut short")
    choices = [choice for event in events for choice in event["choices"]]
    if choices[-1]["finish_reason"] != "length":
        return Seen(what="answer cut short")
    return Seen(what="answered", text="".join(choice["text"] for choice in choices))


@dataclass(frozen=True, kw_only=True)
class Process:
    """What the kernel says of the server."""

    pid: int

    @property
    def resident_bytes(self) -> int:
        lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:")) * 1024

    @property
    def open_files(self) -> int:
        return len(list(Path(f"/proc/{self.pid}/fd").iterdir()))


@dataclass(kw_only=True)
class Overload:
    """The run over one server; what broke a rule is in `broken`."""

    client: Client
    process: Process
    serve: ServeConfig
    longest: int
    new_tokens: int
    chance: random.Random
    tokens: range
    broken: list[str]

    def prompt(self, length: int = PROMPT_TOKENS) -> list[int]:
        return self.chance.choices(self.tokens, k=length)

    async def ask(self, prompt: list[int], **options: Any) -> Seen:
        """One completion, as short as most are here."""
        return await self.client.ask(prompt, **{"new_tokens": self.new_tokens, **options})

    async def capacity(self, requests: int) -> float:
        """Answers a second of twice as many clients as there are slots."""
        left = iter(range(requests))

        async def ask_again() -> None:
            for number in left:
                seen = await self.ask(self.prompt(), stream=number % 2 == 0)
                self.check(seen, is_loaded=False)

        started = time.perf_counter()
        await asyncio.gather(*(ask_again() for _ in range(2 * self.serve.slots)))
        return requests / (time.perf_counter() - started)

    def check(self, seen: Seen, *, is_loaded: bool) -> None:
        """Notes what should not have been."""
        if seen.what not in ("answered", "refused", "left") or (
            seen.what == "refused" and not is_loaded
        ):
            self.broken.append(seen.what)

    async def overload(self, rate: float, requests: int, every: int) -> list[int]:
        """Resident bytes at each line."""
        longest_wait = (self.serve.slots + self.serve.max_queue) * OVERLOAD / rate
        counts: Counter[str] = Counter()
        sizes: list[int] = []
        tasks: list[asyncio.Task[None]] = []

        async def ask(number: int) -> None:
            leaves = self.chance.random() < LEAVING
            seen = await self.ask(
                self.prompt(),
                stream=number % 2 == 0,
                patience=self.chance.uniform(0, longest_wait) if leaves else None,
                is_rude=self.chance.random() < 0.5,
            )
            counts[seen.what] += 1
            self.check(seen, is_loaded=True)

        began = due = time.perf_counter()
        for number in range(1, requests + 1):
            due += self.chance.expovariate(rate)
            await asyncio.sleep(due - time.perf_counter())
            tasks.append(asyncio.create_task(ask(number)))
            if number % every == 0:
                sizes.append(
                    await self.show(number, number / (time.perf_counter() - began), counts)
                )
        seconds, meant = time.perf_counter() - began, due - began
        await asyncio.gather(*tasks)
        print(f"all: sent in {seconds:.1f} s, meant {meant:.1f};", _counted(counts))
        if meant < SENT_SHARE * seconds:
            self.broken.append(f"it took {seconds:.1f} s to send what was meant for {meant:.1f}")
        if not counts["refused"]:
            self.broken.append("nothing was refused, so there was no overload")
        return sizes

    async def show(self, number: int, rate: float, counts: Counter[str]) -> int:
        gauges, size = await self.client.gauges(), self.process.resident_bytes
        print(
            f"{number} sent, {rate:.1f} a second; {_counted(counts)}; resident"
            f" {size / 1e6:.1f} MB, {self.process.open_files} files; waiting"
            f" {gauges['waiting']:.0f}, running {gauges['running']:.0f}, pages"
            f" {gauges['pages_used']:.0f} used",
            flush=True,
        )
        return size

    async def settle(self) -> dict[str, float]:
        """The gauges once nothing is in work; what is still there after a while is noted."""
        ends = time.monotonic() + SETTLE_SECONDS
        while True:
            gauges = await self.client.gauges()
            left = {name: gauges[name] for name in ("waiting", "running", "pages_used")}
            if not any(left.values()) or time.monotonic() > ends:
                break
            await asyncio.sleep(0.1)
        self.broken += [f"{name} is {value:.0f}" for name, value in left.items() if value]
        status, _ = await self.client.get("/health")
        if status != 200:
            self.broken.append(f"/health says {status}")
        return gauges

    async def answers(self, prompts: list[list[int]]) -> list[str]:
        asked = [self.ask(prompt, stream=False) for prompt in prompts]
        seen = await asyncio.gather(*asked)
        for each in seen:
            self.check(each, is_loaded=False)
        return [each.text for each in seen]

    async def pages_at_once(self, pages: float) -> float:
        """The most pages seen in use while every slot has a prompt as long as there can be.

        A request has its pages from its beginning if few tokens are to come. As requests may end
        before one looks, they are asked again until all `pages` were seen.
        """
        most, prompt_tokens = 0.0, self.longest - LAST_TOKENS
        for _ in range(TRIES):
            prompts = [self.prompt(prompt_tokens) for _ in range(self.serve.slots)]
            asked = asyncio.gather(
                *(self.ask(each, stream=False, new_tokens=LAST_TOKENS) for each in prompts)
            )
            while not asked.done():
                most = max(most, (await self.client.gauges())["pages_used"])
            for seen in await asked:
                self.check(seen, is_loaded=False)
            if most >= pages:
                break
        return most

    async def run(self, requests: int, every: int) -> None:
        """All of it."""
        prompts = [self.prompt() for _ in range(self.serve.slots)]
        answers = await self.answers(prompts)
        before, files = await self.settle(), self.process.open_files
        capacity = await self.capacity(min(20 * self.serve.slots, requests))
        print(
            f"capacity {capacity:.1f} requests a second, {capacity * self.new_tokens:.0f} tokens/s"
        )
        sizes = await self.overload(OVERLOAD * capacity, requests, every)
        after = await self.settle()
        await asyncio.sleep(0.5)  # for sockets to be closed
        if self.process.open_files > files:
            self.broken.append(f"{self.process.open_files} files are open, {files} were")
        for name in ("compilations_total", "pages"):
            if before[name] != after[name]:
                self.broken.append(f"{name} was {before[name]:.0f} and is {after[name]:.0f}")
        most = await self.pages_at_once(after["pages"])
        print(f"afterwards {most:.0f} of {after['pages']:.0f} pages could be had at once")
        if most < after["pages"]:
            self.broken.append(f"only {most:.0f} of {after['pages']:.0f} pages could be had")
        if await self.answers(prompts) != answers:
            self.broken.append("answers are not those of before")
        await self.settle()
        self.judge_sizes(sizes)

    def judge_sizes(self, sizes: list[int]) -> None:
        half = len(sizes) // 2
        first, second = sizes[len(sizes) // 5 : half], sizes[half:]
        if not first:
            return
        growth = sum(second) / len(second) / (sum(first) / len(first)) - 1
        print(f"resident memory of the second half over the first: {growth:+.2%}")
        if growth > GROWTH:
            self.broken.append(f"resident memory grew by {growth:.1%}")


def _counted(counts: Counter[str]) -> str:
    return ", ".join(f"{count} {what}" for what, count in sorted(counts.items())) or "none ended"


async def measure(options: argparse.Namespace, url: str, pid: int, checkpoint: Path) -> list[str]:
    serve = apply_overrides(RunConfig(), options.set).serve
    shape = json.loads((checkpoint / "config.json").read_text())
    overload = Overload(
        client=Client(url),
        process=Process(pid=pid),
        serve=serve,
        new_tokens=options.new_tokens,
        longest=serve.longest(shape["max_position_embeddings"]),
        chance=random.Random(0),
        tokens=range(6, shape["vocab_size"]),
        broken=[],
    )
    await overload.run(options.requests, options.every)
    return overload.broken


def main() -> int:
    parser = argparse.ArgumentParser(description="Twice what the server can answer")
    parser.add_argument("--checkpoint", type=Path, help="(default: a bench_tiny, random weights)")
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--every", type=int, default=1000, help="requests a line")
    parser.add_argument("--set", action="append", default=[], metavar="serve.FIELD=VALUE")
    parser.add_argument("--log", type=Path, help="the server's log (default: nowhere)")
    options = parser.parse_args()
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        checkpoint = options.checkpoint or folder / "tiny"
        if options.checkpoint is None:
            write_checkpoint(checkpoint)
        log = stack.enter_context((options.log or folder / "log").open("w"))
        url, pid = stack.enter_context(server(checkpoint, options.set, log))
        broken = asyncio.run(measure(options, url, pid, checkpoint))
    for rule, count in Counter(broken).items():
        print(f"BROKEN: {rule}, {count} times")
    print("broken rules:", len(set(broken)) or "none")
    return 1 if broken else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ValueError as error:
        print(f"overload.py: {error}", file=sys.stderr)
        sys.exit(2)
