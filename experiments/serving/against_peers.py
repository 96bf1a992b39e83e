"""Tokens a second of eight streams over HTTP, against transformers and llama.cpp on one checkpoint.

    python experiments/serving/against_peers.py --transformers-python A --llama-python B

A bench_tiny with random weights is saved as a Hugging Face checkpoint. `python serve.py` serves it
to eight clients, which stream their answers; `transformers` and llama.cpp make the same answers in
one batch, with no HTTP around them. They take turns, after an untimed round in which the greedy
tokens of all have to be the same.

A needs torch and transformers, B llama-cpp-python, gguf, numpy and safetensors; without one that
peer is left out. llama.cpp is timed as it comes, with a cache of 16 bits, which may part from the
others at near ties; in the untimed round it has one of 32.
"""

import argparse
import asyncio
import contextlib
import dataclasses
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

# A peer's interpreter runs this file too. What one side alone has is imported where it is used.

ROOT = Path(__file__).resolve().parents[2]
BATCH, PROMPT_TOKENS, NEW_TOKENS = 8, 16, 64
BAR = 2.5
"""Times transformers."""
STARTED = "dsv3 serve: "
PAUSE_SECONDS = 0.3
"""Before each turn, for the threads of the one before to sleep."""
PEERS = ("transformers", "llama.cpp")
WHOLE_NUMBERS = {
    "max_position_embeddings": "context_length",
    "num_hidden_layers": "block_count",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "vocab_size": "vocab_size",
    "num_attention_heads": "attention.head_count",
    "v_head_dim": "attention.value_length_mla",
    "q_lora_rank": "attention.q_lora_rank",
    "kv_lora_rank": "attention.kv_lora_rank",
    "qk_rope_head_dim": "rope.dimension_count",
    "first_k_dense_replace": "leading_dense_block_count",
    "n_routed_experts": "expert_count",
    "num_experts_per_tok": "expert_used_count",
    "n_shared_experts": "expert_shared_count",
    "moe_intermediate_size": "expert_feed_forward_length",
    "n_group": "expert_group_count",
    "topk_group": "expert_group_used_count",
}
"""Of config.json, and what llama.cpp calls them."""
Prompts = list[list[int]]
Generate = Callable[[Prompts, bool], list[list[int]]]
"""generate(prompts, is_exact): `NEW_TOKENS` greedy tokens of each."""
Ask = Callable[[Prompts, bool], dict[str, Any]]
"""The same of a process, with its `seconds` beside the `tokens`."""


# The checkpoint and its GGUF


def write_checkpoint(directory: Path) -> Any:
    """Writes a bench_tiny of random weights, norms and router bias too, with a tokenizer for it,
    which is returned."""
    sys.path[:0] = [str(ROOT)]  # for configs
    import jax
    from flax import nnx

    import dsv3_jax
    from configs.bench_tiny import config
    from dsv3_jax.data.tokenizer import train_tokenizer
    from dsv3_jax.model.transformer import Transformer

    shape = dataclasses.replace(config().model, initializer_range=0.05)
    model = Transformer(shape, rngs=nnx.Rngs(0))
    state, key = nnx.state(model), jax.random.key(1)
    leaves, structure = jax.tree.flatten(state)
    moved = [  # norms begin as ones, the router's bias as zeros
        leaf + 0.05 * jax.random.normal(jax.random.fold_in(key, i), leaf.shape, leaf.dtype)
        if leaf.ndim == 1
        else leaf
        for i, leaf in enumerate(leaves)
    ]
    nnx.update(model, jax.tree.unflatten(structure, moved))
    texts = [path.read_text() for path in sorted(Path(asyncio.__file__).parent.glob("*.py"))]
    tokenizer = train_tokenizer(texts, shape.vocab_size)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(Path(folder) / "tokenizer.json")
        dsv3_jax.save_hf(model, directory, "float32", tokenizer_from=folder)
    return tokenizer


def write_gguf(checkpoint: Path, target: Path) -> None:
    """The checkpoint as llama.cpp's `deepseek2`, all FP32, without its tokenizer."""
    import gguf  # pyright: ignore[reportMissingImports]
    from safetensors.numpy import load_file

    c = json.loads((checkpoint / "config.json").read_text())
    rank, rope, nope = c["kv_lora_rank"], c["qk_rope_head_dim"], c["qk_nope_head_dim"]
    heads = c["num_attention_heads"]
    w = gguf.GGUFWriter(target, "deepseek2")
    w.add_tokenizer_model("none")
    whole = {
        "attention.head_count_kv": 1,
        "attention.key_length": rank + rope,
        "attention.value_length": rank,
        "attention.key_length_mla": nope + rope,
        "expert_gating_func": gguf.ExpertGatingFuncType.SIGMOID,
    }
    whole |= {theirs: c[ours] for ours, theirs in WHOLE_NUMBERS.items()}
    for name, value in whole.items():
        w.add_uint32(f"deepseek2.{name}", value)
    w.add_layer_norm_rms_eps(c["rms_norm_eps"])
    w.add_rope_freq_base(c["rope_theta"])
    w.add_expert_weights_scale(c["routed_scaling_factor"])
    w.add_expert_weights_norm(True)
    tensors = {}
    for file in checkpoint.glob("*.safetensors"):
        tensors |= load_file(file)
    for name, values in gguf_tensors(tensors, c["num_hidden_layers"], heads, nope):
        w.add_tensor(name, values)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


