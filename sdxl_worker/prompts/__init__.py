"""From prompts to what the UNet reads, in steps that each can be asked alone.

    parse.parse(text, syntax)            -> ParsedPrompt: pieces (text, weight), BREAKs among them, and <kind:...> tags
    chunks.items_of(pieces, ...)         -> items: a token id, or an embedding's vectors, with a weight each
    chunks.chunks_of(items, ...)         -> chunks of 77 places: start, 75 places, end and padding
    encode.encode(pipeline, prompts,...) -> hidden states and pooled state, with the weights applied
    conditioning.applied(pipeline, ...)  -> the arguments that a diffusers call takes

Everything is done once for each text encoder with its own tokenizer; `encoder` is its name in the pipeline,
"text_encoder" or "text_encoder_2". A prompt that stock diffusers reads the same way is left to it, to the bit.

Textual inversion comes in through one object, `vectors.Embeddings`: `split(text, encoder)` gives the text of a piece in
order, as strings that are tokenised and as `Vectors(name, values)` that take the places of a word, values of shape
(n, the encoder's width). Pass it as `applied(pipeline, request, embeddings)`, and the same to `examined` and
`inspect.inspection`. What follows is done here: a Vectors part becomes one item of n places with its piece's weight,
which never straddles two chunks; the encoder then runs with a hook that puts the values into its token embedding's
output (`encode.vectors_in_place`). Tokenizer, token table and weights stay untouched. `NO_EMBEDDINGS` splits nothing.

Tags: under a1111 `parse` takes `<lora:...>`, `<lyco:...>` and `<hypernet:...>` out of the text and gives them as
`Tag(kind, body, text)`, in their order. `lora_tags.with_lora_tags` turns those of LoRAs into entries of the request.

Embeddings: `embedding_file` says what a file is, `bundled` what a LoRA file holds, `ready.make_ready` fetches and reads
those of a request, and `embeddings.PromptEmbeddings` is the object that finds all of them in the prompts.
"""

from sdxl_worker.prompts.conditioning import Conditioning, applied, encoded_now, examined
from sdxl_worker.prompts.inspect import inspection
from sdxl_worker.prompts.parse import ParsedPrompt, Piece, Tag, parse
from sdxl_worker.prompts.reading import tokenizers_of
from sdxl_worker.prompts.vectors import NO_EMBEDDINGS, Embeddings, Vectors

__all__ = [
    "NO_EMBEDDINGS",
    "Conditioning",
    "Embeddings",
    "ParsedPrompt",
    "Piece",
    "Tag",
    "Vectors",
    "applied",
    "encoded_now",
    "examined",
    "inspection",
    "parse",
    "tokenizers_of",
]
