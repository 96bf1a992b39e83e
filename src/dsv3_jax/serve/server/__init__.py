"""The OpenAI-compatible server over a `Backend`: texts, grammars, admission, HTTP, metrics."""