def gguf_tensors(
    tensors: dict[str, Any], layers: int, heads: int, nope: int
) -> Iterator[tuple[str, Any]]:
    """Names and values as llama.cpp has them; kv_b_proj is cut for its absorbed attention."""
    import numpy as np

    for ours, theirs in (
        ("model.embed_tokens", "token_embd"),
        ("model.norm", "output_norm"),
        ("lm_head", "output"),
    ):
        yield f"{theirs}.weight", tensors[f"{ours}.weight"]
    plain = {
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.q_a_proj": "attn_q_a",
        "self_attn.q_a_layernorm": "attn_q_a_norm",
        "self_attn.q_b_proj": "attn_q_b",
        "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa",
        "self_attn.kv_a_layernorm": "attn_kv_a_norm",
        "self_attn.o_proj": "attn_output",
        "mlp.gate": "ffn_gate_inp",
    }
    plain |= {f"mlp.{part}_proj": f"ffn_{part}" for part in ("gate", "up", "down")}
    plain |= {
        f"mlp.shared_experts.{part}_proj": f"ffn_{part}_shexp" for part in ("gate", "up", "down")
    }
    for i in range(layers):
        layer, block = f"model.layers.{i}", f"blk.{i}"
        for ours, theirs in plain.items():
            if f"{layer}.{ours}.weight" in tensors:
                yield f"{block}.{theirs}.weight", tensors[f"{layer}.{ours}.weight"]
        kv_b = tensors[f"{layer}.self_attn.kv_b_proj.weight"]
        kv_b = kv_b.reshape(heads, -1, kv_b.shape[1])
        yield f"{block}.attn_k_b.weight", np.ascontiguousarray(kv_b[:, :nope].swapaxes(1, 2))
        yield f"{block}.attn_v_b.weight", np.ascontiguousarray(kv_b[:, nope:])
        bias = tensors.get(f"{layer}.mlp.gate.e_score_correction_bias")
        if bias is None:
            continue
        yield f"{block}.exp_probs_b.bias", bias
        experts = f"{layer}.mlp.experts"
        count = len(bias)
        for part in ("gate", "up", "down"):
            each = [tensors[f"{experts}.{e}.{part}_proj.weight"] for e in range(count)]
            yield f"{block}.ffn_{part}_exps.weight", np.stack(each)


# Peers, each in a process of its own


def transformers_generate(checkpoint: Path) -> Generate:
    """Greedy answers to a batch of prompts, by transformers as it comes."""
    import torch  # pyright: ignore[reportMissingImports]
    from transformers import AutoModelForCausalLM  # pyright: ignore[reportMissingImports]

    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None  # ends no answer

    def generate(prompts, is_exact):  # which it is always
        ids = torch.tensor(prompts)
        with torch.inference_mode():
            found = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=NEW_TOKENS,
                do_sample=False,
                pad_token_id=0,
            )
        return found[:, ids.shape[1] :].tolist()

    return generate


