"""Single tokens as the API shows them."""

import codecs
from functools import cached_property

from dsv3_jax.data.tokenizer import Tokenizer


class Vocabulary:
    """Texts and bytes of single tokens."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer

    def text(self, token: int) -> str:
        """A token's text; of bytes that are no character, U+FFFD."""
        return self._tokenizer.decode([token], skip_special_tokens=False)

    def utf8(self, token: int) -> bytes:
        """A token's bytes, also where they are a part of a character."""
        text = self.text(token)
        if "\N{REPLACEMENT CHARACTER}" not in text:
            return text.encode("utf-8")
        written = self._tokenizer.backend.id_to_token(token) or ""
        if all(character in self._bytes for character in written):
            return bytes(self._bytes[character] for character in written)
        if written.startswith("<0x"):  # SentencePiece's
            return bytes.fromhex(written[3:-1])
        return text.encode("utf-8")

    def label(self, token: int) -> str:
        """A token's text for an object's key: bytes that are no character as `bytes:\\xe6`."""
        content = self.utf8(token)
        try:
            return codecs.decode(content, "utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)

    @cached_property
    def _bytes(self) -> dict[str, int]:
        """Byte-level BPE's alphabet: printable Latin-1 stands for itself, others follow U+0100."""
        printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
        others = [byte for byte in range(256) if byte not in printable]
        return {chr(byte): byte for byte in printable} | {
            chr(0x100 + number): byte for number, byte in enumerate(others)
        }
