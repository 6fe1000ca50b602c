"""Files as every family publishes them, written by the tests, each with the family's own equations beside it.

The equations are written from the families' definitions and share nothing with `SAE` or with the loaders.
"""

from tests.lookalikes import (
    circuit_tracer,
    dictionary_learning,
    gemma_scope,
    goodfire,
    llama_scope,
    openai,
    qwen_scope,
    saelens,
    single_files,
    sparsify,
)
from tests.lookalikes.base import LookAlike

MODULES = (
    goodfire,
    gemma_scope,
    circuit_tracer,
    saelens,
    dictionary_learning,
    openai,
    single_files,
    llama_scope,
    qwen_scope,
    sparsify,
)
LOOKALIKES: dict[str, LookAlike] = {like.name: like for module in MODULES for like in module.LOOKALIKES}