def llama_generate(checkpoint: Path) -> Generate:
    """Greedy answers to a batch of prompts, by llama.cpp's own calls."""
    import llama_cpp as ll  # pyright: ignore[reportMissingImports]
    import numpy as np

    file = checkpoint.with_suffix(".gguf")
    write_gguf(checkpoint, file)
    ll.llama_backend_init()
    parameters = ll.llama_model_default_params()
    parameters.n_gpu_layers = 0
    model = ll.llama_model_load_from_file(str(file).encode(), parameters)
    options = ll.llama_context_default_params()
    options.n_ctx = BATCH * (PROMPT_TOKENS + NEW_TOKENS)
    options.n_seq_max, options.kv_unified = BATCH, True
    options.n_threads = options.n_threads_batch = 2
    as_it_comes = ll.llama_init_from_model(model, options)
    options.type_k = options.type_v = ll.GGML_TYPE_F32
    options.flash_attn_type = ll.LLAMA_FLASH_ATTN_TYPE_DISABLED
    exact = ll.llama_init_from_model(model, options)
    if not (model and as_it_comes and exact):
        raise ValueError(f"{file} was not loaded, expected a model that llama.cpp takes")
    vocab = ll.llama_vocab_n_tokens(ll.llama_model_get_vocab(model))
    batch = ll.llama_batch_init(BATCH * PROMPT_TOKENS, 0, 1)

    def read(context, rows, first):
        """The next tokens after `rows`, whose tokens have the positions from `first` on."""
        at, ends = 0, []
        for sequence, tokens in enumerate(rows):
            for place, token in enumerate(tokens):
                batch.token[at], batch.pos[at] = token, first + place
                batch.n_seq_id[at], batch.seq_id[at][0] = 1, sequence
                batch.logits[at] = place == len(tokens) - 1
                at += 1
            ends.append(at - 1)
        batch.n_tokens = at
        if ll.llama_decode(context, batch) != 0:
            raise ValueError("llama_decode failed, expected room for every token")
        logits = [ll.llama_get_logits_ith(context, end) for end in ends]
        return [int(np.ctypeslib.as_array(each, (vocab,)).argmax()) for each in logits]

    def generate(prompts, is_exact):
        context = exact if is_exact else as_it_comes
        ll.llama_memory_clear(ll.llama_get_memory(context), True)
        made = [[token] for token in read(context, prompts, 0)]
        for step in range(NEW_TOKENS - 1):
            last = [row[-1:] for row in made]
            for row, token in zip(made, read(context, last, PROMPT_TOKENS + step), strict=True):
                row.append(token)
        return made

    return generate


def be_peer(name: str, checkpoint: Path) -> None:
    """Reads a batch of prompts a line, writes a line: how many seconds it took, and the tokens."""
    generate = (transformers_generate if name == PEERS[0] else llama_generate)(checkpoint)
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        started = time.perf_counter()
        tokens = generate(asked["prompts"], asked["is_exact"])
        seconds = time.perf_counter() - started
        print(json.dumps({"seconds": seconds, "tokens": tokens}), flush=True)


@contextlib.contextmanager
def peer(name: str, python: str, checkpoint: Path, errors: TextIO) -> Iterator[Ask]:
    """A peer in a process of its own. Raises ValueError where it does not start."""
    command = [python, __file__, "--be", name, str(checkpoint)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=errors, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        questions, answers = process.stdin, process.stdout

        def ask(prompts, is_exact):
            questions.write(json.dumps({"prompts": prompts, "is_exact": is_exact}) + "\n")
            questions.flush()
            return listen()

        def listen():
            line = answers.readline()
            if not line:
                raise ValueError(f"{name} of {python} ended, expected answers: {last_line(errors)}")
            return json.loads(line)

        try:
            listen()
            yield ask
        finally:
            questions.close()


# Ours


@contextlib.contextmanager
def server(checkpoint: Path, settings: Sequence[str], errors: TextIO) -> Iterator[tuple[str, int]]:
    """The URL of `python serve.py` for the checkpoint, and its process id. Raises ValueError where
    it does not start."""
    command = [sys.executable, "-u", str(ROOT / "serve.py"), str(checkpoint), "--port", "0"]
    command += [f"--set={setting}" for setting in settings]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as process:
        assert process.stdout is not None
        try:
            line = process.stdout.readline()
            if not line.startswith(STARTED):
                raise ValueError(f"serve.py ended, expected a server: {last_line(errors)}")
            yield line.partition(" at ")[2].split()[0], process.pid
        finally:
            process.terminate()


def last_line(errors: TextIO) -> str:
    """What a process that ended said last."""
    lines = Path(errors.name).read_text().splitlines()
    return lines[-1] if lines else "it said nothing"


async def stream(client: Any, prompt: list[int]) -> bytearray:
    """The events of one streamed answer, read when the clock has stopped."""
    body = {"prompt": prompt, "max_tokens": NEW_TOKENS, "temperature": 0, "ignore_eos": True}
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    content = bytearray()
    async with client.stream("POST", "/v1/completions", json=body) as response:
        response.raise_for_status()
        async for chunk in response.aiter_raw():
            content += chunk
    return content


def read_events(content: bytearray) -> str:
    """The text of a stream of events; its last has the usage."""
    lines = content.decode().split("\n\n")[:-2]  # without [DONE]
    events = [json.loads(line.removeprefix("data: ")) for line in lines]
    assert events[-1]["usage"]["completion_tokens"] == NEW_TOKENS
    return "".join(choice["text"] for event in events for choice in event["choices"])


async def ask_server(client: Any, prompts: Prompts) -> dict[str, Any]:
    """Seconds that eight streams took together, and their texts."""
    started = time.perf_counter()
    contents = await asyncio.gather(*(stream(client, prompt) for prompt in prompts))
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "texts": [read_events(content) for content in contents]}


