"""Models that units make in no time, and requests for them."""

import dataclasses

import numpy as np
from flax import nnx
from jax.sharding import Mesh

from dsv3_jax.config import ModelConfig, ServeConfig
from dsv3_jax.model.spread import spread
from dsv3_jax.model.transformer import Transformer
from dsv3_jax.parallel.inference import inference_mesh
from dsv3_jax.serve.generate import generate
from dsv3_jax.serve.request import Request, SamplingParams

CONFIG = ModelConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    moe_intermediate_size=16,
    num_hidden_layers=1,
    first_k_dense_replace=1,
    num_attention_heads=2,
    q_lora_rank=None,
    kv_lora_rank=16,
    qk_nope_head_dim=8,
    qk_rope_head_dim=8,
    v_head_dim=8,
    n_routed_experts=8,
    num_experts_per_tok=2,
    n_group=2,
    topk_group=1,
    num_nextn_predict_layers=0,
    max_position_embeddings=96,
    initializer_range=0.2,  # so that choices are not close calls
    eos_token_id=None,
)
"""One dense layer: what compiles fast."""
WHOLE = dataclasses.replace(CONFIG, num_hidden_layers=2, num_nextn_predict_layers=1)
"""With experts, and an MTP module that guesses."""
SERVE = ServeConfig(
    slots=4,
    page_size=8,
    prefill_chunk=16,
    decode_steps=2,
    max_seq_len=96,
    disaggregated=True,
)


def make_model(config: ModelConfig = CONFIG, mesh: Mesh | None = None) -> Transformer:
    model = Transformer(config, rngs=nnx.Rngs(0))
    return model if mesh is None else spread(model, inference_mesh(mesh))


def random_requests(count: int, seed: int) -> list[Request]:
    """Half of them begin alike; one is of a single token; every third is drawn, and of 40 tokens,
    for `generate`."""
    rng = np.random.default_rng(seed)
    beginning = rng.integers(0, 64, 60).tolist()
    requests = []
    for number in range(count):
        is_drawn = number % 3 == 2
        length = 40 if is_drawn else 1 if number == 0 else int(rng.integers(1, 50))
        shared = int(rng.integers(0, length)) if number % 2 else 0
        prompt = beginning[:shared] + rng.integers(0, 64, length).tolist()[shared:]
        requests.append(
            Request(
                id=str(number),
                prompt=tuple(prompt),
                max_tokens=int(rng.integers(1, 40)),
                sampling=SamplingParams(temperature=0.8, top_k=20, seed=number)
                if is_drawn
                else SamplingParams(),
            )
        )
    return requests


def expected(model: Transformer, requests: list[Request]) -> dict[str, list[int]]:
    """`generate`'s answers: greedy ones in one batch, drawn ones each alone."""
    most = max(request.max_tokens for request in requests)
    greedy = [r for r in requests if not r.sampling.temperature]
    found = generate(model, [list(r.prompt) for r in greedy], most)
    answers = {r.id: tokens for r, tokens in zip(greedy, found, strict=True)}
    for request in (r for r in requests if r.sampling.temperature):
        s = request.sampling
        options = dict(temperature=s.temperature, top_p=s.top_p, top_k=s.top_k, seed=s.seed)
        (answers[request.id],) = generate(model, [list(request.prompt)], most, **options)
    return {r.id: answers[r.id][: r.max_tokens] for r in requests}