async def engine_seconds(client: Any) -> list[float]:
    """Seconds in prompts, in decoding, and decoding steps so far, by the server's own count."""
    lines = (await client.get("/metrics")).text.splitlines()
    values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    names = ("prefill_seconds", "decode_seconds", "decode_steps")
    return [float(values[f"dsv3_{name}_total"]) for name in names]


# The comparison


def count_same(texts: list[str], rows: list[list[int]], tokenizer: Any) -> int:
    """Of how many answers the text is that of the tokens."""
    pairs = zip(texts, rows, strict=True)
    return sum(text == tokenizer.decode(row) for text, row in pairs)


async def take_turns(
    client: Any, peers: dict[str, Ask], prompts: Prompts, is_exact: bool
) -> tuple[dict[str, Any], str]:
    """What each has made of the prompts, ours first, and a line about our own engine."""
    before = await engine_seconds(client)
    await asyncio.sleep(PAUSE_SECONDS)
    found = {"ours": await ask_server(client, prompts)}
    after = await engine_seconds(client)
    reading, decoding, steps = (b - a for a, b in zip(before, after, strict=True))
    about = f"{reading:.3f} s in prompts, {decoding:.3f} in {steps:.0f} decode steps"
    for name, ask in peers.items():
        time.sleep(PAUSE_SECONDS)
        found[name] = ask(prompts, is_exact)
    return found, about


async def measure(
    url: str, peers: dict[str, Ask], tokenizer: Any, trials: int
) -> tuple[dict[str, list[float]], bool]:
    """Seconds of each, by name, and whether all tokens were the same in the untimed round."""
    import httpx

    chance = random.Random(0)
    seconds = {name: [] for name in ("ours", *peers)}
    is_same = True
    async with httpx.AsyncClient(base_url=url, timeout=300) as client:
        for trial in range(trials + 1):
            ids = range(6, tokenizer.vocab_size)  # behind the special tokens
            prompts = [chance.choices(ids, k=PROMPT_TOKENS) for _ in range(BATCH)]
            found, about = await take_turns(client, peers, prompts, trial == 0)
            rates = {name: BATCH * NEW_TOKENS / each["seconds"] for name, each in found.items()}
            line = ", ".join(f"{name} {rate:.0f} tokens/s" for name, rate in rates.items())
            same = {
                name: count_same(found["ours"]["texts"], found[name]["tokens"], tokenizer)
                for name in peers
            }
            print(f"{f'trial {trial}' if trial else 'untimed'}: {line} (the server: {about})")
            for name, count in same.items():
                print(f"  {count} of {BATCH} answers of {name} are ours")
            if trial == 0:
                is_same = all(count == BATCH for count in same.values())
                continue
            for name, each in found.items():
                seconds[name].append(each["seconds"])
    return seconds, is_same


def show(seconds: dict[str, list[float]]) -> None:
    """Medians, spreads, and the bar."""
    medians = {name: BATCH * NEW_TOKENS / statistics.median(each) for name, each in seconds.items()}
    for name, each in seconds.items():
        low, high = (BATCH * NEW_TOKENS / extreme for extreme in (max(each), min(each)))
        print(f"{name}: median {medians[name]:.0f} tokens/s [{low:.0f} to {high:.0f}],"
              f" ours {medians['ours'] / medians[name]:.2f} times")  # fmt: skip
    if PEERS[0] in medians:
        is_met = medians["ours"] >= BAR * medians[PEERS[0]]
        print(f"{BAR} times {PEERS[0]}: {'met' if is_met else 'NOT met'}")


def main() -> int:
    parser = argparse.ArgumentParser(description="Tokens a second over HTTP against peers'")
    parser.add_argument("--transformers-python", metavar="PATH")
    parser.add_argument("--llama-python", metavar="PATH")
    parser.add_argument("--trials", type=int, default=5)
    parser.add_argument("--set", action="append", default=[], metavar="serve.FIELD=VALUE")
    parser.add_argument("--be", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.be is not None:
        be_peer(options.be[0], Path(options.be[1]))
        return 0
    pythons = zip(PEERS, (options.transformers_python, options.llama_python), strict=True)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        errors = stack.enter_context((folder / "errors").open("w"))
        checkpoint = folder / "tiny"
        tokenizer = write_checkpoint(checkpoint)
        settings = [f"serve.slots={BATCH}", *options.set]
        url, _ = stack.enter_context(server(checkpoint, settings, errors))
        peers = {
            name: stack.enter_context(peer(name, python, checkpoint, errors))
            for name, python in pythons
            if python is not None
        }
        measured = measure(url, peers, tokenizer, options.trials)
        seconds, is_same = asyncio.run(measured)
    show(seconds)
    if not is_same:
        print("answers differ: these are not the same model")
    return 0 if is_same else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ValueError as error:
        print(f"against_peers.py: {error}", file=sys.stderr)
        sys.exit(2)
